"""Where the time of a step goes.

In:  steps as they are made. Out: a trace of some steps as files.
Knows nothing of models or data.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule


@contextmanager
def profiled(steps: int, folder: Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Trace some steps, from the fourth on: those before make memory and caches.

    Args:
        steps: how many.
        folder: gets trace.json, for https://ui.perfetto.dev, and operations.txt, what took how long in all.

    Yields:
        what to call after each step.
    """
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def written(found) -> None:
        folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(folder / "trace.json"))
        table = found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)
        (folder / "operations.txt").write_text(table, encoding="utf-8")
        log(f"{folder}: trace.json and operations.txt of {steps} steps\n{_top(found, by)}")

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    when = schedule(wait=2, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=when, on_trace_ready=written) as now:
        yield now.step


def _top(found, by: str) -> str:
    """The ten operations that took most time by themselves, a line each."""
    by = by.replace("cuda", "device")
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, by))
    total = sum(getattr(e, by) for e in events) or 1
    return "\n".join(
        f"  {getattr(e, by) / total:5.1%}  {getattr(e, by) / 1000:9.1f} ms  {e.count:6} x  {e.key[:60]}"
        for e in events[:10]
    )

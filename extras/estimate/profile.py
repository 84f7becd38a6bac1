"""How fast the machine could be, and where the time of a step goes.

In:  a device, steps as they are made. Out: FLOP/s of large matrix products; a trace of some steps as files.
Knows nothing of models or data.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of three: what a model FLOPs utilization (MFU) is a share of.

    Data sheets promise more than any product reaches (an H200 989 TFLOP/s in bf16, measured 791), and for CPUs nothing.
    """
    n = 8192 if device.type == "cuda" else 1024  # large enough to fill the device, 3 ms and 0.1 s
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(4):  # the first one sets things up
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        taken.append(time.perf_counter() - began)
    return 2 * n**3 / min(taken[1:])


@contextmanager
def profiled(steps: int, folder: Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Trace some steps, from the fourth on: those before make memory and caches.

    Args:
        steps: how many; 0: none.
        folder: gets trace.json, for https://ui.perfetto.dev, and operations.txt, what took how long in all.

    Yields:
        what to call after each step.
    """
    if not steps:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

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

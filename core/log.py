"""What a run says: lines for people (terminal and log.txt), records for programs (metrics.jsonl).

In:  the numbers of each step. Out: lines and records; only the first rank speaks.
Knows nothing of the loop or of trackers: they are given each record.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from core import files


class Log:
    """Args:
    folder: the run's.
    speak: whether this is the first rank.
    track: called with each record; it must neither raise nor wait.
    """

    def __init__(self, folder: Path, speak: bool, track: Callable[[dict], None] | None = None):
        self.speak, self.track, self.files, self.bar = speak, track, [], None
        self.window: list[dict] = []  # records of the steps since the last line
        self.val_loss: float | None = None
        if speak:
            # Line by line, so that a kill loses at most one.
            folder.mkdir(parents=True, exist_ok=True)
            names = ("log.txt", "metrics.jsonl")
            self.files = [open(folder / n, "a", encoding="utf-8", buffering=1) for n in names]  # noqa: SIM115

    def progress(self, total: int, done: int) -> None:
        """Show a bar with the time left, on a terminal only: in a file its redrawing would be noise."""
        if self.speak and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def __call__(self, line: str) -> None:
        if not self.speak:
            return
        self._write(0, line + "\n")
        # Where nobody reads our output any more, that is no reason to stop a week of training.
        with suppress(OSError, ValueError):
            tqdm.write(line) if self.bar else print(line, flush=True)

    def step(self, record: dict, every: int, steps: int, rest: Callable[[float, float], str]) -> None:
        """Take the record of a step; after every so many of them, and after the last, print a line.

        Args:
            record: step, loss, lr, grad_norm, targets, tokens, seconds; in fp16 also scale.
            steps: of the whole run.
            rest: (tokens per second, seconds left) -> what else the line says.
        """
        self.window.append(record)
        if self.bar:
            self.bar.update()
        # Means over the steps since the last line: one step alone says little.
        if record["step"] % every == 0 or record["step"] == steps:
            loss, seconds = (sum(r[key] for r in self.window) / len(self.window) for key in ("loss", "seconds"))
            per_second, left = record["tokens"] / max(seconds, 1e-9), (steps - record["step"]) * seconds
            val = f" val {self.val_loss:.4f}" if self.val_loss is not None else ""
            scale = f" scale {record['scale']:g}" if "scale" in record else ""
            line = f"step {record['step']}/{steps} loss {loss:.4f}{val} lr {record['lr']:.2e}"
            line += f" norm {record['grad_norm']:.2f} {per_second:,.0f} tokens/s"
            self(line + rest(per_second, left) + scale)
            self.window = []
        self.metrics(record)

    def metrics(self, record: dict) -> None:
        """Append a record to metrics.jsonl."""
        record = {key: plain(value) if isinstance(value, float) else value for key, value in record.items()}
        self.val_loss = record.get("val_loss", self.val_loss)
        if self.speak:
            self._write(1, json.dumps(record, allow_nan=False) + "\n")
            if self.track:
                self.track(record)

    def _write(self, which: int, text: str) -> None:
        # A full disk must not stop training here; saving a checkpoint will tell.
        with suppress(OSError):
            self.files[which].write(text)

    def rewind(self, step: int) -> None:
        """Take the records after `step` out of metrics.jsonl: the run goes on from there and will write them again."""
        if not self.speak:
            return
        path = Path(self.files[1].name)
        if not path.stat().st_size:
            return
        # Written anew without them, and opened again at its end.
        self.files[1].close()
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        files.write_text(path, "".join(line + "\n" for line in lines if self._step(line) <= step))
        self.files[1] = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    @staticmethod
    def _step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            # A kill, a full disk or a power cut tore the line.
            return math.inf

    def close(self) -> None:
        # Closing writes what the disk refused before.
        for f in self.files:
            with suppress(OSError):
                f.close()
        if self.bar:
            self.bar.close()


def plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

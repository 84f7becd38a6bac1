"""Contestants in turn: functions in this process, or processes that do a piece of work for each line they get.

In:  ways to do the same. Out: seconds of each round, and a table.
Knows nothing of what is timed.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# What device.keep_freed_memory does in a training run, for a process from its beginning.
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def rounds(ways: dict[str, Callable], number: int) -> dict[str, list[float]]:
    """Wall seconds of each way in each round, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(number + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[str, list[float]], size: int) -> dict:
    """Medians, spread, and the median of each round's ratio to the first way: drift cancels within a round."""
    first = next(iter(seconds))
    result = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], values)]
        result[name] = {
            "seconds": round(statistics.median(values), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
            "mb_per_s": round(size / 1e6 / statistics.median(values), 2),
            "times_first": round(statistics.median(ratios), 2),
        }
        print(
            f"{name:<30} {result[name]['seconds']:>8.2f} s ({min(values):.2f} to {max(values):.2f})"
            f" {result[name]['mb_per_s']:>7.1f} MB/s {result[name]['times_first']:>7.2f} x"
        )
    return result


def start(module: str, about: dict, env: dict | None = None) -> subprocess.Popen:
    """`python -m module` with these arguments: it works when it is asked."""
    words = [sys.executable, "-m", module, json.dumps(about)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def ask(name: str, process: subprocess.Popen) -> dict:
    """One piece of work, and what it took."""
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise UserError(f"{name} ended with code {process.wait()}")
    return json.loads(line)


def finish(process: subprocess.Popen) -> dict:
    """What a process says at its end."""
    return json.loads(process.communicate()[0])

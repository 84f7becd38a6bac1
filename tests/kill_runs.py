"""Ends a small run at random instants and starts it again until it is through, again and again.

    python tests/kill_runs.py FOLDER 2000               # 2,000 times SIGKILL
    python tests/kill_runs.py FOLDER 100 TERM INT       # one of these, and now and then a second one
    python tests/kill_runs.py FOLDER 0                  # killed at each file operation of a save, one after the other

After each death: what bears a checkpoint's name is whole, and the newest is not older than before. At the end of each
run: weights, moments, scaler and counters are those of an unbroken one, bit for bit. Prints figures as JSON.

One process with one thread, which itself never runs a backward pass, forks each life of the run: a tenth of a second
instead of the seconds in which an interpreter with torch starts.
"""

import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import small_run
import torch
import torch._dynamo  # optimizers import it when they are made: once here instead of in each life
from faulty_disk import FaultyDisk
from safetensors.torch import load_file

from core import checkpoint, errors, hf_folder
from core.guards import StopSignals

fork = multiprocessing.get_context("fork")
SAVING, LISTENING = 0, 1  # places in `flags`, which parent and child share: inside a save; signals are taken


def state_of(folder: Path, step: int) -> tuple[dict, dict, dict]:
    """Weights, moments, and scaler and counters of a checkpoint."""
    at = folder / f"checkpoint-{step}"
    state = json.loads((at / "state.json").read_text())
    return (
        load_file(at / "model.safetensors"),
        load_file(at / "optimizer.safetensors"),
        {k: state[k] for k in ("step", "rows_seen", "best", "overflows", "scaler")},
    )


def assert_equal(a: tuple, b: tuple) -> None:
    for one, other in zip(a[:2], b[:2]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert a[2] == b[2]


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, all of which are whole."""
    steps = hf_folder.checkpoint_steps(folder)
    for step in steps:
        assert hf_folder.verify(folder / f"checkpoint-{step}") is None, "a checkpoint that has its name must be whole"
    return steps


def live(folder: Path, flags: mmap.mmap, options: dict, at: int = 0) -> None:
    """One life, in a process of its own; with `at` it ends at that file operation of its first save."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    commit, enter, leave = checkpoint.Run._commit, StopSignals.__enter__, StopSignals.__exit__
    disk = FaultyDisk(at)

    def saving(run, *args):
        flags[SAVING], disk.on = 1, at > 0 and not disk.done
        commit(run, *args)
        flags[SAVING], disk.on = 0, False

    def entered(stop):
        found = enter(stop)
        flags[LISTENING] = 1
        return found

    def left(stop, *error):
        flags[LISTENING] = 0
        leave(stop, *error)

    checkpoint.Run._commit, StopSignals.__enter__, StopSignals.__exit__ = saving, entered, left

    def main() -> int:
        with disk:
            small_run.run(folder, **options)
        return 0

    errors.run(main)


def begin(folder: Path, flags: mmap.mmap, options: dict, at: int = 0):
    flags[SAVING] = flags[LISTENING] = 0
    process = fork.Process(target=live, args=(folder, flags, options, at))
    process.start()
    return process


def last_step(folder: Path) -> int:
    """Of metrics.jsonl; its last line may be half there."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def end(folder: Path, process, flags: mmap.mmap, signals: list, rng: random.Random, seconds: list) -> bool:
    """Send the signals, wait for the end and look at what it left; returns whether a save was under way."""
    listening, before, began = flags[LISTENING], last_step(folder), time.monotonic()
    for number, s in enumerate(signals):
        if number:
            process.join(rng.uniform(0, 0.03))
        if process.exitcode is None:
            os.kill(process.pid, s)
    process.join(60)
    assert process.exitcode is not None, "it did not end"
    if signals == [signal.SIGKILL] or len(signals) > 1 or not listening or process.exitcode == 0:
        return bool(flags[SAVING])
    assert process.exitcode == errors.Interrupted.exit_code or not flags[LISTENING], f"it ended with {process.exitcode}"
    if process.exitcode == errors.Interrupted.exit_code:
        saved = hf_folder.checkpoint_steps(folder)[-1]
        assert saved == last_step(folder) <= before + 2, "the step that ran and at most one that had just begun"
        seconds.append(time.monotonic() - began)
    return bool(flags[SAVING])


def at_random(home: Path, number: int, kinds: list) -> dict:
    rng, flags = random.Random(0), mmap.mmap(-1, 2)
    every = 1 if kinds == [signal.SIGKILL] else 7
    options = {"max_steps": 100, "save_every": every, "eval_every": 50, "micro_batch": 8, "dtype": "fp16"}
    small_run.bin_rows(home)
    begin(home / "unbroken", flags, options).join(120)
    unbroken = state_of(home / "unbroken", 100)
    ends, inside, runs, seconds = Counter(), 0, 0, []
    while sum(ends.values()) < number:
        folder, newest = home / f"run-{runs}", 0
        while True:
            process = begin(folder, flags, options)
            process.join(rng.uniform(0, 0.6) if sum(ends.values()) < number else 60)
            if process.exitcode is None:
                signals = [
                    rng.choice(kinds) for _ in range(1 if kinds == [signal.SIGKILL] or rng.random() < 0.7 else 2)
                ]
                inside += end(folder, process, flags, signals, rng, seconds)
            if process.exitcode == 0:
                break
            ends[process.exitcode] += 1
            steps = whole_steps(folder)
            assert max(steps, default=0) >= newest, "a checkpoint was lost"
            newest = max(steps, default=0)
        assert_equal(state_of(folder, 100), unbroken)
        assert not list(folder.glob(".t*"))
        runs += 1
    return {
        "ended": sum(ends.values()),
        "in a save": inside,
        "runs": runs,
        "exit codes": ends,
        "longest stop": round(max(seconds, default=0), 2),
    }


def at_each_operation(home: Path) -> dict:
    flags = mmap.mmap(-1, 2)
    options = {"max_steps": 4, "save_every": 1, "val": False, "eval_every": 99, "micro_batch": 8, "min_lr": 3e-3}
    small_run.bin_rows(home)
    begin(home / "unbroken", flags, options).join(60)
    begin(home / "begun", flags, options | {"max_steps": 2}).join(60)
    for at in range(1, 1000):
        folder = home / f"run-{at}"
        shutil.copytree(home / "begun", folder)
        process = begin(folder, flags, options, at)  # its first save is that of step 3, which deletes that of step 1
        process.join(60)
        if process.exitcode == 0:  # there are not so many
            return {"operations": at - 1}
        assert process.exitcode == -signal.SIGKILL and flags[SAVING]
        assert whole_steps(folder) in ([1, 2], [1, 2, 3], [2, 3])
        begin(folder, flags, options).join(60)
        assert whole_steps(folder) == [3, 4] and not list(folder.glob(".t*"))
        assert_equal(state_of(folder, 4), state_of(home / "unbroken", 4))
    raise AssertionError("no end")


if __name__ == "__main__":
    home, number = Path(sys.argv[1]), int(sys.argv[2])
    kinds = [signal.Signals[f"SIG{name}"] for name in sys.argv[3:] or ["KILL"]]
    print(json.dumps(at_random(home, number, kinds) if number else at_each_operation(home)))

"""Training survives: kills, signals, hanging and lost ranks, disks that refuse, damage, NaN, other numbers of ranks."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run
import torch
from faulty_disk import FaultyDisk
from kill_runs import assert_equal, last_step, state_of, whole_steps
from safetensors.torch import load_file
from small_run import SEQ_LEN
from test_trainer import launch, metrics

from assembly.models import load_model
from core import checkpoint, distributed, hf_folder
from core.data import step_rows
from core.device import choose_dtype
from core.errors import Diverged, UserError
from core.guards import StopSignals
from core.optim import LossScale
from trainer import next_token_loss

HERE = Path(__file__).resolve().parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------- kills and signals


def kill_runs(tmp_path, *words) -> dict:
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_runs.py"), str(tmp_path), *map(str, words)],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.heavy
def test_kills_at_random_instants_change_no_bit_and_lose_no_checkpoint(tmp_path, pytestconfig):
    kills = pytestconfig.getoption("kills")
    done = kill_runs(tmp_path, kills)
    assert done["ended"] == kills and done["exit codes"] == {"-9": kills}
    assert done["in a save"] >= kills / 5


@pytest.mark.heavy
def test_a_kill_at_any_file_operation_of_a_save_changes_no_bit_and_loses_no_checkpoint(tmp_path):
    assert kill_runs(tmp_path, 0)["operations"] > 50


@pytest.mark.heavy
def test_signals_at_random_instants_save_within_one_step_and_a_second_ends_at_once(tmp_path):
    done = kill_runs(tmp_path, 20, "TERM", "INT")
    assert done["exit codes"]["75"] >= 8 and done["exit codes"].keys() <= {"75", "-15", "-2", "130", "1"}
    assert done["longest stop"] < 10


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def rank(number: int, world: int, port: str, out_dir: Path, program: Path = HERE, **options) -> subprocess.Popen:
    """One rank, started by hand: its exit code is not torchrun's."""
    small_run.bin_rows(out_dir.parent)  # or both would make it
    names = {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, str(program / "small_run.py"), str(out_dir), json.dumps(options)],
        env=ONE_THREAD | names,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(ranks: int, out_dir: Path, *flags: str, **options) -> subprocess.Popen:
    small_run.bin_rows(out_dir.parent)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            *flags,
            str(HERE / "small_run.py"),
            str(out_dir),
            json.dumps(options),
        ],
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(true, seconds: float = 90) -> float:
    """Wait for something; returns how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.02)
    return time.monotonic() - began


def pids(out_dir: Path, ranks: int) -> list[int]:
    return [int(Path(f"{out_dir}.pid-{r}").read_text()) for r in range(ranks)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LONG = {"max_steps": 100_000, "save_every": 100_000, "eval_every": 100_000, "val": False}


@pytest.mark.heavy
def test_both_ranks_save_the_same_step_when_one_is_asked_to_stop(tmp_path):
    port = free_port()
    both = [rank(r, 2, port, tmp_path / "run", **LONG) for r in range(2)]
    until(lambda: last_step(tmp_path / "run") > 3)
    before = last_step(tmp_path / "run")
    both[1].send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=30)[1] for p in both]
    assert [p.returncode for p in both] == [75, 75], said
    step = last_step(tmp_path / "run")
    assert all(f"stopped: saved {tmp_path}/run/checkpoint-{step}," in s and "Traceback" not in s for s in said)
    assert whole_steps(tmp_path / "run") == [step] and step <= before + 50  # files are read later than steps are made


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_once_on_all_ranks(tmp_path, number):
    process = torchrun(2, tmp_path / "run", **LONG)
    until(lambda: last_step(tmp_path / "run") > 3)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    step = last_step(tmp_path / "run")
    assert said.count(f"stopped: saved {tmp_path}/run/checkpoint-{step},") == 2, said
    assert whole_steps(tmp_path / "run") == [step]
    assert process.returncode == 1  # torchrun's own, whatever its ranks' are


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_leaves_either_as_a_second_to_the_system(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.heavy
def test_a_second_signal_ends_the_ranks_at_once_with_the_last_checkpoint_whole(tmp_path):
    port = free_port()
    both = [rank(r, 2, port, tmp_path / "run", **LONG | {"save_every": 5}) for r in range(2)]
    until(lambda: last_step(tmp_path / "run") > 12)
    for p in both:
        os.kill(p.pid, signal.SIGSTOP)  # so that the second comes before the step is through
    for p in both:
        os.kill(p.pid, signal.SIGTERM)
        os.kill(p.pid, signal.SIGINT)
        os.kill(p.pid, signal.SIGCONT)
    began = time.monotonic()
    for p in both:
        p.communicate(timeout=30)
    # Two that are pending are handled together: each other signal sets its own.
    assert {p.returncode for p in both} <= {75, -signal.SIGTERM, -signal.SIGINT, 69} and time.monotonic() - began < 15
    assert whole_steps(tmp_path / "run")


@pytest.mark.heavy
@pytest.mark.parametrize(("ranks", "kills"), [(2, 3), (4, 1)])
def test_torchrun_restarts_killed_ranks_and_the_end_is_that_of_an_unbroken_run(tmp_path, ranks, kills):
    # The order of more than two summands is only fixed where it is asked for.
    options = {"max_steps": 120, "save_every": 7, "eval_every": 50, "micro_batch": 2, "deterministic": ranks > 2}
    launch(2 if ranks == 2 else 1, tmp_path / "unbroken", **options)  # in a fixed order one process has the same bits
    rng, out_dir, gone = random.Random(ranks), tmp_path / "run", []
    process = torchrun(ranks, out_dir, f"--max-restarts={kills}", **options)
    old = []
    for k in range(kills):
        goal = rng.randint(120 * k // kills + 1, 120 * (k + 1) // kills - 20)
        until(lambda: last_step(out_dir) >= goal and pids(out_dir, ranks) != old)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        old = pids(out_dir, ranks)
        os.kill(rng.choice(old), signal.SIGKILL)
        gone.append(until(lambda: not any(map(alive, old)), 30))  # noqa: B023
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, [line for line in said.splitlines() if "error" in line] + [said[-3000:]]
    print(f"{kills} kills, all {ranks} ranks gone within {max(gone):.2f} s")
    assert_equal(state_of(out_dir, 120), state_of(tmp_path / "unbroken", 120))
    assert "resumed from" in (out_dir / "log.txt").read_text() and pids(out_dir, ranks) != old


@pytest.mark.heavy
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_hanging_rank_is_named_with_what_the_other_waited_for(tmp_path, stopped):
    process = torchrun(2, tmp_path / "run", **LONG | {"timeout_s": 4})
    until(lambda: last_step(tmp_path / "run") > 3)
    began, hanging = time.monotonic(), pids(tmp_path / "run", 2)[stopped]
    os.kill(hanging, signal.SIGSTOP)
    other = pids(tmp_path / "run", 2)[1 - stopped]
    until(lambda: not alive(other), 30)
    seconds = time.monotonic() - began
    os.kill(hanging, signal.SIGKILL)  # torchrun would do so after 30 s
    said = process.communicate(timeout=60)[0]
    lines = [line for line in said.splitlines() if "error: rank" in line]
    assert len(lines) == 1 and f"rank {stopped} did not answer within timeout_s" in lines[0], said
    assert lines[0].split(": ")[1].startswith(f"rank {1 - stopped}, ") and "exitcode  : 69" in said
    assert any(op in lines[0] for op in ("the sum of gradients in backward", "all_reduce")), lines[0]
    assert "Traceback (most recent call last):\n  File" not in said.split("error: rank")[0]
    print(f"{seconds:.1f} s: {lines[0]}")


# ---------------------------------------------------------------- disks


BRIEF = {"batch_tokens": 2 * SEQ_LEN, "micro_batch": 2, "save_every": 1, "eval_every": 2}


@pytest.mark.heavy
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_any_one_operation_of_a_save_costs_no_older_checkpoint_and_no_step(
    tmp_path, number, monkeypatch
):
    options = BRIEF | {"val": False, "eval_every": 99, "min_lr": 3e-3}
    small_run.run(tmp_path / "unbroken", max_steps=4, **options)
    small_run.run(tmp_path / "begun", max_steps=2, **options)
    unbroken, survive, failed = state_of(tmp_path / "unbroken", 4), checkpoint.Run._survive, 0

    def first_only(run, what, warn, must, action):
        disk.on = what == "a checkpoint" and not disk.done
        saved = survive(run, what, warn, must, action)
        if disk.on:
            disk.on = False
            whole = whole_steps(run.folder)  # a deletion that fails comes after the new one is whole
            assert whole in (([1, 2], [1, 2, 3], [2, 3]) if not saved else ([2, 3],))
            assert not list(run.folder.glob(".t*")), "nothing half-made is left"
        return saved

    monkeypatch.setattr(checkpoint.Run, "_survive", first_only)
    for at in range(1, 1000):
        folder = tmp_path / f"run-{at}"
        shutil.copytree(tmp_path / "begun", folder)
        with FaultyDisk(at, number) as disk:
            small_run.run(folder, max_steps=4, **options)
        assert_equal(state_of(folder, 4), unbroken)
        assert whole_steps(folder) == [3, 4] or whole_steps(folder) == [2, 4]
        told = (folder / "log.txt").read_text().count("warning: a checkpoint could not be saved")
        if len(disk.done) < at:
            break
        assert told <= 1
        failed += told
    assert at > 50 and failed >= at - 10, "a few of them have a second way to do the same"
    print(f"{at - 1} operations, {failed} saves failed")


@pytest.mark.heavy
def test_a_disk_that_refuses_any_one_operation_leaves_a_model_that_loads(tmp_path, monkeypatch):
    options = BRIEF | {"save_every": 99, "min_lr": 3e-3}
    small_run.run(tmp_path / "unbroken", max_steps=4, **options)
    small_run.run(tmp_path / "begun", max_steps=2, **options)
    publish, whole = checkpoint.Run.publish, load_file(tmp_path / "unbroken/checkpoint-4/model.safetensors")

    def watched(run, strategy, facts, warn, must=False):
        disk.on = True
        saved = publish(run, strategy, facts, warn, must=False)
        disk.on = False
        assert not list(run.folder.glob(".t*"))
        load_model(run.folder)
        return saved

    monkeypatch.setattr(checkpoint.Run, "publish", watched)
    for at in range(1, 1000):
        shutil.copytree(tmp_path / "begun", tmp_path / f"run-{at}")
        with FaultyDisk(at, errno.ENOSPC) as disk:
            small_run.run(tmp_path / f"run-{at}", max_steps=4, **options)
        weights = load_file(tmp_path / f"run-{at}/checkpoint-4/model.safetensors")
        assert all(torch.equal(t, whole[name]) for name, t in weights.items())
        if len(disk.done) < at:
            break
    assert at > 30


def test_a_real_limit_on_file_sizes_is_survived(tmp_path):
    """The kernel's own refusal, inside safetensors too."""
    usual, calls = resource.getrlimit(resource.RLIMIT_FSIZE), 0

    def limiting(model, batch):
        nonlocal calls
        calls += torch.is_grad_enabled()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if calls in (3, 4) else usual[0], usual[1]))
        return next_token_loss(model, batch)

    try:
        small_run.run(tmp_path / "run", max_steps=6, keep=9, val=False, loss=limiting, **BRIEF | {"eval_every": 99})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert whole_steps(tmp_path / "run") == [1, 2, 5, 6] and not list((tmp_path / "run").glob(".t*"))
    assert (tmp_path / "run/log.txt").read_text().count("warning: a checkpoint could not be saved") == 2


def test_a_thousand_damages_of_checkpoint_files_are_named_and_the_one_before_is_used(tmp_path):
    small_run.run(tmp_path / "run", max_steps=2, val=False, save_every=1)
    folder, rng = tmp_path / "run/checkpoint-2", random.Random(0)
    names = sorted(os.listdir(folder))
    assert len(names) > 6
    run = checkpoint.Run(tmp_path / "run", {}, {}, None)
    for k in range(1000):
        path = folder / rng.choice(names)
        data = path.read_bytes()
        damage = rng.choice(("flip", "flip", "cut", "gone", "grown"))
        at = rng.randrange(len(data) - 1)
        if damage == "flip":
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        elif damage == "gone":
            path.unlink()
        else:
            path.write_bytes(data[:at] if damage == "cut" else data + b"x")
        said = []
        assert run.newest(said.append) == tmp_path / "run/checkpoint-1", (k, damage, path.name, at)
        assert len(said) == 1 and str(folder) in said[0] and (path.name in said[0] or path.name == "manifest.json"), (
            said
        )
        path.write_bytes(data)
    assert run.newest(print) == folder
    run.close()


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path):
    small_run.run(tmp_path / "run", max_steps=2, val=False, save_every=1)
    (tmp_path / "run/checkpoint-2/state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2: state.json is missing -- --resume auto"):
        small_run.run(tmp_path / "run", max_steps=3, val=False, resume=str(tmp_path / "run/checkpoint-2"))
    (tmp_path / "run/checkpoint-1/stray").write_text("")
    with pytest.raises(UserError, match=r"checkpoint-1: stray is not in manifest\.json"):
        small_run.run(tmp_path / "run", max_steps=3, val=False, resume=str(tmp_path / "run/checkpoint-1"))


def test_a_second_trainer_is_refused_with_the_process_of_the_first(tmp_path):
    small_run.run(tmp_path / "run", max_steps=1, val=False)
    run = checkpoint.Run(tmp_path / "run", {}, {}, None)
    second = subprocess.run(
        [sys.executable, str(HERE / "small_run.py"), str(tmp_path / "run"), "{}"],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=60,
    )
    run.close()
    assert (
        second.returncode == 2
        and second.stderr == f"error: {tmp_path}/run is in use by process {os.getpid()} -- another --out_dir?\n"
    )


def test_a_copied_run_goes_on_bit_for_bit(tmp_path):
    options = {"max_steps": 6, "save_every": 2, "min_lr": 3e-3, "val": False, "keep": 3}
    small_run.run(tmp_path / "run", **options)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)  # all times are new
    shutil.rmtree(tmp_path / "copy/checkpoint-6")
    small_run.run(tmp_path / "copy", **options)
    assert_equal(state_of(tmp_path / "copy", 6), state_of(tmp_path / "run", 6))


# ---------------------------------------------------------------- another number of ranks


@pytest.mark.heavy
def test_a_run_goes_on_with_one_two_four_and_one_ranks_over_the_same_ids_and_losses(tmp_path):
    options = {"save_every": 25, "eval_every": 100, "val": False, "min_lr": 3e-3, "micro_batch": 2}
    launch(1, tmp_path / "one", max_steps=100, **options)
    dealt = []
    for steps, ranks in ((25, 1), (50, 2), (75, 4), (100, 1)):
        launch(ranks, tmp_path / "many", max_steps=steps, **options)
        seen = [json.loads((tmp_path / f"many/seen-{r}.json").read_text()) for r in range(ranks)]
        dealt += [piece for turn in zip(*seen) for piece in turn]
    assert dealt == json.loads((tmp_path / "one/seen-0.json").read_text()) and len(dealt) == 400
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert len(one) == len(many) == 100
    assert max(abs(a - b) / a for a, b in zip(one, many)) <= 1e-6


def test_other_batches_go_on_at_the_next_row_and_each_row_comes_once_an_epoch(tmp_path):
    seen, steps, rng = [], 0, random.Random(0)

    def watching(model, batch):
        seen.extend(batch.rows)
        return next_token_loss(model, batch)

    for rows, micro in ((8, 2), (4, 4), (16, 2), (6, 3), (2, 1)):
        steps += rng.randint(1, 6)
        small_run.run(
            tmp_path / "run",
            max_steps=steps,
            batch_tokens=rows * SEQ_LEN,
            micro_batch=micro,
            val=False,
            loss=watching,
        )
    n = len(small_run.bin_rows(tmp_path))
    assert seen == step_rows(0, len(seen), n, seed=1)
    assert len(set(seen[:n])) == min(n, len(seen))


# ---------------------------------------------------------------- numbers that are none


def injector(rng: random.Random, model, where: str, at: int, value: float):
    """A loss function whose `at`-th training call has a bad loss, or a bad number somewhere in a gradient."""
    calls = 0
    parameters = list(model.parameters())

    def injected(model, batch):
        nonlocal calls
        calls += torch.is_grad_enabled()
        loss = next_token_loss(model, batch)
        if not torch.is_grad_enabled() or calls != at:
            return loss
        if where == "loss":
            return loss * value
        p = rng.choice(parameters)

        def poke(grad):
            grad = grad.clone()
            grad.view(-1)[rng.randrange(grad.numel())] = value
            hook.remove()
            return grad

        hook = p.register_hook(poke)
        return loss

    return injected


VALUES = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_250_bad_numbers_are_never_applied_and_told_with_all_there_is_to_know(tmp_path, dtype):
    rng, options = (
        random.Random(0),
        {"batch_tokens": 2 * SEQ_LEN, "micro_batch": 1, "val": False, "save_every": 99, "eval_every": 99},
    )
    start = small_run.small_model()
    for k in range(250):
        model, steps = small_run.small_model(), rng.randint(1, 3)
        where, before = rng.choice(("loss", "gradient")), {}

        bad = injector(rng, model, where, 2 * steps - rng.randint(0, 1), rng.choice(VALUES))

        def loss(model, batch, bad=bad, before=before):
            if len(before.setdefault("rows", [])) % 2 == 0:
                before["weights"] = [t.detach().clone() for t in model.parameters()]
            before["rows"] += batch.rows
            return bad(model, batch)

        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with pytest.raises(Diverged) as caught:
            small_run.run(tmp_path / "run", model=model, dtype=dtype, loss=loss, max_steps=9, **options)
        assert caught.value.exit_code == 3
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before["weights"])), (k, where)
        assert steps == 1 or not torch.equal(model.lm_head.weight, start.lm_head.weight)
        said, rows = str(caught.value), before["rows"][-2:]
        assert (
            said.startswith(f"step {steps}: loss ")
            and "gradient norm " in said
            and f"lr {min(steps, 2) * 1.5e-3:.1e}"[:6] in said
        )
        assert f"rows {rows}" in said and all(f"small.bin: tokens {i * SEQ_LEN} to" in said for i in rows)
        noted = json.loads((tmp_path / "run/diverged.json").read_text())
        assert list(noted["rows"]) == [str(i) for i in rows] and noted["what"] in said


def test_500_overflows_of_fp16_are_counted_and_never_applied(tmp_path, monkeypatch):
    """One step in two is bad, at random; the scale stays up."""
    rng, model = random.Random(0), small_run.small_model()
    monkeypatch.setattr(LossScale, "update", lambda self, finite: outcomes.append(finite))
    outcomes, weights, bad_steps, checked = [], [], [], 0

    def loss(model, batch):
        nonlocal checked
        now = [p.detach().clone() for p in model.parameters()]
        if outcomes:
            same = all(torch.equal(a, b) for a, b in zip(now, weights.pop()))
            assert same == (not outcomes[-1]) and same >= bad_steps[-1]  # now and then there is a real overflow
            checked += same
        weights.append(now)
        bad_steps.append(rng.random() < 0.5)
        if not bad_steps[-1]:
            return next_token_loss(model, batch)
        return injector(rng, model, rng.choice(("loss", "gradient")), 1, rng.choice(VALUES))(model, batch)

    small_run.run(
        tmp_path / "run",
        model=model,
        dtype="fp16",
        loss=loss,
        max_steps=1001,
        val=False,
        save_every=9999,
        eval_every=9999,
        batch_tokens=SEQ_LEN,
        micro_batch=1,
    )
    assert checked >= 450 and len(outcomes) == 1001


def test_overflows_without_end_stop_with_the_scale_and_twenty_in_a_row_are_too_many(tmp_path, monkeypatch):
    bad = lambda m, b: next_token_loss(m, b) * math.inf  # noqa: E731
    with pytest.raises(Diverged, match=r"step 17: loss inf.*, scale 0.5; rows") as caught:
        small_run.run(tmp_path / "a/run", dtype="fp16", max_steps=99, val=False, loss=bad)
    assert caught.value.exit_code == 3 and metrics(tmp_path / "a/run", "scale")[-1] == 1
    monkeypatch.setattr(LossScale, "update", lambda self, finite: None)
    with pytest.raises(Diverged, match=r"step 21: .* scale 65536"):
        small_run.run(tmp_path / "b/run", dtype="fp16", max_steps=99, val=False, loss=bad)


@pytest.mark.heavy
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_bad_number_on_one_rank_stops_both_before_the_update(tmp_path, parallel):
    port = free_port()
    options = {"max_steps": 9, "save_every": 2, "val": False, "parallel": parallel, "bad": {"rank": 1, "call": 7}}
    both = [rank(r, 2, port, tmp_path / "run", **options) for r in range(2)]  # two micro-batches a step: in step 4
    said = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [3, 3], said
    assert all("error: step 4: loss nan" in s and "Traceback" not in s for s in said)
    assert whole_steps(tmp_path / "run") == [2]


def test_a_spike_is_told_and_stops_on_request(tmp_path):
    def spike_at(number, factor=3.0):
        calls = 0

        def loss(model, batch):
            nonlocal calls
            calls += 1
            return next_token_loss(model, batch) * (factor if calls == number else 1)

        return loss

    options = {
        "val": False,
        "eval_every": 999,
        "save_every": 139,
        "batch_tokens": SEQ_LEN,
        "micro_batch": 1,
        "max_steps": 150,
    }
    for name, at in (("early", 100), ("late", 140)):  # before the 129th there is too little to compare it with
        small_run.run(tmp_path / name / "run", loss=spike_at(at), **options)
        told = [line for line in (tmp_path / name / "run/log.txt").read_text().splitlines() if "sigma" in line]
        assert [line.split(": loss")[0] for line in told] == (["warning: step 140"] if name == "late" else [])
    usual = torch.tensor(metrics(tmp_path / "late/run")[11:140], dtype=torch.float64)
    mean, sigma = usual[:-1].mean(), usual[:-1].std(correction=0)
    plain = float(usual[-1]) / 3
    for sigmas in (5.9, 6.1):
        small_run.run(tmp_path / f"{sigmas}/run", loss=spike_at(140, float(mean + sigmas * sigma) / plain), **options)
        assert ("sigma" in (tmp_path / f"{sigmas}/run/log.txt").read_text()) == (sigmas > 6)
    model = small_run.small_model()
    with pytest.raises(Diverged, match=r"step 140: loss 1\d\.\d+ is above"):
        small_run.run(tmp_path / "stop/run", model=model, loss=spike_at(140), stop_at_spike=True, **options)
    saved = load_file(tmp_path / "stop/run/checkpoint-139/model.safetensors")
    assert all(torch.equal(t, dict(model.named_parameters())[name]) for name, t in saved.items())


# ---------------------------------------------------------------- clocks, logs, starts


def test_a_clock_that_jumps_or_stands_still_changes_nothing(tmp_path, monkeypatch):
    small_run.run(tmp_path / "a/run", max_steps=5)
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.choice((-86400, 0, 86400)))
    small_run.run(tmp_path / "b/run", max_steps=5)
    assert all(0 <= s < 60 for s in metrics(tmp_path / "b/run", "seconds"))
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    small_run.run(tmp_path / "c/run", max_steps=5)
    assert metrics(tmp_path / "c/run", "seconds") == [0.0] * 5
    for name in "bc":
        assert_equal(state_of(tmp_path / name / "run", 5), state_of(tmp_path / "a/run", 5))


def test_a_full_disk_under_the_log_does_not_stop_training(tmp_path):
    full, calls = os.open("/dev/full", os.O_WRONLY), 0

    def filling(model, batch):
        nonlocal calls
        calls += 1
        if calls == 6:
            for fd in os.listdir("/proc/self/fd"):
                link = Path(f"/proc/self/fd/{fd}")
                if (
                    link.is_symlink()
                    and os.readlink(link).startswith(f"{tmp_path}/b/run/")
                    and Path(os.readlink(link)).name in ("log.txt", "metrics.jsonl")
                ):
                    os.dup2(full, int(fd))
        return next_token_loss(model, batch)

    small_run.run(tmp_path / "a/run", max_steps=5)
    small_run.run(tmp_path / "b/run", max_steps=5, loss=filling)
    os.close(full)
    assert_equal(state_of(tmp_path / "b/run", 5), state_of(tmp_path / "a/run", 5))
    assert metrics(tmp_path / "b/run") == metrics(tmp_path / "a/run")[:1]
    (tmp_path / "b/run/metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "lo{"step": 1}\n\0\0\n{"step": 9'
    )  # torn
    small_run.run(tmp_path / "b/run", max_steps=6)
    assert metrics(tmp_path / "b/run", "step")[0] == 1 and metrics(tmp_path / "b/run", "step")[-1] == 6


@pytest.mark.parametrize("where", ["nobody reads", "full disk", "LANG=C"])
def test_output_that_goes_nowhere_does_not_stop_training(tmp_path, where):
    out_dir, options = tmp_path / "运行", json.dumps({"max_steps": 4, "val": False})
    command = [sys.executable, str(HERE / "small_run.py"), str(out_dir), options]
    env = ONE_THREAD | ({"LANG": "C", "LC_ALL": "C"} if where == "LANG=C" else {})
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command, env=env, stdout=full if where == "full disk" else subprocess.PIPE, stderr=subprocess.PIPE
        )
        if where == "nobody reads":
            process.stdout.close()
            process.stdout = None
        _, err = process.communicate(timeout=60)
    assert whole_steps(out_dir) == [4] and b"Traceback" not in err
    assert (out_dir / "log.txt").read_text(encoding="utf-8").count("step ") == 4
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("names", "device", "says"),
    [
        ({"RANK": "0"}, "cpu", "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not -- start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "cpu", "RANK is set but MASTER_PORT is not"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "taken"},
            "cpu",
            "in use.* -- a free MASTER_PORT",
        ),
        (
            {"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "cpu",
            "rank zero of 2 does not meet the others",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"},
            "cpu",
            "rank 0 of 2 does not meet the others at 127",
        ),
        ({}, "cuda", "no device cuda:0, this machine has 0 CUDA devices -- --device cpu"),
        ({}, "cuda:7", "no device cuda:7"),
        ({}, "mps", "'mps' is not a device of this machine"),
        ({}, "gpu", "'gpu' is not a device of this machine"),
    ],
)
def test_a_start_that_cannot_work_is_one_line_with_the_cure(monkeypatch, names, device, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ports = {"taken": str(taken.getsockname()[1]), "free": free_port()}
        for name, value in names.items():
            monkeypatch.setenv(name, ports.get(value, value))
        with pytest.raises(UserError, match=says) as caught:
            distributed.start(device, timeout_s=1)
        assert "\n" not in str(caught.value)


def test_cards_without_bf16_get_fp16_and_older_ones_fp32(monkeypatch):
    cuda = torch.device("cuda")
    for capability, expected in (((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert choose_dtype("auto", cuda) == expected
        assert choose_dtype("bf16", cuda) == torch.bfloat16, "what was asked for is what is used"


@pytest.mark.parametrize("has", [(), ("amx_tile",), ("avx512_bf16",), ("amx_tile", "avx512_bf16")])
def test_a_cpu_gets_bf16_where_it_has_instructions_for_it(monkeypatch, has):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda found=name in has: found, raising=False)
    assert choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if has else torch.float32)
    assert choose_dtype("fp32", torch.device("cpu")) == torch.float32


@pytest.mark.heavy
@pytest.mark.parametrize("what", ["configuration", "data, model or tokenizer", "program"])
def test_ranks_that_were_started_unlike_are_refused(tmp_path, what):
    port, program, other = free_port(), HERE, {}
    if what == "program":
        for name in ("core", "tokenizer", "assembly", "model.py", "trainer.py", "tests/small_run.py"):
            copy = shutil.copytree if (HERE.parent / name).is_dir() else shutil.copyfile
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            copy(HERE.parent / name, tmp_path / "copy" / name)
        program = tmp_path / "copy/tests"
        with open(tmp_path / "copy/core/guards.py", "a") as f:
            f.write("# another version\n")
    else:
        other = {"lr": 1e-3} if what == "configuration" else {"rows": "chats"}
    both = [rank(0, 2, port, tmp_path / "run"), rank(1, 2, port, tmp_path / "run", program, **other)]
    said = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [2, 2], said
    assert all(f"error: rank 1 has another {what} than rank 0 -- " in s and "Traceback" not in s for s in said)
    assert not hf_folder.checkpoint_steps(tmp_path / "run")

"""Promises of the loop: equal results however the batch is cut, precision, guards, stops."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import small_run
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from core import device
from core.data import Batch, plan_step, step_rows
from core.distributed import Ranks
from core.errors import Diverged, Interrupted, UserError
from core.generate import SamplingConfig, generate
from core.optim import OptimConfig, learning_rate, make_optimizers
from trainer import next_token_loss

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent


def metrics(folder: Path, key: str = "loss") -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [m[key] for m in map(json.loads, lines) if key in m]


def weights(folder: Path, step: int) -> dict:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def launch(ranks: int, out_dir: Path, **options) -> None:
    """Train in processes of their own, under torchrun where there are several."""
    small_run.bin_rows(out_dir.parent)  # or each rank would make it
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(HERE / "small_run.py"), str(out_dir), json.dumps(options)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rows", ["bin", "chats"])
def test_ranks_see_the_rows_of_one_process_and_reach_its_losses(tmp_path, ranks, rows):
    options = {"rows": rows, "max_steps": 50, "save_every": 50, "eval_every": 50, "micro_batch": 2}
    launch(1, tmp_path / "one", **options)
    launch(ranks, tmp_path / "many", **options)
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert len(one) == len(many) == 50
    assert max(abs(a - b) / a for a, b in zip(one, many)) <= 1e-6
    assert metrics(tmp_path / "one", "targets") == metrics(tmp_path / "many", "targets")
    val_one, val_many = metrics(tmp_path / "one", "val_loss"), metrics(tmp_path / "many", "val_loss")
    assert val_many == pytest.approx(val_one, rel=1e-6)
    # Dealt out in turn, the micro-batches of the ranks are those of the single process, id for id.
    alone = json.loads((tmp_path / "one/seen-0.json").read_text())
    dealt = [json.loads((tmp_path / f"many/seen-{r}.json").read_text()) for r in range(ranks)]
    assert [piece for turn in zip(*dealt) for piece in turn] == alone


@pytest.mark.heavy
@pytest.mark.parametrize("rows", ["bin", "chats"])
def test_gradient_is_the_same_for_1x4_4x1_micro_batches_and_two_ranks(tmp_path, rows):
    # After one step AdamW's first moment is the gradient times 1 - beta1; without clipping it is the raw gradient.
    options = {"rows": rows, "max_steps": 1, "batch_tokens": 4 * small_run.SEQ_LEN, "grad_clip": 0.0, "val": False}
    launch(1, tmp_path / "1x4", micro_batch=4, **options)
    launch(1, tmp_path / "4x1", micro_batch=1, **options)
    launch(2, tmp_path / "ranks", micro_batch=1, **options)
    grads = {}
    for name in ("1x4", "4x1", "ranks"):
        moments = load_file(tmp_path / name / "checkpoint-1" / "optimizer.safetensors")
        grads[name] = {k: v for k, v in moments.items() if k.endswith(":exp_avg")}
    counts = {name: metrics(tmp_path / name, "targets") for name in grads}
    assert counts["1x4"] == counts["4x1"] == counts["ranks"]
    # The same gradient once more, by hand: the mean over all targets of the step.
    model = small_run.small_model()
    data = small_run.chat_rows() if rows == "chats" else small_run.bin_rows(tmp_path)
    whole = data.batch(step_rows(0, 4, len(data), seed=1))
    per_row = (whole.targets != -100).sum(dim=1)
    assert per_row.unique().numel() > 1, "the rows should differ in their number of targets"
    (next_token_loss(model, whole) / whole.count).backward()
    for name, p in model.named_parameters():
        expected = p.grad * 0.1
        scale = expected.abs().max()
        for kind in grads:
            assert torch.allclose(grads[kind][f"{name}:exp_avg"], expected, rtol=1e-4, atol=1e-6 * scale), (name, kind)


def test_fp16_with_a_scaler_and_bf16_train_to_the_loss_of_fp32_within_one_percent(tmp_path):
    last = {}
    for dtype in ("fp32", "fp16", "bf16"):
        small_run.run(tmp_path / dtype, dtype=dtype, max_steps=40, eval_every=40, save_every=40)
        last[dtype] = metrics(tmp_path / dtype, "val_loss")[-1]
    start = math.log(small_run.VOCAB)
    assert last["fp32"] < start - 0.02, "it should have learned something"
    assert last["fp16"] == pytest.approx(last["fp32"], rel=0.01)
    assert last["bf16"] == pytest.approx(last["fp32"], rel=0.01)
    assert min(metrics(tmp_path / "fp16", "scale")) >= 1


def test_matrix_products_run_in_the_dtype_asked_for(tmp_path):
    for dtype, expected in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        model, seen = small_run.small_model(), set()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, o, seen=seen: seen.add(o.dtype))
        small_run.run(tmp_path / dtype, model=model, dtype=dtype, max_steps=1, val=False)
        assert seen == {expected}
        assert all(p.dtype == torch.float32 for p in model.parameters())


def spoiled(at: int, value: float = math.inf):
    """A loss function that returns a non-finite loss on its `at`-th training call."""
    calls = 0

    def loss(model, batch: Batch):
        nonlocal calls
        total = next_token_loss(model, batch)
        if torch.is_grad_enabled():
            calls += 1
            if calls == at:
                return total * value
        return total

    return loss


def test_fp16_overflow_leaves_the_weights_alone_and_halves_the_scale(tmp_path):
    # Four micro-batches a step: the 9th call is the first of step 3.
    small_run.run(tmp_path / "a" / "run", dtype="fp16", max_steps=3, loss=spoiled(9), save_every=1, keep=3)
    before, after = weights(tmp_path / "a/run", 2), weights(tmp_path / "a/run", 3)
    assert all(torch.equal(before[k], after[k]) for k in before)
    scales = metrics(tmp_path / "a/run", "scale")
    assert scales[2] == scales[1] / 2
    small_run.run(tmp_path / "b" / "run", dtype="fp16", max_steps=4, loss=spoiled(9), save_every=1, keep=3)
    again = weights(tmp_path / "b/run", 4)
    assert any(not torch.equal(after[k], again[k]) for k in after), "the step after an overflow trains again"


def test_fp16_gives_up_after_twenty_overflows_in_a_row(tmp_path):
    with pytest.raises(Diverged, match="scale"):
        small_run.run(
            tmp_path / "run",
            dtype="fp16",
            max_steps=40,
            val=False,
            loss=lambda m, b: next_token_loss(m, b) * math.inf,
        )
    assert len(metrics(tmp_path / "run", "scale")) <= 20


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_non_finite_loss_stops_with_the_rows_named_and_the_weights_untouched(tmp_path, value, dtype):
    model = small_run.small_model()
    with pytest.raises(Diverged, match=r"step 3: loss (inf|nan).*lr .*small.bin: tokens") as caught:
        small_run.run(tmp_path / "run", model=model, dtype=dtype, loss=spoiled(10, value), save_every=2)
    assert caught.value.exit_code == 3
    saved = weights(tmp_path / "run", 2)
    assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters() if n in saved)


def test_a_batch_that_cannot_be_divided_is_refused_with_one_that_can(tmp_path):
    with pytest.raises(
        UserError, match="batch_tokens 100 is not a multiple of ranks 1 x seq_len 32 = 32 -- --batch_tokens 96"
    ):
        small_run.run(tmp_path / "run", batch_tokens=100)


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "expected"),
    [
        (1, 5, (10, 5, 2)),
        (2, 5, (10, 5, 1)),
        (1, 8, (10, 5, 2)),
        (1, 4, (10, 2, 5)),
        (5, 8, (10, 2, 1)),
        (10, 8, (10, 1, 1)),
    ],
)
def test_micro_batches_divide_a_step_among_the_ranks(ranks, micro_batch, expected):
    assert plan_step(320, micro_batch, 32, ranks) == expected


@pytest.mark.parametrize("micro_batch", [5, 8, 4])
def test_epochs_become_steps(tmp_path, micro_batch):
    rows = len(small_run.bin_rows(tmp_path))
    options = {"batch_tokens": 32 * small_run.SEQ_LEN, "micro_batch": micro_batch, "save_every": 99, "val": False}
    small_run.run(tmp_path / "run", max_steps=0, epochs=2, eval_every=99, **options)
    assert len(metrics(tmp_path / "run")) == round(2 * rows / 32) > 10


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path):
    small_run.run(tmp_path / "run", max_steps=1, grad_clip=0.01, val=False)
    moments = load_file(tmp_path / "run/checkpoint-1/optimizer.safetensors")
    norm = math.sqrt(sum(float((v / 0.1).square().sum()) for k, v in moments.items() if k.endswith(":exp_avg")))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_metrics_hold_the_learning_rate_of_every_step_and_the_best_model_is_published(tmp_path):
    seen = []
    small_run.run(tmp_path / "run", max_steps=10, sample=lambda m: seen.append(m.training) or "a sample")
    optim = OptimConfig(lr=3e-3, min_lr=3e-3 / 10, warmup_steps=2)
    assert metrics(tmp_path / "run", "lr") == [learning_rate(s, 10, optim) for s in range(10)]
    about = json.loads((tmp_path / "run/run.json").read_text())
    losses = metrics(tmp_path / "run", "val_loss")
    assert about["val_loss"] == min(losses) and about["step"] == 5 * (losses.index(min(losses)) + 1)
    assert seen == [False, False] and (tmp_path / "run/log.txt").read_text().count("a sample") == 2


def test_bits_per_byte_is_the_cost_of_the_whole_validation_text(tmp_path):
    model = small_run.run(tmp_path / "run", max_steps=5)
    rows = small_run.bin_rows(tmp_path, tail=True)
    nats = 0.0
    with torch.no_grad():
        for i in range(len(rows)):
            ids, targets, docs = (torch.from_numpy(a)[None] for a in rows.row(i))
            logp = model(ids, docs=docs).log_softmax(-1)[0]
            nats -= sum(float(logp[t, y]) for t, y in enumerate(targets[0].tolist()) if y != -100)
    text_bytes = json.loads((tmp_path / "small.json").read_text())["text_bytes"]
    assert metrics(tmp_path / "run", "val_bits_per_byte")[-1] == pytest.approx(
        nats / math.log(2) / text_bytes, rel=1e-3
    )


def start_long_run(out_dir: Path) -> subprocess.Popen:
    options = json.dumps({"max_steps": 100000, "save_every": 100000, "eval_every": 100000})
    process = subprocess.Popen(
        [sys.executable, str(HERE / "small_run.py"), str(out_dir), options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out_dir / "metrics.jsonl").exists() and len((out_dir / "metrics.jsonl").read_text().splitlines()) > 3:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_within_one_step_and_exits_75(tmp_path, number):
    process = start_long_run(tmp_path / "run")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped: saved" in err and "Traceback" not in err
    done = metrics(tmp_path / "run", "targets")
    assert (tmp_path / "run" / f"checkpoint-{len(done)}").is_dir()


def test_ranks_stop_together_when_one_is_asked(tmp_path, monkeypatch):
    # One process stands in for two: the other rank's flag arrives in the sum.
    monkeypatch.setattr(
        Ranks, "sum", lambda self, t: t + torch.tensor([0, 0, 1.0], dtype=t.dtype) if t.numel() == 3 else t
    )
    with pytest.raises(Interrupted):
        small_run.run(tmp_path / "run")
    assert (tmp_path / "run/checkpoint-1").is_dir()


@pytest.mark.heavy
def test_compiled_training_reaches_the_losses_of_eager_with_one_graph_for_all_blocks_and_both_modes(tmp_path):
    """Without a break (fullgraph), and samples of all lengths are not compiled."""
    from torch._dynamo.utils import counters

    def sample(model):
        return str([list(generate(model, [1] * n, SamplingConfig(max_new_tokens=3), set())) for n in (3, 5)])

    small_run.run(tmp_path / "eager", max_steps=4, sample=sample)
    torch._dynamo.reset()
    counters.clear()
    model = small_run.run(tmp_path / "compiled", max_steps=4, sample=sample, compile=True)
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(tmp_path / "eager"), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2, "one for training, one for validation"
    assert not counters["graph_break"]
    # The whole would hide from the head's loss that its gradients are wanted for a sum: logits would be computed twice.
    assert model._compiled_call_impl is None and model.model.layers[1]._compiled_call_impl is not None


def test_a_step_waits_for_the_device_twice_however_many_micro_batches_and_parameters(tmp_path, monkeypatch):
    """On a GPU each .item() lets its queue of work run empty: one for the sums, one for the gradient's norm."""
    waits = []

    def noting(name):
        original = getattr(torch.Tensor, name)
        return lambda self, *args, **options: (waits.append(name), original(self, *args, **options))[1]

    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, noting(name))
    for micro, layers in ((1, 2), (4, 2), (4, 6)):
        taken = []
        for steps in (2, 5):
            waits.clear()
            model = small_run.small_model(layers)
            small_run.run(tmp_path / f"{micro}-{layers}-{steps}", model, max_steps=steps, micro_batch=micro, val=False)
            taken.append(len(waits))
        assert taken[1] - taken[0] == 3 * 2, waits


@pytest.mark.parametrize("layers", [1, 4])
def test_the_update_of_a_step_is_one_call_for_all_matrices_and_one_for_all_norms(layers):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names[func.name()] += 1
            return func(*args, **(kwargs or {}))

    model, names = small_run.small_model(layers), Counter()
    (optimizer,) = make_optimizers(model, OptimConfig())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with Calls():
        optimizer.step()
    assert names["aten::_fused_adamw_"] == 2 and not [n for n in names if "addcdiv" in n], names


def test_traced_steps_leave_files_and_change_nothing(tmp_path, capsys):
    plain = small_run.run(tmp_path / "plain", max_steps=6, val=False)
    traced = small_run.run(tmp_path / "traced", max_steps=6, val=False, profile=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True))
    events = json.loads((tmp_path / "traced/profile/trace.json").read_text())["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name", "")).startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert (
        "aten::mm" in (tmp_path / "traced/profile/operations.txt").read_text() and "aten::" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="profile = 2 needs 5 steps, 4 are left"):
        small_run.run(tmp_path / "short", max_steps=4, val=False, profile=2)


def test_a_log_line_says_loss_validation_rate_norm_speed_share_memory_and_time_left(tmp_path, monkeypatch):
    """The share is of a measured product; here the product is said to be twice as fast as the steps are."""
    flops = device.flops_per_token(small_run.small_model(), small_run.SEQ_LEN)
    monkeypatch.setattr(
        trainer.time, "monotonic", partial(next, itertools.count(step=0.5))
    )  # each look half a second later
    monkeypatch.setattr(device, "matmul_peak", lambda device, dtype: 2 * flops * 8 * small_run.SEQ_LEN / 0.5)
    small_run.run(tmp_path / "run", max_steps=40)
    lines = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if line.startswith("step 6/40 loss")]
    value = metrics(tmp_path / "run", "val_loss")[0]
    assert re.fullmatch(
        rf"step 6/40 loss \d\.\d{{4}} val {value:.4f} lr \S+ norm \d\.\d\d 512 tokens/s MFU 50\.0% \d\.\d GB left 0:00:17",
        lines[0],
    ), lines

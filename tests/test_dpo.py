"""Promises of dpo.py: the loss of the paper, a reference that is read once, and what every training here promises."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lively
from safetensors.torch import load_file
from test_trainer import metrics

import dpo
from assembly import models
from core import files, hf_folder
from core.errors import UserError
from extras.preferences import pairs
from model import ModelConfig
from tokenizer import chat

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("曹操字什么？", "刘备是谁？", "何为忠义？", "下一句呢？", "他去了哪里？", "谁来了？")
BEFORE = [{"role": "user", "content": "好？"}, {"role": "assistant", "content": "好。"}]  # an answer that is not judged
OPTIONS = [
    "--max_steps",
    "6",
    "--batch_tokens",
    "512",
    "--micro_batch",
    "2",
    "--save_every",
    "3",
    "--eval_every",
    "3",
    "--log_every",
    "1",
    "--lr",
    "1e-3",
    "--min_lr",
    "1e-4",
    "--warmup_steps",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
]


@pytest.fixture(scope="module")
def place(small, tmp_path_factory) -> Path:
    """A folder with a chat model and pairs: the better answer is short, the other long."""
    place = tmp_path_factory.mktemp("place")
    model = lively(
        ModelConfig(
            vocab_size=small.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    hf_folder.save_model(place / "base", model, small, {"chat_format": "bos"})
    lines = [
        {
            "messages": [
                *BEFORE * (n == 2),
                {"role": "user", "content": q},
                {"role": "assistant", "content": f"是{q[:n]}。"},
            ],
            "rejected": "不知道" * n,
        }
        for q in QUESTIONS
        for n in (1, 2, 3, 4)
    ]
    (place / "pairs.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    return place


def train(place: Path, out: Path, *words: str) -> None:
    """dpo.py in this process."""
    argv = [
        "dpo.py",
        "--init_from",
        str(place / "base"),
        "--pairs.train",
        str(place / "pairs.jsonl"),
        "--out_dir",
        str(out),
        *OPTIONS,
        *words,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        dpo.main()


def rows_of(place: Path, small, length: int = 64) -> pairs.PairRows:
    found, _ = pairs.read_pairs([str(place / "pairs.jsonl")], small, "bos", length)
    return pairs.PairRows(found, length, small.eos_id)


def naive_log_probability(model, ids, mask) -> torch.Tensor:
    """Of the trained ids of one text, one after another."""
    logits = model(torch.tensor([list(ids)]))[0].double()
    return sum(logits[i].log_softmax(-1)[ids[i + 1]] for i in range(len(ids) - 1) if mask[i + 1])


def naive_loss(model, reference, pair, beta: float, smoothing: float) -> torch.Tensor:
    gained = [
        naive_log_probability(model, *text) - naive_log_probability(reference, *text).detach() for text in pair[:2]
    ]
    p = torch.sigmoid(beta * (gained[0] - gained[1]))
    return -(1 - smoothing) * p.log() - smoothing * (1 - p).log()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_are_those_of_the_formula(place, small, smoothing):
    reference, model = models.load_model(place / "base"), models.load_model(place / "base")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    rows, numbers = rows_of(place, small), [0, 5, 9]
    rows.reference = pairs.over_pairs(
        rows, 4, torch.device("cpu"), lambda b: pairs.log_probabilities(reference, b), range(len(rows))
    )
    batch = rows.batch(numbers)
    pairs.dpo_loss(0.3, smoothing)(model, batch).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted = sum(naive_loss(model, reference, rows.pairs[i], 0.3, smoothing) for i in numbers)
    wanted.backward()
    assert pairs.dpo_loss(0.3, smoothing)(model, batch).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert batch.count.item() == 3
    for mine, p in zip(ours, model.parameters(), strict=True):
        assert (mine - p.grad).norm() <= 1e-4 * p.grad.norm()


@pytest.mark.parametrize("words", [(), ("--lora.r", "4")])
def test_it_begins_at_ln_2_and_learns_which_answers_are_preferred(place, small, tmp_path, words, capsys):
    train(place, tmp_path / "out", *words, "--max_steps", "30", "--warmup_steps", "2", "--lr", "5e-3")
    losses = metrics(tmp_path / "out")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.3
    assert "held-out pairs the right way round: 100.0% of 2" in capsys.readouterr().out
    assert (tmp_path / "out" / ("adapter_model.safetensors" if words else "model.safetensors")).exists()
    if not words:  # against what it was: the preferred became likelier beside the other
        before, after = models.load_model(place / "base"), models.load_model(tmp_path / "out")
        for good, bad, _ in rows_of(place, small).pairs[::5]:
            gains = [naive_log_probability(after, *t) - naive_log_probability(before, *t) for t in (good, bad)]
            assert gains[0] > gains[1] and gains[1] < 0


def test_the_reference_is_computed_once(place, small, tmp_path, monkeypatch):
    train(place, tmp_path / "out")

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(pairs, "log_probabilities", never)
    train(place, tmp_path / "out")  # finished
    (kept,) = (tmp_path / "out").glob("reference-*.safetensors")
    model, found = models.load_model(place / "base"), load_file(kept)
    assert found["train"].shape == (22, 2) and found["held_out"].shape == (2, 2)
    wanted = [[naive_log_probability(model, *text).item() for text in pair[:2]] for pair in rows_of(place, small).pairs]
    ours = torch.cat([found["train"], found["held_out"]]).tolist()
    for (good, bad), (mine, others) in zip(sorted(wanted), sorted(ours), strict=True):
        assert (mine, others) == pytest.approx((good, bad), rel=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bits(place, tmp_path):
    train(place, tmp_path / "out")
    last = tmp_path / "out/checkpoint-6"
    straight = load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")
    shutil.rmtree(last)
    train(place, tmp_path / "out")
    again = load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")
    assert "resumed from" in (tmp_path / "out/log.txt").read_text()
    assert straight.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in straight.items())


@pytest.mark.heavy
def test_two_ranks_reach_the_losses_of_one_process(place, tmp_path):
    train(place, tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "dpo.py"),
        "--init_from",
        str(place / "base"),
        "--pairs.train",
        str(place / "pairs.jsonl"),
        "--out_dir",
        str(tmp_path / "two"),
        *OPTIONS,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss", "grad_norm"):
        assert metrics(tmp_path / "two", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5)


def test_what_cannot_be_used_is_refused_or_counted(place, tmp_path, small, capsys):
    def written(*lines) -> str:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / "bad.jsonl")

    chat_of = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for lines, words in (
        ([chat_of], r"bad.jsonl:1: no messages with a rejected answer"),
        ([chat_of | {"rejected": "b"}], "both answers are the same"),
        ([chat_of | {"rejected": " "}], "no messages with a rejected"),
        ([{"rejected": "c"}], "no messages"),
    ):
        with pytest.raises(UserError, match=words):
            train(place, tmp_path / "out", "--pairs.train", written(*lines))
    with pytest.raises(UserError, match="too few pairs to hold some out"):
        train(place, tmp_path / "out", "--pairs.train", written(chat_of | {"rejected": "c"}))
    for (good, bad, _), (_, line) in zip(
        rows_of(place, small).pairs, files.read_jsonl(place / "pairs.jsonl"), strict=True
    ):
        judged = [small.decode([i for i, m in zip(*text) if m]) for text in (good, bad)]
        assert judged == [line["messages"][-1]["content"], line["rejected"]]
    sizes = [
        max(
            len(chat.render([*m[:-1], {"role": "assistant", "content": a}], small, "bos")[0])
            for a in (m[-1]["content"], other)
        )
        for m, other in ((d["messages"], d["rejected"]) for _, d in files.read_jsonl(place / "pairs.jsonl"))
    ]
    length = sorted(set(sizes))[2] - 2  # some are longer by one than what fits
    found, intro = pairs.read_pairs([str(place / "pairs.jsonl")], small, "bos", length)
    assert len(found) == sum(size <= length + 1 for size in sizes) and length + 2 in sizes
    assert 0 < len(found) < 24 and intro[0].startswith(
        f"{24 - len(found)} pairs longer than {length} tokens left out: "
    )

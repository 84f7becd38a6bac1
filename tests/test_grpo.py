"""Promises of grpo.py: the loss of the paper on the model's own answers, rewards that rise, runs that go on."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lively
from safetensors.torch import load_file
from test_trainer import metrics

import grpo
from assembly import models
from core import hf_folder
from core.errors import UserError
from core.generate import SamplingConfig
from extras.decoding.batching import Text, Token, continued
from extras.preferences import questions, scalar
from model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = [
    "--max_steps",
    "4",
    "--batch_tokens",
    "256",
    "--micro_batch",
    "2",
    "--save_every",
    "2",
    "--eval_every",
    "2",
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
    "--max_new_tokens",
    "6",
    "--group",
    "4",
    "--reward",
    "format",
    "--pattern",
    "[^\\ufffd]+",
]


@pytest.fixture(scope="module")
def place(small, tmp_path_factory) -> Path:
    """A folder with a chat model and questions."""
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
    chats = [
        {"messages": [{"role": "user", "content": f"{q}？"}, {"role": "assistant", "content": q}]}
        for q in "曹刘孙关张赵马黄诸葛司马"
    ]
    (place / "chats.jsonl").write_text(
        "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats), encoding="utf-8"
    )
    return place


def words(place: Path, out: Path, *more: str) -> list[str]:
    chats = str(place / "chats.jsonl")
    return [
        "--init_from",
        str(place / "base"),
        "--questions.train",
        chats,
        "--questions.val",
        chats,
        "--out_dir",
        str(out),
        *OPTIONS,
        *more,
    ]


def train(place: Path, out: Path, *more: str) -> None:
    """grpo.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grpo.py", *words(place, out, *more)])
        grpo.main()


def naive_log_probabilities(model, question: list[int], answer: list[int]) -> list[torch.Tensor]:
    logits = model(torch.tensor([question + answer]))[0].double()
    return [logits[len(question) + k - 1].log_softmax(-1)[id] for k, id in enumerate(answer)]


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_loss_and_gradient_are_those_of_the_formula(place, small, kl):
    model, reference = models.load_model(place / "base"), models.load_model(place / "base")
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    reference.requires_grad_(False)
    asked, said = [[1, 50, 60], [1, 70]], [[[5, 6, 2], [9, 2], [8, 7, 3, 4]], [[11, 2], [12, 13, 14, 2], [2]]]
    groups = [
        [
            Text(q, SamplingConfig(), {2}, tokens=[Token(None, id, "", 0.0, [(0, 0.0)]) for id in a], added=a)
            for a in group
        ]
        for q, group in zip(asked, said)
    ]
    cfg = questions.RewardConfig(group=3, kl=kl)
    batch = questions.QuestionBatch(
        torch.zeros(2, 64, dtype=torch.long), torch.full((2, 64), -100), None, [0, 1], asked, ["", ""]
    )
    loss = questions.grpo_loss(
        cfg, lambda *_: groups, lambda *_: [1.0, 0.0, 0.5, 0.25, 0.25, 0.25], reference if kl else None
    )(model, batch)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted, mean, sigma = 0.0, 0.5, statistics.pstdev([1.0, 0.0, 0.5])
    for answers, question, judged in zip(said, asked, ([1.0, 0.0, 0.5], None)):
        for n, answer in enumerate(answers):
            logp = naive_log_probabilities(model, question, answer)
            advantage = (judged[n] - mean) / sigma if judged else 0.0  # all alike: nothing to learn
            part = sum(-advantage * p for p in logp)
            if kl:
                theirs = naive_log_probabilities(reference, question, answer)
                part = part + kl * sum(torch.exp(r - p) - (r - p) - 1 for r, p in zip(theirs, logp))
            wanted = wanted + part / len(answer) / 3
    wanted.backward()
    assert batch.count.item() == 2 and loss.item() == pytest.approx(wanted.item(), abs=1e-4)
    for mine, p in zip(ours, model.parameters(), strict=True):
        assert (mine - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6


def test_rules_judge_the_whole_answer(small):
    def judge(**options):
        rule = questions.make_judge(questions.RewardConfig(**options), small)
        return lambda said, wanted: rule([Text([1], SamplingConfig(), set(), added=small.encode(said))], [wanted])[0]

    exact = judge()
    assert [exact("曹操。", "曹操。"), exact(" 曹操。\n", "曹操。"), exact("曹操", "曹操。")] == [1, 1, 0]
    shape = judge(reward="format", pattern=".{1,3}。")
    assert [shape("曹操。", ""), shape("曹操", ""), shape("他是曹操。", "")] == [1, 0, 0]
    both = judge(reward="both", pattern=".{1,3}。")
    assert [both("曹操。", "曹操。"), both("刘备。", "曹操。"), both("刘备", "曹操")] == [1, 0.5, 0]


@pytest.mark.heavy
@pytest.mark.parametrize("more", [("--lr", "1e-2"), ("--lr", "5e-2", "--lora.r", "16")])
def test_what_is_rewarded_becomes_what_is_said(place, tmp_path, more):
    train(
        place,
        tmp_path / "out",
        *more,
        "--max_steps",
        "40",
        "--eval_every",
        "40",
        "--min_lr",
        "1e-3",
        "--batch_tokens",
        "512",
    )
    assert metrics(tmp_path / "out", "val_loss")[-1] < 0.1


def test_an_untrained_model_earns_little(place, small):
    """What the test above begins with."""
    rows, _ = questions.question_rows([str(place / "chats.jsonl")], small, "bos", 64)
    cfg = questions.RewardConfig(reward="format", pattern="[^\\ufffd]+", max_new_tokens=6)
    loss = questions.grpo_loss(
        cfg, questions.Respond(continued, {small.eos_id}), questions.make_judge(cfg, small), None
    )
    with torch.no_grad():
        missed = loss(models.load_model(place / "base"), rows.batch(range(len(rows))))
    assert missed.item() >= 0.5 * len(rows)


def test_a_stopped_run_goes_on_to_the_same_bits(place, tmp_path):
    train(place, tmp_path / "out")
    last = tmp_path / "out/checkpoint-4"
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
        str(ROOT / "grpo.py"),
        *words(place, tmp_path / "two"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss", "grad_norm"):
        assert metrics(tmp_path / "two", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-4, abs=1e-6)
    assert any(norm > 0 for norm in metrics(tmp_path / "one", "grad_norm"))


def test_what_cannot_be_used_is_refused_or_counted(place, tmp_path, small):
    for more, said in (
        (["--reward", "both", "--pattern", ""], "need a pattern"),
        (["--reward", "format", "--pattern", "("], "pattern = '\\('"),
        (["--group", "1"], "group = 1"),
        (["--parallel", "fsdp"], "cannot answer questions"),
        (["--max_memory_gb", "1"], "max_memory_gb"),
        (["--reward", "exact"], "need a pattern"),
        (["--reward", "model", "--pattern", ""], "model needs a folder"),
        (["--reward", "model", "--pattern", "", "--reward_model", str(place / "base")], "not a reward model"),
    ):
        with pytest.raises(UserError, match=said):
            train(place, tmp_path / "out", *more)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: no messages with an answer"):
        train(place, tmp_path / "out", "--questions.train", str(path))
    chats = [
        {"messages": [{"role": "user", "content": "长" * n}, {"role": "assistant", "content": "好"}]} for n in (3, 90)
    ]
    path.write_text("".join(json.dumps(c) + "\n" for c in chats))
    rows, intro = questions.question_rows([str(path)], small, "bos", 64)
    assert len(rows) == 1 and "1 questions as long as the context of 64" in intro[0]


def test_a_reward_model_judges_question_and_answer(place, tmp_path, small, capsys):
    base = hf_folder.open_model(place / "base")
    model = hf_folder.build(*scalar.begin(base.model, base.weights, place / "base")).eval()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    scalar.RewardFolder().save(
        tmp_path / "reward", model, small, {"chat_format": "bos"}, dict(model.named_parameters())
    )
    cfg = questions.RewardConfig(reward="model", reward_model="x")
    texts = [
        Text([1, 50, 60], SamplingConfig(), set(), added=[5, 6]),
        Text([1, 70], SamplingConfig(), set(), added=[9]),
    ]
    with torch.no_grad():
        wanted = [
            model(torch.tensor([t.prompt + t.added]), torch.tensor([len(t.prompt + t.added) - 1])).item() for t in texts
        ]
    assert questions.make_judge(cfg, small, model)(texts, ["", ""]) == pytest.approx(wanted, abs=1e-4)
    train(
        place,
        tmp_path / "out",
        "--reward",
        "model",
        "--pattern",
        "",
        "--reward_model",
        str(tmp_path / "reward"),
        "--max_steps",
        "30",
        "--lr",
        "1e-2",
        "--min_lr",
        "1e-3",
        "--eval_every",
        "30",
        "--batch_tokens",
        "512",
    )
    rows, _ = questions.question_rows([str(place / "chats.jsonl")], small, "bos", 64)
    loss = questions.grpo_loss(
        questions.RewardConfig(reward="model", reward_model="x", max_new_tokens=6),
        questions.Respond(continued, {small.eos_id}),
        questions.make_judge(cfg, small, model),
        None,
    )
    with torch.no_grad():
        before = loss(models.load_model(place / "base"), rows.batch(range(len(rows)))).item() / len(rows)
    assert metrics(tmp_path / "out", "val_loss")[-1] < before - 0.5

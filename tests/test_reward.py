"""Promises of reward.py: the loss of the formula, transformers' numbers, a filter that keeps the better half."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_dpo
import torch
from safetensors.torch import load_file
from test_dpo import OPTIONS, ROOT, place  # noqa: F401
from test_trainer import metrics

import reward
import tokenizer
from assembly import inference, models
from core import files, hf_folder
from core.errors import UserError
from extras.preferences import scalar
from tokenizer import chat


def run(*argv: str) -> None:
    """reward.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reward.py", *map(str, argv)])
        reward.main()


def words(place: Path, out: Path, *more: str) -> list[str]:  # noqa: F811
    return [
        "--init_from",
        str(place / "base"),
        "--pairs.train",
        str(place / "pairs.jsonl"),
        "--out_dir",
        str(out),
        *OPTIONS,
        *more,
    ]


@pytest.fixture(scope="module", params=["whole", "lora"])
def trained(place, tmp_path_factory, request) -> Path:  # noqa: F811
    """A reward model, whole or as an adapter."""
    out = tmp_path_factory.mktemp("reward") / "out"
    more = ("--lora.r", "4") if request.param == "lora" else ()
    run(*words(place, out, "--max_steps", "30", "--lr", "5e-3", "--warmup_steps", "2", *more))
    return out


def opened(folder: Path, place: Path) -> scalar.RewardModel:  # noqa: F811
    if (folder / "config.json").exists():
        return hf_folder.build(*scalar.open_reward(folder)).eval()
    base = models.open_model(place / "base")
    base.model, base.weights = scalar.begin(base.model, base.weights, place / "base")
    return hf_folder.build(*inference.attach(base, folder)).eval()


def texts_of(place: Path) -> list[tuple[list[int], list[int]]]:  # noqa: F811
    """Both texts of each pair, without the id that ends the answer."""
    text, found = tokenizer.load(place / "base"), []
    for _, line in files.read_jsonl(place / "pairs.jsonl"):
        both = (line["messages"][-1]["content"], line["rejected"])
        found.append(
            tuple(
                list(chat.render([*line["messages"][:-1], {"role": "assistant", "content": a}], text, "bos")[0])[:-1]
                for a in both
            )
        )
    return found


def test_it_begins_at_ln_2_and_puts_the_better_answers_higher(trained, place, capsys):  # noqa: F811
    losses = metrics(trained)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.2
    model = opened(trained, place)
    with torch.no_grad():  # one text at a time, without padding
        each = [[model(torch.tensor([t]), torch.tensor([len(t) - 1])).item() for t in pair] for pair in texts_of(place)]
    assert sum(good > bad for good, bad in each) >= 23
    together = scalar.rewards(model, [t for pair in texts_of(place) for t in pair], batch=7)
    assert together == pytest.approx([value for pair in each for value in pair], abs=1e-4)


def test_loss_and_gradient_are_those_of_the_formula(trained, place, small):  # noqa: F811
    model, rows = opened(trained, place), test_dpo.rows_of(place, small)
    batch = rows.batch([1, 4, 6])
    scalar.pair_loss(model, batch).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    both = [[model.score(model.hidden(torch.tensor([t]))[0, -1]) for t in texts_of(place)[i]] for i in (1, 4, 6)]
    wanted = -sum(torch.log(torch.sigmoid(good - bad)) for good, bad in both)
    wanted.backward()
    assert scalar.pair_loss(model, batch).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert all(
        (g - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-7
        for n, p in model.named_parameters()
        if (g := ours.get(n)) is not None
    )


def test_transformers_reads_the_same_rewards(trained, place):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    if not (trained / "config.json").exists():
        pytest.skip("an adapter is no folder for it")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(trained).eval()
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    model = opened(trained, place)
    texts = [t for pair in texts_of(place)[:5] for t in pair]
    longest = max(map(len, texts))
    padded = torch.tensor([t + [theirs.config.pad_token_id] * (longest - len(t)) for t in texts])
    with torch.no_grad():
        wanted = theirs(
            padded, attention_mask=(torch.arange(longest) < torch.tensor([[len(t)] for t in texts])).long()
        ).logits[:, 0]
    assert scalar.rewards(model, texts, 4) == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_filter_keeps_the_better_half_of_a_mixed_file_in_its_order(trained, place, tmp_path, capsys):  # noqa: F811
    lines = []
    for _, line in files.read_jsonl(place / "pairs.jsonl"):
        for good in (True, False):
            answer = line["messages"][-1]["content"] if good else line["rejected"]
            lines.append({"messages": [*line["messages"][:-1], {"role": "assistant", "content": answer}], "good": good})
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    run(
        "score",
        "--model",
        trained,
        "--input",
        mixed,
        "--keep",
        "0.5",
        "--output",
        tmp_path / "half.jsonl",
        "--device",
        "cpu",
    )
    kept = [json.loads(line) for line in (tmp_path / "half.jsonl").read_text().splitlines()]
    assert (
        len(kept) == 24
        and sum(line["good"] for line in kept) >= 22
        and "24 of 48 lines kept" in capsys.readouterr().out
    )
    without = [{k: v for k, v in line.items() if k != "reward"} for line in kept]
    assert without == [line for line in lines if line in without]
    # Of all answers to one question the best; the same question stands there several times.
    run(
        "score",
        "--model",
        trained,
        "--input",
        mixed,
        "--best",
        "true",
        "--output",
        tmp_path / "best.jsonl",
        "--device",
        "cpu",
    )
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    asked = [json.dumps(line["messages"][:-1]) for line in best]
    assert len(set(asked)) == len(asked) == len({json.dumps(line["messages"][:-1]) for line in lines})
    model, text = opened(trained, place), tokenizer.load(place / "base")
    for line in best:
        rivals = [other for other in lines if other["messages"][:-1] == line["messages"][:-1]]
        values = [
            model(
                torch.tensor([list(chat.render(r["messages"], text, "bos")[0])[:-1]]),
                torch.tensor([len(chat.render(r["messages"], text, "bos")[0]) - 2]),
            ).item()
            for r in rivals
        ]
        assert line["reward"] == pytest.approx(max(values), abs=1e-4)


def test_answers_of_sample_py_are_scored_too(trained, place, tmp_path):  # noqa: F811
    answers = tmp_path / "answers.jsonl"
    lines = [{"prompt": "谁？", "answer": a} for a in ("是谁。", "不知道不知道")] + [
        {"prompt": [{"role": "user", "content": "何？"}], "answer": "是何。"}
    ]
    answers.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    run(
        "score",
        "--model",
        trained,
        "--input",
        answers,
        "--best",
        "true",
        "--output",
        tmp_path / "best.jsonl",
        "--device",
        "cpu",
    )
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in best] == ["是谁。", "是何。"]


def test_a_stopped_run_goes_on_to_the_same_bits(place, tmp_path):  # noqa: F811
    run(*words(place, tmp_path / "out"))
    last = tmp_path / "out/checkpoint-6"
    straight = load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")
    shutil.rmtree(last)
    run(*words(place, tmp_path / "out"))
    again = load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")
    assert "resumed from" in (tmp_path / "out/log.txt").read_text() and "score.weight" in straight
    assert straight.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in straight.items())


@pytest.mark.heavy
def test_two_ranks_reach_the_losses_of_one_process(place, tmp_path):  # noqa: F811
    run(*words(place, tmp_path / "one"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "reward.py"),
        *words(place, tmp_path / "two"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss", "grad_norm"):
        assert metrics(tmp_path / "two", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5)


def test_what_cannot_be_used_is_refused_or_counted(place, tmp_path, capsys):  # noqa: F811
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="max_memory_gb"):
        run(*words(place, tmp_path / "out", "--max_memory_gb", "1"))
    with pytest.raises(UserError, match="not a reward model but"):
        run("score", "--model", place / "base", "--input", place / "pairs.jsonl")
    run(*words(place, tmp_path / "out", "--max_steps", "1"))
    with pytest.raises(UserError, match=r"bad.jsonl:1: neither messages nor a prompt"):
        run("score", "--model", tmp_path / "out", "--input", tmp_path / "bad.jsonl")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "谁？", "answer": "是" * 100}) + "\n")
    with pytest.raises(UserError, match="no lines that fit into 64 tokens"):
        run("score", "--model", tmp_path / "out", "--input", tmp_path / "long.jsonl")
    assert "1 lines longer than 64 tokens left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"lm_head|missing"):  # it is no language model
        models.open_model(tmp_path / "out")

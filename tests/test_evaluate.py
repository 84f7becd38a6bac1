"""Promises of evaluate.py: bits per byte, multiple choice, and reports that survive a kill.

Oracles: naive loops over the model's logits, the engine's validation, models that are rigged to know or not to know,
and lm-eval.
"""

import csv
import io
import json
import math
import os
import pkgutil
import random
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import lively
from texts import BOOK
from torch import nn

import evaluate
import trainer
from assembly.inference import InferenceConfig, open_generator
from core import distributed, errors, hf_folder, validate
from core.bins import BinWriter, TokenBin
from core.checkpoint import State
from core.data import BinRows
from core.errors import UserError
from core.generate import SamplingConfig
from core.log import Log
from extras.evaluation import bits, choices, likelihood, subjects
from extras.evaluation.likelihood import Request
from extras.evaluation.report import Progress, Report, Table
from extras.families.llama_kin import KinConfig
from model import ModelConfig
from tokenizer import chat

QUIET = {"tell": lambda line: None}


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A run folder of a lively model with 256 positions."""
    config = ModelConfig(
        vocab_size=small.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    path = tmp_path_factory.mktemp("evaluate") / "model"
    hf_folder.save_model(path, lively(config), small, {})
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return open_generator(InferenceConfig(model=str(folder), device="cpu"))


def quiet() -> Progress:
    progress = Progress(None, {})
    progress.tell = lambda line: None
    return progress


def config(data, **options):
    return evaluate.EvaluateConfig(data=str(data), **options)


def naive(model, request: Request) -> float:
    """ln P(continuation | context), an id at a time."""
    ids, total = list(request.context), 0.0
    for id in request.continuation:
        with torch.no_grad():
            total += model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[id].item()
        ids.append(id)
    return total


def command(*words: str) -> int:
    """evaluate.py in this process; its exit code."""
    before, sys.argv = sys.argv, ["evaluate.py", *map(str, words)]
    try:
        errors.run(evaluate.main)
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before


# Likelihoods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_log_likelihoods_are_those_of_a_loop_over_single_ids(generator, batch):
    rng = random.Random(0)
    draw = lambda n: [rng.randrange(1, 600) for _ in range(n)]  # noqa: E731
    context = draw(30)
    requests = [Request(context, [id]) for id in draw(4)]  # these share a row, as the letters of a question do
    requests += [Request(draw(rng.randrange(1, 40)), draw(rng.randrange(1, 9))) for _ in range(12)]
    requests += [requests[5], Request(draw(200), draw(57))]  # twice the same; and as long as the context allows
    found = likelihood.log_likelihoods(generator.model, requests, batch)
    assert found == pytest.approx([naive(generator.model, r) for r in requests], abs=1e-4)
    total = likelihood.sum_nats(generator.model, requests, batch)
    assert total == pytest.approx(-sum(naive(generator.model, r) for r in requests), abs=1e-3)


def test_padding_changes_nothing_where_positions_are_scaled_by_the_length_of_a_row(tiny_config):
    options = {"rope_type": "dynamic", "rope_factor": 4.0}
    model = lively(KinConfig(**asdict(tiny_config) | options))
    requests = [Request([5, 6, 7], [8, 9]), Request([3] * 60, [9, 2, 4]), Request([5], [9])]
    expected = [naive(model, r) for r in requests]
    assert likelihood.log_likelihoods(model, requests, 3) == pytest.approx(expected, abs=1e-4)


def test_logits_go_through_the_head_in_pieces(generator, monkeypatch):
    requests = [Request([5, 6, 7], [8, 9, 10, 11, 12]), Request([5], [9])]
    whole, seen = likelihood.log_likelihoods(generator.model, requests, 2), []
    generator.model.lm_head.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 2 * generator.model.config.vocab_size)
    assert likelihood.log_likelihoods(generator.model, requests, 2) == pytest.approx(whole, abs=1e-5)
    assert seen == [2, 2, 2]
    generator.model.lm_head._forward_hooks.clear()


def test_a_model_in_fewer_bits_is_measured_as_it_is(folder, small, tmp_path):
    generator = open_generator(InferenceConfig(model=str(folder), device="cpu", quantize="int8"))
    requests = [Request([5, 6, 7], [8, 9]), Request([5], [9])]
    expected = [naive(generator.model, r) for r in requests]
    assert likelihood.log_likelihoods(generator.model, requests, 1) == pytest.approx(expected, abs=0.05)
    with BinWriter(tmp_path / "val.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        out.add([1, 5, 6, 7, 8, 9, small.eos_id], 20)
    found = bits.run(generator, config(tmp_path / "val.bin"), SamplingConfig(), quiet())
    assert found.scores["nats"] == pytest.approx(
        -naive(generator.model, Request([1], [5, 6, 7, 8, 9, small.eos_id])), abs=0.1
    )


def test_a_model_with_broken_weights_is_refused(folder):
    broken = open_generator(InferenceConfig(model=str(folder), device="cpu"))
    broken.model.model.norm.weight.data[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        likelihood.log_likelihoods(broken.model, [Request([1], [2])], 1)
    with pytest.raises(UserError, match="not finite"):
        likelihood.sum_nats(broken.model, [Request([1], [2])], 1)


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 10, 15, 16, 17, 18, 50])
def test_windows_predict_every_id_but_the_first_once_and_are_as_long_as_they_can_be(count):
    ids, length = list(range(count)), 8
    found = likelihood.cut_windows(ids, length)
    assert [id for window in found for id in window.continuation] == ids[1:]
    for window in found:
        assert [*window.context, *window.continuation] == ids[window.context[0] : window.continuation[-1] + 1]
        assert len(window.read) == min(length, count - 1)


# Bits per byte --------------------------------------------------------------------------------------------------------


def test_bits_per_byte_of_a_bin_is_what_training_calls_bits_per_byte(generator, small, tmp_path):
    with BinWriter(tmp_path / "val.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        for text in BOOK[:40]:
            out.add(small.encode(text, bos=True, eos=True), len(text.encode()))
    rows = BinRows(TokenBin(tmp_path / "val.bin", small.vocab_size), 256, docs=True, eos_id=small.eos_id, tail=True)
    among = SimpleNamespace(world=1, rank=0)
    model, ranks = generator.model, distributed.start("cpu")
    strategy = SimpleNamespace(model=model, module=model, ranks=ranks, data=among, weight=1)
    task = SimpleNamespace(loss=trainer.next_token_loss, val_rows={"val": rows}, sample=None)
    nats, targets = validate.evaluate(task, rows, len(rows), 2, strategy, nullcontext())
    cfg = trainer.TrainConfig(micro_batch=2, eval_tokens=1 << 30)
    facts, _ = validate.validate(task, cfg, strategy, nullcontext(), Log(tmp_path, speak=False), State())
    per_byte = facts["val_bits_per_byte"]
    generator.model.eval()
    found = bits.run(generator, config(tmp_path / "val.bin", batch=3), SamplingConfig(), quiet())
    assert found.scores["bits_per_byte"] == pytest.approx(per_byte, rel=1e-6)
    assert found.scores["nats"] == pytest.approx(nats, rel=1e-6) and found.scores["tokens"] == targets
    assert found.scores["bytes"] == sum(len(text.encode()) for text in BOOK[:40]) and found.scores["documents"] == 40
    (tmp_path / "val.json").unlink()
    found = bits.run(generator, config(tmp_path / "val.bin"), SamplingConfig(), quiet())
    assert (
        "bits_per_byte" not in found.scores
        and "no bits per byte" in found.notes[-1]
        and found.notes[0].startswith("nats per token")
    )


def test_bits_per_byte_of_a_text_counts_every_byte_once(generator, small, tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "PART_TOKENS", 300)  # several parts
    long = "\n".join(BOOK[:30])
    texts = [long, "短", "", "曹操字孟德。", "曹操字孟德。"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    found = bits.run(generator, config(tmp_path / "a.jsonl", batch=2), SamplingConfig(), quiet())
    nats = tokens = 0
    for text in texts:
        ids = small.encode(text, bos=True)
        with torch.no_grad():
            for at in range(1, len(ids), 256):  # each 256 from the one in front of them; the last from all that fits
                end = min(at + 256, len(ids))
                begin = max(0, end - 257)
                logp = generator.model(torch.tensor([ids[begin : end - 1]]))[0].double().log_softmax(-1)
                nats -= sum(logp[k - begin - 1, ids[k]].item() for k in range(at, end))
                tokens += end - at
    scores, size = found.scores, sum(len(text.encode()) for text in texts)
    assert scores["nats"] == pytest.approx(nats, rel=1e-6) and scores["tokens"] == tokens
    assert scores["bytes"] == size and scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert scores["perplexity_per_token"] == pytest.approx(math.exp(nats / tokens))
    assert scores["documents"] == 5 and any("1 documents without text" in note for note in found.notes)
    (tmp_path / "a.txt").write_text("\ufeff" + long, "utf-8")
    whole = bits.run(generator, config(tmp_path / "a.txt"), SamplingConfig(), quiet())
    assert whole.scores["bytes"] == len(long.encode()) and whole.scores["documents"] == 1
    first = bits.run(generator, config(tmp_path / "a.jsonl", limit=1), SamplingConfig(), quiet())
    assert first.scores["nats"] == pytest.approx(whole.scores["nats"]) and first.scores["documents"] == 1


def test_a_vocabulary_that_cannot_write_the_text_is_told(generator, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("曹操字孟德。", "utf-8")
    monkeypatch.setattr(generator.tokenizer, "decode", lambda ids: "?")
    found = bits.run(generator, config(tmp_path / "a.txt"), SamplingConfig(), quiet())
    assert any("1 of 1 documents do not come back" in note for note in found.notes)


# Examinations ---------------------------------------------------------------------------------------------------------

CHOSEN = {
    "ceval": ["law", "physician", "college_physics"],
    "cmmlu": ["agronomy", "logical", "ethnology"],
    "mmlu": ["virology", "anatomy", "college_physics"],
}


def exam_zip(path: Path, kind: str, count: int, seed: int = 0, change=None) -> dict[str, str]:
    """A zip in the official layout, with made-up questions; returns question -> right letter of those scored.

    Args:
        change: (name in the zip, rows) -> rows, to spoil a file.
    """
    rng, right = random.Random(seed), {}
    scored = "val" if kind == "ceval" else "test"
    with zipfile.ZipFile(path, "w") as archive:
        for subject in CHOSEN[kind]:
            for split in ("dev", scored):
                rows = []
                for number in range(5 if split == "dev" else count):
                    letter = rng.choice("ABCD")
                    text = f"{subject} {split} {number}: {rng.choice(BOOK)[:12]}"
                    if split == scored:
                        right[text] = letter
                    rows.append([text, *(f"选{rng.randrange(100)}" for _ in "ABCD"), letter])
                if kind == "ceval":
                    head = ["id", "question", "A", "B", "C", "D", "answer"] + ["explanation"] * (split == "dev")
                    rows = [head, *([k, *row, *["因为"] * (split == "dev")] for k, row in enumerate(rows))]
                elif kind == "cmmlu":
                    rows = [["", "Question", "A", "B", "C", "D", "Answer"], *([k, *row] for k, row in enumerate(rows))]
                stem = {
                    "ceval": f"{split}/{subject}_{split}.csv",
                    "cmmlu": f"{split}/{subject}.csv",
                    "mmlu": f"data/{split}/{subject}_{split}.csv",
                }[kind]
                out = io.StringIO(newline="")
                csv.writer(out).writerows(change(stem, rows) if change else rows)
                archive.writestr(stem, out.getvalue())
    return right


class Rigged(nn.Module):
    """A model whose next id is the letter that `answer(question)` says, or any letter alike where it says None."""

    def __init__(self, tokenizer, answer, positions: int = 4096):
        super().__init__()
        self.tokenizer, self.answer, self.examples = tokenizer, answer, set()
        self.config = SimpleNamespace(max_position_embeddings=positions, vocab_size=tokenizer.vocab_size)
        self.lm_head = nn.Linear(tokenizer.vocab_size, tokenizer.vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.model = SimpleNamespace(embed_tokens=self.lm_head)

    def hidden(self, ids):
        x = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, read in enumerate(ids.tolist()):
            _, *examples, question = self.tokenizer.decode([id for id in read if id]).split("\n\n")
            self.examples.add(tuple(example.split(": ")[0].removeprefix("题目：") for example in examples))
            letter = self.answer(question.split("\n")[0].removeprefix("题目："))
            if letter:
                x[row, :, self.tokenizer.encode(letter, continues=True)[-1]] = 5.0
        return x


def rigged(small, answer, positions: int = 4096):
    return SimpleNamespace(model=Rigged(small, answer, positions), tokenizer=small, chat_format=None, context=positions)


@pytest.mark.parametrize("shots", [0, 2, 5])
@pytest.mark.parametrize("kind", choices.EXAMS)
def test_a_model_that_knows_the_answers_scores_everything(small, tmp_path, kind, shots):
    right = exam_zip(tmp_path / "exam.zip", kind, 6)
    generator = rigged(small, right.get)
    found = pkgutil.resolve_name(evaluate.KINDS[kind])(
        generator, config(tmp_path / "exam.zip", shots=shots), SamplingConfig(), quiet()
    )
    assert generator.model.examples == {tuple(f"{subject} dev {k}" for k in range(shots)) for subject in CHOSEN[kind]}
    assert found.scores["accuracy_of_questions"] == found.scores["mean_of_subjects"] == 1.0
    assert found.scores["questions"] == 18 and found.scores["not_asked"] == 0
    assert found.scores["mean_low"] > 0.5 and "above the 25 %" in found.notes[0]
    with zipfile.ZipFile(tmp_path / "exam.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    again = pkgutil.resolve_name(evaluate.KINDS[kind])(
        rigged(small, right.get), config(tmp_path / "unpacked"), SamplingConfig(), quiet()
    )
    assert again.scores == found.scores


def test_a_model_that_guesses_scores_chance_and_is_not_told_apart_from_it(small, tmp_path):
    exam_zip(tmp_path / "exam.zip", "cmmlu", 60)
    guess = lambda question: random.Random(question).choice("ABCD")  # noqa: E731
    found = choices.run(
        "cmmlu", rigged(small, guess), config(tmp_path / "exam.zip", shots=0), SamplingConfig(), quiet()
    )
    scores = found.scores
    assert scores["mean_low"] < 0.25 < scores["mean_high"] and scores["accuracy_low"] < 0.25 < scores["accuracy_high"]
    assert (
        abs(scores["mean_of_subjects"] - 0.25) < 0.08 and "not significantly different from the 25 %" in found.notes[0]
    )


def test_a_model_that_always_says_a_scores_the_share_of_as(small, tmp_path):
    right = exam_zip(tmp_path / "exam.zip", "mmlu", 20)
    others = {q for q, letter in right.items() if letter == "A"} & set(list(right)[:20])
    mostly = lambda q: "B" if q in others else "A"  # noqa: E731
    found = choices.run("mmlu", rigged(small, mostly), config(tmp_path / "exam.zip"), SamplingConfig(), quiet())
    told = f"A was chosen in {60 - len(others)} of 60 questions, and is the right one in {list(right.values()).count('A')}."
    assert others and told in found.notes
    share = list(right.values()).count("A") / len(right)
    always = choices.run("mmlu", rigged(small, lambda q: "A"), config(tmp_path / "exam.zip"), SamplingConfig(), quiet())
    assert always.scores["accuracy_of_questions"] == pytest.approx(share)
    assert any(
        f"A was chosen in 60 of 60 questions, and is the right one in {round(60 * share)}." in note
        for note in always.notes
    )
    letters = next(table for table in always.tables if table.title == "Letters")
    assert letters.rows == [[a, 60 * (a == "A"), list(right.values()).count(a)] for a in "ABCD"]
    nothing = choices.run(
        "mmlu", rigged(small, lambda q: None), config(tmp_path / "exam.zip"), SamplingConfig(), quiet()
    )
    assert nothing.scores["accuracy_of_questions"] == pytest.approx(share)
    assert any("In 60 questions several letters" in note for note in nothing.notes)


def test_subjects_categories_and_all_are_means_of_what_was_right(small, tmp_path):
    right = exam_zip(tmp_path / "exam.zip", "ceval", 10)
    known = lambda q: right[q] if q.startswith(("law", "physician val 1")) else "ABCD"["ABCD".index(right[q]) - 1]  # noqa: E731
    found = choices.run("ceval", rigged(small, known), config(tmp_path / "exam.zip"), SamplingConfig(), quiet())
    table = {t.title: {row[0]: row for row in t.rows} for t in found.tables}
    assert {name: row[:5] for name, row in table["Subjects"].items()} == {
        "law": ["law", "Humanities", 10, 10, 1.0],
        "physician": ["physician", "Other", 10, 1, 0.1],
        "college_physics": ["college_physics", "STEM", 10, 0, 0.0],
    }
    assert {name: row[:4] for name, row in table["Categories"].items()} == {
        "STEM": ["STEM", 1, 10, 0.0],
        "Humanities": ["Humanities", 1, 10, 1.0],
        "Other": ["Other", 1, 10, 0.1],
        "Hard": ["Hard", 1, 10, 0.0],
        "all": ["all", 3, 30, pytest.approx(1.1 / 3)],
    }
    assert any("49 of C-Eval's subjects are not in exam.zip" in note for note in found.notes)
    two = choices.run("ceval", rigged(small, known), config(tmp_path / "exam.zip", limit=2), SamplingConfig(), quiet())
    assert two.scores["questions"] == 6 and two.scores["right"] == 3


def test_prompts_are_those_of_the_benchmarks():
    example = choices.Question("一加一是？", ["1", "2", "3", "4"], "B")
    asked = choices.Question("2+2?", ["1", "2", "3", "4"], "D")
    of = lambda kind, name, examples: choices.write_prompt(choices.EXAMS[kind], name, examples, asked)  # noqa: E731
    assert of("ceval", "法学", [example]) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        "一加一是？\nA. 1\nB. 2\nC. 3\nD. 4\n答案：B\n\n2+2?\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    )
    assert of("cmmlu", "农学", [example]) == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
        "题目：一加一是？\nA. 1\nB. 2\nC. 3\nD. 4\n答案是：B\n\n题目：2+2?\nA. 1\nB. 2\nC. 3\nD. 4\n答案是："
    )
    assert of("mmlu", "college physics", [example]) == (
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        "一加一是？\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_examples_are_dropped_from_the_front_and_what_does_not_fit_at_all_is_not_asked(small, tmp_path):
    def lengthen(name, rows):
        return [[*row[:1], row[1] + "。" * 900, *row[2:]] if row[0] == 3 and "test" in name else row for row in rows]

    right, shown = exam_zip(tmp_path / "exam.zip", "cmmlu", 5, change=lengthen), []
    asked = choices.read(choices.EXAMS["cmmlu"], tmp_path / "exam.zip")[1]["agronomy"][0]
    examples = choices.read(choices.EXAMS["cmmlu"], tmp_path / "exam.zip")[0]["agronomy"]
    two = choices.write_prompt(choices.EXAMS["cmmlu"], "农学", examples[3:], asked)
    room = len(small.encode(two, bos=True))  # the letter is only predicted
    assert choices.fit_shots(choices.EXAMS["cmmlu"], rigged(small, None, room - 1), "农学", examples, asked)[0] == 1
    generator = rigged(small, lambda q: shown.append(q) or right.get(q), positions=room)
    shots, requests = choices.fit_shots(choices.EXAMS["cmmlu"], generator, "农学", examples, asked)
    assert shots == 2 and requests[0].context == small.encode(two + "A", bos=True)[:-1]
    found = choices.run("cmmlu", generator, config(tmp_path / "exam.zip"), SamplingConfig(), quiet())
    assert found.scores["questions"] == 12 and found.scores["not_asked"] == 3 and found.scores["right"] == 12
    assert any("Shots dropped in 12 of 12 questions" in note for note in found.notes)
    assert any("3 of 15 questions were not asked" in note for note in found.notes)
    with pytest.raises(UserError, match="none of 15 questions fits"):
        choices.run("cmmlu", rigged(small, right.get, 20), config(tmp_path / "exam.zip"), SamplingConfig(), quiet())


@pytest.mark.parametrize("merged", ["：A", "：C"])
def test_a_letter_that_the_vocabulary_joins_with_what_is_in_front_is_compared_with_the_others(merged):
    def encode(text, bos):
        text, ids = text.replace(merged, "*"), [1] * bos
        return ids + [9 if c == "*" else 10 + ord(c) % 50 for c in text]

    generator = SimpleNamespace(chat_format=None, tokenizer=SimpleNamespace(encode=encode))
    found = choices.make_requests(generator, "答案：", "")
    for letter, request in zip("ABCD", found):
        assert [*request.context, *request.continuation] == encode(f"答案：{letter}", True)
        assert list(request.context) == encode("答案", True)
        assert len(request.continuation) == (1 if f"：{letter}" == merged else 2)


def test_letters_of_several_ids_are_compared_where_they_differ():
    encode = lambda text, bos: [1, *(x for c in text for x in (7, ord(c)))]  # noqa: E731 -- as byte fallback does
    found = choices.make_requests(SimpleNamespace(chat_format=None, tokenizer=SimpleNamespace(encode=encode)), "问", "")
    assert found == [Request([1, 7, ord("问"), 7], [ord(letter)]) for letter in "ABCD"]


@pytest.mark.parametrize("chat_format", ["bos", "human-assistant", "llama2", "user-assistant"])
def test_a_chat_model_is_asked_in_its_format_and_answers_with_the_letter(small, chat_format):
    generator = SimpleNamespace(chat_format=chat_format, tokenizer=small)
    asked, _ = chat.render([{"role": "user", "content": "问：\n答案："}], small, chat_format, generation=True)
    for letter, request in zip("ABCD", choices.make_requests(generator, "问：\n答案：", "")):
        ids = [*request.context, *request.continuation]
        assert ids[: len(asked)] == asked and small.decode(ids[len(asked) :]).strip() == letter
        assert len(request.continuation) == 1 and small.eos_id not in request.continuation


def test_intervals_are_the_ones_of_the_textbooks():
    assert choices.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert choices.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert choices.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    # 1 and 9 of 10: p = 2/12 and 10/12, variance 5/432 each; 1.96 * sqrt(10/432) / 2
    assert choices.mean_of_shares([(1, 10), (9, 10)]) == pytest.approx((0.5, 0.35090, 0.64910), abs=1e-4)


def test_the_interval_of_the_mean_holds_the_truth_in_95_of_100_examinations():
    rng, inside = random.Random(0), 0
    truth = [0.25, 0.4, 0.25, 0.9, 0.1] * 4
    for _ in range(2000):
        counts = [(sum(rng.random() < p for _ in range(25)), 25) for p in truth]
        _, low, high = choices.mean_of_shares(counts)
        inside += low <= sum(truth) / len(truth) <= high
    assert 0.94 <= inside / 2000 <= 0.98


@pytest.mark.parametrize("kind, scored, in_all", [("ceval", 1346, 52), ("cmmlu", 11582, 67), ("mmlu", 14042, 57)])
def test_the_official_zips_are_read_whole(shared_data, kind, scored, in_all):
    exam = choices.EXAMS[kind]
    examples, asked = choices.read(exam, shared_data / "eval" / f"{kind}.zip")
    assert sum(map(len, asked.values())) == scored and len(asked) == in_all
    assert {len(questions) for questions in examples.values()} == {5}
    assert asked.keys() == {s for names in exam.categories.values() for s in names} >= exam.second[1]


def test_the_mapping_of_c_evals_subjects_is_the_official_one(shared_data):
    official = json.loads((shared_data / "eval/ceval_subject_mapping.json").read_text("utf-8"))
    ours = {s: [name, category] for category, names in subjects.CEVAL.items() for s, name in names.items()}
    assert ours == {subject: entry[1:] for subject, entry in official.items()}


# Reports and journals -------------------------------------------------------------------------------------------------


def test_a_report_is_json_and_markdown(tmp_path):
    report = Report(
        "T",
        {"model": "a|b", "options": {"x": 1}},
        {"score": 0.12345678, "count": 1234},
        [Table("Rows", ["a", "b"], [["x|y\nz", 0.5]])],
        ["A note."],
    )
    report.save(tmp_path / "deep/report.json")
    assert json.loads((tmp_path / "deep/report.json").read_text("utf-8")) == {
        "task": "T",
        "about": report.about,
        "scores": report.scores,
        "notes": ["A note."],
        "tables": [{"title": "Rows", "columns": ["a", "b"], "rows": [["x|y\nz", 0.5]]}],
    }
    text = (tmp_path / "deep/report.md").read_text("utf-8")
    for line in (
        "# T",
        "- A note.",
        "| score | 0.1235 |",
        "| count | 1,234 |",
        "| x\\|y z | 0.5000 |",
        "| model | a\\|b |",
    ):
        assert line in text.split("\n")


def test_a_journal_keeps_what_is_finished_and_forgets_a_torn_line(tmp_path):
    said = []
    first = Progress(tmp_path / "r.json", {"model": 1}, said.append)
    first.add("a", [1.5, "字"])
    first.add("b", {"x": 2})
    with open(tmp_path / "r.json.part", "ab") as f:
        f.write('["c", "字'.encode()[:-1])  # killed in the middle of a character
    again = Progress(tmp_path / "r.json", {"model": 1}, said.append)
    assert again.done == {"a": [1.5, "字"], "b": {"x": 2}} and "goes on after 2" in said[-1]
    again.add("c", 3)
    assert Progress(tmp_path / "r.json", {"model": 1}, said.append).done.keys() == {"a", "b", "c"}
    other = Progress(tmp_path / "r.json", {"model": 2}, said.append)
    assert other.done == {} and "begins anew" in said[-1]
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_was_cut_short_goes_on_and_ends_with_the_same_report(folder, tmp_path, monkeypatch, capsys):
    exam_zip(tmp_path / "exam.zip", "mmlu", 4)
    words = ("mmlu", "--model", folder, "--data", tmp_path / "exam.zip", "--device", "cpu", "--shots", "1")
    assert command(*words, "--output", tmp_path / "whole.json") == 0
    ask_subject, asked = choices.ask_subject, []

    def cut_short(exam, generator, subject, *rest):
        asked.append(subject)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask_subject(exam, generator, subject, *rest)

    monkeypatch.setattr(choices, "ask_subject", cut_short)
    assert command(*words, "--output", tmp_path / "cut.json") == 130
    assert (tmp_path / "cut.json.part").exists() and not (tmp_path / "cut.json").exists()
    assert command(*words, "--output", tmp_path / "cut.json") == 0
    assert len(asked) == 4 and asked[1] == asked[2] and "goes on after 1" in capsys.readouterr().err
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("whole", "cut"))
    assert whole["about"].pop("seconds") >= 0 and cut["about"].pop("seconds") >= 0
    assert whole == cut and not (tmp_path / "cut.json.part").exists()


@pytest.mark.parametrize("change", ["weights", "data", "shots", "tokenizer"])
def test_a_journal_of_another_evaluation_is_not_used(folder, tmp_path, change):
    model, zipped = tmp_path / "model", tmp_path / "exam.zip"
    model.mkdir()
    for path in folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    exam_zip(zipped, "mmlu", 2)
    section = lambda shots, **more: SimpleNamespace(  # noqa: E731
        evaluate=config(zipped, shots=shots, **more),
        inference=InferenceConfig(model=str(model)),
        sampling=SamplingConfig(),
    )
    named = lambda shots, **more: evaluate.identify("mmlu", [section(shots).inference], section(shots, **more))  # noqa: E731
    before = named(1)
    assert before == named(1, batch=3)  # how many rows at once changes no result
    if change == "data":
        exam_zip(zipped, "mmlu", 2, seed=1)
    elif change != "shots":
        path = model / {"weights": "model.safetensors", "tokenizer": "tokenizer.model"}[change]
        path.write_bytes(path.read_bytes() + b"\0")
    assert named(2 if change == "shots" else 1) != before


# The command ----------------------------------------------------------------------------------------------------------


def test_without_output_the_report_is_printed_and_progress_goes_to_stderr(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("曹操字孟德。", "utf-8")
    assert command("bpb", "--model", folder, "--data", tmp_path / "a.txt", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert out.startswith("# Bits per byte of a.txt\n") and "| bits_per_byte |" in out and "part 1" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_only_the_evaluation_that_is_asked_for_is_imported(folder, root, tmp_path):
    (tmp_path / "a.txt").write_text("曹操字孟德。", "utf-8")
    script = "import sys, evaluate; evaluate.main(); print(*sys.modules, file=sys.stderr)"
    words = ["bpb", "--model", folder, "--data", tmp_path / "a.txt", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=root, capture_output=True, text=True)
    found = {name for name in done.stderr.split() if name.startswith("extras.") and name.count(".") == 2}
    assert done.returncode == 0, done.stderr
    assert found == {f"extras.evaluation.{name}" for name in ("bits", "likelihood", "report")}


def test_compare_takes_folders_in_front_and_writes_a_page(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("曹操字什么？\n<b>玄德</b>", "utf-8")
    words = (
        "compare",
        folder,
        folder,
        "--prompts",
        tmp_path / "prompts.txt",
        "--max_new_tokens",
        "4",
        "--device",
        "cpu",
    )
    assert command(*words, "--output", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert report["about"]["model 1"] == report["about"]["model 2"] == str(folder) and report["about"]["limit"] == 0
    assert report["tables"][-1]["rows"][0][0] == "曹操字什么？" and len(report["tables"][-1]["rows"]) == 2
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "&lt;b&gt;玄德&lt;/b&gt;" in page and str(folder) in page and (tmp_path / "r.md").exists()


def test_a_folder_with_an_adapter_is_its_base_with_it(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    cfg = InferenceConfig(dtype="bf16", adapter="x")
    assert evaluate.choose_folder(cfg, str(tmp_path / "lora")) == InferenceConfig(
        dtype="bf16", adapter=str(tmp_path / "lora")
    )
    assert evaluate.choose_folder(cfg, str(tmp_path)) == InferenceConfig(dtype="bf16", model=str(tmp_path))


@pytest.mark.parametrize(
    "words, temperature", [((), 0.0), (("--temperature", "0.5"), 0.5), (("s.toml",), 0.3), (("t.toml",), 0.0)]
)
def test_answers_are_greedy_unless_a_flag_or_a_file_says_otherwise(folder, tmp_path, monkeypatch, words, temperature):
    (tmp_path / "s.toml").write_text("[sampling]\ntemperature = 0.3\n")
    (tmp_path / "t.toml").write_text("[sampling]\ntop_k = 5\n")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "曹操", "target": "孟德"}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    asked = (
        "generation",
        *words,
        "--model",
        folder,
        "--data",
        "chats.jsonl",
        "--max_new_tokens",
        "3",
        "--device",
        "cpu",
    )
    assert command(*asked, "--output", "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["about"]["temperature"] == temperature


def spoiled(path: Path, change) -> Path:
    exam_zip(path, "ceval", 2, change=change)
    return path


BAD = {
    "nothing": (lambda d, m: [], "nothing: no such evaluation"),
    "another kind": (lambda d, m: ["gsm8k"], "gsm8k: no such evaluation -- python evaluate.py bpb or ceval"),
    "no data": (lambda d, m: ["bpb", "--model", m], "bpb needs --data"),
    "nothing to compare": (lambda d, m: ["compare", "--prompts", d / "a.txt"], "compare needs model folders"),
    "no prompts": (lambda d, m: ["compare", m], "nothing to compare"),
    "no such data": (lambda d, m: ["bpb", "--model", m, "--data", d / "none.txt"], "none.txt: no such file"),
    "no model": (lambda d, m: ["bpb", "--model", d, "--data", d / "a.txt"], "no model in this folder"),
    "no such model": (lambda d, m: ["bpb", "--model", d / "none", "--data", d / "a.txt"], "no such model folder"),
    "a negative limit": (lambda d, m: ["bpb", "--model", m, "--data", d / "a.txt", "--limit", "-1"], "limit = -1"),
    "output of another kind": (lambda d, m: ["bpb", "--data", d / "a.txt", "--output", "r.md"], "must end in .json"),
    "not UTF-8": (lambda d, m: ["bpb", "--model", m, "--data", d / "gbk.txt"], "gbk.txt: not UTF-8 at byte 0"),
    "an empty text": (lambda d, m: ["bpb", "--model", m, "--data", d / "empty.txt"], "no text in it"),
    "no key text": (
        lambda d, m: ["bpb", "--model", m, "--data", d / "b.jsonl"],
        "b.jsonl:1: no text under the key text",
    ),
    "not a zip": (lambda d, m: ["ceval", "--model", m, "--data", d / "a.txt"], "a.txt: not a whole zip"),
    "another zip": (lambda d, m: ["ceval", "--model", m, "--data", d / "other.zip"], "no folder val with .csv files"),
    "another exam": (
        lambda d, m: ["ceval", "--model", m, "--data", d / "mmlu.zip"],
        "anatomy_dev.csv is no subject of C-Eval",
    ),
    "no column": (
        lambda d, m: [
            "ceval",
            "--model",
            m,
            "--data",
            spoiled(d / "x.zip", lambda n, rows: [[c for k, c in enumerate(row) if k != 3] for row in rows]),
        ],
        "college_physics_dev.csv:1: no column 'b'",
    ),
    "no letter": (
        lambda d, m: [
            "ceval",
            "--model",
            m,
            "--data",
            spoiled(d / "x.zip", lambda n, rows: [*rows[:2], [*rows[2][:6], "E", *rows[2][7:]]]),
        ],
        "college_physics_dev.csv:3: the answer is 'E'",
    ),
    "a short row": (
        lambda d, m: ["ceval", "--model", m, "--data", spoiled(d / "x.zip", lambda n, rows: [*rows[:2], rows[2][:4]])],
        "3: 4 columns instead of 8",
    ),
    "an empty file": (
        lambda d, m: ["ceval", "--model", m, "--data", spoiled(d / "x.zip", lambda n, rows: rows[:1])],
        "college_physics_dev.csv: no questions in it",
    ),
    "too many shots": (
        lambda d, m: ["mmlu", "--model", m, "--data", d / "mmlu.zip", "--shots", "6"],
        "MMLU has 5 examples",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_user_did_wrong_is_one_line_and_exit_code_2(folder, tmp_path, capsys, case):
    (tmp_path / "a.txt").write_text("曹操字孟德。", "utf-8")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gbk.txt").write_bytes("曹操".encode("gbk"))
    (tmp_path / "b.jsonl").write_text('{"content": "x"}\n')
    exam_zip(tmp_path / "mmlu.zip", "mmlu", 2)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    words, told = BAD[case]
    words = words(tmp_path, folder)
    code = command(*words, *(["--device", "cpu"] if len(words) > 1 else []))
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and told in err, err


# lm-eval --------------------------------------------------------------------------------------------------------------

# In a process of its own, from another folder: lm-eval imports a package that is called evaluate, too.
LM_EVAL = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

folder, questions, text = sys.argv[1:]
lm = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4, logits_cache=False, add_bos_token=True)
task = ConfigurableTask(config={
    "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": questions}, "test_split": "train",
    "output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "right", "target_delimiter": "", "metric_list": [{"metric": "acc"}]})
found = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
samples = sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
lm.add_bos_token = False
rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (open(text, encoding="utf-8").read(),), 0)])
print(json.dumps({"likelihoods": [[x for (x, _), in s["resps"]] for s in samples],
                  "accuracy": found["results"]["local"]["acc,none"], "rolling": rolling[0]}))
"""


@pytest.mark.heavy
def test_likelihoods_are_lm_evals_on_a_local_task(generator, folder, tmp_path):
    pytest.importorskip("lm_eval")
    exam, asked, lines = choices.EXAMS["ceval"], [], []
    exam_zip(tmp_path / "exam.zip", "ceval", 7)
    for questions in choices.read(exam, tmp_path / "exam.zip")[1].values():
        for question in questions:
            prompt = choices.write_prompt(exam, "法学", [], question)
            asked.append(choices.make_requests(generator, prompt, ""))
            lines.append(json.dumps({"prompt": prompt, "right": "ABCD".index(question.right)}) + "\n")
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    (tmp_path / "text.txt").write_text("\n".join(BOOK[:30]), "utf-8")
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LM_EVAL, folder, tmp_path / "questions.jsonl", tmp_path / "text.txt"],
        cwd=tmp_path,
        env=os.environ | home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [likelihood.log_likelihoods(generator.model, requests, 8) for requests in asked]
    gap = max(abs(a - b) for row, other in zip(ours, theirs["likelihoods"]) for a, b in zip(row, other))
    assert len(theirs["likelihoods"]) == len(ours) == 21 and gap <= 1e-4
    ids = generator.tokenizer.encode("\n".join(BOOK[:30]), bos=True)
    rolling = -likelihood.sum_nats(generator.model, likelihood.cut_windows(ids, generator.context), 4)
    assert abs(rolling - theirs["rolling"]) <= 1e-6 * abs(rolling)

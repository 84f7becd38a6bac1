"""Chats with known answers: what the model says, beside what it should say.

In:  a generator (a model with its tokenizer and chat format: assembly/inference.py); JSONL lines {"messages": [...]}
     that end with the assistant's turn, or {"prompt": ..., "target": ...}. That turn, or the target, is held back; the
     lines are grouped by their "kind".
Out: a report: BLEU, ROUGE, exact match and F1 over characters, by kind and of all.
Knows nothing of what an answer means: a score says how similar two texts are, not whether the answer is right.

    python evaluate.py generation --model out/sft --data data/sft_val.jsonl --output out/report.json

`ask` is what the other evaluations by generated text use, too.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from core import files
from core.errors import UserError
from core.generate import SamplingConfig
from extras.evaluation import metrics
from extras.evaluation.report import Progress, Report, Table
from tokenizer import TokenizerError

SHOWN = 5  # answers in the report, the first ones


class Question(NamedTuple):
    """A line of the data: where it stands, what is asked (a text or messages), what should be answered, its group."""

    where: str
    prompt: str | list[dict]
    reference: str
    kind: str


class Answer(NamedTuple):
    """What the model said.

    Attributes:
        text: "" where the prompt left no room.
        end: "stop"; "length": cut off by max_new_tokens or the end of the context; "no room": the prompt is longer than
            the context, and the model was not asked.
        tokens: ids it made, the stop id too.
        seconds: its share of the time that its batch took.
        lost: tokens that truncate has taken from the prompt's beginning.
    """

    text: str
    end: str
    tokens: int
    seconds: float
    lost: int = 0


def run(generator, cfg, sampling: SamplingConfig, progress: Progress) -> Report:
    """Ask every question of cfg.data, at most cfg.limit, and compare the answers with the references."""
    # The model's answers.
    questions = read(cfg.data)
    questions = questions[: cfg.limit] if cfg.limit else questions
    prompts = [(q.where, q.prompt) for q in questions]
    answers = ask(generator, prompts, cfg.batch, sampling, progress)

    # A row of scores for each kind of question, where there are several, and one for all.
    kinds = sorted({q.kind for q in questions})
    columns = ["kind", "n", "bleu", "rouge_1", "rouge_2", "rouge_l", "exact_match", "char_f1"]
    table = Table("By kind", columns, [])
    for kind in [*(kinds if len(kinds) > 1 else []), None]:
        picked = [(a.text, q.reference) for q, a in zip(questions, answers) if kind in (None, q.kind)]
        scores = compare(*zip(*picked))
        table.rows.append(["all" if kind is None else kind or "(none)", len(picked), *scores.values()])

    # The scores of the report are the last ones, those of all.
    notes = [
        f"{len(answers):,} answers: bleu {scores['bleu']:.1f}, rouge_l {scores['rouge_l']:.3f}, "
        f"exact match {scores['exact_match']:.1%}.",
        "bleu is sacrebleu's corpus score with its tokenizer zh, from 0 to 100; all else is from 0 to 1.",
        "rouge_1, rouge_2 and rouge_l are F1 as rouge-chinese computes it, over characters, the mean of all answers.",
        "char_f1 is the F1 of the bags of characters; exact match allows spaces around the text.",
        *notes_on(answers),
    ]
    first = [[join_messages(q.prompt), a.text, q.reference, a.end] for q, a in zip(questions, answers)][:SHOWN]
    tables = [table, Table("The first answers", ["prompt", "answer", "reference", "end"], first)]
    return Report(f"Answers to {Path(cfg.data).name}", scores=scores, tables=tables, notes=notes)


def compare(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All scores of a list of answers: BLEU of the whole, of the others the mean."""
    pairs = list(zip(answers, references, strict=True))
    rouges = [metrics.rouge(metrics.characters(a), metrics.characters(r)) for a, r in pairs]
    each = [
        score | {"exact_match": metrics.exact_match(a, r), "char_f1": metrics.char_f1(a, r)}
        for score, (a, r) in zip(rouges, pairs)
    ]
    means = {name: sum(score[name] for score in each) / len(each) for name in each[0]}
    return {"bleu": metrics.corpus_bleu(answers, references)} | means


def read(path: str) -> list[Question]:
    """The questions of a file.

    Raises:
        UserError: no such file, no lines, a line that has no reference.
    """
    questions = []
    for where, item in files.read_jsonl(path):
        prompt, reference = item.get("prompt"), item.get("target")
        if isinstance(messages := item.get("messages"), list) and messages:
            last = messages[-1] if isinstance(messages[-1], dict) else {}
            prompt, reference = messages[:-1], last.get("content") if last.get("role") == "assistant" else None
        if not isinstance(prompt, (str, list)) or not prompt or not isinstance(reference, str) or not reference.strip():
            raise UserError(
                f"{where}: needs messages that end with the assistant's turn, or a prompt and a target",
                f"keys here: {', '.join(item)}",
            )
        questions.append(Question(where, prompt, reference, str(item.get("kind", ""))))
    if not questions:
        raise UserError(f"{path}: no questions in it")
    return questions


def ask(
    generator,
    prompts: Sequence[tuple[str, str | list[dict]]],
    batch: int,
    sampling: SamplingConfig,
    progress: Progress,
) -> list[Answer]:
    """The model's answers, in the prompts' order; those that `progress` has are not asked again.

    Args:
        generator: its model, tokenizer and chat format answer.
        prompts: (where it stands, text or messages). A base model goes on from the text.
        batch: texts at once.
    Raises:
        UserError: a prompt that the chat format does not know, named by where it stands.
    """
    # All prompts are encoded first: what is wrong with one of them shows before the model works.
    ids, left = [], []
    for k, (where, prompt) in enumerate(prompts):
        try:
            ids.append(generator.encode(prompt))
        except (UserError, TokenizerError) as e:
            raise UserError(f"{where}: {e}") from None
        if str(k) in progress.done:
            continue
        if len(ids[k]) > generator.context and sampling.truncate == "none":
            progress.add(str(k), Answer("", "no room", 0, 0.0))
        else:
            left.append(k)

    # Then they are answered, so many between two entries of the journal that a row whose text has ended early finds
    # another one.
    with tqdm(desc=generator.name, total=len(ids), initial=len(ids) - len(left), unit="answer", disable=None) as bar:
        for at in range(0, len(left), 4 * batch):
            some = left[at : at + 4 * batch]
            begun = time.perf_counter()
            groups = generator.continue_all([ids[k] for k in some], sampling, rows=batch)
            seconds = (time.perf_counter() - begun) / len(some)
            for k, (text,) in zip(some, groups):
                answer, made = generator.decode(ids[k], text.added), len(text.added) + (text.end == "stop")
                lost = len(ids[k]) - len(text.prompt)
                progress.add(str(k), Answer(answer, text.end, made, seconds, lost))
            bar.update(len(some))
    return [Answer(*progress.done[str(k)]) for k in range(len(prompts))]


def notes_on(answers: Sequence[Answer]) -> list[str]:
    """What a reader of the scores must know of the answers."""
    ends = [answer.end for answer in answers]
    cut, out = ends.count("length"), ends.count("no room")
    lost = [answer.lost for answer in answers if answer.lost]
    notes = [f"{cut} of {len(ends)} answers were cut off by max_new_tokens or the end of the context."] if cut else []
    notes += [
        f"{len(lost)} of {len(ends)} prompts were asked without their first tokens, {sum(lost):,} altogether, "
        "as they are longer than the model's context."
    ] * bool(lost)
    return notes + [
        f"{out} of {len(ends)} prompts are longer than the model's context: their answer counts as empty "
        "(--truncate left asks with the end of the prompt)."
    ] * bool(out)


def join_messages(prompt: str | list[dict]) -> str:
    """A prompt as one text: of several messages each behind its role."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)

"""C-Eval, CMMLU and MMLU: questions with four answers, of which the model finds one letter the most likely.

In:  a generator (a model with its tokenizer and chat format: assembly/inference.py); the official zip, or the folder
     that it unpacks to. Out: a report by subject and category.
Knows nothing of drawing: no answer is searched for in a text. The prompts are those of the benchmarks' own code:

    C-Eval  https://github.com/hkust-nlp/ceval, code/evaluator_series/evaluators/llama.py: the val split is scored,
            since the answers of test are kept back
    CMMLU   https://github.com/haonan-li/CMMLU, src/mp_utils.py: test is scored
    MMLU    https://github.com/hendrycks/test, evaluate.py: test is scored; " A" with its space, as in the examples
"""

import csv
import io
import math
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from extras.evaluation import likelihood, subjects
from extras.evaluation.report import Progress, Report, Table
from tokenizer import chat

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)
JOINT = 8  # a text has at most so many ids less than its two halves, far more than was ever seen
UNASKED = "-"  # instead of a letter, where not even the question alone fits into the context
CSV_BYTES = 64 << 20  # of a file in a zip, unpacked; the largest real one has 2 MB


class Question(NamedTuple):
    text: str
    answers: list[str]
    right: str  # a letter


@dataclass(frozen=True)
class Exam:
    """What one benchmark's files and prompts look like."""

    title: str
    categories: dict[str, dict[str, str]]  # category -> subject -> its name in the prompts
    second: tuple[str, Set[str]]  # a second view of some subjects: its name, and which
    scored: str  # the split; examples come from dev
    columns: tuple[str, ...]  # in lower case; () where the files have no header: text, A, B, C, D, answer
    intro: str
    question: str  # in front of each
    ask: str  # behind each
    space: str  # between that and the letter


COLUMNS = ("question", "a", "b", "c", "d", "answer")
EXAMS = {
    "ceval": Exam(
        title="C-Eval",
        categories=subjects.CEVAL,
        second=("Hard", subjects.CEVAL_HARD),
        scored="val",
        columns=COLUMNS,
        intro="以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n",
        question="",
        ask="答案：",
        space="",
    ),
    "cmmlu": Exam(
        title="CMMLU",
        categories=subjects.CMMLU,
        second=("China specific", subjects.CMMLU_CHINA),
        scored="test",
        columns=COLUMNS,
        intro="以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
        question="题目：",
        ask="答案是：",
        space="",
    ),
    "mmlu": Exam(
        title="MMLU",
        categories=subjects.MMLU,
        second=("", set()),
        scored="test",
        columns=(),
        intro="The following are multiple choice questions (with answers) about {}.\n\n",
        question="",
        ask="Answer:",
        space=" ",
    ),
}


def run(kind: str, generator, cfg, sampling, progress: Progress) -> Report:
    """One of EXAMS; nothing is drawn, so `sampling` is not used. A finished subject is a line of the journal."""
    exam = EXAMS[kind]
    examples, scored = read(exam, Path(cfg.data))
    found: dict[str, dict] = {}
    for category, names in exam.categories.items():
        for subject in (s for s in names if s in scored):
            if subject not in progress.done:
                began, asked = time.perf_counter(), scored[subject][: cfg.limit or None]
                result = ask_subject(exam, generator, names[subject], examples[subject], asked, cfg)
                progress.add(subject, result)
                right, seconds = count_right(result), time.perf_counter() - began
                progress.tell(f"{subject} ({category}): {right} of {len(asked)}, {seconds:.1f} s")
            found[subject] = progress.done[subject]
    return make_report(exam, found, generator, cfg)


ceval, cmmlu, mmlu = (partial(run, kind) for kind in EXAMS)


# Files ----------------------------------------------------------------------------------------------------------------


def read(exam: Exam, path: Path) -> tuple[dict[str, list[Question]], dict[str, list[Question]]]:
    """Examples and scored questions of each subject.

    Raises:
        UserError: not this benchmark's files, or a file that is not as it should be, named with its line.
    """
    known = {subject for names in exam.categories.values() for subject in names}
    found: dict[str, dict[str, list[Question]]] = {"dev": {}, exam.scored: {}}
    for name, content in read_csv_files(path):
        split, stem = Path(name).parts[-2:] if len(Path(name).parts) > 1 else ("", name)
        subject = Path(stem).stem.removesuffix(f"_{split}")
        if split in found:
            if subject not in known:
                raise UserError(f"{path}: {name} is no subject of {exam.title}", "another benchmark's files?")
            found[split][subject] = list(read_questions(exam, f"{path}/{name}", content))
            if not found[split][subject]:
                raise UserError(f"{path}/{name}: no questions in it")
    examples, scored = found["dev"], found[exam.scored]
    if not scored or scored.keys() - examples.keys():
        lacking = sorted(scored.keys() - examples.keys())
        what = f"dev has no {lacking[0]}" if lacking else f"no folder {exam.scored} with .csv files"
        raise UserError(f"{path}: {what}", f"the zip of {exam.title}, or the folder it unpacks to")
    return examples, scored


def read_csv_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each .csv in a folder or zip, in the order of their names."""
    if path.is_dir():
        for file in sorted(path.rglob("*.csv")):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                if entry.filename.endswith(".csv") and "__MACOSX" not in entry.filename:
                    with archive.open(entry) as f:
                        content = f.read(CSV_BYTES + 1)
                    if len(content) > CSV_BYTES:
                        raise UserError(f"{path}: {entry.filename} is larger than {CSV_BYTES:,} bytes")
                    yield entry.filename, content
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:  # the last: encrypted
        raise UserError(f"{path}: not a whole zip: {e}") from None


def read_questions(exam: Exam, where: str, content: bytes) -> Iterator[Question]:
    """Rows of one file."""
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        width, columns = 6, list(range(6))
        if exam.columns:
            header = [name.strip().lower() for name in next(rows, [])]
            if lacking := [name for name in exam.columns if name not in header]:
                raise UserError(f"{where}:1: no column {lacking[0]!r}", f"columns here: {', '.join(header)}")
            width, columns = len(header), [header.index(name) for name in exam.columns]
        for row in rows:
            if len(row) != width:
                raise UserError(f"{where}:{rows.line_num}: {len(row)} columns instead of {width}")
            text, *answers, right = (row[k] for k in columns)
            if right.strip() not in tuple(LETTERS):
                raise UserError(f"{where}:{rows.line_num}: the answer is {right!r:.40}, not one of A, B, C, D")
            yield Question(text, answers, right.strip())
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start}") from None
    except csv.Error as e:
        raise UserError(f"{where}:{rows.line_num}: {e}") from None


# Prompts --------------------------------------------------------------------------------------------------------------


def write_prompt(exam: Exam, subject: str, examples: Iterable[Question], question: Question) -> str:
    """The text up to where the letter has to come."""
    return (
        exam.intro.format(subject) + "".join(write_example(exam, q) for q in examples) + write_question(exam, question)
    )


def write_question(exam: Exam, q: Question) -> str:
    options = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, q.answers))
    return f"{exam.question}{q.text}\n{options}\n{exam.ask}"


def write_example(exam: Exam, example: Question) -> str:
    """A question with its answer."""
    return f"{write_question(exam, example)}{exam.space}{example.right}\n\n"


def make_requests(generator, prompt: str, space: str) -> list[likelihood.Request]:
    """For each letter the ids up to it and its own, which differ between the letters.

    Prompt and letter are encoded together: a vocabulary may join the letter with what is in front of it, or write it
    in several ids. A chat model is asked in its format, and answers with the letter.
    """
    tokenizer = generator.tokenizer
    if generator.chat_format:
        turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": a}] for a in LETTERS]
        whole = [chat.render(messages, tokenizer, generator.chat_format)[0] for messages in turns]
    else:
        whole = [tokenizer.encode(prompt + space + letter, bos=True) for letter in LETTERS]
    # What all have in common at the beginning is read; what ends an answer is the same for all, and says nothing.
    begin, end = count_common(whole), 0
    while min(map(len, whole)) - end > begin + 1 and len({ids[-1 - end] for ids in whole}) == 1:
        end += 1
    return [likelihood.Request(ids[:begin], ids[begin : len(ids) - end]) for ids in whole]


def count_common(rows: list[list[int]]) -> int:
    """How many ids all rows have in common at their beginning."""
    return next((k for k, ids in enumerate(zip(*rows)) if len(set(ids)) > 1), min(map(len, rows)))


def fit_shots(
    exam: Exam, generator, subject: str, examples: list[Question], question: Question
) -> tuple[int, list[likelihood.Request]]:
    """As many of the examples, the last ones, as the context has room for, and the requests; none: (0, [])."""
    # First by adding up, so that what is far too long is not encoded; where parts meet, they may share some ids.
    size, most = len(generator.tokenizer.encode(write_prompt(exam, subject, [], question))) - JOINT, 0
    for example in reversed(examples):
        size += count_ids(generator.tokenizer, write_example(exam, example)) - JOINT
        most += size <= generator.context
    # Then exactly.
    for shots in range(most, -1, -1):
        prompt = write_prompt(exam, subject, examples[len(examples) - shots :], question)
        requests = make_requests(generator, prompt, exam.space)
        if max(len(request.read) for request in requests) <= generator.context:
            return shots, requests
    return 0, []


@lru_cache(maxsize=64)
def count_ids(tokenizer, example: str) -> int:
    """Ids of an example, which stands in front of many questions."""
    return len(tokenizer.encode(example))


def ask_subject(exam: Exam, generator, subject: str, examples: list[Question], asked: list[Question], cfg) -> dict:
    """Right and chosen letters, a character a question; the examples each had; how many had no single best letter, and
    how many the tokenizer cannot write."""
    if len(examples) < cfg.shots:
        raise UserError(f"{exam.title} has {len(examples)} examples for {subject}", f"--shots {len(examples)}")
    # All letters of all questions in as few batches as possible.
    shots, groups = zip(*(fit_shots(exam, generator, subject, examples[: cfg.shots], question) for question in asked))
    requests = [request for group in groups for request in group]
    values = iter(likelihood.log_likelihoods(generator.model, requests, cfg.batch))

    # The likeliest letter of each question; the first of several that are equally likely.
    chosen, ties = "", 0
    for group in groups:
        found = [next(values) for _ in group]
        chosen += LETTERS[found.index(max(found))] if found else UNASKED
        ties += bool(found) and found.count(max(found)) > 1
    garbled = sum(not can_write(generator.tokenizer, "\n".join([q.text, *q.answers])) for q in asked)
    right = "".join(q.right for q in asked)
    return {"right": right, "chosen": chosen, "shots": list(shots), "ties": ties, "garbled": garbled}


def can_write(tokenizer, text: str) -> bool:
    """Whether the text comes back from the tokenizer as it was."""
    return tokenizer.decode(tokenizer.encode(text)) == text


def count_right(result: dict) -> int:
    return sum(a == b for a, b in zip(result["right"], result["chosen"]))


# Scores ---------------------------------------------------------------------------------------------------------------


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share; unlike the normal one it stays within 0 and 1, and has a width at both.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    p, square = right / of, z * z / of
    middle, half = p + square / 2, z * math.sqrt(p * (1 - p) / of + square / of / 4)
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def mean_of_shares(counts: list[tuple[int, int]], z: float = 1.96) -> tuple[float, float, float]:
    """The mean of shares (right, of), and its 95 % interval.

    A subject with no or all answers right would have no variance, so each is taken to have one more of both kinds.
    Source: Agresti and Caffo 2000, https://doi.org/10.1080/00031305.2000.10474560
    """
    mean = sum(right / of for right, of in counts) / len(counts)
    smooth = [((right + 1) / (of + 2), of + 2) for right, of in counts]
    half = z * math.sqrt(sum(p * (1 - p) / n for p, n in smooth)) / len(counts)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def make_report(exam: Exam, found: dict[str, dict], generator, cfg) -> Report:
    """Scores of what was asked; what was not is a note."""
    # How many were right, and asked, in each subject.
    counts = {s: (count_right(r), sum(letter != UNASKED for letter in r["chosen"])) for s, r in found.items()}
    counts = {subject: count for subject, count in counts.items() if count[1]}
    total = sum(len(r["right"]) for r in found.values())
    right, asked = (sum(numbers) for numbers in zip(*counts.values())) if counts else (0, 0)
    if not asked:
        raise UserError(f"none of {total} questions fits into the model's {generator.context} positions")

    # The tables: by category, by subject, by letter.
    groups = {category: [s for s in names if s in counts] for category, names in exam.categories.items()}
    groups[exam.second[0]] = [s for s in counts if s in exam.second[1]]
    groups["all"] = list(counts)
    by_category = [[name, *mean_row([counts[s] for s in members])] for name, members in groups.items() if members]
    of = {subject: category for category, names in exam.categories.items() for subject in names}
    by_subject = [[s, of[s], n, k, k / n, *wilson(k, n), verdict(*wilson(k, n))] for s, (k, n) in counts.items()]
    chosen = Counter("".join(r["chosen"] for r in found.values()))
    answers = Counter("".join(r["right"] for r in found.values()))
    interval = ["from", "to", "beside 25 %"]
    tables = [
        Table("Categories", ["category", "subjects", "questions", "mean of subjects", *interval], by_category),
        Table("Subjects", ["subject", "category", "questions", "right", "accuracy", *interval], by_subject),
        Table("Letters", ["letter", "chosen", "right answers"], [[a, chosen[a], answers[a]] for a in LETTERS]),
    ]

    # The scores, and what a reader must know of them.
    mean, low, high = mean_of_shares(list(counts.values()))
    scores = {
        "mean_of_subjects": mean,
        "mean_low": low,
        "mean_high": high,
        "chance": CHANCE,
        "accuracy_of_questions": right / asked,
        "accuracy_low": wilson(right, asked)[0],
        "accuracy_high": wilson(right, asked)[1],
        "questions": asked,
        "right": right,
        "not_asked": total - asked,
    }
    notes = [describe_mean(mean, low, high), *describe_gaps(exam, found, total - asked, asked, generator, cfg)]
    return Report(f"{exam.title}, {cfg.shots}-shot, split {exam.scored}", scores=scores, tables=tables, notes=notes)


def mean_row(counts: list[tuple[int, int]]) -> list:
    mean, low, high = mean_of_shares(counts)
    return [len(counts), sum(n for _, n in counts), mean, low, high, verdict(low, high)]


def verdict(low: float, high: float) -> str:
    """Where an interval lies."""
    return "above" if low > CHANCE else "below" if high < CHANCE else "not told apart"


def describe_mean(mean: float, low: float, high: float) -> str:
    words = {"above": "above", "below": "below", "not told apart": "not significantly different from"}
    return (
        f"Mean of the subjects {mean:.1%}, 95 % interval {low:.1%} to {high:.1%}: {words[verdict(low, high)]} the "
        "25 % of guessing. The interval covers the choice of questions, not the choice of prompts."
    )


def describe_gaps(exam: Exam, found: dict[str, dict], unasked: int, asked: int, generator, cfg) -> list[str]:
    """Notes on all that was not as it was asked for."""
    notes = [
        f"Asked in the chat format {generator.chat_format}, examples and question in one message."
        if generator.chat_format
        else "Asked as a text to continue."
    ]

    # What was left out.
    if cfg.limit:
        notes.append(f"With limit {cfg.limit:,}: only the first questions of each subject.")
    lacking = sum(map(len, exam.categories.values())) - len(found)
    if lacking:
        notes.append(f"{lacking} of {exam.title}'s subjects are not in {Path(cfg.data).name}.")
    shots = [s for r in found.values() for s, letter in zip(r["shots"], r["chosen"]) if letter != UNASKED]
    if dropped := sum(s < cfg.shots for s in shots):
        notes.append(
            f"Shots dropped in {dropped:,} of {asked:,} questions, the first ones first, to fit into the "
            f"{generator.context:,} positions: {sum(shots) / asked:.2f} were shown on average."
        )
    if unasked:
        notes.append(
            f"{unasked:,} of {asked + unasked:,} questions were not asked, since they do not fit into the "
            f"{generator.context:,} positions even without shots; they are in no share."
        )

    # What makes a score say less than it seems to: characters that were never seen, one letter for all questions, ties.
    if garbled := sum(r["garbled"] for r in found.values()):
        notes.append(f"{garbled:,} questions have characters that the tokenizer cannot write and the model never saw.")
    letter, most = Counter("".join(r["chosen"] for r in found.values()).replace(UNASKED, "")).most_common(1)[0]
    if most > 0.8 * asked:
        those = sum(a == letter != UNASKED != b for r in found.values() for a, b in zip(r["right"], r["chosen"]))
        notes.append(f"{letter} was chosen in {most:,} of {asked:,} questions, and is the right one in {those:,}.")
    if ties := sum(r["ties"] for r in found.values()):
        notes.append(f"In {ties:,} questions several letters are the most likely; the first of them was taken.")
    return notes

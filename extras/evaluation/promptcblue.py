"""PromptCBLUE: the tasks of a Chinese medical benchmark, asked and answered in words.

In:  a generator (a model with its tokenizer and chat format: assembly/inference.py);
     JSONL lines {"input", "target", "answer_choices", "task_type", "task_dataset"}, as the benchmark has them.
Out: a report: for each task how well the answers agree with the targets, and how many had no form that can be read.
Knows the form in which each type of task wants its answer, and nothing of medicine.

    python evaluate.py promptcblue --model out/sft --data promptcblue_dev.jsonl --max_new_tokens 512

The score of a task is that of the benchmark's own script (https://github.com/michael-wzhu/PromptCBLUE, src/evaluation):

    task_type              the answer is read as               score
    ner, spo_generation,   a set of items,                     micro F1: over the items of all answers together
    attr_cls, normalization, event_extraction
    cls, matching          one of answer_choices or            F1 of each label, their mean weighted by how often it is
                           非上述类型                          wanted (the plain mean for CHIP-CTC, KUAKE-QIC and
                                                               IMCS-V2-DAC)
    report_generation      a text for each of six sections     ROUGE-L over words, the mean of all sections
    response_generation    a text                              ROUGE-L over words, the mean of all answers

Where the script is silent or brittle, these are ours, and for an answer in the wanted form they change nothing:

- A label is also found inside a longer answer, at each place the longest that fits, if it is the only one there. The
  script takes the whole answer as the label, so that each unusual answer becomes a label of its own with an F1 of 0.
- The line that leads in (上述句子中的实体包含：) may be missing, the script drops the first line unseen. A line without
  the wanted form is passed over. A state that is none of answer_choices stays as it is, and so is wrong.
- An answer without anything in the wanted form is counted as unparsed, and gives no item, label or section.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from core import files
from core.errors import UserError
from core.generate import SamplingConfig
from extras.evaluation import metrics
from extras.evaluation.generation import Answer, ask, notes_on
from extras.evaluation.report import Progress, Report, Table

NONE_OF_THEM = ("非上述类型", "含有多个类别")  # labels that are right at times without being among the choices
ALIKE = {"相同": "是的", "不同": "不是"}  # CHIP-STS asks in both ways
NOTHING = ("没有指定", "没有对应")  # 上述句子没有指定类型实体, 没有对应的标准化实体: the form of an empty set
PLAIN_MEAN = {"CHIP-CTC", "KUAKE-QIC", "IMCS-V2-DAC"}
EVENT = ("主体词", "发生状态", "描述词", "解剖部位")
SECTIONS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")
EMPTY = ["无", "。"]  # what the benchmark compares where a text is empty


class Question(NamedTuple):
    """A line of the data."""

    where: str
    task: str
    type: str
    choices: list[str]
    prompt: str
    target: str


# What an answer says: None where nothing in it has the wanted form ----------------------------------------------------


def parse_entities(text: str, choices: Sequence[str]) -> set[tuple] | None:
    """`疾病实体：肺外结核病，喉结核`, a line for each type -> {("疾病", "肺外结核病"), ...}."""
    found, formed = set(), is_empty_set(text)
    for line in text.split("\n"):
        kind, mark, names = line.strip().partition("实体：")
        if mark and kind in choices:
            formed = True
            found |= {(kind, name.strip()) for name in names.split("，") if name.strip()}
    return found if formed else None


def parse_relations(text: str, choices: Sequence[str]) -> set[tuple] | None:
    """`具有同义词关系的头尾实体对如下：头实体为A，尾实体为B。头实体为...` -> {("同义词", "A", "B"), ...}."""
    found, formed = set(), is_empty_set(text)
    for line in text.split("\n"):
        head = re.match(r"具有(.+?)关系的头尾实体对如下：", line.strip())
        if head:
            formed = True
            pairs = (pair.split("，尾实体为") for pair in line.strip()[head.end() :].split("。"))
            found |= {(head[1], p[0].strip().removeprefix("头实体为"), p[1].strip()) for p in pairs if len(p) > 1}
    return found if formed else None


def parse_states(text: str, choices: Sequence[str]) -> set[tuple] | None:
    """`咳嗽：患有该症状`, a line for each finding -> {("咳嗽", "患有该症状"), ...}."""
    lines = (line.split("：") for line in text.split("\n"))
    found = {(line[0].strip(), line[1].strip()) for line in lines if len(line) == 2 and line[1].strip()}
    return found if is_empty_set(text) or any(state in choices for _, state in found) else None


def parse_events(text: str, choices: Sequence[str]) -> set[tuple] | None:
    """`主体词：腹胀；发生状态：否定；描述词：a，b；解剖部位：腹`, a line each ->
    {("腹胀", "否定", ("a", "b"), ("腹",)), ...}."""
    found = set()
    for line in text.split("\n"):
        fields = dict(field.strip().split("：", 1) for field in line.split("；") if "：" in field)
        if EVENT[0] in fields:
            name, state, *lists = (fields.get(key, "").strip() for key in EVENT)
            found.add((name, state, *(tuple(v.strip() for v in value.split("，") if v.strip()) for value in lists)))
    return found if found or is_empty_set(text) else None


def parse_terms(text: str, choices: Sequence[str]) -> set[tuple] | None:
    """`双子宫，双阴道` in the last line -> {("双子宫",), ("双阴道",)}; what is none of the choices is passed over."""
    found = {(term.strip(),) for term in text.strip().split("\n")[-1].split("，") if term.strip() in choices}
    return found if found or is_empty_set(text) else None


def parse_label(text: str, choices: Sequence[str]) -> str | None:
    """The one label that the answer names."""
    alike = [other for other, name in ALIKE.items() if name in choices]
    # The longest first, so that 不相关 is not read as 相关.
    known = sorted({*choices, *NONE_OF_THEM, *alike}, key=len, reverse=True)
    said = text.strip()
    found = [said] if said in known else re.findall("|".join(map(re.escape, known)), said)
    named = {ALIKE.get(name, name) for name in found}
    return named.pop() if len(named) == 1 else None


def parse_sections(text: str, choices: Sequence[str]) -> dict[str, str] | None:
    """`主诉：咳嗽。`, a line for each section -> {"主诉": "咳嗽。", ...}."""
    lines = (line.strip().partition("：") for line in text.split("\n"))
    return {name: said.strip() for name, mark, said in lines if mark and name in SECTIONS} or None


def parse_reply(text: str, choices: Sequence[str]) -> str | None:
    """The answer itself."""
    return text.strip() or None


def is_empty_set(text: str) -> bool:
    """Whether the answer says that there is nothing of what was asked for."""
    return any(words in text for words in NOTHING)


PARSERS: dict[str, Callable] = {
    "ner": parse_entities,
    "spo_generation": parse_relations,
    "attr_cls": parse_states,
    "event_extraction": parse_events,
    "normalization": parse_terms,
    "cls": parse_label,
    "matching": parse_label,
    "report_generation": parse_sections,
    "response_generation": parse_reply,
}


# Scores of a task -----------------------------------------------------------------------------------------------------


def score_items(said: Sequence[set | None], wanted: Sequence[set]) -> dict[str, float]:
    """Precision, recall and F1 of the items of all answers, and the share of answers with exactly the wanted ones."""
    said = [items or set() for items in said]
    right, made, there = (sum(map(len, sets)) for sets in ([a & b for a, b in zip(said, wanted)], said, wanted))
    precision, recall = right / made if made else 0.0, right / there if there else 0.0
    if not there and not made:  # nothing to be found in any of them, and nothing said
        precision = recall = 1.0
    exact = sum(a == b for a, b in zip(said, wanted)) / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "exact": exact}


def score_labels(said: Sequence[str | None], wanted: Sequence[str]) -> dict[str, float]:
    """Accuracy, and F1 as one number for many labels: micro, macro (the mean) and weighted (by how often wanted).

    The labels are all that are wanted or said; an answer without one is wrong, but no label. Micro F1 is the accuracy
    where all answers name a label, and above it where some do not, because those count for recall only.
    """
    right = Counter(a for a, b in zip(said, wanted) if a == b)
    made, there = Counter(a for a in said if a is not None), Counter(wanted)
    f1 = {name: 2 * right[name] / (made[name] + there[name]) for name in {*made, *there}}
    return {
        "accuracy": right.total() / len(wanted),
        "micro_f1": 2 * right.total() / (made.total() + there.total()),
        "macro_f1": sum(f1.values()) / len(f1),
        "weighted_f1": sum(f1[name] * there[name] for name in there) / len(wanted),
    }


def score_texts(said: Sequence[str | None], wanted: Sequence[str]) -> dict[str, float]:
    """ROUGE over words as the benchmark cuts them, the mean; an empty text stands as 无 。"""
    each = [metrics.rouge(metrics.words(a or "") or EMPTY, metrics.words(b) or EMPTY) for a, b in zip(said, wanted)]
    return {name: sum(score[name] for score in each) / len(each) for name in each[0]}


def score(task: str, kind: str, said: Sequence, wanted: Sequence) -> tuple[str, dict[str, float]]:
    """(name of the benchmark's own score, all scores) of a task's answers."""
    if PARSERS[kind] is parse_label:
        return "macro_f1" if task in PLAIN_MEAN else "weighted_f1", score_labels(said, wanted)
    if PARSERS[kind] is parse_sections:
        # Each section that is wanted is a text of its own.
        said = [(a or {}).get(name, "") for a, b in zip(said, wanted) for name in b]
        wanted = [text for b in wanted for text in b.values()]
    if PARSERS[kind] in (parse_sections, parse_reply):
        return "rouge_l", score_texts(said, wanted)
    return "f1", score_items(said, wanted)


# The evaluation -------------------------------------------------------------------------------------------------------


def run(generator, cfg, sampling: SamplingConfig, progress: Progress) -> Report:
    """Ask the questions of cfg.data, of each task the first cfg.limit ones, and score each task."""
    tasks = read(cfg.data)
    questions = [q for group in tasks.values() for q in (group[: cfg.limit] if cfg.limit else group)]
    answers = ask(generator, [(q.where, q.prompt) for q in questions], cfg.batch, sampling, progress)
    return evaluate(questions, answers)


def evaluate(questions: Sequence[Question], answers: Sequence[Answer]) -> Report:
    """The report on answers to questions."""
    # Each task has a score of its own kind, a row in the summary, and one in the table of its kind.
    grouped: dict[tuple[str, str], list[tuple[Question, Answer]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        grouped[question.task, question.type].append((question, answer))
    summary = Table("Tasks", ["task", "type", "n", "unparsed", "cut off", "score", "is"], [])
    details: dict[str, Table] = {}
    first = Table("First answer of each task", ["task", "answer", "target"], [])
    unread, floors = 0, []
    for (task, kind), pairs in grouped.items():
        parse = PARSERS[kind]
        said, wanted = [parse(a.text, q.choices) for q, a in pairs], [parse(q.target, q.choices) for q, _ in pairs]
        name, scores = score(task, kind, said, wanted)
        unparsed, cut = said.count(None), sum(a.end == "length" for _, a in pairs)
        unread += unparsed
        summary.rows.append([task, kind, len(pairs), unparsed, cut, scores[name], name])
        title = {"f1": "Items", "rouge_l": "Texts"}.get(name, "Labels")
        details.setdefault(title, Table(title, ["task", *scores], [])).rows.append([task, *scores.values()])
        first.rows.append([task, pairs[0][1].text, pairs[0][0].target])
        # What a model that says nothing would get, so that nobody takes it for skill.
        if name == "rouge_l":
            empty = score(task, kind, [None] * len(pairs), wanted)[1][name]
            floors.append(f"{task}: empty answers would score {empty:.3f}: the script compares 无 。 in their place.")

    # All tasks weigh the same.
    overall = sum(row[5] for row in summary.rows) / len(summary.rows)
    scores = {"overall": overall} | {f"{row[0]} {row[6]}": row[5] for row in summary.rows}
    notes = [
        f"overall {overall:.3f}: the mean of {len(grouped)} tasks' scores, each from 0 to 1.",
        f"{unread} of {len(answers)} answers had nothing in the form of their task (unparsed) and count as wrong.",
        *floors,
        *notes_on(answers),
    ]
    return Report("PromptCBLUE", scores=scores, tables=[summary, *details.values(), first], notes=notes)


def read(path: str) -> dict[str, list[Question]]:
    """The questions of each task, in the order of the file.

    Raises:
        UserError: no such file, no lines, a line without the fields, a type of task that is not known, a target that is
            not in the form of its task.
    """
    tasks: dict[str, list[Question]] = defaultdict(list)
    for where, item in files.read_jsonl(path):
        wrong = [key for key in ("input", "target", "task_type", "task_dataset") if not isinstance(item.get(key), str)]
        if wrong:
            raise UserError(f"{where}: {wrong[0]} is missing, or no text", f"keys here: {', '.join(item)}")
        kind, choices = item["task_type"], item.get("answer_choices") or []
        if kind not in PARSERS:
            raise UserError(f"{where}: task_type {kind!r} is not known", f"known: {', '.join(PARSERS)}")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{where}: answer_choices is not a list of texts")
        question = Question(where, item["task_dataset"], kind, choices, item["input"], item["target"])
        if PARSERS[kind](question.target, choices) is None:
            raise UserError(f"{where}: the target is not in the form of {kind}: {question.target[:60]!r}")
        tasks[question.task].append(question)
    if not tasks:
        raise UserError(f"{path}: no questions in it")
    return tasks

"""Several models beside each other: in numbers, and answer by answer to the same prompts.

In:  generators (models, each with its own tokenizer and chat format: assembly/inference.py); files of prompts, one a
     line; a text for bits per byte.
Out: a report, and the same as one HTML file without scripts or anything from elsewhere.
Knows nothing of which answer is better: that is for the reader.

    python evaluate.py compare out/sft out/lora --prompts configs/prompts/daily.txt --output out/compare.json

A base model goes on from the prompt, a chat model answers it.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

from core import files
from core.device import num_parameters
from core.errors import UserError
from core.generate import SamplingConfig
from extras.evaluation import bits
from extras.evaluation.generation import Answer, ask, notes_on
from extras.evaluation.report import Progress, Report, Table
from model import Llama

ANSWERS = "Answers"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f4f5f6; --ink: #1f2328; --faint: #5d646b; --line: #d9dce0;
        font: 16px/1.65 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --card: #20242a; --ink: #e4e6e9; --faint: #9aa2ab; --line: #383e46; }
}
* { box-sizing: border-box; }
body { max-width: 80rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.4rem; }
h2 { margin: 2rem 0 .6rem; font-size: 1.1rem; }
h3 { margin: 0 0 .2rem; font-size: .85rem; color: var(--faint); }
h2, h3, p, li, td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
td:first-child { min-width: 8rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .8rem; }
article { min-width: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
          border-radius: 8px; }
article p { margin: 0; white-space: pre-wrap; }
.empty, .notes { color: var(--faint); }
.notes { padding-left: 1.2rem; font-size: .9rem; }
"""


class Part:
    """A part of an evaluation's progress: its keys are those of the whole that begin with a prefix."""

    def __init__(self, whole: Progress, prefix: str):
        self.whole, self.prefix, self.tell = whole, prefix, whole.tell
        mine = [key for key in whole.done if key.startswith(prefix)]
        self.done = {key.removeprefix(prefix): whole.done[key] for key in mine}

    def add(self, key: str, value) -> None:
        """A finished unit, in the part and in the whole."""
        self.done[key] = value
        self.whole.add(self.prefix + key, value)


class Comparison(Report):
    """A report that is saved as a page, too."""

    def save(self, path: str | Path) -> None:
        super().save(path)
        files.write_text(Path(path).with_suffix(".html"), write_page(self))


def run(generators: Iterable, cfg, sampling: SamplingConfig, progress: Progress) -> Comparison:
    """Measure each model on cfg.data, if that is given, and ask it each of cfg.prompts, at most cfg.limit.

    Args:
        generators: where they are opened when asked for, there is one at a time in memory.
    """
    prompts = read_prompts(cfg.prompts)
    prompts = prompts[: cfg.limit] if cfg.limit else prompts
    if not prompts and not cfg.data:
        raise UserError("nothing to compare", "--prompts configs/prompts/daily.txt, or --data with a text")

    # One model after another: its row in the table of models, and its answers, a column beside those of the others.
    columns = ["model", "parameters", "vocabulary", "context", "speaks as", "bits per byte", "tokens per second"]
    models, names, answers, scores, notes = Table("Models", columns, []), [], [], {}, []
    for generator in generators:  # not enumerate, which would hold the one before
        number = len(names)
        name = generator.name if generator.name not in names else f"{generator.name} ({number + 1})"
        measured = bits.run(generator, cfg, sampling, Part(progress, f"{number} bits ")) if cfg.data else None
        given = ask(generator, prompts, cfg.batch, sampling, Part(progress, f"{number} "))
        bits_per_byte = describe_bits(measured)
        scores |= {f"{name} bits_per_byte": bits_per_byte} if isinstance(bits_per_byte, float) else {}
        models.rows.append([name, *describe_model(generator), bits_per_byte, measure_speed(given)])
        # The first of the notes on bits says the number that the table has.
        about = [*(measured.notes[1:] if measured else []), *notes_on(given)]
        notes += [f"{name}: {note}" for note in about]
        names.append(name)
        answers.append([answer.text for answer in given])
        del generator  # before the next one is loaded

    # The answers, prompt by prompt.
    notes.insert(0, f"Models: {len(names)}, prompts: {len(prompts)}.")
    if not prompts:
        return Comparison("Models side by side", scores=scores, tables=[models], notes=notes)
    notes.append(
        f"tokens per second: in batches of {cfg.batch}, reading the prompts included; tokens of "
        "different vocabularies are not equally long."
    )
    rows = [[prompt, *row] for (_, prompt), *row in zip(prompts, *answers)]
    tables = [models, Table(ANSWERS, ["prompt", *names], rows)]
    return Comparison("Models side by side", scores=scores, tables=tables, notes=notes)


def describe_bits(measured: Report | None) -> float | str:
    """Bits per byte; a text where there is no number that could be compared."""
    scores = measured.scores if measured else {}
    # What a vocabulary cannot write costs nothing.
    if scores.get("documents_changed"):
        return f"too low: {scores['bits_per_byte']:.4f}"
    return scores.get("bits_per_byte", "")


def describe_model(generator) -> list:
    """Parameters, vocabulary, context, and the format that the model answers in."""
    sizes = [count_parameters(generator.model), generator.tokenizer.vocab_size, generator.context]
    return [*sizes, generator.chat_format or "base"]


def measure_speed(answers: Sequence[Answer]) -> int | str:
    """Tokens per second of all answers together."""
    seconds, made = sum(a.seconds for a in answers), sum(a.tokens for a in answers)
    return round(made / seconds) if seconds else ""


def count_parameters(model: Llama) -> int:
    """How many the architecture has, also where they are quantised (a tied output layer then stands for itself)."""
    with torch.device("meta"):
        return num_parameters(type(model)(model.config))[0]


def read_prompts(paths: Iterable[str]) -> list[tuple[str, str]]:
    """("PATH:LINE", prompt) of each line that is not blank.

    Raises:
        UserError: no such file, not UTF-8, no prompts in it.
    """
    prompts = []
    for path in [paths] * bool(paths) if isinstance(paths, str) else paths:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
        found = [(f"{path}:{n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise UserError(f"{path}: no prompts in it")
        prompts += found
    return prompts


# The page -------------------------------------------------------------------------------------------------------------


def write_page(report: Report) -> str:
    """The report as one HTML file; every text in it is escaped, and the page may neither run nor load anything."""
    title = f"{report.task}: {', '.join(row[0] for row in report.tables[0].rows)}"
    about = Table("About", ["what", "value"], [[key, str(value)] for key, value in report.about.items()])
    models, *others = [*report.tables, *([about] if about.rows else [])]
    parts = [f"<h1>{escape(title)}</h1>", write_table(models)]
    parts += ['<ul class="notes">', *(f"<li>{escape(note)}</li>" for note in report.notes), "</ul>"]
    for table in others:
        plain = [f"<h2>{escape(table.title)}</h2>", write_table(table)]
        parts += write_answers(table) if table.title == ANSWERS else plain
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
"""
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def write_answers(table: Table) -> list[str]:
    """A section for each prompt, with a box for each model's answer."""
    parts = []
    for prompt, *answers in table.rows:
        parts.append(f'<section>\n<h2 lang="zh-CN">{escape(prompt)}</h2>\n<div class="answers">')
        for name, answer in zip(table.columns[1:], answers):
            said = f'<p lang="zh-CN">{escape(answer)}</p>' if answer.strip() else '<p class="empty">(nothing)</p>'
            parts.append(f"<article><h3>{escape(name)}</h3>{said}</article>")
        parts.append("</div>\n</section>")
    return parts


def write_table(table: Table) -> str:
    """A table as it is."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ["<tr>" + "".join(map(write_cell, row)) + "</tr>" for row in table.rows]
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def write_cell(value) -> str:
    """A number stands on the right, a float with four digits as in the Markdown."""
    if isinstance(value, (int, float)):
        return f'<td class="number">{f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"}</td>'
    return f"<td>{escape(str(value))}</td>"

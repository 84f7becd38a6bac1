"""What an evaluation found, and how far it has come.

In:  scores, tables, notes. Out: a JSON file and the same as Markdown beside it; while it runs, a journal beside both.
Knows nothing of models or tasks.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from core import files
from core.errors import UserError


@dataclass
class Table:
    """Rows under named columns; a float is shown with four digits behind the point."""

    title: str
    columns: list[str]
    rows: list[list]


@dataclass
class Report:
    """One evaluation.

    Args:
        task: what was evaluated.
        about: on what: model, data, options.
        scores: the results in numbers, by name; what has no value (an infinity, a share of nothing) is left out.
        tables: the results in detail.
        notes: sentences on how to read them, and on all that was left out.
    """

    task: str
    about: dict = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The report for people."""
        parts = [f"# {_line(self.task)}"]
        parts += ["\n".join(f"- {_line(note)}" for note in self.notes)] if self.notes else []
        tables = [Table("Scores", ["score", "value"], [list(pair) for pair in self.scores.items()]), *self.tables]
        parts += [_table(table) for table in tables if table.rows]
        parts += [_table(Table("About", ["what", "value"], [list(pair) for pair in self.about.items()]))]
        return "\n\n".join(parts) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report as JSON to `path`, and as Markdown beside it with the suffix .md."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path.with_suffix(".md"), self.markdown())
        files.write_json(path, asdict(self))


def _table(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return f"## {_line(table.title)}\n\n" + "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


def tell(line: str) -> None:
    """On stderr: what is printed may be the report."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """The units of an evaluation that are finished: each a line of a journal, so that a killed run goes on from there.

    Attributes:
        done: key -> value of each finished unit, as JSON gives it back.
        tell: takes a line on how far it is.

    Args:
        path: `PATH.part` is the journal; None: nothing is written.
        identity: all that the results depend on; a journal of another identity is not used.
    """

    def __init__(self, path: str | Path | None, identity: dict, tell=tell):
        self.done: dict[str, object] = {}
        self.tell = tell
        self._path = self._file = None
        if path is None:
            return
        self._path = Path(f"{path}.part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The first line says what the parts depend on.
        first = json.dumps(identity, ensure_ascii=False, sort_keys=True)
        lines = self._read()
        if lines and lines[0] == first:
            self.done = dict(self._unit(number, line) for number, line in enumerate(lines[1:], 2))
            tell(f"{self._path}: goes on after {len(self.done)} finished parts")
        elif lines:
            tell(f"{self._path}: of another model, data or options, begins anew")
        # The file is written anew: what a kill has torn is gone, and the next part begins a line.
        kept = [first, *(json.dumps(unit, ensure_ascii=False) for unit in self.done.items())]
        files.write_text(self._path, "\n".join(kept) + "\n")
        self._file = open(self._path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 -- open as long as the run

    def _read(self) -> list[str]:
        """Whole lines of the journal."""
        try:
            text = self._path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        except OSError as e:
            raise UserError(f"{self._path}: {e.strerror}") from None
        return text.split("\n")[:-1]  # behind the last newline there is nothing, or a torn line

    def _unit(self, number: int, line: str) -> tuple[str, object]:
        try:
            key, value = json.loads(line)
            if isinstance(key, str):
                return key, value
        except (ValueError, TypeError, RecursionError):
            pass
        raise UserError(f"{self._path}:{number}: not a line of a journal", "remove the file to begin anew")

    def add(self, key: str, value) -> None:
        """A finished unit; it is on the disk when this returns."""
        self.done[key] = value
        if self._file:
            self._file.write(json.dumps([key, value], ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The report is saved: the journal is not needed any more."""
        if self._file:
            self._file.close()
            self._path.unlink(missing_ok=True)

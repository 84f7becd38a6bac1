"""A chapter of the tutorial in, the output of its code blocks out.

    python docs/tutorial/chapters.py 4                 # run chapter 4 and print each block with what it prints

The ```python blocks of a chapter run in order, in one namespace, in an empty folder that is removed afterwards. A
block that prints is followed by a ```text block with what it should print. Knows nothing of what the code is about.
"""

import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:  # run as a program, Python knows only this file's own folder
    sys.path.insert(0, str(ROOT))

from core import errors  # noqa: E402

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def chapter(number: int, language: str = "zh") -> Path:
    """The file of a chapter.

    Args:
        number: from 1.
        language: zh or en.

    Raises:
        UserError: there is no such chapter.
    """
    found = {int(path.name[:2]): path for path in sorted((HERE / language).glob("*.md"))}
    if number not in found:
        raise errors.UserError(f"{HERE / language}: no chapter {number}", f"1 to {max(found)}")
    return found[number]


def fences(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a Markdown file, in order."""
    return FENCE.findall(path.read_text(encoding="utf-8"))


def run(path: Path, names: dict) -> Iterator[tuple[str, str, str]]:
    """Run a chapter's code in the working directory.

    Args:
        path: the chapter.
        names: the namespace of its blocks, empty at first; it holds their variables afterwards.

    Yields:
        (code, what it printed, what it should print) of each ```python block.
    """
    for (language, code), (after, expected) in itertools.pairwise([*fences(path), ("", "")]):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, path.name, "exec"), names)
            yield code, out.getvalue(), expected if after == "text" else ""


@contextlib.contextmanager
def empty_folder():
    """An empty working directory for the `with` block."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        raise errors.UserError("which chapter?", "python docs/tutorial/chapters.py 4")
    path = chapter(int(sys.argv[1]))
    with empty_folder():
        for code, printed, _ in run(path, {}):
            print("".join(f">>> {line}\n" for line in code.splitlines()) + printed)


if __name__ == "__main__":
    errors.run(main)

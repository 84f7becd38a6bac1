"""Promises of docs/tutorial: its code runs and prints what stands below it, the same in both languages; what it names exists."""

import ast
import codeop
import re
import sys
from pathlib import Path

import pytest
import torch

from core import errors

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs/tutorial"
sys.path.insert(0, str(TUTORIAL))  # its programs stand alone, beside each other

import chapters  # noqa: E402
import figures  # noqa: E402

NUMBERS = range(1, 12)
PAGES = sorted(TUTORIAL.rglob("*.md"))
FLOAT = re.compile(r"-?\d+\.\d+")
LINK = re.compile(r"\]\(([^)#]+)\)")


def same(printed: str, expected: str) -> bool:
    """Equal, but for numbers with a point, which may differ by 0.01: processors round differently."""
    near = zip(map(float, FLOAT.findall(printed)), map(float, FLOAT.findall(expected)))
    return FLOAT.split(printed) == FLOAT.split(expected) and all(abs(a - b) <= 0.0101 for a, b in near)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_chapter_prints_what_it_says(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    path = chapters.chapter(number)
    ran = list(chapters.run(path, {}))
    for code, printed, expected in ran:
        assert same(printed, expected), f"{path.name} prints\n{printed}not\n{expected}after\n{code}"
    assert sum(language == "text" for language, _ in chapters.fences(path)) == sum(bool(said) for _, _, said in ran)


@pytest.mark.parametrize("number", NUMBERS)
def test_both_languages_have_the_same_code_and_output(number):
    zh, en = chapters.chapter(number, "zh"), chapters.chapter(number, "en")
    assert zh.name == en.name
    assert chapters.fences(zh) == chapters.fences(en)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_chapter_can_be_pasted_into_pythons_prompt(number):
    for language, code in chapters.fences(chapters.chapter(number)):
        lines = []
        for line in code.split("\n") if language == "python" else ():
            lines.append(line)
            if codeop.compile_command("\n".join(lines)):
                lines = []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(TUTORIAL).as_posix())
def test_what_a_page_links_to_exists(page):
    text = chapters.FENCE.sub("", page.read_text(encoding="utf-8"))
    links = LINK.findall(text)
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods (as Class.method) of a Python file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("language, title", [("zh", "## 它在哪里\n"), ("en", "## Where is it?\n")])
def test_every_function_of_where_is_it_exists(language, title, number):
    path = chapters.chapter(number, language)
    lines = path.read_text(encoding="utf-8").split(title)[1].strip().splitlines()
    assert "".join(lines).count("`") <= 2 * 3, "at most three functions, or nobody looks them up"
    for line in lines:
        (link,), names = LINK.findall(line), set(re.findall(r"`([^`]+)`", line))
        assert names and names <= names_in(path.parent / link), f"{path.name}: {names - names_in(path.parent / link)}"


def test_the_index_names_every_chapter_in_both_languages():
    links = LINK.findall((TUTORIAL / "README.md").read_text(encoding="utf-8"))
    found = {page.relative_to(TUTORIAL).as_posix() for page in PAGES} - {"README.md"}
    assert found <= set(links) and len(found) == 2 * len(NUMBERS)


def test_every_figure_is_shown_in_both_languages_and_is_small():
    for language in ("zh", "en"):
        text = "".join(chapters.chapter(number, language).read_text(encoding="utf-8") for number in NUMBERS)
        assert {f"../img/{p.name}" for p in (TUTORIAL / "img").iterdir()} == {
            k for k in LINK.findall(text) if k.endswith(".png")
        }
    assert max(p.stat().st_size for p in (TUTORIAL / "img").iterdir()) < 60_000


def test_every_figure_is_drawn_by_our_code(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = figures.draw(tmp_path / "img")
    assert {p.name for p in drawn} == {p.name for p in (TUTORIAL / "img").iterdir()}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


def test_without_matplotlib_the_figures_end_with_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    with pytest.raises(SystemExit) as end:
        errors.run(figures.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the figures need matplotlib -- pip install matplotlib\n"


def test_a_chapter_runs_as_a_program(monkeypatch, capsys):
    before = Path.cwd()
    monkeypatch.setattr(sys, "argv", ["chapters.py", "3"])
    chapters.main()
    out = capsys.readouterr().out
    assert ">>> rows = BinRows(" in out and "\n2 rows, 0 tokens left over\n" in out
    assert Path.cwd() == before


def test_a_chapter_that_is_not_there_is_one_line():
    with pytest.raises(errors.UserError, match="no chapter 12 -- 1 to 11"):
        chapters.chapter(12)


@pytest.mark.parametrize(
    "printed, expected, equal",
    [
        ("loss 0.523\n", "loss 0.518\n", True),
        ("loss 0.53\n", "loss 0.51\n", False),
        ("3 rows\n", "4 rows\n", False),
        ("a 1.0\n", "b 1.0\n", False),
        ("[1.0, 2.0]\n", "[1.0]\n", False),
        ("x\n", "", False),
    ],
)
def test_only_numbers_with_a_point_may_differ_and_only_a_little(printed, expected, equal):
    assert same(printed, expected) == equal

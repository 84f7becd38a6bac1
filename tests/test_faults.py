"""Promise of faults.tsv: every fault we know of has a test that is there, or says that it has none."""

import ast
import csv
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAMILIES = {"TB": 12, "CO": 18, "TK": 6, "CK": 19, "TR": 20, "SF": 9, "SA": 9, "SV": 16}  # letters -> number of faults
MAY_BE_OPEN = re.compile(r"(CK|TR|SA)\d+|SF7|SF8")


def rows() -> list[dict]:
    with open(HERE / "faults.tsv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


def known_tests() -> set[str]:
    """FILE::NAME of every test, found without importing any."""
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in HERE.glob("test_*.py")}
    return {
        f"{name}::{node.name}"
        for name, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_fault_stands_once_and_none_is_left_out():
    assert [row["id"] for row in rows()] == [
        f"{family}{n + 1}" for family, count in FAMILIES.items() for n in range(count)
    ]


def test_every_fault_says_what_is_to_happen_and_which_tests_hold_it():
    for row in rows():
        assert len(row) == 4 and all(row.values()) and all(value == value.strip() for value in row.values()), row["id"]


def test_every_named_test_exists():
    known = known_tests()
    assert len(known) > 300
    missing = {
        row["id"]: absent for row in rows() if row["tests"] != "open" and (absent := set(row["tests"].split()) - known)
    }
    assert not missing


def test_only_faults_of_parts_to_come_are_open():
    assert [row["id"] for row in rows() if row["tests"] == "open" and not MAY_BE_OPEN.fullmatch(row["id"])] == []

"""Promises of `core/config.py`: defaults < TOML files left to right < flags, and nothing unknown passes."""

import dataclasses
import math
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from core import config
from core.config import Range, Section
from core.errors import UserError


@dataclass(frozen=True)
class Train:
    lr: float = 1e-3  # how fast
    max_steps: int = 10
    seed: int = 1
    out_dir: str = "out"
    compile: bool = False
    train: tuple[str, ...] = ("a", "b")
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_steps < 0:
            raise ValueError("max_steps is negative")


@dataclass(frozen=True)
class Data:
    path: str = "x.bin"
    seed: int = 2


SECTIONS = {"train": Train, "data": Data}


def load(*argv, default=None):
    return config.load("Train a thing.", SECTIONS, [str(a) for a in argv], default)


@pytest.fixture
def toml(tmp_path):
    """Text -> path of a TOML file."""

    def write(text, name="a.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(*argv, **kw):
    with pytest.raises(UserError) as e:
        load(*argv, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


# Precedence -----------------------------------------------------------------------------------------------------------


def test_without_anything_the_defaults_hold():
    assert vars(load()) == {"train": Train(), "data": Data()}


def test_files_go_over_defaults_left_to_right_and_flags_over_all(toml):
    first = toml("[train]\nlr = 1.0\nmax_steps = 1\nout_dir = 'first'\n[data]\nseed = 9\n")
    second = toml("[train]\nlr = 2.0\nmax_steps = 2\n", "b.toml")
    cfg = load("--lr", "3", first, second)
    assert cfg.train == Train(lr=3.0, max_steps=2, out_dir="first")
    assert cfg.data == Data(seed=9)
    assert load(second, first).train == Train(lr=1.0, max_steps=1, out_dir="first")


def test_of_two_equal_flags_the_last_holds():
    assert load("--lr", "3", "--train.lr=4").train.lr == 4.0


def test_the_default_file_is_read_only_where_no_other_is_named(monkeypatch, tmp_path, toml):
    default = toml("[train]\nmax_steps = 77\n")
    monkeypatch.chdir("/")  # it is found beside the code, not in the working folder
    assert load(default=str(default)).train.max_steps == 77
    assert load("--lr=2", default=str(default)).train.max_steps == 77
    assert load(toml("", "empty.toml"), default=str(default)).train.max_steps == 10


# Flags ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--train.lr=2e-4"], "lr", 2e-4),
        (["--train.lr", "2e-4"], "lr", 2e-4),
        (["--lr=2E-4"], "lr", 2e-4),
        (["--lr", "-1"], "lr", -1.0),
        (["--max_steps", "5"], "max_steps", 5),
        (["--max-steps=5"], "max_steps", 5),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--train.seed", str(2**63 - 1)], "seed", 2**63 - 1),
        (["--train.seed", str(10**30 + 1)], "seed", 10**30 + 1),
        (["--compile"], "compile", True),
        (["--compile=false"], "compile", False),
        (["--compile=True"], "compile", True),
        (["--out_dir", "路径 with space"], "out_dir", "路径 with space"),
        (["--out_dir="], "out_dir", ""),
        (["--out_dir=a=b"], "out_dir", "a=b"),
        (["--out_dir", "--x"], "out_dir", "--x"),
        (["--out_dir", "7"], "out_dir", "7"),
        (["--train.train", "c"], "train", ("c",)),
        (["--train.train=c,d"], "train", ("c", "d")),
        (["--train.train="], "train", ()),
        (["--sizes", "1,2"], "sizes", (1, 2)),
    ],
)
def test_a_flag_becomes_the_type_that_the_field_declares(argv, key, value):
    got = getattr(load(*argv).train, key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("lr = 2e-4", "lr", 2e-4),
        ("lr = 2", "lr", 2.0),
        ("max_steps = 9_000", "max_steps", 9000),
        (f"seed = {2**63 - 1}", "seed", 2**63 - 1),
        ("compile = true", "compile", True),
        ("train = []", "train", ()),
        ("train = ['c', 'd']", "train", ("c", "d")),
        ("sizes = [1, 2]", "sizes", (1, 2)),
        ("out_dir = '7'", "out_dir", "7"),
    ],
)
def test_a_toml_value_becomes_the_type_that_the_field_declares(toml, line, key, value):
    got = getattr(load(toml(f"[train]\n{line}\n")).train, key)
    assert got == value and type(got) is type(value)


def test_the_section_may_be_dropped_only_where_the_key_is_unique():
    assert load("--path", "y").data.path == "y"
    assert refusal("--seed", "3") == "--seed is ambiguous -- write --train.seed or --data.seed"
    assert load("--data.seed", "3").data.seed == 3


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--lrr", "1"], ("--lrr", "did you mean lr?")),
        (["--train.max_step=1"], ("train.max_step", "mean max_steps?")),
        (["--trian.lr=1"], ("trian", "did you mean train?")),
        (["--zzzzzz=1"], ("unknown", "known: ", "out_dir")),
        (["--=1"], ("unknown",)),
        (["--"], ("unknown",)),
        (["--train.=1"], ("unknown",)),
        (["--lr"], ("--lr needs a value",)),
        (["train"], ("'train'",)),
        (["-lr"], ("'-lr'",)),
        (["--lr", "fast"], ("--lr", "train.lr = 'fast'", "float")),
        (["--lr", ""], ("train.lr", "float")),
        (["--max_steps", "1.5"], ("train.max_steps = '1.5'", "int")),
        (["--max_steps", "5x"], ("int",)),
        (["--compile=maybe"], ("train.compile = 'maybe'", "bool")),
        (["--sizes", "1,x"], ("sizes", "'x'", "int")),
        *((["--lr", bad], ("train.lr", bad)) for bad in ("nan", "inf", "-inf", "1e999", "NaN", "infinity")),
        *((["--max_steps", bad], ("train.max_steps", bad)) for bad in ("nan", "inf", "1e999", "9" * 400)),
        (["--max_steps=-1"], ("[train] max_steps is negative", "set in --max_steps")),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line_that_names_it(argv, parts):
    said = refusal(*argv)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    "text, parts",
    [
        ("[train]\nlrr = 1\n", ("train.lrr", "did you mean lr?")),
        ("[trian]\nlr = 1\n", ("[trian]", "mean train?")),
        ("train = 1\n", ("train",)),
        ("lr = 1\n", ("lr",)),
        ("[[train]]\nlr = 1\n", ("train",)),
        ("[train.more]\nlr = 1\n", ("train.more",)),
        ("[train]\nlr = 'x'\n", ("train.lr", "float")),
        ("[train]\nlr = true\n", ("train.lr", "float")),
        ("[train]\nlr = nan\n", ("train.lr",)),
        ("[train]\nlr = -inf\n", ("train.lr",)),
        ("[train]\nlr = []\n", ("train.lr",)),
        ("[train]\nlr = 2020-01-01\n", ("train.lr",)),
        ("[train]\nmax_steps = 1.5\n", ("train.max_steps", "int")),
        ("[train]\nmax_steps = false\n", ("train.max_steps", "int")),
        ("[train]\nout_dir = 7\n", ("train.out_dir", "str")),
        ("[train]\nout_dir = {a = 1}\n", ("train.out_dir",)),
        ("[train]\ncompile = 1\n", ("train.compile", "bool")),
        ("[train]\ntrain = [1]\n", ("train.train", "str")),
        ("[train]\ntrain = 1\n", ("train.train", "list")),
        ("[train]\ntrain = [['a']]\n", ("train.train",)),
        ("[train]\nsizes = ['x']\n", ("train.sizes",)),
        ("[train]\nmax_steps = -3\n", ("[train] max_steps is negative", "set in ")),
        ("[train]\nmax_steps = 1" + "0" * 400 + "\n", ("train.max_steps",)),
        ("[train]\nlr = 1" + "0" * 400 + "\n", ("train.lr",)),
        ("[train]\nseed = " + "9" * 5000 + "\n", ("not valid TOML",)),
        ("[train\n", ("not valid TOML",)),
        ("[train]\nlr = 1\nlr = 2\n", ("not valid TOML",)),
        (b"\xff\xfe", ("not valid TOML",)),
        ("x = " + "[" * 5000 + "]" * 5000, ("not valid TOML",)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(toml, text, parts):
    path = toml(text)
    said = refusal(path)
    assert all(part in said for part in (str(path), *parts)), said


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert refusal(tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: No such file or directory"
    (tmp_path / "folder.toml").mkdir()
    assert str(tmp_path / "folder.toml") in refusal(tmp_path / "folder.toml")


# Choices and ranges ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounded(Section):
    kind: Literal["adamw", "muon"] = "adamw"
    maybe: Literal["", "short", "long"] = ""
    rows: Annotated[int, Range(least=1)] = 8
    steps: Annotated[int, Range(least=0)] = 0
    lr: Annotated[float, Range(above=0)] = 3e-4
    share: Annotated[float, Range(least=0, most=1)] = 0.5
    beta: Annotated[float, Range(least=0, below=1)] = 0.9
    wide: Annotated[float, Range(above=0, below=2)] = 1.0
    most: Annotated[int, Range(most=3)] = 1

    def __post_init__(self):
        super().__post_init__()
        if self.steps and self.steps < self.rows:
            raise ValueError(f"steps = {self.steps}, must be at least rows = {self.rows}")


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"kind": "sgd"}, "kind = 'sgd', must be one of adamw, muon"),
        ({"maybe": "x"}, "maybe = 'x', must be one of short, long"),
        ({"rows": 0}, "rows = 0, must be at least 1"),
        ({"steps": -1}, "steps = -1, must not be negative"),
        ({"lr": 0.0}, "lr = 0.0, must be above 0"),
        ({"lr": -1.0}, "lr = -1.0, must be above 0"),
        ({"share": 1.5}, "share = 1.5, must be from 0 to 1"),
        ({"share": -0.5}, "share = -0.5, must be from 0 to 1"),
        ({"beta": 1.0}, "beta = 1.0, must be at least 0 and below 1"),
        ({"wide": 2.0}, "wide = 2.0, must be above 0 and below 2"),
        ({"most": 4}, "most = 4, must be at most 3"),
        ({"steps": 5}, "steps = 5, must be at least rows = 8"),  # over several fields: the section's own check
        *(
            ({name: bad}, f"{name} = {bad}, ")
            for name in ("lr", "share", "beta", "wide")
            for bad in (math.nan, math.inf, -math.inf)
        ),
    ],
    ids=str,
)
def test_a_value_outside_the_choices_or_the_range_beside_its_field_is_refused(bad, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        Bounded(**bad)
    if all(math.isfinite(v) for v in bad.values() if isinstance(v, float)):
        words = [word for name, value in bad.items() for word in (f"--{name}", str(value))]
        said = refusal_of({"bounded": Bounded}, *words)
        assert said == f"[bounded] {says} -- set in --{next(iter(bad))}"


def test_values_at_the_edges_of_a_range_are_taken():
    edges = {"rows": 1, "steps": 0, "lr": 1e-300, "share": 1.0, "beta": 0.0, "wide": 1.999, "most": 3, "maybe": ""}
    assert dataclasses.asdict(Bounded(**edges)) == {"kind": "adamw", **edges}
    assert Bounded(share=0.0).share == 0 and Bounded(kind="muon", maybe="long").maybe == "long"


def test_choices_and_ranges_leave_the_type_of_flags_and_toml_as_it_is(toml):
    sections = {"bounded": Bounded}
    path = toml("[bounded]\nlr = 1\nkind = 'muon'\n")
    cfg = config.load("", sections, ["--rows", "1e2", str(path), "--maybe="]).bounded
    assert cfg == Bounded(kind="muon", lr=1.0, rows=100) and type(cfg.lr) is float and type(cfg.rows) is int
    assert "bounded.kind = 7 is not of type str" in refusal_of(sections, str(toml("[bounded]\nkind = 7\n", "b.toml")))
    assert "bounded.rows = '1.5' is not of type int" in refusal_of(sections, "--rows", "1.5")


def refusal_of(sections, *argv):
    with pytest.raises(UserError) as e:
        config.load("", sections, list(argv))
    return str(e.value)


# Sections that are declared by their path -----------------------------------------------------------------------------

WING = """from dataclasses import dataclass
from typing import Annotated
from core.config import Range, Section

@dataclass(frozen=True)
class WingConfig(Section):
    rank: Annotated[int, Range(least=0)] = 0  # of the wing
    seed: int = 5
"""


@pytest.fixture
def wing(tmp_path, monkeypatch):
    """Sections, one of which is in a module that nobody has imported, and whether somebody has by now."""
    name = f"wing_{tmp_path.name}"
    (tmp_path / "modules").mkdir()
    (tmp_path / f"modules/{name}.py").write_text(WING)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield {"train": Train, "wing": f"{name}:WingConfig"}, lambda: name in sys.modules
    sys.modules.pop(name, None)


def test_a_section_that_nobody_names_is_not_imported_and_is_none(wing, toml):
    sections, imported = wing
    cfg = config.load("", sections, ["--lr", "2", str(toml("[train]\nmax_steps = 3\n")), "--seed", "4"])
    assert cfg.train == Train(lr=2.0, max_steps=3, seed=4) and cfg.wing is None and not imported()
    # What it holds is neither shown nor saved.
    assert config.as_dict(cfg).keys() == {"train"} and "wing" not in config.show(cfg)
    assert sections["wing"].endswith(":WingConfig"), "the caller's own table stays as it is"


@pytest.mark.parametrize("how", ["flag", "flag with its section", "file"])
def test_a_section_is_imported_where_a_flag_or_a_file_names_it(wing, toml, how):
    sections, imported = wing
    words = {
        "flag": ["--rank", "3"],
        "flag with its section": ["--wing.rank=3"],
        "file": [str(toml("[wing]\nrank = 3\n"))],
    }
    cfg = config.load("", sections, words[how])
    assert imported() and dataclasses.asdict(cfg.wing) == {"rank": 3, "seed": 5}
    assert config.as_dict(cfg)["wing"]["seed"] == 5 and "[wing] rank=" in config.show(cfg)


def test_a_wrong_key_or_value_of_such_a_section_is_refused_as_any_other(wing, toml):
    sections, _ = wing
    assert refusal_of(sections, "--wing.rank=-1") == "[wing] rank = -1, must not be negative -- set in --rank"
    assert "unknown option --wing.rnk -- did you mean rank?" in refusal_of(sections, "--wing.rnk=1")
    assert "unknown key wing.rnk -- did you mean rank?" in refusal_of(sections, str(toml("[wing]\nrnk = 1\n")))
    assert refusal_of(sections, "--ranks", "1") == "unknown option --ranks -- did you mean rank?"
    assert "did you mean wing?" in refusal_of(sections, "--wign.rank=1")


def test_help_shows_such_a_section_like_the_others(wing, capsys):
    sections, imported = wing
    with pytest.raises(SystemExit):
        config.load("Train a thing.", sections, ["--help"])
    said = capsys.readouterr().out
    assert imported() and "--- [wing]" in said and "= 0  # of the wing" in said and "--- [train]" in said


def test_a_deleted_wing_takes_its_sections_with_it(wing, toml, capsys):
    sections, _ = wing
    sections |= {"gone": "extras.gone.wing:WingConfig"}
    with pytest.raises(SystemExit):
        config.load("", sections, ["--help"])
    said = capsys.readouterr().out
    assert "= 0  # of the wing" in said and "--- [gone]  not here: its wing was deleted" in said
    # Who asks for it is told; who makes another mistake, or asks for another wing, does not hear of it.
    for words in (["--gone.rank", "1"], [str(toml("[gone]\nrank = 1\n"))]):
        assert refusal_of(sections, *words) == "[gone] is declared in extras.gone.wing, which is not here"
    assert refusal_of(sections, "--ranks", "1") == "unknown option --ranks -- did you mean rank?"
    assert config.load("", sections, ["--rank", "2"]).wing.rank == 2


def test_a_module_that_a_wing_lacks_is_not_taken_for_a_deleted_wing(wing, tmp_path):
    sections, _ = wing
    name = sections["wing"].removesuffix(":WingConfig")
    path = tmp_path / f"modules/{name}.py"
    path.write_text(f"import {name}_part\n" + path.read_text())
    with pytest.raises(ModuleNotFoundError, match=f"{name}_part"):
        config.load("", sections, ["--help"])


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_description_and_the_source_of_the_sections(capsys, flag):
    with pytest.raises(SystemExit) as e:
        load("--lr=1", flag)
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert said.startswith("Train a thing.\n")
    assert "lr: float = 1e-3  # how fast" in said and 'path: str = "x.bin"' in said and "[data]" in said


def test_resolved_options_are_plain_data_that_loads_again(toml):
    cfg = load("--lr", "3", "--sizes=1,2", "--data.seed=5")
    plain = config.as_dict(cfg)
    assert plain["train"] == dataclasses.asdict(cfg.train) and plain["data"]["seed"] == 5
    assert "[train] lr=3.0 max_steps=10" in config.show(cfg) and len(config.show(cfg).split("\n")) == 2

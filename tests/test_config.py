"""Promises of `core/config.py`: defaults < TOML files left to right < flags, and nothing unknown passes."""

import dataclasses
import sys
from dataclasses import dataclass

import pytest

from core import config
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


# Sections of wings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wings(tmp_path, monkeypatch):
    """Sections of a wing that is here, of one that was deleted, and of one that lacks a module of its own."""
    (tmp_path / "wings/broken").mkdir(parents=True)
    (tmp_path / "wings/here").mkdir()
    section = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass One:\n    rank: int = 4  # of it\n"
    (tmp_path / "wings/here/one.py").write_text(section)
    (tmp_path / "wings/broken/one.py").write_text("import wings.broken.two\n" + section)
    monkeypatch.syspath_prepend(tmp_path)
    yield {"train": Train} | {name: f"wings.{name}.one:One" for name in ("here", "deleted")}
    for name in [name for name in sys.modules if name.split(".")[0] == "wings"]:
        del sys.modules[name]


def test_a_wing_is_imported_where_its_section_or_a_key_of_it_is_named(wings, toml):
    assert config.load("", wings, ["--lr", "2"]).here is None and "wings.here.one" not in sys.modules
    assert config.load("", wings, ["--rank", "2"]).here.rank == 2
    assert config.load("", wings, [str(toml("[here]\nrank = 3\n"))]).here.rank == 3


def test_a_deleted_wing_takes_its_sections_with_it(wings, toml, capsys):
    with pytest.raises(SystemExit):
        config.load("", wings, ["--help"])
    said = capsys.readouterr().out
    assert "rank: int = 4  # of it" in said and "--- [deleted]  not here: its wing was deleted" in said
    # Who asks for it is told, and who makes another mistake is told of that.
    for argv in (["--deleted.rank", "1"], [str(toml("[deleted]\nrank = 1\n"))]):
        with pytest.raises(UserError, match=r"\[deleted\] is declared in wings.deleted.one, which is not here"):
            config.load("", wings, argv)
    with pytest.raises(UserError, match="unknown option --rnak -- did you mean rank"):
        config.load("", wings, ["--rnak", "1"])


def test_a_module_that_a_wing_lacks_is_not_taken_for_a_deleted_wing(wings):
    with pytest.raises(ModuleNotFoundError, match=r"wings\.broken\.two"):
        config.load("", {"broken": "wings.broken.one:One"}, ["--help"])

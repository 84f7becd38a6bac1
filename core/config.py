"""Options: dataclass defaults < TOML files left to right < flags.

In:  a command's sections (name -> frozen dataclass) and its argv. Out: one instance per section.
Knows no section by name: each dataclass lives in the file that consumes it, its choices and ranges beside its fields.

    python pretrain.py configs/demo.toml configs/extra.toml --train.lr=2e-4 --max_steps 100

A flag is `--section.key=value`; the section may be dropped where the key is unique. What is not known is refused.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import pkgutil
import sys
import tomllib
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

from core.errors import UserError


class Range(NamedTuple):
    """The numbers that a field may hold: `lr: Annotated[float, Range(above=0)] = 3e-4`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        # NaN fails every comparison, and an infinity is no value of an option.
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        # The usual ranges have words of their own, which read better than their two bounds.
        if self == Range(least=0):
            return "must not be negative"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"must be from {self.least} to {self.most}"
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return "must be " + " and ".join(f"{word} {value}" for word, value in words.items() if math.isfinite(value))


@dataclasses.dataclass(frozen=True)
class Section:
    """What every section of options is derived from: it refuses a value outside its field's choices or range."""

    def __post_init__(self):
        # Ranges and choices are annotations, so that --help, which prints the source, shows them beside the defaults.
        for name, kind in _hints(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
                raise ValueError(f"{name} = {value!r}, must be one of {', '.join(filter(None, typing.get_args(kind)))}")
            for bound in getattr(kind, "__metadata__", ()):
                if not bound.holds(value):
                    raise ValueError(f"{name} = {value}, {bound}")


def load(doc: str, sections: dict[str, type | str], argv: list[str], default: str | None = None) -> SimpleNamespace:
    """Read the options of one command.

    Args:
        doc: the command's own description, for --help.
        sections: section name -> frozen dataclass whose fields all have defaults; or "package.module:Class" for one
            that is imported only where a file or a flag names it or one of its keys.
        argv: command-line words without the program's name.
        default: TOML file read where argv names none.
    Returns:
        A namespace with one dataclass instance per section, None for one declared by its path that nothing names.
    Raises:
        UserError: unknown section or key, a value of the wrong type, a dataclass that refuses its values.
    """
    sections = _Sections(sections)
    paths, flags = _split(argv, sections, doc)
    if default and not paths:
        # Beside the code, so that the command works from any folder.
        paths = [str(Path(__file__).resolve().parent.parent / default)]
    # Later settings go over earlier ones: the files from left to right, then the flags.
    settings = [(path, *item) for path in paths for item in _read_toml(path, sections)]
    settings += [(f"--{key}", section, key, text) for section, key, text in flags]
    given: dict[str, dict] = {name: {} for name in sections}  # section -> key -> (value, where it was set)
    for where, section, key, value in settings:
        given[section][key] = _convert(sections[section], section, key, value, where), where
    # A dataclass refuses what it cannot take; the message then says where the values were set.
    result = SimpleNamespace()
    for name, keys in given.items():
        values = {key: value for key, (value, _) in keys.items()}
        try:
            wanted = values or name in sections.eager
            setattr(result, name, sections[name](**values) if wanted else None)
        except ValueError as e:
            places = sorted({where for _, where in keys.values()})
            raise UserError(f"[{name}] {e}", f"set in {', '.join(places)}" if places else "") from None
    return result


def as_dict(cfg: SimpleNamespace) -> dict[str, dict]:
    """The resolved options as plain data, to be printed and saved."""
    return {name: dataclasses.asdict(section) for name, section in vars(cfg).items() if section is not None}


def show(cfg: SimpleNamespace) -> str:
    """The resolved options, a line per section."""
    lines = {name: " ".join(f"{k}={v}" for k, v in keys.items()) for name, keys in as_dict(cfg).items()}
    return "\n".join(f"[{name}] {line}" for name, line in lines.items())


class _Sections(dict):
    """Section name -> class; one that is declared by its path is imported when it is asked for."""

    def __init__(self, sections: dict[str, type | str]):
        super().__init__(sections)
        self.eager = {name for name in self if self.is_loaded(name)}  # these are there even where nothing names them

    def __getitem__(self, name: str) -> type:
        if not self.is_loaded(name):
            path = super().__getitem__(name)
            try:
                self[name] = pkgutil.resolve_name(path)
            except ModuleNotFoundError as e:
                # A wing may be deleted, and its sections are gone with it. What a wing lacks that is here is a bug.
                if not path.replace(":", ".").startswith(f"{e.name}."):
                    raise
                raise UserError(f"[{name}] is declared in {path.partition(':')[0]}, which is not here") from None
        return super().__getitem__(name)

    def is_here(self, name: str) -> bool:
        """Whether the module that declares a section is there."""
        try:
            return bool(self[name])
        except UserError:
            return False

    def is_loaded(self, name: str) -> bool:
        return not isinstance(super().__getitem__(name), str)

    def find(self, name: str) -> tuple[str, str]:
        """`section.key` or a key that only one section has -> (section, key)."""
        # With its section it is one option; else one section at most may have it.
        section, dot, key = name.partition(".")
        if dot and section not in self:
            raise UserError(f"unknown option --{name}", _near(section, self))
        if dot and key not in _hints(self[section]):
            raise UserError(f"unknown option --{name}", _near(key, _hints(self[section])))
        if dot:
            return section, key
        # First among the sections that are there: a search in the others imports their wings.
        homes = [s for s in self if self.is_loaded(s) and name in _hints(self[s])]
        homes = homes or [s for s in self if self.is_here(s) and name in _hints(self[s])]
        if len(homes) > 1:
            raise UserError(f"--{name} is ambiguous", "write " + " or ".join(f"--{s}.{name}" for s in homes))
        if not homes:
            known = [key for s in self if self.is_here(s) for key in _hints(self[s])]
            raise UserError(f"unknown option --{name}", _near(name, known))
        return homes[0], name


@functools.cache
def _hints(cls: type) -> dict[str, typing.Any]:
    """Field -> its declared type, with choices and ranges."""
    return typing.get_type_hints(cls, include_extras=True)


def _type(cls: type, key: str) -> type:
    """The type of a field's values: of a range or of choices that of its numbers or words."""
    kind = _hints(cls)[key]
    # Literal["a", "b"] holds words, Annotated[int, Range(least=1)] numbers.
    if typing.get_origin(kind) is Literal:
        return type(typing.get_args(kind)[0])
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind


def _is_list(cls: type, key: str) -> bool:
    return typing.get_origin(_type(cls, key)) is tuple


def _split(argv: list[str], sections: _Sections, doc: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Words of the command line -> TOML paths, and (section, key, text) of each flag."""
    # Words are taken one after another, since a flag may take the next ones as its value.
    paths, flags = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        # Flushed, so that a reader who has gone away (`| head`) shows here and not at exit.
        if word in ("-h", "--help"):
            print(_help(doc, sections), flush=True)
            sys.exit(0)
        if not word.startswith("--"):
            if not word.endswith(".toml"):
                raise UserError(f"unexpected argument {word!r}", "options look like --key value, files end in .toml")
            paths.append(word)
            continue
        # A flag: its value stands behind "=" or is the next word; a bool without one is true.
        name, equals, text = word[2:].partition("=")
        section, key = sections.find(name.replace("-", "_"))
        is_bool, is_list = _type(sections[section], key) is bool, _is_list(sections[section], key)
        if not equals and is_bool and (not words or words[0].lower() not in ("true", "false")):
            text = "true"
        elif not equals and not words:
            raise UserError(f"--{name} needs a value")
        elif not equals:
            text = words.pop(0)
            # A list takes all words up to the next option, so that `--input texts/*.txt` works.
            while is_list and words and not (words[0].startswith("--") or words[0].endswith(".toml")):
                text += "," + words.pop(0)
        flags.append((section, key, text))
    return paths, flags


def _near(word: str, known) -> str:
    """A hint for a word that is not known: the one that was probably meant, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _read_toml(path: str, sections: _Sections) -> list[tuple[str, str, typing.Any]]:
    """(section, key, value) of each line."""
    # A file of options, which the user wrote by hand: each mistake is said with the file's name.
    try:
        with open(path, "rb") as f:
            found = tomllib.load(f)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # also numbers and nesting beyond what Python reads
        raise UserError(f"{path}: not valid TOML: {e}") from None
    # A typo in a section's name must not lose its keys in silence.
    for section, keys in found.items():
        if not isinstance(keys, dict):
            raise UserError(f"{path}: {section} is outside of any section", f"sections are {', '.join(sections)}")
        if section not in sections:
            raise UserError(f"{path}: unknown section [{section}]", _near(section, sections))
    return [(section, key, value) for section, keys in found.items() for key, value in keys.items()]


def _convert(cls: type, section: str, key: str, value, where: str):
    """A TOML value or a flag's text as the type that the field declares."""
    name = f"{section}.{key}"
    if key not in _hints(cls):
        raise UserError(f"{where}: unknown key {name}", _near(key, _hints(cls)))
    kind = _type(cls, key)
    if not _is_list(cls, key):
        return _scalar(kind, name, value, where)
    # tuple[str, ...]: a TOML list, or comma-separated text.
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        raise UserError(f"{where}: {name} = {value!r} is not a list")
    return tuple(_scalar(typing.get_args(kind)[0], name, v, where) for v in items if v != "")


def _scalar(kind: type, name: str, value, where: str):
    """One word or number of an option, as `kind`."""
    problem = UserError(f"{where}: {name} = {value!r} is not of type {kind.__name__}")
    # TOML knows types and flags are text: a text is converted, a value of another type is a mistake.
    if kind is bool and isinstance(value, (bool, str)) and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, str):
        return value
    if kind in (bool, str) or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise problem
    # A number that is not finite, or not whole where it should be, is refused; 1e6 is a whole one.
    try:
        number = float(value)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise problem
        if kind is int and isinstance(value, str) and "e" in value.lower():
            return int(number)
        return kind(value)  # not of the float: 2**63 - 1 does not survive one
    except (ValueError, OverflowError):
        raise problem from None


def _help(doc: str, sections: _Sections) -> str:
    """The command's description and the source of its sections: names, defaults and reasons, never out of date."""
    parts = [inspect.cleandoc(doc or "")]
    for name in sections:
        if sections.is_here(name):
            parts.append(f"--- [{name}]  --{name}.KEY=VALUE\n" + inspect.getsource(sections[name]).rstrip())
        else:
            parts.append(f"--- [{name}]  not here: its wing was deleted")
    return "\n\n".join(parts)

"""Options: dataclass defaults < TOML files left to right < flags.

In:  a command's sections (name -> frozen dataclass) and its argv. Out: one instance per section.
Knows no section by name: each dataclass lives in the file that consumes it.

    python pretrain.py configs/demo.toml configs/extra.toml --train.lr=2e-4 --max_steps 100

A flag is `--section.key=value`; the section may be dropped where the key is unique. What is not known is refused.
"""

import dataclasses
import difflib
import inspect
import math
import sys
import tomllib
import typing
from pathlib import Path
from types import SimpleNamespace

from core.errors import UserError


def load(doc: str, sections: dict[str, type], argv: list[str], default: str | None = None) -> SimpleNamespace:
    """Read the options of one command.

    Args:
        doc: the command's own description, for --help.
        sections: section name -> frozen dataclass whose fields all have defaults.
        argv: command-line words without the program's name.
        default: TOML file read where argv names none.
    Returns:
        A namespace with one dataclass instance per section.
    Raises:
        UserError: unknown section or key, a value of the wrong type, a dataclass that refuses its values.
    """
    files, flags = _split(argv, sections, doc)
    values: dict[str, dict] = {name: {} for name in sections}
    origin: dict[tuple[str, str], str] = {}
    if default and not files:
        # Beside the code, so that the command works from any folder.
        files = [str(Path(__file__).resolve().parent.parent / default)]
    for path in files:
        for section, keys in _read_toml(path).items():
            if not isinstance(keys, dict):
                raise UserError(f"{path}: {section} stands outside a section", f"sections are {', '.join(sections)}")
            if section not in sections:
                raise UserError(f"{path}: unknown section [{section}]", _near(section, sections))
            for key, value in keys.items():
                values[section][key] = _convert(sections[section], section, key, value, path)
                origin[section, key] = path
    for section, key, text in flags:
        values[section][key] = _convert(sections[section], section, key, text, f"--{key}")
        origin[section, key] = f"--{key}"
    result = SimpleNamespace()
    for name, cls in sections.items():
        try:
            setattr(result, name, cls(**values[name]))
        except ValueError as e:
            places = sorted({where for (section, _), where in origin.items() if section == name})
            raise UserError(f"[{name}] {e}", f"set in {', '.join(places)}" if places else "") from None
    return result


def as_dict(cfg: SimpleNamespace) -> dict[str, dict]:
    """The resolved options as plain data, to be printed and saved."""
    return {name: dataclasses.asdict(section) for name, section in vars(cfg).items()}


def show(cfg: SimpleNamespace) -> str:
    """The resolved options, a line per section."""
    return "\n".join(
        f"[{name}] " + " ".join(f"{k}={v}" for k, v in keys.items()) for name, keys in as_dict(cfg).items()
    )


def _split(argv: list[str], sections: dict[str, type], doc: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Words of the command line -> TOML paths, and (section, key, text) of each flag."""
    files, flags = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(_help(doc, sections), flush=True)  # a reader gone away (`| head`) shows here, not at exit
            sys.exit(0)
        if not word.startswith("--"):
            if not word.endswith(".toml"):
                raise UserError(f"unexpected argument {word!r}", "options look like --key value, files end in .toml")
            files.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        section, key = _find(name.replace("-", "_"), sections)
        if not equals:
            if _field_type(sections[section], key) is bool and (not words or words[0].lower() not in ("true", "false")):
                text = "true"
            elif not words:
                raise UserError(f"--{name} needs a value")
            else:
                text = words.pop(0)
                # A list takes all words up to the next option, so that `--input texts/*.txt` works.
                while _is_list(sections[section], key) and words and not words[0].startswith("--"):
                    if words[0].endswith(".toml"):
                        break
                    text += "," + words.pop(0)
        flags.append((section, key, text))
    return files, flags


def _find(name: str, sections: dict[str, type]) -> tuple[str, str]:
    """`section.key` or a key that only one section has -> (section, key)."""
    section, dot, key = name.partition(".")
    if dot:
        if section not in sections:
            raise UserError(f"unknown option --{name}", _near(section, sections))
        if key not in _fields(sections[section]):
            raise UserError(f"unknown option --{name}", _near(key, _fields(sections[section])))
        return section, key
    homes = [s for s, cls in sections.items() if name in _fields(cls)]
    if len(homes) > 1:
        raise UserError(f"--{name} is ambiguous", "write " + " or ".join(f"--{s}.{name}" for s in homes))
    if not homes:
        raise UserError(f"unknown option --{name}", _near(name, [k for cls in sections.values() for k in _fields(cls)]))
    return homes[0], name


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)}


def _field_type(cls: type, key: str):
    return typing.get_type_hints(cls)[key]


def _is_list(cls: type, key: str) -> bool:
    return typing.get_origin(_field_type(cls, key)) is tuple


def _read_toml(path: str) -> dict:
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # also numbers and nesting beyond what Python reads
        raise UserError(f"{path}: not valid TOML: {e}") from None


def _convert(cls: type, section: str, key: str, value, where: str):
    """A TOML value or a flag's text as the type that the field declares."""
    if key not in _fields(cls):
        raise UserError(f"{where}: unknown key {section}.{key}", _near(key, _fields(cls)))
    kind = _field_type(cls, key)
    if _is_list(cls, key):  # tuple[str, ...]: a TOML list, or comma-separated text
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise UserError(f"{where}: {section}.{key} = {value!r} is not a list")
        return tuple(_scalar(typing.get_args(kind)[0], section, key, v, where) for v in items if v != "")
    return _scalar(kind, section, key, value, where)


def _scalar(kind: type, section: str, key: str, value, where: str):
    problem = UserError(f"{where}: {section}.{key} = {value!r} is not of type {kind.__name__}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise problem
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise problem
    if kind is str:
        if not isinstance(value, str):
            raise problem
        return value
    try:
        number = float(value)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise problem
        if kind is int and isinstance(value, str) and "e" in value.lower():
            return int(number)  # 1e6
        return kind(value)  # not of the float: 2**63 - 1 does not survive one
    except (ValueError, OverflowError):
        raise problem from None


def _help(doc: str, sections: dict[str, type]) -> str:
    """The command's description and the source of its sections: names, defaults and reasons, never out of date."""
    parts = [inspect.cleandoc(doc or "")]
    for name, cls in sections.items():
        parts.append(f"--- [{name}]  --{name}.KEY=VALUE\n" + inspect.getsource(cls).rstrip())
    return "\n\n".join(parts)

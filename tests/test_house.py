"""Promises of the house: imports point down, nothing is unpickled or evaluated, commands do nothing when imported.

Each rule is a function from a file's syntax tree to what breaks it, and is shown to catch a bad snippet.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIP = {"tests", "docs", "runs", "data", "out"}
FILES = sorted(
    p
    for p in ROOT.rglob("*.py")
    if not any(part in SKIP or part.startswith(".") for part in p.relative_to(ROOT).parts[:-1])
)
TREES = {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in FILES}
COMMANDS = {name.removesuffix(".py") for name in TREES if "/" not in name and name != "model.py"}
CORE_PACKAGES = {re.split(r"[<>=!~\[ ]", line)[0] for line in (ROOT / "requirements.txt").read_text().split() if line}


def layer(module: str) -> str:
    """Which floor of the house a module (dotted) stands on."""
    top = module.split(".")[0]
    return top if top in ("core", "extras", "tokenizer", "model") else "command" if top in COMMANDS else "foreign"


MAY_IMPORT = {
    "command": {"extras", "core", "model", "tokenizer"},
    "extras": {"core", "model", "tokenizer"},
    "core": {"core", "model", "tokenizer"},
    "tokenizer": {"tokenizer"},
    "model": set(),
}


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(name: str, tree: ast.AST, top_level: bool = False):
    """Dotted names that a file imports; with top_level only what it imports when it is itself imported."""
    nodes = [*tree.body] if top_level else [tree]
    while nodes:
        node = nodes.pop()
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_of(name).split(".")
            if node.level:  # from .x import y
                package = package[: len(package) - node.level + name.endswith("__init__.py")]
                base = ".".join(filter(None, [*package, node.module]))
            else:
                base = node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


def dotted(node: ast.expr, full: dict[str, str]) -> str:
    """`os.path.join` for that expression, with imported names in `full`; what is not written out is `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, full)}.{node.attr}"
    return full.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def full_names(name: str, tree: ast.AST) -> dict[str, str]:
    """What an imported name stands for: {"sp": "subprocess", "load": "torch.load"}."""
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return full


def options(node: ast.Call):
    """(name, its constant value or "?") of each keyword, those of a literal `**{...}` too."""
    for keyword in node.keywords:
        pairs = [(keyword.arg, keyword.value)]
        if keyword.arg is None:
            pairs = zip(keyword.value.keys, keyword.value.values) if isinstance(keyword.value, ast.Dict) else []
            pairs = [(getattr(key, "value", "?"), value) for key, value in pairs]
        for key, value in pairs:
            yield key, value.value if isinstance(value, ast.Constant) else "?"


# The rules ------------------------------------------------------------------------------------------------------------


def imports_point_down(name, tree):
    mine = layer(module_of(name))
    if mine == "tokenizer" and is_guard(tree.body[-1]):
        # Run with `python -m`, its main() is a command; what others import of the file knows nothing above it.
        command = [node for node in tree.body if is_guard(node) or getattr(node, "name", "") == "main"]
        tree = ast.Module([node for node in tree.body if node not in command], [])
        allowed = MAY_IMPORT["command"]
        yield from (
            f"{name} (its main) imports {other}"
            for node in command
            for other in imports(name, node)
            if layer(other) not in allowed | {"foreign"}
        )
    for other in imports(name, tree):
        theirs = layer(other)
        if theirs != "foreign" and theirs not in MAY_IMPORT[mine]:
            same_extra = mine == theirs == "extras" and other.split(".")[1:2] == module_of(name).split(".")[1:2]
            # One extra puts a model together for every command that asks it.
            if not same_extra and not (mine == theirs == "extras" and name == "extras/speaker.py"):
                yield f"{name} ({mine}) imports {other} ({theirs})"


def is_loaded_late(name) -> bool:
    """Whether functions alone import a file: what stands at its top then waits until one of them is called."""
    module, at_top, inside = module_of(name), set(), set()
    for other, tree in TREES.items():
        at_top |= set(imports(other, tree, top_level=True))
        inside |= set(imports(other, tree))
    return module in inside and not any(f"{found}.".startswith(f"{module}.") for found in at_top)


def optional_packages_are_imported_where_they_are_used(name, tree):
    if is_loaded_late(name):
        return
    ours = {"core", "extras", "tokenizer", "model", *COMMANDS}
    for other in imports(name, tree, top_level=True):
        top = other.split(".")[0]
        if top not in sys.stdlib_module_names and top not in CORE_PACKAGES | ours:
            yield f"{name} imports {top} at its top"


# Packages and modules that turn data into calls: unpicklers, templates, code by name.
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "copyreg",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "runpy",
    "codeop",
    "jinja2",
    "mako",
    "torch.serialization",
    "torch.storage",
    "torch.hub",
    "torch.jit",
    "torch.package",
    "torch.distributed.checkpoint",
    "torch.utils.cpp_extension",
}
FORBIDDEN_NAMES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "__builtins__",
    "os.system",
    "os.popen",
    "os.startfile",
    "pty.spawn",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.load_all",
    "torch.load",
    "torch.save",
}
# Whatever stands in front of the last dot.
FORBIDDEN_ENDS = re.compile(
    r"(.*\.)?(read_pickle|to_pickle|(unsafe|full)_load(_all)?|(add_)?safe_globals|apply_chat_template|import_module|"
    r"create_subprocess_shell|(all_gather|gather)_object|(broadcast|scatter|send|recv)_object_list)|os\.(exec|spawn).*"
)
# The only values these options may have; what is no constant is refused, too.
ALLOWED_VALUES = {"strict": True, "shell": False, "allow_pickle": False, "weights_only": True}
MAY_READ_PICKLES = "core/checkpoint.py"  # foreign weights, where the user allows it, by torch's unpickler of tensors


def nothing_is_unpickled_or_evaluated(name, tree):
    full, permitted = full_names(name, tree), set()

    def bad(what: str) -> bool:
        inside = any("." in m and f"{what}.".startswith(f"{m}.") for m in FORBIDDEN_MODULES)
        return inside or what in FORBIDDEN_NAMES or FORBIDDEN_ENDS.fullmatch(what) is not None

    for other in imports(name, tree):
        if bad(other) or any(f"{other}.".startswith(f"{m}.") for m in FORBIDDEN_MODULES):
            yield f"{name} imports {other}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        what, said = dotted(node.func, full), dict(options(node))
        if what == "torch.load" and name == MAY_READ_PICKLES and said.get("weights_only") is True:
            permitted.add(node.func)
        if (
            what == "getattr"
            and isinstance(node.args[1], ast.Constant)
            and bad(f"{dotted(node.args[0], full)}.{node.args[1].value}".removeprefix("builtins."))
        ):
            yield f"{name}:{node.lineno} gets {node.args[1].value}"
        handed_on = what.endswith(".load_model")  # the user's own --allow_pickle
        for key, value in said.items():
            wrong = key in ALLOWED_VALUES and value is not ALLOWED_VALUES[key] and not handed_on
            if wrong or key == "trust_remote_code":
                yield f"{name}:{node.lineno} says {key}={value}"
    for node in ast.walk(tree):  # also where it is not called: `run = os.system`
        loaded = isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load)
        if loaded and node not in permitted and bad(what := dotted(node, full).removeprefix("builtins.")):
            yield f"{name}:{node.lineno} uses {what}"


def no_file_is_a_drawer(name, tree):
    if Path(name).stem in ("utils", "util", "common", "helpers", "helper", "misc"):
        yield f"{name}: a function lives with the noun it serves"


def is_guard(node) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" and not node.orelse


def commands_do_nothing_when_imported(name, tree):
    if "/" in name:
        return
    for at, node in enumerate(tree.body):
        docstring = at == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        constant = isinstance(node, (ast.Assign, ast.AnnAssign)) and not any(
            isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(node)
        )
        definition = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        if not (docstring or constant or definition or is_guard(node)):
            yield f"{name}:{node.lineno} does something at import: {ast.unparse(node)[:60]}"
    if not is_guard(tree.body[-1]):
        yield f"{name} does not end with its __main__ guard"


RULES = [
    imports_point_down,
    optional_packages_are_imported_where_they_are_used,
    nothing_is_unpickled_or_evaluated,
    no_file_is_a_drawer,
    commands_do_nothing_when_imported,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds_in_every_file(rule):
    assert [broken for name, tree in TREES.items() for broken in rule(name, tree)] == []


def test_the_walk_sees_the_whole_house():
    assert {"model.py", "pretrain.py", "sft.py", "sample.py", "data_process.py", "core/engine.py"} <= TREES.keys()
    assert {"pretrain", "sft"} <= COMMANDS and {"torch", "numpy", "safetensors"} <= CORE_PACKAGES
    assert {name.split("/")[0] for name in TREES if "/" in name} == {"core", "extras", "tokenizer"}


GUARD = "\nif __name__ == '__main__':\n    main()\n"


@pytest.mark.parametrize(
    "rule, name, bad",
    [
        (imports_point_down, "core/x.py", "import extras.lora"),
        (imports_point_down, "core/x.py", "from extras import lora"),
        (imports_point_down, "core/x.py", "def f():\n    from sft import main"),
        (imports_point_down, "core/x.py", "from ..extras import lora"),
        (imports_point_down, "extras/x.py", "from extras import lora"),
        (imports_point_down, "extras/x.py", "from .lora import apply"),
        (imports_point_down, "extras/x.py", "from . import lora"),
        (imports_point_down, "extras/x.py", "import pretrain"),
        (imports_point_down, "extras/x/y.py", "from extras.z.y import f"),
        (imports_point_down, "sft.py", "from pretrain import build"),
        (imports_point_down, "sft.py", "if True:\n    import pretrain"),
        (imports_point_down, "tokenizer/x.py", "def main():\n    from core import errors"),
        (imports_point_down, "tokenizer/x.py", "def main():\n    import sft" + GUARD),
        (imports_point_down, "tokenizer/x.py", "from core import errors\ndef main(): pass" + GUARD),
        (imports_point_down, "tokenizer/x.py", "def f():\n    from core import errors" + GUARD),
        (imports_point_down, "model.py", "from core.errors import UserError"),
        (imports_point_down, "model.py", "def main():\n    import tokenizer"),
        (imports_point_down, "tokenizer/x.py", "import core.errors"),
        (imports_point_down, "tokenizer/x.py", "from model import IGNORE"),
        (optional_packages_are_imported_where_they_are_used, "core/x.py", "import transformers"),
        (
            optional_packages_are_imported_where_they_are_used,
            "core/x.py",
            "try:\n    import tokenizers\nexcept E: pass",
        ),
        (optional_packages_are_imported_where_they_are_used, "extras/x.py", "from pyarrow import parquet"),
        (optional_packages_are_imported_where_they_are_used, "core/x.py", "class A:\n    import yaml"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "def f():\n    import pickle"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "from torch import load"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "torch.load(p, weights_only=True)"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "numpy.load(p, allow_pickle=True)"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "x = eval('1')"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "exec(open(f).read())"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "os.system('ls')"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "subprocess.run('ls', shell=True)"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "A.from_pretrained(p, trust_remote_code=flag)"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "model.load_state_dict(s, strict=False)"),
        *(
            (nothing_is_unpickled_or_evaluated, "core/checkpoint.py", bad)
            for bad in (
                "torch.load(p)",
                "torch.load(p, weights_only=False)",
                "torch.load(p, weights_only=flag)",
                "read = torch.load",
                "import torch as t\nt.load(p)",
                "from torch import load as read\nread(p, weights_only=False)",
                "torch.load(p, **{'weights_only': False})",
                "getattr(torch, 'load')(p)",
                "torch.jit.load(p)",
                "import torch.serialization",
                "torch.serialization.load(p)",
                "from torch.serialization import load",
                "torch.serialization.add_safe_globals([A])",
                "from torch import hub",
                "torch.distributed.checkpoint.load(s)",
                "from torch.distributed import checkpoint",
                "torch.distributed.all_gather_object(a, b)",
                "torch.save(s, p)",
                "load_file(p, weights_only=False)",
                "np.load(p, allow_pickle=flag)",
                "np.load(p, **{'allow_pickle': True})",
                "pd.read_pickle(p)",
                "from pandas import read_pickle",
                "import marshal",
                "import shelve as s",
                "import dill",
                "from joblib import load",
                "import cloudpickle.x",
                "import _pickle",
                "yaml.load(f)",
                "yaml.load(f, Loader=yaml.Loader)",
                "from yaml import load",
                "import yaml as y\ny.unsafe_load(f)",
                "import jinja2",
                "from jinja2.sandbox import SandboxedEnvironment",
                "tok.apply_chat_template(m)",
                "from mako.template import Template",
                "subprocess.Popen(c, shell=flag)",
                "subprocess.run(c, **{'shell': True})",
                "import subprocess as s\ns.getoutput(c)",
                "from os import system",
                "from os import popen as p",
                "import os as o\no.system(c)",
                "run = os.system",
                "getattr(os, 'system')(c)",
                "os.execv(p, a)",
                "os.spawnl(m, p)",
                "asyncio.create_subprocess_shell(c)",
                "import pty\npty.spawn(c)",
                "code = compile(t, p, 'exec')",
                "f = eval",
                "import builtins\nbuiltins.exec(c)",
                "import builtins as b\nb.eval(c)",
                "getattr(builtins, 'eval')(c)",
                "__builtins__['eval'](c)",
                "__import__(name)",
                "importlib.import_module(name)",
                "from importlib import import_module as i\ni(n)",
                "import runpy",
                "A.from_pretrained(p, trust_remote_code=False)",
                "A.from_pretrained(p, **{'trust_remote_code': 1})",
            )
        ),
        (nothing_is_unpickled_or_evaluated, "sample.py", "torch.load(p, weights_only=True)"),
        (no_file_is_a_drawer, "core/utils.py", ""),
        (no_file_is_a_drawer, "extras/common.py", ""),
        (commands_do_nothing_when_imported, "x.py", "print('hello')" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "CFG = load()" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "for x in y:\n    pass" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "if True:\n    f()" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "def main(): pass"),
    ],
)
def test_the_rule_catches(rule, name, bad):
    assert list(rule(name, ast.parse(bad)))


@pytest.mark.parametrize(
    "rule, name, good",
    [
        (imports_point_down, "core/x.py", "from core import data\nfrom model import Llama\nimport tokenizer, torch"),
        (imports_point_down, "tokenizer/__init__.py", "from . import chat\nfrom .backends import load"),
        (imports_point_down, "tokenizer/x.py", "from .chat import render\nfrom . import train"),
        (imports_point_down, "extras/x/y.py", "from .z import f\nfrom extras.x import z\nfrom core import data"),
        (imports_point_down, "tokenizer/x.py", "from . import load\ndef main():\n    from extras import remap" + GUARD),
        (imports_point_down, "sft.py", "from extras import lora\nfrom core import data"),
        (
            optional_packages_are_imported_where_they_are_used,
            "core/x.py",
            "import torch, json\ndef f():\n    import yaml",
        ),
        # Only functions import this file.
        (optional_packages_are_imported_where_they_are_used, "extras/serve/schema.py", "import pydantic"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "model.eval()\nload_state_dict(s, strict=True)\njson.load(f)"),
        (
            nothing_is_unpickled_or_evaluated,
            "core/checkpoint.py",
            "torch.load(p, map_location='cpu', weights_only=True)",
        ),
        (
            nothing_is_unpickled_or_evaluated,
            "x.py",
            "re.compile(p)\ntorch.compile(m)\nclass C:\n    compile: bool = False",
        ),
        (nothing_is_unpickled_or_evaluated, "x.py", "yaml.safe_load(f)\nsubprocess.run([c], shell=False)\nnp.load(p)"),
        (nothing_is_unpickled_or_evaluated, "x.py", "checkpoint.load_model(f, allow_pickle=cfg.allow_pickle)"),
        (commands_do_nothing_when_imported, "x.py", "'''Doc.'''\nimport a\nB = 3\n@d(x=1)\nclass C: pass" + GUARD),
    ],
)
def test_the_rule_lets_pass(rule, name, good):
    assert list(rule(name, ast.parse(good))) == []

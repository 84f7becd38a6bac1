"""Promises of the house: imports point down, wings and optional packages come last, files stay short, nothing is
unpickled or evaluated, commands do nothing when imported.

Each rule is a function from a file's syntax tree to what breaks it, and is shown to catch a bad snippet.
"""

import ast
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from sources import (
    FUNCTIONS,
    ROOT,
    SOURCES,
    TREES,
    code_lines,
    comment_lines,
    files_behind,
    files_of,
    imported,
    imports,
    is_guard,
    module_of,
    named_by_path,
    nodes_at_import,
)

LESSON = ("data_process.py", "pretrain.py", "sft.py", "sample.py")
# What a reader of the lesson has before them: commands -> files and code lines behind them, at most.
BEHIND = {LESSON: (36, 3650), ("pretrain.py",): (29, 2920)}
LENGTHS = {"model.py": 150, "trainer.py": 220}  # code lines, at most
MAIN = 25  # code lines of a command's main: a table of contents
PARAMETERS = 7  # of a function, at most; self is none
COMMENTS, COMMENTS_OF_A_FILE = 0.10, 0.04  # comments on lines of their own, per code line of the lesson, at least
FMT_SKIPS = 12  # tables that a formatter would make harder to read, in the whole tree

COMMANDS = {name.removesuffix(".py") for name in TREES if "/" not in name} - {"model", "trainer"}
ROOMS = ("assembly", "extras", "trainer", "core", "tokenizer", "model")
OURS = {*ROOMS, "bench", "runs", *COMMANDS}
CORE_PACKAGES = {re.split(r"[<>=!~\[ ]", line)[0] for line in (ROOT / "requirements.txt").read_text().split() if line}


def layer(module: str) -> str:
    """Which floor of the house a module (dotted) stands on."""
    top = module.split(".")[0]
    return top if top in (*ROOMS, "bench", "runs") else "command" if top in COMMANDS else "foreign"


# Nothing imports a command, and no wing another wing.
MAY_IMPORT = {
    "bench": {"bench", *ROOMS},
    "runs": {"runs", *ROOMS},
    "command": {*ROOMS},
    "assembly": {*ROOMS},
    "extras": {"core", "tokenizer", "model"},
    "trainer": {"core", "model"},
    "core": {"core", "model"},
    "tokenizer": {"tokenizer"},
    "model": set(),
}
CORE_MAY_NAME = ("tokenizer.TokenizerError", "tokenizer.chat")  # its errors, and the names and ends of chat formats


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
    """What is named by its path counts as imported, too."""
    mine, wing = layer(module_of(name)), module_of(name).split(".")[:2]
    named = [path.replace(":", ".") for path in named_by_path(tree)]
    for other in [*imports(name, tree), *named]:
        theirs = layer(other)
        own_wing = mine == theirs == "extras" and other.split(".")[:2] == wing and name.count("/") > 1
        exact = mine == "core" and any(f"{other}.".startswith(f"{known}.") for known in CORE_MAY_NAME)
        if theirs not in {"foreign", *MAY_IMPORT[mine]} and not own_wing and not exact:
            yield f"{name} ({mine}) imports {other} ({theirs})"


def a_wing_is_a_folder(name, tree):
    if name.startswith("extras/") and name.count("/") != 2:
        yield f"{name}: a wing is a folder of extras, and its files are in it"


# Of the standard library what some systems or versions of Python have not.
NOT_EVERYWHERE = {"fcntl": "Windows", "resource": "Windows", "compression": "Python before 3.14"}


def is_optional(module: str) -> bool:
    """Whether somebody may not have it: no module of ours, of the standard library or of requirements.txt."""
    top = module.split(".")[0]
    if module.startswith("torch.utils.tensorboard"):  # torch's own, but it needs the package
        return True
    return top in NOT_EVERYWHERE or top not in {*sys.stdlib_module_names, *CORE_PACKAGES, *OURS}


@cache
def loads_torch(file: str) -> bool:
    """Whether torch is loaded when a file of ours is."""
    behind = [module for name in files_behind(file) for module in imports(name, TREES[name], top_level=True)]
    return any(module.split(".")[0] == "torch" for module in behind)


def imports_are_late_only_for_wings_and_optional_packages(name, tree):
    """What is imported inside a function is not behind a command that does not call it, and nobody counts it there:
    it must be a wing, an optional package, or a file of ours that is there for an optional package. And a command
    that loads no torch (2.6 s, 230 MB) may put off what loads it.
    """
    if name.startswith("runs/"):
        return
    light = "/" not in name and name in TREES and not loads_torch(name)
    early = set(map(id, nodes_at_import(tree)))
    for node in ast.walk(tree):
        for module in imported(name, node) if id(node) not in early else ():
            own = files_of(module)[-1:]
            for_a_package = any(is_optional(other) for file in own for other in imports(file, TREES[file]))
            for_torch = light and any(map(loads_torch, own))
            if not (layer(module) == "extras" or is_optional(module) or for_a_package or for_torch):
                yield f"{name}:{node.lineno} imports {module} inside a function"


def what_is_named_by_its_path_is_a_wing_and_is_there(name, tree):
    for path in named_by_path(tree):
        module, _, what = path.partition(":")
        if layer(module) == "foreign":
            continue
        own_contest = layer(module) == layer(module_of(name)) == "bench"
        if layer(module) != "extras" and not own_contest:
            yield f"{name} names {path}, which is no wing"
        body = [node for file in files_of(module)[-1:] if module_of(file) == module for node in TREES[file].body]
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        defined = {node.name for node in body if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
        defined |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        if what not in defined:
            yield f"{name} names {path}, which is not there"


def optional_packages_are_imported_where_they_are_used(name, tree):
    if name.startswith("runs/"):  # a program for one of them
        return

    # A file of a wing that only its own wing imports, and late: it is there for the package.
    def names_me(other: str, top_level: bool) -> bool:
        return any(name in files_of(module)[-1:] for module in imports(other, TREES[other], top_level))

    wing = [other for other in TREES if name.startswith("extras/") and Path(other).parent == Path(name).parent]
    for_it = any(names_me(other, False) for other in wing) and not any(names_me(other, True) for other in TREES)
    for other in imports(name, tree, top_level=True) if not for_it else ():
        if is_optional(other):
            yield f"{name} imports {other} at its top"


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
    "pkgutil.resolve_name",
}
# Whatever stands in front of the last dot.
FORBIDDEN_ENDS = re.compile(
    r"(.*\.)?(read_pickle|to_pickle|(unsafe|full)_load(_all)?|(add_)?safe_globals|apply_chat_template|import_module|"
    r"create_subprocess_shell|(all_gather|gather)_object|(broadcast|scatter|send|recv)_object_list)|os\.(exec|spawn).*"
)
# The only values these options may have; what is no constant is refused, too.
ALLOWED_VALUES = {"strict": True, "shell": False, "allow_pickle": False, "weights_only": True}
MAY_READ_PICKLES = (
    "extras/families/folders.py"  # foreign weights, where the user allows it, by torch's unpickler of tensors
)
# Sections and stages that the house names by their paths: what_is_named_by_its_path_is_a_wing_and_is_there.
MAY_IMPORT_BY_PATH = {"core/config.py", "extras/corpus/run.py", "bench/__main__.py"}
MAY_IMPORT_BY_PATH |= {f"{command}.py" for command in COMMANDS}


def nothing_is_unpickled_or_evaluated(name, tree):
    full, permitted = full_names(name, tree), set()

    def bad(what: str) -> bool:
        if what == "pkgutil.resolve_name" and name in MAY_IMPORT_BY_PATH:
            return False
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
    if module_of(name) in COMMANDS | {"x"} and not is_guard(tree.body[-1]):
        yield f"{name} does not end with its __main__ guard"


def only_commands_are_run(name, tree):
    """A wing may have a small program of its own; core, the tokenizer, assembly and the loop have none."""
    if layer(module_of(name)) in ("core", "tokenizer", "assembly", "trainer", "model"):
        yield from (f"{name}:{node.lineno} is a command" for node in tree.body if is_guard(node))


def functions_take_few_parameters(name, tree):
    methods = {
        function
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for function in node.body
        if isinstance(function, FUNCTIONS) and "staticmethod" not in map(ast.unparse, function.decorator_list)
    }
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            given = node.args
            several = [one for one in (given.vararg, given.kwarg) if one]
            number = len([*given.posonlyargs, *given.args, *given.kwonlyargs, *several]) - (node in methods)
            if number > PARAMETERS:
                yield f"{name}:{node.lineno} {getattr(node, 'name', 'lambda')} takes {number} parameters"


# What an object may lack, by the name of the attribute. No object of a contract of ours is in here: it has every
# method of the contract, or it does not satisfy it.
MAY_LACK = {
    "strerror": "an error that a library raises where Python raises OSError",
    "error_status_hint": "an error of h11 that is not about what the client sent",
    "__metadata__": "a type without Annotated",
    "posix_fallocate": "os on macOS",
    "MADV_RANDOM": "mmap on Windows",
    "MADV_DONTNEED": "mmap on Windows",
    "_linear_pointwise": "torch without MKL-DNN",
    "_convert_weight_to_int4pack_for_cpu": "torch before 2.6",
    "finish_timeout": "wandb before 0.19",
}


def asked_for(tree) -> list[tuple[int, str]]:
    """(line, attribute) of each `getattr(x, "attribute", default)` and `hasattr(x, "attribute")`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (what := dotted(node.func, {})) in ("getattr", "hasattr"):
            named = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            if named and (what == "hasattr" or len(node.args) > 2):
                found.append((node.lineno, node.args[1].value))
    return found


def contracts_have_no_optional_parts(name, tree):
    yield from (f"{name}:{line} asks for {what}" for line, what in asked_for(tree) if what not in MAY_LACK)


def mains_are_tables_of_contents(name, text):
    for node in ast.parse(text).body if "/" not in name else ():
        if isinstance(node, FUNCTIONS) and node.name == "main":
            if (number := len(code_lines(text, node)) - 1) > MAIN:  # its body
                yield f"{name}: main has {number} code lines"


# What the loop does in one step, in this order, written out where it happens.
STEP = (
    "learning_rate",
    "strategy.sync",
    "task.loss",
    "backward",
    "ranks.sum",
    "math.isfinite",
    "torch._foreach_mul_",
    "optimizer.step",
    "log.step",
    "evaluate",
    "run.save",
)


def the_loop_can_be_recited(name, tree):
    """One function has all of a step in its `while`, in the order of STEP."""
    if name != "trainer.py":
        return
    loops = [
        [node for part in loop.body for node in ast.walk(part) if isinstance(node, ast.Call)]
        for function in ast.walk(tree)
        if isinstance(function, FUNCTIONS)
        for loop in ast.walk(function)
        if isinstance(loop, ast.While)
    ]
    if len(loops) != 1:
        yield f"{name} has {len(loops)} loops"
    for calls in loops:
        places = {}
        for call in calls:
            what = ast.unparse(call.func)
            for step in STEP:
                if what == step or what.endswith(f".{step}") or (step == "evaluate" and what.startswith(step)):
                    places.setdefault(step, []).append((call.func.end_lineno, call.func.end_col_offset))
        yield from (f"{name}: the loop has no {step}" for step in STEP if step not in places)
        there = [step for step in STEP if step in places]
        for one, two in pairwise(there):
            if not max(places[one]) < min(places[two]):
                yield f"{name}: {two} comes before {one}"


RULES = [
    imports_point_down,
    a_wing_is_a_folder,
    imports_are_late_only_for_wings_and_optional_packages,
    what_is_named_by_its_path_is_a_wing_and_is_there,
    optional_packages_are_imported_where_they_are_used,
    nothing_is_unpickled_or_evaluated,
    no_file_is_a_drawer,
    commands_do_nothing_when_imported,
    only_commands_are_run,
    functions_take_few_parameters,
    contracts_have_no_optional_parts,
    the_loop_can_be_recited,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds_in_every_file(rule):
    assert [broken for name, tree in TREES.items() for broken in rule(name, tree)] == []


def test_mains_are_tables_of_contents():
    assert [broken for name, text in SOURCES.items() for broken in mains_are_tables_of_contents(name, text)] == []


def test_the_walk_sees_the_whole_house():
    assert {"model.py", "pretrain.py", "sft.py", "sample.py", "data_process.py", "trainer.py"} <= TREES.keys()
    assert {"pretrain", "sft"} <= COMMANDS and {"torch", "numpy", "safetensors"} <= CORE_PACKAGES
    rooms = {"assembly", "bench", "core", "extras", "runs", "tokenizer"}
    assert {name.split("/")[0] for name in TREES if "/" in name} == rooms


def test_files_stay_short():
    lengths = {name: len(code_lines(SOURCES[name])) for name in LENGTHS}
    assert {name: length for name, length in lengths.items() if length > LENGTHS[name]} == {}


@pytest.mark.parametrize("commands", BEHIND, ids=" ".join)
def test_what_stands_behind_the_lesson_can_be_read_in_an_afternoon(commands):
    names, (most_files, most_lines) = files_behind(*commands), BEHIND[commands]
    lines = sum(len(code_lines(SOURCES[name])) for name in names)
    assert len(names) <= most_files and lines <= most_lines, f"{len(names)} files, {lines:,} code lines"


def test_no_wing_stands_behind_the_lesson_but_the_demos_corpus():
    assert {name for name in files_behind(*LESSON) if name.startswith("extras/")} == {"extras/corpus/sanguo.py"}


def test_the_walk_finds_what_is_imported_indirectly_and_not_what_is_imported_late():
    behind = files_behind("pretrain.py")
    # pretrain.py -> assembly/training.py -> trainer.py -> core/log.py; a package's own file comes with each of its.
    assert {"assembly/training.py", "trainer.py", "core/log.py", "core/__init__.py", "tokenizer/chat.py"} <= behind
    assert "extras/finetune/lora.py" not in behind and "sft.py" not in behind


def test_the_lessons_files_say_why():
    rows = {name: (len(code_lines(SOURCES[name])), len(comment_lines(SOURCES[name]))) for name in files_behind(*LESSON)}
    few = [
        f"{name}: {n} comments, {k} code lines" for name, (k, n) in sorted(rows.items()) if n < COMMENTS_OF_A_FILE * k
    ]
    lines, comments = map(sum, zip(*rows.values()))
    assert not few and comments >= COMMENTS * lines, f"{comments} comments, {lines} code lines; {few}"


def test_few_tables_escape_the_formatter():
    mark = "# fmt: " + "skip"
    texts = [*SOURCES.values(), *(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))]
    assert sum(text.count(mark) for text in texts) <= FMT_SKIPS


def test_every_attribute_that_may_lack_is_asked_for():
    assert {what for tree in TREES.values() for _, what in asked_for(tree)} >= MAY_LACK.keys()


def test_lines_are_counted_as_they_are_read():
    text = '''"""Docs."""

# Why.
import a  # beside code: no line of its own

# ---------------- a heading

def f():
    """Docs."""
    return """
    a text
    """
'''
    assert (code_lines(text), comment_lines(text)) == ({4, 8, 10, 11, 12}, {3})
    assert code_lines(text, ast.parse(text).body[-1]) == {8, 10, 11, 12}


GUARD = "\nif __name__ == '__main__':\n    main()\n"
LOOP = """
def loop(task):
    while state.step < steps:
        lr = learning_rate(state.step)
        for m in range(micro_batches):
            with strategy.sync(last=True):
                loss = task.loss(model, batch)
                (loss * scale).backward()
        total, targets = ranks.sum(totals).tolist()
        if math.isfinite(total) and math.isfinite(norm):
            torch._foreach_mul_(gradients, scale)
            for optimizer in optimizers:
                optimizer.step()
        log.step(record)
        evaluate_and_publish()
        run.save(state)
"""


def bad_loops():
    """The loop with a part behind a function, with two parts the other way round, and twice."""
    lines = LOOP.split("\n")
    yield "\n".join(line for line in lines if "backward" not in line)
    yield LOOP.replace("strategy.sync(last=True)", "task.loss(m, b)").replace("= task.loss(", "= strategy.sync(")
    yield LOOP.replace("run.save", "evaluate_again").replace("evaluate_and_publish", "run.save")
    yield LOOP.replace("optimizer.step()", "ranks.sum(t)").replace("ranks.sum(totals)", "optimizer.step()")
    yield LOOP + LOOP.replace("loop(", "another(")
    yield "def loop():\n    steps()"


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
        (imports_point_down, "tokenizer/x.py", "from . import load\ndef main():\n    from extras import remap" + GUARD),
        (imports_point_down, "core/x.py", "from tokenizer import Tokenizer"),
        (imports_point_down, "core/x.py", "import tokenizer"),
        (imports_point_down, "core/x.py", "from trainer import Task"),
        (imports_point_down, "core/x.py", "from assembly import training"),
        (imports_point_down, "core/x.py", "WAY = 'extras.finetune.lora:LoraConfig'"),
        (imports_point_down, "extras/x/y.py", "from trainer import Task"),
        (imports_point_down, "extras/x/y.py", "def f():\n    from assembly.models import open_model"),
        (imports_point_down, "extras/x/y.py", "STAGE = 'extras.z.y:f'"),
        (imports_point_down, "extras/x/y.py", "from bench import peers"),
        (imports_point_down, "extras/x.py", "from extras.x import z"),
        (imports_point_down, "assembly/x.py", "from pretrain import open_rows"),
        (imports_point_down, "trainer.py", "from assembly import models"),
        (imports_point_down, "trainer.py", "def f():\n    from extras.parallel import zero1"),
        (imports_point_down, "bench/x.py", "import pretrain"),
        (imports_point_down, "model.py", "import trainer"),
        (a_wing_is_a_folder, "extras/x.py", ""),
        (a_wing_is_a_folder, "extras/x/y/z.py", ""),
        *(
            (imports_are_late_only_for_wings_and_optional_packages, name, bad)
            for name, bad in (
                ("core/x.py", "def f():\n    from core import data"),
                ("core/x.py", "def f():\n    import torch"),
                ("core/x.py", "def f():\n    from torch.distributed import fsdp"),
                ("core/x.py", "class A:\n    def f(self):\n        import json"),
                ("core/x.py", "f = lambda: __import__\ndef g():\n    def h():\n        from model import Llama"),
                ("sft.py", "def main():\n    from assembly import training"),
                ("assembly/x.py", "def f():\n    from core.parallel import DDP"),
                ("tokenizer/x.py", "def f():\n    from . import train"),
                ("sft.py", "def f():\n    from assembly import models"),
                ("data_process.py", "def f():\n    from core import bins"),
                ("sft.py", "if __name__ == '__main__':\n    from core import errors"),
            )
        ),
        *(
            (what_is_named_by_its_path_is_a_wing_and_is_there, "x.py", bad)
            for bad in (
                "S = {'optim': 'core.optim:OptimConfig'}",
                "f('assembly.models:load_model')",
                "WAY = 'trainer:train'",
                "S = {'lora': 'extras.finetune.lora:LoraOptions'}",
                "S = {'lora': 'extras.finetune.loar:LoraConfig'}",
            )
        ),
        (imports_point_down, "tokenizer/x.py", "from core import errors\ndef main(): pass" + GUARD),
        (imports_point_down, "tokenizer/x.py", "def f():\n    from core import errors" + GUARD),
        (imports_point_down, "model.py", "from core.errors import UserError"),
        (imports_point_down, "model.py", "def main():\n    import tokenizer"),
        (imports_point_down, "tokenizer/x.py", "import core.errors"),
        (imports_point_down, "tokenizer/x.py", "from model import IGNORE"),
        (optional_packages_are_imported_where_they_are_used, "core/x.py", "import transformers"),
        (optional_packages_are_imported_where_they_are_used, "core/x.py", "import fcntl"),
        (
            optional_packages_are_imported_where_they_are_used,
            "core/x.py",
            "try:\n    import tokenizers\nexcept E: pass",
        ),
        (optional_packages_are_imported_where_they_are_used, "extras/x.py", "from pyarrow import parquet"),
        (optional_packages_are_imported_where_they_are_used, "core/x.py", "class A:\n    import yaml"),
        # Another file of the wing imports this one at its top; and a file of another wing comes late, but from outside.
        (optional_packages_are_imported_where_they_are_used, "extras/serve/app.py", "import starlette"),
        (optional_packages_are_imported_where_they_are_used, "extras/tracking/trackers.py", "import wandb"),
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
            (nothing_is_unpickled_or_evaluated, MAY_READ_PICKLES, bad)
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
                "pkgutil.resolve_name(name)",
                "from pkgutil import resolve_name as r\nr(name)",
                "from importlib import import_module as i\ni(n)",
                "import runpy",
                "A.from_pretrained(p, trust_remote_code=False)",
                "A.from_pretrained(p, **{'trust_remote_code': 1})",
            )
        ),
        (nothing_is_unpickled_or_evaluated, "sample.py", "torch.load(p, weights_only=True)"),
        (nothing_is_unpickled_or_evaluated, "core/checkpoint.py", "torch.load(p, weights_only=True)"),
        (no_file_is_a_drawer, "core/utils.py", ""),
        (no_file_is_a_drawer, "extras/common.py", ""),
        (commands_do_nothing_when_imported, "x.py", "print('hello')" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "CFG = load()" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "for x in y:\n    pass" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "if True:\n    f()" + GUARD),
        (commands_do_nothing_when_imported, "x.py", "def main(): pass"),
        (commands_do_nothing_when_imported, "sft.py", "def main(): pass"),
        (commands_do_nothing_when_imported, "trainer.py", "setup()"),
        (only_commands_are_run, "core/x.py", "def main(): pass" + GUARD),
        (only_commands_are_run, "trainer.py", "def main(): pass" + GUARD),
        *(
            (functions_take_few_parameters, "core/x.py", bad)
            for bad in (
                "def f(a, b, c, d, e, f, g, h): pass",
                "def f(a, /, b, c, d, *e, f, g, **h): pass",
                "class A:\n    def f(self, a, b, c, d, e, f, g, h): pass",
                "class A:\n    @staticmethod\n    def f(a, b, c, d, e, f, g, h): pass",
                "async def f(a, b, c, d, e, f, g, h=None): pass",
                "f = lambda a, b, c, d, e, f, g, h: a",
                "def o():\n    def f(a, b, c, d, e, f, g, *, h): pass",
            )
        ),
        (contracts_have_no_optional_parts, "core/x.py", "getattr(rows, 'bytes_per_token', None)"),
        (contracts_have_no_optional_parts, "core/x.py", "if hasattr(rows, 'make'): pass"),
        *((the_loop_can_be_recited, "trainer.py", bad) for bad in bad_loops()),
    ],
)
def test_the_rule_catches(rule, name, bad):
    assert list(rule(name, ast.parse(bad)))


@pytest.mark.parametrize(
    "rule, name, good",
    [
        (
            imports_point_down,
            "core/x.py",
            "from core import data\nfrom model import Llama\nfrom tokenizer import chat, TokenizerError\nimport torch",
        ),
        (imports_point_down, "tokenizer/__init__.py", "from . import chat\nfrom .backends import load"),
        (imports_point_down, "tokenizer/x.py", "from .chat import render\nfrom . import train"),
        (imports_point_down, "extras/x/y.py", "from .z import f\nfrom extras.x import z\nfrom core import data"),
        (imports_point_down, "sft.py", "from extras import lora\nfrom core import data"),
        (imports_point_down, "sft.py", "from trainer import Task\nfrom assembly import training\nimport model"),
        (imports_point_down, "sft.py", "WING = 'extras.finetune.lora:LoraConfig'\nDEVICE = 'cuda:x'"),
        (imports_point_down, "assembly/x.py", "import trainer\nfrom . import models\nfrom extras.z import y"),
        (imports_point_down, "trainer.py", "from core.data import Rows\nfrom model import Llama"),
        (imports_point_down, "bench/x.py", "import trainer\nfrom assembly import inference\nfrom . import peers"),
        (a_wing_is_a_folder, "extras/x/y.py", ""),
        *(
            (imports_are_late_only_for_wings_and_optional_packages, name, good)
            for name, good in (
                ("assembly/x.py", "def f():\n    from extras.finetune import lora\n    import transformers"),
                ("core/x.py", "try:\n    import torch\nexcept ImportError:\n    import json"),
                ("core/x.py", "def f():\n    import fcntl"),
                ("plot.py", "def f():\n    from matplotlib import font_manager"),
                ("data_process.py", "def f():\n    from assembly import models"),
            )
        ),
        (what_is_named_by_its_path_is_a_wing_and_is_there, "x.py", "S = {'lora': 'extras.finetune.lora:LoraConfig'}"),
        (what_is_named_by_its_path_is_a_wing_and_is_there, "x.py", "f('cuda:x', 'PATH:LINE')"),
        (only_commands_are_run, "extras/x/y.py", "def main(): pass" + GUARD),
        (functions_take_few_parameters, "core/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g): pass"),
        (contracts_have_no_optional_parts, "core/x.py", "getattr(e, 'strerror', None) or getattr(config, name)"),
        (the_loop_can_be_recited, "trainer.py", LOOP),
        (
            optional_packages_are_imported_where_they_are_used,
            "core/x.py",
            "import torch, json\ndef f():\n    import yaml",
        ),
        (optional_packages_are_imported_where_they_are_used, "extras/serve/schema.py", "from pydantic import Field"),
        (nothing_is_unpickled_or_evaluated, "core/x.py", "model.eval()\nload_state_dict(s, strict=True)\njson.load(f)"),
        (
            nothing_is_unpickled_or_evaluated,
            MAY_READ_PICKLES,
            "torch.load(p, map_location='cpu', weights_only=True)",
        ),
        (
            nothing_is_unpickled_or_evaluated,
            "x.py",
            "re.compile(p)\ntorch.compile(m)\nclass C:\n    compile: bool = False",
        ),
        (nothing_is_unpickled_or_evaluated, "x.py", "yaml.safe_load(f)\nsubprocess.run([c], shell=False)\nnp.load(p)"),
        (nothing_is_unpickled_or_evaluated, "x.py", "checkpoint.load_model(f, allow_pickle=cfg.allow_pickle)"),
        (nothing_is_unpickled_or_evaluated, "core/config.py", "import pkgutil\npkgutil.resolve_name(path)"),
        (commands_do_nothing_when_imported, "x.py", "'''Doc.'''\nimport a\nB = 3\n@d(x=1)\nclass C: pass" + GUARD),
    ],
)
def test_the_rule_lets_pass(rule, name, good):
    assert list(rule(name, ast.parse(good))) == []


def test_a_long_main_is_caught():
    short = "def main():\n" + '    "Docs."\n' + "    f()\n\n    # Why.\n" * MAIN
    assert not list(mains_are_tables_of_contents("x.py", short))
    assert list(mains_are_tables_of_contents("x.py", short + "    f()\n"))

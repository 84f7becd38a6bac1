"""The house's source files, read and never run: what each imports, what stands behind a command, how long it is.

A code line has a token that is neither comment nor docstring. Names are paths in the repository, "core/config.py".
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_HOUSE = {"tests", "docs", "data", "out"}
# A section or function that is named by its path and imported when it is asked for: "extras.finetune.lora:LoraConfig".
BY_PATH = re.compile(r"([a-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def read_sources(root: Path = ROOT) -> dict[str, str]:
    """Name -> text of every Python file but the tests and the tutorial's programs."""
    paths = {path.relative_to(root): path for path in root.rglob("*.py")}
    inside = {p: path for p, path in paths.items() if p.parts[0] not in NO_HOUSE and not p.parts[0].startswith(".")}
    return {p.as_posix(): inside[p].read_text(encoding="utf-8") for p in sorted(inside)}


SOURCES = read_sources()
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}


def module_of(name: str) -> str:
    """ "core/config.py" -> "core.config"."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" and not node.orelse


def nodes_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported: no body of a function, not the end that only a command runs."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        later = isinstance(node, (*FUNCTIONS, ast.Lambda)) or is_guard(node)
        todo += [] if later else ast.iter_child_nodes(node)


def imported(name: str, node: ast.AST) -> Iterator[str]:
    """Dotted names that one import statement names: `from core import bins` -> core.bins."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module
        if node.level:  # from .x import y
            package = module_of(name).split(".")
            package = package[: len(package) - node.level + name.endswith("__init__.py")]
            base = ".".join(filter(None, [*package, node.module]))
        yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(name: str, tree: ast.AST, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with top_level only what it imports when it is itself imported."""
    for node in nodes_at_import(tree) if top_level else ast.walk(tree):
        yield from imported(name, node)


def named_by_path(tree: ast.AST) -> Iterator[str]:
    """Paths of what a file names in texts instead of importing it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and BY_PATH.fullmatch(node.value):
            yield node.value


def files_of(module: str) -> list[str]:
    """The file of a module of ours, and those of the packages above it; none for somebody else's."""
    parts = module.split(".")
    stems = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return [name for stem in stems for name in (f"{stem}.py", f"{stem}/__init__.py") if name in TREES]


def files_behind(*commands: str) -> set[str]:
    """The commands' files, and every file of ours that is imported when they are, however indirectly."""
    seen, todo = set(), list(commands)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [file for module in imports(name, TREES[name], top_level=True) for file in files_of(module)]
    return seen


def code_lines(text: str, tree: ast.AST | None = None) -> set[int]:
    """Numbers of the code lines of a file; with a node of its tree of that part alone."""
    lines, docstrings = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
            and ast.get_docstring(node, clean=False) is not None
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    part = set(range(tree.lineno, tree.end_lineno + 1)) if tree else lines
    return (lines - docstrings) & part


def comment_lines(text: str) -> set[int]:
    """Numbers of the lines that hold a comment and nothing else; a ruled line is a heading, not a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [t for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")]
    return {t.start[0] for t in found if not t.string.startswith("# --")}

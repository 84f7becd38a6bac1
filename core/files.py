"""Files that are whole or not there: written beside, forced to disk, renamed.

In:  bytes and paths. Out: files that survive a kill and a power cut once the call has returned.
Knows no format.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from core.errors import UserError

# Of any JSON that is read whole: names and shapes of 1,024 layers, the most that model.py builds, take 1.5 MB; and
# Python makes at most some 60 MB of this many bytes.
JSON_BYTES = 2 << 20


def fsync_dir(folder: Path) -> None:
    """Force a folder's entries (a rename in it) to disk. Windows cannot open folders; its renames are journalled."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary path)` make a file, then put it at `path` in one step. On any error `path` is untouched."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        # Opened for writing, although nothing is written: Windows refuses to flush another handle.
        with open(temporary, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename is an entry of the folder: it has to reach the disk, too.
    fsync_dir(path.parent)


def lock(folder: Path):
    """Hold a folder for this process; the lock goes with the process, however it ends, or with `close()` of the result.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks of this kind
        return None
    handle = open(folder / ".lock", "a+")  # noqa: SIM115 -- held open as long as the lock
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise UserError(f"{folder} is in use by process {handle.read().strip() or '?'}", "another --out_dir?") from None
    os.register_at_fork(after_in_child=handle.close)  # or a worker that outlives this process would hold it, too
    # Whoever comes next can say which process holds it.
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def check_free(paths: list[Path], overwrite: bool) -> None:
    """UserError where one of these is there already."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists", "--overwrite replaces it, --output writes elsewhere")


def write_text(path: Path, text: str) -> None:
    """Put UTF-8 text at `path` in one step."""
    replace(path, lambda p: p.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value) -> None:
    """Put JSON at `path` in one step; NaN and infinities are refused, since they are not JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def parse_object(text: bytes | str) -> dict:
    """A JSON object; ValueError where it is none, names a key twice (Python keeps the last), or holds a NaN."""

    # Two programs could read two things where a key comes twice.
    def no_twins(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")

    # Some editors begin a file with a byte order mark; utf-8-sig takes it off.
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=no_twins, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("PATH:LINE", object) of each line of a JSONL file; only a newline ends a line, blank ones are passed over.

    Raises:
        UserError: no such file, a line that is not UTF-8, not JSON, not an object, or names a key twice.
    """
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                where = f"{path}:{number}"
                try:
                    if line := line.strip():
                        yield where, parse_object(line)
                except ValueError as e:
                    raise UserError(f"{where}: not a JSON object in UTF-8: {e}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}", "make it with python data_process.py") from None


def read_json(path: Path, hint: str = "") -> dict:
    """A JSON object from a file; one that is huge, names a key twice or holds NaN is refused."""
    try:
        with open(path, "rb") as f:
            text = f.read(JSON_BYTES + 1)
        # One byte more was asked for: if it came, the file is too large.
        if len(text) > JSON_BYTES:
            raise UserError(f"{path}: larger than {JSON_BYTES:,} bytes", hint)
        return parse_object(text)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}", hint) from None
    except ValueError as e:
        raise UserError(f"{path}: not a JSON object: {e}", hint) from None

"""Files that are whole or not there: written beside, forced to disk, renamed.

In:  bytes and paths. Out: files that survive a kill and a power cut once the call has returned.
Knows no format.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from core.errors import UserError


def fsync_dir(folder: Path) -> None:
    """Force a folder's entries (a rename in it) to disk. Windows cannot open folders; its renames are journalled."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Force a closed file's content to disk (opened for writing: Windows refuses to flush a read handle)."""
    with open(path, "r+b") as f:
        os.fsync(f.fileno())


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary path)` make a file, then put it at `path` in one step. On any error `path` is untouched."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder: `.tmp-PID-...` of processes that are gone."""
    for path in Path(folder).glob(".tmp-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # there a signal would end the process that is asked after
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


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
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


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

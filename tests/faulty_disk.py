"""A disk that fails, or a kill, at a chosen one of the file operations of a save.

with FaultyDisk() as disk: ...              disk.done: what was done to files, in order
with FaultyDisk(at=7, error=28) as disk:    the seventh is refused with ENOSPC
with FaultyDisk(at=7) as disk:              the process is killed in the middle of it
"""

import builtins
import io
import os
import signal

from safetensors import SafetensorError

from core import checkpoint, hf_folder

NAMES = [
    (builtins, "open"),
    (io, "open"),
    (checkpoint, "save_file"),
    (hf_folder, "save_file"),
    *((os, n) for n in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "sendfile")),
]


class FaultyDisk:
    """Counts while `on`; a write that fails has written its first half."""

    def __init__(self, at: int = 0, error: int = 0):
        self.at, self.error, self.on, self.done = at, error, False, []

    def __enter__(self) -> "FaultyDisk":
        self._real = [getattr(module, name) for module, name in NAMES]
        for (module, name), real in zip(NAMES, self._real):
            setattr(module, name, self._open(real) if name == "open" else self._watched(name, real))
        return self

    def __exit__(self, *error) -> None:
        for (module, name), real in zip(NAMES, self._real):
            setattr(module, name, real)

    def step(self, name: str, half=lambda: None) -> None:
        """One operation; `half` does a part of it."""
        if not self.on:
            return
        self.done.append(name)
        if len(self.done) != self.at:
            return
        half()
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "save_file":  # safetensors has an error of its own
            raise SafetensorError(f"I/O error: {os.strerror(self.error)} (os error {self.error})")
        raise OSError(self.error, os.strerror(self.error))

    def _watched(self, name: str, real):
        def call(*args, **kw):
            def half():
                if name == "save_file":
                    real(*args, **kw)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)

            self.step(name, half)
            return real(*args, **kw)

        return call

    def _open(self, real):
        def call(path, mode="r", *args, **kw):
            if mode.startswith("r") and "+" not in mode:
                return real(path, mode, *args, **kw)
            self.step("open")
            return File(real(path, mode, *args, **kw), self)

        return call


class File:
    """An open file whose writes are counted."""

    def __init__(self, file, disk: FaultyDisk):
        self._file, self._disk = file, disk

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, text):
        def half():
            self._file.write(text[: len(text) // 2])
            self._file.flush()

        self._disk.step("write", half)
        return self._file.write(text)

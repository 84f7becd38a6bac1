"""What a run has done so far, on disk, so that the same command goes on from there after a kill.

In:  results of chunks, one after another: plain values with numpy arrays in them. Out: the same, in another process.
Knows no documents. One record a result: lengths, CRC-32, JSON, the arrays' bytes; a record that is cut short or
damaged ends the file. No pickle: a file that somebody else left in the folder can give wrong values, but runs nothing.
"""

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core import files

HEAD, JSON = struct.Struct("<QI"), struct.Struct("<Q")  # bytes of the body and its CRC-32; bytes of the JSON in it
SOURCES = Path(__file__).resolve().parents[2]
CODE = ("data_process.py", "core/bins.py", "extras/corpus/*.py", "tokenizer/*.py")  # what results depend on


class Journal:
    """The records of one command in one folder, which it holds for itself.

    A `with` block that ends without an error removes them.

    Args:
        folder: where the command's results will be.
        key: plain data; all that the records depend on. The input's paths, sizes and times belong to it.

    Raises:
        UserError: another process works in the folder.
    """

    def __init__(self, folder: Path, key):
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = files.lock(folder)
        sources = [p.read_bytes() for pattern in CODE for p in sorted(SOURCES.glob(pattern))]
        digest = hashlib.sha256(json.dumps([key, np.__version__]).encode() + b"".join(sources)).hexdigest()
        self.folder = folder / f".journal-{digest[:16]}"
        for other in folder.glob(".journal-*"):
            if other != self.folder:
                print(f"{other}: removed; another command, or this one on other files, had left it")
                shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)

    def open(self, *names) -> "Records":
        """The records of one part of the work."""
        return Records(self.folder / "-".join(map(str, names)))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            shutil.rmtree(self.folder)  # finished: nobody goes on from it
        if self._lock:
            self._lock.close()


class Records:
    """A file of records: iterate over those that are there, then append."""

    def __init__(self, path: Path):
        self._file = open(path, "a+b")  # noqa: SIM115 -- open as long as this object lives

    def __iter__(self) -> Iterator:
        """The whole records; what stands behind them is cut off."""
        total, end = os.fstat(self._file.fileno()).st_size, 0
        self._file.seek(0)
        while end + HEAD.size <= total:
            size, crc = HEAD.unpack(self._file.read(HEAD.size))
            if not JSON.size < size <= total - end - HEAD.size or zlib.crc32(body := self._file.read(size)) != crc:
                break
            end += HEAD.size + size
            yield _unpack(body)
        self._file.truncate(end)

    def append(self, value) -> None:
        """Write a record: safe from a kill when this returns; from a power cut when the system has written it."""
        arrays: list[np.ndarray] = []

        def place_of(array: np.ndarray) -> dict:
            arrays.append(array)
            return {"dtype": array.dtype.str, "shape": array.shape}

        text = json.dumps(value, ensure_ascii=False, default=place_of).encode("utf-8", "surrogatepass")
        body = b"".join([JSON.pack(len(text)), text, *(array.tobytes() for array in arrays)])
        self._file.write(HEAD.pack(len(body), zlib.crc32(body)) + body)
        self._file.flush()


def _unpack(body: bytes):
    at = JSON.size + JSON.unpack_from(body)[0]
    text = body[JSON.size : at].decode("utf-8", "surrogatepass")

    def array_of(value: dict):
        nonlocal at
        if value.keys() != {"dtype", "shape"}:
            return value
        array = np.frombuffer(body, value["dtype"], int(np.prod(value["shape"])), at).reshape(value["shape"])
        at += array.nbytes
        return array

    # Objects are met in the order of their ends, and none holds another array: that of the arrays.
    return json.loads(text, object_hook=array_of)

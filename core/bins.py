"""Token bins: raw little-endian uint16 or uint32 ids with a .json beside them that says what they are.

In:  documents' ids. Out: files that appear whole or not at all; ids read from them, each checked.
Knows nothing of text, rows, models or torch.

A bin is the documents' ids one after another: [bos] ids eos [bos] ids eos ...
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core import files
from core.errors import UserError

BLOCK_BYTES = 16 << 20  # a hash per block: a later check can name the damaged part of a large file
SAMPLE_TOKENS = 1 << 20  # at each end of a trusted bin, which identify it
FORMAT = 1


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class BinWriter:
    """Write documents' ids to a bin and its sidecar; both appear whole when the `with` block ends, or not at all.

    Args:
        path: the .bin file; the sidecar is the same name with .json.
        vocab_size: every id is below it.
        eos_id: the id that ends each document.
        tokenizer_sha256: hash of the tokenizer's model file; training refuses another one.
        source: what the documents are, for people.
    """

    def __init__(self, path: Path, vocab_size: int, eos_id: int, tokenizer_sha256: str, source: str = ""):
        self.path = Path(path)
        self.about = {
            "format": FORMAT,
            "dtype": dtype_for(vocab_size).name,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "tokenizer_sha256": tokenizer_sha256,
            "source": source,
        }
        self.dtype = dtype_for(vocab_size)
        self.tokens = self.documents = self.text_bytes = 0
        self.sources: dict[str, dict[str, int]] = {}
        self._hashes: list[str] = []
        self._block = bytearray()

    def __enter__(self) -> "BinWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".tmp-{os.getpid()}-{self.path.name}")
        self._file = open(self._temporary, "wb")
        return self

    def add(self, ids: Sequence[int], text_bytes: int, documents: int = 1, source: str = "") -> None:
        """Append whole documents.

        Args:
            ids: of the documents in a row, bos and eos included.
            text_bytes: of their text in UTF-8.
            documents: how many.
            source: the file they are from, to be counted by.
        """
        array = np.asarray(ids)
        # numpy wraps around silently when an id does not fit the dtype.
        assert array.size and array.min() >= 0 and array.max() < self.about["vocab_size"], "id outside the vocabulary"
        self._block += array.astype(self.dtype, copy=False).tobytes()
        while len(self._block) >= BLOCK_BYTES:
            self._flush(BLOCK_BYTES)
        self.tokens += array.size
        self.documents += documents
        self.text_bytes += text_bytes
        if source:
            counts = self.sources.setdefault(source, {"documents": 0, "tokens": 0, "text_bytes": 0})
            for name, number in (("documents", documents), ("tokens", array.size), ("text_bytes", text_bytes)):
                counts[name] += number

    def flush(self) -> None:
        """Force all that was added to disk, after the last `add`: of several bins all can fail before one appears."""
        if self._block:
            self._flush(len(self._block))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _flush(self, size: int) -> None:
        self._file.write(self._block[:size])
        self._hashes.append(hashlib.sha256(self._block[:size]).hexdigest())
        del self._block[:size]

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                if not self.tokens:
                    raise UserError(f"{self.path}: no documents to write", "is the corpus empty?")
                self.flush()
                self._file.close()
                sidecar = self.path.with_suffix(".json")
                # In this order a kill leaves either pair whole, or a bin without sidecar, never a wrong pair.
                sidecar.unlink(missing_ok=True)
                os.replace(self._temporary, self.path)
                self.about |= {
                    "tokens": self.tokens,
                    "documents": self.documents,
                    "text_bytes": self.text_bytes,
                    "sources": self.sources,
                    "block_bytes": BLOCK_BYTES,
                    "blocks_sha256": self._hashes,
                }
                files.write_json(sidecar, self.about)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class TokenBin:
    """A bin opened for reading, checked against its sidecar and the vocabulary.

    Args:
        path: the .bin file.
        vocab_size: of the model that will read it.
        tokenizer_sha256: of the tokenizer that the model is trained with; "" skips the check.
        warn: called with a line of text where the bin has no sidecar.
        trust: do not read a bin without sidecar to its end now; what `read` gives is checked in any case.
    Raises:
        UserError: missing, truncated, made with another tokenizer, ids out of range.
    """

    def __init__(self, path: str | Path, vocab_size: int, tokenizer_sha256: str = "", warn=print, trust: bool = False):
        self.path, self.vocab_size = Path(path), vocab_size
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 -- open as long as this object lives
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}", "make it with python data_process.py") from None
        entry = os.fstat(self._file.fileno())
        if not stat.S_ISREG(entry.st_mode):
            raise UserError(f"{path}: not a file")
        size = entry.st_size
        sidecar, about = self.path.with_suffix(".json"), read_sidecar(self.path)
        self.dtype = np.dtype(about["dtype"]).newbyteorder("<") if about else dtype_for(vocab_size)
        if size % self.dtype.itemsize:
            raise UserError(f"{path}: {size} bytes is not a multiple of {self.dtype.itemsize}", "the file is damaged")
        self.tokens = size // self.dtype.itemsize
        self.text_bytes = about.get("text_bytes", 0)  # 0: not known, no bits per byte
        self.eos_id = about.get("eos_id")
        self._hashes, self._block_bytes = about.get("blocks_sha256"), about.get("block_bytes", BLOCK_BYTES)
        if about:
            if about["tokens"] != self.tokens:
                raise UserError(
                    f"{path}: {self.tokens} tokens, {sidecar.name} says {about['tokens']}",
                    "truncated? make it again with python data_process.py",
                )
            if about["vocab_size"] > vocab_size:
                raise UserError(f"{path}: made for a vocabulary of {about['vocab_size']}, the model has {vocab_size}")
            if tokenizer_sha256 and about["tokenizer_sha256"] != tokenizer_sha256:
                theirs, ours = about["tokenizer_sha256"][:12], tokenizer_sha256[:12]
                raise UserError(
                    f"{path}: made with tokenizer {theirs!r}, this run has {ours!r}",
                    "python data_process.py --input ... --tokenizer FOLDER --overwrite",
                )
            self.digest = hashlib.sha256("".join(about["blocks_sha256"]).encode()).hexdigest()
        else:
            checked = "ids are checked only as they are read" if trust else "every id is checked once"
            warn(f"warning: {path} has no {sidecar.name}: {checked}, bits per byte are not known")
            self.digest = self._sample() if trust else self._scan()

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count) as int64.

        Read, not mapped: a file cut short under a running trainer gives an error here instead of a SIGBUS, and a
        50 GB bin does not count as 50 GB of resident memory.
        """
        size = self.dtype.itemsize
        raw = self._bytes(start * size, count * size)
        if len(raw) != count * size:
            raise UserError(f"{self.path}: cut short at token {start + len(raw) // size} while being read")
        ids = np.frombuffer(raw, self.dtype).astype(np.int64)
        # An id past the embedding would be a crash far from its cause, or on a GPU a dead process.
        if count and ids.max() >= self.vocab_size:
            at = int(ids.argmax())
            raise UserError(
                f"{self.path}: token {start + at} is {ids[at]}, vocab is {self.vocab_size}",
                "another tokenizer's bin, or a damaged file",
            )
        return ids

    def _bytes(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, start)
        self._file.seek(start)  # Windows
        return self._file.read(size)

    def _scan(self) -> str:
        """Check every id of a bin without sidecar; returns a hash of its content."""
        digest = hashlib.sha256()
        for start in range(0, self.tokens, BLOCK_BYTES):
            digest.update(self.read(start, min(BLOCK_BYTES, self.tokens - start)).tobytes())
        return digest.hexdigest()

    def _sample(self) -> str:
        """A hash of the length and both ends: it tells other bins apart, but not a change in the middle of this one."""
        count = min(SAMPLE_TOKENS, self.tokens)
        ends = self.read(0, count).tobytes() + self.read(self.tokens - count, count).tobytes()
        return f"sample-{hashlib.sha256(f'{self.tokens} '.encode() + ends).hexdigest()}"

    def verify(self) -> int:
        """Compare the whole bin with the hashes in its sidecar.

        Returns:
            the number of blocks, all of them whole.

        Raises:
            UserError: no sidecar, or damaged blocks, each named with its bytes.
        """
        if self._hashes is None:
            raise UserError(f"{self.path}: no {self.path.with_suffix('.json').name} beside it to compare it with")
        size = self._block_bytes
        bad = [
            k
            for k, wanted in enumerate(self._hashes)
            if hashlib.sha256(self._bytes(k * size, size)).hexdigest() != wanted
        ]
        if bad:
            places = ", ".join(f"block {k} (bytes {k * size:,} to {(k + 1) * size - 1:,})" for k in bad[:10])
            raise UserError(
                f"{self.path}: damaged in {len(bad)} of {len(self._hashes)} blocks: {places}",
                "make it again, or copy it",
            )
        return len(self._hashes)


def source_of(path: Path) -> str:
    """What a bin's sidecar says its documents are; "" where there is no bin, "?" where it has no sidecar."""
    return str(read_sidecar(path).get("source", "?")) if path.exists() else ""


def read_sidecar(path: str | Path) -> dict:
    """What the .json beside a bin says, checked key by key; {} where there is none."""
    path = Path(path).with_suffix(".json")
    if not path.exists():
        return {}
    kinds = {
        "format": int,
        "dtype": str,
        "tokens": int,
        "vocab_size": int,
        "eos_id": int,
        "text_bytes": int,
        "tokenizer_sha256": str,
        "blocks_sha256": list,
    }
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON", "make the bin again") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: not a JSON object", "make the bin again")
    for key, kind in kinds.items():
        if type(about.get(key)) is not kind:
            raise UserError(f"{path}: {key} is missing or not of type {kind.__name__}", "make the bin again")
    if about["format"] != FORMAT:
        raise UserError(f"{path}: format {about['format']}, this version reads {FORMAT}", "make the bin again")
    if about["dtype"] not in ("uint16", "uint32"):
        raise UserError(f"{path}: dtype {about['dtype']!r} is neither uint16 nor uint32", "make the bin again")
    itemsize, block_bytes = np.dtype(about["dtype"]).itemsize, about.get("block_bytes", BLOCK_BYTES)
    if type(block_bytes) is not int or not 1 <= block_bytes <= 1 << 30:  # a block is held in memory to be compared
        raise UserError(f"{path}: block_bytes is {block_bytes!s:.40}, must be 1 to {1 << 30}", "make the bin again")
    for key, least, most in (
        ("tokens", 0, 1 << 60),
        ("vocab_size", 1, 1 << 8 * itemsize),
        ("eos_id", 0, about["vocab_size"] - 1),
        ("text_bytes", 0, 1 << 60),
    ):
        if not least <= about[key] <= most:
            raise UserError(f"{path}: {key} is {about[key]!s:.40}, must be {least} to {most}", "make the bin again")
    hashes, blocks = about["blocks_sha256"], -(-about["tokens"] * itemsize // block_bytes)
    if not all(isinstance(h, str) and re.fullmatch("[0-9a-f]{64}", h) for h in hashes) or len(hashes) != blocks:
        raise UserError(f"{path}: blocks_sha256 does not hold {blocks} hashes", "make the bin again")
    sources = about.setdefault("sources", {})
    if not isinstance(sources, dict) or not all(
        isinstance(found, dict) and all(type(found.get(key)) is int for key in ("documents", "tokens", "text_bytes"))
        for found in sources.values()
    ):
        raise UserError(f"{path}: sources holds something else than counts", "make the bin again")
    return about

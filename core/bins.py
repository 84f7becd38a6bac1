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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from core import files
from core.errors import UserError

BLOCK_BYTES = 16 << 20  # a hash per block: a later check can name the damaged part of a large file
SAMPLE_TOKENS = 1 << 20  # at each end of a trusted bin, which identify it
FORMAT = 1
COUNTS = ("documents", "tokens", "text_bytes")


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
        self.path, self.dtype = Path(path), dtype_for(vocab_size)
        self.about = {"format": FORMAT, "dtype": self.dtype.name, "vocab_size": vocab_size, "eos_id": eos_id}
        self.about |= {"tokenizer_sha256": tokenizer_sha256, "source": source}
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
        # An id that does not fit the dtype would become another id: numpy wraps around in silence.
        assert array.size and array.min() >= 0 and array.max() < self.about["vocab_size"], "id outside the vocabulary"
        # Written in whole blocks, so that each has its hash.
        self._block += array.astype(self.dtype, copy=False).tobytes()
        self._write_blocks(BLOCK_BYTES)
        self.tokens += array.size
        self.documents += documents
        self.text_bytes += text_bytes
        # The same three numbers once more, by the file that the documents are from.
        if source:
            counts = self.sources.setdefault(source, dict.fromkeys(COUNTS, 0))
            for name, number in zip(COUNTS, (documents, array.size, text_bytes)):
                counts[name] += number

    def flush(self) -> None:
        """Force all that was added to disk, after the last `add`: of several bins all can fail before one appears."""
        self._write_blocks(1)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_blocks(self, least: int) -> None:
        """Write blocks while there are at least so many bytes; the last one of a bin may be shorter than the others."""
        while len(self._block) >= least:
            block = self._block[:BLOCK_BYTES]
            self._file.write(block)
            self._hashes.append(hashlib.sha256(block).hexdigest())
            del self._block[:BLOCK_BYTES]

    def __exit__(self, kind, error, trace) -> None:
        # After an error nothing of the bin stays.
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
                counts = {name: getattr(self, name) for name in (*COUNTS, "sources")}
                hashes = {"block_bytes": BLOCK_BYTES, "blocks_sha256": self._hashes}
                files.write_json(sidecar, self.about | counts | hashes)
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
        # A file, with a whole number of ids.
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 -- open as long as this object lives
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}", "make it with python data_process.py") from None
        entry = os.fstat(self._file.fileno())
        if not stat.S_ISREG(entry.st_mode):
            raise UserError(f"{path}: not a file")
        about = read_sidecar(self.path)
        self.dtype = np.dtype(about["dtype"]).newbyteorder("<") if about else dtype_for(vocab_size)
        self.tokens, rest = divmod(entry.st_size, self.dtype.itemsize)
        if rest:
            said = f"{entry.st_size} bytes is not a multiple of {self.dtype.itemsize}"
            raise UserError(f"{path}: {said}", "the file is damaged")
        self.text_bytes, self.eos_id = about.get("text_bytes", 0), about.get("eos_id")  # 0: no bits per byte
        self._hashes, self._block_bytes = about.get("blocks_sha256"), about.get("block_bytes", BLOCK_BYTES)
        # Its digest tells a resumed run that the data is the same. It is made of hashes that are there already, or,
        # without a sidecar, of the ids.
        if about:
            self._compare(about, tokenizer_sha256)
            self.digest = hashlib.sha256("".join(self._hashes).encode()).hexdigest()
        else:
            checked = "ids are checked only as they are read" if trust else "every id is checked once"
            warn(f"warning: {path} has no {self.path.stem}.json: {checked}, bits per byte are not known")
            self.digest = self._sample() if trust else self._scan()

    def _compare(self, about: dict, tokenizer_sha256: str) -> None:
        """UserError where the sidecar says that this is not the bin for this tokenizer."""
        if about["tokens"] != self.tokens:
            said = f"{self.tokens} tokens, {self.path.stem}.json says {about['tokens']}"
            raise UserError(f"{self.path}: {said}", "truncated? make it again with python data_process.py")
        if (made_for := about["vocab_size"]) > self.vocab_size:
            raise UserError(f"{self.path}: made for a vocabulary of {made_for}, the model has {self.vocab_size}")
        if tokenizer_sha256 and about["tokenizer_sha256"] != tokenizer_sha256:
            said = f"made with tokenizer {about['tokenizer_sha256'][:12]!r}, this run has {tokenizer_sha256[:12]!r}"
            raise UserError(f"{self.path}: {said}", "python data_process.py --input ... --tokenizer FOLDER --overwrite")

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count) as int64.

        Read, not mapped: a file cut short under a running trainer gives an error here instead of a SIGBUS, and a
        50 GB bin does not count as 50 GB of resident memory.
        """
        # Fewer bytes than asked for: somebody has cut the file since it was opened.
        size = self.dtype.itemsize
        raw = self._bytes(start * size, count * size)
        if len(raw) != count * size:
            raise UserError(f"{self.path}: cut short at token {start + len(raw) // size} while being read")
        ids = np.frombuffer(raw, self.dtype).astype(np.int64)
        # An id past the embedding would be a crash far from its cause, or on a GPU a dead process.
        if count and ids.max() >= self.vocab_size:
            at = int(ids.argmax())
            said = f"token {start + at} is {ids[at]}, vocab is {self.vocab_size}"
            raise UserError(f"{self.path}: {said}", "another tokenizer's bin, or a damaged file")
        return ids

    def _bytes(self, start: int, size: int) -> bytes:
        self._file.seek(start)
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
        # One block after another: the file may be larger than memory.
        if self._hashes is None:
            raise UserError(f"{self.path}: no {self.path.with_suffix('.json').name} beside it to compare it with")
        size = self._block_bytes
        found = (hashlib.sha256(self._bytes(k * size, size)).hexdigest() for k in range(len(self._hashes)))
        bad = [k for k, (hash, wanted) in enumerate(zip(found, self._hashes)) if hash != wanted]
        if bad:
            places = ", ".join(f"block {k} (bytes {k * size:,} to {(k + 1) * size - 1:,})" for k in bad[:10])
            said = f"{self.path}: damaged in {len(bad)} of {len(self._hashes)} blocks: {places}"
            raise UserError(said, "make it again, or copy it")
        return len(self._hashes)


def source_of(path: Path) -> str:
    """What a bin's sidecar says its documents are; "" where there is no bin, "?" where it has no sidecar."""
    return str(read_sidecar(path).get("source", "?")) if path.exists() else ""


def read_sidecar(path: str | Path) -> dict:
    """What the .json beside a bin says, checked key by key; {} where there is none."""
    path = Path(path).with_suffix(".json")
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON", "make the bin again") from None
    for problem in _problems(about):
        raise UserError(f"{path}: {problem}", "make the bin again")
    return about | {"sources": about.get("sources", {})}


def _problems(about) -> Iterator[str]:
    """What is wrong with a sidecar's content, the first thing first."""
    if not isinstance(about, dict):
        yield "not a JSON object"
    # What every sidecar has, and what this version can read.
    kinds = {int: ("format", "tokens", "vocab_size", "eos_id", "text_bytes"), str: ("dtype", "tokenizer_sha256")}
    for kind, keys in (kinds | {list: ("blocks_sha256",)}).items():
        yield from (f"{k} is missing or not of type {kind.__name__}" for k in keys if type(about.get(k)) is not kind)
    if about["format"] != FORMAT:
        yield f"format {about['format']}, this version reads {FORMAT}"
    if about["dtype"] not in ("uint16", "uint32"):
        yield f"dtype {about['dtype']!r} is neither uint16 nor uint32"
    # A block is held in memory to be compared: its size is bounded, too.
    itemsize, block_bytes = np.dtype(about["dtype"]).itemsize, about.get("block_bytes", BLOCK_BYTES)
    if type(block_bytes) is not int or not 1 <= block_bytes <= 1 << 30:
        yield f"block_bytes is {block_bytes!s:.40}, must be 1 to {1 << 30}"
    limits = {"tokens": (0, 1 << 60), "vocab_size": (1, 1 << 8 * itemsize), "text_bytes": (0, 1 << 60)}
    limits["eos_id"] = (0, about["vocab_size"] - 1)
    for key, (least, most) in limits.items():
        if not least <= about[key] <= most:
            yield f"{key} is {about[key]!s:.40}, must be {least} to {most}"
    # A hash for each block, and counts for each source.
    hashes, blocks = about["blocks_sha256"], -(-about["tokens"] * itemsize // block_bytes)
    if len(hashes) != blocks or not all(isinstance(h, str) and re.fullmatch("[0-9a-f]{64}", h) for h in hashes):
        yield f"blocks_sha256 does not hold {blocks} hashes"
    sources = about.get("sources", {})
    found = sources.values() if isinstance(sources, dict) else [None]
    if not all(isinstance(counts, dict) and all(type(counts.get(k)) is int for k in COUNTS) for counts in found):
        yield "sources holds something else than counts"

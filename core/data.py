"""Token bins, chat samples, rows, batches, and the order in which a run sees them.

In:  bins (raw little-endian uint16 or uint32 with a .json beside them), or rendered chats (ids and loss mask).
Out: Batch objects, the same for any number of ranks and after any resume.
Knows nothing of text, models or losses.

Shapes:  B rows of a micro-batch, T positions (seq_len)

A bin is the documents' ids one after another: [bos] ids eos [bos] ids eos ... Row i of a bin is the window of T + 1
ids from i * T: its first T are read, its last T are predicted.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core import files
from core.errors import UserError
from model import IGNORE

BLOCK_BYTES = 16 << 20  # a hash per block: a later check can name the damaged part of a large file
SAMPLE_TOKENS = 1 << 20  # at each end of a trusted bin, which identify it
FORMAT = 1


@dataclass
class Batch:
    """One micro-batch: ids, targets (B, T) int64, docs (B, T) int32 or None, and the rows it was made of."""

    ids: Tensor
    targets: Tensor
    docs: Tensor | None
    rows: list[int]

    @property
    def count(self) -> Tensor:
        """Number of targets, a scalar: what a sum of losses is divided by."""
        return (self.targets != IGNORE).sum()

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        tensors = {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return replace(self, **{name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()})


# ---------------------------------------------------------------- bins


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


# ---------------------------------------------------------------- rows


class BinRows:
    """Rows of a bin: consecutive windows, each exactly once per epoch.

    Args:
        bin: the tokens.
        seq_len: T.
        docs: number the documents of a row, so that attention stays within each.
        eos_id: the id that ends a document.
        tail: also give the last, incomplete window, padded (validation wants every token; training drops it).
    """

    def __init__(self, bin: TokenBin, seq_len: int, docs: bool, eos_id: int, tail: bool = False):
        self.bin, self.seq_len, self.docs, self.eos_id = bin, seq_len, docs, eos_id
        whole = (bin.tokens - 1) // seq_len
        rest = bin.tokens - 1 - whole * seq_len
        self.rows, self.left_over = (whole + bool(rest), 0) if tail else (whole, rest)
        if self.rows < 1:  # an empty bin has -1
            raise UserError(
                f"{bin.path}: {bin.tokens} tokens, needs at least seq_len + 1 = {seq_len + 1}",
                "a longer text or a smaller --seq_len",
            )
        self.digest = bin.digest
        # Bits per byte = nats of all targets / ln 2 / bytes of the text they encode.
        self.bytes_per_token = bin.text_bytes / bin.tokens

    def __len__(self) -> int:
        return self.rows

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """ids, targets, docs of row i, each (T,)."""
        start = i * self.seq_len
        window = self.bin.read(start, min(self.seq_len + 1, self.bin.tokens - start))
        ids, targets = _padded(window[:-1], self.seq_len, self.eos_id), _padded(window[1:], self.seq_len, IGNORE)
        if not self.docs:
            return ids, targets, None
        ends = ids == self.eos_id
        # What follows an end belongs to the next document, and predicting it from this one would be a guess.
        return ids, np.where(ends, IGNORE, targets), np.cumsum(ends) - ends

    def describe(self) -> str:
        return (
            f"{self.bin.path}: {self.bin.tokens:,} tokens in {len(self)} rows of {self.seq_len}, "
            f"{self.left_over} tokens at the end left out"
        )

    def where(self, i: int) -> str:
        return f"{self.bin.path}: tokens {i * self.seq_len} to {(i + 1) * self.seq_len}"


class MixedRows:
    """Rows of several bins together, each with a share of them.

    One epoch shows every row of every bin at least once, and the one with the most rows for its share exactly once; the
    others begin again. Which row comes when is decided by `row_number`, as for a single bin.

    Args:
        parts: the bins' rows, of one seq_len.
        shares: how much of the training each is, in any unit; None: as much as each has.
    """

    def __init__(self, parts: Sequence[BinRows], shares: Sequence[float] | None = None):
        self.parts = parts
        shares = list(shares or map(len, parts))
        self.seq_len, self.bytes_per_token = parts[0].seq_len, 0.0
        epoch = max(len(part) / share for part, share in zip(parts, shares))
        counts = [max(len(part), round(share * epoch)) for part, share in zip(parts, shares)]
        self.ends = np.cumsum(counts)
        identity = [(part.digest, count) for part, count in zip(parts, counts)]
        self.digest = hashlib.sha256(str(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, i: int) -> tuple[BinRows, int]:
        k = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[k], (i - (int(self.ends[k - 1]) if k else 0)) % len(self.parts[k])

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """ids, targets, docs of row i, each (T,)."""
        part, at = self._find(i)
        return part.row(at)

    def describe(self) -> str:
        counts = np.diff(self.ends, prepend=0)
        return "\n".join(
            f"{count / len(self):.1%} {part.describe()}, each {count / len(part):.2f} times an epoch"
            for part, count in zip(self.parts, counts)
        )

    def where(self, i: int) -> str:
        part, at = self._find(i)
        return part.where(at)


def parse_mix(entries: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """["wiki.bin:0.7", "medical.bin:0.3"] -> paths and shares; None where no entry has a share.

    Raises:
        UserError: some entries with a share and some without, a share of 0, or a file that is named twice.
    """
    found = [re.fullmatch(r"(.+?)(?::([0-9]*\.?[0-9]+))?", entry) for entry in entries]
    paths, shares = [m[1] for m in found if m], [float(m[2]) for m in found if m and m[2]]
    real = [os.path.realpath(path) for path in paths]
    if doubles := {path for path, r in zip(paths, real) if real.count(r) > 1}:
        raise UserError(f"{', '.join(sorted(doubles))}: named twice", "a share says how often a bin is seen")
    if not paths:
        raise UserError("data.train is empty", "a bin to train on")
    if shares and (len(shares) < len(paths) or min(shares) <= 0):
        raise UserError(f"{', '.join(entries)}: all or none have a share, and none is 0", "a.bin:0.7,b.bin:0.3")
    return paths, shares or None


class ChatRows:
    """Rows of rendered chats: several samples packed into each, none split.

    Args:
        samples: (ids, mask, where) of each chat; mask is 1 where the id is to be predicted.
        seq_len: T; no sample may have more than T + 1 ids.
        pad_id: the id that fills a row's rest; it has no loss and its own document number.
        pack: False gives every sample a row of its own.
    """

    def __init__(
        self, samples: Iterable[tuple[Sequence[int], Sequence[int], str]], seq_len: int, pad_id: int, pack: bool = True
    ):
        self.seq_len, self.pad_id = seq_len, pad_id
        self.samples = [(np.asarray(ids, np.int64), np.asarray(mask, bool), where) for ids, mask, where in samples]
        digest = hashlib.sha256()
        self.packs: list[list[int]] = []
        room = 0
        for k, (ids, mask, where) in enumerate(self.samples):
            need = len(ids) - 1  # the last id is only predicted, never read
            assert 0 < need <= seq_len and mask[1:].any(), f"{where}: sample does not fit"
            if not (pack and need <= room):
                self.packs.append([])
                room = seq_len
            self.packs[-1].append(k)
            room -= need
            digest.update(ids.tobytes() + mask.tobytes())
        if not self.packs:
            raise UserError("no chats to train on")
        digest.update(str(self.packs).encode())  # the rows' numbers mean another order in another packing
        self.digest = digest.hexdigest()
        self.bytes_per_token = 0.0

    def __len__(self) -> int:
        return len(self.packs)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, targets, docs of row i, each (T,)."""
        ids, targets, docs = [], [], []
        for number, k in enumerate(self.packs[i]):
            tokens, mask, _ = self.samples[k]
            ids.append(tokens[:-1])
            targets.append(np.where(mask[1:], tokens[1:], IGNORE))
            docs.append(np.full(len(tokens) - 1, number))
        return (
            _padded(np.concatenate(ids), self.seq_len, self.pad_id),
            _padded(np.concatenate(targets), self.seq_len, IGNORE),
            _padded(np.concatenate(docs), self.seq_len, len(docs)),
        )

    def where(self, i: int) -> str:
        return f"{self.samples[self.packs[i][0]][2]} and the {len(self.packs[i]) - 1} chats packed with it"


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    return values if len(values) == length else np.append(values, np.full(length - len(values), fill, np.int64))


def batch(rows: BinRows | MixedRows | ChatRows, indices: Sequence[int]) -> Batch:
    """The rows with the given numbers as one micro-batch; rows that need more than a Batch say how: `make`."""
    ids, targets, docs = zip(*(rows.row(i) for i in indices))
    return getattr(rows, "make", Batch)(
        torch.from_numpy(np.stack(ids)),
        torch.from_numpy(np.stack(targets)),
        None if docs[0] is None else torch.from_numpy(np.stack(docs).astype(np.int32)),
        list(indices),
    )


def parse_object(text: bytes | str) -> dict:
    """A JSON object; ValueError where it is none, names a key twice (Python keeps the last), or holds a NaN."""

    def no_twins(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")

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
                if not (line := line.strip()):
                    continue
                try:
                    yield f"{path}:{number}", parse_object(line)
                except ValueError as e:
                    raise UserError(f"{path}:{number}: not a JSON object in UTF-8: {e}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}", "make it with python data_process.py") from None


# ---------------------------------------------------------------- order


def permute(k: int, n: int, key: str) -> int:
    """Where a fixed pseudo-random permutation of range(n) sends k.

    A Feistel network over the smallest even number of bits that holds n, walked until it lands below n again
    (at most 4 rounds of it on average, since the domain is less than 4n): no state, no table, any k at once.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, https://eprint.iacr.org/2001/012
    """
    assert 0 <= k < n
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = k >> half, k & low
        for round in range(4):
            digest = hashlib.blake2b(f"{key}:{round}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        k = left << half | right
        if k < n:
            return k


def row_number(k: int, n: int, seed: int) -> int:
    """Row that comes k-th in a run over n rows: each epoch of n is a permutation of its own."""
    epoch, at = divmod(k, n)
    return permute(at, n, f"{seed}:{epoch}")


def step_rows(seen: int, rows_per_step: int, n: int, seed: int) -> list[int]:
    """Row numbers of the optimizer step that begins after `seen` rows, over all ranks, in order."""
    return [row_number(seen + j, n, seed) for j in range(rows_per_step)]

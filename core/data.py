"""Token bins, chat samples, rows, batches, and the order in which a run sees them.

In:  bins (raw little-endian uint16 or uint32 with a .json beside them), or rendered chats (ids and loss mask).
Out: Batch objects, the same for any number of ranks and after any resume.
Knows nothing of text, models or losses.

Shapes:  B rows of a micro-batch, T positions (seq_len)

A bin is the documents' ids one after another: [bos] ids eos [bos] ids eos ... Row i of a bin is the window of T + 1
ids from i * T: its first T are read, its last T are predicted.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from core.bins import TokenBin
from core.errors import UserError
from model import IGNORE


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

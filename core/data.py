"""Rows, batches, and the order in which a run sees them.

In:  a token bin. Out: Batch objects, the same for any number of ranks and after any resume.
Knows nothing of text, models or ranks.

Shapes:  B rows of a micro-batch, T positions (seq_len)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

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
        # Tensors of wings' batches, too. From pinned memory a GPU copies while the program goes on.
        tensors = {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return replace(self, **{name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()})


class Rows(Protocol):
    """What a run trains on or is validated on: numbered rows of seq_len positions.

    Attributes:
        seq_len: positions of a row, T.
        digest: a hash of all rows; a resumed run must have the same.
    """

    seq_len: int
    digest: str

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers as one micro-batch."""

    def where(self, i: int) -> str:
        """Where row i comes from, for people."""

    def describe(self) -> str:
        """A line on all rows, for people."""

    def text_bytes(self, rows: int) -> float:
        """UTF-8 bytes of the text in the first rows; 0 where they are not known."""


class BinRows:
    """Rows of a bin: consecutive windows, each exactly once per epoch.

    Row i is the window of T + 1 ids from i * T: its first T are read, its last T are predicted.

    Args:
        bin: the tokens.
        seq_len: T.
        docs: number the documents of a row, so that attention stays within each.
        eos_id: the id that ends a document.
        tail: also give the last, incomplete window, padded (validation wants every token; training drops it).
    """

    def __init__(self, bin: TokenBin, seq_len: int, docs: bool, eos_id: int, tail: bool = False):
        self.bin, self.seq_len, self.docs, self.eos_id = bin, seq_len, docs, eos_id
        # The last id is only predicted, never read.
        whole, rest = divmod(bin.tokens - 1, seq_len)
        self.rows, self.left_over = (whole + bool(rest), 0) if tail else (whole, rest)
        if self.rows < 1:  # an empty bin has -1
            needed = f"needs at least seq_len + 1 = {seq_len + 1}"
            raise UserError(f"{bin.path}: {bin.tokens} tokens, {needed}", "a longer text or a smaller --seq_len")
        self.digest = bin.digest

    def __len__(self) -> int:
        return self.rows

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """ids, targets, docs of row i, each (T,)."""
        # Row i + 1 begins with the id that row i ends with: the one predicts it, the other reads it.
        start = i * self.seq_len
        window = self.bin.read(start, min(self.seq_len + 1, self.bin.tokens - start))
        ids, targets = padded(window[:-1], self.seq_len, self.eos_id), padded(window[1:], self.seq_len, IGNORE)
        if not self.docs:
            return ids, targets, None
        # What follows an end belongs to the next document, and predicting it from this one would be a guess.
        ends = ids == self.eos_id
        return ids, np.where(ends, IGNORE, targets), np.cumsum(ends) - ends

    def batch(self, indices: Sequence[int]) -> Batch:
        return stack([self.row(i) for i in indices], indices)

    def where(self, i: int) -> str:
        return f"{self.bin.path}: tokens {i * self.seq_len} to {(i + 1) * self.seq_len}"

    def describe(self) -> str:
        rows = f"{self.bin.tokens:,} tokens in {len(self)} rows of {self.seq_len}"
        return f"{self.bin.path}: {rows}, {self.left_over} tokens at the end left out"

    def text_bytes(self, rows: int) -> float:
        # The text's bytes are spread evenly over all ids; one without a target (a document's first) counts too.
        return min(rows * self.seq_len, self.bin.tokens) * (self.bin.text_bytes / self.bin.tokens)


def padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    return values if len(values) == length else np.append(values, np.full(length - len(values), fill, np.int64))


def stack(rows: Sequence[tuple], indices: Sequence[int]) -> Batch:
    """Rows (ids, targets, docs), each (T,), as one micro-batch."""
    ids, targets, docs = zip(*rows)
    docs = None if docs[0] is None else torch.from_numpy(np.stack(docs).astype(np.int32))
    return Batch(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(targets)), docs, list(indices))


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
    # Each round mixes one half of the bits with a hash of the other half, and swaps them: nothing is lost.
    while True:
        left, right = k >> half, k & low
        for round in range(4):
            digest = hashlib.blake2b(f"{key}:{round}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        k = left << half | right
        # A number outside the range is sent on, until it comes back into it.
        if k < n:
            return k


def row_number(k: int, n: int, seed: int) -> int:
    """Row that comes k-th in a run over n rows: each epoch of n is a permutation of its own."""
    epoch, at = divmod(k, n)
    return permute(at, n, f"{seed}:{epoch}")


def step_rows(seen: int, rows_per_step: int, n: int, seed: int) -> list[int]:
    """Row numbers of the optimizer step that begins after `seen` rows, over all ranks, in order."""
    return [row_number(seen + j, n, seed) for j in range(rows_per_step)]


def plan_step(batch_tokens: int, micro_batch: int, seq_len: int, ranks: int) -> tuple[int, int, int]:
    """How the rows of an optimizer step are dealt out.

    Returns:
        rows per step over all ranks; rows per micro-batch, at most micro_batch, and as many as divide a rank's share
        of the step without a rest; micro-batches per rank.
    Raises:
        UserError: batch_tokens cannot be dealt out to the ranks in whole rows.
    """
    # Every rank has the same number of rows, whole ones.
    share = ranks * seq_len
    if batch_tokens % share:
        nearest = max(share, batch_tokens // share * share)
        multiple = f"ranks {ranks} x seq_len {seq_len} = {share}"
        raise UserError(f"batch_tokens {batch_tokens} is not a multiple of {multiple}", f"--batch_tokens {nearest}")
    # Of one rank's rows the largest micro-batches of one size that memory allows.
    mine = batch_tokens // share
    micro = next(n for n in range(min(micro_batch, mine), 0, -1) if mine % n == 0)
    return mine * ranks, micro, mine // micro


def seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Dropout in the forward pass of a step's micro-batch depends on nothing that came before."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[:8]) >> 1)

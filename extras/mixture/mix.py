"""Several bins in one run, each with its share of the rows.

In:  rows of bins, and shares as "wiki.bin:0.7". Out: rows of all of them (see core/data.py).
Knows nothing of models or of the order in which rows are seen.
"""

import hashlib
import os
import re
from collections.abc import Sequence

import numpy as np

from core.data import Batch, BinRows, stack
from core.errors import UserError


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
        self.seq_len = parts[0].seq_len
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

    def batch(self, indices: Sequence[int]) -> Batch:
        return stack([self.row(i) for i in indices], indices)

    def text_bytes(self, rows: int) -> float:
        return 0.0  # a sum over several texts would say nothing about any of them

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

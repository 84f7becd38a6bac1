"""Exact and near duplicates out of a stream of documents; the first of each kind stays.

In:  documents. Out: those that are neither equal nor nearly equal to one kept before them.
How, in two steps, so that the first can run in many processes and the second sees every document in order:

    sign   texts -> signatures and exact hashes; a pure function, for workers
    Index  remembers what was kept, says of each further document "", "exact duplicate" or "near duplicate"

    for docs, signed in <chunks, from worker processes>:
        reasons = index.add(signed)

A text is the set of its character 5-grams without any whitespace, for where a Chinese line breaks says nothing. The
share of n-grams that two texts have in common, of all that they have, is their Jaccard similarity J. MinHash (Broder
1997) estimates it: for a random order of all n-grams, two sets have the same smallest member with probability J. 128
such orders make a signature. It is cut into bands; documents that agree in a whole band are looked at (`bands` says how
many), and only where the signatures agree in enough places (`cut`) is the later one removed.

On 100,000 texts of 0.5 to 5 kB with 10,000 edited copies: 99.3 % of the copies with J >= 0.85 went, none of 2,111 with
J < 0.6; at least 10 times as fast as datasketch 2.0, 4 times as rensa 0.5, both fed with n-grams by Python (bench.py).

Results depend neither on chunks, nor processes, nor on what went to disk.
Does not know meaning, nor a short text inside a long one; case, width, punctuation, simplified or not: all differ.
"""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import Annotated, NamedTuple

import numpy as np

from core.config import Range, Section
from extras.corpus.account import Account, Doc, Stage

EXACT, NEAR = "exact duplicate", "near duplicate"
REASONS = ("", NEAR, EXACT)  # the verdict on a document is the largest of those on its pairs
# Characters. Of 30,000 pairs of unrelated answers one in a thousand has J above 0.04 (with bigrams 0.13); one changed
# character of 100 leaves J = 0.87 (with bigrams 0.95, with 7-grams 0.82).
NGRAM = 5
MISS_WEIGHT = 0.95  # of a pair missed by all bands against one looked at in vain: the latter costs a comparison only
PART = 1 << 17  # characters hashed at a time: arrays of 1 MiB. 2^15 takes 1.35 times as long, 2^18 8 % less
EMPTY = np.uint32(0xFFFFFFFF)  # no n-gram yet
BLOCK = 256  # documents that the index takes at a time: 64 take 1.6 times as long, 1024 13 % less but more pages
CHUNK = 256  # documents that `dedup` signs at a time
FULL = 0.6  # of the slots, then the table doubles: 1.8 probes for a key that is there, 3.6 for one that is not (Knuth)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: odd, bits without a pattern


@dataclass(frozen=True)
class DedupConfig(Section):
    # A document is a near duplicate if its character 5-grams have at least this Jaccard similarity with another's.
    threshold: Annotated[float, Range(above=0, most=1)] = 0.8
    # Entries of a signature; the estimate's standard error is at most 0.5 / sqrt(this).
    permutations: Annotated[int, Range(least=1, most=4096)] = 128
    # MiB for the index, 600 to 1,200 bytes a document; what does not fit goes to files, up to 4 times slower.
    memory_mb: Annotated[int, Range(least=0)] = 256
    temp_dir: str = ""  # where those go, a folder on a disk; "" for the system's

    def __post_init__(self):
        super().__post_init__()
        if self.temp_dir and not os.path.isdir(self.temp_dir):
            raise ValueError(f"temp_dir {self.temp_dir} is not a folder")


class Signed(NamedTuple):
    """What the index needs to know of n documents: exact (n, 2) uint64, signatures (n, permutations) uint32."""

    exact: np.ndarray
    signatures: np.ndarray


# ---------------------------------------------------------------- signatures


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads every bit of a uint64 over all of it, one to one, in place (MurmurHash3's finalizer)."""
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        x ^= x >> np.uint64(33)
        x *= factor
    x ^= x >> np.uint64(33)
    return x


@lru_cache
def _factors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """a (odd, so that h -> a * h + b is one to one on 32 bits) and b of each order."""
    numbers = _mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * GOLDEN).astype(np.uint32)
    return numbers[:count] | np.uint32(1), numbers[count:]


def signatures(texts: list[str], permutations: int = 128) -> np.ndarray:
    """The MinHash signatures of texts.

    Entry k is the first of a text's n-grams in order k, as a number. Order k puts in front the n-grams that a hash
    deals into bin k of 128, by that hash; behind them all others by a_k * hash + b_k mod 2^32. A long text has n-grams
    in every bin, so that each is hashed once, not 128 times: 2.2 times as fast on texts of 900 characters.

    Args:
        texts: any; some hundreds at a time, as each numpy call has its price. A short one (fewer than 5 characters
            without whitespace) is one n-gram, an empty one too.
        permutations: entries of a signature.

    Returns:
        (len(texts), permutations) uint32.

    Source: Broder, On the resemblance and containment of documents, 1997; the bins: Li, Owen, Zhang, One Permutation
    Hashing, NIPS 2012, with empty bins filled as in Dahlgaard et al., Fast Similarity Sketching, arXiv 1704.04370, of
    which this is the first round and the fall-back.
    """
    plain = ["".join(text.split()).ljust(NGRAM) for text in texts]  # no text has a blank now: none is taken for another
    part = np.cumsum([len(text) for text in plain], dtype=np.int64) // PART
    starts = [*np.flatnonzero(np.diff(part, prepend=-1)).tolist(), len(plain)]
    parts = [_signatures(plain[a:b], permutations) for a, b in pairwise(starts)]
    return np.concatenate([np.empty((0, permutations), np.uint32), *parts])


def _signatures(plain: list[str], permutations: int) -> np.ndarray:
    """Of at least one text, each of at least 5 characters."""
    codes = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), "<u4")
    owner = np.repeat(np.arange(len(plain)), [len(text) for text in plain])  # text of each character, then n-gram
    last = len(codes) - NGRAM + 1
    hashes = np.zeros(last, np.uint64)
    for i in range(NGRAM):
        hashes *= GOLDEN
        hashes += codes[i : last + i]
    inside = owner[:last] == owner[NGRAM - 1 :]  # the others begin in one text and end in the next
    hashes, owner = _mix(hashes[inside]), owner[:last][inside]

    low = hashes.astype(np.uint32) & np.uint32(0x7FFFFFFF)  # 31 bits, so that none is EMPTY
    bins = ((hashes >> np.uint64(32)) * np.uint64(permutations)) >> np.uint64(32)  # from bits that `low` has not
    result = np.full((len(plain), permutations), EMPTY)
    np.minimum.at(result.ravel(), owner * permutations + bins.view(np.int64), low)

    gaps = (result == EMPTY).any(1)
    if gaps.any():
        some = gaps[owner]
        low, starts = low[some], np.flatnonzero(np.diff(owner[some], prepend=-1))
        others = np.empty((permutations, len(starts)), np.uint32)
        for row, a, b in zip(others, *_factors(permutations)):
            np.minimum.reduceat(low * a + b, starts, out=row)
        result[gaps] = np.where(result[gaps] == EMPTY, others.T, result[gaps])
    return result


def sign(options: DedupConfig, texts: list[str]) -> Signed:
    """What `Index.add` wants of some texts; the order of arguments is that of `tokenizer.parallel.map_in_order`.

    Returns:
        signatures as above, and 128 bits of BLAKE2b of each whole text, whitespace included.
    """
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
    exact = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return Signed(exact, signatures(texts, options.permutations))


@lru_cache
def bands(threshold: float, permutations: int = 128) -> tuple[int, int]:
    """How many bands of how many entries a signature is cut into.

    Two documents of similarity s agree in a whole one of b bands of r with probability p(s) = 1 - (1 - s^r)^b. Chosen
    is what makes the area under p below the threshold (looked at in vain) and that over p above it (missed), weighted,
    smallest. For 0.8: 16 bands of 8, which find 94.7 % at s = 0.8, 99.4 % at 0.85, and look at 24 % at 0.6.

    Returns:
        (bands, entries in each).

    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4; Zhu et al., LSH Ensemble, VLDB 2016, 5.2 for
    the areas, there with equal weights: that is 9 bands of 14, which without the comparison are all there is.
    """
    s = (np.arange(1000) + 0.5) / 1000

    def cost(r: int) -> float:
        p = 1 - (1 - s**r) ** (permutations // r)
        return (1 - MISS_WEIGHT) * p[s < threshold].sum() + MISS_WEIGHT * (1 - p[s >= threshold]).sum()

    r = min(range(1, permutations + 1), key=cost)
    return permutations // r, r


def cut(threshold: float, permutations: int = 128) -> float:
    """The share of equal entries from which on a pair counts as near: one standard error below the threshold.

    For 0.8 this is 0.765, reached by 99.6 % of pairs with J = 0.85, 84 % with 0.8, 5 % with 0.7, 0.01 % with 0.6.
    """
    return threshold - (threshold * (1 - threshold) / permutations) ** 0.5


# ---------------------------------------------------------------- what was kept


class _Room:
    """Arrays of zeros: in memory while they fit, then in files that nobody else sees and that vanish with them."""

    def __init__(self, options: DedupConfig):
        self.left, self.folder = options.memory_mb << 20, options.temp_dir or None
        self.maps: dict[int, mmap.mmap] = {}

    def zeros(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size <= self.left:
            self.left -= size
            return np.zeros(shape, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an OSError now, not a SIGBUS later
            pages = mmap.mmap(file.fileno(), size)
        if hasattr(mmap, "MADV_RANDOM"):
            pages.madvise(mmap.MADV_RANDOM)  # a page at a time, not 128 KiB around each
        array = np.frombuffer(pages, dtype).reshape(shape)
        self.maps[id(array)] = pages
        return array

    def free(self, array: np.ndarray) -> None:
        if self.maps.pop(id(array), None) is None:
            self.left += array.nbytes

    def unload(self) -> None:
        """Give the pages of files back; they stay in the system's cache while there is room, and count as its."""
        for pages in self.maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)


class _Table:
    """uint64 key -> the first document that had it; a hash table with linear probing, many keys at a time."""

    def __init__(self, room: _Room, slots: int = 1 << 12):
        self.room, self.used = room, 0
        self.slots = room.zeros((slots, 3), np.uint32)  # both halves of a key, 1 + document; 0 for free

    def find(self, keys: np.ndarray) -> np.ndarray:
        """1 + document of each key (n,) uint64, 0 where there is none: (n,) uint32."""
        low, high = keys.view(np.uint32).reshape(-1, 2).T
        found = np.zeros(len(keys), np.uint32)
        todo, at = np.arange(len(keys)), self._home(keys)
        while len(todo):
            slots = self.slots.take(at, axis=0)
            same = (slots[:, 0] == low[todo]) & (slots[:, 1] == high[todo])
            found[todo[same]] = slots[same, 2]  # 0, too, where the slot is free and the key happens to be 0
            on = ~same & (slots[:, 2] != 0)
            todo, at = todo[on], (at[on] + 1) & (len(self.slots) - 1)
        return found

    def insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add keys (n,) uint64 that are all different and not there, with 1 + document of each (n,) uint32."""
        while self.used + len(keys) > FULL * len(self.slots):
            self._double()
        self.used += len(keys)
        rows = np.column_stack([keys.view(np.uint32).reshape(-1, 2), values])
        at = self._home(keys)
        while len(rows):
            free = self.slots[at, 2] == 0
            self.slots[at[free]] = rows[free]  # of several for the same slot one is written, the others go on
            slots = self.slots.take(at, axis=0)
            on = (slots[:, 0] != rows[:, 0]) | (slots[:, 1] != rows[:, 1])
            rows, at = rows[on], (at[on] + 1) & (len(self.slots) - 1)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        return (keys & np.uint64(len(self.slots) - 1)).astype(np.int64)

    def _double(self) -> None:
        old, self.used = self.slots, 0
        self.slots = self.room.zeros((2 * len(old), 3), np.uint32)
        for at in range(0, len(old), 1 << 12):
            rows = old[at : at + (1 << 12)]
            rows = rows[rows[:, 2] != 0]
            self.insert(np.ascontiguousarray(rows[:, :2]).view(np.uint64).ravel(), rows[:, 2])
            self.room.unload()
        self.room.free(old)


class Index:
    """Remembers the documents that were kept and finds duplicates of them.

    A document is compared with the first that was kept with the same exact hash, and with the first that was kept with
    the same band, for each band: at most bands + 1 comparisons, however many alike there are. What was removed is
    forgotten, so of a chain of ever less similar texts not all go.
    """

    def __init__(self, options: DedupConfig):
        """See DedupConfig; OSError from here on where the temporary files find no room."""
        self.options = options
        self.bands, self.rows = bands(options.threshold, options.permutations)
        self.cut = cut(options.threshold, options.permutations) * options.permutations
        self.kept = 0
        self._room = _Room(options)
        self._table = _Table(self._room)
        # 16 bits of an entry are enough to compare: different ones are taken for equal in 1 of 65536 cases.
        self._dtype = np.dtype([("exact", np.uint64, (2,)), ("signature", np.uint16, (options.permutations,))])
        self._store = self._room.zeros((1 << 10,), self._dtype)

    def add(self, signed: Signed) -> list[str]:
        """Take documents, in their order.

        Args:
            signed: n documents, with the same options.

        Returns:
            n times "" for kept, "exact duplicate" or "near duplicate" (of one that was kept).
        """
        assert signed.signatures.shape == (len(signed.exact), self.options.permutations)
        reasons = []
        for at in range(0, len(signed.exact), BLOCK):
            reasons += self._add(Signed(*(array[at : at + BLOCK] for array in signed)))
            self._room.unload()
        return reasons

    def _add(self, signed: Signed) -> list[str]:
        keys = self._keys(signed)
        new = np.empty(len(keys), self._dtype)
        new["exact"], new["signature"] = signed.exact, signed.signatures.astype(np.uint16)
        verdict = np.zeros(len(keys), np.int8)  # a number in REASONS

        # Compared with what the index had, all at once.
        owners = self._table.find(keys.ravel()).reshape(keys.shape)
        which, column = np.nonzero(owners)
        np.maximum.at(verdict, which, self._compare(new[which], self._store[owners[which, column] - 1]))

        # Compared with each other, one after another, because what is removed removes nothing.
        absent = owners == 0
        _, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
        alike = (absent & (times[inverse].reshape(keys.shape) > 1)).any(1)
        first: dict[int, int] = {}
        for i in np.flatnonzero(alike & (verdict == 0)).tolist():
            mine = keys[i, absent[i]].tolist()
            rivals = sorted({first[key] for key in mine if key in first})
            if rivals:
                verdict[i] = self._compare(new[i], new[rivals]).max()
            if not verdict[i]:
                for key in mine:
                    first.setdefault(key, i)

        self._keep(new[verdict == 0], keys[verdict == 0], absent[verdict == 0])
        return [REASONS[v] for v in verdict.tolist()]

    def _keys(self, signed: Signed) -> np.ndarray:
        """(n, 1 + bands) uint64: half of the exact hash, then a hash of each band and its number."""
        cells = signed.signatures[:, : self.bands * self.rows].reshape(-1, self.bands, self.rows)
        keys = np.empty((len(cells), 1 + self.bands), np.uint64)
        keys[:, 0], keys[:, 1:] = signed.exact[:, 0], np.arange(self.bands)
        for i in range(self.rows):
            keys[:, 1:] = _mix(keys[:, 1:] * GOLDEN + cells[:, :, i])
        return keys

    def _compare(self, new: np.ndarray, old: np.ndarray) -> np.ndarray:
        """The verdict on `new` because of `old`, pairwise."""
        near = (new["signature"] == old["signature"]).sum(-1) >= self.cut
        return np.where((new["exact"] == old["exact"]).all(-1), REASONS.index(EXACT), near * REASONS.index(NEAR))

    def _keep(self, new: np.ndarray, keys: np.ndarray, absent: np.ndarray) -> None:
        while self.kept + len(new) > len(self._store):
            old, self._store = self._store, self._room.zeros((2 * len(self._store),), self._dtype)
            for at in range(0, len(old), BLOCK):
                part = old[at : at + BLOCK]
                self._store[at : at + len(part)] = part
                self._room.unload()
            self._room.free(old)
        self._store[self.kept : self.kept + len(new)] = new
        numbers = np.broadcast_to(np.arange(1, len(new) + 1)[:, None] + self.kept, keys.shape)
        fresh, at = np.unique(keys[absent], return_index=True)  # the first of equal ones is that of the first document
        self._table.insert(fresh, numbers[absent][at].astype(np.uint32))
        self.kept += len(new)


def dedup(docs: Iterable[Doc], account: Account, options: DedupConfig) -> Iterator[Doc]:
    """The stage in one process: what is neither equal nor nearly equal to a document kept before it.

    Args:
        docs: the stream.
        account: of the stage; rejects are "exact duplicate" and "near duplicate".
        options: see DedupConfig.
    """
    docs = iter(docs)
    chunks = iter(lambda: list(islice(docs, CHUNK)), [])
    return drop(((chunk, sign_docs(options, chunk)) for chunk in chunks), account, options)


def sign_docs(options: DedupConfig, docs: list[Doc]) -> Signed:
    """The first step of the stage, for workers."""
    return sign(options, [doc.text for doc in docs])


def drop(chunks: Iterable[tuple[list[Doc], Signed]], account: Account, options: DedupConfig) -> Iterator[Doc]:
    """The second step: documents in order, with what `sign_docs` made of them; the rest as in `dedup`."""
    index = Index(options)
    for docs, signed in chunks:
        for doc, reason in zip(map(Doc._make, docs), index.add(Signed(*signed))):
            account.seen += 1
            if reason:
                account.reject(doc, reason)
                continue
            account.kept += 1
            account.out += 1
            yield doc


STAGE = Stage("dedup", drop, DedupConfig(), "in order", sign_docs)

"""Documents to token bins, and a look into bins and JSON lines.

In:  what the stages give. Out: train.bin and val.bin; lines that explain a file; a check of its hashes.
Does not know where documents come from.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core import bins, files
from core.errors import UserError
from extras.corpus.account import Doc
from extras.corpus.pipeline import Report
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """Which documents are held out for validation.

    Args:
        border: those whose hash is at most this: the choice depends on nothing but a document's text.
        cut: instead the end of every document, where there are too few of them to hold one out.
    """

    border: float
    cut: bool = False


class NothingHeldOut(Exception):
    """One of the two bins would have been empty; `split` is the next thing to try."""

    def __init__(self, split: Split):
        super().__init__()
        self.split = split


@dataclass(frozen=True)
class Tokenize:
    """The documents of a chunk as ids: what a worker process does last."""

    tokenizer: Tokenizer
    split: Split

    def __call__(self, docs: Iterable[Doc]) -> tuple[list[tuple[bool, str, np.ndarray, int, int]], float, int]:
        """[(held out?, file, ids of documents in a row, bytes of their text, how many)], least hash, all documents."""
        parts: dict[tuple[bool, str], list[str]] = {}  # in order: a chunk's documents come file after file
        least, number = 1.0, 0
        for number, (text, where) in enumerate(docs, 1):  # noqa: B007 -- their number is a result
            file, share = where.rpartition(":")[0], share_of(text)
            least = min(least, share)
            if self.split.cut:
                at = len(text) * 95 // 100
                parts.setdefault((False, file), []).append(text[:at])
                parts.setdefault((True, file), []).append(text[at:])
            else:
                parts.setdefault((share <= self.split.border, file), []).append(text)
        rows = []
        for (held_out, file), texts in parts.items():
            found = self.tokenizer.encode_texts([text for text in texts if text], bos=True, eos=True)
            if found.sizes:
                rows.append((held_out, file, found.ids, found.text_bytes, len(found.sizes)))
        return rows, least, number


def share_of(text: str) -> float:
    """A number from 0 to 1 that depends on nothing but the text."""
    return zlib.crc32(text.encode()) / (1 << 32)  # a seventh of sha256's time, and nobody gains by forging it


def write(
    folder: Path, tokenizer: Tokenizer, split: Split, results: Iterator, report: Report, source: str
) -> list[str]:
    """Write train.bin and val.bin, both or none.

    Args:
        folder: of both.
        tokenizer: that made the results.
        split: of `Tokenize`.
        results: of `Tokenize`, in order.
        report: with an account "tokenize".
        source: what the documents are, for people.

    Returns:
        lines on the two bins.

    Raises:
        NothingHeldOut: one of them would be empty; nothing was written.
        UserError: no documents.
    """
    # Each document goes to one of the two. Both files appear together, when the `with` block ends without an error.
    least, account = 1.0, report.accounts["tokenize"]
    with ExitStack() as stack:
        pair = [
            stack.enter_context(
                bins.BinWriter(folder / name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256, source)
            )
            for name in ("train.bin", "val.bin")
        ]
        with tqdm(desc=str(folder), unit="doc", unit_scale=True, disable=None) as bar:
            for rows, smallest, number in results:
                for held_out, file, ids, text_bytes, documents in rows:
                    pair[held_out].add(ids, text_bytes, documents, file)
                least = min(least, smallest)
                account.add(number, number, number, {}, {}, [])  # all that come in are kept
                bar.update(number)

        # Before anything appears: all documents are accounted for, and neither bin is empty.
        report.check("tokenize", source)
        if not (pair[0].tokens and pair[1].tokens):
            if split.cut:
                raise UserError(f"{source}: too little text: none can be held out for validation")
            # At least one document is held out, however few there are; a lone one is cut.
            alone = account.kept == 1 or not pair[0].tokens
            raise NothingHeldOut(Split(least * (1 + 1e-9), alone))
        for bin in pair:
            bin.flush()
    lines = ["too few documents to hold one out: the last 5 % of each are"] if split.cut else []
    return lines + [
        f"{b.path}: {b.documents:,} documents, {b.tokens:,} tokens, {b.text_bytes / b.tokens:.2f} bytes each"
        for b in pair
    ]


# ---------------------------------------------------------------- looking into files


def inspect(path: Path, tokenizer: Tokenizer | None, show: int = 60) -> list[str]:
    """Lines that explain a bin or a JSONL file: counts, first and last tokens as text, lengths, share per source.

    Args:
        path: a .bin (with the .json beside it, or not) or a .jsonl.
        tokenizer: that made the bin; None: ids are shown instead of text.
        show: tokens from either end.

    Raises:
        UserError: no such file, or a damaged one.
    """
    return _inspect_jsonl(path) if path.suffix == ".jsonl" else _inspect_bin(path, tokenizer, show)


def _inspect_bin(path: Path, tokenizer: Tokenizer | None, show: int) -> list[str]:
    about = bins.read_sidecar(path)
    size = about.get("vocab_size") or (tokenizer.vocab_size if tokenizer else 1 << 16)
    bin = bins.TokenBin(path, size, tokenizer.sha256 if tokenizer else "")
    eos_id = about.get("eos_id", tokenizer.eos_id if tokenizer else 2)

    # A bin may be larger than memory: it is read block by block.
    ends, counts, highest = [], 0, 0
    for start in range(0, bin.tokens, bins.BLOCK_BYTES):
        ids = bin.read(start, min(bins.BLOCK_BYTES, bin.tokens - start))
        ends.append(np.flatnonzero(ids == eos_id) + start)
        highest = max(highest, int(ids.max(initial=0)))
        counts = counts + np.bincount(ids, minlength=size)
    ends = np.concatenate([np.zeros(0, np.int64), *ends])
    lengths = np.diff(ends, prepend=-1)
    decode = tokenizer.decode if tokenizer else lambda ids: " ".join(map(str, ids))
    lines = [
        f"{path}: {bin.tokens:,} tokens, {bin.dtype.name}, {len(ends):,} documents",
        *(
            f"  {key} {about[key]}"
            for key in ("source", "vocab_size", "tokenizer_sha256", "text_bytes")
            if key in about
        ),
        f"  {np.count_nonzero(counts):,} of {size:,} ids occur, the highest is {highest:,}",
        f"  first: {decode(bin.read(0, min(show, bin.tokens)).tolist())!r}",
        f"  last:  {decode(bin.read(max(0, bin.tokens - show), min(show, bin.tokens)).tolist())!r}",
        *_histogram(lengths, "tokens"),
    ]
    return lines + _shares(about.get("sources", {}), "tokens")


def _inspect_jsonl(path: Path) -> list[str]:
    keys, lengths, sources = Counter(), [], {}
    first = last = None
    for _, item in files.read_jsonl(path):
        first, last = first or item, item
        keys.update(item.keys())
        size = len(json.dumps(item, ensure_ascii=False)) if "text" not in item else len(str(item["text"]))
        lengths.append(size)
        file = str(item.get("source", "")).rpartition(":")[0]
        found = sources.setdefault(file, {"documents": 0, "characters": 0})
        found["documents"] += 1
        found["characters"] += size
    if first is None:
        return [f"{path}: no documents"]
    return [
        f"{path}: {len(lengths):,} documents",
        "  fields: " + ", ".join(f"{k} ({n:,})" for k, n in keys.most_common()),
        f"  first: {json.dumps(first, ensure_ascii=False)[:300]}",
        f"  last:  {json.dumps(last, ensure_ascii=False)[:300]}",
        *_histogram(np.array(lengths), "characters"),
        *_shares(sources, "characters"),
    ]


def _histogram(lengths: np.ndarray, unit: str) -> list[str]:
    """How many documents have how many tokens, in classes that double."""
    if not len(lengths):
        return []
    classes, counts = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    return [
        f"  up to {1 << c:>9,} {unit}: {n:>9,} {'#' * max(1, round(40 * n / counts.max()))}"
        for c, n in zip(classes.tolist(), counts.tolist())
    ]


def _shares(sources: dict, unit: str) -> list[str]:
    total = sum(s[unit] for s in sources.values())
    return [
        f"  {s[unit] / max(1, total):>6.1%} {name or '?'}: {s['documents']:,} documents, {s[unit]:,} {unit}"
        for name, s in sorted(sources.items(), key=lambda pair: -pair[1][unit])
    ]


def verify(path: Path) -> str:
    """Compare a bin with the block hashes beside it; a line that says it is whole.

    Raises:
        UserError: no sidecar, another size, or damaged blocks, each named with its bytes.
    """
    about = bins.read_sidecar(path)
    if not about:
        raise UserError(f"{path}: no {path.with_suffix('.json').name} beside it to compare it with")
    bin = bins.TokenBin(path, about["vocab_size"])
    blocks = bin.verify()
    return f"{path}: whole, {bin.tokens:,} tokens in {blocks} blocks"

"""Bits per byte: how well a model predicts a text, in a unit that can be compared between vocabularies.

In:  a generator (a model with its tokenizer: assembly/inference.py); a UTF-8 text, a JSONL file with "text" in its
     lines, or a token bin. Out: a report.
Knows nothing of training, though a bin gives the number that training calls bits/byte.

The model reads at most its context in one piece: a text is cut into windows of that length. Each begins with the last
token of the one before, so every token is predicted once and the first of a window sees one token only.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from core import bins, files
from core.data import BinRows
from core.errors import UserError
from core.generate import require_finite
from extras.evaluation import likelihood
from extras.evaluation.report import Progress, Report

PART_TOKENS = 1 << 16  # the journal gets a line after so many: some seconds of a small model on a CPU


@dataclass
class Counts:
    """What was read."""

    documents: int = 0
    empty: int = 0
    changed: int = 0  # documents that the tokenizer does not give back as they were
    bytes: float = 0
    tokens: int = 0  # those predicted
    seen: int = 0  # ids in front of them in their windows, all together


def run(generator, cfg, sampling, progress: Progress) -> Report:
    """Bits per byte and perplexity of `cfg.data`; nothing is drawn, so `sampling` is not used."""
    measure = measure_bin if cfg.data.endswith(".bin") else measure_text
    return measure(generator, cfg, progress)


def measure_text(generator, cfg, progress: Progress) -> Report:
    """Each document by itself: bos, then its ids; the end of a document is not predicted."""
    # Windows of many documents make a part; a finished part is a line of the journal.
    counts, nats, number, part, size = Counts(), 0.0, 0, [], 0

    def measure(windows: list[likelihood.Request]) -> float:
        return likelihood.sum_nats(generator.model, windows, cfg.batch)

    for window in cut_documents(generator, cfg, counts):
        part.append(window)
        size += len(window.continuation)
        if size >= PART_TOKENS:
            nats += measure_once(progress, number, measure, part)
            number, part, size = number + 1, [], 0
    nats += measure_once(progress, number, measure, part) if part else 0.0

    # What a reader must know of the number.
    seen = counts.seen / max(1, counts.tokens)
    notes = [
        f"Windows of {generator.context:,} tokens, one behind the other: a token saw {seen:.1f} others on average; "
        "a document's end is not predicted."
    ]
    if counts.empty:
        notes.append(f"{counts.empty:,} documents without text were passed over.")
    if counts.changed:
        notes.append(
            f"{counts.changed:,} of {counts.documents:,} documents do not come back from the tokenizer as they"
            " were: what it cannot write costs no bits here, so the number is too low."
        )
    return make_report(cfg, counts, nats, notes)


def cut_documents(generator, cfg, counts: Counts) -> Iterator[likelihood.Request]:
    """Windows of all documents, which are counted on the way."""
    for text in read_texts(Path(cfg.data)):
        if cfg.limit and counts.documents == cfg.limit:
            return
        ids = generator.tokenizer.encode(text, bos=True)
        counts.documents += 1
        if len(ids) < 2:
            counts.empty += 1
            continue
        counts.bytes += len(text.encode())
        counts.changed += generator.tokenizer.decode(ids) != text
        for window in likelihood.cut_windows(ids, generator.context):
            before, predicted = len(window.context), len(window.continuation)
            counts.tokens += predicted
            counts.seen += predicted * before + predicted * (predicted - 1) // 2
            yield window


def read_texts(path: Path) -> Iterator[str]:
    """Documents of a file: "text" of each line of a .jsonl, or the whole of any other."""
    if path.suffix == ".jsonl":
        for where, item in files.read_jsonl(path):
            if not isinstance(item.get("text"), str):
                raise UserError(f"{where}: no text under the key text", f"keys here: {', '.join(item)}")
            yield item["text"]
        return
    try:
        yield path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}", "a text, a .jsonl, or a .bin") from None


@torch.inference_mode()
def measure_bin(generator, cfg, progress: Progress) -> Report:
    """Rows as in training: attention stays within a document, and its first token is not predicted from another one."""
    # The rows of training's validation, at most cfg.limit of them.
    model, tokenizer = generator.model, generator.tokenizer
    bin = bins.TokenBin(cfg.data, model.config.vocab_size, tokenizer.sha256)
    eos_id = tokenizer.eos_id if bin.eos_id is None else bin.eos_id
    rows = BinRows(bin, generator.context, docs=True, eos_id=eos_id, tail=True)
    number = min(len(rows), cfg.limit or len(rows))
    device, total, tokens = model.model.embed_tokens.weight.device, 0.0, 0

    def measure(begin: int, end: int) -> list:
        nats, targets = 0.0, 0
        for start in range(begin, end, cfg.batch):
            batch = rows.batch(range(start, min(start + cfg.batch, end))).to(device)
            nats += require_finite(model(batch.ids, batch.targets, batch.docs).sum()).item()
            targets += int(batch.count)
        return [nats, targets]

    # A finished part is a line of the journal.
    per_part = max(1, PART_TOKENS // generator.context)
    for begin in range(0, number, per_part):
        end = min(begin + per_part, number)
        nats, targets = measure_once(progress, begin // per_part, measure, begin, end)
        total, tokens = total + nats, tokens + targets

    # What a reader must know of the number.
    documents = bins.read_sidecar(cfg.data).get("documents", 0) if number == len(rows) else 0
    counts = Counts(documents, bytes=rows.text_bytes(number), tokens=tokens)
    notes = [
        f"Rows of {generator.context:,} tokens, one behind the other; a document's end is predicted, its first token"
        " is not, as in training's validation."
    ]
    if number < len(rows):
        notes.append(f"The first {number:,} of {len(rows):,} rows; a token is taken to have as many bytes as the mean.")
    if not bin.text_bytes:
        notes.append("The bin has no .json that says how many bytes its text has: no bits per byte.")
    return make_report(cfg, counts, total, notes)


def measure_once(progress: Progress, number: int, measure: Callable, *part):
    """What `measure` says of a part, from the journal or measured now."""
    if str(number) not in progress.done:
        began, value = time.perf_counter(), measure(*part)
        progress.add(str(number), value)
        progress.tell(f"part {number + 1}: {time.perf_counter() - began:.1f} s")
    return progress.done[str(number)]


def make_report(cfg, counts: Counts, nats: float, notes: list[str]) -> Report:
    """The scores of so many nats."""
    if not counts.tokens:
        raise UserError(f"{cfg.data}: no text in it")
    # First the scores that the first note tells, then what they were made of.
    per_token = nats / counts.tokens
    scores = {"bits_per_byte": nats / math.log(2) / counts.bytes} if counts.bytes else {}
    scores |= {"nats_per_token": per_token}
    if per_token < 700:  # above, a float has no room for it
        scores |= {"perplexity_per_token": math.exp(per_token)}
    first = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items()) + "."
    scores |= {"nats": nats, "tokens": counts.tokens}
    if counts.bytes:
        scores |= {"bytes": round(counts.bytes), "bytes_per_token": counts.bytes / counts.tokens}
    scores |= {"documents": counts.documents} if counts.documents else {}
    scores |= {"documents_changed": counts.changed} if counts.changed else {}
    return Report(f"Bits per byte of {Path(cfg.data).name}", scores=scores, notes=[first, *notes])

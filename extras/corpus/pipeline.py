"""Stages one after another, in several processes, in the order of the input.

In:  blocks of the readers, stages. Out: what `finish` makes of the documents, chunk by chunk, and the accounts.
Does not know what the stages do. Per-document stages run in worker processes, next to each other in one; a stage that
must see all documents in order runs in this process between them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

from core import files
from core.errors import UserError
from extras.corpus import Account, Doc, Reject
from extras.corpus.readers import ReadConfig, parse
from tokenizer.parallel import map_in_order

CHUNK_CHARS = 1 << 19  # of documents that travel to a worker together
NO_TEXT_LIMIT = 1000  # so many records without one document: the options are wrong, not the records


class Stage(NamedTuple):
    """A step of the chain.

    Args:
        name: for the account.
        run: (docs, account, options) -> docs.
        options: its section of the options.
        in_order: it must see all documents in their order, in one process.
    """

    name: str
    run: Callable[[Iterable[Doc], Account, object], Iterator[Doc]]
    options: object = None
    in_order: bool = False


@dataclass(frozen=True)
class _Work:
    """What a worker process does with each chunk."""

    read: ReadConfig | None  # chunks are blocks, to be parsed first
    items: bool
    stages: tuple[Stage, ...]
    finish: Callable | None
    keep_texts: bool


def run(
    blocks: Iterable,
    read: ReadConfig,
    stages: list[Stage],
    books: "Books",
    finish: Callable[[Iterable[Doc]], object] = list,
    processes: int = 1,
    items: bool = False,
) -> Iterator:
    """Run the chain.

    Args:
        blocks: of `readers.blocks`.
        read: how to parse them.
        stages: in order.
        books: filled as results are consumed.
        finish: docs of one chunk -> result, in a worker; it must read all of them.
        processes: workers for each run of per-document stages.
        items: as in `readers.parse`.

    Returns:
        an iterator of `finish`'s results, in the order of the input.

    Raises:
        UserError: many records, and not one of them gives a document.
    """
    groups = [(in_order, tuple(group)) for in_order, group in groupby(stages, lambda stage: stage.in_order)]
    if not groups or groups[0][0]:
        groups.insert(0, (False, ()))  # parsing happens in workers
    if groups[-1][0]:
        groups.append((False, ()))  # and so does finishing
    chunks: Iterable = blocks
    for number, (in_order, group) in enumerate(groups):
        if in_order:
            docs = chain.from_iterable(chunks)
            for stage in group:
                docs = stage.run(docs, books.accounts[stage.name], stage.options)
            chunks = _chunked(docs)
        else:
            last = number == len(groups) - 1
            work = _Work(read if number == 0 else None, items, group, finish if last else None, books.keep_texts)
            chunks = _merged(map_in_order(_do, work, chunks, processes), books)
    yield from chunks


def _do(work: _Work, chunk) -> tuple[object, list[Account]]:
    accounts = [Account("read", work.keep_texts)] if work.read else []
    docs = parse(chunk, work.read, accounts[0], work.items) if work.read else chunk
    for stage in work.stages:
        accounts.append(Account(stage.name, work.keep_texts))
        docs = stage.run(docs, accounts[-1], stage.options)
    return (work.finish or list)(docs), accounts


def _merged(results: Iterator, books: "Books") -> Iterator:
    for result, found in results:
        for account in found:
            books.accounts[account.stage].add(account)
        books.write_rejects()
        read = books.accounts["read"]
        if not read.kept and read.seen >= NO_TEXT_LIMIT:
            raise UserError(f"none of the first {read.seen:,} records gives a document: {books.main_reason('read')}")
        yield result


def _chunked(docs: Iterable[Doc]) -> Iterator[list[Doc]]:
    chunk, chars = [], 0
    for doc in docs:
        chunk.append(doc)
        chars += len(doc.text) + 64
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


class Books:
    """The accounts of a run, and its rejects.jsonl, written as it goes on.

    Args:
        folder: for accounting.json and rejects.jsonl.
        stages: names, "read" first.
        keep_texts: also write what the rejected documents say.
    """

    def __init__(self, folder, stages: Iterable[str], keep_texts: bool = False):
        self.folder, self.keep_texts = folder, keep_texts
        self.accounts = {name: Account(name, keep_texts) for name in stages}
        self.first: dict[tuple[str, str], str] = {}  # (stage, reason) -> where it stands first
        folder.mkdir(parents=True, exist_ok=True)
        files.clear_leftovers(folder)
        self._temporary = folder / f".tmp-{os.getpid()}-rejects.jsonl"
        self._file = open(self._temporary, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 -- closed by __exit__

    def write_rejects(self) -> None:
        """Write the rejects down that came since the last call: they are not kept in memory."""
        for account in self.accounts.values():
            for reject in account.take_rejects():
                self.first.setdefault((reject.stage, reject.reason), reject.where)
                self._file.write(_line(reject))

    def main_reason(self, stage: str) -> str:
        """The most frequent reason for a stage's rejects, and where it stands first."""
        rejected = self.accounts[stage].rejected
        if not rejected:
            return "nothing came in"
        reason, count = rejected.most_common(1)[0]
        return f"{count:,} times: {reason} (first: {self.first[stage, reason]})"

    def check(self, last: str, source: str) -> None:
        """To be called before anything is published, when all documents have passed.

        Args:
            last: the last stage.
            source: of the documents, for people.

        Raises:
            UserError: no document came out of the last stage; it names the stage that let none through.
            AssertionError: documents are neither kept nor rejected.
        """
        for a in self.accounts.values():
            assert not a.missing, f"{a.stage}: {a.missing} documents are neither kept nor rejected"
        if not self.accounts[last].kept:
            self.write_rejects()
            stage = next(a.stage for a in self.accounts.values() if not a.kept)
            raise UserError(f"{source}: no documents: {stage}: {self.main_reason(stage)}")

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Put both files in their places, or leave those of an earlier run where this one failed."""
        try:
            if error is None:
                self.write_rejects()
                self._file.close()
                os.replace(self._temporary, self.folder / "rejects.jsonl")
                files.write_json(self.folder / "accounting.json", [a.as_dict() for a in self.accounts.values()])
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """The accounts for people."""
        lines = []
        for account in self.accounts.values():
            lines.append(f"{account.stage}: {account.seen:,} in, {account.kept:,} kept"
                         + f" (as {account.out:,})" * (account.out != account.kept))  # fmt: skip
            for reason, count in account.rejected.most_common():
                lines.append(f"  {count:,} rejected: {reason} (first: {self.first[account.stage, reason]})")
            lines += [f"  {count:,} changed: {rule}" for rule, count in account.changed.most_common()]
        return lines


def _line(reject: Reject) -> str:
    about = {"stage": reject.stage, "where": reject.where, "reason": reject.reason}
    if reject.text:
        about["text"] = reject.text
    return json.dumps(about, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"

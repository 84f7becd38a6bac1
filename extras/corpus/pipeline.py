"""Stages one after another, in several processes, in the order of the input.

In:  blocks of the readers, stages. Out: what `finish` makes of the documents, chunk by chunk, and the run's report.
Stages that look at one document at a time run in worker processes, neighbours among them in the same process. A stage
that must see all documents in order runs in the main process, between them.
Does not know what the stages do.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from core import files
from core.errors import UserError
from extras.corpus.account import Account, Doc, Reject, Stage
from extras.corpus.journal import Records
from extras.corpus.readers import ReadConfig, parse
from tokenizer.parallel import map_in_order

CHUNK_CHARS = 1 << 19  # of documents that travel to a worker together
NO_TEXT_LIMIT = 1000  # so many records without one document: the options are wrong, not the records


@dataclass(frozen=True)
class _Work:
    """What a worker process does with each chunk."""

    read: ReadConfig | None  # chunks are blocks, to be parsed first
    items: bool
    stages: list[Stage]
    prepares_for: Stage | None
    finish: Callable | None
    keep_texts: bool


def run(
    blocks: Iterable,
    read: ReadConfig,
    stages: list[Stage],
    report: "Report",
    finish: Callable[[Iterable[Doc]], object] = list,
    processes: int = 1,
    records: Callable[[int], Records] | None = None,
) -> Iterator:
    """Run the chain.

    Args:
        blocks: of `readers.blocks`.
        read: how to parse them.
        stages: in order.
        report: filled as results are consumed.
        finish: docs of one chunk -> result, in a worker; it must read all of them.
        processes: workers for each run of per-document stages.
        records: number of a run of per-document stages -> where its results are kept; those there are not made again.

    Returns:
        an iterator of `finish`'s results (plain data, where there are records), in the order of the input.

    Raises:
        UserError: many records, and not one of them gives a document.
    """
    chunks: Iterable = blocks
    groups = _groups(stages)
    items = any(stage.items for stage in stages[:1])
    for number, (where, group) in enumerate(groups):
        if where == "in order":
            docs = chunks if group[0].prepare else map(Doc._make, chain.from_iterable(chunks))
            for stage in group:
                docs = stage.run(docs, report.accounts[stage.name], stage.options)
            chunks = _chunked(docs)
        else:
            # The last run of workers also does what comes behind all stages, and one in front of a stage in order
            # prepares the documents for it.
            last = number + 1 == len(groups)
            behind = None if last else next((stage for stage in groups[number + 1][1] if stage.prepare), None)
            work = _Work(None if number else read, items, group, behind, finish if last else None, report.keep_texts)
            workers = processes if where == "workers" else 1
            chunks = _merged(_results(work, chunks, workers, records and records(number)), report)
    yield from chunks


def _groups(stages: list[Stage]) -> list[tuple[str, list[Stage]]]:
    """Neighbours that run in the same place, with workers in front (to parse), behind (to finish), and to prepare."""
    groups: list[tuple[str, list[Stage]]] = [("workers", [])]
    for stage in stages:
        if stage.prepare and groups[-1][0] != "workers":
            groups.append(("workers", []))
        if stage.where != groups[-1][0]:
            groups.append((stage.where, []))
        groups[-1][1].append(stage)
    return groups if groups[-1][0] == "workers" else [*groups, ("workers", [])]


def _do(work: _Work, chunk) -> tuple[object, list[tuple]]:
    accounts = [Account("read", work.keep_texts)] if work.read else []
    docs = parse(chunk, work.read, accounts[0], work.items) if work.read else map(Doc._make, chunk)
    for stage in work.stages:
        accounts.append(Account(stage.name, work.keep_texts))
        docs = stage.run(docs, accounts[-1], stage.options)
    result = (work.finish or list)(docs)
    if work.prepares_for:
        result = result, work.prepares_for.prepare(work.prepares_for.options, result)
    return result, [(account.stage, account.entries()) for account in accounts]


def _results(work: _Work, chunks: Iterable, processes: int, records: Records | None) -> Iterator:
    """What `_do` makes of each chunk, or has made of it in an earlier run."""
    chunks, there = iter(chunks), 0
    for result in records or ():
        next(chunks)
        there += 1
        yield result
    if there:
        print(f"the first {there:,} chunks of this work are those of an earlier run", flush=True)
    for result in map_in_order(_do, work, chunks, processes):
        if records:
            records.append(result)
        yield result


def _merged(results: Iterator, report: "Report") -> Iterator:
    """The results; their accounts go into the report."""
    for result, found in results:
        for stage, entries in found:
            report.accounts[stage].add(*entries)
        report.write_rejects()
        read = report.accounts["read"]
        if not read.kept and read.seen >= NO_TEXT_LIMIT:
            raise UserError(f"none of the first {read.seen:,} records gives a document: {report.main_reason('read')}")
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


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder: `.tmp-PID-...` of processes that are gone."""
    for path in Path(folder).glob(".tmp-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # there a signal would end the process that is asked after
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


class Report:
    """The accounts of a run, one for each stage, and its rejects.jsonl, written as it goes on.

    Args:
        folder: for accounting.json and rejects.jsonl.
        stages: names, "read" first.
        keep_texts: also write what the rejected documents say.
    """

    def __init__(self, folder, stages: Iterable[str], keep_texts: bool = False):
        self.folder, self.keep_texts = folder, keep_texts
        self.accounts = {name: Account(name, keep_texts) for name in stages}
        self.first: dict[tuple[str, str], str] = {}  # (stage, reason) -> where it was met first
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        self._temporary = folder / f".tmp-{os.getpid()}-rejects.jsonl"
        self._file = open(self._temporary, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 -- closed by __exit__

    def write_rejects(self) -> None:
        """Write down the rejects that came since the last call: they are not kept in memory."""
        for account in self.accounts.values():
            for reject in account.take_rejects():
                self.first.setdefault((reject.stage, reject.reason), reject.where)
                self._file.write(_line(reject))

    def main_reason(self, stage: str) -> str:
        """The most frequent reason for a stage's rejects, and where it was met first."""
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

    def __enter__(self) -> "Report":
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
            lines.append(
                f"{account.stage}: {account.seen:,} in, {account.kept:,} kept"
                + f" (as {account.out:,})" * (account.out != account.kept)
            )
            for reason, count in account.rejected.most_common():
                lines.append(f"  {count:,} rejected: {reason} (first: {self.first[account.stage, reason]})")
            lines += [f"  {count:,} changed: {rule}" for rule, count in account.changed.most_common()]
        return lines


def _line(reject: Reject) -> str:
    about = {"stage": reject.stage, "where": reject.where, "reason": reject.reason}
    if reject.text:
        about["text"] = reject.text
    return json.dumps(about, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"

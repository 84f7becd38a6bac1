"""What stages take, give and write down: documents, rejects, accounts.

In:  documents, one after another. Out: documents, and an account of every one of them.
A stage is a function `stage(docs, account, options) -> docs` from a stream to a stream, in a file of its own. It yields
a document (once, several times, changed or not) or rejects it by name. `Account` counts both, and a run whose totals do
not add up is a bug, said and ended with code 1.
Does not know what a stage does, nor where documents come from.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Doc(NamedTuple):
    """One document.

    text: what it says; of a chat file the JSON line.
    where: "FILE:LINE" where it begins in the input.
    """

    text: str
    where: str


class Reject(NamedTuple):
    """A document that a stage left out."""

    stage: str
    where: str
    reason: str  # a few words, the same for the same cause: they are counted
    text: str = ""  # the document, where rejected texts are to be kept


class Account:
    """What one stage did with its documents: everything that came in is kept or rejected.

    Attributes:
        stage: its name.
        seen: documents in.
        kept: documents of which something came out.
        out: documents out (more than kept where one is cut into several, fewer where several are joined).
        rejected: reason -> documents.
        changed: rule -> documents that it changed.
        rejects: not yet written down, see `take_rejects`.
    """

    def __init__(self, stage: str, keep_texts: bool = False):
        self.stage, self.keep_texts = stage, keep_texts
        self.seen = self.kept = self.out = 0
        self.rejected: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.rejects: list[Reject] = []

    def reject(self, doc: Doc, reason: str) -> None:
        """Leave a document out and say why; call it instead of yielding anything for it."""
        self.rejected[reason] += 1
        self.rejects.append(Reject(self.stage, doc.where, reason, doc.text if self.keep_texts else ""))

    def note(self, doc: Doc, what: str, text: str) -> None:
        """Write down what was taken out of a document that stays, where texts are kept; it is no reject."""
        if self.keep_texts:
            self.rejects.append(Reject(self.stage, doc.where, what, text))

    def take_rejects(self) -> list[Reject]:
        """The rejects since the last call, to be written down."""
        taken, self.rejects = self.rejects, []
        return taken

    def entries(self) -> tuple:
        """All of it as plain data, for `add` in another process."""
        return self.seen, self.kept, self.out, self.rejected, self.changed, self.rejects

    def add(self, seen: int, kept: int, out: int, rejected: dict, changed: dict, rejects: list) -> None:
        """Take over the `entries` of the same stage from another process or block."""
        self.seen += seen
        self.kept += kept
        self.out += out
        self.rejected.update(rejected)
        self.changed.update(changed)
        self.rejects += [Reject(*reject) for reject in rejects]

    @property
    def missing(self) -> int:
        """Documents that are neither kept nor rejected: not 0 is a bug."""
        return self.seen - self.kept - sum(self.rejected.values())

    def as_dict(self) -> dict:
        """Plain data for a report."""
        # In an order that does not depend on which process was first.
        counts = (self.rejected, self.changed)
        rejected, changed = (dict(sorted(c.items(), key=lambda pair: (-pair[1], pair[0]))) for c in counts)
        return {
            "stage": self.stage,
            "in": self.seen,
            "kept": self.kept,
            "out": self.out,
            "rejected": rejected,
            "changed": changed,
        }


def each(docs: Iterable[Doc], account: Account, work) -> Iterator[Doc]:
    """A stage out of a function on one document.

    Args:
        docs: the stream.
        account: of the stage.
        work: Doc -> iterable of Doc; to leave a document out it calls `account.reject` and gives nothing.
    """
    for doc in docs:
        account.seen += 1
        some = False
        for result in work(doc):
            some = True
            account.out += 1
            yield result
        account.kept += some


class Stage(NamedTuple):
    """A step of the chain, as the file of a stage declares it.

    Args:
        name: for the account.
        run: (docs, account, options) -> docs.
        options: its section of the options, here with the defaults.
        where: "workers"; "here": chunk after chunk in this process; "in order": all documents as one stream in it.
        prepare: (options, docs of a chunk) -> what the stage needs to know of them, made by workers. A stage in order
            that has it gets chunks (docs, what was made of them) instead of docs.
        items: it knows the fields of items: as the first stage it gets an item's JSON, not the text in it.
    """

    name: str
    run: Callable[[Iterable[Doc], Account, object], Iterator[Doc]]
    options: object
    where: str = "workers"
    prepare: Callable[[object, list[Doc]], object] | None = None
    items: bool = False

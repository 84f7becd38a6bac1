"""Long texts into overlapping windows, short texts joined.

In:  documents. Out: documents of about the length that a model reads at once; every character of the input is in them.
Does not know tokens: lengths are in characters, so that the same text gives the same windows for every vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from core.config import Range, Section
from extras.corpus.account import Account, Doc, Stage, each


@dataclass(frozen=True)
class WindowConfig(Section):
    window_chars: int = 1100  # longer documents are cut into windows of so many characters, about 1,024 tokens
    window_step: int = 950  # characters from one window's begin to the next: what one window cuts is whole in another

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.window_step <= self.window_chars:
            raise ValueError("window_step must be positive and at most window_chars, or characters would be lost")


def window(docs: Iterable[Doc], account: Account, cfg: WindowConfig) -> Iterator[Doc]:
    """The stage; short documents pass as they are."""
    return each(
        docs,
        account,
        lambda doc: (Doc(text, doc.where) for text in windows(doc.text, cfg.window_chars, cfg.window_step)),
    )


def windows(text: str, size: int, step: int) -> Iterator[str]:
    """Pieces of `size` characters, each `step` after the last; the last one ends where the text ends, none is empty."""
    for start in range(0, max(1, len(text) - size + step), step):
        yield text[start : start + size]


@dataclass(frozen=True)
class ConcatConfig(Section):
    # Short documents are joined into texts of at most so many characters.
    concat_chars: Annotated[int, Range(least=1)] = 1024
    concat_by: str = "\n"  # what is put between them


def concat(docs: Iterable[Doc], account: Account, cfg: ConcatConfig) -> Iterator[Doc]:
    """The stage, in order: neighbours are joined; a document that is longer by itself stays alone."""
    joined: Doc | None = None
    for doc in docs:
        account.seen, account.kept = account.seen + 1, account.kept + 1
        if joined and len(joined.text) + len(cfg.concat_by) + len(doc.text) <= cfg.concat_chars:
            joined = Doc(joined.text + cfg.concat_by + doc.text, joined.where)
            continue
        if joined:
            account.out += 1
            yield joined
        joined = doc
    if joined:
        account.out += 1
        yield joined


WINDOW = Stage("window", window, WindowConfig())
CONCAT = Stage("concat", concat, ConcatConfig(), "in order")

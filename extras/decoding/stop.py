"""A text that ends before the first of its stop strings.

In:  text piece by piece, as a decoder gives it. Out: the text up to the stop string that is whole first.
Does not know ids or models.
"""

from collections.abc import Iterable, Iterator, Sequence


class UntilStop:
    """Text in piece by piece, out up to the stop string that is whole first; no character of one ever comes out.

    Args:
        stops: strings, none empty.

    Attributes:
        stopped: one of them has come; nothing comes out any more.
    """

    def __init__(self, stops: Iterable[str]):
        self.stops, self.stopped, self._held = tuple(stops), False, ""

    def push(self, piece: str) -> str:
        """The text that is certain to stand before any stop string."""
        self._held += "" if self.stopped else piece
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        self.stopped = self.stopped or bool(found)
        certain = min(found)[1] if found else len(self._held)
        if not found:  # what may be the beginning of one is held back
            starts = [n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
            certain -= max(starts, default=0)
        out, self._held = self._held[:certain], "" if found else self._held[certain:]
        return out

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        out, self._held = self._held, ""
        return out


def cut_at_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to the stop string that is whole first; no more of them are asked for then."""
    until = UntilStop(stops)
    for piece in pieces:
        yield until.push(piece)
        if until.stopped:
            return
    yield until.flush()

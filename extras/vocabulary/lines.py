"""The lines of text files, for all that is made of or measured on plain texts."""

from collections.abc import Iterable, Iterator

from tokenizer import TokenizerError


def read_lines(paths: Iterable[str]) -> Iterator[str]:
    """The lines of UTF-8 text files, line ends included; TokenizerError where one is not UTF-8."""
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                yield from file
        except UnicodeDecodeError as e:
            raise TokenizerError(f"{path}: not UTF-8: {e.reason} at byte {e.start} -- convert it first") from None

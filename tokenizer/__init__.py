"""Text to ids and back.

In:  a folder or file with a sentencepiece `.model` or a `tokenizer.json`. Out: a `Tokenizer`.
Use: `tok = load("out/pretrain"); tok.decode(tok.encode("话说天下大势")) == "话说天下大势"`.
Does not know models or tensors, and never imports torch. The parts:

    sentencepiece_model.py   the fields of a `.model` file
    backends.py              the two kinds of vocabulary file
    huggingface.py           the files that transformers reads
    chat.py                  messages -> ids and loss mask
    train.py                 texts -> a new vocabulary
"""

import codecs
import functools
import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from . import chat, huggingface
from .backends import SentencePieceBackend, TokenizerJsonBackend
from .sentencepiece_model import TokenizerError

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError", "load"]

# Texts travel to the worker processes in chunks of about this many characters: large enough that starting a task
# costs nothing, small enough that the chunks under way stay far below the memory of a token bin's writer.
CHUNK_CHARS = 1 << 18


def load(path) -> "Tokenizer":
    """Load a tokenizer.

    Args:
        path: a folder with `tokenizer.model` (preferred) or `tokenizer.json`, or such a file.

    Returns:
        the tokenizer.

    Raises:
        TokenizerError: nothing there, an unusable file, or a tokenizer.json without the package tokenizers.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{path}: no tokenizer.model or tokenizer.json in this folder -- is it a run folder?")
        path = found[0]
    return Tokenizer(TokenizerJsonBackend(path) if path.suffix == ".json" else SentencePieceBackend(path))


class Tokenizer:
    """One vocabulary. Get one from `load`.

    Attributes:
        path: the file it came from.
        sha256: of that file.
        vocab_size: every id is below it.
        bos_id, eos_id: begin and end of a document.
        pad_id: or None.
        special_ids: the control pieces, text -> id. Text never encodes to these.
        dtype: the smallest numpy dtype for its ids, uint16 or uint32.
    """

    def __init__(self, backend):
        self._backend = backend
        self.path: Path = backend.path
        self.sha256: str = backend.sha256
        self.vocab_size: int = len(backend.pieces)
        self.bos_id: int = backend.bos_id
        self.eos_id: int = backend.eos_id
        self.pad_id: int | None = backend.pad_id
        self.special_ids: dict[str, int] = backend.special_ids
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    def encode(self, text: str, bos: bool = False, eos: bool = False, continues: bool = False) -> list[int]:
        """Encode a text; what looks like a special token in it is plain text.

        With byte fallback and the identity normaliser `decode(encode(text)) == text` for every text.

        Args:
            text: any text without lone surrogates.
            bos: put bos_id in front.
            eos: put eos_id behind.
            continues: the text follows other text, so no dummy prefix (a space some vocabularies put in front).

        Returns:
            ids in [0, vocab_size).

        Raises:
            TokenizerError: not a text, or a lone surrogate in it.
        """
        _check_text(text)
        return [self.bos_id] * bos + self._backend.encode(text, continues) + [self.eos_id] * eos

    def encode_batch(
        self,
        texts: Iterable[str],
        processes: int = 1,
        bos: bool = False,
        eos: bool = False,
        start_method: str | None = None,
    ) -> Iterator[np.ndarray]:
        """Encode many texts in order, holding only a few chunks of them in memory.

        Args:
            texts: any iterable, read as the results are consumed.
            processes: 1 for none but this one; more start that many workers, each with its own copy of the vocabulary.
            bos, eos: as in `encode`.
            start_method: "fork", "spawn" or "forkserver"; None takes the platform's default.

        Returns:
            an iterator of id arrays, one a text, each (number of ids,) of `self.dtype`.

        Raises:
            TokenizerError: as `encode`.
        """
        if processes <= 1:
            for chunk in _chunks(texts):
                yield from _split(*self._encode_chunk(chunk, bos, eos))
            return
        with multiprocessing.get_context(start_method).Pool(processes) as pool:
            # Pool.imap would read all of `texts` at once; this window keeps the workers busy and the memory small.
            waiting = deque()
            for chunk in _chunks(texts):
                waiting.append(pool.apply_async(_work, (str(self.path), self.sha256, chunk, bos, eos)))
                if len(waiting) > 2 * processes:
                    yield from _split(*waiting.popleft().get())
            while waiting:
                yield from _split(*waiting.popleft().get())

    def _encode_chunk(self, texts: list[str], bos: bool, eos: bool) -> tuple[np.ndarray, list[int]]:
        """All ids of the texts in a row, and how many each text has: two objects to send instead of thousands."""
        head, tail = [self.bos_id] * bos, [self.eos_id] * eos
        rows = self._backend.encode_many(texts)
        if bos or eos:
            rows = [head + row + tail for row in rows]
        sizes = [len(row) for row in rows]
        # np.fromiter refuses an id that does not fit the dtype, where .astype would wrap it silently.
        return np.fromiter(itertools.chain.from_iterable(rows), self.dtype, sum(sizes)), sizes

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decode ids to text. Ids that are not valid UTF-8 together give U+FFFD.

        Args:
            ids: any ids in [0, vocab_size).
            skip_special: leave control pieces out; else write their text.

        Returns:
            the text.

        Raises:
            TokenizerError: an id out of range.
        """
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, skip_special: bool = True) -> "StreamDecoder":
        """A decoder that takes ids one by one; `skip_special` as in `decode`."""
        table = self._backend.id_bytes
        if not skip_special:
            table = list(table)
            for text, i in self.special_ids.items():
                table[i] = text.encode()
        return StreamDecoder(table, self._backend.strips_space)

    def id_to_piece(self, id: int) -> str:
        """The vocabulary entry of an id as the file writes it (`▁` for a space in sentencepiece models)."""
        _check_id(id, self.vocab_size)
        return self._backend.pieces[id]

    def save(self, folder, chat_format: str | None = None) -> None:
        """Write the files that make a folder a Hugging Face tokenizer, and that `load` reads.

        `tokenizer.model` (or `tokenizer.json` alone, if that is what this tokenizer came from), `tokenizer.json`,
        `tokenizer_config.json`, `special_tokens_map.json`. transformers then gives the same ids for every text that
        has no literal special token in it. A sentencepiece model that tokenizer.json cannot express exactly is saved
        without one, with a warning that says why.

        Args:
            folder: made if it is missing.
            chat_format: a name from `chat.FORMATS`; its template is written for `apply_chat_template`.

        Raises:
            TokenizerError: unknown format, or one this vocabulary cannot write.
        """
        template = None
        if chat_format is not None:
            chat.special_ids(self, chat_format)  # refuses what could not be rendered
            template = chat.template(chat_format)
        huggingface.save(self._backend, Path(folder), template)


class StreamDecoder:
    """Ids in one by one, text out as soon as it is whole: never half a character.

    The pieces of text in order are exactly `decode` of all the ids. Get one from `Tokenizer.stream`.
    """

    def __init__(self, id_bytes: list[bytes], strips_space: bool):
        self._id_bytes = id_bytes
        self._strip = strips_space  # still to be dropped: the space that encoding puts in front of a text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that became certain with this id; TokenizerError if it is out of range."""
        _check_id(id, len(self._id_bytes))
        data = self._id_bytes[id]
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest at the end of the ids: U+FFFD for a character that never became whole, else nothing."""
        return self._utf8.decode(b"", True)


def _check_id(id: int, vocab_size: int) -> None:
    if not 0 <= id < vocab_size:
        raise TokenizerError(f"id {id} is out of range: this vocabulary has ids 0 to {vocab_size - 1}")


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"the text has a lone surrogate U+{ord(text[e.start]):04X} at character {e.start} -- "
            "read the file as UTF-8, without errors='surrogateescape'"
        ) from None


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, chars = [], 0
    for text in texts:
        _check_text(text)
        chunk.append(text)
        chars += len(text) + 64  # so that a million empty texts are not one chunk
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _split(ids: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    at = 0
    for size in sizes:
        yield ids[at : at + size]
        at += size


@functools.lru_cache(maxsize=1)
def _loaded(path: str) -> Tokenizer:
    return load(path)


def _work(path: str, sha256: str, texts: list[str], bos: bool, eos: bool) -> tuple[np.ndarray, list[int]]:
    """One chunk in a worker process, which loads the vocabulary with its first chunk."""
    tokenizer = _loaded(path)
    if tokenizer.sha256 != sha256:
        raise TokenizerError(f"{path}: the file changed while texts were being encoded -- start again")
    return tokenizer._encode_chunk(texts, bos, eos)

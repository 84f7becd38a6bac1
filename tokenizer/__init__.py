"""Text to ids and back.

In:  a folder or file with a sentencepiece `.model` or a `tokenizer.json`. Out: a `Tokenizer`.
Use: `tokenizer = load("out/pretrain"); tokenizer.decode(tokenizer.encode("话说天下大势")) == "话说天下大势"`.
Does not know models or tensors, and never imports torch. The parts:

    sentencepiece_model.py     the fields of a `.model` file
    sentencepiece_backend.py   that kind of vocabulary: text -> ids, the bytes of an id
    tokenizer_json.py          the other kind, with the optional package tokenizers
    huggingface.py             the files that transformers reads
    chat.py                    messages -> ids and loss mask
    parallel.py                several processes, results in order
    train.py                   texts -> a new vocabulary
    sentencepiece_writer.py    a `.model` file of a changed vocabulary, for pruning and converting
"""

import codecs
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import chat, huggingface
from .parallel import map_in_order
from .sentencepiece_backend import SentencePieceBackend
from .sentencepiece_model import TokenizerError

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
    if path.suffix != ".json":
        return Tokenizer(SentencePieceBackend(path))
    # This file of ours is there for an optional package, so it is imported only where somebody has a tokenizer.json.
    from .tokenizer_json import TokenizerJsonBackend

    return Tokenizer(TokenizerJsonBackend(path))


class Encoded(NamedTuple):
    """The ids of several texts one after another, how many each text has, and the UTF-8 bytes of all the texts."""

    ids: np.ndarray
    sizes: list[int]
    text_bytes: int


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
        model: the fields of its `.model`; None where it came from a tokenizer.json.
    """

    def __init__(self, backend):
        self._backend = backend
        self.path, self.model, self.special_ids = backend.path, backend.model, backend.special_ids
        self.bos_id, self.eos_id, self.pad_id = backend.bos_id, backend.eos_id, backend.pad_id
        # Runs and bins name their tokenizer by this, so that nothing is read with another one.
        self.sha256 = hashlib.sha256(backend.data).hexdigest()
        self.vocab_size = len(backend.pieces)
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
        # The library would take what is no text for something else, or end with an error of its own.
        _check_text(text)
        return [self.bos_id] * bos + self._backend.encode(text, continues) + [self.eos_id] * eos

    def encode_texts(self, texts: list[str], bos: bool = False, eos: bool = False) -> Encoded:
        """Encode a list of texts at once; arguments and errors as `encode`."""
        text_bytes = sum(map(_check_text, texts))
        head, tail = [self.bos_id] * bos, [self.eos_id] * eos
        rows = self._backend.encode_many(texts)
        sizes = [bos + len(row) + eos for row in rows]
        flat = itertools.chain.from_iterable(part for row in rows for part in (head, row, tail))
        # np.fromiter refuses an id that does not fit the dtype, where .astype would wrap it silently.
        return Encoded(np.fromiter(flat, self.dtype, sum(sizes)), sizes, text_bytes)

    def encode_chunks(
        self, texts: Iterable[str], processes: int = 1, bos: bool = False, eos: bool = False
    ) -> Iterator[Encoded]:
        """Encode many texts in order, a chunk of them at a time, holding only a few chunks in memory.

        Args:
            texts: any iterable, read as the results are consumed.
            processes: as in `map_in_order`.
            bos, eos: as in `encode`.

        Returns:
            an iterator of `Encoded`; together they hold every text once, in order.

        Raises:
            TokenizerError: as `encode`; or a worker was killed.
        """
        work = functools.partial(Tokenizer.encode_texts, bos=bos, eos=eos)
        yield from map_in_order(work, self, _chunks(texts), processes)

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
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes that ids stand for; what encoding puts in front of a text is taken off. Otherwise as `decode`."""
        ids = list(ids)
        # The smallest and the largest say whether any is out of range.
        for i in ids and (min(ids), max(ids)):
            _check_id(i, self.vocab_size)
        table = self._id_bytes(skip_special)
        data = b"".join([table[i] for i in ids])
        return data.removeprefix(b" ") if self._backend.strips_space else data

    def stream(self, skip_special: bool = True) -> "StreamDecoder":
        """A decoder that takes ids one by one; `skip_special` as in `decode`."""
        return StreamDecoder(self._id_bytes(skip_special), self._backend.strips_space)

    def _id_bytes(self, skip_special: bool) -> list[bytes]:
        """The bytes of each id: of a control piece none, or its text."""
        if skip_special:
            return self._backend.id_bytes
        table = list(self._backend.id_bytes)
        for text, i in self.special_ids.items():
            table[i] = text.encode()
        return table

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
            # Refuses a format that this vocabulary could not render.
            chat.special_ids(self, chat_format)
            template = chat.template(chat_format)
        huggingface.save(self._backend, Path(folder), template)


class StreamDecoder:
    """Ids in one by one, text out as soon as it is whole: never half a character.

    The pieces of text in order are exactly `decode` of all the ids. Get one from `Tokenizer.stream`.
    """

    def __init__(self, id_bytes: list[bytes], strips_space: bool):
        self._id_bytes = id_bytes
        # Still to be dropped: the space that encoding puts in front of a text.
        self._strip = strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that became certain with this id; TokenizerError if it is out of range."""
        _check_id(id, len(self._id_bytes))
        data = self._id_bytes[id]
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        # The decoder keeps the first bytes of a character until its last one has come.
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest at the end of the ids: U+FFFD for a character that never became whole, else nothing."""
        return self._utf8.decode(b"", True)


def _check_id(id: int, vocab_size: int) -> None:
    # Checked by hand: a list would take a negative id for a place from its end.
    if not 0 <= id < vocab_size:
        raise TokenizerError(f"id {id} is out of range: this vocabulary has ids 0 to {vocab_size - 1}")


def _check_text(text: str) -> int:
    """The text's size in UTF-8 bytes; TokenizerError if it is no text."""
    if not isinstance(text, str):
        raise TokenizerError(f"expected a text, got {type(text).__name__}")
    try:
        return len(text.encode())
    except UnicodeEncodeError as e:
        what = f"the text has a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}"
        raise TokenizerError(f"{what} -- read the file as UTF-8, without errors='surrogateescape'") from None


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about CHUNK_CHARS characters."""
    chunk, chars = [], 0
    for text in texts:
        chunk.append(text)
        # 64 more for each, so that a million empty texts are not one chunk. What is no text is refused when encoded.
        chars += (len(text) if isinstance(text, str) else 0) + 64
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk

"""The sentencepiece `.model` file, read and written field by field.

In:  the bytes of a `.model` (a protobuf ModelProto). Out: a `Model`, and the same bytes again.
Use: `model = read_model("tokenizer.model")`, change it, `Path(p).write_bytes(write_model(model))`.
Does not know how to encode text. sentencepiece ends the whole process on some malformed files, so what
has not passed `parse_model` is never handed to it.

The schema is sentencepiece_model.proto of https://github.com/google/sentencepiece. Fields we have no name for are kept
as they are. A protobuf message is a row of fields, each `key value` with key = number * 8 + wire type:

    wire type   value
    0           varint: 7 bits a byte, lowest first, high bit set on all but the last
    2           a varint length and as many bytes (texts, nested messages)
    5, 1        4 or 8 bytes (float, double)
"""

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Piece types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Model types.
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4

SPACE = "▁"  # sentencepiece writes a space inside pieces as U+2581

Message = tuple[tuple[int, int, int | bytes], ...]  # (field number, wire type, value) in file order


class TokenizerError(ValueError):
    """What is wrong with a tokenizer, a text or a chat, in one line: `PATH: what -- hint`."""


class Piece(NamedTuple):
    """One vocabulary entry; its id is its place in the list."""

    text: str
    score: float
    type: int = NORMAL
    unknown: Message = ()


@dataclass(frozen=True)
class Model:
    """A vocabulary with its settings. `trainer`, `normalizer` and `rest` hold raw fields; the properties name ours.

    Args:
        pieces: the vocabulary, id = index.
        trainer: fields of TrainerSpec.
        normalizer: fields of NormalizerSpec.
        rest: every other field of ModelProto.
    """

    pieces: list[Piece]
    trainer: Message = ()
    normalizer: Message = ()
    rest: Message = ()

    # TrainerSpec -----------------------------------------------------------------------------------------------------
    @property
    def model_type(self) -> int:
        return _number(self.trainer, 3, UNIGRAM)

    @property
    def byte_fallback(self) -> bool:
        return bool(_number(self.trainer, 35, 0))

    @property
    def treat_whitespace_as_suffix(self) -> bool:
        return bool(_number(self.trainer, 24, 0))

    @property
    def unk_surface(self) -> str:
        return _text(self.trainer, 44, " \u2047 ")

    @property
    def unk_id(self) -> int:
        return next(i for i, p in enumerate(self.pieces) if p.type == UNKNOWN)

    @property
    def bos_id(self) -> int | None:
        return self._control_id(_text(self.trainer, 46, "<s>"))

    @property
    def eos_id(self) -> int | None:
        return self._control_id(_text(self.trainer, 47, "</s>"))

    @property
    def pad_id(self) -> int | None:
        return self._control_id(_text(self.trainer, 48, "<pad>"))

    def _control_id(self, text: str) -> int | None:
        # By name, as sentencepiece itself does; TrainerSpec's number is only a wish at training time.
        return next((i for i, p in enumerate(self.pieces) if p.type == CONTROL and p.text == text), None)

    # NormalizerSpec --------------------------------------------------------------------------------------------------
    @property
    def normalizer_name(self) -> str:
        return _text(self.normalizer, 1, "")

    @property
    def charsmap(self) -> bytes:
        """Empty for the identity normaliser."""
        return _bytes(self.normalizer, 2)

    @property
    def add_dummy_prefix(self) -> bool:
        return bool(_number(self.normalizer, 3, 1))

    @property
    def remove_extra_whitespaces(self) -> bool:
        return bool(_number(self.normalizer, 4, 1))

    @property
    def escape_whitespaces(self) -> bool:
        return bool(_number(self.normalizer, 5, 1))

    def without_dummy_prefix(self) -> "Model":
        """The same vocabulary for text that continues other text."""
        return replace(self, normalizer=(*(f for f in self.normalizer if f[0] != 3), (3, 0, 0)))


def read_model(path) -> Model:
    """Read and check a `.model` file.

    Args:
        path: the file.

    Returns:
        the model.

    Raises:
        TokenizerError: no such file, or not a model we can rely on.
    """
    return parse_model(read_bytes(path), str(path))


def read_bytes(path) -> bytes:
    """The bytes of a file; TokenizerError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise TokenizerError(f"{path}: {e.strerror.lower()} -- a tokenizer.model or tokenizer.json is needed") from None


def parse_model(data: bytes, path: str = "tokenizer.model") -> Model:
    """Parse and check the bytes of a `.model` file; arguments, result and errors as `read_model`."""
    pieces: list[Piece] = []
    trainer: Message = ()
    normalizer: Message = ()
    rest: Message = ()
    try:
        for number, wire, value in _fields(data):
            if number in (1, 2, 3) and wire != 2:
                raise ValueError(f"field {number} has wire type {wire}")
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                trainer += tuple(_fields(value))
            elif number == 3:
                normalizer += tuple(_fields(value))
            else:
                rest += ((number, wire, value),)
        model = Model(pieces, trainer, normalizer, rest)
        _check(model)
    except ValueError as e:  # also UnicodeDecodeError
        raise TokenizerError(f"{path}: not a usable sentencepiece model: {e} -- is the file whole?") from None
    return model


def write_model(model: Model) -> bytes:
    """The bytes of a model, fields in the order sentencepiece writes them.

    Args:
        model: what `read_model` gave, changed or not.

    Returns:
        a ModelProto; byte for byte the file that was read when nothing was changed.
    """
    out = bytearray()
    for piece in model.pieces:
        fields = [(1, 2, piece.text.encode()), (2, 5, struct.pack("<f", piece.score))]
        if piece.type != NORMAL:
            fields.append((3, 0, piece.type))
        out += _write([(1, 2, _write([*fields, *piece.unknown]))])
    specs = [(number, 2, _write(spec)) for number, spec in ((2, model.trainer), (3, model.normalizer)) if spec]
    return bytes(out + _write([*specs, *model.rest]))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, and the place behind it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("the file is cut off or damaged")
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """The fields of one message; nested messages stay bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size = 8 if wire == 1 else 4
            if wire == 2:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        if wire not in (0, 1, 2, 5) or number == 0 or at > len(data):
            raise ValueError("the file is cut off or damaged")
        yield number, wire, value


def _write(fields: Iterable[tuple[int, int, int | bytes]]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        numbers = [number << 3 | wire]
        if wire == 0:
            numbers.append(value)
        elif wire == 2:
            numbers.append(len(value))
        for n in numbers:
            while n > 127:
                out.append(n & 127 | 128)
                n >>= 7
            out.append(n)
        if wire != 0:
            out += value
    return bytes(out)


def _piece(data: bytes) -> Piece:
    text, score, kind, unknown = "", 0.0, NORMAL, ()
    for number, wire, value in _fields(data):
        if (number, wire) == (1, 2):
            text = value.decode()
        elif (number, wire) == (2, 5):
            score = struct.unpack("<f", value)[0]
        elif (number, wire) == (3, 0):
            kind = value
        else:
            unknown += ((number, wire, value),)
    return Piece(text, score, kind, unknown)


def _last(fields: Message, number: int, default):
    return next((value for n, _, value in reversed(fields) if n == number), default)


def _number(fields: Message, number: int, default: int) -> int:
    value = _last(fields, number, default)
    if not isinstance(value, int):
        raise ValueError(f"setting {number} should be a number")
    return value - (1 << 64) if value >> 63 else value  # negative numbers are 64-bit two's complement


def _bytes(fields: Message, number: int, default: bytes = b"") -> bytes:
    value = _last(fields, number, default)
    if not isinstance(value, bytes):
        raise ValueError(f"setting {number} should be a text")
    return value


def _text(fields: Message, number: int, default: str) -> str:
    return _bytes(fields, number, default.encode()).decode()


def _check(model: Model) -> None:
    """ValueError unless sentencepiece can load the model safely and every promise of `Tokenizer` can be kept."""
    pieces = model.pieces
    if not pieces:
        raise ValueError("it has no pieces")
    if model.model_type not in (UNIGRAM, BPE, WORD, CHAR):
        raise ValueError(f"unknown model type {model.model_type}")
    for i, piece in enumerate(pieces):
        if not piece.text or "\0" in piece.text or not NORMAL <= piece.type <= BYTE or not math.isfinite(piece.score):
            raise ValueError(f"piece {i} is damaged: {piece[:3]}")
        # sentencepiece would give such a piece's id to the plain character: text could then forge control ids.
        if len(piece.text) == 1 and piece.type in (UNKNOWN, CONTROL):
            raise ValueError(f"piece {i}, a control piece, is the single character {piece.text!r}")
    if len({p.text for p in pieces}) < len(pieces):
        raise ValueError("two pieces have the same text")
    if sum(p.type == UNKNOWN for p in pieces) != 1:
        raise ValueError("it needs exactly one unknown piece")
    names = {p.text for p in pieces if p.type == BYTE}
    if (names or model.byte_fallback) and names != {f"<0x{b:02X}>" for b in range(256)}:
        raise ValueError("byte fallback needs the 256 pieces <0x00> ... <0xFF>")
    if names and not model.byte_fallback:
        raise ValueError("it has byte pieces but byte fallback is off")
    for name, found, wanted in (
        ("bos", model.bos_id, _number(model.trainer, 41, 1)),
        ("eos", model.eos_id, _number(model.trainer, 42, 2)),
    ):
        if found is None:
            raise ValueError(f"it has no {name} control piece")
        if found != wanted:
            raise ValueError(f"its settings say {name} is id {wanted}, its pieces say {found}")
    if model.bos_id == model.eos_id:
        raise ValueError(f"bos and eos are the same id {model.bos_id}")
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        raise ValueError("spaces behind words or unescaped spaces are not supported")
    # Read here, so that none fails later.
    _ = model.pad_id, model.unk_surface, model.normalizer_name, model.add_dummy_prefix, model.remove_extra_whitespaces
    _check_charsmap(model.charsmap)
    for number, wire, value in model.rest:
        if number == 5 and wire == 2 and _bytes(tuple(_fields(value)), 2):
            raise ValueError("a denormaliser is not supported")


def _check_charsmap(blob: bytes) -> None:
    """ValueError if looking a text up in the normaliser's trie could leave its memory.

    The trie is a double array (https://github.com/s-yata/darts-clone): node i reads unit i ^ offset ^ byte, so with a
    length that is a multiple of 256 units it is enough that i ^ offset lies inside.
    """
    if not blob:
        return
    size = int.from_bytes(blob[:4], "little")
    if len(blob) < 4 or size % 1024 or not 0 < size < len(blob) - 4 or blob[-1] != 0:
        raise ValueError("the normaliser table is damaged")
    units = np.frombuffer(blob, "<u4", size // 4, 4)
    nodes = np.flatnonzero(units >> 31 == 0)
    inner = units[nodes]
    target = nodes ^ ((inner >> 10) << ((inner & 0x200) >> 6)).astype(np.int64)
    if (target >= len(units)).any():
        raise ValueError("the normaliser table is damaged")
    values = units[target[(inner & 0x100) > 0]] & 0x7FFFFFFF  # places in the list of replacements
    if (values >= len(blob) - 4 - size).any():
        raise ValueError("the normaliser table is damaged")

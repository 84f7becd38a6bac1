"""The sentencepiece `.model` file, read and checked field by field.

In:  the bytes of a `.model` (a protobuf ModelProto). Out: a `Model`.
Does not know how to encode text, nor how to write a file (sentencepiece_writer.py does). sentencepiece ends the
whole process on some malformed files, so what has not passed `parse_model` is never handed to it.

The schema is sentencepiece_model.proto of https://github.com/google/sentencepiece. Fields we have no name for are kept
as they are. A protobuf message is a row of fields, each `key value` with key = number * 8 + wire type:

    wire type   value
    0           varint: 7 bits a byte, lowest first, high bit set on all but the last
    2           a varint length and as many bytes (texts, nested messages)
    5, 1        4 or 8 bytes (float, double)
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Piece types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Model types.
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4

SPACE = "▁"  # sentencepiece writes a space inside pieces as U+2581
BYTE_PIECES = tuple(f"<0x{b:02X}>" for b in range(256))

Message = tuple[tuple[int, int, int | bytes], ...]  # (field number, wire type, value) in file order


class TokenizerError(ValueError):
    """What is wrong with a tokenizer, a text or a chat, in one line: `PATH: what -- hint`."""


class Piece(NamedTuple):
    """One vocabulary entry; its id is its place in the list."""

    text: str
    score: float
    type: int = NORMAL
    unknown: Message = ()


class Setting:
    """A field of one of the model's messages as an attribute; its type is that of the default.

    Args:
        message: the attribute of `Model` with the raw fields.
        number: of the field.
        default: what counts where the file does not say.
    """

    def __init__(self, message: str, number: int, default):
        self.message, self.number, self.default = message, number, default

    def __get__(self, model: "Model", owner: type):
        return _value(getattr(model, self.message), self.number, self.default)


@dataclass(frozen=True)
class Model:
    """A vocabulary with its settings. `trainer`, `normalizer` and `rest` hold raw fields; the settings name ours.

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

    model_type = Setting("trainer", 3, UNIGRAM)
    treat_whitespace_as_suffix = Setting("trainer", 24, False)
    byte_fallback = Setting("trainer", 35, False)
    wanted_bos_id = Setting("trainer", 41, 1)
    wanted_eos_id = Setting("trainer", 42, 2)
    unk_surface = Setting("trainer", 44, " \u2047 ")
    bos_piece = Setting("trainer", 46, "<s>")
    eos_piece = Setting("trainer", 47, "</s>")
    pad_piece = Setting("trainer", 48, "<pad>")
    normalizer_name = Setting("normalizer", 1, "")
    charsmap = Setting("normalizer", 2, b"")  # empty for the identity normaliser
    add_dummy_prefix = Setting("normalizer", 3, True)
    remove_extra_whitespaces = Setting("normalizer", 4, True)
    escape_whitespaces = Setting("normalizer", 5, True)

    @property
    def unk_id(self) -> int:
        return next(i for i, p in enumerate(self.pieces) if p.type == UNKNOWN)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The control pieces, text -> id."""
        return {p.text: i for i, p in enumerate(self.pieces) if p.type == CONTROL}

    # By name, as sentencepiece itself does: the numbers in TrainerSpec are only wishes at training time.
    bos_id = property(lambda self: self.special_ids.get(self.bos_piece))
    eos_id = property(lambda self: self.special_ids.get(self.eos_piece))
    pad_id = property(lambda self: self.special_ids.get(self.pad_piece))

    def bytes_of(self, piece: Piece) -> bytes:
        """What a piece stands for in a text; a control piece for nothing."""
        if piece.type == CONTROL:
            return b""
        if piece.type == BYTE:
            return bytes([BYTE_PIECES.index(piece.text)])
        return (self.unk_surface if piece.type == UNKNOWN else piece.text.replace(SPACE, " ")).encode()


def read_bytes(path) -> bytes:
    """The bytes of a file; TokenizerError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise TokenizerError(f"{path}: {e.strerror.lower()} -- a tokenizer.model or tokenizer.json is needed") from None


def parse_model(data: bytes, path: str = "tokenizer.model") -> Model:
    """Parse and check the bytes of a `.model` file.

    Args:
        data: the file.
        path: its name, for errors.

    Returns:
        the model.

    Raises:
        TokenizerError: not a model we can rely on.
    """
    try:
        # Field 1 is a piece, 2 the trainer's settings, 3 the normaliser's. A message that comes in several parts is one
        # with the fields of all, as in protobuf.
        pieces, specs, rest = [], {2: [], 3: []}, []
        for number, wire, value in _fields(data):
            if number not in (1, *specs):
                rest.append((number, wire, value))
            elif wire != 2:
                raise ValueError(f"field {number} has wire type {wire}")
            elif number == 1:
                pieces.append(_piece(value))
            else:
                specs[number].extend(_fields(value))
        model = Model(pieces, tuple(specs[2]), tuple(specs[3]), tuple(rest))
        _check(model)
    except ValueError as e:  # also UnicodeDecodeError
        raise TokenizerError(f"{path}: not a usable sentencepiece model: {e} -- is the file whole?") from None
    return model


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, and the place behind it."""
    value = shift = 0
    while True:
        # Ten bytes at most: a number has 64 bits.
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
        # Sizes come from the file: what reaches beyond its end is refused below.
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
            value, at = data[at : at + size], at + size
        if wire not in (0, 1, 2, 5) or number == 0 or at > len(data):
            raise ValueError("the file is cut off or damaged")
        yield number, wire, value


def _piece(data: bytes) -> Piece:
    # A field that comes twice: the last one counts. What we have no name for is kept, to be written back.
    fields = tuple(_fields(data))
    found = {(number, wire): value for number, wire, value in fields}
    unknown = tuple(field for field in fields if field[:2] not in ((1, 2), (2, 5), (3, 0)))
    score = struct.unpack("<f", found.get((2, 5), bytes(4)))[0]
    return Piece(found.get((1, 2), b"").decode(), score, found.get((3, 0), NORMAL), unknown)


def _value(fields: Message, number: int, default):
    """The setting's value: the last one counts, as in protobuf; ValueError where it is of another kind."""
    found = next((value for n, _, value in reversed(fields) if n == number), None)
    if found is None:
        return default
    if isinstance(found, int) != isinstance(default, int):
        raise ValueError(f"setting {number} should be a {'number' if isinstance(default, int) else 'text'}")
    if isinstance(default, int):
        # Negative numbers are 64-bit two's complement; a setting whose default is a bool becomes one.
        return type(default)(found - (1 << 64) if found >> 63 else found)
    return found.decode() if isinstance(default, str) else found


def _check(model: Model) -> None:
    """ValueError unless sentencepiece can load the model safely and every promise of `Tokenizer` can be kept."""
    for i, piece in enumerate(model.pieces):
        if not piece.text or "\0" in piece.text or not NORMAL <= piece.type <= BYTE or not math.isfinite(piece.score):
            raise ValueError(f"piece {i} is damaged: {piece[:3]}")
        # sentencepiece would give such a piece's id to the plain character: text could then forge control ids.
        if len(piece.text) == 1 and piece.type in (UNKNOWN, CONTROL):
            raise ValueError(f"piece {i}, a control piece, is the single character {piece.text!r}")
    # The settings that are not asked for below are read here, so that none fails later.
    _ = model.pad_id, model.unk_surface, model.normalizer_name, model.add_dummy_prefix, model.remove_extra_whitespaces
    bos, eos, wanted_bos, wanted_eos = model.bos_id, model.eos_id, model.wanted_bos_id, model.wanted_eos_id
    types = [piece.type for piece in model.pieces]
    # With byte fallback every byte has a piece, so that every text can be written.
    byte_pieces = {piece.text for piece in model.pieces if piece.type == BYTE}
    needs_bytes = byte_pieces or model.byte_fallback
    odd_spaces = model.treat_whitespace_as_suffix or not model.escape_whitespaces
    denormalizers = [value for number, wire, value in model.rest if (number, wire) == (5, 2)]
    # Where several are true, the first one is told.
    problems = {
        "it has no pieces": not types,
        f"unknown model type {model.model_type}": model.model_type not in (UNIGRAM, BPE, WORD, CHAR),
        "two pieces have the same text": len({piece.text for piece in model.pieces}) < len(types),
        "it needs exactly one unknown piece": types.count(UNKNOWN) != 1,
        "byte fallback needs the 256 pieces <0x00> ... <0xFF>": needs_bytes and byte_pieces != set(BYTE_PIECES),
        "it has byte pieces but byte fallback is off": needs_bytes and not model.byte_fallback,
        "it has no bos control piece": bos is None,
        f"its settings say bos is id {wanted_bos}, its pieces say {bos}": bos != wanted_bos,
        "it has no eos control piece": eos is None,
        f"its settings say eos is id {wanted_eos}, its pieces say {eos}": eos != wanted_eos,
        f"bos and eos are the same id {bos}": bos == eos,
        "spaces behind words or unescaped spaces are not supported": odd_spaces,
        "the normaliser table is damaged": not _stays_inside(model.charsmap),
        "a denormaliser is not supported": any(_value(tuple(_fields(spec)), 2, b"") for spec in denormalizers),
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(problem)


def _stays_inside(blob: bytes) -> bool:
    """Can looking a text up in the normaliser's trie never leave its memory?

    The trie is a double array (https://github.com/s-yata/darts-clone): node i reads unit i ^ offset ^ byte, so with a
    length that is a multiple of 256 units it is enough that i ^ offset lies inside.
    """
    # No table is safe, too: it is that of the identity normaliser.
    size = int.from_bytes(blob[:4], "little")
    if not blob or len(blob) < 4 or size % 1024 or not 0 < size < len(blob) - 4 or blob[-1] != 0:
        return not blob
    # The highest bit marks a leaf, bit 8 a node with one, bit 9 an offset in steps of 256 units.
    units = np.frombuffer(blob, "<u4", size // 4, 4)
    nodes = np.flatnonzero(units >> 31 == 0)
    inner = units[nodes]
    target = nodes ^ ((inner >> 10) << ((inner & 0x200) >> 6)).astype(np.int64)
    if (target >= len(units)).any():
        return False
    # Leaves hold places in the list of replacements behind the trie.
    values = units[target[(inner & 0x100) > 0]] & 0x7FFFFFFF
    return bool((values < len(blob) - 4 - size).all())

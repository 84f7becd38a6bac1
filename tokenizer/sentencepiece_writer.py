"""A `Model` back to the bytes of a `.model` file.

In:  what `sentencepiece_model.parse_model` gave, changed or not. Out: a protobuf ModelProto.
For vocabularies that are made of others: pruning, converting. What reads and encodes texts does not need it.
"""

import struct
from collections.abc import Iterable

from .sentencepiece_model import NORMAL, Model


def write_model(model: Model) -> bytes:
    """The bytes of a model, fields in the order sentencepiece writes them.

    Args:
        model: what `parse_model` gave, changed or not.

    Returns:
        a ModelProto; byte for byte the file that was read when nothing was changed.
    """
    out = bytearray()
    for piece in model.pieces:
        fields = [(1, 2, piece.text.encode()), (2, 5, struct.pack("<f", piece.score))]
        # A type that is the default is not written, as protobuf's own writer does.
        if piece.type != NORMAL:
            fields.append((3, 0, piece.type))
        out += _write([(1, 2, _write([*fields, *piece.unknown]))])
    # A message that the file did not have is not made up.
    specs = [(number, 2, _write(spec)) for number, spec in ((2, model.trainer), (3, model.normalizer)) if spec]
    return bytes(out + _write([*specs, *model.rest]))


def _write(fields: Iterable[tuple[int, int, int | bytes]]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        numbers = [number << 3 | wire]
        if wire == 0:
            numbers.append(value)
        elif wire == 2:
            numbers.append(len(value))
        for n in numbers:
            # A varint: 7 bits a byte, lowest first, the high bit set on all but the last.
            while n > 127:
                out.append(n & 127 | 128)
                n >>= 7
            out.append(n)
        if wire != 0:
            out += value
    return bytes(out)

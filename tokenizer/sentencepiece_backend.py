"""A sentencepiece vocabulary: plain text to ids, and the bytes that each id stands for.

In:  a `.model` file. Out: an object that `Tokenizer` asks. tokenizer_json.py has the other kind with the same methods.
Does not know where bos and eos are put, nor chats.
"""

import re
import warnings
from functools import cached_property
from pathlib import Path

import sentencepiece

from . import huggingface
from .sentencepiece_model import BYTE_PIECES, NORMAL, SPACE, USER_DEFINED, TokenizerError, parse_model, read_bytes

# The field normalizer_spec (3) with nothing in it but add_dummy_prefix (3) = 0. Protobuf joins the parts of a message,
# and of a field that comes twice the last one counts. So these bytes behind a model switch its dummy prefix off.
WITHOUT_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])


class SentencePieceBackend:
    """A sentencepiece `.model`.

    Args:
        path: the file.

    Raises:
        TokenizerError: missing or unusable file.
    """

    def __init__(self, path: Path):
        self.path, self.data = path, read_bytes(path)
        self.model = model = parse_model(self.data, str(path))
        self.pieces = [p.text for p in model.pieces]
        roles = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
        self.tokens = {role: self.pieces[i] for role, i in roles.items() if i is not None}
        self.bos_id, self.eos_id, self.pad_id = model.bos_id, model.eos_id, model.pad_id
        self.special_ids, self.id_bytes = model.special_ids, [model.bytes_of(p) for p in model.pieces]
        # Without a piece for the space, sentencepiece would write it as the bytes of U+2581 and never get it back.
        can_write_space = any(p.text == SPACE and p.type in (NORMAL, USER_DEFINED) for p in model.pieces)
        self._prefix = model.add_dummy_prefix and (can_write_space or not model.byte_fallback)
        # Decoding drops the space that encoding put in front.
        self.strips_space = self._prefix or model.remove_extra_whitespaces
        self._processor = self._load(self.data if self._prefix else self.data + WITHOUT_PREFIX)
        # Characters that only the byte pieces write faithfully: sentencepiece takes U+2581 for a space.
        hard = (SPACE if can_write_space else SPACE + " ") if model.byte_fallback else ""
        self._byte_ids = {char: [self.pieces.index(BYTE_PIECES[b]) for b in char.encode()] for char in hard}
        self._to_split = re.compile(f"([{hard}])" if hard else "(?!)")  # (?!) is found nowhere

    def _load(self, data: bytes) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as e:
            raise TokenizerError(f"{self.path}: sentencepiece refuses it: {e}") from None

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The processor for text that follows other text: the same vocabulary without the dummy prefix."""
        return self._load(self.data + WITHOUT_PREFIX) if self._prefix else self._processor

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text; `continues` as in `Tokenizer.encode`."""
        if not self._to_split.search(text):
            return (self._continuing if continues else self._processor).encode(text)
        # Cut at the hard characters. What stands between them is encoded without a prefix, so it is put in front here.
        ids = []
        for part in self._to_split.split(text if continues or not self._prefix else " " + text):
            ids += self._byte_ids[part] if part in self._byte_ids else self._continuing.encode(part)
        return ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        # One call into C++ for all texts that need no splitting is about a tenth faster than one call each.
        if not any(map(self._to_split.search, texts)):
            return self._processor.encode(texts, num_threads=1)
        return [self.encode(text) for text in texts]

    def write(self, folder: Path) -> dict:
        """Write the vocabulary's files into a folder; returns what tokenizer_config.json says of them."""
        (folder / "tokenizer.model").write_bytes(self.data)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False}
        try:
            huggingface.write_json(folder / "tokenizer.json", huggingface.tokenizer_json(self.model))
        except TokenizerError as e:
            # A stale one of another vocabulary would be worse than none.
            (folder / "tokenizer.json").unlink(missing_ok=True)
            del config["tokenizer_class"]
            warnings.warn(f"no tokenizer.json written, other tools may split texts otherwise: {e}", stacklevel=4)
        return config

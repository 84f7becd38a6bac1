"""A vocabulary of the other kind: a `tokenizer.json`.

In:  the file, with the names of its bos and eos from the files beside it. Out: an object that `Tokenizer` asks; it has
     the attributes and methods of sentencepiece_backend.py. Special-token text inside a text is plain text here too.
Needs the optional package tokenizers, so `load` imports this file only for a tokenizer.json.
"""

import json
import re
from functools import cached_property
from pathlib import Path

from .sentencepiece_model import TokenizerError, read_bytes


class TokenizerJsonBackend:
    """A Hugging Face `tokenizer.json`, with the names of its bos and eos from the files beside it.

    Args:
        path: the file. A prefix of its name (`x.tokenizer.json`) is expected on the files beside it too.

    Raises:
        TokenizerError: missing package, missing or unusable file, no bos or eos, a decoder we do not know.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise TokenizerError(f"{path}: needs the package tokenizers -- pip install tokenizers") from None
        # No fields of a .model: what needs them asks for None.
        self._library, self.model = tokenizers, None
        self.path, self.data = path, read_bytes(path)
        # The names of bos and eos stand in one of the files beside it, as texts or as ids.
        prefix = path.name.removesuffix("tokenizer.json")
        self.config = self._beside(prefix + "tokenizer_config.json")
        maps = [self.config, self._beside(prefix + "special_tokens_map.json")]
        numbers = [self._beside("config.json"), self._beside("generation_config.json")]
        try:
            self._json = json.loads(self.data)
            self._processor = self._load(self._json)
            vocab = self._processor.get_vocab(with_added_tokens=True)
            self.special_ids = {t["content"]: t["id"] for t in self._json["added_tokens"] if t["special"]}
            self.pieces = [""] * (max(vocab.values()) + 1)
            for piece, i in vocab.items():
                self.pieces[i] = piece
            self._read_decoder()
        except TokenizerError:
            raise
        # tokenizers raises bare Exception.
        except Exception as e:
            raise TokenizerError(f"{path}: not a usable tokenizer.json: {e!r} -- is it a whole file?") from None
        # Role -> text, for the configuration we write.
        self.tokens = {}
        ids = {}
        for role in ("bos", "eos", "pad", "unk"):
            ids[role] = self._special_id(role, vocab, maps, numbers)
            if ids[role] is not None:
                self.tokens[role] = self.pieces[ids[role]]
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        for role in ("bos", "eos"):
            if ids[role] is None:
                raise TokenizerError(f"{path}: no {role} token -- put its tokenizer_config.json beside it")
        # bos and eos are control ids even where the file does not mark them so.
        self.special_ids |= {self.tokens[role]: ids[role] for role in ("bos", "eos")}
        for i in self.special_ids.values():
            self.id_bytes[i] = b""

    def __reduce__(self):
        # A pickled processor forgets that special tokens in a text are text, so a worker process reads the file again.
        return TokenizerJsonBackend, (self.path,)

    def _beside(self, name: str) -> dict:
        path = self.path.with_name(name)
        if not path.exists():
            return {}
        try:
            found = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as e:
            raise TokenizerError(f"{path}: not JSON: {e}") from None
        if not isinstance(found, dict):
            raise TokenizerError(f"{path}: not a JSON object")
        return found

    def _special_id(self, role: str, vocab: dict, maps: list[dict], numbers: list[dict]) -> int | None:
        # By text first: a file may name a token either as a string or as an object.
        for found in maps:
            token = found.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in vocab:
                return vocab[token]
        for found in numbers:
            i = found.get(f"{role}_token_id")
            # Llama 3 lists several ends.
            i = i[0] if isinstance(i, list) and i else i
            if isinstance(i, int) and 0 <= i < len(self.pieces):
                return i
        return None

    def _load(self, config: dict):
        processor = self._library.Tokenizer.from_str(json.dumps(config))
        # What a file may ask for: rows of one length. Here a text has the ids that it has.
        processor.no_padding()
        processor.no_truncation()
        # "<s>" in a text is three characters, not bos.
        processor.encode_special_tokens = True
        return processor

    def _read_decoder(self) -> None:
        """Which bytes each id stands for, from the decoder's steps."""
        # The library decodes only whole rows of ids; a stream needs the bytes of one id. Unknown steps are refused.
        decoder = self._json["decoder"] or {"type": "Fuse"}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        self.strips_space, one_byte, from_byte_level, replaced = False, False, False, []
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel":
                from_byte_level = True
            elif kind == "ByteFallback":
                one_byte = True
            elif kind == "Replace" and "String" in step["pattern"]:
                replaced.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace":
                replaced.append((step["replacement"], " "))
                self.strips_space = step.get("prepend_scheme") != "never"
            elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
                self.strips_space = True
            elif kind != "Fuse":
                raise TokenizerError(f"{self.path}: its decoder {kind} is not supported")
        # A piece is written in printable characters, or it names one byte, or it is text with its spaces replaced.
        self.id_bytes = []
        for piece in self.pieces:
            if from_byte_level and all(c in BYTE_LEVEL for c in piece):
                self.id_bytes.append(bytes(BYTE_LEVEL[c] for c in piece))
            elif one_byte and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                self.id_bytes.append(bytes([int(piece[3:5], 16)]))
            else:
                for old, new in replaced:
                    piece = piece.replace(old, new)
                self.id_bytes.append(piece.encode())

    @cached_property
    def _continuing(self):
        """The processor for text that follows other text: nothing is put in front."""
        steps = ("normalizer", "pre_tokenizer")
        return self._load(self._json | {name: _without_prefix(self._json.get(name)) for name in steps})

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text; `continues` as in `Tokenizer.encode`."""
        processor = self._continuing if continues else self._processor
        return processor.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def write(self, folder: Path) -> dict:
        """Write the vocabulary's file into a folder; returns what tokenizer_config.json says of it."""
        # `load` would prefer a tokenizer.model of another vocabulary.
        (folder / "tokenizer.model").unlink(missing_ok=True)
        (folder / "tokenizer.json").write_bytes(self.data)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False}
        kept = ("add_bos_token", "add_eos_token", "chat_template")
        return config | {key: self.config[key] for key in kept if key in self.config}


def _without_prefix(step: dict | None) -> dict | None:
    """A normaliser or pre-tokeniser without the step that puts a space in front of the text."""
    if step is None or step["type"] == "Prepend":
        return None
    # A copy: the file's own steps stay as they are.
    step = dict(step)
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            step[name] = [s for s in map(_without_prefix, step[name]) if s is not None]
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    return step


def _byte_level() -> dict[str, int]:
    """GPT-2's writing of bytes as printable characters: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_LEVEL = _byte_level()

"""What is in a vocabulary, and how well it fits a text.

    python vocabulary.py inspect --tokenizer chatglm2/tokenizer.model out/pretrain --text book.txt --pieces 10

In:  tokenizers. Out: counts of pieces by class, pieces no text can reach, characters per token.
Does not change a vocabulary; prune.py does.
"""

import functools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import sentencepiece

from core.config import Section
from extras.vocabulary.lines import read_lines
from tokenizer import Tokenizer, TokenizerError, load
from tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Model
from tokenizer.sentencepiece_writer import write_model

# Files that people download, so that a look at one says what it is.
KNOWN = {
    "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2": "ChatGLM2-6B",
    "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347": "Llama 2",
}
KINDS = {UNKNOWN: "unknown", CONTROL: "control", USER_DEFINED: "user-defined", UNUSED: "unused", BYTE: "byte"}


# Classes of characters and pieces ------------------------------------------------------------------------------------


@functools.cache
def char_class(char: str) -> str:
    """The class of a character, for choosing pieces by script.

    Args:
        char: one character; sentencepiece's "▁" is a space.

    Returns:
        "space" (control characters too), "digits", "punct", "symbols" (emoji too), "marks" (combining, joiners),
        "latin" (A-Z and a-z), "latin-extended", "fullwidth", "han-traditional" (in Big5 and not in GB 2312, by
        Python's own tables), "han" (all other ideographs), "kana", or the first word of its Unicode name: "hangul",
        "cyrillic", "arabic", ...
    """
    category, word = unicodedata.category(char), unicodedata.name(char, "other").split()[0].lower()
    if char == SPACE or category in ("Zs", "Zl", "Zp", "Cc"):
        return "space"
    if (word == "cjk" and category == "Lo") or char in "〇々":
        return "han-traditional" if _writes("big5", char) and not _writes("gb2312", char) else "han"
    if category[0] in "NPS":
        return {"N": "digits", "P": "punct", "S": "symbols"}[category[0]]
    if category in ("Cf", "Cn", "Co") or word in ("combining", "variation"):
        return "marks"
    if word == "latin":
        return "latin" if char.isascii() else "latin-extended"
    return "kana" if word in ("hiragana", "katakana", "katakana-hiragana") else word


def _writes(encoding: str, char: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def char_classes(text: str) -> set[str]:
    """The classes of a piece's characters; spaces belong to every class and are left out."""
    return set(map(char_class, text)) - {"space"}


def piece_class(piece) -> str:
    """One class for a piece: what it is if it is no text, else its characters' class, or "mixed"."""
    if piece.type != NORMAL:
        return KINDS[piece.type]
    classes = char_classes(piece.text) or {"space"}
    if "han-traditional" in classes:
        classes.discard("han")
    return classes.pop() if len(classes) == 1 else "mixed"


def count_classes(model: Model) -> dict[str, int]:
    """Number of pieces by class, the most frequent class first."""
    names, counts = np.unique([piece_class(p) for p in model.pieces], return_counts=True)
    return {str(names[k]): int(counts[k]) for k in np.argsort(-counts, kind="stable")}


# How a vocabulary works -----------------------------------------------------------------------------------------------


def unreachable(model: Model) -> list[int]:
    """Ids of normal pieces that no text is ever encoded to.

    A piece that does not come out of its own text comes out of no text: what happens inside a span of a text (the best
    merges of a BPE, the best segmentation of a unigram model) happens in the same order when the span stands alone.
    """
    plain = tuple(f for f in model.normalizer if f[0] not in (2, 3, 4))  # nothing done to the text: pieces as they are
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(write_model(replace(model, normalizer=(*plain, (3, 0, 0), (4, 0, 0)))))
    normal = [i for i, p in enumerate(model.pieces) if p.type == NORMAL]
    rows = processor.encode([model.pieces[i].text for i in normal], num_threads=1)
    return [i for i, row in zip(normal, rows) if row != [i]]


@dataclass
class Fit:
    """A text as a tokenizer sees it: its size, and how often each id occurs in it, (vocab_size,)."""

    chars: int
    text_bytes: int
    counts: np.ndarray

    @property
    def chars_per_token(self) -> float:
        return self.chars / max(1, self.counts.sum())

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.counts.sum())


def fit(tokenizer: Tokenizer, texts: Iterable[str], processes: int = 1) -> Fit:
    """Encode texts and count; TokenizerError if there is none."""
    result = Fit(0, 0, np.zeros(tokenizer.vocab_size, np.int64))

    def passing():
        for text in texts:
            result.chars += len(text)
            yield text

    for chunk in tokenizer.encode_chunks(passing(), processes):
        result.text_bytes += chunk.text_bytes
        result.counts += np.bincount(chunk.ids, minlength=tokenizer.vocab_size)
    if not result.chars:
        raise TokenizerError("there is no text to measure on -- empty files?")
    return result


# The command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectConfig(Section):
    tokenizer: tuple[str, ...] = ("data/tokenizer",)  # folders or files; several are shown side by side
    text: tuple[str, ...] = ()  # UTF-8 files to measure characters per token on
    pieces: int = 0  # also show so many pieces of each class
    find: str = ""  # also show how this text is cut


def run(cfg: InspectConfig) -> None:
    """Print what is asked for, of one tokenizer after another."""
    tokenizers = [load(path) for path in cfg.tokenizer]
    for tokenizer in tokenizers:
        print("\n".join(describe(tokenizer, cfg.pieces)) + "\n")
    if cfg.find:
        for tokenizer in tokenizers:
            ids = tokenizer.encode(cfg.find)
            print(f"{tokenizer.path}: {len(ids)} tokens: {' '.join(f'{tokenizer.id_to_piece(i)}({i})' for i in ids)}")
    for path in cfg.text:
        for tokenizer in tokenizers:
            found = fit(tokenizer, read_lines([path]))
            print(
                f"{path}: {found.chars:,} characters, {found.counts.sum():,} tokens of {tokenizer.path}: "
                f"{found.chars_per_token:.4f} characters each, {found.bytes_per_token:.4f} bytes each, "
                f"{(found.counts > 0).sum():,} pieces in use"
            )


def describe(tokenizer: Tokenizer, pieces: int = 0) -> list[str]:
    """Lines on one tokenizer: sizes, specials, settings, pieces by class with `pieces` examples of each."""
    name = KNOWN.get(tokenizer.sha256)
    lines = [
        f"{tokenizer.path}: {tokenizer.vocab_size:,} ids, {tokenizer.dtype}",
        f"sha256 {tokenizer.sha256}" + f" ({name})" * bool(name),
    ]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    lines.append(
        ", ".join(f"{role} {i}" for role, i in ids.items())
        + "; "
        + " ".join(f"{text}={i}" for text, i in tokenizer.special_ids.items())
    )
    if (model := tokenizer.model) is None:
        return [*lines, "a tokenizer.json: only .model files are taken apart further"]
    kind = {1: "unigram", 2: "BPE", 3: "words", 4: "characters"}[model.model_type]
    lost = unreachable(model)
    lines += [
        f"{kind}, byte fallback {'on' if model.byte_fallback else 'off'}, normaliser {model.normalizer_name}, "
        f"dummy prefix {'on' if model.add_dummy_prefix else 'off'}",
        f"{len(lost)} pieces that no text reaches"
        + ": " * bool(lost)
        + " ".join(f"{model.pieces[i].text}({i})" for i in lost[:10]),
    ]
    for name, count in count_classes(model).items():
        examples = [p.text for p in model.pieces if pieces and piece_class(p) == name][:pieces]
        lines.append(f"{count:>8,} {name} " + " ".join(examples))
    return lines

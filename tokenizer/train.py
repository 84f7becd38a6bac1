"""Texts to a new vocabulary: a sentencepiece BPE with byte fallback.

In:  any texts. Out: a `.model` file: unk 0, `<s>` 1, `</s>` 2, the control pieces of chats, 256 bytes, learned pieces.
Run: `python vocabulary.py train --input book.txt more.txt --output out/tokenizer --vocab_size 8000`
Does not know how texts are cleaned, and keeps no state: the same texts and options give the same bytes.
"""

import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from .sentencepiece_model import SPACE, TokenizerError

# Control, never user-defined: user-defined pieces would be found inside texts, where anyone could forge a turn.
CONTROL_PIECES = ("<|im_start|>", "<|im_end|>")

# sentencepiece leaves out, without an error, lines longer than its limit and lines that contain NUL or its own mark
# U+2585. We cut there instead, and at U+2581, which it would take for a space.
# MAX_LINE is in characters: at most 4,000 bytes, below the limit of 4,192.
MAX_LINE = 1000
CUT = re.compile("[\0\u2581\u2585]")


def train(
    texts: Iterable[str],
    output_model_path,
    vocab_size: int,
    *,
    character_coverage: float = 0.9999,
    max_lines: int = 2_000_000,
    seed: int = 0,
    num_threads: int = 2,
) -> Path:
    """Train a vocabulary and write it with one rename.

    Args:
        texts: the texts; pieces never reach over a line break.
        output_model_path: where the `.model` goes; its folder is made if missing.
        vocab_size: number of ids, control and byte pieces included.
        character_coverage: share of all characters in the texts that get pieces of their own, in (0, 1]; the rarest
            are written as bytes.
        max_lines: a random choice of so many lines (of at most 1,000 characters) is used if there are more; the
            trainer holds them all in memory.
        seed: of that choice.
        num_threads: of sentencepiece; it does not change the result but is written into the file.

    Returns:
        the path.

    Raises:
        TokenizerError: no text, or a vocab_size these texts cannot fill or that is too small for their characters.
    """
    path, result = Path(output_model_path), io.BytesIO()
    lines = _choose(_lines(texts), max_lines, random.Random(seed))
    if not lines:
        raise TokenizerError(f"{path}: there is no text to train a vocabulary on")
    # Every id and option is given, so that another version of the library makes the same vocabulary.
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=result,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            # Texts without any space would give a vocabulary that cannot write one.
            required_chars=SPACE,
            # With these no text is changed or lost: `decode(encode(text)) == text`.
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=list(CONTROL_PIECES),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise TokenizerError(f"{path}: {_explain(str(e), vocab_size)}") from None
    # Written beside it, then renamed: no reader ever sees half a file.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_bytes(result.getvalue())
    os.replace(temporary, path)
    return path


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without what sentencepiece cannot take, cut to MAX_LINE characters; none empty."""
    for text in texts:
        for line in text.splitlines():
            for part in CUT.split(line):
                for at in range(0, len(part), MAX_LINE):
                    yield part[at : at + MAX_LINE]


def _choose(lines: Iterable[str], count: int, rng: random.Random) -> list[str]:
    """At most `count` lines, each with the same chance (reservoir sampling: Vitter 1985, algorithm R).

    sentencepiece can choose too, but (0.2.3) makes the same choice whatever seed it is given.
    """
    # Line n, from 0, takes a place among n + 1 at random: it is chosen where the place is among the first `count`.
    chosen = []
    for number, line in enumerate(lines):
        if number < count:
            chosen.append(line)
        elif (place := rng.randrange(number + 1)) < count:
            chosen[place] = line
    return chosen


def _explain(error: str, vocab_size: int) -> str:
    """sentencepiece's two usual complaints, without its file names and line numbers."""
    if found := re.search(r"value <= (\d+)", error):
        return f"vocab_size {vocab_size} is too large for these texts -- at most {found[1]}, or more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size {vocab_size} is too small for these texts' characters -- "
            f"at least {found[1]}, or a lower character_coverage"
        )
    return f"sentencepiece could not train a vocabulary: {error}"

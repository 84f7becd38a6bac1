"""Texts to a new vocabulary: a folder with tokenizer.model, tokenizer.json and their settings.

    python vocabulary.py train --input book.txt more.txt --output out/tokenizer --vocab_size 8000

In:  UTF-8 text files. Out: a tokenizer folder. Does not know how a vocabulary is learned; tokenizer/train.py does.
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import Section
from extras.vocabulary.lines import read_lines
from tokenizer import load
from tokenizer.train import train


@dataclass(frozen=True)
class VocabularyConfig(Section):
    input: tuple[str, ...] = ()  # UTF-8 text files
    output: str = ""  # folder for tokenizer.model, tokenizer.json and their settings
    vocab_size: int = 8000
    character_coverage: float = 0.9999  # share of the text that gets characters as tokens; the rarest become bytes
    seed: int = 0  # of the choice of lines, where there are too many

    def __post_init__(self):
        super().__post_init__()
        if not self.input or not self.output:
            raise ValueError("input and output must be given")


def run(cfg: VocabularyConfig) -> None:
    """Train the vocabulary and write its folder."""
    path = train(
        read_lines(cfg.input),
        Path(cfg.output) / "tokenizer.model",
        cfg.vocab_size,
        character_coverage=cfg.character_coverage,
        seed=cfg.seed,
    )
    tokenizer = load(path)
    tokenizer.save(cfg.output)
    print(f"{path}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256}")

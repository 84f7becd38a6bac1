"""Text in, tokenizer and token bins out.

    python data_process.py                                    # the demo: a public-domain novel and questions on it
    python data_process.py --input book.txt notes.jsonl       # your own text, with a vocabulary trained on it
    python data_process.py --input corpus.jsonl --tokenizer chatglm2/tokenizer.model
    python data_process.py clean window tokenize --input *.jsonl.gz     # stages in order; without tokenize: JSON lines
    python data_process.py inspect data/train.bin             # what is in a bin or JSONL file; verify checks its hashes

In:  the demo's novel, from the user's package index; or files, which go through the stages of extras/corpus/run.py.
Out: data/tokenizer/, data/train.bin and data/val.bin with their .json. The demo also writes data/sft_*.jsonl; a run on
     files also says what became of every document, in data/accounting.json and data/rejects.jsonl.
Does not know models: only the stage `filter` asks one, and only then torch is loaded.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Annotated

from core import bins, config, errors, files
from core.config import Range, Section
from core.errors import UserError
from extras.corpus import sanguo
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer
from tokenizer.train import train as train_tokenizer

DEMO = "三国演义"  # the source that the demo's bins name


@dataclass(frozen=True)
class ProcessConfig(Section):
    out_dir: str = "data"
    tokenizer: str = ""  # a folder or model file to use; "": train one on the text
    vocab_size: Annotated[int, Range(least=300)] = 4096  # of the trained one; 256 of them are bytes
    character_coverage: float = 0.998  # share of the text that gets characters as tokens; the rarest become bytes
    # Documents held out for validation, chosen by the hash of their text.
    val_share: Annotated[float, Range(above=0, below=1)] = 0.01
    processes: Annotated[int, Range(least=1)] = 2  # that read, clean and tokenize
    keep_rejected: bool = False  # rejects.jsonl also says what the rejected documents say
    overwrite: bool = False  # replace what is already in out_dir (the demo replaces its own without asking)


# All but the first are about the user's own files. Each is imported when an option asks for it.
SECTIONS = {
    "process": ProcessConfig,
    "read": "extras.corpus.readers:ReadConfig",
    "wiki": "extras.corpus.wiki:WikiConfig",
    "clean": "extras.corpus.clean:CleanConfig",
    "dedup": "extras.corpus.dedup:DedupConfig",
    "filter": "extras.corpus.filter:FilterConfig",
    "window": "extras.corpus.windows:WindowConfig",
    "concat": "extras.corpus.windows:ConcatConfig",
    "sft": "extras.corpus.chats:ChatsConfig",
}


def main() -> None:
    # Words in front of the options name stages for the user's own files, or ask for a look at files.
    words = list(takewhile(lambda word: not word.startswith("-") and not word.endswith(".toml"), sys.argv[1:]))
    cfg = config.load(__doc__, SECTIONS, sys.argv[1 + len(words) :])
    if words or cfg.read:
        from extras.corpus.run import run

        return run(cfg, words, make_tokenizer, load_model)

    # The demo replaces its own files without asking, and never those of another text.
    out = Path(cfg.process.out_dir)
    if not cfg.process.overwrite and bins.source_of(out / "train.bin") not in ("", DEMO):
        raise UserError(f"{out / 'train.bin'} holds another text", "--overwrite replaces it; or another --out_dir")

    # The novel has 120 chapters. Six whole ones are held out, so that validation reads text that training never saw.
    raw, entities = sanguo.read(sanguo.fetch(out / "cache"))
    chapters = [sanguo.clean(chapter) for chapter in raw]
    train, val = sanguo.split(chapters)
    characters = sum(len(c.text) for c in chapters)
    print(f"{DEMO}: {len(train)} chapters to train on, {len(val)} held out, {characters:,} characters")

    # A vocabulary learned from the training chapters alone, and both parts written as its ids.
    tokenizer = make_tokenizer(cfg.process, (c.text for c in train))
    for name, part in (("train.bin", train), ("val.bin", val)):
        write_bin(out / name, [c.text for c in part], tokenizer, cfg.process.processes)

    # Questions on the novel's facts, for sft.py. Some facts are never trained on: they show what the model guesses.
    for name, chats in sanguo.chats(chapters, entities).items():
        path = out / f"sft_{name}.jsonl"
        files.write_text(path, "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats))
        print(f"{path}: {len(chats):,} chats")


def make_tokenizer(cfg: ProcessConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer in out_dir/tokenizer: a copy of the given one, or one trained on the texts' first million lines."""
    folder = Path(cfg.out_dir) / "tokenizer"
    model = cfg.tokenizer or folder / "tokenizer.model"
    if not cfg.tokenizer:
        lines = islice((line for text in texts for line in text.split("\n")), 1_000_000)
        # So often that each becomes one token: a chat names its roles in every turn, and Chinese text has few letters.
        roles = ["user", "assistant", "system"] * 1000
        train_tokenizer(chain(roles, lines), model, cfg.vocab_size, character_coverage=cfg.character_coverage)
    load_tokenizer(model).save(folder)
    tokenizer = load_tokenizer(folder)
    print(f"{folder}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}")
    return tokenizer


def load_model(folder: Path):
    """Any model folder, for the stage `filter`: with torch, so not before that stage asks."""
    from assembly import models

    return models.load_model(folder)


def write_bin(path: Path, texts: list[str], tokenizer: Tokenizer, processes: int) -> None:
    """Tokenize the demo's documents into one bin, each as bos, its ids, eos."""
    with bins.BinWriter(path, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256, DEMO) as out:
        for ids, sizes, text_bytes in tokenizer.encode_chunks(texts, processes, bos=True, eos=True):
            out.add(ids, text_bytes, documents=len(sizes))
    print(f"{path}: {out.documents:,} documents, {out.tokens:,} tokens, {out.text_bytes / out.tokens:.2f} bytes each")


if __name__ == "__main__":
    errors.run(main)

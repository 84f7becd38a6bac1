"""Text in, tokenizer and token bins out.

    python data_process.py                                    # the demo: a public-domain novel and questions on it
    python data_process.py --input book.txt,notes.jsonl       # your own text, with a vocabulary trained on it
    python data_process.py --input corpus.jsonl --tokenizer chatglm2/tokenizer.model

Writes data/tokenizer/, data/train.bin and data/val.bin with their .json; the demo also data/sft_*.jsonl.
A .jsonl file has a document a line, in the field `text_field`; any other file is UTF-8 text, cut as `split` says.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

import tokenizer
from core import config, data, errors, files
from core.errors import UserError
from extras import sanguo
from tokenizer.train import train as train_tokenizer

DEMO = "三国演义"  # the source that the demo's bins name


@dataclass(frozen=True)
class ProcessConfig:
    input: tuple[str, ...] = ()  # files; none: the demo
    out_dir: str = "data"
    tokenizer: str = ""  # a folder or model file to use; "": train one on the text
    vocab_size: int = 4096  # of the trained one
    character_coverage: float = 0.998  # share of the text that gets characters as tokens; the rarest become bytes
    text_field: str = "text"  # of .jsonl
    split: str = "file"  # text files: a document is the whole file, a line, or what stands between blank lines
    val_share: float = 0.01  # documents held out for validation, chosen by the hash of their text
    processes: int = 2  # that tokenize
    overwrite: bool = False  # replace bins that are already in out_dir (the demo replaces its own without asking)

    def __post_init__(self):
        if self.split not in ("file", "line", "blank"):
            raise ValueError(f"split = {self.split!r}, must be file, line or blank")
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share = {self.val_share}, must be between 0 and 1")
        if self.processes < 1 or self.vocab_size < 300:
            raise ValueError("processes must be at least 1, vocab_size at least 300: 256 bytes and some characters")


def main() -> None:
    cfg = config.load(__doc__, {"process": ProcessConfig}, sys.argv[1:]).process
    demo(cfg) if not cfg.input else own_text(cfg)


def demo(cfg: ProcessConfig) -> None:
    """The novel 三国演义: chapters for the bins, chats on its facts for fine-tuning."""
    out = Path(cfg.out_dir)
    if not cfg.overwrite and data.source_of(out / "train.bin") not in ("", DEMO):
        raise UserError(f"{out / 'train.bin'} holds another text", "--overwrite replaces it; or another --out_dir")
    raw, entities = sanguo.read(sanguo.fetch(out / "cache"))
    chapters = [sanguo.clean(chapter) for chapter in raw]
    train, val = sanguo.split(chapters)
    size = sum(len(c.text) for c in chapters)
    print(f"三国演义: {len(train)} chapters to train on, {len(val)} held out, {size:,} characters")
    text = make_tokenizer(cfg, (c.text for c in train))
    write_bin(out / "train.bin", [c.text for c in train], text, cfg.processes, DEMO)
    write_bin(out / "val.bin", [c.text for c in val], text, cfg.processes, DEMO)
    for name, chats in sanguo.chats(chapters, entities).items():
        write_chats(out / f"sft_{name}.jsonl", chats)


def own_text(cfg: ProcessConfig) -> None:
    """The user's files, read anew for the split, the vocabulary and each bin: one file's text in memory at most."""
    out = Path(cfg.out_dir)
    for name in ("train.bin", "val.bin"):
        if (out / name).exists() and not cfg.overwrite:
            raise UserError(f"{out / name} exists", "--overwrite replaces it, --out_dir writes elsewhere")
    hashes = [share_of(text) for text in documents(cfg)]
    if not hashes:
        raise UserError(f"{', '.join(cfg.input)}: no documents", "empty files?")
    # At least one document is held out, however few there are; a lone one is cut.
    border = max(cfg.val_share, min(hashes) * (1 + 1e-9))
    lone = len(hashes) == 1
    text = make_tokenizer(cfg, documents(cfg))
    parts = {"train": lambda t: [t[: len(t) * 95 // 100]] if lone else [t] * (share_of(t) > border),
             "val": lambda t: [t[len(t) * 95 // 100 :]] if lone else [t] * (share_of(t) <= border)}  # fmt: skip
    if lone:
        print("one document: its last 5 % are held out for validation")
    for name, part in parts.items():
        write_bin(out / f"{name}.bin", (p for t in documents(cfg) for p in part(t) if p), text, cfg.processes,
                  ", ".join(cfg.input))  # fmt: skip


def documents(cfg: ProcessConfig) -> Iterator[str]:
    """The texts of all input files; blank ones are passed over."""
    for path in cfg.input:
        if path.endswith(".jsonl"):
            for where, item in data.read_jsonl(path):
                if not isinstance(item.get(cfg.text_field), str):
                    raise UserError(f"{where}: {cfg.text_field} is missing or not text",
                                    f"--text_field; keys here: {', '.join(item)}")  # fmt: skip
                if item[cfg.text_field].strip():
                    yield item[cfg.text_field]
            continue
        try:
            with open(path, encoding="utf-8-sig") as f:
                pieces = f if cfg.split == "line" else f.read().split("\n\n") if cfg.split == "blank" else [f.read()]
                yield from (piece.strip("\n") for piece in pieces if piece.strip())
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 at byte {e.start}", "iconv -f GB18030 -t UTF-8 converts") from None


def share_of(text: str) -> float:
    """A number from 0 to 1 that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / (1 << 56)


def make_tokenizer(cfg: ProcessConfig, texts: Iterator[str]):
    """The tokenizer in data/tokenizer: a copy of the given one, or one trained on the texts' first million lines."""
    folder = Path(cfg.out_dir) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.tokenizer:
        tokenizer.load(cfg.tokenizer).save(folder)
    else:
        model = folder / "tokenizer.model"
        lines = islice((line for text in texts for line in text.split("\n")), 1_000_000)
        # Often enough to become one token each: a chat names its roles in every turn, Chinese text has few letters.
        roles = ["user", "assistant", "system"] * 1000
        train_tokenizer(chain(roles, lines), model, cfg.vocab_size, character_coverage=cfg.character_coverage)
        tokenizer.load(model).save(folder)
    text = tokenizer.load(folder)
    print(f"{folder}: {text.vocab_size} tokens, sha256 {text.sha256[:12]}")
    return text


def write_bin(path: Path, texts, text, processes: int, source: str) -> None:
    """Tokenize documents into one bin, each as bos, its ids, eos."""
    with data.BinWriter(path, text.vocab_size, text.eos_id, text.sha256, source) as out:
        with tqdm(desc=path.name, unit="doc", disable=not sys.stderr.isatty()) as bar:
            for ids, sizes, text_bytes in text.encode_chunks(texts, processes, bos=True, eos=True):
                out.add(ids, text_bytes, documents=len(sizes))
                bar.update(len(sizes))
    print(f"{path}: {out.documents:,} documents, {out.tokens:,} tokens, {out.text_bytes / out.tokens:.2f} bytes each")


def write_chats(path: Path, chats: list[dict]) -> None:
    files.write_text(path, "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats))
    print(f"{path}: {len(chats):,} chats")


if __name__ == "__main__":
    errors.run(main)

"""Text in, tokenizer and token bins out.

    python data_process.py                                    # the demo: a public-domain novel and questions on it
    python data_process.py --input book.txt notes.jsonl       # your own text, with a vocabulary trained on it
    python data_process.py --input corpus.jsonl --tokenizer chatglm2/tokenizer.model
    python data_process.py clean window tokenize --input *.jsonl.gz     # stages in order; without tokenize: JSON lines
    python data_process.py inspect data/train.bin             # what is in a bin or JSONL file; verify checks its hashes

Writes data/tokenizer/, data/train.bin and data/val.bin with their .json (the demo also data/sft_*.jsonl), and what
became of every document: data/accounting.json, data/rejects.jsonl.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path

import tokenizer
from core import bins, config, errors, files
from core.errors import UserError
from extras.corpus import pipeline, readers, sanguo, tokenize
from extras.corpus.account import Doc
from extras.corpus.journal import Journal
from extras.corpus.stages import OF_ITEMS, STAGES
from tokenizer.train import train as train_tokenizer

DEMO = "三国演义"  # the source that the demo's bins name


@dataclass(frozen=True)
class ProcessConfig:
    out_dir: str = "data"
    tokenizer: str = ""  # a folder or model file to use; "": train one on the text
    vocab_size: int = 4096  # of the trained one
    character_coverage: float = 0.998  # share of the text that gets characters as tokens; the rarest become bytes
    val_share: float = 0.01  # documents held out for validation, chosen by the hash of their text
    processes: int = 2  # that read, clean and tokenize
    keep_rejected: bool = False  # rejects.jsonl also says what the rejected documents say
    overwrite: bool = False  # replace what is already in out_dir (the demo replaces its own without asking)

    def __post_init__(self):
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share = {self.val_share}, must be between 0 and 1")
        if self.processes < 1 or self.vocab_size < 300:
            raise ValueError("processes must be at least 1, vocab_size at least 300: 256 bytes and some characters")


RESULTS = {"tokenize": ("train.bin", "val.bin"), "sft": ("chats.jsonl",)}


def main() -> None:
    names, argv = split_words(sys.argv[1:])
    cfg = config.load(__doc__, sections(), argv)
    if names[0] in LOOKS:
        if not cfg.read.input:
            raise UserError(f"{names[0]} needs files", f"python data_process.py {names[0]} data/train.bin")
        LOOKS[names[0]](cfg)
    elif cfg.read.input:
        own_text(cfg, names)
    else:
        demo(cfg.process)


def sections() -> dict[str, type]:
    """Option sections: the command's own, the readers', and one a stage."""
    stages = {name: type(stage.options) for name, stage in STAGES.items() if stage.options}
    return {"process": ProcessConfig, "read": readers.ReadConfig, **stages}


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """Stage names in front of the options -> (names, the rest); none: tokenize. Files behind inspect are its input."""
    words = list(takewhile(lambda word: not word.startswith("-") and not word.endswith(".toml"), argv))
    rest = argv[len(words) :]
    if words and words[0] in LOOKS:
        return words[:1], ["--input", *words[1:], *rest] if words[1:] else rest
    known = [*STAGES, "tokenize"]
    for word in words:
        if word not in known:
            raise UserError(f"{word!r} is not a stage", f"stages are {', '.join(known)}; files stand behind --input")
    if len(set(words)) < len(words) or "tokenize" in words[:-1]:
        raise UserError(f"{' '.join(words)}: each stage once, and tokenize last")
    return words or ["tokenize"], rest


def inspect(cfg) -> None:
    """Explain bins and JSON lines."""
    for path in map(Path, cfg.read.input):
        beside = path.parent / "tokenizer"
        folder = cfg.process.tokenizer or (beside if beside.is_dir() else None)
        print("\n".join(tokenize.inspect(path, tokenizer.load(folder) if folder and path.suffix != ".jsonl" else None)))


def verify(cfg) -> None:
    """Compare bins with their hashes; each is named, and the first damaged one ends it."""
    for path in map(Path, cfg.read.input):
        print(tokenize.verify(path))


LOOKS = {"inspect": inspect, "verify": verify}


def demo(cfg: ProcessConfig) -> None:
    """The novel 三国演义: chapters for the bins, chats on its facts for fine-tuning."""
    out = Path(cfg.out_dir)
    if not cfg.overwrite and bins.source_of(out / "train.bin") not in ("", DEMO):
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


def own_text(cfg, names: list[str]) -> None:
    """The user's files through the stages, into bins or into JSON lines."""
    out = Path(cfg.process.out_dir)
    results = RESULTS.get(names[-1], ("docs.jsonl",))
    for name in results:
        if (out / name).exists() and not cfg.process.overwrite:
            raise UserError(f"{out / name} exists", "--overwrite replaces it, --out_dir writes elsewhere")
        if (out / name).resolve() in [Path(path).resolve() for path in cfg.read.input]:
            raise UserError(f"{out / name} is read and would be written over", "another --out_dir")
    with Journal(out, [names, depends_on(cfg)]) as journal:
        if names[-1] != "tokenize":
            lines = write_lines(out / results[0], cfg, names, journal)
        else:
            text = trained_before(out / "tokenizer", journal) or make_tokenizer(cfg.process, texts_of(cfg, names))
            journal.open("tokenizer").append(text.sha256)
            lines, split = [], tokenize.Split(cfg.process.val_share)
            while not lines:
                try:
                    lines = write_bins(cfg, names, text, split, journal)
                except tokenize.NothingHeldOut as e:
                    split = e.split
    print("\n".join(lines))


def depends_on(cfg) -> list:
    """What the work of an earlier run must share with this one, so that this one may go on from it."""
    options = config.as_dict(cfg)
    for section, name in (
        ("process", "processes"),
        ("process", "overwrite"),
        ("process", "out_dir"),
        ("read", "keep_going"),
    ):
        del options[section][name]
    found = [os.stat(path) if os.path.exists(path) else None for path in cfg.read.input]
    return [options, [entry and [entry.st_size, entry.st_mtime_ns] for entry in found]]


def trained_before(folder: Path, journal: Journal) -> tokenizer.Tokenizer | None:
    """The tokenizer that an earlier run of this command put there, if it is the same still."""
    made = list(journal.open("tokenizer"))
    if made and folder.is_dir() and (text := tokenizer.load(folder)).sha256 == made[-1]:
        return text
    return None


def documents(cfg, names: list[str], books: pipeline.Books, finish=list, records=None) -> Iterator:
    """What `finish` makes of the documents behind the last stage, chunk by chunk."""
    stages = [STAGES[name]._replace(options=getattr(cfg, name, None)) for name in names if name in STAGES]
    blocks = readers.blocks(cfg.read, books.accounts["read"])
    return pipeline.run(blocks, cfg.read, stages, books, finish, cfg.process.processes, names[0] in OF_ITEMS, records)


def open_books(cfg, names: list[str]) -> pipeline.Books:
    return pipeline.Books(Path(cfg.process.out_dir), ["read", *names], cfg.process.keep_rejected)


def texts_of(cfg, names: list[str]) -> Iterator[str]:
    """The texts that the bins will be made of, for a vocabulary."""
    with open_books(cfg, names) as books:
        yield from (doc.text for docs in documents(cfg, names, books) for doc in docs)
        books.check(([*books.accounts])[-2], ", ".join(cfg.read.input))  # the stage in front of tokenize


def write_bins(cfg, names: list[str], text: tokenizer.Tokenizer, split: tokenize.Split, journal: Journal) -> list[str]:
    records = partial(journal.open, f"{text.sha256[:16]}-{split.border!r}-{split.cut}")
    with open_books(cfg, names) as books:
        results = documents(cfg, names, books, tokenize.Tokenize(text, split), records)
        lines = tokenize.write(books.folder, text, split, results, books, ", ".join(cfg.read.input))
    return books.lines() + lines


def write_lines(path: Path, cfg, names: list[str], journal: Journal) -> list[str]:
    """JSON lines: the chats, or {"text", "source"} of each document."""
    finish = chat_lines if names[-1] == "sft" else text_lines
    with open_books(cfg, names) as books:

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", newline="\n") as f:
                for lines in documents(cfg, names, books, finish, partial(journal.open, "lines")):
                    f.writelines(lines)
            books.check(names[-1], ", ".join(cfg.read.input))

        files.replace(path, write)
    return [*books.lines(), f"{path}: {books.accounts[names[-1]].out:,} documents"]


def text_lines(docs: Iterable[Doc]) -> list[str]:
    return [json.dumps({"text": doc.text, "source": doc.where}, ensure_ascii=False) + "\n" for doc in docs]


def chat_lines(docs: Iterable[Doc]) -> list[str]:
    return [doc.text + "\n" for doc in docs]


def make_tokenizer(cfg: ProcessConfig, texts: Iterator[str]):
    """The tokenizer in data/tokenizer: a copy of the given one, or one trained on the texts' first million lines."""
    folder = Path(cfg.out_dir) / "tokenizer"
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


def write_bin(path: Path, texts: Iterable[str], text: tokenizer.Tokenizer, processes: int, source: str) -> None:
    """Tokenize documents into one bin, each as bos, its ids, eos."""
    with bins.BinWriter(path, text.vocab_size, text.eos_id, text.sha256, source) as out:
        for ids, sizes, text_bytes in text.encode_chunks(texts, processes, bos=True, eos=True):
            out.add(ids, text_bytes, documents=len(sizes))
    print(f"{path}: {out.documents:,} documents, {out.tokens:,} tokens, {out.text_bytes / out.tokens:.2f} bytes each")


def write_chats(path: Path, chats: list[dict]) -> None:
    files.write_text(path, "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats))
    print(f"{path}: {len(chats):,} chats")


if __name__ == "__main__":
    errors.run(main)

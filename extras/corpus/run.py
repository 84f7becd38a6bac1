"""The user's own files to bins or to JSON lines, with an account of every document.

In:  files of any usual format. Out: train.bin and val.bin, or chats.jsonl, or docs.jsonl; accounting.json and
     rejects.jsonl, which say what became of every document; for `inspect` and `verify` lines on files.
Does not know how a tokenizer is made or a model loaded: data_process.py hands both in.

The files of this wing, in the order in which a document meets them:

    run.py          the words on the command line; what is written where
    readers.py      files -> documents
    wiki.py         MediaWiki pages -> text
    clean.py        rules on characters and lines, thresholds
    dedup.py        exact and near duplicates
    windows.py      long texts into overlapping windows, short ones joined
    filter.py       what a trained model finds too surprising or too dull; perplexity.py asks the model
    chats.py        question-answer files of many formats -> one chat format
    tokenize.py     documents -> token bins; a look into files
    pipeline.py     stages one after another, in several processes, and the report of a run
    journal.py      what is done so far, so that a killed run goes on
    account.py      documents, stages and their accounts
    sanguo.py       the demo's novel and chats, with the tables in sanguo.toml
"""

import json
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from core import config, files
from core.errors import UserError
from extras.corpus import pipeline, readers, tokenize
from extras.corpus.account import Doc, Stage
from extras.corpus.journal import Journal
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer

# What the command line calls a stage -> where it is declared; its module is imported when it is named.
STAGES: dict[str, str | Stage] = {
    "wiki": "extras.corpus.wiki:STAGE",
    "clean": "extras.corpus.clean:STAGE",
    "dedup": "extras.corpus.dedup:STAGE",
    "filter": "extras.corpus.filter:STAGE",
    "window": "extras.corpus.windows:WINDOW",
    "concat": "extras.corpus.windows:CONCAT",
    "sft": "extras.corpus.chats:STAGE",
}
# The files that a run writes, by its last stage; otherwise docs.jsonl.
RESULTS = {"tokenize": ("train.bin", "val.bin"), "sft": ("chats.jsonl",)}
# Options that change no result.
FREE = (("process", "processes"), ("process", "overwrite"), ("process", "out_dir"), ("read", "keep_going"))

MakeTokenizer = Callable[[object, Iterable[str]], Tokenizer]  # (options of [process], texts) -> it, saved in out_dir
LoadModel = Callable[[Path], object]  # folder -> its model; only the stage filter asks for one


def run(cfg, words: list[str], make_tokenizer: MakeTokenizer, load_model: LoadModel) -> None:
    """Do what the command line asks for.

    Args:
        cfg: the command's options; sections of stages that nobody named are None.
        words: in front of the options: stages in order, or inspect or verify and their files.
        make_tokenizer: where tokenize is the last stage and no tokenizer of an earlier run is there.
        load_model: for the stage filter.

    Raises:
        UserError: no files, words that are no stages, results that exist already, and what stages find.
    """
    # A look at files needs no stages; its files may stand right behind the word.
    given = cfg.read.input if cfg.read else ()
    if words[:1] in (["inspect"], ["verify"]):
        if not (given := given or tuple(words[1:])):
            raise UserError(f"{words[0]} needs files", f"python data_process.py {words[0]} data/train.bin")
        for path in map(Path, given):
            print(tokenize.verify(path) if words[0] == "verify" else inspect(path, cfg.process.tokenizer))
        return

    # Everything else goes through stages.
    names = stage_names(words)
    if not given:
        raise UserError(f"{' '.join(names)} needs files", "--input FILES; without stages and options it makes the demo")
    own_text(cfg, names, make_tokenizer, load_model)


def stage_names(words: list[str]) -> list[str]:
    """The stages that words name; none: tokenize."""
    known = [*STAGES, "tokenize"]
    for word in words:
        if word not in known:
            raise UserError(f"{word!r} is not a stage", f"stages are {', '.join(known)}; files come after --input")
    if len(set(words)) < len(words) or "tokenize" in words[:-1]:
        raise UserError(f"{' '.join(words)}: each stage once, and tokenize last")
    return words or ["tokenize"]


def inspect(path: Path, given: str) -> str:
    """Lines that explain a bin or a JSONL file, with the tokenizer given or the one beside it."""
    beside = path.parent / "tokenizer"
    folder = given or (beside if beside.is_dir() else None)
    tokenizer = load_tokenizer(folder) if folder and path.suffix != ".jsonl" else None
    return "\n".join(tokenize.inspect(path, tokenizer))


def own_text(cfg, names: list[str], make_tokenizer: MakeTokenizer, load_model: LoadModel) -> None:
    """The user's files through the stages, into bins or into JSON lines; arguments as in `run`."""
    # Nothing that exists is replaced without asking, and what is read is never written.
    out = Path(cfg.process.out_dir)
    results = RESULTS.get(names[-1], ("docs.jsonl",))
    for name in results:
        if (out / name).exists() and not cfg.process.overwrite:
            raise UserError(f"{out / name} exists", "--overwrite replaces it, --out_dir writes elsewhere")
        if (out / name).resolve() in [Path(path).resolve() for path in cfg.read.input]:
            raise UserError(f"{out / name} is read and would be written over", "another --out_dir")
    stages = [stage(name, cfg, load_model) for name in names if name in STAGES]
    with Journal(out, [names, depends_on(cfg)]) as journal:
        if names[-1] != "tokenize":
            lines = write_lines(out / results[0], cfg, stages, journal)
        else:
            # The vocabulary first; where it is to be trained, the stages run once for it alone.
            tokenizer = trained_before(out / "tokenizer", journal)
            tokenizer = tokenizer or make_tokenizer(cfg.process, texts_of(cfg, stages))
            journal.open("tokenizer").append(tokenizer.sha256)
            # Very few documents: a second pass holds at least one out, or cuts a lone one.
            lines, split = [], tokenize.Split(cfg.process.val_share)
            while not lines:
                try:
                    lines = write_bins(cfg, stages, tokenizer, split, journal)
                except tokenize.NothingHeldOut as e:
                    split = e.split
    print("\n".join(lines))


def depends_on(cfg) -> list:
    """What the work of an earlier run must share with this one, so that this one may go on from it."""
    options = config.as_dict(cfg)
    for section, name in FREE:
        del options[section][name]
    found = [os.stat(path) if os.path.exists(path) else None for path in cfg.read.input]
    return [options, [entry and [entry.st_size, entry.st_mtime_ns] for entry in found]]


def trained_before(folder: Path, journal: Journal) -> Tokenizer | None:
    """The tokenizer that an earlier run of this command put there, if it is the same still."""
    made = list(journal.open("tokenizer"))
    if made and folder.is_dir() and (tokenizer := load_tokenizer(folder)).sha256 == made[-1]:
        return tokenizer
    return None


def stage(name: str, cfg, load_model: LoadModel) -> Stage:
    """A stage with the options of this run."""
    found = STAGES[name]
    found = pkgutil.resolve_name(found) if isinstance(found, str) else found
    work = partial(found.run, load_model=load_model) if name == "filter" else found.run
    return found._replace(run=work, options=vars(cfg)[name] or found.options)


def documents(cfg, stages: list[Stage], report: pipeline.Report, finish=list, records=None) -> Iterator:
    """What `finish` makes of the documents behind the last stage, chunk by chunk."""
    blocks = readers.blocks(cfg.read, report.accounts["read"])
    return pipeline.run(blocks, cfg.read, stages, report, finish, cfg.process.processes, records)


def open_report(cfg, stages: list[Stage], *last: str) -> pipeline.Report:
    """The report of a run of these stages, beside its results; `last` names what comes behind them."""
    names = ["read", *(stage.name for stage in stages), *last]
    return pipeline.Report(Path(cfg.process.out_dir), names, cfg.process.keep_rejected)


def texts_of(cfg, stages: list[Stage]) -> Iterator[str]:
    """The texts that the bins will be made of, for a vocabulary."""
    with open_report(cfg, stages, "tokenize") as report:
        yield from (doc.text for docs in documents(cfg, stages, report) for doc in docs)
        report.check([*report.accounts][-2], ", ".join(cfg.read.input))  # the stage in front of tokenize


def write_bins(cfg, stages: list[Stage], tokenizer: Tokenizer, split: tokenize.Split, journal: Journal) -> list[str]:
    """Both bins; lines on what became of the documents. `tokenize.NothingHeldOut` where one of them would be empty."""
    records = partial(journal.open, f"{tokenizer.sha256[:16]}-{split.border!r}-{split.cut}")
    with open_report(cfg, stages, "tokenize") as report:
        results = documents(cfg, stages, report, tokenize.Tokenize(tokenizer, split), records)
        lines = tokenize.write(report.folder, tokenizer, split, results, report, ", ".join(cfg.read.input))
    return report.lines() + lines


def write_lines(path: Path, cfg, stages: list[Stage], journal: Journal) -> list[str]:
    """JSON lines: the chats, or {"text", "source"} of each document."""
    last = stages[-1].name
    finish = chat_lines if last == "sft" else text_lines
    with open_report(cfg, stages) as report:

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", newline="\n") as f:
                for lines in documents(cfg, stages, report, finish, partial(journal.open, "lines")):
                    f.writelines(lines)
            report.check(last, ", ".join(cfg.read.input))

        files.replace(path, write)
    return [*report.lines(), f"{path}: {report.accounts[last].out:,} documents"]


def text_lines(docs: Iterable[Doc]) -> list[str]:
    return [json.dumps({"text": doc.text, "source": doc.where}, ensure_ascii=False) + "\n" for doc in docs]


def chat_lines(docs: Iterable[Doc]) -> list[str]:
    return [doc.text + "\n" for doc in docs]

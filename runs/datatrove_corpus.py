"""The corpus chain clean -> dedup -> tokenize on many machines: the same functions, as steps of datatrove pipelines.

    pip install -r requirements-datatrove.txt
    python -m runs.datatrove_corpus --input a.jsonl.gz b.txt --tokenizer data/tokenizer --out_dir data/big --tasks 8
    python -m runs.datatrove_corpus ... --executor slurm --partition cpu --tasks 500 --workers 100

In:  files. Out: train.bin, val.bin, their .json and accounting.json, byte for byte what the single-machine
`python data_process.py clean dedup tokenize` makes of them; rejects.jsonl with the same lines in another order.
Between the steps, in OUT_DIR/steps/data, for the N-th input file:

    1 clean     many tasks   the file -> N.docs (documents, accounts), N.signed (what the index wants of them)
    2 dedup     one task     all N.signed in the order of the files -> N.reasons (why a document goes, or "")
    3 tokenize  many tasks   N.docs, N.reasons -> N.ids
    4 bins      one task     all N.ids in the order of the files -> the bins and the accounts

datatrove marks a finished task and passes over it when the same command comes again.
Run so far: the local executor; Ray's on one machine; Slurm's against stand-ins for its commands, never on a cluster.
Does not know how to read a part of a file: files are what is dealt to the tasks.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from core import config, errors, files
from core.config import Range, Section
from core.errors import UserError
from extras.corpus import clean, dedup, readers, tokenize
from extras.corpus.account import Account, Doc, each
from extras.corpus.journal import Records
from extras.corpus.pipeline import Report, clear_leftovers
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer


@dataclass(frozen=True)
class RunConfig(Section):
    tokenizer: str = ""  # a folder or model file
    out_dir: str = "data"
    # Documents held out for validation, as in data_process.py.
    val_share: Annotated[float, Range(above=0, below=1)] = 0.01
    keep_rejected: bool = False  # likewise
    tasks: Annotated[int, Range(least=1)] = 2  # that the input files are dealt to; a task without a file does nothing
    workers: Annotated[int, Range(least=1)] = 2  # tasks that run at the same time
    # slurm, ray: then all paths are on a file system that the machines share.
    executor: Literal["local", "slurm", "ray"] = "local"
    partition: str = ""  # Slurm's, for the tasks
    time: str = "24:00:00"  # Slurm's limit for a task
    # That Slurm or Ray reserves for a task; dedup's --memory_mb must stay well below it.
    memory_gb: Annotated[int, Range(least=1)] = 4


SECTIONS = {"run": RunConfig, "read": readers.ReadConfig, "clean": clean.CleanConfig, "dedup": dedup.DedupConfig}
# Options that change no result of a task that was done.
FREE = (*(("run", name) for name in ("workers", "executor", "partition", "time", "memory_gb")), ("read", "keep_going"))


def main() -> None:
    cfg = config.load(__doc__, SECTIONS, sys.argv[1:])
    local, chained = cfg.run.executor == "local", executors(cfg)
    prepare(cfg)
    with quiet(steps_folder(cfg) / "datatrove.log") if local else nullcontext():
        for executor in chained:
            executor.run()
            # Ray's only warns of tasks that failed, and the next step's would wait for them for ever.
            if cfg.run.executor == "ray" and executor.get_incomplete_ranks():
                raise UserError("not all tasks were done", f"see {executor.logging_dir.path}/logs")
    print(f"{steps_folder(cfg)}: all steps are " + ("submitted" if cfg.run.executor == "slurm" else "done"))


# ---------------------------------------------------------------- the steps; datatrove calls step(data, task, tasks)


def clean_files(cfg, _, rank: int, world_size: int) -> None:
    for number, path in dealt(cfg, rank, world_size):
        save(cfg, number, "docs", clean_file(cfg, path))
        signed = (dedup.sign(cfg.dedup, [text for text, _ in docs]) for docs, _ in load(cfg, number, "docs"))
        save(cfg, number, "signed", signed)


def mark_duplicates(cfg, _, rank: int, world_size: int) -> None:
    index = dedup.Index(cfg.dedup)
    for number in range(len(cfg.read.input)):
        signed = (dedup.Signed(*arrays) for arrays in load(cfg, number, "signed"))
        save(cfg, number, "reasons", map(index.add, signed))


def encode_files(cfg, _, rank: int, world_size: int) -> None:
    finish = tokenize.Tokenize(tokenizer_of(cfg), tokenize.Split(cfg.run.val_share))
    for number, _ in dealt(cfg, rank, world_size):
        save(cfg, number, "ids", encode_file(cfg, number, finish))


def write_bins(cfg, _, rank: int, world_size: int) -> None:
    tokenizer, numbers = tokenizer_of(cfg), range(len(cfg.read.input))
    split, lines = tokenize.Split(cfg.run.val_share), []
    results = (found for n in numbers for found in load(cfg, n, "ids"))
    while not lines:
        try:
            lines = write(cfg, tokenizer, split, results)
        except tokenize.NothingHeldOut as e:  # there are very few documents: once more, all of them here
            split, finish = e.split, tokenize.Tokenize(tokenizer, e.split)
            results = (found for n in numbers for found in encode_file(cfg, n, finish))
    print("\n".join(lines), flush=True)


STEPS = {"1-clean": clean_files, "2-dedup": mark_duplicates, "3-tokenize": encode_files, "4-bins": write_bins}
IN_ONE_TASK = ("2-dedup", "4-bins")  # these see all files, in their order


def clean_file(cfg, path: str) -> Iterator:
    """(documents, accounts) of each block of a file."""
    unread = Account("read", cfg.run.keep_rejected)  # what never gets into a block
    for block in readers.blocks(replace(cfg.read, input=(path,)), unread):
        read, cleaned = (Account(stage, cfg.run.keep_rejected) for stage in ("read", "clean"))
        docs = list(clean.clean(readers.parse(block, cfg.read, read), cleaned, cfg.clean))
        yield docs, [(account.stage, account.entries()) for account in (read, cleaned)]
    yield [], [("read", unread.entries())]


def encode_file(cfg, number: int, finish: tokenize.Tokenize) -> Iterator:
    """(what `finish` makes of the documents that stay, accounts) of each block of a file."""
    for (docs, accounts), reasons in zip(load(cfg, number, "docs"), load(cfg, number, "reasons"), strict=True):
        account, verdicts = Account("dedup", cfg.run.keep_rejected), iter(reasons)

        def unless_duplicate(doc: Doc, account=account, verdicts=verdicts) -> Iterator[Doc]:
            if reason := next(verdicts):
                account.reject(doc, reason)
            else:
                yield doc

        result = finish(each(map(Doc._make, docs), account, unless_duplicate))
        yield result, [*accounts, ("dedup", account.entries())]


def write(cfg, tokenizer: Tokenizer, split: tokenize.Split, results: Iterator) -> list[str]:
    """The bins and the accounts of all that `encode_file` gave; lines on them."""
    with Report(Path(cfg.run.out_dir), ["read", "clean", "dedup", "tokenize"], cfg.run.keep_rejected) as report:

        def reported() -> Iterator:
            for result, accounts in results:
                for stage, entries in accounts:
                    report.accounts[stage].add(*entries)
                report.write_rejects()
                yield result

        lines = tokenize.write(report.folder, tokenizer, split, reported(), report, ", ".join(cfg.read.input))
    return report.lines() + lines


# ---------------------------------------------------------------- files between the steps


def steps_folder(cfg) -> Path:
    return Path(cfg.run.out_dir) / "steps"


def tokenizer_of(cfg) -> Tokenizer:
    return load_tokenizer(Path(cfg.run.out_dir) / "tokenizer")


def dealt(cfg, rank: int, world_size: int) -> list[tuple[int, str]]:
    """(number, path) of a task's files."""
    return list(enumerate(cfg.read.input))[rank::world_size]


def save(cfg, number: int, kind: str, records: Iterable) -> None:
    """Put records in their place in one step: a task that is killed leaves nothing that looks whole."""

    def write_to(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)  # of a killed process that had the same number
        file = Records(temporary)
        for record in chain(records, [None]):
            file.append(record)

    files.replace(steps_folder(cfg) / "data" / f"{number:05d}.{kind}", write_to)


def load(cfg, number: int, kind: str) -> Iterator:
    """The records that `save` wrote."""
    path = steps_folder(cfg) / "data" / f"{number:05d}.{kind}"
    for record in Records(path):
        if record is None:
            return
        yield record
    raise UserError(f"{path}: damaged", f"delete {steps_folder(cfg)} and begin again")


# ---------------------------------------------------------------- datatrove


def executors(cfg) -> list:
    """One for each step, each behind the one before it."""
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    except ImportError:
        raise UserError("needs the package datatrove", "pip install -r requirements-datatrove.txt") from None
    run, root = cfg.run, Path(__file__).resolve().parents[1]
    # Where a task finds these modules; Slurm hands this environment on.
    os.environ["PYTHONPATH"] = path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    slurm = {"time": run.time, "partition": run.partition, "mem_per_cpu_gb": run.memory_gb}
    slurm["qos"] = ""  # the cluster's own; not each has the one that datatrove asks for
    remote = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    make = {
        "local": LocalPipelineExecutor,
        "slurm": partial(SlurmPipelineExecutor, **slurm),
        "ray": partial(RayPipelineExecutor, mem_per_cpu_gb=run.memory_gb, ray_remote_kwargs=remote),
    }
    chained = []
    for name, step in STEPS.items():
        tasks = 1 if name in IN_ONE_TASK else run.tasks
        chained.append(
            make[run.executor](
                pipeline=[partial(step, cfg)],
                tasks=tasks,
                workers=min(tasks, run.workers),
                depends=chained[-1] if chained else None,
                logging_dir=str(steps_folder(cfg) / name),
            )
        )
    return chained


def prepare(cfg) -> None:
    """Refuse what cannot work, and steps of another run; then put the tokenizer where all tasks find it."""
    run, steps = cfg.run, steps_folder(cfg)
    if not cfg.read.input or not run.tokenizer:
        raise UserError("needs --input FILES and --tokenizer FOLDER", "python data_process.py makes a tokenizer")
    if run.executor != "local" and not all(map(os.path.isabs, [run.out_dir, run.tokenizer, *cfg.read.input])):
        raise UserError("a relative path means something else on another machine", "paths from / on")
    if run.executor == "slurm" and not run.partition:
        raise UserError("Slurm needs --partition NAME", "sinfo lists them")
    tokenizer, options, about = load_tokenizer(run.tokenizer), config.as_dict(cfg), steps / "options.json"
    for section, name in FREE:
        del options[section][name]
    sizes = [os.path.exists(path) and [os.path.getsize(path), os.path.getmtime(path)] for path in cfg.read.input]
    options = json.loads(json.dumps({**options, "files": sizes, "tokenizer": tokenizer.sha256}))
    if about.exists():
        # datatrove goes by the number of a task only, and would take another run's for this one's.
        if json.loads(about.read_text(encoding="utf-8")) != options:
            raise UserError(f"{steps}: steps of other options or files", "delete it, or another --out_dir")
        if run.executor == "local":  # elsewhere, who is alive cannot be known from here
            clear_leftovers(steps / "data")
        return
    for name in ("train.bin", "val.bin"):
        if (path := Path(run.out_dir) / name).exists():
            raise UserError(f"{path} exists", "another --out_dir")
    tokenizer.save(Path(run.out_dir) / "tokenizer")
    (steps / "data").mkdir(parents=True, exist_ok=True)
    files.write_json(about, options)


@contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Send what this process and its children write to stderr into a file: datatrove reports every task there."""
    stderr = os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


if __name__ == "__main__":
    from runs import datatrove_corpus  # a job elsewhere imports the steps by this name: its __main__ is another

    errors.run(datatrove_corpus.main)

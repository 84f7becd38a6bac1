"""How good is a model? Numbers with their error bars, as a JSON file and as Markdown.

    python evaluate.py bpb --model out/pretrain --data data/val.bin                 # bits per byte of a bin or a text
    python evaluate.py ceval --model out/sft --data ceval.zip --output out/ceval.json           # 5-shot
    python evaluate.py mmlu --model out/sft --data mmlu.zip --shots 0 --limit 20    # 20 questions of each subject
    python evaluate.py promptcblue --model out/sft --data dev.json --max_new_tokens 512
    python evaluate.py generation --model out/sft --data data/sft_val.jsonl
    python evaluate.py compare out/sft out/lora --prompts configs/prompts/daily.txt --output out/compare.json

bpb reads a token bin, a JSONL file with "text" in its lines, or any other UTF-8 text as one document. ceval, cmmlu and
mmlu read the official zips, or the folders they unpack to; the answer is the letter that the model finds most likely.
promptcblue and generation ask for texts and score them; compare puts the answers of models and adapters side by side,
and writes an HTML page, too. Texts are greedy unless --temperature says otherwise.

With --output, a killed evaluation goes on where it was: the same command again. docs/evaluation.md says what the
numbers mean.
"""

import hashlib
import pkgutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated

from assembly.inference import InferenceConfig, find_adapter, newest_model, open_generator
from core import config, errors, files, hf_folder
from core.config import Range, Section
from core.errors import UserError
from core.generate import SamplingConfig
from extras.evaluation.report import Progress


@dataclass(frozen=True)
class EvaluateConfig(Section):
    data: str = ""  # what to evaluate on: a file, or a folder that a zip was unpacked into
    shots: Annotated[int, Range(least=0)] = 5  # ceval, cmmlu, mmlu: examples in front of each question
    prompts: tuple[str, ...] = ()  # compare: files of prompts, one a line
    # Only the first so many: questions of a subject or task, documents, rows, prompts; 0: all.
    limit: Annotated[int, Range(least=0)] = 0
    output: str = ""  # where the report goes, a .json, with a .md beside it; "": printed
    batch: Annotated[int, Range(least=1)] = (
        16  # rows that go through the model at once; it changes the last digits only
    )

    def __post_init__(self):
        super().__post_init__()
        if self.output and not self.output.endswith(".json"):
            raise ValueError(f"output = {self.output!r}, must end in .json; the .md comes beside it")


@dataclass(frozen=True)
class GreedyConfig(SamplingConfig):
    """sample.py's options, but the most likely id where nothing else is said: a score should not hang on the draw."""

    temperature: Annotated[float, Range(least=0, most=100)] = 0.0


SECTIONS = {"evaluate": EvaluateConfig, "inference": InferenceConfig, "sampling": GreedyConfig}
# Each is (generator, options, sampling, progress) -> Report, and is imported when it is asked for.
KINDS = {
    "bpb": "extras.evaluation.bits:run",
    "ceval": "extras.evaluation.choices:ceval",
    "cmmlu": "extras.evaluation.choices:cmmlu",
    "mmlu": "extras.evaluation.choices:mmlu",
    "promptcblue": "extras.evaluation.promptcblue:run",
    "generation": "extras.evaluation.generation:run",
    "compare": "extras.evaluation.side_by_side:run",  # takes several generators
}
DRAWN = ("promptcblue", "generation", "compare")  # what [sampling] says matters to these
ADAPTER = "adapter_config.json"  # the file that every folder of an adapter has, PEFT's too


def main() -> None:
    # What is evaluated, of which models, and all that the numbers depend on: an earlier run of the same goes on.
    kind, folders, cfg = read_options(sys.argv[1:])
    asked = [choose_folder(cfg.inference, folder) for folder in folders] or [cfg.inference]
    about, began = identify(kind, asked, cfg), time.perf_counter()
    progress = Progress(cfg.evaluate.output or None, about)

    # Only this kind of evaluation is loaded. A comparison opens its models itself, one at a time in memory.
    evaluate, generators = pkgutil.resolve_name(KINDS[kind]), map(open_generator, asked)
    subject = generators if kind == "compare" else next(generators)
    report = evaluate(subject, cfg.evaluate, cfg.sampling, progress)
    report = replace(report, about=about | report.about | {"seconds": round(time.perf_counter() - began)})

    # The report is printed, or saved; then the journal is not needed any more.
    if not cfg.evaluate.output:
        return print(report.markdown(), end="")
    output = Path(cfg.evaluate.output)
    report.save(output)
    progress.remove()
    print(f"{output}: {report.notes[0]}")


def read_options(words: list[str]):
    """The kind of evaluation, the model folders of a comparison, and all other options."""
    kind, rest = (words[:1] or [""])[0], words[1:]
    if kind in ("-h", "--help"):
        config.load(__doc__, SECTIONS, [kind])  # prints it, and ends the program
    if kind not in KINDS:
        raise UserError(f"{kind or 'nothing'}: no such evaluation", f"python evaluate.py {' or '.join(KINDS)}")
    folders = list(takewhile(lambda word: not word.startswith("--"), rest)) if kind == "compare" else []
    cfg = config.load(__doc__, SECTIONS, rest[len(folders) :])
    if kind == "compare" and not folders:
        raise UserError("compare needs model folders", "python evaluate.py compare out/sft out/lora --prompts FILE")
    if kind != "compare" and not cfg.evaluate.data:
        raise UserError(f"{kind} needs --data", "a file, or a folder")
    return kind, folders, cfg


def choose_folder(cfg: InferenceConfig, folder: str) -> InferenceConfig:
    """The same options for a model, or for an adapter and its base."""
    is_adapter = (Path(folder) / ADAPTER).exists()
    return replace(cfg, adapter=folder, model="") if is_adapter else replace(cfg, model=folder, adapter="")


def identify(kind: str, asked: list[InferenceConfig], cfg) -> dict:
    """All that the numbers depend on: a journal with another is not used."""
    # The models: their weights, tokenizers and adapters.
    found = {"kind": kind}
    for number, one in enumerate(asked, 1):
        base = one.model or (find_adapter(one.adapter)[1] if one.adapter else newest_model())
        folder, end = hf_folder.model_folder(base), f" {number}" * (len(asked) > 1)
        found |= {f"model{end}": str(folder), f"weights{end}": weights_digest(folder)[:16]}
        found |= {f"{path.name}{end}": files.sha256(path)[:16] for path in sorted(folder.glob("tokenizer.*"))}
        if one.adapter:
            found |= {f"adapter{end}": one.adapter, f"adapter files{end}": digest(one.adapter)}
    # The data.
    for name in [cfg.evaluate.data] * bool(cfg.evaluate.data) + list(cfg.evaluate.prompts):
        found |= {name: digest(name)}
    # The options, but not those that say where, not what; batch and device change the last digits only.
    options = asdict(cfg.evaluate) | asdict(cfg.inference)
    for name in ("data", "prompts", "output", "batch", "model", "adapter", "device", "compile", "allow_pickle"):
        del options[name]
    return found | options | (asdict(cfg.sampling) if kind in DRAWN else {})


def digest(path: str | Path) -> str:
    """Of a file's content, or of the names and contents of a folder's files."""
    path = Path(path)
    if path.is_file():
        return files.sha256(path)[:16]
    inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
    if not inside:
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: an empty folder")
    names = [f"{p.relative_to(path).as_posix()} {files.sha256(p)}" for p in inside]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Hash of a folder's weight files."""
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        from extras.families import folders

        paths = folders.weight_files(folder)
    return hashlib.sha256("".join(map(files.sha256, paths)).encode()).hexdigest()


if __name__ == "__main__":
    errors.run(main)

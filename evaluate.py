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
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from assembly.inference import Speaker, SpeakerConfig, newest_model
from core import config, errors, files, hf_folder
from core.errors import UserError
from core.generate import SamplingConfig
from extras.evaluation import bits, choices, generation, promptcblue, side_by_side
from extras.evaluation.report import Progress
from extras.finetune import lora


@dataclass(frozen=True)
class EvaluateConfig:
    data: str = ""  # what to evaluate on: a file, or a folder that a zip was unpacked into
    shots: int = 5  # ceval, cmmlu, mmlu: examples in front of each question
    prompts: tuple[str, ...] = ()  # compare: files of prompts, one a line
    limit: int = 0  # only the first so many: questions of a subject or task, documents, rows, prompts; 0: all
    output: str = ""  # where the report goes, a .json, with a .md beside it; "": printed
    batch: int = 16  # rows that go through the model at once; it changes the last digits only

    def __post_init__(self):
        if self.shots < 0 or self.limit < 0 or self.batch < 1:
            raise ValueError(
                f"shots = {self.shots}, limit = {self.limit}, batch = {self.batch}: "
                "must not be negative, and batch at least 1"
            )
        if self.output and not self.output.endswith(".json"):
            raise ValueError(f"output = {self.output!r}, must end in .json; the .md comes beside it")


@dataclass(frozen=True)
class GreedyConfig(SamplingConfig):
    """sample.py's options, but the most likely id where nothing else is said: a score should not hang on the draw."""

    temperature: float = 0.0


KINDS = {
    "bpb": bits.run,
    "ceval": choices.ceval,
    "cmmlu": choices.cmmlu,
    "mmlu": choices.mmlu,
    "promptcblue": promptcblue.run,
    "generation": generation.run,
    "compare": side_by_side.run,
}
DRAWN = ("promptcblue", "generation", "compare")  # what [sampling] says matters to these


def main() -> None:
    kind, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    sections = {"evaluate": EvaluateConfig, "speaker": SpeakerConfig, "sampling": GreedyConfig}
    if kind in ("-h", "--help"):
        config.load(__doc__, sections, [kind])
    if kind not in KINDS:
        raise UserError(f"{kind or 'nothing'}: no such evaluation", f"python evaluate.py {' or '.join(KINDS)}")
    folders = list(takewhile(lambda word: not word.startswith("--"), argv)) if kind == "compare" else []
    cfg = config.load(__doc__, sections, argv[len(folders) :])
    if kind == "compare" and not folders:
        raise UserError("compare needs model folders", "python evaluate.py compare out/sft out/lora --prompts FILE")
    if kind != "compare" and not cfg.evaluate.data:
        raise UserError(f"{kind} needs --data", "a file, or a folder")
    asked = [of_folder(cfg.speaker, folder) for folder in folders] or [cfg.speaker]
    about = identity(kind, asked, cfg)
    progress, began = Progress(cfg.evaluate.output or None, about), time.perf_counter()
    speakers = map(Speaker, asked)  # one at a time in memory
    report = KINDS[kind](speakers if folders else next(speakers), cfg.evaluate, cfg.sampling, progress)
    report.about = about | report.about | {"seconds": round(time.perf_counter() - began)}
    if not cfg.evaluate.output:
        print(report.markdown(), end="")
        return
    output = Path(cfg.evaluate.output)
    report.save(output)
    if kind == "compare":
        files.write_text(output.with_suffix(".html"), side_by_side.page(report))
    progress.remove()
    print(f"{output}: {report.notes[0]}")


def of_folder(cfg: SpeakerConfig, folder: str) -> SpeakerConfig:
    """The same options for a model, or for an adapter and its base."""
    is_adapter = (Path(folder) / lora.CONFIG).exists()
    return replace(cfg, adapter=folder, model="") if is_adapter else replace(cfg, model=folder, adapter="")


def identity(kind: str, asked: list[SpeakerConfig], cfg) -> dict:
    """All that the numbers depend on: a journal with another is not used."""
    found = {"kind": kind}
    for number, one in enumerate(asked, 1):
        base = one.model or (lora.base_of(one.adapter) if one.adapter else newest_model())
        folder, end = hf_folder.model_folder(base), f" {number}" * (len(asked) > 1)
        found |= {f"model{end}": str(folder), f"weights{end}": hf_folder.weights_digest(folder)[:16]}
        found |= {f"{path.name}{end}": files.sha256(path)[:16] for path in sorted(folder.glob("tokenizer.*"))}
        if one.adapter:
            found |= {f"adapter{end}": one.adapter, f"adapter files{end}": digest(one.adapter)}
    for name in [cfg.evaluate.data] * bool(cfg.evaluate.data) + list(cfg.evaluate.prompts):
        found |= {name: digest(name)}
    options = asdict(cfg.evaluate) | asdict(cfg.speaker)
    # These say where, not what; batch and device change the last digits only.
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


if __name__ == "__main__":
    errors.run(main)

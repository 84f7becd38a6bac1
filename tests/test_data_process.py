"""The text side of the chain: what of a user's file lands in which bin."""

import json
import subprocess
import sys

import numpy as np
import pytest

import data_process
from core import config
from core.errors import UserError
from extras.corpus import run as corpus_run
from tokenizer import load


def run(folder, **options):
    options = {"out_dir": folder / "data", "processes": 1, "character_coverage": 1.0, **options}
    flags = [f"--{key}={','.join(value) if isinstance(value, tuple) else value}" for key, value in options.items()]
    cfg = config.load("", data_process.SECTIONS, flags)
    corpus_run.own_text(cfg, ["tokenize"], data_process.make_tokenizer, data_process.load_model)


def process(folder, **options):
    run(folder, **{"vocab_size": 320, **options})
    tokenizer = load(folder / "data/tokenizer")
    docs = {}
    for name in ("train", "val"):
        ids = np.fromfile(folder / f"data/{name}.bin", np.uint16).tolist()
        docs[name] = []
        while ids:
            assert ids[0] == tokenizer.bos_id
            end = ids.index(tokenizer.eos_id)
            docs[name].append(tokenizer.decode(ids[1:end]))
            ids = ids[end + 1 :]
    return docs


TEXTS = [f"第{n}篇：天地玄黄，宇宙洪荒。{n * n}" for n in range(200)]


def test_every_document_lands_once_in_train_or_val_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:100]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[100:]) + "\n\n", encoding="utf-8")
    docs = process(tmp_path, input=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")), split="line", val_share=0.1)
    assert sorted(docs["train"] + docs["val"]) == sorted(TEXTS)
    assert docs["train"] == [t for t in TEXTS if t in set(docs["train"])]
    assert 5 <= len(docs["val"]) <= 40


def test_a_few_documents_still_leave_one_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS[:5]), encoding="utf-8")
    docs = process(tmp_path, input=(str(tmp_path / "a.txt"),), split="blank")
    assert len(docs["val"]) == 1 and len(docs["train"]) == 4


def test_a_lone_document_is_cut_and_nothing_of_it_lost(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS), encoding="utf-8")
    docs = process(tmp_path, input=(str(tmp_path / "a.txt"),))
    assert docs["train"][0] + docs["val"][0] == "".join(TEXTS) and len(docs["train"]) == len(docs["val"]) == 1


def test_bins_know_the_bytes_of_their_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    process(tmp_path, input=(str(tmp_path / "a.txt"),), split="line")
    about = [json.loads((tmp_path / f"data/{n}.json").read_text()) for n in ("train", "val")]
    assert sum(a["text_bytes"] for a in about) == sum(len(t.encode()) for t in TEXTS)
    assert sum(a["documents"] for a in about) == len(TEXTS)


def test_one_and_two_processes_write_the_same_bins(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    process(tmp_path, input=(str(tmp_path / "a.txt"),), split="line")
    one = (tmp_path / "data/train.bin").read_bytes()
    run(
        tmp_path,
        input=(str(tmp_path / "a.txt"),),
        tokenizer=tmp_path / "data/tokenizer",
        split="line",
        processes=2,
        overwrite=True,
    )
    assert (tmp_path / "data/train.bin").read_bytes() == one


def test_existing_bins_and_empty_input_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="no documents"):
        process(tmp_path, input=(str(tmp_path / "empty.txt"),))
    process(tmp_path, input=(str(tmp_path / "a.txt"),))
    with pytest.raises(UserError, match="exists -- --overwrite"):
        process(tmp_path, input=(str(tmp_path / "a.txt"),))
    (tmp_path / "bad.jsonl").write_text('{"content": "x"}\n{"content": "y"}\n')
    with pytest.raises(UserError, match=r"no field text; there is content \(first: .*bad\.jsonl:1\)"):
        process(tmp_path, input=(str(tmp_path / "bad.jsonl"),), overwrite=True)


LOADED = """
import sys
import data_process
from core import errors

try:
    errors.run(data_process.main)
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def modules_after(root, folder, *words) -> set[str]:
    """What a process has loaded when the command has ended without an error."""
    env = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("name", ["small.txt", "small.jsonl"])
def test_no_torch_is_loaded_for_texts_and_looks(root, tmp_path, name):
    lines = [json.dumps({"text": t}) for t in TEXTS] if name.endswith("l") else TEXTS
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    options = ("--input", name, "--vocab_size", "320", "--character_coverage", "1", "--processes", "1")
    for words in (
        options,
        ("clean", "dedup", "window", "concat", *options, "--out_dir", "lines"),
        ("inspect", "data/train.bin", "lines/docs.jsonl"),
        ("verify", "data/train.bin"),
        ("--help",),
    ):
        assert "torch" not in modules_after(root, tmp_path, *words), words


def test_a_stage_is_imported_when_it_is_named(root, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "a.toml").write_text('[read]\ninput = ["a.txt"]\nsplit = "line"\n', encoding="utf-8")
    found = modules_after(root, tmp_path, "clean", "a.toml", "--processes", "1")
    stages = {f"extras.corpus.{name}" for name in ("clean", "dedup", "filter", "windows", "chats", "perplexity")}
    assert found & stages == {"extras.corpus.clean"}


def test_the_command_itself_imports_the_demo_only(root, tmp_path):
    script = "import sys, data_process; print(*sys.modules)"
    env = {"PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    found = set(done.stdout.split())
    assert "torch" not in found and {n for n in found if n.startswith("extras.corpus.")} == {"extras.corpus.sanguo"}


@pytest.mark.parametrize("words", [["clean"], ["clean", "tokenize"], ["--split", "line"]])
def test_stages_or_options_of_files_without_files_are_refused(tmp_path, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["data_process.py", *words, "--out_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="needs files -- --input FILES"):
        data_process.main()
    assert not (tmp_path / "out").exists()

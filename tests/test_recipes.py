"""Promises of `runs/*.sh`: they are whole, say how they are used, and go from files to answers."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


def run(*words, env=None, cwd=ROOT):
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | (
        env or {}
    )  # this environment's python
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_recipe_is_bash_and_without_files_says_how_it_is_used(script, tmp_path):
    assert run("-n", script).returncode == 0
    for words in ([], [tmp_path / "out"], [tmp_path / "out", "--texts", "a.txt"], [tmp_path / "out", "a.txt"]):
        done = run(script, *words)
        assert done.returncode != 0 and "usage: bash runs/" in done.stderr and len(done.stderr.splitlines()) == 1
    head = script.read_text().split("\nset -eu")[0]
    assert all(f"{word}:" in head for word in ("Purpose", "Hardware", "Time", "Data"))


@pytest.mark.heavy
def test_the_medical_recipe_goes_from_files_to_answers_and_goes_on_where_it_was(tmp_path):
    places = ["头", "胃", "腰", "手", "脚", "眼"]
    rng = random.Random(0)  # a text that says the same again and again would be cleaned away
    words = ["".join(rng.sample("头胃腰手脚眼痛多因劳累宜静养日饮水忌辛辣热寒风湿气血", 3)) for _ in range(300)]
    text = "".join("，".join(rng.choices(words, k=9)) + "。\n" for _ in range(600))
    (tmp_path / "a book.txt").write_text(text)
    chats = [
        {"instruction": f"{a}痛{n}天怎么办？", "input": "", "output": f"您好，{a}痛请静养{n}日。"}
        for n in range(60)
        for a in places
    ]
    chats += chats[:100]  # the same again: on the same side
    (tmp_path / "chats.json").write_text(json.dumps(chats, ensure_ascii=False))
    words = [ROOT / "runs/medical.sh", "out", "--texts", "a book.txt", "--chats", "chats.json"]
    env = {"STEPS": "3", "SFT_STEPS": "3", "VOCAB": "360", "OMP_NUM_THREADS": "1"}
    done = run(*words, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("？") >= 5 and "no medical advice" in done.stdout
    lines = [(tmp_path / f"out/chats/{name}.jsonl").read_text().splitlines() for name in ("chats", "train", "val")]
    assert sorted(lines[1] + lines[2]) == sorted(lines[0]) and 7 <= len(lines[2]) < 20
    asked = [{json.loads(line)["messages"][0]["content"] for line in part} for part in lines[1:]]
    assert not asked[0] & asked[1]
    weights = tmp_path / "out/base/checkpoint-3/model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(*words, env=env | {"SFT_STEPS": "4"}, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert weights.stat().st_mtime_ns == before and "resumed from out/chat/checkpoint-3" in again.stdout + again.stderr
    other = run(*words[:-1], "a book.txt", env=env, cwd=tmp_path)
    assert other.returncode == 2 and "made of other files" in other.stderr

"""Promises of runs/datatrove_corpus.py: what many tasks make equals what the single-machine command makes."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import data_process
from core import config
from core.errors import UserError
from extras.corpus import readers, run
from extras.corpus.journal import Records
from runs import datatrove_corpus

pytest.importorskip("datatrove", reason="pip install -r requirements-datatrove.txt")

STAGES = ["clean", "dedup", "tokenize"]
BINS = ("train.bin", "val.bin", "train.json", "val.json", "accounting.json")
OPTIONS = ["--keep_going", "--split", "blank", "--val_share", "0.1", "--keep_rejected"]


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏。，") for _ in range(rng.randint(80, 200)))
        for _ in range(count)
    ]


def edited(text: str) -> str:
    return text[:40] + "改" + text[41:]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Four files: exact and near copies across them and within one; rejects of every stage; one that is cut short."""
    folder, (a, b, c) = tmp_path_factory.mktemp("corpus"), (texts(seed, 60) for seed in (1, 2, 3))
    b[10], b[20], b[30], b[31] = a[5], edited(a[6]), "太短", "★☆※◆◇" * 20
    c[0], c[1], c[2], c[3], c[4] = a[7], edited(b[40]), b[41], edited(c[50]), "加微信：weixin12345 " + c[4]
    paths = [folder / name for name in ("a.jsonl.gz", "b.jsonl", "c.txt", "cut.jsonl.gz")]
    lines, more = ([json.dumps({"text": text}) for text in part] for part in (a, texts(4, 9)))
    paths[0].write_bytes(gzip.compress("\n".join([*lines, "no JSON"]).encode()))
    paths[1].write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in b), encoding="utf-8")
    paths[2].write_text("\n\n".join(c), encoding="utf-8")
    paths[3].write_bytes(gzip.compress("\n".join(more).encode())[:-200])
    return [str(path) for path in paths]


def single(paths: list[str], text, out: Path, options: list[str]) -> Path:
    argv = ["--input", *paths, "--tokenizer", str(text.path), "--out_dir", str(out), "--processes", "1", *options]
    run.own_text(
        config.load("", data_process.SECTIONS, argv), STAGES, data_process.make_tokenizer, data_process.load_model
    )
    return out


@pytest.fixture(scope="module")
def expected(corpus, small, tmp_path_factory) -> Path:
    return single(corpus, small, tmp_path_factory.mktemp("single"), OPTIONS)


@pytest.fixture
def many(corpus, small, tmp_path, monkeypatch):
    """Run the program in this process, its tasks one after another -> where its bins are."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # put back afterwards: the program sets it

    def run(*options: str, paths=corpus, out=tmp_path / "many", common=OPTIONS) -> Path:
        argv = ["--input", *paths, "--tokenizer", str(small.path), "--out_dir", str(out), "--workers", "1", *common]
        monkeypatch.setattr(sys, "argv", ["", *argv, *options])
        datatrove_corpus.main()
        return out

    return run


def assert_equal(found: Path, expected: Path) -> None:
    for name in BINS:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    lines = [(folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines() for folder in (found, expected)]
    assert sorted(lines[0]) == sorted(lines[1])
    assert sorted(p.name for p in (found / "tokenizer").iterdir()) == sorted(
        p.name for p in (expected / "tokenizer").iterdir()
    )


def test_the_corpus_meets_every_case(expected):
    read, clean, dedup, tokenize = json.loads((expected / "accounting.json").read_text(encoding="utf-8"))
    assert len(read["rejected"]) == 2 and len(clean["rejected"]) == 2 and clean["changed"]["contact"] == 1
    assert dedup["rejected"] == {"exact duplicate": 3, "near duplicate": 3} and tokenize["kept"] > 150
    assert len(json.loads((expected / "val.json").read_text(encoding="utf-8"))["sources"]) >= 3


@pytest.mark.parametrize("tasks", ["1", "3", "6"])
def test_any_number_of_tasks_gives_the_bytes_of_the_single_machine_command(many, expected, tasks, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)  # several blocks a file
    assert_equal(many("--tasks", tasks), expected)


@pytest.mark.parametrize("count", [1, 3])
def test_so_do_the_few_documents_of_which_none_would_be_held_out(many, small, tmp_path, count):
    (tmp_path / "few.txt").write_text("\n\n".join(texts(9, count)), encoding="utf-8")
    options = {"paths": [str(tmp_path / "few.txt")], "common": ["--split", "blank"]}
    assert_equal(many(**options), single(options["paths"], small, tmp_path / "single", options["common"]))


@pytest.mark.heavy
def test_the_bare_command_runs_tasks_in_processes_and_says_nothing_but_the_accounts(
    corpus, small, tmp_path, expected, root
):
    command = [sys.executable, "-m", "runs.datatrove_corpus", "--tasks", "3", "--out_dir", str(tmp_path / "out")]
    command += ["--input", *corpus, "--tokenizer", str(small.path), *OPTIONS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    dedup = json.loads((expected / "accounting.json").read_text(encoding="utf-8"))[2]
    assert f"dedup: {dedup['in']} in, {dedup['kept']} kept" in done.stdout and "datatrove" not in done.stdout
    assert_equal(tmp_path / "out", expected)


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "steps/data").iterdir()}


@pytest.mark.parametrize(
    "step, redone",
    [
        ("1-clean", {"00000.docs", "00000.signed", "00003.docs", "00003.signed"}),
        ("2-dedup", {f"0000{number}.reasons" for number in range(4)}),
        ("3-tokenize", {"00000.ids", "00003.ids"}),
        ("4-bins", set()),
    ],
)
def test_a_task_whose_mark_is_gone_is_done_again_alone_and_gives_the_same(many, expected, step, redone):
    out = many("--tasks", "3")
    before = written(out)
    (out / "steps" / step / "completions/00000").unlink()
    if step == "4-bins":
        (out / "train.bin").unlink()
    assert_equal(many("--tasks", "3"), expected)
    assert {name for name, time in written(out).items() if time != before[name]} == redone


def test_a_finished_run_does_nothing_when_it_is_started_again(many, expected):
    out = many()
    before = written(out), (out / "train.bin").stat().st_mtime_ns
    assert_equal(many(), expected)
    assert (written(out), (out / "train.bin").stat().st_mtime_ns) == before


@pytest.mark.parametrize("step, at", [("1-clean", 2), ("2-dedup", 0), ("3-tokenize", 1), ("4-bins", 0)])
def test_a_run_killed_in_any_step_goes_on_from_its_finished_tasks(many, expected, tmp_path, monkeypatch, step, at):
    whole = datatrove_corpus.STEPS[step]

    def killed(cfg, data, rank, world_size):
        if rank == at:
            raise KeyboardInterrupt
        whole(cfg, data, rank, world_size)

    with monkeypatch.context() as patch:
        patch.setitem(datatrove_corpus.STEPS, step, killed)
        with pytest.raises(KeyboardInterrupt):
            many("--tasks", "3")
    before = written(tmp_path / "many")
    assert bool(before) and not (tmp_path / "many/train.bin").exists()
    assert_equal(many("--tasks", "3"), expected)
    assert before.items() <= written(tmp_path / "many").items()


def test_a_kill_within_a_file_leaves_nothing_that_looks_whole(many, expected, tmp_path, monkeypatch):
    real = datatrove_corpus.clean_file

    def half(cfg, path):
        yield from [next(real(cfg, path))]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datatrove_corpus, "clean_file", half)
        with pytest.raises(KeyboardInterrupt):
            many()
    assert not written(tmp_path / "many")
    # What a process that could not even clean up left, whose number this one has.
    stale = tmp_path / f"many/steps/data/.tmp-{os.getpid()}-00000.docs"
    Records(stale).append([[["left over", "a:1"]], []])
    assert_equal(many(), expected)


def test_steps_of_other_options_or_files_are_not_mixed_in(many, corpus, tmp_path):
    out = many()
    many("--workers", "2")  # changes no result
    for options in (["--tasks", "3"], ["--threshold", "0.5"], ["--min_chars", "50"], ["--val_share", "0.2"]):
        with pytest.raises(UserError, match="steps of other options or files"):
            many(*options)
    path = tmp_path / "new.txt"
    path.write_text("\n\n".join(texts(4, 20)), encoding="utf-8")
    many(paths=[str(path)], out=tmp_path / "other")
    path.write_text("\n\n".join(texts(5, 20)), encoding="utf-8")
    with pytest.raises(UserError, match="steps of other options or files"):
        many(paths=[str(path)], out=tmp_path / "other")
    for left in out.glob("steps/*.json"):
        left.unlink()
    with pytest.raises(UserError, match=r"train.bin exists"):
        many()


@pytest.mark.parametrize("kind, step", [("docs", "3-tokenize"), ("signed", "2-dedup"), ("ids", "4-bins")])
def test_a_part_that_was_cut_short_is_refused(many, kind, step):
    out = many()
    path = out / "steps/data" / f"00001.{kind}"
    path.write_bytes(path.read_bytes()[:-20])
    for mark in (out / "steps" / step / "completions").iterdir():
        mark.unlink()
    with pytest.raises(UserError, match=rf"00001.{kind}: damaged"):
        many()


def test_a_missing_file_ends_the_run_with_its_name(many, corpus):
    with pytest.raises(UserError, match=r"gone.txt: No such file"):
        many("--keep_going=false", paths=[*corpus[:2], "gone.txt"])


def test_what_cannot_work_is_refused_before_anything_is_written(many, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="relative path"):
        many("--executor", "slurm", "--partition", "cpu", paths=["a.txt"])
    with pytest.raises(UserError, match="--partition"):
        many("--executor", "slurm")
    with pytest.raises(UserError, match="executor = 'dask'"):
        many("--executor", "dask")
    with pytest.raises(UserError, match="--tokenizer"):
        many("--tokenizer", "")
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-datatrove.txt"):
        many()
    assert not (tmp_path / "many").exists()


SBATCH = """#!/bin/bash
for word in "$@"; do script=$word; done  # the last word
grep -q merge_stats "$script" || for task in $(seq 0 $(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" >> "$0.log" 2>&1 || exit 1
done
echo "$@" >> "$0.calls"
echo Submitted batch job 17
"""


@pytest.mark.heavy
@pytest.mark.skipif(os.name == "nt", reason="no bash")
def test_slurm_gets_jobs_that_find_these_modules(corpus, small, tmp_path, expected, root):
    stand_ins = {"sbatch": SBATCH, "srun": '#!/bin/bash\nexec "${@:4}"\n', "scontrol": "#!/bin/bash\necho here\n"}
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-m", "runs.datatrove_corpus", "--executor", "slurm", "--partition", "cpu"]
    command += ["--input", *corpus, "--tokenizer", str(small.path), "--out_dir", str(tmp_path / "out"), *OPTIONS]
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "sbatch.log").read_text()
    steps = [line for line in (tmp_path / "sbatch.calls").read_text().splitlines() if "RUN_OFFSET" in line]
    assert ["afterok:17" in line for line in steps] == [False, True, True, True]
    assert_equal(tmp_path / "out", expected)

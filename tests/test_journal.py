"""Promises of a corpus run that is stopped: the same command goes on behind what was done, and gives the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_corpus import load_config

import data_process
from core import files
from core.errors import UserError
from extras.corpus import pipeline, readers, windows
from extras.corpus import run as corpus_run
from extras.corpus.journal import Journal, Records

ROOT = Path(__file__).resolve().parents[1]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=8,
)
ARRAY = st.sampled_from([np.arange(0), np.arange(6, dtype=np.uint16), np.ones((2, 3), np.uint32), np.zeros((1, 0, 2))])


def alike(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    return len(a) == len(b) and all(map(alike, a, b)) if isinstance(a, list) else a == b


@given(st.lists(st.lists(PLAIN | ARRAY), max_size=4), st.data())
def test_records_come_back_as_they_were_and_a_torn_one_ends_them(tmp_path_factory, values, data):
    path = tmp_path_factory.mktemp("records") / "0"
    ends = [0]
    for value in values:
        records = Records(path)
        assert len(list(records)) == len(ends) - 1
        records.append(value)
        ends.append(path.stat().st_size)
    assert alike(list(Records(path)), values)
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = sum(end <= cut for end in ends) - 1
    records = Records(path)
    assert alike(list(records), values[:whole]) and path.stat().st_size == ends[whole]
    records.append(["behind it"])
    assert alike(list(Records(path)), [*values[:whole], ["behind it"]])


def test_a_damaged_record_and_what_stands_behind_it_is_not_used(tmp_path):
    records = Records(tmp_path / "0")
    for n in range(3):
        records.append({"text": f"第{n}"})
    raw = (tmp_path / "0").read_bytes()
    for at in range(len(raw)):
        (tmp_path / "0").write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        found = list(Records(tmp_path / "0"))
        assert found == [{"text": f"第{n}"} for n in range(len(found))] and len(found) <= 3 * at // len(raw)
    (tmp_path / "0").write_bytes(raw + bytes(100))  # as after a power cut
    assert len(list(Records(tmp_path / "0"))) == 3


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """40 blocks."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 300)
    monkeypatch.setattr(pipeline, "CHUNK_CHARS", 400)
    path = tmp_path / "corpus.jsonl"
    texts = [f"第{n % 90}行，共有{n % 90}的平方{(n % 90) ** 2}，文字足够长了，可以留下来。" for n in range(120)]
    path.write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts) + "{bad\n", encoding="utf-8"
    )
    return path


def run(folder, words, corpus, *flags):
    cfg = load_config([f"--out_dir={folder}", f"--input={corpus}", "--vocab_size=320", *flags])
    corpus_run.own_text(cfg, words, data_process.make_tokenizer, data_process.load_model)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


class Stopped(BaseException):
    pass


def count_work(monkeypatch, stop_after=None):
    """Counts the chunks that are worked on, and stops the run after so many."""
    done = []
    work = pipeline._do

    def counted(*args):
        if len(done) == stop_after:
            raise Stopped
        done.append(work(*args))
        return done[-1]

    monkeypatch.setattr(pipeline, "_do", counted)
    return done


@pytest.mark.parametrize(
    "words",
    [
        ["clean", "tokenize"],
        ["clean", "dedup", "window", "tokenize"],
        ["dedup"],
        ["window", "concat", "dedup", "clean"],
    ],
)
@pytest.mark.parametrize("stop_after", [1, 17, 30])
def test_the_same_command_does_only_what_is_left(tmp_path, corpus, monkeypatch, words, stop_after, capsys):
    with monkeypatch.context() as m:
        done = count_work(m)
        run(tmp_path / "whole", words, corpus, "--processes=1")
        total = len(done)
    for folder in ("whole", "out"):  # with a vocabulary that is there already: no pass over the text to make one
        flags = (
            ["--processes=1", f"--tokenizer={tmp_path / 'whole/tokenizer'}"]
            if "tokenize" in words
            else ["--processes=1"]
        )
        if folder == "whole":
            with monkeypatch.context() as m:
                done = count_work(m)
                run(tmp_path / "whole", words, corpus, "--overwrite", *flags)
                total = len(done)
            continue
        with monkeypatch.context() as m:
            count_work(m, stop_after)
            with pytest.raises(Stopped):
                run(tmp_path / folder, words, corpus, *flags)
        assert not list((tmp_path / folder).glob("*.bin")) and not (tmp_path / folder / "docs.jsonl").exists()
        with monkeypatch.context() as m:
            done = count_work(m)
            capsys.readouterr()
            run(tmp_path / folder, words, corpus, *flags)
        assert len(done) == total - stop_after
        assert "are those of an earlier run" in capsys.readouterr().out
    wanted = contents(tmp_path / "whole")
    assert contents(tmp_path / "out") == wanted
    assert not list((tmp_path / "out").glob(".journal-*"))


def test_a_trained_vocabulary_is_not_trained_again(tmp_path, corpus, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(corpus_run, "write_bins", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(tmp_path / "out", ["tokenize"], corpus)
    monkeypatch.setattr(data_process, "train_tokenizer", None)  # nobody calls it
    run(tmp_path / "out", ["tokenize"], corpus)
    assert (tmp_path / "out/train.bin").exists()


@pytest.mark.parametrize("change", ["option", "file", "stages"])
def test_work_for_other_options_or_files_is_not_used_and_removed_with_a_word(
    tmp_path, corpus, monkeypatch, change, capsys
):
    flags, words = ["--processes=1"], ["clean"]
    with monkeypatch.context() as m:
        count_work(m, 10)
        with pytest.raises(Stopped):
            run(tmp_path / "out", words, corpus, *flags)
    (left,) = (tmp_path / "out").glob(".journal-*")
    if change == "option":
        flags.append("--min_chars=30")
    elif change == "stages":
        words = ["clean", "window"]
    else:
        os.utime(corpus, ns=(1, 1))
    run(tmp_path / "out", words, corpus, *flags)
    assert (
        f"{left}: removed; another command, or this one on other files, had left it" in capsys.readouterr().out
        and not left.exists()
    )
    run(tmp_path / "fresh", words, corpus, *flags)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_stage_that_works_here_is_not_repeated_either(tmp_path, corpus, monkeypatch):
    seen = []

    def slow(docs, account, options):
        for doc in docs:
            seen.append(doc.where)
            if len(seen) == 50:
                raise Stopped
            account.seen, account.kept, account.out = account.seen + 1, account.kept + 1, account.out + 1
            yield doc

    monkeypatch.setitem(corpus_run.STAGES, "window", pipeline.Stage("window", slow, windows.WindowConfig(), "here"))
    with pytest.raises(Stopped):
        run(tmp_path / "out", ["clean", "window"], corpus)
    run(tmp_path / "out", ["clean", "window"], corpus)
    assert len(set(seen)) == 120 and len(seen) < 125  # but for the documents of the chunk where it stopped


def test_two_commands_in_one_folder_are_refused(tmp_path, corpus):
    with Journal(tmp_path / "out", "a"):
        with pytest.raises(UserError, match=r"in use by process \d+"):
            run(tmp_path / "out", ["clean"], corpus)
    run(tmp_path / "out", ["clean"], corpus)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = (
        "import sys, time\nfrom tokenizer.parallel import map_in_order\nimport os\n"
        "def work(shared, chunk):\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    pids = map_in_order(work, None, iter(range(100)), 2)\n"
        "    print(*{next(pids) for _ in range(50)}, flush=True)\n    time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    workers = list(map(int, parent.stdout.readline().split()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def running(pid):
        try:
            return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except FileNotFoundError:
            return False

    if not Path("/proc").is_dir():
        pytest.skip("no /proc to ask")
    end = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert workers and not any(map(running, workers))


def test_a_lock_goes_with_its_process_though_its_children_live_on(tmp_path):
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom core import files\n"
        "lock = files.lock(Path(sys.argv[1]))\nthere, here = os.pipe()\nchild = os.fork()\n"
        "if not child:\n    os.write(here, b'I live')\n    time.sleep(30)\n    os._exit(0)\nos.read(there, 1)\n"
        "print(child, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(done.stdout.readline())
    done.wait()
    try:
        files.lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)

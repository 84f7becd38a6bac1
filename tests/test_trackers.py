"""A tracker gets the numbers of metrics.jsonl, and whatever becomes of it the run goes on."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import UserError
from extras.tracking import trackers
from extras.tracking.trackers import TrackConfig, open_tracker

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [
    {"step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": None, "targets": 90, "seconds": 0.25},
    {"step": 1, "val_loss": 2.0, "val_bits_per_byte": 1.5, "val_loss_by_source": {"a.jsonl": 1.0, "b.jsonl": None}},
    {"step": 2, "loss": float("nan"), "lr": 2e-3, "grad_norm": 0.5, "targets": 80, "seconds": 0.5},
]
SENT = [
    (1, {"loss": 2.5, "lr": 1e-3, "targets": 90, "seconds": 0.25}),
    (1, {"val_loss": 2.0, "val_bits_per_byte": 1.5, "val_loss_by_source/a.jsonl": 1.0}),
    (2, {"lr": 2e-3, "grad_norm": 0.5, "targets": 80, "seconds": 0.5}),
]


class Fake:
    """Stands in for swanlab, wandb and trackio: keeps what it is told; `log` and `init` may do something else."""

    def __init__(self, log=None, init=None):
        self.inits, self.sent, self.threads, self.finished = [], [], [], 0
        self._log, self._init = log, init

    def Settings(self, **values):
        return SimpleNamespace(**values, base_url="https://tracker.example", finish_timeout=0.0)

    def init(self, **values):
        self.inits.append(values)
        if self._init:
            self._init()
        return self

    def log(self, numbers, step):
        self.threads.append(threading.current_thread())
        if self._log:
            self._log()
        self.sent.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
        "NETRC",
        "SWANLAB_MODE",
        "SWANLAB_API_KEY",
        "SWANLAB_ROOT",
        "SWANLAB_SAVE_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # HOME of Windows
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, tracker: str, fake, records=RECORDS, folder="run", options=None, **config) -> list[str]:
    """Send records as the engine does; returns the warnings."""
    monkeypatch.setitem(sys.modules, tracker, fake)
    Path(folder).mkdir(exist_ok=True)
    warnings: list[str] = []
    sink = open_tracker(TrackConfig(tracker, **config), folder, options or {}, warnings.append)
    for record in records:
        sink(record)
    sink.close()
    return warnings


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_no_tracker_unless_one_is_asked_for_and_only_known_ones():
    assert open_tracker(TrackConfig(), "nowhere", {}, print) is None
    with pytest.raises(ValueError, match="must be one of tensorboard, swanlab, wandb, trackio"):
        TrackConfig("mlflow")


@pytest.mark.parametrize("tracker", ["tensorboard", "swanlab", "wandb", "trackio"])
def test_a_missing_package_is_told_at_once_with_what_installs_it(monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=re.escape(f"pip install {tracker}")):
        open_tracker(TrackConfig(tracker), "run", {}, print)


def test_tensorboard_reads_back_what_was_sent(tmp_path):
    pytest.importorskip("tensorboard")
    warnings: list[str] = []
    (tmp_path / "run").mkdir()
    sink = open_tracker(TrackConfig("tensorboard"), tmp_path / "run", {"lr": 1e-3}, warnings.append)
    for record in RECORDS:
        sink(record)
    sink.close()
    expected: dict = {}
    for step, numbers in SENT:
        for name, value in numbers.items():
            expected.setdefault(name, []).append((step, pytest.approx(value)))  # fp32 there
    assert events(tmp_path / "run") == expected and not warnings


def test_tensorboard_forgets_what_a_killed_run_had_sent_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    # A run is killed after step 9, its checkpoint is of step 6; it goes on with step 7, or first makes up for the
    # validation of step 6.
    for name, made_up in (("a", []), ("b", [{"step": 6, "val_loss": 60.0}])):
        (tmp_path / name).mkdir()
        for records in (
            [{"step": s, "loss": float(s)} for s in range(1, 10)],
            [*made_up, *({"step": s, "loss": 100.0 + s} for s in range(7, 12))],
        ):
            sink = open_tracker(TrackConfig("tensorboard"), tmp_path / name, {}, print)
            for record in records:
                sink(record)
            sink.close()
        expected = [(s, float(s)) for s in range(1, 7)] + [(s, 100.0 + s) for s in range(7, 12)]
        assert events(tmp_path / name)["loss"] == expected
    assert events(tmp_path / "b")["val_loss"] == [(6, 60.0)]


@pytest.mark.parametrize("tracker", ["swanlab", "wandb", "trackio"])
def test_the_others_get_the_finite_numbers_at_their_steps_and_the_options(monkeypatch, tracker):
    fake = Fake()
    assert run(monkeypatch, tracker, fake, options={"train": {"seed": 1}}, folder="first") == []
    assert fake.sent == SENT and fake.finished == 1
    (told,) = fake.inits
    assert (told["project"], told["config"]) == ("language-model", {"train": {"seed": 1}})
    assert told["name"].startswith("first")
    run(monkeypatch, tracker, fake, project="p", run_name="n")
    assert fake.inits[1]["project"] == "p" and fake.inits[1]["name"].startswith("n")


@pytest.mark.parametrize("tracker, key", [("swanlab", "id"), ("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_is_the_same_run_there_and_one_begun_anew_is_not(monkeypatch, tracker, key):
    fake = Fake()
    for first in (1, 4, 7, 1, 5):  # killed and gone on twice, begun anew, gone on
        run(monkeypatch, tracker, fake, [{"step": first, "loss": 1.0}])
    run(monkeypatch, tracker, fake, [{"step": 4, "loss": 1.0}], folder="other")
    ids = [told[key] for told in fake.inits]
    assert ids[0] == ids[1] == ids[2] and ids[3] == ids[4] and len(set(ids)) == 3
    assert {told["resume"] for told in fake.inits} == {"allow"}
    assert re.fullmatch("[a-z0-9]{21}", json.loads(Path("run/tracker.json").read_text())["id"])


def test_a_damaged_id_is_replaced(monkeypatch):
    Path("run").mkdir()
    for damaged in ("", "{", "[]", '{"id": 3}'):
        Path("run/tracker.json").write_text(damaged)
        fake = Fake()
        assert run(monkeypatch, "wandb", fake, [{"step": 4, "loss": 1.0}]) == [] and len(fake.inits[0]["id"]) == 21


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_without_a_login_nothing_is_asked_or_sent_and_the_users_own_choice_is_kept(monkeypatch, tracker):
    upper = tracker.upper()

    def mode() -> str:
        fake = Fake()
        run(monkeypatch, tracker, fake, RECORDS[:1])
        return fake.inits[0].get("mode", "the package's")

    assert mode() == "offline"
    for variable in (f"{upper}_MODE", f"{upper}_API_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "x")
            assert mode() == "the package's"
    if tracker == "wandb":
        Path("home/.netrc").write_text("machine elsewhere.example login user password x\n")
        assert mode() == "offline"
        Path("home/.netrc").write_text("machine tracker.example login user password x\n")
    else:
        Path("home/.swanlab").mkdir()
        Path("home/.swanlab/.netrc").write_text("machine swanlab.example login user password x\n")
    assert mode() == "the package's"


def fail():
    raise ConnectionError("no\nnetwork")


@pytest.mark.parametrize(
    "way", [{"log": fail}, {"init": fail}, {"log": lambda: sys.exit(1)}], ids=["log", "init", "exit"]
)
@pytest.mark.parametrize("tracker", ["swanlab", "wandb", "trackio"])
def test_a_tracker_that_fails_is_told_once_and_not_used_any_more(monkeypatch, tracker, way):
    fake = Fake(**way)
    warnings = run(monkeypatch, tracker, fake, RECORDS * 20)
    assert len(warnings) == 1 and len(fake.threads) <= 1
    assert re.fullmatch(
        rf"warning: tracker {tracker} failed: (ConnectionError: no network|SystemExit: 1); "
        "it is not used any more, metrics.jsonl has it all",
        warnings[0],
    )


def test_a_failure_in_the_middle_is_told_while_the_run_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Fake(log=fail))
    Path("run").mkdir()
    warnings: list[str] = []
    sink = open_tracker(TrackConfig("wandb"), "run", {}, warnings.append)
    for _ in range(1000):
        sink(RECORDS[0])
        if warnings:
            break
        time.sleep(0.01)
    assert len(warnings) == 1
    sink.close()
    assert len(warnings) == 1


def test_a_warning_that_nobody_can_read_stops_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", Fake(log=fail))

    def closed(line):
        raise BrokenPipeError(32, "Broken pipe")

    sink = open_tracker(TrackConfig("wandb"), tmp_path, {}, closed)
    sink(RECORDS[0])
    sink.close()
    assert sink.told


def test_a_full_disk_is_no_more_than_a_warning(monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.files, "write_json", full)
    (warning,) = run(monkeypatch, "wandb", Fake())
    assert "No space left on device" in warning


def test_a_tracker_that_hangs_holds_up_neither_the_steps_nor_the_end(monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.2)
    for way in ("log", "init"):
        forever = threading.Event()
        began = time.monotonic()
        (warning,) = run(monkeypatch, "wandb", Fake(**{way: forever.wait}), RECORDS * 100)
        assert time.monotonic() - began < 5 and "is not done after 0.2 s" in warning
        forever.set()


def test_packages_work_outside_the_main_thread_and_so_cannot_take_over_its_signals(monkeypatch):
    def take_over():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # raises ValueError in any thread but the main one

    before = signal.getsignal(signal.SIGINT)
    fake = Fake()
    run(monkeypatch, "swanlab", fake)
    assert threading.main_thread() not in fake.threads
    (warning,) = run(monkeypatch, "swanlab", Fake(init=take_over))
    assert "main thread" in warning and signal.getsignal(signal.SIGINT) is before


def test_a_program_ends_although_its_tracker_hangs(tmp_path):
    program = """
import sys, threading, types
from extras.tracking import trackers
trackers.PATIENCE_S = 0.1
sys.modules["trackio"] = types.SimpleNamespace(init=lambda **_: threading.Event().wait())
sink = trackers.open_tracker(trackers.TrackConfig("trackio"), ".", {}, print)
sink({"step": 1, "loss": 1.0})
sink.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "is not done after 0.1 s" in done.stdout, done.stderr

"""Each record of metrics.jsonl in; the same numbers out to a program that draws them while the run goes on: a tracker.

    python pretrain.py --tracker tensorboard          # pip install tensorboard; then tensorboard --logdir out
    python pretrain.py --tracker swanlab --project my-models --run_name first        # or wandb, trackio

In:  the records that the engine writes. Out: their numbers at their steps in TensorBoard, SwanLab, W&B or Trackio.
metrics.jsonl is the truth: a tracker works in a thread of its own, and one that fails or hangs is told once and left.
Knows nothing of the loop, of models, or of who is logged in beyond asking the tracker's own files.
"""

import json
import math
import netrc
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from core import files
from core.config import Section
from core.errors import UserError

PATIENCE_S = 60  # so long the end of a run waits for a tracker; its model is saved by then


@dataclass(frozen=True)
class TrackConfig(Section):
    # Draw the curves there, too; "": metrics.jsonl only.
    tracker: Literal["", "tensorboard", "swanlab", "wandb", "trackio"] = ""
    project: str = "language-model"  # swanlab, wandb, trackio: the runs that are shown together
    run_name: str = ""  # what the run is called there; "": as out_dir


@dataclass(frozen=True)
class Start:
    """What a tracker is told when a run begins or goes on.

    Attributes:
        id: 21 lowercase letters and digits; the same when the run is resumed.
        first_step: of the first new record; what the tracker has from there on is of a start that did not last.
        options: plain data.
    """

    folder: Path
    id: str
    project: str
    name: str
    first_step: int
    options: dict


class Tracker:
    """Sends records on. It never raises and never waits, except up to PATIENCE_S in `close`.

    The package works in a thread: it may look for a network as long as it likes. What goes wrong there is told from
    the thread of the run, once, and ends the sending.
    """

    def __init__(
        self, begin: Callable, package, cfg: TrackConfig, folder: Path, options: dict, warn: Callable[[str], None]
    ):
        self.what, self.warn, self.problem, self.told = cfg.tracker, warn, "", False
        self.records: queue.SimpleQueue = queue.SimpleQueue()
        name = cfg.run_name or folder.resolve().name
        self.start = lambda first: begin(
            package, Start(folder, run_id(folder, first <= 1), cfg.project, name, first, options)
        )
        self.thread = threading.Thread(target=self._work, name=f"tracker {cfg.tracker}", daemon=True)
        self.thread.start()

    def __call__(self, record: dict) -> None:
        """Take a record of metrics.jsonl: all its finite numbers are sent with its step."""
        if not self.problem:
            self.records.put(dict(record))
        self._tell()

    def close(self) -> None:
        """Let the tracker finish. Call it once, when the run's files are written."""
        self.records.put(None)
        self.thread.join(PATIENCE_S)
        if self.thread.is_alive() and not self.problem:
            self.problem = f"is not done after {PATIENCE_S} s"
        self._tell()

    def _tell(self) -> None:
        if self.problem and not self.told:
            self.told = True
            with suppress(OSError, ValueError):  # nobody reads our warnings any more
                self.warn(
                    f"warning: tracker {self.what} {self.problem}; it is not used any more, metrics.jsonl has it all"
                )

    def _work(self) -> None:
        try:
            first = self.records.get()
            if first is None:
                return
            # A resumed run may begin with a validation of the step where it stopped, which is there already.
            send, finish = self.start(first["step"] + ("loss" not in first))
            record = first
            while record is not None:
                send(numbers(record), record["step"])
                record = self.records.get()
            finish()
        except (Exception, SystemExit) as e:  # packages end programs, too
            self.problem = f"failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}"


def open_tracker(cfg: TrackConfig, folder: str | Path, options: dict, warn: Callable[[str], None]) -> Tracker | None:
    """The tracker that the options ask for; None if they ask for none. On the first rank only.

    Args:
        folder: the run's; it keeps the run's id in tracker.json.
        options: plain data to show beside the curves.
        warn: is told, once, if the tracker fails.
    Raises:
        UserError: its package is not installed.
    """
    if not cfg.tracker:
        return None
    return Tracker(BEGIN[cfg.tracker], package_of(cfg.tracker), cfg, Path(folder), options, warn)


@contextmanager
def tracking(cfg: TrackConfig, folder: str | Path, options: dict, first: bool) -> Iterator[Tracker | None]:
    """`open_tracker` around a run on its first rank, closed when it ends, however that is; warnings go to stderr."""
    tracker = open_tracker(cfg, folder, options, partial(print, file=sys.stderr, flush=True)) if first else None
    try:
        yield tracker
    finally:
        if tracker:
            tracker.close()


def package_of(tracker: str):
    """The tracker's package, imported."""
    try:
        if tracker == "tensorboard":
            from torch.utils import tensorboard as package
        elif tracker == "swanlab":
            import swanlab as package
        elif tracker == "wandb":
            import wandb as package
        else:
            import trackio as package
    except Exception as e:  # not only ImportError: a package that does not suit another's version raises what it likes
        raise UserError(f"--tracker {tracker}: {type(e).__name__}: {e}", f"pip install {tracker}") from None
    return package


def numbers(record: dict, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record but its step; those of an inner dict under outer/inner."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and math.isfinite(value) and f"{prefix}{key}" != "step":
            found[f"{prefix}{key}"] = value
    return found


def run_id(folder: Path, anew: bool) -> str:
    """The run's id: kept in tracker.json of its folder, a new one where there is none or the run begins anew."""
    path = folder / "tracker.json"
    if not anew:
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))["id"]
            if isinstance(kept, str):
                return kept
    fresh = secrets.token_hex(11)[:21]  # SwanLab takes just such ids: 21 lowercase letters and digits
    files.write_json(path, {"id": fresh})
    return fresh


# Each of these is given the package and the run's Start, and returns send(numbers, step) and finish() -----------------


def tensorboard(package, run: Start) -> tuple[Callable, Callable]:
    """Event files in the run's folder."""
    writer = package.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)
    writer.add_text("options", f"```\n{json.dumps(run.options, ensure_ascii=False, indent=2)}\n```", run.first_step)

    def send(found: dict[str, float], step: int) -> None:
        for name, value in found.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def swanlab(package, run: Start) -> tuple[Callable, Callable]:
    """swanlab.cn; without a login or SWANLAB_MODE files in the run's folder, for `swanlab sync`."""
    home = Path(os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab")
    kept = any((folder / ".netrc").is_file() for folder in (home, Path(".swanlab")))
    mode = {} if kept or asked("SWANLAB_MODE", "SWANLAB_API_KEY") else {"mode": "offline"}
    started = package.init(
        project=run.project,
        name=run.name,
        id=run.id,
        resume="allow",
        config=run.options,
        log_dir=str(run.folder / "swanlab"),
        **mode,
    )
    return (lambda found, step: started.log(found, step=step)), started.finish


def wandb(package, run: Start) -> tuple[Callable, Callable]:
    """wandb.ai or WANDB_BASE_URL; without a login or WANDB_MODE files in the run's folder, for `wandb sync`."""
    # The log is ours to print, not to send. Half the patience, so that the reason is there before the run's end.
    settings = package.Settings(console="off", init_timeout=PATIENCE_S / 2)
    if hasattr(settings, "finish_timeout"):  # 0, its default, waits at the program's end as long as the network takes
        settings.finish_timeout = PATIENCE_S / 2
    hosts = {urlsplit(os.environ.get("WANDB_BASE_URL") or settings.base_url).netloc, "api.wandb.ai"}
    kept = False
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            kept = kept or bool(path and hosts & netrc.netrc(path).hosts.keys())
    mode = {} if kept or asked("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE") else {"mode": "offline"}
    started = package.init(
        project=run.project,
        name=run.name,
        id=run.id,
        resume="allow",
        config=run.options,
        dir=str(run.folder),
        settings=settings,
        **mode,
    )
    return (lambda found, step: started.log(found, step=step)), started.finish


def trackio(package, run: Start) -> tuple[Callable, Callable]:
    """A database on this machine (TRACKIO_DIR), for `trackio show`; runs are told apart by name, so the id is in it."""
    started = package.init(project=run.project, name=f"{run.name}-{run.id[:6]}", resume="allow", config=run.options)
    return (lambda found, step: started.log(found, step=step)), started.finish


def asked(*variables: str) -> bool:
    """Whether the user has set one of these environment variables."""
    return any(os.environ.get(name) for name in variables)


BEGIN = {"tensorboard": tensorboard, "swanlab": swanlab, "wandb": wandb, "trackio": trackio}

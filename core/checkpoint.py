"""Runs: a folder that is locked while in use, its checkpoints, its best model.

In:  a strategy (a model on its ranks), a tokenizer, numbers. Out: folders that survive a kill and a full disk.
Knows nothing of losses, text or devices' speed.

    out/pretrain/                    the best model so far, a Hugging Face folder, plus run.json
    out/pretrain/checkpoint-<step>/  the same files plus optimizer.safetensors, state.json and manifest.json

A checkpoint is written under another name, forced to disk and renamed: one that has its name is whole. There is no
file that says which is the latest; the names say it, and each is verified before it is used. Nothing is pickled.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from core import files
from core.errors import StorageError, UserError
from core.hf_config import family_of
from core.hf_folder import FORMAT, check_tensors, checkpoint_steps, load_tensors, save_model, verify
from core.optim import LossScale
from core.parallel import Strategy
from model import Llama


class WholeModel:
    """What a run's folders hold of the model: all of it. A wing that trains a part of it brings its own saver.

    Attributes:
        file: with the weights.
        trained_only: whether only trained parameters are saved.
    """

    file, trained_only = "model.safetensors", False

    def save(self, folder: Path, model: Llama, tokenizer, about: dict, weights: dict[str, Tensor]) -> None:
        save_model(folder, model, tokenizer, about, weights)

    def load(self, folder: Path, model: Llama) -> dict[str, Tensor]:
        """What was saved, by the model's names."""
        ours = family_of(model.config).ours
        return {ours(name): t for name, t in load_tensors(folder / self.file).items()}


@dataclass
class State:
    """Where a run is: what a checkpoint says besides weights and moments."""

    step: int = 0  # optimizer steps done
    rows_seen: int = 0
    best: float | None = None  # the lowest validation loss
    overflows: int = 0  # in a row, of fp16
    validated: bool = True  # False: the run was stopped where a validation was due


class Run:
    """One run's folder: locked while in use, its checkpoints, its model.

    Args:
        folder: out_dir.
        identity: what a resumed run must share with the one it continues: seed, hashes of data and tokenizer,
            model sizes. A difference is refused, naming the keys.
        about: plain data for run.json (the resolved options among it).
        tokenizer: saved with every model.
        keep: checkpoints kept, at least 2, so that one is whole while another is being deleted.
        write: False on all ranks but the first: they read, and write nothing.
        saver: how models become files.
    """

    def __init__(self, folder: str | Path, identity: dict, about: dict, tokenizer, keep=2, write=True, saver=None):
        self.saver = saver or WholeModel()
        self.folder, self.identity, self.about, self.tokenizer = Path(folder), identity, about, tokenizer
        self.keep, self.write = max(2, keep), write
        self.failures: dict[str, int] = {}  # in a row, by what was to be saved
        # Locked first: what is half written belongs to nobody then.
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = files.lock(self.folder)
            self._clear()

    def close(self) -> None:
        """Release the folder."""
        if self.write and self._lock:
            self._lock.close()

    def _clear(self) -> None:
        """Remove what was half written or half deleted."""
        for leftover in [*self.folder.glob(".tmp-*"), *self.folder.glob(".trash-*")]:
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()

    def start_anew(self) -> Path | None:
        """Move an earlier run's files aside, to `<folder>.1` or the next free number; returns that folder."""
        if not self.write or not any(p.name != ".lock" for p in self.folder.iterdir()):
            return None
        # By renames: nothing is deleted, and nothing is copied.
        number = next(n for n in range(1, 1 << 30) if not self.folder.with_name(f"{self.folder.name}.{n}").exists())
        aside = self.folder.with_name(f"{self.folder.name}.{number}")
        aside.mkdir()
        for path in list(self.folder.iterdir()):
            if path.name != ".lock":
                os.rename(path, aside / path.name)
        return aside

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    # -------- going on

    def resume(self, wanted: str, strategy: Strategy, scaler: LossScale | None, log: Callable[[str], None]) -> State:
        """Go on from a checkpoint, or begin.

        Args:
            wanted: auto: from the newest whole one; no: from none; or a checkpoint's path.
            strategy: takes its part of weights and moments.
        Returns:
            where the run is.
        Raises:
            UserError: no such checkpoint, or one of a run of another identity.
        """
        if wanted == "no":
            return State()
        # The newest whole checkpoint, or the one that the user names.
        path = self.newest(log) if wanted == "auto" else Path(wanted)
        if path is None:
            return State()
        if wanted != "auto" and (problem := verify(path) if path.is_dir() else "No such folder"):
            raise UserError(f"{path}: {problem}", "--resume auto takes the newest whole one")
        state = self.restore(path, strategy, scaler, log)
        log(f"resumed from {path}")
        # From an older one the run goes another way: it must not meet its own later steps again.
        if wanted != "auto" and (later := self.set_aside_after(state.step)):
            log(f"set aside: {', '.join(p.name for p in later)}")
        return state

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are named through `warn` and passed over."""
        for path in map(self.path, reversed(checkpoint_steps(self.folder))):
            problem = verify(path)
            if problem is None:
                return path
            warn(f"warning: {path}: {problem}; trying the one before it")
        return None

    def restore(self, path: Path, strategy: Strategy, scaler: LossScale | None, warn: Callable[[str], None]) -> State:
        """Put a checkpoint's state into the strategy and the scaler; arguments and errors as `resume`."""
        # Only a run of the same data, model and tokenizer goes on. Other options may change, and each is named.
        state = files.read_json(path / "state.json")
        self._check_identity(path, state)
        self._tell_options(state["about"].get("options", {}), warn)
        # Compared with what the model has before anything of it changes.
        mine = strategy.parameters(self.saver.trained_only)
        weights = self.saver.load(path, strategy.model)
        if strategy.partial:
            weights = {name: t for name, t in weights.items() if name in mine}
        check_tensors(path / self.saver.file, weights, mine)
        # The weights, the optimizers' moments, the scale of fp16, and where the run was.
        strategy.load(weights, load_tensors(path / "optimizer.safetensors"))
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        return State(**{field: state[field] for field in asdict(State())})

    def _check_identity(self, path: Path, state: dict) -> None:
        """UserError where the checkpoint is another version's, or another run's."""
        if state["format"] != FORMAT:
            said = f"format {state['format']}, written with {state.get('versions', {})}, this version reads {FORMAT}"
            raise UserError(f"{path}: {said}", "finish the run with the version that began it, or --resume no")
        then, now = state["identity"], self.identity
        keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if keys:
            said = "; ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in keys)
            hint = "--resume no starts anew (the old run is kept), or take another --out_dir"
            raise UserError(f"{path} cannot be resumed: {said}", hint)

    def _tell_options(self, then: dict, warn: Callable[[str], None]) -> None:
        """Name every option that has another value than when the checkpoint was written."""
        now = self.about.get("options", {})
        # A section of a wing is there only if something named it; what changes training is in the identity.
        for section, values in then.items():
            for key, value in values.items() if section in now else ():
                new = now[section].get(key, value)  # earlier versions had some of them elsewhere
                if key not in ("resume", "log_every") and json.dumps(value) != json.dumps(new):
                    warn(f"resuming with another {section}.{key}: was {value!r}, now {new!r}")

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints later than `step`, so that a run rolled back to it does not meet them again."""
        later = [self.path(s) for s in checkpoint_steps(self.folder) if s > step] if self.write else []
        for path in later:
            os.rename(path, path.with_name(f"set-aside-{path.name}-{os.getpid()}"))
        return later

    # -------- saving

    def save(self, strategy: Strategy, scaler: LossScale | None, state: State, warn, must: bool = False) -> bool:
        """Commit checkpoint-<state.step>; on all ranks, for the first needs the others' parts.

        A disk that refuses is told and survived, until the third time in a row; with `must`, the first time ends it.

        Returns:
            Whether it was saved.
        Raises:
            StorageError: the disk has refused once too often.
        """
        # All ranks give their parts of weights and moments, and the first one writes.
        weights, moments = strategy.weights(self.saver.trained_only), strategy.moments()
        about = asdict(state) | {"scaler": scaler.state_dict() if scaler is not None else None}
        return self._survive("a checkpoint", warn, must, lambda: self._commit(strategy.model, weights, moments, about))

    def publish(self, strategy: Strategy, facts: dict, warn, must: bool = False) -> bool:
        """Write the model into the run folder itself, where sample.py, sft.py and transformers look for it."""
        weights = strategy.weights(self.saver.trained_only)
        parts = (self.folder, strategy.model, self.tokenizer, self.about | facts, weights)
        return self._survive("the best model", warn, must, lambda: self.saver.save(*parts))

    def note_divergence(self, facts: dict) -> None:
        """Write diverged.json, for the user to look at."""
        if self.write:
            with suppress(OSError):
                files.write_json(self.folder / "diverged.json", facts)

    def _survive(self, what: str, warn, must: bool, action: Callable[[], None]) -> bool:
        """Whether what must be written was written; on the other ranks there is nothing to write."""
        if not self.write:
            return True
        try:
            action()
        except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
            self.failures[what] = self.failures.get(what, 0) + 1
            self._clear()
            line = f"{what} could not be saved: {getattr(e, 'strerror', None) or e}"
            if must or self.failures[what] == 3:
                raise StorageError(f"{self.folder}: {line}", "the earlier checkpoints are whole") from None
            warn(f"warning: {line}; the earlier ones are whole, training goes on")
            return False
        self.failures[what] = 0
        return True

    def _commit(self, model: Llama, weights: dict, moments: dict, about: dict) -> None:
        """Write checkpoint-<step>, and delete the oldest ones."""
        final = self.path(about["step"])
        temporary = self.folder / f".tmp-{os.getpid()}-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        # Everything is written under a name that nobody reads ...
        self.saver.save(temporary, model, self.tokenizer, self.about | {"step": about["step"]}, weights)
        moments = {name: t.detach().contiguous() for name, t in moments.items()}
        files.replace(temporary / "optimizer.safetensors", lambda p: save_file(moments, p))
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        state = about | {"identity": self.identity, "about": self.about, "versions": versions}
        files.write_json(temporary / "state.json", {"format": FORMAT} | state)
        # The manifest says what a whole checkpoint is: each file with its size and hash.
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(temporary.iterdir())}
        files.write_json(temporary / "manifest.json", manifest)
        # ... and becomes the checkpoint by one rename.
        # One of that name is a damaged one that was passed over.
        if final.exists():
            self._discard(final)
        os.rename(temporary, final)
        files.fsync_dir(self.folder)
        # The new one is safe: the oldest may go.
        for step in checkpoint_steps(self.folder)[: -self.keep]:
            self._discard(self.path(step))

    def _discard(self, path: Path) -> None:
        """Rename first: a half-deleted folder never bears a checkpoint's name."""
        trash = self.folder / f".trash-{os.getpid()}-{path.name}"
        os.rename(path, trash)
        shutil.rmtree(trash)

"""Run folders and checkpoints: the only code that opens either.

In:  a model, optimizers, a tokenizer, numbers. Out: folders that transformers, vLLM and llama.cpp's converter read.
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
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from core import files
from core.errors import StorageError, UserError
from core.hf_config import family_of, load_config
from core.hf_folder import FORMAT, check_tensors, checkpoint_steps, load_tensors, save_model, verify
from core.parallel import named
from model import Llama


class WholeModel:
    """What a run's folders hold of the model: all of it. An extra that trains a part of it brings its own saver.

    Attributes:
        file: with the weights.
        trained_only: whether only trained parameters are saved.
    """

    file, trained_only = "model.safetensors", False

    def save(self, folder: Path, model: Llama, tokenizer, about: dict, weights: dict[str, Tensor]) -> None:
        save_model(folder, model, tokenizer, about, weights)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """What was saved, by the model's names."""
        family = family_of(load_config(folder))
        return {family.ours(name): t for name, t in load_tensors(folder / self.file).items()}


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
        saver: how models become files; None: a WholeModel.
    """

    def __init__(
        self, folder: str | Path, identity: dict, about: dict, tokenizer, keep: int = 2, write: bool = True, saver=None
    ):
        self.saver = saver or WholeModel()
        self.folder, self.identity, self.about, self.tokenizer = Path(folder), identity, about, tokenizer
        self.keep, self.write = max(2, keep), write
        self.failures: dict[str, int] = {}  # in a row, by what was to be saved
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = files.lock(self.folder)
            for leftover in [*self.folder.glob(".tmp-*"), *self.folder.glob(".trash-*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def close(self) -> None:
        """Give the folder free."""
        if self.write and self._lock:
            self._lock.close()

    def start_anew(self) -> Path | None:
        """Move an earlier run's files aside, to `<folder>.1` or the next free number; returns that folder."""
        if not self.write or not any(p.name != ".lock" for p in self.folder.iterdir()):
            return None
        number = next(n for n in range(1, 1 << 30) if not self.folder.with_name(f"{self.folder.name}.{n}").exists())
        aside = self.folder.with_name(f"{self.folder.name}.{number}")
        aside.mkdir()
        for path in list(self.folder.iterdir()):
            if path.name != ".lock":
                os.rename(path, aside / path.name)
        return aside

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def newest(self, warn) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are named through `warn` and passed over."""
        for step in reversed(checkpoint_steps(self.folder)):
            problem = verify(self.path(step))
            if problem is None:
                return self.path(step)
            warn(f"warning: {self.path(step)}: {problem}; trying the one before it")
        return None

    def restore(self, path: Path, spread, optimizers: list, scaler, warn) -> dict:
        """Put a checkpoint's state into model, optimizers and scaler.

        Args:
            spread: the model on its ranks, see parallel.py; each takes its part.

        Returns:
            Its state: step, rows_seen, best and what else `save` was given.
        Raises:
            UserError: made by a run of another identity.
        """
        state = files.read_json(path / "state.json")
        if state["format"] != FORMAT:
            by = state.get("versions", {})
            raise UserError(
                f"{path}: format {state['format']}, written with {by}, this version reads {FORMAT}",
                "finish the run with the version that began it, or --resume no",
            )
        different = [
            f"{key} was {state['identity'].get(key)!r}, now {self.identity.get(key)!r}"
            for key in sorted(state["identity"].keys() | self.identity.keys())
            if state["identity"].get(key) != self.identity.get(key)
        ]
        if different:
            raise UserError(
                f"{path} cannot be resumed: {'; '.join(different)}",
                "--resume no starts anew (the old run is kept), or take another --out_dir",
            )
        for section, values in state["about"].get("options", {}).items():
            for key, value in values.items():
                if key in ("resume", "log_every"):
                    continue
                now = self.about.get("options", {}).get(section, {}).get(key)
                if json.dumps(value) != json.dumps(now):
                    warn(f"resuming with another {section}.{key}: was {value!r}, now {now!r}")
        weights = self.saver.load(path)
        mine = spread.mine(self.saver.trained_only)
        if spread.partial:
            weights = {name: t for name, t in weights.items() if name in mine}
        check_tensors(path / self.saver.file, weights, mine)
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in load_tensors(path / "optimizer.safetensors").items():
            name, _, entry = key.rpartition(":")
            moments.setdefault(name, {})[entry] = value
        for name, p in mine.items():
            spread.put(p, weights[name])
        for name, p, optimizer in named(spread.model, optimizers):
            # The fused kernel wants its step counter where the parameter is; load_state_dict would do the same.
            optimizer.state[p] = {k: spread.part(v, p) for k, v in moments.get(name, {}).items()}
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        return state

    def save(self, spread, optimizers: list, scaler, state: dict, warn, must: bool = False) -> bool:
        """Commit checkpoint-<state["step"]>; on all ranks, for the first needs the others' parts.

        A disk that refuses is told and survived, until the third time in a row; with `must`, the first time ends it.

        Returns:
            Whether it was saved.
        Raises:
            StorageError: the disk has refused once too often.
        """
        weights, moments = spread.weights(self.saver.trained_only), spread.moments(optimizers)
        return self._survive(
            "a checkpoint", warn, must, lambda: self._commit(spread.model, weights, moments, scaler, state)
        )

    def publish(self, spread, facts: dict, warn, must: bool = False) -> bool:
        """Write the model into the run folder itself, where sample.py, sft.py and transformers look for it."""
        weights = spread.weights(self.saver.trained_only)
        return self._survive(
            "the best model",
            warn,
            must,
            lambda: self.saver.save(self.folder, spread.model, self.tokenizer, self.about | facts, weights),
        )

    def _survive(self, what: str, warn, must: bool, action) -> bool:
        if not self.write:
            return True
        try:
            action()
            self.failures[what] = 0
            return True
        except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
            self.failures[what] = self.failures.get(what, 0) + 1
            for leftover in [*self.folder.glob(".tmp-*"), *self.folder.glob(".trash-*")]:
                shutil.rmtree(leftover, ignore_errors=True)
            line = f"{what} could not be saved: {getattr(e, 'strerror', None) or e}"
            if must or self.failures[what] == 3:
                raise StorageError(f"{self.folder}: {line}", "checkpoints from before are whole") from None
            warn(f"warning: {line}; those from before are whole, training goes on")
            return False

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints later than `step`, so that a run rolled back to it does not meet them again."""
        later = [self.path(s) for s in checkpoint_steps(self.folder) if s > step] if self.write else []
        for path in later:
            os.rename(path, path.with_name(f"set-aside-{path.name}-{os.getpid()}"))
        return later

    def _commit(self, model: Llama, weights: dict, moments: dict, scaler, state: dict) -> None:
        final = self.path(state["step"])
        temporary = self.folder / f".tmp-{os.getpid()}-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        self.saver.save(temporary, model, self.tokenizer, self.about | {"step": state["step"]}, weights)
        moments = {name: t.detach().contiguous() for name, t in moments.items()}
        files.replace(temporary / "optimizer.safetensors", lambda p: save_file(moments, p))
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        files.write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                **state,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "identity": self.identity,
                "about": self.about,
                "versions": versions,
            },
        )
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(temporary.iterdir())}
        files.write_json(temporary / "manifest.json", manifest)
        if final.exists():  # a damaged one that was passed over
            self._discard(final)
        os.rename(temporary, final)
        files.fsync_dir(self.folder)
        for step in checkpoint_steps(self.folder)[: -self.keep]:
            self._discard(self.path(step))

    def _discard(self, path: Path) -> None:
        """Rename first: a half-deleted folder never bears a checkpoint's name."""
        trash = self.folder / f".trash-{os.getpid()}-{path.name}"
        os.rename(path, trash)
        shutil.rmtree(trash)

"""Run folders and checkpoints: the only code that opens either.

In:  a model, optimizers, a tokenizer, numbers. Out: folders that transformers, vLLM and llama.cpp's converter read.
Knows nothing of losses, text or devices' speed.

    out/pretrain/                    the best model so far, a Hugging Face folder, plus run.json
    out/pretrain/checkpoint-<step>/  the same files plus optimizer.safetensors, state.json and manifest.json

A checkpoint is written under another name, forced to disk and renamed: one that has its name is whole. There is no
file that says which is the latest; the names say it, and each is verified before it is used. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import struct
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core import files
from core.errors import StorageError, UserError
from model import Llama, ModelConfig
from tokenizer import chat

FORMAT = 1
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# ---------------------------------------------------------------- model folders


def save_model(folder: Path, model: Llama, tokenizer, about: dict) -> None:
    """Write a Hugging Face folder: config, weights, tokenizer, and run.json with `about`.

    Args:
        folder: made if it is not there; files of the same names are replaced one by one.
        model: fp32 weights; a NaN or infinity in them is refused.
        tokenizer: its files are copied; None: no tokenizer files.
        about: plain data on the run: step, validation, options; `chat_format` where the model chats.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(model.config),
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if tokenizer is not None:
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config |= special
        if about.get("chat_format"):
            special["eos_token_id"] = sorted(chat.end_ids(tokenizer, about["chat_format"]))
        files.write_json(folder / "generation_config.json", {"_from_model_config": False, **special})
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
            tokenizer.save(temporary, chat_format=about.get("chat_format"))
            for path in sorted(Path(temporary).iterdir()):
                files.replace(folder / path.name, lambda p, path=path: shutil.copyfile(path, p))
    weights = model_tensors(model)
    bad = [name for name, t in weights.items() if not t.isfinite().all()]
    assert not bad, f"non-finite weights would have been saved: {bad[0]}"
    files.replace(folder / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))
    files.write_json(folder / "run.json", {"format": FORMAT, **about})
    # Last: a folder with a config.json has all the rest.
    files.write_json(folder / "config.json", config)


def model_tensors(model: Llama) -> dict[str, Tensor]:
    """Weights by name; tied ones once, under the embedding's name."""
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    return state


def load_model(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """Build the model that a Llama-family folder describes, with its weights.

    Args:
        folder: config.json and model.safetensors (or shards named by model.safetensors.index.json).
        dtype: of the weights in memory.
    Raises:
        UserError: missing or damaged files, another family, weights that do not fit the config, NaN in weights.
    """
    folder = Path(folder)
    config = load_config(folder)
    shards = _shards(folder)
    with torch.device("meta"):  # names and shapes without memory
        described = Llama(config)
    size = sum(p.numel() for p in described.parameters())
    on_disk = sum(s.stat().st_size for s in shards)
    # Every stored weight takes at least half a byte; a config that asks for far more was not written for these files.
    if size > 4 * on_disk + (1 << 20):
        raise UserError(f"{folder}/config.json: describes {size:,} parameters, the weights are {on_disk:,} bytes")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= load_tensors(shard)
    state = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}  # old exports store this constant
    if config.tie_word_embeddings:
        # Tied weights are stored once, and both names are in use for them.
        one = state.pop(HEAD, None)
        state.setdefault(EMBEDDING, one) if one is not None else None
        if EMBEDDING in state:
            state[HEAD] = state[EMBEDDING]
    _check_tensors(shards[0], state, described.state_dict())
    described.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in state.items()}, assign=True)
    if config.tie_word_embeddings:
        described.lm_head.weight = described.model.embed_tokens.weight
    for p in described.parameters():
        p.requires_grad_(True)
    return described


def load_config(folder: Path) -> ModelConfig:
    """ModelConfig out of a folder's config.json, every number checked before anything is allocated."""
    path = Path(folder) / "config.json"
    raw = read_json(path, hint=f"is {folder} a model folder?")
    family = raw.get("model_type")
    if family != "llama":
        raise UserError(f"{path}: model_type {family!r} is not supported", "llama is")
    rope = raw.get("rope_parameters") or {}  # transformers 5 keeps rope_theta in here
    scaling = raw.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling:
        raise UserError(f"{path}: rope_scaling {scaling} is not supported")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
        raise UserError(f"{path}: hidden_act must be silu and mlp_bias false")
    raw = {**raw, "rope_theta": raw.get("rope_theta", rope.get("rope_theta", 10000.0))}
    # transformers' own defaults where its config.json leaves a key out.
    raw.setdefault("tie_word_embeddings", False)
    raw.setdefault("rms_norm_eps", 1e-6)
    raw.setdefault("max_position_embeddings", 2048)
    values = {}
    for field in dataclasses.fields(ModelConfig):
        value = raw.get(field.name)
        if value is None:
            if field.name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                              "num_attention_heads"):  # fmt: skip
                raise UserError(f"{path}: {field.name} is missing")
            continue
        numeric = (int, float) if field.type in (float, "float") else (field.type,)
        if type(value) not in numeric or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path}: {field.name} = {value!r} is not of type {field.type.__name__}")
        values[field.name] = value
    try:
        config = ModelConfig(**values)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None
    if not config.vocab_size:
        raise UserError(f"{path}: vocab_size is 0")
    return config


def read_json(path: Path, hint: str = "") -> dict:
    """A JSON object from a file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}", hint) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object", hint)
    return value


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(f"{single}: No such file", f"is {folder} a model folder?")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map is missing")
    shards = sorted(set(map(str, names.values())))
    for name in shards:
        # A name with a folder in it could read any file of the machine.
        if Path(name).name != name or name in ("..", ".") or (folder / name).is_symlink():
            raise UserError(f"{index}: {name!r} is not a plain file name inside the folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: No such file", "an incomplete download?")
    return [folder / name for name in shards]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, 25 << 20):  # a real header is some hundred bytes per tensor
            raise UserError(f"{path}: not a safetensors file, or damaged")
        return load_file(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a safetensors file, or damaged: {e}") from None


def _check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse missing, unexpected, misshapen or non-finite tensors, all of them named in one message."""
    problems = [f"{n} is missing" for n in wanted if n not in found]
    problems += [f"{n} is unexpected" for n in found if n not in wanted]
    problems += [
        f"{n} has shape {tuple(found[n].shape)}, expected {tuple(wanted[n].shape)}"
        for n in wanted
        if n in found and found[n].shape != wanted[n].shape
    ]
    problems += [f"{n} is {t.dtype}" for n, t in found.items() if not t.is_floating_point()]
    if not problems:
        problems = [f"{n} holds NaN or infinity" for n, t in found.items() if not t.isfinite().all()]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")


def model_folder(path: str | Path) -> Path:
    """The folder with the weights: the path itself, or its newest whole checkpoint where a run was cut short."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder", "train one with python pretrain.py, or check the path")
    if (path / "config.json").exists():
        return path
    for step in reversed(checkpoint_steps(path)):
        if verify(path / f"checkpoint-{step}") is None:
            return path / f"checkpoint-{step}"
    raise UserError(f"{path}: no model in this folder", "train one with python pretrain.py, or check the path")


def weights_digest(folder: Path) -> str:
    """Hash of a folder's weight files: says whether a base model is the same."""
    return hashlib.sha256("".join(files.sha256(s) for s in _shards(folder)).encode()).hexdigest()


def load_about(folder: Path) -> dict:
    """run.json of a folder that we wrote, {} for one from elsewhere."""
    path = Path(folder) / "run.json"
    return read_json(path) if path.exists() else {}


# ---------------------------------------------------------------- resumable runs


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have their final name, oldest first; file times say nothing."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in found if m)


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
    """

    def __init__(self, folder: str | Path, identity: dict, about: dict, tokenizer, keep: int = 2, write: bool = True):
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

    def restore(self, path: Path, model: Llama, optimizers: list, scaler, warn) -> dict:
        """Put a checkpoint's state into model, optimizers and scaler.

        Returns:
            Its state: step, rows_seen, best and what else `save` was given.
        Raises:
            UserError: made by a run of another identity.
        """
        state = read_json(path / "state.json")
        different = [
            f"{key} was {state['identity'].get(key)!r}, now {self.identity.get(key)!r}"
            for key in sorted(state["identity"].keys() | self.identity.keys())
            if state["identity"].get(key) != self.identity.get(key)
        ]
        if different:
            raise UserError(f"{path} cannot be resumed: {'; '.join(different)}",
                            "--resume no starts anew (the old run is kept), or take another --out_dir")  # fmt: skip
        for section, values in state["about"].get("options", {}).items():
            for key, value in values.items():
                if key in ("resume", "log_every"):
                    continue
                now = self.about.get("options", {}).get(section, {}).get(key)
                if json.dumps(value) != json.dumps(now):
                    warn(f"resuming with another {section}.{key}: was {value!r}, now {now!r}")
        weights = load_tensors(path / "model.safetensors")
        wanted = model_tensors(model)
        _check_tensors(path / "model.safetensors", weights, wanted)
        moments = load_tensors(path / "optimizer.safetensors")
        with torch.no_grad():
            for name, p in wanted.items():
                p.copy_(weights[name])
        for name, p, optimizer in _named(model, optimizers):
            mine = {k[len(name) + 1 :]: v for k, v in moments.items() if k.startswith(name + ":")}
            # The fused kernel wants its step counter where the parameter is; load_state_dict would do the same.
            optimizer.state[p] = {k: v.to(p.device) for k, v in mine.items()}
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        return state

    def save(self, model: Llama, optimizers: list, scaler, state: dict, warn, must: bool = False) -> bool:
        """Commit checkpoint-<state["step"]>.

        A disk that refuses is told and survived, until the third time in a row; with `must`, the first time ends it.

        Returns:
            Whether it was saved.
        Raises:
            StorageError: the disk has refused once too often.
        """
        return self._survive("a checkpoint", warn, must, lambda: self._commit(model, optimizers, scaler, state))

    def publish(self, model: Llama, facts: dict, warn, must: bool = False) -> bool:
        """Write the model into the run folder itself, where sample.py, sft.py and transformers look for it."""
        return self._survive("the best model", warn, must,
                             lambda: save_model(self.folder, model, self.tokenizer, self.about | facts))  # fmt: skip

    def _survive(self, what: str, warn, must: bool, action) -> bool:
        if not self.write:
            return True
        try:
            action()
            self.failures[what] = 0
            return True
        except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
            self.failures[what] = self.failures.get(what, 0) + 1
            for leftover in self.folder.glob(".tmp-*"):
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

    def _commit(self, model: Llama, optimizers: list, scaler, state: dict) -> None:
        final = self.path(state["step"])
        temporary = self.folder / f".tmp-{os.getpid()}-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(temporary, model, self.tokenizer, self.about | {"step": state["step"]})
        moments = {
            f"{name}:{key}": value.detach().contiguous()
            for name, p, optimizer in _named(model, optimizers)
            for key, value in optimizer.state[p].items()
        }
        files.replace(temporary / "optimizer.safetensors", lambda p: save_file(moments, p))
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        files.write_json(temporary / "state.json", {
            "format": FORMAT, **state, "scaler": scaler.state_dict() if scaler is not None else None,
            "identity": self.identity, "about": self.about, "versions": versions,
        })  # fmt: skip
        manifest = {
            p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(temporary.iterdir())
        }
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


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file of its manifest has its size and hash."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError as e:
        return str(e)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.json"):
        if name not in manifest:
            return f"{name} is not in manifest.json"
    present = {p.name for p in folder.iterdir()} - {"manifest.json"}
    if extra := sorted(present - manifest.keys()):
        return f"{extra[0]} is not in manifest.json"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            return f"{name} is {path.stat().st_size} bytes, not what manifest.json says"
        if files.sha256(path) != entry.get("sha256"):
            return f"{name} is damaged (sha256 differs)"
    return None


def _named(model: Llama, optimizers: list):
    """(name, parameter, its optimizer) for every trained parameter."""
    names = {id(p): n for n, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield names[id(p)], p, optimizer

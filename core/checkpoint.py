"""Run folders and checkpoints: the only code that opens either.

In:  a model, optimizers, a tokenizer, numbers. Out: folders that transformers, vLLM and llama.cpp's converter read.
Knows nothing of losses, text or devices' speed.

    out/pretrain/                    the best model so far, a Hugging Face folder, plus run.json
    out/pretrain/checkpoint-<step>/  the same files plus optimizer.safetensors, state.json and manifest.json

A checkpoint is written under another name, forced to disk and renamed: one that has its name is whole. There is no
file that says which is the latest; the names say it, and each is verified before it is used. Nothing is pickled.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import reprlib
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core import data, files
from core.errors import Diverged, StorageError, UserError
from core.parallel import named
from model import Llama, ModelConfig
from tokenizer import chat

FORMAT = 1
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Of any JSON that is read whole: names and shapes of 1,024 layers, the most that model.py builds, take 1.5 MB; and
# Python makes at most some 60 MB of this many bytes.
JSON_BYTES = 2 << 20
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---------------------------------------------------------------- model folders


def save_model(folder: Path, model: Llama, tokenizer, about: dict, weights: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder: config, weights, tokenizer, and run.json with `about`.

    Args:
        folder: made if it is not there; files of the same names are replaced one by one.
        model: fp32 weights; a NaN or infinity in them is refused.
        tokenizer: its files are copied; None: no tokenizer files.
        about: plain data on the run: step, validation, options; `chat_format` where the model chats.
        weights: of the whole model by name, where `model` has only a part of them.
    Raises:
        Diverged: a weight is not a finite number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = family_of(model.config).write(model.config) | {"torch_dtype": "float32", "use_cache": True}
    if tokenizer is not None:
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config |= special
        if about.get("chat_format"):
            special["eos_token_id"] = sorted(chat.end_ids(tokenizer, about["chat_format"]))
        files.write_json(folder / "generation_config.json", {"_from_model_config": False, **special})
    save_tensors(folder / "model.safetensors", model_tensors(model, weights))
    save_about(folder, tokenizer, about)
    # Last: a folder with a config.json has all the rest.
    files.write_json(folder / "config.json", config)


def save_tensors(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights by name; Diverged where one is not a finite number."""
    if bad := [name for name, t in weights.items() if not _finite(t)]:  # the last step was finite, but too large
        raise Diverged(f"{bad[0]} holds NaN or infinity: nothing of it is saved", "a lower --lr")
    files.replace(path, lambda p: save_file(weights, p, metadata={"format": "pt"}))


def save_about(folder: Path, tokenizer, about: dict) -> None:
    """Write run.json and the tokenizer's files (None: without one)."""
    own = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
            tokenizer.save(temporary, chat_format=about.get("chat_format"))
            for path in sorted(Path(temporary).iterdir()):
                files.replace(folder / path.name, lambda p, path=path: shutil.copyfile(path, p))
        own = {"tokenizer_sha256": tokenizer.sha256}
    files.write_json(folder / "run.json", {"format": FORMAT, **about, **own})


def model_tensors(model: Llama, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights by the names of files, the model's own if no others are given; tied ones once, as the embedding."""
    state = {name: t.detach().contiguous() for name, t in (weights or dict(model.named_parameters())).items()}
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    return {family_of(model.config).theirs(name): t for name, t in state.items()}


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> Llama:
    """Build the model that a folder describes, with its weights.

    Args:
        dtype: of the weights in memory.
        The rest and the errors as in `open_model`.
    """
    return build(*open_model(folder, allow_pickle), device, dtype)


def build(
    model: Llama, fill: Callable, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """Memory and weights for what `open_model` returned."""
    state: dict[str, Tensor] = {}
    # Copies: what is only mapped would change, or end the process, when the file is written over during a run.
    fill(lambda name, t: state.__setitem__(name, t.to(device=device, dtype=dtype, copy=True)))
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def open_model(folder: str | Path, allow_pickle: bool = False) -> tuple[Llama, Callable]:
    """Look at a model folder, and hold its weights ready.

    Args:
        folder: config.json and model.safetensors (or shards named by model.safetensors.index.json), or where there is
            neither, the same as pytorch_model.bin, or one .pt or .pth.
        allow_pickle: read a .bin, .pt or .pth, by torch's unpickler that builds tensors and calls nothing else.
    Returns:
        the model on the meta device, and `fill` for `parallel.spread`: it calls what it is given with each weight's
        name and values, which are mapped from the files.
    Raises:
        UserError: missing or damaged files, another family, weights that do not fit the config, NaN in weights.
    """
    folder = Path(folder)
    config = load_config(folder)
    if read_json(folder / "config.json").get("quantization_config"):
        raise UserError(
            f"{folder}: its weights are quantised, they are for generation only", "take the folder that it was made of"
        )
    family = family_of(config)
    paths = _weight_files(folder)
    state: dict[str, Tensor] = {}
    for path in paths:  # mapped, not read: nothing is allocated before sizes and names have been compared
        tensors = _map_tensors(path, JSON_BYTES) if path.suffix == ".safetensors" else _load_pickled(path, allow_pickle)
        if twins := sorted(state.keys() & tensors.keys()):
            raise UserError(f"{path}: {twins[0]} is in another of the files, too")
        state |= tensors
    state = {name: t for theirs, t in state.items() if (name := family.ours(theirs))}
    layers = {m[1] for name in state if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != config.num_hidden_layers:
        raise UserError(f"{folder}/config.json: describes {config.num_hidden_layers} layers, the weights {len(layers)}")
    with torch.device("meta"):  # names and shapes without memory
        described = family.model(config)
    size = sum(p.numel() for p in described.parameters())
    on_disk = sum(path.stat().st_size for path in paths)
    # Every stored weight takes at least half a byte; a config that asks for far more was not written for these files.
    if size > 4 * on_disk + (1 << 20):
        raise UserError(f"{folder}/config.json: describes {size:,} parameters, the weights are {on_disk:,} bytes")
    if config.tie_word_embeddings:
        # Tied weights are stored once, and both names are in use for them.
        one = state.pop(HEAD, None)
        state.setdefault(EMBEDDING, one) if one is not None else None
        if EMBEDDING in state:
            state[HEAD] = state[EMBEDDING]
    check_tensors(paths[0], state, described.state_dict())

    def fill(write: Callable[[str, Tensor], None]) -> None:
        for name, values in state.items():
            write(name, values)

    return described, fill


def check_tokenizer(folder: Path, model: Llama, tokenizer) -> None:
    """Refuse a tokenizer that the model was not trained with: one with more ids, or of another hash than noted."""
    size = model.config.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {size}", "is this its tokenizer?"
        )
    noted = load_about(folder).get("tokenizer_sha256", tokenizer.sha256)
    if noted != tokenizer.sha256:
        raise UserError(
            f"{folder}: trained with tokenizer {str(noted)[:12]}, here is {tokenizer.sha256[:12]}",
            "the files of two models in one folder?",
        )


def load_config(folder: Path) -> ModelConfig:
    """What a folder's config.json says, every number checked before anything is allocated."""
    path = Path(folder) / "config.json"
    raw = read_json(path, hint=f"is {folder} a model folder?")
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{path}: model_type {reprlib.repr(name)} is not supported", f"known: {', '.join(FAMILIES)}")
    config = FAMILIES[name].read(raw, path)
    if not config.vocab_size:
        raise UserError(f"{path}: vocab_size is 0")
    return config


class Family:
    """How the folders of Llama and its descendants in model.py are read and written. Others: extras/families.py.

    Args:
        architecture: what transformers calls the model.

    Attributes:
        model: its class here.
    """

    model = Llama

    def __init__(self, architecture: str):
        self.architecture = architecture

    def read(self, raw: dict, path: Path) -> ModelConfig:
        """config.json -> config.

        Raises:
            UserError: a number that is missing or impossible, a way of computing that is not here.
        """
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise UserError(f"{path}: hidden_act must be silu and mlp_bias false")
        if raw.get("use_sliding_window"):
            raise UserError(f"{path}: use_sliding_window is not supported")
        return make_config(ModelConfig, raw | read_rope(raw, path), path)

    def write(self, config: ModelConfig) -> dict:
        """config -> config.json."""
        scaling = {"rope_type": config.rope_type, "factor": config.rope_factor}
        if config.original_max_position_embeddings:
            scaling["original_max_position_embeddings"] = config.original_max_position_embeddings
        if config.rope_type == "llama3":
            scaling |= {name: ROPE_CONSTANTS[name] for name in ("low_freq_factor", "high_freq_factor")}
        same = {k: v for k, v in dataclasses.asdict(config).items() if k not in ROPE_FIELDS}
        return {
            "architectures": [self.architecture],
            **same,
            "hidden_act": "silu",
            "mlp_bias": False,
            "rope_scaling": None if config.rope_type == "default" else scaling,
            "attention_dropout": 0.0,
        }

    def ours(self, name: str) -> str:
        """Our name of a stored tensor, "" for a constant that old exports store."""
        return "" if name.endswith("rotary_emb.inv_freq") else name

    def theirs(self, name: str) -> str:
        return name


# By model_type. Commands add those of extras/families.py.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
}
ROPE_FIELDS = ("rope_type", "rope_factor", "original_max_position_embeddings")
# What transformers lets a config.json say and model.py takes as given.
ROPE_CONSTANTS = {"beta_fast": 32, "beta_slow": 1, "low_freq_factor": 1, "high_freq_factor": 4, "truncate": True}


def sizes(config: ModelConfig) -> dict:
    """What tells one model from another; fields that came later only where they are used: older runs go on."""
    later = {"model_type": "llama", "rope_type": "default", "rope_factor": 1.0, "original_max_position_embeddings": 0}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in later or v != later[k]}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def read_rope(raw: dict, path: Path) -> dict:
    """rope_theta and ROPE_FIELDS out of a config.json, old (rope_scaling) or of transformers 5 (rope_parameters)."""
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters = {reprlib.repr(rope)} is not an object")
    scaling = raw.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    plain = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    if (
        kind is None
        or (kind != "default" and scaling.get("factor") is None)
        or any(
            value is not None and key not in plain and value != ROPE_CONSTANTS.get(key)
            for key, value in scaling.items()
        )
    ):
        raise UserError(f"{path}: rope_scaling {reprlib.repr(scaling)} is not supported")
    theta = raw.get("rope_theta")
    found = {"rope_theta": rope.get("rope_theta", 10000.0) if theta is None else theta, "rope_type": kind}
    if kind != "default":
        found["rope_factor"] = scaling["factor"]
        if kind in ("yarn", "llama3"):
            found["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings", 0)
    return found


def make_config(cls: type, raw: dict, path: Path, **own):
    """A ModelConfig or one derived from it, out of what a config.json says, every number checked; `own` is not."""
    raw = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | raw
    values = {}
    for field in (f for f in dataclasses.fields(cls) if f.name not in own):
        value = raw.get(field.name)
        if value is None:
            if field.name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            ):
                raise UserError(f"{path}: {field.name} is missing")
            continue
        fits = type(value) in (int, float) if field.type is float else type(value) is field.type
        # The comparison also keeps out integers that no float holds.
        if not fits or (type(value) in (int, float) and not abs(value) <= sys.float_info.max):
            raise UserError(f"{path}: {field.name} = {reprlib.repr(value)} is not of type {field.type.__name__}")
        values[field.name] = field.type(value)
    try:
        return cls(**values, **own)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def read_json(path: Path, hint: str = "") -> dict:
    """A JSON object from a file; one that is huge, names a key twice or holds NaN is refused."""
    try:
        with open(path, "rb") as f:
            text = f.read(JSON_BYTES + 1)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}", hint) from None
    if len(text) > JSON_BYTES:
        raise UserError(f"{path}: larger than {JSON_BYTES:,} bytes", hint)
    try:
        return data.parse_object(text)
    except ValueError as e:
        raise UserError(f"{path}: not a JSON object: {e}", hint) from None


def _weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder: safetensors where there are any, else pickles."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json", Path(name).suffix)
    pickles = sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".pth") and p.is_file())
    if len(pickles) > 1:
        raise UserError(f"{folder}: weights in {pickles[0].name} or {pickles[1].name}?", "leave one of them there")
    if not pickles:
        raise UserError(f"{folder}/model.safetensors: No such file", f"is {folder} a model folder?")
    return pickles


def _shards(index: Path, suffix: str) -> list[Path]:
    """The weight files that an index names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map is missing")
    shards = sorted(set(map(str, names.values())))
    for name in shards:
        # A name with a folder in it, or a link, could read any file of the machine.
        plain = Path(name).name == name and name.endswith(suffix) and name.isprintable()
        if not plain or (index.parent / name).is_symlink():
            raise UserError(
                f"{index}: {reprlib.repr(name)} is not a plain file name inside the folder",
                f"a file of its own, {suffix}; cp -rL copies what links point to",
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: No such file", "an incomplete download?")
    return [index.parent / name for name in shards]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file of ours, copied: Windows neither moves nor removes a file that is mapped."""
    # The moments of a run have three times the names of its weights.
    return {name: t.clone() for name, t in _map_tensors(path, 4 * JSON_BYTES).items()}


def _map_tensors(path: Path, most: int) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory; its names and shapes may take `most` bytes."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(size - 8, most):
                raise ValueError(f"its header would take {length:,} bytes")
            data.parse_object(f.read(length))  # the library takes the last of two tensors of one name
        return load_file(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a safetensors file, or damaged: {e}") from None


def _load_pickled(path: Path, allowed: bool) -> dict[str, Tensor]:
    """All tensors of a file by torch.save, mapped where that is possible; nothing else in it is built or called.

    Source: before torch 2.6 such a file could run code (CVE-2025-32434), before 2.10 damage memory (CVE-2026-24747).
    """
    if not allowed:
        raise UserError(
            f"{path}: a pickle, which can hold more than weights",
            "pretrain.py, sft.py and sample.py read its tensors with --allow_pickle",
        )
    if torch.__version__ < (2, 10):
        raise UserError(f"--allow_pickle needs torch 2.10, this is {torch.__version__}", "pip install -U torch")
    try:
        zipped = zipfile.is_zipfile(path)  # since torch 1.6; only these can be mapped
        with zipfile.ZipFile(path) if zipped else contextlib.nullcontext() as archive:
            if zipped and any(member.compress_type for member in archive.infolist()):
                raise ValueError("torch.save compresses nothing")  # so this was made to grow
        state = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as e:  # whatever a hostile file makes the unpickler stumble over; its advice is not for our users
        raise UserError(f"{path}: holds more than weights, or is damaged ({type(e).__name__})") from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.is_cpu
        for k, t in state.items()
    ):
        raise UserError(f"{path}: not a table of tensors by name")
    return {k: t.detach() for k, t in state.items()}


def check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse missing, unexpected, misshapen or non-finite tensors, all of them named in one message."""
    problems = [f"{n} is missing" for n in wanted if n not in found]
    problems += [f"{n} is unexpected" for n in found if n not in wanted]
    problems += [
        f"{n} has shape {tuple(found[n].shape)}, expected {tuple(wanted[n].shape)}"
        for n in wanted
        if n in found and found[n].shape != wanted[n].shape
    ]
    problems += [f"{n} is {t.dtype}" for n, t in found.items() if t.dtype not in WEIGHT_DTYPES]
    if not problems:
        problems = [f"{n} holds NaN or infinity" for n, t in found.items() if not _finite(t)]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")


def _finite(t: Tensor) -> bool:
    # isfinite would build two more tensors of this size; a NaN is both the least and the greatest.
    return bool(torch.stack(torch.aminmax(t)).isfinite().all())


def model_folder(path: str | Path, config: str = "config.json") -> Path:
    """The folder with the weights: the path itself, or its newest whole checkpoint where a run was cut short.

    Args:
        config: the file that such a folder has.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder", "train one with python pretrain.py, or check the path")
    for folder in [path, *(path / f"checkpoint-{step}" for step in reversed(checkpoint_steps(path)))]:
        if (folder / config).exists() and (folder == path or verify(folder) is None):
            return folder
    raise UserError(f"{path}: no model in this folder", "train one with python pretrain.py, or check the path")


def weights_digest(folder: Path) -> str:
    """Hash of a folder's weight files: says whether a base model is the same."""
    return hashlib.sha256("".join(map(files.sha256, _weight_files(folder))).encode()).hexdigest()


def load_about(folder: Path) -> dict:
    """run.json of a folder that we wrote, {} for one from elsewhere."""
    path = Path(folder) / "run.json"
    about = read_json(path) if path.exists() else {}
    if not isinstance(about.get("chat_format"), str | None):
        raise UserError(f"{path}: chat_format = {reprlib.repr(about['chat_format'])} is not a name")
    return about


# ---------------------------------------------------------------- resumable runs


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have their final name, oldest first; file times say nothing."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in found if m)


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
        state = read_json(path / "state.json")
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


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file of its manifest has its size and hash."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError as e:
        return str(e)
    # What holds a part of a model has a prefix: adapter_model.safetensors, adapter_config.json.
    part = "".join(name.removesuffix("model.safetensors") for name in manifest if name.endswith("_model.safetensors"))
    for name in (f"{part}model.safetensors", "optimizer.safetensors", "state.json", f"{part}config.json"):
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

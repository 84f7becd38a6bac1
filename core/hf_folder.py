"""Model folders: what transformers, vLLM and llama.cpp's converter read, and run.json beside it.

In:  a model, a tokenizer, plain data on the run. Out: a folder; from a folder a model and its weights, each checked.
Knows nothing of runs, optimizers or losses.
"""

import hashlib
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core import files
from core.errors import Diverged, UserError
from core.hf_config import family_of, read_config
from core.memory import save_memory
from model import Llama, ModelConfig
from tokenizer import chat

FORMAT = 1
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        # A chat model stops at the end of an answer.
        if about.get("chat_format"):
            special["eos_token_id"] = sorted(chat.end_ids(tokenizer, about["chat_format"]))
        files.write_json(folder / "generation_config.json", {"_from_model_config": False, **special})
    # Tied weights are stored once, as the embedding.
    state, theirs = weights or dict(model.named_parameters()), family_of(model.config).theirs
    if model.config.tie_word_embeddings:
        state = {name: t for name, t in state.items() if name != HEAD}
    save_tensors(folder / "model.safetensors", {theirs(n): t.detach().contiguous() for n, t in state.items()})
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


@dataclass
class Opened:
    """A model folder that was looked at: everything is checked, and no memory is taken yet.

    Attributes:
        model: on the meta device.
        weights: (name, values) of each of its weights, mapped from the files; to be read once.
        paths: the files with the weights.
    """

    folder: Path
    model: Llama
    weights: Iterable[tuple[str, Tensor]]
    paths: list[Path]

    @cached_property
    def digest(self) -> str:
        """Hash of the weight files: says whether a base model is the same."""
        return hashlib.sha256("".join(map(files.sha256, self.paths)).encode()).hexdigest()


def open_model(folder: Path) -> Opened:
    """Look at a folder with a plain Llama, as `save_model` writes it. All other folders: assembly/models.py.

    Args:
        folder: config.json and model.safetensors.
    Raises:
        UserError: missing or damaged files, weights that do not fit the config, NaN in weights.
    """
    path = folder / "model.safetensors"
    return match(folder, read_config(folder / "config.json", f"is {folder} a model folder?"), map_tensors(path), [path])


def match(folder: Path, config: ModelConfig, state: dict[str, Tensor], paths: list[Path]) -> Opened:
    """Bring a config and stored tensors together.

    Args:
        state: tensors by the names of their files, mapped, not read: nothing is allocated before sizes and names
            have been compared.
        paths: their files.
    Raises:
        UserError: weights that do not fit the config, NaN in weights.
    """
    family = family_of(config)
    state = {name: t for theirs, t in state.items() if (name := family.ours(theirs))}
    # A config with more layers than the weights could make building the model itself expensive.
    layers = {m[1] for name in state if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != config.num_hidden_layers:
        raise UserError(f"{folder}/config.json: describes {config.num_hidden_layers} layers, the weights {len(layers)}")
    with torch.device("meta"):  # names and shapes without memory
        described = save_memory(family.model(config))
    size, on_disk = sum(p.numel() for p in described.parameters()), sum(path.stat().st_size for path in paths)
    # Every stored weight takes at least half a byte; a config that asks for far more was not written for these files.
    if size > 4 * on_disk + (1 << 20):
        raise UserError(f"{folder}/config.json: describes {size:,} parameters, the weights are {on_disk:,} bytes")
    # Tied weights are stored once, and both names are in use for them.
    if config.tie_word_embeddings:
        one = state.get(EMBEDDING, state.get(HEAD))
        if one is not None:
            state |= {EMBEDDING: one, HEAD: one}
    check_tensors(paths[0], state, described.state_dict())
    return Opened(folder, described, iter(state.items()), paths)


def build(model: Llama, weights: Iterable[tuple[str, Tensor]], device="cpu", dtype=torch.float32) -> Llama:
    """Memory and weights for a model on the meta device.

    Args:
        weights: (name, values) of each.
        device: a torch device or its name.
        dtype: of the weights in memory.
    """
    # Copies: what is only mapped would change, or end the process, when the file is written over during a run.
    state = {name: t.to(device=device, dtype=dtype, copy=True) for name, t in weights}
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def check_tokenizer(folder: Path, model: Llama, tokenizer) -> None:
    """Refuse a tokenizer that the model was not trained with: one with more ids, or of another hash than noted."""
    if model.config.vocab_size < tokenizer.vocab_size:
        said = f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}"
        raise UserError(f"{folder}: {said}", "is this its tokenizer?")
    # A folder from elsewhere has no such note.
    noted = load_about(folder).get("tokenizer_sha256", tokenizer.sha256)
    if noted != tokenizer.sha256:
        said = f"trained with tokenizer {str(noted)[:12]}, here is {tokenizer.sha256[:12]}"
        raise UserError(f"{folder}: {said}", "the files of two models in one folder?")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file of ours, copied: Windows neither moves nor removes a file that is mapped."""
    # The moments of a run have three times the names of its weights.
    return {name: t.clone() for name, t in map_tensors(path, 4 * files.JSON_BYTES).items()}


def map_tensors(path: Path, most: int = files.JSON_BYTES) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory; its names and shapes may take `most` bytes."""
    try:
        with open(path, "rb") as f:
            # Eight bytes with the header's length, then the header, which is JSON. A huge or a wrong one is refused
            # before the library reads it.
            size, head = os.fstat(f.fileno()).st_size, f.read(8)
            length = int.from_bytes(head, "little") if len(head) == 8 else size
            if length > min(size - 8, most):
                raise ValueError(f"its header would take {length:,} bytes")
            files.parse_object(f.read(length))  # the library takes the last of two tensors of one name
        return load_file(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a safetensors file, or damaged: {e}") from None


def check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse missing, unexpected, misshapen or non-finite tensors, all of them named in one message."""
    problems = [f"{n} is missing" for n in wanted if n not in found]
    problems += [f"{n} is unexpected" for n in found if n not in wanted]
    shapes = {n: (tuple(found[n].shape), tuple(t.shape)) for n, t in wanted.items() if n in found}
    problems += [f"{n} has shape {here}, expected {there}" for n, (here, there) in shapes.items() if here != there]
    problems += [f"{n} is {t.dtype}" for n, t in found.items() if t.dtype not in WEIGHT_DTYPES]
    # Last, since it reads every number.
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
    path, hint = Path(path), "train one with python pretrain.py, or check the path"
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder", hint)
    # A checkpoint may be damaged; the folder itself has no manifest.
    for folder in [path, *(path / f"checkpoint-{step}" for step in reversed(checkpoint_steps(path)))]:
        if (folder / config).exists() and (folder == path or verify(folder) is None):
            return folder
    raise UserError(f"{path}: no model in this folder", hint)


def load_about(folder: Path) -> dict:
    """run.json of a folder that we wrote, {} for one from elsewhere."""
    path = Path(folder) / "run.json"
    about = files.read_json(path) if path.exists() else {}
    if not isinstance(about.get("chat_format"), str | None):
        raise UserError(f"{path}: chat_format = {reprlib.repr(about['chat_format'])} is not a name")
    return about


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have their final name, oldest first; file times say nothing."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in found if m)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file of its manifest has its size and hash."""
    try:
        manifest = files.read_json(folder / "manifest.json")
    except UserError as e:
        return str(e)
    # What holds a part of a model has a prefix: adapter_model.safetensors, adapter_config.json.
    part = "".join(name.removesuffix("model.safetensors") for name in manifest if name.endswith("_model.safetensors"))
    for name in (f"{part}model.safetensors", "optimizer.safetensors", "state.json", f"{part}config.json"):
        if name not in manifest:
            return f"{name} is not in manifest.json"
    # Nothing else is in the folder, and each file has its size and its hash.
    if extra := sorted({p.name for p in folder.iterdir()} - manifest.keys() - {"manifest.json"}):
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

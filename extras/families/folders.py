"""Model folders that we did not write: other families, weights in several files, pickles.

In:  a folder from elsewhere. Out: a model on the meta device and its weights, each checked, as core/hf_folder.py gives
them for plain Llamas.
Knows nothing of what the model is opened for.
"""

import contextlib
import reprlib
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from core import files, hf_folder
from core.errors import UserError
from core.hf_config import OtherConfig
from extras.families.llama_kin import ARCHITECTURES, KinFamily
from extras.families.others import FAMILIES


def open_model(folder: Path, allow_pickle: bool = False) -> hf_folder.Opened:
    """Look at a model folder.

    Args:
        folder: config.json and model.safetensors (or shards named by model.safetensors.index.json), or where there is
            neither, the same as pytorch_model.bin, or one .pt or .pth.
        allow_pickle: read a .bin, .pt or .pth, by torch's unpickler that builds tensors and calls nothing else.
    Raises:
        UserError: missing or damaged files, a family that is not here, weights that do not fit the config.
    """
    config = read_config(folder)
    if files.read_json(folder / "config.json").get("quantization_config"):
        raise UserError(
            f"{folder}: its weights are quantised, they are for generation only", "take the folder that it was made of"
        )
    paths = weight_files(folder)
    state: dict[str, Tensor] = {}
    for path in paths:
        pickled = path.suffix != ".safetensors"
        tensors = _load_pickled(path, allow_pickle) if pickled else hf_folder.map_tensors(path)
        if twins := sorted(state.keys() & tensors.keys()):
            raise UserError(f"{path}: {twins[0]} is in another of the files, too")
        state |= tensors
    return hf_folder.match(folder, config, state, paths)


def read_config(folder: Path) -> OtherConfig:
    """What a folder's config.json says, every number checked before anything is allocated."""
    path = Path(folder) / "config.json"
    raw = files.read_json(path, hint=f"is {folder} a model folder?")
    name = raw.get("model_type")
    known = {name: KinFamily(name) for name in ARCHITECTURES} | FAMILIES
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{path}: model_type {reprlib.repr(name)} is not supported", f"known: {', '.join(known)}")
    return known[name].read(raw, path)


def weight_files(folder: Path) -> list[Path]:
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
    names = files.read_json(index).get("weight_map")
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

"""Any model folder in, a model out: plain Llamas by core/hf_folder.py, all others by a wing.

In:  a folder. Out: a model on the meta device with its weights, or a whole one.
Knows nothing of what the model is opened for.
"""

from pathlib import Path

import torch

from core import files, hf_config, hf_folder
from core.hf_folder import Opened
from model import Llama, ModelConfig


def open_model(folder: str | Path, allow_pickle: bool = False) -> Opened:
    """Look at a model folder: names, sizes and numbers are checked, nothing is allocated.

    Args:
        folder: ours, or Hugging Face's of a known family; see extras/families/folders.py for what may be in it.
        allow_pickle: its weights may be a .bin, .pt or .pth: only tensors are read from it.
    Raises:
        UserError: missing or damaged files, an unknown family, weights that do not fit the config, NaN in weights.
    """
    # What the lesson writes needs no wing. Everything else is asked of the one that knows other people's folders.
    folder = Path(folder)
    raw = _read_json(folder)
    plain = hf_config.is_plain_llama(raw) and not raw.get("quantization_config")
    if plain and (folder / "model.safetensors").is_file():
        return hf_folder.open_model(folder)
    from extras.families import folders

    return folders.open_model(folder, allow_pickle)


def load_model(
    folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32, allow_pickle: bool = False
) -> Llama:
    """The model that a folder describes, with its weights in `dtype`; errors as `open_model`."""
    # Weights are copied out of the files one after another, cast on the way.
    opened = open_model(folder, allow_pickle)
    return hf_folder.build(opened.model, opened.weights, device, dtype)


def read_config(folder: str | Path) -> ModelConfig:
    """What a folder's config.json says, every number checked."""
    folder = Path(folder)
    if hf_config.is_plain_llama(_read_json(folder)):
        return hf_config.read_config(folder / "config.json")
    from extras.families import folders

    return folders.read_config(folder)


def _read_json(folder: Path) -> dict:
    return files.read_json(folder / "config.json", hint=f"is {folder} a model folder?")

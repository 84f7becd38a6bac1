"""How surprising a text is to a trained model.

In:  a model folder, a text. Out: bits per byte.
Does not know how a model is loaded: that is handed in; nor what is done with the number: filter.py does.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from core import hf_folder
from model import Llama
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer


@lru_cache(1)
def load(path: str, load_model: Callable[[Path], Llama]) -> tuple[Llama, Tokenizer]:
    """Once, not for every chunk of documents."""
    folder = hf_folder.model_folder(path)
    return load_model(folder).eval(), load_tokenizer(folder)


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, text: str) -> float:
    """How many bits the model needs for a byte of the text, in windows of its context, all of it read."""
    ids = torch.tensor(tokenizer.encode(text, bos=True, eos=True))
    length, nats = model.config.max_position_embeddings, 0.0
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        nats += model(window[None, :-1], targets=window[None, 1:]).sum().item()
    return nats / math.log(2) / max(1, len(text.encode()))

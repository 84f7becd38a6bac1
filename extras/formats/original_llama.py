"""A Llama as Meta's original code has it, which llama.cpp and llama2.c follow: what their formats ask for alike.

In:  a model folder, weights, a tokenizer. Out: weights in the interleaved layout, and a vocabulary that merging pairs
explains.
Knows no file format: gguf_file.py and llama2c.py do.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from core import hf_folder
from core.errors import UserError
from model import Llama
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer
from tokenizer.sentencepiece_model import BPE, SPACE, UNUSED, USER_DEFINED, Piece


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k, so that RoPE turns the pairs (2i, 2i + 1) of a head, not (i, i + D/2).

    llama.cpp and llama2.c have it so, our files are as transformers has it. The scores are the same, because q and k
    are reordered alike.

    Args:
        weight: (heads * D, C), or a bias (heads * D,).
        heads: of q or of k.
    Returns:
        the same shape.
    Source: https://arxiv.org/abs/2104.09864, equation 34; transformers' convert_llama_weights_to_hf.py, the other way.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`; arguments and result as there."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def load_folder(path: str, open_model: Callable[..., hf_folder.Opened]) -> tuple[Path, Llama, Tokenizer]:
    """The folder with a run's weights, its model in fp32 and its tokenizer, which belong together.

    Args:
        open_model: folder -> what is in it, whatever its family.
    """
    folder = hf_folder.model_folder(path)
    tokenizer, opened = load_tokenizer(folder), open_model(folder)
    config = {"model_type": "llama", "rope_type": "default"} | dataclasses.asdict(opened.model.config)
    kind, rope = config["model_type"], config["rope_type"]
    if (kind, rope) != ("llama", "default"):
        raise UserError(
            f"{folder}: {kind} with rope_type {rope}, only plain Llama models are written for others",
            "transformers reads the folder as it is, llama.cpp's own converter too",
        )
    model = hf_folder.build(opened.model, opened.weights)
    hf_folder.check_tokenizer(folder, model, tokenizer)
    return folder, model, tokenizer


def vocabulary(tokenizer: Tokenizer, size: int) -> list[Piece]:
    """The pieces of a tokenizer, id = place in the list.

    Args:
        tokenizer: a BPE of sentencepiece that changes no text: the other programs merge pairs and know nothing else.
        size: of the model's embedding. Rows that no text can name get unused pieces.
    Raises:
        UserError: the other programs would give other ids.
    """
    model = tokenizer.model
    if model is None:
        raise UserError(
            f"{tokenizer.path}: not a sentencepiece model", "llama.cpp and llama2.c need a tokenizer.model here"
        )
    problems = {
        "it is no BPE": model.model_type != BPE,
        "its normaliser changes texts": model.charsmap or model.remove_extra_whitespaces,
        "it has no byte fallback": not model.byte_fallback,
        "it has no piece for the space": all(p.text != SPACE for p in model.pieces),
        "it has user-defined or unused pieces": any(p.type in (USER_DEFINED, UNUSED) for p in model.pieces),
    }
    for problem, there in problems.items():
        if there:
            raise UserError(f"{tokenizer.path}: {problem}: llama.cpp and llama2.c would read texts otherwise")
    # sentencepiece writes a space as SPACE, so no piece of it has a plain one: these names are free.
    return [*model.pieces, *(Piece(f"<padding {i}>", 0.0, UNUSED) for i in range(len(model.pieces), size))]

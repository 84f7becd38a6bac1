"""A model that follows its tokenizer to a pruned vocabulary: its embedding and head keep the rows of what stayed.

In:  a model folder, the tokenizer from before and the pruned one. Out: a model folder.
Does not choose pieces.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from core import hf_folder
from core.errors import UserError
from model import Llama
from tokenizer import Tokenizer, load


def remap_model(path: Path, output: Path, old: Tokenizer, new: Tokenizer, load_model: Callable) -> None:
    """Write a model whose embedding and head have the rows of the pieces that stayed, the rest unchanged.

    Args:
        path: a model folder with the old tokenizer in it.
        output: the new folder.
        load_model: a function from a folder to a model.

    Raises:
        UserError: no model there, or one with another tokenizer.
    """
    folder = hf_folder.model_folder(path)
    theirs = load(folder)
    if theirs.sha256 != old.sha256:
        raise UserError(f"{folder}: its tokenizer is {theirs.sha256[:12]}, --input is {old.sha256[:12]}")
    model = load_model(folder)
    before = sum(p.numel() for p in model.parameters())
    ids = {p.text: i for i, p in enumerate(old.model.pieces)}
    take_rows(model, [ids[p.text] for p in new.model.pieces])
    about = hf_folder.load_about(folder)
    hf_folder.save_model(output, model, new, about | {"pruned_from_tokenizer": old.sha256})
    print(f"{output}: {before:,} -> {sum(p.numel() for p in model.parameters()):,} parameters")


def take_rows(model: Llama, rows: list[int]) -> None:
    """Leave only these rows, in this order, in the embedding and the head."""
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight = nn.Parameter(embedding.weight.detach()[rows])
    head.weight = embedding.weight if model.config.tie_word_embeddings else nn.Parameter(head.weight.detach()[rows])
    model.config = dataclasses.replace(model.config, vocab_size=len(rows))

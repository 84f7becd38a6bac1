"""Longer contexts: positions scaled to the range that a model knows, and cheaper attention while it is tuned for them.

In:  an opened model and LongConfig. Out: the same model with another config and, in training, shifted sparse attention;
outside of training its attention is the whole one, so that what is saved needs no code of ours.
Knows nothing of LoRA: configs/longlora.toml puts the two together, with embeddings and norms trained besides.

Shapes:  B batch, H heads, K key/value heads, T positions, D head_dim
Source: Chen et al., LongLoRA, https://arxiv.org/abs/2309.12307
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from core.config import Range, Section
from core.errors import UserError
from model import Attention, Llama, ModelConfig

GROUPS = 4  # a group is a quarter of the row, as in the paper


@dataclass(frozen=True)
class LongConfig(Section):
    # Positions to reach, a multiple of what the base knows; 0: as many as the base.
    context: Annotated[int, Range(least=0)] = 0
    scaling: Literal["linear", "dynamic", "yarn"] = "linear"  # of positions
    shifted: bool = False  # in training, attention within groups of a quarter of a row; half of the heads shifted


def plan(config: ModelConfig, rope_type: str, cfg: LongConfig) -> dict:
    """What changes in a model's config, so that it reaches further; {} for nothing.

    Args:
        rope_type: of the model; "": its positions are not turned as Llama's are.
    Raises:
        UserError: a context that the base has already, a model whose positions are scaled already or not turned.
    """
    known = config.max_position_embeddings
    if not cfg.context:
        return {}
    if rope_type != "default":
        said = f"context = {cfg.context}: not for {config.model_type} with rope_type {rope_type or 'of its own'}"
        raise UserError(said, "a Llama or Qwen whose positions are not scaled")
    if cfg.context <= known:
        raise UserError(f"context = {cfg.context}: the base has {known} positions", f"--context {4 * known}")
    # transformers measures `dynamic` from max_position_embeddings; yarn alone wants to know what was trained on.
    return {
        "rope_type": cfg.scaling,
        "rope_factor": cfg.context / known,
        "max_position_embeddings": known if cfg.scaling == "dynamic" else cfg.context,
        "original_max_position_embeddings": known if cfg.scaling == "yarn" else 0,
    }


def shift(model: Llama) -> Llama:
    """The same model with shifted sparse attention in training.

    Raises:
        UserError: an odd number of heads.
    """
    if model.config.num_attention_heads % 2:
        raise UserError(f"shifted: {model.config.num_attention_heads} heads have no halves")
    for block in model.model.layers:
        block.self_attn.attend = partial(shifted_attention, block.self_attn)
    return model


def shifted_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention within groups of a quarter of the row; in half of the heads the groups begin half a group later, so
    that what one group knows reaches the next. A quarter of the products, and never a key from behind a query.

    The paper rolls the shifted heads around, and its last group sees the row's beginning; here the two halves at the
    ends are groups of their own.

    Args and result: as Attention.attend. Outside of training: that.
    """
    whole = partial(type(attention).attend, attention)
    rows, heads, t, _ = q.shape
    if not attention.training:
        return whole(q, k, v, mask)
    if t % (2 * GROUPS):
        raise UserError(f"shifted: rows of {t} positions", f"a seq_len that {2 * GROUPS} divides")
    size, times = t // GROUPS, heads // k.shape[1]
    k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))

    def within(some: slice, first: int, last: int, size: int) -> Tensor:
        """Some heads at positions first .. last - 1, in groups of `size`."""
        parts = [x[:, some, first:last].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        allowed = None
        if mask is not None:  # (B, 1, T, T): its blocks on the diagonal
            starts = range(first, last, size)
            allowed = torch.stack([mask[..., i : i + size, i : i + size] for i in starts], dim=1).flatten(0, 1)
        return whole(*parts, allowed).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)  # (B, h, last - first, D)

    straight, shifted, half = slice(0, heads // 2), slice(heads // 2, heads), size // 2
    pieces = [within(shifted, 0, half, half), within(shifted, half, t - half, size), within(shifted, t - half, t, half)]
    return torch.cat([within(straight, 0, t, size), torch.cat(pieces, dim=2)], dim=1)

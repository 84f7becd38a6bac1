"""Sampling: prompts of ids in, ids out one step at a time, with a key/value cache.

In:  a model and lists of ids. Out: (row, id) pairs as they are chosen.
Knows ids, not text: what they mean, and when half a character has come, is the tokenizer's business.

Shapes:  B prompts, V vocabulary
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError
from model import Cache, Llama


@dataclass(frozen=True)
class SamplingConfig:
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely id (greedy)
    top_k: int = 0  # only the k most likely ids; 0: all
    top_p: float = 0.9  # only the most likely ids that together reach this probability; 1: all
    min_p: float = 0.0  # only ids at least this share as likely as the most likely one; 0: all
    repetition_penalty: float = 1.0  # above 1: ids already there become less likely
    seed: int = 1  # the same seed gives the same text, whatever else is in the batch

    def __post_init__(self):
        # Written so that NaN fails every test.
        # The bounds keep fp32 from overflowing, and lie far beyond what is of use.
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature = {self.temperature}, must be from 0 to 100")
        if self.max_new_tokens < 0 or self.top_k < 0:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}, top_k = {self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}, must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty}, must be from 0.01 to 100")


def next_probabilities(logits: Tensor, seen: Tensor, cfg: SamplingConfig) -> Tensor:
    """What to draw the next id from.

    Args:
        logits: (B, V).
        seen: (B, V) bool, the ids already in each row, for the repetition penalty.
    Returns:
        Probabilities (B, V) fp32, each row summing to one; at temperature 0 all on the most likely id.
    """
    logits = logits.float()
    if cfg.repetition_penalty != 1:
        # CTRL, https://arxiv.org/abs/1909.05858: divide what is positive, multiply what is negative.
        punished = torch.where(logits > 0, logits / cfg.repetition_penalty, logits * cfg.repetition_penalty)
        largest = torch.finfo(torch.float32).max  # a huge logit divided by a small penalty stays a number
        logits = torch.where(seen, punished, logits).clamp(-largest, largest)
    best = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    # Below this temperature the division would overflow, and the draw is certain anyway.
    if cfg.temperature < 1e-5:
        return torch.zeros_like(logits).scatter_(1, best, 1.0)
    logits = (logits - logits.gather(1, best)) / cfg.temperature  # the largest is 0: exp cannot overflow
    if 0 < cfg.top_k < logits.shape[1]:
        kth = logits.topk(cfg.top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(dim=-1)
    if cfg.min_p > 0:
        p = p.masked_fill(p < cfg.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        p = p / p.sum(dim=-1, keepdim=True)
    if cfg.top_p < 1:
        # Source: https://arxiv.org/abs/1904.09751. An id stays while those before it have not reached top_p.
        ordered, order = p.sort(dim=-1, descending=True)
        reached = ordered.cumsum(dim=-1) - ordered >= cfg.top_p
        reached[:, 0] = False  # a top_p below the smallest fp32 number would leave none
        p = torch.zeros_like(p).scatter_(1, order, ordered.masked_fill(reached, 0.0))
        p = p / p.sum(dim=-1, keepdim=True)
    return p


@torch.no_grad()
def generate(model: Llama, prompts: Sequence[Sequence[int]], cfg: SamplingConfig,
             stop_ids: set[int]) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Continue prompts, all of them in one batch.

    Args:
        prompts: ids of each row, none empty, none longer than the model's context.
        stop_ids: an id in here ends its row and is not given out.
    Yields:
        Once per step, (row, id) of every row that goes on. A row ends at a stop id, after max_new_tokens, or where
        it fills the model's context.
    Raises:
        UserError: an empty or too long prompt, an id out of range, logits that are not numbers.
    """
    assert prompts
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt has no tokens", "this tokenizer has no bos; write at least one character")
        if len(prompt) > context:
            raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {context}", "shorten it")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = next(i for i in prompt if not 0 <= i < vocab)
            raise UserError(f"the prompt has id {wrong}, the model knows {vocab}", "is this its tokenizer?")
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    longest = max(map(len, prompts))
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T), left-padded
    # No row can use more than this, and each of its steps is a step of every row.
    steps = min(cfg.max_new_tokens, context - min(map(len, prompts)) + 1)
    cache = Cache(model.config, len(prompts), longest + steps, pad, device=device, dtype=dtype)
    seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    # A generator per row: what a row draws does not depend on its neighbours. Drawn on the CPU, the same on any device.
    generators = [torch.Generator().manual_seed(cfg.seed) for _ in prompts]
    alive = [True] * len(prompts)
    for made in range(steps):
        # The next id is drawn after the last position, and a position past the context was never trained.
        alive = [on and len(prompt) + made <= context for on, prompt in zip(alive, prompts)]
        if not any(alive):
            return
        # Logits of the last position only: those of a whole batch of prompts would be gigabytes.
        logits = model.lm_head(model.hidden(ids, cache=cache)[:, -1])  # (B, V)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite numbers", "its weights may be damaged; try --dtype fp32")
        p = next_probabilities(logits, seen, cfg)
        if cfg.temperature < 1e-5:
            chosen = p.argmax(dim=-1)
        else:
            draws = torch.tensor([[torch.rand((), generator=g).item()] for g in generators], device=device)  # (B, 1)
            # Where the running sum passes the draw; the last id with any probability where rounding leaves it short.
            last = vocab - 1 - (p > 0).flip(-1).float().argmax(dim=-1)
            chosen = torch.minimum((p.cumsum(dim=-1) <= draws).sum(dim=-1), last)  # (B,)
        seen[torch.arange(len(prompts)), chosen] = True
        step = []
        for row, token in enumerate(chosen.tolist()):
            alive[row] = alive[row] and token not in stop_ids
            if alive[row]:
                step.append((row, token))
        yield step
        ids = chosen[:, None]  # (B, 1)


def complete(model: Llama, prompts: Sequence[Sequence[int]], cfg: SamplingConfig,
             stop_ids: set[int]) -> list[list[int]]:  # fmt: skip
    """What `generate` adds to each prompt, all at once."""
    added: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, cfg, stop_ids):
        for row, token in step:
            added[row].append(token)
    return added

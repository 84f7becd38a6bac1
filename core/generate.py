"""Sampling: a prompt of ids in, ids out one at a time, with a key/value cache.

In:  a model and a list of ids. Out: ids as they are chosen; and `for_decoding`, the same model with faster products.
Knows ids, not text: what they mean, and when half a character has come, is the tokenizer's business. Many texts at
once, beams and log-probabilities: extras/decoding.

Shapes:  B texts, T new positions, S positions in the cache, V vocabulary
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from core.config import Range, Section
from core.errors import UserError
from model import Llama, ModelConfig

INTEL = Path("/proc/cpuinfo").exists() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


# The bounds keep fp32 from overflowing, and lie far beyond what is of use.
@dataclass(frozen=True)
class SamplingConfig(Section):
    max_new_tokens: Annotated[int, Range(least=0)] = 200
    temperature: Annotated[float, Range(least=0, most=100)] = 0.8  # 0: always the most likely id (greedy)
    top_k: Annotated[int, Range(least=0)] = 0  # only the k most likely ids; 0: all
    # Only the most likely ids that together reach this probability; 1: all.
    top_p: Annotated[float, Range(above=0, most=1)] = 0.9
    min_p: Annotated[float, Range(least=0, most=1)] = 0.0  # only ids this share as likely as the likeliest; 0: all
    # Above 1: ids in the prompt or in what was made become less likely.
    repetition_penalty: Annotated[float, Range(least=0.01, most=100)] = 1.0
    # Subtracted from the logits of ids that were made already: presence once, frequency once for each time.
    presence_penalty: Annotated[float, Range(least=-2, most=2)] = 0.0
    frequency_penalty: Annotated[float, Range(least=-2, most=2)] = 0.0
    truncate: Literal["none", "left"] = "none"  # left: when the context is full, the text goes on from its newer half
    seed: int = 1  # the same seed gives the same text, whatever else is in the batch


class Cache:
    """Keys and values of the positions already seen, for step-by-step decoding; each row is at its own place.

    Args:
        config: sizes.
        batch: rows B.
        length: positions S that fit.

    Attributes:
        used: (B,) int64, positions filled so far. After prompts of different lengths, padded on the right, set it back
            to their lengths: what lies behind is written over before anything sees it.
        span: how many of the S positions attention looks at; at least as many as are used. None: all.
        fresh: nothing is in it yet: the keys are those of the queries' own positions.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, *, device=None, dtype=None):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used = torch.zeros(batch, dtype=torch.long, device=device)
        self.span: int | None = None
        self.fresh, self.whole = True, False

    def positions_and_mask(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Make room for `count` more positions: where they are (B, T); which keys they see (B, 1, T, S), or None: all
        before them. The model calls it once, and then `append` for each layer."""
        self.at = self.used[:, None] + torch.arange(count, device=self.used.device)  # (B, T)
        self.used += count
        # In an empty cache the keys are those of these positions alone, and attention is causal anyway.
        self.whole, self.fresh = self.fresh, False
        if self.whole:
            return self.at, None
        keys = torch.arange(self.k.shape[3] if self.span is None else self.span, device=self.used.device)  # (S,)
        return self.at, (keys <= self.at[..., None])[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of the new positions; return the keys and values to look at, (B, K, S, D)."""
        # Each row is written at its own place.
        rows = torch.arange(len(self.used), device=k.device)[:, None]
        self.k[layer][rows, :, self.at] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, self.at] = v.transpose(1, 2).to(self.v.dtype)
        if self.whole:
            return k, v
        return self.k[layer, :, :, : self.span].to(k.dtype), self.v[layer, :, :, : self.span].to(v.dtype)


def generate(model: Llama, prompt: Sequence[int], cfg: SamplingConfig, stop_ids: set[int]) -> Iterator[int]:
    """Continue a prompt.

    Args:
        prompt: ids, not empty, not longer than the model's context.
        stop_ids: an id in here ends the text and is not given out.
    Yields:
        ids, up to a stop id, max_new_tokens, or the end of the model's context.
    Raises:
        UserError: an empty or too long prompt, an id out of range, logits that are not numbers.
    """
    weight, context = model.model.embed_tokens.weight, model.config.max_position_embeddings
    text = fit_prompt(prompt, model, cfg)
    length = min(len(text) + cfg.max_new_tokens, context)
    cache = Cache(model.config, 1, length, device=weight.device, dtype=weight.dtype)
    # What the draw needs: random numbers of its own, and which ids have come, how often.
    draws = torch.Generator().manual_seed(cfg.seed)  # on the CPU: the same on any device
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=weight.device)
    made = torch.zeros(1, model.config.vocab_size, dtype=torch.int32, device=weight.device)
    seen[0, text] = True

    new, room = text, context - len(text)
    for number in range(cfg.max_new_tokens):
        # The model reads what it has not read yet: first the whole prompt, then each new id.
        cache.span = int(cache.used[0]) + len(new)
        logits = next_logits(model, torch.tensor([new], device=weight.device), cache)  # (1, V)
        chosen = choose(penalise(logits, seen, made, cfg), cfg, [draws])
        require_finite(logits.log_softmax(dim=-1)[0, chosen])
        id = int(chosen)
        if id in stop_ids:
            return
        yield id
        text, new = [*text, id], [id]
        seen[0, id] = True
        made[0, id] += 1
        # The next id is drawn behind the last position, and a position past the context was never trained.
        if number + 1 > room and cfg.truncate == "none":
            return
        if int(cache.used[0]) == context:  # with truncate: the newer half of the text is read anew
            new = text[-1 - context // 2 :]
            cache.used.zero_()
            cache.fresh = True


@torch.no_grad()
def next_logits(model: Llama, ids: Tensor, cache: Cache) -> Tensor:
    """What may follow the last of the new ids: (B, T) -> logits (B, V) fp32."""
    return model.lm_head(model.hidden(ids, cache=cache)[:, -1]).float()


def penalise(logits: Tensor, seen: Tensor, made: Tensor, cfg: SamplingConfig) -> Tensor:
    """Logits with what repeats made less likely.

    Args:
        logits: (B, V) fp32.
        seen: (B, V) bool, ids in the prompt or in what was made.
        made: (B, V) int32, how often each id was made.
    """
    if cfg.presence_penalty or cfg.frequency_penalty:
        # https://platform.openai.com/docs/advanced-usage, "frequency and presence penalties"
        logits = logits - cfg.presence_penalty * (made > 0) - cfg.frequency_penalty * made
    if cfg.repetition_penalty != 1:
        # CTRL, https://arxiv.org/abs/1909.05858: divide what is positive, multiply what is negative.
        punished = torch.where(logits > 0, logits / cfg.repetition_penalty, logits * cfg.repetition_penalty)
        largest = torch.finfo(torch.float32).max  # a huge logit divided by a small penalty stays a number
        logits = torch.where(seen, punished, logits).clamp(-largest, largest)
    return logits


def choose(scores: Tensor, cfg: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
    """The next id of each text, (B,): scores (B, V) and a generator of random numbers for each."""
    if cfg.temperature < 1e-5:
        return scores.argmax(dim=-1)
    p = next_probabilities(scores, cfg)
    drawn = torch.tensor([[torch.rand((), generator=g).item()] for g in draws], device=p.device)
    # Where the running sum passes the draw; the last id with any probability where rounding leaves it short.
    last = p.shape[1] - 1 - (p > 0).flip(-1).float().argmax(dim=-1)
    return torch.minimum((p.cumsum(dim=-1) <= drawn).sum(dim=-1), last)


def next_probabilities(logits: Tensor, cfg: SamplingConfig) -> Tensor:
    """What to draw the next id from.

    Args:
        logits: (B, V) fp32.
    Returns:
        Probabilities (B, V) fp32, each row summing to one; at temperature 0 all on the most likely id.
    """
    best = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    # Below this temperature the division would overflow, and the draw is certain anyway.
    if cfg.temperature < 1e-5:
        return torch.zeros_like(logits).scatter_(1, best, 1.0)
    logits = (logits - logits.gather(1, best)) / cfg.temperature  # the largest is 0: exp cannot overflow
    # Each of the three rules below takes ids out; the rest share the probability.
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


def require_finite(logp: Tensor) -> Tensor:
    """The same log-probabilities, one of each row; UserError where they are not numbers: one logit was none."""
    if not logp.isfinite().all():
        raise UserError("the model's logits are not finite numbers", "its weights may be damaged; try --dtype fp32")
    return logp


def fit_prompt(prompt: Sequence[int], model: Llama, sampling: SamplingConfig) -> list[int]:
    """The prompt, or with `truncate` its end, which leaves room for new ids.

    Raises:
        UserError: an empty or too long prompt, an id out of range.
    """
    # A wrong id would read behind the embedding: on a GPU that ends the process.
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt:
        raise UserError("a prompt has no tokens", "this tokenizer has no bos; write at least one character")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        wrong = next(i for i in prompt if not 0 <= i < vocab)
        raise UserError(f"the prompt has id {wrong}, the model knows {vocab}", "is this its tokenizer?")
    if len(prompt) <= context:
        return list(prompt)
    if sampling.truncate == "none":
        said = f"the prompt has {len(prompt)} tokens, the model's context is {context}"
        raise UserError(said, "shorten it, or --truncate left")
    # Its end is what the text goes on from; at least half of the context is kept.
    return list(prompt[-max(context - sampling.max_new_tokens, context // 2) :])


class DecodingLinear(nn.Linear):
    """A linear layer for a CPU, with the products that are fast for few rows of x.

    In fp32 that is oneDNN's: torch's own goes to MKL, which gives one row one core, and is slower still with a few.
    Compiled, one row is multiplied and summed: in bf16 that reads 33 GB/s, oneDNN's 11, as it is made for many rows.
    Milliseconds of 35,207 x 768 on two cores (AMD EPYC), torch's and this: fp32 1 row 8.1 and 3.7, 16 rows 19 and 8.5,
    512 rows 487 and 306; bf16 compiled, 1 row: 4.7 and 1.7.
    On an Intel Xeon with AMX, 64,794 x 1,024: fp32 1 row 8.8 and 9.0 (2,752 x 1,024: 0.38 and 0.44), 16 rows 61 and 40:
    one row stays with MKL there. bf16, 1 row: torch's 7.0, as matrix times vector 3.9.
    """

    def forward(self, x: Tensor) -> Tensor:
        compiling, one_row = torch.compiler.is_compiling(), x.numel() == x.shape[-1]
        if one_row and compiling:
            y = (self.weight * x.view(1, -1)).sum(dim=-1, dtype=torch.float32).to(x.dtype)
        elif one_row and INTEL and x.dtype == torch.bfloat16:
            y = torch.mv(self.weight, x.view(-1))
        elif compiling or x.dtype != torch.float32 or (one_row and INTEL):
            return super().forward(x)
        else:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        # A sum of products has no bias yet, and one dimension.
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def for_decoding(model: nn.Module) -> nn.Module:
    """The same model with products for few rows, where it is on a CPU. Names and values of its weights stay."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in model.modules():
        if known and type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = DecodingLinear
    return model

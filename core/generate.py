"""Sampling: prompts of ids in, ids out one step at a time, with a key/value cache.

In:  a model and lists of ids. Out: ids as they are chosen, with their log-probabilities.
Knows ids, not text: what they mean, and when half a character has come, is the tokenizer's business.

`Batch` continues texts that come and go; `generate`, `complete` and `beam_search` are for prompts that are all there.

Shapes:  B texts, T positions of the longest prompt, V vocabulary
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
    repetition_penalty: float = 1.0  # above 1: ids in the prompt or in what was made become less likely
    presence_penalty: float = 0.0  # taken from the logits of ids that were made already
    frequency_penalty: float = 0.0  # the same, once for each time
    truncate: str = "none"  # left: where the context is full, the text goes on from its newer half
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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} = {getattr(self, name)}, must be from -2 to 2")
        if self.truncate not in ("none", "left"):
            raise ValueError(f"truncate = {self.truncate!r}, must be none or left")


def penalised(logits: Tensor, seen: Tensor, made: Tensor, cfg: SamplingConfig) -> Tensor:
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


@dataclass(eq=False)
class Text:
    """A prompt, how it is continued, and what was added so far."""

    prompt: list[int]
    sampling: SamplingConfig
    stop_ids: set[int] | frozenset[int]
    logprobs: int = 0  # how many of the most likely ids are told with each token
    added: list[int] = field(default_factory=list)
    tokens: list["Token"] = field(default_factory=list)  # kept where `logprobs` is not 0
    end: str = ""  # "": it goes on; "stop": a stop id came; "length": max_new_tokens, or the context is full

    def __post_init__(self):
        # Of its own: what a text draws does not depend on its neighbours. On the CPU, the same on any device.
        self.draws = torch.Generator().manual_seed(self.sampling.seed)
        self.kind = replace(self.sampling, seed=0)  # texts of one kind share a call


class Token(NamedTuple):
    """What a step adds to a text."""

    text: Text
    id: int
    end: str  # "" or why the text ends here: at a "stop" id, which is no part of it, or by its "length"
    logprob: float  # of the id, in the model's own distribution: before temperature and penalties
    top: list[tuple[int, float]]  # the most likely ids there with theirs, as many as the text asked for


class Batch:
    """Texts that are continued together, each at its own place; they come and go between steps.

    Args:
        rows: texts at once.
        length: positions that each of them may fill; 0: the model's context.
        compiled: the step of one token goes through torch.compile.
    """

    def __init__(self, model: Llama, rows: int, length: int = 0, compiled: bool = False):
        self.model, self.rows = model, rows
        self.context = model.config.max_position_embeddings
        weight, vocab = model.model.embed_tokens.weight, model.config.vocab_size
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = Cache(model.config, rows, length or self.context, device=self.device, dtype=self.dtype)
        self.cache.fresh = False
        self.texts: list[Text] = []  # text i is in row i
        self.logits = torch.zeros(rows, vocab, device=self.device)
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=self.device)
        self.made = torch.zeros(rows, vocab, dtype=torch.int32, device=self.device)
        self.behind = False  # the newest ids have not been through the model yet
        self.compiled = compiled
        self.next_logits = torch.compile(next_logits) if compiled else next_logits

    @property
    def free(self) -> int:
        """Rows without a text."""
        return self.rows - len(self.texts)

    def add(
        self, prompt: list[int], sampling: SamplingConfig, stop_ids: set[int], n: int = 1, logprobs: int = 0
    ) -> list[Text]:
        """n texts that begin with the same prompt, drawn with the seeds `sampling.seed`, + 1 ...; it is read once.

        Raises:
            UserError: an empty or too long prompt, an id out of range.
        """
        return self.add_all([prompt], sampling, stop_ids, n, logprobs)[0]

    @torch.no_grad()
    def add_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop_ids: set[int],
        n: int = 1,
        logprobs: int = 0,
    ) -> list[list[Text]]:
        """The same for several prompts, in one pass of the model."""
        assert len(prompts) * n <= self.free
        self._catch_up()
        prompts = [fitting(prompt, self.model, sampling) for prompt in prompts]
        groups = [
            [Text(list(prompt), replace(sampling, seed=sampling.seed + i), stop_ids, logprobs) for i in range(n)]
            for prompt in prompts
        ]
        if not sampling.max_new_tokens:
            for text in itertools.chain(*groups):
                text.end = "length"
            return groups
        cache, logits = self._read(prompts)
        for source, group in enumerate(groups):
            for text in group:
                row = len(self.texts)
                self.texts.append(text)
                self._place(row, cache, logits, source)
                self.seen[row], self.made[row] = False, 0
                self.seen[row, text.prompt] = True
        return groups

    def _read(self, prompts: list[list[int]]) -> tuple[Cache, Tensor]:
        """Prompts through the model: their keys and values, and the logits (B, V) behind the last id of each."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        longest = int(lengths.max())
        cache = Cache(self.model.config, len(prompts), longest, device=self.device, dtype=self.dtype)
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=self.device)  # (B, T)
        x = self.model.hidden(ids, cache=cache)[torch.arange(len(prompts), device=self.device), lengths - 1]  # (B, C)
        cache.used = lengths
        # Logits of the last position only: those of a whole batch of prompts would be gigabytes.
        return cache, self.model.lm_head(x).float()

    def _place(self, row: int, cache: Cache, logits: Tensor, source: int = 0) -> None:
        """Row `source` of a cache becomes this batch's row `row`."""
        length = cache.k.shape[3]
        self.cache.k[:, row, :, :length], self.cache.v[:, row, :, :length] = cache.k[:, source], cache.v[:, source]
        self.cache.used[row], self.logits[row] = cache.used[source], logits[source]

    @torch.no_grad()
    def step(self) -> list[Token]:
        """One more id for every text; none if there is no text. Those that end leave their rows.

        Raises:
            UserError: logits that are not numbers.
        """
        if not self.texts:
            return []
        self._catch_up()
        count = len(self.texts)
        chosen = self._choose(self.logits[:count])  # (B,)
        rows = torch.arange(count, device=self.device)
        logp = self.logits[:count].log_softmax(dim=-1)  # (B, V), not finite where one of a row's logits is not
        told = finite(logp[rows, chosen]).tolist()
        self.seen[rows, chosen] = True
        self.made[rows, chosen] += 1
        self.behind = True
        step = []
        for row, (text, id, logprob) in enumerate(zip(list(self.texts), chosen.tolist(), told)):
            top = []
            if text.logprobs:
                best = logp[row].topk(min(text.logprobs, logp.shape[1]))
                top = list(zip(best.indices.tolist(), best.values.tolist()))
            if id in text.stop_ids:
                text.end = "stop"
            else:
                text.added.append(id)
                # The next id is drawn behind the last position, and a position past the context was never trained.
                full = len(text.prompt) + len(text.added) > self.context and text.sampling.truncate == "none"
                text.end = "length" if full or len(text.added) == text.sampling.max_new_tokens else ""
            step.append(Token(text, id, text.end, logprob, top))
            text.tokens += step[-1:] if top else []
        for token in step:
            if token.end:
                self.remove(token.text)
        return step

    def remove(self, text: Text) -> None:
        """A text that nobody waits for any more; nothing happens if it has ended."""
        if text not in self.texts:
            return
        row, last = self.texts.index(text), len(self.texts) - 1
        if row != last:  # the last one moves into its place: a step then reads the first rows only
            for part in (self.cache.used, self.logits, self.seen, self.made):
                part[row] = part[last]
            self.cache.k[:, row], self.cache.v[:, row] = self.cache.k[:, last], self.cache.v[:, last]
            self.texts[row] = self.texts[last]
        self.texts.pop()
        self.behind = self.behind and bool(self.texts)

    def _choose(self, logits: Tensor) -> Tensor:
        """The next id of each text, (B,)."""
        chosen = torch.empty(len(logits), dtype=torch.long, device=self.device)
        kinds: dict[SamplingConfig, list[int]] = {}
        for row, text in enumerate(self.texts):
            kinds.setdefault(text.kind, []).append(row)
        for cfg, rows in kinds.items():
            of = rows if len(kinds) > 1 else slice(len(rows))  # all of them: no copy
            scores = penalised(logits[of], self.seen[of], self.made[of], cfg)
            if cfg.temperature < 1e-5:
                chosen[of] = scores.argmax(dim=-1)
                continue
            p = next_probabilities(scores, cfg)
            draws = [[torch.rand((), generator=self.texts[row].draws).item()] for row in rows]
            # Where the running sum passes the draw; the last id with any probability where rounding leaves it short.
            last = p.shape[1] - 1 - (p > 0).flip(-1).float().argmax(dim=-1)
            passed = (p.cumsum(dim=-1) <= torch.tensor(draws, device=self.device)).sum(dim=-1)
            chosen[of] = torch.minimum(passed, last)
        return chosen

    def _catch_up(self) -> None:
        """The newest id of every text goes through the model."""
        if not self.behind or not self.texts:
            return
        used = self.cache.used.tolist()
        for row, text in enumerate(self.texts):
            if used[row] == self.context:  # with truncate: read anew from the newer half on
                recent = (text.prompt + text.added[:-1])[-(self.context // 2) :]
                self._place(row, *self._read([recent]))
                used[row] = len(recent)
        count = len(self.texts)
        cache = self.cache.first(count)
        if not self.compiled:  # a compiled step is the same for all lengths
            cache.span = max(used[:count]) + 1
        ids = torch.tensor([[text.added[-1]] for text in self.texts], device=self.device)  # (B, 1)
        self.logits[:count] = self.next_logits(self.model, ids, cache)
        self.behind = False

    @torch.no_grad()
    def fork(self, choices: list[tuple[int, int]]) -> None:
        """For each (row, id): the text of that row with that id behind it. They take the place of all texts."""
        rows = torch.tensor([row for row, _ in choices], device=self.device)
        for part in (self.cache.used, self.logits, self.seen, self.made):
            part[: len(rows)] = part[rows]
        for part in (self.cache.k, self.cache.v):
            part[:, : len(rows)] = part[:, rows]
        self.texts = [replace(self.texts[row], added=[*self.texts[row].added, id]) for row, id in choices]
        place, ids = torch.arange(len(rows), device=self.device), [id for _, id in choices]
        self.seen[place, ids] = True
        self.made[place, ids] += 1
        self.behind = True
        self._catch_up()


def next_logits(model: Llama, ids: Tensor, cache: Cache) -> Tensor:
    """One more id for every row: (B, 1) -> logits (B, V) fp32."""
    return model.lm_head(model.hidden(ids, cache=cache)[:, -1]).float()


def finite(logp: Tensor) -> Tensor:
    """The same log-probabilities, one of each row; UserError where they are not numbers: one logit was none."""
    if not logp.isfinite().all():
        raise UserError("the model's logits are not finite numbers", "its weights may be damaged; try --dtype fp32")
    return logp


def fitting(prompt: Sequence[int], model: Llama, sampling: SamplingConfig) -> list[int]:
    """The prompt, or with `truncate` its end, which leaves room for new ids.

    Raises:
        UserError: an empty or too long prompt, an id out of range.
    """
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt:
        raise UserError("a prompt has no tokens", "this tokenizer has no bos; write at least one character")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        wrong = next(i for i in prompt if not 0 <= i < vocab)
        raise UserError(f"the prompt has id {wrong}, the model knows {vocab}", "is this its tokenizer?")
    if len(prompt) > context and sampling.truncate == "none":
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model's context is {context}", "shorten it, or --truncate left"
        )
    kept = max(context - sampling.max_new_tokens, context // 2)
    return list(prompt) if len(prompt) <= context else list(prompt[-kept:])


def generate(
    model: Llama, prompts: Sequence[Sequence[int]], cfg: SamplingConfig, stop_ids: set[int], *, compiled: bool = False
) -> Iterator[list[tuple[int, int]]]:
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
    longest = max(map(len, prompts))
    length = min(longest + cfg.max_new_tokens, model.config.max_position_embeddings)
    batch = Batch(model, len(prompts), length, compiled)
    rows = {group[0]: row for row, group in enumerate(batch.add_all(prompts, cfg, stop_ids))}
    while step := batch.step():
        yield [(rows[token.text], token.id) for token in step if token.end != "stop"]


def continued(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    cfg: SamplingConfig,
    stop_ids: set[int],
    *,
    rows: int,
    n: int = 1,
    logprobs: int = 0,
    compiled: bool = False,
) -> list[list[Text]]:
    """The n texts of each prompt, in the prompts' order. A text that ends makes room for the next.

    Args:
        rows: texts at once, at least n of them.
        The rest and the errors as in `generate`; logprobs as in `Batch.add`.
    """
    prompts = [fitting(prompt, model, cfg) for prompt in prompts]
    length = min(max(map(len, prompts)) + cfg.max_new_tokens, model.config.max_position_embeddings)
    batch, groups = Batch(model, min(max(rows, n), n * len(prompts)), length, compiled), [[]] * len(prompts)
    # Prompts of similar length are read together, with little padding.
    waiting = sorted(range(len(prompts)), key=lambda k: len(prompts[k]), reverse=True)
    while waiting or batch.texts:
        if now := [waiting.pop() for _ in range(min(batch.free // n, len(waiting)))]:
            for k, group in zip(now, batch.add_all([prompts[k] for k in now], cfg, stop_ids, n, logprobs)):
                groups[k] = group
        batch.step()
    return groups


def complete(
    model: Llama, prompts: Sequence[Sequence[int]], cfg: SamplingConfig, stop_ids: set[int]
) -> list[list[int]]:
    """What is added to each prompt, all at once."""
    return [text.added for (text,) in continued(model, prompts, cfg, stop_ids, rows=len(prompts))]


@torch.no_grad()
def beam_search(
    model: Llama,
    prompt: Sequence[int],
    cfg: SamplingConfig,
    stop_ids: set[int],
    beams: int,
    length_penalty: float = 1.0,
) -> list[tuple[list[int], float]]:
    """The likeliest continuations that `beams` texts, the best at each length, lead to.

    Args:
        cfg: max_new_tokens and the penalties; nothing is drawn.
        length_penalty: a text's score is the sum of its log-probabilities over its length to this power: above 0
            longer ones gain.
    Returns:
        `beams` continuations (fewer if the vocabulary is smaller) with their scores, the best first. The stop id counts
        in score and length and is not given out.
    Raises:
        UserError: as `generate`.

    Source: https://arxiv.org/abs/1609.08144, section 7, with the plain length of transformers
    """
    batch = Batch(model, beams, min(len(prompt) + cfg.max_new_tokens, model.config.max_position_embeddings))
    batch.add(list(prompt), replace(cfg, truncate="none"), set(), n=beams)
    steps = min(cfg.max_new_tokens, model.config.max_position_embeddings - len(prompt) + 1)
    sums = torch.full((beams, 1), -math.inf, device=batch.device)
    sums[0] = 0.0  # the beams are all alike at first: one of them is enough
    done: list[tuple[list[int], float]] = []
    for made in range(1, steps + 1):
        live = len(batch.texts)
        logp = batch.logits[:live].log_softmax(dim=-1)
        finite(logp.amax(dim=-1))
        scores = penalised(logp, batch.seen[:live], batch.made[:live], cfg) + sums  # (B, V)
        # So many that `beams` go on even if all the others stop.
        best = scores.flatten().topk(min((1 + len(stop_ids)) * beams, scores.numel()))
        found = zip(best.values.tolist(), best.indices.tolist())
        candidates = [(total, *divmod(place, scores.shape[1])) for total, place in found if total > -math.inf]
        for total, row, id in candidates[:beams]:
            if id in stop_ids or made == steps:
                done.append((batch.texts[row].added + [id] * (id not in stop_ids), total / made**length_penalty))
        done = sorted(done, key=lambda item: -item[1])[:beams]
        going = [c for c in candidates if c[2] not in stop_ids][:beams]
        if not going or made == steps or (len(done) == beams and going[0][0] / made**length_penalty <= done[-1][1]):
            break
        sums = torch.tensor([[total] for total, _, _ in going], device=batch.device)
        batch.fork([(row, id) for _, row, id in going])
    return done

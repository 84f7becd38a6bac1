"""Many texts at once: they are continued together, each at its own place; they come and go between steps.

In:  a model and lists of ids. Out: ids as they are chosen, with their log-probabilities.
Knows ids, not text.

Shapes:  B texts, T positions of the longest prompt, V vocabulary
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from core.generate import Cache, SamplingConfig, choose, fit_prompt, next_logits, penalise, require_finite
from model import Llama


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
        prompts = [fit_prompt(prompt, self.model, sampling) for prompt in prompts]
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
        told = require_finite(logp[rows, chosen]).tolist()
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
            scores = penalise(logits[of], self.seen[of], self.made[of], cfg)
            chosen[of] = choose(scores, cfg, [self.texts[row].draws for row in rows])
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
        # The first rows of the cache, in the same memory.
        cache = copy.copy(self.cache)
        cache.k, cache.v, cache.used = cache.k[:, :count], cache.v[:, :count], cache.used[:count]
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


def generate_all(
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
    compiled: bool = False,
    **each: int,
) -> list[list[Text]]:
    """The n texts of each prompt, in the prompts' order. A text that ends makes room for the next.

    Args:
        rows: texts at once, at least n of them.
        each: n and logprobs, as in `Batch.add`.
        The rest and the errors as in `generate`.
    """
    n = each.get("n", 1)
    prompts = [fit_prompt(prompt, model, cfg) for prompt in prompts]
    length = min(max(map(len, prompts)) + cfg.max_new_tokens, model.config.max_position_embeddings)
    batch, groups = Batch(model, min(max(rows, n), n * len(prompts)), length, compiled), [[]] * len(prompts)
    # Prompts of similar length are read together, with little padding.
    waiting = sorted(range(len(prompts)), key=lambda k: len(prompts[k]), reverse=True)
    while waiting or batch.texts:
        if now := [waiting.pop() for _ in range(min(batch.free // n, len(waiting)))]:
            for k, group in zip(now, batch.add_all([prompts[k] for k in now], cfg, stop_ids, **each)):
                groups[k] = group
        batch.step()
    return groups


def complete(
    model: Llama, prompts: Sequence[Sequence[int]], cfg: SamplingConfig, stop_ids: set[int]
) -> list[list[int]]:
    """What is added to each prompt, all at once."""
    return [text.added for (text,) in continued(model, prompts, cfg, stop_ids, rows=len(prompts))]

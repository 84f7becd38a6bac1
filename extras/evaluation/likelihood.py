"""How likely a model finds what it reads.

In:  a model and lists of ids. Out: log-probabilities in nats.
Knows ids, not text. Rows are padded on the right, where a causal model never looks, and ordered by their lengths.

Shapes:  B rows, T positions of the longest, C hidden size, N places where something is predicted, V vocabulary
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.generate import require_finite
from core.memory import LOGITS_AT_ONCE
from model import IGNORE, Llama


class Request(NamedTuple):
    """Ids that are read, and ids behind them whose probability is asked for; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def read(self) -> tuple[int, ...]:
        """What goes through the model: the last id is only predicted."""
        return (*self.context, *self.continuation[:-1])


@torch.inference_mode()
def log_likelihoods(model: Llama, requests: Sequence[Request], batch: int) -> list[float]:
    """ln P(continuation | context) of each request, the sum over the continuation's ids.

    Args:
        requests: none reads more ids than the model has positions. Those that read the same, as the letters of a
            question do, share a row.
        batch: rows at once.
    Raises:
        UserError: logits that are not numbers.
    """
    # Which places of which rows are asked for.
    rows: dict[tuple, dict[int, list]] = defaultdict(lambda: defaultdict(list))  # read -> place -> (request, its id)
    for number, request in enumerate(requests):
        assert request.context and request.continuation
        assert len(request.read) <= model.config.max_position_embeddings
        for place, id in enumerate(request.continuation, len(request.context) - 1):
            rows[request.read][place].append((number, id))

    # The head sees these places only.
    sums = [0.0] * len(requests)
    for reads in order_by_length(rows, batch):
        places = [(row, place, asked) for row, read in enumerate(reads) for place, asked in rows[read].items()]
        ids = pad(reads, 0, model)  # (B, T)
        row, place = torch.tensor([p[:2] for p in places], device=ids.device).T  # (N,), (N,)
        x = model.hidden(ids)[row, place]  # (B, T, C) -> (N, C)
        # Logits of all N at once may be more than the memory holds.
        chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        for start in range(0, len(places), chunk):
            logp = model.lm_head(x[start : start + chunk]).float().log_softmax(dim=-1)  # (n, V)
            require_finite(logp.amax(dim=-1))
            now = enumerate(places[start : start + chunk])
            at, numbers, wanted = zip(*((k, *one) for k, (_, _, asked) in now for one in asked))
            for number, value in zip(numbers, logp[list(at), list(wanted)].tolist()):
                sums[number] += value
    return sums


@torch.inference_mode()
def sum_nats(model: Llama, requests: Sequence[Request], batch: int) -> float:
    """-ln P(continuation | context), summed over all requests: for long continuations, whose logits are not kept."""
    total = 0.0
    pairs = [(r.read, (*[IGNORE] * (len(r.context) - 1), *r.continuation)) for r in requests]
    for rows in order_by_length(pairs, batch, length=lambda pair: len(pair[0])):
        ids, targets = zip(*rows)
        loss = model(pad(ids, 0, model), pad(targets, IGNORE, model)).sum()
        total += require_finite(loss).item()
    return total


def cut_windows(ids: Sequence[int], length: int) -> list[Request]:
    """A text cut so that each of its ids but the first is predicted once.

    Each window reads `length` ids, the first of them the last of the window before. The last window of a text that is
    longer begins early enough to be as long, too, and predicts only what is left.
    Source: lm-eval's loglikelihood_rolling, https://github.com/EleutherAI/lm-evaluation-harness
    """
    ends = [*range(length + 1, len(ids), length), len(ids)]
    starts = range(1, len(ids), length)  # of what is predicted
    return [Request(ids[max(0, end - 1 - length) : start], ids[start:end]) for start, end in zip(starts, ends)]


def order_by_length(rows, size: int, length: Callable = len) -> Iterator[list]:
    """Rows in batches, the longest first: if there is no memory for them, it shows at once."""
    ordered = sorted(rows, key=length, reverse=True)
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def pad(rows: Sequence[Sequence[int]], fill: int, model: Llama) -> Tensor:
    """(B, T) int64, shorter rows filled up on the right; the first row is the longest."""
    longest = len(rows[0])
    ids = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(ids, device=model.model.embed_tokens.weight.device)

"""Beam search: the likeliest continuations of a prompt, instead of drawn ones.

In:  a model and a list of ids. Out: continuations with their scores, the best first.
Knows ids, not text.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from core.generate import SamplingConfig, penalise, require_finite
from extras.decoding.batching import Batch
from model import Llama


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
        require_finite(logp.amax(dim=-1))
        scores = penalise(logp, batch.seen[:live], batch.made[:live], cfg) + sums  # (B, V)
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

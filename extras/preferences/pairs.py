"""Pairs of answers, one preferred: rows for the training loop, and the loss of DPO on them.

In:  chats whose last answer is the preferred one, with the other beside them as `rejected`. Out: rows, a loss function.
Knows nothing of files of weights or of ranks.

Shapes:  B pairs, T positions of one of its two texts, N pairs of a file
Source: Rafailov et al., Direct Preference Optimization, https://arxiv.org/abs/2305.18290
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import data, files
from core.config import Range, Section
from core.errors import UserError
from model import IGNORE
from tokenizer import Tokenizer, TokenizerError, chat


@dataclass(frozen=True)
class PairsConfig(Section):
    init_from: str = "out/sft"  # a chat model's folder
    train: tuple[str, ...] = ("data/pairs/chats.jsonl",)  # chats with another, worse answer beside them
    val: tuple[str, ...] = ()  # the same, held out; none: val_share of the training pairs
    val_share: Annotated[float, Range(above=0, below=1)] = 0.1  # drawn with the run's seed
    chat_format: Literal["auto", *chat.FORMATS] = "auto"  # auto: the model's own
    # Positions of each of the two texts; 0: the model's max_position_embeddings.
    seq_len: Annotated[int, Range(least=0)] = 0


@dataclass
class PairBatch(data.Batch):
    """ids, targets (B, 2 T): each row the preferred text, then the other. reference: (B, 2) fp32."""

    reference: Tensor

    @property
    def count(self) -> Tensor:
        """Pairs: the loss is a mean over them."""
        return self.ids.new_tensor(len(self.rows))


class PairRows:
    """Rows of pairs.

    Args:
        pairs: ((ids, mask) of the preferred text, (ids, mask) of the other, where) of each; at most T + 1 ids.
        length: T.
        pad_id: fills a text's rest, behind all that is read from it.

    Attributes:
        reference: (N, 2), log-probabilities of the answers before training; zeros until they are set.
    """

    def __init__(self, pairs: Sequence[tuple], length: int, pad_id: int):
        self.pairs, self.length, self.pad_id, self.seq_len = pairs, length, pad_id, 2 * length
        self.reference = torch.zeros(len(pairs), 2)
        digest = hashlib.sha256(str(length).encode())
        for *texts, _ in pairs:
            for ids, mask in texts:
                digest.update(np.asarray(ids, np.int64).tobytes() + np.asarray(mask, bool).tobytes() + b"|")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, None]:
        """ids, targets (2 T,) of pair i; nothing for documents."""
        ids = np.full((2, self.length), self.pad_id, np.int64)
        targets = np.full((2, self.length), IGNORE, np.int64)
        for side, (tokens, mask) in enumerate(self.pairs[i][:2]):
            tokens, mask = np.asarray(tokens, np.int64), np.asarray(mask, bool)
            ids[side, : len(tokens) - 1] = tokens[:-1]
            targets[side, : len(tokens) - 1] = np.where(mask[1:], tokens[1:], IGNORE)
        return ids.reshape(-1), targets.reshape(-1), None

    def batch(self, indices: Sequence[int]) -> PairBatch:
        plain = data.stack([self.row(i) for i in indices], indices)
        return PairBatch(plain.ids, plain.targets, None, plain.rows, self.reference[plain.rows])

    def where(self, i: int) -> str:
        return self.pairs[i][2]

    def describe(self) -> str:
        return f"{len(self)} pairs, each two texts of at most {self.length} tokens"

    def text_bytes(self, rows: int) -> float:
        return 0.0  # the loss is on preferences


def read_pairs(
    paths: Sequence[str], tokenizer: Tokenizer, chat_format: str, length: int
) -> tuple[list[tuple], list[str]]:
    """Pairs of files that `data_process.py sft` has made of preferences.

    Args:
        length: T.

    Returns:
        pairs as PairRows takes them, and lines on those that do not fit.

    Raises:
        UserError: a chat without another answer, or with twice the same.
    """
    pairs, long = [], []
    for path in paths:
        for where, item in files.read_jsonl(path):
            messages, other = item.get("messages"), item.get("rejected", item.get("response_rejected"))
            if isinstance(other, dict):
                other = other.get("content", other.get("value"))
            if not isinstance(messages, list) or not messages or not isinstance(other, str) or not other.strip():
                raise UserError(
                    f"{where}: no messages with a rejected answer beside them",
                    "python data_process.py sft --input FILE makes them of preference files",
                )
            worse = [*messages[:-1], {"role": "assistant", "content": other.strip()}]
            try:
                texts = [chat.render(m, tokenizer, chat_format, train_on="last") for m in (messages, worse)]
            except TokenizerError as e:
                raise UserError(f"{where}: {e}") from None
            if list(texts[0][0]) == list(texts[1][0]):
                raise UserError(f"{where}: both answers are the same")
            size = max(len(ids) for ids, _ in texts)
            long.append((where, size)) if size > length + 1 else pairs.append((*texts, where))
    if not pairs:
        raise UserError(f"{', '.join(paths)}: no pairs that fit into {length} tokens")
    some = ", ".join(f"{where} ({size} tokens)" for where, size in long[:10])
    return pairs, [f"{len(long)} pairs longer than {length} tokens left out: {some}"] * bool(long)


def pair_rows(
    cfg: PairsConfig, seed: int, tokenizer: Tokenizer, chat_format: str, length: int
) -> tuple[PairRows, PairRows, list[str]]:
    """Rows to train on, rows that are held out, and lines on them. Arguments as in `read_pairs`."""
    pairs, lines = read_pairs(cfg.train, tokenizer, chat_format, length)
    if cfg.val:
        held_out, more = read_pairs(cfg.val, tokenizer, chat_format, length)
        lines += more
    else:
        order = np.random.default_rng(seed).permutation(len(pairs))
        at = max(1, round(cfg.val_share * len(pairs)))
        if at == len(pairs):
            raise UserError(f"{', '.join(cfg.train)}: too few pairs to hold some out", "--val FILE")
        held_out, pairs = ([pairs[i] for i in sorted(part)] for part in (order[:at], order[at:]))
    lines.append(f"{len(pairs)} pairs to train on, {len(held_out)} held out, each two texts of at most {length} tokens")
    rows, held_out = (PairRows(part, length, tokenizer.eos_id) for part in (pairs, held_out))
    return rows, held_out, lines


def log_probabilities(model: nn.Module, batch: data.Batch) -> Tensor:
    """(B, 2): of the preferred answers and of the others, each the sum over its tokens, given what stands before."""
    b, t = batch.ids.shape[0], batch.ids.shape[1] // 2
    losses = model(batch.ids.view(2 * b, t), batch.targets.view(2 * b, t))  # (2 B, T)
    return -losses.view(b, 2, t).sum(-1)


def margins(model: nn.Module, batch: PairBatch, beta: float) -> Tensor:
    """(B,): by how much more the model has come to like the preferred answer than the other, times beta."""
    gained = log_probabilities(model, batch) - batch.reference
    return beta * (gained[:, 0] - gained[:, 1])


def dpo_loss(beta: float, label_smoothing: float) -> Callable[[nn.Module, PairBatch], Tensor]:
    """DPO's loss, summed over pairs; ln 2 for each at the start.

    Args:
        beta: the larger, the closer the model stays to what it was.
        label_smoothing: the share of pairs whose preference may be the wrong way round.
    """

    def loss(model: nn.Module, batch: PairBatch) -> Tensor:
        margin = margins(model, batch, beta)
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        return -((1 - label_smoothing) * right + label_smoothing * wrong).sum()

    return loss


@torch.no_grad()
def over_pairs(
    rows: PairRows, micro: int, device: torch.device, score: Callable[[PairBatch], Tensor], numbers: Sequence[int]
) -> Tensor:
    """`score`, (B, ...), of the pairs with these numbers, `micro` at a time, together on the CPU."""
    parts = [score(rows.batch(numbers[at : at + micro]).to(device)) for at in range(0, len(numbers), micro)]
    return torch.cat(parts).float().cpu()


def report(model: nn.Module, rows: PairRows, micro: int, device: torch.device, score: Callable) -> str:
    """A line on held-out pairs: which way round they are, and how far apart.

    Args:
        score: (model, batch) -> (B,), above 0 where a pair is the right way round.
    """
    found = over_pairs(rows, micro, device, partial(score, model), range(len(rows)))
    right = (found > 0).float().mean()
    return f"held-out pairs the right way round: {right:.1%} of {len(found)}, margin {found.mean():.4f}"

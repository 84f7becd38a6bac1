"""Answers that a model gives to questions, judged: group relative policy optimization (GRPO) as a loss function.

In:  questions as ids, a judge of texts. Out: rows for the training loop; a loss that lets the model answer, and raises
the probability of what was better than the other answers to the same question.
Every update uses answers of the model as it is: there is no ratio to older probabilities, and nothing to clip.
Knows nothing of files of weights.

Shapes:  B questions, G answers to each, T positions of the longest question and answer
Source: Shao et al., DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from core import data, files
from core.errors import UserError
from core.generate import SamplingConfig, Text, continued
from extras.preferences import scalar
from model import IGNORE
from tokenizer import TokenizerError, chat


@dataclass(frozen=True)
class RewardConfig:
    # exact: 1 for the file's answer; format: 1 for a text that `pattern` fits; both: half each; model: a reward model's
    reward: str = "exact"
    pattern: str = ""  # a regular expression for the whole answer
    reward_model: str = ""  # a folder that reward.py has written
    group: int = 8  # answers to each question, G
    max_new_tokens: int = 60  # longer answers end there, and are judged as they are
    temperature: float = 1.0  # of the answers that are learned from
    kl: float = 0.0  # weight of the divergence from the model as it was, which is kept beside it; 0: none

    def __post_init__(self):
        if self.reward not in ("exact", "format", "both", "model"):
            raise ValueError(f"reward = {self.reward!r}, must be exact, format, both or model")
        if (self.reward in ("format", "both")) != bool(self.pattern):
            raise ValueError(f"reward = {self.reward}, pattern = {self.pattern!r}: format and both need a pattern")
        if (self.reward == "model") != bool(self.reward_model):
            raise ValueError(f"reward = {self.reward}, reward_model = {self.reward_model!r}: model needs a folder")
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise ValueError(f"pattern = {self.pattern!r}: {e}") from None
        if self.group < 2 or self.max_new_tokens < 1 or not 0 < self.temperature <= 10 or not 0 <= self.kl < 100:
            raise ValueError(
                f"group = {self.group}, max_new_tokens = {self.max_new_tokens}, temperature = "
                f"{self.temperature}, kl = {self.kl}: at least 2, 1, above 0, from 0"
            )


@dataclass
class QuestionBatch(data.Batch):
    """Questions; `ids` and `targets` (B, T) hold nothing but say how many positions an answer may reach."""

    questions: list[list[int]]
    answers: list[str]

    @property
    def count(self) -> Tensor:
        return self.ids.new_tensor(len(self.questions))


class QuestionRows:
    """Rows of questions.

    Args:
        items: (ids of the question, the file's answer, where) of each.
        context: positions of the model.
    """

    bytes_per_token = 0.0

    def __init__(self, items: Sequence[tuple[list[int], str, str]], context: int):
        self.items, self.seq_len = items, context
        self.digest = hashlib.sha256(repr([item[:2] for item in items]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, None]:
        return np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORE, np.int64), None

    def make(self, ids: Tensor, targets: Tensor, docs: None, indices: list[int]) -> QuestionBatch:
        chosen = [self.items[i] for i in indices]
        return QuestionBatch(ids, targets, docs, indices, [list(c[0]) for c in chosen], [c[1] for c in chosen])

    def where(self, i: int) -> str:
        return self.items[i][2]


Judge = Callable[[Sequence[Text], Sequence[str]], list[float]]  # answers, and those of the file -> a reward for each


def judge(cfg: RewardConfig, text, model: scalar.RewardModel | None = None) -> Judge:
    """The rule that the options name, from 0 to 1, or a reward model.

    Args:
        text: the tokenizer.
        model: a reward model with the same tokenizer, for cfg.reward = "model".
    """
    if model is not None:
        return lambda texts, _: scalar.rewards(model, [t.prompt + t.added for t in texts], batch=64)
    pattern = re.compile(cfg.pattern, re.DOTALL)
    rules = {
        "exact": lambda said, wanted: float(said.strip() == wanted.strip()),
        "format": lambda said, _: float(pattern.fullmatch(said.strip()) is not None),
    }
    chosen = [rules[name] for name in (("exact", "format") if cfg.reward == "both" else (cfg.reward,))]

    def by_rule(texts: Sequence[Text], wanted: Sequence[str]) -> list[float]:
        said = [text.decode(t.added) for t in texts]
        return [sum(rule(s, w) for rule in chosen) / len(chosen) for s, w in zip(said, wanted)]

    return by_rule


def answered(
    model: nn.Module, batch: QuestionBatch, stop_ids: set[int], sampling: SamplingConfig, n: int
) -> list[list[Text]]:
    """n answers of the model to each question; with their stop ids in `tokens`."""
    training = model.training
    model.eval()
    with torch.no_grad():
        rows = n * len(batch.questions)
        groups = continued(model, batch.questions, sampling, stop_ids, rows=rows, n=n, logprobs=1)
    model.train(training)
    return groups


def advantages(rewards: Tensor) -> Tensor:
    """(B, G) -> (B, G): how far each is above its group's mean, in its standard deviations; 0 where all are alike."""
    spread = rewards.std(dim=1, correction=0, keepdim=True)
    return torch.where(spread > 1e-6, (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-6), 0.0)


def grpo_loss(
    cfg: RewardConfig, stop_ids: set[int], reward: Judge, reference: nn.Module | None
) -> Callable[[nn.Module, QuestionBatch], Tensor]:
    """The loss, summed over questions. Without gradients it is what greedy answers miss: 1 - reward of each.

    Args:
        reward: see `judge`.
        reference: the model as it was, for cfg.kl.
    """

    def loss(model: nn.Module, batch: QuestionBatch) -> Tensor:
        inner, learning = getattr(model, "module", model), torch.is_grad_enabled()
        # The engine has seeded torch for this micro-batch: the draws depend on nothing that came before.
        seed, n = torch.initial_seed() % (1 << 31), cfg.group if learning else 1
        temperature = cfg.temperature if learning else 0.0
        sampling = SamplingConfig(cfg.max_new_tokens, temperature, top_p=1.0, seed=seed)
        groups = answered(inner, batch, stop_ids, sampling, n)
        texts = [t for group in groups for t in group]
        judged = reward(texts, [answer for answer in batch.answers for _ in range(n)])
        rewards = torch.tensor(judged, device=batch.ids.device).view(len(groups), n)
        if not learning:
            return (1 - rewards).sum()
        ids, targets = joined(texts, batch.ids.device)  # (B G, T)
        losses = model(ids, targets)
        counts = (targets != IGNORE).sum(dim=1)
        each = advantages(rewards).flatten() * losses.sum(dim=1)
        if reference is not None:
            with torch.no_grad():
                theirs = reference(ids, targets)
            far = losses - theirs  # log-probability of the reference minus ours; 0 where there is no target
            each = each + cfg.kl * (far.exp() - far - 1).sum(dim=1)  # Schulman's third estimator, as in the paper
        return (each / counts).sum() / n

    return loss


def joined(texts: Sequence[Text], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids, targets (N, T): questions with their answers, padded on the right; targets are the answers' ids."""
    whole = [(text.prompt, [token.id for token in text.tokens]) for text in texts]
    length = max(len(question) + len(answer) for question, answer in whole) - 1
    ids = torch.zeros(len(whole), length, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (question, answer) in enumerate(whole):
        both = torch.tensor(question + answer)
        ids[row, : len(both) - 1] = both[:-1]
        targets[row, len(question) - 1 : len(both) - 1] = both[len(question) :]
    return ids.to(device), targets.to(device)


def read_questions(paths: Sequence[str], text, chat_format: str, context: int, intro: list[str]) -> list[tuple]:
    """(ids of the question, the answer, where) of chats; questions that leave no room are counted in `intro`.

    Raises:
        UserError: a line that is no chat with an answer last.
    """
    items, long = [], []
    for path in paths:
        for where, item in files.read_jsonl(path):
            messages = item.get("messages")
            try:
                if not isinstance(messages, list) or not messages or messages[-1]["role"] != "assistant":
                    raise UserError(f"{where}: no messages with an answer at their end")
                ids = list(chat.render(messages[:-1], text, chat_format, generation=True)[0])
            except TokenizerError as e:
                raise UserError(f"{where}: {e}") from None
            long.append(where) if len(ids) >= context else items.append((ids, messages[-1]["content"], where))
    if long:
        intro.append(f"{len(long)} questions as long as the context of {context} left out: {', '.join(long[:10])}")
    if not items:
        raise UserError(f"{', '.join(paths)}: no questions that leave room for an answer")
    return items

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
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor, nn

from core import data, files
from core.config import Range, Section
from core.errors import UserError
from core.generate import SamplingConfig
from extras.preferences import scalar
from model import IGNORE
from tokenizer import Tokenizer, TokenizerError, chat


@dataclass(frozen=True)
class RewardConfig(Section):
    # exact: 1 for the file's answer; format: 1 for a text that `pattern` fits; both: half each; model: a reward model's
    reward: Literal["exact", "format", "both", "model"] = "exact"
    pattern: str = ""  # a regular expression for the whole answer
    reward_model: str = ""  # a folder that reward.py has written
    group: Annotated[int, Range(least=2)] = 8  # answers to each question, G
    max_new_tokens: Annotated[int, Range(least=1)] = 60  # longer answers end there, and are judged as they are
    temperature: Annotated[float, Range(above=0, most=10)] = 1.0  # of the answers that are learned from
    # Weight of the divergence from the model as it was, which is kept beside it; 0: none.
    kl: Annotated[float, Range(least=0, below=100)] = 0.0

    def __post_init__(self):
        super().__post_init__()
        if (self.reward in ("format", "both")) != bool(self.pattern):
            raise ValueError(f"reward = {self.reward}, pattern = {self.pattern!r}: format and both need a pattern")
        if (self.reward == "model") != bool(self.reward_model):
            raise ValueError(f"reward = {self.reward}, reward_model = {self.reward_model!r}: model needs a folder")
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise ValueError(f"pattern = {self.pattern!r}: {e}") from None


class Answer(Protocol):
    """A question and what a model has added to it, as ids; `tokens` are those of the answer and of its end."""

    prompt: list[int]
    added: list[int]
    tokens: list


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

    def __init__(self, items: Sequence[tuple[list[int], str, str]], context: int):
        self.items, self.seq_len = items, context
        self.digest = hashlib.sha256(repr([item[:2] for item in items]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int]) -> QuestionBatch:
        chosen = [self.items[i] for i in indices]
        ids = torch.zeros(len(chosen), self.seq_len, dtype=torch.long)
        questions, answers = [list(c[0]) for c in chosen], [c[1] for c in chosen]
        return QuestionBatch(ids, torch.full_like(ids, IGNORE), None, list(indices), questions, answers)

    def where(self, i: int) -> str:
        return self.items[i][2]

    def describe(self) -> str:
        return f"{len(self)} questions"

    def text_bytes(self, rows: int) -> float:
        return 0.0  # the loss is on rewards


# Answers, and those of the file -> a reward for each.
Judge = Callable[[Sequence[Answer], Sequence[str]], list[float]]


def make_judge(cfg: RewardConfig, tokenizer: Tokenizer, model: scalar.RewardModel | None = None) -> Judge:
    """The rule that the options name, from 0 to 1, or a reward model.

    Args:
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

    def by_rule(texts: Sequence[Answer], wanted: Sequence[str]) -> list[float]:
        said = [tokenizer.decode(t.added) for t in texts]
        return [sum(rule(s, w) for rule in chosen) / len(chosen) for s, w in zip(said, wanted)]

    return by_rule


@dataclass(frozen=True)
class Respond:
    """How a model answers: the many texts at once of another wing, which grpo.py hands over.

    Args:
        continue_all: as extras/decoding/batching.py's `continued`.
        stop_ids: ids that end an answer.
    """

    continue_all: Callable
    stop_ids: set[int]

    def __call__(self, model: nn.Module, batch: QuestionBatch, sampling: SamplingConfig, n: int) -> list[list[Answer]]:
        """n answers of the model to each question; with their stop ids in `tokens`."""
        training = model.training
        model.eval()
        with torch.no_grad():
            rows = n * len(batch.questions)
            groups = self.continue_all(model, batch.questions, sampling, self.stop_ids, rows=rows, n=n, logprobs=1)
        model.train(training)
        return groups


def advantages(rewards: Tensor) -> Tensor:
    """(B, G) -> (B, G): how far each is above its group's mean, in its standard deviations; 0 where all are alike."""
    spread = rewards.std(dim=1, correction=0, keepdim=True)
    return torch.where(spread > 1e-6, (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-6), 0.0)


def grpo_loss(
    cfg: RewardConfig, respond: Respond, judge: Judge, reference: nn.Module | None
) -> Callable[[nn.Module, QuestionBatch], Tensor]:
    """The loss, summed over questions. Without gradients it is what greedy answers miss: 1 - reward of each.

    Args:
        judge: see `make_judge`.
        reference: the model as it was, for cfg.kl.
    """

    def loss(model: nn.Module, batch: QuestionBatch) -> Tensor:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        learning = torch.is_grad_enabled()
        # The loop has seeded torch for this micro-batch: the draws depend on nothing that came before.
        seed, n = torch.initial_seed() % (1 << 31), cfg.group if learning else 1
        temperature = cfg.temperature if learning else 0.0
        groups = respond(inner, batch, SamplingConfig(cfg.max_new_tokens, temperature, top_p=1.0, seed=seed), n)
        texts = [t for group in groups for t in group]
        judged = judge(texts, [answer for answer in batch.answers for _ in range(n)])
        rewards = torch.tensor(judged, device=batch.ids.device).view(len(groups), n)
        if not learning:
            return (1 - rewards).sum()
        # Answers above their group's mean become likelier, the others less likely.
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


def report(
    model: nn.Module, rows: QuestionRows, respond: Respond, judge: Judge, tokenizer: Tokenizer, most: int
) -> str:
    """Greedy answers of at most `most` tokens to three questions, with their rewards."""
    batch = rows.batch(range(min(3, len(rows))))
    said = [texts[0] for texts in respond(model, batch, SamplingConfig(most, 0.0), 1)]
    return "\n".join(
        f"  {tokenizer.decode(t.prompt).strip()} -> {tokenizer.decode(t.added)} ({reward:.3g})"
        for t, reward in zip(said, judge(said, batch.answers))
    )


def joined(texts: Sequence[Answer], device: torch.device) -> tuple[Tensor, Tensor]:
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


def question_rows(
    paths: Sequence[str], tokenizer: Tokenizer, chat_format: str, context: int
) -> tuple[QuestionRows, list[str]]:
    """Rows of chats, whose last answers are held back; no paths give no rows.

    Returns:
        rows, and lines on questions that leave no room for an answer.
    Raises:
        UserError: a line that is no chat with an answer last.
    """
    items, long = [], []
    for where, item in (line for path in paths for line in files.read_jsonl(path)):
        messages = item.get("messages")
        try:
            if not isinstance(messages, list) or not messages or messages[-1]["role"] != "assistant":
                raise UserError(f"{where}: no messages with an answer at their end")
            ids = list(chat.render(messages[:-1], tokenizer, chat_format, generation=True)[0])
        except TokenizerError as e:
            raise UserError(f"{where}: {e}") from None
        long.append(where) if len(ids) >= context else items.append((ids, messages[-1]["content"], where))
    if paths and not items:
        raise UserError(f"{', '.join(paths)}: no questions that leave room for an answer")
    some = f"{len(long)} questions as long as the context of {context} left out: {', '.join(long[:10])}"
    return QuestionRows(items, context), [some] * bool(long)

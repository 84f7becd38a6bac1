"""A reward model: the number that stands for how good an answer is, read behind its last token.

In:  a chat model as the beginning; pairs of answers. Out: rewards of texts; a loss that puts the preferred one higher.
In files it is transformers' LlamaForSequenceClassification with one label, so that it is read there, too.
Knows nothing of what the rewards are for.

Shapes:  B texts (pairs in the loss), T positions, C hidden_size
Source: Bradley and Terry's model as in Ouyang et al., https://arxiv.org/abs/2203.02155, section 3.5
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import files, hf_config, hf_folder
from core.checkpoint import WholeModel
from core.errors import UserError
from extras.preferences.pairs import PairBatch
from model import IGNORE, Llama, ModelConfig

ARCHITECTURE = "LlamaForSequenceClassification"


class RewardModel(Llama):
    """A Llama with one number as its output instead of logits."""

    def __init__(self, config: ModelConfig):
        super().__init__(replace(config, tie_word_embeddings=False))
        del self.lm_head
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        """ids (B, T), last (B,), where each text ends -> rewards (B,) fp32."""
        x = self.hidden(ids)[torch.arange(len(ids), device=ids.device), last]  # (B, C)
        return self.score(x)[:, 0].float()


def begin(base: Llama, weights: Iterable[tuple[str, Tensor]], folder: Path) -> tuple[RewardModel, Iterator]:
    """A reward model on the meta device and its first weights: those of a chat model, and zeros for the score.

    Args:
        base, weights, folder: the chat model, as it was opened.
    Raises:
        UserError: a family that transformers' class does not describe.
    """
    if type(base.config) is not ModelConfig:
        raise UserError(f"{folder}: a reward model begins as a Llama, this is {base.config.model_type}")
    with torch.device("meta"):
        model = RewardModel(base.config)
    own = ((name, values) for name, values in weights if name != hf_folder.HEAD)
    return model, itertools.chain(own, [("score.weight", torch.zeros(model.score.weight.shape))])


class RewardFolder(WholeModel):
    """The saver: a folder as `checkpoint.save_model` writes it, with transformers' other class named."""

    def save(self, folder: Path, model: RewardModel, tokenizer, about: dict, weights: dict[str, Tensor]) -> None:
        super().save(folder, model, tokenizer, about, weights)
        # transformers reads the number behind the last id that is not this one: the rest of a row is filled with it.
        own = {
            "architectures": [ARCHITECTURE],
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
            "pad_token_id": tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
        }
        path = folder / "config.json"
        files.write_json(path, files.read_json(path) | own)


def open_reward(folder: Path) -> tuple[RewardModel, Iterable[tuple[str, Tensor]]]:
    """A reward model's folder: the model on the meta device, and its weights.

    Raises:
        UserError: another kind of model, damaged files.
    """
    named = files.read_json(folder / "config.json").get("architectures")
    if named != [ARCHITECTURE]:
        raise UserError(f"{folder}: not a reward model but {named}", "python reward.py makes one")
    with torch.device("meta"):
        model = RewardModel(hf_config.read_config(folder / "config.json"))
    path = folder / RewardFolder.file
    found = hf_folder.load_tensors(path)
    hf_folder.check_tensors(path, found, model.state_dict())
    return model, found.items()


def differences(model: nn.Module, batch: PairBatch) -> Tensor:
    """(B,): the reward of the preferred answer less that of the other."""
    b, t = batch.ids.shape[0], batch.ids.shape[1] // 2
    targets = batch.targets.view(2 * b, t)
    # The last target is the id that ends the answer; the position it is predicted at reads the answer's last id.
    last = torch.where(targets != IGNORE, torch.arange(t, device=targets.device), 0).amax(dim=1)
    both = model(batch.ids.view(2 * b, t), last).view(b, 2)
    return both[:, 0] - both[:, 1]


def pair_loss(model: nn.Module, batch: PairBatch) -> Tensor:
    """Minus the logarithm of the probability that the preferred answer wins, summed over pairs; ln 2 each at first."""
    return -F.logsigmoid(differences(model, batch)).sum()


@torch.no_grad()
def rewards(model: RewardModel, texts: list[list[int]], batch: int) -> list[float]:
    """Of texts as ids, without the id that ends the answer; `batch` at a time, those of one length together."""
    device, found = model.score.weight.device, [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        longest = max(len(texts[k]) for k in some)
        ids = torch.tensor([texts[k] + [0] * (longest - len(texts[k])) for k in some], device=device)
        last = torch.tensor([len(texts[k]) - 1 for k in some], device=device)
        for k, value in zip(some, model(ids, last).tolist()):
            found[k] = value
    return found

"""Rewards of a file's chats, and a choice among them: the better part, or the best answer to each prompt.

In:  a reward model, chats or answers as lines of JSON. Out: the lines that are kept, with their rewards.
Knows nothing of how the model is opened.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from core import files
from core.config import Range, Section
from core.errors import UserError
from extras.preferences.scalar import RewardModel, rewards
from tokenizer import Tokenizer, TokenizerError, chat


@dataclass(frozen=True)
class ScoreConfig(Section):
    model: str = "out/reward"  # a folder that reward.py has written
    input: str = ""  # chats, or answers of sample.py --output, a line each
    output: str = ""  # lines that are kept, with their "reward"
    keep: Annotated[float, Range(above=0, most=1)] = 1.0  # the share of all lines, those with the highest rewards
    best: bool = False  # of the answers to one prompt only the best
    batch: Annotated[int, Range(least=1)] = 16  # texts at once
    device: str = "auto"


def score_file(cfg: ScoreConfig, model: RewardModel, tokenizer: Tokenizer, chat_format: str) -> None:
    """Rewards of all lines of cfg.input; those that are kept go into cfg.output, in their order."""
    items, texts, long, context = [], [], [], model.config.max_position_embeddings
    for where, item in files.read_jsonl(cfg.input):
        try:
            ids = chat.render(messages_of(item, where), tokenizer, chat_format, train_on="last")[0][:-1]
        except TokenizerError as e:
            raise UserError(f"{where}: {e}") from None
        if len(ids) > context:
            long.append(where)
            continue
        items.append(item)
        texts.append(list(ids))
    if long:
        print(f"{len(long)} lines longer than {context} tokens left out: {', '.join(long[:10])}", file=sys.stderr)
    if not items:
        raise UserError(f"{cfg.input}: no lines that fit into {context} tokens")
    found = rewards(model, texts, cfg.batch)
    chosen = list(range(len(items)))
    if cfg.best:
        leaders: dict[str, int] = {}
        for k in chosen:
            asked = json.dumps(messages_of(items[k], "")[:-1], ensure_ascii=False)
            leaders[asked] = max(leaders.get(asked, k), k, key=lambda n: (found[n], -n))
        chosen = sorted(leaders.values())
    kept = sorted(sorted(chosen, key=lambda k: -found[k])[: max(1, round(cfg.keep * len(chosen)))])
    if cfg.output:
        lines = [json.dumps(items[k] | {"reward": round(found[k], 6)}, ensure_ascii=False) + "\n" for k in kept]
        files.write_text(Path(cfg.output), "".join(lines))
    mean = [sum(found[k] for k in part) / len(part) for part in (range(len(items)), kept)]
    print(f"{len(kept)} of {len(items)} lines kept; mean reward {mean[0]:.4f} of all, {mean[1]:.4f} of these")


def messages_of(item: dict, where: str) -> list[dict]:
    """The chat of a line, or the question and the answer of one that sample.py has written."""
    messages = item.get("messages", item.get("prompt"))
    if "answer" in item and "messages" not in item:
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        messages = [*asked, {"role": "assistant", "content": item["answer"]}] if isinstance(asked, list) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: neither messages nor a prompt with its answer", f"keys here: {', '.join(item)}")
    return messages

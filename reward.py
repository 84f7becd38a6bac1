"""Pairs of answers in, a model that gives any answer a number out: the better answer of a pair the higher one.

    python data_process.py sft --input pairs.json --out_dir data/pairs       # preference files of the usual formats
    python reward.py --init_from out/sft --train data/pairs/chats.jsonl
    python reward.py score --input chats.jsonl --keep 0.5 --output better.jsonl      # the half with the higher rewards
    python sample.py --prompts questions.txt --n 8 --output out/answers.jsonl
    python reward.py score --input out/answers.jsonl --best true --output best.jsonl     # the best of each 8

Writes a folder that transformers reads as LlamaForSequenceClassification to out/reward, or an adapter for it. After
each validation it says how often held-out pairs are the right way round. The same command goes on after a stop.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tokenizer
import trainer
from core import config, distributed, errors, files, hf_folder
from core.errors import UserError
from core.optim import OptimConfig
from extras.finetune import lora, nf4
from extras.preferences import open_chat_model, pairs, scalar
from extras.tracking import trackers
from tokenizer import chat


@dataclass(frozen=True)
class ScoreConfig:
    model: str = "out/reward"  # a folder that this command has written
    input: str = ""  # chats, or answers of sample.py --output, a line each
    output: str = ""  # lines that are kept, with their "reward"
    keep: float = 1.0  # the share of all lines, those with the highest rewards
    best: bool = False  # of the answers to one prompt only the best
    batch: int = 16  # texts at once
    device: str = "auto"

    def __post_init__(self):
        if not 0 < self.keep <= 1 or self.batch < 1:
            raise ValueError(f"keep = {self.keep}, batch = {self.batch}: above 0 and at most 1, and at least 1")


def main() -> None:
    if sys.argv[1:2] == ["score"]:
        return score(config.load(__doc__, {"score": ScoreConfig}, sys.argv[2:]).score)
    sections = {
        "pairs": pairs.PairsConfig,
        "lora": lora.LoraConfig,
        "optim": OptimConfig,
        "train": trainer.TrainConfig,
        "track": trackers.TrackConfig,
    }
    cfg = config.load(__doc__, sections, sys.argv[1:], default="configs/reward.toml")
    if cfg.train.max_memory_gb:
        raise UserError("max_memory_gb knows training on the next token only", "a smaller --micro_batch")
    ranks = distributed.start(cfg.train.device, cfg.train.timeout_s)
    folder, base, fill, text, chat_format = open_chat_model(cfg.pairs.init_from, cfg.pairs.chat_format)
    intro, length = [config.show(cfg)], cfg.pairs.seq_len or base.config.max_position_embeddings
    rows, val_rows = pairs.pair_rows(cfg.pairs, cfg.train.seed, text, chat_format, length, intro)
    identity = {
        "tokenizer": text.sha256,
        "base": hf_folder.weights_digest(folder),
        "chat_format": chat_format,
        "reward": True,
    }
    model, fill = scalar.begin(base, fill, folder)
    if cfg.lora.r:  # nothing beside the blocks' matrices is trained but the score, which has no base to stand beside
        cfg.lora = replace(cfg.lora, modules_to_save=(*cfg.lora.modules_to_save, "score"))
    fill, saver = lora.tune(model, fill, cfg, folder, identity, intro, nf4.Weight, {})
    about = {"command": "reward", "chat_format": chat_format, "options": config.as_dict(cfg), "intro": intro}
    with trackers.tracking(cfg.track, cfg.train.out_dir, about["options"], ranks.first) as track:
        trainer.train(
            model,
            scalar.pair_loss,
            rows,
            {"held out": val_rows},
            cfg.train,
            cfg.optim,
            ranks,
            text,
            identity,
            about,
            lambda m: pairs.told(val_rows, cfg.train.micro_batch, ranks.device, partial(scalar.differences, m)),
            fill,
            saver or scalar.RewardFolder(),
            track,
        )
    ranks.close()


def score(cfg: ScoreConfig) -> None:
    """Rewards of all lines of a file; those that are kept into another, in their order."""
    is_adapter = not (Path(cfg.model) / "config.json").exists() and bool(lora.base_of(cfg.model))
    folder = hf_folder.model_folder(lora.base_of(cfg.model) if is_adapter else cfg.model)
    if is_adapter:
        model, fill = scalar.begin(*hf_folder.open_model(folder), folder)
        model, fill, noted = lora.attach(model, fill, cfg.model, folder)
    else:
        (model, fill), noted = scalar.open_reward(folder), folder
    text, chat_format = tokenizer.load(folder), hf_folder.load_about(noted).get("chat_format")
    model = hf_folder.build(model, fill, distributed.start(cfg.device).device).eval()
    items, texts, long, context = [], [], [], model.config.max_position_embeddings
    for where, item in files.read_jsonl(cfg.input):
        try:
            ids = chat.render(messages_of(item, where), text, chat_format, train_on="last")[0][:-1]
        except tokenizer.TokenizerError as e:
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
    found = scalar.rewards(model, texts, cfg.batch)
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


if __name__ == "__main__":
    errors.run(main)

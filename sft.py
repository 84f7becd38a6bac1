"""Base model and chats in, chat model out: the loop and the model of pretraining, a loss on the answers only.

    python sft.py                                                 # configs/demo-sft.toml: the facts of the demo
    python sft.py configs/sft.toml --init_from out/llama-92m --train chats.jsonl --out_dir out/my-chat
    python sft.py configs/sft.toml configs/lora.toml              # small matrices beside the base's weights: LoRA
    python sft.py --show_mask 3                                   # print samples, trained tokens marked, and stop

A line of a chat file: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
Writes a Hugging Face folder with its chat template to out/sft; run.json in it names the chat format. With LoRA it is
an adapter in PEFT's format.
"""

import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby

import tokenizer
import trainer
from core import config, data, distributed, errors, files, hf_folder
from core.generate import SamplingConfig, complete
from core.loss import next_token_loss
from core.optim import OptimConfig
from extras.estimate import report as estimate
from extras.families import others as families
from extras.finetune import longlora, lora, nf4
from extras.tracking import trackers
from model import Llama
from tokenizer import chat


@dataclass(frozen=True)
class ChatConfig:
    init_from: str = "out/pretrain"  # a model folder: ours, or Hugging Face's of a known family
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    train: tuple[str, ...] = ("data/sft_train.jsonl",)  # chat files
    val: tuple[str, ...] = ("data/sft_val.jsonl",)  # none: no validation; several: a loss for each, and of all
    chat_format: str = "chatml"  # how roles and turns become tokens: see tokenizer/chat.py
    train_on: str = "assistant"  # assistant: loss on all answers and their ends; last: on the last; all: on every token
    seq_len: int = 0  # positions per row; 0: the model's max_position_embeddings
    max_prompt_tokens: int = 0  # chats with more in front of their last answer are left out and counted; 0: no limit
    max_answer_tokens: int = 0  # the same for the last answer
    pack: bool = True  # several chats in one row, attention within each
    show_mask: int = 0  # print so many samples with their trained tokens marked, and stop
    prompt: str = ""  # answered after every validation; "": none

    def __post_init__(self):
        if self.chat_format not in chat.FORMATS:
            raise ValueError(f"chat_format = {self.chat_format!r}, must be one of {', '.join(chat.FORMATS)}")
        if self.train_on not in chat.TRAIN_ON:
            raise ValueError(f"train_on = {self.train_on!r}, must be one of {', '.join(chat.TRAIN_ON)}")
        for name in ("seq_len", "max_prompt_tokens", "max_answer_tokens", "show_mask"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}, must not be negative")


def main() -> None:
    sections = {
        "chat": ChatConfig,
        "lora": lora.LoraConfig,
        "long": longlora.LongConfig,
        "optim": OptimConfig,
        "train": trainer.TrainConfig,
        "track": trackers.TrackConfig,
        "estimate": estimate.EstimateConfig,
    }
    cfg = config.load(__doc__, sections, sys.argv[1:], default="configs/demo-sft.toml")
    families.register()
    ranks = distributed.start(cfg.train.device, cfg.train.timeout_s)
    folder = hf_folder.model_folder(cfg.chat.init_from)
    text = tokenizer.load(folder)
    model, fill = hf_folder.open_model(folder, cfg.chat.allow_pickle)
    hf_folder.check_tokenizer(folder, model, text)
    intro = [config.show(cfg)]
    identity = {
        "tokenizer": text.sha256,
        "base": hf_folder.weights_digest(folder),
        "chat_format": cfg.chat.chat_format,
        "train_on": cfg.chat.train_on,
    }
    changes = longlora.begin(model, cfg.long, identity)
    fill, saver = lora.tune(model, fill, cfg, folder, identity, intro, nf4.Weight, changes)
    seq_len = cfg.chat.seq_len or cfg.long.context or model.config.max_position_embeddings
    for paths in (cfg.chat.train, cfg.chat.val):
        if len({os.path.realpath(path) for path in paths}) < len(paths):
            raise errors.UserError(f"{', '.join(paths)}: the same file stands twice")
    rows = chat_rows(cfg.chat.train, text, cfg.chat, seq_len, intro)
    if cfg.chat.show_mask:
        for ids, mask, where in rows.samples[: cfg.chat.show_mask]:
            print(f"{where}: {marked(text, ids, mask)}")
        return
    if cfg.estimate.dry_run:
        print(estimate.report(model, cfg, rows, seq_len, ranks))
        return
    val_rows = {path: chat_rows((path,), text, cfg.chat, seq_len, intro) for path in cfg.chat.val}
    options = config.as_dict(cfg)
    about = {"command": "sft", "chat_format": cfg.chat.chat_format, "options": options, "intro": intro}
    with trackers.tracking(cfg.track, cfg.train.out_dir, options, ranks.first) as track:
        trainer.train(
            model,
            next_token_loss,
            rows,
            val_rows,
            cfg.train,
            cfg.optim,
            ranks,
            text,
            identity,
            about,
            (lambda m: answer(m, text, cfg.chat)) if cfg.chat.prompt else None,
            fill,
            saver,
            track,
        )
    ranks.close()


def chat_rows(paths: tuple[str, ...], text, cfg: ChatConfig, seq_len: int, intro: list[str]) -> data.ChatRows:
    """Chat files rendered and packed; what does not fit is left out, counted and named in `intro`."""
    samples, left_out = [], defaultdict(list)  # limit -> (where, tokens)
    question, answer = cfg.max_prompt_tokens, cfg.max_answer_tokens
    limits = {
        f"longer than {seq_len} tokens": seq_len + 1,
        f"with a question longer than {question} tokens": question or math.inf,
        f"with an answer longer than {answer} tokens": answer or math.inf,
    }
    for path in paths:
        for where, item in files.read_jsonl(path):
            if "messages" not in item:
                raise errors.UserError(f"{where}: messages is missing", f"keys here: {', '.join(item)}")
            try:
                ids, mask = chat.render(item["messages"], text, cfg.chat_format, train_on=cfg.train_on)
                sizes = [len(ids)]
                if question or answer:
                    last = chat.render(item["messages"], text, cfg.chat_format, train_on="last")[1]
                    sizes += [last.index(1) if any(last) else len(ids), sum(last)]
            except tokenizer.TokenizerError as e:
                raise errors.UserError(f"{where}: {e}") from None
            over = [(what, size) for (what, most), size in zip(limits.items(), sizes) if size > most]
            if over:
                left_out[over[0][0]].append((where, over[0][1]))
            else:
                samples.append((ids, mask, where))
    told = [
        f"{len(chats)} chats {what} left out: " + ", ".join(f"{where} ({n} tokens)" for where, n in chats[:10])
        for what, chats in left_out.items()
    ]
    if not samples:
        raise errors.UserError(f"{', '.join(paths)}: no chats that fit into {seq_len} tokens", "; ".join(told)[:300])
    rows = data.ChatRows(samples, seq_len, text.eos_id, cfg.pack)
    intro.append(f"{', '.join(paths)}: {len(samples)} chats in {len(rows)} rows of {seq_len}")
    intro += told
    return rows


def marked(text, ids, mask) -> str:
    """A sample as text with its trained tokens between 【 and 】."""
    runs = groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1])
    texts = [(trained, text.decode([i for i, _ in run], skip_special=False)) for trained, run in runs]
    return "".join(f"【{part}】" if trained else part for trained, part in texts)


def answer(model: Llama, text, cfg: ChatConfig) -> str:
    """What the model answers to cfg.prompt, each time the most likely token."""
    ids, _ = chat.render([{"role": "user", "content": cfg.prompt}], text, cfg.chat_format, generation=True)
    sampling = SamplingConfig(max_new_tokens=60, temperature=0)
    return f"{cfg.prompt} -> {text.decode(complete(model, [ids], sampling, chat.end_ids(text, cfg.chat_format))[0])}"


if __name__ == "__main__":
    errors.run(main)

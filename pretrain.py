"""Bins in, base model out.

    python pretrain.py                                            # configs/demo.toml: a small model on a laptop
    python pretrain.py configs/llama-92m.toml --lr 2e-4
    torchrun --standalone --nproc_per_node=4 pretrain.py          # the same on four cards or processes

Reads data/train.bin, data/val.bin and data/tokenizer (made by data_process.py); writes the model, a Hugging Face
folder, to out/pretrain. Stopped by Ctrl-C or killed, the same command goes on where it was.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import tokenizer
import trainer
from core import bins, config, data, distributed, errors, hf_config, hf_folder
from core.generate import SamplingConfig, complete
from core.loss import next_token_loss
from core.optim import OptimConfig
from extras.estimate import report as estimate
from extras.families import others as families
from extras.finetune import longlora, lora, nf4
from extras.tracking import trackers
from model import Llama, ModelConfig, describe


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...] = ("data/train.bin",)  # several are mixed: wiki.bin:0.7,medical.bin:0.3
    val: str = "data/val.bin"  # "": no validation
    tokenizer: str = "data/tokenizer"
    seq_len: int = 0  # positions per row; 0: the model's max_position_embeddings
    docs: bool = True  # attention stays within a document where several share a row
    verify: bool = False  # before step 0 read every bin whole and compare it with the hashes in its .json
    trust: bool = False  # bins without .json: do not read them whole first; ids are still checked as they are used
    init_from: str = ""  # a model folder to go on from; "": new weights
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    prompt: str = ""  # continued after every validation; "": none

    def __post_init__(self):
        if self.seq_len < 0:
            raise ValueError(f"seq_len = {self.seq_len}, must not be negative")


def main() -> None:
    sections = {
        "model": ModelConfig,
        "data": DataConfig,
        "lora": lora.LoraConfig,
        "long": longlora.LongConfig,
        "optim": OptimConfig,
        "train": trainer.TrainConfig,
        "track": trackers.TrackConfig,
        "estimate": estimate.EstimateConfig,
    }
    cfg = config.load(__doc__, sections, sys.argv[1:], default="configs/demo.toml")
    families.register()
    ranks = distributed.start(cfg.train.device, cfg.train.timeout_s)
    if cfg.estimate.dry_run and cfg.estimate.tokens and cfg.model.vocab_size and not cfg.data.init_from:
        with torch.device("meta"):  # neither data nor tokenizer are needed
            model = Llama(cfg.model)
        print(estimate.report(model, cfg, None, cfg.data.seq_len or cfg.model.max_position_embeddings, ranks))
        return
    base = cfg.data.init_from and hf_folder.model_folder(cfg.data.init_from)
    text = tokenizer.load(base or cfg.data.tokenizer)
    model, fill = hf_folder.open_model(base, cfg.data.allow_pickle) if base else new_model(cfg, text)
    if base:
        hf_folder.check_tokenizer(base, model, text)
    intro = [config.show(cfg), describe(model)]
    identity = {
        "tokenizer": text.sha256,
        "docs": cfg.data.docs,
        "base": hf_folder.weights_digest(base) if base else "",
    }
    if cfg.long.context and not base:
        raise errors.UserError("context: a new model has max_position_embeddings", "--init_from DIR")
    changes = longlora.begin(model, cfg.long, identity)
    fill, saver = lora.tune(model, fill, cfg, base, identity, intro, nf4.Weight, changes)
    identity["model"] = hf_config.sizes(model.config)
    seq_len = cfg.data.seq_len or cfg.long.context or model.config.max_position_embeddings
    train, shares = data.parse_mix(cfg.data.train)

    def open_rows(path: str, tail: bool) -> data.BinRows:
        bin = bins.TokenBin(path, model.config.vocab_size, text.sha256, trust=cfg.data.trust)
        if cfg.data.verify:
            bin.verify()
        return data.BinRows(bin, seq_len, cfg.data.docs, text.eos_id, tail)

    parts = [open_rows(path, tail=False) for path in train]
    rows = data.MixedRows(parts, shares) if len(parts) > 1 else parts[0]
    val_rows = {cfg.data.val: open_rows(cfg.data.val, tail=True)} if cfg.data.val else {}
    if cfg.estimate.dry_run:
        print(estimate.report(model, cfg, rows, seq_len, ranks))
        return
    intro.append(rows.describe())
    options = config.as_dict(cfg)
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
            {"command": "pretrain", "options": options, "intro": intro},
            (lambda m: continuation(m, text, cfg.data.prompt)) if cfg.data.prompt else None,
            fill,
            saver,
            track,
        )
    ranks.close()


def new_model(cfg, text) -> tuple[Llama, Callable]:
    """A model of the configured size with the tokenizer's vocabulary, without memory yet, and its fresh weights."""
    size = cfg.model.vocab_size or text.vocab_size
    if size < text.vocab_size:
        raise errors.UserError(
            f"vocab_size {size} is smaller than the tokenizer's {text.vocab_size}",
            "--vocab_size 0 takes the tokenizer's",
        )
    with torch.device("meta"):
        model, names = (Llama(dataclasses.replace(cfg.model, vocab_size=size)) for _ in range(2))
    return model, partial(names.init_weights, cfg.train.seed)


def continuation(model: Llama, text, prompt: str) -> str:
    """How the model goes on after the prompt, 60 tokens, each time the most likely one."""
    ids = text.encode(prompt, bos=True)
    added = complete(model, [ids], SamplingConfig(max_new_tokens=60, temperature=0), {text.eos_id})[0]
    return text.decode(ids + added)


if __name__ == "__main__":
    errors.run(main)

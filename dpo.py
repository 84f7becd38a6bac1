"""A chat model and pairs of answers in, a model that prefers the better kind out: direct preference optimization.

    python data_process.py sft --input pairs.json --out_dir data/pairs       # preference files of the usual formats
    python dpo.py --init_from out/sft --train data/pairs/chats.jsonl
    python dpo.py configs/lora.toml --optimizer adamw --lr 1e-4 --init_from out/sft --train data/pairs/chats.jsonl

Writes a model folder, or with LoRA an adapter, to out/dpo. After each validation it says how often held-out pairs are
the right way round. Stopped by Ctrl-C or killed, the same command goes on where it was.
"""

import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import trainer
from core import config, distributed, errors, hf_folder
from core.optim import OptimConfig
from extras.estimate import report as estimate
from extras.families import others as families
from extras.finetune import lora, nf4
from extras.preferences import open_chat_model, pairs
from extras.tracking import trackers


@dataclass(frozen=True)
class DpoConfig:
    beta: float = 0.1  # the larger, the closer the model stays to what it was
    label_smoothing: float = 0.0  # share of pairs that may be the wrong way round

    def __post_init__(self):
        if not 0 < self.beta < 1000 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"beta = {self.beta}, label_smoothing = {self.label_smoothing}: above 0, and below 0.5")


def main() -> None:
    sections = {
        "pairs": pairs.PairsConfig,
        "dpo": DpoConfig,
        "lora": lora.LoraConfig,
        "optim": OptimConfig,
        "train": trainer.TrainConfig,
        "track": trackers.TrackConfig,
        "estimate": estimate.EstimateConfig,
    }
    cfg = config.load(__doc__, sections, sys.argv[1:], default="configs/dpo.toml")
    families.register()
    ranks = distributed.start(cfg.train.device, cfg.train.timeout_s)
    folder, model, fill, text, chat_format = open_chat_model(cfg.pairs.init_from, cfg.pairs.chat_format)
    intro, length = [config.show(cfg)], cfg.pairs.seq_len or model.config.max_position_embeddings
    rows, val_rows = pairs.pair_rows(cfg.pairs, cfg.train.seed, text, chat_format, length, intro)
    identity = {
        "tokenizer": text.sha256,
        "base": hf_folder.weights_digest(folder),
        "chat_format": chat_format,
        "beta": cfg.dpo.beta,
        "label_smoothing": cfg.dpo.label_smoothing,
    }
    if not cfg.estimate.dry_run:
        refer(cfg, folder, identity["base"], (rows, val_rows), ranks)
    fill, saver = lora.tune(model, fill, cfg, folder, identity, intro, nf4.Weight, {})
    if cfg.estimate.dry_run:
        print(estimate.report(model, cfg, rows, rows.seq_len, ranks))
        return
    options = config.as_dict(cfg)
    about = {"command": "dpo", "chat_format": chat_format, "options": options, "intro": intro}
    with trackers.tracking(cfg.track, cfg.train.out_dir, options, ranks.first) as track:
        loss = pairs.dpo_loss(cfg.dpo.beta, cfg.dpo.label_smoothing)
        trainer.train(
            model,
            loss,
            rows,
            {"held out": val_rows},
            cfg.train,
            cfg.optim,
            ranks,
            text,
            identity,
            about,
            lambda m: pairs.told(
                val_rows, cfg.train.micro_batch, ranks.device, partial(pairs.margins, m, beta=cfg.dpo.beta)
            ),
            fill,
            saver,
            track,
        )
    ranks.close()


def refer(cfg, folder: Path, weights: str, parts: tuple, ranks) -> None:
    """Log-probabilities of the model as it is, into the rows: computed once, kept in out_dir for runs that go on."""
    dtype = trainer.choose_dtype(cfg.train.dtype, ranks.device)
    name = hashlib.sha256(" ".join([weights, str(dtype), *(rows.digest for rows in parts)]).encode()).hexdigest()[:16]
    path = Path(cfg.train.out_dir) / f"reference-{name}.safetensors"
    if ranks.agree(path.is_file()):
        found = hf_folder.load_tensors(path)
    else:
        model = hf_folder.build(*hf_folder.open_model(folder), ranks.device).eval()
        found = {}
        for part, rows in zip(("train", "held_out"), parts):
            numbers = range(len(rows))[ranks.rank :: ranks.world]  # each rank its share
            found[part] = torch.zeros(len(rows), 2)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                found[part][numbers] = pairs.over_pairs(
                    rows, cfg.train.micro_batch, ranks.device, partial(pairs.log_probabilities, model), numbers
                )
            found[part] = ranks.sum(found[part].to(ranks.device)).cpu()
        if ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            hf_folder.save_tensors(path, found)
    for part, rows in zip(("train", "held_out"), parts):
        rows.reference = found[part]


if __name__ == "__main__":
    errors.run(main)

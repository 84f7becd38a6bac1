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

import numpy as np
import torch

import tokenizer
from core import checkpoint, config, distributed, engine, errors
from core.optim import OptimConfig
from extras import estimate, families, lora, nf4, preferences, trackers
from tokenizer import chat


@dataclass(frozen=True)
class PairsConfig:
    init_from: str = "out/sft"  # a chat model's folder
    train: tuple[str, ...] = ("data/pairs/chats.jsonl",)  # chats with another, worse answer beside them
    val: tuple[str, ...] = ()  # the same, held out; none: val_share of the training pairs
    val_share: float = 0.1  # drawn with the run's seed
    chat_format: str = "auto"  # auto: the model's own
    seq_len: int = 0  # positions of each of the two texts; 0: the model's max_position_embeddings
    beta: float = 0.1  # the larger, the closer the model stays to what it was
    label_smoothing: float = 0.0  # share of pairs that may be the wrong way round

    def __post_init__(self):
        if self.chat_format not in ("auto", *chat.FORMATS):
            raise ValueError(f"chat_format = {self.chat_format!r}, must be auto or one of {', '.join(chat.FORMATS)}")
        if self.seq_len < 0 or not 0 < self.val_share < 1:
            raise ValueError(f"seq_len = {self.seq_len}, val_share = {self.val_share}: not negative, and from 0 to 1")
        if not 0 < self.beta < 1000 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"beta = {self.beta}, label_smoothing = {self.label_smoothing}: above 0, and below 0.5")


def main() -> None:
    sections = {"pairs": PairsConfig, "lora": lora.LoraConfig, "optim": OptimConfig, "train": engine.TrainConfig,
                "track": trackers.TrackConfig, "estimate": estimate.EstimateConfig}  # fmt: skip
    cfg = config.load(__doc__, sections, sys.argv[1:], default="configs/dpo.toml")
    families.register()
    ranks = distributed.start(cfg.train.device, cfg.train.timeout_s)
    folder = checkpoint.model_folder(cfg.pairs.init_from)
    text, own = tokenizer.load(folder), checkpoint.load_about(folder).get("chat_format")
    chat_format = own if cfg.pairs.chat_format == "auto" else cfg.pairs.chat_format
    if not chat_format:
        raise errors.UserError(f"{folder}: a base model has no way to answer", "python sft.py first, or --chat_format")
    model, fill = checkpoint.open_model(folder)
    checkpoint.check_tokenizer(folder, model, text)
    intro, length = [config.show(cfg)], cfg.pairs.seq_len or model.config.max_position_embeddings
    rows, val_rows = pair_rows(cfg, text, chat_format, length, intro)
    identity = {"tokenizer": text.sha256, "base": checkpoint.weights_digest(folder), "chat_format": chat_format,
                "beta": cfg.pairs.beta, "label_smoothing": cfg.pairs.label_smoothing}  # fmt: skip
    if not cfg.estimate.dry_run:
        refer(cfg, folder, identity["base"], (rows, val_rows), ranks)
    fill, saver = lora.tune(model, fill, cfg, folder, identity, intro, nf4.Weight, {})
    if cfg.estimate.dry_run:
        print(estimate.report(model, cfg, rows, rows.seq_len, ranks))
        return
    options = config.as_dict(cfg)
    about = {"command": "dpo", "chat_format": chat_format, "options": options, "intro": intro}
    with trackers.tracking(cfg.track, cfg.train.out_dir, options, ranks.first) as track:
        loss = preferences.dpo_loss(cfg.pairs.beta, cfg.pairs.label_smoothing)
        engine.train(model, loss, rows, {"held out": val_rows}, cfg.train, cfg.optim, ranks, text, identity, about,
                     lambda m: told(m, val_rows, cfg, ranks), fill, saver, track)  # fmt: skip
    ranks.close()


def pair_rows(cfg, text, chat_format: str, length: int, intro: list[str]) -> tuple:
    """Rows to train on and rows that are held out."""
    pairs = preferences.read_pairs(cfg.pairs.train, text, chat_format, length, intro)
    if cfg.pairs.val:
        held_out = preferences.read_pairs(cfg.pairs.val, text, chat_format, length, intro)
    else:
        order = np.random.default_rng(cfg.train.seed).permutation(len(pairs))
        at = max(1, round(cfg.pairs.val_share * len(pairs)))
        if at == len(pairs):
            raise errors.UserError(f"{', '.join(cfg.pairs.train)}: too few pairs to hold some out", "--val FILE")
        held_out, pairs = ([pairs[i] for i in sorted(part)] for part in (order[:at], order[at:]))
    intro.append(f"{len(pairs)} pairs to train on, {len(held_out)} held out, each two texts of at most {length} tokens")
    return tuple(preferences.PairRows(part, length, text.eos_id) for part in (pairs, held_out))


def refer(cfg, folder: Path, weights: str, parts: tuple, ranks) -> None:
    """Log-probabilities of the model as it is, into the rows: computed once, kept in out_dir for runs that go on."""
    dtype = engine.choose_dtype(cfg.train.dtype, ranks.device)
    name = hashlib.sha256(" ".join([weights, str(dtype), *(rows.digest for rows in parts)]).encode()).hexdigest()[:16]
    path = Path(cfg.train.out_dir) / f"reference-{name}.safetensors"
    if ranks.agree(path.is_file()):
        found = checkpoint.load_tensors(path)
    else:
        model = checkpoint.build(*checkpoint.open_model(folder), ranks.device).eval()
        found = {}
        for part, rows in zip(("train", "held_out"), parts):
            numbers = range(len(rows))[ranks.rank :: ranks.world]  # each rank its share
            found[part] = torch.zeros(len(rows), 2)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                found[part][numbers] = preferences.over_pairs(
                    rows, cfg.train.micro_batch, ranks.device, partial(preferences.log_probabilities, model), numbers)
            found[part] = ranks.sum(found[part].to(ranks.device)).cpu()
        if ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_tensors(path, found)
    for part, rows in zip(("train", "held_out"), parts):
        rows.reference = found[part]


def told(model, rows, cfg, ranks) -> str:
    """How the model sees the held-out pairs: which way round they are, and how far apart."""
    score = partial(preferences.margins, model, beta=cfg.pairs.beta)
    found = preferences.over_pairs(rows, cfg.train.micro_batch, ranks.device, score, range(len(rows)))
    return (f"held-out pairs the right way round: {(found > 0).float().mean():.1%} of {len(found)}, "
            f"margin {found.mean():.4f}")  # fmt: skip


if __name__ == "__main__":
    errors.run(main)

"""A chat model and pairs of answers in, a model that prefers the better kind out: direct preference optimization.

    python data_process.py sft --input pairs.json --out_dir data/pairs       # preference files of the usual formats
    python dpo.py --init_from out/sft --train data/pairs/chats.jsonl
    python dpo.py configs/lora.toml --optimizer adamw --lr 1e-4 --init_from out/sft --train data/pairs/chats.jsonl

Writes a model folder, or with LoRA an adapter, to out/dpo. After each validation it says how often held-out pairs are
the right way round. Stopped by Ctrl-C or killed, the same command goes on where it was.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from assembly import models, training
from core import errors, hf_folder
from core.config import Range, Section
from core.device import choose_dtype
from core.distributed import Ranks
from extras.preferences import pairs
from trainer import Task, TrainConfig


@dataclass(frozen=True)
class DpoConfig(Section):
    beta: Annotated[float, Range(above=0, below=1000)] = 0.1  # the larger, the closer the model stays to what it was
    # Share of pairs that may be the wrong way round.
    label_smoothing: Annotated[float, Range(least=0, below=0.5)] = 0.0


def main() -> None:
    # The options, this process among the ranks, and the chat model to begin with.
    sections = {"pairs": pairs.PairsConfig, "dpo": DpoConfig}
    cfg = training.load_options(__doc__, sections, "configs/dpo.toml", wings=("lora", "track", "estimate"))
    ranks = training.join_ranks(cfg)
    base, chat_format = training.open_chat_base(cfg.pairs.init_from, cfg.pairs.chat_format)

    # Pairs of answers, and how likely the model finds them as it is.
    length = cfg.pairs.seq_len or base.model.config.max_position_embeddings
    rows, held_out, lines = pairs.pair_rows(cfg.pairs, cfg.train.seed, base.tokenizer, chat_format, length)
    if not training.is_dry_run(cfg):
        add_reference(cfg.train, base, {"train": rows, "held_out": held_out}, ranks)

    # DPO's loss, and the loop.
    base = training.adapt(base, cfg)
    identity = base.identity | {"chat_format": chat_format} | asdict(cfg.dpo)
    about, intro = {"command": "dpo", "chat_format": chat_format}, (*lines, *base.intro)
    margins = partial(pairs.margins, beta=cfg.dpo.beta)
    sample = partial(pairs.report, rows=held_out, micro=cfg.train.micro_batch, device=ranks.device, score=margins)
    loss = pairs.dpo_loss(cfg.dpo.beta, cfg.dpo.label_smoothing)
    parts = (base.model, base.weights, rows, {"held out": held_out}, loss, base.tokenizer)
    training.run(Task(*parts, identity, about, intro, sample, base.saver), cfg, ranks)


def add_reference(options: TrainConfig, base: training.Base, parts: dict[str, pairs.PairRows], ranks: Ranks) -> None:
    """Log-probabilities of the model as it is, into the rows: computed once, kept in out_dir for runs that go on."""
    dtype = choose_dtype(options.dtype, ranks.device)
    name = " ".join([base.identity["base"], str(dtype), *(rows.digest for rows in parts.values())])
    path = Path(options.out_dir) / f"reference-{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
    if ranks.agree(path.is_file()):
        found = hf_folder.load_tensors(path)
    else:
        found, score = {}, partial(pairs.log_probabilities, models.load_model(base.folder, ranks.device).eval())
        for part, rows in parts.items():
            numbers = range(len(rows))[ranks.rank :: ranks.world]  # each rank its share
            found[part] = torch.zeros(len(rows), 2)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                found[part][numbers] = pairs.over_pairs(rows, options.micro_batch, ranks.device, score, numbers)
            found[part] = ranks.sum(found[part].to(ranks.device)).cpu()
        if ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            hf_folder.save_tensors(path, found)
    for part, rows in parts.items():
        rows.reference = found[part]


if __name__ == "__main__":
    errors.run(main)

"""A run small enough to be repeated hundreds of times, for the tests of engine and checkpoints.

As a program (under torchrun too): `python small_run.py OUT_DIR '{"max_steps": 5, "rows": "chats"}'` trains and writes
OUT_DIR/seen-<rank>.json, the ids of every micro-batch in order, and OUT_DIR.pid-<rank>.
"""

import dataclasses
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trainer
from core import distributed, errors, hf_folder
from core.bins import BinWriter, TokenBin
from core.data import BinRows, ChatRows
from core.loss import next_token_loss
from core.optim import OptimConfig
from model import Llama, ModelConfig

VOCAB, SEQ_LEN = 64, 32


class NoTokenizer:
    """Stands in where a run needs a tokenizer to save; ids 1 and 2 begin and end a document."""

    bos_id, eos_id, pad_id, sha256 = 1, 2, None, "none"

    def save(self, folder, chat_format=None):
        (Path(folder) / "tokenizer.model").write_bytes(b"a tokenizer")


def bin_rows(folder: Path, tail: bool = False, seq_len: int = SEQ_LEN) -> BinRows:
    """Rows of a bin of random documents of uneven lengths: the number of targets differs from row to row."""
    path = Path(folder) / "small.bin"
    if not path.exists():
        rng = np.random.default_rng(0)
        with BinWriter(path, VOCAB, 2, "none") as out:
            for _ in range(300):
                ids = [1, *rng.integers(3, VOCAB, rng.integers(1, 60)).tolist(), 2]
                out.add(ids, 3 * len(ids))
    return BinRows(TokenBin(path, VOCAB, "none"), seq_len, docs=True, eos_id=2, tail=tail)


def chat_rows() -> ChatRows:
    """Rows of random chats: some rows have many targets, some few."""
    rng = np.random.default_rng(1)
    samples = []
    for k in range(200):
        question, answer = rng.integers(1, 20), rng.integers(1, 10)
        ids = rng.integers(3, VOCAB, question + answer)
        samples.append((ids, np.arange(len(ids)) >= question, f"chat {k}"))
    return ChatRows(samples, SEQ_LEN, pad_id=2)


def small_model(layers: int = 2, **changes) -> Llama:
    model = Llama(
        ModelConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQ_LEN,
            **changes,
        )
    )
    model.init_weights(0)
    return model


def run(
    out_dir,
    model=None,
    rows="bin",
    loss_fn=next_token_loss,
    val=True,
    optimizer="adamw",
    lr=3e-3,
    grad_clip=1.0,
    min_lr=None,
    samples=None,
    fill=None,
    seq_len=SEQ_LEN,
    **options,
) -> Llama:
    """Train the small model; `options` are fields of TrainConfig. Returns the model."""
    out_dir, model = Path(out_dir), model or small_model()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    defaults = {
        "max_steps": 10,
        "batch_tokens": 8 * SEQ_LEN,
        "micro_batch": 2,
        "save_every": 5,
        "eval_every": 5,
        "log_every": 1,
        "device": "cpu",
        "dtype": "fp32",
        "timeout_s": 60,
    }
    cfg = trainer.TrainConfig(out_dir=str(out_dir), **defaults | options)
    optim = OptimConfig(
        optimizer=optimizer, lr=lr, min_lr=lr / 10 if min_lr is None else min_lr, warmup_steps=2, grad_clip=grad_clip
    )
    ranks = distributed.start(cfg.device, cfg.timeout_s)
    if not next(model.parameters()).is_meta:
        model.to(ranks.device)
    train_rows = chat_rows() if rows == "chats" else bin_rows(out_dir.parent, seq_len=seq_len)
    val_rows = {"val": bin_rows(out_dir.parent, tail=True, seq_len=seq_len)} if val else {}
    about = {"options": {"train": dataclasses.asdict(cfg), "optim": dataclasses.asdict(optim)}}
    trainer.train(
        model,
        loss_fn,
        train_rows,
        val_rows,
        cfg,
        optim,
        ranks,
        NoTokenizer(),
        {"model": dataclasses.asdict(model.config)},
        about,
        samples,
        fill,
    )
    ranks.close()
    return model


def main() -> None:
    torch.set_num_threads(1)
    out_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    changes, meta = options.pop("model", {}), options.pop("meta", False)
    if fails := options.pop("no_room_for_models", 0):  # so many times the run folder's own model is not written
        save = hf_folder.save_model

        def full_at_first(folder, *args):
            nonlocal fails
            if folder == out_dir and fails:
                fails -= 1
                raise OSError(28, "No space left on device")
            save(folder, *args)

        hf_folder.save_model = full_at_first
    rank, bad = int(os.environ.get("RANK", 0)), options.pop("bad", {})  # bad: the rank and call of a loss that is NaN
    out_dir.mkdir(parents=True, exist_ok=True)
    Path(f"{out_dir}.pid-{rank}").write_text(str(os.getpid()))
    with torch.device("meta" if meta else "cpu"):
        model = small_model(**changes)
    if meta:  # the sizes again: of a pipeline's model the ranks take layers away
        options["fill"] = partial(small_model(**changes).init_weights, 0)
    seen = []

    def recording_loss(model, batch):
        if torch.is_grad_enabled():
            seen.append([batch.rows, batch.ids.tolist()])
        return next_token_loss(model, batch) * (math.nan if bad == {"rank": rank, "call": len(seen)} else 1)

    loss_fn = next_token_loss if options.get("parallel") == "pipeline" else recording_loss
    try:
        run(out_dir, model, loss_fn=loss_fn, **options)
    finally:
        (out_dir / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    errors.run(main)

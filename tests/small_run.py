"""A run small enough to be repeated hundreds of times, for the tests of the loop and of checkpoints.

As a program (under torchrun too): `python small_run.py OUT_DIR '{"max_steps": 5, "rows": "chats"}'` trains and writes
OUT_DIR/seen-<rank>.json, the ids of every micro-batch in order, and OUT_DIR.pid-<rank>.
"""

import copy
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assembly import training
from assembly.chats import ChatRows
from core import checkpoint, errors
from core.bins import BinWriter, TokenBin
from core.data import BinRows
from core.hf_config import family_of
from core.optim import OptimConfig
from model import Llama, ModelConfig
from trainer import Task, TrainConfig, next_token_loss

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


def newborn(config: ModelConfig, seed: int = 0) -> Llama:
    """A model with the weights that it is born with."""
    model = family_of(config).model(config)
    with torch.no_grad():
        for p, (_, values) in zip(model.parameters(), model.weights_at_birth(seed), strict=True):
            p.copy_(values)
    return model


def small_config(layers: int = 2, **changes) -> ModelConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQ_LEN,
    }
    return ModelConfig(**sizes | changes)


def small_model(layers: int = 2, **changes) -> Llama:
    return newborn(small_config(layers, **changes))


def run(out_dir, model=None, rows="bin", loss=next_token_loss, val=True, sample=None, **options) -> Llama:
    """Train the small model, as the commands do.

    Args:
        model: with its weights; or on the meta device, then it gets those of its birth.
        options: fields of TrainConfig and OptimConfig, and seq_len.
    Returns:
        the model.
    """
    out_dir, model = Path(out_dir), model or small_model()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    seq_len, lr = options.pop("seq_len", SEQ_LEN), options.pop("lr", 3e-3)
    rate = {"lr": lr, "min_lr": lr / 10, "warmup_steps": 2}
    known = {f.name for f in dataclasses.fields(OptimConfig)}
    optim = OptimConfig(**rate | {name: value for name, value in options.items() if name in known})
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
    options = {name: value for name, value in options.items() if name not in known}
    cfg = SimpleNamespace(train=TrainConfig(str(out_dir), **defaults | options), optim=optim, estimate=None, track=None)
    ranks = training.join_ranks(cfg)
    # Names and shapes of the weights are read from a copy: a pipeline takes layers out of the model.
    is_meta = next(model.parameters()).is_meta
    weights = copy.deepcopy(model).weights_at_birth(0) if is_meta else ()
    if not is_meta:
        model.to(ranks.device)
    train_rows = chat_rows() if rows == "chats" else bin_rows(out_dir.parent, seq_len=seq_len)
    val_rows = {"val": bin_rows(out_dir.parent, tail=True, seq_len=seq_len)} if val else {}
    identity = {"model": dataclasses.asdict(model.config)}
    parts = (model, weights, train_rows, val_rows, loss, NoTokenizer())
    training.run(Task(*parts, identity, about={}, sample=sample), cfg, ranks)
    return model


def main() -> None:
    torch.set_num_threads(1)
    out_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    changes, meta = options.pop("model", {}), options.pop("meta", False)
    if fails := options.pop("no_room_for_models", 0):  # so many times the run folder's own model is not written
        save = checkpoint.save_model

        def full_at_first(folder, *args):
            nonlocal fails
            if folder == out_dir and fails:
                fails -= 1
                raise OSError(28, "No space left on device")
            save(folder, *args)

        checkpoint.save_model = full_at_first
    rank, bad = int(os.environ.get("RANK", 0)), options.pop("bad", {})  # bad: the rank and call of a loss that is NaN
    out_dir.mkdir(parents=True, exist_ok=True)
    Path(f"{out_dir}.pid-{rank}").write_text(str(os.getpid()))
    with torch.device("meta" if meta else "cpu"):
        model = Llama(small_config(**changes)) if meta else small_model(**changes)
    seen = []

    def recording_loss(model, batch):
        if torch.is_grad_enabled():
            seen.append([batch.rows, batch.ids.tolist()])
        return next_token_loss(model, batch) * (math.nan if bad == {"rank": rank, "call": len(seen)} else 1)

    loss = next_token_loss if options.get("parallel") == "pipeline" else recording_loss
    try:
        run(out_dir, model, loss=loss, **options)
    finally:
        (out_dir / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    errors.run(main)

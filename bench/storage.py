"""What reading rows and saving checkpoints costs beside a step of training.

In:  sizes of a model. Out: seconds and memory.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.options import BenchConfig, read_sizes
from bench.peers import Setup, compete
from core.bins import TokenBin
from core.checkpoint import Run, State
from core.data import BinRows, step_rows
from core.device import DTYPES
from core.distributed import Ranks
from core.optim import OptimConfig, make_optimizers
from core.parallel import Strategy
from model import Llama
from trainer import TrainConfig


def loader(cfg: BenchConfig) -> None:
    """The start at step 1,000,000 in a bin of 50 GB (with holes: it takes no disk), and then 1,000 micro-batches."""

    def resident() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) >> 10

    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "large.bin"
        with open(path, "wb") as f:
            f.truncate(50_000_000_000)
        began, before = time.perf_counter(), resident()
        bin = TokenBin(path, read_sizes(cfg.model).vocab_size, warn=lambda line: None, trust=True)
        rows = BinRows(bin, cfg.seq_len, docs=True, eos_id=1)
        seen, seconds = 1_000_000 * cfg.rows, []
        rows.batch(step_rows(seen, cfg.rows, len(rows), seed=1))
        first = time.perf_counter() - began
        for k in range(1000):
            began = time.perf_counter()
            rows.batch(step_rows(seen + k * cfg.rows, cfg.rows, len(rows), seed=1))
            seconds.append(time.perf_counter() - began)
        grown = resident() - before
    ms = round(1000 * statistics.median(seconds), 3)
    result = {"first_batch_s": round(first, 3), "ms": ms, "rss_growth_mib": grown}
    print(f"first micro-batch after {first:.3f} s, then {ms} ms each, memory grew by {grown} MiB")
    print(json.dumps(result))


class Four:
    """Asks for four steps."""

    def __init__(self):
        self.seconds: list[float] = []

    def wait(self) -> bool:
        self.began = time.perf_counter()
        return len(self.seconds) < 4

    def tell(self, loss: float) -> None:
        self.seconds.append(round(time.perf_counter() - self.began, 2))


def saving(cfg: BenchConfig) -> None:
    """Three checkpoints of a model with AdamW's moments, and three steps of the smallest useful kind beside them."""
    sizes, found = read_sizes(cfg.model), {}
    # Moments exist after the first step.
    with torch.device("meta"):
        model = Llama(sizes)
    ranks = Ranks(0, 1, torch.device("cpu"))
    strategy = Strategy(model, model.weights_at_birth(0), TrainConfig(), ranks, torch.float32)
    optimizers = make_optimizers(model, OptimConfig())
    strategy.take(optimizers)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers[0].step()
    model.zero_grad()
    # What a save takes ...
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Run(folder, {}, {}, None)
        for step in (1, 2, 3):
            began = time.perf_counter()
            run.save(strategy, None, State(step), print, must=True)
            found.setdefault("save_s", []).append(round(time.perf_counter() - began, 2))
        size = sum(path.stat().st_size for path in run.path(3).iterdir())
        run.close()
    # ... and what a step takes.
    ids = torch.randint(0, sizes.vocab_size, (cfg.rows, cfg.seq_len + 1))
    setup = Setup(sizes, ids, DTYPES[cfg.dtype], cfg.compile, cfg.gradient_checkpointing, cfg.micro_batches)
    compete("ours", setup, steps := Four())
    found["step_s"] = steps.seconds
    save, one = statistics.median(found["save_s"]), statistics.median(found["step_s"][1:])
    every = TrainConfig.save_every
    found |= {"gb": round(size / 1e9, 2), "share": round(save / (every * one), 5)}
    print(
        f"{found['gb']} GB in {save:.2f} s; a step of {cfg.rows * cfg.seq_len * cfg.micro_batches:,} tokens takes "
        f"{one:.2f} s: one save every {every} steps costs {found['share']:.2%}"
    )
    print(json.dumps(found))

"""Steps of training beside others' (peers.py). Linux.

In:  sizes of a model. Out: tokens a second, ratios, memory.
"""

import json
import os
import statistics
import time
from dataclasses import asdict

import torch

from bench.options import BenchConfig, read_sizes
from bench.timing import KEEP_FREED, ask, finish, start
from core.device import DTYPES, flops_per_token
from model import Llama


def train(cfg: BenchConfig) -> None:
    """A step of each contestant in turn, each in a process of its own, after two that are not counted."""
    sizes = read_sizes(cfg.model)
    about = {
        "sizes": asdict(sizes),
        "rows": cfg.rows,
        "seq_len": cfg.seq_len,
        "dtype": cfg.dtype,
        "compiled": cfg.compile,
        "checkpointing": cfg.gradient_checkpointing,
        "micro_batches": cfg.micro_batches,
    }
    # A process for each, with the same settings of threads and allocator unless the options say otherwise.
    same = os.environ | KEEP_FREED
    plain = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}  # core/__init__.py set it
    processes = {
        peer: start(
            "bench.peers",
            {"peer": peer, **about},
            same if cfg.alike else os.environ if peer == "ours" else plain,
        )
        for peer in cfg.peers
    }
    seconds, losses = {peer: [] for peer in cfg.peers}, {}
    peaks = []  # GFLOP/s of a matrix product alone, in each round
    # Two rounds are not counted: moments and compiled code are made in them.
    for turn in range(cfg.rounds + 2):
        for peer, process in processes.items():
            line = ask(peer, process)
            losses.setdefault(peer, line["loss"])
            if turn > 1:
                seconds[peer].append(line["seconds"])
        peaks.append(product_rate(cfg.dtype))
    # Ratios within a round, against the first contestant.
    tokens = cfg.rows * cfg.seq_len * cfg.micro_batches
    with torch.device("meta"):
        flops = flops_per_token(Llama(sizes), cfg.seq_len)
    result = {"gflops_of_a_product": round(statistics.median(peaks[2:])), "flops_per_token": flops}
    for peer, process in processes.items():
        rest = finish(process)
        ratios = sorted(a / b for a, b in zip(seconds[peer], seconds[cfg.peers[0]]))
        speed = tokens / statistics.median(seconds[peer])
        result[peer] = {
            "tokens_per_s": round(speed),
            "seconds": [round(s, 3) for s in seconds[peer]],
            "times_first": round(statistics.median(ratios), 3),
            "from": round(ratios[0], 3),
            "to": round(ratios[-1], 3),
            "peak_gb": round(rest["peak_gb"], 2),
            "first_loss": round(losses[peer], 3),
            "share_of_product": round(speed * flops / 1e9 / statistics.median(peaks[2:]), 3),
        }
        r = result[peer]
        print(
            f"{peer:<14} {r['tokens_per_s']:>7,} tokens/s  {r['times_first']:.2f} x ({r['from']:.2f} to "
            f"{r['to']:.2f}) the time of {cfg.peers[0]}  {r['peak_gb']:.2f} GB  {r['share_of_product']:.0%} of a "
            f"product's rate  first loss {r['first_loss']}"
        )
        if "parts" in rest:
            whole = statistics.median(seconds[peer]) / cfg.micro_batches
            result["parts"] = {name: round(part / whole, 3) for name, part in rest["parts"].items()}
    if "parts" in result:
        print("ours, each part alone: " + ", ".join(f"{name} {share:.0%}" for name, share in result["parts"].items()))
    print(json.dumps(result))


def product_rate(dtype: str, size: int = 2048) -> float:
    """GFLOP/s of the best of three matrix products: what no training can exceed."""
    a = torch.randn(size, size, dtype=DTYPES[dtype])
    times = []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e9

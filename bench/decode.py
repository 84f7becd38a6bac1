"""New tokens beside others' (decoders.py).

In:  sizes of a model, a tokenizer. Out: tokens a second, ratios, the share of what memory gives.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.options import BenchConfig, read_sizes
from bench.peers import fresh_model
from bench.timing import ask, finish, start
from core import hf_folder
from extras.formats import gguf_file
from tokenizer import load as load_tokenizer


def decode(cfg: BenchConfig) -> None:
    """A text continued by each contestant in turn, each in a process of its own, after one that is not counted."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    sizes = replace(read_sizes(cfg.model), vocab_size=tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, sizes.vocab_size, (cfg.prompt_tokens,), generator=generator).tolist()
    found: dict[str, list[dict]] = {name: [] for name in cfg.contestants}
    rates = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        # The same weights for all, in the file that each reads; each waits in a process of its own.
        model = fresh_model(sizes)
        hf_folder.save_model(Path(folder) / "model", model, tokenizer, {})
        processes = {}
        for name in cfg.contestants:
            path = Path(folder) / "model"
            if name.startswith("llama.cpp"):
                path = Path(folder) / f"{name}.gguf"
                print(name, gguf_file.write(path, model, tokenizer, name.split("-")[1], "bench", None), flush=True)
            about = {"name": name, "path": str(path.resolve()), "prompt": prompt}
            processes[name] = start("bench.decoders", about | {"new": cfg.new_tokens, "threads": cfg.threads})
        del model
        # The speed of memory is measured in the same rounds: it bounds all of them.
        for turn in range(cfg.rounds + 1):
            for name, process in processes.items():
                found[name] += [ask(name, process)] * bool(turn)
            rates.append(read_rate())
        read = {name: finish(process)["bytes"] for name, process in processes.items()}
    rate, first = statistics.median(rates), found[cfg.contestants[0]]
    result: dict = {"read_gb_per_s": round(rate, 1)}
    print(f"memory is read at {rate:.1f} GB/s; {cfg.prompt_tokens} + {cfg.new_tokens} tokens, {cfg.threads} threads")
    # Ratios within a round: drift cancels there.
    for name, lines in found.items():
        rows = int(name.split("batch")[1].split("-")[0]) if "batch" in name else 1
        speeds = sorted(rows * cfg.new_tokens / line["seconds"] for line in lines)
        ratios = sorted(rows * a["seconds"] / b["seconds"] for a, b in zip(first, lines))
        step = statistics.median((line["seconds"] - line["first_s"]) / (cfg.new_tokens - 1) for line in lines)
        waits = statistics.median(line["first_s"] for line in lines)
        r = result[name] = {
            "tokens_per_s": round(statistics.median(speeds), 1),
            "times_first": round(statistics.median(ratios), 3),
            "from": round(ratios[0], 3),
            "to": round(ratios[-1], 3),
            "first_ms": round(1000 * waits, 1),
            "mb_per_step": round(read[name] / 1e6),
            "share_of_bound": round(read[name] / 1e9 / rate / step, 3),
            "same_ids": sum(a == b for a, b in zip(lines[0]["ids"], first[0]["ids"])),
        }
        print(
            f"{name:<22} {r['tokens_per_s']:>7.1f} tokens/s  {r['times_first']:.2f} x ({r['from']:.2f} to "
            f"{r['to']:.2f})  first after {r['first_ms']:.0f} ms  {r['mb_per_step']} MB a step, "
            f"{r['share_of_bound']:.0%} of what memory gives  {r['same_ids']} ids alike"
        )
    print(json.dumps(result))


def read_rate(size: int = 1 << 28) -> float:
    """GB/s at which a GiB is summed up, the best of three: no token comes faster than its weights are read."""
    numbers, times = torch.ones(size), []
    for _ in range(3):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return 4 * size / min(times) / 1e9

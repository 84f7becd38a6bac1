"""Memory and time of training steps: with each kind of checkpointing; of all weights, LoRA or QLoRA. Linux.

In:  sizes of a model. Out: GB beyond what torch itself takes, and seconds.

    python -m bench.step_memory '{"sizes": {...}, ...}'       # fields of Steps: in a process of its own
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.options import BenchConfig, read_sizes
from bench.timing import KEEP_FREED, ROOT
from core.data import Batch
from core.device import DTYPES
from core.distributed import Ranks
from core.errors import UserError
from core.memory import save_memory
from core.optim import OptimConfig, make_optimizers
from core.parallel import Strategy
from extras.estimate.memory import OVERHEAD, Step, peak_bytes
from extras.finetune import lora, nf4
from model import Llama, ModelConfig
from trainer import TrainConfig, next_token_loss


@dataclass(frozen=True)
class Steps:
    """Training steps to take: of what, and how."""

    sizes: dict  # fields of ModelConfig
    way: str = "full"  # full, lora or qlora: what is trained
    kind: str = "none"  # of gradient checkpointing
    dtype: str = "fp32"
    rows: int = 4
    seq_len: int = 512
    steps: int = 2
    micro_batches: int = 2
    optimizer: str = "adamw"


def activations(cfg: BenchConfig) -> None:
    """Peak memory of training steps with each kind of checkpointing, measured and as extras/estimate expects it."""
    result, sizes = [], read_sizes(cfg.model)
    with torch.device("meta"):
        model = Llama(sizes)
    for dtype in ("fp32", "bf16"):
        for kind in ("none", "selective", "full"):
            taken = take_alone(Steps(asdict(sizes), kind=kind, dtype=dtype), os.environ)["bytes"]
            step = Step(4, 512, DTYPES[dtype], kind)
            expected = OVERHEAD["cpu"] * peak_bytes(model, step)
            result.append(
                {
                    "dtype": dtype,
                    "checkpointing": kind,
                    "gb": round(taken / 1e9, 2),
                    "expected_gb": round(expected / 1e9, 2),
                }
            )
            print(result[-1], flush=True)
    print(json.dumps(result))


def finetune(cfg: BenchConfig) -> None:
    """Memory and time of a step that trains all weights, LoRA (r = 8, all linear layers of the blocks), or QLoRA."""
    result = {}
    print(f"{cfg.rows} x {cfg.seq_len} tokens, {cfg.dtype}, gradient_checkpointing {cfg.gradient_checkpointing}")
    for way in ("full", "lora", "qlora"):
        # A process for each: what one has freed would count for the next.
        work = Steps(
            asdict(read_sizes(cfg.model)),
            way=way,
            kind=cfg.gradient_checkpointing,
            dtype=cfg.dtype,
            rows=cfg.rows,
            seq_len=cfg.seq_len,
            steps=cfg.rounds + 1,
            micro_batches=cfg.micro_batches,
        )
        found = take_alone(work, os.environ | KEEP_FREED)
        seconds = found["seconds"][1:]  # moments are made in the first step
        result[way] = {
            "peak_gb": round(found["bytes"] / 1e9, 2),
            "step_s": round(statistics.median(seconds), 3),
            "least": round(min(seconds), 3),
            "most": round(max(seconds), 3),
        }
        r = result[way]
        print(
            f"{way:<6} {r['peak_gb']:>6.2f} GB  {r['step_s']:>7.2f} s a step ({r['least']:.2f} to {r['most']:.2f})",
            flush=True,
        )
    print(json.dumps(result))


def take_alone(work: Steps, env: dict) -> dict:
    """The steps in a process of its own, with these variables of the environment."""
    words = [sys.executable, "-m", "bench.step_memory", json.dumps(asdict(work))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise UserError(f"training steps with {asdict(work)} ended with code {done.returncode}")
    return json.loads(done.stdout)


def take(work: Steps) -> list[float]:
    """Seconds of each step."""
    sizes = ModelConfig(**work.sizes)
    with torch.device("meta"):
        model, plain = Llama(sizes), Llama(sizes)
    # The model as the command would build it.
    weights = plain.weights_at_birth(0)
    if work.way != "full":
        options = lora.LoraConfig(r=8, quantize="nf4" if work.way == "qlora" else "")
        lora.apply(model, options, nf4.Weight if work.way == "qlora" else None)
        weights = lora.weights_at_birth(model, weights, 0)
    save_memory(model, work.kind)
    Strategy(model, weights, TrainConfig(), Ranks(0, 1, torch.device("cpu")), DTYPES[work.dtype])
    optimizers, seconds = make_optimizers(model, OptimConfig(optimizer=work.optimizer)), []
    ids = torch.randint(0, sizes.vocab_size, (work.rows, work.seq_len))
    # Its steps, without the log and the checks of the loop: neither takes memory.
    for _ in range(work.steps):
        began = time.perf_counter()
        for _ in range(work.micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bf16"):
                loss = next_token_loss(model, Batch(ids, ids, torch.zeros_like(ids), []))
            loss.backward()
            del loss
        for each in optimizers:
            each.step()
        model.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def resident(what: str) -> int:
    """Bytes of this process by the kernel's account: VmRSS now, VmHWM at most."""
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024


def main() -> None:
    """Prints bytes beyond what was taken before, and seconds of each step."""
    work = Steps(**json.loads(sys.argv[1]))
    tiny = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    # What torch takes once is not the model's.
    take(Steps(asdict(tiny), way=work.way, kind=work.kind, dtype=work.dtype, rows=1, seq_len=8))
    before = resident("VmRSS:")
    seconds = take(work)
    print(json.dumps({"bytes": resident("VmHWM:") - before, "seconds": seconds}))


if __name__ == "__main__":
    main()

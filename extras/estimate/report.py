"""What a run will take, before it begins: memory, work, days.

    python pretrain.py configs/llama-92m.toml --dry_run --memory 6GB
    python pretrain.py configs/llama-0.5b.toml --dry_run --tokens 30e9 --cards 6 --mfu 0.45       # no data needed

In:  a model on the meta device, options, the data's rows. Out: lines of text. Nothing is trained or written.
Knows one device with the whole model on it (ddp); what runs beside training, as CUDA itself, is not in its figures.
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch

from core.config import Range, Section
from core.data import Rows, plan_step
from core.device import choose_dtype, describe, flops_per_token, matmul_peak
from core.distributed import Ranks
from core.errors import UserError
from extras.estimate import memory
from model import Llama

# TFLOP/s of dense products with 16-bit factors and 32-bit sums, of the makers' data sheets and white papers.
CARDS = {"T4": 65, "V100": 125, "RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H20": 148, "H100": 989}
KINDS = ("none", "selective", "full")


@dataclass(frozen=True)
class EstimateConfig(Section):
    dry_run: bool = False  # say what the run would take, and end
    memory: str = ""  # of a device, as 6GB: the largest micro-batch that fits it
    # Positions to train on in all; 0: as the data, epochs and max_steps say.
    tokens: Annotated[float, Range(least=0)] = 0.0
    cards: Annotated[int, Range(least=1)] = 1  # so many of each kind of card
    # The share of its products' peak that a device keeps up in training.
    mfu: Annotated[float, Range(above=0, most=1)] = 0.4

    def __post_init__(self):
        super().__post_init__()
        if self.memory:
            gigabytes(self.memory)


def gigabytes(text: str) -> float:
    """6GB, 6.5 GB or 6000MB -> 6.0, 6.5 or 6.0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])i?B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"memory = {text!r}, must be a size as 6GB or 800MB")
    return float(found[1]) / (1 if found[2].upper() == "G" else 1000)


def days(flops: float, tflops: float, cards: int, mfu: float) -> float:
    """Of a run of so many floating-point operations on cards that keep up this share of their TFLOP/s."""
    return flops / (tflops * 1e12 * cards * mfu) / 86400


def describe_run(model: Llama, cfg, rows: Rows | None, seq_len: int, ranks: Ranks) -> str:
    """The whole estimate.

    Args:
        model: on the meta device, with what LoRA has changed in it.
        cfg: with sections estimate, train and optim.
        rows: what would be trained on; None: cfg.estimate.tokens positions.

    Raises:
        UserError: neither rows nor tokens; a batch that cannot be divided.
    """
    asked, options = cfg.estimate, cfg.train
    device = ranks.device.type if ranks.device.type in memory.OVERHEAD else "cpu"
    if rows is None and not asked.tokens:
        raise UserError("there is no data whose tokens could be counted", "--tokens 30e9, or python data_process.py")
    step = memory.Step(options.micro_batch, seq_len, choose_dtype(options.dtype, ranks.device), device=device)
    positions, told = asked.tokens, []
    if rows is not None:
        per_step, micro, number = plan_step(options.batch_tokens, options.micro_batch, seq_len, ranks.world)
        step = replace(step, rows=micro, several=number > 1, docs=rows.batch([0]).docs is not None)
        if not positions:
            steps = options.max_steps or max(1, round(options.epochs * len(rows) / per_step))
            positions = steps * options.batch_tokens
            told = [f"data: {len(rows):,} rows of {seq_len}; {steps:,} steps of {per_step} rows"]
    sections = [describe(model), _memory_table(model, cfg, step)]
    if asked.memory:
        sections.append(_largest_batches(model, cfg, step))
    sections.append("\n".join([*told, *_time_table(model, cfg, step, positions, ranks)]))
    return "\n\n".join(sections)


def _memory_table(model: Llama, cfg, step: memory.Step) -> str:
    """What takes the memory, for each dtype and kind of checkpointing."""
    overhead = memory.OVERHEAD[step.device]
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    gradients = sum(p.numel() for p in trained) * 4 / 1e9
    moments = gradients * _moments(cfg.optim.optimizer, model)
    lines = [
        f"memory of one device in GB at the peak of a step, {step.rows} rows of {step.seq_len} at once, "
        f"x {overhead} for the allocator:",
        f"{'':<23} weights  gradients  moments  activations  in all",
    ]
    for name, dtype in {"fp32": torch.float32, "bf16 or fp16": torch.bfloat16}.items():
        for kind in KINDS:
            whole = memory.peak_bytes(model, replace(step, dtype=dtype, checkpointing=kind), cfg.optim) / 1e9
            rest = max(0.0, whole - weights - gradients - moments)
            chosen = (kind, dtype.itemsize) == (cfg.train.gradient_checkpointing, step.dtype.itemsize)
            lines.append(
                f"{name:<12} {kind:<10} {weights:>7.2f} {gradients:>10.2f} {moments:>8.2f} {rest:>12.2f} "
                f"{whole * overhead:>7.2f}" + "  <- as configured" * chosen
            )
    return "\n".join(lines)


def _largest_batches(model: Llama, cfg, step: memory.Step) -> str:
    """The largest micro-batch that fits the memory that was asked about."""
    limit = gigabytes(cfg.estimate.memory) / memory.OVERHEAD[step.device]

    def need(kind: str, rows: int) -> float:
        return memory.peak_bytes(model, replace(step, rows=rows, checkpointing=kind), cfg.optim) / 1e9

    fits = {kind: memory.fitting_rows(partial(need, kind), limit, most=1024) for kind in KINDS}
    said = ", ".join(f"{n or 'none'} with gradient_checkpointing {kind}" for kind, n in fits.items())
    return f"largest micro_batch in {cfg.estimate.memory}, {str(step.dtype).removeprefix('torch.')}: {said}"


def _time_table(model: Llama, cfg, step: memory.Step, positions: float, ranks: Ranks) -> list[str]:
    """How long it takes on this machine and on cards that people have."""
    asked, flops = cfg.estimate, flops_per_token(model, step.seq_len)
    again = flops + flops / 3  # the forward pass, a third, once more
    lines = [
        f"{positions:,.0f} positions x {flops:.3g} FLOPs = {positions * flops:.3g} FLOPs "
        f"({positions * again:.3g} with gradient_checkpointing full)",
        "",
        f"{f'at {asked.mfu:.0%} of the peak of matrix products':<50}{'':>10}  gradient_checkpointing full",
    ]
    here = matmul_peak(ranks.device, step.dtype) / 1e12
    machines = {f"this machine ({ranks.device.type}, {here:.3g} TFLOP/s measured)": (here, 1)}
    machines |= {f"{asked.cards} x {name} ({tflops} TFLOP/s)": (tflops, asked.cards) for name, tflops in CARDS.items()}
    for name, (tflops, count) in machines.items():
        plain, full = (days(positions * work, tflops, count, asked.mfu) for work in (flops, again))
        lines.append(f"{name:<50}{_time(plain):>10}  {_time(full):>10}")
    return lines


def _moments(optimizer: str, model: Llama) -> float:
    """Numbers that the optimizer keeps for each trained one: AdamW two, Muon one."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    once = sum(
        size for name, size in sizes.items() if optimizer == "muon" and ".layers." in name and "norm" not in name
    )
    return 2 - once / max(1, sum(sizes.values()))


def _time(days: float) -> str:
    return f"{days:.2f} d" if days >= 1 else f"{days * 24:.2f} h" if days >= 1 / 24 else f"{days * 1440:.1f} min"

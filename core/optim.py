"""Parameter groups, optimizers and the learning rate as a function of the step.

In:  a model and OptimConfig. Out: a list of torch optimizers that are stepped together.
Knows nothing of data, loops or files.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from core.config import Range, Section
from core.errors import UserError


@dataclass(frozen=True)
class OptimConfig(Section):
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices and AdamW for the rest
    lr: Annotated[float, Range(above=0)] = 3e-4  # at the top of the schedule
    # At its end; a tenth of lr is usual (Chinchilla, https://arxiv.org/abs/2203.15556).
    min_lr: Annotated[float, Range(least=0)] = 3e-5
    warmup_steps: Annotated[int, Range(least=0)] = 100
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm up, stay, fall linearly in the last decay_share
    # Of the steps after warm-up; https://arxiv.org/abs/2405.18392: 20 % is as good as a whole cosine.
    decay_share: Annotated[float, Range(least=0, most=1)] = 0.2
    weight_decay: Annotated[float, Range(least=0)] = 0.1  # on matrices; norms and biases have none
    beta1: Annotated[float, Range(least=0, below=1)] = 0.9
    beta2: Annotated[float, Range(least=0, below=1)] = 0.95  # Llama 2's; 0.999 forgets too slowly for short runs
    eps: Annotated[float, Range(above=0)] = 1e-8
    grad_clip: Annotated[float, Range(least=0)] = 1.0  # largest gradient norm; 0: no clipping

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr}, must be from 0 to lr = {self.lr}")


def learning_rate(step: int, max_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of step 0 .. max_steps - 1; a pure function, so a resumed run needs no scheduler state."""
    # Up from zero: the moments of AdamW know too little in the first steps.
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    # Then down, along half a cosine or, with wsd, only at the end.
    after = (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps)  # 0 .. 1
    if cfg.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * after))
    else:
        share = min(1.0, (1 - after) / cfg.decay_share) if cfg.decay_share else 1.0
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * share


def make_optimizers(model: nn.Module, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the blocks' matrices and AdamW over embedding, head and norms."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise UserError("no parameter to train")
    # Muon is for matrices between features; a row of the embedding or of the head belongs to one token.
    with_muon = cfg.optimizer == "muon"
    matrices = {n: p for n, p in named.items() if with_muon and p.ndim == 2 and ".layers." in n}
    rest = [p for n, p in named.items() if n not in matrices]
    # Weight decay pulls weights to zero; a norm's factors belong near one.
    decayed, others = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # fused: one kernel for all parameters, 5x the speed of the default (foreach) on CPU.
    betas = (cfg.beta1, cfg.beta2)
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr, betas, cfg.eps, fused=True)
    return [Muon(matrices.values(), cfg.lr, weight_decay=cfg.weight_decay), adamw] if with_muon else [adamw]


class LossScale:
    """The factor of the loss in fp16, so that small gradients do not become zero: halved when a gradient overflows,
    doubled after 2,000 steps without; it begins at 2^16. Powers of two: they change no digit.

    torch.amp.GradScaler does the same, looking for overflows on its own; here the gradient's norm tells, on all ranks
    and for cut parameters alike. Source: Micikevicius et al., https://arxiv.org/abs/1710.03740
    """

    def __init__(self):
        self.scale, self.good_steps = 2.0**16, 0

    def update(self, finite: bool) -> None:
        """After a step, with whether its gradient was finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict:
        return {"scale": self.scale, "_growth_tracker": self.good_steps}  # GradScaler's names: older checkpoints load

    def load_state_dict(self, state: dict) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["_growth_tracker"])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix learns at the same speed.

    Args:
        params: 2-D weights.
        lr: used as AdamW's would be: updates are scaled to its usual root mean square of 0.2.
        momentum: Nesterov momentum.
        weight_decay: decoupled, as in AdamW.

    torch.optim.Muon (torch 2.9 on) does the same one matrix at a time and always in bf16, which a CPU without bf16
    units emulates at an eighth of its fp32 speed; here matrices of one shape are a batch, and CPUs use fp32.

    Sources: https://kellerjordan.github.io/posts/muon/, scaling: https://arxiv.org/abs/2502.16982 section 2.2
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            # Matrices of one shape are made orthogonal together.
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, same in by_shape.items():
                # The gradients of many steps, with this one's counted once more (Nesterov).
                updates = []
                for p in same:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * math.sqrt(max(shape))
                for p, update in zip(same, orthogonal(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-group["lr"] * scale)


def orthogonal(g: Tensor) -> Tensor:
    """Nearly the closest matrix with singular values of one, by five quintic Newton-Schulz steps. g (N, rows, cols)."""
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT  # x @ x.mT is smaller on the short side
    # No singular value is above the norm: divided by it, all are at most one, as the steps need it.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        # Coefficients that make small singular values grow fastest; they settle between 0.7 and 1.2, not at 1.
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    return x.mT if tall else x

"""ZeRO-1: every rank has the whole model, but only a part of the optimizers' moments.

In:  a model on each rank. Out: a Strategy (see core/parallel.py).
Knows nothing of data, learning rates or files.

Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054, section 5.1
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.parallel import DDP
from extras.parallel.gather import gather


class ZeRO1(DDP):
    """Each parameter has one owner, who keeps its moments, updates it and sends it to the others."""

    def take(self, optimizers: list) -> None:
        super().take(optimizers)
        self.owner: dict[nn.Parameter, int] = {}
        load = [0] * self.ranks.world
        every = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        for p in sorted(every, key=lambda p: -p.numel()):  # the largest first, to the rank with the least
            self.owner[p] = load.index(min(load))
            load[self.owner[p]] += p.numel()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if self.owner[p] == self.ranks.rank]

    @torch.no_grad()
    def after_step(self) -> None:
        for sent in [dist.broadcast(p.data, owner, async_op=True) for p, owner in self.owner.items()]:
            sent.wait()

    def moments(self) -> dict[str, Tensor]:
        return gather(super().moments(), self.ranks)

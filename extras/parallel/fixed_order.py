"""Gradients summed in an order that does not depend on the number of ranks: the same bits on 1, 2, 4 ... of them.

In:  a model on each rank. Out: a Strategy (see core/parallel.py).
Knows nothing of data, learning rates or files.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import UserError
from core.parallel import Strategy


class FixedOrder(Strategy):
    """The whole model on every rank; gradients are summed along a tree.

    Micro-batch g of a step (there are m per rank, g = m * ranks + rank) is leaf g of a binary tree. Its lowest levels
    lie between ranks: in round k a rank swaps sums with the one whose number differs in bit k, and a + b = b + a. The
    levels above are sums of what a rank has; like the digits of a binary counter, two of a size become one.
    """

    def prepare(self, weights, cfg, dtype: torch.dtype) -> nn.Module:
        if cfg.parallel != "ddp":
            raise UserError(f'deterministic = true needs parallel = "ddp", not {cfg.parallel!r}')
        if self.ranks.world & (self.ranks.world - 1):
            raise UserError(f"deterministic = true on {self.ranks.world} ranks", "1, 2, 4, 8 ... ranks")
        if self.ranks.device.type == "cuda":
            # Some kernels, as attention's backward pass, add in the order in which their threads happen to come.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it then
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a help to find faults: it costs time
        module = super().prepare(weights, cfg, dtype)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.sums: list[tuple[int, list[Tensor]]] = []  # (micro-batches in it, gradients)
        return module

    @contextmanager
    def sync(self, last: bool) -> Iterator[None]:
        yield
        self._add_leaf()
        if last:
            _, grads = self.sums.pop()
            while self.sums:
                torch._foreach_add_(grads, self.sums.pop()[1])
            for p, grad in zip(self.trained, grads):
                p.grad = grad

    def _add_leaf(self) -> None:
        """The gradients of a micro-batch go into the tree."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        for p in self.trained:
            p.grad = None
        # The levels between ranks.
        for bit in range(self.ranks.world.bit_length() - 1):
            other, theirs = self.ranks.rank ^ (1 << bit), [torch.empty_like(g) for g in grads]
            pairs = [(dist.isend, g) for g in grads], [(dist.irecv, t) for t in theirs]
            moves = [dist.P2POp(op, t, other) for pair in zip(*pairs) for op, t in pair]
            for move in dist.batch_isend_irecv(moves):
                move.wait()
            torch._foreach_add_(grads, theirs)
        # The levels above: two sums of a size become one.
        size = 1
        while self.sums and self.sums[-1][0] == size:
            torch._foreach_add_(grads, self.sums.pop()[1])
            size *= 2
        self.sums.append((size, grads))

"""What a training step need not hold in memory: the logits of all positions, and what can be recomputed.

In:  a model. Out: the same model with another `loss` and `run` (see model.py), which compute the same numbers.
Knows nothing of data, optimizers or ranks.

Shapes:  N positions, C hidden_size, V vocab_size
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from model import IGNORE, Llama

# Logits held at once while losses are computed: the (B, T, V) tensor is the largest of all (at V = 64,794 and 2,048
# tokens: 531 MB in fp32), a chunk of this many numbers is 64 MiB. On a GPU four times as many: 218M parameters train
# 1.18 times as fast, for 0.8 GB more.
LOGITS_AT_ONCE = 1 << 24

_aten = torch.ops.aten
# What selective recomputation keeps: what is expensive to recompute. Norms, rotations, silu and sums are cheap.
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def save_memory(model: Llama, recomputed: str = "none") -> Llama:
    """The model with its loss in chunks, and with less kept for the backward pass.

    Args:
        recomputed: "none"; "selective": all but PRODUCTS; "full": all of a block but its input.

    Source of recomputation: https://arxiv.org/abs/1604.06174
    """
    model.loss, model.run = partial(chunked_loss, model.config.vocab_size), type(model).run
    if recomputed != "none":
        selected = partial(create_selective_checkpoint_contexts, PRODUCTS)
        model.run = partial(recompute, selected if recomputed == "selective" else noop_context_fn)
    return model


def recompute(context_fn, block: nn.Module, *args) -> Tensor:
    """A block's forward pass, parts of which run once more in its backward pass instead of being kept."""
    if not block.training:
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=context_fn)


def chunked_loss(vocab_size: int, x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Cross-entropy of each position, a chunk of positions at a time. x (B, T, C), targets (B, T) -> (B, T) fp32."""
    # Positions in a row, whatever sequence they are from.
    b, t, c = x.shape
    x, targets = x.reshape(b * t, c), targets.reshape(b * t)
    rows = max(1, (LOGITS_AT_ONCE << 2 * x.is_cuda) // vocab_size)
    if type(head) is nn.Linear:
        losses = HeadLoss.apply(x, head.weight, targets, rows, torch.is_grad_enabled())
    else:  # the head is wrapped: what the wrapper does to its gradients is its own business
        chunks = zip(x.split(rows), targets.split(rows))
        losses = torch.cat([checkpoint(_plain_loss, head, *chunk, use_reentrant=False) for chunk in chunks])
    return losses.view(b, t)


def _plain_loss(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """(N, C), (N,) -> (N,) fp32."""
    return F.cross_entropy(head(x).float(), targets, ignore_index=IGNORE, reduction="none")


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of each position from what the head reads, a chunk of positions at a time.

    Gradients are made beside the logits they come from, while those exist: in the forward pass, for the sum over
    positions that training asks for. Where the backward pass weighs positions unequally, logits are computed again.
    The head has 40 % of the products of 92M parameters: computing its logits twice would cost a tenth of a step.

    Source of the idea: Liger Kernel, https://arxiv.org/abs/2410.10989
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int, train: bool) -> Tensor:
        """x (N, C), weight (V, C), targets (N,), rows to a chunk, whether gradients are wanted -> losses (N,) fp32."""
        # The products are in the dtype that autocast asks for, else in x's own.
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.rows, ctx.wanted = rows, [train and need for need in ctx.needs_input_grad[:2]]
        losses, *grads = head_loss((x, weight, targets), rows, ctx.dtype, ctx.wanted)
        ctx.save_for_backward(x, weight, targets, *grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        """g (N,): the weight of each position's loss."""
        # A sum weighs all positions alike: g is one number, expanded, and the gradients are there up to that factor.
        x, weight, targets, *grads = ctx.saved_tensors
        if any(g.stride()):
            _, *grads = head_loss((x, weight, targets), ctx.rows, ctx.dtype, ctx.wanted, g)
        else:
            grads = [None if t is None else t.mul_(g[0]) for t in grads]
        return *grads, None, None, None


def head_loss(
    inputs: tuple[Tensor, Tensor, Tensor], rows: int, dtype: torch.dtype, wanted: list[bool], g: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses and their gradients.

    Args:
        inputs: x (N, C), weight (V, C), targets (N,).
        rows: positions to a chunk.
        dtype: of the products.
        wanted: whether the gradient to x is wanted, and that to weight.
        g: (N,), the weight of each position's loss in the gradients; None: one.
    Returns:
        losses (N,); where wanted, the gradients of their sum to x (N, C) and to weight (V, C), else None.
    """
    x, weight, targets = inputs
    losses = torch.empty(len(x), device=x.device)
    dx = torch.empty_like(x) if wanted[0] else None
    dw = torch.zeros_like(weight) if wanted[1] else None
    with torch.autocast(x.device.type, enabled=False):
        w, vocab = weight.to(dtype), len(weight)
        # An odd vocabulary takes the GPU's slowest products: half a step of 92M parameters.
        if x.is_cuda:
            w = F.pad(w, (0, 0, 0, -vocab % 64))  # (V', C)
        # Only a chunk's logits are there at any time.
        for part in (slice(i, i + rows) for i in range(0, len(x), rows)):
            chunk, target = x[part].to(dtype), targets[part, None]
            counts = target != IGNORE
            logits = chunk @ w.T  # (n, V')
            logits[:, vocab:] = -math.inf  # probability and gradient zero
            logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            # A position without a target has no loss: any class will do for the look-up.
            target = target.where(counts, 0)
            losses[part] = torch.where(counts, -logp.gather(1, target), 0.0)[:, 0]
            if any(wanted):
                # d loss / d logits = softmax - 1 at the target
                d = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
                d = d.mul_(counts if g is None else counts * g[part, None]).to(dtype)
                if wanted[0]:
                    dx[part] = d @ w
                if wanted[1]:
                    d = d.T[:vocab]
                    dw.addmm_(d, chunk) if dtype == dw.dtype else dw.add_(d @ chunk)
    return losses, dx, dw

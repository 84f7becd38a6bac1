"""NF4: a weight in four bits a number, in blocks of 64 with each block's largest absolute value beside them.

In:  a weight. Out: bytes and scales that stand for it; the weight again; a linear layer's product with it.
Knows nothing of models, of LoRA or of files.

Shapes:  W (out, in), flattened and filled up with zeros to n blocks: packed (n, 32) uint8, absmax (n,) fp32
    With double quantisation: absmax (n,) uint8, absmax_scale (n / 256,) fp32, absmax_mean () fp32
Source: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314, sections 2 and 3
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

BLOCK, ABSMAX_BLOCK = 64, 256  # the paper's: 32 / 64 bits more for a number, with double quantisation 0.127
UNPACKED_AT_ONCE = 4096  # blocks: 1.5 MB besides the result; all at once would take three times the memory in bf16
PARTS = ("packed", "absmax", "absmax_scale", "absmax_mean")


def nf4_levels() -> Tensor:
    """The 16 values: quantiles of the normal distribution, so that each stands for as many of a block's weights.

    Eight from the lower half and nine from the upper, zero being in both, divided by the largest.

    Returns:
        (16,) fp32 from -1 to 1, rising.
    Source: section 3; the outermost probability is not there but in the authors' code (create_normal_map of
        bitsandbytes): half-way between the outermost of 16 and of 15 values that lie evenly.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    lower, upper = (torch.special.ndtri(torch.linspace(0.5, outermost, n, dtype=torch.float64)) for n in (8, 9))
    return (torch.cat([-lower.flip(0), upper[1:]]) / upper[-1]).float()


def tree_levels() -> Tensor:
    """256 values for numbers of very unlike sizes: for each power of ten below 1 half as many as for the one above.

    Between 10^(e - 7) and 10^(e - 6) there are the centres of 2^e equal parts, e = 0 .. 6, with both signs; and 0, 1.

    Returns:
        (256,) fp32, rising.
    Source: dynamic tree quantization, https://arxiv.org/abs/2110.02861, section 2.1
    """
    edges = (torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float64) * 10.0 ** (e - 6) for e in range(7))
    positive = torch.cat([(e[1:] + e[:-1]) / 2 for e in edges])
    return torch.cat([-positive.flip(0), torch.tensor([0.0]), positive, torch.tensor([1.0])]).float()


NF4, TREE = nf4_levels(), tree_levels()
PAIRS = torch.cartesian_prod(NF4, NF4)  # (256, 2): what a byte stands for, its high half first


def quantize(weight: Tensor, double_quant: bool = False) -> tuple[Tensor, ...]:
    """A weight's packed bytes and scales.

    Args:
        weight: of any shape and floating dtype; the meta device gives shapes.
        double_quant: the scales less their mean in 8 bits, in blocks of 256.
    Returns:
        as many of PARTS as there are, shapes above.
    """
    codes, absmax = _nearest(weight.detach(), NF4, BLOCK)  # (n, 64), (n,)
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    if not double_quant:
        return packed, absmax
    mean = absmax.mean()
    codes, scale = _nearest(absmax - mean, TREE, ABSMAX_BLOCK)
    return packed, codes.flatten()[: len(absmax)].clone(), scale, mean


def dequantize(
    parts: tuple[Tensor | None, ...], shape: torch.Size, dtype: torch.dtype = torch.float32, room: Tensor | None = None
) -> Tensor:
    """The weight that `quantize` has packed, in the shape it had: computed in fp32, rounded once to dtype.

    Args:
        room: of dtype, for 64 n numbers or more: where the weight comes; None: a new place.
    """
    packed, absmax, scale, mean = (*parts, None, None)[:4]
    if room is None:
        room = torch.empty(packed.numel() * 2, dtype=dtype, device=packed.device)
    if scale is not None:
        absmax = TREE.to(absmax.device)[absmax.int()] * scale.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)] + mean
    pairs, blocks = PAIRS.to(packed.device), room[: packed.numel() * 2].view(-1, BLOCK)
    for part in (slice(i, i + UNPACKED_AT_ONCE) for i in range(0, len(packed), UNPACKED_AT_ONCE)):
        # As an embedding: on a CPU 2.5 times as fast as indexing.
        values = F.embedding(packed[part].int(), pairs).view(-1, BLOCK)  # (m, 64) fp32
        torch.mul(values, absmax[part, None], out=blocks[part])
    return blocks.view(-1)[: shape.numel()].view(shape)


def _nearest(values: Tensor, levels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Number of the level nearest to each value over its block's absmax, (n, size) uint8, and absmax (n,) fp32."""
    blocks = F.pad(values.float().flatten(), (0, -values.numel() % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    borders = ((levels[1:] + levels[:-1]) / 2).to(values.device)
    blocks = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a block may be all zeros
    return torch.bucketize(blocks, borders, out_int32=True).byte(), absmax


# One weight is unpacked at a time, all into the same place. With a new place for each, activations of one layer come to
# lie where the weight before was, and the heap grows by almost all weights unpacked: for a model of 283 MB in fp32,
# 52 MB packed, steps of 32 tokens took 0.30 to 0.33 GB, and take 0.17 to 0.20.
ROOMS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _unpacked(parts: tuple[Tensor | None, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """W, until the next is unpacked."""
    # torch.compile plans its memory itself; tensors without values (core/memory.py) must not stay behind in ROOMS.
    if torch.compiler.is_compiling() or isinstance(parts[0], FakeTensor):
        return dequantize(parts, shape, dtype)
    key, numel = (parts[0].device, dtype), parts[0].numel() * 2
    if key not in ROOMS or len(ROOMS[key]) < numel:
        ROOMS[key] = torch.empty(numel, dtype=dtype, device=parts[0].device)
    return dequantize(parts, shape, dtype, ROOMS[key])


class Product(torch.autograd.Function):
    """x W^T + b with a packed W. The backward pass gets W from its bytes again: nothing as large as W is kept."""

    @staticmethod
    def forward(
        ctx, x: Tensor, bias: Tensor | None, shape: torch.Size, dtype: torch.dtype, *parts: Tensor | None
    ) -> Tensor:
        """x (..., in), bias (out,), shape (out, in), W's PARTS, for torch.compile one by one -> (..., out) of dtype."""
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.save_for_backward(*parts)
        return F.linear(x.to(dtype), _unpacked(parts, shape, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        """g (..., out) -> the gradient to x; W and b are frozen."""
        dx, parts = None, ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = (g @ _unpacked(parts, ctx.shape, g.dtype)).to(ctx.dtype)
        return dx, *[None] * 7


class Weight(nn.Module):
    """A packed weight that stands in a linear layer where its weight was: the parts are parameters without gradient.

    Args:
        weight: (out, in); on the meta device there are sizes only, and `pack` makes the parts later.
        double_quant: see `quantize`.
    """

    def __init__(self, weight: Tensor, double_quant: bool = False):
        super().__init__()
        self.shape, self.double_quant = weight.shape, double_quant
        for name, part in self.pack(weight).items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Parts of a weight by their names here."""
        return dict(zip(PARTS, quantize(weight, self.double_quant)))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> x W^T + b (..., out)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return Product.apply(x, bias, self.shape, dtype, *(getattr(self, name, None) for name in PARTS))

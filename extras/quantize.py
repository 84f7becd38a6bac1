"""Linear layers with weights of 8 or 4 bits, for generation: a model in, the same model out.

In:  a model with weights in fp32 or bf16. Out: the same model, in bf16 but for these weights.
Knows nothing of training: nothing here has a gradient. (QLoRA's four bits, with one, are extras/nf4.py.)

One new token reads every weight once and computes little: it is as fast as memory is, and half or a quarter of the
bytes is half or a quarter of the time.

Shapes:  N outputs, K inputs, G inputs in a group, M rows of x
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Llama

KINDS = ("none", "int8", "int4")
GROUP = 32  # inputs that share a scale in int4: half a bit more for each weight, and as fast as 128
# Rows of x from which weights are turned into bf16 for a product: torch's product of int8 takes as long for every row,
# 0.9 ms for the 35,207 x 768 of a head, beside 9 ms for 16 rows in bf16 (one core with AVX512-BF16).
FEW_ROWS = 6


class Int8Linear(nn.Module):
    """y = x W^T with W = codes * scale, a scale for each output (symmetric).

    Args:
        weight: (N, K), what is rounded; or codes as int8 where `scale` (N, 1) is given.
        bias: (N,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None):
        super().__init__()
        self.inputs = weight.shape[1]
        if scale is None:
            weight = weight.float()
            scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
            scale = torch.where(scale == 0, 1.0, scale)  # a row of zeros
            weight = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        # torch's product wants a multiple of 32 inputs: with others it gives infinity or ends the process.
        self.register_buffer("codes", F.pad(weight, (0, -self.inputs % 32)))
        self.register_buffer("scale", scale.squeeze(1).bfloat16())
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    def weight(self) -> Tensor:
        """(N, K) bf16: each product of a code and a scale rounded once."""
        return self.codes[:, : self.inputs].to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.inputs)  # (M, K)
        if len(flat) <= FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            padded = F.pad(flat, (0, self.codes.shape[1] - self.inputs))
            y = torch._weight_int8pack_mm(padded, self.codes, self.scale)  # (M, N)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.linear(flat, self.weight().to(x.dtype), self.bias)
        return y.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """The same with codes from -8 to 7, and a scale for each GROUP of inputs of an output.

    Args:
        weight: (N, K), what is rounded; or codes as int8 where `scale` (N, K / GROUP) is given.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None):
        super().__init__()
        self.outputs, self.inputs = weight.shape
        # Whole groups, and a multiple of 16 outputs, as torch's product wants them; what is added is zeros.
        weight = F.pad(weight, (0, -self.inputs % GROUP, 0, -self.outputs % 16))
        if scale is None:
            weight, scale = rounded(weight.float().view(len(weight), -1, GROUP))
        else:
            scale = F.pad(scale, (0, 0, 0, -self.outputs % 16))
        self.register_buffer("scale", scale.bfloat16())  # (N, K / G)
        self.register_buffer("bias", None if bias is None else bias.bfloat16())
        self.on_cpu = weight.device.type == "cpu"
        if self.on_cpu:
            packed = torch._convert_weight_to_int4pack_for_cpu(weight.view(len(weight), -1).int() + 8, 1)
            no_zero = torch.zeros_like(self.scale)
            both = torch.stack([self.scale, no_zero], dim=-1).transpose(0, 1).contiguous()  # (K / G, N, 2)
            self.register_buffer("scales_and_zeros", both)
        else:
            low, high = (weight.view(len(weight), -1) + 8).to(torch.uint8).view(len(weight), -1, 2).unbind(dim=-1)
            packed = low | high << 4
        self.register_buffer("codes", packed)  # half a byte each

    def weight(self) -> Tensor:
        """(N, K) bf16."""
        if self.on_cpu:  # the packing is torch's own: its product with the identity tells
            eye = torch.eye(self.scale.shape[1] * GROUP, dtype=torch.bfloat16)
            whole = torch._weight_int4pack_mm_for_cpu(eye, self.codes, GROUP, self.scales_and_zeros).T
        else:
            codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).view(len(self.codes), -1, GROUP)
            whole = ((codes.to(self.scale.dtype) - 8) * self.scale[..., None]).flatten(1)
        return whole[: self.outputs, : self.inputs]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.inputs)  # (M, K)
        if self.on_cpu:
            padded = F.pad(flat.bfloat16(), (0, -self.inputs % GROUP))
            y = torch._weight_int4pack_mm_for_cpu(padded, self.codes, GROUP, self.scales_and_zeros)[:, : self.outputs]
            y = y.to(x.dtype)
        else:
            y = F.linear(flat, self.weight().to(x.dtype))
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def rounded(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -8 to 7 and scales of groups of weights, with the least squared error of a few scales each.

    Args:
        groups: (N, K / G, G) fp32.
    Returns:
        codes (N, K / G, G) int8, scales (N, K / G) that bf16 holds exactly.
    """
    # The number farthest from zero becomes -8, whatever its sign (as in ggml's q4_0), or is cut off a little.
    far = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # (N, K / G, 1)
    best_codes, best_scale = torch.zeros_like(groups, dtype=torch.int8), torch.ones_like(far)
    best_error = torch.full_like(far, float("inf"))
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        scale = (far * (share / -8)).bfloat16().float()
        scale = torch.where(scale == 0, 1.0, scale)
        codes = (groups / scale).round().clamp(-8, 7)
        error = (codes * scale - groups).square().sum(dim=2, keepdim=True)
        better = error < best_error
        best_codes = torch.where(better, codes.to(torch.int8), best_codes)
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_codes, best_scale.squeeze(2)


@torch.no_grad()
def quantize(model: Llama, kind: str) -> Llama:
    """Replace the linear layers of blocks and head, where they stand; all else becomes bf16.

    Args:
        kind: int8 or int4.
    """
    layer = {"int8": Int8Linear, "int4": Int4Linear}[kind]
    for parent in [module for module in model.modules() if not isinstance(module, (Int8Linear, Int4Linear))]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:  # a tied head has its own copy then; the embedding stays as it is
                setattr(parent, name, layer(child.weight.detach(), child.bias))
    return model.bfloat16()


class DecodingLinear(nn.Linear):
    """A linear layer for a CPU, with the products that are fast for few rows of x.

    In fp32 that is oneDNN's: torch's own goes to MKL, which gives one row one core, and is slower still with a few.
    Compiled, one row is multiplied and summed: in bf16 that reads 33 GB/s, oneDNN's 11, as it is made for many rows.
    Milliseconds of 35,207 x 768 on two cores (AMD EPYC), torch's and this: fp32 1 row 8.1 and 3.7, 16 rows 19 and 8.5,
    512 rows 487 and 306; bf16 compiled, 1 row: 4.7 and 1.7.
    """

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if compiling and x.numel() == x.shape[-1]:
            y = (self.weight * x.view(1, -1)).sum(dim=-1, dtype=torch.float32).to(x.dtype)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
        if x.dtype == torch.float32 and not compiling:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def for_decoding(model: Llama) -> Llama:
    """The same model with products for few rows, where it is on a CPU. Names and values of its weights stay."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in model.modules():
        if known and type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = DecodingLinear
    return model

"""Linear layers that are fast for the few rows of generation, on a CPU.

In:  a model. Out: the same model with other products of the same numbers. Names and values of its weights stay.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

INTEL = Path("/proc/cpuinfo").exists() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


class DecodingLinear(nn.Linear):
    """A linear layer for a CPU, with the products that are fast for few rows of x.

    In fp32 that is oneDNN's: torch's own goes to MKL, which gives one row one core, and is slower still with a few.
    Compiled, one row is multiplied and summed: in bf16 that reads 33 GB/s, oneDNN's 11, as it is made for many rows.
    Milliseconds of 35,207 x 768 on two cores (AMD EPYC), torch's and this: fp32 1 row 8.1 and 3.7, 16 rows 19 and 8.5,
    512 rows 487 and 306; bf16 compiled, 1 row: 4.7 and 1.7.
    On an Intel Xeon with AMX, 64,794 x 1,024: fp32 1 row 8.8 and 9.0 (2,752 x 1,024: 0.38 and 0.44), 16 rows 61 and 40:
    one row stays with MKL there. bf16, 1 row: torch's 7.0, as matrix times vector 3.9.
    """

    def forward(self, x: Tensor) -> Tensor:
        compiling, one_row = torch.compiler.is_compiling(), x.numel() == x.shape[-1]
        if INTEL and one_row and not compiling:
            if x.dtype != torch.bfloat16:
                return super().forward(x)
            y = torch.mv(self.weight, x.view(-1))
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
        if compiling and one_row:
            y = (self.weight * x.view(1, -1)).sum(dim=-1, dtype=torch.float32).to(x.dtype)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
        if x.dtype == torch.float32 and not compiling:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def for_decoding(model: nn.Module) -> nn.Module:
    """The same model with products for few rows, where it is on a CPU. Names and values of its weights stay."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in model.modules():
        if known and type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = DecodingLinear
    return model

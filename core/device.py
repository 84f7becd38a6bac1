"""What the machine can do, and what a model costs: dtype, memory, speed; parameters, floating-point operations, MFU.

In:  a device; a model, on the meta device or not. Out: numbers, settings and lines. Knows nothing of data.
"""

import ctypes
import sys
import time

import torch

from core.distributed import Ranks
from model import Llama

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what was asked for, or the fastest that is safe on this machine."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        # Before Ampere (8.0) bf16 is emulated; fp16 has matrix units from Volta (7.0) on.
        generation, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if generation >= 8 else torch.float16 if generation == 7 else torch.float32
    # bf16 on a CPU pays only with instructions for it: AMX tiles, AVX512-BF16. Without it is emulated: 0.15x of fp32.
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has = device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in units)
    return torch.bfloat16 if has else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for those of the next step.

    By default it gives large ones back to the system at once, and the next has to be cleared page by page: a quarter
    of a step on two cores (docs/performance.md). Nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return
    # Large tensors come from the heap, too, and the heap is never made smaller.
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)


def used_gb(device: torch.device) -> float:
    """The most memory that this process has had so far: of tensors on a GPU, else of everything; 0: not known here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    # macOS counts bytes, Linux kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of three: what a model FLOPs utilization (MFU) is a share of.

    Data sheets promise more than any product reaches (an H200 989 TFLOP/s in bf16, measured 791), and for CPUs nothing.
    """
    # Large enough to fill the device: 3 ms, and 0.1 s on a CPU.
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    # The first one sets things up and does not count.
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        taken.append(time.perf_counter() - began)
    return 2 * n**3 / min(taken[1:])


def num_parameters(model: Llama) -> tuple[int, int]:
    """(all parameters, of which embedding and head); a tied matrix counts once."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if ".layers." not in name and ".norm." not in name)


def flops_per_token(model: Llama, seq_len: int) -> int:
    """Floating-point operations of one token's forward and backward pass.

    6 per weight that multiplies (2 forward, 4 backward; the embedding look-up multiplies nothing, the head does)
    plus attention's two products, 12 * layers * heads * head_dim * seq_len, halved because causal.
    Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311
    """
    c = model.config
    blocks = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
    return 6 * (blocks + c.vocab_size * c.hidden_size) + attention


def describe(model: Llama) -> str:
    """A few lines on the size of a model: parameters, FLOPs per token and bytes."""
    c, (total, embedding) = model.config, num_parameters(model)
    tied = "tied" if c.tie_word_embeddings else "untied"
    flops = flops_per_token(model, c.max_position_embeddings)
    rows = [
        f"parameters      {total:>15,}  ({total / 1e6:.1f}M)",
        f"  embedding+head{embedding:>15,}  ({embedding / total:.0%}, {tied}, vocabulary {c.vocab_size:,})",
        f"  blocks        {total - embedding:>15,}  ({c.num_hidden_layers} layers)",
        f"FLOPs per token {flops:>15,}  (forward and backward, at {c.max_position_embeddings} positions)",
        f"bytes, fp32     {4 * total:>15,}  weights",
        f"                {4 * total:>15,}  gradients",
        f"                {8 * total:>15,}  two moments (AdamW; Muon has one)",
    ]
    return "\n".join(rows)


class Speed:
    """How fast a run is: its share of the machine's peak (MFU), its memory, the time left.

    Args:
        flops: of a token's forward and backward pass; 0: not known.
    """

    def __init__(self, flops: int, ranks: Ranks, dtype: torch.dtype):
        self.flops, self.ranks, self.dtype = flops, ranks, dtype
        self.peak = 0.0  # FLOP/s of all ranks, once measured

    def describe(self, tokens_per_second: float, seconds_left: float) -> str:
        """The end of a log line."""
        # In a run of seconds nobody asks, and other ranks print nothing.
        if self.flops and not self.peak and self.ranks.first and seconds_left > 10:
            self.peak = matmul_peak(self.ranks.device, self.dtype) * self.ranks.world
        mfu = f" MFU {self.flops * tokens_per_second / self.peak:.1%}" if self.peak else ""
        s = int(seconds_left)
        return f"{mfu} {used_gb(self.ranks.device):.1f} GB left {s // 3600}:{s // 60 % 60:02}:{s % 60:02}"

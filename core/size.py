"""How large a model is, and how fast it trains: parameters, floating-point operations, bytes, MFU.

In:  a model, on the meta device or not. Out: numbers and lines.
"""

import torch

from core.device import matmul_peak, used_gb
from core.distributed import Ranks
from model import Llama


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
    c = model.config
    total, embedding = num_parameters(model)
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

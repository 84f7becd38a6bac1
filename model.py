"""The Llama decoder, alone: imports torch and nothing of ours.

In:  token ids (B, T), and optionally targets, document numbers or a key/value cache. Out: logits or per-token losses.
Knows nothing of files, tokenizers, optimizers, devices or ranks.

    python model.py configs/llama-92m.toml        # parameters, FLOPs per token, bytes

Names of options and parameters are those of Hugging Face's LlamaConfig and LlamaForCausalLM, so a state dict
goes from one to the other without renaming.

Shapes:  B batch, T positions, C hidden_size, F intermediate_size, H heads, K key/value heads, D head_dim,
         V vocab_size, S positions in the cache

Sources: Llama 2 https://arxiv.org/abs/2307.09288, RMSNorm https://arxiv.org/abs/1910.07467,
         RoPE https://arxiv.org/abs/2104.09864, SwiGLU https://arxiv.org/abs/2002.05202,
         GQA https://arxiv.org/abs/2305.13245
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

IGNORE = -100  # the target of a position without a loss; torch's and transformers' convention


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder, under the names of transformers' LlamaConfig."""

    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 256  # C
    intermediate_size: int = 704  # F, about 8/3 of C: SwiGLU has three matrices where a plain MLP has two
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 0  # K; 0: as many as heads (no grouping)
    head_dim: int = 0  # D; 0: C / H
    max_position_embeddings: int = 256  # longest sequence trained on
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = True  # one matrix for embedding and head: at small C it is most of the model
    model_type: str = "llama"  # or qwen2: biases on queries, keys and values; qwen3: these two normed in each head
    rope_type: str = "default"  # longer contexts: linear, dynamic (NTK), yarn, llama3; see `rope_speeds`
    rope_factor: float = 1.0  # how many times as long
    original_max_position_embeddings: int = 0  # of yarn and llama3: trained on before; 0: max_position_embeddings

    def __post_init__(self):
        # A frozen dataclass fills its own blanks: every reader sees the final numbers.
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if not 0 < getattr(self, name) <= 1 << 24:
                raise ValueError(f"{name} is {getattr(self, name)}, must be from 1 to {1 << 24}")
        if not 0 <= self.vocab_size <= 1 << 24:
            raise ValueError(f"vocab_size is {self.vocab_size}, must be from 0 to {1 << 24}")
        if self.num_hidden_layers > 1024:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}, must be at most 1024")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_attention_heads * self.head_dim > 1 << 24:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} x head_dim {self.head_dim} is above {1 << 24}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, must be even: RoPE turns pairs")
        for name in ("rms_norm_eps", "rope_theta"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} is {getattr(self, name)}, must be a positive number")
        if type(self) is ModelConfig and self.model_type not in ("llama", "qwen2", "qwen3"):
            raise ValueError(f"model_type is {self.model_type!r}, must be one of llama, qwen2, qwen3")
        self._check_rope()

    def _check_rope(self) -> None:
        known = ("default", "linear", "dynamic", "yarn", "llama3")
        if self.rope_type not in known:
            raise ValueError(f"rope_type is {self.rope_type!r}, must be one of {', '.join(known)}")
        if not 1 <= self.rope_factor <= 1 << 24:
            raise ValueError(f"rope_factor is {self.rope_factor}, must be from 1 to {1 << 24}")
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}, must be above 1 with rope_type yarn")
        if self.rope_factor != 1 and self.rope_type == "default":
            raise ValueError(f"rope_factor is {self.rope_factor}, with rope_type default it must be 1")
        if not 0 <= self.original_max_position_embeddings <= 1 << 24:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}, "
                f"must be from 0 to {1 << 24}"
            )
        if self.rope_type == "dynamic" and self.rotary_dim < 4:
            raise ValueError(f"rope_type is dynamic, but a head turns only {self.rotary_dim} numbers")

    @property
    def rotary_dim(self) -> int:
        """How many of the D numbers of a head are turned; all of them here."""
        return self.head_dim


class Cache:
    """Keys and values of the positions already seen, for step-by-step decoding; each row is at its own place.

    Args:
        config: sizes.
        batch: rows B.
        length: positions S that fit.

    Attributes:
        used: (B,) int64, positions filled so far. After prompts of different lengths, padded on the right, set it back
            to their lengths: what lies behind is written over before anything sees it.
        span: how many of the S positions attention looks at; at least as many as are used.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, *, device=None, dtype=None):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used = torch.zeros(batch, dtype=torch.long, device=device)
        self.span = length
        self.fresh = True  # nothing in it: the keys are those of the queries' own positions

    def first(self, rows: int) -> "Cache":
        """The first rows of it, in the same memory."""
        part = copy(self)
        part.k, part.v, part.used = self.k[:, :rows], self.v[:, :rows], self.used[:rows]
        return part

    def positions(self, count: int) -> Tensor:
        """Where the next `count` tokens of each row go: (B, T)."""
        return self.used[:, None] + torch.arange(count, device=self.used.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of the new positions; return the keys and values to look at, (B, K, S, D)."""
        rows, at = torch.arange(len(self.used), device=k.device)[:, None], self.positions(k.shape[2])
        self.k[layer][rows, :, at] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, at] = v.transpose(1, 2).to(self.v.dtype)
        return (k, v) if self.fresh else (self.k[layer, :, :, : self.span], self.v[layer, :, :, : self.span])


def rope_speeds(config: ModelConfig, length: int, device=None) -> tuple[Tensor, float]:
    """How far each pair of numbers turns from one position to the next.

    Args:
        length: of the text so far; `dynamic` depends on it.
    Returns:
        angles (D/2,) fp32, and a factor for cosines and sines.

    Sources: linear https://arxiv.org/abs/2306.15595, yarn https://arxiv.org/abs/2309.00071, dynamic (NTK) section 3.4
    there, llama3 https://arxiv.org/abs/2407.21783 section 3.4.3; each with the constants that transformers takes
    """
    d, theta, factor = config.rotary_dim, config.rope_theta, config.rope_factor
    trained = config.original_max_position_embeddings or config.max_position_embeddings
    if config.rope_type == "dynamic":
        known = config.max_position_embeddings
        theta *= (factor * max(length, known) / known - (factor - 1)) ** (d / (d - 2))
    speeds = 1.0 / theta ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)  # (D/2,)
    if config.rope_type == "linear":
        return speeds / factor, 1.0
    if config.rope_type == "yarn":
        # Pairs that turn more than 32 times within what was trained on stay; those below one turn are stretched.
        low, high = (d * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        stretched = ((torch.arange(d // 2, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)
        return speeds * (1 - stretched) + speeds / factor * stretched, 0.1 * math.log(factor) + 1
    if config.rope_type == "llama3":
        # The same with 4 turns and 1, and a ramp over the turns instead of over the pairs.
        stays = ((trained * speeds / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
        return speeds * stays + speeds / factor * (1 - stays), 1.0
    return speeds, 1.0


def rope_table(positions: Tensor, config: ModelConfig, length: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding.

    Args:
        positions: (B, T) or (1, T) integers.
        length: as in `rope_speeds`.
    Returns:
        cos, sin, each (B or 1, 1, T, D) fp32; the second half of D repeats the first (half-split layout, as in
        transformers; the interleaved layout of the paper is the same up to a permutation of the rows of q and k).
    """
    speeds, factor = rope_speeds(config, length, positions.device)
    angle = positions[..., None].float() * speeds  # (B, T, D/2)
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # (B, 1, T, D)
    return angle.cos() * factor, angle.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (B, H, T, D), any float dtype, kept."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, d
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.make_projections(config, bias or config.model_type == "qwen2")
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=bias)

    def make_projections(self, config: ModelConfig, bias: bool) -> None:
        c, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=config.rms_norm_eps) for _ in range(2))
        self.normed = config.model_type == "qwen3"

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys and values (B, K, T, D), the first two turned."""
        q, k, v = (w(x).view(*x.shape[:2], -1, self.head_dim) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).reshape(b, t, -1))  # (B, T, C)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, D), twice (B, K, S, D) -> (B, H, T, D)."""
        # is_causal aligns the triangle at the top left, right only where queries and keys are the same positions.
        return F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head (it bears the prefix `model.` in a state dict)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


_aten = torch.ops.aten
# What selective checkpointing keeps: what is dear to compute again. Norms, rotations, silu and sums are cheap.
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


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
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.rows, ctx.wanted = rows, [train and need for need in ctx.needs_input_grad[:2]]
        losses, *grads = head_loss(x, weight, targets, rows, ctx.dtype, ctx.wanted)
        ctx.save_for_backward(x, weight, targets, *grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        """g (N,): the weight of each position's loss."""
        x, weight, targets, *grads = ctx.saved_tensors
        if any(g.stride()):  # not one number, expanded
            _, *grads = head_loss(x, weight, targets, ctx.rows, ctx.dtype, ctx.wanted, g)
        else:
            grads = [None if t is None else t.mul_(g[0]) for t in grads]
        return *grads, None, None, None


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    dtype: torch.dtype,
    wanted: list[bool],
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,); where wanted, also the gradients of their sum (weighed with g) to x (N, C) and to weight (V, C)."""
    losses = torch.empty(len(x), device=x.device)
    dx = torch.empty_like(x) if wanted[0] else None
    dw = torch.zeros_like(weight) if wanted[1] else None
    with torch.autocast(x.device.type, enabled=False):
        w, vocab = weight.to(dtype), len(weight)
        if x.is_cuda:  # an odd vocabulary takes the GPU's slowest products: half a step of 92M parameters
            w = F.pad(w, (0, 0, 0, -vocab % 64))  # (V', C)
        for part in (slice(i, i + rows) for i in range(0, len(x), rows)):
            chunk, target = x[part].to(dtype), targets[part, None]
            counts = target != IGNORE
            logits = chunk @ w.T  # (n, V')
            logits[:, vocab:] = -math.inf  # probability and gradient zero
            logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
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


class Llama(nn.Module):
    """The whole model.

    `gradient_checkpointing` says what of a block is computed again in the backward pass instead of being kept: "none",
    "selective" (all but PRODUCTS) or "full" (all but its input, https://arxiv.org/abs/1604.06174).
    """

    # Rows of logits held at once while losses are computed: the (B, T, V) tensor is the largest of all
    # (at V = 64,794 and 2,048 tokens: 531 MB in fp32), a chunk of this many numbers is 64 MiB. On a GPU four times as
    # many: 218M parameters train 1.18 times as fast, for 0.8 GB more.
    loss_chunk_numel = 1 << 24

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("vocab_size is not set")
        self.config = config
        self.gradient_checkpointing = "none"
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int, write: Callable[[str, Tensor], None] | None = None) -> None:
        """Normal(0, 0.02) everywhere; what writes into the residual stream divided by sqrt(2 layers) (GPT-2's recipe,
        so that its variance does not grow with depth): o_proj and down_proj. Norms one, biases zero.

        Args:
            seed: of the numbers, the same on every device.
            write: gets each weight's name and its values, one after another; None: they become this model's.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            values = torch.full(p.shape, 1.0 if name.endswith("norm.weight") else 0.0)
            if p.ndim == 2:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                values.normal_(0.0, std, generator=generator)
            p.copy_(values) if write is None else write(name, values)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, docs: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits, or the loss of every position.

        Args:
            ids: (B, T) int64 token ids.
            targets: (B, T) int64, the id to predict at each position, IGNORE for none.
            docs: (B, T) int, number of the document a position belongs to, never falling along a row: positions
                restart and attention stops at its borders. None: each row is one document.
            cache: keys and values of earlier positions; ids are then the next ones, and the cache is advanced.
        Returns:
            Without targets: logits (B, T, V). With targets: losses (B, T) fp32 in nats, zero where ignored.
        """
        x = self.hidden(ids, docs, cache)  # (B, T, C)
        return self.lm_head(x) if targets is None else self._losses(x, targets)

    def hidden(self, ids: Tensor, docs: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head reads: (B, T, C). Arguments as in `forward`."""
        rope, mask = self.context(ids, docs, cache)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        for block in self.model.layers:
            x = self.run_block(block, x, rope, mask, cache)
        x = self.model.norm(x)
        if cache is not None:
            cache.used += ids.shape[1]
            cache.fresh = False
        return x

    def run_block(self, block: Block, *args) -> Tensor:
        """A block, with as much checkpointing as is set. Arguments and result as `Block.forward`."""
        if self.gradient_checkpointing == "none" or not self.training:
            return block(*args)
        contexts = noop_context_fn
        if self.gradient_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    def context(self, ids: Tensor, docs: Tensor | None, cache: Cache | None):
        """What every block needs besides x: the rotary table and the mask (None for plain causal)."""
        positions, mask = self._positions_and_mask(ids, docs, cache)
        length = ids.shape[1]
        if cache is not None and self.config.rope_type == "dynamic":
            length += int(cache.used.max())
        return rope_table(positions, self.config, length), mask

    def _positions_and_mask(self, ids: Tensor, docs: Tensor | None, cache: Cache | None):
        """Position of each token in its document (B or 1, T), and the mask of allowed keys, None for plain causal."""
        t = ids.shape[1]
        index = torch.arange(t, device=ids.device)
        if cache is not None:
            assert docs is None, "a cache holds one document per row"
            positions = cache.positions(t)  # (B, T)
            if cache.fresh:
                return positions, None
            return positions, (torch.arange(cache.span, device=ids.device) <= positions[..., None])[:, None]
        if docs is not None:
            first = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0), value=True)  # (B, T): a document begins here
            start = torch.where(first, index, 0).cummax(dim=1).values  # (B, T): index of its first token
            same = docs[:, :, None] == docs[:, None, :]  # (B, T, T)
            return index - start, (same & (index <= index[:, None]))[:, None]  # (B, T), (B, 1, T, T)
        return index[None], None

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each position, a chunk of positions at a time. x (B, T, C), targets (B, T) -> (B, T)."""
        b, t, c = x.shape
        x, targets = x.reshape(b * t, c), targets.reshape(b * t)
        rows = max(1, (self.loss_chunk_numel << 2 * x.is_cuda) // self.config.vocab_size)
        if type(self.lm_head) is nn.Linear:
            losses = HeadLoss.apply(x, self.lm_head.weight, targets, rows, torch.is_grad_enabled())
        else:  # something wraps the head: what it does to its gradients is its own affair
            chunks = zip(x.split(rows), targets.split(rows))
            losses = torch.cat([checkpoint(self._chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])
        return losses.view(b, t)

    def _chunk_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """(N, C), (N,) -> (N,) fp32."""
        return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=IGNORE, reduction="none")

    def num_parameters(self) -> tuple[int, int]:
        """(all parameters, of which embedding and head); a tied matrix counts once."""
        total = sum(p.numel() for p in self.parameters())
        return total, total - sum(p.numel() for n, p in self.named_parameters() if ".layers." in n or ".norm." in n)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one token's forward and backward pass.

        6 per weight that multiplies (2 forward, 4 backward; the embedding look-up multiplies nothing, the head does)
        plus attention's two products, 12 * layers * heads * head_dim * seq_len, halved because causal.
        Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311
        """
        c = self.config
        blocks = sum(p.numel() for n, p in self.named_parameters() if ".layers." in n and p.ndim == 2)
        attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
        return 6 * (blocks + c.vocab_size * c.hidden_size) + attention


def describe(model: Llama) -> str:
    """A few lines on the size of a model: parameters, FLOPs per token and bytes."""
    config = model.config
    total, embedding = model.num_parameters()
    tied = "tied" if config.tie_word_embeddings else "untied"
    rows = [
        f"parameters      {total:>15,}  ({total / 1e6:.1f}M)",
        f"  embedding+head{embedding:>15,}  ({embedding / total:.0%}, {tied}, vocabulary {config.vocab_size:,})",
        f"  blocks        {total - embedding:>15,}  ({config.num_hidden_layers} layers)",
        f"FLOPs per token {model.flops_per_token(config.max_position_embeddings):>15,}  (forward and backward, "
        f"at {config.max_position_embeddings} positions)",
        f"bytes, fp32     {4 * total:>15,}  weights",
        f"                {4 * total:>15,}  gradients",
        f"                {8 * total:>15,}  two moments (AdamW; Muon has one)",
    ]
    return "\n".join(rows)


def main() -> int:
    import sys
    import tomllib

    if len(sys.argv) != 2:
        print("usage: python model.py CONFIG.toml", file=sys.stderr)
        return 2
    try:
        with open(sys.argv[1], "rb") as f:
            config = ModelConfig(**tomllib.load(f)["model"])
        with torch.device("meta"):  # shapes without memory
            text = describe(Llama(replace(config, vocab_size=config.vocab_size or 4096)))
        if not config.vocab_size:
            text = "vocabulary: the tokenizer's; 4,096 are assumed here, what data_process.py trains\n" + text
        print(text)
    except (OSError, TypeError, ValueError, KeyError) as e:
        what = "no [model] section" if isinstance(e, KeyError) else e
        print(f"error: {sys.argv[1]}: {what}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

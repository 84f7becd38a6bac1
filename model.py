"""The Llama decoder, alone: token ids in, logits or the loss of every position out.

Knows nothing of files, tokenizers, optimizers, devices or ranks. Names of options and parameters are those of Hugging
Face's LlamaConfig and LlamaForCausalLM, so a state dict goes from one to the other without renaming.

Shapes:  B batch, T positions, C hidden_size, F intermediate_size, H heads, K key/value heads, D head_dim,
         V vocab_size, S positions in the cache

Sources: Llama 2 https://arxiv.org/abs/2307.09288, RMSNorm https://arxiv.org/abs/1910.07467,
         RoPE https://arxiv.org/abs/2104.09864, SwiGLU https://arxiv.org/abs/2002.05202,
         GQA https://arxiv.org/abs/2305.13245
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the target of a position without a loss; torch's and transformers' convention


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder, under the names of transformers' LlamaConfig. core/hf_config.py checks them."""

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
    tie_word_embeddings: bool = True  # one matrix for embedding and head: at small C it is most of the model

    def __post_init__(self):
        # A frozen dataclass fills its own blanks: every reader sees the final numbers.
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)


def rope_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding for positions (B or 1, T), each (B or 1, 1, T, D) fp32."""
    d = config.head_dim
    # How far each pair of a head's numbers turns from one position to the next.
    speeds = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=positions.device).float() / d)  # (D/2,)
    angle = positions[:, None, :, None].float() * speeds  # (B or 1, 1, T, D/2)
    # The second half repeats the first: the half-split layout of transformers. The paper's layout, where the two
    # numbers of a pair are neighbours, is the same up to a permutation of the rows of q_proj and k_proj.
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (B, H, T, D), any float dtype, kept."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        # Four products without biases. Keys and values may have fewer heads than queries: a smaller cache.
        c, d = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache=None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D): those of earlier positions in front
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).reshape(b, t, -1))  # (B, T, C)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys and values (B, K, T, D), the first two turned."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        return rotate(q, *rope), rotate(k, *rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (B, H, T, D), keys and values (B, K, S, D) -> (B, H, T, D)."""
        # is_causal puts the triangle at the top left: right only where queries and keys are the same positions.
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head (it bears the prefix `model.` in a state dict)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def cross_entropy(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Loss of each position in nats, 0 where ignored: x (B, T, C), targets (B, T) -> (B, T) fp32."""
    logits = head(x).float()  # (B, T, V), the largest tensor of all: core/memory.py never holds it whole
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")


def run(block: nn.Module, *args) -> Tensor:
    """A block's forward pass; all that its backward pass needs is kept."""
    return block(*args)


class Llama(nn.Module):
    """The whole model."""

    # Both may be exchanged for functions that compute the same in less memory: core/memory.py.
    loss: Callable[[Tensor, nn.Module, Tensor], Tensor] = staticmethod(cross_entropy)
    run: Callable[..., Tensor] = staticmethod(run)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None, docs: Tensor | None = None, cache=None) -> Tensor:
        """Logits, or the loss of every position.

        Args:
            ids: (B, T) int64 token ids.
            targets: (B, T) int64, the id to predict at each position, IGNORE for none.
            docs: (B, T) int, number of the document a position belongs to, never falling along a row: positions
                restart and attention stops at its borders. None: each row is one document.
            cache: keys and values of earlier positions, see core/generate.py; ids are then the next ones.
        Returns:
            Without targets: logits (B, T, V). With targets: losses (B, T) fp32 in nats, zero where ignored.
        """
        x = self.hidden(ids, docs, cache)  # (B, T, C)
        return self.lm_head(x) if targets is None else self.loss(x, self.lm_head, targets)

    def hidden(self, ids: Tensor, docs: Tensor | None = None, cache=None) -> Tensor:
        """What the head reads: (B, T, C). Arguments as in `forward`."""
        # Positions and mask are the same for every block: they are made once.
        context = self.context(ids, docs, cache)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        for block in self.model.layers:
            x = self.run(block, x, *context, cache)
        return self.model.norm(x)

    def context(self, ids: Tensor, docs: Tensor | None, cache=None) -> tuple:
        """What every block needs besides x: the rotary table, and the mask (None for plain causal)."""
        positions, mask = positions_and_mask(ids, docs) if cache is None else cache.positions_and_mask(ids.shape[1])
        return rope_table(positions, self.config), mask

    @torch.no_grad()
    def weights_at_birth(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of each weight: Normal(0, 0.02), norms one. What writes into the residual stream (o_proj and
        down_proj) is divided by sqrt(2 layers), GPT-2's recipe, so that its variance does not grow with depth.
        """
        # Drawn on the CPU: the same weights on every device.
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if writes_residual else 0.02
            values = torch.ones(p.shape)
            yield name, values.normal_(0.0, std, generator=generator) if p.ndim == 2 else values


def positions_and_mask(ids: Tensor, docs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Position of each token in its document (B or 1, T); which keys it sees (B, 1, T, T), None: all before it."""
    index = torch.arange(ids.shape[1], device=ids.device)
    if docs is None:
        return index[None], None
    # A token sees what stands before it in its own document; positions count from the document's beginning.
    begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0), value=True)  # (B, T): a document begins here
    start = torch.where(begins, index, 0).cummax(dim=1).values  # (B, T): index of its first token
    same = docs[:, :, None] == docs[:, None, :]  # (B, T, T)
    return index - start, (same & (index <= index[:, None]))[:, None]

"""Decoders of other families than Llama's: Bloom, GPT-NeoX (Pythia), Falcon, GLM, ChatGLM2 and Baichuan.

In:  their Hugging Face folders. Out: models with the methods and inner names of model.py's Llama, so that the loop,
LoRA, sampling and checkpoints treat them alike; they are written back under their own names, for transformers.
Knows no tokenizer. Dropout that a config.json asks for in training is not applied.

A family is a list of choices (FamilyConfig), how its config.json says them, and what it calls its weights.

Shapes:  B batch, T positions, S keys, C hidden_size, H heads, K key/value heads, D head_dim, F intermediate_size
Sources: Bloom https://arxiv.org/abs/2211.05100, ALiBi https://arxiv.org/abs/2108.12409, GPT-NeoX
https://arxiv.org/abs/2204.06745, Falcon https://arxiv.org/abs/2311.16867, GLM https://arxiv.org/abs/2406.12793
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.hf_config import Family, make_config
from extras.families.llama_kin import Kin, KinAttention, KinConfig, read_rope
from model import MLP, positions_and_mask, rotate


@dataclass(frozen=True)
class FamilyConfig(KinConfig):
    """Sizes under Llama's names, and what a family does in its own way."""

    qkv: str = "groups"  # queries, keys, values: apart; one product, all of a group of heads side by side; or in a row
    qkv_bias: bool = True
    out_bias: bool = True  # of attention's last product
    mlp: str = "gelu"  # gelu, gelu_tanh, swiglu; joined_swiglu: gate and up in one product
    mlp_bias: bool = True
    layer_norm: bool = True  # else RMSNorm
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # of a block, before attention and MLP
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)) instead of one after the other
    rotary_share: float = 1.0  # of each head's numbers, from the first on
    interleaved: bool = False  # pairs are neighbours
    alibi: bool = False  # instead of rotations
    embedding_norm: bool = False
    source: dict = field(default_factory=dict)  # config.json as it was read

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_share)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def norm(self) -> nn.Module:
        return (nn.LayerNorm if self.layer_norm else nn.RMSNorm)(self.hidden_size, eps=self.rms_norm_eps)


class FamilyAttention(KinAttention):
    """Attention whose queries, keys and values may come out of one product."""

    def __init__(self, config: FamilyConfig, layer: int):
        super().__init__(config, layer)
        self.config = config
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.out_bias)

    def make_projections(self, config: FamilyConfig) -> None:
        if config.qkv == "apart":
            super().make_projections(dataclasses.replace(config, attention_bias=config.qkv_bias))
        else:
            size = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
            self.query_key_value = nn.Linear(config.hidden_size, size, bias=config.qkv_bias)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        c, (b, t) = self.config, x.shape[:2]
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        if c.qkv == "apart":
            q, k, v = (w(x).view(b, t, -1, c.head_dim) for w in (self.q_proj, self.k_proj, self.v_proj))
        elif c.qkv == "groups":  # the queries of a group, its key, its value, next group
            sizes = (heads // groups, 1, 1)
            parts = self.query_key_value(x).view(b, t, groups, sum(sizes), c.head_dim).split(sizes, dim=3)
            q, k, v = (part.flatten(2, 3) for part in parts)
        else:  # all queries, all keys, all values
            q, k, v = self.query_key_value(x).view(b, t, -1, c.head_dim).split((heads, groups, groups), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return (q, k, v) if rope is None else (self.turn(q, rope), self.turn(k, rope), v)

    def turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the first numbers of each head, (B, H, T, D)."""
        turned, rest = x[..., : self.config.rotary_dim], x[..., self.config.rotary_dim :]
        if self.config.interleaved:  # bring pairs (0, 1), (2, 3) ... to where `rotate` expects them, and back
            turned = rotate(turned.unflatten(-1, (-1, 2)).mT.flatten(-2), *rope).unflatten(-1, (2, -1)).mT.flatten(-2)
        else:
            turned = rotate(turned, *rope)
        return torch.cat((turned, rest), dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        return super().attend(q, k, v, mask)


class PlainMLP(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self, config: FamilyConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))


class JoinedMLP(nn.Module):
    """SwiGLU with gate and up in one product."""

    def __init__(self, config: FamilyConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class FamilyBlock(nn.Module):
    """One layer; arguments and result as model.py's Block."""

    def __init__(self, config: FamilyConfig, layer: int):
        super().__init__()
        kinds = {"swiglu": MLP, "joined_swiglu": JoinedMLP}
        self.self_attn, self.mlp = FamilyAttention(config, layer), kinds.get(config.mlp, PlainMLP)(config)
        self.norms, self.parallel = config.norms, config.parallel
        for name in config.norms:
            self.add_module(name, config.norm())

    def forward(self, x: Tensor, rope: tuple | None, mask: Tensor | None, cache=None) -> Tensor:
        first, second = self.get_submodule(self.norms[0]), self.get_submodule(self.norms[-1])
        read = first(x)
        attended = self.self_attn(read, rope, mask, cache)
        if self.parallel:
            return x + attended + self.mlp(read if second is first else second(x))
        x = x + attended
        return x + self.mlp(second(x))


class NormedEmbedding(nn.Embedding):
    """An embedding with a norm behind it, in one module: where it goes, its norm goes along."""

    def __init__(self, config: FamilyConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        self.norm = config.norm()

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class FamilyModel(Kin):
    """A decoder out of FamilyBlocks; what it is called with and what it returns is Llama's."""

    def __init__(self, config: FamilyConfig):
        super().__init__(config)
        self.model.layers = nn.ModuleList(FamilyBlock(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = config.norm()
        if config.embedding_norm:
            self.model.embed_tokens = NormedEmbedding(config)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.model.embed_tokens.weight

    def context(self, ids: Tensor, docs: Tensor | None, cache=None):
        if not self.config.alibi:
            return super().context(ids, docs, cache)
        t = ids.shape[1]
        positions, mask = positions_and_mask(ids, docs) if cache is None else cache.positions_and_mask(t)
        queries = torch.arange(t, device=ids.device)[None] if cache is None else positions  # (B or 1, T)
        keys = torch.arange(t if mask is None else mask.shape[-1], device=ids.device)  # (S,)
        distance = (keys - queries[..., None])[:, None]  # (B or 1, 1, T, S), 0 at a query's own place, negative before
        bias = alibi_slopes(self.config.num_attention_heads, ids.device)[:, None, None] * distance  # (B or 1, H, T, S)
        return None, bias.masked_fill(~(distance <= 0 if mask is None else mask), float("-inf"))


def alibi_slopes(heads: int, device=None) -> Tensor:
    """How fast each head's attention falls with distance, (H,): 2^(-8/n), 2^(-16/n) ... for n heads, a power of two;
    heads beyond the largest power of two take every second slope of twice as many."""
    n = 1 << (heads.bit_length() - 1)
    powers = [8 * i / n for i in range(1, n + 1)] + [4 * i / n for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor([2**-power for power in powers], device=device)


# ---------------------------------------------------------------- files


class FamilyFiles(Family):
    """A family's config.json and names.

    Args:
        choices: (raw, path) -> fields of FamilyConfig.
        names: (theirs, ours): parts of names, in the order in which they are replaced.
        prefix: of theirs, which some exports leave out.
    """

    model = FamilyModel

    def __init__(self, choices: Callable[[dict, Path], dict], names: list[tuple[str, str]], prefix: str = ""):
        self.choices, self.names, self.prefix = choices, names, prefix

    def read(self, raw: dict, path: Path) -> FamilyConfig:
        found = self.choices(raw, path)
        own = {name: found.get(name, default) for name, default in CHOICES.items()} | {"source": raw}
        config = make_config(FamilyConfig, raw | found, path, **own)
        if config.rotary_dim % 2 or (not config.rotary_dim and not config.alibi):
            raise UserError(f"{path}: {config.rotary_dim} numbers of a head are turned, must be even and not 0")
        return config

    def write(self, config: FamilyConfig) -> dict:
        return {k: v for k, v in config.source.items() if k != "dtype"}  # torch_dtype says it

    def ours(self, name: str) -> str:
        if name.endswith((".inv_freq", ".attention.bias", ".attention.masked_bias")):
            return ""  # constants
        if not name.startswith(("lm_head", self.prefix)):
            name = self.prefix + name
        for theirs, ours in self.names:
            name = name.replace(theirs, ours)
        return name

    def theirs(self, name: str) -> str:
        for theirs, ours in self.names:
            name = name.replace(ours, theirs)
        return name


# What a family decides, not its config.json, and what it is if it does not.
CHOICES = {f.name: f.default for f in dataclasses.fields(FamilyConfig)[len(dataclasses.fields(KinConfig)) :]}
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _only(raw: dict, path: Path, **values) -> None:
    """Refuse a config.json where one of these is there and something else."""
    for key, value in values.items():
        if raw.get(key, value) != value:
            raise UserError(f"{path}: {key} = {str(raw[key])[:60]!r} is not supported")


def _first(raw: dict, *names: str):
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _four_times(size):
    return 4 * size if type(size) is int else size  # make_config says what is wrong with another


def _gelu(raw: dict, path: Path, key: str) -> str:
    name = str(raw.get(key, "gelu"))
    if name not in GELUS:
        raise UserError(f"{path}: {key} = {name[:60]!r} is not supported")
    return GELUS[name]


def _share(raw: dict, path: Path, value) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise UserError(f"{path}: {str(value)[:60]!r} of a head is turned, must be above 0 and at most 1")
    return float(value)


def _flag(raw: dict, path: Path, key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if type(value) is not bool:
        raise UserError(f"{path}: {key} = {str(value)[:60]!r} is not true or false")
    return value


def bloom(raw: dict, path: Path) -> dict:
    _only(raw, path, apply_residual_connection_post_layernorm=False)
    hidden = _first(raw, "hidden_size", "n_embed")
    return {
        "vocab_size": raw.get("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _four_times(hidden),
        "num_hidden_layers": _first(raw, "n_layer", "num_hidden_layers"),
        "num_attention_heads": _first(raw, "n_head", "num_attention_heads"),
        "max_position_embeddings": raw.get("seq_length", 2048),
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "alibi": True,
        "embedding_norm": True,
        "mlp": "gelu_tanh",
    }


def gpt_neox(raw: dict, path: Path) -> dict:
    rope = read_rope(raw | {"rope_theta": _first(raw, "rope_theta", "rotary_emb_base")}, path)
    share = _first(raw.get("rope_parameters") or {}, "partial_rotary_factor") or raw.get("rotary_pct", 0.25)
    bias = _flag(raw, path, "attention_bias", True)
    return rope | {
        "rms_norm_eps": raw.get("layer_norm_eps", 1e-5),
        "rotary_share": _share(raw, path, share),
        "parallel": _flag(raw, path, "use_parallel_residual", True),
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_bias": False,
        "mlp": _gelu(raw, path, "hidden_act"),
    }


def falcon(raw: dict, path: Path) -> dict:
    _only(raw, path, alibi=False)  # its biases are rounded to bf16, for all dtypes
    heads, hidden = _first(raw, "num_attention_heads", "n_head"), _first(raw, "hidden_size", "n_embed")
    new = _flag(raw, path, "new_decoder_architecture", False)
    two = new and raw.get("num_ln_in_parallel_attn") in (None, 2)
    parallel = new or _flag(raw, path, "parallel_attn", True)
    groups = _first(raw, "num_kv_heads", "n_head_kv") if new else 1 if _flag(raw, path, "multi_query", True) else heads
    norms = ("ln_attn", "ln_mlp") if two else ("input_layernorm",) + ("post_attention_layernorm",) * (not parallel)
    bias = _flag(raw, path, "bias", False)
    return read_rope(raw, path) | {
        "num_attention_heads": heads,
        "num_hidden_layers": _first(raw, "num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "intermediate_size": _first(raw, "ffn_hidden_size") or _four_times(hidden),
        "num_key_value_heads": groups,
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "norms": norms,
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "parallel": parallel,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "mlp": _gelu(raw, path, "activation"),
    }


def glm(raw: dict, path: Path) -> dict:
    _only(raw, path, hidden_act="silu")
    rope = read_rope(raw, path)
    share = _first(raw.get("rope_parameters") or {}, "partial_rotary_factor") or raw.get("partial_rotary_factor", 0.5)
    return rope | {
        "qkv": "apart",
        "qkv_bias": _flag(raw, path, "attention_bias", True),
        "attention_bias": False,
        "rms_norm_eps": raw.get("rms_norm_eps", 1.5625e-07),
        "mlp": "joined_swiglu",
        "rotary_share": _share(raw, path, share),
        "out_bias": False,
        "mlp_bias": False,
        "layer_norm": False,
        "interleaved": True,
    }


def chatglm(raw: dict, path: Path) -> dict:
    """ChatGLM2 and 3, by their own files."""
    _only(
        raw,
        path,
        rmsnorm=True,
        post_layer_norm=True,
        apply_residual_connection_post_layernorm=False,
        add_bias_linear=False,
        multi_query_attention=True,
        original_rope=True,
    )
    ratio = raw.get("rope_ratio", 1)
    if "padded_vocab_size" not in raw:
        raise UserError(f"{path}: not ChatGLM2's or ChatGLM3's; the first ChatGLM is not supported")
    if type(ratio) not in (int, float) or not 0 < ratio < 1e9:
        raise UserError(f"{path}: rope_ratio = {str(ratio)[:60]!r}, must be a positive number")
    return {
        "vocab_size": raw["padded_vocab_size"],
        "hidden_size": raw.get("hidden_size"),
        "intermediate_size": raw.get("ffn_hidden_size"),
        "num_hidden_layers": raw.get("num_layers"),
        "num_attention_heads": raw.get("num_attention_heads"),
        "head_dim": raw.get("kv_channels"),
        "num_key_value_heads": raw.get("multi_query_group_num"),
        "rms_norm_eps": raw.get("layernorm_epsilon", 1e-5),
        "max_position_embeddings": raw.get("seq_length", 2048),
        "rope_theta": 10000.0 * ratio,
        "tie_word_embeddings": _flag(raw, path, "tie_word_embeddings", False),
        "qkv": "row",
        "qkv_bias": _flag(raw, path, "add_qkv_bias", False),
        "out_bias": False,
        "mlp_bias": False,
        "mlp": "joined_swiglu",
        "layer_norm": False,
        "rotary_share": 0.5,
        "interleaved": True,
    }


def baichuan(raw: dict, path: Path) -> dict:
    """7B turns queries and keys, 13B has ALiBi; nothing else in its config.json says which it is."""
    _only(raw, path, hidden_act="silu")
    if raw.get("vocab_size") == 125696:
        raise UserError(f"{path}: Baichuan 2, whose head norms its weights, is not supported")
    alibi = "max_position_embeddings" not in raw
    return {
        "max_position_embeddings": _first(raw, "max_position_embeddings", "model_max_length"),
        "alibi": alibi,
        "qkv": "row",
        "qkv_bias": False,
        "out_bias": False,
        "mlp": "swiglu",
        "mlp_bias": False,
        "layer_norm": False,
    }


_MEGATRON = [
    (".self_attention.dense.", ".self_attn.o_proj."),
    (".self_attention.", ".self_attn."),
    (".mlp.dense_h_to_4h.", ".mlp.up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
]
_BLOOM = [
    ("transformer.word_embeddings_layernorm.", "model.embed_tokens.norm."),
    ("transformer.word_embeddings.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    ("transformer.ln_f.", "model.norm."),
    *_MEGATRON,
]
_NEOX = [
    ("gpt_neox.embed_in.", "model.embed_tokens."),
    ("gpt_neox.layers.", "model.layers."),
    ("gpt_neox.final_layer_norm.", "model.norm."),
    ("embed_out.", "lm_head."),
    *((theirs.replace("self_attention", "attention"), ours) for theirs, ours in _MEGATRON),
]
_CHATGLM = [
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.layers.", "model.layers."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.output_layer.", "lm_head."),
    (".mlp.dense_h_to_4h.", ".mlp.gate_up_proj."),
    *_MEGATRON,
]


FAMILIES = {
    "bloom": FamilyFiles(bloom, _BLOOM, "transformer."),
    "gpt_neox": FamilyFiles(gpt_neox, _NEOX),
    "falcon": FamilyFiles(falcon, _BLOOM),
    "glm": FamilyFiles(glm, []),
    "chatglm": FamilyFiles(chatglm, _CHATGLM),
    "baichuan": FamilyFiles(baichuan, [(".W_pack.", ".query_key_value.")]),
}

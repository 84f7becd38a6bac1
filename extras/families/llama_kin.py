"""Llama's next of kin: Qwen2 (biases on queries, keys and values), Qwen3 (queries and keys normed in each head), biases
of Llama's own, and positions scaled for longer contexts.

In:  a config.json. Out: a model with the methods and names of model.py's Llama, so that the loop, LoRA, sampling and
checkpoints treat them alike; it is written back as it came, for transformers.

Shapes:  B batch, T positions, C hidden_size, H heads, K key/value heads, D head_dim
"""

import dataclasses
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from core.config import Section
from core.errors import UserError
from core.hf_config import MOST, Family, OtherConfig, check_size, make_config
from core.memory import save_memory
from model import Attention, Llama, ModelConfig, positions_and_mask, rotate

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# What transformers lets a config.json say and `rope_speeds` takes as given.
ROPE_CONSTANTS = {"beta_fast": 32, "beta_slow": 1, "low_freq_factor": 1, "high_freq_factor": 4, "truncate": True}


@dataclass(frozen=True)
class KinConfig(OtherConfig):
    """Sizes under Llama's names, and what differs from Llama."""

    attention_bias: bool = False
    model_type: str = "llama"
    rope_type: str = "default"  # longer contexts: linear, dynamic (NTK), yarn, llama3; see `rope_speeds`
    rope_factor: float = 1.0  # how many times as long
    original_max_position_embeddings: int = 0  # of yarn and llama3: trained on before; 0: max_position_embeddings

    def __post_init__(self):
        super().__post_init__()
        if type(self) is KinConfig and self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type is {self.model_type!r}, must be one of {', '.join(ARCHITECTURES)}")
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r}, must be one of {', '.join(ROPE_TYPES)}")
        if not 1 <= self.rope_factor <= MOST:
            raise ValueError(f"rope_factor is {self.rope_factor}, must be from 1 to {MOST}")
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}, must be above 1 with rope_type yarn")
        if self.rope_factor != 1 and self.rope_type == "default":
            raise ValueError(f"rope_factor is {self.rope_factor}, with rope_type default it must be 1")
        check_size(self, "original_max_position_embeddings", least=0)
        if self.rope_type == "dynamic" and self.rotary_dim < 4:
            raise ValueError(f"rope_type is dynamic, but a head turns only {self.rotary_dim} numbers")

    @property
    def rotary_dim(self) -> int:
        """How many of the D numbers of a head are turned; all of them here."""
        return self.head_dim

    @property
    def family(self) -> Family:
        return KinFamily(self.model_type)


@dataclass(frozen=True)
class KinOptions(Section):
    """What a new model has besides the sizes in [model]; see KinConfig."""

    model_type: Literal["llama", "qwen2", "qwen3"] = "llama"
    attention_bias: bool = False
    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    rope_factor: float = 1.0
    original_max_position_embeddings: int = 0


def rope_speeds(config: KinConfig, length: int, device=None) -> tuple[Tensor, float]:
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


def rope_table(positions: Tensor, config: KinConfig, length: int) -> tuple[Tensor, Tensor]:
    """As model.py's, with scaled positions; `length` as in `rope_speeds`."""
    speeds, factor = rope_speeds(config, length, positions.device)
    angle = positions[..., None].float() * speeds  # (B, T, D/2)
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # (B, 1, T, D)
    return angle.cos() * factor, angle.sin() * factor


class KinAttention(Attention):
    """Attention with biases, and with queries and keys that may be normed."""

    def __init__(self, config: KinConfig, layer: int):
        nn.Module.__init__(self)  # Attention's own products are not wanted
        self.layer, self.head_dim = layer, config.head_dim
        self.make_projections(config)
        inside = config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(inside, config.hidden_size, bias=config.attention_bias)

    def make_projections(self, config: KinConfig) -> None:
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=config.rms_norm_eps) for _ in range(2))

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (w(x).view(*x.shape[:2], -1, self.head_dim) for w in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        return rotate(q, *rope), rotate(k, *rope), v


class Kin(Llama):
    """A Llama with the attention and the positions of its kin."""

    attention = KinAttention

    def __init__(self, config: KinConfig):
        super().__init__(config)
        for layer, block in enumerate(self.model.layers):
            block.self_attn = self.attention(config, layer)

    def context(self, ids: Tensor, docs: Tensor | None, cache=None) -> tuple:
        positions, mask = positions_and_mask(ids, docs) if cache is None else cache.positions_and_mask(ids.shape[1])
        length = ids.shape[1]
        if cache is not None and self.config.rope_type == "dynamic":
            length = int(cache.used.max())
        return rope_table(positions, self.config, length), mask

    def weights_at_birth(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """As Llama's; biases are zero."""
        for name, values in super().weights_at_birth(seed):
            yield name, torch.zeros_like(values) if name.endswith("bias") else values


def rope_type(config: ModelConfig) -> str:
    """How a model's positions are turned; "" where they are not turned as Llama's are."""
    if type(config) is ModelConfig:
        return "default"
    return config.rope_type if type(config) is KinConfig else ""


def change(model: Llama, changes: dict) -> Kin:
    """A plain Llama or one of its kin, on the meta device, with other fields in its config."""
    config = KinConfig(**dataclasses.asdict(model.config) | changes)
    with torch.device("meta"):
        return save_memory(Kin(config))


class KinFamily(Family):
    """Their config.json; weights have Llama's names."""

    model = Kin

    def __init__(self, model_type: str):
        self.architecture = ARCHITECTURES[model_type]

    def read(self, raw: dict, path: Path) -> KinConfig:
        """config.json -> config.

        Raises:
            UserError: a number that is missing or impossible, a way of computing that is not here.
        """
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise UserError(f"{path}: hidden_act must be silu and mlp_bias false")
        if raw.get("use_sliding_window"):
            raise UserError(f"{path}: use_sliding_window is not supported")
        return make_config(KinConfig, raw | read_rope(raw, path), path)

    def write(self, config: KinConfig) -> dict:
        scaling = {"rope_type": config.rope_type, "factor": config.rope_factor}
        if config.original_max_position_embeddings:
            scaling["original_max_position_embeddings"] = config.original_max_position_embeddings
        if config.rope_type == "llama3":
            scaling |= {name: ROPE_CONSTANTS[name] for name in ("low_freq_factor", "high_freq_factor")}
        ours = ("rope_type", "rope_factor", "original_max_position_embeddings")
        same = {k: v for k, v in dataclasses.asdict(config).items() if k not in ours}
        constant = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0}
        scaling = None if config.rope_type == "default" else scaling
        return {"architectures": [self.architecture], **same, **constant, "rope_scaling": scaling}


def read_rope(raw: dict, path: Path) -> dict:
    """What a config.json says of positions: old (rope_scaling) or of transformers 5 (rope_parameters)."""
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters = {reprlib.repr(rope)} is not an object")
    scaling = raw.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    plain = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    if (
        kind is None
        or (kind != "default" and scaling.get("factor") is None)
        or any(
            value is not None and key not in plain and value != ROPE_CONSTANTS.get(key)
            for key, value in scaling.items()
        )
    ):
        raise UserError(f"{path}: rope_scaling {reprlib.repr(scaling)} is not supported")
    theta = raw.get("rope_theta")
    found = {"rope_theta": rope.get("rope_theta", 10000.0) if theta is None else theta, "rope_type": kind}
    if kind != "default":
        found["rope_factor"] = scaling["factor"]
        if kind in ("yarn", "llama3"):
            found["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings", 0)
    return found

"""config.json of a model folder: checked number by number when it is read, and written for transformers.

In:  a config.json, or options. Out: a ModelConfig, or an error that names the number. And back.
Knows nothing of weights. Other families than Llama: extras/families.
"""

import dataclasses
import math
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path

from core import files
from core.errors import UserError
from model import Llama, ModelConfig

MOST = 1 << 24  # of any size: larger numbers are mistakes or attacks, and would be allocated


@dataclass(frozen=True)
class CheckedConfig(ModelConfig):
    """Sizes that come from a file or from the command line. Every number is checked before anything is allocated."""

    def __post_init__(self):
        # The blanks that super() fills are derived from these.
        for name in ("hidden_size", "num_attention_heads"):
            check_size(self, name)
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by {heads}")
        super().__post_init__()
        sizes = ("intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings")
        for name in sizes:
            check_size(self, name)
        check_size(self, "vocab_size", least=0)
        check_size(self, "num_hidden_layers", most=1024)
        # Sizes that are fine one by one may not go together.
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
        if heads * self.head_dim > MOST:
            raise ValueError(f"num_attention_heads {heads} x head_dim {self.head_dim} is above {MOST}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, must be even: RoPE turns pairs")
        for name in ("rms_norm_eps", "rope_theta"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} is {getattr(self, name)}, must be a positive number")


def check_size(config: ModelConfig, name: str, least: int = 1, most: int = MOST) -> None:
    """ValueError where a field is not in its range."""
    if not least <= getattr(config, name) <= most:
        raise ValueError(f"{name} is {getattr(config, name)}, must be from {least} to {most}")


class Family:
    """How the folders of a family are read and written: here Llama's.

    Attributes:
        architecture: what transformers calls the model.
        model: its class here.
    """

    architecture, model = "LlamaForCausalLM", Llama

    def write(self, config: ModelConfig) -> dict:
        """config -> config.json."""
        constant = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None}
        about = {"architectures": [self.architecture], "model_type": "llama", "hidden_act": "silu"}
        return about | dataclasses.asdict(config) | constant

    def ours(self, name: str) -> str:
        """Our name of a stored tensor, "" for a constant that old exports store."""
        return "" if name.endswith("rotary_emb.inv_freq") else name

    def theirs(self, name: str) -> str:
        """The stored name of a tensor of ours."""
        return name


@dataclass(frozen=True)
class OtherConfig(CheckedConfig):
    """A config of another family: the classes derived from it, in extras/families, say which."""

    @property
    def family(self) -> Family:
        raise NotImplementedError


def family_of(config: ModelConfig) -> Family:
    """The family that a config belongs to."""
    return config.family if isinstance(config, OtherConfig) else Family()


def identify(config: ModelConfig) -> dict:
    """What tells one model from another: what a resumed run must share with the one it continues."""
    # Runs of earlier versions have the first key, and of the others only those that are used.
    usual = {"model_type": "llama", "rope_type": "default", "rope_factor": 1.0, "original_max_position_embeddings": 0}
    found = {"attention_bias": False} | dataclasses.asdict(config)
    return {key: value for key, value in found.items() if key not in usual or value != usual[key]}


def is_plain_llama(raw: dict) -> bool:
    """Whether a config.json describes what model.py is; everything else is for extras/families to read or refuse."""
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or {}
    if raw.get("rope_scaling") or not isinstance(rope, dict) or rope.keys() - {"rope_theta", "rope_type"}:
        return False
    usual = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    plain = raw.get("model_type") == "llama" and rope.get("rope_type", "default") == "default"
    return plain and all(raw.get(key, value) == value for key, value in usual.items())


def read_config(path: Path, hint: str = "") -> ModelConfig:
    """What a plain Llama's config.json says.

    Raises:
        UserError: a number that is missing or impossible.
    """
    raw = files.read_json(path, hint)
    # transformers 5 has moved it; a config.json that has both says it in the old place.
    if raw.get("rope_theta") is None:
        raw |= {"rope_theta": (raw.get("rope_parameters") or {}).get("rope_theta")}
    checked = make_config(CheckedConfig, raw, path)
    return ModelConfig(**dataclasses.asdict(checked))


def make_config(cls: type, raw: dict, path: Path, **own) -> ModelConfig:
    """A config of the class, out of what a config.json says, every number checked; `own` is not."""
    # What transformers means where a file does not say it.
    raw = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | raw
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    # Each number that is there has the type of its field.
    values = {}
    for field in (f for f in dataclasses.fields(cls) if f.name not in own):
        value = raw.get(field.name)
        if value is None:
            if field.name in needed:
                raise UserError(f"{path}: {field.name} is missing")
            continue
        # A whole number will do for a fraction, and true is no number.
        fits = type(value) in (int, float) if field.type is float else type(value) is field.type
        # The comparison also keeps out integers that no float holds.
        if not fits or (type(value) in (int, float) and not abs(value) <= sys.float_info.max):
            raise UserError(f"{path}: {field.name} = {reprlib.repr(value)} is not of type {field.type.__name__}")
        values[field.name] = field.type(value)
    try:
        config = cls(**values, **own)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None
    if not config.vocab_size:
        raise UserError(f"{path}: vocab_size is 0")
    return config

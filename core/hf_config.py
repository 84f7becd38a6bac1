"""config.json of a model folder: read, checked number by number, and written.

In:  a config.json. Out: a ModelConfig, or an error that names the number. And back.
Knows nothing of weights.
"""

import dataclasses
import reprlib
import sys
from pathlib import Path

from core import files
from core.errors import UserError
from model import Llama, ModelConfig


class Family:
    """How the folders of Llama and its descendants in model.py are read and written. Others: extras/families.py.

    Args:
        architecture: what transformers calls the model.

    Attributes:
        model: its class here.
    """

    model = Llama

    def __init__(self, architecture: str):
        self.architecture = architecture

    def read(self, raw: dict, path: Path) -> ModelConfig:
        """config.json -> config.

        Raises:
            UserError: a number that is missing or impossible, a way of computing that is not here.
        """
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise UserError(f"{path}: hidden_act must be silu and mlp_bias false")
        if raw.get("use_sliding_window"):
            raise UserError(f"{path}: use_sliding_window is not supported")
        return make_config(ModelConfig, raw | read_rope(raw, path), path)

    def write(self, config: ModelConfig) -> dict:
        """config -> config.json."""
        scaling = {"rope_type": config.rope_type, "factor": config.rope_factor}
        if config.original_max_position_embeddings:
            scaling["original_max_position_embeddings"] = config.original_max_position_embeddings
        if config.rope_type == "llama3":
            scaling |= {name: ROPE_CONSTANTS[name] for name in ("low_freq_factor", "high_freq_factor")}
        same = {k: v for k, v in dataclasses.asdict(config).items() if k not in ROPE_FIELDS}
        return {
            "architectures": [self.architecture],
            **same,
            "hidden_act": "silu",
            "mlp_bias": False,
            "rope_scaling": None if config.rope_type == "default" else scaling,
            "attention_dropout": 0.0,
        }

    def ours(self, name: str) -> str:
        """Our name of a stored tensor, "" for a constant that old exports store."""
        return "" if name.endswith("rotary_emb.inv_freq") else name

    def theirs(self, name: str) -> str:
        return name


# By model_type. Commands add those of extras/families.py.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
}


ROPE_FIELDS = ("rope_type", "rope_factor", "original_max_position_embeddings")


# What transformers lets a config.json say and model.py takes as given.
ROPE_CONSTANTS = {"beta_fast": 32, "beta_slow": 1, "low_freq_factor": 1, "high_freq_factor": 4, "truncate": True}


def sizes(config: ModelConfig) -> dict:
    """What tells one model from another; fields that came later only where they are used: older runs go on."""
    later = {"model_type": "llama", "rope_type": "default", "rope_factor": 1.0, "original_max_position_embeddings": 0}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in later or v != later[k]}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def read_rope(raw: dict, path: Path) -> dict:
    """rope_theta and ROPE_FIELDS out of a config.json, old (rope_scaling) or of transformers 5 (rope_parameters)."""
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


def make_config(cls: type, raw: dict, path: Path, **own):
    """A ModelConfig or one derived from it, out of what a config.json says, every number checked; `own` is not."""
    raw = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | raw
    values = {}
    for field in (f for f in dataclasses.fields(cls) if f.name not in own):
        value = raw.get(field.name)
        if value is None:
            if field.name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            ):
                raise UserError(f"{path}: {field.name} is missing")
            continue
        fits = type(value) in (int, float) if field.type is float else type(value) is field.type
        # The comparison also keeps out integers that no float holds.
        if not fits or (type(value) in (int, float) and not abs(value) <= sys.float_info.max):
            raise UserError(f"{path}: {field.name} = {reprlib.repr(value)} is not of type {field.type.__name__}")
        values[field.name] = field.type(value)
    try:
        return cls(**values, **own)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def load_config(folder: Path) -> ModelConfig:
    """What a folder's config.json says, every number checked before anything is allocated."""
    path = Path(folder) / "config.json"
    raw = files.read_json(path, hint=f"is {folder} a model folder?")
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{path}: model_type {reprlib.repr(name)} is not supported", f"known: {', '.join(FAMILIES)}")
    config = FAMILIES[name].read(raw, path)
    if not config.vocab_size:
        raise UserError(f"{path}: vocab_size is 0")
    return config

"""LoRA: a model's own weights stay as they are, and a product of two narrow matrices beside each of them is trained.

In:  a model, on the meta device or not, and LoraConfig. Out: the same model with y = W x + alpha / r * B A x where it
had y = W x; adapters as files in PEFT's format; or a plain model again, with the products added to its weights.
Knows nothing of data, losses or ranks: frozen weights have requires_grad False, and that is all the others see.

Shapes:  A (r, in), B (out, r), W (out, in)
Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import checkpoint, files
from core.errors import UserError
from model import Llama

CONFIG, PREFIX = "adapter_config.json", "base_model.model."  # of PEFT: a file, and what its names have before ours
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class LoraConfig:
    r: int = 0  # rank of what is added to a matrix; 0: no LoRA, all weights are trained
    alpha: float = 0.0  # what is added is scaled by alpha / r; 0: twice r
    dropout: float = 0.0  # share of the inputs of A that are set to zero while training
    target_modules: tuple[str, ...] = ()  # linear layers, by the ends of their names; none: all of the blocks
    modules_to_save: tuple[str, ...] = ()  # what is trained whole besides: embed_tokens, lm_head, norm ...
    lora_config: str = ""  # a JSON file with lora_r, lora_alpha, lora_dropout, lora_target_modules instead of these

    def __post_init__(self):
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.lora_config:
            if given != {"lora_config"}:
                raise ValueError("lora_config and the other options of the section: one or the other")
            for name, value in read_config(Path(self.lora_config)).items():
                object.__setattr__(self, name, value)
            if self.target_modules == "all-linear":
                object.__setattr__(self, "target_modules", ())
        if self.r < (1 if given else 0):
            raise ValueError(f"r = {self.r}, must be at least 1 where there is LoRA")
        if not self.alpha:
            object.__setattr__(self, "alpha", 2.0 * self.r)
        if not 0 <= self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(f"alpha = {self.alpha}, dropout = {self.dropout}: from 0, and from 0 to below 1")
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules = {self.target_modules!r}, must be a list of names")


class LoraLinear(nn.Linear):
    """A linear layer with W frozen: W x + alpha / r * B A x. Names are those of the plain layer and of PEFT."""

    def __init__(self, plain: nn.Linear, cfg: LoraConfig):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias, self.scale, self.dropout = plain.weight, plain.bias, cfg.alpha / cfg.r, cfg.dropout
        self.lora_A = nn.Linear(plain.in_features, cfg.r, bias=False, device=plain.weight.device)
        self.lora_B = nn.Linear(cfg.r, plain.out_features, bias=False, device=plain.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(dropped))  # (..., in) -> (..., out)


# ---------------------------------------------------------------- model -> model


def apply(model: Llama, cfg: LoraConfig) -> Llama:
    """Put LoRA into a model, in place, and freeze all but it and modules_to_save. A and B get no values here.

    Raises:
        UserError: a name that the model does not have, r larger than a matrix.
    """
    tied = model.config.tie_word_embeddings
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not (tied and name == HEAD)}
    assert not any(isinstance(layer, LoraLinear) for layer in linear.values())
    targets = _chosen("target_modules", cfg.target_modules, linear) or [n for n in linear if ".layers." in n]
    whole = [n for n, m in model.named_modules() if [*m.parameters(recurse=False)] and n not in targets]
    whole = _chosen("modules_to_save", cfg.modules_to_save, whole)
    model.requires_grad_(False)
    for name in targets:
        least = min(linear[name].weight.shape)
        if not 0 < cfg.r <= least:
            raise UserError(f"r = {cfg.r} for {name} of {' x '.join(map(str, linear[name].weight.shape))}",
                            f"from 1 to {least}")  # fmt: skip
        _replace(model, name, LoraLinear(linear[name], cfg))
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return model


@torch.no_grad()
def merge(model: Llama) -> Llama:
    """Add each product to its weight, in place: a plain model that computes the same."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight)
            plain.bias = layer.bias
            _replace(model, name, plain)
    return model


def _chosen(option: str, words: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that a word is or ends, in their order; each word must fit one."""
    found = {word: [n for n in names if n == word or n.endswith(f".{word}")] for word in words}
    if missing := [word for word, fitting in found.items() if not fitting]:
        known = sorted({re.sub(r".*\.", "", name) for name in names})
        raise UserError(f"{option}: {missing[0]!r} is nowhere in the model", f"there are {', '.join(known)}")
    return [n for n in names if any(n in fitting for fitting in found.values())]


def _replace(model: Llama, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


# ---------------------------------------------------------------- training


def begin(model: Llama, fill: Callable, cfg: LoraConfig, seed: int, base: Path) -> tuple[Callable, "Adapter"]:
    """Apply LoRA to what `checkpoint.open_model` returned, for training.

    Args:
        seed: of A's first values; those of B are zero, so that the model begins as its base.
        base: the folder that was opened.
    Returns:
        `fill` for the whole, and the saver for `engine.train`.
    """
    apply(model, cfg)
    shapes = {name: p.shape for name, p in model.named_parameters() if ".lora_" in name}  # a pipeline takes layers away

    def fill_both(write: Callable[[str, Tensor], None]) -> None:
        fill(write)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            # As wide as PEFT's uniform numbers, whatever the layer's width is.
            std = 1 / math.sqrt(3 * shape[1]) if name.endswith("lora_A.weight") else 0.0
            write(name, torch.zeros(shape).normal_(0.0, std, generator=generator))

    return fill_both, Adapter(cfg, base, model.config.tie_word_embeddings)


class Adapter:
    """The saver of a run that trains LoRA (see `checkpoint.WholeModel`): only what is trained, as PEFT writes it."""

    file, trained_only = "adapter_model.safetensors", True

    def __init__(self, cfg: LoraConfig, base: Path, tied: bool):
        self.cfg, self.base, self.tied, self.base_sha256 = cfg, base, tied, checkpoint.weights_digest(base)
        # What a resumed run must share with the one it continues.
        self.identity = {k: v for k, v in asdict(cfg).items() if k != "lora_config"} | {
            "target_modules": list(cfg.target_modules), "modules_to_save": list(cfg.modules_to_save)}  # fmt: skip

    def save(self, folder: Path, model: Llama, tokenizer, about: dict, weights: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(weights)
        if self.tied and f"{EMBEDDING}.weight" in weights:  # PEFT has no tied ones: both get the same values
            weights[f"{HEAD}.weight"] = weights[f"{EMBEDDING}.weight"].clone()
        checkpoint.save_tensors(folder / self.file, {PREFIX + n: t.detach().contiguous() for n, t in weights.items()})
        checkpoint.save_about(folder, tokenizer, about | {"base_sha256": self.base_sha256})
        layers = sorted({name.split(".")[-3] for name in weights if name.endswith(".lora_A.weight")})
        whole = sorted({name.rpartition(".")[0] for name in weights if ".lora_" not in name})
        # Last: a folder that has it has all the rest.
        files.write_json(folder / CONFIG, {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.base), "r": self.cfg.r,
            "lora_alpha": self.cfg.alpha, "lora_dropout": self.cfg.dropout, "bias": "none", "inference_mode": True,
            "target_modules": list(self.cfg.target_modules) or layers, "modules_to_save": whole or None,
        })  # fmt: skip

    def load(self, folder: Path) -> dict[str, Tensor]:
        return _load(folder / self.file, self.tied)


# ---------------------------------------------------------------- files


def attach(model: Llama, fill: Callable, adapter: str | Path, base: Path) -> tuple[Llama, Callable, Path]:
    """Apply a saved adapter, ours or PEFT's, to what `checkpoint.open_model` returned.

    Args:
        adapter: a folder with adapter_config.json, or of a run that was cut short.
        base: the folder that was opened.
    Returns:
        the model, `fill` for it with the adapter's values, and the adapter's folder.
    Raises:
        UserError: made for another base, merged into this one already, damaged, or of a kind that this is not.
    """
    folder = checkpoint.model_folder(adapter, CONFIG)
    path, here = folder / Adapter.file, checkpoint.weights_digest(base)
    noted = checkpoint.load_about(folder).get("base_sha256", here)  # PEFT's own say nothing: names and shapes must fit
    if files.sha256(path) in str(checkpoint.load_about(base).get("merged_sha256")):
        raise UserError(f"{folder}: is merged into {base} already")
    if noted != here:
        raise UserError(f"{folder}: an adapter for the base {str(noted)[:12]}, {base} is {here[:12]}", "--model BASE")
    values, read = _load(path, model.config.tie_word_embeddings), read_config(folder / CONFIG)
    modules = [name.rpartition(".")[0] for name in values]
    if isinstance(read.get("target_modules"), str):  # a pattern: the weights say what it has found
        read["target_modules"] = tuple(m.removesuffix(".lora_A") for m in modules if m.endswith(".lora_A"))
    for word in read.get("modules_to_save", ()):
        if not any(name.endswith(word) for name in [*modules, HEAD * model.config.tie_word_embeddings]):
            raise UserError(f"{path}: {word} is missing", f"modules_to_save of {CONFIG} names it")
    read["modules_to_save"] = tuple(dict.fromkeys(m for m in modules if ".lora_" not in m))
    try:
        apply(model, LoraConfig(**read))
    except ValueError as e:
        raise UserError(f"{folder / CONFIG}: {e}") from None
    except UserError as e:
        raise UserError(f"{folder}: {e}") from None
    checkpoint.check_tensors(path, values, {n: p for n, p in model.named_parameters() if p.requires_grad})

    def fill_both(write: Callable[[str, Tensor], None]) -> None:
        fill(write)
        for name, t in values.items():
            write(name, t)

    return model, fill_both, folder


def base_of(adapter: str | Path) -> str:
    """The base that an adapter names."""
    path = checkpoint.model_folder(adapter, CONFIG) / CONFIG
    name = checkpoint.read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise UserError(f"{path}: its base {name!r} is not here", "--model BASE")
    return name


def _load(path: Path, tied: bool) -> dict[str, Tensor]:
    """An adapter's tensors by our names."""
    values = {name.removeprefix(PREFIX): t for name, t in checkpoint.load_tensors(path).items()}
    if tied and (f"{HEAD}.weight" in values or f"{EMBEDDING}.weight" in values):
        head, embedding = values.pop(f"{HEAD}.weight", None), values.get(f"{EMBEDDING}.weight")
        if head is None or embedding is None or not torch.equal(head, embedding):
            raise UserError(f"{path}: embedding and head differ, in its base they are one matrix")
    return values


# Names in the JSON files of other projects, besides our own.
NAMES = {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target_modules": "target_modules"}
# What does not change the numbers; every other key of PEFT's must be off.
HARMLESS = {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
            "megatron_core", "qalora_group_size", "ensure_weight_tying"}  # fmt: skip
# PEFT's other ways to begin change the base's weights as well.
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def read_config(path: Path) -> dict:
    """Fields of LoraConfig from PEFT's adapter_config.json or another project's JSON file.

    Raises:
        UserError: a key or value that we do not know or cannot do.
    """
    ours = {field.name for field in fields(LoraConfig)} - {"lora_config"}
    found = {}
    for key, value in checkpoint.read_json(path).items():
        name = NAMES.get(key, key)
        texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
        fits = {"r": type(value) is int, "alpha": type(value) in (int, float), "dropout": type(value) in (int, float),
                "target_modules": texts or isinstance(value, str | None), "modules_to_save": texts or value is None,
                "peft_type": value == "LORA", "init_lora_weights": value in BEGINNINGS}  # fmt: skip
        if not fits.get(name, key in HARMLESS or value in (None, False, {}, [], "none")):
            raise UserError(f"{path}: {key} = {str(value)[:60]!r} is not supported")
        if name in ours:
            if name in found:
                raise UserError(f"{path}: {name} is given twice")
            found[name] = tuple(value) if texts else () if value is None else value
    if not found.get("r") or not found.get("alpha"):
        raise UserError(f"{path}: r and alpha must be there and not 0")
    return found

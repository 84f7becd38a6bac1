"""LoRA: a model's own weights stay as they are, and a product of two narrow matrices beside each of them is trained.

In:  a model, on the meta device or not, and LoraConfig. Out: the same model with y = W x + alpha / r * B A x where it
had y = W x; adapters as files in PEFT's format; or a plain model again, with the products added to its weights.
QLoRA: W is packed while A and B are trained. The adapter's file is the same, and it is used, sampled from and merged
with the base as it is on disk, as with PEFT.
Knows nothing of data, losses or ranks: frozen weights have requires_grad False, and that is all the others see.

Shapes:  A (r, in), B (out, r), W (out, in)
Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import files, hf_folder
from core.checkpoint import WholeModel
from core.config import Range, Section
from core.errors import UserError
from core.hf_config import family_of
from extras.finetune import nf4
from model import Llama, ModelConfig

CONFIG, PREFIX = "adapter_config.json", "base_model.model."  # of PEFT: a file, and what its names have before ours
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
QUANTIZING = ("quantize", "double_quant")  # of LoraConfig: what adapters' own files do not say


@dataclass(frozen=True)
class LoraConfig(Section):
    r: int = 0  # rank of what is added to a matrix; 0: no LoRA, all weights are trained
    alpha: Annotated[float, Range(least=0)] = 0.0  # what is added is scaled by alpha / r; 0: twice r
    # Share of the inputs of A that are set to zero while training.
    dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    target_modules: tuple[str, ...] = ()  # linear layers, by the ends of their names; none: all of the blocks
    modules_to_save: tuple[str, ...] = ()  # what is trained whole besides: embed_tokens, lm_head, norm ...
    lora_config: str = ""  # a JSON file with lora_r, lora_alpha, lora_dropout, lora_target_modules instead of these
    # nf4 (QLoRA): the blocks' weights that LoRA adapts are kept in 4.5 bits each.
    quantize: Literal["", "nf4"] = ""
    double_quant: bool = False  # nf4 in 4.127 bits: the scales of its blocks in 8 bits, too

    def __post_init__(self):
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.lora_config:
            if given - {*QUANTIZING} != {"lora_config"}:
                raise ValueError("lora_config and the other options of the section: one or the other")
            for name, value in read_config(Path(self.lora_config)).items():
                object.__setattr__(self, name, value)
            if self.target_modules == "all-linear":
                object.__setattr__(self, "target_modules", ())
        if self.r < (1 if given else 0):
            raise ValueError(f"r = {self.r}, must be at least 1 where there is LoRA")
        if not self.alpha:
            object.__setattr__(self, "alpha", 2.0 * self.r)
        super().__post_init__()
        if self.double_quant and not self.quantize:
            raise ValueError("double_quant = True, must go with quantize = nf4")
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules = {self.target_modules!r}, must be a list of names")


class LoraLinear(nn.Linear):
    """A linear layer with W frozen: W x + alpha / r * B A x. Names are those of the plain layer and of PEFT.

    Args:
        pack: W -> a module in its place that computes W x + b; None: W stays.
    """

    def __init__(self, plain: nn.Linear, cfg: LoraConfig, pack: Callable[[Tensor], nn.Module] | None = None):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias, self.scale, self.dropout = plain.weight, plain.bias, cfg.alpha / cfg.r, cfg.dropout
        self.lora_A = nn.Linear(plain.in_features, cfg.r, bias=False, device=plain.weight.device)
        self.lora_B = nn.Linear(cfg.r, plain.out_features, bias=False, device=plain.weight.device)
        self.packed = pack is not None
        if pack is not None:
            del self.weight  # a parameter's name takes no module
            self.weight = pack(plain.weight)

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        plain = self.weight(x, self.bias) if self.packed else super().forward(x)
        return plain + self.scale * self.lora_B(self.lora_A(dropped))  # (..., in) -> (..., out)


# ---------------------------------------------------------------- model -> model


def apply(model: Llama, cfg: LoraConfig, packed: Callable[[Tensor, bool], nn.Module] | None = None) -> Llama:
    """Put LoRA into a model, in place, and freeze all but it and modules_to_save. A and B get no values here.

    Args:
        packed: where cfg.quantize asks for it, (W, double_quant) -> a module in W's place: `nf4.Weight`.
    Raises:
        UserError: a name that the model does not have, r larger than a matrix.
    """
    assert bool(cfg.quantize) == (packed is not None)
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
            raise UserError(
                f"r = {cfg.r} for {name} of {' x '.join(map(str, linear[name].weight.shape))}", f"from 1 to {least}"
            )
        pack = partial(packed, double_quant=cfg.double_quant) if packed and ".layers." in name else None  # not the head
        _replace(model, name, LoraLinear(linear[name], cfg, pack))
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return model


@torch.no_grad()
def merge(model: Llama) -> Llama:
    """Add each product to its weight, in place: a plain model that computes the same.

    Args:
        model: with its base's own weights, as `attach` makes it: what QLoRA packs is for training only.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            assert not layer.packed
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


def tune(base, cfg, changes: dict):
    """LoRA or QLoRA for a run, as the options say.

    Args:
        base: what the run begins with, a Base of assembly/training.py.
        cfg: with sections lora, optim and train.
        changes: what was changed in the base's config before, noted beside the adapter.
    Returns:
        the base with LoRA in its model, first values of A and B behind its weights, and an Adapter as its saver.
    Raises:
        UserError: options that do not go together.
    """
    if base.folder is None:
        raise UserError("LoRA needs a trained model as its base", "--init_from DIR")
    if cfg.optim.optimizer == "muon":  # its updates have full rank, a product's factors do not
        raise UserError('optimizer = "muon" does not go with LoRA', "--optimizer adamw, or configs/lora.toml")
    if cfg.lora.quantize and cfg.train.parallel == "fsdp":
        raise UserError('parallel = "fsdp" does not go with quantize', "--parallel ddp: packed weights are small")
    config = base.model.config
    model = apply(base.model, cfg.lora, nf4.Weight if cfg.lora.quantize else None)
    saver = Adapter(cfg.lora, base.folder, base.identity["base"], config, changes)
    trained, frozen = ([p for p in model.parameters() if p.requires_grad is flag] for flag in (True, False))
    line = (
        f"{'QLoRA' if cfg.lora.quantize else 'LoRA'}: {sum(p.numel() for p in trained):,} parameters are trained, "
        f"{sum(p.numel() * p.element_size() for p in frozen) / 1e6:,.0f} MB are frozen"
    )
    return replace(
        base,
        model=model,
        weights=weights_at_birth(model, base.weights, cfg.train.seed),
        identity=base.identity | {"lora": saver.identity},
        intro=(*base.intro, line),
        saver=saver,
    )


def weights_at_birth(model: Llama, weights: Iterable[tuple[str, Tensor]], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of a model with LoRA: those of its base, packed where they are to be, and the first of A and B.

    Args:
        model: with LoRA applied.
        weights: of the plain model.
        seed: of A's first values; those of B are zero, so that the model begins as its base.
    """
    # Looked up now: a pipeline takes layers away before the weights are read.
    layers = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, LoraLinear) and m.packed}
    shapes = {name: p.shape for name, p in model.named_parameters() if ".lora_" in name}
    return itertools.chain(_packed(layers, weights), _narrow(shapes, seed))


def _packed(layers: dict[str, nn.Module], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights one after another, so that they are never in memory all at once unpacked."""
    for name, values in weights:
        if name in layers:
            yield from ((f"{name}.{part}", t) for part, t in layers[name].pack(values).items())
        else:
            yield name, values


def _narrow(shapes: dict[str, torch.Size], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        # As wide as PEFT's uniform numbers, whatever the layer's width is.
        std = 1 / math.sqrt(3 * shape[1]) if name.endswith("lora_A.weight") else 0.0
        yield name, torch.zeros(shape).normal_(0.0, std, generator=generator)


class Adapter(WholeModel):
    """The saver of a run that trains LoRA: only what is trained, as PEFT writes it."""

    file, trained_only = "adapter_model.safetensors", True

    def __init__(self, cfg: LoraConfig, base: Path, base_sha256: str, config: ModelConfig, changes: dict):
        self.cfg, self.base, self.config, self.changes = cfg, base, config, changes
        self.base_sha256 = base_sha256
        # What a resumed run must share with the one it continues; QLoRA's only with it: runs from before it go on.
        skip = ("lora_config", *(QUANTIZING if not cfg.quantize else ()))
        self.identity = {k: v for k, v in asdict(cfg).items() if k not in skip} | {
            "target_modules": list(cfg.target_modules),
            "modules_to_save": list(cfg.modules_to_save),
        }

    def save(self, folder: Path, model: Llama, tokenizer, about: dict, weights: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(weights)
        if self.config.tie_word_embeddings and f"{EMBEDDING}.weight" in weights:
            weights[f"{HEAD}.weight"] = weights[f"{EMBEDDING}.weight"].clone()  # PEFT has no tied ones: the same values
        weights = {family_of(self.config).theirs(name): t for name, t in weights.items()}
        hf_folder.save_tensors(folder / self.file, {PREFIX + n: t.detach().contiguous() for n, t in weights.items()})
        hf_folder.save_about(
            folder,
            tokenizer,
            about | {"base_sha256": self.base_sha256} | ({"base_changes": self.changes} if self.changes else {}),
        )
        targets = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
        if not self.cfg.target_modules:
            targets = sorted({name.rpartition(".")[2] for name in targets})
        elif _has_llama_names(self.config):  # as the user said it; another family has other names
            targets = list(self.cfg.target_modules)
        whole = sorted({name.rpartition(".")[0] for name in weights if ".lora_" not in name})
        # Last: a folder that has it has all the rest.
        files.write_json(
            folder / CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(self.base),
                "r": self.cfg.r,
                "lora_alpha": self.cfg.alpha,
                "lora_dropout": self.cfg.dropout,
                "bias": "none",
                "inference_mode": True,
                "target_modules": targets,
                "modules_to_save": whole or None,
            },
        )

    def load(self, folder: Path, model: Llama) -> dict[str, Tensor]:
        return _load(folder / self.file, self.config)


# ---------------------------------------------------------------- files


def attach(opened: hf_folder.Opened, folder: Path) -> tuple[Llama, Iterator[tuple[str, Tensor]]]:
    """Apply a saved adapter, ours or PEFT's, to a base: its weights are never packed.

    Args:
        opened: the base.
        folder: the adapter's, see `find_adapter`.
    Returns:
        the model, and its weights with the adapter's behind them.
    Raises:
        UserError: made for another base, merged into this one already, damaged, or of a kind that this is not.
    """
    model, base = opened.model, opened.folder
    path = folder / Adapter.file
    # PEFT's own say nothing of the base: names and shapes must fit.
    noted = hf_folder.load_about(folder).get("base_sha256", opened.digest)
    if files.sha256(path) in str(hf_folder.load_about(base).get("merged_sha256")):
        raise UserError(f"{folder}: is merged into {base} already")
    if noted != opened.digest:
        made = f"an adapter for the base {str(noted)[:12]}, {base} is {opened.digest[:12]}"
        raise UserError(f"{folder}: {made}", "--model BASE")
    values, read = _load(path, model.config), read_config(folder / CONFIG)
    modules = [name.rpartition(".")[0] for name in values]
    # A pattern, or names of another family: the weights say what was found.
    if isinstance(read.get("target_modules"), str) or not _has_llama_names(model.config):
        read["target_modules"] = tuple(m.removesuffix(".lora_A") for m in modules if m.endswith(".lora_A"))
    for word in read.get("modules_to_save", ()):
        theirs = [family_of(model.config).theirs(f"{name}.").rstrip(".") for name in [*modules, HEAD]]
        if not any(name.endswith(word) for name in theirs[: len(modules) + model.config.tie_word_embeddings]):
            raise UserError(f"{path}: {word} is missing", f"modules_to_save of {CONFIG} names it")
    read["modules_to_save"] = tuple(dict.fromkeys(m for m in modules if ".lora_" not in m))
    try:
        apply(model, LoraConfig(**read))
    except ValueError as e:
        raise UserError(f"{folder / CONFIG}: {e}") from None
    except UserError as e:
        raise UserError(f"{folder}: {e}") from None
    hf_folder.check_tensors(path, values, {n: p for n, p in model.named_parameters() if p.requires_grad})
    return model, itertools.chain(opened.weights, values.items())


def find_adapter(path: str | Path) -> Path:
    """The adapter's folder: the path itself, or the newest whole checkpoint of a run that was cut short."""
    return hf_folder.model_folder(path, CONFIG)


def _has_llama_names(config: ModelConfig) -> bool:
    """Whether a family's stored names are ours."""
    return family_of(config).theirs("model.layers.0.self_attn.") == "model.layers.0.self_attn."


def base_of(adapter: str | Path) -> str:
    """The base that an adapter names."""
    path = find_adapter(adapter) / CONFIG
    name = files.read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise UserError(f"{path}: its base {name!r} is not here", "--model BASE")
    return name


def _load(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """An adapter's tensors by our names."""
    ours = family_of(config).ours
    values = {ours(name.removeprefix(PREFIX)): t for name, t in hf_folder.load_tensors(path).items()}
    if config.tie_word_embeddings and (f"{HEAD}.weight" in values or f"{EMBEDDING}.weight" in values):
        head, embedding = values.pop(f"{HEAD}.weight", None), values.get(f"{EMBEDDING}.weight")
        if head is None or embedding is None or not torch.equal(head, embedding):
            raise UserError(f"{path}: embedding and head differ, in its base they are one matrix")
    return values


# Names in the JSON files of other projects, besides our own.
NAMES = {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target_modules": "target_modules"}
# What does not change the numbers; every other key of PEFT's must be off.
HARMLESS = {
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
}
# PEFT's other ways to begin change the base's weights as well.
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def read_config(path: Path) -> dict:
    """Fields of LoraConfig from PEFT's adapter_config.json or another project's JSON file.

    Raises:
        UserError: a key or value that we do not know or cannot do.
    """
    ours = {field.name for field in fields(LoraConfig)} - {"lora_config", *QUANTIZING}
    found = {}
    for key, value in files.read_json(path).items():
        name = NAMES.get(key, key)
        texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
        fits = {
            "r": type(value) is int,
            "alpha": type(value) in (int, float),
            "dropout": type(value) in (int, float),
            "target_modules": texts or isinstance(value, str | None),
            "modules_to_save": texts or value is None,
            "peft_type": value == "LORA",
            "init_lora_weights": value in BEGINNINGS,
        }
        if not fits.get(name, key in HARMLESS or value in (None, False, {}, [], "none")):
            raise UserError(f"{path}: {key} = {str(value)[:60]!r} is not supported")
        if name in ours:
            if name in found:
                raise UserError(f"{path}: {name} is given twice")
            found[name] = tuple(value) if texts else () if value is None else value
    if not found.get("r") or not found.get("alpha"):
        raise UserError(f"{path}: r and alpha must be there and not 0")
    return found

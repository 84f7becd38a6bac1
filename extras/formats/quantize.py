"""Linear layers with weights of 8 or 4 bits, for generation: a model in, the same model out.

In:  a model with weights in fp32 or bf16, or a folder that `save` wrote. Out: the same model, in bf16 but for these
weights; folders in the format compressed-tensors, which transformers and vLLM read.
Knows nothing of training: nothing here has a gradient. (QLoRA's four bits, with one, are extras/finetune/nf4.py.)

One new token reads every weight once and computes little: it is as fast as memory is, and half or a quarter of the
bytes is half or a quarter of the time.

Shapes:  N outputs, K inputs, G inputs in a group, M rows of x
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import files, hf_folder
from core.config import Section
from core.errors import UserError
from core.hf_config import family_of
from model import Llama, ModelConfig
from tokenizer import load as load_tokenizer

KINDS = ("none", "int8", "int4")
GROUP = 32  # inputs that share a scale in int4: half a bit more for each weight, and as fast as 128
# Rows of x up to which torch's product of int8 is the fastest here. Milliseconds of one core with AVX512-BF16, for the
# 35,207 x 768 of a head and 1, 4, 8, 16 rows: 4.9, 6.3, 13, 23; with bf16 weights made PIECE by PIECE 8.4, 8.2, 11, 10,
# made all at once 78 to 94; one row, compiled, 3.8. int4: 2.1, 3.3, 6.1, 11; bf16 layers: 7.5, 7.5, 9.9, 9.7. With x
# in fp32 both products are 6 and 30 times as slow.
FEW_ROWS = 4
PIECE = 1 << 21  # weights: as bf16 they stay in the cache until they are multiplied


@dataclass(frozen=True)
class QuantizeConfig(Section):
    model: str = "out/sft"  # a model folder
    type: Literal["int8", "int4"] = "int8"
    output: str = ""  # the folder to make, for sample.py, serve.py, transformers and vLLM
    overwrite: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.output:
            raise ValueError("output must be given")


def export(cfg: QuantizeConfig, open_model: Callable[..., hf_folder.Opened]) -> None:
    """What `python export.py quantize` does: a model folder with rounded weights, in compressed-tensors' format.

    Args:
        open_model: folder -> what is in it, whatever its family.
    """
    folder, path = hf_folder.model_folder(cfg.model), Path(cfg.output)
    files.check_free([path], cfg.overwrite)
    tokenizer = load_tokenizer(folder)
    opened = open_model(folder)
    model = build(opened.model, opened.weights, cfg.type)
    hf_folder.check_tokenizer(folder, model, tokenizer)
    for note in save(path, model, cfg.type, tokenizer, hf_folder.load_about(folder)):
        print(f"note: {note}: sample.py and serve.py read this folder, transformers and vLLM will not", file=sys.stderr)
    size = (path / "model.safetensors").stat().st_size
    print(f"{path}: {cfg.type}, {size:,} bytes; python sample.py --model {path}")


# ---------------------------------------------------------------- layers


class Int8Linear(nn.Module):
    """y = x W^T with W = codes * scale, a scale for each output (symmetric).

    Args:
        weight: (N, K), what is rounded; or codes as int8 where `scale` (N, 1) is given.
        bias: (N,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if scale is None:
            weight = weight.float()
            scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
            scale = torch.where(scale == 0, 1.0, scale)  # a row of zeros
            weight = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        # torch's product wants a multiple of 32 inputs: with others it gives infinity or ends the process.
        self.register_buffer("codes", F.pad(weight, (0, -self.in_features % 32)))
        self.register_buffer("scale", scale.squeeze(1).bfloat16())
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    def weight(self) -> Tensor:
        """(N, K) bf16: each product of a code and a scale rounded once."""
        return self.codes[:, : self.in_features].to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        # (M, K), as wide as the codes.
        flat = F.pad(x.reshape(-1, self.in_features), (0, self.codes.shape[1] - self.in_features))
        if len(flat) == 1 and torch.compiler.is_compiling():  # becomes one loop over the codes, 1.5 times as fast
            y = ((self.codes * flat.float()).sum(dim=1) * self.scale.float()).to(x.dtype)[None]  # (1, N)
        elif len(flat) <= FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            y = torch._weight_int8pack_mm(flat, self.codes, self.scale)  # (M, N)
        else:
            rows = max(1, PIECE // flat.shape[1])
            pieces = zip(self.codes.split(rows), self.scale.split(rows))
            y = torch.cat([F.linear(flat, codes.to(x.dtype)) * scale.to(x.dtype) for codes, scale in pieces], dim=1)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    @staticmethod
    def stored(n: int, k: int) -> dict[str, Tensor]:
        """What a file has of an (N, K) weight: tensors on the meta device."""
        return _stored(weight_packed=(n, -(-k // 4), torch.int32), weight_scale=(n, 1, torch.bfloat16))

    def parts(self) -> dict[str, Tensor]:
        """The same with values."""
        return {
            "weight_packed": pack(self.codes[:, : self.in_features], 8),
            "weight_scale": self.scale[:, None],
            "weight_shape": torch.tensor([self.out_features, self.in_features]),
        }


class Int4Linear(nn.Module):
    """The same with codes from -8 to 7, and a scale for each GROUP of inputs of an output (symmetric, too).

    Args:
        weight: (N, K), what is rounded; or codes as int8 where `scale` (N, K / GROUP) is given.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Whole groups, and a multiple of 16 outputs, as torch's product wants them; what is added is zeros.
        weight = F.pad(weight, (0, -self.in_features % GROUP, 0, -self.out_features % 16))
        if scale is None:
            weight, scale = rounded(weight.float().view(len(weight), -1, GROUP))
            weight = weight.flatten(1)
        else:
            scale = F.pad(scale, (0, 0, 0, -self.out_features % 16), value=1.0)  # as `rounded` says of zeros
        # torch's product takes codes * scale + shift; all shifts are 0.
        both = torch.stack([scale.bfloat16(), torch.zeros_like(scale, dtype=torch.bfloat16)], dim=-1)
        self.register_buffer("scale_and_shift", both.transpose(0, 1).contiguous())  # (K / G, N, 2)
        self.register_buffer("bias", None if bias is None else bias.bfloat16())
        self.on_cpu = weight.device.type == "cpu" and hasattr(torch, "_convert_weight_to_int4pack_for_cpu")
        packed = torch._convert_weight_to_int4pack_for_cpu(weight.int() + 8, 1) if self.on_cpu else pack(weight, 4)
        self.register_buffer("codes", packed)  # half a byte each

    def weight(self) -> Tensor:
        """(N, K) bf16: each product of a code and a scale rounded once."""
        return self._unpacked(self.scale_and_shift)

    def _unpacked(self, scale_and_shift: Tensor) -> Tensor:
        if self.on_cpu:  # the packing is torch's own: its product with the identity tells
            eye = torch.eye(len(scale_and_shift) * GROUP, dtype=torch.bfloat16)
            whole = torch._weight_int4pack_mm_for_cpu(eye, self.codes, GROUP, scale_and_shift).T
        else:
            scale = scale_and_shift[..., 0].T  # (N, K / G)
            codes = unpack(self.codes, scale.shape[1] * GROUP, 4).view(len(scale), -1, GROUP)
            whole = (codes.to(scale.dtype) * scale[..., None]).flatten(1)
        return whole[: self.out_features, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)  # (M, K)
        if self.on_cpu:
            padded = F.pad(flat.bfloat16(), (0, -self.in_features % GROUP))
            y = torch._weight_int4pack_mm_for_cpu(padded, self.codes, GROUP, self.scale_and_shift)
            y = y[:, : self.out_features].to(x.dtype)
        else:
            y = F.linear(flat, self.weight().to(x.dtype))
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    @staticmethod
    def stored(n: int, k: int) -> dict[str, Tensor]:
        """What a file has of an (N, K) weight: tensors on the meta device."""
        return _stored(weight_packed=(n, -(-k // 8), torch.int32), weight_scale=(n, -(-k // GROUP), torch.bfloat16))

    def parts(self) -> dict[str, Tensor]:
        """The same with values."""
        ones = torch.stack([torch.ones_like(self.scale_and_shift[..., 0]), self.scale_and_shift[..., 1]], dim=-1)
        return {
            "weight_packed": pack(self._unpacked(ones).to(torch.int8), 4),
            "weight_scale": self.scale_and_shift[:, : self.out_features, 0].T,
            "weight_shape": torch.tensor([self.out_features, self.in_features]),
        }


BITS, LAYERS = {"int8": 8, "int4": 4}, {"int8": Int8Linear, "int4": Int4Linear}


def rounded(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -8 to 7 and scales of groups of weights, with the least squared error of a few scales each.

    Args:
        groups: (N, K / G, G) fp32.
    Returns:
        codes (N, K / G, G) int8, scales (N, K / G) that bf16 holds exactly.
    """
    # The number farthest from zero becomes -8, whatever its sign (as in ggml's q4_0), or is cut off a little.
    far = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # (N, K / G, 1)
    best_codes, best_scale = torch.zeros_like(groups, dtype=torch.int8), torch.ones_like(far)
    best_error = torch.full_like(far, float("inf"))
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        scale = (far * (share / -8)).bfloat16().float()
        scale = torch.where(scale == 0, 1.0, scale)
        codes = (groups / scale).round().clamp(-8, 7)
        error = (codes * scale - groups).square().sum(dim=2, keepdim=True)
        better = error < best_error
        best_codes = torch.where(better, codes.to(torch.int8), best_codes)
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_codes, best_scale.squeeze(2)


# ---------------------------------------------------------------- model -> model


def quantize(model: Llama, kind: str) -> Llama:
    """Replace the linear layers of blocks and head, where they stand; all else becomes bf16.

    Args:
        kind: int8 or int4.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A layer is replaced, and the memory of its weight is free, before the next one.
    weights = (parameters.popitem() for _ in range(len(parameters)))
    return build(model, weights, kind, None)


@torch.no_grad()
def build(
    model: Llama, weights: Iterable[tuple[str, Tensor]], kind: str, device: torch.device | str | None = "cpu"
) -> Llama:
    """`hf_folder.build` and `quantize` in one: each weight is rounded as it is read, so that no fp32 copy of all
    exists.

    Args:
        model: on the meta device.
        weights: (name, values) of each of its weights, to be read once.
        kind: int8 or int4.
        device: None: where the values are.
    """
    linear, rest = _linear(model), {}
    for name, values in weights:
        layer = name.removesuffix(".weight")
        if layer in linear:
            _put(model, layer, LAYERS[kind](values.to(device=device), None))
        else:
            rest[name] = values.detach().to(device=device, dtype=torch.bfloat16, copy=True)
    return _finished(model, linear, rest)


def _linear(model: Llama) -> dict[str, torch.Size]:
    """Names and shapes of the weights that are rounded."""
    found = {name: m.weight.shape for name, m in model.named_modules() if type(m) is nn.Linear}
    assert found, "nothing to round: `for_decoding` and LoRA's products come after, or not at all"
    return found


def _put(model: Llama, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _finished(model: Llama, linear: dict[str, torch.Size], rest: dict[str, Tensor]) -> Llama:
    """Biases to their layers, all else where it belongs. A head that was tied has its own weights now."""
    for name in linear:
        model.get_submodule(name).bias = rest.pop(f"{name}.bias", None)
    model.load_state_dict(rest | dict(model.named_buffers()), assign=True)
    model.config = replace(model.config, tie_word_embeddings=False)
    return model.requires_grad_(False)


# ---------------------------------------------------------------- files


def pack(codes: Tensor, bits: int) -> Tensor:
    """(R, C) int8 -> (R, C * bits / 32) int32: made unsigned, the first in the lowest bits; rows end with zeros.

    Source: compressed-tensors' pack_to_int32
    """
    each = 32 // bits
    unsigned = F.pad((codes.int() + (1 << bits - 1)).to(torch.uint8), (0, -codes.shape[1] % each))
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def unpack(words: Tensor, columns: int, bits: int) -> Tensor:
    """(R, C) int8 from what `pack` made of it."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=-1).flatten(1)
    return (unsigned[:, :columns].int() - (1 << bits - 1)).to(torch.int8)


def _stored(**parts: tuple) -> dict[str, Tensor]:
    made = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (*shape, dtype) in parts.items()}
    return made | {"weight_shape": torch.empty(2, dtype=torch.int64, device="meta")}


def tensors(model: Llama) -> dict[str, Tensor]:
    """All of a quantised model by our names, each rounded weight as its parts in compressed-tensors' format."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, tuple(LAYERS.values()))}
    rest = {name: p.detach() for name, p in model.named_parameters()}
    for name, layer in packed.items():
        rest |= {f"{name}.{part}": t for part, t in layer.parts().items()}
        rest |= {} if layer.bias is None else {f"{name}.bias": layer.bias}
    return {name: t.cpu().contiguous() for name, t in rest.items()}


def quantization_config(kind: str) -> dict:
    """What config.json says of int8 or int4 weights.

    "pack-quantized" for both: vLLM refuses "int-quantized", the other format for int8, where activations are not int8.
    """
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    if kind == "int4":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
        "kv_cache_scheme": None,
    }


def kind_of(folder: str | Path) -> str:
    """What the weights of a model folder are: int8, int4, or none of these.

    Raises:
        UserError: quantised in another way.
    """
    path = Path(folder) / "config.json"
    found = files.read_json(path).get("quantization_config")
    for kind in LAYERS:
        if found and _says(found, quantization_config(kind)):
            return kind
    if found is not None:
        raise UserError(
            f"{path}: weights quantised in this way are not read here",
            f"pack-quantized int8, or int4 in groups of {GROUP}, of all linear layers is",
        )
    return "none"


def _says(found, wanted) -> bool:
    """Whether JSON has all of this; others write more, of what is off."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_says(found.get(key), value) for key, value in wanted.items())
    return found == wanted and type(found) is type(wanted)


def save(folder: Path, model: Llama, kind: str, tokenizer, about: dict) -> list[str]:
    """Write a quantised model as a Hugging Face folder; arguments as `hf_folder.save_model`.

    Returns:
        reasons why transformers and vLLM will not read it (`load` will), for the user.
    """
    hf_folder.save_model(folder, model, tokenizer, about, tensors(model))
    path = folder / "config.json"
    own = {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "quantization_config": quantization_config(kind)}
    files.write_json(path, files.read_json(path) | own)
    ragged = [
        f"{name} has {m.in_features} inputs, no multiple of {GROUP}"
        for name, m in model.named_modules()
        if isinstance(m, Int4Linear) and m.in_features % GROUP
    ]
    # Its class FalconLinear has no place for packed weights (transformers 5).
    return ragged[:1] + ["transformers quantises no Falcon"] * (files.read_json(path)["model_type"] == "falcon")


def load(folder: Path, config: ModelConfig, device: torch.device | str = "cpu") -> Llama:
    """The model of a folder whose `kind_of` is int8 or int4, with the very weights that were saved.

    Args:
        config: what the folder's config.json says, checked.
    Raises:
        UserError: damaged files, weights that do not fit the config.
    """
    path, kind, family = folder / "model.safetensors", kind_of(folder), family_of(config)
    with torch.device("meta"):
        model = family.model(config)
    linear = _linear(model)
    wanted = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in linear}
    for name, shape in linear.items():
        wanted |= {f"{name}.{part}": t for part, t in LAYERS[kind].stored(*shape).items()}
    found = {ours: t for name, t in hf_folder.load_tensors(path).items() if (ours := family.ours(name))}
    _check(path, found, wanted)
    for name, shape in linear.items():
        parts = {part: found.pop(f"{name}.{part}").to(device) for part in LAYERS[kind].stored(*shape)}
        if parts["weight_shape"].tolist() != list(shape):
            raise UserError(f"{path}: {name}.weight_shape is {parts['weight_shape'].tolist()}, expected {[*shape]}")
        codes = unpack(parts["weight_packed"], shape[1], BITS[kind])
        _put(model, name, LAYERS[kind](codes, None, parts["weight_scale"]))
    return _finished(model, linear, {name: t.to(device=device, dtype=torch.bfloat16) for name, t in found.items()})


def _check(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse missing, unexpected, misshapen or non-finite tensors."""
    whole = {name for name, t in wanted.items() if not t.is_floating_point()}  # these are checked here
    wrong = [
        name
        for name in whole & found.keys()
        if (found[name].shape, found[name].dtype) != (wanted[name].shape, wanted[name].dtype)
    ]
    if missing := sorted(whole - found.keys()):
        raise UserError(f"{path}: {missing[0]} is missing")
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{path}: {name} is {found[name].dtype} {tuple(found[name].shape)}, expected "
            f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
        )
    hf_folder.check_tensors(
        path, {n: t for n, t in found.items() if n not in whole}, {n: t for n, t in wanted.items() if n not in whole}
    )

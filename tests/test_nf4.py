"""Promises of NF4 and QLoRA: the numbers of naive loops and of bitsandbytes, a packed base that trains as its unpacked one."""

import json
import statistics
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_lora import ADAPTER, launch, logits, place, refused, train, with_adapter  # noqa: F401
from test_trainer import metrics

from assembly.models import load_model, open_model
from core import hf_folder
from core.data import Batch
from core.device import num_parameters
from core.distributed import Ranks
from core.memory import save_memory
from core.optim import OptimConfig, make_optimizers
from core.parallel import Strategy
from extras.estimate import memory
from extras.finetune import lora, nf4
from extras.finetune.lora import LoraConfig, LoraLinear
from model import Llama, ModelConfig
from trainer import TrainConfig, next_token_loss

QLORA = ("--quantize", "nf4")
SHAPES = [(64, 64), (100, 77), (3, 5), (1, 1), (256, 300)]
both_ways = pytest.mark.parametrize("double_quant", [False, True])


def bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        return pytest.importorskip("bitsandbytes.functional")


def weight(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001


def there_and_back(w: torch.Tensor, double_quant: bool) -> torch.Tensor:
    return nf4.dequantize(nf4.quantize(w, double_quant), w.shape)


def naive(values: list[float], levels: list[float], size: int) -> tuple[list[int], list[float]]:
    """The nearest level of each number, and each block's largest one, by loops."""
    codes, scales = [], []
    for first in range(0, len(values), size):
        block = values[first : first + size]
        scales.append(max(abs(v) for v in block))
        codes += [min(range(len(levels)), key=lambda k: abs(levels[k] - v / (scales[-1] or 1.0))) for v in block]
    return codes, scales


# ---------------------------------------------------------------- numbers


def test_the_levels_are_quantiles_of_the_normal_distribution():
    normal, outermost = statistics.NormalDist(), (1 - 1 / 32 + 1 - 1 / 30) / 2
    upper = [normal.inv_cdf(0.5 + (outermost - 0.5) * k / 8) for k in range(9)]
    lower = [normal.inv_cdf(0.5 - (outermost - 0.5) * k / 7) for k in range(7, 0, -1)]
    assert [v / upper[-1] for v in lower + upper] == pytest.approx(nf4.NF4.tolist(), abs=1e-6)
    assert nf4.NF4[7] == 0 and nf4.NF4[0] == -1 and nf4.NF4[15] == 1


def test_the_levels_are_those_of_bitsandbytes():
    theirs = bitsandbytes()
    assert (theirs.get_4bit_type("nf4", device="cpu") - nf4.NF4).abs().max() <= 1e-6
    assert (theirs.create_dynamic_map() - nf4.TREE).abs().max() <= 1e-6


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_unpacking_are_those_of_naive_loops(shape, double_quant):
    w = weight(shape)
    w[0] = 0.0 if len(w) > 1 else w[0]  # with a block of zeros
    numbers = w.flatten().tolist()
    codes, scales = naive(numbers, nf4.NF4.tolist(), 64)
    parts = nf4.quantize(w, double_quant)
    halves = [half for byte in parts[0].flatten().tolist() for half in (byte >> 4, byte & 15)]
    assert halves[: len(codes)] == codes
    if double_quant:
        mean = sum(scales) / len(scales)
        eights, large = naive([s - mean for s in scales], nf4.TREE.tolist(), 256)
        scales = [nf4.TREE[code].item() * large[k // 256] + mean for k, code in enumerate(eights)]
    expected = [nf4.NF4[code].item() * scales[k // 64] for k, code in enumerate(codes)]
    assert nf4.dequantize(parts, w.shape).flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_bitsandbytes(shape, double_quant):
    theirs, w = bitsandbytes(), weight(shape, 1)
    packed, about = theirs.quantize_4bit(w, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    unpacked, ours = theirs.dequantize_4bit(packed, about), there_and_back(w, double_quant)
    same = ((unpacked - ours).abs() <= 1e-6 * w.abs().max()).float().mean()
    # Its search among 256 levels ends at times beside the nearest, where a scale lies between two: one block in a hundred.
    assert same >= 0.98 if double_quant else same == 1
    assert (ours - w).square().mean().item() == pytest.approx(
        (unpacked - w).square().mean().item(), rel=1e-4 if double_quant else 1e-6
    )
    if shape[0] > 1:
        assert 0.05 < (ours - w).norm() / w.norm() < 0.12


@pytest.mark.parametrize("double_quant, bits", [(False, 4.5), (True, 4 + 8 / 64 + 32 / 64 / 256)])
def test_a_weight_takes_so_many_bits(double_quant, bits):
    parts = nf4.quantize(torch.zeros(256, 256), double_quant)
    assert 8 * sum(t.nbytes for t in parts) == pytest.approx(256 * 256 * bits, abs=32)  # and one mean


@both_ways
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.arange(24.0) / 10])
def test_a_packed_layer_computes_and_learns_as_one_with_the_unpacked_weight(bias, dtype, double_quant):
    w = weight((24, 40))
    layer, unpacked = nf4.Weight(w, double_quant), there_and_back(w, double_quant)
    x, g, results = torch.randn(2, 7, 40), torch.randn(2, 7, 24), []
    for way in (lambda x: layer(x, bias), lambda x: F.linear(x, unpacked, bias)):
        mine = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = way(mine)
        y.backward(g.to(y.dtype))
        results.append((y, mine.grad))
    (y, dx), (expected, wanted) = results
    assert y.dtype == expected.dtype == (dtype or torch.float32) and torch.equal(y, expected)
    assert dx.dtype == torch.float32 and torch.equal(dx, wanted)


def test_nothing_larger_than_the_packed_weight_waits_for_the_backward_pass():
    layer, kept = nf4.Weight(weight((256, 256)), double_quant=False), []
    x = torch.randn(8, 256, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(x, None)
    assert 0 < sum(kept) <= 256 * 256 * 4.5 / 8


# ---------------------------------------------------------------- a model


def begun(base: str = "base", cfg: LoraConfig = LoraConfig(r=4, quantize="nf4")) -> Llama:  # noqa: B008
    """As sft.py begins it, on one rank."""
    opened = open_model(base)
    model = lora.apply(opened.model, cfg, nf4.Weight if cfg.quantize else None)
    weights = lora.weights_at_birth(model, opened.weights, 1)
    return Strategy(model, weights, TrainConfig(), Ranks(0, 1, torch.device("cpu")), torch.float32).model


def unpacked(base: str, double_quant: bool = False) -> Llama:
    """A plain model whose blocks' matrices have been packed and unpacked."""
    model = load_model(base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".layers." in name and p.ndim == 2:
                p.copy_(there_and_back(p, double_quant))
    return model


def rows() -> Batch:
    ids = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], None, [])


@both_ways
@pytest.mark.parametrize("base, targets", [("base", ()), ("untied", ("lm_head", "q_proj"))])
def test_training_begins_at_the_loss_of_the_packed_and_unpacked_base(place, base, targets, double_quant):  # noqa: F811
    model = begun(base, LoraConfig(r=4, quantize="nf4", double_quant=double_quant, target_modules=targets))
    plain, expected = load_model(base), unpacked(base, double_quant)
    packed = [name for name, m in model.named_modules() if isinstance(m, LoraLinear) and m.packed]
    assert len(packed) == (2 if targets else 14) and not any("lm_head" in name for name in packed)
    for name, p in expected.named_parameters():
        if name.removesuffix(".weight") not in packed:
            p.data = plain.get_parameter(name).data
            assert torch.equal(model.get_parameter(name), p), f"{name} stays as it is"
    losses = [next_token_loss(m, rows()).item() for m in (model, expected, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - losses[2]) > 1e-4 * losses[2]


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_lora_beside_the_unpacked_base_and_change_a_and_b_only(place, kind, dtype):  # noqa: F811
    hf_folder.save_model(place / "unpacked", unpacked("base"), None, {})
    found = []
    for model in (begun("base"), begun("unpacked", LoraConfig(r=4))):
        before = {n: p.clone() for n, p in save_memory(model, kind).named_parameters()}
        optimizers, losses = make_optimizers(model.train(), OptimConfig(lr=1e-2)), []
        for _ in range(4):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses.append(next_token_loss(model, rows()))
            losses[-1].backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if ".lora_" in n} and len(changed) == 28
        assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
        found.append([loss.item() for loss in losses])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][-1] < found[0][0]


def test_the_whole_base_never_stands_in_memory():
    sizes = ModelConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4
    )
    with torch.device("meta"):
        model, plain = Llama(sizes), Llama(sizes)
    lora.apply(model, LoraConfig(r=2, quantize="nf4"), nf4.Weight)
    weights = lora.weights_at_birth(model, plain.weights_at_birth(0), 0)
    with memory._Live() as live:
        Strategy(model, weights, TrainConfig(), Ranks(0, 1, torch.device("cpu")), torch.float32)
    whole, largest = 4 * num_parameters(plain)[0], 4 * 128 * 256
    held = sum(p.nbytes for p in model.parameters())
    assert held < 0.25 * whole and live.now == pytest.approx(held, rel=0.05)
    assert live.peak < held + 6 * largest < 0.4 * whole


# ---------------------------------------------------------------- training with sft.py


def test_the_adapter_is_that_of_lora_and_speaks_beside_the_base_as_it_is_on_disk(place):  # noqa: F811
    train("--out_dir", "lora")
    out = train(*QLORA, "--out_dir", "qlora")
    a, b = load_file(place / "lora" / ADAPTER), load_file(place / "qlora" / ADAPTER)
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    one, other = (json.loads((place / name / "adapter_config.json").read_text()) for name in ("lora", "qlora"))
    assert one == other
    assert json.loads((out / "run.json").read_text())["options"]["lora"]["quantize"] == "nf4"
    assert metrics(out)[-1] < metrics(out)[0] and metrics(out)[0] != metrics(Path("lora"))[0]
    plain = load_model("base").eval()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            part = "base_model.model." + name.removesuffix("weight")
            if f"{part}lora_A.weight" in b:
                p += 2 * b[f"{part}lora_B.weight"] @ b[f"{part}lora_A.weight"]
    assert (logits(with_adapter(out)) - logits(plain)).abs().max() <= 1e-5 * logits(plain).abs().max()


def test_a_run_goes_on_only_with_the_same_way_of_packing(place):  # noqa: F811
    train(*QLORA, "--max_steps", "2")
    train(*QLORA, "--max_steps", "3")
    refused(lambda: train("--max_steps", "4"), "cannot be resumed", "lora was")
    refused(lambda: train(*QLORA, "--double_quant", "true", "--max_steps", "4"), "cannot be resumed", "lora was")


def test_the_identity_of_lora_alone_is_what_it_was_before_there_was_qlora(place):  # noqa: F811
    assert lora.Adapter(LoraConfig(r=4), place / "base", "", ModelConfig(), {}).identity == {
        "r": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": [],
        "modules_to_save": [],
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    "way",
    [
        [],
        ["--gradient_checkpointing", "full"],
        ["--parallel", "zero1"],
        ["--parallel", "pipeline", "--init_from", "untied"],
    ],
)
def test_two_ranks_have_the_losses_of_one_process_and_its_adapter(place, way):  # noqa: F811
    words = [*QLORA, "--val", "chats.jsonl"]
    one = train(*words, *(way[2:] if "untied" in way else []), "--out_dir", "one")
    launch(2, *words, *way, "--out_dir", "two")
    for key in ("loss", "val_loss"):
        assert metrics(Path("two"), key) == pytest.approx(metrics(one, key), rel=2e-6)
    a, b = (load_file(place / name / ADAPTER) for name in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-5) for n in a)
    launch(2, *words, *way, "--out_dir", "two", "--max_steps", "7")  # and its checkpoint is read again
    assert "resumed from two/checkpoint-6" in (place / "two/log.txt").read_text()


@pytest.mark.heavy
@both_ways
def test_compiled_blocks_have_the_losses_of_those_that_are_not(place, double_quant):  # noqa: F811
    words = [*QLORA, "--double_quant", str(double_quant), "--max_steps", "3"]
    eager, compiled = (metrics(train(*words, "--compile", flag, "--out_dir", flag)) for flag in ("false", "true"))
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_what_does_not_go_together_is_refused(place):  # noqa: F811
    refused(lambda: train("--quantize", "int4"), "quantize = 'int4'")
    refused(lambda: train("--double_quant", "true"), "double_quant = True")
    refused(lambda: train(*QLORA, "--parallel", "fsdp"), 'parallel = "fsdp" does not go with quantize')
    (place / "lora.json").write_text(json.dumps({"lora_r": 8, "lora_alpha": 32}))
    assert LoraConfig(lora_config="lora.json", quantize="nf4").r == 8  # the file cannot say it
    (place / "lora.json").write_text(json.dumps({"lora_r": 8, "lora_alpha": 32, "quantize": "nf4"}))
    refused(lambda: LoraConfig(lora_config="lora.json"), "quantize = 'nf4' is not supported")
    (place / "lora.json").write_text(json.dumps({"lora_r": 8, "lora_alpha": 32, "quantize": None}))
    assert LoraConfig(lora_config="lora.json").quantize == ""

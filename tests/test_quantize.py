"""Promises of `extras/quantize.py`: the codes are the nearest ones, and the products are those of the rounded weights."""

import math

import pytest
import torch
import torch.nn.functional as F

import tokenizer
from core import checkpoint
from core.generate import SamplingConfig, complete
from extras import families, quantize
from extras.quantize import FEW_ROWS, GROUP, DecodingLinear, Int4Linear, Int8Linear
from model import Llama, ModelConfig

GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
SHAPES = [(48, 64), (35, 96), (97, 52), (5, 1668)]  # whole and broken groups of inputs, blocks of outputs


def weights(n, k, seed=0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1
    w[0] = 0.0  # nothing to scale
    w[1, 0] = 3.0  # one far from all others
    return w


def dequantised(layer) -> torch.Tensor:
    """W, from what the product does to unit vectors, one at a time."""
    return torch.cat([layer(row[None].bfloat16()) for row in torch.eye(layer.inputs)]).T.float()


@pytest.mark.parametrize("n, k", SHAPES)
def test_int8_codes_are_those_of_a_loop(n, k):
    w, found = weights(n, k), torch.zeros(n, k)
    for row in range(n):
        scale = max(abs(x) for x in w[row].tolist()) / 127
        scale = torch.tensor(scale).bfloat16().item() or 1.0
        for column in range(k):
            code = max(-127, min(127, round(w[row, column].item() / scale)))
            found[row, column] = torch.tensor(code * scale).bfloat16()
    assert (dequantised(Int8Linear(w, None)) - found).abs().max() <= 0.01 * w.abs().max()  # a tie may round otherwise
    assert ((dequantised(Int8Linear(w, None)) - found).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("n, k", SHAPES)
def test_int4_codes_have_the_least_error_of_the_scales_that_are_tried(n, k):
    w = weights(n, k)
    padded = F.pad(w, (0, -k % GROUP)).view(n, -1, GROUP)
    best = 0.0
    for group in padded.flatten(0, 1).tolist():
        far = max(group, key=abs)
        errors = []
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
            scale = torch.tensor(far * share / -8).bfloat16().item() or 1.0
            errors.append(sum((max(-8, min(7, round(x / scale))) * scale - x) ** 2 for x in group))
        best += min(errors)
    layer = Int4Linear(w, None)
    assert ((dequantised(layer) - w) ** 2).sum().item() == pytest.approx(best, rel=2e-2)  # dequantised in bf16
    plain = sum(((F.pad(w, (0, -k % GROUP)).view(n, -1, GROUP) - codes * scale) ** 2).sum().item() for codes, scale in [max_abs(padded)])
    assert best < 0.95 * plain, "no better than the plain scale"


def max_abs(groups):
    scale = (groups.abs().amax(dim=2, keepdim=True) / 7).clamp(min=1e-9)
    return (groups / scale).round(), scale


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_weights(kind, n, k, rows, bias):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, rows, k, generator=generator).bfloat16() if rows > 20 else torch.randn(rows, k, generator=generator).bfloat16()
    b = torch.randn(n, generator=generator) if bias else None
    layer = kind(weights(n, k), b)
    exact = x.double() @ layer.weight().double().T + (0 if b is None else b.bfloat16().double())
    got = layer(x)
    assert got.shape == exact.shape and got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()  # bf16 has 8 bits


def test_the_packed_form_of_four_bits_and_the_plain_one_are_the_same_weights():
    w = weights(35, 96)
    cpu = Int4Linear(w, None)
    other = Int4Linear(w, None)
    codes, _ = quantize.rounded(F.pad(w, (0, 0, 0, -35 % 16)).view(48, -1, GROUP))
    other.on_cpu = False  # what other devices do
    low, high = (codes.view(48, -1) + 8).to(torch.uint8).view(48, -1, 2).unbind(dim=-1)
    other.codes = low | high << 4
    assert torch.equal(other.weight(), cpu.weight())
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.allclose(other(x), cpu(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 5)])
def test_a_tied_head_is_packed_and_the_embedding_stays(tiny_config, make_model, kind, bits):
    model = make_model(tiny_config)
    embedding = model.model.embed_tokens.weight.detach().clone()
    quantize.quantize(model, kind)
    assert torch.equal(model.model.embed_tokens.weight, embedding.bfloat16())
    layers = [m for m in model.modules() if isinstance(m, (Int8Linear, Int4Linear))]
    assert len(layers) == 7 * 3 + 1 and not any(type(m) is torch.nn.Linear for m in model.modules())
    assert model.lm_head.codes.numel() * model.lm_head.codes.element_size() <= 112 * 32 * bits / 8
    assert complete(model, [[1, 2, 3], [4]], GREEDY, set()) == [complete(model, [p], GREEDY, set())[0] for p in ([1, 2, 3], [4])]


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_products_for_decoding_are_torchs(rows, bias, dtype, tolerance):
    layer = torch.nn.Linear(52, 97, bias=bias, dtype=dtype)
    x = torch.randn(1, rows, 52, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with torch.no_grad():
        quantize.for_decoding(layer)
        assert type(layer) is DecodingLinear
        for got in (layer(x), torch.compile(layer)(x)):
            assert got.dtype == dtype and got.shape == expected.shape
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def nats(model, ids, targets):
    with torch.no_grad():
        return model(ids, targets).sum().item() / targets.numel()


@pytest.mark.parametrize("kind, most", [("int8", 1.01), ("int4", 1.08)])  # 656,000 parameters: the fewer, the more it shows
def test_the_perplexity_of_a_real_model_stays(shared_data, kind, most):
    folder = shared_data / "weights/infinitensor-story"
    model, text = checkpoint.load_model(folder).eval(), tokenizer.load(folder)
    # Stories of its own, drawn: a text that it expects.
    drawn = complete(model, [text.encode("Once upon a time", bos=True)] * 4, SamplingConfig(max_new_tokens=300, seed=3, temperature=1.0, top_p=1.0), set())
    ids = torch.tensor([row[:300] for row in drawn])
    before = nats(model, ids[:, :-1], ids[:, 1:])
    after = nats(quantize.quantize(model, kind), ids[:, :-1], ids[:, 1:])
    assert math.exp(after - before) <= most and after != before


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_other_families_are_quantised_too(kind):
    families.register()
    config = families.FamilyConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                   max_position_embeddings=64, model_type="bloom")  # fmt: skip
    model = checkpoint.family_of(config).model(config)
    model.init_weights(0)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model.eval()(ids)
        after = quantize.quantize(model, kind)(ids)
    assert F.cosine_similarity(before.flatten(), after.float().flatten(), dim=0) > 0.97


def test_what_is_left_of_the_bytes():
    model = Llama(ModelConfig(vocab_size=640, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4))
    model.init_weights(0)
    whole = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n) + 640 * 256
    held = {}
    for kind in ("int8", "int4"):
        copy = quantize.quantize(Llama(model.config), kind)
        held[kind] = sum(m.codes.numel() * m.codes.element_size() for m in copy.modules() if isinstance(m, (Int8Linear, Int4Linear)))
    assert held["int8"] == whole and held["int4"] == whole / 2

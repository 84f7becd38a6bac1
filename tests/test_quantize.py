"""Promises of `extras/formats/quantize.py` and `core/generate.py`: the codes are the nearest ones, and the products are
those of the rounded weights."""

import json
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_run import newborn

import tokenizer
from assembly import models
from core import hf_folder
from core.errors import UserError
from core.generate import DecodingLinear, SamplingConfig, for_decoding
from core.hf_config import family_of
from extras.decoding.batching import complete
from extras.families import others as families
from extras.families.llama_kin import KinConfig
from extras.formats import quantize
from extras.formats.quantize import FEW_ROWS, GROUP, Int4Linear, Int8Linear
from model import IGNORE, Llama, ModelConfig

GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
SHAPES = [(48, 64), (35, 96), (97, 52), (5, 1668)]  # whole and broken groups of inputs, blocks of outputs


def weights(n, k, seed=0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1
    w[0] = 0.0  # nothing to scale
    w[1, 0] = 3.0  # one far from all others
    return w


def loaded(folder) -> Llama:
    """The model of a quantised folder, as sample.py reads it."""
    return quantize.load(folder, models.read_config(folder)).eval()


def dequantised(layer) -> torch.Tensor:
    """W, from what the product does to unit vectors, one at a time."""
    return torch.cat([layer(row[None].bfloat16()) for row in torch.eye(layer.in_features)]).T.float()


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
    plain = sum(
        ((F.pad(w, (0, -k % GROUP)).view(n, -1, GROUP) - codes * scale) ** 2).sum().item()
        for codes, scale in [max_abs(padded)]
    )
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
    x = (
        torch.randn(2, rows, k, generator=generator).bfloat16()
        if rows > 20
        else torch.randn(rows, k, generator=generator).bfloat16()
    )
    b = torch.randn(n, generator=generator) if bias else None
    layer = kind(weights(n, k), b)
    exact = x.double() @ layer.weight().double().T + (0 if b is None else b.bfloat16().double())
    got = layer(x)
    assert got.shape == exact.shape and got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()  # bf16 has 8 bits


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_no_weight_within_the_codes_is_more_than_half_a_step_away(kind):
    w = weights(48, 96)
    layer = kind(w, None)
    codes = quantize.unpack(layer.parts()["weight_packed"], 96, 8 if kind is Int8Linear else 4)
    scale = (
        layer.parts()["weight_scale"].float().abs().repeat_interleave(96 // layer.parts()["weight_scale"].shape[1], 1)
    )
    off = (dequantised(layer) - w).abs() / scale
    ends = (codes == codes.max()) | (codes == codes.min())  # what lies outside is cut off
    assert off[~ends].max() <= 0.5 + 127 * 2**-9 * (kind is Int8Linear) + 8 * 2**-9  # their product is rounded to bf16
    assert not ends.all(dim=1).any()


def test_a_product_in_pieces_is_the_whole_one(monkeypatch):
    layer, x = Int8Linear(weights(97, 52), torch.arange(97.0)), torch.randn(40, 52).bfloat16()
    whole = layer(x)
    monkeypatch.setattr(quantize, "PIECE", 64 * 10)  # ten pieces, the last one shorter
    torch.testing.assert_close(layer(x), whole, rtol=2**-7, atol=2**-7)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [1, 9])
def test_compiled_products_are_the_same(kind, rows):
    layer = kind(weights(35, 52), torch.arange(35.0))
    x = torch.randn(1, rows, 52, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=2**-7, atol=2**-6)


def test_the_packed_form_of_four_bits_and_the_plain_one_are_the_same_weights():
    w = weights(35, 96)
    cpu = Int4Linear(w, None)
    other = Int4Linear(w, None)
    codes, _ = quantize.rounded(F.pad(w, (0, 0, 0, -35 % 16)).view(48, -1, GROUP))
    other.on_cpu = False  # what other devices do
    other.codes = quantize.pack(codes.flatten(1), 4)
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
    assert complete(model, [[1, 2, 3], [4]], GREEDY, set()) == [
        complete(model, [p], GREEDY, set())[0] for p in ([1, 2, 3], [4])
    ]


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_products_for_decoding_are_torchs(rows, bias, dtype, tolerance):
    layer = torch.nn.Linear(52, 97, bias=bias, dtype=dtype)
    x = torch.randn(1, rows, 52, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with torch.no_grad():
        for_decoding(layer)
        assert type(layer) is DecodingLinear
        for got in (layer(x), torch.compile(layer)(x)):
            assert got.dtype == dtype and got.shape == expected.shape
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def nats(model, ids, targets):
    with torch.no_grad():
        return model(ids, targets).sum().item() / (targets != IGNORE).sum().item()


@pytest.mark.parametrize(
    "kind, most", [("int8", 1.01), ("int4", 1.08)]
)  # 656,000 parameters: the fewer, the more it shows
def test_the_perplexity_of_a_real_model_stays(shared_data, kind, most):
    folder = shared_data / "weights/infinitensor-story"
    model, text = models.load_model(folder).eval(), tokenizer.load(folder)
    # Stories of its own, drawn: texts that it expects.
    prompt, rows = text.encode("Once upon a time", bos=True), []
    for seed in range(24):
        cfg = SamplingConfig(max_new_tokens=250, seed=seed, temperature=1.0, top_p=1.0)
        rows.append([*prompt, *complete(model, [prompt], cfg, {text.eos_id})[0], text.eos_id])
    assert len({tuple(row) for row in rows}) == 24
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORE
    )
    ids, targets = ids[:, :-1], targets[:, 1:]
    before = nats(model, ids, targets)
    after = nats(quantize.quantize(model, kind), ids, targets)
    assert math.exp(after - before) <= most and after != before


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_other_families_are_quantised_too(kind):
    config = families.FamilyConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        model_type="bloom",
    )
    model = newborn(config)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model.eval()(ids)
        after = quantize.quantize(model, kind)(ids)
    assert F.cosine_similarity(before.flatten(), after.float().flatten(), dim=0) > 0.97


def test_what_is_left_of_the_bytes():
    model = newborn(
        ModelConfig(vocab_size=640, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4)
    )
    whole = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n) + 640 * 256
    held = {}
    for kind in ("int8", "int4"):
        copy = quantize.quantize(Llama(model.config), kind)
        held[kind] = sum(
            m.codes.numel() * m.codes.element_size() for m in copy.modules() if isinstance(m, (Int8Linear, Int4Linear))
        )
    assert held["int8"] == whole and held["int4"] == whole / 2


# ---------------------------------------------------------------- files

KIND_OF_MODEL = {
    "plain": ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "biases, untied": KinConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        model_type="qwen2",
        tie_word_embeddings=False,
    ),
    "broken groups": ModelConfig(
        vocab_size=97, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4
    ),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 32), (5, 13), (1, 1)])
def test_codes_lie_in_words_as_a_loop_puts_them(bits, shape):
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    each, words = 32 // bits, quantize.pack(codes, bits)
    assert words.shape == (shape[0], -(-shape[1] // each))
    for row in range(shape[0]):
        for column in range(words.shape[1]):
            word = 0
            for i, code in enumerate(codes[row, column * each : (column + 1) * each].tolist()):
                word |= code + (1 << bits - 1) << i * bits
            assert words[row, column].item() & 0xFFFFFFFF == word
    assert torch.equal(quantize.unpack(words, shape[1], bits), codes)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("which", KIND_OF_MODEL)
def test_what_is_saved_comes_back_bit_for_bit(make_model, tmp_path, kind, which):
    model = quantize.quantize(make_model(KIND_OF_MODEL[which]), kind)
    quantize.save(tmp_path, model, kind, None, {})
    assert quantize.kind_of(tmp_path) == kind
    again = loaded(tmp_path)
    same_state(again, model)
    assert again.config == model.config
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
    large = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * large + 10_000


def same_state(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, t in one.state_dict().items():
        assert t.dtype == other.state_dict()[name].dtype and torch.equal(t, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_rounded_one_after_another_as_they_are_read(make_model, tmp_path, kind):
    plain = make_model(KIND_OF_MODEL["plain"])
    hf_folder.save_model(tmp_path, plain, None, {})
    opened = models.open_model(tmp_path)
    model = opened.model

    def watched():
        for name, values in opened.weights:
            yield name, values
            held = [t for t in [*model.parameters(), *model.buffers()] if not t.is_meta]
            assert all(t.dtype != torch.float32 for t in held)
            if name.endswith("proj.weight"):
                assert type(model.get_submodule(name.removesuffix(".weight"))) is quantize.LAYERS[kind]

    built = quantize.build(model, watched(), kind)
    same_state(built, quantize.quantize(plain, kind))


def exact(plain, quantised, folder, kind):
    """The plain model in fp32 with the weights that a folder's codes and scales stand for."""
    family, stored = family_of(plain.config), load_file(folder / "model.safetensors")
    stored = {family.ours(name): t for name, t in stored.items()}
    model = deepcopy(plain)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, p in model.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.weight_packed" not in stored:
                p.copy_(stored[name])
                continue
            scale = stored[f"{layer}.weight_scale"].float()
            codes = quantize.unpack(stored[f"{layer}.weight_packed"], p.shape[1], 8 if kind == "int8" else 4)
            p.copy_(codes * scale.repeat_interleave(p.shape[1] // scale.shape[1], dim=1))
    return model


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("which", ["Llama", "Qwen3", "GPTNeoX", "Bloom", "Falcon"])
def test_transformers_reads_what_is_saved_or_it_is_said_that_it_does_not(tmp_path, kind, which):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    sizes |= {"n_layer": 2, "n_head": 4} if which == "Bloom" else {}
    torch.manual_seed(0)
    original = getattr(transformers, f"{which}ForCausalLM")(getattr(transformers, f"{which}Config")(**sizes)).eval()
    with torch.no_grad():
        for p in original.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.1)
    original.save_pretrained(tmp_path / "plain")
    plain = models.load_model(tmp_path / "plain").eval()
    opened = models.open_model(tmp_path / "plain")
    model = quantize.build(opened.model, opened.weights, kind).eval()
    told = quantize.save(tmp_path / "packed", model, kind, None, {})
    ids = torch.randint(0, 96, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = exact(plain, model, tmp_path / "packed", kind)(ids)
        assert (model(ids) - expected).abs().max() <= 0.03 * expected.abs().max()  # bf16: 8 bits, two layers
        assert torch.equal(loaded(tmp_path / "packed")(ids), model(ids))
        if which == "Falcon":
            assert told
            return
        assert not told
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        got = theirs.eval()(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_inputs_that_are_no_whole_groups_are_told(make_model, tmp_path):
    model = quantize.quantize(make_model(KIND_OF_MODEL["broken groups"]), "int4")
    assert "has 40 inputs" in quantize.save(tmp_path, model, "int4", None, {})[0]


def damaged(name, how):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        how(state, name)
        save_file(state, folder / "model.safetensors")

    return damage


def of_config(**changes):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text())
        weights = raw["quantization_config"]["config_groups"]["group_0"]["weights"]
        for key, value in changes.items():
            (weights if key in weights else raw["quantization_config"])[key] = value
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "damage, says",
    [
        (damaged(f"{LAYER}.weight_packed", dict.pop), "weight_packed is missing"),
        (damaged(f"{LAYER}.weight_scale", dict.pop), "weight_scale is missing"),
        (
            damaged(f"{LAYER}.weight_packed", lambda s, n: s.update({n: s[n][:, :-1].contiguous()})),
            "weight_packed is torch.int32 (96, 7), expected torch.int32 (96, 8)",
        ),
        (damaged(f"{LAYER}.weight_packed", lambda s, n: s.update({n: s[n].float()})), "weight_packed is torch.float32"),
        (
            damaged(f"{LAYER}.weight_scale", lambda s, n: s.update({n: s[n].T.contiguous()})),
            "weight_scale has shape (2, 96)",
        ),
        (damaged(f"{LAYER}.weight_scale", lambda s, n: s[n].fill_(math.nan)), "weight_scale holds NaN"),
        (damaged(f"{LAYER}.weight_shape", lambda s, n: s[n].fill_(64)), "weight_shape is [64, 64], expected [96, 64]"),
        (damaged("more", lambda s, n: s.update({n: torch.ones(3)})), "more is unexpected"),
        (damaged("model.norm.weight", dict.pop), "model.norm.weight is missing"),
        (of_config(num_bits=3), "not read here"),
        (of_config(group_size=128), "not read here"),
        (of_config(symmetric=False), "not read here"),
        (of_config(quant_method="gptq"), "not read here"),
        (of_config(ignore=["lm_head"]), "not read here"),
        (of_config(config_groups=[]), "not read here"),
        (of_config(config_groups={}), "not read here"),
    ],
)
def test_what_is_damaged_or_foreign_is_one_line(make_model, tmp_path, damage, says):
    quantize.save(tmp_path, quantize.quantize(make_model(KIND_OF_MODEL["plain"]), "int4"), "int4", None, {})
    damage(tmp_path)
    with pytest.raises(UserError) as e:
        loaded(tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_plain_folder_is_none_and_a_quantised_one_is_no_base_for_training(make_model, tmp_path):
    model = make_model(KIND_OF_MODEL["plain"])
    hf_folder.save_model(tmp_path / "plain", model, None, {})
    assert quantize.kind_of(tmp_path / "plain") == "none"
    quantize.save(tmp_path / "packed", quantize.quantize(model, "int8"), "int8", None, {})
    for open_model in (models.open_model, hf_folder.open_model):
        with pytest.raises(UserError):
            open_model(tmp_path / "packed")
    with pytest.raises(UserError, match="quantised, they are for generation only"):
        models.open_model(tmp_path / "packed")

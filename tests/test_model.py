"""Promises of `model.py`: it is Llama, and each faster or leaner path equals the plain one."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
import pretrain
from core import errors, hf_folder, memory
from core.device import flops_per_token, num_parameters
from core.errors import UserError
from core.generate import Cache
from core.hf_config import CheckedConfig
from core.memory import save_memory
from extras.families.llama_kin import Kin, KinConfig
from model import IGNORE, Llama, cross_entropy

V = 97


def ids_of(*shape, seed=1):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def some_targets(ids, seed=2):
    """Random targets, about a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, ids.shape, generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.3, IGNORE, targets)


def gradients(model, *args):
    """(losses, gradient by name) of the summed loss."""
    model.zero_grad(set_to_none=True)
    losses = model(*args)
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


# The family -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_those_of_transformers(tiny_config, make_model, kv_heads, tied, bias):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        tiny_config, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=500.0, rms_norm_eps=1e-3
    )
    if bias:
        config = KinConfig(**dataclasses.asdict(config), attention_bias=True)
    ours = make_model(config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dataclasses.asdict(config))).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = ids_of(2, 40)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.5  # not a comparison of zeros
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5)


def test_a_head_dim_of_its_own_equals_transformers(tiny_config, make_model):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(tiny_config, head_dim=12)
    ours = make_model(config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dataclasses.asdict(config))).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_of(1, 20)), theirs(ids_of(1, 20)).logits, rtol=0, atol=1e-5)


def test_no_position_sees_a_later_one(tiny_model):
    ids = ids_of(1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % V
    with torch.no_grad():
        before, after = tiny_model(ids), tiny_model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert all(not torch.equal(before[0, t], after[0, t]) for t in range(12, 20))


# Losses ---------------------------------------------------------------------------------------------------------------


def test_losses_are_cross_entropy_of_the_logits_and_zero_where_ignored(tiny_model):
    ids = ids_of(3, 17)
    targets = some_targets(ids)
    losses, logits = tiny_model(ids, targets), tiny_model(ids)
    assert losses.shape == ids.shape and losses.dtype == torch.float32
    expected = F.cross_entropy(logits.view(-1, V), targets.view(-1).clamp(min=0), reduction="none").view(3, 17)
    torch.testing.assert_close(losses[targets != IGNORE], expected[targets != IGNORE], rtol=1e-6, atol=1e-6)
    assert (losses[targets == IGNORE] == 0).all()


def test_a_batch_without_targets_costs_nothing_and_is_not_nan(tiny_model):
    ids = ids_of(2, 9)
    losses, grads = gradients(tiny_model, ids, torch.full_like(ids, IGNORE))
    assert (losses == 0).all() and all((g == 0).all() for g in grads.values())


class Products(TorchDispatchMode):
    """Notes the shape of every matrix product's result."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weigh", ["sum", "by row", "by position"])
def test_losses_in_chunks_equal_those_at_once_and_never_hold_all_logits(tiny_model, weigh, dtype, monkeypatch):
    ids = ids_of(2, 17)  # 34 positions: the last chunk is a short one
    targets = some_targets(ids)
    weights = {"sum": torch.tensor(0.7), "by row": torch.tensor([[1.0], [-2]]), "by position": torch.randn(2, 17)}[
        weigh
    ]

    def run():
        tiny_model.zero_grad()
        with Products() as products, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = tiny_model(ids, targets)
            (losses * weights).sum().backward() if weigh != "sum" else (losses.sum() * weights).backward()
        logits = [shape[0] for shape in products.shapes if shape[1] == V]
        return logits, losses.detach(), {name: p.grad for name, p in tiny_model.named_parameters()}

    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 3 * V + 1)
    logits, losses, grads = run()
    assert max(logits) == 3 and sum(logits) == 34 * (1 if weigh == "sum" else 2)  # once, or again in the backward pass
    tiny_model.loss = cross_entropy
    logits, expected, expected_grads = run()
    assert logits == [34]
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for name, grad in expected_grads.items():
        error = (grads[name] - grad).norm() / grad.norm()
        assert error < (0.01 if dtype == torch.bfloat16 else 1e-5), (name, error)


def test_gradients_of_the_head_are_made_only_where_they_are_wanted(tiny_model):
    ids, shapes, c = ids_of(2, 16), {}, tiny_model.config.hidden_size
    for wanted in ("nothing", "the rest", "all"):
        tiny_model.lm_head.weight.requires_grad_(wanted == "all")
        with Products() as products, torch.set_grad_enabled(wanted != "nothing"):
            tiny_model.loss(torch.randn(2, 16, c, requires_grad=True), tiny_model.lm_head, ids)
        shapes[wanted] = products.shapes
    assert shapes["nothing"] == [(32, V)]
    assert shapes["the rest"] == [(32, V), (32, c)]
    assert shapes["all"] == [(32, V), (32, c), (V, c)]


def test_a_head_that_something_wraps_gets_its_gradients_from_autograd(tiny_model, monkeypatch):
    ids = ids_of(2, 17)
    expected, grads = gradients(tiny_model, ids, ids)
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 3 * V)
    tiny_model.lm_head = nn.Sequential(tiny_model.lm_head)
    got, wrapped = gradients(tiny_model, ids, ids)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        found = wrapped[name.replace("lm_head.", "lm_head.0.")]
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_vocabulary_larger_than_the_chunk_still_gives_losses(tiny_model, monkeypatch):
    ids = ids_of(1, 5)
    expected = tiny_model(ids, ids)
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(tiny_model(ids, ids), expected, rtol=1e-6, atol=1e-6)


# Documents in one row -------------------------------------------------------------------------------------------------


def packed(*lengths, seed=1):
    """(1, T) ids and document numbers of documents of the given lengths."""
    docs = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return ids_of(1, sum(lengths), seed=seed), docs


# 600 positions before B: more than a block of keys of the attention kernel is masked away altogether.
@pytest.mark.parametrize("lengths, changed", [((7, 9), 0), ((7, 9), 1), ((5, 8, 6), 1), ((600, 20), 0), ((20, 600), 1)])
def test_changing_one_document_leaves_the_logits_of_the_others_bit_equal(tiny_model, lengths, changed):
    ids, docs = packed(*lengths)
    other = torch.where(docs == changed, (ids + 1 + ids_of(*ids.shape, seed=9) % (V - 1)) % V, ids)
    with torch.no_grad():
        before, after = tiny_model(ids, docs=docs), tiny_model(other, docs=docs)
    mine = (docs == changed)[0]
    assert torch.equal(before[:, ~mine], after[:, ~mine])
    assert not torch.equal(before[:, mine], after[:, mine])


@pytest.mark.parametrize("lengths", [(7, 9), (1, 1, 14), (9, 1, 6), (600, 20)])
def test_losses_of_a_packed_row_equal_those_of_its_documents_alone(tiny_model, lengths):
    ids, docs = packed(*lengths)
    targets = some_targets(ids)
    with torch.no_grad():
        together = tiny_model(ids, targets, docs=docs)
        for number in range(len(lengths)):
            mine = (docs == number)[0]
            alone = tiny_model(ids[:, mine], targets[:, mine])
            torch.testing.assert_close(together[:, mine], alone, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_have_documents_of_their_own(tiny_model):
    rows = [packed(7, 9, seed=1), packed(3, 3, 10, seed=2), packed(16, seed=3)]
    with torch.no_grad():
        batch = tiny_model(torch.cat([i for i, _ in rows]), docs=torch.cat([d for _, d in rows]))
        for row, (ids, docs) in enumerate(rows):
            torch.testing.assert_close(batch[row : row + 1], tiny_model(ids, docs=docs), rtol=1e-5, atol=1e-5)


def test_positions_restart_at_each_document_and_go_on_where_each_row_is(tiny_model, monkeypatch):
    """RoPE sees only distances, so a shift would not show in the losses: it would only leave the trained range."""
    seen, real = [], model_file.rope_table
    monkeypatch.setattr(
        model_file,
        "rope_table",
        lambda positions, config: seen.append(positions.tolist()) or real(positions, config),
    )
    ids, docs = packed(3, 1, 4)
    tiny_model(ids, docs=docs)
    cache = Cache(tiny_model.config, 2, 5)
    tiny_model(ids_of(2, 4), cache=cache)
    cache.used = torch.tensor([4, 1])
    tiny_model(ids_of(2, 1), cache=cache)
    assert seen == [[[0, 1, 2, 0, 0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]], [[4], [1]]]


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_logits_equal_uncached_ones(tiny_config, make_model, kv_heads):
    model = make_model(dataclasses.replace(tiny_config, num_key_value_heads=kv_heads))
    ids = ids_of(2, 14)
    cache, parts, at = Cache(model.config, 2, 14), [], 0
    with torch.no_grad():
        for count in (5, 1, 1, 3, 1, 3):  # a prompt, steps, and several positions at once
            parts.append(model(ids[:, at : at + count], cache=cache))
            at += count
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-5, atol=1e-5)


def test_prompts_of_different_lengths_go_on_as_each_alone(tiny_model):
    lengths, steps = (3, 8, 5, 1), 4
    longest = max(lengths)
    texts = [ids_of(n + steps, seed=n) for n in lengths]
    right = torch.stack([F.pad(text[:n], (0, longest - n), value=7) for text, n in zip(texts, lengths)])
    cache = Cache(tiny_model.config, len(lengths), longest + steps)
    with torch.no_grad():
        first = tiny_model(right, cache=cache)
        cache.used = torch.tensor(lengths)
        parts = []
        for s in range(steps):
            cache.span = longest + s + 1
            parts.append(tiny_model(torch.stack([t[n + s] for t, n in zip(texts, lengths)])[:, None], cache=cache))
        after = torch.cat(parts, dim=1)
        for row, (text, n) in enumerate(zip(texts, lengths)):
            torch.testing.assert_close(
                torch.cat([first[row, :n], after[row]]), tiny_model(text[None])[0], rtol=1e-5, atol=1e-5
            )


# Gradient checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_docs", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradient_checkpointing_changes_no_bit(tiny_model, with_docs, chunked, kind, monkeypatch):
    ids, docs = packed(9, 4, 20)
    args = (ids, some_targets(ids), docs if with_docs else None)
    tiny_model.train()
    if chunked:
        monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 5 * V)
    calls = []
    tiny_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, plain_grads = gradients(tiny_model, *args)
    assert len(calls) == 1
    save_memory(tiny_model, kind)
    again, again_grads = gradients(tiny_model, *args)
    assert len(calls) == 3  # once more in the forward, once again in the backward pass
    assert torch.equal(plain, again)
    assert all(torch.equal(plain_grads[n], again_grads[n]) for n in plain_grads)


# Sizes and weights ----------------------------------------------------------------------------------------------------


def test_what_writes_into_the_residual_stream_starts_smaller_by_the_root_of_twice_the_layers():
    config = KinConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = Kin(config)
    weights = dict(model.weights_at_birth(3))
    assert {name: p.shape for name, p in weights.items()} == {name: p.shape for name, p in model.named_parameters()}
    for name, p in weights.items():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
            continue
        std = 0.02 / (2 * 8) ** 0.5 if "o_proj" in name or "down_proj" in name else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.06), name
        assert abs(p.mean().item()) < 4 * std / p.numel() ** 0.5, name


def test_the_seed_alone_decides_the_first_weights(tiny_config):
    def weights(seed):
        return dict(Llama(tiny_config).weights_at_birth(seed))

    torch.manual_seed(123)
    one = weights(1)
    torch.manual_seed(456)
    again, other = weights(1), weights(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_tied_weights_are_one_tensor_and_untied_ones_two(tiny_config):
    tied = Llama(tiny_config)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_on_paper(tiny_config, tied):
    # V 97, C 32, F 52, 3 layers, 4 heads of 8, 2 key/value heads
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 52 + 2 * 32
    embedding = 97 * 32 * (1 if tied else 2)
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    assert num_parameters(model) == (3 * layer + 32 + embedding, embedding)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_counted_as_on_paper(tiny_config, tied):
    # Every multiplying weight: 2 forward, 4 backward. Each of 4 heads of 8 over on average half of 64 positions, twice
    # (scores and values), 2 per multiply-add, thrice (forward and the double backward).
    weights = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 52) + 97 * 32
    attention = 3 * (4 * 8 * 32) * 2 * 2 * 3
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    assert flops_per_token(model, 64) == 6 * weights + attention


BAD = [
    {"hidden_size": 0},
    {"hidden_size": -32},
    {"hidden_size": 33},
    {"hidden_size": (1 << 24) + 8},
    {"intermediate_size": 0},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 1025},
    {"num_attention_heads": 0},
    {"num_attention_heads": -4},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": -1},
    {"num_key_value_heads": 8},
    {"head_dim": 7},
    {"head_dim": -8},
    {"max_position_embeddings": 0},
    {"vocab_size": -1},
    {"vocab_size": 1 << 25},
    {"rms_norm_eps": 0.0},
    {"rms_norm_eps": float("nan")},
    {"rope_theta": -1.0},
    {"rope_theta": float("inf")},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_an_impossible_size_is_refused_and_named(tiny_config, bad):
    with pytest.raises(ValueError) as e:
        CheckedConfig(**dataclasses.asdict(tiny_config) | {"num_key_value_heads": 0, "head_dim": 0} | bad)
    assert next(iter(bad)) in str(e.value) and "\n" not in str(e.value)


def test_a_model_without_a_vocabulary_is_refused(tiny_model, tmp_path):
    hf_folder.save_model(tmp_path, tiny_model, None, {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 0}))
    with pytest.raises(UserError, match="vocab_size"):
        hf_folder.open_model(tmp_path)


# The command ----------------------------------------------------------------------------------------------------------


DRY_RUN = ("--dry_run", "--tokens", "1e6")


def test_a_dry_run_prints_what_it_counts(tmp_path, root, tiny_config):
    path = tmp_path / "小 模型.toml"
    path.write_text(
        "[model]\nvocab_size = 97\nhidden_size = 32\nintermediate_size = 52\nnum_hidden_layers = 3\n"
        "num_key_value_heads = 2\nmax_position_embeddings = 64\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "pretrain.py", path, *DRY_RUN], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    model = Llama(tiny_config)
    total, embedding = num_parameters(model)
    numbers = (total, embedding, total - embedding, flops_per_token(model, 64), 4 * total, 8 * total)
    assert all(f" {n:,} " in done.stdout.replace("\n", " ") for n in numbers)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "hidden_size",
        "\xff",
        "[model]\nhidden_size = 3\n",
        "[model]\nhiden_size = 3\n",
        "model = 3\n",
        "[model]\nvocab_size = 9\nhidden_size = 'x'\n",
        "[model]\nvocab_size = 9\nhidden_size = 256.5\n",
        "[model]\nvocab_size = 9\nhidden_size = 16777216\nnum_attention_heads = 16777216\nhead_dim = 16777216\n",
    ],
)
def test_a_config_that_cannot_be_described_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(path), *DRY_RUN])
    with pytest.raises(SystemExit) as e:
        errors.run(pretrain.main)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.startswith("error: ") and str(path) in err and err.count("\n") == 1

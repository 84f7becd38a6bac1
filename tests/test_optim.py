"""Promises of `core/optim.py`: the schedule's values, who is decayed, and Muon against a naive loop and torch's own."""

import dataclasses
import itertools
import math

import pytest
import torch

from core.errors import UserError
from core.optim import Muon, OptimConfig, learning_rate, make_optimizers, orthogonal
from extras.families.llama_kin import KinConfig


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Schedule -------------------------------------------------------------------------------------------------------------

COSINE = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=10, schedule="cosine")
WSD = dataclasses.replace(COSINE, schedule="wsd", decay_share=0.2)


@pytest.mark.parametrize("cfg", [COSINE, WSD])
def test_warm_up_rises_linearly_from_one_share_to_the_top(cfg):
    assert [learning_rate(s, 110, cfg) for s in range(10)] == pytest.approx([1e-4 * (s + 1) for s in range(10)])
    assert learning_rate(10, 110, cfg) == 1e-3


def test_cosine_is_half_way_in_the_middle_and_min_lr_at_the_end():
    assert learning_rate(60, 110, COSINE) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(35, 110, COSINE) == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(110, 110, COSINE) == pytest.approx(1e-4)
    assert 1e-4 < learning_rate(109, 110, COSINE) < 1.01e-4 + 1e-6


def test_wsd_stays_at_the_top_and_then_falls_in_a_line():
    assert all(learning_rate(s, 110, WSD) == pytest.approx(1e-3) for s in range(10, 91))
    assert learning_rate(100, 110, WSD) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(110, 110, WSD) == pytest.approx(1e-4)
    falling = [learning_rate(s, 110, WSD) for s in range(90, 111)]
    assert [a - b for a, b in itertools.pairwise(falling)] == pytest.approx([9e-4 / 20] * 20)


def test_wsd_without_a_decay_never_falls():
    cfg = dataclasses.replace(WSD, decay_share=0.0)
    assert {learning_rate(s, 110, cfg) for s in range(10, 111)} == {1e-3}


@pytest.mark.parametrize("cfg", [COSINE, WSD])
@pytest.mark.parametrize("max_steps", [1, 2, 5, 10, 11])
def test_runs_no_longer_than_the_warm_up_have_a_rate_above_zero(cfg, max_steps):
    assert all(0 < learning_rate(s, max_steps, cfg) <= 1e-3 for s in range(max_steps))


def test_no_warm_up_begins_at_the_top():
    assert learning_rate(0, 50, dataclasses.replace(COSINE, warmup_steps=0)) == 1e-3


@pytest.mark.parametrize(
    "bad",
    [
        {"optimizer": "sgd"},
        {"schedule": "linear"},
        {"lr": 0.0},
        {"lr": -1e-3},
        {"eps": 0.0},
        {"min_lr": 1e-3},
        {"min_lr": -1e-5},
        {"decay_share": 1.5},
        {"beta1": -0.1},
        {"beta1": 1.0},
        {"beta2": 1.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"grad_clip": -1.0},
        *({k: math.nan} for k in ("lr", "min_lr", "decay_share", "weight_decay", "beta1", "beta2", "eps", "grad_clip")),
        {"lr": math.inf},
        {"weight_decay": math.inf},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_and_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimConfig(**bad)


# Who gets what --------------------------------------------------------------------------------------------------------


def names_of(model, group):
    known = {id(p): n for n, p in model.named_parameters()}
    return {known[id(p)] for p in group["params"]}


def test_adamw_decays_every_matrix_and_no_norm_or_bias(tiny_config, make_model):
    model = make_model(KinConfig(**dataclasses.asdict(tiny_config), attention_bias=True))
    [adamw] = make_optimizers(model, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6))
    decayed, plain = adamw.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in adamw.param_groups)
    every = {n for n, _ in model.named_parameters()}
    assert names_of(model, plain) == {n for n in every if "norm" in n or n.endswith("bias")}
    assert names_of(model, decayed) == every - names_of(model, plain)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tiny_config, make_model):
    model = make_model(
        KinConfig(**dataclasses.asdict(tiny_config) | {"tie_word_embeddings": False}, attention_bias=True)
    )
    muon, adamw = make_optimizers(model, OptimConfig(optimizer="muon"))
    of_muon = names_of(model, muon.param_groups[0])
    assert of_muon == {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    of_adamw = set().union(*(names_of(model, g) for g in adamw.param_groups))
    assert of_adamw == {n for n, _ in model.named_parameters()} - of_muon
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names_of(model, adamw.param_groups[0])


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_refused(tiny_model):
    for p in tiny_model.model.parameters():
        p.requires_grad_(False)
    tiny_model.model.norm.weight.requires_grad_(True)
    [adamw] = make_optimizers(tiny_model, OptimConfig())
    assert [names_of(tiny_model, g) for g in adamw.param_groups] == [{"model.norm.weight"}]
    tiny_model.model.norm.weight.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter"):
        make_optimizers(tiny_model, OptimConfig())


# Muon -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 40), (1, 8)])
def test_orthogonal_keeps_the_singular_vectors_and_makes_the_values_about_one(shape):
    g = randn(3, *shape)
    out = orthogonal(g)
    for matrix, made in zip(g, out):
        u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        inner = u.mT @ made.double() @ vh.mT  # diagonal exactly when the singular vectors are the same
        values = inner.diagonal()
        assert ((values > 0.6) & (values < 1.3)).all()
        assert (inner - values.diag()).abs().max() < 1e-3
        torch.testing.assert_close(u @ inner @ vh, made.double(), rtol=0, atol=1e-3)  # and nothing beside them


def test_orthogonal_does_not_depend_on_the_scale_or_on_its_neighbours_and_bears_zero():
    g = randn(2, 8, 12)
    out = orthogonal(g)
    torch.testing.assert_close(orthogonal(g * 1000), out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(orthogonal(g[1:]), out[1:], rtol=1e-4, atol=1e-5)
    assert (orthogonal(torch.zeros(1, 8, 12)) == 0).all()


def naive_muon(weight, grads, lr, momentum, decay):
    """Each step by the paper, on one matrix, in float64."""
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for g in grads:
        buffer = momentum * buffer + (1 - momentum) * g.double()
        x = momentum * buffer + (1 - momentum) * g.double()  # Nesterov: a look ahead
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        weight = weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(weight.shape)) * x
    return weight


SHAPES = [(12, 20), (20, 12), (12, 20), (16, 16)]


def stepped(make, steps=3):
    """Weights after some steps of an optimizer, their starting values and the gradients used."""
    starts = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(s.clone()) for s in starts]
    grads = [[randn(*shape, seed=100 * t + i) for t in range(1, steps + 1)] for i, shape in enumerate(SHAPES)]
    optimizer = make(params)
    for t in range(steps):
        for p, mine in zip(params, grads):
            p.grad = mine[t].clone()
        optimizer.step()
    return [p.detach() for p in params], starts, grads


def test_muon_equals_a_naive_loop_over_the_matrices():
    after, starts, grads = stepped(lambda ps: Muon(ps, lr=0.05, weight_decay=0.3))
    for now, start, mine in zip(after, starts, grads):
        expected = naive_muon(start, mine, 0.05, 0.95, 0.3)
        torch.testing.assert_close(now.double(), expected, rtol=1e-3, atol=2e-4)
        assert (now - start).norm() > 0.03 * start.norm()  # far more than the tolerance


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_is_near_torchs_own():
    after, starts, _ = stepped(lambda ps: Muon(ps, lr=0.05, weight_decay=0.3))
    theirs, _, _ = stepped(lambda ps: torch.optim.Muon(ps, lr=0.05, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    for a, b, start in zip(after, theirs, starts):
        assert (a - b).norm() < 0.03 * (b - start).norm()  # torch's five steps are in bf16


def test_muon_leaves_a_matrix_without_gradient_alone():
    p = torch.nn.Parameter(randn(4, 6))
    before = p.detach().clone()
    Muon([p], lr=1.0).step()
    assert torch.equal(p, before)

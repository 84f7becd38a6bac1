"""Promises of longer contexts: attention in shifted groups is what a mask of loops allows, and only in training."""

import math

import pytest
import torch

from core import checkpoint
from core.errors import UserError
from extras import longlora
from extras.longlora import LongConfig
from model import Llama, ModelConfig

SIZES = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=16)  # fmt: skip


def model_of(**changes):
    model = Llama(SIZES)
    model.init_weights(0)
    longlora.begin(model, LongConfig(**changes))
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_each_head_sees_its_group_up_to_itself_and_nothing_else(packed):
    attention = model_of(shifted=True).model.layers[0].self_attn.train()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 8, generator=generator) for heads in (4, 2, 2))
    docs = torch.tensor([[0] * 5 + [1] * 11 + [2] * 16, [0] * 32])
    mask = ((docs[:, :, None] == docs[:, None, :]) & torch.ones(32, 32).tril().bool())[:, None] if packed else None
    y = attention.attend(q, k, v, mask)
    assert y.shape == q.shape
    for row in range(2):
        for head in range(4):
            shift = 0 if head < 2 else 4  # groups of 8, half a group later for the second half of the heads
            for t in range(32):
                seen = [s for s in range(t + 1) if (s + shift) // 8 == (t + shift) // 8
                        and (not packed or docs[row, s] == docs[row, t])]  # fmt: skip
                scores = torch.stack([q[row, head, t] @ k[row, head // 2, s] / math.sqrt(8) for s in seen])
                expected = scores.softmax(0) @ v[row, head // 2, seen]
                torch.testing.assert_close(y[row, head, t], expected, rtol=1e-5, atol=1e-6)


def test_outside_of_training_attention_is_the_whole_one():
    plain, shifted = model_of(), model_of(shifted=True)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids), shifted.eval()(ids))
        assert not torch.allclose(plain.train()(ids), shifted.train()(ids), atol=1e-4)


def test_rows_that_do_not_divide_and_contexts_that_are_none_are_refused():
    with pytest.raises(UserError, match="8 divides"):
        model_of(shifted=True).train()(torch.arange(30)[None])
    with pytest.raises(UserError, match="has 16 positions"):
        model_of(context=16)
    scaled = model_of(context=64)
    with pytest.raises(UserError, match="rope_type linear"):
        longlora.begin(scaled, LongConfig(context=128))
    for bad in ({"context": -1}, {"scaling": "none"}):
        with pytest.raises(ValueError):
            LongConfig(**bad)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_transformers_reads_the_longer_model_with_the_same_logits(tmp_path, scaling):
    transformers = pytest.importorskip("transformers")
    model = model_of(context=64, scaling=scaling).eval()
    checkpoint.save_model(tmp_path, model, None, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert not torch.allclose(model_of().eval()(ids), expected, atol=1e-4)

"""Promises of longer contexts: attention in shifted groups is what a mask of loops allows, and only in training."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import newborn

import export
import pretrain
from assembly import training
from assembly.inference import attach
from assembly.models import open_model, read_config
from core import hf_folder
from core.bins import BinWriter
from core.errors import UserError
from core.memory import save_memory
from extras.finetune.longlora import LongConfig
from model import Llama, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
SIZES = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


def reach(model, weights, **changes):
    """A model on the meta device as a training command changes it, with its weights."""
    base = training.Base(model, weights, None, Path("base"), {})
    base, _ = training.reach_further(base, LongConfig(**changes))
    return hf_folder.build(base.model, base.weights)


def model_of(**changes):
    with torch.device("meta"):
        model = save_memory(Llama(SIZES))
    return reach(model, newborn(SIZES).state_dict().items(), **changes)


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
                seen = [
                    s
                    for s in range(t + 1)
                    if (s + shift) // 8 == (t + shift) // 8 and (not packed or docs[row, s] == docs[row, t])
                ]
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
        reach(scaled, [], context=128)
    for bad in ({"context": -1}, {"scaling": "none"}):
        with pytest.raises(ValueError):
            LongConfig(**bad)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_transformers_reads_the_longer_model_with_the_same_logits(tmp_path, scaling):
    transformers = pytest.importorskip("transformers")
    model = model_of(context=64, scaling=scaling).eval()
    hf_folder.save_model(tmp_path, model, None, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert not torch.allclose(model_of().eval()(ids), expected, atol=1e-4)


def test_a_base_is_brought_further_by_pretraining_and_its_adapter_says_so(tmp_path, small, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = replace(SIZES, vocab_size=small.vocab_size)
    base = newborn(config)
    hf_folder.save_model(tmp_path / "base", base, small, {})
    with BinWriter(tmp_path / "text.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        for n in range(40):
            text = "天地玄黄，宇宙洪荒。" * (n % 7 + 1)
            out.add(small.encode(text, bos=True, eos=True), len(text.encode()))
    monkeypatch.chdir(tmp_path)
    words = [
        "--init_from",
        "base",
        "--data.train",
        "text.bin",
        "--data.val",
        "",
        "--prompt",
        "",
        "--context",
        "64",
        "--max_steps",
        "6",
        "--batch_tokens",
        "128",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--save_every",
        "3",
    ]
    run(pretrain, monkeypatch, str(ROOT / "configs/longlora.toml"), *words)
    values = load_file("out/long/adapter_model.safetensors")
    trained = {name.removeprefix("base_model.model.").removesuffix(".weight") for name in values}
    assert {"model.embed_tokens", "model.norm", "model.layers.1.input_layernorm"} <= trained
    assert not torch.equal(values["base_model.model.model.norm.weight"], base.model.norm.weight)
    model, weights = attach(open_model("base"), Path("out/long"))
    assert (model.config.rope_type, model.config.rope_factor, model.config.max_position_embeddings) == (
        "linear",
        4.0,
        64,
    )
    tuned = hf_folder.build(model, weights).eval()
    run(export, monkeypatch, "merge", "--adapter", "out/long", "--output", "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    ids = torch.randint(0, small.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tuned(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    # the whole model instead of an adapter; and what cannot be
    run(pretrain, monkeypatch, *words, "--optimizer", "adamw", "--out_dir", "out/whole")
    assert read_config("out/whole").rope_factor == 4.0
    # dynamic scaling leaves the number of positions in the config as it is, and trains on more all the same
    run(pretrain, monkeypatch, *words, "--scaling", "dynamic", "--optimizer", "adamw", "--out_dir", "out/dynamic")
    assert read_config("out/dynamic").max_position_embeddings == 16
    assert " rows x 64 positions = " in Path("out/dynamic/log.txt").read_text()
    for bad, says in (
        (["--context", "32"], "cannot be resumed"),
        (["--init_from", "out/whole"], "rope_type linear"),
        (["--init_from", "", "--tokenizer", "base"], "--init_from DIR"),
        (["--optimizer", "muon"], "LoRA"),
    ):
        with pytest.raises(UserError, match=says):
            run(pretrain, monkeypatch, str(ROOT / "configs/longlora.toml"), *words, *bad)


def run(command, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [command.__name__, *words])
    command.main()

"""Promises of `configs/`: each is accepted by its command, and its model has the size that its numbers say."""

import dataclasses
import pkgutil
import tomllib
from pathlib import Path

import pytest
import torch

import dpo
import grpo
import pretrain
import reward
import sft
from core import config
from core.device import describe, num_parameters
from model import Llama, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "configs").glob("*.toml"))
COMMANDS = (pretrain, sft, dpo, grpo, reward)
VOCABULARY = 64_794  # where a config leaves it to the tokenizer: ChatGLM2's, the largest one in common use here

each_config = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def sections_of(command, monkeypatch) -> dict[str, type]:
    """The sections that a command hands to core.config."""
    caught = []

    def catch(doc, sections, argv, default=None):
        caught.append(sections)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(config, "load", catch)
        with pytest.raises(SystemExit):
            command.main()
    return caught[0]


def test_there_are_configs():
    assert {"demo", "demo-sft"} <= {p.stem for p in PATHS}


@each_config
def test_a_command_accepts_every_key_and_value(path, monkeypatch):
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    fitting = [s for s in (sections_of(c, monkeypatch) for c in COMMANDS) if written.keys() <= s.keys()]
    assert fitting, f"no command has all of {list(written)}"
    resolved = config.as_dict(config.load("", fitting[0], [str(path)]))
    for section, keys in written.items():
        for key, value in keys.items():
            now = resolved[section][key]
            assert (list(now) if isinstance(now, tuple) else now) == value


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_no_key_of_a_wing_is_in_another_section(command, monkeypatch):
    """What `--key` means would depend on whether something before it has named the wing."""
    sections = sections_of(command, monkeypatch)
    keys = {
        name: {f.name for f in dataclasses.fields(pkgutil.resolve_name(s) if isinstance(s, str) else s)}
        for name, s in sections.items()
    }
    wings = [name for name, s in sections.items() if isinstance(s, str)]
    assert wings and not [(a, b) for a in wings for b in keys if a != b and keys[a] & keys[b]]


@each_config
def test_the_model_builds_and_has_as_many_parameters_as_its_numbers_say(path):
    m = tomllib.loads(path.read_text(encoding="utf-8")).get("model")
    if m is None:
        pytest.skip("this one sizes no model")
    c, f, layers, heads = (
        m[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    )
    vocabulary = m.get("vocab_size") or VOCABULARY
    d = m.get("head_dim") or c // heads
    kv_heads = m.get("num_key_value_heads") or heads
    attention = 2 * c * heads * d + 2 * c * kv_heads * d
    if m.get("attention_bias"):
        attention += heads * d + 2 * kv_heads * d + c
    embedding = vocabulary * c * (1 if m.get("tie_word_embeddings", True) else 2)
    expected = layers * (attention + 3 * c * f + 2 * c) + c + embedding

    sizes = ModelConfig(**(m | {"vocab_size": vocabulary}))
    with torch.device("meta"):
        model = Llama(sizes)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert num_parameters(model) == (expected, embedding)
    assert f"{expected:,}" in describe(model)


@each_config
def test_the_head_says_purpose_hardware_time_and_data(path):
    head = path.read_text(encoding="utf-8").split("\n[")[0]
    assert all(f"{word}:" in head for word in ("Purpose", "Hardware", "Time", "Data"))
    assert all(line.startswith("#") for line in head.strip().split("\n"))

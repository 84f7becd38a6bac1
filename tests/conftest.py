"""What several test files share: the import path, one thread, seeds, a tiny model, the optional real data."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # a bare `pytest` puts only the tests' own folder there
    sys.path.insert(0, str(ROOT))

from texts import BOOK, change  # noqa: E402

from core import hf_folder  # noqa: E402
from core.hf_config import family_of  # noqa: E402
from core.memory import save_memory  # noqa: E402
from model import Llama, ModelConfig  # noqa: E402
from tokenizer import load  # noqa: E402
from tokenizer.sentencepiece_writer import write_model  # noqa: E402
from tokenizer.train import train  # noqa: E402

torch.set_num_threads(1)
# Derandomized: the same examples in every run. No deadline: a busy machine is not a failure.
settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
settings.load_profile("seeded")


def lively(config: ModelConfig, seed: int = 0) -> Llama:
    """A model whose attention is far from uniform and whose norms and biases are not trivial, unlike a fresh one's."""
    model = save_memory(family_of(config).model(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.25, generator=generator)
    return model.eval()


def pytest_addoption(parser):
    parser.addoption(
        "--mutations", type=int, default=100_000, help="damaged inputs for each of six targets in tests/test_fuzz.py"
    )
    parser.addoption("--kills", type=int, default=200, help="random kills of training in tests/test_survival.py")
    parser.addoption("--mutation-seed", type=int, default=0, help="another number, other inputs")


@pytest.fixture
def make_model():
    """config -> a lively model."""
    return lively


@pytest.fixture
def tiny_config() -> ModelConfig:
    """Grouped heads and tied weights; every size differs from the others, so that no two can be mixed up unseen."""
    return ModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@pytest.fixture
def tiny_model(tiny_config) -> Llama:
    return lively(tiny_config)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora and tokenizers, in a folder beside the repository; most machines have none."""
    path = ROOT.parent / "shared/data"
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A vocabulary of ours."""
    return load(train(BOOK, tmp_path_factory.mktemp("small") / "tokenizer.model", 600))


@pytest.fixture(scope="session")
def small_with_prefix(small, tmp_path_factory):
    """The same with the dummy prefix that Llama and ChatGLM have."""
    model = small.model
    normalizer = (*(f for f in model.normalizer if f[0] != 3), (3, 0, 1))
    path = tmp_path_factory.mktemp("prefix") / "tokenizer.model"
    path.write_bytes(write_model(change(model, normalizer=normalizer)))
    return load(path)


@pytest.fixture(scope="session")
def home(small, tmp_path_factory) -> Path:
    """For the servers: a chat model, the same as a base model, and one with much room, all random."""
    home = tmp_path_factory.mktemp("home")
    for name, context in (("chat", 128), ("long", 1 << 15)):
        model = lively(
            ModelConfig(
                vocab_size=small.vocab_size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=context,
            )
        )
        if name == "long":  # greedy, it goes on until the context is full
            model.model.embed_tokens.weight.data[[small.bos_id, small.eos_id]] = 0
        hf_folder.save_model(home / name, model, small, {"chat_format": "bos"})
        hf_folder.save_model(home / f"{name}-base", model, small, {})
    return home

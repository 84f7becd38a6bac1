"""The benchmark of training measures what it says: every contestant takes real steps of the same model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bench import peers
from model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
SIZES = """[model]
vocab_size = 500
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 64
tie_word_embeddings = false
"""


@pytest.mark.heavy
@pytest.mark.parametrize("how", [[], ["--alike", "false", "--dtype", "bf16", "--micro_batches", "2"]])
def test_training_is_timed_beside_others_and_ends_in_json(tmp_path, how):
    pytest.importorskip("transformers")
    (tmp_path / "small.toml").write_text(SIZES)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            "train",
            "--model",
            str(tmp_path / "small.toml"),
            "--rounds",
            "2",
            "--seq_len",
            "64",
            "--peers",
            "ours",
            "transformers",
            "classic",
            *how,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for peer in ("ours", "transformers", "classic"):
        assert result[peer]["first_loss"] == pytest.approx(math.log(500), rel=0.02)  # nothing is known yet
        assert len(result[peer]["seconds"]) == 2 and result[peer]["peak_gb"] > 0.1
    assert result["ours"]["times_first"] == 1.0
    assert set(result["parts"]) == {"embedding", "attention", "MLP", "norms", "head and loss", "optimizer"}


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask")
def test_finetuning_is_measured_in_each_way_and_needs_less_the_less_it_trains(tmp_path):
    changes = (
        ("vocab_size = 500", "vocab_size = 2000"),
        ("hidden_size = 64", "hidden_size = 512"),
        ("layers = 2", "layers = 16"),
        ("intermediate_size = 128", "intermediate_size = 2048"),
    )
    sizes = SIZES
    for old, new in changes:
        sizes = sizes.replace(old, new)
    (tmp_path / "wide.toml").write_text(sizes)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            "finetune",
            "--model",
            str(tmp_path / "wide.toml"),
            "--rounds",
            "2",
            "--rows",
            "1",
            "--seq_len",
            "32",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    weights_gb = 4 * 16 * (4 * 512**2 + 3 * 512 * 2048) / 1e9
    full, low, packed = (result[way]["peak_gb"] for way in ("full", "lora", "qlora"))
    assert full > low + 2.5 * weights_gb  # gradients and two moments
    assert low > packed + 0.5 * weights_gb  # 27.5 of 32 bits, less what unpacks them and what the heap holds back
    assert all(0 < r["least"] <= r["step_s"] <= r["most"] for r in result.values())


@pytest.mark.parametrize("bad", [["--peers", "ours", "nobody"], ["--dtype", "fp16"], ["--gradient_checkpointing", "x"]])
def test_what_cannot_be_timed_is_refused_in_a_line(bad):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "train", "--model", "configs/demo.toml", *bad],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("error: "), done.stderr


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_every_contestant_learns_what_it_sees(peer, micro_batches):
    import torch

    if peer in ("transformers", "litgpt", "trainer"):
        pytest.importorskip({"trainer": "accelerate"}.get(peer, peer))
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    ids = torch.randint(0, 50, (2, 17))
    turns = Sixty()
    peers.compete(peer, peers.Setup(config, ids, micro_batches=micro_batches), turns)
    assert len(turns.losses) == 60 and turns.losses[-1] < 0.8 * turns.losses[0], turns.losses


class Sixty:
    def __init__(self):
        self.losses = []

    def wait(self):
        return len(self.losses) < 60

    def tell(self, loss):
        self.losses.append(loss)


@pytest.mark.heavy
def test_decoding_is_timed_beside_transformers_and_ends_in_json(tmp_path, small):
    pytest.importorskip("transformers")
    wide = SIZES.replace("hidden_size = 64", "hidden_size = 512").replace(
        "intermediate_size = 128", "intermediate_size = 2048"
    )
    (tmp_path / "small.toml").write_text(wide)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            "decode",
            "--model",
            str(tmp_path / "small.toml"),
            "--tokenizer",
            str(small.path),
            "--rounds",
            "2",
            "--new_tokens",
            "20",
            "--prompt_tokens",
            "8",
            "--contestants",
            "ours",
            "transformers",
            "ours-batch3",
            "ours-int8",
            "ours-bf16-compiled",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ours"]["same_ids"] == result["transformers"]["same_ids"] == result["ours-batch3"]["same_ids"] == 20
    assert result["ours"]["times_first"] == 1.0 and result["read_gb_per_s"] > 0.5
    weights = 2 * (4 * 512**2 + 3 * 512 * 2048) + 600 * 512
    for name, size in (("ours", 4), ("ours-bf16-compiled", 2), ("ours-int8", 1)):
        assert result[name]["mb_per_step"] == pytest.approx(size * weights / 1e6, rel=0.05)
    assert all(0 < r["from"] <= r["times_first"] <= r["to"] and r["first_ms"] > 0 for r in list(result.values())[1:])

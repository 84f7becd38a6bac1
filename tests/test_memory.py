"""Promises of the estimate of memory: what a step really takes, and a change that really fits."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import small_run
import torch

from core.errors import UserError
from core.optim import OptimConfig
from extras.estimate import memory
from model import Llama, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig(
    vocab_size=5000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
)
with torch.device("meta"):
    MODEL = Llama(CONFIG)
# With pages of its own for each tensor the system's figure is that of the tensors.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask")
@pytest.mark.parametrize(
    "options",
    [
        (16, "none", "adamw", True),
        (16, "selective", "adamw", False),
        (16, "full", "adamw", True),
        (2, "none", "muon", True),
    ],
)
def test_the_estimate_is_what_a_step_takes(options):
    rows, kind, optimizer, several = options
    settings = {
        "sizes": asdict(CONFIG),
        "rows": rows,
        "seq_len": 256,
        "kind": kind,
        "optimizer": optimizer,
        "micro_batches": 1 + several,
    }
    command = [sys.executable, "-m", "bench.step_memory", json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=OWN_PAGES)
    assert done.returncode == 0, done.stderr
    step = memory.Step(rows, 256, checkpointing=kind, several=several)
    expected = memory.peak_bytes(MODEL, step, OptimConfig(optimizer=optimizer))
    assert expected == pytest.approx(json.loads(done.stdout)["bytes"], rel=0.1)


def test_checkpointing_and_half_precision_take_less():
    need = {
        (k, d): memory.peak_bytes(MODEL, memory.Step(16, 256, d, k))
        for k in ("none", "selective", "full")
        for d in (torch.float32, torch.bfloat16)
    }
    for d in (torch.float32, torch.bfloat16):
        assert need["none", d] > need["selective", d] > need["full", d]
    assert need["none", torch.bfloat16] < need["none", torch.float32]


def test_a_run_that_would_not_fit_is_refused_with_the_smallest_change_that_does(tmp_path):
    options = {"batch_tokens": 64 * small_run.SEQ_LEN, "micro_batch": 64, "max_steps": 1}
    with pytest.raises(
        UserError, match=r"a step needs 0\.\d\d GB, max_memory_gb is 0\.002 -- --micro_batch \d+$"
    ) as caught:
        small_run.run(tmp_path / "a", **options, max_memory_gb=0.002)
    assert not list((tmp_path / "a").glob("checkpoint-*"))
    fits = int(str(caught.value).rpartition(" ")[2])
    small_run.run(tmp_path / "b", **options | {"micro_batch": fits}, max_memory_gb=0.002)
    assert "expected peak 0.00 GB, max_memory_gb is 0.002" in (tmp_path / "b/log.txt").read_text()
    with pytest.raises(UserError):  # twice as many would not have fitted: it is the smallest change
        small_run.run(tmp_path / "c", **options | {"micro_batch": 2 * fits}, max_memory_gb=0.002)
    with pytest.raises(UserError, match="one row with full checkpointing"):
        small_run.run(tmp_path / "d", **options, max_memory_gb=0.0001)
    with pytest.raises(UserError, match="max_memory_gb"):
        small_run.run(tmp_path / "e", max_memory_gb=1.0, parallel="fsdp")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is changed without glibc")
def test_freed_memory_stays_with_the_process_for_the_next_step():
    code = """
import sys, torch
from core import device
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) >> 10
if sys.argv[1] == "keep":
    device.keep_freed_memory()
before = resident()
tensors = [torch.ones(8 << 20) for _ in range(8)]
del tensors
print(resident() - before)
"""
    grown = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "as usual")
    }
    assert grown["keep"] > 8 * 30 and grown["as usual"] < 30, grown  # MiB

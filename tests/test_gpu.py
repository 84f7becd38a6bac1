"""Promises that only a GPU can keep or break; skipped where there is none.

pytest tests/test_gpu.py
"""

import gc
import shutil
from dataclasses import replace

import pytest
import small_run
import torch
from safetensors.torch import load_file
from test_trainer import metrics

from assembly import training
from core import distributed, errors
from core import memory as core_memory
from core.data import Batch
from core.device import choose_dtype
from core.generate import SamplingConfig
from core.hf_config import identify
from core.memory import save_memory
from core.optim import OptimConfig, make_optimizers
from core.parallel import DDP
from extras.decoding.batching import continued
from extras.estimate import memory
from extras.finetune import lora, nf4
from extras.formats import quantize
from extras.parallel.fsdp import FSDP
from extras.parallel.zero1 import ZeRO1
from model import ModelConfig
from trainer import next_token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
WIDE = ModelConfig(
    vocab_size=8000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=4,
    num_attention_heads=8,
    max_position_embeddings=512,
)


def train(folder, **options):
    """The small run on the GPU: losses of its steps, and the last checkpoint's tensors."""
    small_run.run(folder, **{"device": "cuda"} | options)
    at = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    return metrics(folder, "loss"), load_file(at / "model.safetensors") | load_file(at / "optimizer.safetensors")


def wide_model(seed=0, **changes):
    return small_run.newborn(replace(WIDE, **changes), seed).cuda()


def test_auto_takes_the_gpu_and_bf16_where_the_card_has_it():
    device = distributed.start("auto").device
    assert device.type == "cuda"
    fast = torch.cuda.get_device_capability() >= (8, 0)
    assert choose_dtype("auto", device) == (torch.bfloat16 if fast else torch.float16)


@pytest.mark.parametrize("rows", ["bin", "chats"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_in_fp32_are_those_of_the_cpu(tmp_path, rows, optimizer):
    options = {"rows": rows, "optimizer": optimizer}
    cpu, _ = train(tmp_path / "cpu/run", device="cpu", **options)
    gpu, _ = train(tmp_path / "gpu/run", **options)
    # Muon's products are in bf16 on a GPU.
    assert gpu == pytest.approx(cpu, rel=1e-5 if optimizer == "adamw" else 5e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_losses_in_half_precision_are_near_those_in_fp32(tmp_path, dtype):
    full, _ = train(tmp_path / "full/run", max_steps=30)
    half, _ = train(tmp_path / "half/run", max_steps=30, dtype=dtype)
    assert half == pytest.approx(full, rel=5e-3) and half != full
    if dtype == "fp16":
        assert all(s > 0 for s in metrics(tmp_path / "half/run", "scale"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows", ["bin", "chats"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, dtype, rows):
    losses, straight = train(tmp_path / "run", dtype=dtype, rows=rows)
    shutil.rmtree(tmp_path / "run/checkpoint-10")
    again, resumed = train(tmp_path / "run", dtype=dtype, rows=rows)
    assert "resumed from" in (tmp_path / "run/log.txt").read_text()
    assert again == losses
    assert straight.keys() == resumed.keys() and all(torch.equal(t, resumed[n]) for n, t in straight.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deterministic_gives_the_same_bits_each_time(tmp_path, dtype):
    """Long rows: for those above, attention's backward pass is one block, whose order is fixed anyway."""
    options = {
        "dtype": dtype,
        "deterministic": True,
        "seq_len": 512,
        "batch_tokens": 4096,
        "micro_batch": 4,
        "max_steps": 4,
    }
    try:
        runs = [
            train(tmp_path / name / "run", model=wide_model(vocab_size=small_run.VOCAB), **options) for name in "ab"
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    (a, first), (b, second) = runs
    assert a == b and all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_of_an_odd_vocabulary_are_those_of_the_cpu(dtype, monkeypatch):
    ids = torch.randint(0, 997, (2, 40), generator=torch.Generator().manual_seed(0))
    targets = torch.where(ids % 5 == 0, -100, ids)

    monkeypatch.setattr(core_memory, "LOGITS_AT_ONCE", 997 * 5)

    def results(device, dtype=torch.float32):
        model = small_run.newborn(replace(WIDE, vocab_size=997, num_hidden_layers=1))
        save_memory(model).to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            losses = model(ids.to(device), targets.to(device))
        losses.sum().backward()
        return [losses.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]

    for ours, wanted in zip(results("cuda", dtype), results("cpu"), strict=True):
        assert (ours - wanted).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.norm()


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_no_loss(tmp_path, kind):
    plain, _ = train(tmp_path / "a/run", dtype="bf16")
    thrifty, _ = train(tmp_path / "b/run", dtype="bf16", gradient_checkpointing=kind)
    assert thrifty == pytest.approx(plain, rel=1e-4)


def test_compiled_losses_are_those_of_the_plain_model(tmp_path):
    plain, _ = train(tmp_path / "a/run")
    compiled, _ = train(tmp_path / "b/run", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
def test_one_rank_of_nccl_gives_the_losses_of_no_rank(tmp_path, monkeypatch, parallel):
    """All that one card can tell of the strategies: the collectives run on the device."""
    import torch.distributed as dist

    plain, _ = train(tmp_path / "a/run", dtype="bf16")
    kind = {"ddp": DDP, "zero1": ZeRO1, "fsdp": FSDP}[parallel]
    monkeypatch.setattr(training, "choose_strategy", lambda options, ranks: kind)  # one rank has nothing to share
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shared, _ = train(tmp_path / "b/run", dtype="bf16", parallel=parallel)
    finally:
        dist.destroy_process_group()
    assert shared == pytest.approx(plain, rel=2e-3 if parallel == "fsdp" else 1e-6)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("docs", [True, False])
def test_the_expected_memory_is_within_15_percent_of_what_a_step_takes(checkpointing, docs):
    step = memory.Step(16, 512, torch.bfloat16, checkpointing, docs, "cuda")
    expected = memory.peak_bytes(wide_model(), step, OptimConfig())
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = save_memory(wide_model(), checkpointing)
    optimizers = make_optimizers(model, OptimConfig())
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 8000, (16, 512), device="cuda")
    numbers = (torch.arange(512, device="cuda") // 200)[None].expand(16, -1).int() if docs else None
    for _ in range(3):
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = next_token_loss(model, Batch(ids, ids, numbers, []))
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert 0.85 < expected / measured < 1.15


def test_too_large_a_step_is_one_line_and_exit_code_2(tmp_path, capsys):
    def too_large():
        torch.empty(1 << 50, device="cuda")

    with pytest.raises(SystemExit) as stopped:
        errors.run(too_large)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: out of GPU memory") and "micro_batch" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_texts_are_those_of_transformers(tmp_path, compiled):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = wide_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    config = transformers.LlamaConfig(**identify(model.config))
    peer = transformers.LlamaForCausalLM(config).cuda().eval()
    peer.load_state_dict(model.state_dict())
    prompts = [torch.randint(3, 8000, (n,)).tolist() for n in (1, 7, 30, 100)]
    greedy = SamplingConfig(max_new_tokens=40, temperature=0)
    ours = [text.added for (text,) in continued(model, prompts, greedy, set(), rows=4, compiled=compiled)]
    for prompt, mine in zip(prompts, ours):
        theirs = peer.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert mine == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_layers_give_the_product_of_the_weights_they_stand_for(kind):
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 200), torch.randn(300)
    layer = quantize.LAYERS[kind](weight.cuda(), bias.cuda())
    for rows in (1, 3, 40):
        x = torch.randn(rows, 200)
        y = layer(x.cuda().bfloat16()).float().cpu()
        assert torch.allclose(y, x.bfloat16().float() @ layer.weight().float().cpu().T + bias, atol=0.5, rtol=0.02)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_on_the_gpu_has_the_logits_of_the_same_on_the_cpu(kind):
    ids = torch.randint(3, 8000, (2, 50))
    on_gpu = quantize.quantize(wide_model(), kind)(ids.cuda()).float().cpu()
    on_cpu = quantize.quantize(wide_model().cpu(), kind)(ids).float()
    assert (on_gpu - on_cpu).abs().max() < 0.03 * on_cpu.abs().max()


def test_nf4_on_the_gpu_has_the_bytes_and_the_product_of_the_cpu():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(5, 128)
    for double in (False, True):
        cpu, gpu = nf4.Weight(weight, double), nf4.Weight(weight.cuda(), double)
        assert torch.equal(cpu.packed, gpu.packed.cpu())
        assert torch.allclose(gpu(x.cuda(), None).cpu(), cpu(x, None), atol=1e-3)


@pytest.mark.parametrize("packed", [None, nf4.Weight])
def test_lora_trains_its_matrices_alone(packed):
    model = wide_model()
    lora.apply(model, lora.LoraConfig(r=4, quantize="nf4" if packed else ""), packed)
    for name, p in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.zeros_(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(3, 8000, (2, 64), device="cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, ids).sum() / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == {n for n in before if ".lora_" in n}

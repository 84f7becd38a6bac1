"""Promises of LoRA: the numbers of W + alpha / r * B A, of one process on every way, of PEFT both ways, of a merged model."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import metrics

import export
import sft
import tokenizer
import trainer
from assembly.inference import InferenceConfig, attach, open_generator
from assembly.models import load_model, open_model
from core import hf_folder
from core.data import seed_micro_batch
from core.errors import UserError
from core.optim import OptimConfig, make_optimizers
from extras.families.llama_kin import KinConfig
from extras.finetune import lora, nf4
from extras.finetune.lora import LoraConfig, LoraLinear
from model import Llama, ModelConfig
from tokenizer import chat

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = "adapter_model.safetensors"
BLOCKS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def place(tmp_path, small, make_model, monkeypatch) -> Path:
    """A folder with a base model in base/, another in other/, one with an own head in untied/, and chats."""
    sizes = ModelConfig(
        vocab_size=small.vocab_size,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    for name, config, seed in (
        ("base", sizes, 0),
        ("other", sizes, 1),
        ("untied", replace(sizes, tie_word_embeddings=False), 2),
    ):
        hf_folder.save_model(tmp_path / name, make_model(config, seed), small, {"chat_format": "bos"})
    chats = [
        {"messages": [{"role": "user", "content": f"{a}是什么？"}, {"role": "assistant", "content": f"{b}的。"}]}
        for a in "天火雪叶夜金木水"
        for b in "蓝红白绿黑黄"
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = [
    "--chat.train",
    "chats.jsonl",
    "--chat_format",
    "bos",
    "--init_from",
    "base",
    "--max_steps",
    "6",
    "--batch_tokens",
    "512",
    "--micro_batch",
    "2",
    "--save_every",
    "2",
    "--eval_every",
    "3",
    "--log_every",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
    "--lr",
    "2e-2",
]
OVERLAYS = [str(ROOT / "configs" / name) for name in ("sft.toml", "lora.toml")]


def train(*words: str) -> Path:
    """Run sft.py in this process; returns its folder."""
    argv, sys.argv = sys.argv, ["sft.py", *OVERLAYS, *WORDS, *words]
    try:
        sft.main()
    finally:
        sys.argv = argv
    return Path(words[words.index("--out_dir") + 1] if "--out_dir" in words else "out/lora")


def launch(ranks: int, *words: str, wait: bool = True) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "sft.py"), *OVERLAYS, *WORDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if wait:
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said[1][-3000:]
    return process


def export_main(*words: str) -> None:
    argv, sys.argv = sys.argv, ["export.py", *words]
    try:
        export.main()
    finally:
        sys.argv = argv


def with_adapter(adapter: Path | str, base: str = "base") -> Llama:
    return hf_folder.build(*attach(open_model(base), lora.find_adapter(adapter))).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(torch.arange(5, 45)[None])
    return getattr(out, "logits", out)


def lively_adapter(model: torch.nn.Module, seed: int = 0) -> None:
    """B is zero at first: numbers that show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0.0, 0.1, generator=generator)


def refused(action, *parts: str) -> None:
    with pytest.raises(UserError) as e:
        action()
    assert all(part in str(e.value) for part in parts), str(e.value)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("layers.1.mlp.up_proj",), ("lm_head", "down_proj")])
def test_logits_are_those_of_weights_with_the_products_added_number_by_number(tiny_config, make_model, targets):
    config = replace(tiny_config, tie_word_embeddings="lm_head" not in targets)
    config = KinConfig(**asdict(config), attention_bias=True)
    plain, cfg = make_model(config), LoraConfig(r=3, alpha=5.0, target_modules=targets)
    adapted = lora.apply(make_model(config), cfg)
    lively_adapter(adapted)
    weights, changed = dict(adapted.named_parameters()), 0
    with torch.no_grad():
        for name, p in plain.named_parameters():
            a, b = (weights.get(name.replace(".weight", f".lora_{which}.weight")) for which in "AB")
            if name.endswith(".weight") and a is not None:
                changed += 1
                a, b = a.tolist(), b.tolist()
                product = [
                    [sum(b[i][k] * a[k][j] for k in range(3)) for j in range(p.shape[1])] for i in range(p.shape[0])
                ]
                p += 5.0 / 3 * torch.tensor(product)
    assert changed == {(): 21, ("q_proj", "v_proj"): 6, ("layers.1.mlp.up_proj",): 1}.get(targets, 4)
    assert (logits(plain) - logits(adapted)).abs().max() <= 1e-5 * logits(plain).abs().max()
    assert (logits(make_model(config)) - logits(adapted)).abs().max() > 0.1
    merged = lora.merge(adapted)
    assert not any(isinstance(m, LoraLinear) for m in merged.modules())
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert (logits(plain) - logits(merged)).abs().max() <= 1e-5 * logits(plain).abs().max()


def test_training_begins_at_the_base_from_numbers_that_only_the_seed_decides(place):
    def begun(seed, other=0):
        opened = open_model(place / "base")
        model = lora.apply(opened.model, LoraConfig(r=4))
        weights = lora.weights_at_birth(model, opened.weights, seed)
        torch.manual_seed(other)  # which must not matter
        return hf_folder.build(model, weights).eval()

    one, again, other = begun(1), begun(1, other=1), begun(2)
    assert torch.equal(logits(one), logits(load_model(place / "base").eval()))
    a, b, c = ({n: p.detach() for n, p in m.named_parameters() if "lora_A" in n} for m in (one, again, other))
    assert len(a) == 14 and all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    first = a["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert not torch.equal(first, a["model.layers.1.self_attn.q_proj.lora_A.weight"])
    theirs = torch.nn.Linear(32, 400, bias=False).weight  # PEFT's and torch's own beginning
    assert torch.cat([t.flatten() for n, t in a.items() if t.shape[1] == 32]).std() == pytest.approx(
        theirs.std().item(), rel=0.1
    )
    assert not any(p.any() for n, p in one.named_parameters() if "lora_B" in n)


def test_only_the_adapter_and_what_is_to_be_saved_change(tiny_config, make_model):
    model = lora.apply(
        make_model(tiny_config), LoraConfig(r=2, modules_to_save=("model.norm", "layers.0.input_layernorm"))
    )
    lively_adapter(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (optimizer,) = make_optimizers(model, OptimConfig(lr=1e-2))
    ids = torch.arange(60)[None]
    model.train()(ids, torch.arange(1, 61)[None]).sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n} | {
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    }
    assert {n for n, p in model.named_parameters() if p.grad is not None} == changed, (
        "no memory for gradients of the rest"
    )


def test_dropout_zeroes_its_share_of_what_enters_a_and_scales_the_rest_only_while_training():
    plain = torch.nn.Linear(1000, 1, bias=False)
    layer = LoraLinear(plain, LoraConfig(r=1, alpha=1.0, dropout=0.25))
    with torch.no_grad():
        plain.weight.zero_()
        layer.lora_A.weight.fill_(1.0)
        layer.lora_B.weight.fill_(1.0)
        kept = layer.train()(torch.eye(1000)).flatten()
    assert sorted(set(kept.tolist())) == pytest.approx([0, 4 / 3]) and 200 <= (kept == 0).sum() <= 300
    assert torch.equal(layer.eval()(torch.eye(1000)), torch.ones(1000, 1))


def test_what_is_dropped_is_another_for_each_seed_step_and_micro_batch_whatever_came_before():
    def drawn(*place):
        seed, step, number = place
        seed_micro_batch(seed, step, number)
        return torch.rand(4).tolist()

    places = [(seed, step, number) for seed in (1, 2) for step in (0, 1) for number in (0, 1, 3)]
    first = [drawn(*place) for place in places]
    assert first[::-1] == [drawn(*place) for place in places[::-1]]
    assert len({tuple(numbers) for numbers in first}) == len(places)


# ---------------------------------------------------------------- training with sft.py


def test_a_run_holds_the_adapter_only_and_its_base_is_untouched(place):
    before = {p.name: p.read_bytes() for p in (place / "base").iterdir() if p.is_file()}
    out = train("--modules_to_save", "norm")
    assert {p.name: p.read_bytes() for p in (place / "base").iterdir() if p.is_file()} == before
    for folder in (out, out / "checkpoint-6"):
        tensors = load_file(folder / ADAPTER)
        assert (
            len(tensors) == 2 * 14 + 1
            and not (folder / "model.safetensors").exists()
            and not (folder / "config.json").exists()
        )
        assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (8, 32)
        assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"].shape == (16, 8)
        assert all(t.any() for t in tensors.values())
        config, about = (json.loads((folder / name).read_text()) for name in ("adapter_config.json", "run.json"))
        assert config["target_modules"] == BLOCKS and config["modules_to_save"] == ["model.norm"]
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, "base")
        assert about["base_sha256"] == open_model(place / "base").digest and about["chat_format"] == "bos"
        assert (folder / "tokenizer.model").read_bytes() == (place / "base/tokenizer.model").read_bytes()
    assert hf_folder.verify(out / "checkpoint-6") is None
    assert metrics(out)[-1] < metrics(out)[0]


@pytest.mark.parametrize("packing", [[], ["--quantize", "nf4"], ["--quantize", "nf4", "--double_quant", "true"]])
def test_the_estimate_of_memory_counts_what_is_trained_and_leaves_a_run_as_it_is(place, packing, capsys):
    nf4.ROOMS.clear()  # as in a process that begins
    checked, plain = train(*packing, "--out_dir", "b", "--max_memory_gb", "3"), train(*packing, "--out_dir", "a")
    a, b = load_file(plain / "checkpoint-6" / ADAPTER), load_file(checked / "checkpoint-6" / ADAPTER)
    assert "expected peak" in (checked / "log.txt").read_text() and metrics(plain) == metrics(checked)
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    refused(lambda: train(*packing, "--out_dir", "c", "--max_memory_gb", "0.00001"), "a step needs")
    train(*packing, "--dry_run", "--out_dir", "d")
    assert "memory of one device" in capsys.readouterr().out and not Path("d").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("packing", [[], ["--quantize", "nf4", "--double_quant", "true"]])
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(place, packing):
    words = [*packing, "--dropout", "0.1", "--max_steps", "30"]
    unbroken, out = train(*words, "--out_dir", "unbroken"), place / "killed"
    process = launch(1, *words, "--out_dir", "killed", wait=False)
    while not (out / "checkpoint-4").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    launch(1, *words, "--out_dir", "killed")
    assert "resumed from" in (out / "log.txt").read_text()
    for name in (ADAPTER, "optimizer.safetensors"):
        a, b = (load_file(folder / "checkpoint-30" / name) for folder in (unbroken, out))
        assert a.keys() == b.keys() and len(a) >= 28 and all(torch.equal(a[n], b[n]) for n in a)
    assert metrics(unbroken) == metrics(out)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "way",
    [
        [],
        ["--parallel", "zero1"],
        ["--parallel", "fsdp"],
        ["--parallel", "fsdp", "--gradient_checkpointing", "full", "--reshard", "false"],
        ["--parallel", "pipeline", "--init_from", "untied", "--dropout", "0"],
    ],
)
def test_two_ranks_have_the_losses_of_one_process_and_its_files(place, way):
    words = ["--modules_to_save", "norm", "--val", "chats.jsonl", "--dropout", "0.1"]
    one = train(*words, *(way[2:] if "untied" in way else []), "--out_dir", "one")
    launch(2, *words, *way, "--out_dir", "two")
    for key in ("loss", "val_loss"):
        assert metrics(Path("two"), key) == pytest.approx(metrics(one, key), rel=2e-6)
    for folder in ("", "checkpoint-6"):
        a, b = (load_file(place / name / folder / ADAPTER) for name in ("one", "two"))
        assert a.keys() == b.keys() and all(
            a[n].shape == b[n].shape and torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-5) for n in a
        )
    assert (
        logits(with_adapter("one", (base := "untied" if "untied" in way else "base")))
        - logits(with_adapter("two", base))
    ).abs().max() < 1e-2
    launch(2, *words, *way, "--out_dir", "two", "--max_steps", "7")  # and its checkpoint is read again
    assert "resumed from two/checkpoint-6" in (place / "two/log.txt").read_text()


def test_sample_answers_with_the_adapter_on_its_base(place, small):
    out = train("--lora.r", "16", "--max_steps", "3")
    generator = open_generator(InferenceConfig(adapter=str(out), device="cpu"))
    assert generator.chat_format == "bos" and torch.equal(logits(generator.model), logits(with_adapter(out)))
    assert (logits(generator.model) - logits(load_model("base").eval())).abs().max() > 0.01
    for name in (ADAPTER, "adapter_config.json"):  # a run cut short
        (out / name).unlink()
    generator = open_generator(InferenceConfig(model="base", adapter=str(out), device="cpu"))
    assert torch.equal(logits(generator.model), logits(with_adapter(out / "checkpoint-3")))


def test_a_run_goes_on_only_with_the_same_adapter_and_never_in_a_full_runs_folder(place):
    train("--max_steps", "2")
    refused(lambda: train("--lora.r", "4"), "cannot be resumed", "lora was")
    refused(lambda: train("--target_modules", "q_proj"), "cannot be resumed", "lora was")
    refused(lambda: train("--init_from", "other"), "cannot be resumed", "base was")
    argv, sys.argv = sys.argv, ["sft.py", OVERLAYS[0], *WORDS, "--max_steps", "2", "--out_dir", "full"]
    sft.main()
    sys.argv = argv
    refused(lambda: train("--out_dir", "full"), "full/checkpoint-2 cannot be resumed", "lora was None")


# ---------------------------------------------------------------- PEFT


def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def theirs(base: str):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "base, words",
    [
        ("base", []),
        ("base", ["--modules_to_save", "embed_tokens,norm", "--target_modules", "q_proj,v_proj"]),
        ("untied", ["--modules_to_save", "lm_head"]),
        ("untied", ["--target_modules", "lm_head,gate_proj"]),
    ],
)
def test_peft_and_we_read_an_adapter_with_the_logits_of_the_model_that_was_trained(place, monkeypatch, base, words):
    kept, train_it = [], trainer.train
    monkeypatch.setattr(trainer, "train", lambda task, *rest: (kept.append(task.model), train_it(task, *rest)))
    out = train("--init_from", base, "--alpha", "20", *words)
    trained = logits(kept[0].eval())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(nexpected|issing).*")
        model = peft().PeftModel.from_pretrained(theirs(base), out)
    for read in (model, with_adapter(out, base)):
        assert (logits(read) - trained).abs().max() <= 1e-5 * trained.abs().max()
    assert (trained - logits(theirs(base))).abs().max() > 0.01


@pytest.mark.parametrize(
    "base, options",
    [
        ("base", {"target_modules": ["q_proj", "v_proj"]}),
        ("base", {"target_modules": "all-linear", "lora_dropout": 0.1}),
        ("base", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
        ("untied", {"target_modules": "all-linear", "modules_to_save": ["norm", "lm_head"]}),
        ("base", {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("untied", {"target_modules": ["up_proj"], "init_lora_weights": "gaussian"}),
    ],
)
def test_adapters_of_peft_load_here_with_equal_logits_and_can_be_merged_once(place, base, options):
    model = (
        peft()
        .get_peft_model(theirs(base), peft().LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **options))
        .eval()
    )
    lively_adapter(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    model.save_pretrained(place / "peft")
    scale = logits(model).abs().max()
    assert (logits(model) - logits(with_adapter("peft", base))).abs().max() <= 1e-5 * scale
    export_main("merge", "--model", base, "--adapter", "peft", "--output", "merged")
    for merged in (load_model("merged").eval(), theirs("merged")):
        assert (logits(model) - logits(merged)).abs().max() <= 1e-5 * scale
    refused(
        lambda: export_main("merge", "--model", "merged", "--adapter", "peft", "--output", "again"),
        "is merged into merged already",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"lora_bias": True, "r": 4},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_peft_can_do_and_we_cannot_is_refused_by_its_name(place, options):
    model = peft().get_peft_model(
        theirs("base"), peft().LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "bias": "none"} | options)
    )
    model.save_pretrained(place / "peft")
    refused(lambda: with_adapter("peft"), "adapter_config.json", next(iter(options)), "is not supported")


# ---------------------------------------------------------------- merging and refusals


def test_a_merged_model_has_the_adapters_logits_and_is_not_merged_with_it_again(place):
    out = train("--modules_to_save", "norm")
    adapted = logits(with_adapter(out))
    export_main("merge", "--adapter", str(out), "--output", "merged")
    for merged in (load_model("merged").eval(), theirs("merged")):
        assert (logits(merged) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert hf_folder.load_about("merged")["chat_format"] == "bos"
    assert (place / "merged/tokenizer.model").read_bytes() == (place / "base/tokenizer.model").read_bytes()
    refused(lambda: export_main("merge", "--adapter", str(out), "--output", "merged"), "merged exists")
    refused(
        lambda: export_main("merge", "--model", "merged", "--adapter", str(out), "--output", "again"),
        "is merged into merged already",
    )
    assert not (place / "again").exists()


def test_an_adapter_for_another_base_is_refused_with_both_hashes(place):
    out = train("--max_steps", "2")
    digests = [open_model(place / name).digest[:12] for name in ("base", "other")]
    refused(lambda: with_adapter(out, "other"), *digests)
    refused(lambda: export_main("merge", "--model", "other", "--adapter", str(out), "--output", "again"), *digests)
    refused(lambda: open_generator(InferenceConfig(model="other", adapter=str(out))), *digests)
    os.rename("base", "elsewhere")
    assert logits(with_adapter(out, "elsewhere")).isfinite().all(), "the same base under another name"
    refused(lambda: open_generator(InferenceConfig(adapter=str(out))), "its base 'base' is not here")


def test_a_damaged_adapter_is_refused_with_what_is_wrong(place):
    out = train("--max_steps", "2")
    config, tensors = json.loads((out / "adapter_config.json").read_text()), load_file(out / ADAPTER)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def changed(**entries):
        save_file({n: t for n, t in (tensors | entries).items() if t is not None}, out / ADAPTER)

    for entries, said in (
        ({name: None}, "up_proj.lora_B.weight is missing"),
        ({name: tensors[name][:-1]}, "up_proj.lora_B.weight has shape (51, 8)"),
        ({name: tensors[name] / 0}, "up_proj.lora_B.weight holds NaN"),
        ({"x": torch.zeros(1)}, "there are"),
    ):
        changed(**entries)
        refused(lambda: with_adapter(out), said)
    changed()
    for entries, said in (
        ({"r": 4}, "has shape"),
        ({"r": 0}, "r and alpha must be there"),
        ({"lora_alpha": 0}, "not 0"),
        ({"r": "8"}, "r = '8'"),
        ({"r": 33}, "r = 33"),
        ({"lora_alpha": -1}, "alpha = -1"),
        ({"lora_r": 8}, "r is given twice"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"modules_to_save": ["lm_head", "x"]}, "x is missing"),
        ({"target_modules": ["q_proj"]}, "is unexpected"),
        ({"target_modules": ["c_attn"]}, "'c_attn' is nowhere in the model"),
        ({"use_new_thing": 3}, "use_new_thing = '3' is not supported"),
    ):
        (out / "adapter_config.json").write_text(json.dumps(config | entries))
        refused(lambda: with_adapter(out), said)
    (out / "adapter_config.json").write_text(json.dumps(config))
    with_adapter(out)


def test_unfit_ranks_and_names_are_refused_with_those_that_fit(place):
    refused(lambda: train("--lora.r", "0"), "r = 0, must be at least 1")
    refused(lambda: train("--lora.r", "33"), "r = 33 for model.layers.0.self_attn.q_proj of 32 x 32", "from 1 to 32")
    refused(lambda: train("--lora.r", "17"), "r = 17 for model.layers.0.self_attn.k_proj of 16 x 32", "from 1 to 16")
    refused(
        lambda: train("--target_modules", "q_proj,query_key_value"),
        "target_modules: 'query_key_value'",
        "there are " + ", ".join(BLOCKS),
    )
    refused(lambda: train("--target_modules", "lm_head"), "'lm_head' is nowhere")  # tied
    refused(
        lambda: train("--modules_to_save", "q_proj"),
        "modules_to_save: 'q_proj'",
        "embed_tokens, input_layernorm, lm_head, norm",
    )
    refused(lambda: train("--dropout", "1"), "dropout = 1")
    refused(lambda: train("--alpha", "-1"), "alpha = -1")
    refused(lambda: train("--optimizer", "muon"), "muon")
    assert not Path("out").exists() or not list(Path("out").rglob("*.safetensors"))


def test_the_json_of_other_projects_is_taken_with_its_names(tmp_path):
    path = tmp_path / "lora.json"
    text = {
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "mlp.down_proj"],
        "modules_to_save": None,
    }
    path.write_text(json.dumps(text))
    cfg = LoraConfig(lora_config=str(path))
    assert (cfg.r, cfg.alpha, cfg.dropout, cfg.target_modules, cfg.modules_to_save) == (
        8,
        32,
        0.05,
        ("q_proj", "mlp.down_proj"),
        (),
    )
    with pytest.raises(ValueError, match="one or the other"):
        LoraConfig(r=4, lora_config=str(path))
    path.write_text(json.dumps(text | {"lora_rank": 4}))
    refused(lambda: LoraConfig(lora_config=str(path)), "lora.json: lora_rank = '4' is not supported")
    path.write_text(json.dumps({"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}))
    assert LoraConfig(lora_config=str(path)).target_modules == ()


def test_lora_is_not_there_where_it_is_not_asked_for(tiny_model):
    assert LoraConfig().r == 0
    refused(lambda: lora.apply(tiny_model, LoraConfig()), "r = 0")


def test_each_source_has_its_own_validation_loss_beside_that_of_all(place):
    lines = (place / "chats.jsonl").read_text().splitlines(keepends=True)
    (place / "a.jsonl").write_text("".join(lines[:5]))
    (place / "b.jsonl").write_text("".join(lines[20:40]))
    found = {}
    for name, files in (("a", ["a.jsonl"]), ("b", ["b.jsonl"]), ("both", ["a.jsonl", "b.jsonl"])):
        out = train("--val", *files, "--max_steps", "3", "--out_dir", name)
        found[name] = [m for m in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "val_loss" in m][
            -1
        ]
    parts = found["both"]["val_loss_by_source"]
    assert parts == {"a.jsonl": found["a"]["val_loss"], "b.jsonl": found["b"]["val_loss"]}
    text, targets = tokenizer.load("base"), []
    for name in "ab":
        chats = [json.loads(line)["messages"] for line in (place / f"{name}.jsonl").read_text().splitlines()]
        targets.append(sum(sum(chat.render(c, text, "bos")[1]) for c in chats))
    mean = (targets[0] * parts["a.jsonl"] + targets[1] * parts["b.jsonl"]) / sum(targets)
    assert found["both"]["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert "val_loss_by_source" not in found["a"]
    refused(lambda: train("--val", "a.jsonl", "./a.jsonl"), "the same file is given twice")

"""Promises of model families: their logits are those of transformers, whatever is done with them, and so are their files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pretrain
import sft
from assembly.inference import InferenceConfig, attach, open_generator
from assembly.models import load_model, open_model
from core import hf_folder
from core.bins import BinWriter
from core.errors import UserError
from core.generate import Cache, SamplingConfig, generate

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FALCON = {k: v for k, v in SIZES.items() if k != "intermediate_size"}


def bloom(heads):
    return "Bloom", {"vocab_size": 96, "hidden_size": 16 * heads, "n_layer": 2, "n_head": heads}


KINDS = {
    "llama": ("Llama", SIZES | {"num_key_value_heads": 2}),
    "llama, linear": ("Llama", SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, dynamic": (
        "Llama",
        SIZES
        | {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "llama, yarn": (
        "Llama",
        SIZES
        | {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            },
        },
    ),
    "llama, llama3": (
        "Llama",
        SIZES
        | {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 1e4,
            },
        },
    ),
    "qwen2": ("Qwen2", SIZES | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", SIZES | {"num_key_value_heads": 2, "head_dim": 32}),
    "glm": ("Glm", SIZES | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "gpt_neox, one after the other": ("GPTNeoX", SIZES | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_neox, all turned": (
        "GPTNeoX",
        SIZES
        | {
            "rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 1.0, "rope_type": "default"},
            "attention_bias": False,
        },
    ),
    "bloom, 4 heads": bloom(4),
    "bloom, 6 heads": bloom(6),
    "falcon, one key": ("Falcon", FALCON),
    "falcon, a key for each head": ("Falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, new": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, new with one norm": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
}


def theirs(kind, folder, **changes):
    """A model of transformers with random weights, norms and biases too, saved to a folder."""
    name, options = KINDS[kind][0], KINDS[kind][1] | changes
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    return model


def ids_of(rows, length):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(tmp_path, kind):
    model, ids = theirs(kind, tmp_path), ids_of(2, 40)
    ours = load_model(tmp_path).eval()
    with torch.no_grad():
        close(ours(ids), model(ids).logits)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "llama, dynamic"])  # whose keys turn anew as a text grows
def test_step_by_step_and_packed_logits_are_those_of_the_whole(tmp_path, kind):
    theirs(kind, tmp_path)
    model = load_model(tmp_path).eval()
    ids = ids_of(2, 20)
    with torch.no_grad():
        cache, whole = Cache(model.config, 2, 20), model(ids)
        parts = [model(part, cache=cache) for part in ids.split([9, 1, 1, 9], dim=1)]
        close(torch.cat(parts, dim=1), whole)
        # rows at different places: what comes after a shorter text is as without its padding
        cache, padded = Cache(model.config, 2, 20), ids[:, :9].clone()
        padded[0, 4:] = 3
        first = model(padded, cache=cache)
        cache.used = torch.tensor([4, 9])
        close(first[0, :4], whole[0, :4])
        steps = [model(torch.stack([ids[0, 4 + i], ids[1, 9 + i]])[:, None], cache=cache) for i in range(11)]
        steps = torch.cat(steps, dim=1)
        close(steps[0], whole[0, 4:15])
        close(steps[1], whole[1, 9:])
        docs = torch.tensor([[0] * 8 + [1] * 12])
        packed = model(ids[:1], docs=docs)[0]
        close(packed, torch.cat([model(ids[:1, :8])[0], model(ids[:1, 8:])[0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_transformers_reads_with_the_same_logits(tmp_path, kind):
    theirs(kind, tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.01 * torch.randn_like(p))
    hf_folder.save_model(tmp_path / "ours", ours, None, {})
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(back).__name__ == f"{KINDS[kind][0]}ForCausalLM"
    with torch.no_grad():
        close(back.eval()(ids_of(2, 40)).logits, ours(ids_of(2, 40)))
        close(load_model(tmp_path / "ours")(ids_of(2, 40)), ours(ids_of(2, 40)))


# ---------------------------------------------------------------- families that transformers does not have


def chatglm2_folder(folder):
    """GLM's folder under ChatGLM2's names, with its products joined. Source: THUDM's modeling_chatglm.py"""
    model = theirs("glm", folder / "glm")
    state, renamed = load_file(folder / "glm/model.safetensors"), {}
    for part in ("weight", "bias"):
        for i in range(2):
            block = [state.pop(f"model.layers.{i}.self_attn.{w}_proj.{part}") for w in "qkv"]
            renamed[f"transformer.encoder.layers.{i}.self_attention.query_key_value.{part}"] = torch.cat(block)
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "lm_head": "transformer.output_layer",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    for name, t in state.items():
        for ours, their in names.items():
            name = name.replace(ours, their)
        renamed[name] = t
    save_file(renamed | {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    config = {
        "model_type": "chatglm",
        "padded_vocab_size": 96,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "multi_query_group_num": 2,
        "multi_query_attention": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "seq_length": 64,
        "apply_residual_connection_post_layernorm": False,
        "layernorm_epsilon": model.config.rms_norm_eps,
        "original_rope": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model, renamed, config


def test_chatglm2_is_glm_under_other_names_with_joined_products(tmp_path):
    (model, renamed, config), ids = chatglm2_folder(tmp_path), ids_of(2, 40)
    ours = load_model(tmp_path).eval()
    with torch.no_grad():
        close(ours(ids), model(ids).logits)
    hf_folder.save_model(tmp_path / "back", ours, None, {})
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == renamed.keys() and all(torch.equal(back[n], renamed[n]) for n in back)
    assert config.items() <= json.loads((tmp_path / "back/config.json").read_text()).items()


def baichuan_folder(folder, kind, **changes):
    """Llama's folder with its three products joined, as Baichuan has them."""
    model = theirs(kind, folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for i in range(2):
        block = [state.pop(f"model.layers.{i}.self_attn.{w}_proj.weight") for w in "qkv"]
        state[f"model.layers.{i}.self_attn.W_pack.weight"] = torch.cat(block)
    save_file(state, folder / "model.safetensors")
    config = {k: v for k, v in config.items() if k not in ("rope_parameters", "num_key_value_heads", "head_dim")}
    config |= {"model_type": "baichuan"} | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return model


KINDS["llama, as many keys"] = ("Llama", SIZES)


def test_baichuan_7b_is_llama_with_its_products_joined(tmp_path):
    model, ids = baichuan_folder(tmp_path, "llama, as many keys"), ids_of(2, 40)
    with torch.no_grad():
        close(load_model(tmp_path)(ids), model(ids).logits)


def test_baichuan_13b_is_that_with_the_biases_of_alibi_instead_of_rotations(tmp_path):
    """Against attention written out with loops: no rotation, a bias that falls with distance, slopes 1/4, 1/16 ..."""
    theirs_model = baichuan_folder(tmp_path, "llama, as many keys", max_position_embeddings=None, model_max_length=64)
    ids, w = ids_of(1, 12), dict(theirs_model.named_parameters())

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[name]

    with torch.no_grad():
        x = w["model.embed_tokens.weight"][ids[0]]
        for i in range(2):
            p = f"model.layers.{i}."
            h = norm(x, p + "input_layernorm.weight")
            q, k, v = (h @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
            y = torch.zeros_like(x)
            for head in range(4):
                part, slope = slice(16 * head, 16 * head + 16), 4.0 ** -(head + 1)
                for t in range(12):
                    scores = torch.stack([q[t, part] @ k[s, part] / 4 - slope * (t - s) for s in range(t + 1)])
                    y[t, part] = scores.softmax(0) @ v[: t + 1, part]
            x = x + y @ w[p + "self_attn.o_proj.weight"].T
            h = norm(x, p + "post_attention_layernorm.weight")
            gate, up = (h @ w[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
        close(load_model(tmp_path)(ids)[0], norm(x, "model.norm.weight") @ w["lm_head.weight"].T)


# ---------------------------------------------------------------- what folders say


def test_names_of_old_exports_are_read(tmp_path):
    """BLOOM's own files leave `transformer.` out, Pythia's hold constants, old configs have other keys."""
    for kind in ("bloom, 4 heads", "gpt_neox"):
        folder = tmp_path / kind
        model, ids = theirs(kind, folder), ids_of(2, 40)
        state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        if kind == "gpt_neox":
            state |= {
                f"gpt_neox.layers.0.attention.{n}": torch.ones(1)
                for n in ("bias", "masked_bias", "rotary_emb.inv_freq")
            }
            del config["rope_parameters"]
            config |= {"rotary_pct": 0.25, "rotary_emb_base": 10000}
        else:
            state = {n.removeprefix("transformer."): t for n, t in state.items()}
            config |= {"n_embed": config.pop("hidden_size"), "num_attention_heads": config.pop("n_head")}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            close(load_model(folder)(ids), model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("bloom, 4 heads", {"apply_residual_connection_post_layernorm": True}, "not supported"),
        ("bloom, 4 heads", {"hidden_size": None}, "missing"),
        ("bloom, 4 heads", {"hidden_size": "64"}, "not of type int"),
        ("bloom, 4 heads", {"qkv": "row", "layer_norm": False}, ""),  # words of ours mean nothing in their files
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act"),
        ("gpt_neox", {"hidden_act": ["gelu"]}, "hidden_act"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "turned"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": -1}}, "turned"),
        ("gpt_neox", {"rope_parameters": ["partial_rotary_factor"]}, "not an object"),
        ("gpt_neox", {"use_parallel_residual": "yes"}, "not true or false"),
        ("falcon, one key", {"alibi": True}, "not supported"),
        ("falcon, new", {"num_kv_heads": 3}, "divisible"),
        ("glm", {"hidden_act": "gelu"}, "not supported"),
        ("glm", {"model_type": "chatglm"}, "first ChatGLM"),
        ("llama", {"model_type": "baichuan", "vocab_size": 125696}, "Baichuan 2"),
        ("qwen2", {"use_sliding_window": True}, "sliding"),
    ],
)
def test_what_a_config_asks_for_and_is_not_here_is_refused_by_name(tmp_path, kind, changes, says):
    theirs(kind, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if not says:
        load_model(tmp_path)
        return
    with pytest.raises(UserError, match=says) as e:
        load_model(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("kind", [*KINDS, "chatglm", "baichuan"])
def test_no_value_in_a_config_is_more_than_a_refusal(tmp_path, kind):
    if kind in KINDS:
        theirs(kind, tmp_path)
    elif kind == "chatglm":
        chatglm2_folder(tmp_path)
    else:
        baichuan_folder(tmp_path, "llama, as many keys")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    keys = [
        *config,
        "rope_scaling",
        "rope_parameters",
        "rope_ratio",
        "num_kv_heads",
        "rotary_pct",
        "rotary_emb_base",
        "layernorm_epsilon",
    ]
    odd = [
        None,
        -1,
        0,
        1.5,
        10**400,
        1 << 60,
        True,
        "x",
        [],
        [1],
        {},
        {"partial_rotary_factor": [1]},
        {"rope_type": "yarn", "factor": -1},
        {"type": {}, "factor": 2},
        {"rope_theta": "x"},
        {"partial_rotary_factor": 10**400},
    ]
    for key in keys:
        for value in odd:
            path.write_text(json.dumps(config | {key: value}))
            try:
                open_model(tmp_path)
            except UserError as e:
                assert "\n" not in str(e) and len(str(e)) < 3000, (key, value)


# ---------------------------------------------------------------- commands

ROOT = Path(__file__).resolve().parents[1]
ONE_OF_EACH = ["llama", "qwen2", "qwen3", "glm", "gpt_neox", "bloom, 4 heads", "falcon, new"]
WORDS = [
    "--max_steps",
    "4",
    "--micro_batch",
    "2",
    "--batch_tokens",
    "256",
    "--save_every",
    "2",
    "--eval_every",
    "2",
    "--log_every",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
    "--warmup_steps",
    "1",
]


def run(command, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [command.__name__, *WORDS, *words])
    command.main()


@pytest.fixture
def place(tmp_path, small, monkeypatch):
    """Chats and a bin; `base(kind)` makes a folder with a model and the tokenizer."""
    chats = [
        {"messages": [{"role": "user", "content": f"{a}是什么？"}, {"role": "assistant", "content": f"{b}的。"}]}
        for a in "天火雪叶夜金木水"
        for b in "蓝红白绿黑黄"
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats))
    with BinWriter(tmp_path / "text.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        for chat in chats * 4:
            text = "".join(m["content"] for m in chat["messages"])
            out.add(small.encode(text, bos=True, eos=True), len(text.encode()))
    monkeypatch.chdir(tmp_path)

    def base(kind):
        model = theirs(kind, tmp_path / "base", vocab_size=small.vocab_size)
        small.save(tmp_path / "base")
        return model

    return base


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("way", ["full", "lora", "qlora"])
def test_every_family_is_trained_on_chats_and_read_by_transformers_afterwards(place, monkeypatch, kind, way):
    model = place(kind)
    configs = [str(ROOT / "configs" / f"{name}.toml") for name in ["sft", way][: 1 + (way != "full")]]
    words = [
        *configs,
        "--init_from",
        "base",
        "--chat.train",
        "chats.jsonl",
        "--chat_format",
        "bos",
        "--chat.val",
        "chats.jsonl",
        "--out_dir",
        "out/new",
        "--lr",
        "1e-2",
        "--seq_len",
        "32",
        "--batch_tokens",
        "128",
    ]
    run(sft, monkeypatch, *words)
    losses = [m["loss"] for m in map(json.loads, Path("out/new/metrics.jsonl").read_text().splitlines()) if "loss" in m]
    assert losses[-1] < losses[0]
    run(sft, monkeypatch, *words, "--max_steps", "6")  # goes on from its checkpoint
    assert Path("out/new/checkpoint-6").is_dir() and Path("out/new/checkpoint-4").is_dir()
    if way == "full":
        back = transformers.AutoModelForCausalLM.from_pretrained("out/new").eval()
        ids = ids_of(2, 20)
        with torch.no_grad():
            close(load_model("out/new")(ids), back(ids).logits)
            assert not torch.allclose(back(ids).logits, model(ids).logits, atol=1e-3)
            # and it says what transformers has it say, the most likely token each time
            generator = open_generator(InferenceConfig(model="out/new", device="cpu"))
            asked = generator.encode("天是什么？")
            greedy = SamplingConfig(max_new_tokens=8, temperature=0)
            said = list(generate(generator.model, asked, greedy, generator.stop_ids))
            expected = back.generate(torch.tensor([asked]), max_new_tokens=8, do_sample=False, pad_token_id=0)[
                0, len(asked) :
            ].tolist()
            assert said and said == expected[: len(said)]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("some", [False, True])
def test_adapters_of_every_family_go_to_peft_and_come_back(place, monkeypatch, kind, some):
    peft = pytest.importorskip("peft")
    model = place(kind)
    name = "query_key_value" if kind.startswith(("gpt", "bloom", "falcon")) else "v_proj"
    words = ["--target_modules", f"layers.1.self_attn.{name}", "--modules_to_save", "embed_tokens"] if some else []
    run(
        sft,
        monkeypatch,
        str(ROOT / "configs/sft.toml"),
        str(ROOT / "configs/lora.toml"),
        "--init_from",
        "base",
        "--chat.train",
        "chats.jsonl",
        "--chat_format",
        "bos",
        "--chat.val",
        "",
        "--out_dir",
        "out/new",
        "--lr",
        "3e-2",
        "--seq_len",
        "32",
        "--batch_tokens",
        "128",
        *words,
    )
    ids = ids_of(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        ours = hf_folder.build(*attach(open_model("base"), Path("out/new"))).eval()
        theirs_model = peft.PeftModel.from_pretrained(model, "out/new").eval()
        close(ours(ids), theirs_model(ids).logits)
        assert not torch.allclose(ours(ids), before, atol=1e-3)
        theirs_model.save_pretrained("peft")
        again = hf_folder.build(*attach(open_model("base"), Path("peft")))
        close(again.eval()(ids), ours(ids))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_continued_pretraining_begins_at_the_loss_of_the_base(place, small, monkeypatch, kind):
    model = place(kind)
    ids = np.fromfile("text.bin", dtype=np.uint16)[: 8 * 32 + 1].astype(np.int64)
    rows = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(rows[:-1].view(8, 32)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[1:]).item()
    with BinWriter("eight.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        out.add(ids.tolist(), 1000)
    run(
        pretrain,
        monkeypatch,
        "--init_from",
        "base",
        "--data.train",
        "eight.bin",
        "--data.val",
        "",
        "--docs",
        "false",
        "--seq_len",
        "32",
        "--out_dir",
        "out/more",
        "--prompt",
        "",
        "--optimizer",
        "adamw",
        "--max_steps",
        "1",
    )
    first = json.loads(Path("out/more/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (["--model_type", "qwen3"], ["q_norm.weight"]),
        (["--kin.model_type=qwen2"], ["q_proj.bias", "v_proj.bias"]),
        (["--attention_bias"], ["o_proj.bias"]),
        (["--rope_type", "yarn", "--rope_factor", "4", "--original_max_position_embeddings", "16"], []),
    ],
)
def test_a_new_model_may_be_one_of_llamas_kin(place, small, monkeypatch, words, there):
    place("llama")
    sizes = [
        "--hidden_size",
        "32",
        "--num_attention_heads",
        "2",
        "--intermediate_size",
        "48",
        "--num_hidden_layers",
        "2",
        "--dtype",
        "fp32",
    ]
    data = ["--data.train", "text.bin", "--data.val", "", "--tokenizer", "base", "--prompt", "", "--seq_len", "32"]
    words = [*sizes, "--max_position_embeddings", "64", *data, "--out_dir", "out/new", *words]
    run(pretrain, monkeypatch, *words)
    names = load_file("out/new/model.safetensors")
    assert all(f"model.layers.1.self_attn.{name}" in names for name in there)
    back = transformers.AutoModelForCausalLM.from_pretrained("out/new").eval()
    with torch.no_grad():
        close(load_model("out/new").eval()(ids_of(2, 20)), back(ids_of(2, 20)).logits)
    run(pretrain, monkeypatch, *words, "--max_steps", "6")  # goes on from its checkpoint
    assert "resumed from out/new/checkpoint-4" in Path("out/new/log.txt").read_text()
    with pytest.raises(UserError, match="model was"):
        run(pretrain, monkeypatch, *words, "--max_steps", "8", "--rope_type", "linear", "--rope_factor", "2")
    with pytest.raises(UserError, match=r"rope_factor is 0\.5, must be from 1"):
        run(pretrain, monkeypatch, *words, "--rope_type", "linear", "--rope_factor", "0.5")
    with pytest.raises(UserError, match="model_type = 'qwen4', must be one of llama, qwen2, qwen3"):
        run(pretrain, monkeypatch, *words, "--model_type", "qwen4")

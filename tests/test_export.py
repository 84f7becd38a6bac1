"""The files for other programs, against these programs: llama.cpp itself, gguf's reader, run.c's loops written in numpy."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import struct
import sys
import urllib.request

import numpy as np
import pytest
import torch
from texts import BOOK, HARD, change, real_model, real_texts

import export
import sample
import tokenizer
from assembly.models import load_model
from core import hf_folder
from core.errors import UserError
from core.generate import SamplingConfig
from extras.decoding.batching import complete
from extras.families.llama_kin import KinConfig
from extras.formats import gguf_file, llama2c, original_llama
from model import ModelConfig
from tokenizer import chat
from tokenizer.sentencepiece_model import CONTROL, SPACE, TokenizerError
from tokenizer.sentencepiece_writer import write_model

GREEDY = SamplingConfig(max_new_tokens=48, temperature=0)
SHAPE = ModelConfig(
    vocab_size=600,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
SHAPES = {
    "grouped": SHAPE,
    "plain, untied": dataclasses.replace(SHAPE, num_key_value_heads=4, tie_word_embeddings=False),
    "odd sizes": dataclasses.replace(SHAPE, hidden_size=40, head_dim=0, intermediate_size=52, num_hidden_layers=3),
}
OF_GGUF = SHAPES | {
    "wide heads": dataclasses.replace(SHAPE, head_dim=24, rope_theta=500.0, rms_norm_eps=1e-3),
    "biases": KinConfig(**dataclasses.asdict(SHAPE) | {"attention_bias": True, "tie_word_embeddings": False}),
    "rows without a piece": dataclasses.replace(SHAPE, vocab_size=640),
}


def run(monkeypatch, *words) -> None:
    """export.py, as a user types it."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    export.main()


def refusal(monkeypatch, *words) -> str:
    with pytest.raises((UserError, TokenizerError)) as caught:
        run(monkeypatch, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path, make_model, small):
    """config, chat format -> a model folder of ours."""

    def make(config=SHAPE, chat_format=None, text=small, name="run"):
        about = {"chat_format": chat_format} if chat_format else {}
        hf_folder.save_model(tmp_path / name, make_model(config), text, about)
        return tmp_path / name

    return make


@pytest.fixture
def stories(shared_data, tmp_path, monkeypatch):
    """The real stories260K as a folder of ours."""
    weights = shared_data / "weights"
    if not (weights / "stories260K.bin").exists():
        pytest.skip(f"{weights}/stories260K.bin is not here")
    run(
        monkeypatch,
        "from-llama2c",
        "--model",
        weights / "stories260K.bin",
        "--tokenizer",
        weights / "tok512.bin",
        "--output",
        tmp_path / "stories",
    )
    return tmp_path / "stories"


# ---------------------------------------------------------------- GGUF


@contextlib.contextmanager
def llama_cpp(path):
    """llama.cpp with a file in it: (endpoint, what is asked) -> what it answers. Attention and its cache in fp32."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = str(path), 0, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads, params.use_jinja = 1, True
    server = xllamacpp.Server(params)
    address = server.listening_address

    def ask(endpoint: str, **body):
        request = urllib.request.Request(
            f"{address}/{endpoint}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    yield ask
    del server


def ids_of(ask, text: str, special: bool = False) -> list[int]:
    return ask("tokenize", content=text, add_special=special, parse_special=special)["tokens"]


def probabilities(ask, ids: list[int], size: int) -> np.ndarray:
    """(size,) logarithms of what llama.cpp gives the next id."""
    # It says nothing of an end or half a character: it is made to choose the byte of a letter, which changes no logits.
    reply = ask(
        "completion", prompt=ids, n_predict=1, temperature=0, n_probs=size, cache_prompt=False, logit_bias=[[101, 1e4]]
    )
    row = np.full(size, -np.inf)
    for entry in reply["completion_probabilities"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


def gguf_of(folder, kind="f32"):
    return folder.with_name(f"{folder.name}-{kind}") / f"{folder.name}-{kind}.gguf"


@pytest.mark.parametrize("name", OF_GGUF)
def test_llama_cpp_computes_our_probabilities_from_an_f32_file(name, folder, monkeypatch):
    path = folder(OF_GGUF[name])
    run(monkeypatch, "gguf", "--model", path, "--type", "f32")
    model, size = load_model(path).eval(), OF_GGUF[name].vocab_size
    ids = [1, *np.random.default_rng(0).integers(3, 600, 30).tolist()]
    with llama_cpp(gguf_of(path)) as ask, torch.no_grad():
        for length in (2, 7, 31):
            ours = model(torch.tensor([ids[:length]]))[0, -1].log_softmax(-1).numpy()
            np.testing.assert_allclose(probabilities(ask, ids[:length], size), ours, atol=2e-3)


def test_llama_cpp_writes_the_same_greedy_text(stories, monkeypatch):
    run(monkeypatch, "gguf", "--model", stories, "--type", "f32")
    model, text = load_model(stories).eval(), tokenizer.load(stories)
    with llama_cpp(gguf_of(stories)) as ask:
        for prompt in ("", "Once upon a time", "Tim had a red car", "中 was the"):
            ids = text.encode(prompt, bos=True)
            ours = complete(model, [ids], dataclasses.replace(GREEDY, max_new_tokens=200), {text.eos_id})[0]
            theirs = ask(
                "completion",
                prompt=prompt or [text.bos_id],
                n_predict=200,
                temperature=0,
                return_tokens=True,
                repeat_penalty=1.0,
            )
            assert theirs["tokens"] == ours
            assert theirs["content"].lstrip() == text.decode([*ids, *ours]).removeprefix(prompt).lstrip()


@pytest.mark.parametrize("kind, least", [("f16", 0.999), ("bf16", 0.99), ("q8_0", 0.99), ("q4_0", 0.8)])
def test_llama_cpp_reads_every_type_and_stays_close(kind, least, stories, monkeypatch):
    run(monkeypatch, "gguf", "--model", stories, "--type", kind)
    model, text = load_model(stories).eval(), tokenizer.load(stories)
    ids = text.encode("Once upon a time, there was a little girl named", bos=True)
    with llama_cpp(gguf_of(stories, kind)) as ask, torch.no_grad():
        theirs = np.exp(probabilities(ask, ids, 512))
    ours = model(torch.tensor([ids]))[0, -1].softmax(-1).detach().numpy()
    assert least < np.minimum(ours, theirs).sum() <= 1 + 1e-3  # the share of probability both agree on


@pytest.mark.parametrize("chat_format", chat.FORMATS)
def test_llama_cpp_gives_the_ids_of_our_chats(chat_format, folder, small, small_with_prefix, monkeypatch):
    talk = [
        {"role": "user", "content": "天下大势，如何？"},
        {"role": "assistant", "content": "分久必合。"},
        {"role": "user", "content": "The fox\nlaughs:  haha"},
    ]
    for number, text in enumerate((small, small_with_prefix)):
        path = folder(SHAPE, chat_format, text, name=f"run{number}")
        run(monkeypatch, "gguf", "--model", path, "--type", "f32")
        model = load_model(path).eval()
        with llama_cpp(gguf_of(path)) as ask:
            for messages in (talk[:1], talk, [{"role": "system", "content": "一二三"}, *talk]):
                ours, _ = chat.render(messages, text, chat_format, generation=True)
                prompt = ask("apply-template", messages=messages)["prompt"]
                assert ids_of(ask, prompt, special=True) == ours
                reply = ask("v1/chat/completions", messages=messages, max_tokens=12, temperature=0, repeat_penalty=1.0)
                assert reply["usage"]["prompt_tokens"] == len(ours)
                stops = chat.end_ids(text, chat_format)
                answer = complete(model, [ours], dataclasses.replace(GREEDY, max_new_tokens=12), stops)[0]
                said = reply["choices"][0]["message"]["content"]
                # Random weights write broken characters; how many U+FFFD stand for one is a matter of taste.
                assert said.replace("\ufffd", "").strip() == text.decode(answer).replace("\ufffd", "").strip()


def test_an_answer_ends_in_llama_cpp_where_it_ends_here(folder, small, monkeypatch):
    path = folder(SHAPE, "chatml")
    run(monkeypatch, "gguf", "--model", path, "--type", "f32")
    with llama_cpp(gguf_of(path)) as ask:
        for end in chat.end_ids(small, "chatml"):
            reply = ask("completion", prompt=[5], n_predict=3, logit_bias=[[end, 1000]], temperature=0)
            assert reply["stop_type"] == "eos" and reply["tokens_predicted"] <= 1


def many_real_texts(count):
    """Real texts, whole and in sentences."""
    texts = real_texts(4000)
    cut = itertools.chain.from_iterable(re.split("(?<=[。！？])", text) for text in texts)
    return list(itertools.islice((t for t in dict.fromkeys([*texts, *cut]) if t and SPACE not in t), count))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["chatglm2-6b.tokenizer.model", "llama2-32k.tokenizer.model"])
def test_llama_cpp_gives_our_ids_on_three_thousand_real_texts(name, folder, monkeypatch):
    text = tokenizer.load(real_model(name))
    path = folder(dataclasses.replace(SHAPE, vocab_size=text.vocab_size + 5, num_hidden_layers=1), text=text)
    run(monkeypatch, "gguf", "--model", path, "--type", "q8_0")
    texts = many_real_texts(3000)
    assert len(texts) == 3000
    with llama_cpp(gguf_of(path, "q8_0")) as ask:
        for line in [*texts, *(t for t in HARD if t and SPACE not in t and "\0" not in t)]:
            assert ids_of(ask, line) == text.encode(line), line
        assert ids_of(ask, "话说", special=True) == text.encode("话说", bos=True)


def test_llama_cpp_gives_the_ids_of_a_vocabulary_of_ours(folder, small, small_with_prefix, monkeypatch):
    for number, text in enumerate((small, small_with_prefix)):
        path = folder(text=text, name=f"run{number}")
        run(monkeypatch, "gguf", "--model", path, "--type", "f32")
        with llama_cpp(gguf_of(path)) as ask:
            for line in [*BOOK[:5], *HARD]:
                if line and SPACE not in line and "\0" not in line:
                    assert ids_of(ask, line) == text.encode(line), line


@pytest.mark.parametrize("kind", gguf_file.LARGEST)
def test_gguf_reads_names_sizes_and_weights(kind, folder, small, monkeypatch):
    gguf = pytest.importorskip("gguf")
    config = OF_GGUF["biases"]
    path = folder(config, "chatml")
    run(monkeypatch, "gguf", "--model", path, "--type", kind)
    found = gguf.GGUFReader(gguf_of(path, kind))
    tensors = {t.name: t for t in found.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = load_model(path).state_dict()
    assert tensors.keys() == {names.get_name(name, (".weight", ".bias")) for name in state}
    # How far a value may be from its weight, as a share of the largest in its block; q4_0 goes from -8 to 7 steps.
    share = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.6 / 127, "q4_0": 1.01 / 8}
    for name, weight in state.items():
        tensor = tensors[names.get_name(name, (".weight", ".bias"))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        got = tensor.tensor_type.name.lower()
        assert got == ("f32" if weight.ndim == 1 else "q8_0" if (kind, name) == ("q4_0", "lm_head.weight") else kind)
        if "q_proj" in name or "k_proj" in name:  # row 2i of a head was row i, row 2i + 1 was row i + 8
            d = config.head_dim
            rows = [
                h * d + i + half * d // 2 for h in range(len(weight) // d) for i in range(d // 2) for half in (0, 1)
            ]
            weight = weight[rows]
        blocks = np.abs(weight.numpy()).reshape(-1, 32).max(1, keepdims=True)
        assert (np.abs(values - weight.numpy()).reshape(-1, 32) <= share[got] * blocks).all()
    said = {key: field.contents() for key, field in found.fields.items() if len(field.data) < 2}
    assert said["general.architecture"] == "llama" and said["llama.block_count"] == 2
    assert (said["llama.attention.head_count"], said["llama.attention.head_count_kv"]) == (4, 2)
    assert (said["llama.embedding_length"], said["llama.feed_forward_length"]) == (64, 96)
    assert (said["llama.context_length"], said["llama.vocab_size"]) == (128, 600)
    assert (said["llama.rope.dimension_count"], said["llama.rope.freq_base"]) == (16, 10000.0)
    assert said["tokenizer.chat_template"] == chat.template("chatml")
    assert said["tokenizer.ggml.eot_token_id"] == small.special_ids["<|im_end|>"]


def test_rows_that_do_not_divide_into_blocks_stay_f16_and_are_told(folder, monkeypatch, capsys):
    gguf = pytest.importorskip("gguf")
    path = folder(dataclasses.replace(SHAPE, intermediate_size=100))
    run(monkeypatch, "gguf", "--model", path, "--type", "q4_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(gguf_of(path, "q4_0")).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert "tensors: 1 q8_0, 12 q4_0, 2 f16, 5 f32" in capsys.readouterr().out


def test_a_weight_too_large_for_the_type_is_refused(folder, small, make_model, monkeypatch, tmp_path):
    model = make_model(SHAPE)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    hf_folder.save_model(tmp_path / "large", model, small, {})
    assert "up_proj.weight holds 1e+05, too large for f16" in refusal(
        monkeypatch, "gguf", "--model", tmp_path / "large"
    )
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("Modelfile"))
    run(monkeypatch, "gguf", "--model", tmp_path / "large", "--type", "bf16")


# ---------------------------------------------------------------- Ollama


def go(template: str, values: dict) -> str:
    """The part of Go's text/template that a Modelfile of ours uses."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    state, out = {}, []

    def value(word: str, dot):
        if word.startswith("$first"):
            return state["$first"]
        name = word.removeprefix("$").removeprefix(".")
        return (values if word.startswith("$.") else dot).get(name)

    def true(condition: str, dot) -> bool:
        if condition.startswith("eq "):
            _, word, text = condition.split(" ")
            return value(word, dot) == text.strip('"')
        return bool(value(condition, dot))

    def walk(at: int, dot, on: bool) -> tuple[int, str]:
        """From part `at` to the end or else of this level -> (its place, its words)."""
        while at < len(parts):
            if at % 2 == 0:
                out.append(parts[at] if on else "")
            elif (word := parts[at]).startswith(("end", "else")):
                return at, word
            elif ":=" in word or " = " in word:
                state["$first"] = word.endswith("true") if on else state["$first"]
            elif word.startswith("range "):
                items = value(word[6:], dot) if on else []
                for item in items:
                    end, _ = walk(at + 1, item, True)
                at = end if items else walk(at + 1, {}, False)[0]
            elif word.startswith("if "):
                done, condition = False, word[3:]
                while True:
                    take = on and not done and (not condition or true(condition, dot))
                    at, word = walk(at + 1, dot, take)
                    done = done or take
                    if word == "end":
                        break
                    condition = word.removeprefix("else").strip().removeprefix("if ")
            elif on:
                out.append(value(word, dot))
            at += 1
        return at, ""

    walk(0, values, True)
    return "".join(out)


@pytest.mark.parametrize("chat_format", chat.FORMATS)
def test_ollamas_template_writes_our_chats(chat_format, folder, small, monkeypatch):
    path = folder(SHAPE, chat_format)
    run(monkeypatch, "gguf", "--model", path)
    written = gguf_of(path, "f16").with_name("Modelfile").read_text(encoding="utf-8")
    assert written.startswith('FROM ./run-f16.gguf\nTEMPLATE """')
    template = written.split('"""')[1]
    assert written.split('"""')[2].split() == [
        "PARAMETER",
        "num_ctx",
        "128",
        "PARAMETER",
        "temperature",
        "0.8",
        "PARAMETER",
        "top_k",
        "0",
        "PARAMETER",
        "top_p",
        "0.9",
        "PARAMETER",
        "repeat_penalty",
        "1.0",
    ]
    talk = [
        {"role": "user", "content": "问？"},
        {"role": "assistant", "content": "答。"},
        {"role": "user", "content": "再问"},
    ]
    for system in ("", "一二"):
        for turns in (talk[:1], talk):
            messages = [{"role": "system", "content": system}] * bool(system) + turns
            ids, _ = chat.render(messages, small, chat_format, generation=True)
            # Ollama's names for the parts; it hands llama.cpp the text, which puts bos in front if the file says so.
            given = [{"Role": m["role"], "Content": m["content"]} for m in messages]
            text = go(template, {"System": system, "Messages": given})
            if gguf_file.adds_bos(small, chat_format):
                text = "<s>" + text
            assert text == small.decode(ids, skip_special=False)


# ---------------------------------------------------------------- llama2.c


def run_c(path, ids: list[int]) -> np.ndarray:
    """forward() of run.c, loop by loop: the logits (T, V) of a model.bin."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", raw[:28])
    floats, at = np.frombuffer(raw, "<f4", offset=28).astype(np.float64), 0
    shared, vocab = vocab > 0, abs(vocab)
    size = dim // heads

    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return floats[at - math.prod(shape) : at].reshape(shape)

    embedding, rms_att = take(vocab, dim), take(layers, dim)
    wq, wk, wv = take(layers, heads * size, dim), take(layers, kv_heads * size, dim), take(layers, kv_heads * size, dim)
    wo, rms_ffn = take(layers, dim, heads * size), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    rms_final = take(dim)
    take(seq_len, size // 2), take(seq_len, size // 2)
    wcls = embedding if shared else take(vocab, dim)
    assert at == len(floats)

    def rmsnorm(x, weight):
        return weight * x / math.sqrt((x * x).mean() + 1e-5)

    keys, values, logits = [[[] for _ in range(layers)] for _ in range(2)] + [[]]
    for pos, token in enumerate(ids):
        x = embedding[token].copy()
        for n in range(layers):
            normed = rmsnorm(x, rms_att[n])
            q, k, v = wq[n] @ normed, wk[n] @ normed, wv[n] @ normed
            for i in range(0, dim, 2):
                angle = pos / 10000 ** (i % size / size)
                for vector in (q, k) if i < len(k) else (q,):
                    a, b = vector[i], vector[i + 1]
                    vector[i], vector[i + 1] = (
                        a * math.cos(angle) - b * math.sin(angle),
                        a * math.sin(angle) + b * math.cos(angle),
                    )
            keys[n].append(k)
            values[n].append(v)
            mixed = np.zeros(dim)
            for h in range(heads):
                own, theirs = slice(h * size, (h + 1) * size), h // (heads // kv_heads) * size
                scores = np.array([q[own] @ key[theirs : theirs + size] for key in keys[n]]) / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                for share, value in zip(weights / weights.sum(), values[n]):
                    mixed[own] += share * value[theirs : theirs + size]
            x += wo[n] @ mixed
            normed = rmsnorm(x, rms_ffn[n])
            gate = w1[n] @ normed
            x += w2[n] @ (gate / (1 + np.exp(-gate)) * (w3[n] @ normed))
        logits.append(wcls @ rmsnorm(x, rms_final))
    return np.array(logits)


def run_c_pieces(path) -> list[tuple[bytes, float]]:
    raw, at, pieces = path.read_bytes(), 4, []
    while at < len(raw):
        score, length = struct.unpack("<fi", raw[at : at + 8])
        pieces.append((raw[at + 8 : at + 8 + length], score))
        at += 8 + length
    assert struct.unpack("<i", raw[:4])[0] == max(len(piece) for piece, _ in pieces)
    return pieces


def run_c_encode(pieces, text: str) -> list[int]:
    """encode() of run.c: characters or their bytes, then again and again the pair of the best score."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokens = []
    for char in " " * bool(text) + text:
        tokens += [ids[char.encode()]] if char.encode() in ids else [byte + 3 for byte in char.encode()]
    while True:
        pairs = [(ids.get(pieces[a][0] + pieces[b][0]), i) for i, (a, b) in enumerate(itertools.pairwise(tokens))]
        found = [(-pieces[merged][1], i, merged) for merged, i in pairs if merged is not None]
        if not found:
            return tokens
        _, i, merged = min(found)
        tokens[i : i + 2] = [merged]


@pytest.mark.parametrize("name", SHAPES)
def test_run_c_computes_our_logits(name, folder, monkeypatch):
    path = folder(SHAPES[name])
    out = path.with_name("c") / "model.bin"
    run(monkeypatch, "llama2c", "--model", path, "--output", out)
    ids = np.random.default_rng(0).integers(0, 600, 12).tolist()
    with torch.no_grad():
        ours = load_model(path)(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(run_c(out, ids), ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())


@pytest.mark.parametrize("name", SHAPES)
def test_our_export_read_back_is_bit_equal(name, folder, small, monkeypatch):
    path = folder(SHAPES[name])
    out, back = path.with_name("c") / "model.bin", path.with_name("back")
    run(monkeypatch, "llama2c", "--model", path, "--output", out)
    run(monkeypatch, "from-llama2c", "--model", out, "--tokenizer", out.with_name("tokenizer.bin"), "--output", back)
    ours, theirs = load_model(path), load_model(back)
    assert theirs.config == ours.config
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for weight, again in zip(ours.state_dict().values(), theirs.state_dict().values()):
        assert torch.equal(weight.view(torch.int32), again.view(torch.int32))
    assert [p[:3] for p in tokenizer.load(back).model.pieces] == [p[:3] for p in small.model.pieces]
    assert tokenizer.load(back).special_ids == small.special_ids


def test_stories260k_tells_its_story(stories, shared_data, monkeypatch, capsys):
    expected = (shared_data / "weights/stories260K.expected.md").read_text(encoding="utf-8")
    expected = expected.split("tok512.bin -t 0.0\n")[1].split("```")[0]
    capsys.readouterr()
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", "--model", str(stories), "--prompt", "", "--temperature", "0", "--max_new_tokens", "256"],
    )
    sample.main()
    assert capsys.readouterr().out == expected


def test_stories260k_goes_back_to_its_own_bytes(stories, shared_data, tmp_path, monkeypatch):
    run(monkeypatch, "llama2c", "--model", stories, "--output", tmp_path / "c/model.bin")
    assert (tmp_path / "c/model.bin").read_bytes() == (shared_data / "weights/stories260K.bin").read_bytes()
    assert (tmp_path / "c/tokenizer.bin").read_bytes() == (shared_data / "weights/tok512.bin").read_bytes()


def test_llama2s_tokenizer_bin_is_its_tokenizer_model(tmp_path):
    ours = tokenizer.load(real_model("llama2-32k.tokenizer.model"))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(llama2c.read_tokenizer(real_model("llama2-32k.tokenizer.bin"), 32000))
    theirs = tokenizer.load(path)
    # llama2.c writes 1e9 less for the pieces of spaces alone where sentencepiece's file has their true rank.
    differ = [(a, b) for a, b in zip(theirs.model.pieces, ours.model.pieces) if a[:3] != b[:3]]
    assert all(a.text == b.text for a, b in differ), differ[:5]
    for text in real_texts(500):
        assert theirs.encode(text) == ours.encode(text)
    llama2c.write_tokenizer(tmp_path / "tokenizer.bin", ours, 32000)
    assert (tmp_path / "tokenizer.bin").read_bytes() == real_model("llama2-32k.tokenizer.bin").read_bytes()


def test_run_c_makes_our_ids(tmp_path, small_with_prefix):
    # A vocabulary as llama2.c trains them: bytes at 3.
    order = sorted(range(600), key=lambda i: (i > 2, small_with_prefix.model.pieces[i].type == CONTROL))
    (tmp_path / "tokenizer.model").write_bytes(
        write_model(change(small_with_prefix.model, pieces=[small_with_prefix.model.pieces[i] for i in order]))
    )
    text = tokenizer.load(tmp_path / "tokenizer.model")
    assert llama2c.write_tokenizer(tmp_path / "tokenizer.bin", text, 600) == []
    pieces = run_c_pieces(tmp_path / "tokenizer.bin")
    for line in [*BOOK[:5], *HARD]:
        if SPACE not in line:
            assert run_c_encode(pieces, line) == text.encode(line), line


def test_what_run_c_reads_otherwise_is_told(folder, small, monkeypatch, capsys):
    run(monkeypatch, "llama2c", "--model", folder(), "--output", folder().with_name("c") / "model.bin")
    said = capsys.readouterr().err
    assert "ids 3 to 258 for bytes, here they begin at 5" in said and "a space in front of every prompt" in said


# ---------------------------------------------------------------- what is refused


def damaged(good: bytes, small_layers: int):
    """Broken model.bin files, and what is said of each."""
    header = list(struct.unpack("<7i", good[:28]))

    def with_header(**changes):
        names = ("dim", "hidden", "layers", "heads", "kv", "vocab", "seq")
        return struct.pack("<7i", *(changes.get(n, v) for n, v in zip(names, header))) + good[28:]

    yield b"", "no header"
    yield good[:27], "no header"
    yield good[:-1], "describes"
    yield good + b"\0", "describes"
    yield with_header(layers=small_layers + 1), "describes"
    yield with_header(vocab=1 << 24, seq=1 << 24), "describes"
    yield with_header(dim=1 << 24, hidden=1 << 24, layers=1024, heads=1, kv=1), "describes"
    yield with_header(vocab=-(1 << 31)), "no header"
    for name in ("dim", "hidden", "layers", "heads", "kv", "vocab", "seq"):
        yield with_header(**{name: 0}), "no header"
        if name != "vocab":
            yield with_header(**{name: -3}), "no header"
    yield with_header(dim=66), "no header"
    yield with_header(kv=3), "no header"
    yield with_header(layers=2_000_000_000), "no header"
    yield b"24ka" + struct.pack("<i", 1) + good, "version 1"
    yield good[:-4] + struct.pack("<f", math.nan), "NaN"


def test_damaged_and_hostile_weights_are_refused_before_anything_is_allocated(folder, monkeypatch, tmp_path):
    config = SHAPES["plain, untied"]
    run(monkeypatch, "llama2c", "--model", folder(config), "--output", tmp_path / "c/model.bin")
    good = (tmp_path / "c/model.bin").read_bytes()
    read = []
    monkeypatch.setattr(np, "fromfile", lambda *a, real=np.fromfile: read.append(a) or real(*a))
    for bad, said in damaged(good, config.num_hidden_layers):
        (tmp_path / "bad.bin").write_bytes(bad)
        read.clear()
        assert said in refusal(
            monkeypatch,
            "from-llama2c",
            "--model",
            tmp_path / "bad.bin",
            "--tokenizer",
            tmp_path / "c/tokenizer.bin",
            "--output",
            tmp_path / "new",
        )
        assert not read or said == "NaN"
        assert not (tmp_path / "new").exists()


def test_damaged_tokenizers_are_refused(folder, monkeypatch, tmp_path):
    run(monkeypatch, "llama2c", "--model", folder(), "--output", tmp_path / "c/model.bin")
    good = (tmp_path / "c/tokenizer.bin").read_bytes()
    path, rows = tmp_path / "bad.bin", []
    at = 4
    while at < len(good):
        length = struct.unpack("<i", good[at + 4 : at + 8])[0]
        rows.append(good[at : at + 8 + length])
        at += 8 + length

    def row(text: bytes, score: float = 0.0, length: int | None = None) -> bytes:
        return struct.pack("<fi", score, len(text) if length is None else length) + text

    for bad, said in (
        (b"", "0 of the model's 600"),
        (good[:3], "0 of"),
        (good[:-1], "599 of"),
        (good + b"\0", "600 of"),
        (good[:4] + b"".join(rows[:-1]), "599 of"),
        (good + row(b"new"), "600 of"),
        (good[:4] + b"".join(rows[:-1]) + row(b"a", length=-5), "599 of"),
        (good[:4] + b"".join(rows[:-1]) + row(b"a", length=2**31 - 1), "599 of"),
        (good[:4] + b"".join(rows[:-1]) + row(b"\xff\xfe"), "not UTF-8"),
        (good[:4] + b"".join(rows[:-1]) + row(b""), "damaged"),
        (good[:4] + b"".join(rows[:-1]) + row(b"newest", math.nan), "damaged"),
        (good[:4] + b"".join(rows[:-1]) + rows[300], "same text"),
        (good[:4] + b"".join([*rows[:9], row(b"no byte"), *rows[10:]]), "256 pieces"),
    ):
        path.write_bytes(bad)
        assert said in refusal(
            monkeypatch,
            "from-llama2c",
            "--model",
            tmp_path / "c/model.bin",
            "--tokenizer",
            path,
            "--output",
            tmp_path / "new",
        ), said
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"head_dim": 24}, "head_dim is 24"),
        ({"rope_theta": 500.0}, "rope_theta is 500"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
    ],
)
def test_what_run_c_cannot_compute_is_refused(changes, said, folder, monkeypatch):
    kind = KinConfig if "attention_bias" in changes else ModelConfig
    path = folder(kind(**dataclasses.asdict(SHAPE) | changes))
    assert said in refusal(monkeypatch, "llama2c", "--model", path, "--output", path.with_name("c") / "model.bin")
    assert not path.with_name("c").exists()


@pytest.mark.parametrize("word", ["gguf", "llama2c"])
def test_vocabularies_that_other_programs_read_otherwise_are_refused(word, folder, small, monkeypatch, tmp_path):
    model = small.model

    def saved(name, text):
        monkeypatch.setattr("warnings.warn", lambda *_, **__: None)  # some of these have no tokenizer.json
        return folder(dataclasses.replace(SHAPE, vocab_size=text.vocab_size), text=text, name=name)

    def changed(name, **changes):
        (tmp_path / f"{name}.model").write_bytes(write_model(change(model, **changes)))
        return saved(name, tokenizer.load(tmp_path / f"{name}.model"))

    pieces = model.pieces
    cases = {
        "no BPE": changed("unigram", trainer=(*(f for f in model.trainer if f[0] != 3), (3, 0, 1))),
        "normaliser": changed("spaces", normalizer=(*(f for f in model.normalizer if f[0] != 4), (4, 0, 1))),
        "user-defined": changed("user", pieces=[*pieces[:-1], pieces[-1]._replace(type=4)]),
        "piece for the space": changed(
            "space", pieces=[p._replace(text="Ω") if p.text == SPACE else p for p in pieces]
        ),
    }
    if word == "llama2c":
        cases["(0, 2, 1)"] = changed(
            "bos",
            pieces=[pieces[0], pieces[2], pieces[1], *pieces[3:]],
            trainer=(*(f for f in model.trainer if f[0] not in (41, 42)), (41, 0, 2), (42, 0, 1)),
        )
    no_bytes = [p for p in pieces if p.type != 6]
    cases["byte fallback"] = changed(
        "bytes", pieces=no_bytes, trainer=(*(f for f in model.trainer if f[0] != 35), (35, 0, 0))
    )
    for said, path in cases.items():
        assert said in refusal(monkeypatch, word, "--model", path, "--output", tmp_path / "out/model.bin"), said
        assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_tokenizer_json_alone_is_refused(folder, small, monkeypatch, tmp_path):
    pytest.importorskip("tokenizers")
    small.save(tmp_path / "json")
    (tmp_path / "json/tokenizer.model").unlink()
    path = folder(text=tokenizer.load(tmp_path / "json"))
    for word in ("gguf", "llama2c"):
        assert "not a sentencepiece model" in refusal(monkeypatch, word, "--model", path, "--output", tmp_path / "new")


def test_what_is_there_is_replaced_only_with_overwrite(folder, monkeypatch, tmp_path):
    path = folder()
    c = ["--model", tmp_path / "c/model.bin", "--tokenizer", tmp_path / "c/tokenizer.bin"]
    for words, there in (
        (["gguf", "--model", path, "--output", tmp_path / "g/x.gguf"], "g/x.gguf"),
        (["gguf", "--model", path, "--output", tmp_path / "g/y.gguf"], "g/Modelfile"),
        (["llama2c", "--model", path, "--output", tmp_path / "c/model.bin"], "c/model.bin"),
        (["llama2c", "--model", path, "--output", tmp_path / "c/other.bin"], "c/tokenizer.bin"),
        (["from-llama2c", *c, "--output", tmp_path / "new"], "new"),
    ):
        if not (tmp_path / there).exists():
            run(monkeypatch, *words)
        before = (tmp_path / there).stat().st_mtime_ns
        assert f"{there} exists" in refusal(monkeypatch, *words)
        assert (tmp_path / there).stat().st_mtime_ns == before
        run(monkeypatch, *words, "--overwrite")
        assert (tmp_path / there).stat().st_mtime_ns != before


def test_without_gguf_the_install_command_is_named_before_a_model_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refusal(monkeypatch, "gguf", "--model", "none")


def test_wrong_words_and_options_are_refused(folder, monkeypatch, tmp_path):
    assert "nothing: no such export" in refusal(monkeypatch)
    assert "onnx: no such export -- python export.py gguf or" in refusal(monkeypatch, "onnx")
    assert "type = 'q2_k', must be one of f32, f16, bf16, q8_0, q4_0" in refusal(monkeypatch, "gguf", "--type", "q2_k")
    assert "output must be given" in refusal(monkeypatch, "llama2c")
    assert "tokenizer and output must be given" in refusal(monkeypatch, "from-llama2c", "--model", "x.bin")
    assert "no such model folder" in refusal(monkeypatch, "gguf", "--model", tmp_path / "none")


def test_the_two_layouts_of_q_and_k_are_inverse_and_known():
    rows = torch.arange(16.0)[:, None]
    assert original_llama.interleaved(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(original_llama.half_split(original_llama.interleaved(rows, 2), 2), rows)
    assert torch.equal(original_llama.interleaved(rows[:, 0], 2), original_llama.interleaved(rows, 2)[:, 0])

"""The server through real sockets and real clients: OpenAI's API, what it refuses, how it ends.

Oracles: the model's own forward pass, `core.generate` one text at a time, `str` methods, the openai SDK, LangChain, curl.
"""

import ast
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serving import Served, until

import serve
from core import errors
from core.generate import SamplingConfig
from extras.decoding.batching import Text, Token, continued
from extras.decoding.stop import UntilStop
from extras.serve.worker import Job, Voice

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

ROOT = Path(__file__).resolve().parents[1]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "曹操"}]


@pytest.fixture(scope="module")
def chat(home):
    with Served(home / "chat", rows=16) as served:
        yield served


@pytest.fixture(scope="module")
def base(home):
    with Served(home / "chat-base") as served:
        yield served


def alone(served: Served, ids: list[int], stop=(), answer=False, **sampling) -> str:
    """What the model says to one prompt and nobody else's beside it."""
    cfg = SamplingConfig(**sampling)
    ((text,),) = continued(served.generator.model, [ids], cfg, served.generator.stop_ids, rows=1)
    decoder = served.generator.tokenizer.stream()
    for id in [] if answer else ids:
        decoder.push(id)
    said = "".join(map(decoder.push, text.added)) + decoder.flush()
    ends = [said.index(s) + len(s) for s in stop if s in said]
    first = min((s for s in stop if s in said), key=lambda s: said.index(s) + len(s)) if ends else None
    said = said[: said.index(first)] if ends else said
    return said.strip() if answer else said


# Answers --------------------------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_says_whole_and_in_pieces(chat):
    ids = chat.generator.encode(USER)
    wanted = alone(chat, ids, answer=True, temperature=0, max_new_tokens=40)
    answer = chat.chat(temperature=0, max_tokens=40)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted, "refusal": None} and len(wanted) > 5
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 40, "total_tokens": len(ids) + 40}
    events = chat.stream(
        CHAT, {"messages": USER, "temperature": 0, "max_tokens": 40, "stream_options": {"include_usage": True}}
    )
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == wanted
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == answer["usage"]
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1


def test_a_text_is_continued_by_a_base_model_and_raw_by_a_chat_model(chat, base):
    for served in (chat, base):
        ids = served.generator.tokenizer.encode("话说天下", bos=True)
        wanted = alone(served, ids, temperature=0, max_new_tokens=30)
        answer = served.complete("话说天下", temperature=0, max_tokens=30)
        assert answer["choices"][0]["text"] == wanted and answer["object"] == "text_completion"
        events = served.stream(TEXT, {"prompt": ids, "temperature": 0, "max_tokens": 30})
        assert (
            "".join(e["choices"][0]["text"] for e in events) == wanted
            and events[-1]["choices"][0]["finish_reason"] == "length"
        )


def test_several_prompts_and_several_texts_of_each_come_in_order(base):
    prompts = ["曹操", "话说天下大势，", [5, 6, 7], "刘备"]
    answer = base.complete(prompts, n=2, max_tokens=9, seed=5, temperature=1, top_p=1)
    ids = [p if isinstance(p, list) else base.generator.tokenizer.encode(p, bos=True) for p in prompts]
    assert [c["index"] for c in answer["choices"]] == list(range(8))
    assert [c["text"] for c in answer["choices"]] == [
        alone(base, i, max_new_tokens=9, seed=5 + k, temperature=1, top_p=1) for i in ids for k in range(2)
    ]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids)) and answer["usage"]["completion_tokens"] == 72


def test_what_a_request_leaves_open_is_as_in_sampling_config_but_for_seed_and_length(base):
    asked = {
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
        "seed": 3,
    }
    ids = base.generator.tokenizer.encode("曹操", bos=True)
    assert base.complete(max_tokens=20, **asked)["choices"][0]["text"] == alone(base, ids, max_new_tokens=20, **asked)
    assert base.complete(max_tokens=20, seed=9)["choices"][0]["text"] == alone(base, ids, max_new_tokens=20, seed=9)
    assert len({base.complete(max_tokens=20)["choices"][0]["text"] for _ in range(5)}) == 5, "no seed: drawn anew"
    room = 128 - len(ids) + 1
    for more in ({}, {"max_tokens": 10**6}, {"max_tokens": None}):
        answer = base.complete(temperature=0, **more)
        assert answer["usage"]["completion_tokens"] == room and answer["choices"][0]["finish_reason"] == "length"
    assert base.complete([3] * 128, temperature=0)["usage"]["completion_tokens"] == 1


def test_two_requests_at_once_are_answered_as_one_by_one(chat):
    """A hundred pairs, sampled and greedy, chats and texts, streams and whole."""
    rng = random.Random(0)
    jobs = []
    for k in range(200):
        question = "".join(rng.choices("曹操刘备孙权天下大势，。", k=rng.randint(1, 12)))
        sampling = {
            "temperature": rng.choice([0, 0.8, 1.5]),
            "seed": rng.randint(0, 99),
            "top_p": rng.choice([0.5, 1]),
            "repetition_penalty": rng.choice([1, 1.3]),
        }
        jobs.append((question, sampling, rng.randint(1, 20), rng.random() < 0.5, k % 3))

    def ask(job):
        question, sampling, tokens, answer, stream = job
        path, body = (
            (CHAT, {"messages": [{"role": "user", "content": question}]}) if answer else (TEXT, {"prompt": question})
        )
        body |= sampling | {"max_tokens": tokens}
        if stream:
            return "".join(
                c["choices"][0]["delta"].get("content", "") if answer else c["choices"][0]["text"]
                for c in chat.stream(path, body)
            )
        (choice,) = chat.ask(path, body)[2]["choices"]
        return choice["message"]["content"] if answer else choice["text"]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, jobs))
    for (question, sampling, tokens, answer, _), said in zip(jobs, together):
        ids = chat.generator.encode(question) if answer else chat.generator.tokenizer.encode(question, bos=True)
        assert said == alone(chat, ids, answer=answer, max_new_tokens=tokens, **sampling)


def test_a_stop_string_ends_a_text_and_no_character_of_one_comes_out(base):
    rng = random.Random(1)
    ids = base.generator.tokenizer.encode("曹操", bos=True)
    for seed in range(12):
        sampling = {"seed": seed, "temperature": 1, "top_p": 1}
        whole = alone(base, ids, max_new_tokens=40, **sampling)
        stop = []
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(whole) - 3)
            stop.append(whole[at : at + rng.randint(1, 3)])
        wanted = alone(base, ids, stop, max_new_tokens=40, **sampling)
        body = {"prompt": "曹操", "max_tokens": 40, "stop": stop if len(stop) > 1 else stop[0]} | sampling
        (choice,) = base.complete(**body)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (wanted, "stop")
        events, said = base.stream(TEXT, body), ""
        for event in events:
            said += event["choices"][0]["text"]
            assert wanted.startswith(said)
        assert said == wanted and events[-1]["choices"][0]["finish_reason"] == "stop"


def voice(tokenizer, ids: list[int], prompt=(), stop=(), answer=False, end="length") -> list[str]:
    """What a Voice gives out for ids, one by one."""
    job = Job(list(prompt), SamplingConfig(), 1, None, stop, 0, answer, None)
    speaks, about = Voice(job, 0, tokenizer, UntilStop(stop)), Text([1], SamplingConfig(), set())
    return [speaks.take(Token(about, id, end if k == len(ids) - 1 else "", 0.0, [])).text for k, id in enumerate(ids)]


@pytest.mark.parametrize("said", ["龘😀é", "  三国 😀 \n", "\n\n", "a b  c ", "😀"])
def test_half_a_character_never_comes_out_and_an_answer_is_stripped(small, small_with_prefix, said):
    for tokenizer in (small, small_with_prefix):
        ids = tokenizer.encode(said, continues=True)
        pieces = voice(tokenizer, ids, prompt=tokenizer.encode("x"))
        assert "".join(pieces) == said and not any("\ufffd" in piece for piece in pieces)
        assert "".join(voice(tokenizer, ids, answer=True)) == said.strip()
        half = tokenizer.encode("龘", continues=True)[:-1]
        assert "".join(voice(tokenizer, [*tokenizer.encode("ab", continues=True), *half], answer=True)) == "ab\ufffd"


def test_an_answer_that_ends_by_itself_says_stop(chat):
    served, ends = chat, chat.generator.stop_ids
    for seed in range(200):
        ((text,),) = continued(
            served.generator.model,
            [served.generator.encode(USER)],
            SamplingConfig(seed=seed, temperature=3, top_p=1, max_new_tokens=60),
            ends,
            rows=1,
        )
        if text.end == "stop":
            break
    answer = chat.chat(seed=seed, temperature=3, top_p=1, max_tokens=60)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == len(text.added)


def test_log_probabilities_are_the_models_in_the_shape_of_each_endpoint(chat):
    generator = chat.generator
    for answer in (True, False):
        prompt = generator.encode(USER) if answer else generator.tokenizer.encode("曹操", bos=True)
        sampling = {"seed": 4, "temperature": 1, "top_p": 1, "max_tokens": 12}
        ((text,),) = continued(
            generator.model,
            [prompt],
            SamplingConfig(seed=4, temperature=1, top_p=1, max_new_tokens=12),
            generator.stop_ids,
            rows=1,
        )
        with torch.no_grad():
            ids = torch.tensor([prompt + text.added])
            wanted = generator.model(ids)[0, len(prompt) - 1 : -1].float().log_softmax(-1)  # (T, V)
        best = wanted.topk(3).values.tolist()
        got = wanted[range(len(text.added)), text.added].tolist()
        pieces = [generator.tokenizer.decode_bytes([id]) for id in text.added]  # this tokenizer takes no space off
        if answer:
            (choice,) = chat.chat(logprobs=True, top_logprobs=3, **sampling)["choices"]
            content = choice["logprobs"]["content"]
            assert [bytes(c["bytes"]) for c in content] == pieces
            assert [c["token"] for c in content] == [p.decode("utf-8", "replace") for p in pieces]
            assert [c["logprob"] for c in content] == pytest.approx(got, abs=1e-4)
            assert [[t["logprob"] for t in c["top_logprobs"]] for c in content] == [
                pytest.approx(b, abs=1e-4) for b in best
            ]
            events = chat.stream(CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 3} | sampling)
            streamed = [entry for e in events for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
            assert [e["bytes"] for e in streamed] == [c["bytes"] for c in content]
        else:
            (choice,) = chat.complete(logprobs=3, **sampling)["choices"]
            told = choice["logprobs"]
            assert told["token_logprobs"] == pytest.approx(got, abs=1e-4) and len(told["tokens"]) == len(pieces)
            assert [sorted(t.values())[-3:] for t in told["top_logprobs"]] == [
                pytest.approx(b[::-1], abs=1e-4) for b in best
            ]
            for token, at in zip(told["tokens"], told["text_offset"]):
                if not token.startswith("bytes:"):
                    assert choice["text"][at:].startswith(token)
            assert chat.complete(logprobs=0, **sampling)["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
                got, abs=1e-4
            )


def test_tokens_behind_a_stop_string_are_not_told(base):
    ids = base.generator.tokenizer.encode("曹操", bos=True)
    whole = alone(base, ids, max_new_tokens=30, seed=2)
    answer = base.complete(max_tokens=30, seed=2, stop=whole[8:10], logprobs=0)["choices"][0]
    at = answer["logprobs"]["text_offset"]
    assert at and max(at) < len(answer["text"]) <= 8


# Refusals -------------------------------------------------------------------------------------------------------------

WRONG = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"seed": 1.0}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**5000}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": "x" * 257}, "stop[0]"),
    ({"stop": "\ud800"}, "stop[0]"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"user": 5}, "user"),
    ({"model": ["chat"]}, "model"),
    ({"tempersture": 1}, "tempersture"),
    ({"\x1b[2J": 1}, "\\x1b[2J"),
]
WRONG_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": USER * 2}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"prompt": "x"}, "prompt"),
    ({"metadata": 5}, "metadata"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"echo": False}, "echo"),
]
WRONG_TEXT = [
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["x", 5]}, "prompt[1]"),
    ({"prompt": [10**9]}, "prompt[0]"),
    ({"prompt": [1, True]}, "prompt[1]"),
    ({"prompt": [[1, -1]]}, "prompt[0][1]"),
    ({"prompt": ["x"] * 999}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": USER}, "messages"),
    ({"max_completion_tokens": 3}, "max_completion_tokens"),
]


@pytest.mark.parametrize(
    "path, fields, name",
    [*((CHAT, f, n) for f, n in WRONG + WRONG_CHAT), *((TEXT, f, n) for f, n in WRONG + WRONG_TEXT)],
)
def test_a_wrong_field_is_refused_by_name_at_once(chat, path, fields, name):
    if hasattr(sys, "set_int_max_str_digits"):
        limit = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
    try:
        body = json.dumps(({"messages": USER} if path == CHAT else {"prompt": "x"}) | fields).encode()
    finally:
        sys.set_int_max_str_digits(limit)
    began = time.monotonic()
    status, _, answer = chat.ask(path, body)
    assert (status, answer["error"]["param"]) == (400, name) and answer["error"]["type"] == "invalid_request_error"
    assert (
        time.monotonic() - began < 0.05
        and name in answer["error"]["message"]
        and answer["error"]["message"].isprintable()
    )


def test_what_clients_send_without_meaning_anything_by_it_is_taken(chat):
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
        "parallel_tool_calls": True,
        "reasoning_effort": None,
        "stop": None,
        "n": 1,
        "seed": 1,
        "model": "chat",
        "stream": False,
        "stream_options": None,
        "audio": None,
        "top_logprobs": None,
        "modalities": ["text"],
    }
    parts = [
        {"role": "developer", "content": "短。"},
        {"role": "user", "content": [{"type": "text", "text": "曹"}, {"type": "text", "text": "操"}]},
    ]
    plain = [{"role": "system", "content": "短。"}, {"role": "user", "content": "曹操"}]
    answers = [
        chat.ask(CHAT, {"messages": m, "max_tokens": 9, "seed": 1} | more)[2]
        for m, more in ((parts, harmless), (plain, {}))
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert chat.complete(max_tokens=2, best_of=2, n=2, echo=False, suffix=None, user="u")["choices"][1]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b'{"n": 1, }', b"{" + b"9" * 9999],
)
def test_what_is_no_json_object_is_refused(chat, body):
    status, _, answer = chat.ask(CHAT, body)
    assert status == 400 and answer["error"]["code"] == "invalid_json"


def test_not_a_number_is_refused_with_the_fields_name(chat):
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e9999", b"9" * 5000, b"-" + b"9" * 5000):
        for field in ("temperature", "top_p", "seed", "n", "max_tokens", "stop"):
            status, _, answer = chat.ask(TEXT, b'{"prompt": "x", "%s": %s}' % (field.encode(), value))
            assert (status, answer["error"]["param"]) == (400, field)


def test_a_prompt_longer_than_the_context_is_refused_with_both_counts(chat, base, monkeypatch):
    ids = base.generator.tokenizer.encode("曹操" * 70, bos=True)
    assert len(ids) > 128
    for served, path, body, count in (
        (base, TEXT, {"prompt": "曹操" * 70}, len(ids)),
        (base, TEXT, {"prompt": [3] * 129}, 129),
        (chat, CHAT, {"messages": [{"role": "user", "content": "曹操" * 70}]}, len(chat.generator.encode("曹操" * 70))),
        (
            chat,
            CHAT,
            {"messages": [{"role": ("user", "assistant")[k % 2], "content": "x"} for k in range(201)]},
            "at least 201",
        ),
    ):
        status, _, answer = served.ask(path, body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert f"{count} tokens" in answer["error"]["message"] and answer["error"]["message"].endswith(" 128")
    monkeypatch.setattr(base.generator.tokenizer, "encode", lambda *_, **__: 1 // 0)
    status, _, answer = base.ask(TEXT, {"prompt": "曹操" * 80_000})
    assert status == 400 and "at least" in answer["error"]["message"], "not even read"


def test_a_base_model_has_no_chat_and_another_model_is_not_there(base):
    status, _, answer = base.ask(CHAT, {"messages": USER})
    assert status == 400 and "base model" in answer["error"]["message"] and TEXT in answer["error"]["message"]
    status, _, answer = base.ask(TEXT, {"prompt": "x", "model": "gpt-4"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"


def test_the_models_say_what_they_are(chat, base):
    (model,) = chat.ask("/v1/models")[2]["data"]
    assert (model["id"], model["object"], model["max_model_len"], model["chat"]) == ("chat", "model", 128, True)
    assert chat.ask("/v1/models/chat")[2] == model and base.ask("/v1/models")[2]["data"][0]["chat"] is False
    assert chat.ask("/health")[::2] == (200, {"status": "ok"})


# Who may ask ----------------------------------------------------------------------------------------------------------


def test_another_host_than_this_machines_needs_a_key(tmp_path, capsys, monkeypatch):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "8.8.8.8"):
        with pytest.raises(ValueError, match="needs an api_key"):
            serve.ServeConfig(host=host)
        serve.ServeConfig(host=host, api_key="k")
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        serve.ServeConfig(host=host)
    assert serve.ServeConfig().host == "127.0.0.1"
    monkeypatch.setattr(sys, "argv", ["serve.py", "--host", "0.0.0.0", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        errors.run(serve.main)
    assert end.value.code == 2 and "needs an api_key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [{"port": 65536}, {"host": ""}, {"rows": 0}, {"queue": 0}, {"context": -1}, {"api_key": " k"}, {"api_key": "钥"}],
)
def test_options_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=r"must (not )?be|needs"):
        serve.ServeConfig(**fields)


def test_the_key_is_asked_for_everywhere_but_on_the_page_and_health(home):
    with Served(home / "chat", key="sesame-1") as served:
        open_paths = {"/", "/chat.js", "/chat.css", "/health"}
        for path in [*served.app.routes, "/nothing", "/v1", "/docs", "/openapi.json", "/health/", "//health"]:
            body = {} if served.app.routes.get(path, ("GET",))[0] == "POST" else None
            status, _, answer = served.ask(path, body)
            assert (status == 401) == (path not in open_paths), path
            for wrong in (
                "sesame-1",
                "Basic sesame-1",
                "Bearer sesame-2",
                "Bearer",
                "Bearer sesame-11",
                "Bearer s",
                "Bearer \xe9",
            ):
                assert (served.ask(path, body, authorization=wrong)[0] == 401) == (path not in open_paths), path
            assert served.ask(path, body, authorization="Bearer sesame-1")[0] != 401
            assert status != 401 or "sesame" not in json.dumps(answer)
    source = (ROOT / "extras/serve/app.py").read_text()
    assert "hmac.compare_digest(key" in source and "self.key ==" not in source


@pytest.mark.parametrize(
    "headers, wanted",
    [
        ({}, 200),
        ({"host_": "localhost"}, 200),
        ({"host_": "LOCALHOST:9"}, 200),
        ({"host_": "[::1]:8000"}, 200),
        ({"host_": "chat.example"}, 200),
        ({"host_": "evil.example"}, 403),
        ({"host_": "127.0.0.1.evil.example"}, 403),
        ({"host_": "localhost.evil.example:8000"}, 403),
        ({"host_": "192.168.1.7"}, 403),
        ({"host_": ""}, 403),
        ({"host_": "localhost:80:80"}, 403),
        ({"host_": "user@localhost"}, 403),
        ({"host_": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host_": "localhost:8000", "origin": "https://localhost:8000"}, 200),
        ({"host_": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host_": "localhost", "origin": "http://localhost.evil.example"}, 403),
        ({"origin": ""}, 403),
    ],
)
def test_pages_of_other_sites_and_rebound_names_get_nothing(home, named, headers, wanted):
    for path, body in (("/v1/models", None), ("/", None), ("/health", None), (TEXT, {"prompt": "x", "max_tokens": 1})):
        status, back, _ = named.ask(path, body, **headers)
        assert status == (wanted if wanted == 403 or path in named.app.routes else 404)
        assert not any(name.lower().startswith("access-control") for name in back)


@pytest.fixture(scope="module")
def named(home):
    with Served(home / "chat", names=("chat.example",)) as served:
        yield served


def test_a_form_or_a_preflight_of_another_site_is_refused(chat):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert chat.ask(TEXT, {"prompt": "x"}, content_type=kind)[0] == 415
    assert chat.ask(TEXT, {"prompt": "x", "max_tokens": 1}, content_type="application/json; charset=utf-8")[0] == 200
    for method in ("OPTIONS", "PUT", "DELETE", "GET", "PATCH", "TRACE"):
        status, back, _ = chat.ask(TEXT, method=method)
        assert status == 405 and back["allow"] == "POST"
    assert chat.ask("/v1/models", {})[0] == 405 and chat.ask("/health", method="HEAD")[0] == 200


def test_every_answer_carries_the_policy_for_browsers(chat):
    for path, body in (
        ("/health", None),
        ("/", None),
        ("/x", None),
        (TEXT, {}),
        (TEXT, {"prompt": "x", "max_tokens": 1, "stream": True}),
    ):
        back = chat.ask(path, body)[1]
        assert back["x-content-type-options"] == "nosniff"
        assert back["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "base-uri 'none'; frame-ancestors 'none'"
        )


def test_the_page_is_three_files_and_nothing_else_of_the_folder(chat):
    folder = ROOT / "extras/serve/page"
    for path, name, kind in (
        ("/", "index.html", "text/html"),
        ("/chat.js", "chat.js", "text/javascript"),
        ("/chat.css", "chat.css", "text/css"),
    ):
        status, back, text = chat.ask(path)
        if (folder / name).is_file():
            assert (
                status == 200
                and back["content-type"] == f"{kind}; charset=utf-8"
                and text == (folder / name).read_bytes()
            )
        else:
            assert status == 404


def test_text_of_special_tokens_in_a_prompt_is_text(chat, base):
    text = base.generator.tokenizer
    evil = "".join(text.special_ids) + "</s><s>曹操"
    assert text.special_ids and base.complete(evil, max_tokens=1)["usage"]["prompt_tokens"] == len(
        text.encode(evil, bos=True)
    )
    assert not set(text.encode(evil)) & set(text.special_ids.values())
    asked = chat.generator.encode([{"role": "user", "content": evil}])
    assert chat.chat(evil, max_tokens=1)["usage"]["prompt_tokens"] == len(asked)
    assert sum(id in text.special_ids.values() for id in asked) == sum(
        id in text.special_ids.values() for id in chat.generator.encode("x")
    )


# Failures and the end -------------------------------------------------------------------------------------------------


def test_an_exception_in_generation_is_an_error_without_insides_and_the_next_request_works(home, capfd):
    with Served(home / "chat") as served:

        def broken(*_, **__):
            raise RuntimeError("the prompt 机密 at /root/secret.py\x1b[2J\n127.0.0.1 GET /forged 200")

        for part in ("step", "add"):
            for stream in (False, True):
                setattr(served.worker.batch, part, broken)
                status, _, answer = served.ask(
                    CHAT, {"messages": [{"role": "user", "content": "机密"}], "stream": stream}
                )
                message = answer["error"]["message"]
                name = re.search(r"[0-9a-f]{12}", message)[0]
                assert status == 500 and answer["error"]["type"] == "server_error"
                assert not any(
                    word in json.dumps(answer, ensure_ascii=False)
                    for word in ("机密", "secret", "Traceback", "RuntimeError", "/", ".py")
                )
                log = capfd.readouterr().err
                assert (
                    f"error {name}: RuntimeError" in log
                    and "worker.py" in log
                    and "\x1b" not in log
                    and "\n127.0.0.1 GET /forged" not in log
                )
                assert served.chat(max_tokens=3)["usage"]["completion_tokens"] == 3


def test_an_exception_amid_a_stream_ends_it_with_an_error(home):
    with Served(home / "chat") as served:
        step, calls = served.worker.batch.step, []

        def breaks():
            calls.append(1)
            if len(calls) == 4:
                raise ValueError("机密")
            return step()

        served.worker.batch.step = breaks
        status, _, text = served.ask(CHAT, {"messages": USER, "stream": True})
        *pieces, last, rest = text.decode().split("\n\n")
        assert status == 200 and not rest and len(pieces) >= 2
        assert (
            json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error" and "机密" not in text.decode()
        )
        assert served.worker.busy == 0 and served.chat(max_tokens=2)


def test_an_exception_in_the_application_is_an_error_too(home, monkeypatch, capfd):
    with Served(home / "chat") as served:
        monkeypatch.setattr(served.app, "_job", lambda *_: 1 // 0)
        status, _, answer = served.ask(CHAT, {"messages": USER})
        assert (
            status == 500 and "ZeroDivision" not in json.dumps(answer) and "ZeroDivisionError" in capfd.readouterr().err
        )


def test_the_log_has_a_line_for_each_request_without_prompts_or_control_characters(home, capfd):
    with Served(home / "chat") as served:
        served.chat("机密文书", max_tokens=1)
        served.complete("机密文书", max_tokens=1)
        served.raw(b"GET /v1/models?key=secret-word HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        served.raw(b"GET /%0a%1b[2J HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        served.raw(b"GET /\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
        served.raw(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        scope = {
            "type": "http",
            "method": "GET",
            "raw_path": b"/\x1b[2J\n\r\x9b",
            "headers": [],
            "path": "/",
            "query_string": b"",
        }
        import asyncio

        async def nothing(*_):
            return {"type": "http.disconnect"}

        asyncio.run(served.app(scope, nothing, nothing))
    log = capfd.readouterr().err
    assert (
        f"127.0.0.1 POST {CHAT} 200 " in log
        and f"127.0.0.1 POST {TEXT} 200 " in log
        and "127.0.0.1 GET /v1/models 200 " in log
    )
    assert "\\x1b[2J\\n\\r\\x9b" in log and "GET /%0a%1b[2J 404" in log
    assert (
        all(line.isprintable() and len(line) < 300 for line in log.splitlines())
        and "机密" not in log
        and "secret-word" not in log
    )


def test_an_answer_on_a_used_connection_does_not_wait_for_the_clients_acknowledgement(chat):
    with socket.create_connection(("127.0.0.1", chat.port), timeout=5) as sock:
        taken = []
        for _ in range(30):
            began, got = time.monotonic(), b""
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not got.endswith(b"}"):
                got += sock.recv(4096)
            taken.append(time.monotonic() - began)
    assert sorted(taken)[15] < 0.02, "Nagle's algorithm is on"


def test_a_client_that_leaves_costs_no_further_token(home):
    body = {"messages": USER, "stream": True}
    for gone_while in ("streaming", "waiting for the whole"):
        with Served(home / "long", rows=1, context=4096, slow_s=0.05) as served:
            data = json.dumps(body | {"stream": gone_while == "streaming"}).encode()
            sock = socket.create_connection(("127.0.0.1", served.port))
            sock.sendall(
                b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % (CHAT.encode(), len(data))
                + data
            )
            until(lambda: served.steps >= 3)
            sock.close()
            at = served.steps
            until(lambda: not served.worker.running)
            time.sleep(0.3)
            assert served.steps <= at + 2, "the one under way, and the one at whose end it was noticed"
            assert served.worker.busy == 0


def test_a_client_that_leaves_the_queue_is_never_begun(home):
    with Served(home / "long", rows=1, queue=3, context=4096, slow_s=0.02) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.chat, max_tokens=100, temperature=0)
        until(lambda: served.steps >= 2)
        add, begun = served.worker.batch.add, []
        served.worker.batch.add = lambda *args: begun.append(args) or add(*args)
        data = json.dumps({"messages": USER}).encode()
        socks = []
        for _ in range(3):
            socks.append(socket.create_connection(("127.0.0.1", served.port)))
            socks[-1].sendall(
                b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % (CHAT.encode(), len(data))
                + data
            )
        until(lambda: len(served.worker.waiting) == 3)
        for sock in socks:
            sock.close()
        until(lambda: not served.worker.waiting)
        assert not first.done()
        assert first.result()["usage"]["completion_tokens"] == 100 and not begun
        assert served.chat(max_tokens=1) and len(begun) == 1


def test_beyond_the_queue_clients_are_told_to_come_again(home):
    with Served(home / "long", rows=2, queue=3, context=4096, slow_s=0.02) as served, ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(served.ask, CHAT, {"messages": USER, "max_tokens": 20}) for _ in range(9)]
        answers = [a.result() for a in asked]
        assert sorted(status for status, _, _ in answers) == [200] * 5 + [503] * 4
        for status, headers, answer in answers:
            if status == 503:
                assert headers["retry-after"] == "1" and answer["error"]["code"] == "overloaded"
        assert served.chat(max_tokens=1, n=2)["choices"][1]


def started(home: Path, *words: str) -> tuple[subprocess.Popen, int]:
    """serve.py as a process, and its port."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), "--model", str(home), "--port", "0", "--device", "cpu", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)$", line.strip())
    assert found, line + process.stderr.read()
    return process, int(found[1])


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end_and_the_exit_code_is_0(home, number):
    process, port = started(home / "long", "--rows", "2", "--context", "4096")
    try:
        data = json.dumps({"messages": USER, "stream": True, "max_tokens": 600}).encode()
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(head % (CHAT.encode(), len(data)) + data)
            got = sock.recv(1 << 16)
            process.send_signal(number)
            time.sleep(0.5)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            while piece := sock.recv(1 << 16):
                got += piece
        assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b"error" not in got
        assert process.wait(timeout=5) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.heavy
def test_streams_that_would_not_end_are_cut_with_an_error_ten_seconds_after_the_signal(home):
    process, port = started(home / "long-base", "--rows", "1")
    try:
        data = json.dumps({"prompt": "曹操", "temperature": 0, "stream": True}).encode()
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with (
            socket.create_connection(("127.0.0.1", port)) as sock,
            socket.create_connection(("127.0.0.1", port)) as slow,
        ):
            sock.sendall(head % (TEXT.encode(), len(data)) + data)
            slow.sendall(head % (TEXT.encode(), 1000) + b"half a body")
            got, told = sock.recv(1 << 16), time.monotonic()
            process.terminate()
            while piece := sock.recv(1 << 16):
                got += piece
        assert process.wait(timeout=15) == 0 and 8 < time.monotonic() - told < 12
        assert b"[DONE]" not in got and b"the server is stopping" in got
    finally:
        process.kill()


def test_what_keeps_the_server_from_starting_is_one_line_and_exit_code_2(home, monkeypatch, capsys):
    def said(*words):
        monkeypatch.setattr(sys, "argv", ["serve.py", *words])
        with pytest.raises(SystemExit) as end:
            errors.run(serve.main)
        assert end.value.code == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use -- --host and --port choose another\n" in said(
            "--model", str(home / "chat"), "--port", str(taken.getsockname()[1])
        )
    assert "129: the model has 128 positions" in said("--model", str(home / "chat"), "--context", "129")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "starlette", None)
        assert said("--model", str(home / "chat")) == (
            "error: the server needs the packages starlette, uvicorn, h11 and pydantic -- pip install -r requirements-serve.txt\n"
        )


def test_the_server_runs_nothing_a_model_says_and_fetches_nothing():
    for path in [*(ROOT / "extras/serve").glob("*.py"), ROOT / "serve.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        }
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {f"{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {
            "eval",
            "exec",
            "compile_command",
            "system",
            "Popen",
            "create_connection",
            "urlopen",
            "open_connection",
            "Template",
        }, path
        assert not imported & {
            "subprocess",
            "urllib.request",
            "http.client",
            "httpx",
            "requests",
            "jinja2",
            "string",
            "importlib",
            "pickle",
        }, path


def test_the_fields_of_a_request_are_those_that_sampling_has():
    from extras.serve import schema

    assert schema.Sampling.model_fields.keys() == {f.name for f in dataclasses.fields(SamplingConfig)} - {
        "max_new_tokens",
        "truncate",
    }


# Real clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sdk(chat):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0)


def test_the_openai_sdk_gets_what_the_model_says(chat, sdk):
    wanted = alone(chat, chat.generator.encode(USER), answer=True, temperature=0, max_new_tokens=30)
    answer = sdk.chat.completions.create(
        model="chat", messages=USER, temperature=0, max_completion_tokens=30, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == wanted and answer.usage.completion_tokens == 30
    assert (
        len(answer.choices[0].logprobs.content) == 30 and len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    )
    events = list(
        sdk.chat.completions.create(
            model="chat",
            messages=USER,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert (
        "".join(e.choices[0].delta.content or "" for e in events if e.choices) == wanted
        and events[-1].usage.completion_tokens == 30
    )
    text = sdk.completions.create(model="chat", prompt="话说", temperature=0, max_tokens=9, logprobs=1)
    assert text.choices[0].text == alone(
        chat, chat.generator.tokenizer.encode("话说", bos=True), temperature=0, max_new_tokens=9
    )
    assert [m.id for m in sdk.models.list()] == ["chat"] and sdk.models.retrieve("chat").id == "chat"


def test_sixteen_at_once_with_the_openai_sdk_get_what_they_get_one_by_one(chat, sdk):
    def ask(k):
        return (
            sdk.chat.completions.create(
                model="chat", messages=[{"role": "user", "content": "曹操" + "刘" * k}], temperature=0, max_tokens=40
            )
            .choices[0]
            .message.content
        )

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(k) for k in range(16)] and len(set(together)) > 8


def test_the_openai_sdk_understands_our_errors(sdk, home):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as e:
        sdk.chat.completions.create(model="chat", messages=USER, temperature=-1)
    assert e.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="gpt-4", messages=USER)
    with Served(home / "chat", key="k") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        client.api_key = "k"
        assert len(list(client.models.list())) == 1
        step, calls = served.worker.batch.step, []
        served.worker.batch.step = lambda: step() if calls.append(1) or len(calls) < 3 else 1 // 0
        with pytest.raises(openai.APIError, match="the server failed"):
            list(client.chat.completions.create(model="chat", messages=USER, stream=True))


def test_langchain_talks_with_it(chat):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=f"{chat.url}/v1", api_key="none", model="chat", temperature=0, max_tokens=30, max_retries=0
    )
    wanted = alone(chat, chat.generator.encode(USER), answer=True, temperature=0, max_new_tokens=30)
    assert model.invoke("曹操").content == wanted
    assert "".join(piece.content for piece in model.stream("曹操")) == wanted
    turns = [("system", "短。"), ("human", "曹操"), ("ai", "魏"), ("human", "刘备")]
    messages = [{"role": {"human": "user", "ai": "assistant"}.get(role, role), "content": text} for role, text in turns]
    assert model.invoke(turns).content == alone(
        chat, chat.generator.encode(messages), answer=True, temperature=0, max_new_tokens=30
    )


def test_curl_as_in_the_description_of_the_command(chat):
    if not shutil.which("curl"):
        pytest.skip("curl is not here")
    done = subprocess.run(
        [
            "curl",
            "-sN",
            f"{chat.url}{CHAT}",
            "-H",
            "Content-Type: application/json",
            "-d",
            json.dumps({"messages": USER, "stream": True, "max_tokens": 5}),
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0 and done.stdout.endswith("data: [DONE]\n\n") and done.stdout.count("data: ") >= 3
    # curl sends `Expect: 100-continue` before a body of a megabyte, and gets its answer before the body.
    done = subprocess.run(
        [
            "curl",
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %{size_upload}",
            f"{chat.url}{TEXT}",
            "-H",
            "Content-Type: application/json",
            "-d",
            "@-",
        ],
        input="x" * (2 << 20),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.startswith("413 ")


@pytest.mark.heavy
def test_real_text_streams_as_the_model_says_it(shared_data):
    with Served(shared_data / "weights/infinitensor-story") as served:
        prompt = "Once upon a time"
        wanted = alone(served, served.generator.tokenizer.encode(prompt, bos=True), temperature=0, max_new_tokens=60)
        events = served.stream(TEXT, {"prompt": prompt, "temperature": 0, "max_tokens": 60})
        assert "".join(e["choices"][0]["text"] for e in events) == wanted and len(wanted.split()) > 30

"""The server against those who mean it harm: heads, bodies, fields, paths, slow and vanishing clients.

Raw sockets throughout. Deadlines are shortened where only that they are held is in question, and real in the heavy tests.
"""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import Served, files_open, memory_mb, until

from extras.serve import app, wire
from extras.serve.answers import Refused

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("pydantic")
schema = pytest.importorskip("extras.serve.schema")
if not Path("/proc/self/fd").is_dir():
    pytest.skip("counts open files as Linux does", allow_module_level=True)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def chat(home):
    with Served(home / "chat", rows=16, queue=64) as served:
        yield served


def request(body: bytes | dict, path: str = TEXT, more: str = "", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(data) if length is None else length
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}Content-Length: {length}\r\n\r\n".encode()
        + data
    )


CLOSE = "Connection: close\r\n"
FINE = request({"prompt": "x", "max_tokens": 1}, more=CLOSE)


# What is too much -----------------------------------------------------------------------------------------------------


def test_a_body_over_a_mebibyte_is_refused_before_it_is_read(chat):
    before = memory_mb()
    began = time.monotonic()
    assert chat.raw(request(b"", length=10**9)).startswith(b"HTTP/1.1 413 ")
    assert chat.raw(request(b"", length=(1 << 20) + 1)).startswith(b"HTTP/1.1 413 ")
    assert chat.raw(request(b"", length=10**19)).startswith(b"HTTP/1.1 4")
    assert time.monotonic() - began < 1
    piece = b"x" * (1 << 16)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for way, first, part in (
        ("declared", request(b"", length=10**9), piece),
        ("chunks", head, b"10000\r\n" + piece + b"\r\n"),
        ("chunks of a byte", head, b"1\r\nx\r\n" * 9000),
    ):
        with socket.create_connection(("127.0.0.1", chat.port), timeout=5) as sock:
            sock.sendall(first)
            sent, got = 0, b""
            sock.settimeout(0)
            while sent < 10**9 and not got.startswith(b"HTTP/1.1 413 "):
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(part[sent % len(part) :])
                with contextlib.suppress(BlockingIOError):
                    got += sock.recv(4096)
            assert sent < 24 << 20, f"{way}: what the system's buffers took, and no more"
            assert got.startswith(b"HTTP/1.1 413 ") and (b"too small" in got) == (way == "chunks of a byte"), way
    assert memory_mb() - before < 20


def test_a_client_that_sends_all_of_too_much_and_then_reads_sees_why(chat):
    for size in ((1 << 20) + 1, 5 << 20):
        assert chat.raw(request(b" " * size)).startswith(b"HTTP/1.1 413 ")
    assert chat.raw(request(b" " * (1 << 20), more=CLOSE)).startswith(b"HTTP/1.1 400 ")


def test_a_head_over_16_kibibytes_is_refused(chat):
    before = memory_mb()
    for big in (b"a" * 20_000, b"a" * 10**6, b"x: y\r\n" * 10**5, b"x: " + b"y" * 10**7):
        for cut in (len(big), 1000):
            got = chat.raw(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
                *(big[k : k + cut] for k in range(0, min(len(big), 40 * cut), cut)),
            )
            assert got.startswith(b"HTTP/1.1 4") and (b" 431 " in got or big.startswith(b"aaaa")), got[:80]
    assert chat.raw(b"GET /" + b"a" * 30_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    # In one piece, and whole: h11 alone would take it.
    assert chat.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 17_000 + b"\r\n\r\n").startswith(
        b"HTTP/1.1 431 "
    )
    assert chat.raw(
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nx: " + b"y" * 15_000 + b"\r\n\r\n"
    ).startswith(b"HTTP/1.1 200 ")
    assert memory_mb() - before < 20


def test_a_flood_of_small_chunks_or_of_bytes_after_a_refusal_is_cut(chat, monkeypatch):
    monkeypatch.setattr(wire, "LINGER_BYTES", 1 << 20)
    files = files_open()
    sent = 0
    with (
        socket.create_connection(("127.0.0.1", chat.port), timeout=5) as sock,
        pytest.raises((ConnectionResetError, BrokenPipeError)),
    ):
        sock.sendall(b"nonsense\r\n\r\n")
        while sent < 1 << 30:
            sent += sock.send(b"x" * 65536)
    assert sent < 64 << 20
    until(lambda: files_open() <= files)


BOMBS = [
    {"n": 10**6},
    {"best_of": 10**9},
    {"logprobs": 10**9},
    {"max_tokens": 10**18},
    {"stop": ["x"] * 10**5},
    {"stop": "x" * 10**6},
    {"prompt": ["x"] * 10**5},
    {"prompt": [[1]] * 10**5},
    {"prompt": [1] * 3 * 10**5},
    {"user": ["x"] * 10**5},
    {"temperature": 10**400},
    {"temperature": [[[[]]]]},
    {"seed": -(10**30)},
    {"x" * 10**6: 1},
    {f"f{k}": 1 for k in range(50_000)},
    {"stream_options": {str(k): True for k in range(50_000)}, "stream": True},
    {"logit_bias": {str(k): 1 for k in range(50_000)}},
]
CHAT_BOMBS = [
    {"messages": [{}] * 25 * 10**4},
    {"messages": [[]] * 25 * 10**4},
    {"messages": [{"role": "user", "content": ""}] * 25_000},
    {"messages": [{"role": ("user", "assistant")[k % 2], "content": "x"} for k in range(22_001)]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 30_000}]},
    {"messages": [{"role": "user", "content": "x" * 10**6}]},
    {"top_logprobs": 10**6, "logprobs": True},
]


@pytest.mark.parametrize(
    "path, bomb",
    [*((TEXT, b) for b in BOMBS), *((CHAT, b) for b in CHAT_BOMBS)],
    ids=lambda v: v if isinstance(v, str) else next(iter(v))[:20],
)
def test_a_bomb_is_refused_with_the_fields_name_in_a_moment(chat, path, bomb):
    body = request(
        {"prompt": "x"} | bomb if path == TEXT else {"messages": [{"role": "user", "content": "x"}]} | bomb, path, CLOSE
    )
    assert len(body) < 1 << 20
    got, data = chat.raw(body), body.partition(b"\r\n\r\n")[2]
    error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
    assert got.startswith(b"HTTP/1.1 400 ") and error["param"] and len(got) < 1500
    if len(bomb.get("messages", "xx")) > 1:  # the others are refused where their text is counted
        took = []
        for _ in range(3):
            began = time.thread_time()  # the machine may be busy with something else
            with pytest.raises(Refused):
                schema.read(data, path == CHAT, schema.Limits("chat", 600, 16, 64, 128))
            took.append(time.thread_time() - began)
        assert min(took) < 0.05, took


def mutated(rng: random.Random) -> bytes:
    """A body that is nearly right, or not at all."""
    values = [
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        2**31,
        10**30,
        1e308,
        -1e-320,
        float("nan"),
        float("inf"),
        "",
        "x",
        "曹操",
        "\ud800",
        "x" * 300,
        [],
        [1],
        ["x"],
        [[]],
        [[1, 2]],
        {},
        {"type": "text"},
        {"include_usage": True},
        [{"role": "user", "content": "x"}],
        [{"role": "user"}],
        [None],
        "auto",
        "none",
    ]
    names = [*schema.Chat.model_fields, *schema.Completion.model_fields, "n", "frob", ""]
    body = {"messages": [{"role": "user", "content": "曹操"}]} if rng.random() < 0.5 else {"prompt": "曹操"}
    for _ in range(rng.randrange(4)):
        body[rng.choice(names)] = rng.choice(values)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:at] = rng.choice([b"[", b"{", b'"', b"\\", b"\x00", b"9" * 50, b"1e999", b"NaN", b"\xff"])
        elif kind == 2:
            del data[at : at + rng.randrange(5)]
        else:
            data[at:at] = data[: rng.randrange(20)]
    return bytes(data)


@pytest.mark.heavy
def test_no_body_does_more_than_be_understood_or_refused(pytestconfig):
    rng = random.Random(0)
    worst, understood, count = 0.0, 0, pytestconfig.getoption("--mutations")
    for _ in range(count):
        body, chat = mutated(rng), rng.random() < 0.5
        began = time.perf_counter()
        try:
            schema.read(body, chat, schema.Limits("m", 600, 16, 64, 128))
            understood += 1
        except Refused as refused:
            assert refused.status in (400, 404) and refused.message.isprintable() and len(refused.message) < 300
        worst = max(worst, time.perf_counter() - began)
    assert count / 100 < understood < count and worst < 0.5  # one that the machine was busy for


@pytest.mark.heavy
def test_ten_thousand_bodies_over_sockets_leave_the_server_as_it_was(home):
    rng = random.Random(1)
    with Served(home / "chat", rows=16, queue=64, context=12) as served:
        files = files_open()
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock, sock.makefile("rb") as reader:
            for _ in range(10_000):
                sock.sendall(request(mutated(rng), rng.choice([CHAT, TEXT])))
                status, size = reader.readline().split()[1], None
                while (line := reader.readline().strip().lower()) != b"":
                    size = int(line.split(b":")[1]) if line.startswith(b"content-length") else size
                while size is None and (chunk := int(reader.readline(), 16)) > 0:  # a stream
                    reader.read(chunk + 2)
                reader.read(size) if size is not None else reader.readline()
                assert status in (b"200", b"400", b"404")
        until(lambda: files_open() <= files)
        assert served.complete(max_tokens=1) and served.worker.busy == 0


# What is no HTTP, and no path -----------------------------------------------------------------------------------------

HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
TAIL = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = {
    "both lengths": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + TAIL,
    "two lengths": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"
    + TAIL,
    "two lengths in one": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Content-Length: 5, 6\r\n\r\nhello"
    + TAIL,
    "a signed length": b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: +5\r\n\r\nhello" + TAIL,
    "a hexadecimal length": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Content-Length: 0x5\r\n\r\nhello"
    + TAIL,
    "lines without CR": b"GET /health HTTP/1.1\nHost: localhost\n\n" + TAIL,
    "one line without CR": b"GET /health HTTP/1.1\r\nHost: localhost\nx: y\r\n\r\n" + TAIL,
    "an empty line without CR": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n" + TAIL,
    "a folded line": b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: y\r\n z\r\n\r\n" + TAIL,
    "a folded length": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\nhello"
    + TAIL,
    "a space before the colon": b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length : 5\r\n\r\nhello" + TAIL,
    "an unknown coding": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"
    + TAIL,
    "two codings": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"
    + TAIL,
    "a bad chunk": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    + TAIL,
    "a chunk with a bad end": b"POST /v1/completions HTTP/1.1\r\n"
    + HOST
    + JSON
    + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n"
    + TAIL,
    "no host": b"GET /health HTTP/1.1\r\n\r\n" + TAIL,
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n" + TAIL,
    "a NUL": b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: a\x00b\r\n\r\n" + TAIL,
    "a NUL in the path": b"GET /he\x00alth HTTP/1.1\r\nHost: localhost\r\n\r\n" + TAIL,
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_two_servers_could_read_in_two_ways_is_refused_and_the_connection_closed(chat, name):
    for data in ([SMUGGLED[name]], [bytes([b]) for b in SMUGGLED[name][:300]]):
        got = chat.raw(*data)
        status = int(got.split()[1]) if got.startswith(b"HTTP/1.1 ") else 0
        assert status in (400, 431, 501), got[:100]
        assert got.count(b"HTTP/1.1 ") == 1 and not got.endswith(b"open") and b"max_model_len" not in got


def test_a_request_that_comes_before_the_answer_to_the_one_in_front_is_not_read(chat):
    got = chat.raw(FINE.replace(CLOSE.encode(), b"") + TAIL)
    assert got.startswith(b"HTTP/1.1 200 ") and got.count(b"HTTP/1.1 ") == 1 and not got.endswith(b"open")
    stream = request({"prompt": "x", "max_tokens": 30, "stream": True})
    got = chat.raw(stream, b"", TAIL)
    assert got.count(b"HTTP/1.1 ") <= 2 and b"[DONE]" in got
    # One after the other on one connection is fine.
    with socket.create_connection(("127.0.0.1", chat.port), timeout=5) as sock:
        for _ in range(3):
            sock.sendall(TAIL)
            got = sock.recv(1 << 16)
            while not got.endswith(b"}]}"):
                got += sock.recv(1 << 16)
            assert got.startswith(b"HTTP/1.1 200 ")


def test_what_a_client_sends_during_its_answer_is_not_kept(home):
    with Served(home / "long", rows=1, context=4096, slow_s=0.05) as served:
        before, sent = memory_mb(), 0
        with socket.create_connection(("127.0.0.1", served.port), timeout=5) as sock:
            sock.sendall(request({"prompt": "x", "stream": True, "temperature": 0}))
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            while sent < 64 << 20:
                sent += sock.send(b"x" * (1 << 16))
            assert memory_mb() - before < 20
        until(lambda: served.worker.busy == 0)


@pytest.mark.heavy
def test_of_a_hundred_thousand_paths_only_the_literal_ones_lead_anywhere(chat, tmp_path):
    asked = SimpleNamespace(method="GET", headers={"host": "localhost"})  # what is asked of starlette's Request
    rng, known = random.Random(0), set(chat.app.routes)
    parts = [
        "/",
        "//",
        "..",
        ".",
        "%2e%2e",
        "%2f",
        "%5c",
        "\\",
        "%00",
        "\x00",
        "etc",
        "passwd",
        "page",
        "index.html",
        "chat.js",
        "v1",
        "models",
        "health",
        "~root",
        "proc",
        "self",
        "environ",
        ";",
        "?",
        "#",
        "%c0%ae",
        "%252e",
        "app.py",
        "worker.py",
        str(tmp_path),
        "chat",
        "completions",
        "a" * 3000,
    ]
    for _ in range(100_000):
        path = "/" * rng.randrange(2) + "".join(rng.choices(parts, k=rng.randint(1, 6)))
        try:
            chat.app._route(path, asked)
            assert path in known, path
        except Refused as refused:
            assert refused.status == (405 if path in known else 404), path
    for path in (
        "/../serve.py",
        "//etc/passwd",
        "/%2e%2e/serve.py",
        "/page/index.html",
        "/chat.js/",
        "/./health",
        "/health%00",
        "/v1/../health",
        "/HEALTH",
        "/%68ealth",
        "/chat.js%20",
        "http://localhost/health",
        "/page/../app.py",
        "*",
    ):
        got = chat.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert got.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), path


# Slow and vanishing clients -------------------------------------------------------------------------------------------


def trickle(served: Served, count: int, first: bytes, byte: bytes) -> list[float]:
    """How long each of `count` clients was let go on that send a byte now and then."""
    began, socks = time.monotonic(), {}
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", served.port))
        sock.sendall(first)
        sock.setblocking(False)
        socks[sock] = None
    lasted = []
    while socks:
        assert time.monotonic() - began < 60, f"{len(socks)} are still let go on"
        for sock in list(socks):
            try:
                sock.send(byte)
            except BlockingIOError:
                pass
            except OSError:
                lasted.append(time.monotonic() - began)
                socks.pop(sock)
                sock.close()
                continue
            try:
                if not sock.recv(1 << 12):
                    raise ConnectionResetError
            except BlockingIOError:
                pass
            except OSError:
                lasted.append(time.monotonic() - began)
                socks.pop(sock)
                sock.close()
        time.sleep(0.05)
    return lasted


SLOW = {
    "head": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ", b"y"),
    "nothing": (b"", b""),
    "body": (request(b"", length=10**5), b" "),
    "chunks": (
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n",
    ),
}


@pytest.mark.parametrize("way", SLOW)
def test_slow_clients_are_let_go_at_the_deadline_and_others_are_served(chat, way, monkeypatch):
    monkeypatch.setattr(wire, "HEAD_S", 0.6)
    monkeypatch.setattr(wire, "LINGER_S", 0.2)
    monkeypatch.setattr(app, "BODY_S", 0.6)
    files, answers, stop = files_open(), [], threading.Event()

    def honest():
        while not stop.is_set():
            began = time.monotonic()
            assert chat.complete(max_tokens=2)
            answers.append(time.monotonic() - began)

    thread = threading.Thread(target=honest)
    thread.start()
    try:
        lasted = trickle(chat, 200, *SLOW[way])
    finally:
        stop.set()
        thread.join()
    assert min(lasted) > 0.5 and max(lasted) < 4, (min(lasted), max(lasted))
    assert len(answers) > 5 and max(answers) < 1
    until(lambda: files_open() <= files)


@pytest.mark.heavy
@pytest.mark.parametrize("way, deadline_s", [("head", 10), ("body", 30)])
def test_the_deadlines_are_ten_and_thirty_seconds(chat, way, deadline_s):
    lasted = trickle(chat, 20, *SLOW[way])
    assert deadline_s - 0.5 < min(lasted) and max(lasted) < deadline_s + 4


def test_a_head_that_comes_slowly_after_a_first_request_has_a_deadline_too(chat, monkeypatch):
    monkeypatch.setattr(wire, "HEAD_S", 0.5)
    with socket.create_connection(("127.0.0.1", chat.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while not got.endswith(b"}"):
            got += sock.recv(1 << 16)
        began = time.monotonic()
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 408 ") and 0.3 < time.monotonic() - began < 2


def test_who_does_not_read_is_cut_and_who_reads_slowly_is_not(home, monkeypatch):
    monkeypatch.setattr(wire, "WRITE_S", 1.0)
    monkeypatch.setattr(wire, "WRITE_BYTES", 1 << 14)
    with Served(home / "chat", rows=4, send_buffer=8192) as served:
        files = files_open()
        for stream in (True, False):
            body = request({"prompt": "x", "n": 4, "logprobs": 20, "stream": stream})
            for reads in (False, True):
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    sock.connect(("127.0.0.1", served.port))
                    sock.settimeout(10)
                    sock.sendall(body)
                    got = sock.recv(64)
                    assert got.startswith(b"HTTP/1.1 200 ")
                    if not reads:
                        until(lambda: not served.server.server_state.connections, 4)
                        continue
                    began = time.monotonic()
                    while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}}"):
                        piece = sock.recv(16384)
                        assert piece, "cut"
                        got += piece
                        time.sleep(0.05 if time.monotonic() - began < 2.5 else 0)
                    assert len(got) > 200_000 and time.monotonic() - began > 1.5
            until(lambda: served.worker.busy == 0)
        until(lambda: files_open() <= files)


def vanish(served: Served, rng: random.Random, parts: tuple[bytes, ...]) -> None:
    sock = socket.create_connection(("127.0.0.1", served.port))
    for part in parts:
        sock.sendall(part)
        time.sleep(rng.random() * 0.01)
    if rng.random() < 0.5:  # RST instead of FIN
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.heavy
def test_after_a_thousand_clients_that_vanish_everything_is_as_before(home):
    with Served(home / "long", rows=8, queue=64, context=2048) as served:
        rng = random.Random(0)
        data = [request({"prompt": "曹操", "stream": rng.random() < 0.7, "n": rng.randint(1, 4)}) for _ in range(50)]

        def many(count):
            for _ in range(count):
                whole = rng.choice(data)
                vanish(
                    served,
                    rng,
                    rng.choice([(whole,), (whole[:50],), (whole[:-5],), (whole, TAIL), (whole[:90], whole[90:])]),
                )
            until(
                lambda: (
                    served.worker.busy == 0 and not served.worker.waiting and not served.server.server_state.connections
                ),
                30,
            )

        many(200)
        files, memory = files_open(), memory_mb()
        many(1000)
        assert files_open() <= files and memory_mb() - memory < 10
        assert not served.worker.running and len(served.worker.batch.texts) == 0
        assert served.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.heavy
def test_a_thousand_clients_at_once_are_served_or_told_to_come_again(home):
    with Served(home / "chat", rows=4, queue=64, slow_s=0.002) as served:
        files, healthy, stop = files_open(), [], threading.Event()

        def health():
            while not stop.is_set():
                began = time.monotonic()
                assert served.ask("/health")[0] == 200
                healthy.append(time.monotonic() - began)
                time.sleep(0.02)

        thread = threading.Thread(target=health)
        thread.start()
        body = request({"prompt": "曹操", "max_tokens": 20}, more=CLOSE)
        socks = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(1000)]
        for sock in socks:
            sock.sendall(body)
        statuses = []
        for sock in socks:
            got = b""
            while piece := sock.recv(1 << 16):
                got += piece
            statuses.append(got.split()[1])
            assert statuses[-1] == b"200" or b"retry-after: 1" in got
            sock.close()
        stop.set()
        thread.join()
        assert set(statuses) == {b"200", b"503"} and statuses.count(b"200") >= 68
        assert max(healthy) < 1 and len(healthy) > 5
        until(lambda: files_open() <= files)


@pytest.mark.heavy
def test_a_minute_of_everything_at_once_and_honest_clients_are_still_served(home):
    """200 slow clients, 1,000 connections, giant bodies, vanishing clients; then memory and files are as before."""
    with Served(home / "chat", rows=8, queue=64) as served:
        for _ in range(20):
            served.complete(max_tokens=20)
        stop, healthy, honest, failures = threading.Event(), [], [], []

        def repeat(act):
            def run():
                rng = random.Random(id(act))
                while not stop.is_set():
                    try:
                        act(rng)
                    except OSError:
                        time.sleep(0.05)  # that is what the attacker gets

            return threading.Thread(target=run)

        def slow(rng):
            socks = []
            for k in range(200):
                socks.append(socket.create_connection(("127.0.0.1", served.port), timeout=5))
                socks[-1].sendall([*SLOW.values()][k % 4][0])
            for _ in range(100):
                if stop.wait(0.1):
                    break
                for k, sock in enumerate(socks):
                    try:
                        sock.send([*SLOW.values()][k % 4][1])
                    except OSError:
                        socks[k] = socket.create_connection(("127.0.0.1", served.port), timeout=5)
            for sock in socks:
                sock.close()

        def idle(rng):
            socks = [socket.create_connection(("127.0.0.1", served.port), timeout=5) for _ in range(1000)]
            stop.wait(5)
            for sock in socks:
                sock.close()

        def giant(rng):
            with socket.create_connection(("127.0.0.1", served.port), timeout=5) as sock:
                sock.sendall(request(b"", length=rng.choice([10**9, 10**6])))
                for _ in range(100):
                    sock.send(b"[" * 65536)

        def gone(rng):
            vanish(served, rng, (request({"prompt": "曹操", "stream": True, "n": 2}),))

        def serve_me(rng):
            began = time.monotonic()
            status, _, answer = served.ask(TEXT, {"prompt": "曹操", "max_tokens": 5, "temperature": 0})
            honest.append((status, time.monotonic() - began))
            if status == 200:
                failures.extend([answer] * (answer["usage"]["completion_tokens"] != 5))

        def health(rng):
            began = time.monotonic()
            failures.extend(["health"] * (served.ask("/health")[0] != 200))
            healthy.append(time.monotonic() - began)
            time.sleep(0.1)

        def attack(seconds):
            stop.clear()
            threads = [repeat(act) for act in (slow, idle, giant, giant, gone, serve_me, serve_me, health)]
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            stop.set()
            for thread in threads:
                thread.join(timeout=30)
            until(lambda: not served.server.server_state.connections, 60)
            return files_open(), memory_mb()

        files, memory = attack(15)  # what the first of them need is kept for the next
        later_files, later_memory = attack(60)
        assert not failures and served.complete(max_tokens=5)
        served_well = [seconds for status, seconds in honest if status == 200]
        told = {
            "honest": len(honest),
            "served": len(served_well),
            "slowest_s": max(served_well),
            "health_s": max(healthy),
            "files": later_files - files,
            "mb": later_memory - memory,
        }
        print(told)
        assert len(served_well) > 0.9 * len(honest) > 50, told
        assert later_files <= files and later_memory - memory < 20 and max(healthy) < 2, told

"""A server on a thread of the test's process, and clients as plain as can be; tests/test_serve.py and its attacks."""

import asyncio
import contextlib
import ctypes
import gc
import http.client
import json
import os
import socket
import threading
import time
from pathlib import Path

from assembly.inference import InferenceConfig, open_generator
from extras.serve import app, wire, worker


class Served:
    """A model folder behind a free port.

    Attributes:
        generator, worker, server: as serve.py makes them.
        steps: how many steps the batch took.
    """

    def __init__(self, folder: Path, rows=4, queue=8, key="", names=(), context=0, send_buffer=0, slow_s=0.0):
        self.generator = open_generator(InferenceConfig(model=str(folder), device="cpu"))
        self.worker = worker.Worker(self.generator, rows, queue, context or self.generator.context)
        self.steps = 0
        step = self.worker.batch.step

        def counted():
            self.steps += 1
            time.sleep(slow_s)
            return step()

        self.worker.batch.step = counted
        sock = wire.listening("127.0.0.1", 0)
        if send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = app.App(self.worker, folder.name, "127.0.0.1", key, names)
        self.server = wire.make(self.app, self.worker)
        self.thread = threading.Thread(
            target=lambda: asyncio.run(wire.serve(self.server, sock, self.worker)), daemon=True
        )
        self.thread.start()
        until(lambda: self.server.started)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive(), "the server did not end"

    def ask(self, path: str, body=None, method: str | None = None, **headers) -> tuple[int, dict, dict]:
        """Status, headers and the JSON of one request; `host_` becomes Host."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {name.strip("_").replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        if data is not None:
            headers = {"content-type": "application/json"} | headers
        connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        is_json = answer.headers.get("content-type") == "application/json" and text
        return answer.status, dict(answer.headers), json.loads(text) if is_json else text

    def chat(self, question: str = "曹操", **fields) -> dict:
        status, _, answer = self.ask(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": question}]} | fields
        )
        assert status == 200, answer
        return answer

    def complete(self, prompt="曹操", **fields) -> dict:
        status, _, answer = self.ask("/v1/completions", {"prompt": prompt} | fields)
        assert status == 200, answer
        return answer

    def stream(self, path: str, body: dict) -> list[dict]:
        """The events of a stream, which must end as OpenAI's do."""
        status, headers, text = self.ask(path, body | {"stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        *events, done, rest = text.decode().split("\n\n")
        assert done == "data: [DONE]" and not rest and all(e.startswith("data: ") for e in events)
        return [json.loads(e.removeprefix("data: ")) for e in events]

    def raw(self, *parts: bytes, wait_s: float = 5.0) -> bytes:
        """What comes back for bytes, until the server closes; b"open" behind it where it does not."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as sock:
            got = b""
            try:
                for part in parts:
                    sock.sendall(part)
                while data := sock.recv(1 << 16):
                    got += data
            except TimeoutError:
                got += b"open"
            except (ConnectionResetError, BrokenPipeError):
                got += b"reset"
            return got


def until(condition, wait_s: float = 20.0) -> None:
    """Wait for something that is to become true."""
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def files_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory_mb() -> float:
    """Of this process, server and clients, without what the allocator only keeps for later."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

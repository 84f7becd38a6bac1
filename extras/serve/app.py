"""A model behind HTTP, spoken to as OpenAI's API: routes, who may ask, and one request from its body to its answer.

    schema.py    a request's JSON -> what is asked for: pydantic models of both endpoints
    worker.py    the one thread that owns the model: texts of all requests are continued together
    answers.py   what the model says -> OpenAI's JSON, whole or as server-sent events
    app.py       this file
    wire.py      the socket: deadlines, limits, what is no HTTP, the end

In:  ASGI. Out: JSON, events, and the three files of the chat page. Needs starlette, uvicorn and pydantic.
Knows the worker's queue; no sockets. The URL never reaches the file system: a route is a key of a dict.
"""

import asyncio
import hmac
import ipaddress
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

from extras.serve.answers import ChatAnswer, Refused, Said, TextAnswer, error, event, too_long
from extras.serve.worker import Full, Inbox, Job, Worker, logged
from tokenizer import TokenizerError

MAX_BODY_BYTES = 1 << 20
BODY_S = 30.0  # from the head of a request to the end of its body

PAGE = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
}
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class App:
    """An ASGI application.

    Args:
        worker: started by whoever runs the application.
        name: of the model, as clients say it.
        host: the address that is listened on.
        key: what clients have to bring; "": nothing.
        names: more that a request may say it is for: behind a proxy, or in a network.
    """

    def __init__(self, worker: Worker, name: str, host: str, key: str = "", names: tuple[str, ...] = ()):
        from starlette.responses import JSONResponse, Response

        from extras.serve import schema

        self.worker, self.generator, self.name, self.key = worker, worker.generator, name, key
        self.hosts = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, *names}
        self.hosts = {host.lower() for host in self.hosts}
        # A page of another site can give its own name this machine's address, but no number.
        self.any_number = host in ("0.0.0.0", "::")
        tokenizer = self.generator.tokenizer
        limits = schema.Limits(name, tokenizer.vocab_size, worker.rows, worker.queue, worker.context)
        self.read = partial(schema.read, limits=limits)
        # No token stands for more bytes of text than its entry has: what is far too long is refused unread.
        self.longest = max(len(tokenizer.id_to_piece(id).encode()) for id in range(tokenizer.vocab_size))
        # What /v1/models says, and the functions that answer.
        model = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "local",
            "max_model_len": worker.context,
            "chat": bool(self.generator.chat_format),
        }

        def always(response):
            async def answer(request, send):
                await response(request.scope, request.receive, send)

            return answer

        async def health(request, send):
            status, word = (200, "ok") if worker.alive else (503, "the worker has ended")
            await JSONResponse({"status": word}, status)(request.scope, request.receive, send)

        async def chat(request, send):
            await self._answer(request, send, chat=True)

        async def completion(request, send):
            await self._answer(request, send, chat=False)

        # Each path that is answered, with its method; nothing else is.
        page = Path(__file__).parent / "page"
        self.routes = {
            path: ("GET", always(Response((page / file).read_bytes(), media_type=kind)))
            for path, (file, kind) in PAGE.items()
            if (page / file).is_file()
        }
        self.routes |= {
            "/health": ("GET", health),
            "/v1/models": ("GET", always(JSONResponse({"object": "list", "data": [model]}))),
            f"/v1/models/{quote(name, safe='')}": ("GET", always(JSONResponse(model))),
            "/v1/chat/completions": ("POST", chat),
            "/v1/completions": ("POST", completion),
        }

    async def __call__(self, scope, receive, send) -> None:
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        assert scope["type"] == "http", scope["type"]
        began, status = time.monotonic(), None
        path = scope["raw_path"].decode("latin-1")  # not decoded further: %2e%2e is no way to say ..

        async def out(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        async def refuse(refused: Refused):
            await JSONResponse(error(refused), refused.status, refused.headers)(scope, receive, out)

        # Whatever goes wrong ends as an answer, and each request as one line in the log.
        request = Request(scope, receive)
        try:
            await self._route(path, request)(request, out)
        except ClientDisconnect:
            pass
        except Refused as refused:
            await refuse(refused)
        except Exception as e:
            name = logged(e)
            if status is None:
                await refuse(Refused(500, f"the server failed; its log has the reason under {name}"))
        finally:
            # Neither the query nor the body: a prompt is nobody's business, and a key might stand there.
            told = path[:200].encode("unicode_escape").decode()
            print(
                f"{(scope.get('client') or ['-'])[0]} {scope['method']} {told} {status or 'gone'} "
                f"{time.monotonic() - began:.2f} s",
                file=sys.stderr,
                flush=True,
            )

    def _route(self, path: str, request):
        """Who answers; `Refused` where the one who asks may not, or nobody does."""
        headers = request.headers
        # For this server, and by no page of another: a browser runs pages of all kinds.
        host = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d*)?", headers.get("host", ""))
        if not host or not self._is_ours(host[1].lower()):
            raise Refused(403, "this server does not answer for that Host", None, "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != headers["host"].lower():
            raise Refused(403, "pages of other sites may not ask this server", None, "wrong_origin")
        # By somebody who may.
        if self.key and path not in PAGE and path != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if not hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode()) or scheme.lower() != "bearer":
                raise Refused(
                    401, "the API key is missing or wrong", None, "invalid_api_key", {"WWW-Authenticate": "Bearer"}
                )
        # A path, a method and a kind of body that somebody answers.
        if path not in self.routes:
            raise Refused(404, "there is nothing under this path", None, "not_found")
        method, answer = self.routes[path]
        if request.method != method and not (request.method == "HEAD" and method == "GET"):
            raise Refused(405, f"this path takes {method}", None, "method_not_allowed", {"Allow": method})
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the content-type must be application/json", None, "wrong_content_type")
        return answer

    def _is_ours(self, host: str) -> bool:
        if host in self.hosts:
            return True
        try:
            return self.any_number and bool(ipaddress.ip_address(host.strip("[]")))
        except ValueError:
            return False

    async def _answer(self, request, send, chat: bool) -> None:
        """One request."""
        from starlette.responses import JSONResponse, StreamingResponse

        if chat and not self.generator.chat_format:
            raise Refused(
                400, f"{self.name} is a base model: it continues texts, under /v1/completions", None, "no_chat_model"
            )
        asked = self.read(await read_body(request), chat)
        # A job for each prompt; all of them get into the queue or none.
        inbox = Inbox(asked.stream)
        jobs = [self._job(prompt, asked, k, chat, inbox) for k, prompt in enumerate(asked.prompts)]
        count = len(jobs) * asked.n
        answer = (ChatAnswer if chat else TextAnswer)(
            self.name, asked.stream, asked.usage, asked.logprobs is not None, sum(len(job.prompt) for job in jobs)
        )
        try:
            self.worker.submit(jobs)
        except Full:
            raise Refused(503, "too many requests are waiting", None, "overloaded", {"Retry-After": "1"}) from None
        try:
            # What fails before the first word is an error of HTTP, in a stream too.
            said = await told(inbox, request)
            if not asked.stream:
                while said is not None and sum(bool(item.end) for item in said) < count:
                    more = await told(inbox, request)
                    said = None if more is None else said + more
            if said is None:
                return  # the client has gone
            if asked.stream:
                response = StreamingResponse(stream(answer, said, inbox, count), media_type="text/event-stream")
            else:
                response = JSONResponse(answer.whole(said, count))
            await response(request.scope, request.receive, send)
        finally:
            self.worker.cancel(jobs)

    def _job(self, prompt: str | list, asked, number: int, chat: bool, inbox: Inbox) -> Job:
        """A prompt of a request (`schema.Asked`), ready for the worker."""
        context, name = self.worker.context, "messages" if chat else "prompt"
        texts = [message["content"] for message in prompt] if chat else [prompt] if isinstance(prompt, str) else []
        least = sum(len(text.encode()) for text in texts) // self.longest
        if least > context:
            raise too_long(name, f"at least {least}", context)
        try:
            ids = self.generator.encode(prompt) if chat else prompt
        except TokenizerError as e:
            raise Refused(400, f"{name}: {e}", name, "invalid_value") from None
        if isinstance(ids, str):
            ids = self.generator.tokenizer.encode(ids, bos=True)
        if len(ids) > context:
            raise too_long(name, len(ids), context)
        if not ids:
            raise Refused(400, "the prompt has no tokens", name, "invalid_value")
        room = context - len(ids) + 1  # the last token needs no position: nothing comes behind it
        sampling = replace(asked.sampling, max_new_tokens=min(asked.max_tokens or room, room))
        return Job(ids, sampling, asked.n, asked.logprobs, asked.stop, number * asked.n, chat, inbox)


async def read_body(request) -> bytes:
    """The body, in memory: not more than MAX_BODY_BYTES, and not longer than BODY_S."""
    too_large = Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes", None, "body_too_large")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_S:.0f} s", None, "timeout") from None
    return bytes(body)


async def told(inbox: Inbox, request) -> list[Said] | None:
    """What is new, or None when the client has gone. Raises `Refused` where it is an error."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    got, left = asyncio.ensure_future(inbox.get()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((got, left), return_when=asyncio.FIRST_COMPLETED)
        if left.done() or not got.done():
            return None
        for said in got.result():
            if said.end == "error":
                raise Refused(500, said.text)
        return got.result()
    finally:
        got.cancel()
        left.cancel()


async def stream(answer: ChatAnswer | TextAnswer, said: list[Said], inbox: Inbox, count: int):
    """The bytes of a stream that begins with `said` and in which so many texts have to end."""
    while True:
        for item in said:
            if item.end == "error":
                yield event(error(Refused(500, item.text)))
                return
        count -= sum(bool(item.end) for item in said)
        yield answer.pieces(said) + (answer.close() if not count else b"")
        if not count:
            return
        said = await inbox.get()

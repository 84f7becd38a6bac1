"""The socket: deadlines and limits that uvicorn has not, what is no HTTP, and the end of it all.

In:  an ASGI application and an open socket. Out: nothing; it returns after SIGTERM or SIGINT.
Knows nothing of models, and of a request no more than where its head and its body end.
"""

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import sys

from core.errors import UserError
from extras.serve.answers import Refused, error
from extras.serve.worker import Worker

HEAD_S = 10.0  # from a connection, or from the first byte of a further request, to the end of its head
WRITE_S, WRITE_BYTES = 30.0, 1 << 16  # what is not in the system's buffers must shrink by so much in that time, or go
LINGER_S, LINGER_BYTES = 2.0, 1 << 24  # that a refused client may go on sending: closed at once, it would see no answer
IDLE_S = 15  # between two requests
END_S = 10.0  # for the streams that are open when the server is told to stop
MAX_HEAD_BYTES = 16 << 10
MAX_FRAME_BYTES = 1 << 16  # of a body beside its contents: a megabyte in chunks of one byte is seconds of work
READ_BYTES = 1 << 16  # at once: what is worked on before another connection has its turn
MAX_CONNECTIONS = 4096  # at most; fewer where the system allows fewer open files


def packages():
    """uvicorn, h11 and uvicorn's protocol class."""
    try:
        import h11
        import pydantic  # noqa: F401  for the schema
        import starlette  # noqa: F401  for the application
        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError:
        raise UserError(
            "the server needs the packages starlette, uvicorn, h11 and pydantic",
            "pip install -r requirements-serve.txt",
        ) from None
    return uvicorn, h11, H11Protocol


def listening(host: str, port: int) -> socket.socket:
    """An open socket."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        why = (getattr(e, "strerror", None) or str(e)).partition(" (")[0]  # the rest is the address again
        raise UserError(f"{host}:{port}: {why}", "--host and --port choose another") from None


def connections() -> int:
    """How many connections may be open, once this process may open as many files as it can."""
    try:
        import resource
    except ImportError:  # Windows, which counts otherwise
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MAX_CONNECTIONS + 256
    if soft != unlimited and soft < wanted:
        soft = wanted if hard == unlimited else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == unlimited else min(MAX_CONNECTIONS, soft - 256)


def make(app, worker: Worker):
    """A uvicorn server for the application; its `should_exit` ends it."""
    uvicorn, h11, H11Protocol = packages()
    most = connections()

    class Protocol(H11Protocol):
        """uvicorn's, with deadlines, one request at a time, and strict about heads."""

        head = stall = None  # timers
        over, spare, frame = False, LINGER_BYTES, 0

        def connection_made(self, transport):
            super().connection_made(transport)
            # asyncio does it for sockets of its own only: else each answer on a used connection waits for 40 ms.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # "Unread" then begins with the first byte that the system does not take.
            transport.set_write_buffer_limits(0)
            transport.max_size = READ_BYTES  # of asyncio's transports
            self._expect_head()
            if len(self.connections) > most:
                self._refuse(Refused(503, "too many connections", None, "overloaded"))
                transport.close()

        def connection_lost(self, exc):
            super().connection_lost(exc)
            for timer in (self.head, self.stall, self.timeout_keep_alive_task):
                if timer:
                    timer.cancel()

        def data_received(self, data):
            if self.over:
                self.spare -= len(data)
                if self.spare < 0:
                    self.transport.abort()
            elif self._answering():
                self._no_more()  # what is sent before an answer has ended is not read
            else:
                cycle, had = self.cycle, len(self.cycle.body) if self.cycle else 0
                super().data_received(data)
                self.frame = self.frame + len(data) - len(cycle.body) + had if cycle and cycle is self.cycle else 0
                if self.frame > MAX_FRAME_BYTES and not self.over:
                    self._refuse(Refused(413, "the chunks of the body are too small", None, "body_too_large"))

        def handle_events(self):
            if self.conn.their_state is h11.IDLE and not self._sound(self.conn.trailing_data[0]):
                return
            super().handle_events()
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._expect_head()
            elif self.conn.their_state is not h11.IDLE and self.head:
                self.head = self.head.cancel()
            if self._answering() and self.conn.trailing_data[0]:
                self._no_more()

        def on_response_complete(self):
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:  # refused before its body was read
                self._end()

        def send_400_response(self, msg):
            # uvicorn calls this where h11 raises; h11 knows the better status: 431, 501.
            self._refuse(Refused(getattr(sys.exc_info()[1], "error_status_hint", 400), msg, None, "bad_request"))

        def pause_writing(self):
            super().pause_writing()
            self._watch_writing(1 << 62)

        def resume_writing(self):
            super().resume_writing()
            if self.stall:
                self.stall = self.stall.cancel()

        def _watch_writing(self, left: int):
            size = self.transport.get_write_buffer_size()
            if left - size < WRITE_BYTES:
                self.transport.abort()
            self.stall = self.loop.call_later(WRITE_S, self._watch_writing, size)

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

        def _no_more(self):
            self.cycle.keep_alive = False
            # h11 keeps the beginning of what is not read, and has uvicorn pause; a client that leaves must be noticed.
            self.flow.resume_reading()

        def _expect_head(self):
            late = Refused(408, f"the head of a request did not come within {HEAD_S:.0f} s", None, "timeout")
            self.head = self.head or self.loop.call_later(HEAD_S, self._refuse, late)

        def _sound(self, data: bytes) -> bool:
            """The limits of a head that h11 leaves open; refuses what is beyond."""
            end = data.find(b"\r\n\r\n")
            head = data if end < 0 else data[:end]
            if re.search(rb"(?<!\r)\n|\n[ \t]", head):  # another server might see other lines there
                self._refuse(Refused(400, "a line of the head is folded or ends without CR LF", None, "bad_request"))
            elif all(b"\n" + name in head.lower() for name in (b"content-length:", b"transfer-encoding:")):
                self._refuse(Refused(400, "the body has two lengths", None, "bad_request"))
            elif end >= 0 and not head.partition(b"\r\n")[0].endswith((b" HTTP/1.0", b" HTTP/1.1")):
                self._refuse(Refused(400, "this is not HTTP/1.1", None, "bad_request"))
            elif len(head) > MAX_HEAD_BYTES:  # h11's own limit is for heads that come in several parts
                self._refuse(Refused(431, f"the head is larger than {MAX_HEAD_BYTES} bytes", None, "bad_request"))
            return not self.over

        def _refuse(self, refused: Refused):
            """An answer without the application."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
                body = json.dumps(error(refused)).encode()
                headers = [
                    ("content-type", "application/json"),
                    ("content-length", str(len(body))),
                    ("connection", "close"),
                    ("retry-after", "1"),
                ]
                head = h11.Response(status_code=refused.status, headers=headers[: 4 if refused.status == 503 else 3])
                parts = (head, h11.Data(data=body), h11.EndOfMessage())
                self.transport.write(b"".join(self.conn.send(part) for part in parts))
            if self.cycle is not None and not self.cycle.response_complete:  # the application is reading the body
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._end()

        def _end(self):
            """Close our side, and the rest when the client has read it."""
            self.over = True
            self._unset_keepalive_if_required()
            self.flow.resume_reading()
            if not self.transport.is_closing():
                with contextlib.suppress(OSError):  # the client has reset it already
                    self.transport.write_eof()
                self.loop.call_later(LINGER_S, self.transport.abort)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            # A little earlier than uvicorn cuts: streams end with an error that says why.
            asyncio.get_running_loop().call_later(END_S * 0.9, worker.stop)
            await super().shutdown(sockets)

    # Its own log lines would be one per request that is no HTTP; ours are written where a request is answered.
    return Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=int(END_S),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            backlog=2048,
        )
    )


async def serve(server, sock: socket.socket, worker: Worker) -> None:
    """Answer until the server is told to exit."""
    # A body of many lists makes Python look for garbage; it need not look through torch and the model each time.
    gc.freeze()
    worker.start()
    try:
        await server.serve(sockets=[sock])
    finally:
        worker.stop()
        gc.unfreeze()


def run(server, sock: socket.socket, worker: Worker) -> None:
    """The same, until SIGTERM or SIGINT."""

    def end(number, frame):
        server.should_exit = True

    # uvicorn raises the signal again when all is done: it finds these, and the process ends with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    asyncio.run(serve(server, sock, worker))
    worker.thread.join(timeout=END_S)

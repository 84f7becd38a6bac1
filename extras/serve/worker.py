"""The one thread that owns the model: texts of all requests are continued together, each step a token for each.

In:  jobs, from the event loop. Out: what they said, back into it, one call for each step however many texts there are.
Knows text and ids; no HTTP, no JSON, nor how a batch computes (extras/decoding/batching.py).
"""

import asyncio
import contextlib
import secrets
import sys
import threading
import traceback
from collections import deque
from dataclasses import dataclass, field

from core.generate import SamplingConfig
from extras.serve.answers import Said, Told
from tokenizer import Tokenizer


class Inbox:
    """What one request's texts have said and nobody has read yet. Lives in the event loop.

    Args:
        stream: wake the reader at every piece, not only where a text ends.
    """

    def __init__(self, stream: bool):
        self.stream, self.said, self.ready = stream, [], asyncio.Event()

    def put(self, said: Said) -> None:
        self.said.append(said)
        if self.stream or said.end:
            self.ready.set()

    async def get(self) -> list[Said]:
        """Everything new; waits for something."""
        await self.ready.wait()
        self.ready.clear()
        said, self.said = self.said, []
        return said


@dataclass(eq=False)
class Job:
    """One prompt of a request and the n texts behind it.

    Attributes:
        logprobs: as in `schema.Asked`.
        first: number of its first text among the request's.
        answer: a chat's: without white space around it, and not a continuation of the prompt's text.
        gone: nobody waits for it any more.
    """

    prompt: list[int]
    sampling: SamplingConfig
    n: int
    logprobs: int | None
    stop: tuple[str, ...]
    first: int
    answer: bool
    inbox: Inbox
    gone: bool = field(default=False)


class Voice:
    """The ids of one text into what may be given out of it.

    Args:
        index: which text of the request.
        until: cuts it at the job's stop strings.
    """

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer, until):
        self.job, self.index, self.tokenizer, self.until = job, index, tokenizer, until
        self.decoder = tokenizer.stream()
        for id in [] if job.answer else job.prompt:  # a continuation's first space is text
            self.decoder.push(id)
        self.made = self.length = self.given = 0  # ids; characters that came, and those that were given out
        self.space, self.begun = "", False  # an answer's white space that may turn out to be its end
        self.held: list[Told] = []  # tokens whose text was not given out yet

    def take(self, token) -> Said:
        """What became certain with a token of the batch."""
        out, end = "", token.end
        if end != "stop":
            self.made += 1
            if self.job.logprobs is not None:
                top = [(self._bytes(id), logprob) for id, logprob in token.top]
                self.held.append(Told(self._bytes(token.id), token.logprob, top, self.length))
            out = self._until(self.decoder.push(token.id))
        if end and not self.until.stopped:
            out += self._until(self.decoder.flush()) + self.until.flush()
        self.given += len(out)
        cut = self.until.stopped
        ready = len(self.held) if end and not cut else sum(told.at < self.given for told in self.held)
        told, self.held = self.held[:ready], self.held[ready:]
        end = "stop" if cut else end
        return Said(self.index, self._trimmed(out) if self.job.answer else out, told, end, self.made)

    def _until(self, piece: str) -> str:
        self.length += len(piece)
        return self.until.push(piece)

    def _trimmed(self, piece: str) -> str:
        """The pieces of `str.strip` of the whole text."""
        piece = self.space + (piece if self.begun else piece.lstrip())
        kept = piece.rstrip()
        self.space, self.begun = piece[len(kept) :], self.begun or bool(kept)
        return kept

    def _bytes(self, id: int) -> bytes:
        # Twice: a tokenizer may take a space off the beginning.
        data = self.tokenizer.decode_bytes([id, id])
        return data[len(data) // 2 :]


class Full(Exception):
    """The queue has no room."""


class Worker:
    """Continuous batching: requests come and go between two steps.

    Args:
        generator: model, tokenizer and stop ids, see assembly/inference.py.
        rows: texts at once.
        queue: jobs that may wait.
        context: positions of each text, prompt and answer.
    """

    def __init__(self, generator, rows: int, queue: int, context: int):
        self.generator, self.rows, self.queue, self.context = generator, rows, queue, context
        self.batch = generator.new_batch(rows, context)  # None: a new one is needed
        self.running = {}  # text of the batch -> Voice
        self.changed = threading.Condition()  # guards the three below; what is above is the thread's own
        self.waiting: deque[Job] = deque()
        self.busy = 0  # rows of jobs that left the queue
        self.stopping = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin; called in the event loop that the answers go to."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait for their turn; all of them or, with `Full`, none."""
        with self.changed:
            # What the free rows are about to take does not wait.
            if self.stopping or len(self.waiting) + len(jobs) > self.queue + self.rows - self.busy:
                raise Full
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more: no further token is made for them. Nothing happens where they have ended."""
        with self.changed:
            for job in jobs:
                job.gone = True
                with contextlib.suppress(ValueError):
                    self.waiting.remove(job)

    def stop(self) -> None:
        """End; jobs that are not done get an error."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopping or self.waiting or self.running)
                if self.stopping:
                    break
                new = []
                while self.waiting and self.busy + self.waiting[0].n <= self.rows:
                    new.append(self.waiting.popleft())
                    self.busy += new[-1].n
            try:
                self._turn(new)
            except Exception as e:  # of any kind: the next request must find a worker
                self._fail(new, f"the server failed; its log has the reason under {logged(e)}")
        with self.changed:
            self._fail([*self.waiting], "the server is stopping")
            self.waiting.clear()

    def _turn(self, new: list[Job]) -> None:
        """One step: texts that nobody waits for leave, new ones come, every text gets a token."""
        if self.batch is None:
            self.batch = self.generator.new_batch(self.rows, self.context)
        # Who has left, who comes: each makes room, or takes it, before the step.
        for text, voice in [*self.running.items()]:
            if voice.job.gone:
                self._leave(text)
        for job in new:
            if job.gone:
                with self.changed:
                    self.busy -= job.n
                continue
            texts = self.batch.add(job.prompt, job.sampling, self.generator.stop_ids, job.n, job.logprobs or 0)
            for k, text in enumerate(texts):
                until = self.generator.until(job.stop)
                self.running[text] = Voice(job, job.first + k, self.generator.tokenizer, until)
        # The step; what became certain in it goes to the event loop in one call.
        said = []
        for token in self.batch.step():
            voice = self.running[token.text]
            piece = voice.take(token)
            if piece.end:
                self._leave(token.text)
            if piece.text or piece.tokens or piece.end:
                said.append((voice.job.inbox, piece))
        self._deliver(said)

    def _leave(self, text) -> None:
        self.batch.remove(text)
        with self.changed:
            del self.running[text]
            self.busy -= 1

    def _deliver(self, said: list[tuple[Inbox, Said]]) -> None:
        def put():
            for inbox, piece in said:
                inbox.put(piece)

        if said:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all who wait
                self.loop.call_soon_threadsafe(put)

    def _fail(self, new: list[Job], why: str) -> None:
        """All that is under way ends with an error; what the batch was doing is unknown."""
        jobs = {voice.job for voice in self.running.values()} | set(new)
        with self.changed:
            self.running, self.busy, self.batch = {}, 0, None
        self._deliver([(job.inbox, Said(job.first, why, [], "error", 0)) for job in jobs])


def logged(e: Exception) -> str:
    """Write an exception to the log; returns the name it has there.

    Where it happened is told whole. Its own words are: they are ours or a library's, but without control characters.
    """
    name = secrets.token_hex(6)
    frames = "".join(traceback.format_tb(e.__traceback__))
    print(
        f"error {name}: {type(e).__name__}: {str(e).encode('unicode_escape').decode()}\n{frames}",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return name

"""What the model says -> OpenAI's JSON: whole answers, pieces of a stream, errors.

In:  `Said`, piece by piece. Out: objects for JSON, and bytes of server-sent events.
Knows neither model nor sockets.

Source: https://platform.openai.com/docs/api-reference/chat/object, .../chat/streaming and .../completions/object
"""

import json
import secrets
import time
from typing import NamedTuple


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people; nothing of the server's insides, at most a short piece of what was sent.
        param: the field at fault.
        code: for programs, in OpenAI's words.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


def too_long(name: str, size: int | str, context: int) -> Refused:
    """A prompt of more tokens than the model has positions."""
    what = f"the prompt has {size} tokens, the context of this model {context}"
    return Refused(400, what, name, "context_length_exceeded")


class Said(NamedTuple):
    """What became certain of one text in a step.

    Attributes:
        index: which text of the request.
        text: whole characters, nothing of a stop string.
        tokens: what is told of the text's tokens, where that was asked for.
        end: "", "stop" or "length"; "error": the rest will not come, and `text` says why.
        made: ids so far, those of this step too.
    """

    index: int
    text: str
    tokens: list["Told"]
    end: str
    made: int


class Told(NamedTuple):
    """A token with its log-probability, those of the most likely ones beside it, and where in the text it begins."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    at: int


DONE = b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error(refused: Refused) -> dict:
    """An error in OpenAI's shape."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


class Answer:
    """The frame of one request's answer.

    Args:
        model: its name.
        stream: in pieces.
        usage: a stream ends with the counts.
        logprobs: tokens are told.
        prompt_tokens: of all prompts together.
    """

    def __init__(self, model: str, stream: bool, usage: bool, logprobs: bool, prompt_tokens: int):
        self.stream, self.usage, self.logprobs, self.prompt_tokens = stream, usage, logprobs, prompt_tokens
        kind = self.kind + ".chunk" * (stream and self.chunks)
        self.head = {"id": self.prefix + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        self.head["model"] = model
        self.begun: set[int] = set()
        self.made: dict[int, int] = {}  # ids of each text

    def pieces(self, said: list[Said]) -> bytes:
        """Events of a stream."""
        return b"".join(event(self._framed(choice)) for item in said for choice in self._choices(item))

    def close(self) -> bytes:
        """The last events of a stream."""
        return (event(self.head | {"choices": [], "usage": self._counts()}) if self.usage else b"") + DONE

    def whole(self, said: list[Said], count: int) -> dict:
        """All of it at once.

        Args:
            said: everything that was said.
            count: texts.
        """
        choices = []
        for index in range(count):
            parts = [item for item in said if item.index == index]
            self.made[index] = parts[-1].made
            tokens = [token for item in parts for token in item.tokens]
            choices.append(self._choice("".join(item.text for item in parts), tokens, parts[-1]))
        return self.head | {"choices": choices, "usage": self._counts()}

    def _framed(self, choice: dict) -> dict:
        return self.head | {"choices": [choice]} | ({"usage": None} if self.usage else {})

    def _counts(self) -> dict:
        read, made = self.prompt_tokens, sum(self.made.values())
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, kind, chunks = "chatcmpl-", "chat.completion", True

    def _choices(self, said: Said):
        self.made[said.index] = said.made
        if said.index not in self.begun:
            self.begun.add(said.index)
            yield self._delta(said.index, {"role": "assistant", "content": ""}, None, None)
        if said.text or said.tokens:
            yield self._delta(said.index, {"content": said.text}, self._told(said.tokens), None)
        if said.end:
            yield self._delta(said.index, {}, None, said.end)

    def _delta(self, index: int, delta: dict, logprobs: dict | None, end: str | None) -> dict:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}

    def _choice(self, text: str, tokens: list[Told], last: Said) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": last.index, "message": message, "logprobs": self._told(tokens), "finish_reason": last.end}

    def _told(self, tokens: list[Told]) -> dict | None:
        def entry(token: bytes, logprob: float) -> dict:
            return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

        content = [entry(t.token, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens]
        return {"content": content, "refusal": None} if self.logprobs else None


class TextAnswer(Answer):
    """Of /v1/completions."""

    prefix, kind, chunks = "cmpl-", "text_completion", False

    def _choices(self, said: Said):
        self.made[said.index] = said.made
        yield self._choice(said.text, said.tokens, said)

    def _choice(self, text: str, tokens: list[Told], last: Said) -> dict:
        return {"index": last.index, "text": text, "logprobs": self._told(tokens), "finish_reason": last.end or None}

    def _told(self, tokens: list[Told]) -> dict | None:
        """Lists beside each other; `text_offset` counts characters of the answer."""
        if not self.logprobs:
            return None
        tops = [{spelled(token): logprob for token, logprob in [*t.top, (t.token, t.logprob)]} for t in tokens]
        return {
            "tokens": [spelled(t.token) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops,
            "text_offset": [t.at for t in tokens],
        }


def spelled(token: bytes) -> str:
    """A token as the key of an object: half a character as OpenAI writes it, so that two halves stay two keys."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

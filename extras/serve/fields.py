"""The JSON of a request -> what is asked for. Every field is checked by a table; an unknown one is refused by name.

In:  bytes of a body. Out: `Asked`, or `Refused` with the field's name.
Knows no tokenizer beyond its number of ids, and no HTTP beyond the status of a refusal.

Source: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create; top_k, min_p and
repetition_penalty have the names of vLLM and of transformers.
"""

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from core.generate import SamplingConfig

MAX_STOPS, MAX_STOP_CHARS = 4, 256  # OpenAI's number; each costs time per token, by its length
MAX_LOGPROBS = 20  # OpenAI's for chats

Check = Callable[[str, object], object]


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


@dataclass(frozen=True)
class Asked:
    """A request that is sound, as far as that can be said without tokenizer and model.

    Attributes:
        prompts: of each text to continue, itself or its ids; of a chat one list of messages.
        sampling: but for max_new_tokens.
        max_tokens: None: as many as there is room for.
        logprobs: how many of the most likely tokens are told; None: nothing is.
        usage: a stream ends with the counts.
    """

    prompts: list[str | list]
    sampling: SamplingConfig
    max_tokens: int | None
    n: int
    logprobs: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def read(body: bytes, chat: bool, model: str, vocab: int, rows: int, queue: int, context: int) -> Asked:
    """What a body asks for.

    Args:
        body: as it came.
        chat: of /v1/chat/completions, else of /v1/completions.
        model: the only model there is.
        vocab: its number of ids.
        rows: texts at once, the most that n may be.
        queue: requests that may wait, the most that there may be prompts.
        context: positions of a text. More messages or ids than that are refused before one of them is looked at.
    Raises:
        Refused: 400 with the field's name; 404 for another model.
    """
    said = parsed(body)
    table = (CHAT if chat else COMPLETION) | {"n": whole(1, rows)}
    for name in said:
        if name not in table:
            raise Refused(400, f"unknown field {brief(name)}", brief(name), "unknown_parameter")
    # null is the same as nothing said, as with OpenAI.
    got = {name: table[name](name, value) for name, value in said.items() if value is not None}
    if got.get("model", model) != model:
        raise Refused(404, f"there is no model {brief(got['model'])}, only {brief(model)}", "model", "model_not_found")
    prompts = [messages(got, context)] if chat else texts(got, vocab, queue, context)
    limits = {got[name] for name in ("max_tokens", "max_completion_tokens") if name in got}
    if len(limits) > 1:
        raise wrong("max_completion_tokens", "differs from max_tokens")
    if got.get("best_of", got.get("n", 1)) != got.get("n", 1):
        raise wrong("best_of", "must equal n: all texts are given out")
    if "stream_options" in got and not got.get("stream"):
        raise wrong("stream_options", "goes with stream only")
    logprobs = got.get("logprobs")
    if chat:
        if "top_logprobs" in got and not logprobs:
            raise wrong("top_logprobs", "goes with logprobs only")
        logprobs = got.get("top_logprobs", 0) if logprobs else None
    # Each request draws anew unless it says a seed. Texts of one request have seed, seed + 1 ...
    got.setdefault("seed", secrets.randbits(32))
    sampling = SamplingConfig(**{name: got[name] for name in SAMPLING if name in got})
    return Asked(
        prompts,
        sampling,
        min(limits, default=None),
        got.get("n", 1),
        logprobs,
        got.get("stop", ()),
        got.get("stream", False),
        got.get("stream_options", {}).get("include_usage", False),
    )


def parsed(body: bytes) -> dict:
    """JSON of a body, an object."""
    try:
        text = body.decode()
        try:
            said = json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # more digits than Python reads: with infinity there, the field's own check names it
            said = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf)
    except (ValueError, RecursionError) as e:
        what = "nested too deeply" if isinstance(e, RecursionError) else "not JSON in UTF-8"
        raise Refused(400, f"the body is {what}", None, "invalid_json") from None
    if not isinstance(said, dict):
        raise Refused(400, "the body is not a JSON object", None, "invalid_json")
    return said


def brief(text: str) -> str:
    """A text of the request as it may stand in an answer: short, and ASCII without control characters."""
    text = text[:64].encode("unicode_escape").decode()
    return text if len(text) <= 64 else f"{text[:61]}..."


def wrong(name: str, what: str) -> Refused:
    return Refused(400, f"{name} {what}", name, "invalid_value")


def too_long(name: str, size: int | str, context: int) -> Refused:
    what = f"the prompt has {size} tokens, the context of this model {context}"
    return Refused(400, what, name, "context_length_exceeded")


# Checks: (name, value) -> value, or Refused. Written so that NaN and infinity fail every comparison.


def whole(low: int, high: int) -> Check:
    def check(name, value):
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, f"must be a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float, above: bool = False) -> Check:
    def check(name, value):
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            limits = f"above {low} and at most {high}" if above else f"from {low} to {high}"
            raise wrong(name, f"must be a number {limits}")
        return float(value)

    return check


def flag(name, value) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "must be true or false")
    return value


def text(name, value) -> str:
    if not isinstance(value, str):
        raise wrong(name, "must be a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise wrong(name, "has half a surrogate pair, which is no character") from None
    return value


def stops(name, value) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > MAX_STOPS:
        raise wrong(name, f"must be a string or a list of at most {MAX_STOPS}")
    for k, stop in enumerate(value):
        if not 1 <= len(text(f"{name}[{k}]", stop)) <= MAX_STOP_CHARS:
            raise wrong(f"{name}[{k}]", f"must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(value)


def stream_options(name, value) -> dict:
    if not isinstance(value, dict):
        raise wrong(name, "must be an object")
    for key, item in value.items():
        if key not in ("include_usage", "include_obfuscation"):
            raise wrong(f"{name}.{brief(key)}", "is unknown")
        flag(f"{name}.{key}", item)
    if value.get("include_obfuscation"):
        raise wrong(f"{name}.include_obfuscation", "is not supported")
    return value


def only(*allowed) -> Check:
    """Fields of other servers' features: they may be said if they change nothing."""

    def check(name, value):
        # 0 == False and 1 == True in Python, not in JSON.
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise Refused(400, f"{name} is not supported here", name, "unsupported_parameter")
        return value

    return check


def anything(kind: type) -> Check:
    """Fields that are for OpenAI's own bookkeeping and change no result."""

    def check(name, value):
        if not isinstance(value, kind):
            raise wrong(name, f"must be of type {kind.__name__}")
        return value

    return check


def as_it_is(name, value):
    """Checked where all fields are known."""
    return value


def messages(got: dict, context: int) -> list[dict]:
    """Messages as the tokenizer's chat formats take them: role and content, both texts."""
    said = got.get("messages")
    if not isinstance(said, list) or not said:
        raise wrong("messages", "must be a list of at least one message")
    if len(said) > context:  # each is at least a token
        raise too_long("messages", f"at least {len(said)}", context)
    result = []
    for k, message in enumerate(said):
        at = f"messages[{k}]"
        if not isinstance(message, dict):
            raise wrong(at, "must be an object")
        for key, value in message.items():
            # Clients send back what they got, with these empty.
            if key not in ("role", "content") and value not in (None, [], {}):
                raise wrong(f"{at}.{brief(key)}", "is not supported")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise wrong(f"{at}.role", "must be system, developer, user or assistant")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part(f"{at}.content[{j}]", item) for j, item in enumerate(content))
        result.append({"role": "system" if role == "developer" else role, "content": text(f"{at}.content", content)})
    return result


def part(name: str, item) -> str:
    """The text of one part of a message."""
    if not isinstance(item, dict) or item.get("type") != "text" or item.keys() != {"type", "text"}:
        raise wrong(name, 'must be {"type": "text", "text": ...}: this model reads nothing else')
    return text(f"{name}.text", item["text"])


def texts(got: dict, vocab: int, most: int, context: int) -> list[str | list[int]]:
    """Prompts of /v1/completions: a text, ids, or a list of either."""
    said = got.get("prompt")
    if isinstance(said, str):
        return [text("prompt", said)]
    if not isinstance(said, list) or not said:
        raise wrong("prompt", "must be a string, a list of token ids, or a list of either")
    if type(said[0]) is int:
        return [ids("prompt", said, vocab, context)]
    if len(said) > most:
        raise wrong("prompt", f"has {len(said)} prompts, at most {most} can wait")
    return [
        text(f"prompt[{k}]", item) if isinstance(item, str) else ids(f"prompt[{k}]", item, vocab, context)
        for k, item in enumerate(said)
    ]


def ids(name: str, value, vocab: int, context: int) -> list[int]:
    if not isinstance(value, list) or not value:
        raise wrong(name, "must be a string or a list of token ids")
    if len(value) > context:
        raise too_long(name, len(value), context)
    for k, item in enumerate(value):
        if type(item) is not int or not 0 <= item < vocab:
            raise wrong(f"{name}[{k}]", f"must be a token id from 0 to {vocab - 1}")
    return value


SAMPLING = {
    "temperature": number(0, 100),
    "top_p": number(0, 1, above=True),
    "top_k": whole(0, 2**31 - 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 100),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": whole(-(2**63), 2**63 - 2**16),  # room for those of the texts behind the first
}
BOTH = SAMPLING | {
    "model": text,
    "max_tokens": whole(1, 2**31 - 1),
    "stop": stops,
    "stream": flag,
    "stream_options": stream_options,
    "user": text,
    "logit_bias": only({}),
}
CHAT = BOTH | {
    "messages": as_it_is,
    "max_completion_tokens": whole(1, 2**31 - 1),
    "logprobs": flag,
    "top_logprobs": whole(0, MAX_LOGPROBS),
    "metadata": anything(dict),
    "store": flag,
    "service_tier": text,
    "safety_identifier": text,
    "prompt_cache_key": text,
    "prompt_cache_retention": text,
    "parallel_tool_calls": flag,  # there are no tools
    "response_format": only({"type": "text"}),
    "modalities": only(["text"]),
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "functions": only([]),
    "function_call": only("none", "auto"),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),  # OpenAI's default
    "audio": only(),
    "prediction": only(),
    "web_search_options": only(),
}
COMPLETION = BOTH | {
    "prompt": as_it_is,
    "logprobs": whole(0, MAX_LOGPROBS),
    "best_of": whole(1, 2**16),
    "echo": only(False),
    "suffix": only(""),
}

"""The JSON of a request -> what is asked for. A pydantic model of each endpoint; an unknown field is refused by name.

In:  bytes of a body. Out: `Asked`, or `Refused` with the field's name.
Knows no tokenizer beyond its number of ids, and no HTTP beyond the status of a refusal. Needs pydantic, so it is
imported where a server is made.

Source: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create; top_k, min_p and
repetition_penalty have the names of vLLM and of transformers.
"""

import json
import math
import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from core.generate import SamplingConfig
from extras.serve.answers import Refused, too_long

MAX_INT = 2**31 - 1
MAX_STOPS, MAX_STOP_CHARS = 4, 256  # OpenAI's number; each costs time per token, by its length
MAX_LOGPROBS = 20  # OpenAI's for chats


class Limits(NamedTuple):
    """What a server has to give.

    Attributes:
        model: the name of the only model there is.
        vocab: its number of ids.
        rows: texts at once, the most that n may be.
        queue: requests that may wait, the most that there may be prompts.
        context: positions of a text. More messages or ids than that are refused before one of them is looked at.
    """

    model: str
    vocab: int
    rows: int
    queue: int
    context: int


class Asked(NamedTuple):
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


# ---------------------------------------------------------------- types of values


def wrong(what: str | int, at: str = "", code: str = "invalid_value") -> PydanticCustomError:
    """What an answer says of a value, or of its part `at`: [3] or .key"""
    return PydanticCustomError(code, "refused", {"what": what, "at": at})


def says(what: str) -> WrapValidator:
    """Our words for a value that pydantic refuses. Where a part of it is at fault and has its own words, these stay."""

    def check(value, handler):
        try:
            return handler(value)
        except ValidationError as e:
            if all("what" in fault.get("ctx", ()) for fault in e.errors(include_url=False)):
                raise
            raise wrong(what) from None

    return WrapValidator(check)


def limited(what: str, low: int, high: Callable[[Limits], int]):
    """A whole number up to a limit of the server."""

    def check(value, info):
        if type(value) is not int or not low <= value <= high(info.context):
            raise wrong(f"must be {what} from {low} to {high(info.context)}")
        return value

    return Annotated[Any, AfterValidator(check)]


def whole(low: int, high: int):
    return Annotated[int, Field(ge=low, le=high), says(f"must be a whole number from {low} to {high}")]


def number(low: float, high: float):
    return Annotated[float, Field(ge=low, le=high), says(f"must be a number from {low} to {high}")]


def only(*allowed):
    """Fields of other servers' features: they may be said if they change nothing."""

    def check(value):
        # 0 == False and 1 == True in Python, not in JSON.
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise wrong("is not supported here", code="unsupported_parameter")
        return value

    return Annotated[Any, AfterValidator(check)]


def some(kind, what: str):
    """A list of ids or of messages. Each is at least a token, so more than the context are refused unread."""

    def check(value, info):
        if isinstance(value, list) and len(value) > info.context.context:
            raise wrong(len(value), code="context_length_exceeded")
        return value

    return Annotated[list[kind], Field(min_length=1, fail_fast=True), says(what), BeforeValidator(check)]


def check_characters(value: str) -> str:
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in set(value)):
        raise wrong("has half a surrogate pair, which is no character")
    return value


def check_model(value: str, info) -> str:
    if value != info.context.model:
        raise wrong(f"there is no model {brief(value)}, only {brief(info.context.model)}", code="model_not_found")
    return value


def check_stream_options(value: dict) -> dict:
    for key, item in value.items():
        if key not in ("include_usage", "include_obfuscation"):
            raise wrong("is unknown", f".{brief(key)}")
        if not isinstance(item, bool):
            raise wrong("must be true or false", f".{key}")
    if value.get("include_obfuscation"):
        raise wrong("is not supported", ".include_obfuscation")
    return value


def check_message(value):
    # Clients send back what they got, with these empty.
    for key, item in value.items() if isinstance(value, dict) else ():
        if key not in ("role", "content") and item not in (None, [], {}):
            raise wrong("is not supported", f".{brief(key)}")
    return value


def join_parts(value):
    return "".join(part.text for part in PARTS.validate_python(value)) if isinstance(value, list) else value


def read_prompt(value, info) -> str | list[int]:
    return (TEXT if isinstance(value, str) else IDS).validate_python(value, context=info.context)


def list_prompts(value, info) -> list[str | list[int]]:
    """Of a text, of ids, or of a list of either."""
    if not isinstance(value, (str, list)) or value == []:
        raise wrong("must be a string, a list of token ids, or a list of either")
    if isinstance(value, str) or type(value[0]) is int:
        return [read_prompt(value, info)]
    if len(value) > info.context.queue:
        raise wrong(f"has {len(value)} prompts, at most {info.context.queue} can wait")
    return PROMPTS.validate_python(value, context=info.context)


Flag = Annotated[bool, says("must be true or false")]
Text = Annotated[str, says("must be a string"), AfterValidator(check_characters)]
Stop = Annotated[
    Text, Field(min_length=1, max_length=MAX_STOP_CHARS), says(f"must have 1 to {MAX_STOP_CHARS} characters")
]


# ---------------------------------------------------------------- the bodies


class Strict(BaseModel):
    model_config = {"strict": True, "extra": "forbid"}


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """As the tokenizer's chat formats take it: role and content, both texts."""

    model_config = {"extra": "ignore", "validate_default": True}

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        says("must be system, developer, user or assistant"),
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ] = None
    content: Annotated[Text, BeforeValidator(join_parts)] = None


class Sampling(Strict):
    temperature: number(0, 100) = None
    top_p: Annotated[float, Field(gt=0, le=1), says("must be a number above 0 and at most 1")] = None
    top_k: whole(0, MAX_INT) = None
    min_p: number(0, 1) = None
    repetition_penalty: number(0.01, 100) = None
    presence_penalty: number(-2, 2) = None
    frequency_penalty: number(-2, 2) = None
    seed: whole(-(2**63), 2**63 - 2**16) = None  # room for those of the texts behind the first


class Request(Sampling):
    """Of both endpoints. What is not said is None, whatever the type."""

    model: Annotated[Text, AfterValidator(check_model)] = None
    max_tokens: whole(1, MAX_INT) = None
    n: limited("a whole number", 1, lambda limits: limits.rows) = 1
    stop: Annotated[
        list[Stop],
        Field(max_length=MAX_STOPS),
        says(f"must be a string or a list of at most {MAX_STOPS}"),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = ()
    stream: Flag = False
    stream_options: Annotated[dict, says("must be an object"), AfterValidator(check_stream_options)] = None
    user: Text = None
    logit_bias: only({}) = None


class Chat(Request):
    """Of /v1/chat/completions."""

    messages: Annotated[
        some(
            Annotated[Message, BeforeValidator(check_message), says("must be an object")],
            "must be a list of at least one message",
        ),
        Field(validate_default=True),
    ] = None
    max_completion_tokens: whole(1, MAX_INT) = None
    logprobs: Flag = None
    top_logprobs: whole(0, MAX_LOGPROBS) = None
    # For OpenAI's own bookkeeping: these change no result.
    metadata: Annotated[dict, says("must be of type dict")] = None
    store: Flag = None
    service_tier: Text = None
    safety_identifier: Text = None
    prompt_cache_key: Text = None
    prompt_cache_retention: Text = None
    parallel_tool_calls: Flag = None  # there are no tools
    response_format: only({"type": "text"}) = None
    modalities: only(["text"]) = None
    tools: only([]) = None
    tool_choice: only("none", "auto") = None
    functions: only([]) = None
    function_call: only("none", "auto") = None
    reasoning_effort: only("none") = None
    verbosity: only("medium") = None  # OpenAI's default
    audio: only() = None
    prediction: only() = None
    web_search_options: only() = None


class Completion(Request):
    """Of /v1/completions."""

    prompt: Annotated[Any, Field(validate_default=True), AfterValidator(list_prompts)] = None
    logprobs: whole(0, MAX_LOGPROBS) = None
    best_of: whole(1, 2**16) = None
    echo: only(False) = None
    suffix: only("") = None


TEXT = TypeAdapter(Text)
IDS = TypeAdapter(
    some(limited("a token id", 0, lambda limits: limits.vocab - 1), "must be a string or a list of token ids")
)
PROMPTS = TypeAdapter(Annotated[list[Annotated[Any, AfterValidator(read_prompt)]], Field(fail_fast=True)])
PART = Annotated[Part, says('must be {"type": "text", "text": ...}: this model reads nothing else')]
PARTS = TypeAdapter(Annotated[list[PART], Field(fail_fast=True)])


# ---------------------------------------------------------------- from a body to what is asked


def read(body: bytes, chat: bool, limits: Limits) -> Asked:
    """What a body asks for.

    Args:
        body: as it came.
        chat: of /v1/chat/completions, else of /v1/completions.
    Raises:
        Refused: 400 with the field's name; 404 for another model.
    """
    # Names first, so that a flood of unknown ones ends at the first.
    said, kind = parse(body), Chat if chat else Completion
    for name in said:
        if name not in kind.model_fields:
            raise Refused(400, f"unknown field {brief(name)}", brief(name), "unknown_parameter")
    # null is the same as nothing said, as with OpenAI.
    said = {name: value for name, value in said.items() if value is not None}
    try:
        got = kind.model_validate(said, context=limits)
    except ValidationError as e:
        raise refused(e, [*said], limits) from None
    # What no field can check alone.
    ends = {said[name] for name in ("max_tokens", "max_completion_tokens") if name in said}
    told = got.logprobs
    if chat:
        told = (got.top_logprobs or 0) if got.logprobs else None
    for unfit, name, what in (
        (len(ends) > 1, "max_completion_tokens", "differs from max_tokens"),
        (said.get("best_of", got.n) != got.n, "best_of", "must equal n: all texts are given out"),
        (got.stream_options is not None and not got.stream, "stream_options", "goes with stream only"),
        ("top_logprobs" in said and told is None, "top_logprobs", "goes with logprobs only"),
    ):
        if unfit:
            raise Refused(400, f"{name} {what}", name, "invalid_value")
    # Each request draws anew unless it says a seed. Texts of one request have seed, seed + 1 ...
    sampling = {"seed": secrets.randbits(32)} | got.model_dump(include={*Sampling.model_fields}, exclude_unset=True)
    return Asked(
        [[dict(message) for message in got.messages]] if chat else got.prompt,
        SamplingConfig(**sampling),
        min(ends, default=None),
        got.n,
        told,
        tuple(got.stop),
        got.stream,
        (got.stream_options or {}).get("include_usage", False),
    )


def refused(e: ValidationError, names: list[str], limits: Limits) -> Refused:
    """The first fault of a body with these fields; another model comes after other fields, prompts come last."""

    def place(fault: dict) -> tuple[int, int]:
        name, last = fault["loc"][0], ("messages", "prompt")
        return (fault["type"] == "model_not_found") + 2 * (name in last), [*names, *last].index(name)

    fault = min(e.errors(include_url=False, include_input=False), key=place)
    code, what, (name, *parts) = fault["type"], fault["ctx"]["what"], fault["loc"]
    name += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts) + fault["ctx"]["at"]
    if code == "context_length_exceeded":
        return too_long(name, f"at least {what}" if name == "messages" else what, limits.context)
    found = code != "model_not_found"
    return Refused(400 if found else 404, f"{name} {what}" if found else what, name, code)


def parse(body: bytes) -> dict:
    """JSON of a body, an object."""
    try:
        try:
            said = json.loads(body.decode())
        except ValueError:  # it may have more digits than Python reads: with infinity there, the field's check names it
            said = json.loads(body.decode(), parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf)
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

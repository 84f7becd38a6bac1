"""Chats to ids and loss mask, and the same as a template for transformers.

In:  messages `[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]`, a tokenizer and the
     name of a format.
Out: ids and, born with them, a mask of the same length: 1 where the token is to be predicted with loss.
Does not know tensors, padding or files. Markers are never searched for in ids: `render` knows what it writes.

A format is data: for every turn a row of parts, a `Special` being one control id and a text being plain text with a
`{content}` slot. Text between two control ids is encoded as one run, cut only where an answer begins. So the ids up
to there are the prompt at generation, for any answer, and a message with "</s>" or "<|im_end|>" in it forges nothing.
"""

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass

from .sentencepiece_model import TokenizerError


class Special(str):
    """A control id: "bos", "eos", or the text of a control piece."""


BOS, EOS = Special("bos"), Special("eos")
IM_START, IM_END = Special("<|im_start|>"), Special("<|im_end|>")

Parts = tuple[str, ...]


@dataclass(frozen=True)
class ChatFormat:
    """How a chat is written: start, system, (question, answer, between)*.

    Args:
        question: a user's turn, to where the assistant begins to speak.
        answer: the assistant's turn; every token of it is trained.
        start: once at the beginning.
        between: after an answer if another question follows.
        system: a system message's own turn; None for formats without one, where `system_in_question` joins it to
            the first question.
        system_in_question: the first question with its system message.
        strip: take white space off both ends of questions and answers, as Meta's code does.
    """

    question: Parts
    answer: Parts
    start: Parts = ()
    between: Parts = ()
    system: Parts | None = None
    system_in_question: str = "{system}\n{content}"
    strip: bool = False


FORMATS = {
    # baby-llama2-chinese: prompt <bos> answer <eos>
    "bos": ChatFormat(question=("{content}", BOS), answer=("{content}", EOS)),
    # Bloom chats of Firefly and BELLE: <bos>User:q</s>\n Assistant:a</s>\n User:q</s> ...
    "user-assistant": ChatFormat(
        start=(BOS,),
        question=("User:{content}", EOS, "\n Assistant:"),
        answer=("{content}", EOS),
        between=("\n ",),
    ),
    "human-assistant": ChatFormat(
        start=(BOS,),
        question=("Human: {content}\nAssistant:",),
        # The space belongs to the answer: pieces of most vocabularies begin with it, few end with it.
        answer=(" {content}", EOS),
        between=("\n",),
    ),
    # https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
    "llama2": ChatFormat(
        question=(BOS, "[INST] {content} [/INST]"),
        answer=(" {content} ", EOS),
        system_in_question="<<SYS>>\n{system}\n<</SYS>>\n\n{content}",
        strip=True,
    ),
    # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    "chatml": ChatFormat(
        system=(IM_START, "system\n{content}", IM_END, "\n"),
        question=(IM_START, "user\n{content}", IM_END, "\n", IM_START, "assistant\n"),
        answer=("{content}", IM_END),
        between=("\n",),
    ),
}


TRAIN_ON = ("assistant", "last", "all")


def render(
    messages: list[dict], tokenizer, chat_format: str, *, generation: bool = False, train_on: str = "assistant"
) -> tuple[list[int], list[int]]:
    """Write a chat as ids with their loss mask.

    Args:
        messages: dicts with "role" and "content"; optionally a system message first, then user and assistant in turn.
        tokenizer: a `Tokenizer`.
        chat_format: a name from `FORMATS`.
        generation: end where the assistant begins to speak; the last message is then the user's.
        train_on: "assistant" for all answers and what ends them, "last" for the last one only, "all" for everything
            but the very first token.

    Returns:
        (ids, mask), lists of the same length; mask[i] is 1 iff token i is to be predicted with loss.

    Raises:
        TokenizerError: a message that breaks the rules, named by its number from 0; an unknown format; or a format that
            needs control pieces this vocabulary lacks.
    """
    if train_on not in TRAIN_ON:
        raise TokenizerError(f"train_on is {train_on!r} -- choose {', '.join(TRAIN_ON)}")
    special = special_ids(tokenizer, chat_format)
    ids: list[int] = []
    mask: list[int] = []

    def emit(text: str, trained: bool) -> None:
        """Encode a run of text; it continues other text unless a control id or nothing is in front."""
        new = tokenizer.encode(text, continues=bool(ids) and not after_special)
        ids.extend(new)
        mask.extend([int(trained or train_on == "all")] * len(new))

    run, in_answer, after_special = "", False, False
    for part, trained in _parts(messages, FORMATS[chat_format], generation):
        is_special = isinstance(part, Special)
        if run and (is_special or trained != in_answer):
            emit(run, in_answer)
            run, after_special = "", False
        in_answer = trained
        if is_special:
            ids.append(special[part])
            mask.append(int(trained or train_on == "all"))
            after_special = True
        else:
            run += part
    if run:
        emit(run, in_answer)
    mask[0] = 0  # nothing stands before it to predict it from
    if train_on == "last" and any(mask):
        end = len(mask) - mask[::-1].index(1)  # a question stands between two answers
        begin = max((i for i in range(end) if not mask[i]), default=-1) + 1
        mask = [0] * begin + mask[begin:]
    return ids, mask


def end_ids(tokenizer, chat_format: str) -> set[int]:
    """The ids that end an answer at generation: the format's own end, and eos.

    Args:
        tokenizer: a `Tokenizer`.
        chat_format: a name from `FORMATS`.

    Returns:
        a set of ids.

    Raises:
        TokenizerError: as `render` for formats.
    """
    special = special_ids(tokenizer, chat_format)
    return {special[part] for part in FORMATS[chat_format].answer if isinstance(part, Special)} | {tokenizer.eos_id}


def special_ids(tokenizer, chat_format: str) -> dict[str, int]:
    """The control ids a format uses: "bos", "eos" and control pieces -> id; errors as `render` for formats."""
    if chat_format not in FORMATS:
        raise TokenizerError(f"unknown chat format {chat_format!r} -- choose one of {', '.join(FORMATS)}")
    known = tokenizer.special_ids | {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    missing = _specials(FORMATS[chat_format]) - known.keys()
    if missing:
        working = [name for name, other in FORMATS.items() if _specials(other) <= known.keys()]
        raise TokenizerError(
            f"{tokenizer.path}: chat format {chat_format} needs the control pieces {' '.join(sorted(missing))} -- "
            f"with this vocabulary choose one of {', '.join(working)}"
        )
    return known


def template(chat_format: str) -> str:
    """The format as a jinja template, for transformers' `apply_chat_template`.

    A question is always followed by what opens the answer, so `add_generation_prompt` changes nothing. The ids equal
    those of `render` unless a message contains the text of a special token, or the vocabulary has a piece that
    reaches over the place where an answer begins (possible only in user-assistant, whose answers directly follow a
    colon): a template can only give a text, and the cut is lost in it.

    Args:
        chat_format: a name from `FORMATS`.

    Returns:
        the template's text.
    """
    form = FORMATS[chat_format]
    content = "message['content'].strip()" if form.strip else "message['content']"
    question = content
    if form.system is None:
        joined = _expression(form.system_in_question, content=content, system="system")
        joined = f"({joined}).strip()" if form.strip else joined
        question = f"({joined} if loop.first and system is not none else {content})"
    return "".join(
        [
            "{% set system = none %}{% set turns = messages %}",
            "{% if messages[0]['role'] == 'system' %}",
            "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% endif %}",
            _jinja(form.start, ""),
            "{% if system is not none %}" + _jinja(form.system, "system") + "{% endif %}" if form.system else "",
            "{% for message in turns %}",
            "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}",
            "{{ raise_exception('user and assistant must alternate') }}{% endif %}",
            "{% if message['role'] == 'user' %}",
            "{% if not loop.first %}" + _jinja(form.between, "") + "{% endif %}" if form.between else "",
            _jinja(form.question, question),
            "{% else %}",
            _jinja(form.answer, content),
            "{% endif %}{% endfor %}",
        ]
    )


def _jinja(parts: Parts, content: str) -> str:
    """Parts as jinja output; `content` is the expression for the slot."""
    out = []
    for part in parts:
        if part in (BOS, EOS) and isinstance(part, Special):
            out.append(f"{part}_token")
        elif isinstance(part, Special):
            out.append(json.dumps(part))
        else:
            out.append(_expression(part, content=content))
    return "{{ " + " + ".join(out) + " }}" if out else ""


def _expression(text: str, **slots: str) -> str:
    """A text with {slots} as a jinja expression: its literals quoted, its slots replaced by expressions."""
    out = []
    for literal, slot, _, _ in string.Formatter().parse(text):
        out += [json.dumps(literal)] * bool(literal) + ([slots[slot]] if slot else [])
    return " + ".join(out)


def _specials(form: ChatFormat) -> set[str]:
    rows = (form.start, form.system or (), form.question, form.answer, form.between)
    return {part for row in rows for part in row if isinstance(part, Special)}


def _fill(parts: Parts, content: str) -> list[str]:
    # A Special has no slot and must stay a Special: str.format would make it a plain text.
    return [part if isinstance(part, Special) else part.format(content=content) for part in parts]


def _parts(messages: list[dict], form: ChatFormat, generation: bool) -> Iterator[tuple[str, bool]]:
    """The chat's parts in order as (text or Special, is it trained)."""
    system, turns = _check(messages, generation)
    yield from ((part, False) for part in form.start)
    if system is not None and form.system is not None:
        yield from ((part, False) for part in _fill(form.system, system))
        system = None
    for number, content in enumerate(turns):
        content = content.strip() if form.strip else content
        if number % 2:
            yield from ((part, True) for part in _fill(form.answer, content))
            continue
        if number:
            yield from ((part, False) for part in form.between)
        elif system is not None:
            content = form.system_in_question.format(system=system, content=content)
            content = content.strip() if form.strip else content
        yield from ((part, False) for part in _fill(form.question, content))


def _check(messages: list[dict], generation: bool) -> tuple[str | None, list[str]]:
    """The system message or None, and the contents of the turns: user, assistant, user, ..."""
    if not isinstance(messages, list) or not messages:
        raise TokenizerError("a chat needs a list of at least one message")
    system, turns = None, []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise TokenizerError(f"message {number}: needs role and content")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise TokenizerError(f"message {number}: unknown role {role!r} -- choose system, user or assistant")
        if not isinstance(content, str):
            raise TokenizerError(f"message {number}: content is {type(content).__name__}, not a text")
        if role == "system":
            if number:
                raise TokenizerError(f"message {number}: system may only be the first")
            system = content
            continue
        wanted = "assistant" if len(turns) % 2 else "user"
        if role != wanted:
            raise TokenizerError(f"message {number}: role {role} where {wanted} should be -- they take turns")
        if role == "assistant" and not content.strip():
            raise TokenizerError(f"message {number}: the assistant's content is empty")
        turns.append(content)
    last = len(messages) - 1
    if not turns:
        raise TokenizerError(f"message {last}: there is no user message after system")
    if generation and len(turns) % 2 == 0:
        raise TokenizerError(f"message {last}: role assistant, but to be answered a chat must end with user")
    if not generation and len(turns) % 2:
        raise TokenizerError(f"message {last}: role user has no answer -- a chat to train on ends with assistant")
    return system, turns

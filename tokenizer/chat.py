"""Chats to ids and loss mask, and the same as a template for transformers.

In:  messages `[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]`, a tokenizer and the
     name of a format.
Out: ids and, born with them, a mask of the same length: 1 where the token is to be predicted with loss.
Does not know tensors, padding or files. Markers are never searched for in ids: `render` knows what it writes.

A format is data: a text for every turn, with slots for control ids, `{bos}`, and for what a message says, `{content}`.
Text between two control ids is encoded as one run, cut only where an answer begins. So the ids up to there are the
prompt at generation, for any answer, and a message with "</s>" or "<|im_end|>" in it forges nothing.
"""

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from operator import itemgetter

from .sentencepiece_model import TokenizerError


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

    question: str
    answer: str
    start: str = ""
    between: str = ""
    system: str | None = None
    system_in_question: str = "{system}\n{content}"
    strip: bool = False


# Slots for control ids: bos, eos, and control pieces by their text.
PIECES = {"im_start": "<|im_start|>", "im_end": "<|im_end|>"}

FORMATS = {
    # baby-llama2-chinese: prompt <bos> answer <eos>
    "bos": ChatFormat("{content}{bos}", "{content}{eos}"),
    # Bloom chats of Firefly and BELLE: <bos>User:q</s>\n Assistant:a</s>\n User:q</s> ...
    "user-assistant": ChatFormat("User:{content}{eos}\n Assistant:", "{content}{eos}", start="{bos}", between="\n "),
    # The space belongs to the answer: pieces of most vocabularies begin with it, few end with it.
    "human-assistant": ChatFormat("Human: {content}\nAssistant:", " {content}{eos}", start="{bos}", between="\n"),
    # https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
    "llama2": ChatFormat(
        "{bos}[INST] {content} [/INST]",
        " {content} {eos}",
        system_in_question="<<SYS>>\n{system}\n<</SYS>>\n\n{content}",
        strip=True,
    ),
    # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    "chatml": ChatFormat(
        "{im_start}user\n{content}{im_end}\n{im_start}assistant\n",
        "{content}{im_end}",
        between="\n",
        system="{im_start}system\n{content}{im_end}\n",
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
    # Text and mask grow together, so that no marker has to be looked for later.
    special = special_ids(tokenizer, chat_format)
    ids: list[int] = []
    mask: list[int] = []
    after_special = False
    # Texts side by side are one run, so that pieces may reach over the format's own words. An answer begins a new run.
    for (trained, is_special), parts in groupby(_parts(messages, FORMATS[chat_format], generation), itemgetter(1, 2)):
        run = [part for part, *_ in parts]
        if is_special:
            new = [special[slot] for slot in run]
        elif text := "".join(run):
            # It continues other text unless a control id or nothing is in front.
            new = tokenizer.encode(text, continues=bool(ids) and not after_special)
        else:
            continue
        after_special = is_special
        ids += new
        mask += [int(trained or train_on == "all")] * len(new)
    # Nothing stands before the first token to predict it from.
    mask[0] = 0
    if train_on == "last" and any(mask):
        # A question stands between two answers, so the last row of ones is the last answer.
        end = len(mask) - mask[::-1].index(1)
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
    return {special[slot] for slot in _specials(FORMATS[chat_format].answer)} | {tokenizer.eos_id}


def special_ids(tokenizer, chat_format: str) -> dict[str, int]:
    """The control ids by slot: "bos", "eos" and what the vocabulary has of `PIECES`; errors as `render` for formats."""
    if chat_format not in FORMATS:
        raise TokenizerError(f"unknown chat format {chat_format!r} -- choose one of {', '.join(FORMATS)}")
    ids = {slot: tokenizer.special_ids[piece] for slot, piece in PIECES.items() if piece in tokenizer.special_ids}
    ids |= {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    if missing := _specials(*_texts(FORMATS[chat_format])) - ids.keys():
        working = [name for name, form in FORMATS.items() if _specials(*_texts(form)) <= ids.keys()]
        raise TokenizerError(
            f"{tokenizer.path}: chat format {chat_format} needs the control pieces "
            f"{' '.join(sorted(PIECES[slot] for slot in missing))} -- "
            f"with this vocabulary choose one of {', '.join(working)}"
        )
    return ids


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
    content = question = "message['content'].strip()" if form.strip else "message['content']"
    # The system message is joined to the first question where it has no turn of its own.
    if form.system is None:
        joined = _expression(form.system_in_question, content=content, system="system")
        joined = f"({joined}).strip()" if form.strip else joined
        question = f"({joined} if loop.first and system is not none else {content})"

    def write(text: str, content: str = "", condition: str = "") -> str:
        """Jinja that writes a text of the format, always or where a condition holds; "" for one that is not there."""
        written = f"{{{{ {_expression(text, content=content)} }}}}" if text else ""
        return f"{{% if {condition} %}}{written}{{% endif %}}" if text and condition else written

    return (
        "{% set system = none %}{% set turns = messages %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% endif %}"
        f"{write(form.start)}{write(form.system, 'system', 'system is not none')}"
        "{% for message in turns %}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        f"{write(form.between, condition='not loop.first')}{write(form.question, question)}"
        f"{{% else %}}{write(form.answer, content)}"
        "{% endif %}{% endfor %}"
    )


def _expression(text: str, **slots: str) -> str:
    """A text with {slots} as a jinja expression: its literals quoted, its slots replaced by expressions."""
    # transformers hands a template bos_token and eos_token; the text of any other control piece is quoted.
    slots |= {"bos": "bos_token", "eos": "eos_token"} | {slot: json.dumps(piece) for slot, piece in PIECES.items()}
    out = []
    for literal, slot in _cut(text):
        out += [json.dumps(literal)] * bool(literal) + ([slots[slot]] if slot else [])
    return " + ".join(out)


def _texts(form: ChatFormat) -> list[str]:
    return [form.start, form.system or "", form.question, form.answer, form.between]


def _specials(*texts: str) -> set[str]:
    """The slots for control ids in texts of a format."""
    return {slot for text in texts for _, slot in _cut(text) if slot} - {"content"}


@cache
def _cut(text: str) -> list[tuple[str, str | None]]:
    """A text of a format at its slots: "a{b}c" -> [("a", "b"), ("c", None)]."""
    return [(literal, slot) for literal, slot, _, _ in string.Formatter().parse(text)]


def _parts(messages: list[dict], form: ChatFormat, generation: bool) -> Iterator[tuple[str, bool, bool]]:
    """The chat's parts in order as (a text, is it trained, False) or (a control id's slot, is it trained, True)."""
    system, turns = _check(messages, generation)
    clean = str.strip if form.strip else str
    # Texts of the format with what fills their slot, and whether they are trained.
    rows = [(form.start, "", False)]
    if system is not None and form.system is not None:
        rows.append((form.system, system, False))
    for number, content in enumerate(map(clean, turns)):
        if number == 0 and system is not None and form.system is None:
            content = clean(form.system_in_question.format(system=system, content=content))
        if number % 2:
            rows.append((form.answer, content, True))
        else:
            rows += [(form.between if number else "", "", False), (form.question, content, False)]
    # The format is cut at its slots, never the message: what looks like a slot there is plain text.
    for text, content, trained in rows:
        for literal, slot in _cut(text):
            yield literal, trained, False
            if slot:
                yield content if slot == "content" else slot, trained, slot != "content"


def _check(messages: list[dict], generation: bool) -> tuple[str | None, list[str]]:
    """The system message or None, and the contents of the turns: user, assistant, user, ..."""
    if not isinstance(messages, list) or not messages:
        raise TokenizerError("a chat needs a list of at least one message")
    system, turns = None, []
    # Each message by itself, and whether it is its turn.
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
    # The chat as a whole: it ends with an answer, or where one is to be generated with a question.
    last = len(messages) - 1
    if not turns:
        raise TokenizerError(f"message {last}: there is no user message after system")
    if generation and len(turns) % 2 == 0:
        raise TokenizerError(f"message {last}: role assistant, but a chat that wants an answer must end with user")
    if not generation and len(turns) % 2:
        raise TokenizerError(f"message {last}: role user has no answer -- a chat to train on ends with assistant")
    return system, turns

"""Question-answer files of many formats -> one chat format.

In:  items: what one line of JSONL, one object of a JSON list, one CSV or parquet row says, as a dict.
Out: `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...], other fields}`,
     what sft.py reads: an optional system message, then user and assistant in turn, an answer last.
How: a row of `FORMATS` names the fields of a format and the function that reads them. The function is given these
     fields and no others, so labels and choices of a test cannot slip into a message; they are kept beside `messages`.
     An item that breaks a rule raises `BadChat`: nothing is cut, guessed or put in order here.

White space at both ends of a content is taken off, since files differ in it and people who ask do not type it.
Fields of single turns (KdConv's `attrs`, CrossWOZ's `dialog_act`) are left out: no message has a place for them.
A list of one text counts as that text; of several nobody knows whether they are alternatives or parts: rejected.
Does not know tokens, files, or whether an answer is right. A text that says "无输入" or "NaN" is a text.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal, NamedTuple

from core.config import Range, Section
from extras.corpus.account import Account, Doc, Stage, each


class BadChat(Exception):
    """An item that cannot be used.

    Attributes:
        reason: a few words, the same for the same cause: they are counted.
        detail: the field or turn, as in "history[2][1]".
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# ---------------------------------------------------------------- formats

Turn = tuple[str, str, object]  # the field it comes from, its role, its content before any check
# sys is the system that answers (CrossWOZ). Where it stands for "system" it comes first and is rejected, not mistaken.
ROLES = {
    "user": "user",
    "human": "user",
    "usr": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "sys": "assistant",
    "system": "system",
}


def _pair(question: str, answer: str) -> Callable[[dict], Iterator[Turn]]:
    """One field asks, one answers; `input` goes on with the question, `history` is a list of earlier [q, a]."""

    def read(item: dict) -> Iterator[Turn]:
        for n, pair in enumerate(_list(item.get("history", []), "history")):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadChat("not a pair of question and answer", f"history[{n}]")
            yield f"history[{n}][0]", "user", pair[0]
            yield f"history[{n}][1]", "assistant", pair[1]
        fields = dict.fromkeys((question, "input"))  # once where input is the question
        parts = [_text(item[field], field) for field in fields if field in item]
        yield question, "user", "\n".join(filter(None, parts))
        yield answer, "assistant", item[answer]

    return read


def _title_ask(item: dict) -> Iterator[Turn]:
    """Toyhom: often only the title asks, so it stands before the description, unless that repeats it."""
    title, ask = _text(item.get("title", ""), "title"), _text(item["ask"], "ask")
    yield "ask", "user", ask if title in ask else f"{title}\n{ask}".strip()
    yield "answer", "assistant", item["answer"]


def _turns(field: str) -> Callable[[dict], Iterator[Turn]]:
    """A list of {role, content} or {from, value}."""

    def read(item: dict) -> Iterator[Turn]:
        for n, turn in enumerate(_list(item[field], field)):
            yield _turn(turn, f"{field}[{n}]")

    return read


def _turn(turn: object, where: str) -> Turn:
    if isinstance(turn, dict):
        for who, what in (("role", "content"), ("from", "value")):
            if who in turn and what in turn:
                role = turn[who]
                if not isinstance(role, str) or role not in ROLES:
                    raise BadChat("unknown role", f"{where}: {role!r:.80}")
                return where, ROLES[role], turn[what]
    raise BadChat("turn without role and content", where)


def _chosen(item: dict) -> Iterator[Turn]:
    """Preferences: the dialogue so far and the better answer, a text or a turn; the worse one stays a field."""
    yield from _turns("conversations")(item)
    chosen = item["chosen"]
    yield _turn(chosen, "chosen") if isinstance(chosen, dict) else ("chosen", "assistant", chosen)


def _kdconv(item: dict) -> Iterator[Turn]:
    """Two people who talk in turn: [{"message": ...}, ...]; the second one is the assistant."""
    for n, turn in enumerate(_list(item["messages"], "messages")):
        if not isinstance(turn, dict) or "message" not in turn:
            raise BadChat("turn without message", f"messages[{n}]")
        yield f"messages[{n}]", "assistant" if n % 2 else "user", turn["message"]


def _huatuo(item: dict) -> Iterator[Turn]:
    """["问：...", "答：...", ...]"""
    for n, value in enumerate(_list(item["data"], "data")):
        match = re.fullmatch(r"([问答])\s*[：:](.*)", _text(value, f"data[{n}]"), re.DOTALL)
        if not match:
            raise BadChat("neither 问： nor 答：", f"data[{n}]")
        yield f"data[{n}]", "user" if match[1] == "问" else "assistant", match[2]


SPEAKER = re.compile(r"<(user|bot)>\s*[:：]")


def _flattened(item: dict) -> Iterator[Turn]:
    """`<user>: q <bot>: a <user>: q` in one field, the last answer in another."""
    before, *parts = SPEAKER.split(_text(item["instruction"], "instruction"))
    if before.strip() or _text(item.get("input", ""), "input"):
        raise BadChat("text outside the turns", "instruction" if before.strip() else "input")
    for n, (who, content) in enumerate(zip(parts[::2], parts[1::2])):
        yield f"instruction, turn {n}", ROLES[who], content
    yield "output", "assistant", item["output"]


def _is_flattened(item: dict) -> bool:
    return isinstance(item["instruction"], str) and bool(SPEAKER.match(item["instruction"].strip()))


def _is_kdconv(item: dict) -> bool:
    turns = item["messages"]
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "message" in first and "content" not in first


class Format(NamedTuple):
    """A way of writing chats.

    keys: fields that must be there; by them formats are told apart.
    read: gets `keys` and `may` of an item and yields its turns in order.
    may: fields that it uses where they are; `system` needs no reading, it goes first.
    fits: tells formats with the same keys apart.
    """

    keys: frozenset[str]
    read: Callable[[dict], Iterator[Turn]]
    may: frozenset[str] = frozenset()
    fits: Callable[[dict], bool] = lambda item: True


def _format(keys: str, read=None, may: str = "", fits=lambda item: True) -> Format:
    return Format(frozenset(keys.split()), read or _pair(*keys.split()), frozenset(may.split()), fits)


# `history` and `system` are claimed only where they are known to mean turns: in a CSV they may be a patient's.
FORMATS = {
    # Stanford Alpaca and its translations, BELLE, shibing624/medical, Huatuo-Llama, Zhongjing, LLaMA-Factory
    "alpaca": _format("instruction output", may="input history system", fits=lambda item: not _is_flattened(item)),
    "flattened": _format("instruction output", _flattened, "input system", _is_flattened),  # Huatuo, liver cancer
    "instruct-output": _format("instruct output", may="input"),  # Zhongjing's safety questions
    "prompt-response": _format("prompt response", may="input history system"),  # ChatLM
    "query-response": _format("query response", may="input history system"),  # ChatMed, ms-swift
    "prompt-answer": _format("prompt answer"),  # CSV files
    "question-answer": _format("question answer"),
    "toyhom": _format("ask answer", _title_ask, "title"),
    "zhihu-kol": _format("INSTRUCTION RESPONSE"),
    # With an instruction beside them nobody knows which half of the question it is.
    "promptcblue": _format("input target", fits=lambda item: not item.get("instruction")),
    "huatuo": _format("data", _huatuo),  # HuatuoGPT-sft-v1
    # OpenAI, CrossWOZ
    "messages": _format("messages", _turns("messages"), "system", lambda item: not _is_kdconv(item)),
    "kdconv": _format("messages", _kdconv, fits=_is_kdconv),
    "dialogue": _format("dialogue", _turns("dialogue")),  # CrossWOZ in other hands
    "conversation": _format("conversation", _turns("conversation")),  # DISC-Med-SFT
    "sharegpt": _format("conversations", _turns("conversations"), "system"),  # also ChatGLM3
    "dpo": _format("conversations chosen", _chosen, "system"),  # preferences: LLaMA-Factory, MedicalGPT
    "prompt-chosen": _format("prompt chosen", may="input history system"),
    "instruction-chosen": _format("instruction chosen", may="input history system"),
    "question-chosen": _format("question response_chosen", may="history system"),  # MedicalGPT
}


@dataclass(frozen=True)
class ChatsConfig(Section):
    # A name in FORMATS of extras/corpus/chats.py; auto: the fields of each item say it.
    sft_format: Literal["auto", *FORMATS] = "auto"
    # Leave out chats with a longer question or a longer answer; 0: no limit.
    max_prompt_chars: Annotated[int, Range(least=0)] = 0
    max_answer_chars: Annotated[int, Range(least=0)] = 0
    allow_empty_prompt: bool = False  # keep chats in which the user says nothing
    system: str = ""  # a system message for chats that have none; "": none
    # Share of the characters of questions to delete or repeat at random.
    augment: Annotated[float, Range(least=0, most=1)] = 0.0
    augment_seed: int = 0  # another seed, other characters

    def __post_init__(self):
        super().__post_init__()
        if self.system and not self.system.strip():
            raise ValueError("system is white space only")


def detect(item: dict) -> str:
    """Which format an item is in, told by its fields.

    A format whose fields include another's wins over it (DPO over sharegpt). Null fields count only if nothing fits
    without them: a table that was joined from several files fills up its rows with nulls.

    Args:
        item: as for `convert`.

    Returns:
        a name from FORMATS.

    Raises:
        BadChat: no format fits, or several do; the reason names the item's fields.
    """
    for keys in ({key for key, value in item.items() if value is not None}, item.keys()):
        found = {name: form.keys for name, form in FORMATS.items() if form.keys <= keys and form.fits(item)}
        best = [name for name, mine in found.items() if not any(mine < other for other in found.values())]
        if len(best) > 1:
            raise BadChat(f"{' or '.join(best)}: {_fields(item)}")
        if best:
            return best[0]
    raise BadChat(f"unknown format: {_fields(item)}")


def _fields(item: dict) -> str:
    return f"fields {sorted(item)!r:.120}"  # repr: a name may hold anything, and this goes into reports


# ---------------------------------------------------------------- one item

# (role before, role) -> why it may not follow; a chat begins after "".
DISORDER = {
    ("", "assistant"): "assistant speaks first",
    ("system", "assistant"): "assistant speaks first",
    ("user", "user"): "two user turns in a row",
    ("assistant", "assistant"): "two assistant turns in a row",
    ("system", "system"): "system message not first",
    ("user", "system"): "system message not first",
    ("assistant", "system"): "system message not first",
}


def convert(
    item: dict,
    chat_format: str = "auto",
    *,
    max_prompt_chars: int = 0,
    max_answer_chars: int = 0,
    allow_empty_prompt: bool = False,
    system: str = "",
) -> dict:
    """Bring one item into the one chat format.

    Args:
        item: field -> value.
        chat_format: a name from FORMATS, or auto.
        max_prompt_chars: of each user message; 0: no limit.
        max_answer_chars: of each answer; 0: no limit.
        allow_empty_prompt: accept user messages without a character.
        system: a system message for a chat that has none or an empty one.

    Returns:
        {"messages": [{"role", "content"}, ...], **fields that the format does not use}; JSON can hold it.

    Raises:
        BadChat: with what is wrong and where.
    """
    if not isinstance(item, dict):
        raise BadChat("not an object", type(item).__name__)
    if not all(isinstance(key, str) for key in item):  # None: csv.DictReader on a row with too many cells
        raise BadChat("a field without a name")
    name = detect(item) if chat_format == "auto" else chat_format
    form = FORMATS[name]
    if missing := sorted(form.keys - item.keys()):
        raise BadChat(f"{name} needs {', '.join(missing)}", _fields(item))
    extra = {key: value for key, value in item.items() if key not in form.keys | form.may}
    if "messages" in extra:
        raise BadChat(f"{name} with a field messages")
    used = {key: item[key] for key in form.keys} | {key: item[key] for key in form.may if item.get(key) is not None}
    limits = {"user": max_prompt_chars, "assistant": max_answer_chars}
    messages, before, where = [], "", name
    own_system = [("system", "system", used.pop("system"))] if "system" in used else []
    for where, role, value in chain(own_system, form.read(used)):
        content = _text(value, where)
        if reason := DISORDER.get((before, role)):
            raise BadChat(reason, where)
        if not content and (role == "assistant" or (role == "user" and not allow_empty_prompt)):
            raise BadChat("empty answer" if role == "assistant" else "empty prompt", where)
        if len(content) > limits.get(role, 0) > 0:
            raise BadChat("answer too long" if role == "assistant" else "prompt too long", f"{where}: {len(content)}")
        messages.append({"role": role, "content": content})
        before = role
    if before != "assistant":
        raise BadChat("last question without answer" if before == "user" else "no turns", where)
    if messages[0] == {"role": "system", "content": ""}:  # many files have the field and nothing in it
        del messages[0]
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system.strip()})
    chat = {"messages": messages, **extra}
    as_line(chat)  # raises if it cannot be written
    return chat


def as_line(chat: dict) -> str:
    """A chat as a line of JSON.

    Raises:
        BadChat: half a character (a lone surrogate), NaN or infinity, or a value that JSON does not have.
    """
    try:
        line = json.dumps(chat, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise BadChat("half a character, which UTF-8 does not have") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise BadChat("a field that JSON cannot hold", str(e)[:120]) from None
    return line


def _list(value: object, where: str) -> list | tuple:
    if not isinstance(value, (list, tuple)):
        raise BadChat("not a list", f"{where}: {type(value).__name__}")
    return value


def _text(value: object, where: str) -> str:
    """A text without white space at its ends."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        if len(value) > 1:
            raise BadChat("several texts for one", f"{where}: {len(value)}")
        value = value[0]
    if not isinstance(value, str):
        raise BadChat("not a text", f"{where}: {'null' if value is None else type(value).__name__}")
    return value.strip()


# ---------------------------------------------------------------- further uses


def flat(messages: list[dict], roles: bool = False, between: str = "\n") -> str:
    """A dialogue as plain text, to pretrain on.

    Args:
        messages: of a chat.
        roles: begin each with 系统：, 问： or 答：.
        between: stands between the messages; "" puts each answer directly behind its question.

    Returns:
        the text, without anything at its end.
    """
    names = {"system": "系统：", "user": "问：", "assistant": "答："} if roles else {}
    return between.join(names.get(message["role"], "") + message["content"] for message in messages)


def augment(text: str, rng: random.Random, share: float) -> str:
    """Delete and repeat characters at random, as people do when they type in haste.

    Args:
        text: a question. Answers are what is to be learned: leave them as they are.
        rng: source of chance; the same state gives the same text.
        share: of the characters, 0 to 1; half of them vanish, the others stand twice.

    Returns:
        the text changed, white space at its ends taken off; unchanged where nothing would be left.
    """
    copies = [rng.choice((0, 2)) if rng.random() < share else 1 for _ in text]
    return "".join(char * n for char, n in zip(text, copies)).strip() or text


def chats(docs: Iterable[Doc], account: Account, options: ChatsConfig) -> Iterator[Doc]:
    """Stage: items as JSON -> chats as lines of JSON.

    Args:
        docs: `text` is one item.
        account: rejects by the reason of a BadChat; changed: "augmented", where a question is no longer what it was.
        options: what to accept.
    """

    def work(doc: Doc) -> Iterator[Doc]:
        try:
            chat = convert(
                _parse(doc.text),
                options.sft_format,
                max_prompt_chars=options.max_prompt_chars,
                max_answer_chars=options.max_answer_chars,
                system=options.system,
                allow_empty_prompt=options.allow_empty_prompt,
            )
            if options.augment:
                account.changed["augmented"] += _augment_questions(chat["messages"], doc.where, options)
            line = as_line(chat)
        except BadChat as e:
            account.reject(doc, e.reason)
            return
        yield Doc(line, doc.where)

    return each(docs, account, work)


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadChat("not JSON", str(e)[:120]) from None


def _augment_questions(messages: list[dict], where: str, options: ChatsConfig) -> bool:
    """Change the questions in place; the same for the same seed and place, however many processes share the work."""
    rng = random.Random(f"{options.augment_seed} {where}".encode("utf-8", "surrogatepass"))
    changed = False
    for message in messages:
        if message["role"] == "user":
            before, message["content"] = message["content"], augment(message["content"], rng, options.augment)
            changed |= message["content"] != before
    return changed


STAGE = Stage("sft", chats, ChatsConfig(), items=True)

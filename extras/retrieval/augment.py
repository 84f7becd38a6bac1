"""Chats to fine-tune on -> the same chats with passages before their last question, as a model will be asked.

In:  chat files, passages. Out: one chat file. What it is for: docs/retrieval.md.
Knows no model; how long a chat is, a tokenizer says.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from core import files
from core.config import Range, Section
from core.errors import UserError
from extras.retrieval.bm25 import Index, RetrievalConfig, read, with_passages
from tokenizer import chat
from tokenizer import load as load_tokenizer


@dataclass(frozen=True)
class AugmentConfig(Section):
    input: tuple[str, ...] = ()  # chat files
    output: str = "data/augmented.jsonl"
    gold: str = "passage"  # field of a chat with the right passage or passages; without: found by question and answer
    # Share of the chats that get only wrong passages, or, every second of them, none.
    without: Annotated[float, Range(least=0, most=1)] = 0.1
    tokenizer: str = ""  # a model's or tokenizer's folder, to count tokens with; "": any length
    chat_format: Literal[*chat.FORMATS] = "chatml"  # in which they are counted
    max_tokens: Annotated[int, Range(least=1)] = 256  # chats that become longer are left out and counted
    seed: int = 1  # of the order of the passages, and of which chats go without


def write_chats(asked: AugmentConfig, options: RetrievalConfig) -> None:
    """What `python retrieve.py` does: chat files and passages into one chat file, and how many chats got what."""
    output = Path(asked.output)
    if not asked.input or not options.retrieve:
        raise UserError("chats and passages are missing", "--input chats.jsonl --retrieve FOLDER")
    if output.resolve() in [Path(path).resolve() for path in asked.input]:
        raise UserError(f"{output} is read and would be written over", "another --output")
    passages, told = read(options.retrieve, options.passage_chars)
    print(told)
    index, tokenizer = Index(passages), load_tokenizer(asked.tokenizer) if asked.tokenizer else None
    lines, counts, long = [], dict.fromkeys(("right", "wrong", "none", "found"), 0), []
    for path in asked.input:
        for where, item in files.read_jsonl(path):
            messages, gold = chat_of(where, item, asked.gold)
            # A chat's passages depend on its own line only.
            rng = random.Random(f"{asked.seed} {where}")
            messages, chosen, right, found = augment(messages, gold, index, options.passages, asked.without, rng)
            size = len(chat.render(messages, tokenizer, asked.chat_format)[0]) if tokenizer else 0
            if size > asked.max_tokens:
                long.append(f"{where} ({size} tokens)")
                continue
            counts["right" if right else "wrong" if chosen else "none"] += 1
            counts["found"] += found
            lines.append(json.dumps({**item, "messages": messages}, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"{', '.join(asked.input)}: no chats of at most {asked.max_tokens} tokens")
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(output, "".join(lines))
    print(
        f"{output}: {len(lines):,} chats, {counts['right']:,} with the right passage, {counts['wrong']:,} with wrong "
        f"ones only, {counts['none']:,} with none"
    )
    print(f"in {counts['found']:,} of them a right passage is among the {options.passages} best for the question")
    if long:
        print(f"{len(long):,} chats longer than {asked.max_tokens} tokens left out: {', '.join(long[:10])}")


def augment(messages: list[dict], gold: list[str], index: Index, k: int, without: float, rng: random.Random):
    """Put the right passage and wrong ones before a chat's last question, in any order.

    The wrong ones are the next best for the question alone, what a reader will meet when it is asked.

    Args:
        messages: of a chat with an answer to its last question.
        gold: the right passages; none: the index's best for question and answer together.
        k: passages in all.
        without: share of chats that get the wrong ones only, or none at all.
        rng: source of chance; the same state gives the same chat.
    Returns:
        (the messages, passages in front, whether a right one is among them, whether it is among the k best for the
        question alone).
    """
    question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    found = [index.passages[i] for i in index.best(question, k + len(gold) + 1)]
    if not gold:
        gold = [index.passages[i] for i in index.best(f"{question}\n{messages[-1]['content']}", 1)]
    # A window of the right passage, or a passage around it, is no wrong one.
    wrong = [passage for passage in found if not any(passage in right or right in passage for right in gold)]
    right, unlucky = gold[:k], rng.random() < without
    if unlucky:
        right, wrong = [], wrong if rng.random() < 0.5 else []
    chosen = right + wrong[: k - len(right)]
    rng.shuffle(chosen)
    return with_passages(messages, chosen), chosen, bool(right), any(passage not in wrong for passage in found[:k])


def chat_of(where: str, item: dict, field: str) -> tuple[list[dict], list[str]]:
    """Messages of a line, and its right passages if it names any."""
    messages, gold = item.get("messages"), item.get(field, [])
    turns = messages if isinstance(messages, list) and all(isinstance(m, dict) for m in messages) else []
    roles = [m.get("role") for m in turns if isinstance(m.get("content"), str)]
    if len(roles) < len(turns) or roles[-2:] != ["user", "assistant"]:
        raise UserError(f"{where}: needs messages that end with a question and its answer", f"keys: {', '.join(item)}")
    gold = [gold] if isinstance(gold, str) else gold
    if not isinstance(gold, list) or not all(isinstance(passage, str) for passage in gold):
        raise UserError(f"{where}: {field} must be a text or a list of texts")
    return messages, [passage for text in gold if (passage := " ".join(text.split()))]

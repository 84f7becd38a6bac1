"""Passages that bear on a question: BM25 over pairs of characters, and the one form in which a model reads them.

    python -m extras.retrieval --input data/sft_train.jsonl --retrieve passages/ --output data/augmented.jsonl
    python sft.py --train data/augmented.jsonl --out_dir out/reader
    python sample.py --model out/reader --retrieve passages/ --prompt "刘表字什么？"

In:  texts, a passage a line of a .txt file or the "text" of a line of JSON; chats to fine-tune on.
Out: the best passages for a question; the same chats with passages before their last question.
Knows no model. The index lives in memory and is built anew each time (docs/retrieval.md: how long that takes).
"""

import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tokenizer
from core import config, errors, files
from core.errors import UserError
from core.generate import SamplingConfig
from tokenizer import chat

# What Lucene and bm25s call the defaults: k1, how much the second occurrence counts, b, how much length takes away.
K1, B = 1.5, 0.75


@dataclass(frozen=True)
class RetrievalConfig:
    retrieve: str = ""  # a .txt or .jsonl file of passages, or a folder of them: the best go before each question
    passages: int = 3  # so many of them at most
    passage_chars: int = 200  # longer ones are cut into windows of so many characters, each overlapping by a quarter

    def __post_init__(self):
        if self.passages < 1 or self.passage_chars < 4:
            raise ValueError(f"passages = {self.passages}, passage_chars = {self.passage_chars}: at least 1 and 4")


# ---------------------------------------------------------------- the index


def terms(text: str) -> list[str]:
    """What a text is found by: pairs of neighbouring characters, and ASCII words and numbers whole, in lower case.

    Punctuation and spaces separate; a character between two of them stands alone. Full-width letters and digits count
    as their ASCII ones (NFKC).
    """
    found = []
    for run in re.findall(r"[a-z0-9]+|[^\W_a-z0-9]+", unicodedata.normalize("NFKC", text).lower()):
        whole = len(run) == 1 or run.isascii()
        found += [run] if whole else [run[i : i + 2] for i in range(len(run) - 1)]
    return found


class Index:
    """An inverted index: for each term the passages that have it, each with what the term adds to its score.

    score(passage) = sum over the question's terms of idf(term) * tf / (tf + K1 * (1 - B + B * length / mean length)),
    idf = ln(1 + (N - df + 0.5) / (df + 0.5)): tf occurrences of the term in the passage, df of N passages have it.

    Args:
        passages: the texts.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, https://doi.org/10.1561/1500000019,
        with Lucene's idf (no negative ones) and without the constant factor K1 + 1: Kamphuis et al., 2020,
        https://cs.uwaterloo.ca/~jimmylin/publications/Kamphuis_etal_ECIR2020_preprint.pdf
    """

    def __init__(self, passages: list[str]):
        self.passages, self.ids = passages, {}
        numbers, lengths = [], np.zeros(len(passages), np.int64)
        for n, passage in enumerate(passages):
            row = [self.ids.setdefault(term, len(self.ids)) for term in terms(passage)]
            lengths[n] = len(row)
            numbers.append(np.array(row, np.int64))
        count = max(1, len(passages))
        where = np.repeat(np.arange(len(passages)), lengths)
        # Term and passage as one number: sorted, they are the postings, and its repeats are tf.
        pairs, tf = np.unique(np.concatenate([*numbers, np.zeros(0, np.int64)]) * count + where, return_counts=True)
        term, of = np.divmod(pairs, count)
        df = np.bincount(term, minlength=len(self.ids))
        self.starts = np.concatenate([[0], np.cumsum(df)])  # postings of term i: starts[i] to starts[i + 1]
        self.of = of.astype(np.int32)  # passage of each posting
        # fp32 as in bm25s, so that what ties there ties here.
        idf = np.log(1 + (len(passages) - df + 0.5) / (df + 0.5)).astype(np.float32)
        norm = K1 * (1 - B + B * lengths / max(1e-9, lengths.mean() if len(passages) else 0))
        self.adds = (idf[term] * (tf / (norm[of] + tf))).astype(np.float32)  # to the score of that passage

    def scores(self, question: str) -> np.ndarray:
        """Of every passage, (N,) fp32; a term that stands twice in the question counts twice."""
        total = np.zeros(len(self.passages), np.float32)
        for term in terms(question):
            if (i := self.ids.get(term)) is not None:
                part = slice(self.starts[i], self.starts[i + 1])
                total[self.of[part]] += self.adds[part]
        return total

    def best(self, question: str, k: int) -> list[int]:
        """Numbers of the k passages with the highest scores above 0, the best first, of equal ones the first."""
        scores = self.scores(question)
        some = np.flatnonzero(scores > 0)
        if len(some) > k:
            some = some[scores[some] >= np.partition(scores[some], -k)[-k]]
        return some[np.argsort(-scores[some], kind="stable")[:k]].tolist()


# ---------------------------------------------------------------- the passages


def read(path: str, chars: int) -> tuple[list[str], str]:
    """The passages of a file or of all files in a folder, and a line that says how many.

    Args:
        path: .txt (each line that is not blank is a passage), .jsonl ("text" of each line), or a folder of such files,
            its folders included.
        chars: longer passages are cut into windows of so many characters, each three quarters of that after the last.
    Returns:
        The passages in the order of the files' names, white space in them as single spaces, none of them twice.
    Raises:
        UserError: nothing to read, a line without "text", not UTF-8.
    """
    root = Path(path)
    found = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    fitting = [p for p in found if p.suffix in (".txt", ".jsonl")]
    if not root.exists() or not fitting:
        raise UserError(f"{path}: {'no .txt or .jsonl files' if root.exists() else 'not found'}", "--retrieve FOLDER")
    texts = [" ".join(text.split()) for file in fitting for text in _texts(file)]
    overlap = chars // 4
    cut = [text[at : at + chars] for text in texts for at in range(0, max(1, len(text) - overlap), chars - overlap)]
    passages = list(dict.fromkeys(text for text in cut if text))
    if not passages:
        raise UserError(f"{path}: no text in {len(fitting)} files")
    told = f"{path}: {len(passages):,} passages of {len(fitting)} files"
    for count, what in (
        (len(found) - len(fitting), "files are neither .txt nor .jsonl"),
        (len(list(filter(None, cut))) - len(passages), "passages stood twice"),
    ):
        told += f"; {count:,} {what}" if count else ""
    return passages, told


def _texts(path: Path):
    if path.suffix == ".txt":
        try:
            yield from path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
        return
    for where, item in files.read_jsonl(path):
        if not isinstance(item.get("text"), str):
            raise UserError(f"{where}: needs a text", f"keys here: {', '.join(item)}")
        yield item["text"]


def with_passages(messages: list[dict], passages: list[str]) -> list[dict]:
    """Messages with passages before the last question, in the form that is trained and asked in.

    Args:
        messages: of a chat, with a user's turn.
        passages: in the order in which they are to stand; none: the messages as they are.
    Returns:
        New messages; all other turns, also earlier questions, stay.
    """
    if not passages:
        return messages
    at = max(n for n, message in enumerate(messages) if message["role"] == "user")
    listed = "".join(f"{n}. {passage}\n" for n, passage in enumerate(passages, 1))
    content = f"资料：\n{listed}\n问题：{messages[at]['content']}"
    return [*messages[:at], {**messages[at], "content": content}, *messages[at + 1 :]]


class Shelf:
    """The passages that questions are answered from.

    Args:
        cfg: where they are, and how many go before a question.
        ids: messages -> token ids of the prompt.
        room: tokens that a prompt may have; passages that do not fit are left out, the worst first.
    Raises:
        UserError: as `read`.
    """

    def __init__(self, cfg: RetrievalConfig, ids: Callable[[list[dict]], list[int]], room: int):
        passages, self.told = read(cfg.retrieve, cfg.passage_chars)
        self.index, self.most, self.ids, self.room = Index(passages), cfg.passages, ids, room

    def put(self, prompt: str | list[dict]) -> tuple[list[dict], list[str], int]:
        """A question, or messages that end with one -> (messages to answer, passages in them, how many had no room)."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        self.ids(messages)  # what are no messages is refused here
        found = [self.index.passages[i] for i in self.index.best(messages[-1]["content"], self.most)]
        count = len(found)
        while count and len(self.ids(with_passages(messages, found[:count]))) > self.room:
            count -= 1
        return with_passages(messages, found[:count]), found[:count], len(found) - count

    def put_and_tell(self, prompt: str | list[dict]) -> tuple[list[dict], str]:
        """The same with a line on the passages, for the terminal."""
        messages, passages, left_out = self.put(prompt)
        told = " ".join(f"{n}. {passage}" for n, passage in enumerate(passages, 1)) or "none"
        told = "".join(c if c.isprintable() else "?" for c in told)  # no control characters on the terminal
        return messages, f"passages: {told}" + (f" ({left_out} more had no room)" if left_out else "")


def open_shelf(generator, cfg: RetrievalConfig, sampling: SamplingConfig) -> Shelf:
    """The passages for a chat model; an answer of up to a quarter of the context has room behind them."""
    if not generator.chat_format:
        raise UserError("--retrieve needs a chat model", "python sft.py makes one")
    room = generator.context - min(sampling.max_new_tokens, generator.context // 4)
    shelf = Shelf(cfg, generator.encode, room)
    print(f"note: {shelf.told}", file=sys.stderr)
    return shelf


# ---------------------------------------------------------------- chats to train on


@dataclass(frozen=True)
class AugmentConfig:
    input: tuple[str, ...] = ()  # chat files
    output: str = "data/augmented.jsonl"
    gold: str = "passage"  # field of a chat with the right passage or passages; without: found by question and answer
    without: float = 0.1  # share of the chats that get only wrong passages, or, every second of them, none
    tokenizer: str = ""  # a model's or tokenizer's folder, to count tokens with; "": any length
    chat_format: str = "chatml"  # in which they are counted
    max_tokens: int = 256  # chats that become longer are left out and counted
    seed: int = 1  # of the order of the passages, and of which chats go without

    def __post_init__(self):
        if not 0 <= self.without <= 1:
            raise ValueError(f"without = {self.without}, must be from 0 to 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}, must be at least 1")
        if self.chat_format not in chat.FORMATS:
            raise ValueError(f"chat_format = {self.chat_format!r}, must be one of {', '.join(chat.FORMATS)}")


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


def main() -> None:
    cfg = config.load(__doc__, {"augment": AugmentConfig, "retrieval": RetrievalConfig}, sys.argv[1:])
    asked, output = cfg.augment, Path(cfg.augment.output)
    if not asked.input or not cfg.retrieval.retrieve:
        raise UserError("chats and passages are missing", "--input chats.jsonl --retrieve FOLDER")
    if output.resolve() in [Path(path).resolve() for path in asked.input]:
        raise UserError(f"{output} is read and would be written over", "another --output")
    passages, told = read(cfg.retrieval.retrieve, cfg.retrieval.passage_chars)
    print(told)
    index, text = Index(passages), tokenizer.load(asked.tokenizer) if asked.tokenizer else None
    lines, counts, long = [], dict.fromkeys(("right", "wrong", "none", "found"), 0), []
    for path in asked.input:
        for where, item in files.read_jsonl(path):
            messages, gold = chat_of(where, item, asked.gold)
            rng = random.Random(f"{asked.seed} {where}")
            messages, chosen, right, found = augment(messages, gold, index, cfg.retrieval.passages, asked.without, rng)
            if text and (size := len(chat.render(messages, text, asked.chat_format)[0])) > asked.max_tokens:
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
    print(f"in {counts['found']:,} of them a right passage is among the {cfg.retrieval.passages} best for the question")
    if long:
        print(f"{len(long):,} chats longer than {asked.max_tokens} tokens left out: {', '.join(long[:10])}")


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


if __name__ == "__main__":
    errors.run(main)

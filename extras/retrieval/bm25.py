"""Passages that bear on a question: BM25 over pairs of characters, and the one form in which a model reads them.

    python sample.py --model out/reader --retrieve passages/ --prompt "刘表字什么？"

In:  texts, a passage a line of a .txt file or the "text" of a line of JSON.
Out: the best passages for a question, and a chat with passages before its last question.
Knows no model. The index lives in memory and is built anew each time (docs/retrieval.md: how long that takes).
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from core import files
from core.config import Range, Section
from core.errors import UserError
from core.generate import SamplingConfig

# What Lucene and bm25s call the defaults: k1, how much the second occurrence counts, b, how much length takes away.
K1, B = 1.5, 0.75


@dataclass(frozen=True)
class RetrievalConfig(Section):
    retrieve: str = ""  # a .txt or .jsonl file of passages, or a folder of them: the best go before each question
    passages: Annotated[int, Range(least=1)] = 3  # so many of them at most
    # Longer ones are cut into windows of so many characters, each overlapping by a quarter.
    passage_chars: Annotated[int, Range(least=4)] = 200


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
    # Which files; their order decides between equal passages.
    root = Path(path)
    found = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    fitting = [p for p in found if p.suffix in (".txt", ".jsonl")]
    if not root.exists() or not fitting:
        raise UserError(f"{path}: {'no .txt or .jsonl files' if root.exists() else 'not found'}", "--retrieve FOLDER")
    # Windows of their texts, none of them twice.
    texts = [" ".join(text.split()) for file in fitting for text in _texts(file)]
    overlap = chars // 4
    cut = [text[at : at + chars] for text in texts for at in range(0, max(1, len(text) - overlap), chars - overlap)]
    passages = list(dict.fromkeys(text for text in cut if text))
    if not passages:
        raise UserError(f"{path}: no text in {len(fitting)} files")
    # What was left out is told.
    told = f"{path}: {len(passages):,} passages of {len(fitting)} files"
    for count, what in (
        (len(found) - len(fitting), "files are neither .txt nor .jsonl"),
        (len(list(filter(None, cut))) - len(passages), "passages stood twice"),
    ):
        told += f"; {count:,} {what}" if count else ""
    return passages, told


def _texts(path: Path) -> Iterator[str]:
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

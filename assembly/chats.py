"""Chats as rows: files of messages rendered to ids and mask, packed, and counted where they do not fit.

In:  chat files, a tokenizer, the name of a chat format. Out: rows (see core/data.py).
Knows nothing of models or of the loop.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from core.data import Batch, padded, stack
from core.errors import UserError
from core.files import read_jsonl
from model import IGNORE
from tokenizer import Tokenizer, TokenizerError, chat


class ChatRows:
    """Rows of rendered chats: several samples packed into each, none split.

    Args:
        samples: (ids, mask, where) of each chat; mask is 1 where the id is to be predicted.
        seq_len: T; no sample may have more than T + 1 ids.
        pad_id: the id that fills a row's rest; it has no loss and its own document number.
        pack: False gives every sample a row of its own.
    """

    def __init__(
        self, samples: Iterable[tuple[Sequence[int], Sequence[int], str]], seq_len: int, pad_id: int, pack: bool = True
    ):
        self.seq_len, self.pad_id = seq_len, pad_id
        # Chats are packed in their order, each into the last row if it has room: a row can be found without a search,
        # and the order of the run mixes the rows anyway.
        self.samples = [(np.asarray(ids, np.int64), np.asarray(mask, bool), where) for ids, mask, where in samples]
        digest = hashlib.sha256()
        self.packs: list[list[int]] = []
        room = 0
        for k, (ids, mask, where) in enumerate(self.samples):
            need = len(ids) - 1  # the last id is only predicted, never read
            assert 0 < need <= seq_len and mask[1:].any(), f"{where}: sample does not fit"
            if not (pack and need <= room):
                self.packs.append([])
                room = seq_len
            self.packs[-1].append(k)
            room -= need
            digest.update(ids.tobytes() + mask.tobytes())
        if not self.packs:
            raise UserError("no chats to train on")
        # The rows' numbers mean another order in another packing.
        digest.update(str(self.packs).encode())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.packs)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, targets, docs of row i, each (T,)."""
        # Each chat is a document of its own: its positions begin at 0, and it does not see its neighbours.
        ids, targets, docs = [], [], []
        for number, k in enumerate(self.packs[i]):
            tokens, mask, _ = self.samples[k]
            ids.append(tokens[:-1])
            targets.append(np.where(mask[1:], tokens[1:], IGNORE))
            docs.append(np.full(len(tokens) - 1, number))
        return (
            padded(np.concatenate(ids), self.seq_len, self.pad_id),
            padded(np.concatenate(targets), self.seq_len, IGNORE),
            padded(np.concatenate(docs), self.seq_len, len(docs)),
        )

    def batch(self, indices: Sequence[int]) -> Batch:
        return stack([self.row(i) for i in indices], indices)

    def text_bytes(self, rows: int) -> float:
        return 0.0  # the loss is on answers, and says nothing about their bytes

    def describe(self) -> str:
        return f"{len(self.samples)} chats in {len(self)} rows of {self.seq_len}"

    def where(self, i: int) -> str:
        return f"{self.samples[self.packs[i][0]][2]} and the {len(self.packs[i]) - 1} chats packed with it"


def chat_rows(paths: Sequence[str], tokenizer: Tokenizer, cfg, seq_len: int) -> tuple[ChatRows, list[str]]:
    """Chat files rendered and packed.

    Args:
        cfg: chat_format, train_on, max_prompt_tokens, max_answer_tokens, pack; see sft.py.
        seq_len: positions of a row.
    Returns:
        rows, and lines on them: what does not fit is left out, counted and named.
    Raises:
        UserError: a line that is no chat, a file that is given twice, no chats that fit.
    """
    refuse_twins(paths)
    # A chat that does not fit is left out as a whole: half a chat would teach answers without their questions.
    samples, left_out = [], defaultdict(list)  # limit -> (where, tokens)
    question, answer = cfg.max_prompt_tokens, cfg.max_answer_tokens
    limits = {
        f"longer than {seq_len} tokens": seq_len + 1,
        f"with a question longer than {question} tokens": question or math.inf,
        f"with an answer longer than {answer} tokens": answer or math.inf,
    }
    for where, messages in read_messages(paths):
        ids, mask = render(messages, tokenizer, cfg.chat_format, where, train_on=cfg.train_on)
        # Limits of question and answer look at the last turn, where the chat's point usually is.
        sizes = [len(ids)]
        if question or answer:
            last = render(messages, tokenizer, cfg.chat_format, where, train_on="last")[1]
            sizes += [last.index(1) if any(last) else len(ids), sum(last)]
        over = [(what, size) for (what, most), size in zip(limits.items(), sizes) if size > most]
        if over:
            left_out[over[0][0]].append((where, over[0][1]))
        else:
            samples.append((ids, mask, where))
    # What was left out is counted and named: nothing is dropped in silence.
    lines = [f"{len(found)} chats {what} left out: {name_some(found)}" for what, found in left_out.items()]
    if not samples:
        raise UserError(f"{', '.join(paths)}: no chats that fit into {seq_len} tokens", "; ".join(lines)[:300])
    rows = ChatRows(samples, seq_len, tokenizer.eos_id, cfg.pack)
    return rows, [f"{', '.join(paths)}: {len(samples)} chats in {len(rows)} rows of {seq_len}", *lines]


def refuse_twins(paths: Sequence[str]) -> None:
    """UserError where two paths are the same file."""
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UserError(f"{', '.join(paths)}: the same file is given twice")


def read_messages(paths: Sequence[str]) -> Iterator[tuple[str, list]]:
    """("PATH:LINE", messages) of each chat."""
    for path in paths:
        for where, item in read_jsonl(path):
            if "messages" not in item:
                raise UserError(f"{where}: messages is missing", f"keys here: {', '.join(item)}")
            yield where, item["messages"]


def render(messages: list, tokenizer: Tokenizer, chat_format: str, where: str, **options) -> tuple[list, list]:
    """Ids and mask of a chat; the error of one that breaks the rules says where it is."""
    try:
        return chat.render(messages, tokenizer, chat_format, **options)
    except TokenizerError as e:
        raise UserError(f"{where}: {e}") from None


def name_some(found: Sequence[tuple[str, int]]) -> str:
    """The first ten of what was left out: (where, tokens)."""
    return ", ".join(f"{where} ({tokens} tokens)" for where, tokens in found[:10])


def mark_trained(tokenizer: Tokenizer, ids, mask) -> str:
    """A sample as text with its trained tokens between 【 and 】."""
    # Neighbours of one kind are decoded together: a character may be spread over several ids.
    runs = groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1])
    texts = [(trained, tokenizer.decode([i for i, _ in run], skip_special=False)) for trained, run in runs]
    return "".join(f"【{part}】" if trained else part for trained, part in texts)

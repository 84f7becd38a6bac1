"""Documents that a trained model finds too surprising (noise) or too easy (repetitions, templates) are left out.

In:  documents and a model folder of ours. Out: those whose bits per byte lie in a range.
Does not know what the right range is: `--keep_rejected` and a look at rejects.jsonl say.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

import tokenizer
from core import hf_folder
from core.errors import UserError
from extras.corpus.account import Account, Doc, each
from model import Llama


@dataclass(frozen=True)
class FilterConfig:
    perplexity: str = ""  # a model folder
    min_bits: float = 0.3  # bits per byte of a document's text
    max_bits: float = 4.0

    def __post_init__(self):
        if not 0 <= self.min_bits < self.max_bits:
            raise ValueError("min_bits must be below max_bits")


def filter(docs: Iterable[Doc], account: Account, cfg: FilterConfig) -> Iterator[Doc]:
    """The stage; it runs in one process, torch uses the cores."""
    if not cfg.perplexity:
        raise UserError("filter needs a model", "--perplexity FOLDER")
    model, text = load(cfg.perplexity)

    def one(doc: Doc) -> Iterator[Doc]:
        bits = bits_per_byte(model, text, doc.text)
        if cfg.min_bits <= bits <= cfg.max_bits:
            yield doc
        else:
            side = f"below {cfg.min_bits:g}" if bits < cfg.min_bits else f"above {cfg.max_bits:g}"
            account.reject(doc, f"{side} bits per byte")

    return each(docs, account, one)


@lru_cache(1)
def load(path: str) -> tuple[Llama, tokenizer.Tokenizer]:
    """Once, not for every chunk of documents."""
    folder = hf_folder.model_folder(path)
    return hf_folder.load_model(folder).eval(), tokenizer.load(folder)


@torch.no_grad()
def bits_per_byte(model: Llama, text: tokenizer.Tokenizer, document: str) -> float:
    """How many bits the model needs for a byte of the document, in windows of its context, all of it read."""
    ids = torch.tensor(text.encode(document, bos=True, eos=True))
    length, nats = model.config.max_position_embeddings, 0.0
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        nats += model(window[None, :-1], targets=window[None, 1:]).sum().item()
    return nats / math.log(2) / max(1, len(document.encode()))

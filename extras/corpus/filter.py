"""Documents that a trained model finds too surprising (noise) or too easy (repetitions, templates) are left out.

In:  documents, a model folder, and what loads it. Out: those whose bits per byte lie in a range.
Does not know what the right range is: `--keep_rejected` and a look at rejects.jsonl say.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from core.config import Range, Section
from core.errors import UserError
from extras.corpus.account import Account, Doc, Stage, each


@dataclass(frozen=True)
class FilterConfig(Section):
    perplexity: str = ""  # a model folder
    min_bits: Annotated[float, Range(least=0)] = 0.3  # bits per byte of a document's text
    max_bits: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        if not self.min_bits < self.max_bits:
            raise ValueError("min_bits must be below max_bits")


def filter(
    docs: Iterable[Doc], account: Account, cfg: FilterConfig, load_model: Callable[[Path], object]
) -> Iterator[Doc]:
    """The stage; it runs in one process, torch uses the cores."""
    if not cfg.perplexity:
        raise UserError("filter needs a model", "--perplexity FOLDER")
    # Only here: the options are read, and all other stages run, without torch.
    from extras.corpus import perplexity

    model, tokenizer = perplexity.load(cfg.perplexity, load_model)

    def one(doc: Doc) -> Iterator[Doc]:
        bits = perplexity.bits_per_byte(model, tokenizer, doc.text)
        if cfg.min_bits <= bits <= cfg.max_bits:
            yield doc
        else:
            side = f"below {cfg.min_bits:g}" if bits < cfg.min_bits else f"above {cfg.max_bits:g}"
            account.reject(doc, f"{side} bits per byte")

    return each(docs, account, one)


STAGE = Stage("filter", filter, FilterConfig(), "here")

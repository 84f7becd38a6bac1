"""From a text file to a token bin: the usual ways, the library's own loop as the limit, and ours.

In:  a text, a tokenizer. Out: seconds. pip install transformers.
"""

import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece

from bench.options import BenchConfig
from bench.timing import report, rounds
from extras.corpus import pipeline, readers
from extras.corpus import tokenize as corpus_bins
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer


def tokenize(cfg: BenchConfig) -> None:
    """All ways in turn; bins of one and of two processes must be the same."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    path, model = Path(cfg.input), str(tokenizer.path)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ways = {
            "HF slow tokenizer, one list": lambda: reference(path, slow_tokenizer(model), out / "reference.bin"),
            "sentencepiece, line by line": lambda: plain(path, model),
            "ours, 1 process": lambda: ours(path, tokenizer, out / "one", 1),
            "ours, 2 processes": lambda: ours(path, tokenizer, out / "two", 2),
        }
        seconds = rounds(ways, cfg.rounds)
        same = (out / "one/train.bin").read_bytes() == (out / "two/train.bin").read_bytes()
    assert same, "one and two processes wrote different bins"
    result = report(seconds, path.stat().st_size)
    one, two = seconds["ours, 1 process"], seconds["ours, 2 processes"]
    result["two_over_one"] = round(statistics.median(a / b for a, b in zip(one, two)), 3)
    print(f"2 processes are {result['two_over_one']:.2f} times as fast as 1")
    print(json.dumps(result))


def reference(path: Path, slow, out: Path) -> None:
    """As baby-llama2-chinese does it: a Python loop, all ids in one list, an array at the end."""
    ids: list[int] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = slow.encode(line.rstrip("\n"), add_special_tokens=False)
            row.append(2)
            ids += row
    np.array(ids, dtype=np.uint16).tofile(out)


def slow_tokenizer(model: str):
    """A transformers tokenizer in Python around sentencepiece, like the one that comes with ChatGLM2."""
    import transformers

    class Slow(transformers.PreTrainedTokenizer):
        def __init__(self):
            self.model = sentencepiece.SentencePieceProcessor(model_file=model)
            super().__init__()

        vocab_size = property(lambda self: self.model.get_piece_size())

        def get_vocab(self):
            return {self.model.id_to_piece(i): i for i in range(self.vocab_size)}

        def _tokenize(self, text, **_):
            return self.model.encode(text, out_type=str)

        def _convert_token_to_id(self, token):
            return self.model.piece_to_id(token)

    return Slow()


def plain(path: Path, model: str) -> None:
    """Encoding alone: nothing is kept or written."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            processor.encode(line.rstrip("\n"))


def ours(path: Path, tokenizer: Tokenizer, folder: Path, processes: int) -> None:
    """The chain of `python data_process.py --split line`."""
    read = readers.ReadConfig(input=(str(path),), split="line")
    split = corpus_bins.Split(0.01)
    with pipeline.Report(folder, ["read", "tokenize"]) as told:
        blocks = readers.blocks(read, told.accounts["read"])
        results = pipeline.run(blocks, read, [], told, corpus_bins.Tokenize(tokenizer, split), processes)
        corpus_bins.write(folder, tokenizer, split, results, told, path.name)

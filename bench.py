"""How fast is it, beside what others do? Rounds of all contestants in turn, so that a busy minute hits all of them.

    python bench.py tokenize --tokenizer chatglm2/tokenizer.model --input corpus.txt    # a document a line

Prints a table of medians and, as its last line, the same as JSON.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

import tokenizer
from core import config, errors
from core.errors import UserError
from extras.corpus import bins, pipeline, readers


@dataclass(frozen=True)
class BenchConfig:
    tokenizer: str = "data/tokenizer"
    input: str = ""  # a UTF-8 text, a document a line
    rounds: int = 5

    def __post_init__(self):
        if self.rounds < 1 or not self.input:
            raise ValueError("input must be given, rounds at least 1")


def main() -> None:
    words = sys.argv[1:2]
    if words != ["tokenize"]:
        raise UserError(f"{' '.join(words) or 'nothing'} cannot be timed", "python bench.py tokenize --help")
    tokenize(config.load(__doc__, {"bench": BenchConfig}, sys.argv[2:]).bench)


def tokenize(cfg: BenchConfig) -> None:
    """From a text file to a token bin: the usual ways, the library's own loop as the limit, and ours."""
    text = tokenizer.load(cfg.tokenizer)
    path, model = Path(cfg.input), str(text.path)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ways = {
            "HF slow tokenizer, one list": lambda: reference(path, slow_tokenizer(model), out / "reference.bin"),
            "sentencepiece, line by line": lambda: plain(path, model),
            "ours, 1 process": lambda: ours(path, text, out / "one", 1),
            "ours, 2 processes": lambda: ours(path, text, out / "two", 2),
        }
        seconds = rounds(ways, cfg.rounds)
        same = (out / "one/train.bin").read_bytes() == (out / "two/train.bin").read_bytes()
    assert same, "one and two processes wrote different bins"
    report(seconds, path.stat().st_size)


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


def ours(path: Path, text: tokenizer.Tokenizer, folder: Path, processes: int) -> None:
    """The chain of `python data_process.py --split line`."""
    read = readers.ReadConfig(input=(str(path),), split="line")
    split = bins.Split(0.01)
    with pipeline.Books(folder, ["read", "tokenize"]) as books:
        blocks = readers.blocks(read, books.accounts["read"])
        results = pipeline.run(blocks, read, [], books, bins.Tokenize(text, split), processes)
        bins.write(folder, text, split, results, books, path.name)


def rounds(ways: dict[str, Callable], number: int) -> dict[str, list[float]]:
    """Wall seconds of each way in each round, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(number + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[str, list[float]], size: int) -> None:
    """Medians, spread, and the median of each round's ratio to the first way: drift cancels within a round."""
    first = next(iter(seconds))
    result = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], values)]
        result[name] = {"seconds": round(statistics.median(values), 3), "least": round(min(values), 3),
                        "most": round(max(values), 3), "mb_per_s": round(size / 1e6 / statistics.median(values), 2),
                        "times_first": round(statistics.median(ratios), 2)}  # fmt: skip
        print(f"{name:<30} {result[name]['seconds']:>8.2f} s ({min(values):.2f} to {max(values):.2f})"
              f" {result[name]['mb_per_s']:>7.1f} MB/s {result[name]['times_first']:>7.2f} x")  # fmt: skip
    one, two = seconds["ours, 1 process"], seconds["ours, 2 processes"]
    result["two_over_one"] = round(statistics.median(a / b for a, b in zip(one, two)), 3)
    print(f"2 processes are {result['two_over_one']:.2f} times as fast as 1")
    print(json.dumps(result))


if __name__ == "__main__":
    errors.run(main)

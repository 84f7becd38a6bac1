"""How fast is it, beside what others do? Rounds of all contestants in turn, so that a busy minute hits all of them.

    python bench.py tokenize --tokenizer chatglm2/tokenizer.model --input corpus.txt    # a document a line
    python bench.py dedup --input corpus.txt                                            # pip install datasketch rensa
    python bench.py memory --tokenizer chatglm2/tokenizer.model --input corpus.txt      # Linux; writes 4 GB to a folder
    python bench.py activations --model configs/llama-92m.toml                          # Linux; training's memory

Prints a table of medians and, as its last line, the same as JSON.
"""

import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import sentencepiece

import tokenizer
from core import config, errors
from core.errors import UserError
from extras.corpus import bins, dedup, pipeline, readers
from tokenizer.parallel import map_in_order


@dataclass(frozen=True)
class BenchConfig:
    tokenizer: str = "data/tokenizer"
    input: str = ""  # a UTF-8 text, a document a line
    model: str = ""  # a config with a [model] section, for activations
    rounds: int = 5
    documents: int = 100_000  # of dedup

    def __post_init__(self):
        if self.rounds < 1 or self.documents < 1000 or not (self.input or self.model):
            raise ValueError("input or model must be given, rounds at least 1, documents at least 1000")


def main() -> None:
    words = sys.argv[1:2]
    ways = {"tokenize": tokenize, "dedup": deduplicate, "memory": memory, "activations": activations}
    if not words or words[0] not in ways:
        raise UserError(f"{' '.join(words) or 'nothing'} cannot be timed", f"python bench.py {' or '.join(ways)}")
    ways[words[0]](config.load(__doc__, {"bench": BenchConfig}, sys.argv[2:]).bench)


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


def report(seconds: dict[str, list[float]], size: int) -> dict:
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
    return result


# ---------------------------------------------------------------- duplicates


def deduplicate(cfg: BenchConfig) -> None:
    """Documents of 0.5 to 5 kB with edited copies among them: two libraries fed from Python, and ours."""
    texts, copies = documents_with_copies(Path(cfg.input), cfg.documents)
    found: dict[str, list[bool]] = {}  # way -> is it a duplicate?
    ways = {"datasketch": lambda: datasketch_way(texts, None),
            "datasketch, crc32": lambda: datasketch_way(texts, crc32),
            "rensa": lambda: rensa_way(texts), "ours, 1 process": lambda: our_way(texts, 1),
            "ours, 2 processes": lambda: our_way(texts, 2)}  # fmt: skip
    seconds = rounds({name: lambda name=name: found.__setitem__(name, ways[name]()) for name in ways}, cfg.rounds)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.0f} MB, {len(copies):,} of them edited copies")
    result = report(seconds, size)
    for name, flags in found.items():
        near = [flags[i] for i, share in copies if share >= 0.85]
        far = [flags[i] for i, share in copies if share < 0.6]
        result[name] |= {"recall": sum(near) / len(near), "false_removals": sum(far) / len(far), "removed": sum(flags)}
        print(f"{name:<30} found {sum(near):,} of {len(near):,} copies with J >= 0.85, removed {sum(far):,} of "
              f"{len(far):,} with J < 0.6, {sum(flags):,} in all")  # fmt: skip
    print(json.dumps(result))


def documents_with_copies(path: Path, number: int) -> tuple[list[str], list[tuple[int, float]]]:
    """Lines drawn at random and joined to 170 to 1,700 characters; a tenth are copies of one before, with 0 to 30 % of
    their characters changed. Also (place, Jaccard similarity to the original) of each copy."""
    rng, texts, copies = random.Random(0), [], []
    lines = path.read_text(encoding="utf-8").split("\n")
    while len(texts) < number:
        if texts and rng.random() < 0.1:
            original = rng.choice(texts)
            share = rng.choice((0.002, 0.01, 0.02, 0.04, 0.1, 0.3)) * rng.random()
            text = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) if rng.random() < share else c for c in original)
            a, b = grams(original), grams(text)
            copies.append((len(texts), len(a & b) / len(a | b)))
        else:
            text, wanted = "", rng.randint(170, 1700)
            while len(text) < wanted:
                text += rng.choice(lines)[:1700]
        texts.append(text)
    return texts, copies


def grams(text: str) -> set[str]:
    """Character 5-grams without whitespace: what all ways compare."""
    text = "".join(text.split())
    return {text[i : i + 5] for i in range(len(text) - 4)} or {text}


def datasketch_way(texts: list[str], hashfunc) -> list[bool]:
    from datasketch import MinHash, MinHashLSH

    index, flags = MinHashLSH(threshold=0.8, num_perm=128), []
    for i, text in enumerate(texts):
        signature = MinHash(num_perm=128, **({"hashfunc": hashfunc} if hashfunc else {}))
        signature.update_batch([gram.encode() for gram in grams(text)])
        flags.append(bool(index.query(signature)))
        if not flags[-1]:
            index.insert(i, signature)
    return flags


def rensa_way(texts: list[str]) -> list[bool]:
    from rensa import RMinHash, RMinHashLSH

    index, flags = RMinHashLSH(threshold=0.8, num_perm=128, num_bands=16), []
    for i, text in enumerate(texts):
        signature = RMinHash(num_perm=128, seed=42)
        signature.update(list(grams(text)))
        flags.append(bool(index.query(signature)))
        if not flags[-1]:
            index.insert(i, signature)
    return flags


def our_way(texts: list[str], processes: int) -> list[bool]:
    options = dedup.DedupConfig()
    index, chunks = dedup.Index(options), (texts[i : i + dedup.CHUNK] for i in range(0, len(texts), dedup.CHUNK))
    return [bool(reason) for signed in map_in_order(dedup.sign, options, chunks, processes)
            for reason in index.add(signed)]  # fmt: skip


# ---------------------------------------------------------------- memory


def memory(cfg: BenchConfig) -> None:
    """The largest process of `clean tokenize` on 2 GB of JSON lines, one of them 1 GB, and of `dedup` on a million
    short texts, with two workers each."""
    result = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        large, short = Path(folder) / "large.jsonl", Path(folder) / "short.jsonl"
        texts = [json.dumps(line.rstrip("\n"), ensure_ascii=False) for line in open(cfg.input, encoding="utf-8")]  # noqa: SIM115
        with open(large, "w", encoding="utf-8") as f:
            while f.tell() < 500_000_000:
                f.writelines(f'{{"text": {text}}}\n' for text in texts)
            f.write('{"text": "' + "长" * 350_000_000 + '"}\n')
            while f.tell() < 2_000_000_000:
                f.writelines(f'{{"text": {text}}}\n' for text in texts)
        rng = random.Random(0)
        with open(short, "w", encoding="utf-8") as f:
            for n in range(1_000_000):
                f.write(json.dumps({"text": f"{n}：{rng.choice(texts)[:100]}"}, ensure_ascii=False) + "\n")
        words = {large: ["clean", "tokenize", "--tokenizer", cfg.tokenizer], short: ["dedup"]}
        for path, command in words.items():
            began = time.monotonic()
            peaks = peak_memory([sys.executable, "data_process.py", *command, "--input", str(path), "--processes", "2",
                                 "--out_dir", f"{folder}/{path.stem}"])  # fmt: skip
            result[path.stem] = {"gigabytes": round(path.stat().st_size / 1e9, 2), "peaks_mib": peaks,
                                 "seconds": round(time.monotonic() - began)}  # fmt: skip
            print(f"{' '.join(command[:2])}: {result[path.stem]}")
    print(json.dumps(result))


def peak_memory(command: list[str]) -> list[int]:
    """The most memory that the command and each of its worker processes held, in MiB, largest first."""
    process, peaks = subprocess.Popen(command, stdout=subprocess.DEVNULL), {}
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # a process that ends while it is asked
            children = [p.read_text().split() for p in Path(f"/proc/{process.pid}/task").glob("*/children")]
            for pid in [str(process.pid), *itertools.chain(*children)]:
                peaks[pid] = int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
        time.sleep(0.1)
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with code {process.returncode}")
    return sorted(peaks.values(), reverse=True)


def activations(cfg: BenchConfig) -> None:
    """Peak memory of training steps with each kind of checkpointing, measured and as core/memory.py expects it."""
    result = []
    for dtype in ("fp32", "bf16"):
        for kind in ("none", "selective", "full"):
            code = f"import bench; bench.train_steps({cfg.model!r}, {kind!r}, {dtype!r})"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            result.append({"dtype": dtype, "checkpointing": kind, **json.loads(done.stdout)})
            print(result[-1], flush=True)
    print(json.dumps(result))


def train_steps(path: str, kind: str, dtype: str, rows: int = 4, seq_len: int = 512) -> None:
    """In a process of its own: two steps of two micro-batches; prints GB beyond what was taken before."""
    import tomllib

    import torch

    from core import memory, optim
    from core.data import Batch
    from core.loss import next_token_loss
    from model import Llama, ModelConfig

    def now(what: str) -> int:
        return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024

    def steps(config: ModelConfig, ids: torch.Tensor) -> None:
        model = Llama(config)
        model.gradient_checkpointing = kind
        optimizers = optim.make_optimizers(model, optim.OptimConfig())
        for _ in range(2):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                    loss = next_token_loss(model, Batch(ids, ids, torch.zeros_like(ids), []))
                loss.backward()
                del loss
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()

    with open(path, "rb") as f:
        sizes = tomllib.load(f)["model"]
    config = ModelConfig(**(sizes | {"vocab_size": sizes.get("vocab_size") or 4096}))
    tiny = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    steps(tiny, torch.zeros(1, 8, dtype=torch.int64))  # what torch takes once
    before = now("VmRSS:")
    steps(config, torch.randint(0, config.vocab_size, (rows, seq_len)))
    half = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    expected = memory.OVERHEAD * memory.peak_bytes(config, rows, seq_len, half, kind)
    print(json.dumps({"gb": round((now("VmHWM:") - before) / 1e9, 2), "expected_gb": round(expected / 1e9, 2)}))


if __name__ == "__main__":
    errors.run(main)

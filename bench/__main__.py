"""How fast is it, beside what others do? Rounds of all contestants in turn, so that a busy minute hits all of them.

    python -m bench tokenize --tokenizer chatglm2/tokenizer.model --input corpus.txt    # a document a line
    python -m bench dedup --input corpus.txt                                            # pip install datasketch rensa
    python -m bench memory --tokenizer chatglm2/tokenizer.model --input corpus.txt      # Linux; writes 4 GB to a folder
    python -m bench activations --model configs/llama-92m.toml                          # Linux; training's memory
    python -m bench finetune --model configs/llama-218m.toml --dtype bf16               # Linux; LoRA, QLoRA's memory
    python -m bench train --model configs/llama-92m.toml --dtype bf16                   # Linux; steps beside others'
    python -m bench loader --model configs/llama-92m.toml                               # Linux; from a 50 GB bin
    python -m bench decode --model configs/llama-92m.toml --tokenizer tokenizer.model   # new tokens beside others'
    python -m bench saving --model configs/llama-218m.toml                              # writes 2.6 GB three times

Prints a table of medians and, as its last line, the same as JSON.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import sentencepiece
import torch
from core.loss import next_token_loss

import tokenizer
import trainer
from assembly.inference import Speaker, SpeakerConfig
from bench import decoders, peers
from core import bins, checkpoint, config, data, errors, hf_folder, optim, parallel
from core.distributed import Ranks
from core.errors import UserError
from core.generate import Batch, SamplingConfig
from extras.corpus import dedup, pipeline, readers
from extras.corpus import tokenize as corpus_bins
from extras.finetune import lora, nf4
from extras.formats import gguf_file, quantize
from model import Llama, ModelConfig
from tokenizer.parallel import map_in_order

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What memory.keep_freed_memory does in a training run, for a process from its beginning.
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@dataclass(frozen=True)
class BenchConfig:
    tokenizer: str = "data/tokenizer"
    input: str = ""  # a UTF-8 text, a document a line
    model: str = ""  # a config with a [model] section, for all that trains
    rounds: int = 5
    documents: int = 100_000  # of dedup
    peers: tuple[str, ...] = ("ours", "transformers", "trainer", "litgpt", "classic")  # of train
    dtype: str = "fp32"  # of train and finetune: fp32 or bf16
    compile: bool = False
    gradient_checkpointing: str = "none"
    # of decode: ours (-bf16, -int8, -int4; -compiled; -batch16), transformers (-bf16), llama.cpp-f32 (-bf16, -q8_0 ...)
    contestants: tuple[str, ...] = ("ours", "ours-compiled", "ours-bf16", "ours-batch16", "transformers")
    prompt_tokens: int = 32
    new_tokens: int = 128
    threads: int = 2  # of decode
    rows: int = 4
    seq_len: int = 512
    micro_batches: int = 1
    alike: bool = True  # the same settings of threads and allocator for all; false: each as it comes

    def __post_init__(self):
        if self.rounds < 1 or self.documents < 1000 or not (self.input or self.model):
            raise ValueError("input or model must be given, rounds at least 1, documents at least 1000")
        if unknown := set(self.peers) - set(peers.PEERS):
            raise ValueError(f"peers: {', '.join(sorted(unknown))} is none of {', '.join(peers.PEERS)}")
        if unknown := {name.split("-")[0] for name in self.contestants} - set(decoders.PEERS):
            raise ValueError(f"contestants: {', '.join(sorted(unknown))} is none of {', '.join(decoders.PEERS)}")
        if self.dtype not in ("fp32", "bf16") or self.gradient_checkpointing not in ("none", "selective", "full"):
            raise ValueError("dtype must be fp32 or bf16, gradient_checkpointing none, selective or full")


def main() -> None:
    words = sys.argv[1:2]
    ways = {
        "tokenize": tokenize,
        "dedup": deduplicate,
        "memory": memory,
        "activations": activations,
        "finetune": finetune,
        "train": train,
        "loader": loader,
        "saving": saving,
        "decode": decode,
    }
    if not words or words[0] not in ways:
        raise UserError(f"{' '.join(words) or 'nothing'} cannot be timed", f"python -m bench {' or '.join(ways)}")
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
    split = corpus_bins.Split(0.01)
    with pipeline.Report(folder, ["read", "tokenize"]) as report:
        blocks = readers.blocks(read, report.accounts["read"])
        results = pipeline.run(blocks, read, [], report, corpus_bins.Tokenize(text, split), processes)
        corpus_bins.write(folder, text, split, results, report, path.name)


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
        result[name] = {
            "seconds": round(statistics.median(values), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
            "mb_per_s": round(size / 1e6 / statistics.median(values), 2),
            "times_first": round(statistics.median(ratios), 2),
        }
        print(
            f"{name:<30} {result[name]['seconds']:>8.2f} s ({min(values):.2f} to {max(values):.2f})"
            f" {result[name]['mb_per_s']:>7.1f} MB/s {result[name]['times_first']:>7.2f} x"
        )
    return result


# ---------------------------------------------------------------- duplicates


def deduplicate(cfg: BenchConfig) -> None:
    """Documents of 0.5 to 5 kB with edited copies among them: two libraries fed from Python, and ours."""
    texts, copies = documents_with_copies(Path(cfg.input), cfg.documents)
    found: dict[str, list[bool]] = {}  # way -> is it a duplicate?
    ways = {
        "datasketch": lambda: datasketch_way(texts, None),
        "datasketch, crc32": lambda: datasketch_way(texts, crc32),
        "rensa": lambda: rensa_way(texts),
        "ours, 1 process": lambda: our_way(texts, 1),
        "ours, 2 processes": lambda: our_way(texts, 2),
    }
    seconds = rounds({name: lambda name=name: found.__setitem__(name, ways[name]()) for name in ways}, cfg.rounds)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.0f} MB, {len(copies):,} of them edited copies")
    result = report(seconds, size)
    for name, flags in found.items():
        near = [flags[i] for i, share in copies if share >= 0.85]
        far = [flags[i] for i, share in copies if share < 0.6]
        result[name] |= {"recall": sum(near) / len(near), "false_removals": sum(far) / len(far), "removed": sum(flags)}
        print(
            f"{name:<30} found {sum(near):,} of {len(near):,} copies with J >= 0.85, removed {sum(far):,} of "
            f"{len(far):,} with J < 0.6, {sum(flags):,} in all"
        )
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
    return [
        bool(reason) for signed in map_in_order(dedup.sign, options, chunks, processes) for reason in index.add(signed)
    ]


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
            peaks = peak_memory(
                [
                    sys.executable,
                    "data_process.py",
                    *command,
                    "--input",
                    str(path),
                    "--processes",
                    "2",
                    "--out_dir",
                    f"{folder}/{path.stem}",
                ]
            )
            result[path.stem] = {
                "gigabytes": round(path.stat().st_size / 1e9, 2),
                "peaks_mib": peaks,
                "seconds": round(time.monotonic() - began),
            }
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
    from extras.estimate.memory import OVERHEAD, peak_bytes

    result, sizes = [], sizes_of(cfg.model)
    with torch.device("meta"):
        model = Llama(sizes)
    for dtype in ("fp32", "bf16"):
        for kind in ("none", "selective", "full"):
            taken = train_steps_alone(os.environ, sizes, kind=kind, dtype=dtype)["bytes"]
            expected = OVERHEAD["cpu"] * peak_bytes(model, 4, 512, DTYPES[dtype], kind)
            result.append(
                {
                    "dtype": dtype,
                    "checkpointing": kind,
                    "gb": round(taken / 1e9, 2),
                    "expected_gb": round(expected / 1e9, 2),
                }
            )
            print(result[-1], flush=True)
    print(json.dumps(result))


def finetune(cfg: BenchConfig) -> None:
    """Memory and time of a step that trains all weights, LoRA (r = 8, all linear layers of the blocks), or QLoRA."""
    result = {}
    print(f"{cfg.rows} x {cfg.seq_len} tokens, {cfg.dtype}, gradient_checkpointing {cfg.gradient_checkpointing}")
    for way in ("full", "lora", "qlora"):
        found = train_steps_alone(
            os.environ | KEEP_FREED,
            sizes_of(cfg.model),
            way=way,
            dtype=cfg.dtype,
            kind=cfg.gradient_checkpointing,
            rows=cfg.rows,
            seq_len=cfg.seq_len,
            steps=cfg.rounds + 1,
            micro_batches=cfg.micro_batches,
        )
        seconds = found["seconds"][1:]  # moments are made in the first step
        result[way] = {
            "peak_gb": round(found["bytes"] / 1e9, 2),
            "step_s": round(statistics.median(seconds), 3),
            "least": round(min(seconds), 3),
            "most": round(max(seconds), 3),
        }
        r = result[way]
        print(
            f"{way:<6} {r['peak_gb']:>6.2f} GB  {r['step_s']:>7.2f} s a step ({r['least']:.2f} to {r['most']:.2f})",
            flush=True,
        )
    print(json.dumps(result))


def train_steps_alone(env: dict, sizes: ModelConfig, **options) -> dict:
    """`train_steps` in a process of its own, with these variables of the environment."""
    code = "import json, sys, bench; bench.train_steps(**json.loads(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps({"sizes": asdict(sizes), **options})],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env=env,
    )
    if done.returncode:
        raise UserError(f"training steps with {options} ended with code {done.returncode}")
    return json.loads(done.stdout)


def train_steps(
    sizes: dict,
    way: str = "full",
    kind: str = "none",
    dtype: str = "fp32",
    rows: int = 4,
    seq_len: int = 512,
    steps: int = 2,
    micro_batches: int = 2,
    optimizer: str = "adamw",
) -> None:
    """In a process of its own: training steps; prints bytes beyond what was taken before, and seconds of each step.

    Args:
        sizes: fields of ModelConfig.
        way: full, lora or qlora: what is trained.
        kind: of gradient checkpointing.
    """

    def now(what: str) -> int:
        return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024

    def take(sizes: ModelConfig, rows: int, seq_len: int) -> list[float]:
        with torch.device("meta"):
            model, plain = Llama(sizes), Llama(sizes)
        fill, seconds = functools.partial(plain.init_weights, 0), []
        if way != "full":
            options = lora.LoraConfig(r=8, quantize="nf4" if way == "qlora" else "")
            fill = lora.begun(model, fill, options, 0, nf4.Weight if way == "qlora" else None)
        parallel.spread(model, trainer.TrainConfig(), Ranks(0, 1, torch.device("cpu")), DTYPES[dtype], fill)
        model.gradient_checkpointing = kind
        optimizers = optim.make_optimizers(model, optim.OptimConfig(optimizer=optimizer))
        ids = torch.randint(0, sizes.vocab_size, (rows, seq_len))
        for _ in range(steps):
            began = time.perf_counter()
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                    loss = next_token_loss(model, data.Batch(ids, ids, torch.zeros_like(ids), []))
                loss.backward()
                del loss
            for each in optimizers:
                each.step()
            model.zero_grad()
            seconds.append(time.perf_counter() - began)
        return seconds

    tiny = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    take(tiny, 1, 8)  # what torch takes once
    before = now("VmRSS:")
    seconds = take(ModelConfig(**sizes), rows, seq_len)
    print(json.dumps({"bytes": now("VmHWM:") - before, "seconds": seconds}))


# ---------------------------------------------------------------- training


def train(cfg: BenchConfig) -> None:
    """A step of each contestant in turn, each in a process of its own, after two that are not counted."""
    sizes = sizes_of(cfg.model)
    about = {
        "sizes": asdict(sizes),
        "rows": cfg.rows,
        "seq_len": cfg.seq_len,
        "dtype": cfg.dtype,
        "compiled": cfg.compile,
        "checkpointing": cfg.gradient_checkpointing,
        "micro_batches": cfg.micro_batches,
    }
    same = os.environ | KEEP_FREED
    plain = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}  # core/__init__.py set it
    processes = {
        peer: subprocess.Popen(
            [sys.executable, "-m", "extras.peers", json.dumps({"peer": peer, **about})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=same if cfg.alike else os.environ if peer == "ours" else plain,
        )
        for peer in cfg.peers
    }
    seconds, losses = {peer: [] for peer in cfg.peers}, {}
    peaks = []  # GFLOP/s of a matrix product alone, in each round
    for turn in range(cfg.rounds + 2):
        for peer, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            line = json.loads(process.stdout.readline())
            losses.setdefault(peer, line["loss"])
            if turn > 1:
                seconds[peer].append(line["seconds"])
        peaks.append(product_rate(cfg.dtype))
    tokens = cfg.rows * cfg.seq_len * cfg.micro_batches
    with torch.device("meta"):
        flops = Llama(sizes).flops_per_token(cfg.seq_len)
    result = {"gflops_of_a_product": round(statistics.median(peaks[2:])), "flops_per_token": flops}
    for peer, process in processes.items():
        rest = json.loads(process.communicate()[0])
        ratios = sorted(a / b for a, b in zip(seconds[peer], seconds[cfg.peers[0]]))
        speed = tokens / statistics.median(seconds[peer])
        result[peer] = {
            "tokens_per_s": round(speed),
            "seconds": [round(s, 3) for s in seconds[peer]],
            "times_first": round(statistics.median(ratios), 3),
            "from": round(ratios[0], 3),
            "to": round(ratios[-1], 3),
            "peak_gb": round(rest["peak_gb"], 2),
            "first_loss": round(losses[peer], 3),
            "share_of_product": round(speed * flops / 1e9 / statistics.median(peaks[2:]), 3),
        }
        r = result[peer]
        print(
            f"{peer:<14} {r['tokens_per_s']:>7,} tokens/s  {r['times_first']:.2f} x ({r['from']:.2f} to "
            f"{r['to']:.2f}) the time of {cfg.peers[0]}  {r['peak_gb']:.2f} GB  {r['share_of_product']:.0%} of a "
            f"product's rate  first loss {r['first_loss']}"
        )
        if "parts" in rest:
            whole = statistics.median(seconds[peer]) / cfg.micro_batches
            result["parts"] = {name: round(part / whole, 3) for name, part in rest["parts"].items()}
    if "parts" in result:
        print("ours, each part alone: " + ", ".join(f"{name} {share:.0%}" for name, share in result["parts"].items()))
    print(json.dumps(result))


def loader(cfg: BenchConfig) -> None:
    """The start at step 1,000,000 in a bin of 50 GB (with holes: it takes no disk), and then 1,000 micro-batches."""

    def resident() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) >> 10

    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "large.bin"
        with open(path, "wb") as f:
            f.truncate(50_000_000_000)
        began, before = time.perf_counter(), resident()
        bin = bins.TokenBin(path, sizes_of(cfg.model).vocab_size, warn=lambda line: None, trust=True)
        rows = data.BinRows(bin, cfg.seq_len, docs=True, eos_id=1)
        seen, seconds = 1_000_000 * cfg.rows, []
        data.batch(rows, data.step_rows(seen, cfg.rows, len(rows), seed=1))
        first = time.perf_counter() - began
        for k in range(1000):
            began = time.perf_counter()
            data.batch(rows, data.step_rows(seen + k * cfg.rows, cfg.rows, len(rows), seed=1))
            seconds.append(time.perf_counter() - began)
        grown = resident() - before
    ms = round(1000 * statistics.median(seconds), 3)
    result = {"first_batch_s": round(first, 3), "ms": ms, "rss_growth_mib": grown}
    print(f"first micro-batch after {first:.3f} s, then {ms} ms each, memory grew by {grown} MiB")
    print(json.dumps(result))


def saving(cfg: BenchConfig) -> None:
    """Three checkpoints of a model with AdamW's moments, and three steps of the smallest useful kind beside them."""
    config, ranks = sizes_of(cfg.model), Ranks(0, 1, torch.device("cpu"))
    model = Llama(config)
    model.init_weights(0)
    optimizers, found = optim.make_optimizers(model, optim.OptimConfig()), {}
    spread = parallel.spread(model, trainer.TrainConfig(), ranks, torch.float32)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers[0].step()
    model.zero_grad()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = checkpoint.Run(folder, {}, {}, None)
        for step in (1, 2, 3):
            began = time.perf_counter()
            run.save(spread, optimizers, None, {"step": step}, print, must=True)
            found.setdefault("save_s", []).append(round(time.perf_counter() - began, 2))
        size = sum(path.stat().st_size for path in run.path(3).iterdir())
        run.close()
    kind = DTYPES[cfg.dtype]
    ids = torch.randint(0, config.vocab_size, (cfg.rows, cfg.seq_len + 1))
    step = peers.ours(config, ids, kind, cfg.compile, cfg.gradient_checkpointing, cfg.micro_batches)
    for _ in range(4):
        began = time.perf_counter()
        step()
        found.setdefault("step_s", []).append(round(time.perf_counter() - began, 2))
    save, one = statistics.median(found["save_s"]), statistics.median(found["step_s"][1:])
    every = trainer.TrainConfig.save_every
    found |= {"gb": round(size / 1e9, 2), "share": round(save / (every * one), 5)}
    print(
        f"{found['gb']} GB in {save:.2f} s; a step of {cfg.rows * cfg.seq_len * cfg.micro_batches:,} tokens takes "
        f"{one:.2f} s: one save every {every} steps costs {found['share']:.2%}"
    )
    print(json.dumps(found))


def decode(cfg: BenchConfig) -> None:
    """A text continued by each contestant in turn, each in a process of its own, after one that is not counted."""
    text = tokenizer.load(cfg.tokenizer)
    sizes = replace(sizes_of(cfg.model), vocab_size=text.vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, sizes.vocab_size, (cfg.prompt_tokens,), generator=generator).tolist()
    found: dict[str, list[dict]] = {name: [] for name in cfg.contestants}
    rates = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = Llama(sizes)
        model.init_weights(0)
        hf_folder.save_model(Path(folder) / "model", model, text, {})
        processes = {}
        for name in cfg.contestants:
            path = Path(folder) / "model"
            if name.startswith("llama.cpp"):
                path = Path(folder) / f"{name}.gguf"
                print(name, gguf_file.write(path, model, text, name.split("-")[1], "bench", None), flush=True)
            about = {"name": name, "path": str(path), "prompt": prompt, "new": cfg.new_tokens, "threads": cfg.threads}
            code = "import json, sys, bench; bench.decoders.serve(**json.loads(sys.argv[1]), ours=bench.our_decoder)"
            processes[name] = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(about)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        del model
        for turn in range(cfg.rounds + 1):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                line = json.loads(process.stdout.readline() or "{}")
                if not line:
                    raise UserError(f"{name} ended with code {process.wait()}")
                found[name] += [line] * bool(turn)
            rates.append(read_rate())
        read = {name: json.loads(process.communicate()[0])["bytes"] for name, process in processes.items()}
    rate, first = statistics.median(rates), found[cfg.contestants[0]]
    result: dict = {"read_gb_per_s": round(rate, 1)}
    print(f"memory is read at {rate:.1f} GB/s; {cfg.prompt_tokens} + {cfg.new_tokens} tokens, {cfg.threads} threads")
    for name, lines in found.items():
        rows = int(name.split("batch")[1].split("-")[0]) if "batch" in name else 1
        speeds = sorted(rows * cfg.new_tokens / line["seconds"] for line in lines)
        ratios = sorted(rows * a["seconds"] / b["seconds"] for a, b in zip(first, lines))
        step = statistics.median((line["seconds"] - line["first_s"]) / (cfg.new_tokens - 1) for line in lines)
        waits = statistics.median(line["first_s"] for line in lines)
        r = result[name] = {
            "tokens_per_s": round(statistics.median(speeds), 1),
            "times_first": round(statistics.median(ratios), 3),
            "from": round(ratios[0], 3),
            "to": round(ratios[-1], 3),
            "first_ms": round(1000 * waits, 1),
            "mb_per_step": round(read[name] / 1e6),
            "share_of_bound": round(read[name] / 1e9 / rate / step, 3),
            "same_ids": sum(a == b for a, b in zip(lines[0]["ids"], first[0]["ids"])),
        }
        print(
            f"{name:<22} {r['tokens_per_s']:>7.1f} tokens/s  {r['times_first']:.2f} x ({r['from']:.2f} to "
            f"{r['to']:.2f})  first after {r['first_ms']:.0f} ms  {r['mb_per_step']} MB a step, "
            f"{r['share_of_bound']:.0%} of what memory gives  {r['same_ids']} ids alike"
        )
    print(json.dumps(result))


def our_decoder(folder: Path, options: list[str], threads: int) -> tuple[Callable, int]:
    """Options: bf16, int8, int4, compiled, batch16."""
    kind = next((o for o in options if o in quantize.KINDS), "none")
    cfg = SpeakerConfig(
        model=str(folder),
        dtype="bf16" if "bf16" in options else "fp32",
        quantize=kind,
        compile="compiled" in options,
        device="cpu",
    )
    model = Speaker(cfg).model
    rows = next((int(o.removeprefix("batch")) for o in options if o.startswith("batch")), 1)
    batches: list[Batch] = []  # a compiled step is kept

    def run(prompt: list[int], new: int):
        if not batches:
            batches.append(Batch(model, rows, len(prompt) + new, cfg.compile))
        began, first = time.perf_counter(), 0.0
        texts = batches[0].add_all([prompt] * rows, SamplingConfig(max_new_tokens=new, temperature=0), set())
        while batches[0].step():
            first = first or time.perf_counter() - began
        return first, time.perf_counter() - began, texts[0][0].added

    return run, decoders.bytes_of_a_step(model)


def read_rate(size: int = 1 << 28) -> float:
    """GB/s at which a GiB is summed up, the best of three: no token comes faster than its weights are read."""
    numbers, times = torch.ones(size), []
    for _ in range(3):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return 4 * size / min(times) / 1e9


def product_rate(dtype: str, size: int = 2048) -> float:
    """GFLOP/s of the best of three matrix products: what no training can exceed."""
    a = torch.randn(size, size, dtype=DTYPES[dtype])
    times = []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e9


def sizes_of(path: str) -> ModelConfig:
    """The [model] section, with the demo's vocabulary where it leaves it to the tokenizer."""
    with open(path, "rb") as f:
        sizes = tomllib.load(f)["model"]
    return ModelConfig(**(sizes | {"vocab_size": sizes.get("vocab_size") or 4096}))


if __name__ == "__main__":
    errors.run(main)

"""The most memory that data_process.py takes on files that are much larger. Linux.

In:  a text, a document a line. Out: MiB of each process.
"""

import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.options import BenchConfig
from bench.timing import ROOT
from core.errors import UserError


def memory(cfg: BenchConfig) -> None:
    """The largest process of `clean tokenize` on 2 GB of JSON lines, one of them 1 GB, and of `dedup` on a million
    short texts, with two workers each."""
    result = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        # Two files: large documents, one of them a gigabyte, and many short ones.
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
        # The chain on each, in processes that the kernel counts.
        words = {large: ["clean", "tokenize", "--tokenizer", cfg.tokenizer], short: ["dedup"]}
        for path, command in words.items():
            began = time.monotonic()
            peaks = peak_memory(
                [
                    sys.executable,
                    str(ROOT / "data_process.py"),
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

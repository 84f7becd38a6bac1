"""Near duplicates found: two libraries fed from Python, and ours.

In:  a text, a document a line. Out: seconds, and how many edited copies each way finds. pip install datasketch rensa.
"""

import json
import random
from pathlib import Path
from zlib import crc32

from bench.options import BenchConfig
from bench.timing import report, rounds
from extras.corpus import dedup
from tokenizer.parallel import map_in_order


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

"""Token bins that follow a tokenizer to its pruned vocabulary; remap_model.py has what models need.

In:  the tokenizer from before and the pruned one; bins and model folders of the first. Out: the same with the second.
Run: `python vocabulary.py prune ... --remap_bin train.bin --remap_model out/pretrain`
Does not choose pieces, and loads torch only where there are models.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core import bins
from core.errors import UserError
from tokenizer import Tokenizer
from tokenizer.parallel import map_in_order
from tokenizer.sentencepiece_model import BYTE

BLOCK_TOKENS = 1 << 20  # read, decoded and encoded at a time


def run(
    old: Tokenizer,
    new: Tokenizer,
    folder: Path,
    bins: Sequence[str],
    models: Sequence[str],
    processes: int,
    load_model: Callable,
) -> None:
    """Rewrite bins and models under their own names into `folder`; nothing that is there is replaced.

    Args:
        load_model: a function from a folder to a model.
    """
    paths = [Path(path) for path in (*bins, *models)]
    for path in paths:
        if (folder / path.name).exists() or [p.name for p in paths].count(path.name) > 1:
            raise UserError(f"{folder / path.name} would be written over", "remove it, or another --output")
    for path in map(Path, bins):
        remap_bin(path, folder / path.name, old, new, processes)
    # Models need torch, bins do not.
    if models:
        from extras.vocabulary.remap_model import remap_model
    for path in map(Path, models):
        remap_model(path, folder / path.name, old, new, load_model)


def remap_bin(path: Path, output: Path, old: Tokenizer, new: Tokenizer, processes: int = 1) -> None:
    """Rewrite a token bin as if its texts had been encoded with the new tokenizer.

    That is what is done: each run of ids between two control ids is decoded and its text encoded. Bytes that are no
    UTF-8 (a document cut inside a character) stay the bytes they are, and are counted.

    Args:
        path: a bin of the old tokenizer, with or without its .json.
        output: the new bin.
        processes: that decode and encode.

    Raises:
        UserError: not a bin of the old tokenizer; or a vocabulary whose ids do not say what the text was.
    """
    model = old.model
    if not model.byte_fallback or model.charsmap or model.remove_extra_whitespaces:
        raise UserError(
            f"{path}: {old.path} does not give texts back exactly (no byte fallback, or a normaliser)",
            "encode the texts again with data_process.py",
        )
    source = bins.TokenBin(path, old.vocab_size, old.sha256)
    broken = 0
    with bins.BinWriter(output, new.vocab_size, new.eos_id, new.sha256, f"{bins.source_of(path)}, pruned") as out:
        with tqdm(desc=str(output), total=source.tokens, unit="tok", unit_scale=True, disable=None) as bar:
            blocks = whole_documents(source, old.eos_id)
            for ids, taken, text_bytes, documents, bad in map_in_order(encode_anew, (old, new), blocks, processes):
                out.add(ids, text_bytes, documents)
                broken += bad
                bar.update(taken)
    print(
        f"{output}: {source.tokens:,} -> {out.tokens:,} tokens, {out.documents:,} documents"
        + f", {broken:,} texts with bytes that are no UTF-8, kept as they were" * bool(broken)
    )


def whole_documents(source: bins.TokenBin, eos_id: int) -> Iterator[np.ndarray]:
    """The bin's ids in blocks that end where a document ends (the last one where the bin ends)."""
    rest = np.zeros(0, source.dtype)
    for start in range(0, source.tokens, BLOCK_TOKENS):
        block = source.read(start, min(BLOCK_TOKENS, source.tokens - start)).astype(source.dtype)
        ids = np.concatenate([rest, block])
        ends = np.flatnonzero(ids == eos_id)
        cut = ends[-1] + 1 if len(ends) else 0
        if cut:
            yield ids[:cut]
        rest = ids[cut:]
    if len(rest):
        yield rest


def encode_anew(tokenizers: tuple[Tokenizer, Tokenizer], ids: np.ndarray) -> tuple[np.ndarray, int, int, int, int]:
    """One block of documents.

    Returns:
        the new ids, the number of old ones, the UTF-8 bytes of the texts, the number of documents and that of texts
        with broken bytes.
    """
    old, new = tokenizers
    names = {old.model.unk_id: new.model.unk_id} | {i: new.special_ids[text] for text, i in old.special_ids.items()}
    at = np.flatnonzero(np.isin(ids, list(names)))
    # What stands in front of the first control id, between two, and behind the last.
    runs = [old.decode_bytes(ids[start:end].tolist()) for start, end in zip([0, *(at + 1)], [*at, len(ids)])]
    whole, broken = [], {}
    for k, run in enumerate(runs):
        try:
            whole.append(run.decode())
        except UnicodeDecodeError:
            whole.append("")
            broken[k] = _encode_broken(new, run)
    out = []
    encoded = new.encode_texts(whole)
    rows = np.split(encoded.ids, np.cumsum(encoded.sizes)[:-1])
    for k, row in enumerate(rows):
        out.append(broken.get(k, row))
        if k < len(at):
            out.append(np.array([names[int(ids[at[k]])]], new.dtype))
    documents = int((ids == old.eos_id).sum()) + int(ids[-1] != old.eos_id)
    return np.concatenate(out), len(ids), sum(map(len, runs)), documents, len(broken)


def _encode_broken(new: Tokenizer, run: bytes) -> np.ndarray:
    """Text around bytes that are no UTF-8; these become byte pieces."""
    byte_ids = {int(p.text[3:5], 16): i for i, p in enumerate(new.model.pieces) if p.type == BYTE}
    ids: list[int] = []
    for n, part in enumerate(re.split("([\udc80-\udcff]+)", run.decode("utf-8", "surrogateescape"))):
        if n % 2:
            ids += [byte_ids[ord(char) - 0xDC00] for char in part]
        else:
            ids += new.encode(part, continues=bool(n))
    return np.array(ids, new.dtype)

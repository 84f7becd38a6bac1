"""A vocabulary to a smaller one: pieces chosen by script, by list, by frequency on a text, or by all of these.

    python vocabulary.py prune --input chatglm2/tokenizer.model --output data/small     # all Chinese, no English words
    python vocabulary.py prune --input tokenizer.model --output DIR --size 24000 --corpus wiki.txt news.txt
    python vocabulary.py prune --input tokenizer.model --output DIR --size 35203 --corpus wiki.txt \\
        --keep han,han-traditional --remap_bin train.bin val.bin --remap_model out/pretrain

In:  a sentencepiece BPE or unigram model. Out: a tokenizer folder (as `Tokenizer.save` writes it), id_map.json (where
each old id went) and report.json. With --remap_*: token bins and models that follow.
Why an embedding should not be larger than it must: with 64,789 ids, 768 wide, it has 50M of 137M parameters.

How pieces stay reachable: a BPE model builds a piece by merging two others, always the same two. If a piece stays, so
do these two, and theirs, down to the characters. The merges inside the piece then still happen in the same order: each
was the best of all possible ones and is still the best of those that are left.
"""

import heapq
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from core.config import Range, Section
from extras.vocabulary import remap
from extras.vocabulary.inspect import Fit, char_classes, count_classes, fit, unreachable
from extras.vocabulary.lines import read_lines
from tokenizer import Tokenizer, TokenizerError, load
from tokenizer.sentencepiece_model import BPE, NORMAL, SPACE, UNIGRAM, USER_DEFINED, Model
from tokenizer.sentencepiece_writer import write_model

# What a Chinese text is written with; English words are spelled in letters.
CHINESE = ("han", "han-traditional", "kana", "bopomofo", "fullwidth", "digits", "punct", "symbols", "marks")
# What a piece counts that the text does not have. Below 1, so that it never beats one that it has; above 0, so that a
# character of another text, three bytes without it, stays before two characters in one piece do.
UNSEEN = 0.4
WIDTHS = (512, 768, 1024, 2048)  # hidden sizes that the report counts parameters for


# Which pieces a piece is made of --------------------------------------------------------------------------------------


def parts_of(model: Model) -> list[tuple[int, ...]]:
    """What each piece's text would be encoded to if the piece were not there.

    Args:
        model: BPE or unigram.

    Returns:
        for each id the ids of its parts: the two pieces of its last merge (BPE), the next best segmentation (unigram),
        or for a character the bytes it falls back to, or the unknown id. () for what is no normal piece, and for a
        piece that the model itself never builds.
    """
    ids = {p.text: i for i, p in enumerate(model.pieces) if p.type not in (2, 3, 6)}  # what texts are matched with
    byte_ids = {p.text: i for i, p in enumerate(model.pieces)} if model.byte_fallback else None

    def fallback(char: str) -> tuple[int, ...]:
        return tuple(byte_ids[f"<0x{b:02X}>"] for b in char.encode()) if byte_ids else (model.unk_id,)

    split = _last_merge(model, ids) if model.model_type == BPE else _next_best(model, ids)
    result: list[tuple[int, ...]] = []
    for piece in model.pieces:
        if piece.type != NORMAL:
            result.append(())
        elif len(piece.text) == 1:
            result.append(fallback(piece.text))
        else:
            found = ([ids[part]] if part in ids else fallback(part) for part in split(piece.text))
            result.append(tuple(itertools.chain.from_iterable(found)))
    return result


def _last_merge(model: Model, ids: dict[str, int]):
    """piece -> its two halves, () if merging its characters never gives it: sentencepiece's merging, spelled out.

    The best score first, the leftmost of equals: sentencepiece's src/bpe_model.cc.
    """
    score = {text: model.pieces[i].score for text, i in ids.items()}
    fixed = sorted((p.text for p in model.pieces if p.type == USER_DEFINED), key=len, reverse=True)
    symbol = re.compile("|".join([*map(re.escape, fixed), "."]), re.DOTALL)

    def split(piece: str) -> tuple[str, ...]:
        symbols, halves = symbol.findall(piece), ()
        while len(symbols) > 1:
            best, at = None, 0
            for k in range(len(symbols) - 1):
                found = score.get(symbols[k] + symbols[k + 1])
                if found is not None and (best is None or found > best) and not {*symbols[k : k + 2]} & {*fixed}:
                    best, at = found, k
            if best is None:
                return ()
            halves = (symbols[at], symbols[at + 1])
            symbols[at : at + 2] = ["".join(halves)]
        return halves

    return split


def _next_best(model: Model, ids: dict[str, int]):
    """piece -> its most likely segmentation into other pieces (Viterbi); a character without a piece stands alone."""
    score = {text: model.pieces[i].score for text, i in ids.items()}
    unknown = min(score.values()) - 10.0  # sentencepiece's own penalty

    def split(piece: str) -> tuple[str, ...]:
        best = [(0.0, ())]  # of each prefix: score and parts
        for end in range(1, len(piece) + 1):
            found = [(best[end - 1][0] + unknown, (*best[end - 1][1], piece[end - 1]))]
            for start in range(end):
                part = piece[start:end]
                if part in score and part != piece:
                    found.append((best[start][0] + score[part], (*best[start][1], part)))
            best.append(max(found, key=lambda f: f[0]))
        return best[-1][1]

    return split


# Choosing -------------------------------------------------------------------------------------------------------------


def choose(
    model: Model,
    keep: Iterable[str] = (),
    words: Iterable[int] = (),
    size: int = 0,
    counts: Sequence[int] = (),
) -> list[int]:
    """Choose the pieces that stay.

    What is no normal piece (control, bytes, unknown, user-defined), the space and the printable ASCII characters always
    stay, and without byte fallback every character, since its text would be lost.

    Args:
        model: BPE or unigram.
        keep: classes of `char_class`; pieces made of nothing else stay.
        words: ids that stay whatever their class is.
        size: number of pieces, exactly; what must stay leaves room for those that save a text the most tokens. 0: only
            what must stay.
        counts: how often each id occurs in that text, (number of pieces,).

    Returns:
        ids in ascending order; every piece is reachable with these alone if it was with all.

    Raises:
        TokenizerError: another kind of model, an unknown class, or a size that does not fit.
    """
    if model.model_type not in (BPE, UNIGRAM):
        raise TokenizerError("only BPE and unigram models are pruned, this is another kind")
    pieces, keep = model.pieces, set(keep)
    classes = [char_classes(p.text) if p.type == NORMAL else set() for p in pieces]
    if unknown := keep - set().union(*classes):
        raise TokenizerError(
            f"keep {', '.join(sorted(unknown))}: this vocabulary has {', '.join(sorted(set().union(*classes)))}"
        )
    parts = parts_of(model)
    if model.model_type == BPE:
        needs = parts
    else:  # any piece of a unigram model stands for itself, but what it is made of should not become unknown
        char_ids = {p.text: i for i, p in enumerate(pieces) if len(p.text) == 1}
        needs = [tuple({char_ids[c] for c in p.text if c in char_ids} - {i}) for i, p in enumerate(pieces)]
    stays = set(words)
    for i, piece in enumerate(pieces):
        if piece.type != NORMAL:
            stays.add(i)
        elif len(piece.text) == 1:
            char = piece.text
            if char == SPACE or " " <= char <= "~" or classes[i] <= keep or not model.byte_fallback:
                stays.add(i)
        elif parts[i] and keep and classes[i] <= keep:
            stays.add(i)
    waiting = list(stays)
    while waiting:  # and what they are made of
        new = set(needs[waiting.pop()]) - stays
        stays |= new
        waiting += new
    if not size:
        return sorted(stays)
    usable = sum(p.type != NORMAL or bool(parts[i]) for i, p in enumerate(pieces))
    if not len(stays) <= size <= usable:
        raise TokenizerError(f"size {size}: what must stay has {len(stays)} pieces, all that can be reached {usable}")
    return sorted(_drop_least_used(model, parts, needs, stays, size, counts))


def _drop_least_used(model, parts, needs, stays: set[int], size: int, counts) -> set[int]:
    """Leave out one piece after the other, always the one that costs the text the fewest tokens more.

    A piece that is left out is written by its parts, so its count passes on to them; and a part can only go when
    nothing that needs it is left. Among equals the one with the lowest score goes.
    """
    count = np.array(counts, np.int64)
    kept = {i for i, p in enumerate(model.pieces) if i in stays or (p.type == NORMAL and parts[i])}
    users = np.zeros(len(parts), np.int64)
    for i in kept:
        for part in set(needs[i]):
            users[part] += 1

    def cost(i: int) -> tuple[float, float, int]:
        return (count[i] + UNSEEN) * (len(parts[i]) - 1), model.pieces[i].score, -i

    heap = [(*cost(i), i) for i in kept - stays if not users[i]]
    heapq.heapify(heap)
    while len(kept) > size:
        *before, i = heapq.heappop(heap)
        if tuple(before) != cost(i):  # pieces that it is a part of were left out since
            heapq.heappush(heap, (*cost(i), i))
            continue
        kept.remove(i)
        _pass_on(int(count[i]), i, parts, kept, count)
        for part in set(needs[i]):
            users[part] -= 1
            if not users[part] and part in kept - stays:
                heapq.heappush(heap, (*cost(part), part))
    return kept


def _pass_on(number: int, i: int, parts, kept: set[int], count) -> None:
    for part in parts[i]:
        if part in kept:
            count[part] += number
        else:
            _pass_on(number, part, parts, kept, count)


def pruned(model: Model, kept: Sequence[int]) -> Model:
    """The model with only the pieces `kept`, in their order; scores, normaliser and settings as they were."""
    new = replace(model, pieces=[model.pieces[i] for i in kept])
    # The only settings that name pieces by number: ids of unk, bos and eos, and of pad where there is one.
    for number, old_id, new_id in (
        (40, model.unk_id, new.unk_id),
        (41, model.bos_id, new.bos_id),
        (42, model.eos_id, new.eos_id),
        (43, model.pad_id, new.pad_id),
    ):
        if new_id != old_id:
            new = replace(new, trainer=(*(f for f in new.trainer if f[0] != number), (number, 0, new_id)))
    return new


# What came of it ------------------------------------------------------------------------------------------------------


def id_map(old: Tokenizer, new: Tokenizer) -> list[int | list[int]]:
    """For each old id the id of the same piece, or the ids that its text has now."""
    ids = {p.text: i for i, p in enumerate(new.model.pieces)}
    return [
        ids[p.text] if p.text in ids else new.encode(p.text.replace(SPACE, " "), continues=True)
        for p in old.model.pieces
    ]


def report(old: Tokenizer, new: Tokenizer, texts: dict[str, tuple[Fit, Fit]]) -> dict:
    """What was won and lost, as plain data.

    Args:
        old, new: before and after.
        texts: file name -> how both fit it.
    """
    before, after = count_classes(old.model), count_classes(new.model)
    dropped = old.vocab_size - new.vocab_size
    return {
        "from_sha256": old.sha256,
        "to_sha256": new.sha256,
        "pieces": {"before": old.vocab_size, "after": new.vocab_size},
        "unreachable": {"before": len(unreachable(old.model)), "after": len(unreachable(new.model))},
        "classes": {name: {"before": n, "after": after.get(name, 0)} for name, n in before.items()},
        "chars_per_token": {
            name: {"before": round(a.chars_per_token, 5), "after": round(b.chars_per_token, 5)}
            for name, (a, b) in texts.items()
        },
        # Tied: one matrix for input and output. Untied: two.
        "parameters_saved": {str(w): {"tied": dropped * w, "untied": 2 * dropped * w} for w in WIDTHS},
    }


def show(found: dict) -> str:
    """The report as lines."""
    pieces, lost = found["pieces"], found["unreachable"]
    lines = [f"{pieces['before']:,} -> {pieces['after']:,} pieces; out of reach {lost['before']} -> {lost['after']}"]
    lines += [f"{c['before']:>8,} -> {c['after']:>6,} {name}" for name, c in found["classes"].items()]
    for name, c in found["chars_per_token"].items():
        change = c["after"] / c["before"] - 1
        lines.append(f"{name}: {c['before']:.4f} -> {c['after']:.4f} characters per token ({change:+.2%})")
    for width, saved in found["parameters_saved"].items():
        tied, untied = saved["tied"] / 1e6, saved["untied"] / 1e6
        lines.append(f"hidden_size {width}: {tied:.1f}M parameters less, {untied:.1f}M where input and output differ")
    return "\n".join(lines)


# The command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneConfig(Section):
    input: str = ""  # the tokenizer: a folder with a tokenizer.model, or such a file
    output: str = ""  # folder for everything that is written; a tokenizer that is there is never replaced by another
    keep: tuple[str, ...] = ()  # classes of pieces that stay; neither keep nor size: CHINESE, see prune.py
    keep_words: str = ""  # a file with a word a line; all that these are written with today stays
    # Number of pieces, exactly: what keep leaves open goes to those the corpus needs most. 0: keep alone.
    size: Annotated[int, Range(least=0)] = 0
    corpus: tuple[str, ...] = ()  # UTF-8 texts to count pieces in, and to measure on before and after
    measure: tuple[str, ...] = ()  # UTF-8 texts to measure on only
    remap_bin: tuple[str, ...] = ()  # token bins of the old vocabulary, written anew into the output folder
    remap_model: tuple[str, ...] = ()  # model folders with the old vocabulary, likewise
    processes: Annotated[int, Range(least=1)] = 2

    def __post_init__(self):
        super().__post_init__()
        if not self.input or not self.output:
            raise ValueError("input and output must be given")
        # The order of a model's own pieces says little: ChatGLM2's first 35,203 cost Chinese a third more tokens.
        if self.size and not self.corpus:
            raise ValueError("size needs a corpus: a text like those the model will read, which says what is useful")


def run(cfg: PruneConfig, load_model: Callable) -> None:
    """Choose the pieces that stay, write the smaller tokenizer with its report, and what is to follow it.

    Args:
        load_model: a function from a folder to a model, called for remap_model only.
    """
    old = load(cfg.input)
    if old.model is None:
        raise TokenizerError(f"{old.path}: only sentencepiece .model files are pruned, this is a tokenizer.json")
    before = {path: fit(old, read_lines([path]), cfg.processes) for path in dict.fromkeys(cfg.corpus + cfg.measure)}
    words = words_of(cfg.keep_words, old) if cfg.keep_words else set()
    keep = cfg.keep or (() if cfg.size else _present(old.model, CHINESE))
    counts = sum(before[path].counts for path in dict.fromkeys(cfg.corpus))
    kept = choose(old.model, keep, words, cfg.size, counts)
    new = save(pruned(old.model, kept), old, Path(cfg.output))
    texts = {path: (a, fit(new, read_lines([path]), cfg.processes)) for path, a in before.items()}
    found = report(old, new, texts)
    _write_json(Path(cfg.output) / "report.json", found)
    print(f"{show(found)}\n{new.path}: {new.vocab_size} ids, sha256 {new.sha256}")
    remap.run(old, new, Path(cfg.output), cfg.remap_bin, cfg.remap_model, cfg.processes, load_model)


def _present(model: Model, classes: Iterable[str]) -> list[str]:
    found = set().union(*(char_classes(p.text) for p in model.pieces if p.type == NORMAL))
    return [c for c in classes if c in found]


def words_of(path: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that the words of a file, a line each, are written with, at the start of a text and inside one."""
    ids: set[int] = set()
    for line in read_lines([path]):
        if word := line.strip():
            ids.update(*(tokenizer.encode(lead + word, continues=True) for lead in ("", " ")))
    return ids


def save(model: Model, old: Tokenizer, folder: Path) -> Tokenizer:
    """Write a pruned model's tokenizer files and id_map.json into a folder, each with one rename; returns it, loaded.

    Raises:
        TokenizerError: the folder holds another tokenizer.
    """
    data, path = write_model(model), folder / "tokenizer.model"
    if path.exists() and path.read_bytes() != data:
        raise TokenizerError(f"{path}: another tokenizer is there already -- choose another --output, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        (Path(temporary) / "pruned.model").write_bytes(data)
        new = load(Path(temporary) / "pruned.model")
        new.save(Path(temporary) / "files")
        _write_json(
            Path(temporary) / "files/id_map.json",
            {"from_sha256": old.sha256, "to_sha256": new.sha256, "ids": id_map(old, new)},
        )
        for file in sorted((Path(temporary) / "files").iterdir(), key=lambda f: f.name == "tokenizer.model"):
            os.replace(file, folder / file.name)
    return load(path)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

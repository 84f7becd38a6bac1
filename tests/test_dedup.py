"""Promises of extras.corpus.dedup: signatures are those of naive MinHash, removal is that of a plain loop, whatever the
chunks, the processes and the disk; near duplicates go, other texts stay, every document is accounted for."""

import errno
import hashlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import BOOK

from extras.corpus import dedup
from extras.corpus.account import Account, Doc
from extras.corpus.dedup import DedupConfig, Index, Signed, sign, signatures
from tokenizer.parallel import map_in_order

SENTENCES = sorted({s for text in BOOK for s in re.findall(r"[^。！？\n]{6,}[。！？]?", text)})
CHARACTERS = sorted(set("".join(SENTENCES)))
# Few characters, so that n-grams repeat; blanks of several kinds; outside the BMP; combined emoji.
TEXTS = st.lists(st.text("ab的了 　\n\t😀👩‍👧é", max_size=30), max_size=12)


# ---------------------------------------------------------------- oracles


def ngrams(text: str) -> set[str]:
    text = "".join(text.split())
    return {text[i : i + 5] for i in range(len(text) - 4)} or {text}


def jaccard(a: str, b: str) -> float:
    a, b = ngrams(a), ngrams(b)
    return len(a & b) / len(a | b)


def mix(x: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = ((x ^ (x >> 33)) * factor) % 2**64
    return x ^ (x >> 33)


def naive_signature(text: str, permutations: int) -> list[int]:
    """Order by order: the smallest of (0, hash) for n-grams in bin k and (1, a_k * hash + b_k) for the others."""
    hashes = []
    for gram in ngrams(text):
        h = 0
        for c in gram.ljust(5):
            h = (h * 0x9E3779B97F4A7C15 + ord(c)) % 2**64
        hashes.append(mix(h))
    entries = []
    for k in range(permutations):
        a = mix((k + 1) * 0x9E3779B97F4A7C15 % 2**64) % 2**32 | 1
        b = mix((permutations + k + 1) * 0x9E3779B97F4A7C15 % 2**64) % 2**32
        keys = []
        for h in hashes:
            low, mine = h % 2**31, (h >> 32) * permutations >> 32 == k
            keys.append((0, low) if mine else (1, (a * low + b) % 2**32))
        entries.append(min(keys)[1])
    return entries


def naive_loop(whole: list, rows: list[list[int]], options: DedupConfig) -> list[str]:
    """One document after another, bands as tuples in a dict."""
    first, kept, reasons = {}, {}, []
    b, r = dedup.bands(options.threshold, options.permutations)
    least = options.threshold - (options.threshold * (1 - options.threshold) / options.permutations) ** 0.5
    for number, (text, row) in enumerate(zip(whole, rows)):
        names = [text, *((i, *row[i * r : i * r + r]) for i in range(b))]
        rivals = [kept[first[name]] for name in names if name in first]
        share = max((sum(x == y for x, y in zip(row, old)) / len(row) for _, old in rivals), default=0)
        if any(text == other for other, _ in rivals):
            reasons.append("exact duplicate")
        elif rivals and share >= least:
            reasons.append("near duplicate")
        else:
            reasons.append("")
            kept[number] = (text, row)
            for name in names:
                first.setdefault(name, number)
    return reasons


def naive_removal(texts: list[str], options: DedupConfig) -> list[str]:
    return naive_loop(texts, signatures(texts, options.permutations).tolist(), options)


# ---------------------------------------------------------------- corpora


def edited(text: str, edits: int, rng: random.Random) -> str:
    chars = list(text)
    for _ in range(edits):
        i = rng.randrange(len(chars))
        chars[i : i + rng.randrange(2)] = rng.choice(CHARACTERS) * rng.randrange(2)
    return "".join(chars)


def corpus(count: int, seed: int, share: float = 0.5) -> list[str]:
    """Texts of one to twelve sentences; a share of them copies of earlier ones with 0 to 20 % of characters edited."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        if texts and rng.random() < share:
            text = rng.choice(texts[-200:])
            texts.append(edited(text, int(rng.choice((0, 0.004, 0.01, 0.03, 0.06, 0.2)) * len(text)), rng))
        else:
            # Characters drawn anew in a fifth of places: sentences of one small book alone would make texts too alike.
            text = "".join(rng.choice(SENTENCES) for _ in range(rng.randint(1, 12)))
            texts.append(edited(text, len(text) // 5, rng))
    return texts


def run(texts, options=DedupConfig(), chunk=64) -> list[str]:  # noqa: B008
    index = Index(options)
    return [reason for i in range(0, len(texts), chunk) for reason in index.add(sign(options, texts[i : i + chunk]))]


# ---------------------------------------------------------------- signatures


@given(TEXTS, st.sampled_from([1, 2, 7, 128]), st.sampled_from([1, 20, 1 << 17]))
@settings(max_examples=60)
def test_signatures_are_those_of_the_naive_loops(texts, permutations, part):
    before, dedup.PART = dedup.PART, part
    try:
        found = signatures(texts, permutations)
    finally:
        dedup.PART = before
    assert found.dtype == np.uint32 and found.shape == (len(texts), permutations) and found.flags.c_contiguous
    assert found.tolist() == [naive_signature(text, permutations) for text in texts]


def test_signatures_of_long_texts_are_those_of_the_naive_loops():
    texts = ["".join(SENTENCES[i : i + n]) for i, n in ((0, 1), (1, 10), (5, 60), (9, 2))] + ["啊" * 3000]
    assert signatures(texts).tolist() == [naive_signature(text, 128) for text in texts]


def test_equal_entries_estimate_the_jaccard_similarity_without_bias():
    # Over 1500 pairs the mean error of fair estimates has a standard deviation of at most 0.5 / sqrt(128 * 1500) = 0.0011;
    # bins can only make it smaller. Short texts (classic MinHash), middling and long ones (bins).
    for low, high in ((20, 60), (200, 500), (1500, 2500)):
        rng = random.Random(low)
        errors = []
        for _ in range(1500 if high < 1000 else 300):
            text = "".join(rng.choices(CHARACTERS, k=rng.randint(low, high)))
            other = edited(text, int(rng.random() * 0.1 * len(text)), rng)
            a, b = signatures([text, other])
            exact = jaccard(text, other)
            errors.append(((a == b).mean() - exact, exact * (1 - exact) / 128))
        error, variance = np.array(errors).T
        assert abs(error.mean()) < 4 * np.sqrt(variance.mean() / len(error))
        assert (error**2).mean() < 1.15 * variance.mean()


def test_the_exact_hash_is_of_the_whole_text():
    texts = ["", " ", "a", "a ", "的", "的😀", "\ud800"]
    exact = sign(DedupConfig(), texts).exact
    assert exact.dtype == np.uint64 and exact.shape == (7, 2)
    digests = [hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).digest() for t in texts]
    assert [row.tobytes() for row in exact] == digests and len(set(digests)) == 7


def test_bands_have_the_smallest_weighted_area():
    for threshold, permutations in (
        (0.5, 128),
        (0.8, 128),
        (0.9, 128),
        (0.8, 64),
        *((t / 20, 30) for t in range(1, 21)),
    ):
        areas = {}
        for r in range(1, permutations + 1):
            b, below, above = permutations // r, 0.0, 0.0
            for i in range(1000):
                s = (i + 0.5) / 1000
                p = 1 - (1 - s**r) ** b
                below, above = (below + p, above) if s < threshold else (below, above + 1 - p)
            areas[b, r] = 0.05 * below + 0.95 * above
        assert dedup.bands(threshold, permutations) == min(areas, key=areas.get)
    assert dedup.bands(0.8, 128) == (16, 8)
    assert dedup.bands(1.0, 128) == (1, 128)


# ---------------------------------------------------------------- removal


@pytest.mark.parametrize("options", [DedupConfig(), DedupConfig(0.5), DedupConfig(0.9, 64), DedupConfig(1.0, 16)])
def test_removal_is_that_of_a_plain_loop(options):
    texts = corpus(1500, 1)
    expected = naive_removal(texts, options)
    assert len(set(expected)) == 3
    assert run(texts, options) == expected


@given(st.lists(st.text("ab ", max_size=9), max_size=30), st.integers(1, 7))
def test_removal_of_tiny_texts_is_that_of_a_plain_loop(texts, chunk):
    assert run(texts, chunk=chunk) == naive_removal(texts, DedupConfig())


@given(st.integers(0, 10**6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(max_examples=20)
def test_removal_of_signatures_that_share_bands_is_that_of_a_plain_loop(seed, sizes):
    # Bands out of 6, in any place: whose band it is decides. Copies agree with theirs in few whole bands or in none.
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 1 << 32, (6, 8), np.uint32)
    rows = pool[rng.integers(6, size=(120, 16))].reshape(120, 128)
    for i in range(1, 120):
        if rng.random() < 0.6:
            rows[i] = rows[rng.integers(i)]
        for band in rng.permutation(16)[: rng.integers(17)]:
            rows[i, 8 * band + rng.integers(8)] = i
    signed, at, found, index = Signed(np.arange(240, dtype=np.uint64).reshape(-1, 2), rows), 0, [], Index(DedupConfig())
    while at < 120:
        for size in sizes:
            found += index.add(Signed(*(array[at : at + size] for array in signed)))
            at += size
    assert found == naive_loop(list(range(120)), rows.tolist(), DedupConfig())


def test_removal_is_that_of_exact_jaccard_where_no_pair_is_near_the_threshold():
    rng = random.Random(5)
    texts = []
    for _ in range(400):
        base = "".join(rng.choices(CHARACTERS, k=rng.randint(150, 600)))
        texts += [edited(base, len(base) // 150, rng) for _ in range(rng.randint(1, 3))]
    rng.shuffle(texts)
    kept, expected = [], []
    for text in texts:
        near = any(jaccard(text, other) >= 0.8 for other in kept if abs(len(other) - len(text)) < 10)
        expected.append(near)
        if not near:
            kept.append(text)
    assert [bool(reason) for reason in run(texts)] == expected
    assert len(kept) == 400


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 90), min_size=1, max_size=20),
    st.sampled_from([1, 5, 256]),
    st.sampled_from([0, 64]),
)
@settings(max_examples=20)
def test_removal_does_not_depend_on_chunks_or_the_disk(seed, sizes, block, memory_mb):
    texts, options = corpus(150, seed), DedupConfig(memory_mb=memory_mb)
    index, found, at, before = Index(options), [], 0, dedup.BLOCK
    dedup.BLOCK = block
    try:
        while at < len(texts):
            for size in sizes:
                found += index.add(sign(options, texts[at : at + size]))
                at += size
    finally:
        dedup.BLOCK = before
    assert bool(index._room.maps) == (memory_mb == 0)
    assert found == naive_removal(texts, options)


def test_removal_is_the_same_in_memory_partly_and_wholly_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    count = 6000  # the table doubles 6 times, what is kept 3 times
    rows = rng.integers(0, 1 << 32, (count, 128), np.uint32)
    for i in range(1, count, 3):  # copies of an earlier one with 0 to 63 other entries
        rows[i] = rows[rng.integers(i)]
        rows[i, rng.permutation(128)[: rng.integers(64)]] = i
    signed = Signed(rng.integers(0, 1 << 63, (count, 2)).astype(np.uint64), rows)
    found = {}
    for memory_mb in (0, 3, 512):
        index = Index(DedupConfig(memory_mb=memory_mb, temp_dir=str(tmp_path)))
        found[memory_mb] = index.add(signed)
        files = len(index._room.maps)
        assert files == {0: 2, 3: 1, 512: 0}[memory_mb]
        assert not any(tmp_path.iterdir())  # nothing is left behind even by a process that is killed
    expected = naive_loop([tuple(pair) for pair in signed.exact.tolist()], rows.tolist(), DedupConfig())
    assert found[0] == found[3] == found[512] == expected
    assert 700 < found[0].count("near duplicate") < 2000 == count // 3


def test_the_same_with_several_processes():
    texts, options = corpus(400, 7), DedupConfig()
    chunks = [texts[i : i + 50] for i in range(0, len(texts), 50)]
    index = Index(options)
    found = [r for signed in map_in_order(sign, options, chunks, 2) for r in index.add(signed)]
    assert found == run(texts)


def test_the_first_is_kept_and_removed_ones_remove_nothing():
    rng = random.Random(3)
    chain = ["".join(rng.choices(CHARACTERS, k=600))]
    for _ in range(30):  # each is like the one before and ever less like the first
        chain.append(edited(chain[-1], 8, rng))
    found = run(chain)
    kept = [i for i, reason in enumerate(found) if not reason]
    assert kept[0] == 0 and 3 <= len(kept) <= 12
    for i, reason in enumerate(found):
        assert not reason or max(jaccard(chain[i], chain[k]) for k in kept if k < i) > 0.7
    assert all(jaccard(chain[a], chain[b]) < 0.85 for a in kept for b in kept if a < b)


def test_identical_texts_and_texts_that_differ_in_whitespace():
    text = "天下大势，分久必合，合久必分。😀👩‍👧"
    assert run([text, text, text[:7] + " \n　" + text[7:], text, text[::-1]]) == [
        "",
        "exact duplicate",
        "near duplicate",
        "exact duplicate",
        "",
    ]


def test_short_and_empty_texts():
    assert run(["", "", " ", "的", "的", "了", "ab", "ba", "ab\0\0\0", "abcd", "abcde", "😀"]) == [
        "",
        "exact duplicate",
        "near duplicate",
        "",
        "exact duplicate",
        "",
        "",
        "",
        "",
        "",
        "",
        "",
    ]
    assert Index(DedupConfig()).add(sign(DedupConfig(), [])) == []


def test_many_that_share_a_band_are_compared_with_its_first_only():
    rows = np.random.default_rng(0).integers(0, 1 << 32, (3000, 128), np.uint32)
    rows[:, :8] = rows[0, :8]  # e.g. a licence at the end of every page
    rows[2999] = rows[1500]
    signed = Signed(np.arange(6000, dtype=np.uint64).reshape(-1, 2), rows)
    index, compared = Index(DedupConfig()), []
    compare = index._compare
    index._compare = lambda new, old: compared.append(max(new.size, old.size)) or compare(new, old)
    assert index.add(signed) == [""] * 2999 + ["near duplicate"]
    assert sum(compared) <= 3000 + 17


# ---------------------------------------------------------------- how well


@pytest.mark.heavy
def test_near_duplicates_go_and_others_stay():
    rng = random.Random(11)
    texts, pairs = [], []
    for _ in range(4000):
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(60, 700)))
        copy = edited(text, max(1, int(rng.choice((0.003, 0.01, 0.015, 0.02, 0.08, 0.1, 0.13)) * len(text))), rng)
        pairs.append(jaccard(text, copy))
        texts += [text, copy]
    found = run(texts)
    assert not any(found[::2])
    gone, exact = np.array([bool(reason) for reason in found[1::2]]), np.array(pairs)
    high, low = exact >= 0.85, exact < 0.6
    assert high.sum() > 1000 and low.sum() > 1000
    assert gone[high].mean() >= 0.99  # asked for: 0.95
    assert gone[low].mean() <= 0.002  # asked for: 0.01


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_memory_stays_within_the_limit(root):
    code = """
import re, sys
import numpy as np
from extras.corpus.dedup import DedupConfig, Index, Signed
rng, index = np.random.default_rng(0), Index(DedupConfig(memory_mb=int(sys.argv[1])))
# Not ru_maxrss: it begins with that of the process this one was started from.
peak = lambda: int(re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak()
for _ in range(160):
    index.add(Signed(rng.integers(0, 1 << 63, (500, 2)).astype(np.uint64), rng.integers(0, 1 << 32, (500, 128), np.uint32)))
print(peak() - before)
"""
    used = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, limit], cwd=root, capture_output=True, text=True, check=True
            ).stdout
        )
        for limit in ("8", "4096")
    ]
    assert used[0] < 70 < used[1]  # measured: 52 and 95; 130 where pages are not given back


# ---------------------------------------------------------------- the stage


def test_every_document_is_kept_or_rejected_with_its_reason():
    texts = corpus(700, 9)
    account = Account("dedup", keep_texts=True)
    docs = [Doc(text, f"a:{i}") for i, text in enumerate(texts)]
    kept = list(dedup.dedup(iter(docs), account, DedupConfig()))
    expected = naive_removal(texts, DedupConfig())
    assert kept == [doc for doc, reason in zip(docs, expected) if not reason]
    assert [(r.where, r.reason, r.text) for r in account.take_rejects()] == [
        (doc.where, reason, doc.text) for doc, reason in zip(docs, expected) if reason
    ]
    assert account.seen == len(texts) == account.kept + sum(account.rejected.values())
    assert account.out == account.kept == len(kept) and account.missing == 0
    assert set(account.rejected) == {"exact duplicate", "near duplicate"}


def test_an_abandoned_stage_adds_up():
    account = Account("dedup")
    stream = dedup.dedup((Doc(text, "") for text in corpus(700, 9)), account, DedupConfig())
    for _ in range(100):
        next(stream)
    stream.close()
    assert account.kept == 100 and account.missing == 0


def test_a_full_disk_is_an_error_and_not_a_signal(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        Index(DedupConfig(memory_mb=0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0},
        {"threshold": 1.01},
        {"threshold": float("nan")},
        {"permutations": 0},
        {"memory_mb": -1},
        {"temp_dir": "/no/such/folder"},
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DedupConfig(**wrong)


# ---------------------------------------------------------------- the table


@given(st.lists(st.sets(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=40), max_size=12))
def test_the_table_is_a_dict(batches):
    table, expected = dedup._Table(dedup._Room(DedupConfig()), slots=4), {}
    for batch in batches:
        keys = np.array(sorted(batch), np.uint64)
        found = table.find(keys)
        assert found.tolist() == [expected.get(key, 0) for key in keys.tolist()]
        new = keys[found == 0]
        numbers = np.arange(1, len(new) + 1, dtype=np.uint32) + len(expected)
        table.insert(new, numbers)
        expected.update(zip(new.tolist(), numbers.tolist()))
    keys = np.array(sorted(expected), np.uint64)
    assert table.find(keys).tolist() == [expected[key] for key in keys.tolist()]

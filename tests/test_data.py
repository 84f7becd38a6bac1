"""Promises of bins and rows: the order is a permutation, bins come back or are refused, rows keep every target."""

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assembly.chats import ChatRows
from core import bins, files
from core.bins import BinWriter, TokenBin
from core.data import BinRows, permute, row_number, step_rows
from core.errors import UserError
from core.files import read_jsonl
from extras.mixture.mix import MixedRows, parse_mix
from model import IGNORE

EOS, VOCAB, SHA = 2, 100, "a" * 64
DOCS = [[1, 5, 6, EOS], [1, 7, EOS], [1, 8, 9, 10, 11, EOS], [EOS], [1, 99, 3, EOS]]


def write_bin(path, docs=DOCS, vocab=VOCAB, sha=SHA):
    with BinWriter(path, vocab, EOS, sha) as out:
        for doc in docs:
            out.add(doc, 3 * len(doc))
    return path


def foreign(path, ids, dtype="<u2"):
    """A bin without sidecar, as other programs write it."""
    np.asarray(ids, dtype).tofile(path)
    return path


def open_bin(path, vocab=VOCAB, sha=SHA, warnings=None):
    return TokenBin(path, vocab, sha, warn=[].append if warnings is None else warnings.append)


def refusal(call):
    with pytest.raises(UserError) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


# The order of the data ------------------------------------------------------------------------------------------------

EDGES = sorted({max(1, 2**k + d) for k in range(12) for d in (-1, 0, 1)})


@pytest.mark.parametrize("n", EDGES)
def test_permute_is_a_bijection_at_and_around_powers_of_two(n):
    assert sorted(permute(k, n, "key") for k in range(n)) == list(range(n))


@given(n=st.integers(1, 700), key=st.text(max_size=5))
def test_permute_is_a_bijection_for_any_size_and_key(n, key):
    assert sorted(permute(k, n, key) for k in range(n)) == list(range(n))


def test_permute_bears_sizes_far_beyond_memory():
    n = 10**15
    images = {permute(k, n, "key") for k in (*range(50), *range(n - 50, n))}
    assert len(images) == 100 and all(0 <= i < n for i in images)
    assert max(images) > n // 2 > min(images)


def test_every_row_is_about_equally_often_at_every_place():
    counts = np.zeros((8, 8))
    for seed in range(800):
        for k in range(8):
            counts[k, row_number(k, 8, seed)] += 1
    assert counts.min() > 50 and counts.max() < 160  # 100 each on average


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 50
    orders = [tuple(row_number(epoch * n + k, n, seed) for k in range(n)) for seed in range(3) for epoch in range(4)]
    assert len(set(orders)) == len(orders) and tuple(range(n)) not in orders


@given(n=st.integers(1, 200), rows=st.integers(1, 7), world=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_every_window_comes_once_per_epoch_whatever_the_batch_and_the_ranks(n, rows, world, seed):
    stream = []
    while len(stream) < 3 * n:
        stream += step_rows(len(stream), rows * world, n, seed)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    # Nothing but k, n and the seed decides: asked one by one, last first, it is the same.
    assert [row_number(k, n, seed) for k in reversed(range(len(stream)))] == stream[::-1]


# Bins: round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab, dtype", [(100, "<u2"), (65536, "<u2"), (65537, "<u4"), (200_000, "<u4")])
def test_a_bin_is_plain_numbers_that_numpy_reads(tmp_path, vocab, dtype):
    docs = [*DOCS, [0, vocab - 1, EOS]]
    path = write_bin(tmp_path / "x.bin", docs, vocab)
    ids = [i for doc in docs for i in doc]
    assert np.fromfile(path, dtype).tolist() == ids
    opened = open_bin(path, vocab)
    assert (opened.tokens, opened.eos_id, opened.text_bytes) == (len(ids), EOS, 3 * len(ids))
    assert opened.read(0, len(ids)).tolist() == ids and opened.read(4, 3).tolist() == ids[4:7]
    assert opened.read(0, len(ids)).dtype == np.int64


def test_the_sidecar_says_what_the_bin_is(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "BLOCK_BYTES", 8)
    path = write_bin(tmp_path / "x.bin")
    about, raw = json.loads((tmp_path / "x.json").read_text()), path.read_bytes()
    blocks = [hashlib.sha256(raw[i : i + 8]).hexdigest() for i in range(0, len(raw), 8)]
    assert about == {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "eos_id": EOS,
        "tokenizer_sha256": SHA,
        "source": "",
        "tokens": 18,
        "documents": 5,
        "text_bytes": 54,
        "sources": {},
        "block_bytes": 8,
        "blocks_sha256": blocks,
    }


def test_the_digest_tells_bins_apart(tmp_path):
    one, same = write_bin(tmp_path / "1.bin"), write_bin(tmp_path / "2.bin")
    other = write_bin(tmp_path / "3.bin", [*DOCS[:-1], [1, 98, 3, EOS]])
    assert open_bin(one).digest == open_bin(same).digest != open_bin(other).digest


@pytest.mark.parametrize("ids", [[VOCAB], [1, -1], [70000], []])
def test_the_writer_takes_no_id_that_would_wrap_around(tmp_path, ids):
    with pytest.raises(AssertionError), BinWriter(tmp_path / "x.bin", VOCAB, EOS, SHA) as out:
        out.add(ids, 1)
    assert list(tmp_path.iterdir()) == []


class Stopped(BaseException):
    """Comes up from anywhere, like a KeyboardInterrupt."""


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("when", ["while adding", "at the fsync", "at the rename", "with no documents"])
def test_a_writer_that_fails_leaves_nothing_behind_and_the_older_bin_intact(tmp_path, monkeypatch, when, older):
    path = tmp_path / "x.bin"
    before = {p.name: p.read_bytes() for p in [write_bin(path), path.with_suffix(".json")]} if older else {}

    def fail(*_):
        raise Stopped

    def write():
        with BinWriter(path, VOCAB, EOS, SHA) as out:
            if when == "with no documents":
                return
            out.add([1, 2], 1)
            if when == "while adding":
                fail()
            monkeypatch.setattr(os, {"at the fsync": "fsync", "at the rename": "replace"}[when], fail)

    with pytest.raises((Stopped, UserError)):
        write()
    monkeypatch.undo()
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert left.pop("x.bin", None) == before.pop("x.bin", None)
    assert left == before or (when == "at the rename" and left == {})


def test_a_new_bin_never_stands_beside_the_sidecar_of_the_old_one(tmp_path, monkeypatch):
    """A bin without a sidecar is checked id by id; one with a wrong sidecar would be trusted."""
    path = write_bin(tmp_path / "x.bin")

    def fail(*_):
        raise Stopped

    monkeypatch.setattr(files, "write_json", fail)
    with pytest.raises(Stopped):
        write_bin(path, [[9, 9, EOS]])
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    assert np.fromfile(path, "<u2").tolist() == [9, 9, EOS]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"名": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"x": float("nan")})

    def half(p):
        p.write_text("half")
        raise Stopped

    with pytest.raises(Stopped):
        files.replace(path, half)
    assert json.loads(path.read_text(encoding="utf-8")) == {"名": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert files.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# Bins: refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sidecar", [True, False])
def test_an_odd_byte_count_is_refused(tmp_path, sidecar):
    path = write_bin(tmp_path / "x.bin") if sidecar else foreign(tmp_path / "x.bin", range(18))
    with open(path, "ab") as f:
        f.write(b"\0")
    assert f"{path}: 37 bytes is not a multiple of 2" in refusal(lambda: open_bin(path))


@pytest.mark.parametrize("size", [0, 2, 18, 34, 1, 35])
def test_a_truncated_bin_is_refused_with_both_lengths(tmp_path, size):
    path = write_bin(tmp_path / "x.bin")
    os.truncate(path, size)
    said = refusal(lambda: open_bin(path))
    if size % 2:
        assert f"{size} bytes is not a multiple of 2" in said
    else:
        assert f"{path}: {size // 2} tokens, x.json says 18" in said


def test_a_longer_bin_than_its_sidecar_says_is_refused(tmp_path):
    path = write_bin(tmp_path / "x.bin")
    with open(path, "ab") as f:
        f.write(b"\1\0")
    assert "19 tokens, x.json says 18" in refusal(lambda: open_bin(path))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9])
def test_a_bin_too_short_for_one_row_is_refused_with_the_minimum(tmp_path, tokens, tail):
    path = foreign(tmp_path / "x.bin", [3] * tokens)
    make = lambda: BinRows(open_bin(path), 8, True, EOS, tail)  # noqa: E731
    if tokens == 9 or (tail and tokens > 1):
        assert len(make()) == 1
    else:
        assert f"{path}: {tokens} tokens, needs at least seq_len + 1 = 9" in refusal(make)


@pytest.mark.parametrize("at", [0, 5, 8, 16])
def test_an_id_out_of_range_is_refused_before_the_model_sees_it(tmp_path, monkeypatch, at):
    """With a sidecar when its row is read, without one when the bin is opened."""
    monkeypatch.setattr(bins, "BLOCK_BYTES", 4)  # the scan takes several pieces
    ids = list(range(1, 18))
    path = write_bin(tmp_path / "x.bin", [ids])
    ids[at] = 4001
    foreign(path, ids)
    said = f"{path}: token {at} is 4001, vocab is 100"
    rows = BinRows(open_bin(path), 4, True, EOS)
    assert said in refusal(lambda: rows.batch(range(len(rows))))
    path.with_suffix(".json").unlink()
    assert said in refusal(lambda: open_bin(path))


def test_a_bin_of_another_tokenizer_is_refused_with_both_hashes(tmp_path):
    path = write_bin(tmp_path / "x.bin")
    said = refusal(lambda: open_bin(path, sha="b" * 64))
    assert str(path) in said and "a" * 12 in said and "b" * 12 in said
    assert open_bin(path, sha="").tokens == 18  # "" skips the check


def test_a_bin_of_a_larger_vocabulary_is_refused_and_of_a_smaller_one_read(tmp_path):
    path = write_bin(tmp_path / "x.bin")
    assert "vocabulary of 100, the model has 99" in refusal(lambda: open_bin(path, vocab=99))
    # Rows of an embedding may be more than the tokenizer's ids; past 65,536 of them the bin stays what it says it is.
    assert open_bin(path, vocab=70_000).read(0, 4).tolist() == DOCS[0]


def test_a_bin_without_sidecar_is_scanned_and_accepted_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "BLOCK_BYTES", 4)  # several pieces
    path, warnings = foreign(tmp_path / "x.bin", [*range(1, 19)]), []
    opened = open_bin(path, warnings=warnings)
    assert len(warnings) == 1 and str(path) in warnings[0] and "x.json" in warnings[0]
    assert (opened.tokens, opened.text_bytes) == (18, 0)
    assert BinRows(opened, 4, False, EOS).text_bytes(2) == 0


def test_a_trusted_bin_is_not_read_whole_but_what_is_read_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "SAMPLE_TOKENS", 4)
    ids = list(range(1, 41))
    ids[20] = 4001
    path, warnings, reads = foreign(tmp_path / "x.bin", ids), [], []
    assert "token 20 is 4001" in refusal(lambda: open_bin(path))
    real = TokenBin.read
    monkeypatch.setattr(TokenBin, "read", lambda self, start, count: reads.append(count) or real(self, start, count))
    rows = BinRows(TokenBin(path, VOCAB, SHA, warnings.append, trust=True), 4, False, EOS)
    assert sum(reads) == 8 and len(warnings) == 1 and "checked only as they are read" in warnings[0]
    assert rows.row(0)[0].tolist() == ids[:4]
    assert f"{path}: token 20 is 4001, vocab is 100" in refusal(lambda: rows.row(5))


def test_the_digest_of_a_trusted_bin_tells_length_and_ends_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "SAMPLE_TOKENS", 4)
    ids = list(range(1, 41))
    digest = lambda ids: TokenBin(foreign(tmp_path / "x.bin", ids), VOCAB, SHA, [].append, trust=True).digest  # noqa: E731
    assert digest(ids) == digest(ids)
    others = [ids[:-1], [99, *ids[1:]], [*ids[:-1], 99], [*ids, *ids], [*ids[:4], *ids[-4:]]]
    assert len({digest(i) for i in (ids, *others)}) == 6
    # Nor is it mistaken for that of a bin that was read to its end, and a refusal to resume shows why.
    assert digest(ids).startswith("sample-") and digest(ids) != open_bin(foreign(tmp_path / "x.bin", ids)).digest


def test_verify_finds_a_hundred_flipped_bits_and_names_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "BLOCK_BYTES", 100)
    path = write_bin(tmp_path / "x.bin", [[3 + k % 90 for k in range(2020)]])  # the last block is not full
    raw, rng = path.read_bytes(), random.Random(0)
    assert open_bin(path).verify() == 41
    for at in [*rng.sample(range(len(raw)), 99), len(raw) - 1]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        first = at // 100 * 100
        said = refusal(lambda: open_bin(path).verify())
        assert f"{path}: damaged in 1 of 41 blocks: block {at // 100} (bytes {first:,} to {first + 99:,})" in said
    path.write_bytes(raw)
    assert open_bin(path).verify() == 41
    path.with_suffix(".json").unlink()
    assert "no x.json beside it" in refusal(lambda: open_bin(path).verify())


def test_wide_ids_are_never_read_as_narrow_ones(tmp_path):
    path = write_bin(tmp_path / "x.bin", [[1, 69_999, EOS]], vocab=70_000)
    assert json.loads((tmp_path / "x.json").read_text())["dtype"] == "uint32"
    assert open_bin(path, vocab=70_000).read(0, 3).tolist() == [1, 69_999, EOS]
    about = json.loads((tmp_path / "x.json").read_text()) | {"dtype": "uint16"}
    (tmp_path / "x.json").write_text(json.dumps(about))
    assert "x.json: vocab_size is 70000, must be 1 to 65536" in refusal(lambda: open_bin(path, vocab=70_000))
    (tmp_path / "x.json").write_text(json.dumps(about | {"vocab_size": VOCAB}))
    assert "6 tokens, x.json says 3" in refusal(lambda: open_bin(path, vocab=70_000))


@pytest.mark.parametrize("name", ["missing.bin", "folder", "folder.bin"])
def test_what_is_not_a_file_is_refused(tmp_path, name):
    if "folder" in name:
        (tmp_path / name).mkdir()
    assert str(tmp_path / name) in refusal(lambda: open_bin(tmp_path / name))


GOOD = {
    "format": 1,
    "dtype": "uint16",
    "tokens": 18,
    "vocab_size": VOCAB,
    "eos_id": EOS,
    "text_bytes": 54,
    "tokenizer_sha256": SHA,
    "blocks_sha256": ["0" * 64],
}
BROKEN = [
    *(({k: v for k, v in GOOD.items() if k != key}, key) for key in GOOD),
    *(
        (GOOD | {key: bad}, key)
        for key in GOOD
        for bad in (None, True, 1.5, {}, "7" if GOOD[key] != "7" else 7)
        if type(bad) is not type(GOOD[key])
    ),
    (GOOD | {"format": 2}, "format"),
    (GOOD | {"format": 0}, "format"),
    (GOOD | {"dtype": "int16"}, "dtype"),
    (GOOD | {"dtype": "float64"}, "dtype"),
    (GOOD | {"dtype": "object"}, "dtype"),
    (GOOD | {"tokens": -18}, "tokens"),
    (GOOD | {"blocks_sha256": [1]}, "blocks_sha256"),
    (GOOD | {"blocks_sha256": ["\ud800"]}, "blocks_sha256"),
    (GOOD | {"text_bytes": -1}, "text_bytes"),
    (GOOD | {"vocab_size": 0}, "vocab_size"),
    (GOOD | {"eos_id": -1}, "eos_id"),
    (GOOD | {"eos_id": VOCAB}, "eos_id"),
    (GOOD | {"tokens": 10**4000}, "tokens"),
    (GOOD | {"vocab_size": 65_537}, "vocab_size"),
    (GOOD | {"blocks_sha256": ["0" * 64] * 2}, "blocks_sha256"),
    *((GOOD | {"block_bytes": bad}, "block_bytes") for bad in (0, -1, "8", True, None, 10**18, 10**4000)),
    *((GOOD | {"sources": bad}, "sources") for bad in ([], "x", {"a": 1}, {"a": {}}, {"a": {"documents": "1"}})),
    ([GOOD], "JSON"),
    (None, "JSON"),
]


@pytest.mark.parametrize("about, key", BROKEN, ids=[f"{i}-{key}" for i, (_, key) in enumerate(BROKEN)])
def test_a_malformed_sidecar_is_refused_with_its_name_and_key(tmp_path, about, key):
    path = write_bin(tmp_path / "x.bin")
    (tmp_path / "x.json").write_text(json.dumps(about))
    said = refusal(lambda: open_bin(path))
    assert "x.json" in said and key in said


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"tokens": ' + b"9" * 5000 + b"}"])
def test_a_sidecar_that_is_not_json_is_refused(tmp_path, raw):
    path = write_bin(tmp_path / "x.bin")
    (tmp_path / "x.json").write_bytes(raw)
    assert "x.json: not valid JSON" in refusal(lambda: open_bin(path))


@settings(max_examples=200)
@given(at=st.integers(0, 400), cut=st.integers(0, 3), put=st.binary(max_size=3))
def test_a_mutated_sidecar_is_read_or_refused_and_nothing_else(at, cut, put):
    with tempfile.TemporaryDirectory() as folder:
        path = write_bin(Path(folder) / "x.bin")
        raw = path.with_suffix(".json").read_bytes()
        at %= len(raw)
        path.with_suffix(".json").write_bytes(raw[:at] + put + raw[at + cut :])
        try:
            assert open_bin(path).tokens == 18
        except UserError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("name", ["三国 演义.bin", "a b/c d.bin", "emoji😀.bin"])
def test_any_path_works_read_only_and_through_a_link(tmp_path, name):
    path = tmp_path / name
    write_bin(path)
    raw = path.read_bytes()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert open_bin(path).read(0, 4).tolist() == DOCS[0]
    finally:
        path.parent.chmod(0o755)
    link = tmp_path / "link.bin"
    link.symlink_to(path)
    assert open_bin(link).read(0, 4).tolist() == DOCS[0] and path.read_bytes() == raw


def test_a_bin_cut_short_while_in_use_is_told(tmp_path):
    path = write_bin(tmp_path / "x.bin")
    rows = BinRows(open_bin(path), 4, True, EOS)
    os.truncate(path, 20)
    assert rows.row(0)[0].tolist() == [1, 5, 6, EOS]
    assert "cut short at token 10" in refusal(lambda: rows.row(2))


def test_a_bin_replaced_while_in_use_stays_the_one_that_was_opened(tmp_path):
    path = write_bin(tmp_path / "x.bin")
    rows = BinRows(open_bin(path), 4, True, EOS)
    before = [rows.row(i)[0].tolist() for i in range(len(rows))]
    write_bin(path, [[9] * 40])
    assert [rows.row(i)[0].tolist() for i in range(len(rows))] == before


# Rows of a bin --------------------------------------------------------------------------------------------------------


def naive_rows(tokens, seq_len, docs, tail):
    """ids, targets and document numbers, token by token."""
    rows = []
    for start in range(0, len(tokens) - 1, seq_len):
        ids, targets, numbers, number = [], [], [], 0
        for j in range(start, start + seq_len):
            real = j + 1 < len(tokens)
            ids.append(tokens[j] if real else EOS)
            targets.append(tokens[j + 1] if real and not (docs and tokens[j] == EOS) else IGNORE)
            numbers.append(number)
            number += ids[-1] == EOS
        if start + seq_len < len(tokens) or tail:
            rows.append((ids, targets, numbers if docs else None))
    return rows


@given(
    tokens=st.lists(st.sampled_from([EOS, EOS, 1, 5, 6, 7, 8]), min_size=2, max_size=60),
    seq_len=st.integers(1, 20),
    docs=st.booleans(),
    tail=st.booleans(),
)
def test_rows_of_a_bin_equal_a_naive_loop_over_its_tokens(tokens, seq_len, docs, tail):
    expected = naive_rows(tokens, seq_len, docs, tail)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_bin(foreign(Path(folder) / "x.bin", tokens))
        if not expected:
            refusal(lambda: BinRows(opened, seq_len, docs, EOS, tail))
            return
        rows = BinRows(opened, seq_len, docs, EOS, tail)
        got = [tuple(None if part is None else part.tolist() for part in rows.row(i)) for i in range(len(rows))]
    assert got == expected


def test_a_batch_is_its_rows_and_counts_its_targets(tmp_path):
    rows = BinRows(open_bin(write_bin(tmp_path / "x.bin")), 5, True, EOS, tail=True)
    made = rows.batch([2, 0, 3])
    for at, i in enumerate([2, 0, 3]):
        assert all(
            torch.equal(t[at].long(), torch.from_numpy(part))
            for t, part in zip((made.ids, made.targets, made.docs), rows.row(i))
        )
    assert made.ids.dtype == made.targets.dtype == torch.int64 and made.docs.dtype == torch.int32
    assert made.rows == [2, 0, 3]
    assert made.count == sum(t != IGNORE for row in made.targets.tolist() for t in row)
    assert BinRows(rows.bin, 5, False, EOS).batch([0]).docs is None
    assert str(rows.bin.path) in rows.where(2) and "10 to 15" in rows.where(2)


def test_validation_leaves_no_target_out_and_training_says_how_many(tmp_path):
    opened = open_bin(write_bin(tmp_path / "x.bin"))
    whole, cut = BinRows(opened, 5, False, EOS, tail=True), BinRows(opened, 5, False, EOS)
    assert whole.batch(range(len(whole))).count == 17 and cut.batch(range(len(cut))).count == 15
    assert "2 tokens at the end left out" in cut.describe()
    assert "0 tokens at the end left out" in whole.describe()


# Chats ----------------------------------------------------------------------------------------------------------------

CHAT = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(3, 90), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda m: any(m[1:])),
    )
)


def alone(ids, mask):
    """What one sample is to be trained on: (inputs, targets)."""
    return ids[:-1], [t if m else IGNORE for t, m in zip(ids[1:], mask[1:])]


@given(chats=st.lists(CHAT, min_size=1, max_size=12), room=st.integers(0, 10), pack=st.booleans())
def test_packing_loses_no_chat_splits_none_and_keeps_every_mask(chats, room, pack):
    seq_len = max(len(ids) for ids, _ in chats) - 1 + room
    rows = ChatRows([(ids, mask, f"f:{i}") for i, (ids, mask) in enumerate(chats, 1)], seq_len, 0, pack)
    found = []
    for i in range(len(rows)):
        ids, targets, docs = (part.tolist() for part in rows.row(i))
        assert len(ids) == len(targets) == len(docs) == seq_len
        numbers = list(dict.fromkeys(docs))
        assert numbers == sorted(numbers) and docs == sorted(docs)
        for number in numbers:
            at = [j for j in range(seq_len) if docs[j] == number]
            part = [ids[j] for j in at], [targets[j] for j in at]
            if part[0][0] == 0:  # padding: a document of its own, of pad ids, without a target
                assert set(part[0]) == {0} and set(part[1]) == {IGNORE} and at[-1] == seq_len - 1
            else:
                found.append(part)
    assert found == [alone(ids, mask) for ids, mask in chats]
    needs, filled = [len(ids) - 1 for ids, _ in chats], [0]
    for need in needs:  # in order, a new row only where the next chat does not fit
        if filled[-1] + need > seq_len:
            filled.append(0)
        filled[-1] += need
    assert len(rows) == (len(filled) if pack else len(chats))


@given(chats=st.lists(CHAT, min_size=1, max_size=12), pad=st.integers(3, 90))
def test_padding_is_told_by_its_place_and_not_by_its_id(chats, pad):
    """The id that fills a row may well stand in chats, and be trained on there."""
    seq_len = max(len(ids) for ids, _ in chats) + 3
    rows = ChatRows([(ids, mask, "f:1") for ids, mask in chats], seq_len, pad, pack=False)
    for i, (ids, mask) in enumerate(chats):
        found = [part.tolist() for part in rows.row(i)]
        inputs, targets = alone(ids, mask)
        rest = seq_len - len(inputs)
        assert found == [inputs + [pad] * rest, targets + [IGNORE] * rest, [0] * len(inputs) + [1] * rest]


def test_chats_that_fit_share_a_row():
    chat = ([5, 6, 7], [0, 1, 1], "f:1")  # two positions each
    assert len(ChatRows([chat] * 6, 4, 0)) == 3 and len(ChatRows([chat] * 6, 5, 0)) == 3
    assert len(ChatRows([chat] * 6, 12, 0)) == 1 and len(ChatRows([chat] * 6, 12, 0, pack=False)) == 6


def test_the_digest_tells_chats_and_masks_apart():
    digest = lambda ids, mask: ChatRows([(ids, mask, "f:1")], 8, 0).digest  # noqa: E731
    assert digest([5, 6, 7], [0, 1, 1]) == digest([5, 6, 7], [0, 1, 1])
    assert len({digest([5, 6, 7], [0, 1, 1]), digest([5, 6, 7], [0, 0, 1]), digest([5, 6, 8], [0, 1, 1])}) == 3


def test_no_chats_are_refused_and_a_row_says_where_its_chats_stood():
    assert "no chats" in refusal(lambda: ChatRows([], 8, 0))
    rows = ChatRows([([5, 6], [0, 1], "f.jsonl:3"), ([5, 6], [0, 1], "f.jsonl:4")], 8, 0)
    assert rows.where(0).startswith("f.jsonl:3")


# JSONL ----------------------------------------------------------------------------------------------------------------


def jsonl(tmp_path, raw):
    path = tmp_path / "对话 a.jsonl"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


def test_lines_come_with_their_file_and_number(tmp_path):
    path = jsonl(tmp_path, '\ufeff{"a": 1}\r\n\n  \n{"b": "一\u2028二"}\n{"c": null}')
    numbered = [(1, {"a": 1}), (4, {"b": "一\u2028二"}), (5, {"c": None})]
    assert list(read_jsonl(path)) == [(f"{path}:{number}", value) for number, value in numbered]
    assert list(read_jsonl(jsonl(tmp_path, ""))) == []


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"{'a': 1}",
        b"[1]",
        b"3",
        b'"x"',
        b"null",
        b'{"a": 1} {"b": 2}',
        b'{"a": "\xff"}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        "{“a”: 1}".encode(),
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path, line):
    path = jsonl(tmp_path, b'{"a": 1}\n\n' + line + b"\n")
    assert refusal(lambda: list(read_jsonl(path))).startswith(f"{path}:3: not a JSON ")


def test_a_missing_file_and_a_folder_of_chats_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert refusal(lambda p=path: list(read_jsonl(p))).startswith(f"{path}: ")


# Mixtures -------------------------------------------------------------------------------------------------------------


def mixture(tmp_path, sizes, shares):
    parts = []
    for n, size in enumerate(sizes):
        path = write_bin(tmp_path / f"{n}.bin", [[10 * (n + 1) + k % 10 for k in range(size * 4 + 1)]])
        parts.append(BinRows(open_bin(path), 4, docs=False, eos_id=EOS))
    return parts, MixedRows(parts, shares)


@pytest.mark.parametrize(
    "sizes, shares, counts",
    [
        ([6, 3], None, [6, 3]),
        ([6, 3], [1, 1], [6, 6]),
        ([6, 3], [1, 3], [6, 18]),
        ([2, 9], [0.7, 0.3], [21, 9]),
        ([5, 5, 5], [2, 1, 1], [10, 5, 5]),
    ],
)
def test_a_mixture_shows_every_row_and_each_bin_in_its_share(tmp_path, sizes, shares, counts):
    parts, mixed = mixture(tmp_path, sizes, shares)
    assert len(mixed) == sum(counts)
    seen = [[] for _ in sizes]
    for i in range(len(mixed)):
        ids, targets, _ = mixed.row(i)
        part = int(ids[0]) // 10 - 1
        (at,) = [
            k
            for k in range(sizes[part])
            if (parts[part].row(k)[0] == ids).all() and f"tokens {k * 4} to" in mixed.where(i)
        ]
        assert (parts[part].row(at)[1] == targets).all()
        seen[part].append(at)
    assert [len(rows) for rows in seen] == counts
    assert all(set(rows) == set(range(size)) for rows, size in zip(seen, sizes))
    assert all(max(map(rows.count, rows)) - min(map(rows.count, rows)) <= 1 for rows in seen)


def test_a_mixture_with_other_shares_is_another_run(tmp_path):
    digests = {mixture(tmp_path, [6, 3], shares)[1].digest for shares in (None, [1, 1], [1, 2])}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "entries, wanted",
    [
        (["a.bin"], (["a.bin"], None)),
        (["a.bin:0.7", "b.bin:.3"], (["a.bin", "b.bin"], [0.7, 0.3])),
        (["C:\\x.bin:2", "C:\\y.bin:1"], (["C:\\x.bin", "C:\\y.bin"], [2, 1])),
        (["C:\\x.bin"], (["C:\\x.bin"], None)),
    ],
)
def test_shares_stand_behind_the_path(entries, wanted):
    assert parse_mix(entries) == wanted


@pytest.mark.parametrize(
    "entries, message",
    [
        (["a.bin:1", "b.bin"], "all or none"),
        (["a.bin:0", "b.bin:1"], "none is 0"),
        (["a.bin", "./a.bin"], "named twice"),
        ([], "empty"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(entries, message):
    with pytest.raises(UserError, match=message):
        parse_mix(entries)

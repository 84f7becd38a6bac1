"""Promises of vocabulary.py prune and inspect, and of what follows a pruned vocabulary: what is kept stays reachable, texts come back, sizes
are exact, bins and models follow."""

import dataclasses
import io
import itertools
import json
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import ANY_TEXT, BOOK, DATA, HARD, RELAXED, change, real_model, real_texts

from assembly.models import load_model
from core import bins, hf_folder
from core.errors import UserError
from extras.vocabulary import inspect, prune, remap, remap_model
from model import ModelConfig
from tokenizer import TokenizerError, load
from tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, USER_DEFINED, Piece, parse_model
from tokenizer.sentencepiece_writer import write_model

ROOT = Path(__file__).resolve().parents[1]
CHATGLM = "chatglm2-6b.tokenizer.model"


def processor_of(model):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(write_model(model))
    return processor


def without_changes_to_text(model):
    return change(model, normalizer=(*(f for f in model.normalizer if f[0] not in (2, 3, 4)), (3, 0, 0), (4, 0, 0)))


@pytest.fixture(scope="session")
def unigram(tmp_path_factory):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in BOOK for line in text.splitlines()),
        model_writer=out,
        vocab_size=440,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return load(path)


@pytest.fixture(params=["small", "small_with_prefix", "unigram"])
def tok(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def chatglm():
    return load(real_model(CHATGLM))


def loaded(model, folder):
    path = folder / "tokenizer.model"
    path.write_bytes(write_model(model))
    return load(path)


def counts_of(tok, texts):
    return inspect.fit(tok, texts).counts


# Reachability ---------------------------------------------------------------------------------------------------------


def test_parts_are_what_sentencepiece_writes_when_the_piece_is_missing(tok):
    model = without_changes_to_text(tok.model)
    parts = prune.parts_of(model)
    for i, piece in enumerate(model.pieces):
        if piece.type == NORMAL:
            rest = change(model, pieces=model.pieces[:i] + model.pieces[i + 1 :])
            ids = [k + (k >= i) for k in processor_of(rest).encode(piece.text)]
            assert parts[i] == tuple(ids), piece.text
        else:
            assert parts[i] == ()


def test_parts_keep_user_defined_pieces_whole(small):
    pieces = [p._replace(type=USER_DEFINED) if p.text == "天下" else p for p in small.model.pieces]
    assert any(p.type == USER_DEFINED for p in pieces)
    pieces.append(Piece("天下大", -1e6))  # no text is encoded to it: what is user-defined is never merged
    model = change(small.model, pieces=pieces)
    lost = [i for i, p in enumerate(pieces) if "天下" in p.text and p.text != "天下"]
    assert inspect.unreachable(model) == lost and not any(prune.parts_of(model)[i] for i in lost)
    kept = prune.choose(model, ["han"])
    assert not set(lost) & set(kept) and {i for i, p in enumerate(pieces) if p.type == USER_DEFINED} <= set(kept)


@pytest.mark.parametrize("name", [CHATGLM, "llama2-32k.tokenizer.model"])
def test_parts_of_real_models_are_those_of_sentencepiece(name):
    model = without_changes_to_text(load(real_model(name)).model)
    parts = prune.parts_of(model)
    lost = [i for i, p in enumerate(model.pieces) if p.type == NORMAL and not parts[i]]
    assert lost == inspect.unreachable(model)
    for i in random.Random(0).sample(range(300, len(model.pieces)), 12):
        if parts[i]:
            rest = change(model, pieces=model.pieces[:i] + model.pieces[i + 1 :])
            assert parts[i] == tuple(k + (k >= i) for k in processor_of(rest).encode(model.pieces[i].text))


def test_a_piece_that_no_text_reaches_is_found_and_left_out(small):
    # Its characters merge into 天下 + 大 whatever the score: the pair 下大 does not exist.
    model = change(small.model, pieces=[*small.model.pieces, Piece("天下大势分", -1e6)])
    last = len(model.pieces) - 1
    assert inspect.unreachable(small.model) == [] and inspect.unreachable(model) == [last]
    assert last not in prune.choose(model, ["han"])


@settings(RELAXED, max_examples=60)
@given(draw=st.data())
def test_any_choice_leaves_no_piece_out_of_reach_and_every_text_comes_back(tok, draw, tmp_path_factory):
    classes = sorted(set().union(*(inspect.char_classes(p.text) for p in tok.model.pieces if p.type == NORMAL)))
    keep = draw.draw(st.sets(st.sampled_from(classes)))
    words = draw.draw(st.sets(st.integers(0, tok.vocab_size - 1), max_size=40))
    must = prune.choose(tok.model, keep, words)
    size = draw.draw(st.just(0) | st.integers(len(must), tok.vocab_size))
    counts = counts_of(tok, draw.draw(st.sampled_from([BOOK[:1], BOOK[1:3], BOOK])))
    kept = prune.choose(tok.model, keep, words, size, counts)
    assert kept == sorted(set(kept)) and set(must) <= set(kept) and words <= set(kept)
    assert len(kept) == (size or len(must))
    new = loaded(prune.pruned(tok.model, kept), tmp_path_factory.mktemp("pruned"))
    assert inspect.unreachable(new.model) == []
    new_ids = {old: n for n, old in enumerate(kept)}
    for text in [*HARD, *BOOK[:5], draw.draw(ANY_TEXT)]:
        old_row, row = tok.encode(text), new.encode(text)
        assert new.decode(row) == text
        if set(old_row) <= set(kept):  # all that it needs is there: it is written as before
            assert row == [new_ids[i] for i in old_row]


# What stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "char, wanted",
    [
        ("A", "latin"),
        ("é", "latin-extended"),
        ("Ａ", "fullwidth"),
        ("１", "digits"),
        ("7", "digits"),
        ("，", "punct"),
        ("国", "han"),
        ("國", "han-traditional"),
        ("灣", "han-traditional"),
        ("人", "han"),
        ("〇", "han"),
        ("𠀀", "han"),
        ("㐀", "han"),
        ("の", "kana"),
        ("ー", "kana"),
        ("한", "hangul"),
        ("ж", "cyrillic"),
        ("😀", "symbols"),
        ("▁", "space"),
        (" ", "space"),
        ("\n", "space"),
        ("\u200d", "marks"),
        ("\u0301", "marks"),
        ("ㄅ", "bopomofo"),
    ],
)
def test_characters_have_the_class_that_a_reader_expects(char, wanted):
    assert inspect.char_class(char) == wanted


def test_rule_mode_keeps_what_its_classes_are_made_of_and_nothing_else(small):
    kept = {small.model.pieces[i].text for i in prune.choose(small.model, ["han"])}
    for piece in small.model.pieces:
        chars = set(piece.text) - {"▁"}
        if (
            piece.type != NORMAL
            or (len(piece.text) == 1 and piece.text.isascii())
            or all("一" <= c <= "龥" for c in chars)
        ):
            assert piece.text in kept
        else:
            assert piece.text not in kept or len(piece.text) == 1, piece.text
    assert "fox" not in kept and "f" in kept and "天下" in kept and "，" not in kept


def test_without_byte_fallback_every_character_stays(tmp_path):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BOOK), model_writer=out, vocab_size=136, model_type="unigram", minloglevel=2
    )
    tok = loaded(parse_model(out.getvalue()), tmp_path)
    chars = [i for i, p in enumerate(tok.model.pieces) if len(p.text) == 1]
    assert set(chars) <= set(prune.choose(tok.model)) and len(prune.choose(tok.model)) < tok.vocab_size
    new = loaded(prune.pruned(tok.model, prune.choose(tok.model)), tmp_path)
    assert new.decode(new.encode(BOOK[0])) == tok.decode(tok.encode(BOOK[0]))


def test_what_the_text_needs_most_stays_about_as_well_as_trying_every_piece_would_find(small):
    """Oracle: drop one piece at a time, each time the one whose absence, tried out, costs the text least."""
    texts = [*BOOK[:2], "天下大势天下大势，分久必合。fox fox fox dog"]
    tok = small
    must = prune.choose(tok.model, ["latin", "punct", "digits"])
    size = len(must) + 12
    best = prune.choose(tok.model, ["latin", "punct", "digits"], np.flatnonzero(counts_of(tok, texts)).tolist())

    def tokens(kept):
        return sum(map(len, processor_of(prune.pruned(tok.model, sorted(kept))).encode(texts)))

    assert tokens(best) == tokens(range(tok.vocab_size)) and len(best) > size + 20

    def needed(i, kept):
        """Would another piece be out of reach, or lack one of its characters?"""
        others = prune.pruned(tok.model, [k for k in kept if k != i])
        text = tok.model.pieces[i].text
        return inspect.unreachable(others) or (len(text) == 1 and any(text in p.text for p in others.pieces))

    while len(best) > size:
        tried = [(tokens([k for k in best if k != i]), i) for i in best if i not in must and not needed(i, best)]
        best.remove(min(tried)[1])
    ours = prune.choose(tok.model, ["latin", "punct", "digits"], size=size, counts=counts_of(tok, texts))
    assert tokens(ours) <= tokens(best) * 1.05 < tokens(must)


def test_the_count_of_a_dropped_piece_passes_to_its_parts(small):
    ids = {p.text: i for i, p in enumerate(small.model.pieces)}
    counts = np.zeros(small.vocab_size, int)
    counts[ids["天下"]], counts[ids["春"]] = (
        10,
        6,
    )  # written 天 + 下 the first costs 10 tokens more, in bytes the other 12
    must = prune.choose(small.model)
    assert not {ids["天下"], ids["天"], ids["下"], ids["春"]} & set(must)
    for room, stays in ((4, ["天下", "天", "下", "春"]), (3, ["天", "下", "春"]), (2, ["天", "下"])):
        kept = prune.choose(small.model, size=len(must) + room, counts=counts)
        assert set(kept) - set(must) == {ids[text] for text in stays}


def test_words_of_a_list_cost_no_more_tokens_than_before(small, tmp_path):
    (tmp_path / "words.txt").write_text("fox\n laughs \n\n天下大势\n", encoding="utf-8")
    words = prune.words_of(str(tmp_path / "words.txt"), small)
    new = loaded(prune.pruned(small.model, prune.choose(small.model, [], words)), tmp_path)
    for text in ("fox", " fox", "laughs", " laughs", "天下大势", " 天下大势"):
        assert len(new.encode(text)) == len(small.encode(text))
    assert len(new.encode("lazy dog")) > len(small.encode("lazy dog"))


def test_order_scores_settings_and_ids_of_specials_survive(small, unigram):
    for tok in (small, unigram):
        # Another order: the special ids move when pieces before them go.
        pieces = [p for p in tok.model.pieces if p.type == NORMAL] + [p for p in tok.model.pieces if p.type != NORMAL]
        ids = {p.text: i for i, p in enumerate(pieces)}
        special = {40: ids["<unk>"], 41: ids["<s>"], 42: ids["</s>"]}
        trainer = (*(f for f in tok.model.trainer if f[0] not in special), *((n, 0, i) for n, i in special.items()))
        model = parse_model(write_model(change(tok.model, pieces=pieces, trainer=trainer)))
        new = prune.pruned(model, prune.choose(model, ["han"]))
        assert len(new.pieces) < len(model.pieces)
        assert [p for p in model.pieces if p in set(new.pieces)] == new.pieces
        assert (new.normalizer, new.rest) == (model.normalizer, model.rest)
        assert [f for f in new.trainer if f[0] > 43 or f[0] < 40] == [f for f in trainer if f[0] > 43 or f[0] < 40]
        again = parse_model(write_model(new))  # refuses settings that name other ids than the pieces do
        assert (again.pieces[again.bos_id].text, again.pieces[again.eos_id].text) == ("<s>", "</s>")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep": ["klingon"]}, "keep klingon: this vocabulary has .*han"),
        ({"size": 100}, r"size 100: what must stay has \d+ pieces, all that can be reached 600"),
        ({"size": 601}, r"size 601: .* 600"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_the_numbers(small, arguments, message):
    with pytest.raises(TokenizerError, match=message):
        prune.choose(small.model, **arguments, counts=np.zeros(600))


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_map_gives_every_old_id_the_bytes_it_had(tok, tmp_path):
    new = prune.save(prune.pruned(tok.model, prune.choose(tok.model, ["han"])), tok, tmp_path / "out")
    found = json.loads((tmp_path / "out/id_map.json").read_text())
    assert (found["from_sha256"], found["to_sha256"]) == (tok.sha256, new.sha256)
    assert len(found["ids"]) == tok.vocab_size
    for old, entry in zip(tok.model.pieces, found["ids"]):
        if isinstance(entry, int):
            assert new.model.pieces[entry].text == old.text
        else:
            assert b"".join(new._backend.id_bytes[i] for i in entry) == old.text.replace("▁", " ").encode()
    assert {e for e in found["ids"] if isinstance(e, int)} == set(range(new.vocab_size))


def test_a_folder_with_another_tokenizer_is_left_alone(small, tmp_path):
    first = prune.pruned(small.model, prune.choose(small.model, ["han"]))
    prune.save(first, small, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    prune.save(first, small, tmp_path)  # the same again is no harm
    with pytest.raises(TokenizerError, match="another tokenizer is there already"):
        prune.save(prune.pruned(small.model, prune.choose(small.model)), small, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_transformers_gives_the_same_ids_after_pruning(small_with_prefix, tmp_path):
    transformers = pytest.importorskip("transformers")
    new = prune.save(
        prune.pruned(small_with_prefix.model, prune.choose(small_with_prefix.model, ["latin"])),
        small_with_prefix,
        tmp_path,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [t for t in [*HARD, *BOOK[:5]] if "<" not in t]:
        assert theirs(text).input_ids == new.encode(text, bos=True)


# Bins -----------------------------------------------------------------------------------------------------------------


def write_bin(path, tok, texts):
    with bins.BinWriter(path, tok.vocab_size, tok.eos_id, tok.sha256, "texts") as out:
        for chunk in tok.encode_chunks(texts, bos=True, eos=True):
            out.add(chunk.ids, chunk.text_bytes, len(chunk.sizes))
    return path


@pytest.fixture
def half(tok, tmp_path):
    """A pruned vocabulary in which about half of the book's words are gone."""
    kept = prune.choose(tok.model, [], size=len(prune.choose(tok.model)) + 60, counts=counts_of(tok, BOOK[:1]))
    return prune.save(prune.pruned(tok.model, kept), tok, tmp_path / "half")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_remapped_bin_is_the_bin_of_the_texts_encoded_anew(tok, half, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(remap, "BLOCK_TOKENS", 500)  # so that documents reach over blocks, and blocks over documents
    texts = [*HARD, *BOOK, "分久必合" * 500, *HARD]
    old, anew = write_bin(tmp_path / "old.bin", tok, texts), write_bin(tmp_path / "anew.bin", half, texts)
    remap.remap_bin(old, tmp_path / "new.bin", tok, half, processes)
    assert (tmp_path / "new.bin").read_bytes() == anew.read_bytes() != old.read_bytes()
    about, wanted = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("new", "anew"))
    assert about.pop("source") == "texts, pruned" and wanted.pop("source") == "texts"
    assert about == wanted


def test_a_foreign_bin_keeps_its_frame_and_its_broken_bytes(small, tmp_path, capsys):
    """Documents with eos only, a chat in the middle, one cut inside a character, an unknown id, no end."""
    half = prune.save(prune.pruned(small.model, prune.choose(small.model)), small, tmp_path / "half")
    texts = ["天下大势", "haha fox", "分久", "dog", "合久"]
    cut = small.encode("天𠀀")[:-2]  # the last character without its last two bytes
    before = [
        *small.encode(texts[0]),
        2,
        *small.encode(texts[1]),
        1,
        *small.encode(texts[2]),
        2,
        *cut,
        2,
        *cut[-1:],
        *small.encode(texts[3], continues=True),
        2,
        0,
        *small.encode(texts[4]),
    ]
    np.array(before, np.uint16).tofile(tmp_path / "old.bin")
    remap.remap_bin(tmp_path / "old.bin", tmp_path / "new.bin", small, half)
    found = np.fromfile(tmp_path / "new.bin", np.uint16).tolist()
    e = half.encode
    wanted = [
        *e(texts[0]),
        2,
        *e(texts[1]),
        1,
        *e(texts[2]),
        2,
        *e("天"),
        *e("𠀀")[:2],
        2,
        e("𠀀")[1],
        *e(texts[3], continues=True),
        2,
        0,
        *e(texts[4]),
    ]
    assert found == wanted
    out = capsys.readouterr().out
    assert "5 documents" in out and "2 texts with bytes that are no UTF-8" in out


def test_bins_that_do_not_fit_are_refused_and_nothing_is_written(small, unigram, tmp_path):
    half = prune.save(prune.pruned(small.model, prune.choose(small.model)), small, tmp_path / "half")
    old = write_bin(tmp_path / "old.bin", unigram, BOOK)
    with pytest.raises(UserError, match="made with tokenizer"):
        remap.run(small, half, tmp_path / "half", [str(old)], [], 1, load_model)
    np.array([1, 700, 2], np.uint16).tofile(tmp_path / "foreign.bin")
    with pytest.raises(UserError, match="token 1 is 700, vocab is 600"):
        remap.run(small, half, tmp_path / "half", [str(tmp_path / "foreign.bin")], [], 1, load_model)
    plain = change(small.model, normalizer=(*small.model.normalizer, (4, 0, 1)))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="does not give texts back exactly"):
        remap.remap_bin(old, tmp_path / "x.bin", loaded(plain, tmp_path / "other"), half)
    assert not list((tmp_path / "half").glob("*.bin")) and not (tmp_path / "x.bin").exists()
    (tmp_path / "half/old.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match="would be written over"):
        remap.run(unigram, half, tmp_path / "half", [str(old)], [], 1, load_model)
    with pytest.raises(UserError, match="would be written over"):
        remap.run(unigram, half, tmp_path / "half", ["a/x.bin", "b/x.bin"], [], 1, load_model)
    assert (tmp_path / "half/old.bin").read_bytes() == b"precious"


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_remapped_model_gives_the_kept_ids_the_logits_they_had(small, make_model, tmp_path, tied, capsys):
    config = ModelConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = make_model(config)  # 40 rows more than the tokenizer has ids: sizes are often rounded up
    hf_folder.save_model(tmp_path / "old", model, small, {"chat_format": "chatml", "step": 7})
    kept = prune.choose(small.model, ["han"])
    new = prune.save(prune.pruned(small.model, kept), small, tmp_path / "new")
    remap.run(small, new, tmp_path / "new", [], [str(tmp_path / "old")], 1, load_model)
    smaller = load_model(tmp_path / "new/old")
    assert smaller.config == dataclasses.replace(config, vocab_size=len(kept))
    assert load(tmp_path / "new/old").sha256 == new.sha256
    about = hf_folder.load_about(tmp_path / "new/old")
    assert about["chat_format"] == "chatml" and about["pruned_from_tokenizer"] == small.sha256
    ids = torch.randint(len(kept), (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(torch.tensor(kept)[ids])[..., kept]
        assert torch.allclose(smaller(ids), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="its tokenizer is"):
        remap_model.remap_model(tmp_path / "old", tmp_path / "x", new, new, load_model)


# The commands ---------------------------------------------------------------------------------------------------------


def command(*args):
    return subprocess.run([sys.executable, "vocabulary.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT)


LOADED = """
import sys
import vocabulary
from core import errors
try:
    errors.run(vocabulary.main)
finally:
    print("loaded:", *sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("word", ["train", "inspect", "prune"])
def test_no_word_loads_torch_where_no_model_is_remapped(small, files, word):
    args = {
        "train": ["--input", files / "book.txt", "--output", files / "out", "--vocab_size", 600],
        "inspect": ["--tokenizer", small.path, "--text", files / "book.txt"],
        "prune": ["--input", small.path, "--output", files / "out", "--remap_bin", files / "train.bin"],
    }[word]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, word, *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split("loaded:")[1].split()
    assert {"vocabulary", "tokenizer", "sentencepiece"} <= set(loaded) and not {"torch", "model"} & set(loaded)


@pytest.mark.parametrize("word", ["", "prunes"])
def test_another_word_is_refused_with_the_three_that_there_are(word):
    done = command(*filter(None, [word]))
    assert done.returncode == 2 and done.stderr == (
        f"error: {word or 'nothing'}: no such word -- python vocabulary.py train or inspect or prune\n"
    )


def test_help_shows_the_options_of_every_word_or_of_one():
    everything, one = command("--help").stdout, command("prune", "--help").stdout
    assert all(f"class {name}Config" in everything for name in ("Vocabulary", "Inspect", "Prune"))
    assert "How pieces stay reachable" in one and "class PruneConfig" in one and "InspectConfig" not in one


@pytest.fixture
def files(small, tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(BOOK), encoding="utf-8")
    (tmp_path / "words.txt").write_text("fox\n", encoding="utf-8")
    write_bin(tmp_path / "train.bin", small, BOOK)
    return tmp_path


def test_the_command_prunes_reports_and_remaps(small, files):
    done = command(
        "prune",
        "--input",
        small.path,
        "--output",
        files / "out",
        "--size",
        450,
        "--keep",
        "punct",
        "--keep_words",
        files / "words.txt",
        "--corpus",
        files / "book.txt",
        files / "words.txt",
        "--remap_bin",
        files / "train.bin",
    )
    assert done.returncode == 0, done.stderr
    new = load(files / "out")
    found = json.loads((files / "out/report.json").read_text())
    assert new.vocab_size == 450 == found["pieces"]["after"] and found["unreachable"] == {"before": 0, "after": 0}
    assert sum(c["after"] for c in found["classes"].values()) == 450
    assert sum(c["before"] for c in found["classes"].values()) == 600
    assert found["parameters_saved"]["768"] == {"tied": 150 * 768, "untied": 300 * 768}
    lines = (files / "book.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    for when, tok in (("before", small), ("after", new)):
        ratio = sum(map(len, lines)) / sum(len(tok.encode(line)) for line in lines)
        assert found["chars_per_token"][str(files / "book.txt")][when] == pytest.approx(ratio, abs=1e-5)
    anew = write_bin(files / "anew.bin", new, BOOK)
    assert (files / "out/train.bin").read_bytes() == anew.read_bytes()
    assert "600 -> 450 pieces; out of reach 0 -> 0" in done.stdout
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "id_map.json", "report.json"} <= {
        p.name for p in (files / "out").iterdir()
    }


@pytest.mark.parametrize(
    "args, message",
    [
        (["--output", "x"], "input and output must be given"),
        (["--size", 400], "size needs a corpus"),
        (["--keep", "klingon"], "keep klingon"),
        (["--corpus", "missing.txt"], "missing.txt: No such file"),
        (["--corpus", "train.bin"], "not UTF-8"),
        (["--kep", "han"], "did you mean keep"),
        (["--remap_bin", "missing.bin"], "missing.bin"),
        (["--remap_model", "."], "no model in this folder"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(small, files, args, message):
    given_input = [] if args[0] == "--output" else ["--input", small.path, "--output", files / "out"]
    args = [files / a if str(a).endswith((".txt", ".bin")) or a == "." else a for a in args]
    done = command("prune", *given_input, *args)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_inspect_shows_tokenizers_side_by_side(small, unigram, files):
    small.save(files / "saved")
    done = command(
        "inspect",
        "--tokenizer",
        small.path,
        unigram.path,
        files / "saved/tokenizer.json",
        "--text",
        files / "book.txt",
        "--find",
        "天下大势",
        "--pieces",
        2,
    )
    assert done.returncode == 0, done.stderr
    lines = (files / "book.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    for tok, kind in ((small, "BPE"), (unigram, "unigram")):
        assert f"sha256 {tok.sha256}" in done.stdout and f"{kind}, byte fallback on" in done.stdout
        ratio = sum(map(len, lines)) / sum(len(tok.encode(line)) for line in lines)
        assert f"{ratio:.4f} characters each" in done.stdout
        assert f"{tok.path}: {len(tok.encode('天下大势'))} tokens" in done.stdout
    assert "only .model files" in done.stdout
    assert command("inspect", "--tokenizer", files).returncode == 2


# The real ChatGLM2 vocabulary -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rule(chatglm, tmp_path_factory):
    began = time.monotonic()
    new = prune.save(
        prune.pruned(chatglm.model, prune.choose(chatglm.model, prune.CHINESE)),
        chatglm,
        tmp_path_factory.mktemp("rule"),
    )
    prune.report(chatglm, new, {})
    print(f"pruning, files and report: {time.monotonic() - began:.1f} s")
    return new


@pytest.fixture(scope="session")
def seed_size(chatglm, tmp_path_factory):
    """35,203 pieces: both scripts, and what real texts need."""
    counts = counts_of(chatglm, real_texts(4000))
    kept = prune.choose(chatglm.model, ["han-traditional"], size=35203, counts=counts)
    return prune.save(prune.pruned(chatglm.model, kept), chatglm, tmp_path_factory.mktemp("seed"))


def test_rule_mode_on_chatglm_keeps_letters_digits_and_both_scripts(chatglm, rule):
    kept = {p.text for p in rule.model.pieces}
    for piece in chatglm.model.pieces:
        if (
            piece.type in (CONTROL, BYTE)
            or (len(piece.text) == 1 and " " <= piece.text <= "~")
            or (piece.type == NORMAL and all("一" <= c <= "\u9fff" for c in piece.text))
        ):
            assert piece.text in kept
    assert inspect.unreachable(rule.model) == [] and rule.vocab_size < 34000
    assert {"臺灣", "國語", "中国", "A", "z", "0", "。"} <= kept


def test_the_seeds_size_costs_neither_names_nor_traditional_script(chatglm, seed_size):
    assert seed_size.vocab_size == 35203 and inspect.unreachable(seed_size.model) == []
    for text in ("A型血 HIV DNA Python", "臺灣國語"):
        assert len(seed_size.encode(text)) <= len(chatglm.encode(text)) + 1
    before, after = (inspect.fit(t, real_texts(4000)).chars_per_token for t in (chatglm, seed_size))
    assert after >= before * 0.998


@pytest.mark.heavy
def test_a_hundred_thousand_random_texts_come_back_from_pruned_vocabularies(rule, seed_size):
    rng = random.Random(0)
    ranges = [
        (0, 0x80),
        (0x20, 0x7F),
        (0x4E00, 0x9FFF),
        (0x20000, 0x2A6DF),
        (0x1F300, 0x1FAFF),
        (0x3000, 0x30FF),
        (0xAC00, 0xD7A3),
        (0x2500, 0x2600),
        (0xFF00, 0xFFEF),
        (0xE000, 0xF8FF),
        (0, 0xD7FF),
        (0x10000, 0x10FFFF),
    ]
    for n in range(100_000):
        low, high = rng.choice(ranges)
        text = "".join(
            chr(rng.randint(low, high)) if rng.random() < 0.8 else rng.choice(" ▁\n\0a中")
            for _ in range(rng.randint(0, 20))
        )
        tok = seed_size if n % 2 else rule
        assert tok.decode(tok.encode(text)) == text


def many_real_texts(count):
    """Real texts, whole and in sentences."""
    texts = real_texts(4000)
    cut = list(itertools.chain.from_iterable(t.replace("。", "。\0").split("\0") for t in texts))
    return [t for t in [*texts, *cut] if t and "<" not in t][:count]


@pytest.mark.heavy
def test_transformers_gives_the_ids_of_the_pruned_vocabulary_on_ten_thousand_real_texts(seed_size):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(seed_size.path.parent)
    texts = many_real_texts(10_000)
    assert len(texts) == 10_000
    processor = sentencepiece.SentencePieceProcessor(model_file=str(seed_size.path))
    for text, ids in zip(texts, theirs(texts).input_ids):
        assert ids == seed_size.encode(text, bos=True)
        assert "▁" in text or ids[1:] == processor.encode(text)


@pytest.mark.heavy
def test_llama_cpp_gives_the_ids_of_the_pruned_vocabulary(seed_size, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    write_gguf(tmp_path / "vocabulary.gguf", seed_size.model)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = str(tmp_path / "vocabulary.gguf"), 256, False, 0
    server = xllamacpp.Server(params)
    for text in [*many_real_texts(2000), *(t for t in HARD if "\0" not in t and "▁" not in t)]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            assert json.load(reply)["tokens"] == seed_size.encode(text), text


def write_gguf(path, model):
    """The vocabulary in llama.cpp's format, around one block of random weights."""
    gguf = pytest.importorskip("gguf")
    out = gguf.GGUFWriter(str(path), "llama")
    width = 32
    out.add_block_count(1)
    out.add_context_length(256)
    out.add_embedding_length(width)
    out.add_feed_forward_length(width)
    out.add_head_count(1)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(width)
    out.add_vocab_size(len(model.pieces))
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([p.text.encode() for p in model.pieces])
    out.add_token_scores([p.score for p in model.pieces])
    out.add_token_types([p.type for p in model.pieces])
    out.add_bos_token_id(model.bos_id)
    out.add_eos_token_id(model.eos_id)
    out.add_unk_token_id(model.unk_id)
    out.add_add_space_prefix(model.add_dummy_prefix)
    shapes = {
        "token_embd": (len(model.pieces), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
    }
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name, shape in {**shapes, **{f"blk.0.{n}": (width, width) for n in square}}.items():
        out.add_tensor(f"{name}.weight", np.full(shape, 0.01, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.heavy
def test_ten_real_megabytes_remap_to_the_bin_of_encoding_anew(chatglm, seed_size, tmp_path):
    if not (DATA / "medical/huatuo_llama_data.json").exists():
        pytest.skip("the real texts are not here")
    texts = [json.loads(line)["output"] for line in (DATA / "medical/huatuo_llama_data.json").open(encoding="utf-8")]
    texts += real_texts(4000)
    size, texts = sum(len(t.encode()) for t in texts), texts * 4
    assert size * 4 > 10e6
    old, anew = write_bin(tmp_path / "old.bin", chatglm, texts), write_bin(tmp_path / "anew.bin", seed_size, texts)
    remap.remap_bin(old, tmp_path / "new.bin", chatglm, seed_size, 2)
    assert (tmp_path / "new.bin").read_bytes() == anew.read_bytes() != old.read_bytes()


def test_chinese_llamas_unigram_vocabulary_is_pruned_too(tmp_path):
    tok = load(real_model("chinese-llama-20k.chinese_sp.model"))
    counts = counts_of(tok, real_texts(500))
    new = loaded(prune.pruned(tok.model, prune.choose(tok.model, [], size=12000, counts=counts)), tmp_path)
    lost = {tok.model.pieces[i].text for i in inspect.unreachable(tok.model)}
    assert {new.model.pieces[i].text for i in inspect.unreachable(new.model)} <= lost
    for text in real_texts(200):
        assert new.decode(new.encode(text)) == tok.decode(tok.encode(text))

"""Promises of `tokenizer`: texts come back, ids equal sentencepiece's and transformers', bad files end in one line."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from texts import ANY_TEXT, BOOK, DATA, HARD, RELAXED, change, real_model, real_texts

from tokenizer import TokenizerError, load
from tokenizer.parallel import map_in_order
from tokenizer.sentencepiece_model import (
    BPE,
    CONTROL,
    SPACE,
    UNUSED,
    Piece,
    parse_model,
)
from tokenizer.sentencepiece_writer import write_model
from tokenizer.train import CONTROL_PIECES, train


@pytest.fixture(params=["small", "small_with_prefix"])
def tok(request):
    return request.getfixturevalue(request.param)


# Encoding and decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(tok, text):
    assert tok.decode(tok.encode(text)) == text


@RELAXED
@given(text=ANY_TEXT)
def test_every_text_comes_back_and_streams_to_the_same_text(tok, text):
    ids = tok.encode(text, bos=True, eos=True)
    stream = tok.stream()
    deltas = [stream.push(i) for i in ids]
    assert "".join(deltas) + stream.flush() == tok.decode(ids) == text
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in deltas)


@RELAXED
@given(text=ANY_TEXT.filter(lambda t: SPACE not in t))
def test_ids_and_text_equal_sentencepiece(tok, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tok.path))
    ids = processor.encode(text)
    assert tok.encode(text) == ids
    assert tok.decode(ids) == processor.decode(ids)


@RELAXED
@given(ids=st.lists(st.integers(0, 599), max_size=30))
def test_streaming_any_ids_gives_what_decoding_them_at_once_gives(tok, ids):
    stream = tok.stream()
    streamed = "".join(stream.push(i) for i in ids) + stream.flush()
    raw = b"".join(tok._backend.id_bytes[i] for i in ids)
    expected = raw.decode("utf-8", "replace")
    assert streamed == tok.decode(ids)
    assert streamed == (expected.removeprefix(" ") if tok._backend.strips_space else expected)


def test_streaming_waits_for_a_whole_character(small):
    ids = small.encode("𠀀")
    assert len(ids) == 4
    stream = small.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "𠀀"]
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


@RELAXED
@given(first=ANY_TEXT, second=ANY_TEXT)
def test_continued_text_joins_without_a_space(tok, first, second):
    if first:
        assert tok.decode(tok.encode(first) + tok.encode(second, continues=True)) == first + second


@pytest.mark.parametrize("name", ["small_with_prefix", "chatglm2-6b.tokenizer.model", "llama2-32k.tokenizer.model"])
def test_continued_text_has_the_ids_of_the_model_rewritten_without_its_prefix(name, request):
    tok = request.getfixturevalue(name) if name == "small_with_prefix" else load(real_model(name))
    normalizer = (*(f for f in tok.model.normalizer if f[0] != 3), (3, 0, 0))
    rewritten = write_model(change(tok.model, normalizer=normalizer))
    processor = sentencepiece.SentencePieceProcessor(model_proto=rewritten)
    texts = [text for text in (HARD + BOOK if name == "small_with_prefix" else real_texts(2000)) if SPACE not in text]
    ids = processor.encode(texts)
    for continuing in (tok, pickle.loads(pickle.dumps(tok))):
        assert [continuing.encode(text, continues=True) for text in texts] == ids
    assert ids != [tok.encode(text) for text in texts]
    assert tok._backend._continuing.serialized_model_proto() == processor.serialized_model_proto()


def test_special_token_text_is_plain_text(tok):
    text = "".join(tok.special_ids) + "<unk>"
    assert not set(tok.encode(text)) & set(tok.special_ids.values())
    assert tok.encode(text, bos=True, eos=True) == [tok.bos_id, *tok.encode(text), tok.eos_id]


def test_control_ids_are_left_out_of_text_unless_asked_for(small):
    ids = [small.bos_id, *small.encode("汉"), small.special_ids["<|im_end|>"]]
    assert small.decode(ids) == "汉"
    assert small.decode(ids, skip_special=False) == "<s>汉<|im_end|>"


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_vocabulary_without_a_piece_for_the_space_still_gives_texts_back(small, tmp_path, prefix):
    model = small.model
    pieces = [p for p in model.pieces if SPACE not in p.text]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(write_model(change(model, pieces=pieces, normalizer=(*model.normalizer, (3, 0, prefix)))))
    tok = load(path)
    for text in HARD:
        assert tok.decode(tok.encode(text)) == text
    tok.save(tmp_path)
    theirs = auto(tmp_path)
    assert all(theirs(text).input_ids == tok.encode(text, bos=True) for text in HARD if not has_special_text(text, tok))


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", b"bytes", None])
def test_what_is_not_text_is_refused(tok, text):
    for encode in (tok.encode, lambda t: list(tok.encode_chunks([t]))):
        with pytest.raises(TokenizerError):
            encode(text)


@pytest.mark.parametrize("bad", [-1, 600, 10**9])
def test_ids_out_of_range_are_refused(small, bad):
    for call in (lambda i: small.decode([i]), small.stream().push, small.id_to_piece):
        with pytest.raises(TokenizerError, match="out of range"):
            call(bad)


def rows_of(tok, texts, processes=1, start_method=None, **options):
    """The ids of each text, by way of `encode_chunks` with processes that start in that way."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(start_method, force=True)
    try:
        for chunk in tok.encode_chunks(texts, processes, **options):
            yield from np.split(chunk.ids, np.cumsum(chunk.sizes)[:-1])
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(("processes", "start_method"), [(1, None), (2, "fork"), (2, "spawn")])
def test_batch_encoding_gives_the_ids_of_single_encoding_in_order(small_with_prefix, processes, start_method):
    texts = [*HARD, *BOOK, *(f"第{i}回" for i in range(5000)), *BOOK * 100]  # several chunks
    arrays = rows_of(small_with_prefix, texts, processes, start_method, bos=True, eos=True)
    count = 0
    for text, array in zip(texts, arrays, strict=True):
        assert array.dtype == np.uint16
        if count % 50 < 25:
            assert array.tolist() == small_with_prefix.encode(text, bos=True, eos=True)
        count += 1
    assert count == len(texts)


def test_batch_encoding_reads_only_a_few_chunks_ahead(small):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "天下大势" * 1000

    assert len(list(islice(rows_of(small, endless(), processes=2), 10))) == 10
    assert read < 2000


def test_a_worker_that_fails_ends_the_batch_with_its_error(small):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        list(small.encode_chunks(["好"] * 9 + ["\ud800"], processes=2))


def kill_itself(shared, chunk):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_work_with_a_line_instead_of_waiting_for_it():
    with pytest.raises(TokenizerError, match="was killed -- out of memory"):
        list(map_in_order(kill_itself, None, range(9), processes=2))


def test_a_tokenizer_json_encodes_in_several_processes_too(small, tmp_path):
    pytest.importorskip("tokenizers")
    small.save(tmp_path)
    tok = load(tmp_path / "tokenizer.json")
    rows = rows_of(tok, [*HARD, *BOOK], processes=2, start_method="spawn")
    assert [row.tolist() for row in rows] == [tok.encode(text) for text in [*HARD, *BOOK]]


def test_chunks_hold_every_text_once_with_its_bytes(small):
    texts = [*HARD, *BOOK * 60]
    chunks = list(small.encode_chunks(texts, eos=True))
    assert len(chunks) > 1 and sum(c.text_bytes for c in chunks) == sum(len(t.encode()) for t in texts)
    assert [n for c in chunks for n in c.sizes] == [len(small.encode(t)) + 1 for t in texts]
    assert all(len(c.ids) == sum(c.sizes) for c in chunks)


# The model file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm2-6b.tokenizer.model", "llama2-32k.tokenizer.model"])
def test_real_models_are_rewritten_byte_for_byte(name):
    path = real_model(name)
    assert write_model(parse_model(path.read_bytes())) == path.read_bytes()


def test_fields_equal_those_read_by_protobuf(small):
    pytest.importorskip("google.protobuf")
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as e:  # it refuses older protobuf runtimes with its own exceptions
        pytest.skip(f"sentencepiece_model_pb2 does not load: {e}")
    data = small.path.read_bytes()
    oracle = sentencepiece_model_pb2.ModelProto.FromString(data)
    model = parse_model(data)
    assert [p[:3] for p in model.pieces] == [(p.piece, p.score, p.type) for p in oracle.pieces]
    spec, norm = oracle.trainer_spec, oracle.normalizer_spec
    assert (model.model_type, model.byte_fallback, model.unk_surface) == (2, spec.byte_fallback, spec.unk_surface)
    assert (model.unk_id, model.bos_id, model.eos_id) == (spec.unk_id, spec.bos_id, spec.eos_id)
    assert (model.normalizer_name, model.charsmap) == (norm.name, norm.precompiled_charsmap)
    flags = (model.add_dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces)
    assert flags == (norm.add_dummy_prefix, norm.remove_extra_whitespaces, norm.escape_whitespaces)
    assert write_model(model) == data == oracle.SerializeToString()


def test_a_damaged_model_ends_in_one_line_never_in_a_crash(small, tmp_path):
    """In a process of its own: the promise is that sentencepiece cannot abort it."""
    script = """
import random, sys
from pathlib import Path
from tokenizer import TokenizerError, load
data, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
rng = random.Random(0)
refused = 0
for n in range(250):
    bad = bytearray(data)
    kind = n % 5
    if kind == 0:
        bad = bad[: rng.randrange(len(bad))]
    elif kind == 1:
        for _ in range(rng.randrange(1, 30)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
    elif kind == 2:
        bad = bytearray(rng.randbytes(rng.randrange(300)))
    elif kind == 3:  # the settings behind the pieces
        for _ in range(rng.randrange(1, 9)):
            bad[-rng.randrange(1, 250)] = rng.randrange(256)
    else:
        at = rng.randrange(len(bad))
        bad[at:at] = rng.randbytes(rng.randrange(1, 9))
    path.write_bytes(bad)
    try:
        tok = load(path)
        tok.decode(tok.encode("天下 hello" + chr(0)))
    except TokenizerError as e:
        assert len(str(e).splitlines()) == 1, e
        refused += 1
print(refused)
"""
    args = [sys.executable, "-c", script, str(small.path), str(tmp_path / "bad.model")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(args, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


# A trie of the right length whose every node points outside.
BAD_TABLE = b"\0\4\0\0" + b"\xff\xff\xff\x7f" * 256 + b"\0"
BREAKS = {
    "no bos control": lambda m: change(m, pieces=[p for p in m.pieces if p.text != "<s>"]),
    "no eos control": lambda m: change(m, pieces=[p._replace(type=1) if p.text == "</s>" else p for p in m.pieces]),
    "same id": lambda m: change(m, trainer=(*m.trainer, (47, 2, b"<s>"), (42, 0, 1))),
    "say eos is id 70000": lambda m: change(m, trainer=(*m.trainer, (42, 0, 70000))),
    "same text": lambda m: change(m, pieces=[*m.pieces, m.pieces[-1]]),
    "exactly one unknown": lambda m: change(m, pieces=m.pieces[1:]),
    "256 pieces": lambda m: change(m, pieces=[p for p in m.pieces if p.text != "<0x41>"]),
    "single character": lambda m: change(m, pieces=[*m.pieces, Piece("龘", 0.0, CONTROL)]),
    "decode byte": lambda m: change(m, trainer=(*m.trainer, (44, 2, b"\xff"))),
    "damaged": lambda m: change(m, pieces=[*m.pieces, Piece("龘", float("nan"))]),
    "setting 3 should be a number": lambda m: change(m, normalizer=(*m.normalizer, (3, 5, b"abcd"))),
    "setting 4 should be a number": lambda m: change(m, normalizer=(*m.normalizer, (4, 2, b"x"))),
    "setting 5 should be a number": lambda m: change(m, normalizer=(*m.normalizer, (5, 2, b"x"))),
    "setting 35 should be a number": lambda m: change(m, trainer=(*m.trainer, (35, 2, b"x"))),
    "setting 44 should be a text": lambda m: change(m, trainer=(*m.trainer, (44, 0, 1))),
    "setting 48 should be a text": lambda m: change(m, trainer=(*m.trainer, (48, 0, 1))),
    "normaliser table": lambda m: change(m, normalizer=(*m.normalizer, (2, 2, BAD_TABLE))),
}


@pytest.mark.parametrize("reason", BREAKS)
def test_a_model_that_breaks_a_promise_is_refused_with_the_reason(small, tmp_path, reason):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(write_model(BREAKS[reason](small.model)))
    with pytest.raises(TokenizerError, match=reason) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "no.model", tmp_path / "no/tokenizer.json"):
        with pytest.raises(TokenizerError, match="^" + str(path)):
            load(path)


# Files for transformers -----------------------------------------------------------------------------------------------


def has_special_text(text, tok):
    """Is there a literal special token in the text? transformers gives those their ids, we do not."""
    return any(special in text for special in [*tok.special_ids, "<unk>"])


def auto(folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def small_auto(small, small_with_prefix, tmp_path_factory):
    pairs = {}
    for tok in (small, small_with_prefix):
        folder = tmp_path_factory.mktemp("auto")
        tok.save(folder)
        pairs[tok.path] = auto(folder)
    return pairs


@RELAXED
@given(text=ANY_TEXT)
def test_transformers_gives_the_same_ids_and_text_for_every_text(tok, small_auto, text):
    theirs = small_auto[tok.path]
    if has_special_text(text, tok):
        return
    ids = tok.encode(text, bos=True)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["chatglm2-6b.tokenizer.model", "llama2-32k.tokenizer.model"])
def test_transformers_gives_the_same_ids_on_real_texts(tmp_path, name):
    tok = load(real_model(name))
    tok.save(tmp_path)
    theirs = auto(tmp_path)
    for text in real_texts(1000):
        assert theirs(text).input_ids == tok.encode(text, bos=True)
        assert tok.decode(tok.encode(text)) == text


def test_a_saved_folder_loads_as_the_same_tokenizer(tok, tmp_path):
    tok.save(tmp_path)
    again = load(tmp_path)
    assert (again.sha256, again.bos_id, again.eos_id, again.pad_id) == (tok.sha256, 1, 2, None)
    theirs = auto(tmp_path)
    assert theirs("汉", "a").input_ids == tok.encode("汉", bos=True) + tok.encode("a", bos=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (tok.bos_id, tok.eos_id, tok.vocab_size)


def test_the_two_files_of_a_saved_folder_give_the_same_ids(tok, tmp_path):
    pytest.importorskip("tokenizers")
    tok.save(tmp_path)
    other = load(tmp_path / "tokenizer.json")
    assert (other.bos_id, other.eos_id, other.vocab_size) == (tok.bos_id, tok.eos_id, tok.vocab_size)
    for text in [*HARD, *BOOK[:5]]:
        for continues in (False, True):
            assert other.encode(text, continues=continues) == tok.encode(text, continues=continues)
        assert other.decode(other.encode(text)) == text
    assert not set(other.encode("".join(tok.special_ids))) & set(tok.special_ids.values())


@pytest.mark.parametrize("reason", ["normaliser", "unused", "no pieces of their own"])
def test_a_model_that_tokenizer_json_cannot_express_is_saved_without_one_and_says_why(small, tmp_path, reason):
    model = small.model
    if reason == "normaliser":
        model = change(model, normalizer=(*model.normalizer, (4, 0, 1)))
    elif reason == "unused":
        model = change(model, pieces=[*model.pieces[:-1], model.pieces[-1]._replace(type=UNUSED)])
    else:
        model = change(model, pieces=[p for p in model.pieces if p.text != "下"])
    (tmp_path / "in.model").write_bytes(write_model(model))
    with pytest.warns(UserWarning, match=reason):
        load(tmp_path / "in.model").save(tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert load(tmp_path / "out").encode("天下") == load(tmp_path / "in.model").encode("天下")


def test_what_lies_beside_a_tokenizer_json_may_be_nonsense(small, tmp_path):
    pytest.importorskip("tokenizers")
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["</s>"], "bos_token": {"content": {}}}')
    tok = load(tmp_path / "tokenizer.json")  # special_tokens_map.json names them too
    assert (tok.bos_id, tok.eos_id) == (small.bos_id, small.eos_id)
    for text in ("[" * 100_000, "[]"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not"):
            load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["weights/infinitensor-story", "tokenizers/minimind-6400.tokenizer.json"])
def test_real_tokenizer_json_encodes_decodes_and_saves_as_itself(tmp_path, name):
    tokenizers = pytest.importorskip("tokenizers")
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here")
    tok = load(DATA / name)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 0)
    library = tokenizers.Tokenizer.from_file(str(tok.path))
    tok.save(tmp_path, chat_format="bos")
    theirs, again = auto(tmp_path), load(tmp_path)
    assert (again.sha256, again.bos_id, again.eos_id) == (tok.sha256, tok.bos_id, tok.eos_id)
    for text in [*real_texts(200), "Once upon a time,  there was\na cat.", " x"]:
        ids = tok.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids == again.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        if not set(ids) & set(tok.special_ids.values()):  # the unknown piece
            assert tok.decode(ids) == library.decode(ids)
    text = "".join(tok.special_ids)
    assert not set(tok.encode(text)) & set(tok.special_ids.values()) and tok.decode(tok.encode(text)) == text


def test_without_the_package_tokenizers_the_error_says_how_to_install_it(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install tokenizers"):
        load(tmp_path / "tokenizer.json")
    assert load(tmp_path).vocab_size == small.vocab_size


# Training -------------------------------------------------------------------------------------------------------------


def test_the_same_texts_train_the_same_bytes(small, tmp_path):
    path = train(iter(BOOK), tmp_path / "again.model", 600)
    assert path.read_bytes() == small.path.read_bytes()
    assert os.listdir(tmp_path) == ["again.model"]


def test_a_choice_of_lines_depends_on_the_seed_alone(tmp_path):
    lines = [f"第{chr(0x4E00 + i)}{chr(0x5000 + i)}回" for i in range(2000)]
    first, other, again = (
        train(lines, tmp_path / "x.model", 400, max_lines=50, seed=seed).read_bytes() for seed in (1, 2, 1)
    )
    assert first == again != other


def test_a_trained_vocabulary_is_what_the_chat_formats_and_the_model_expect(small):
    model = small.model
    assert (small.vocab_size, model.unk_id, small.bos_id, small.eos_id, small.pad_id) == (600, 0, 1, 2, None)
    assert model.model_type == BPE and model.byte_fallback and not model.add_dummy_prefix
    assert set(CONTROL_PIECES) < set(small.special_ids)
    assert not any(set(p.text) & set("\n\r\0") for p in model.pieces)


def test_a_vocabulary_of_texts_without_spaces_can_write_a_space(tmp_path):
    path = train(["天下大势分久必合"] * 9, tmp_path / "tokenizer.model", 275)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert processor.decode(processor.encode(" 天 ")) == load(path).decode(load(path).encode(" 天 ")) == " 天 "


@pytest.mark.parametrize("middle", ["一二三四五六七八九十" * 2000, "\0", "\u2585"])
def test_lines_that_sentencepiece_would_leave_out_are_not_lost(tmp_path, middle):
    text = f"一二三四五{middle}六七八九十"
    tok = load(train([text] * 20, tmp_path / "tokenizer.model", 280))
    assert sum(len(tok.encode(char)) == 1 for char in "一二三四五六七八九十") == 10


def test_a_vocabulary_size_that_does_not_fit_the_texts_is_refused_with_the_limit(tmp_path):
    with pytest.raises(TokenizerError, match=r"too large .* at most \d+") as caught:
        train(BOOK, tmp_path / "x.model", 100_000)
    limit = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert load(train(BOOK, tmp_path / "x.model", limit)).vocab_size == limit
    with pytest.raises(TokenizerError, match=r"too small .* at least \d+"):
        train(BOOK, tmp_path / "y.model", 200)
    with pytest.raises(TokenizerError, match="no text"):
        train(["", "\n"], tmp_path / "y.model", 200)
    assert not (tmp_path / "y.model").exists()


def test_the_command_trains_a_folder_and_refuses_bad_input_with_exit_code_2(tmp_path):
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "book.txt").write_text("\n".join(BOOK), encoding="utf-8")

    def run(file):
        args = ["--input", file, "--output", tmp_path / "out", "--vocab_size", "600"]
        command = [sys.executable, "vocabulary.py", "train", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=root)

    done = run(tmp_path / "book.txt")
    assert done.returncode == 0 and "600 ids" in done.stdout, done.stderr
    assert load(tmp_path / "out").vocab_size == 600 and (tmp_path / "out/tokenizer.json").exists()
    (tmp_path / "gbk.txt").write_bytes("话说天下".encode("gb18030"))
    for bad in ("gbk.txt", "missing.txt"):
        done = run(tmp_path / bad)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and bad in done.stderr

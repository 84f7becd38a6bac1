"""Promises of the corpus stages: every document is accounted for, whatever the format, the encoding and the damage."""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from core import bins, config, hf_folder
from core.errors import UserError
from extras.corpus import clean, pipeline, readers, tokenize, windows
from extras.corpus import run as corpus_run
from extras.corpus.account import Account, Doc
from model import ModelConfig
from tokenizer import TokenizerError
from tokenizer import load as load_tokenizer
from tokenizer.train import train

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [f"第{n}篇：天地玄黄，宇宙洪荒。{n * n}\n第二行，{'长' * (n % 7)}" for n in range(60)]


def read(*paths, **options):
    """(texts, places, account) of files."""
    cfg = readers.ReadConfig(input=tuple(map(str, paths)), **options)
    account = Account("read")
    docs = [doc for block in readers.blocks(cfg, account) for doc in readers.parse(block, cfg, account)]
    assert account.missing == 0 and account.kept == len(docs)
    return [d.text for d in docs], [d.where for d in docs], account


def run(folder, *words, **options):
    """The command's own functions, in this process."""
    flags = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in options.items()]
    names, cfg = corpus_run.stage_names(list(words)), load_config([f"--out_dir={folder}", *flags])
    corpus_run.own_text(cfg, names, data_process.make_tokenizer, data_process.load_model)
    return json.loads((folder / "accounting.json").read_text())


def load_config(argv):
    return config.load("", data_process.SECTIONS, argv)


def command(*args):
    return subprocess.run(
        [sys.executable, "data_process.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )


# Formats --------------------------------------------------------------------------------------------------------------


def jsonl(texts):
    return "".join(json.dumps({"id": n, "text": t}, ensure_ascii=n % 2 == 0) + "\n" for n, t in enumerate(texts))


FORMATS = {
    "a.jsonl": (jsonl(TEXTS), {}),
    "lines.json": (jsonl(TEXTS), {}),
    "array.json": (json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False, indent=1), {}),
    "flat.json": (json.dumps([{"x": [1, {"y": '"]}'}], "text": t} for t in TEXTS]), {}),
    "object.json": (json.dumps({"version": 1, "data": [{"text": t} for t in TEXTS]}, indent=2), {}),
    "named.json": (json.dumps({f"d{n}": {"text": t} for n, t in enumerate(TEXTS)}, indent=2), {}),
    "a.csv": ("id,text\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(TEXTS)), {}),
    "semicolon.csv": ("id;text;x,y\n" + "".join(f'{n};"{t}";\n' for n, t in enumerate(TEXTS)), {}),
    "a.tsv": ("text\tid\n" + "".join(f'"{t}"\t{n}\n' for n, t in enumerate(TEXTS)), {}),
    "blank.txt": ("\n\n".join(TEXTS) + "\n", {"split": "blank"}),
    "spaced.txt": ("\n \n\t\n\n".join(TEXTS), {"split": "blank"}),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [1 << 20, 37])
def test_every_format_gives_the_texts_in_order(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    content, options = FORMATS[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    texts, places, account = read(tmp_path / name, **options)
    assert texts == TEXTS and account.seen == 60
    numbers = [int(place.rpartition(":")[2]) for place in places]
    assert numbers == ([1] * 60 if name == "flat.json" else sorted(set(numbers))) and all(
        place.startswith(f"{tmp_path / name}:") for place in places
    )
    if name == "blank.txt":
        assert numbers == list(range(1, 180, 3))
    if name.endswith(("sv", "a.jsonl")):
        assert numbers == ([n + 1 for n in range(60)] if name == "a.jsonl" else [2 * n + 2 for n in range(60)])


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst", "zip"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom", "gb18030"])
@pytest.mark.parametrize(
    "name, crlf", [("a.jsonl", True), ("array.json", False), ("a.csv", True), ("spaced.txt", True)]
)
def test_packed_files_in_other_encodings_and_line_ends_give_the_same_texts(tmp_path, suffix, encoding, name, crlf):
    content, options = FORMATS[name]
    content = content.replace("\n", "\r\n") if crlf else content
    raw = b"\xfe\xff" + content.encode("utf-16-be") if encoding == "utf-16-be-bom" else content.encode(encoding)
    path = tmp_path / f"{name}.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../folder/" + name, raw)  # a path that leads out is only a name: nothing is extracted
    elif suffix == "zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(raw))
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[suffix].compress(raw))
    assert read(path, **options)[0] == TEXTS
    assert os.listdir(tmp_path) == [path.name]


def test_packed_files_in_a_zip_are_unpacked_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl.gz", gzip.compress(jsonl(TEXTS[:20]).encode()))
        archive.writestr("b.jsonl.xz", lzma.compress(jsonl(TEXTS[20:40]).encode()))
        archive.writestr("c.jsonl", jsonl(TEXTS[40:]))
    assert read(tmp_path / "a.zip")[0] == TEXTS


@pytest.mark.parametrize(
    "at, value, says", [(6, 200, "version"), (10, 97, "compression"), (8, 1, "encrypted"), (16, 1, "CRC")]
)
def test_a_zip_that_cannot_be_unpacked_is_named_with_the_reason(tmp_path, at, value, says):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", jsonl(TEXTS))
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    for start in (raw.index(b"PK\3\4") - 2, raw.index(b"PK\1\2")):  # the member's own head, and its line in the table
        raw[start + at] = value
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(UserError, match=rf"a\.zip.*{says}"):
        read(tmp_path / "a.zip")


def test_parquet_gives_the_same_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(60)), "text": TEXTS}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == TEXTS
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(raw))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("c.parquet", raw)
    assert read(tmp_path / "b.parquet.gz", tmp_path / "c.zip")[0] == TEXTS * 2


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_files_of_several_members_are_read_to_the_end(tmp_path, suffix):
    zstandard = pytest.importorskip("zstandard") if suffix == "zst" else None
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard and zstandard.compress}[
        suffix
    ]
    parts = [pack(jsonl(TEXTS[:30]).encode()), pack(b""), pack(jsonl(TEXTS[30:]).encode())]
    for padding in (b"", bytes(4 * 300)) if suffix in ("gz", "xz") else (b"",):
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(padding.join([*parts, b""]))
        assert read(tmp_path / f"a.jsonl.{suffix}")[0] == TEXTS


@pytest.mark.parametrize(
    "adapter, item, wanted",
    [
        ("wikipedia-cn-filtered", {"completion": "百科", "source": "x"}, "百科"),
        ("wudao", {"title": "题", "content": "文", "id": 1}, "题\n文"),
        ("baike-qa2019", {"title": "问", "desc": "", "answer": "答", "category": "c"}, "问\n答"),
        ("zhihu-kol", {"INSTRUCTION": "问", "RESPONSE": "答"}, "问\n答"),
        ("medical-finetune", {"instruction": "问", "input": "", "output": "答"}, "问\n答"),
        (
            "baidubaike-563w",
            {"title": "题", "summary": None, "sections": [{"title": "节", "content": "文"}]},
            "题\n节\n文",
        ),
        ("drcd", {"title": "t", "paragraphs": [{"context": "一"}, {"context": "二"}]}, "一\n二"),
    ],
)
def test_known_corpora_need_only_their_name(tmp_path, adapter, item, wanted):
    (tmp_path / "a.jsonl").write_text(json.dumps(item), encoding="utf-8")
    assert read(tmp_path / "a.jsonl", adapter=adapter)[0] == [wanted]


@pytest.mark.parametrize(
    "pattern, options, wanted",
    [
        ("pretrain/cmrc2018_dev.json", {"adapter": "cmrc2018"}, 848),
        ("pretrain/DRCD_dev.json", {"adapter": "drcd"}, 383),
        ("pretrain/poetry_*.jsonl", {}, 325 + 6000),
        ("derived/cmrc2019_stories.jsonl", {}, 439),
        ("medical/tcm_*.txt", {}, 5),
        ("medical/tcm_*.txt", {"split": "line"}, 82_354),
    ],
)
def test_real_corpora_give_all_their_documents(shared_data, pattern, options, wanted):
    texts, _, account = read(*sorted(shared_data.glob(pattern)), **options)
    assert len(texts) == wanted and not account.rejected and not any("\ufffd" in t for t in texts[:1000])


# Damage ---------------------------------------------------------------------------------------------------------------

BAD_LINES = {
    b'{"text": "a"': "not a JSON object",
    b'{"text": NaN}': "NaN is not JSON",
    b"[" * 100_000: "nested too deeply",
    b'{"text": ' + b"9" * 5000 + b"}": "not a JSON object",
    b'"text"': "a str, not an object",
    b'["text"]': "a list, not an object",
    b'{"text": "x", "text": "y"}': "a key occurs twice",
    b'{"text": "\\ud800"}': "a lone surrogate",
    b'{"text": "\xd6\xd0"}': "not text in this encoding",
    b'{"txet": "x"}': "no field text; there is txet",
    b'{"text": null}': "empty",
    b'{"text": "  "}': "empty",
    b'{"text": 5}': "of type int, not text",
    b'{"text": ["x"]}': "of type list, not text",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda b: b[:20].decode("latin-1"))
def test_a_bad_line_is_rejected_by_its_number_and_the_others_stay(tmp_path, bad):
    good = jsonl(TEXTS[:3]).encode()
    (tmp_path / "a.jsonl").write_bytes(good + bad + b"\n\n" + good)
    texts, _, account = read(tmp_path / "a.jsonl")
    assert texts == TEXTS[:3] * 2 and account.seen == 7
    (reject,) = account.take_rejects()
    assert reject.where == f"{tmp_path / 'a.jsonl'}:4" and BAD_LINES[bad] in reject.reason


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("Zürich ist schön und größer als Düsseldorf", "latin-1"),
        ("El niño comió piñas mañana", "latin-1"),
        ("Привет, как дела сегодня?", "cp1251"),
        ("中文。", "utf-16-le"),
    ],
)
def test_a_file_in_an_encoding_that_we_cannot_tell_gives_rejects_and_no_wrong_text(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(((text + "\n") * 5).encode(encoding))
    assert read(tmp_path / "a.txt", split="line")[0] == []
    assert read(tmp_path / "a.txt", split="line", encoding=encoding)[0] == [text] * 5


def test_a_guessed_encoding_is_told(tmp_path):
    for n, text in enumerate(("话说天下大势，分久必合", "臺灣國語，漢字轉換", "中文 mixed with English 文字")):
        (tmp_path / f"{n}.txt").write_text(f"{text}\nASCII only\n", encoding="gb18030")
    texts, _, account = read(*sorted(tmp_path.iterdir()))
    assert [t.split("\n")[0] for t in texts] == [
        "话说天下大势，分久必合",
        "臺灣國語，漢字轉換",
        "中文 mixed with English 文字",
    ]
    assert account.changed == {"files taken to be GB18030": 3}


@pytest.mark.parametrize(
    "encoding, raw",
    [
        ("utf-16", b"\xff\xfe" + "一\n二".encode("utf-16-le") + b"\x00\xd8" + "\n三".encode("utf-16-le")),
        ("auto", b"\xff\xfe" + "一\n二".encode("utf-16-le") + b"\x22\xdc" + "\n三".encode("utf-16-le")),
        ("gb18030", "一\n二".encode("gb18030") + b"\x81\x30\n" + "三".encode("gb18030")),
    ],
)
def test_bytes_that_are_no_text_cost_only_their_line_in_other_encodings_too(tmp_path, encoding, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    texts, _, account = read(tmp_path / "a.txt", split="line", encoding=encoding)
    assert texts == ["一", "三"] and sum(account.rejected.values()) == 1


def test_an_encoding_that_does_not_fit_the_file_or_is_none_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("中文没有标记", encoding="utf-16-le")
    with pytest.raises(UserError, match=r"a\.txt: cannot be read as utf-16: .*BOM"):
        read(tmp_path / "a.txt", encoding="utf-16")
    for name in ("no-such", "rot13", "base64", "undefined"):
        with pytest.raises(ValueError, match=f"encoding = '{name}' is not known"):
            readers.ReadConfig(encoding=name)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.RAR", "a.7z"])
def test_archives_that_are_not_read_are_refused_and_not_taken_for_text(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"text" * 200) if name.endswith("gz") else b"text" * 200)
    with pytest.raises(UserError, match="archives of this kind are not read"):
        read(tmp_path / name)


def test_bytes_that_are_no_text_can_be_replaced_instead(tmp_path):
    (tmp_path / "a.txt").write_bytes("好".encode() + b"\xff" + "文".encode())
    assert read(tmp_path / "a.txt", errors="replace")[0] == ["好\ufffd文"]
    texts, _, account = read(tmp_path / "a.txt")
    assert texts == [] and account.rejected == {"bytes that are not text in this encoding": 1}
    (tmp_path / "a.csv").write_bytes(b'text,x\n"' + "好".encode() + b"\xff\r\n" + "文".encode() + b'",1\n')
    assert read(tmp_path / "a.csv", errors="replace")[0] == ["好\ufffd\n文"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800\\r\\nb"}')
    assert read(tmp_path / "a.jsonl", errors="replace")[0] == ["a\ufffd\nb"]


def test_control_characters_are_taken_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("一\0二\x07\t三\u2028四".encode())
    texts, _, account = read(tmp_path / "a.txt", split="line")
    assert texts == ["一二\t三\u2028四"] and account.changed == {"control characters removed": 1}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_marks_and_line_ends_of_an_operating_system_change_no_document(tmp_path, end, mark):
    for name, options in (
        ("a.txt", {}),
        ("a.txt", {"split": "line"}),
        ("a.txt", {"split": "blank"}),
        ("a.jsonl", {}),
        ("a.csv", {}),
    ):
        lines = {
            "a.txt": ["一\u2028二", "", "三\x85四"],
            "a.csv": ["text,x", '"一\u2028二",1', '"三\x85四",2'],
            "a.jsonl": ['{"text": "一\u2028二"}', '{"text": "三\x85四"}'],
        }[name]
        (tmp_path / name).write_bytes(mark + end.join([*lines, ""]).encode())
        texts, places, account = read(tmp_path / name, **options)
        assert texts == (["一\u2028二\n\n三\x85四"] if not options and name == "a.txt" else ["一\u2028二", "三\x85四"])
        assert not account.rejected and places[-1].endswith(
            {"a.txt": ":3" if options else ":1", "a.csv": ":3", "a.jsonl": ":2"}[name]
        )
    (tmp_path / "old.txt").write_bytes("一\r二".encode())
    assert read(tmp_path / "old.txt")[0] == ["一\n二"]


CSV_CASES = [
    ('a,text\n1,"x\n\ny"\n2,NA\n3,null\n4,None\n', ["x\n\ny", "NA", "null", "None"], 0),
    ('text,b\n"say ""hi""",1\n', ['say "hi"'], 0),
    ("text,b\nx\ny,1,2\nz,3\n", ["z"], 2),
    ('text,b\nx,1\n"y,2\nz,3\n', ["x"], 1),
    ('text,b\n"x"y,1\nz,2\n', ["z"], 1),
    ("\ufefftext\nx\n", ["x"], 0),
]


@pytest.mark.parametrize("content, wanted, rejected", CSV_CASES)
def test_csv_is_read_as_its_writers_meant_it(tmp_path, content, wanted, rejected):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8", newline="")
    texts, _, account = read(tmp_path / "a.csv")
    assert texts == wanted and sum(account.rejected.values()) == rejected


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "blank.txt", "a.csv", "line.txt"])
def test_what_is_too_long_is_rejected_by_its_line_and_the_others_stay(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    long = "长" * 20_000
    texts = ["前文", long, "后文", long, "末文"]
    content = {
        "a.jsonl": jsonl(texts),
        "array.json": json.dumps([{"text": t} for t in texts], ensure_ascii=False, indent=0),
        "blank.txt": "\n\n".join(texts),
        "line.txt": "\n".join(texts),
        "a.csv": "text,b\n" + "".join(f"{t},1\n" for t in texts),
    }[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    found, _, account = read(
        tmp_path / name, max_doc_bytes=5000, split={"blank.txt": "blank", "line.txt": "line"}.get(name, "file")
    )
    assert found == ["前文", "后文", "末文"]
    if name != "a.csv":  # there a field that is too long ends the line for the csv module, and its rest is a row
        assert account.rejected == {"longer than 5000 bytes": 2}


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_file_cut_anywhere_is_named_and_with_keep_going_its_beginning_is_kept(tmp_path, suffix):
    zstandard = pytest.importorskip("zstandard") if suffix == "zst" else None
    rng = random.Random(0)
    texts = [f"{t}{rng.random()}" for t in TEXTS * 20]  # several blocks of each packer
    pack = {
        "gz": gzip.compress,
        "bz2": lambda raw: bz2.compress(raw, 1),
        "xz": lzma.compress,
        "zst": zstandard and zstandard.compress,
    }[suffix]
    path, whole, kept = tmp_path / f"a.jsonl.{suffix}", pack(jsonl(texts).encode()), []
    for _ in range(50):
        path.write_bytes(whole[: rng.randrange(1, len(whole))])
        with pytest.raises(UserError, match=r"a[.]jsonl.*(damaged or cut short|not a)"):
            read(path)
        found, _, account = read(path, keep_going=True)
        assert found == texts[: len(found)]
        assert account.rejected["a file that could not be read to its end"] == 1
        kept.append(len(found))
    assert max(kept) > len(texts) / 2


@pytest.mark.parametrize("damage", ["flip", "rest"])
@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_damaged_file_is_named_wherever_the_damage_is(tmp_path, suffix, damage):
    zstandard = pytest.importorskip("zstandard") if suffix == "zst" else None
    pack = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard and zstandard.ZstdCompressor(write_checksum=True).compress,
    }[suffix]
    path, whole, rng = tmp_path / f"a.jsonl.{suffix}", pack(jsonl(TEXTS).encode()), random.Random(0)
    for _ in range(20):
        bad = bytearray(whole)
        if damage == "flip":
            bad[rng.randrange(20, len(bad))] ^= 1 << rng.randrange(8)
        else:
            bad += pack(b"more")  # another frame, its beginning damaged
            bad[len(whole)] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a[.]jsonl"):
            read(path)


@pytest.mark.parametrize("damage", ["crc", "rest"])
def test_what_is_wrong_at_the_end_of_a_gz_file_is_named_and_its_documents_are_kept(tmp_path, damage):
    whole = bytearray(gzip.compress(jsonl(TEXTS).encode()))
    if damage == "crc":
        whole[-8] ^= 1
    else:
        whole += b"garbage"
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or cut short after what was read so far"):
        read(tmp_path / "a.jsonl.gz")
    texts, _, account = read(tmp_path / "a.jsonl.gz", keep_going=True)
    assert texts == TEXTS and account.rejected["a file that could not be read to its end"] == 1


def test_a_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BOMB_BYTES", 1 << 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\n" * (4 << 20)))
    with pytest.raises(UserError, match="bomb"):
        read(tmp_path / "a.txt.gz", split="line")


@pytest.mark.parametrize("make", [lambda p: None, os.mkdir, os.mkfifo, lambda p: os.symlink(p, p)])
def test_what_is_no_readable_file_is_named_and_the_others_can_go_on(tmp_path, make):
    make(tmp_path / "bad.jsonl")
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS), encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl.*--keep_going"):
        read(tmp_path / "bad.jsonl", tmp_path / "a.jsonl")
    assert read(tmp_path / "bad.jsonl", tmp_path / "a.jsonl", keep_going=True)[0] == TEXTS


@settings(max_examples=400)
@given(
    content=st.binary(max_size=300)
    | st.lists(
        st.sampled_from(
            [
                b'{"text": "',
                b'"}',
                b"[",
                b"]",
                b"{",
                b"}",
                b",",
                b'"',
                b"\\",
                b"\n",
                b"\r\n",
                b"x",
                "文".encode(),
                b"\xff",
                b"\xd6",
                b"text",
                b"\0",
                b"1",
                b"null",
                b"\xef\xbb\xbf",
                b";",
                b"\t",
            ]
        ),
        max_size=60,
    ).map(b"".join),
    name=st.sampled_from(
        [
            "a.jsonl",
            "a.json",
            "a.csv",
            "a.tsv",
            "a.txt",
            "a.jsonl.gz",
            "a.zip",
            "a.xml",
            "a.wikitext",
            "a.parquet",
            "a.parquet.gz",
        ]
    ),
    split=st.sampled_from(["file", "line", "blank"]),
    errors=st.sampled_from(["reject", "replace"]),
    block=st.sampled_from([7, 100, 1 << 20]),
)
def test_any_bytes_are_documents_rejects_or_one_line_of_error(tmp_path_factory, content, name, split, errors, block):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    before, readers.BLOCK_BYTES = readers.BLOCK_BYTES, block
    try:
        texts, _, account = read(path, split=split, errors=errors)
    except UserError as e:
        assert len(str(e).splitlines()) == 1
        return
    finally:
        readers.BLOCK_BYTES = before
    assert all(t.strip() and t.encode() for t in texts)
    if name == "a.txt" and split == "line" and errors == "reject" and b"\xef\xbb\xbf" not in content:
        lines = [line for line in content.split(b"\n") if line.strip()]
        assert account.seen == len(lines) or readers._guess(content) != "utf-8"


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, step", [(1100, 950), (10, 10), (7, 1), (5, 3)])
def test_windows_lose_nothing_at_any_length(size, step):
    text = "".join(chr(0x4E00 + n) for n in range(size * 4 + 3))
    for length in range(1, len(text) + 1):
        pieces = list(windows.windows(text[:length], size, step))
        assert all(0 < len(p) <= size for p in pieces) and all(len(p) == size for p in pieces[:-1])
        assert all(text[n * step :].startswith(p) for n, p in enumerate(pieces))
        covered = set().union(*(range(n * step, n * step + len(p)) for n, p in enumerate(pieces)))
        assert covered == set(range(length))
        assert len(pieces) == 1 or (len(pieces) - 2) * step + size < length  # none that the one before it holds already


@given(lengths=st.lists(st.integers(1, 50), max_size=40), limit=st.integers(1, 60))
def test_concat_joins_neighbours_and_loses_nothing(lengths, limit):
    docs = [Doc(chr(0x4E00 + n) * size, f"f:{n}") for n, size in enumerate(lengths)]
    account = Account("concat")
    joined = list(windows.concat(docs, account, windows.ConcatConfig(limit)))
    assert "\n".join(d.text for d in joined) == "\n".join(d.text for d in docs)
    assert all(len(d.text) <= limit or "\n" not in d.text for d in joined)
    assert all(len(a.text) + 1 + len(b.text.split("\n")[0]) > limit for a, b in pairwise(joined))
    assert (account.seen, account.kept, account.out) == (len(docs), len(docs), len(joined))


# Cleaning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after",
    [
        ("看这里https://a.com/x?y=1&z=（广告）吧", "看这里（广告）吧"),
        ("写信到 some.one+x@mail.example.com 吧", "写信到   吧"),
        ("<p class='x'>正文</p><br/>下一句<!-- 注 -->", "正文下一句"),
        ("电话13812345678，固话010-12345678。", "电话，固话。"),
        ("书号9787301138123456和圆周率3.13812345678不是电话", "书号9787301138123456和圆周率3.13812345678不是电话"),
        ("加QQ：123456789 或微信号: abc_123456 联系", "  或  联系"),
        ("好！！！！！！！……………… 真的。。。", "好！！！……… 真的。。。"),
        ("ＡＢＣ１２３，５０％", "ABC123，50%"),
        ("a &lt;b&gt; &amp; c &nbsp;好", "a <b> & c \xa0好"),
        ("a < b 且 c > d，1<2", "a < b 且 c > d，1<2"),
        ("零\u200b宽\ufeff字 👨\u200d👩", "零宽字 👨\u200d👩"),
        ("行尾 \u3000\n\n\n\n\n下一段", "行尾\n\n下一段"),
        ("e\u0301", "é"),
    ],
)
def test_rules_take_out_what_they_name_and_leave_the_rest(before, after):
    account = Account("clean", keep_texts=True)
    found = clean.rewrite(Doc(before, "f:1"), account, clean.CleanConfig())
    assert found.replace(" ", "") == after.replace(" ", "")
    assert (before == found) == (not account.changed)


@pytest.mark.parametrize(
    "text, options, reason",
    [
        ("太短", {}, "shorter than 10"),
        ("abcdefghijklmnop" * 3, {"min_han": 0.3}, "Han"),
        ("★☆★☆♪♫♬♩★☆★☆甲", {}, "symbols"),
        ("买买买买" * 50, {}, "repeated"),
        ("　" * 30, {}, "shorter"),
        ("一句普通的话，没有什么特别的地方。", {"min_han": 0.5}, ""),
        ("Plain English text, long enough.", {}, ""),
        ("def f(x):\n    return {'a': [1, 2]}", {}, ""),
    ],
)
def test_thresholds_say_why(text, options, reason):
    account = Account("clean")
    docs = list(clean.clean([Doc(text, "f:1")], account, clean.CleanConfig(**options)))
    assert bool(docs) == (not reason) and account.missing == 0
    assert all(reason in found for found in account.rejected)


def test_simplification_and_word_counts_come_from_optional_packages():
    pytest.importorskip("opencc")
    pytest.importorskip("jieba")
    account = Account("clean")
    docs = [
        Doc("臺灣國語，漢字轉換成為簡體字，這裡有很多很多的詞語。", "f:1"),
        Doc("只有四个词，啊啊啊啊啊啊。", "f:2"),
    ]
    found = list(clean.clean(docs, account, clean.CleanConfig(simplify=True, min_words=8)))
    assert [d.text[:4] for d in found] == ["台湾国语"] and account.rejected == {"fewer than 8 words": 1}


@pytest.mark.parametrize("package, options", [("opencc", {"simplify": True}), ("jieba", {"min_words": 3})])
def test_a_missing_optional_package_is_one_line_with_the_install_command(monkeypatch, package, options):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        list(clean.clean([Doc("x", "f:1")], Account("clean"), clean.CleanConfig(**options)))


def test_what_rules_took_can_be_read_again(tmp_path):
    (tmp_path / "a.txt").write_text("有链接 https://example.com/x 的一行文字，后面还有字。\n短\n", encoding="utf-8")
    run(tmp_path / "out", "clean", input=tmp_path / "a.txt", split="line", keep_rejected=True, processes=1)
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert {(r["reason"], r["text"]) for r in rejects} == {
        ("removed by url", "https://example.com/x"),
        ("shorter than 10 characters", "短"),
    }


# The chain ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """Three files with good and bad records, and what a reader can know of them."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS).encode() + b"{bad\n" + jsonl(TEXTS[:5]).encode())
    (tmp_path / "b.txt").write_text(
        "\n".join(f"这是第{n}行，文字足够长了，可以留下来。" for n in range(300)), encoding="gb18030"
    )
    (tmp_path / "c.csv").write_text("text,x\n太短,1\n够长的一行文字，可以留下来了。,2\n坏\n", encoding="utf-8")
    return [tmp_path / name for name in ("a.jsonl", "b.txt", "c.csv")]


def test_totals_add_up_in_every_stage_and_rejects_name_their_lines(tmp_path, corpus):
    out = tmp_path / "out"
    accounts = run(
        out,
        "clean",
        "window",
        "concat",
        "tokenize",
        input=tuple(corpus),
        split="line",
        window_chars=20,
        window_step=15,
        vocab_size=320,
        processes=1,
    )
    assert [a["stage"] for a in accounts] == ["read", "clean", "window", "concat", "tokenize"]
    for before, after in pairwise(accounts):
        assert before["out"] == after["in"]
    assert all(a["in"] == a["kept"] + sum(a["rejected"].values()) for a in accounts)
    assert accounts[0]["in"] == 60 + 1 + 5 + 300 + 3 and sum(accounts[0]["rejected"].values()) == 2
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rejects if r["stage"] == "read"] == [f"{corpus[0]}:61", f"{corpus[2]}:4"]
    assert len(rejects) == sum(sum(a["rejected"].values()) for a in accounts)
    about = [json.loads((out / f"{n}.json").read_text()) for n in ("train", "val")]
    assert sum(a["documents"] for a in about) == accounts[-1]["kept"]
    for a in about:
        for key in ("documents", "tokens", "text_bytes"):
            assert sum(s[key] for s in a["sources"].values()) == a[key]


def test_the_order_of_stages_is_the_users_and_the_same_stages_alone_give_the_same_texts(tmp_path, corpus):
    run(tmp_path / "both", "clean", "window", input=tuple(corpus), split="line", window_chars=20, window_step=15)
    run(tmp_path / "one", "clean", input=tuple(corpus), split="line")
    run(tmp_path / "two", "window", input=tmp_path / "one/docs.jsonl", window_chars=20, window_step=15)
    texts = [
        [json.loads(line)["text"] for line in (tmp_path / n / "docs.jsonl").open(encoding="utf-8")]
        for n in ("both", "two")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 300


def test_a_stage_that_loses_a_document_is_found_out(tmp_path, corpus, monkeypatch):
    def loses(docs, account, options):
        for doc in docs:
            account.seen += 1
            if not doc.where.endswith(":7"):
                account.kept += 1
                yield doc

    monkeypatch.setitem(corpus_run.STAGES, "window", pipeline.Stage("window", loses, windows.WindowConfig()))
    for words in (["window"], ["window", "tokenize"]):
        with pytest.raises(AssertionError, match="window: 2 documents are neither kept nor rejected"):
            run(tmp_path / "out", *words, input=tuple(corpus), split="line", processes=1)
    assert not list((tmp_path / "out").rglob("[!.]*.*"))


@pytest.mark.parametrize("split", ["file", "line"])
def test_one_two_and_four_processes_write_the_same_bins(tmp_path, corpus, split, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(pipeline, "CHUNK_CHARS", 500)
    found = []
    for processes in (1, 2, 4):
        out = tmp_path / f"out{processes}"
        run(
            out,
            "clean",
            "concat",
            "tokenize",
            input=tuple(corpus),
            split=split,
            processes=processes,
            vocab_size=320,
            concat_chars=50,
        )
        found.append([(out / n).read_bytes() for n in ("train.bin", "val.bin", "accounting.json")])
        # What the reader rejects is written when it is met, which may be a few blocks earlier.
        found[-1].append(sorted((out / "rejects.jsonl").read_bytes().splitlines()))
    assert found[0] == found[1] == found[2]


def test_many_lines_without_the_field_end_it_with_the_keys_that_are_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 1}\n' * 5000, encoding="utf-8")
    with pytest.raises(UserError, match=r"none of the first 5,000 .* no field text; there is content, id .*a\.jsonl:1"):
        run(tmp_path / "out", input=tmp_path / "a.jsonl")
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_special_token_text_in_a_corpus_is_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\n".join(f"</s><s>[INST]<|im_end|><unk> 第{n}行" for n in range(50)), encoding="utf-8"
    )
    run(tmp_path / "out", input=tmp_path / "a.txt", split="line", vocab_size=310)
    ids = np.fromfile(tmp_path / "out/train.bin", np.uint16)
    about = json.loads((tmp_path / "out/train.json").read_text())
    assert (ids == 2).sum() == (ids == 1).sum() == about["documents"] and not (ids == 0).any()
    assert not ((ids == 3) | (ids == 4)).any()


@pytest.mark.parametrize(
    "words, message",
    [
        (["cleen"], "is not a stage"),
        (["clean", "inspect"], "is not a stage .* tokenize;"),
        (["tokenize", "clean"], "tokenize last"),
        (["clean", "clean"], "each stage once"),
    ],
)
def test_stages_that_make_no_chain_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        corpus_run.stage_names(words)


@pytest.mark.parametrize("words", [["clean"], ["tokenize"], ["clean", "tokenize"]])
def test_a_run_that_keeps_nothing_is_refused_with_the_reason_and_writes_nothing(tmp_path, words):
    (tmp_path / "a.txt").write_text("\n \n" if words == ["tokenize"] else "短\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no documents: (clean: 1 times: shorter than 10|read: 1 times: empty)"):
        run(tmp_path / "out", *words, input=tmp_path / "a.txt")
    assert not list((tmp_path / "out").rglob("[!.]*.*"))


@pytest.mark.parametrize("words", [["inspect"], ["verify"]])
def test_looking_at_nothing_is_refused(words):
    done = command(*words)
    assert done.returncode == 2 and f"{words[0]} needs files" in done.stderr


def test_output_is_never_written_over_its_input(tmp_path):
    (tmp_path / "docs.jsonl").write_text(jsonl(TEXTS), encoding="utf-8")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"exists|written over"):
            run(tmp_path, "clean", input=tmp_path / "docs.jsonl", **options)
    assert (tmp_path / "docs.jsonl").read_text(encoding="utf-8") == jsonl(TEXTS)


# Forks from a process of its own, which has no threads: a lock that one of pytest's holds would stay locked in the child.
KILLS = """
import os, random, signal, sys, threading, time
from pathlib import Path
import tqdm
import data_process
from core import config
from extras.corpus import readers
from extras.corpus import run as corpus_run

# The bars' own lock is a semaphore that all forks share: one that is killed while it holds it would stop the others.
tqdm.tqdm.set_lock(threading.RLock())
readers.BLOCK_BYTES = 1000
whole, out, files = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def run(folder, processes):
    cfg = config.load("", data_process.SECTIONS, ["--out_dir", str(folder), "--input", files, "--split", "line",
                      "--vocab_size", "320", "--overwrite", "--processes", str(processes)])
    corpus_run.own_text(cfg, ["clean", "dedup", "tokenize"], data_process.make_tokenizer, data_process.load_model)

run(whole, 1)
began = time.monotonic()
run(whole, 2)
usual, rng, killed, published = time.monotonic() - began, random.Random(0), 0, 0
wanted = {n: (whole / n).read_bytes() for n in ("train.bin", "val.bin")}
for n in range(400):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # its workers are killed with it
        run(out, (1, 2, 4)[n % 3])
        os._exit(0)
    time.sleep(0.01 + rng.uniform(0, usual))
    os.killpg(pid, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    for name in wanted:
        if (out / name).with_suffix(".json").exists():
            published += 1
            assert (out / name).read_bytes() == wanted[name], name
    if killed == 50:
        break
run(out, 4)
print("killed", killed, "published", published, file=sys.stderr)
"""


@pytest.mark.heavy
def test_fifty_kills_at_random_moments_leave_whole_bins_or_none_and_the_rerun_writes_the_same(tmp_path, corpus):
    args = [tmp_path / "whole", tmp_path / "out", ",".join(map(str, corpus))]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0 and "killed 50 published" in done.stderr, done.stderr[-2000:]
    assert "published 0" not in done.stderr
    for name in ("train.bin", "val.bin", "train.json", "val.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_a_full_disk_ends_with_code_4_and_publishes_nothing(tmp_path, corpus):
    script = """
import resource, signal, sys
import data_process
from core import errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
errors.run(data_process.main)
"""
    text = "".join(f"第{n}行，{n * n}，文字足够长了，可以留下来。\n" for n in range(3000))
    (tmp_path / "big.txt").write_text(text, encoding="utf-8")
    run(tmp_path / "first", input=tmp_path / "big.txt", split="line", vocab_size=320)
    args = [
        "--input",
        tmp_path / "big.txt",
        "--split",
        "line",
        "--tokenizer",
        tmp_path / "first/tokenizer",
        "--out_dir",
        tmp_path / "out",
    ]
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_killed_worker_ends_the_command_with_one_line(tmp_path, corpus, monkeypatch):
    def dies(docs, account, options):
        os.kill(os.getpid(), signal.SIGKILL)
        yield from docs

    monkeypatch.setitem(corpus_run.STAGES, "window", pipeline.Stage("window", dies, windows.WindowConfig()))
    began = time.monotonic()
    with pytest.raises(TokenizerError, match="a worker process was killed"):
        run(tmp_path / "out", "window", input=tuple(corpus), split="line", processes=2)
    assert time.monotonic() - began < 5 and not list((tmp_path / "out").glob("[!.]*"))
    assert not list((tmp_path / "out").glob(".tmp-*"))


@pytest.mark.heavy
def test_the_filter_drops_what_a_trained_model_finds_too_surprising(tmp_path, make_model):
    """Oracle: bits per byte from the plain logits."""
    tokenizer = load_tokenizer(train(["天地玄黄，宇宙洪荒。"] * 50, tmp_path / "t/tokenizer.model", 280))
    model = make_model(
        ModelConfig(
            vocab_size=280,
            hidden_size=32,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    )
    hf_folder.save_model(tmp_path / "model", model, tokenizer, {})
    docs = ["天地玄黄，宇宙洪荒。" * n for n in (1, 2, 9)] + ["kwx@#%&zq", "天"]
    bits = []
    for doc in docs:
        ids, nats = torch.tensor(tokenizer.encode(doc, bos=True, eos=True)), 0.0
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            logits = model(window[None, :-1])[0].log_softmax(-1)
            nats -= logits[torch.arange(len(window) - 1), window[1:]].sum().item()
        bits.append(nats / math.log(2) / len(doc.encode()))
    border = sorted(bits)[2]
    (tmp_path / "a.jsonl").write_text(jsonl(docs), encoding="utf-8")
    run(
        tmp_path / "out",
        "filter",
        input=tmp_path / "a.jsonl",
        perplexity=tmp_path / "model",
        min_bits=0,
        max_bits=border * 1.0001,
    )
    kept = [json.loads(line)["text"] for line in (tmp_path / "out/docs.jsonl").open(encoding="utf-8")]
    assert kept == [doc for doc, b in zip(docs, bits) if b <= border] and len(kept) == 3


# Looking --------------------------------------------------------------------------------------------------------------


def test_inspect_and_verify_explain_a_bin_and_name_a_damaged_block(tmp_path, corpus):
    out = tmp_path / "out"
    run(out, input=tuple(corpus), split="line", vocab_size=320)
    done = command("inspect", out / "train.bin")
    about = json.loads((out / "train.json").read_text())
    assert done.returncode == 0, done.stderr
    assert f"{about['tokens']:,} tokens, uint16, {about['documents']:,} documents" in done.stdout
    assert "天地玄黄" in done.stdout and f"{corpus[1]}: " in done.stdout
    assert command("verify", out / "train.bin", out / "val.bin").returncode == 0
    rng, raw = random.Random(0), bytearray((out / "train.bin").read_bytes())
    for _ in range(100):
        at = rng.randrange(len(raw))
        (out / "train.bin").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(UserError, match="damaged in 1 of 1 blocks: block 0"):
            tokenize.verify(out / "train.bin")


def test_verify_names_the_block(tmp_path, monkeypatch):

    monkeypatch.setattr(bins, "BLOCK_BYTES", 100)
    with bins.BinWriter(tmp_path / "x.bin", 300, 2, "0" * 64) as out:
        out.add(list(range(3, 203)), 600)
    assert "whole, 200 tokens in 4 blocks" in tokenize.verify(tmp_path / "x.bin")
    raw = bytearray((tmp_path / "x.bin").read_bytes())
    raw[250] ^= 1
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"1 of 4 blocks: block 2 \(bytes 200 to 299\)"):
        tokenize.verify(tmp_path / "x.bin")


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_line_of_a_gigabyte_is_rejected_in_bounded_memory(tmp_path):
    """The file is sparse: a line of NUL bytes between two good ones."""
    for name, head in (("a.jsonl", jsonl(TEXTS).encode()), ("b.txt", "\n".join(TEXTS).encode() + b"\n")):
        with open(tmp_path / name, "wb") as f:
            f.write(head)
            f.seek(1 << 30, io.SEEK_CUR)
            f.write(b"\n" + head)
    script = """
import re, resource, sys
import data_process
sys.argv = ["data_process.py", *sys.argv[1:]]
data_process.main()
# Not RUSAGE_SELF: the maximum of a process that was started begins at that of the one that started it.
own = int(re.search("VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1])
print("peak", max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10)
"""
    args = [
        sys.executable,
        "-c",
        script,
        "--input",
        tmp_path / "a.jsonl",
        tmp_path / "b.txt",
        "--split",
        "line",
        "--vocab_size",
        "320",
        "--out_dir",
        tmp_path / "out",
    ]
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (
        "2 rejected: longer than 16777216 bytes (first:" in done.stdout and f"{tmp_path / 'a.jsonl'}:61)" in done.stdout
    )
    assert int(done.stdout.split("peak ")[1]) < 512


def test_documents_that_are_all_the_same_are_split_too(tmp_path):
    (tmp_path / "same.txt").write_text("完全一样的一行文字，没有分别。\n" * 50, encoding="utf-8")
    accounts = run(tmp_path / "out", input=tmp_path / "same.txt", split="line", vocab_size=300)
    assert accounts[-1]["kept"] == 50 and (tmp_path / "out/val.bin").stat().st_size > 0

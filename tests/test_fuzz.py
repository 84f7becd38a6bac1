"""Promises to damaged input: it is read or refused in one line, fast; no other exception, no document unaccounted for.

    pytest tests/test_fuzz.py                                             # 100,000 inputs for each of six targets
    pytest tests/test_fuzz.py --mutations 1000                            # some seconds
    pytest tests/test_fuzz.py --mutations 1000000 --mutation-seed 7       # an evening, other inputs

Every case is made from one number alone, and a failure says which: `--mutations 1 --mutation-seed THAT -k NAME` makes
it again.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import random
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
from small_run import small_model
from test_chats import GOLDEN

from assembly.models import load_model
from core import bins, data, files, hf_folder
from core.errors import UserError
from extras.corpus import chats, readers, tokenize, wiki
from extras.corpus.account import Account, Doc
from tokenizer import TokenizerError, chat, load

pytestmark = pytest.mark.heavy
LIMIT_S = 1.0  # of the process's own time, for any one input
# Of --mutations: what takes a tenth of a millisecond to try is tried as often as asked for, the slower ones less often.
SHARES = {
    "records": 1,
    "chats": 1,
    "ids": 1,
    "bins": 1,
    "sidecars": 1,
    "weights": 1,
    "models": 0.1,
    "configs": 0.1,
    "packed": 0.05,
}


@pytest.fixture
def cases(request):
    """name of a target -> a random generator for each of its cases, guarded."""

    def guarded(name: str, each: int = 1):
        """`each`: mutated inputs in one case."""
        config = request.config
        first = config.getoption("--mutation-seed")
        for seed in range(first, first + max(1, int(config.getoption("--mutations") * SHARES[name]) // each)):
            began = time.process_time()
            try:
                yield random.Random(seed)
            except GeneratorExit:
                # The loop's body failed; what it raised is shown by itself.
                print(f"{name}: made by --mutation-seed {seed}")
                raise
            took = time.process_time() - began
            assert took < LIMIT_S, f"{name}: --mutation-seed {seed} took {took:.1f} s"

    return guarded


def one_line(error: Exception) -> None:
    assert "\n" not in str(error), error


def both(results: list[bool]) -> None:
    """Some were accepted and some refused: else the damage is too great or too small to try anything."""
    assert len(results) < 50 or {*results} == {True, False}


# Kinds of damage ------------------------------------------------------------------------------------------------------

INSERTED = [
    b"\0",
    b"\x07",
    b"\x1b",
    b"\x7f",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\udc00",
    b"\xff",
    b"\xc3",
    b"\xf0\x9f\x98",
    "\u2028".encode(),
    "\ufffd".encode(),
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b";",
    b"\t",
    b"<",
    b">",
    b"&#0;",
    b"]]>",
    b"<page>",
    b"</text>",
    b"<!--",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'""',
    b"9" * 5000,
    b"[" * 300,
    b'{"a":' * 300,
    b"\xd6\xd0\xce\xc4",
    b"\xa4\xa4",
    b"\x81",
    b"\x80",
]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three faults: flipped bytes, a part cut out or written twice, something put in."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        a, b = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
        kind = rng.randrange(6)
        if kind == 0 and out:
            for _ in range(rng.randrange(1, 5)):
                out[rng.randrange(len(out))] = rng.randrange(256)
        elif kind == 1:
            del out[a : min(b, a + rng.choice((1, 5, 10**9)))]
        elif kind == 2:
            out[b:b] = out[a : min(b, a + 300)]
        elif kind == 3:
            out[a:a] = rng.randbytes(rng.randrange(1, 9))
        elif out and kind == 4:
            out[a % len(out)] ^= 1 << rng.randrange(8)
        else:
            out[a:a] = rng.choice(INSERTED)
    return bytes(out)


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\0",
    "\ud800",
    "文",
    "9" * 400,
    [],
    [None],
    [[]],
    ["x"],
    {},
    {"x": 1},
    {"role": "user"},
    ["x", "y"],
    {"content": None},
]


def altered(value, rng: random.Random):
    """JSON with one place of it changed: another value or type, a key gone or misspelt, a list cut or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        out, kind = dict(value), rng.randrange(8)
        if kind == 0:
            del out[key]
        elif kind == 1:
            out[key + rng.choice(("x", " ", "\0", "\ud800"))] = out.pop(key)
        elif kind == 2:
            out[rng.choice(("id", "messages", "input", "history", "system", "text", "x"))] = rng.choice(ODD)
        else:
            out[key] = altered(value[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return rng.choice(
            (
                value[:at],
                value[at:],
                value + value,
                [*value[:at], *value[at + 1 :]],
                *[[*value[:at], altered(value[at], rng), *value[at + 1 :]]] * 4,
            )
        )
    if isinstance(value, str) and value and rng.random() < 0.5:
        return damaged(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
    if rng.random() < 0.03:
        for _ in range(rng.choice((100, 400))):  # deeper than any reader's recursion is a case of its own, in bytes
            value = [value] if rng.random() < 0.5 else {"x": value}
        return value
    return rng.choice(ODD)


# Targets --------------------------------------------------------------------------------------------------------------

TEXTS = [
    "天地玄黄，宇宙洪荒。",
    "日月盈昃",
    "Plain English, 123.",
    '引号"与\\反斜线',
    "😀👨‍👩‍👧",
    "a\tb",
    "{[,;]}",
    "<b>x</b>",
]
PAGE = (
    "<page><title>甲{}</title><ns>0</ns><revision><text>'''甲'''是[[乙|丙]]。{{{{lang|en|Q}}}}-{{zh-cn:鼠标;zh-tw:滑鼠}}-\n"
    "== 注释 ==\n* &lt;ref&gt;x&lt;/ref&gt;</text></revision></page>"
)
# Name of a file -> (what stands before its records, one record, what stands between and behind them).
RECORDS = {
    "a.jsonl": ("", lambda n: json.dumps({"id": n, "text": TEXTS[n % 8]}, ensure_ascii=n % 2 == 0), "\n", ""),
    "a.json": (
        "[",
        lambda n: json.dumps({"id": n, "text": TEXTS[n % 8], "x": [1, {"y": "]"}]}, ensure_ascii=False),
        ",\n",
        "]",
    ),
    "object.json": ('{"data": [', lambda n: json.dumps({"text": TEXTS[n % 8]}), ",\n", "]}"),
    "a.csv": ("id,text\n", lambda n: f'{n},"{TEXTS[n % 8].replace(chr(34), chr(34) * 2)}"', "\n", "\n"),
    "a.tsv": ("id\ttext\n", lambda n: f"{n}\t{TEXTS[(0, 1, 2, 4)[n % 4]]}", "\n", "\n"),
    "a.txt": ("", lambda n: f"第{n}行，{TEXTS[n % 8]}", "\n", "\n"),
    "blank.txt": ("", lambda n: f"第{n}段，\n{TEXTS[n % 8]}", "\n\n", "\n"),
    "a.xml": ("<mediawiki>", PAGE.format, "\n", "</mediawiki>"),
    "a.wikitext": ("", lambda n: f"== {n} ==\n'''甲'''是[[乙|丙]]。{TEXTS[n % 8]}", "\n", "\n"),
}
ENCODINGS = (
    "utf-8",
    "ascii",
    "latin-1",
    "utf-16",
    "utf-16-be",
    "utf-32",
    "utf-7",
    "gb18030",
    "gbk",
    "big5",
    "shift_jis",
    "iso2022_jp",
    "hz",
    "cp1252",
    "raw_unicode_escape",
    "idna",
    "punycode",
)
PER_FILE = 20  # damaged records in a file


def test_damaged_files_give_documents_or_counted_rejects_and_never_an_exception(tmp_path, cases, monkeypatch):
    results = []
    for rng in cases("records", PER_FILE):
        name = rng.choice(sorted(RECORDS))
        before, record, between, after = RECORDS[name]
        parts = [damaged(record(n).encode(), rng) for n in range(PER_FILE)]
        raw = before.encode() + between.encode().join(parts) + after.encode()
        if rng.random() < 0.2:  # the frame too
            raw = damaged(raw, rng)
        if rng.random() < 0.1:
            raw = raw.decode("utf-8", "ignore").encode(rng.choice(("utf-16", "gb18030", "utf-8-sig")))
            raw = damaged(raw, rng) if rng.random() < 0.5 else raw
        path = tmp_path / name
        path.write_bytes(raw)
        monkeypatch.setattr(readers, "BLOCK_BYTES", rng.choice((1 << 20, 200, 17)))
        cfg = readers.ReadConfig(
            input=(str(path),),
            split=rng.choice(("file", "line", "blank")),
            errors=rng.choice(("reject", "replace")),
            keep_going=rng.random() < 0.3,
            encoding=rng.choice(ENCODINGS) if rng.random() < 0.15 else "auto",
            max_doc_bytes=rng.choice((1 << 24, 1 << 24, 60)),
            adapter=rng.choice(("", "", "", *readers.ADAPTERS)),
        )
        account, items = Account("read"), rng.random() < 0.3
        try:
            with contextlib.redirect_stdout(None):
                docs = [
                    doc for block in readers.blocks(cfg, account) for doc in readers.parse(block, cfg, account, items)
                ]
        except UserError as e:
            one_line(e)
            docs = None
        assert account.missing == 0 and account.kept == account.out
        results.append(docs is not None)
        if docs is not None:
            assert account.kept == len(docs)
            for doc in docs:
                assert doc.text.strip() and doc.text.encode() and doc.where.startswith(str(path))
                assert not readers.CONTROL.search(doc.text) and "\r" not in doc.text
            assert len(account.take_rejects()) == sum(account.rejected.values())
            if name == "a.xml" and items and rng.random() < 0.2:
                stage = Account("wiki")
                out = list(wiki.wiki(docs, stage, wiki.WikiConfig()))
                assert stage.missing == 0 and stage.out == len(out)
    both(results)


@pytest.fixture
def packed(tmp_path) -> dict[str, bytes]:
    """The same records in files of every packed kind, by name."""
    raw = "".join(json.dumps({"text": f"{n} {TEXTS[n % 8]}"}) + "\n" for n in range(200)).encode()
    found = {"a.jsonl.gz": gzip.compress(raw), "a.jsonl.bz2": bz2.compress(raw), "a.jsonl.xz": lzma.compress(raw)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", raw)
        archive.writestr("b/c.jsonl.gz", found["a.jsonl.gz"])
    found["a.zip"] = (tmp_path / "a.zip").read_bytes()
    with contextlib.suppress(ImportError):
        import zstandard

        found["a.jsonl.zst"] = zstandard.compress(raw)
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [TEXTS[n % 8] for n in range(200)]}), tmp_path / "a.parquet")
        found["a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    return found


def test_damaged_packed_files_are_read_or_refused_and_never_an_exception(tmp_path, cases, packed):
    results = []
    for rng in cases("packed"):
        name = rng.choice(sorted(packed))
        path, account = tmp_path / name, Account("read")
        path.write_bytes(damaged(packed[name], rng))
        cfg = readers.ReadConfig(input=(str(path),))
        try:
            docs = [doc for block in readers.blocks(cfg, account) for doc in readers.parse(block, cfg, account)]
            assert account.kept == len(docs)
            results.append(True)
        except UserError as e:
            one_line(e)
            results.append(False)
        assert account.missing == 0
    both(results)


def test_damaged_chats_are_chats_or_counted_rejects_and_never_an_exception(cases):
    results, names = [], ["auto", *sorted(chats.FORMATS)]
    for rng in cases("chats", 10):
        docs = []
        for n in range(10):
            item = rng.choice(GOLDEN)[1]
            for _ in range(rng.choice((1, 1, 2, 4))):
                item = altered(item, rng)
            text = json.dumps(item, ensure_ascii=rng.random() < 0.5)
            if rng.random() < 0.2:
                text = damaged(text.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
            docs.append(Doc(text, f"f:{n}"))
        account = Account("sft", keep_texts=True)
        cfg = chats.ChatsConfig(
            rng.choice(names) if rng.random() < 0.3 else "auto",
            augment=rng.choice((0, 0.5)),
            allow_empty_prompt=rng.random() < 0.5,
            system=rng.choice(("", "系统")),
            max_answer_chars=rng.choice((0, 3)),
        )
        out = list(chats.chats(docs, account, cfg))
        assert account.seen == len(docs) and account.missing == 0 and account.kept == account.out == len(out)
        for doc in out:
            chat._check(files.parse_object(doc.text.encode())["messages"], False)  # what sft.py does with it
        for reject in account.take_rejects():
            assert len(reject.reason) < 300 and reject.reason.isprintable()
        results += [True] * len(out) + [False] * (len(docs) - len(out))
    both(results)


def small_bin(path: Path) -> Path:
    with bins.BinWriter(path, 100, 2, "a" * 64, "x") as out:
        for n in range(40):
            out.add([1, *range(3, 3 + n % 60), 2], 50, source="f.txt")
    return path


def read_all(path: Path, rng: random.Random) -> bool:
    """Open a bin in some way and read it; was it accepted?"""
    try:
        bin = bins.TokenBin(
            path,
            rng.choice((100, 100, 90, 70_000)),
            rng.choice(("", "a" * 64, "b" * 64)),
            [].append,
            trust=rng.random() < 0.5,
        )
        rows = data.BinRows(bin, rng.choice((1, 8, 31, 5000)), rng.random() < 0.5, 2, rng.random() < 0.5)
        found = rows.batch(range(len(rows)))
        assert found.ids.min() >= 0 and found.ids.max() < bin.vocab_size
        if rng.random() < 0.3:
            bin.verify()
    except UserError as e:
        one_line(e)
        return False
    return True


def test_damaged_bins_are_read_or_refused_and_never_an_exception(tmp_path, cases):
    path = small_bin(tmp_path / "x.bin")
    raw, sidecar = path.read_bytes(), path.with_suffix(".json").read_bytes()
    results = []
    for rng in cases("bins"):
        path.write_bytes(damaged(raw, rng))
        path.with_suffix(".json").unlink(missing_ok=True)
        if rng.random() < 0.5:
            path.with_suffix(".json").write_bytes(sidecar)
        results.append(read_all(path, rng))
    both(results)


def test_damaged_sidecars_are_read_or_refused_and_never_an_exception(tmp_path, cases):
    path = small_bin(tmp_path / "x.bin")
    sidecar, about, results = path.with_suffix(".json"), json.loads(path.with_suffix(".json").read_bytes()), []
    for rng in cases("sidecars"):
        if rng.random() < 0.5:
            sidecar.write_bytes(damaged(json.dumps(about).encode(), rng))
        else:
            sidecar.write_text(json.dumps(altered(about, rng)))
        results.append(read_all(path, rng))
        with contextlib.suppress(UserError):
            assert tokenize.inspect(path, None, 5)
    both(results)


def test_damaged_models_are_loaded_or_refused_and_never_an_exception(small, small_with_prefix, tmp_path, cases):
    models, path, results = [tok.path.read_bytes() for tok in (small, small_with_prefix)], tmp_path / "bad.model", []
    for rng in cases("models"):
        raw = rng.choice(models)
        if rng.random() < 0.4:  # the settings behind the pieces
            raw = raw[: -len(raw) // 20] + damaged(raw[-len(raw) // 20 :], rng)
        else:
            raw = damaged(raw, rng)
        path.write_bytes(raw)
        try:
            tok = load(path)
            for text in ("天下大势 hello\0😀", "  "):
                ids = tok.encode(text, bos=True, eos=True)
                assert all(0 <= i < tok.vocab_size for i in ids) and isinstance(tok.decode(ids), str)
            chat.render([{"role": "user", "content": "天"}], tok, "bos", generation=True)
            results.append(True)
        except TokenizerError as e:
            one_line(e)
            results.append(False)
    both(results)


# Folders from elsewhere -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    hf_folder.save_model(tmp_path / "m", small_model(), None, {})
    load_model(tmp_path / "m")  # what torch does once is not to be laid to a case
    return tmp_path / "m"


@pytest.fixture
def memory():
    """At most 200 MB more than now: what is above raises MemoryError, which is no UserError."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + (200 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def try_load(folder: Path) -> bool:
    try:
        model = load_model(folder)
    except UserError as e:
        one_line(e)
        return False
    assert all(p.isfinite().all() for p in model.parameters())
    return True


def test_damaged_configs_are_loaded_or_refused_and_nothing_large_is_allocated(folder, memory, cases):
    path, about, results = folder / "config.json", json.loads((folder / "config.json").read_text()), []
    for rng in cases("configs"):
        if rng.random() < 0.3:
            path.write_bytes(damaged(json.dumps(about).encode(), rng))
        else:
            changed = altered(about, rng)
            if isinstance(changed, dict) and rng.random() < 0.5:
                changed[rng.choice(sorted(about))] = rng.choice(
                    (0, -1, 1, 2, 3, 31, 33, 64, 10**6, 10**9, 2**40, 1e-9, 1e30, "32", None)
                )
            path.write_text(json.dumps(changed))
        results.append(try_load(folder))
    both(results)


def test_damaged_weight_files_are_loaded_or_refused_and_nothing_large_is_allocated(folder, memory, cases):
    path, results = folder / "model.safetensors", []
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    for rng in cases("weights"):
        kind = rng.randrange(4)
        if kind == 0:
            path.write_bytes(damaged(raw, rng))
        elif kind == 1:  # the header's bytes, its length kept right
            bad = damaged(raw[8 : 8 + size], rng)
            path.write_bytes(struct.pack("<Q", len(bad)) + bad + raw[8 + size :])
        elif kind == 2:
            path.write_bytes(
                struct.pack(
                    "<Q", rng.choice((0, 1, size - 1, size + 1, len(raw), 1 << 20, 100 << 20, 1 << 63, 2**64 - 1))
                )
                + raw[8:]
            )
        else:
            changed = altered(head, rng)
            if isinstance(changed, dict) and rng.random() < 0.7:
                changed[rng.choice(sorted(head))] = {
                    "dtype": rng.choice(("F32", "F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "X")),
                    "shape": rng.choice(
                        ([32], [64, 32], [0], [], [2**63], [2**31, 2**31], [-1], [2**32, 2**32, 0], [1.5])
                    ),
                    "data_offsets": rng.choice(([0, 128], [0, 8192], [128, 0], [0, 2**63], [0, 0], [-1, 3], [0], "x")),
                }
            bad = json.dumps(changed).encode()
            path.write_bytes(struct.pack("<Q", len(bad)) + bad + raw[8 + size :])
        results.append(try_load(folder))
    both(results)


# Streaming ------------------------------------------------------------------------------------------------------------


def test_random_ids_stream_to_what_they_decode_to_at_once(small, small_with_prefix, cases):
    """Bytes are drawn as often as all pieces together: characters are begun, broken and ended everywhere."""
    for rng in cases("ids"):
        tok = rng.choice((small, small_with_prefix))
        byte_ids = [i for i, p in enumerate(tok.model.pieces) if p.type == 6]
        ids = [
            rng.choice(byte_ids) if rng.random() < 0.5 else rng.randrange(tok.vocab_size)
            for _ in range(rng.randrange(40))
        ]
        skip = rng.random() < 0.5
        stream = tok.stream(skip)
        deltas = [stream.push(i) for i in ids]
        deltas.append(stream.flush())
        assert "".join(deltas) == tok.decode(ids, skip)
        raw = tok.decode_bytes(ids, skip)
        assert "".join(deltas) == raw.decode("utf-8", "replace")

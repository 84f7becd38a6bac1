"""Files of any usual format to documents, in bounded memory.

In:  paths: text, .jsonl, .json (array, object or lines), .csv, .tsv, .parquet, MediaWiki .xml; each also as .gz, .bz2,
     .xz, .zst or inside a .zip; in UTF-8, UTF-16 or GB18030.
Out: `blocks` cuts files into blocks of whole records, cheaply; `parse` makes documents of a block, in a worker process.
Does not know what happens to the documents, and repairs nothing: what cannot be read exactly is rejected by line.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

from core import files
from core.config import Range, Section
from core.errors import UserError
from extras.corpus import wiki
from extras.corpus.account import Account, Doc

BLOCK_BYTES = 1 << 20  # large enough that handing a block to a worker costs nothing beside reading it
HEAD_BYTES = 1 << 18  # what is looked at to tell the encoding and the kind of JSON
# Unpacked to more than this and more than so many times the packed size: a bomb, no corpus (text packs 3 to 10 times).
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE = re.compile("[\ud800-\udfff]")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".xml": "wiki",
    ".wikitext": "wikitext",
}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)

# Which fields of a well-known corpus hold its text; several are joined by a line break, empty ones passed over.
ADAPTERS = {
    "wikipedia-cn-filtered": ("completion",),
    "c4-zh": ("text",),
    "wudao": ("title", "content"),
    "medical-pretrain": ("text",),  # shibing624/medical
    "medical-finetune": ("instruction", "input", "output"),
    "baike-qa2019": ("title", "desc", "answer"),
    "webtext2019zh": ("title", "desc", "content"),
    "news2016zh": ("title", "content"),
    "wiki2019zh": ("title", "text"),
    "zhihu-kol": ("INSTRUCTION", "RESPONSE"),
    "dolma": ("text",),
    "cmrc2018": ("context_text",),
    "baidubaike-563w": None,  # nested: functions below
    "drcd": None,
}


@dataclass(frozen=True)
class ReadConfig(Section):
    input: tuple[str, ...] = ()  # files; none: the demo
    # auto: the file's name says it.
    format: Literal["auto", "text", "jsonl", "json", "csv", "parquet", "wiki", "wikitext"] = "auto"
    encoding: str = "auto"  # a name that Python knows; auto: the byte order mark, else UTF-8 or GB18030, whichever fits
    # Text files: a document is the whole file, one line, or the lines between two blank lines.
    split: Literal["file", "line", "blank"] = "file"
    text_field: tuple[str, ...] = ("text",)  # of JSON, CSV and Parquet; several are joined by a line break
    # The fields of a well-known corpus instead: see ADAPTERS in extras/corpus/readers.py.
    adapter: Literal["", *ADAPTERS] = ""
    # Longer documents are rejected: one endless line must not take all memory.
    max_doc_bytes: Annotated[int, Range(least=1)] = 16 << 20
    # Documents with bytes that are not text: reject them, or replace the bytes by U+FFFD.
    errors: Literal["reject", "replace"] = "reject"
    keep_going: bool = False  # a file that is missing or damaged is reported and the others go on

    def __post_init__(self):
        super().__post_init__()
        if self.encoding != "auto":
            try:
                "".encode(self.encoding)  # refuses what is no encoding of texts, too: rot13, base64
            except (LookupError, UnicodeError):
                raise ValueError(f"encoding = {self.encoding!r} is not known") from None
        if not self.text_field:
            raise ValueError("text_field must not be empty")


class Block(NamedTuple):
    """Some records of one file.

    Args:
        path: of the file; of an archive's member "archive.zip/member".
        kind: "lines" or "jsonl": `data` holds whole lines in UTF-8; "texts", "items" or "rows": `records` does.
        line: number of the first line.
        data: the lines.
        records: (line or record number, text in UTF-8 | JSON in UTF-8 | dict).
    """

    path: str
    kind: str
    line: int = 1
    data: bytes = b""
    records: tuple[tuple[int, bytes | dict], ...] = ()


# ---------------------------------------------------------------- files to blocks


def blocks(cfg: ReadConfig, account: Account) -> Iterator[Block]:
    """All input files as blocks, in order.

    Args:
        cfg: what to read and how.
        account: of the stage "read"; what is too long to be held is rejected here.

    Raises:
        UserError: a file that is missing, no file, or damaged, unless cfg.keep_going.
    """
    for path in cfg.input:
        try:
            for name, suffixes, stream in _open(path):
                yield from _blocks_of(name, suffixes, stream, cfg, account)
        except (*DAMAGED, OSError, UserError) as e:
            what = str(e) if isinstance(e, UserError) else f"{path}: {getattr(e, 'strerror', None) or e}"
            if isinstance(e, DAMAGED):
                what = f"{path}: damaged or cut short after what was read so far: {e or type(e).__name__}"
            if not cfg.keep_going:
                raise UserError(what, "--keep_going goes on with the other files") from None
            print(f"warning: {what}", flush=True)
            account.seen += 1
            account.reject(Doc("", path), "a file that could not be read to its end")


def _open(path: str) -> Iterator[tuple[str, list[str], BinaryIO]]:
    """The byte streams of a path, unpacked: one, or one for each member of a zip archive, which is never extracted."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a file", "name files; the shell's * names many")
    if not path.lower().endswith(".zip"):
        with open(path, "rb") as raw:
            suffixes, stream = _unpack(path, raw)
            yield path, suffixes, stream
        return
    with _zip_trouble(path):
        archive = zipfile.ZipFile(path)
    with archive:
        for member in archive.infolist():
            name = f"{path}/{member.filename}"
            if member.is_dir():
                continue
            if member.flag_bits & 1:
                raise UserError(f"{name}: encrypted")
            with _zip_trouble(name):
                inner = archive.open(member)
            with inner:
                suffixes, stream = _unpack(member.filename, inner)
                yield name, suffixes, _Guarded(name, stream, archive.fp)


@contextmanager
def _zip_trouble(name: str) -> Iterator[None]:
    """What zipfile raises besides BadZipFile: of compressions it does not know, and of nonsense in the tables."""
    try:
        yield
    except (RuntimeError, ValueError, OverflowError, struct.error) as e:
        raise UserError(f"{name}: cannot be unpacked: {e}") from None


def _unpack(name: str, raw: BinaryIO) -> tuple[list[str], BinaryIO]:
    suffixes = [s.lower() for s in Path(name).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    if not packed:
        return suffixes, raw
    if packed == ".gz":
        stream = gzip.GzipFile(fileobj=raw)
    elif packed == ".bz2":
        stream = _Frames(raw, bz2.BZ2Decompressor, OSError)
    elif packed == ".xz":
        stream = _Frames(raw, lzma.LZMADecompressor, lzma.LZMAError)
    else:
        stream = _zstandard(name, raw)
    return suffixes, _Guarded(name, stream, raw)


def _zstandard(name: str, raw: BinaryIO) -> "_Frames":
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{name}: needs the package zstandard", "pip install zstandard") from None
        return _Frames(raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
    return _Frames(raw, zstd.ZstdDecompressor, zstd.ZstdError)


class _Frames:
    """A packed stream of one frame after another; EOFError where one is damaged or has no end.

    The packages' own readers miss that: zstandard's takes a frame that is cut short for whole, and Python's for .bz2
    and .xz take a second frame with a damaged beginning, and all behind it, for padding.
    """

    def __init__(self, raw: BinaryIO, new_frame, error: type[Exception]):
        self.raw, self.new_frame, self.error = raw, new_frame, error
        self.frame, self.packed, self.rest = None, b"", b""

    def read1(self, size: int) -> bytes:
        while not self.rest:
            more = self.packed or self.raw.read(1 << 10)  # up to 32 MiB unpacked: four bytes of .zst can be 128 KiB
            self.packed = more if self.frame else more.lstrip(b"\0")  # zeros between frames are padding, as .xz allows
            if not more and self.frame:
                raise EOFError("the last frame has no end")
            if not more:
                return b""
            if not self.packed:
                continue
            self.frame = self.frame or self.new_frame()
            try:
                self.rest = self.frame.decompress(self.packed)
            except self.error as e:
                raise EOFError(str(e)) from None
            ended, self.packed = self.frame.eof, self.frame.unused_data if self.frame.eof else b""
            self.frame = None if ended else self.frame
        part, self.rest = self.rest[:size], self.rest[size:]
        return part


class _Guarded(io.RawIOBase):
    """An unpacked stream that stops at a bomb, and gives out all that stands before a damage; it cannot seek."""

    def __init__(self, name: str, stream: BinaryIO, packed: BinaryIO):
        self.name, self.stream, self.packed, self.count, self.damage = name, stream, packed, 0, None

    def read(self, size: int) -> bytes:
        if self.damage:
            raise self.damage
        parts, wanted = [], size
        try:  # piece by piece: a whole `read` would lose what it had when it met the damage
            while wanted > 0 and (part := self.stream.read1(wanted)):
                parts.append(part)
                wanted -= len(part)
        except (*DAMAGED, OSError) as e:
            self.damage = e
            if not parts:
                raise
        chunk = b"".join(parts)
        self.count += len(chunk)
        if self.count > BOMB_BYTES and self.count > BOMB_RATIO * max(1, self.packed.tell()):
            raise UserError(f"{self.name}: unpacks to over {BOMB_RATIO} times its size", "is it a bomb?")
        return chunk

    read1 = read  # a .gz in a .zip is guarded twice


def _blocks_of(path: str, suffixes: list[str], stream: BinaryIO, cfg: ReadConfig, account: Account) -> Iterator[Block]:
    kind = cfg.format
    if kind == "auto":
        suffix = suffixes[-1] if suffixes else ""
        if suffix in ARCHIVES:  # their headers would be read as texts
            raise UserError(f"{path}: archives of this kind are not read", "unpack it, or make a .zip")
        kind = FORMATS.get(suffix, "text")
    if kind == "text" and cfg.format == "auto":  # dumps in parts have names like .xml-p1p1000.bz2
        start = _read_fully(stream, 512)
        stream = _Joined(start, stream)
        if b"<mediawiki" in start.replace(b"\0", b""):
            kind = "wiki"
    if kind == "parquet":
        yield from _parquet(path, stream)
        return
    if kind == "wiki":
        pages = (
            (n, wiki.page_doc(page).text.encode("utf-8", "surrogatepass"))
            for n, page in enumerate(wiki.pages(stream, path), 1)
        )
        yield from _grouped(path, "items", pages)
        return
    stream, head = _as_utf8(path, stream, cfg.encoding, account)
    if kind == "json":
        start = head.lstrip()[:1]
        if start == b"[":
            yield from _grouped(path, "items", _array(path, stream, cfg, account))
            return
        kind = "jsonl" if _is_object(head.lstrip().split(b"\n", 1)[0]) else "object"
    if kind == "jsonl":
        yield from _lines(path, "jsonl", stream, cfg, account)
    elif kind == "object":
        yield from _grouped(path, "rows", _object(path, stream, cfg))
    elif kind == "csv":
        yield from _grouped(path, "rows", _csv(path, stream, head, suffixes, cfg, account))
    elif kind == "wikitext":
        # One byte more than is allowed is enough for `parse` to reject it, and so is a byte that is no text.
        text = _read_fully(stream, cfg.max_doc_bytes + 1).decode("utf-8", "surrogateescape")
        page = {"title": Path(path).stem, "text": text, "namespace": 0, "redirect": False}
        yield Block(path, "items", records=((1, _json_bytes(page)),))
    elif cfg.split == "line":
        yield from _lines(path, "lines", stream, cfg, account)
    else:
        yield from _grouped(path, "texts", _texts(path, stream, cfg, account))


def _grouped(path: str, kind: str, records: Iterable[tuple[int, bytes | dict]]) -> Iterator[Block]:
    """Records one by one to blocks of about BLOCK_BYTES."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += len(record[1]) if kind != "rows" else sum(len(str(v)) for v in record[1].values())
        if size >= BLOCK_BYTES or len(group) >= 10_000:
            yield Block(path, kind, records=tuple(group))
            group, size = [], 0
    if group:
        yield Block(path, kind, records=tuple(group))


# ---------------------------------------------------------------- encodings


def _as_utf8(path: str, stream: BinaryIO, encoding: str, account: Account) -> tuple[BinaryIO, bytes]:
    """The stream in UTF-8 without byte order mark, and its first bytes.

    Bytes that are no text in the stream's encoding become bytes that are no UTF-8 either: who decodes a record strictly
    meets them there.
    """
    head = _read_fully(stream, HEAD_BYTES)
    if encoding == "auto":
        encoding = _guess(head)
        if encoding == "gb18030":  # Big5 and Shift-JIS often pass for it: whoever reads the report should know
            account.changed["files taken to be GB18030"] += 1
    rest = _Joined(head, stream)
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig", "ascii"):
        rest = _Transcoded(path, rest, encoding)
    head = _read_fully(rest, HEAD_BYTES)
    head = head.removeprefix(codecs.BOM_UTF8)
    return _Joined(head, rest), head


def _guess(head: bytes) -> str:
    for mark, name in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if head.startswith(mark):
            return name
    lines = head.split(b"\n")
    if len(head) == HEAD_BYTES and len(lines) > 1:
        lines.pop()  # it may be cut
    lines = [line for line in lines if not line.isascii()]
    other = sum(not _decodes(line, "utf-8") and _decodes(line, "gb18030") and _in_pairs(line) for line in lines)
    # One bad line is a fault in a UTF-8 file; most of them are another encoding.
    return "gb18030" if other > len(lines) / 2 else "utf-8"


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _in_pairs(line: bytes) -> bool:
    """Do most bytes above 127 have a neighbour there? In Chinese they do; the ü of a Latin-1 "Zürich" has none."""
    return 2 * len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", line)) < sum(byte > 127 for byte in line)


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes unless the stream ends before, or is damaged there: a read may give fewer."""
    parts = []
    try:
        while size > 0 and (part := stream.read(size)):
            parts.append(part)
            size -= len(part)
    except (*DAMAGED, OSError):
        if not parts:
            raise  # else the next read raises it again
    return b"".join(parts)


class _Joined(io.RawIOBase):
    """Bytes already read, then the rest of the stream."""

    def __init__(self, head: bytes, stream: BinaryIO):
        self.head, self.stream = head, stream

    def read(self, size: int) -> bytes:
        if not self.head:
            return self.stream.read(size)
        part, self.head = self.head[:size], self.head[size:]
        return part


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are no text as lone surrogates. Python's own "surrogateescape" gives up on those below 128."""
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("escape every byte", _escaped)


class _Transcoded(io.RawIOBase):
    """A stream of another encoding as UTF-8."""

    def __init__(self, name: str, stream: BinaryIO, encoding: str):
        self.name, self.stream, self.encoding, self.ended = name, stream, encoding, False
        self.decoder = codecs.getincrementaldecoder(encoding)("escape every byte")

    def read(self, size: int) -> bytes:
        text = ""
        while not text and not self.ended:
            part = self.stream.read(size)
            self.ended = not part
            try:
                text = self.decoder.decode(part, final=self.ended)
            except UnicodeError as e:  # no single bad bytes, those are escaped: "stream does not start with BOM"
                raise UserError(f"{self.name}: cannot be read as {self.encoding}: {e}", "another --encoding") from None
        return text.encode("utf-8", "surrogatepass")  # an escaped byte: no UTF-8


# ---------------------------------------------------------------- records


def _lines(path: str, kind: str, stream: BinaryIO, cfg: ReadConfig, account: Account) -> Iterator[Block]:
    """Blocks of whole lines. A line that does not fit into max_doc_bytes is read past, never held."""
    line, rest = 1, b""
    while chunk := stream.read(BLOCK_BYTES):
        rest += chunk
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield Block(path, kind, line, rest[:cut])
            line += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
        if len(rest) > cfg.max_doc_bytes:
            account.seen += 1
            account.reject(Doc("", f"{path}:{line}"), f"longer than {cfg.max_doc_bytes} bytes")
            while (at := rest.find(b"\n")) < 0 and (chunk := stream.read(BLOCK_BYTES)):
                rest = chunk
            line, rest = line + 1, rest[at + 1 :] if at >= 0 else b""
    if rest:
        yield Block(path, kind, line, rest)


def _texts(path: str, stream: BinaryIO, cfg: ReadConfig, account: Account) -> Iterator[tuple[int, bytes]]:
    """Whole files, or their parts between blank lines, each with the number of its first line."""
    parts, size, first = [], 0, 1

    def joined():
        if size > cfg.max_doc_bytes:
            account.seen += 1
            account.reject(Doc("", f"{path}:{first}"), f"longer than {cfg.max_doc_bytes} bytes")
        elif parts:
            yield first, b"".join(parts)

    whole = True  # is the piece a line of its own?
    for number, piece in _short_lines(stream, cfg.max_doc_bytes):
        begins, whole = whole, piece.endswith(b"\n")
        if cfg.split == "blank" and begins and not piece.strip():
            yield from joined()
            parts, size, first = [], 0, number + 1
            continue
        size += len(piece)
        if size <= cfg.max_doc_bytes:
            parts.append(piece)
        else:
            parts.clear()
    yield from joined()


def _short_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes]]:
    """(line number, line); a line longer than `limit` comes in pieces."""
    line, rest = 1, b""
    while chunk := stream.read(BLOCK_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for piece in whole:
            yield line, piece + b"\n"
            line += 1
        if len(rest) > limit:
            yield line, rest
            rest = b""
    if rest:
        yield line, rest


# A whole string, or one character: a quote whose string has no end yet, or what opens, closes or separates.
_JSON_PART = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)


def _array(path: str, stream: BinaryIO, cfg: ReadConfig, account: Account) -> Iterator[tuple[int, bytes]]:
    """(line, JSON text) of each item of a top-level array, without holding more than one item.

    Finds where items end by counting brackets outside strings; whether an item is valid JSON shows when it is parsed.
    """
    line, depth, rest, at = 1, 0, b"", 0  # at: up to where `rest` has been looked at
    skipping = False  # inside an item that is too long
    while chunk := stream.read(BLOCK_BYTES):
        rest += chunk
        start = 0  # of the item
        while True:
            found = _JSON_PART.search(rest, at)
            if not found or found[0] == b'"':
                at = found.start() if found else len(rest)
                break
            at, part = found.end(), found[0]
            if part in b"[{" and depth == 0:
                depth, start = 1, at
                line += rest.count(b"\n", 0, at)
            elif depth == 0:
                continue  # behind the array's end
            elif part in b"[{":
                depth += 1
            elif part in b"]}" and depth > 1:
                depth -= 1
            elif part in b",]" and depth == 1:
                yield from _item(path, line, rest[start : found.start()], skipping, cfg, account)
                line += rest.count(b"\n", start, at)
                start, skipping = at, False
                depth = 0 if part == b"]" else 1
        rest, at = rest[start:], at - start
        if len(rest) > cfg.max_doc_bytes:
            skipping = True
            line += rest.count(b"\n", 0, at)
            rest, at = rest[at:], 0
            if rest:  # inside a string: its beginning is as good as all of it, but for a backslash in front of its end
                line += rest.count(b"\n")
                rest = b'"\\' if (len(rest) - len(rest.rstrip(b"\\"))) % 2 else b'"'
    if depth:
        raise UserError(f"{path}:{line}: the JSON array is cut short")


def _item(
    path: str, line: int, text: bytes, skipping: bool, cfg: ReadConfig, account: Account
) -> Iterator[tuple[int, bytes]]:
    line += text.count(b"\n", 0, len(text) - len(text.lstrip()))
    if skipping or len(text) > cfg.max_doc_bytes:
        account.seen += 1
        account.reject(Doc("", f"{path}:{line}"), f"longer than {cfg.max_doc_bytes} bytes")
    elif text.strip():
        yield line, text


def _object(path: str, stream: BinaryIO, cfg: ReadConfig) -> Iterator[tuple[int, dict]]:
    """The items of a JSON object over several lines: of its one list of objects, or its values if all are objects."""
    text = _read_fully(stream, 4 * cfg.max_doc_bytes + 1)
    if len(text) > 4 * cfg.max_doc_bytes:
        raise UserError(
            f"{path}: one JSON object of more than {4 * cfg.max_doc_bytes} bytes",
            "convert it to JSON lines, or --max_doc_bytes",
        )
    try:
        whole = files.parse_object(text)
    except ValueError as e:
        raise UserError(f"{path}: not JSON: {e}") from None
    lists = [v for v in whole.values() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)]
    if len(lists) == 1:
        return enumerate(lists[0], 1)
    if whole and all(isinstance(v, dict) for v in whole.values()):
        return enumerate(whole.values(), 1)
    return enumerate([whole], 1)


def _is_object(line: bytes) -> bool:
    try:
        files.parse_object(line)
    except ValueError:
        return False
    return True


def _csv(
    path: str, stream: BinaryIO, head: bytes, suffixes: list[str], cfg: ReadConfig, account: Account
) -> Iterator[tuple[int, dict]]:
    """(line, row) with the first line's names; all values stay strings, also "NA" and "null"."""
    first = head.split(b"\n", 1)[0]
    tab = suffixes[-1:] == [".tsv"] or (b"\t" in first and b"," not in first)
    delimiter = "\t" if tab else ";" if first.count(b";") > first.count(b",") else ","
    csv.field_size_limit(cfg.max_doc_bytes)
    # What is no UTF-8 travels as lone surrogates; `parse` rejects the row that has them.
    lines = (piece.decode("utf-8", "surrogateescape") for _, piece in _short_lines(stream, cfg.max_doc_bytes))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names, start = None, 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as e:
            account.seen += 1
            account.reject(Doc("", f"{path}:{start}"), f"not CSV: {e}")
            start = rows.line_num + 1
            continue
        here, start = start, rows.line_num + 1
        if names is None:
            names = [name.strip() for name in row]
            if len(set(names)) < len(names):
                raise UserError(f"{path}:1: a column name occurs twice: {', '.join(names)}")
        elif row and len(row) != len(names):
            account.seen += 1
            account.reject(Doc("", f"{path}:{here}"), f"{len(row)} columns where the first line has {len(names)}")
        elif row:
            yield here, dict(zip(names, row))


def _parquet(path: str, stream: BinaryIO) -> Iterator[Block]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: needs the package pyarrow", "pip install pyarrow") from None
    if not stream.seekable():  # packed: Parquet is read from its end
        file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the reader
        shutil.copyfileobj(stream, file)
        stream = file
    try:
        number = 0
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1000):
            rows = batch.to_pylist()
            yield Block(path, "rows", records=tuple(enumerate(rows, number + 1)))
            number += len(rows)
    except (ArrowException, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a usable Parquet file: {e}") from None


def _json_bytes(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------- blocks to documents


def parse(block: Block, cfg: ReadConfig, account: Account, items: bool = False) -> Iterator[Doc]:
    """The documents of a block.

    Args:
        block: from `blocks`.
        cfg: as there.
        account: of the stage "read".
        items: give JSON items as they are (their JSON text) for a stage that knows their fields, not the text in them.

    Returns:
        documents in order; their texts have "\\n" for line ends and no control characters but that and the tab.
    """
    for line, record in _records(block):
        account.seen += 1
        where = f"{block.path}:{line}"
        try:
            text = _text_of(record, block.kind, cfg, items)
        except _Bad as e:
            account.reject(Doc(record.decode("utf-8", "replace") if isinstance(record, bytes) else "", where), str(e))
            continue
        if CONTROL.search(text):
            account.changed["control characters removed"] += 1
            text = CONTROL.sub("", text)
        if not text or text.isspace():
            account.reject(Doc("", where), "empty")
            continue
        account.kept += 1
        account.out += 1
        yield Doc(text, where)


class _Bad(Exception):
    """Why a record gives no document."""


def _records(block: Block) -> Iterator[tuple[int, bytes | dict]]:
    if block.kind not in ("lines", "jsonl"):
        yield from block.records
        return
    for number, line in enumerate(block.data.split(b"\n"), block.line):
        if line.strip():  # blank lines between documents are no documents
            yield number, line


def _text_of(record: bytes | dict, kind: str, cfg: ReadConfig, items: bool) -> str:
    if isinstance(record, bytes):
        if len(record) > cfg.max_doc_bytes:
            raise _Bad(f"longer than {cfg.max_doc_bytes} bytes")
        try:
            text = record.decode("utf-8", "strict" if cfg.errors == "reject" else "replace")
        except UnicodeDecodeError:
            raise _Bad("bytes that are not text in this encoding") from None
        if kind in ("lines", "texts"):
            return _line_ends(text.removeprefix("\ufeff")).strip("\n")
        try:
            record = files.parse_object(text.removeprefix("\ufeff"))
        except ValueError as e:
            raise _Bad(f"not a JSON object: {re.sub('[0-9]+', 'N', str(e))[:80]}") from None
    text = _json_bytes(record).decode("utf-8", "surrogatepass") if items else _fields(record, cfg)
    try:
        text.encode()
    except UnicodeEncodeError:
        if cfg.errors == "reject":
            raise _Bad("a lone surrogate, or bytes that are not text in this encoding") from None
        text = SURROGATE.sub("\ufffd", text)
    return _line_ends(text)


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _fields(item: dict, cfg: ReadConfig) -> str:
    if cfg.adapter == "baidubaike-563w":
        sections = [p for s in item.get("sections") or [] for p in (s.get("title"), s.get("content"))]
        values = [item.get("title"), item.get("summary"), *sections]
    elif cfg.adapter == "drcd":
        values = [p.get("context") for p in item.get("paragraphs") or []]
    else:
        names = ADAPTERS[cfg.adapter] if cfg.adapter else cfg.text_field
        if not any(name in item for name in names):
            raise _Bad(f"no field {' or '.join(names)}; there is {', '.join(map(str, item))[:120]}")
        values = [item.get(name) for name in names]
    for value in values:
        if not isinstance(value, str | None):
            raise _Bad(f"a field is of type {type(value).__name__}, not text")
    return "\n".join(value.strip("\n") for value in values if value and value.strip())

"""MediaWiki dumps to plain text, for Chinese above all.

In:  a decompressed export XML (`pages`), then documents that each hold one page as a JSON line (`page_doc`).
Out: one plain text per article: the title, paragraphs, headings on lines of their own, lists as "- " and "1. ".

    for page in pages(bz2.open("zhwiki-latest-pages-articles.xml.bz2"), "zhwiki"):
        print(to_text(page.text, page.title))

How one page becomes text. Every step takes time proportional to the page, and no step can raise:

    _cut      comments and tags; what is not wikitext (code, formulas) goes into a safe until the end
    _match    pairs the brackets; picks the variant of -{..}-; drops tables; whatever has no partner goes
    _show     mwparserfromhell reads what is left, templates and links; both print what a reader sees of them
    _lines    headings, sections that hold no prose, list marks
    _tidy     entities, empty parentheses, blanks
    _sweep    the promise: no [[ ]] {{ }} {| -{ }- <ref in the result, whatever came in

Does not know what a template says unless it is in SHOWN (templates are programs on the wiki, not in the page), nor
section names in languages other than Chinese and English, nor Chinese conversion beyond the variants written out.
"""

import html
import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple
from xml.parsers import expat

from core.config import Section
from core.errors import UserError
from extras.corpus.account import Account, Doc, Stage, each


@dataclass(frozen=True)
class WikiConfig(Section):
    """What a page is made of."""

    keep_title: bool = True  # as the first line: many articles never name their subject otherwise
    keep_math: bool = True  # formulas as $LaTeX$: sentences break without them, and chat models write them so


class Page(NamedTuple):
    """One page of a dump, in its newest revision there.

    title, text: as written; the text is wikitext.
    where: "PATH:N", the page's number in the file, from 1.
    redirect: it only sends the reader to another page.
    namespace: 0 for articles; talk, user, template and other pages have their own numbers.
    """

    title: str
    text: str
    where: str
    redirect: bool = False
    namespace: int = 0


# Reading a dump -------------------------------------------------------------------------------------------------------

REDIRECT = re.compile(r"\s*#\s*(?:redirect|重定向|виж|пренасочване)\s*:?\s*\[\[", re.IGNORECASE)


def pages(stream: BinaryIO, path: str) -> Iterator[Page]:
    """The pages of a MediaWiki export, one at a time: memory holds one page, however long the file is.

    Args:
        stream: decompressed XML of any export version, in any encoding that its first bytes declare.
        path: the file's name, for messages and `Page.where`.

    Raises:
        UserError: the XML is damaged, cut short, of another kind, or declares entities (a few lines of which can
            unfold to gigabytes; no dump has any).
    """
    parser = expat.ParserCreate(namespace_separator=" ")  # names come as "NAMESPACE name": the version is in there
    parser.buffer_text = True
    fields: dict[str, list[str]] = {}
    inside: list[str] = []  # names of the open elements
    ready: list[Page] = []
    count = 0

    def start(name, attributes):
        name = name.rpartition(" ")[2]
        if not inside and name != "mediawiki":
            raise UserError(f"{path}:{parser.CurrentLineNumber}: not a MediaWiki export, its root is <{name[:40]}>")
        inside.append(name)
        if name == "page":
            fields.clear()
        elif name in ("title", "ns", "text", "redirect"):
            fields[name] = []  # a later revision's text takes the place of an earlier one's

    def data(text):
        if inside and inside[-1] in ("title", "ns", "text") and inside[-1] in fields:
            fields[inside[-1]].append(text)

    def end(name):
        nonlocal count
        if inside.pop() == "page":
            count += 1
            title, ns, text = ("".join(fields.get(key, ())).strip() for key in ("title", "ns", "text"))
            redirect = "redirect" in fields or bool(REDIRECT.match(text))
            ready.append(Page(title, text, f"{path}:{count}", redirect, int(ns) if ns.lstrip("-").isdecimal() else 0))

    def doctype(*_):
        raise UserError(f"{path}:{parser.CurrentLineNumber}: a document type declaration", "MediaWiki dumps have none")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = doctype
    more = True
    while more:
        try:
            chunk = stream.read(1 << 16)
            more = bool(chunk)
            parser.Parse(chunk, not more)
        except expat.ExpatError as e:
            raise UserError(
                f"{path}:{e.lineno}: damaged XML: {expat.ErrorString(e.code)}",
                "if the file is cut short, download it again",
            ) from None
        except (EOFError, OSError) as e:  # from the decompressor under the stream
            if isinstance(e, OSError) and e.errno:
                raise  # the disk's, not the file's
            raise UserError(
                f"{path}:{parser.CurrentLineNumber}: the compressed file is cut short or damaged", "download it again"
            ) from None
        except (LookupError, ValueError) as e:  # an encoding that Python or expat does not have
            raise UserError(f"{path}:{parser.CurrentLineNumber}: {e}", "convert the file to UTF-8") from None
        yield from ready
        ready.clear()


def page_doc(page: Page) -> Doc:
    """A page as the document that the stage `wiki` takes."""
    values = {"title": page.title, "text": page.text, "namespace": page.namespace, "redirect": page.redirect}
    return Doc(json.dumps(values, ensure_ascii=False), page.where)


# What a page is made of -----------------------------------------------------------------------------------------------

# Characters that Unicode keeps out of texts for such private use. A safe's number stands between the first two; GONE
# stands where something was dropped, so that parentheses are removed if they became empty, and `main()` keeps its own.
OPEN, CLOSE, GONE = "\ufdd0", "\ufdd1", "\ufdd2"
# From the parser, which sees pairs of brackets only: 50,000 open ones take it minutes and more, lists 30 us a mark.
START = "\ufdd3"  # of a line that could be a list or a heading
HIDE = str.maketrans("[]{}<>", "\ufdd4\ufdd5\ufdd6\ufdd7\ufdd8\ufdd9")
UNHIDE = {ord(START): ""} | {value: chr(key) for key, value in HIDE.items()}
PRIVATE = re.compile("[\ufdd0-\ufdd9]")

TAGS = {
    name: what
    for what, names in {
        "safe": "nowiki pre syntaxhighlight source math chem ce",
        "dropped": "ref gallery timeline table imagemap score graph mapframe maplink hiero templatedata inputbox"
        " includeonly indicator categorytree style script rp",
        "line": "br p div li ul ol dl dt dd tr hr blockquote center poem h1 h2 h3 h4 h5 h6 caption",
        "stripped": "b i u s em strong small big sub sup span font code tt kbd samp var del ins strike abbr cite q dfn"
        " bdi bdo mark ruby rb rt rtc wbr td th tbody thead references noinclude onlyinclude section time nobr data",
    }.items()
    for name in names.split()
}
FORMULAS = ("math", "chem", "ce")
# A tag's attributes are looked for 1,000 characters far: "a <b and" in a text must not cost the rest of the page.
TAG = re.compile(r"<!--|<(/?)([a-zA-Z][a-zA-Z0-9]*)(\s[^<>]{0,1000}|/|)>")

# Pairs of brackets. "-{" before an odd number of braces is a dash and a template: "1900-{{a}}".
MARK = re.compile(
    r"^[ \t:]*\{\||^[ \t]*\|\}(?!\})|\[\[(?!\[)|\]\]|-\{(?=(?:\{\{)*(?!\{))|\{\{|\}+-?|^==(?=.*==[ \t]*$)", re.MULTILINE
)
PARTNER = {"}}": "{{", "]]": "[[", "}-": "-{", "|}": "{|"}
MAX_NESTING = 15  # real pages stay under 10; the parser's own limit is 40, and a template takes two of it
VARIANT = re.compile(r"(?:^|;)\s*(zh(?:-[a-z]+)*)\s*:")
FLAGS = re.compile(r"\s*([A-Z+-](?:\s*;\s*[A-Z+-])*|(?:zh(?:-[a-z]+)*[\s;]*)+|)\s*\|")

ARGUMENT = re.compile(r"(?<!-)\{\{\{[^{}|]*(?:\|([^{}]*))?\}\}\}")  # {{{name|default}}}, left over in a page
NOT_SHOWN = re.compile(
    r"\s*(?:file|image|media|category|文件|檔案|档案|图像|圖像|图片|圖片|媒体|媒體|分类|分類|файл|картинка|категория)\s*:",
    re.IGNORECASE,
)
OTHER_WIKI = re.compile(r"\s*[a-z]{2,3}(?:-[a-z-]+)?:")  # a link to the same article in another language

# What a reader sees of a template: the first of these arguments that it has. The rest prints nothing.
SHOWN = {
    name: arguments.split()
    for arguments, names in {
        "2": "lang|langx|lang2|transl|translit|color|colour|font color|hover title|僻字2",
        "1": "nowrap|nobr|nobold|noitalic|small|smaller|large|larger|big|resize|midsize|sub|sup|sc|smallcaps|math|mvar|"
        "var|code|codes|mono|keypress|key|kbd|abbr|tooltip|quote|cquote|blockquote|quotation|vanchor|flag|flagcountry|"
        "angbr|formatnum|nts|ipa|em|strong|bold|b|i|u|僻字|專名|专名|pua|val",
        "d lt 3 1": "internal link helper|link|le|ilh|interlanguage link helper",
        "lt 1": "ill|interlanguage link|interlanguage link multi|illm",
        "4 3 2": "tsl|translink|translation link",
    }.items()
    for name in names.split("|")
}
SIGNS = {
    "!": "|",
    "=": "=",
    "'": "'",
    "·": "·",
    "•": "•",
    "dot": "·",
    "nbsp": " ",
    "ndash": "–",
    "mdash": "—",
    "--": "—",
    "snd": " – ",
    "spaced ndash": " – ",
}

# Sections without prose. See also / 参见 / 相关条目 are among them: a list of titles, which teaches a model to list.
# A bare 来源 is not: it is as often the origin of a thing as the sources of the page.
SECTIONS = re.compile(
    "[注註]|[注註][释釋解]|[脚腳][注註]|[参參]考|(?:[参參]考)?(?:文[献獻]|[书書]目|[条條]目)|(?:[参參]考|[资資]料)[来來]源|[参參]考[资資]料|"
    "(?:外部|相[关關])[链鏈連连][接结結]|(?:延伸|[扩擴]展)[阅閱][读讀]|[参參][见見看阅閱]|另[见見]|相[关關][条條]目|"
    "references?|(?:foot)?notes?|citations?|sources?|bibliography|external links?|see also|further reading|works cited"
)
AND = re.compile(r"[和与與及暨、/&,]|\band\b")
HEADING = re.compile(r"(={1,6})(.+?)\1")
TEXT = 9  # below any heading
HAN = re.compile(r"[\u3400-\u9fff]")

LINK = re.compile(r"\[(?:https?:|ftp:|mailto:|//)[^\s\[\]]*+[ \t]*+([^\[\]\n]*+)\]", re.IGNORECASE)
FIRST = re.compile(rf"^ *{GONE}[ {GONE}]*[.,;:，。；：、]*")  # of a list item that began with what was dropped
JUNK = re.compile(r"\||!.*(?:!!|\|)|----")
SWITCH = re.compile(r"__(?:(?:NO|FORCE|HIDDEN|NEW|STATIC)[A-Z]+|TOC|INDEX|DISAMBIG|[\u4e00-\u9fff]{2,9})__")
BLANKS = f" \t\u00a0\u3000{GONE}"
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
# At most 20 characters to each side, or a line of a thousand dropped templates would cost its square.
PAUSE = " ,，、;；:："
EMPTY = re.compile(rf"[（(「『“《\[][{PAUSE}.。/–—-]{{0,20}}{GONE}[{PAUSE}.。/–—{GONE}-]{{0,20}}[）)」』”》\]]")
LEFT_BEHIND = [
    re.compile(rf"(?<=[（(])[{PAUSE}]{{0,20}}{GONE}[{PAUSE}{GONE}]{{0,20}}"),
    re.compile(rf"[{PAUSE}]{{0,20}}{GONE}[{PAUSE}{GONE}]{{0,20}}(?=[）)])"),
    re.compile(rf"[{PAUSE}] ?{GONE} ?(?=[{PAUSE.strip()}。.])"),
    re.compile(rf" {GONE}[ {GONE}]{{0,20}}(?=[,.;:!?])"),
]
WIDE = "，。、；：！？（）「」『』《》"  # bring their own blank
BESIDE_WIDE = re.compile(rf"(?<=[{WIDE}]) +|(?<=\S) +(?=[{WIDE}])")
PROMISE = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||-\{|\}-|<ref", re.IGNORECASE)


def to_text(wikitext: str, title: str = "", keep_title: bool = True, keep_math: bool = True) -> str:
    """What a reader sees of a page's wikitext, without tables, pictures, notes and lists of links.

    Args:
        wikitext: of one page.
        title: of the page.
        keep_title: the title is the first line.
        keep_math: formulas stay, as $LaTeX$. What is kept as written (formulas, code, nowiki) gets a blank between two
            brackets that together would be wiki markup: "}}" -> "} }", the same to LaTeX.

    Returns:
        Paragraphs; "" if nothing is left but the title. Never contains [[ ]] {{ }} {| -{ }- or <ref.

    Raises:
        UserError: mwparserfromhell is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError("the stage wiki needs the package mwparserfromhell", "pip install mwparserfromhell") from None
    safe: list[str] = []
    text = _cut(PRIVATE.sub("", wikitext), safe, keep_math)
    text = _match(ARGUMENT.sub(r"\1", text))
    text = _show(mwparserfromhell.parse(text, skip_style_tags=True), title).translate(UNHIDE)
    text = _tidy(_lines(text))
    text = re.sub(f"{OPEN}(\\d+){CLOSE}", lambda m: safe[int(m[1])], text)
    text = _sweep(PRIVATE.sub("", text)).strip()
    return f"{_sweep(title)}\n\n{text}" if text and title and keep_title else text


def _cut(text: str, safe: list[str], keep_math: bool) -> str:
    """Comments and tags; the insides of the "safe" ones go into `safe`, a number stays."""
    opens, closes = defaultdict(list), defaultdict(list)
    for m in TAG.finditer(text):
        if m[2] and not m[3].endswith("/"):
            (closes if m[1] else opens)[m[2].lower()].append((m.start(), m.end()))
    last = text.rfind("-->")  # a comment that is never closed hides nothing
    out, at = [], 0
    while m := TAG.search(text, at):
        out.append(text[at : m.start()])
        at, name = m.end(), (m[2] or "").lower()
        kind = TAGS.get(name)
        if not name:
            at = text.find("-->", at) + 3 if at <= last else at
        elif kind is None or not (m[3].strip(" /\n\t") == "" or "=" in m[3]):  # "x<y>z", "List<String>": text
            out.append(m[0])
        elif kind in ("safe", "dropped") and not m[1]:
            if m[3].endswith("/"):  # <ref name="a" />
                out.append(GONE)
                continue
            k = bisect_left(closes[name], (at, 0))
            following = bisect_left(opens[name], (at, 0))
            if k == len(closes[name]) or (
                # A <ref> that is opened again before it is closed was forgotten: what lies between is text.
                kind == "dropped" and following < len(opens[name]) and opens[name][following] < closes[name][k]
            ):
                continue
            inside, at = text[at : closes[name][k][0]], closes[name][k][1]
            if kind == "dropped" or (name in FORMULAS and not keep_math):
                out.append(GONE)
            else:
                safe.append(_as_written(inside, name))
                line = "\n" if name in ("pre", "syntaxhighlight", "source") and "\n" in inside else ""
                out.append(f"{line}{OPEN}{len(safe) - 1}{CLOSE}{line}")
        elif kind == "line":
            out.append("\n")
        elif name == "rt":
            out.append("）" if m[1] else "（")
        elif name == "sup" and not m[1] and text[at : at + 1] in tuple("0123456789-−"):
            out.append("^")  # 10<sup>6</sup> is not 106
        elif name in ("td", "th"):
            out.append(" ")
    return "".join(out) + text[at:]


def _as_written(inside: str, name: str) -> str:
    """A formula, code or nowiki: as it is, but for blanks that keep its brackets from looking like wiki markup."""
    if name in FORMULAS:
        inside = f"${' '.join(inside.split())}$"
    else:
        inside = html.unescape(inside)
    return re.sub(r"\[(?=\[)|\](?=\])|\{(?=[{|])|-(?=\{)|\}(?=[}-])|<(?=ref)", r"\g<0> ", inside, flags=re.IGNORECASE)


def _match(text: str) -> str:
    """Pairs of brackets; those without partner go, as do tables; variants are chosen."""
    out: list[str] = []
    stack: list[list] = []  # open brackets: [mark, its place in `out`, how deep the pairs inside it are nested]
    count = dict.fromkeys(PARTNER.values(), 0)  # of each in the stack

    def leave(keep=False):
        mark, place, depth = stack.pop()
        count[mark] -= 1
        if not keep:
            out[place] = ""
        if stack:
            stack[-1][2] = max(stack[-1][2], depth)

    def close(mark):
        while stack[-1][0] != PARTNER[mark]:
            leave()  # the innermost open bracket has no partner
        _, place, depth = stack[-1]
        if mark == "|}":
            out[place + 1 :] = [f"\n{GONE}\n"]
            stack[-1][2] = 0
            leave()
        elif depth >= MAX_NESTING:
            leave()
        else:
            stack[-1][2] += 1
            if mark == "}-":
                out[place + 1 :] = [_variant("".join(out[place + 1 :]))]
            else:
                out.append(mark)
            leave(keep=mark != "}-")

    at = 0
    for m in MARK.finditer(text):
        out.append(text[at : m.start()].translate(HIDE))
        at, mark = m.end(), m[0].strip(" \t:")
        if mark in count:
            count[mark] += 1
            stack.append([mark, len(out), 0])
            out.append(mark)
        elif mark.startswith("="):
            # No template, link or table of an article has a heading inside: one that was never closed costs its
            # section some marks, and not the rest of the page.
            while stack:
                leave()
            out.append(mark)
        elif mark in ("]]", "|}"):
            if count[PARTNER[mark]]:
                close(mark)
        else:  # a run of closing braces, perhaps with a dash: which of them belong together, the open ones tell
            braces, dash = mark.count("}"), mark.endswith("-")
            while braces:
                if braces >= 2 and count["{{"]:
                    close("}}")
                    braces -= 2
                elif braces == 1 and dash and count["-{"]:
                    close("}-")
                    braces, dash = 0, False
                else:
                    out.append("}".translate(HIDE))
                    braces -= 1
            out.append("-" * dash)
    while stack:
        leave()
    return re.sub(r"^(?=[*#:;=-])", START, "".join(out) + text[at:].translate(HIDE), flags=re.MULTILINE)


def _variant(inside: str) -> str:
    """What the inside of -{..}- prints for a reader in mainland China."""
    if flags := FLAGS.match(inside):
        inside = inside[flags.end() :]
        if {flag.strip() for flag in flags[1].split(";")} & {"H", "T", "-"}:  # hidden, the page's title, a rule's end
            return GONE
    before, *rules = VARIANT.split(inside)
    if not rules or before.strip():
        return inside
    variants = dict(zip(rules[::2], (text.strip().rstrip(";") for text in rules[1::2])))
    return next((variants[code] for code in ("zh-cn", "zh-hans", "zh") if code in variants), variants[rules[0]])


def _show(code, title: str) -> str:
    """What a reader sees of parsed wikitext; MAX_NESTING bounds the recursion."""
    out = []
    for node in code.nodes:
        kind = type(node).__name__
        if kind == "Template":
            out.append(_template(node, title) or GONE)
        elif kind == "Wikilink":
            target = str(node.title)
            if NOT_SHOWN.match(target) or (node.text is None and OTHER_WIKI.match(target)):
                out.append(GONE)
            else:
                shown = _show(node.text, title) if node.text is not None else ""
                out.append(shown if shown.strip() else _show(node.title, title).strip().removeprefix(":"))
        elif kind == "ExternalLink":
            out.append(_show(node.url, title))
        else:  # text and entities
            out.append(str(node))
    return "".join(out)


def _template(node, title: str) -> str:
    """What a reader sees of a template; "" if it is not known here."""
    name = " ".join(str(node.name).replace("_", " ").split()).lower()
    name = re.sub(r"^(?:(?:subst|safesubst|template|模板) ?: ?)+", "", name)
    if name in SIGNS:
        return SIGNS[name]
    if name == "pagename":
        return title
    if name.startswith("formatnum:"):
        return _show(node.name, title).partition(":")[2].strip()
    values = {str(p.name).strip(): p.value for p in node.params}

    def get(key):
        return _show(values[key], title).strip() if key in values else ""

    def bracketed(outer, *inner):
        inner = [text for text in inner if text]
        if not inner or not outer:
            return outer or " ".join(inner)
        return f"{outer}（{'，'.join(inner)}）" if HAN.search(outer) else f"{outer} ({', '.join(inner)})"

    if name == "bd":  # {{bd|1900年|1月1日|1980年|2月2日}}
        born, died = get("1") + get("2"), get("3") + get("4")
        return f"（{born or '？'}－{died}）" if born or died else ""
    if name == "nihongo":
        return bracketed(get("1"), get("2"), get("3"))
    if name in ("ruby", "ruby-ja", "ruby-py"):
        return bracketed(get("1"), get("2"))
    if name in ("convert", "cvt"):  # 5 km; 5 to 10 km
        return " ".join(get(k) for k in ("1234" if get("2") in ("to", "-", "–", "and", "by", "x", "×") else "12"))
    if name in ("frac", "sfrac"):
        return "/".join(get(key) for key in ("1", "2", "3") if get(key))
    if name in ("chem", "linktext"):
        return "".join(get(key) for key in values if key.isdecimal())
    if name == "as of":
        return " ".join(filter(None, ("as of" if get("lc") else "As of", get("3"), get("2"), get("1"))))
    if name.startswith("lang-"):
        return get("1")
    if name.startswith(("link-", "internal link helper/")):
        name = "internal link helper"
    return next(filter(None, map(get, SHOWN.get(name, ()))), "")


def _lines(text: str) -> str:
    """Headings, lists and what else begins a line; sections without prose and headings without text go."""
    text = SWITCH.sub("", LINK.sub(lambda m: m[1] or GONE, text))
    lines: list[tuple[int, str]] = []  # (level of the heading or TEXT, line)
    numbers: list[int] = []  # of "#" lists, for each depth
    skipping = 0  # the level of the heading whose section is left out
    for line in text.split("\n"):
        line = re.sub("''+", "", line).strip(BLANKS)
        if heading := HEADING.fullmatch(line):
            level, name = len(heading[1]), heading[2].strip("= " + BLANKS)
            if skipping and level > skipping:
                continue
            parts = [part.strip() for part in AND.split(name.casefold()) if part.strip()]
            skipping = level if parts and all(map(SECTIONS.fullmatch, parts)) else 0
            if not skipping and name:
                lines += [(TEXT, ""), (level, name), (TEXT, "")]
        elif not skipping:
            marks = re.match(r"[*#:;]*", line)[0]
            rest = FIRST.sub("", line[len(marks) :]).strip(BLANKS)
            marks = marks[-MAX_NESTING:]
            depth, last = len(marks), marks[-1:]
            numbers = (numbers + [0] * depth)[: depth if last == "#" else max(depth - 1, 0)]
            if last == "#" and rest:
                numbers[-1] += 1
            # A row of a table that lost its frame; a rule; a line that lost all its words.
            if JUNK.match(rest) or (GONE in line and not re.search(r"\w", rest)) or (marks and not rest):
                continue
            bullet = {"*": "- ", "#": f"{numbers[-1] if numbers else 0}. "}.get(last, "")
            lines.append((TEXT, "  " * sum(mark in "*#" for mark in marks[:-1]) + bullet + rest))
    out, below = [], 0  # the level of what follows: a heading is empty if that is no deeper
    for level, line in reversed(lines):
        if level == TEXT or level < below:
            out.append(line)
            below = level if line else below
    return "\n".join(reversed(out))


def _tidy(text: str) -> str:
    """Entities, invisible characters, what dropped things left behind, blanks."""
    text = INVISIBLE.sub("", html.unescape(text))
    text = re.sub(r"(?<=\S)[^\S\n]+", " ", text)
    for _ in range(2):  # （（...）） has been seen
        text = EMPTY.sub(GONE, text)
    for pattern in LEFT_BEHIND:
        text = pattern.sub("", text)
    text = re.sub(r"(?<=\S) {2,}", " ", text.replace(GONE, ""))
    text = BESIDE_WIDE.sub("", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", text, flags=re.MULTILINE))


def _sweep(text: str) -> str:
    """No two characters that are wiki markup remain side by side, also not after two between them went."""
    if not PROMISE.search(text):
        return text
    out: list[str] = []
    for character in text:
        out.append(character)
        for size in (2, 4):
            if PROMISE.fullmatch("".join(out[-size:])):
                del out[-size:]
    return "".join(out)


def wiki(docs: Iterable[Doc], account: Account, options: WikiConfig) -> Iterator[Doc]:
    """The stage: pages as `page_doc` makes them -> the text of the articles.

    Args:
        docs: their text is a JSON line with "title", "text" (wikitext), "namespace" and "redirect".
        account: rejects are called "redirect", "not an article" and "empty" (a title and nothing else).
        options: see `WikiConfig`.

    Raises:
        UserError: a document is no such line, or mwparserfromhell is not installed.
    """

    def work(doc):
        try:
            page = json.loads(doc.text)
            title, text, namespace, redirect = (page[key] for key in ("title", "text", "namespace", "redirect"))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{doc.where}: not a page of a MediaWiki dump", "leave the stage wiki out") from None
        if redirect:
            account.reject(doc, "redirect")
        elif namespace != 0:
            account.reject(doc, "not an article")
        elif result := to_text(text, title, options.keep_title, options.keep_math):
            yield Doc(result, doc.where)
        else:
            account.reject(doc, "empty")

    return each(docs, account, work)


STAGE = Stage("wiki", wiki, WikiConfig(), items=True)

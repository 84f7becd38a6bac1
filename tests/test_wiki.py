"""Promises of extras/corpus/wiki.py: dumps are streamed, pages become text, no markup is left, nothing runs for hours."""

import bz2
import io
import json
import re
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from extras.corpus.account import Account, Doc
from extras.corpus.wiki import Page, WikiConfig, page_doc, pages, to_text, wiki

MARKUP = ("[[", "]]", "{{", "}}", "{|", "<ref", "-{", "}-")


@pytest.fixture
def parser():
    pytest.importorskip("mwparserfromhell")


def left_over(text: str) -> list[str]:
    return [mark for mark in MARKUP if mark in text.lower()]


# Dumps ----------------------------------------------------------------------------------------------------------------


def dump(*inside: str, version: str = "0.11", head: str = "") -> str:
    return f'{head}<mediawiki xmlns="http://www.mediawiki.org/xml/export-{version}/">{"".join(inside)}</mediawiki>'


def page(title="甲", text="乙", ns=0, more="") -> str:
    return f"<page><title>{title}</title><ns>{ns}</ns>{more}<revision><id>1</id><text>{text}</text></revision></page>"


def read(xml: str | bytes, path: str = "x.xml") -> list[Page]:
    return list(pages(io.BytesIO(xml if isinstance(xml, bytes) else xml.encode()), path))


def test_pages_are_read_in_order_and_numbered_from_1():
    siteinfo = "<siteinfo><sitename>W</sitename><namespaces><namespace key='0'/></namespaces></siteinfo>"
    xml = dump(siteinfo, page("A&amp;B", "  一\n二 &lt;ref&gt;"), page("Talk:C", "三", ns=1))
    assert read(xml) == [Page("A&B", "一\n二 <ref>", "x.xml:1", False, 0), Page("Talk:C", "三", "x.xml:2", False, 1)]


@pytest.mark.parametrize("version", ["0.3", "0.10", "0.11", "9.9"])
def test_any_export_version_is_read(version):
    assert [p.title for p in read(dump(page(), version=version))] == ["甲"]


def test_a_dump_without_namespace_and_one_with_a_prefix_are_read():
    assert read("<mediawiki>" + page() + "</mediawiki>")[0].text == "乙"
    prefixed = re.sub(r"<(/?)(\w)", r"<\1w:\2", page())
    assert read(f'<w:mediawiki xmlns:w="http://x/">{prefixed}</w:mediawiki>')[0].text == "乙"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_byte_order_mark_need_no_declaration(encoding):
    assert read(dump(page("標題", "文")).encode(encoding))[0][:2] == ("標題", "文")


def test_a_declared_encoding_is_used():
    head = '<?xml version="1.0" encoding="iso-8859-1"?>'
    assert read(dump(page("é", "ü"), head=head).encode("latin-1"))[0][:2] == ("é", "ü")


def test_redirects_are_marked_by_element_or_text():
    xml = dump(
        page(more='<redirect title="丙" />'), page(text="#重定向 [[丙]]"), page(text="#REDIRECT: [[丙]]"), page()
    )
    assert [p.redirect for p in read(xml)] == [True, True, True, False]


def test_the_newest_revision_is_the_page():
    assert (
        read(
            dump(
                "<page><title>甲</title><ns>0</ns><revision><text>旧</text></revision>"
                "<revision><text>新</text></revision></page>"
            )
        )[0].text
        == "新"
    )


def test_a_page_without_text_is_a_page():
    assert read(dump('<page><title>甲</title><revision><text deleted="deleted" /></revision></page>'))[0].text == ""


@pytest.mark.parametrize(
    ("xml", "line"),
    [
        (dump("\n", page(), "\n<page><title>甲"), 3),  # the closing tag of another element
        (dump(page())[:-30], 1),
        ("<mediawiki>\n<page>\n<title>甲", 3),
        ("", 1),
        ("no XML", 1),
        ("<html>\n</html>", 1),
        ("<mediawiki>\n\n&nbsp;</mediawiki>", 3),
        (b"<mediawiki>\n\xff\xfe</mediawiki>", 2),
        ('<?xml version="1.0" encoding="klingon"?><mediawiki/>', 1),
        ('<?xml version="1.0" encoding="gb2312"?><mediawiki/>', 1),
    ],
)
def test_damage_is_one_line_with_path_and_line(xml, line):
    with pytest.raises(UserError) as e:
        read(xml, "some/x.xml")
    assert str(e.value).startswith(f"some/x.xml:{line}: ") and "\n" not in str(e.value)


def test_every_cut_of_a_dump_is_said():
    xml = dump(page(), "\n", page("丁")).encode()
    for end in range(len(xml)):
        with pytest.raises(UserError, match=r"^x\.xml:\d+: "):
            read(xml[:end])


@pytest.mark.parametrize("cut", ["short", "damaged"])
def test_a_damaged_compressed_file_is_said(cut, tmp_path):
    path = tmp_path / "x.xml.bz2"
    data = bytearray(bz2.compress(dump(*[page(str(i)) for i in range(999)]).encode()))
    path.write_bytes(data[:-40] if cut == "short" else data[:40] + b"damage" + data[46:])
    with bz2.open(path) as stream, pytest.raises(UserError, match="cut short or damaged"):
        list(pages(stream, path.name))


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE a [<!ENTITY b "c">]>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;">]>',
    ],
)
def test_declarations_are_refused(declaration):
    with pytest.raises(UserError, match=r"x\.xml:1: a document type declaration"):
        read(dump(page(text="&d;"), head=declaration))


class Endless(io.RawIOBase):
    """A dump of many pages that is never in memory."""

    def __init__(self, count: int):
        body = page(text="字" * 2000).encode()
        self.parts = iter([b"<mediawiki>", *[body] * count, b"</mediawiki>"])
        self.rest = b""

    def read(self, size=-1):
        while len(self.rest) < size and (part := next(self.parts, b"")):
            self.rest += part
        data, self.rest = self.rest[:size], self.rest[size:]
        return data


def test_memory_does_not_grow_with_the_dump():
    list(pages(Endless(10), "x"))
    peaks = []
    for count in (200, 4000):  # 1.2 MB, 24 MB
        tracemalloc.start()
        assert sum(1 for _ in pages(Endless(count), "x")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 4 << 20


# Wikitext -------------------------------------------------------------------------------------------------------------

GOLDEN = [
    # Chinese variants
    ("-{zh-hans:计算机;zh-hant:電腦}-和-{zh-hant:電腦; zh-cn: 电脑; }-", "计算机和电脑"),
    ("-{zh-tw:滑鼠;zh-cn:鼠标;zh-hans:滑鼠器}-、-{zh:字;zh-tw:體}-、-{zh-tw:軟體;zh-hk:軟件}-", "鼠标、字、軟體"),
    ("-{生物}-、-{H|zh-cn:甲;zh-tw:乙}-丙、-{T|zh-cn:甲;zh-tw:乙}-丁、-{A|zh-cn:甲;zh-tw:乙}-戊", "生物、丙、丁、甲戊"),
    ("[[A|-{zh-hans:[[甲|乙]];zh-hant:丙}-]]是[[-{zh-hans:甲;zh-hant:乙}-]]", "乙是甲"),
    ("-{{{lang|en|X}}}-、1900-{{lang|en|X}}-1901、{{lang|en|-{Y}-}}", "X、1900-X-1901、Y"),
    ("-{zh-hans:{{lang|en|a&nbsp;b}};zh-hant:c}-、-{zh-hans:-{甲}-乙;zh-hant:丙}-、甲-{}-乙", "a b、甲乙、甲乙"),
    ("-{zh-cn;zh-hans|丁}-、-{|戊}-", "丁、戊"),
    # templates
    ("'''鲁迅'''{{bd|1881年|9月25日|1936年|10月19日|L}}", "鲁迅（1881年9月25日－1936年10月19日）"),
    (
        "{{bd|1950年|3月3日}}、{{BD|||1980年|}}、{{bd|[[1900年]]|[[1月1日]]|1980年|2月2日}}{{bd}}",
        "（1950年3月3日－）、（？－1980年）、（1900年1月1日－1980年2月2日）",
    ),
    (
        "法国（{{lang-fr|'''[[France]]'''}}，{{IPA-fr|fʁɑ̃s}}）、{{lang|fr|{{lang|de|x}}}}、{{langx|en|b}}",
        "法国（France）、x、b",
    ),
    (
        "{{le|中文|English}}、{{link-en|甲|A|乙}}、{{tsl|en|Original|中文}}、{{tsl|en|O|甲|乙}}、{{tsl|en|Interix}}",
        "中文、乙、中文、乙、Interix",
    ),
    (
        "{{Internal link helper/en|甲|A}}、{{internal link helper|乙|B|lang-code=en}}、{{Link_ja|x}}{{ill|丙|en|C|lt=丁}}",
        "甲、乙、丁",
    ),
    (
        "{{nihongo|东京|東京|Tōkyō}}、{{nihongo|Tokyo|東京}}、{{ruby|漢字|かな}}",
        "东京（東京，Tōkyō）、Tokyo (東京)、漢字（かな）",
    ),
    ("<ruby><rb>漢</rb><rp>(</rp><rt>かん</rt><rp>)</rp></ruby>", "漢（かん）"),
    (
        "{{NoteTA|1=zh-cn:甲;zh-tw:乙|G1=IT}}{{Infobox|a=[[b]]|c={{d|e={{f}}}}\n|g=<ref>{{h}}</ref>}}甲{{CURRENTYEAR}}",
        "甲",
    ),
    (
        "{{quote|甲{{lang|la|乙}}}}、{{nowrap|1=丙=丁}}、{{formatnum:1234}}、{{convert|5|to|10|km}}、{{frac|1|2}}",
        "甲乙、丙=丁、1234、5 to 10 km、1/2",
    ),
    ("甲{{{1|乙}}}丙{{{2}}}丁", "甲乙丙丁"),
    # what dropped templates leave
    ("空（{{x}}）的（{{a}}；{{b}}）和main()与（{{a}}，甲；{{b}}）乙「{{x}}」", "空的和main()与（甲）乙"),
    ("甲，{{x}}，乙<ref>a</ref>。 <ref>b</ref> 丙 {{x}}{{y}}。a {{x}}, b", "甲，乙。丙。a, b"),
    # links, files, categories
    (
        "[[File:a.jpg|thumb|200px|说明[[乙]]和[[丙|丁]]]]甲[[文件:b.png]][[檔案:c.png|x]][[图像:d.png]][[分类:甲]][[分類:乙]]",
        "甲",
    ),
    (
        "[[:Category:乙|丙]]、[[:分类:丁]]、[[#节]]、[[ 戊 ]]、[[[己]]]、[[en:Foo]][[zh-min-nan:Bar]]",
        "丙、分类:丁、#节、戊、[己]、",
    ),
    ("[http://a.b/c 甲]、[https://a {{lang|en|b}} [[c]]]、http://x.y/z", "甲、b c、http://x.y/z"),
    # tags
    ('甲<ref>[[a]]{{b|c}}</ref>乙<ref name="x" />丙<ref name=y>q<br/></ref>丁<!-- [[x]]\n -->戊', "甲乙丙丁戊"),
    ("<gallery>\nFile:a.jpg|甲\n</gallery>乙<timeline>x</timeline><imagemap>y</imagemap>", "乙"),
    ("甲<nowiki>[[乙]] '''丙''' &lt;ref {{丁}}</nowiki>戊", "甲[ [乙] ] '''丙''' < ref { {丁} }戊"),
    (
        '设<math display="inline">f(x)=\\frac{1}{\\sqrt{x}}\n-{a}</math>为函数，H<sub>2</sub>O，10<sup>6</sup>',
        "设$f(x)=\\frac{1}{\\sqrt{x} } - {a}$为函数，H2O，10^6",
    ),
    ('a<b and c>d, List<String> <span style="x">x</span><br />y', "a<b and c>d, List<String> x\ny"),
    ("<pre>\n# x\n  * y[[0]]\n</pre>", "# x\n  * y[ [0] ]"),
    # tables, headings, lists
    ("{| class=x\n|a||b\n|-\n|\n{|\n|c\n|}\n|{{d|e}}\n|}\n甲", "甲"),
    (
        "== [[历史]]{{anchor|x}} ==\n文\n=== -{zh-cn:子;zh-tw:丑}- ===\n节\n=== 空 ===\n{{x}}\n== 后 ==\n丙",
        "历史\n\n文\n\n子\n\n节\n\n后\n\n丙",
    ),
    (
        "* 甲\n** 乙\n# 丙\n# 丁\n## 戊\n# 己\n; 词\n: 解\n:* 庚\n\n# 辛\n* {{cite|x}}.",
        "- 甲\n  - 乙\n1. 丙\n2. 丁\n  1. 戊\n3. 己\n词\n解\n- 庚\n\n1. 辛",
    ),
    ("''斜''、'''粗'''、'''''都'''''、&nbsp;&lt;乙&gt;&amp;amp;\u200b", "斜、粗、都、<乙>&amp;"),
    ("__NOTOC__甲__不转换__乙 __init__\n----\n丙\n\n\n\n丁", "甲乙 __init__\n丙\n\n丁"),
    ("* {{cite|x}}. 甲\n* <ref>x</ref> 乙", "- 甲\n- 乙"),
    # broken markup
    ("甲<ref>没有结尾。丙<ref>丁</ref>戊", "甲没有结尾。丙戊"),
    ("甲[[乙|丙\n\n丁]] 己]]{{Cite|a}}}}庚{{", "甲丙\n\n丁 己庚"),
    ("{{lang|en|甲\n\n乙\n== 标题 ==\n丙}}", "lang|en|甲\n\n乙\n\n标题\n\n丙"),
    ("{|\n! a !! b\n|-\n| c\n甲\n== 标题 ==\n乙\n|}", "甲\n\n标题\n\n乙"),
    ("&#91;&#91;甲&#93;&#93;&lt;ref&gt;乙", "甲>乙"),
]


@pytest.mark.parametrize(("wikitext", "text"), GOLDEN)
def test_golden(wikitext, text, parser):
    assert to_text(wikitext) == text


@pytest.mark.parametrize(
    "heading",
    [
        "注释",
        "註釋",
        "参考文献",
        "參考文獻",
        "参考资料",
        "參考資料",
        "外部链接",
        "外部連結",
        "外部連接",
        "参见",
        "參見",
        "相关条目",
        "注释与参考资料",
        "References",
        "External links",
        "Notes",
        "See also",
        "Further reading",
        "Bibliography",
        "Notes and references",
    ],
)
def test_sections_without_prose_go_with_their_subsections(heading, parser):
    text = f"甲\n== {heading} ==\n* 去\n=== 子 ===\n去\n== 后 ==\n乙\n=={heading}==\n* 去"
    assert to_text(text) == "甲\n\n后\n\n乙"


@pytest.mark.parametrize("heading", ["参与者", "来源", "注音", "Notes on style", "和"])
def test_other_sections_stay(heading, parser):
    assert to_text(f"甲\n== {heading} ==\n乙") == f"甲\n\n{heading}\n\n乙"


def test_the_innermost_of_too_many_brackets_are_read(parser):
    assert to_text("{{lang|en|" * 50 + "甲" + "}}" * 50) == "lang|en|" * 35 + "甲"


def test_less_than_and_a_far_greater_than_are_no_tag(parser):
    text = "若a <b 则x = 1，" + "字" * 1000 + "而c > d"
    assert to_text(text) == text


def test_the_title_is_the_first_line_unless_there_is_no_text(parser):
    assert to_text("乙", "甲") == "甲\n\n乙"
    assert to_text("乙", "甲", keep_title=False) == "乙"
    assert to_text("{{x}}", "甲") == ""
    assert to_text("'''{{PAGENAME}}'''是", "甲", keep_title=False) == "甲是"


def test_formulas_can_be_left_out(parser):
    assert to_text("设<math>x</math>为（<math>y</math>）数", keep_math=False) == "设为数"


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(UserError, match="needs the package mwparserfromhell -- pip install mwparserfromhell"):
        to_text("甲")


# The promise ----------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    "{{",
    "}}",
    "[[",
    "]]",
    "{|",
    "\n{|",
    "|}",
    "\n|}",
    "-{",
    "}-",
    "{{{",
    "}}}",
    "{",
    "}",
    "[",
    "]",
    "<",
    "-",
    "|",
    "=",
    ";",
    ":",
    "<ref>",
    "</ref>",
    "<ref name=a/>",
    "<!--",
    "-->",
    "<nowiki>",
    "</nowiki>",
    "<math>",
    "</math>",
    "<br/>",
    "<b>",
    "<r",
    "ef",
    "'''",
    "''",
    "[http://x.y ",
    "http://",
    "\n",
    "\n== a ==\n",
    "\n* ",
    "\n# ",
    "\n|-\n",
    " ",
    "中文",
    "a",
    "（",
    "）",
    "(",
    ")",
    "lang|en|",
    "{{lang|en|",
    "{{tsl|en|",
    "{{bd|",
    "zh-cn:",
    "zh-tw:",
    "H|",
    "&#91;",
    "&#93;",
    "&#123;",
    "&#125;",
    "&lt;ref",
    "&amp;",
    "File:",
    "分类:",
    "formatnum:",
    "\ufdd0",
    "\ufdd1",
    "\ufdd2",
    "\ufdd03\ufdd1",
]


@settings(max_examples=600)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join), st.sampled_from(["", "甲", "[[x", "{{<ref>}}"]))
def test_no_markup_is_left_whatever_comes_in(wikitext, title):
    pytest.importorskip("mwparserfromhell")
    assert not left_over(to_text(wikitext, title))


PARAGRAPHS = "甲段开头。\n\n乙段（一）在[[中]]间{{lang|en|Q}}。\n\n* 丙项\n\n丁段结尾。"
STRAY = [
    "{{",
    "}}",
    "[[",
    "]]",
    "{|",
    "|}",
    "-{",
    "}-",
    "<ref>",
    "</ref>",
    "<ref name=x>",
    "<!--",
    "<nowiki>",
    "<gallery>",
    "</math>",
    "<table>",
    "<div>",
]


@given(st.sampled_from(STRAY), st.integers(0, 3), st.booleans())
def test_one_stray_mark_costs_no_paragraph(mark, where, at_end):
    pytest.importorskip("mwparserfromhell")
    parts = PARAGRAPHS.split("\n\n")
    parts[where] = parts[where] + mark if at_end else mark + parts[where]
    text = to_text("\n\n".join(parts))
    assert not left_over(text)
    assert not [word for word in ("甲段开头", "乙段", "在中间Q", "丙项", "丁段结尾") if word not in text]


SLOW = {
    "open templates": ("{{", 100_000),
    "templates with argument": ("{{a|", 50_000),
    "open links": ("[[a|", 50_000),
    "open tables": ("{|\n", 50_000),
    "open tags": ("<b>", 50_000),
    "open refs": ("<ref>", 30_000),
    "attributes": ("<b a=", 30_000),
    "open comments": ("<!--", 100_000),
    "open urls": ("[http://a ", 20_000),
    "styles": ("<div style='", 15_000),
    "lists": ("#*", 50_000),
    "quotes": ("'''a''", 30_000),
    "sweep": ("[{{[{", 30_000),
    "entities": ("&#91;&#123;", 15_000),
    "parentheses": ("({{a}},", 20_000),
    "variant": ("-{", 50_000),
    "headings": ("== a ==\n", 15_000),
    "blanks": (" ", 150_000),
    "arguments": ("{{{", 50_000),
    "mixed": ("{{a|[[b|-{c", 10_000),
    "links": ("[[a|b]]", 15_000),
    "equals": ("=", 100_000),
    "newlines in names": ("{{a\nb|" * 14 + "}}" * 14, 800),
    "nested, many": ("{{lang|en|" * 14 + "x" + "}}" * 14, 700),
}
CLOSED = {
    "templates": ("{{a|", "}}"),
    "links": ("[[a|", "]]"),
    "shown": ("{{lang|en|", "}}"),
    "variants": ("-{zh-tw:b;zh-cn:a", "}-"),
    "tables": ("{|\n|", "\n|}\n"),
    "both": ("{{a|[[b|", "]]}}"),
    "tags": ("<b>", "</b>"),
}

MEASURE = """
import json, sys, time
from extras.corpus.wiki import to_text
to_text("warm")
for name, text in json.load(sys.stdin).items():
    start = time.process_time()
    result = to_text(text)
    print(json.dumps([name, time.process_time() - start, result[:200]]), flush=True)
"""


@pytest.mark.heavy
def test_pathological_pages_take_less_than_two_seconds(root, parser):
    cases = {name: unit * n for name, (unit, n) in SLOW.items()}
    cases |= {
        "pauses": "甲" + "{{a}}," * 20_000 + "乙",
        "long url": "[http://" + "a" * 100_000,
        "deep list": "#*" * 50_000 + "x",
        "variant flags": "-{" + "zh   " * 1000 + "x}-",
    }
    cases |= {f"nested {name}": a * 10_000 + b * 10_000 for name, (a, b) in CLOSED.items()}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps(cases),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(cases)
    assert not [(name, seconds) for name, seconds, _ in rows if seconds > 2]
    assert not [(name, text) for name, _, text in rows if left_over(text)]


# The stage ------------------------------------------------------------------------------------------------------------


def test_the_stage_accounts_for_every_page(parser):
    account = Account("wiki")
    docs = [
        page_doc(p)
        for p in (
            Page("甲", "'''甲'''是[[字]]。", "x:1"),
            Page("乙", "#REDIRECT [[甲]]", "x:2", redirect=True),
            Page("Talk:甲", "说", "x:3", namespace=1),
            Page("丙", "{{stub}}", "x:4"),
            Page("丁", "有<math>x</math>。", "x:5"),
        )
    ]
    assert list(wiki(docs, account, WikiConfig())) == [Doc("甲\n\n甲是字。", "x:1"), Doc("丁\n\n有$x$。", "x:5")]
    assert account.rejected == {"redirect": 1, "not an article": 1, "empty": 1}
    assert (account.seen, account.kept, account.missing) == (5, 2, 0)


def test_the_options_reach_the_text(parser):
    doc = page_doc(Page("甲", "有<math>x</math>。", "x:1"))
    assert list(wiki([doc], Account("wiki"), WikiConfig(keep_title=False, keep_math=False))) == [Doc("有。", "x:1")]


@pytest.mark.parametrize("text", ["plain", "[]", "{}", '"x"', '{"title": "a"}'])
def test_what_is_no_page_is_said(text):
    with pytest.raises(UserError, match=r"^f\.txt:3: not a page of a MediaWiki dump"):
        list(wiki([Doc(text, "f.txt:3")], Account("wiki"), WikiConfig()))


# Real dumps -----------------------------------------------------------------------------------------------------------

DUMPS = {  # file -> pages, redirects, articles with text
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (206, 100, 106),
    "enwiki-table-markup.xml.bz2": (5, 0, 5),
    "bgwiki-latest-pages-articles-shortened.xml.bz2": (3, 0, 1),  # UTF-16; two of the pages are no articles
}


@pytest.mark.parametrize("name", DUMPS)
def test_real_dumps(name, shared_data, parser):
    path = shared_data / "wiki" / name
    raw = bz2.decompress(path.read_bytes())
    xml = raw.decode("utf-16" if raw.startswith(b"\xff\xfe") else "utf-8")
    account = Account("wiki")
    with bz2.open(path) as stream:
        texts = list(wiki(map(page_doc, pages(stream, name)), account, WikiConfig()))
    assert account.seen == len(re.findall(r"<page>", xml)) == DUMPS[name][0]
    assert account.rejected["redirect"] == len(re.findall(r"<redirect\b", xml)) == DUMPS[name][1]
    assert (account.kept, account.missing) == (DUMPS[name][2], 0)
    for doc in texts:
        assert not left_over(doc.text)
        assert not re.search(
            r"<br|</?span|&nbsp;|'''|\[https?:|style=\"|^\s*(?:\||!.*!!)|（）|\ufdd0", doc.text, re.M
        ), doc.where
        assert not re.search(r"^(References|External links|See also)$", doc.text, re.M), doc.where


def test_the_chinese_page(shared_data, parser):
    text = to_text(
        next((shared_data / "wiki").glob("zhwiki_*.wikitext")).read_text(encoding="utf-8"), "微软POSIX子系统"
    )
    paragraphs = text.split("\n\n")
    assert paragraphs[0] == "微软POSIX子系统" and len(paragraphs) == 5
    assert paragraphs[1].endswith("Windows NT家族操作系统的三个子系统之一（另两个是OS/2和Windows子系统）。")
    assert (
        "FIPS）151-2中列出的要求。Windows NT 3.5、Windows NT 3.51和Windows NT 4被认定完全兼容FIPS 151-2。"
        in paragraphs[2]
    )
    assert paragraphs[4].endswith("它被使用Interix子系统的“Windows Services for UNIX”取代。")
    assert not left_over(text) and not re.search("参见|注释|Category|Russinovich|Reflist", text)


PEAK = """
import bz2, re, sys
from extras.corpus.account import Account
from extras.corpus.wiki import WikiConfig, page_doc, pages, wiki
account = Account("wiki")
with bz2.open(sys.argv[1]) as stream:
    for doc in wiki(map(page_doc, pages(stream, "x")), account, WikiConfig()):
        pass
status = open("/proc/self/status").read()
print(account.seen, account.kept, int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) // 1024)
"""  # not getrusage: a child's ru_maxrss begins with what its parent had, here all of torch


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_dump_takes_less_than_300_mb(root, shared_data, parser):
    path = shared_data / "wiki" / next(iter(DUMPS))
    result = subprocess.run([sys.executable, "-c", PEAK, path], cwd=root, capture_output=True, text=True, check=True)
    seen, kept, peak_mb = map(int, result.stdout.split())
    assert (seen, kept) == (206, 106) and peak_mb < 300

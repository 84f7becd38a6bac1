"""Rules for characters, for what does not belong into a text, and for texts that are none.

In:  documents. Out: documents with normalised characters and without links, addresses, tags, numbers of people; too
     short, too odd or too repetitive ones are rejected.
Does not know other documents: duplicates are dedup.py's.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from core.config import Range, Section
from core.errors import UserError
from extras.corpus.account import Account, Doc, Stage, each

# What each rule takes out. Digits are bounded, so that a part of a longer number (an ISBN, a price) is no phone number.
RULES = {
    "url": re.compile(r"(?:https?://|ftp://|www\.)[\w\-.~:/?#\[\]@!$&'()*+,;=%]+", re.ASCII | re.IGNORECASE),
    "email": re.compile(r"[\w.+\-]+@[\w\-]+(?:\.[\w\-]+)+", re.ASCII),
    "html": re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>\n]{0,500}>", re.DOTALL | re.IGNORECASE),
    "phone": re.compile(
        r"(?<![\d.])(?:(?:\+?86[\- ]?)?1[3-9]\d[\- ]?\d{4}[\- ]?\d{4}|0\d{2,3}[\-－ ]\d{7,8})(?![\d.])", re.ASCII
    ),
    "contact": re.compile(
        r"(?:加|＋)?(?:QQ|扣扣|企鹅|微信|weixin|wechat|\bVX)(?:群|号|号码|公众号)*\s*[:：是为]?\s*"
        r"(?<![0-9])(?:[1-9]\d{4,11}|[a-zA-Z][\w\-]{5,19})(?!\d)",
        re.ASCII | re.IGNORECASE,
    ),
}
REPEATED = re.compile(r"([^\w\s])\1{3,}")  # the same mark four times or more: three say as much
BLANK = (re.compile(r"[ \t\u3000\xa0]+$", re.MULTILINE), re.compile(r"\n{3,}"))
# Full-width letters, digits and the marks among digits; Chinese punctuation is full-width by right and stays.
HALF_WIDTH = {0xFEE0 + ord(c): c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789%+-=@#&*"}
# Zero-width and direction marks; not the joiners that emoji and Indic scripts need.
UNSEEN = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffc]")
REPETITION_GRAM = 10  # characters: novels repeat 1 to 3 % of such runs, spam most of them


@dataclass(frozen=True)
class CleanConfig(Section):
    # Unicode form: NFKC also changes Chinese punctuation to ASCII.
    normalize: Literal["NFC", "NFKC", "none"] = "NFC"
    half_width: bool = True  # full-width letters and digits become ASCII
    remove: tuple[str, ...] = tuple(RULES)  # rules to apply; each is counted, --keep_rejected says what it took
    repeated: bool = True  # a mark repeated four times or more becomes three
    simplify: bool = False  # traditional to simplified characters (pip install opencc)
    min_chars: int = 10  # after all rules
    min_words: int = 0  # counted by jieba (pip install jieba); the 0.5B TinyLM project drops below 10
    min_han: Annotated[float, Range(least=0, most=1)] = 0.0  # share of Han characters, white space not counted
    # Share of what is neither letter, digit nor common punctuation, likewise.
    max_symbols: Annotated[float, Range(least=0, most=1)] = 0.5
    # Share of 10-character runs that the document had before.
    max_repetition: Annotated[float, Range(least=0, most=1)] = 0.5

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.remove) - set(RULES):
            raise ValueError(f"remove {', '.join(sorted(unknown))}: rules are {', '.join(RULES)}")


def clean(docs: Iterable[Doc], account: Account, cfg: CleanConfig) -> Iterator[Doc]:
    """The stage: rules first, thresholds on what they leave."""
    simplify = _simplifier() if cfg.simplify else None
    count_words = _word_counter() if cfg.min_words else None

    def one(doc: Doc) -> Iterator[Doc]:
        text = rewrite(doc, account, cfg, simplify)
        if reason := too_poor(text, cfg, count_words):
            account.reject(doc, reason)
        else:
            yield Doc(text, doc.where)

    return each(docs, account, one)


def rewrite(doc: Doc, account: Account, cfg: CleanConfig, simplify: Callable[[str], str] | None = None) -> str:
    """A document's text after all rules; what they took is noted."""
    text = doc.text
    changes: list[tuple[str, Callable[[str], str]]] = []
    if cfg.normalize != "none":
        changes.append(("normalize", lambda t: unicodedata.normalize(cfg.normalize, t)))
    changes.append(("unseen characters", lambda t: UNSEEN.sub("", t)))
    if cfg.half_width:
        changes.append(("half_width", lambda t: t.translate(HALF_WIDTH)))
    changes += [
        (rule, lambda t, rule=rule: RULES[rule].sub(lambda m: _take(doc, account, rule, m), t))
        for rule in RULES
        if rule in cfg.remove
    ]
    if "html" in cfg.remove:
        changes.append(("html entities", html.unescape))  # after the tags: &lt;b&gt; is meant to be read
    if cfg.repeated:
        changes.append(("repeated", lambda t: REPEATED.sub(lambda m: m[1] * 3, t)))
    if simplify:
        changes.append(("simplify", simplify))
    changes.append(("blanks", lambda t: BLANK[1].sub("\n\n", BLANK[0].sub("", t)).strip("\n")))
    for name, change in changes:
        before, text = text, change(text)
        if text != before:
            account.changed[name] += 1
    return text


def _take(doc: Doc, account: Account, rule: str, match: re.Match) -> str:
    account.note(doc, f"removed by {rule}", match[0])
    # What is gone should not glue two words together; a comment or tag between letters did not separate them before.
    return " " if rule != "html" and match.string[match.start() - 1 : match.start()].isascii() else ""


def too_poor(text: str, cfg: CleanConfig, count_words: Callable[[str], int] | None = None) -> str:
    """Why a text is not worth keeping; "" if it is."""
    if len(text) < max(1, cfg.min_chars):
        return f"shorter than {max(1, cfg.min_chars)} characters"
    chars = "".join(text.split())
    if not chars:
        return "empty"
    if count_words and count_words(text) < cfg.min_words:
        return f"fewer than {cfg.min_words} words"
    if cfg.min_han and len(HAN.findall(chars)) < cfg.min_han * len(chars):
        return f"less than {cfg.min_han:g} of it is Han characters"
    if cfg.max_symbols < 1 and len(SYMBOL.findall(chars)) > cfg.max_symbols * len(chars):
        return f"more than {cfg.max_symbols:g} of it is symbols"
    if cfg.max_repetition < 1 and repetition(chars) > cfg.max_repetition:
        return f"more than {cfg.max_repetition:g} of it is repeated"
    return ""


HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
SYMBOL = re.compile(r"[^\w，。、；：？！“”‘’（）《》〈〉【】「」『』—…·,.;:?!\"'()\-%/]")


def repetition(text: str) -> float:
    """Share of the runs of REPETITION_GRAM characters that occurred before in the text."""
    runs = len(text) - REPETITION_GRAM + 1
    return 1 - len({text[i : i + REPETITION_GRAM] for i in range(runs)}) / runs if runs > 0 else 0.0


def _simplifier() -> Callable[[str], str]:
    try:
        import opencc
    except ImportError:
        raise UserError("simplify needs the package opencc", "pip install opencc") from None
    return opencc.OpenCC("t2s").convert


def _word_counter() -> Callable[[str], int]:
    try:
        import jieba
    except ImportError:
        raise UserError("min_words needs the package jieba", "pip install jieba") from None
    jieba.setLogLevel(60)
    return lambda text: sum(bool(re.search(r"\w", word)) for word in jieba.cut(text))


STAGE = Stage("clean", clean, CleanConfig())

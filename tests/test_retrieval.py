"""Retrieval: the passages that bm25s finds, the chats that are made of them, the command that asks with them in front."""

import itertools
import json
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
from test_commands import command

import retrieve
import sample
import tokenizer
from assembly.inference import Chat
from core import errors
from core.errors import UserError
from extras.retrieval.augment import augment
from extras.retrieval.bm25 import Index, RetrievalConfig, Shelf, read, terms, with_passages
from tokenizer import chat

NOTES = ["刘表，字景升。", "李典，字曼成。", "孔融，字文举。", "张昭，字子布。", "曹操，字孟德。"]


def asked(question: str, answer: str = "", **fields) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def write_lines(path, items) -> str:
    path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8")
    return str(path)


def zipf_texts(count: int, rng: random.Random) -> list[str]:
    """Texts of 1 to 80 characters, some frequent, most rare, with marks, ASCII words and repeats between them."""
    characters = [chr(0x4E00 + i) for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    marks = ["，", "。", " GPT-4 ", " llama", "2024年", "Ａ"]
    return [
        "".join(
            rng.choices(characters, weights)[0] if rng.random() < 0.9 else rng.choice(marks)
            for _ in range(rng.randint(1, 80))
        )
        for _ in range(count)
    ]


# The index ------------------------------------------------------------------------------------------------------------


def test_terms_are_pairs_of_characters_and_ascii_words_whole():
    assert terms("刘表的字，是 景升？") == ["刘表", "表的", "的字", "是", "景升"]
    assert terms("用GPT-4写第64回！") == ["用", "gpt", "4", "写第", "64", "回"]
    assert terms("第６４回，ＡＢ") == ["第", "64", "回", "ab"] and terms("……！ _") == [] == terms("")


def same_top_three(passages: list[str], questions: list[str]) -> int:
    """Compare with bm25s on the same terms; returns for how many questions no tie leaves it a choice."""
    bm25s = pytest.importorskip("bm25s")
    theirs = bm25s.BM25(k1=1.5, b=0.75)  # its default variant, Lucene's
    theirs.index([terms(p) for p in passages], show_progress=False)
    ours, clear = Index(passages), 0
    for question in questions:
        known = [t for t in terms(question) if t in ours.ids]
        scores = theirs.get_scores(known) if known else np.zeros(len(passages), np.float32)
        np.testing.assert_array_equal(ours.scores(question), scores)
        # bm25s leaves open which of equal passages comes first (argpartition); here it is the earlier one.
        order = sorted((n for n in range(len(passages)) if scores[n] > 0), key=lambda n: (-scores[n], n))[:4]
        assert ours.best(question, 3) == order[:3]
        if len(order) == 4 and len({float(scores[n]) for n in order}) == 4:
            found = theirs.retrieve([known], k=3, show_progress=False, n_threads=0).documents[0]
            assert ours.best(question, 3) == found.tolist()
            clear += 1
    return clear


def test_the_top_three_of_two_hundred_questions_are_those_of_bm25s():
    rng = random.Random(0)
    passages = zipf_texts(1500, rng)
    # Pieces of passages, some of them of two passages, as questions are; the last with terms that no passage has.
    cut = [p[len(p) // 4 :][:12] for p in rng.sample(passages, 400)]
    questions = [a + b * (n % 3 == 0) + "鿿鿾" * (n > 180) for n, (a, b) in enumerate(zip(cut[:200], cut[200:]))]
    assert same_top_three(passages, questions) > 150


def test_on_real_questions_they_are_too(shared_data):
    items = json.loads((shared_data / "sft/llamafactory_alpaca_zh_demo.json").read_text())
    passages = list(dict.fromkeys(item["output"][:200] for item in items))
    assert same_top_three(passages, [item["instruction"] + item["input"] for item in items[:200]]) > 150


def test_scores_are_the_formula_summed_term_by_term():
    rng = random.Random(1)
    passages, index = (texts := zipf_texts(60, rng)), Index(texts)
    rows = [Counter(terms(p)) for p in passages]
    mean = sum(row.total() for row in rows) / len(rows)
    for question in zipf_texts(20, rng):
        for n, row in enumerate(rows):
            wanted = 0.0
            for term in terms(question):
                df = sum(term in other for other in rows)
                idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
                wanted += idf * row[term] / (row[term] + 1.5 * (1 - 0.75 + 0.75 * row.total() / mean))
            assert index.scores(question)[n] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_of_equal_passages_the_earlier_ones_are_taken_and_of_unknown_words_none():
    index = Index([f"第{n}号：刘表" for n in range(10)])
    assert index.best("刘表", 3) == [0, 1, 2] and index.best("刘表", 20) == list(range(10))
    assert index.best("鿿鿾", 3) == index.best("", 3) == index.best("？", 3) == []
    assert Index(["。", "，"]).best("刘表", 3) == []


# The passages ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("\ufeff刘表，字景升。\r\n\n  孔融，\t字文举。\n", encoding="utf-8")
    (tmp_path / "deep/c.txt").write_text("刘表，字景升。\n", encoding="utf-8")
    (tmp_path / "book.pdf").write_text("x")
    write_lines(tmp_path / "a.jsonl", [{"text": "曹操，\n字孟德。", "source": "x"}, {"text": ""}])
    passages, told = read(str(tmp_path), 200)
    assert passages == ["曹操， 字孟德。", "刘表，字景升。", "孔融， 字文举。"]
    assert told == f"{tmp_path}: 3 passages of 3 files; 1 files are neither .txt nor .jsonl; 1 passages stood twice"
    assert read(str(tmp_path / "b.txt"), 200)[0] == passages[1:]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 13, 14, 15, 50])
def test_windows_over_a_long_passage_overlap_and_lose_nothing(tmp_path, length):
    text = "".join(chr(0x4E00 + i) for i in range(length))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    passages, _ = read(str(tmp_path), 8)
    assert passages[0] + "".join(p[2:] for p in passages[1:]) == text and max(map(len, passages)) <= 8
    assert all(a[-2:] == b[:2] for a, b in itertools.pairwise(passages)) and min(map(len, passages)) > (length > 8) * 2


def test_what_cannot_be_read_is_one_line(tmp_path):
    for name, text, said in (
        ("x", None, "x: not found"),
        ("e", b"", "no text in 1 files"),
        ("u.txt", b"\xff", "not UTF-8 at byte 0"),
        ("k.jsonl", b'{"body": "x"}', "k.jsonl:1: needs a text -- keys here: body"),
    ):
        path = tmp_path / name
        if text == b"":
            path.mkdir()
            path = path / "e.txt"
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(UserError, match=said):
            read(str(path), 200)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.txt or \.jsonl files"):
        read(str(tmp_path / "empty"), 200)


def test_passages_stand_before_the_last_question_only():
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "刘表字什么？"},
    ]
    put = with_passages(messages, NOTES[:2])
    assert (
        put[:2] == messages[:2]
        and put[2]["content"] == "资料：\n1. 刘表，字景升。\n2. 李典，字曼成。\n\n问题：刘表字什么？"
    )
    assert messages[2]["content"] == "刘表字什么？" and with_passages(messages, []) == messages
    answered = [*messages, {"role": "assistant", "content": "景升。"}]
    assert with_passages(answered, NOTES[:2]) == [*put, answered[3]], "one form, to train on and to ask in"


# Chats to train on ----------------------------------------------------------------------------------------------------


def test_the_right_passage_stands_at_any_place_among_the_next_best():
    index = Index([*NOTES, *(f"刘表的第{n}件事" for n in range(4))])
    places, seen = Counter(), set()
    for seed in range(300):
        messages, chosen, right, _ = augment(
            asked("刘表的字是什么？", "刘表，字景升。")["messages"], [NOTES[0]], index, 3, 0, random.Random(seed)
        )
        assert right and len(chosen) == 3 and set(chosen) - {NOTES[0]} == {"刘表的第0件事", "刘表的第1件事"}
        places[chosen.index(NOTES[0])] += 1
        seen.add(messages[0]["content"])
    assert all(70 < places[place] < 130 for place in range(3)) and len(seen) == 6
    assert messages[1]["content"] == "刘表，字景升。"


def test_without_a_named_passage_the_best_for_question_and_answer_is_the_right_one():
    index = Index(["表字是什么？人的第二个名字。", *NOTES])
    chosen = augment(asked("谁的表字是什么？", "李典，字曼成。")["messages"], [], index, 2, 0, random.Random(0))[1]
    assert NOTES[1] in chosen
    # A window of the right passage, or what it is a window of, is no wrong one.
    index = Index(["刘表，字景升。荆州牧。", "字景升。荆州", "刘表之子刘琦"])
    assert augment(asked("刘表，字景升")["messages"], ["刘表，字景升。荆州牧。"], index, 3, 0, random.Random(0))[1] in (
        a := ["刘表，字景升。荆州牧。", "刘表之子刘琦"],
        a[::-1],
    )


def test_a_share_of_the_chats_gets_wrong_passages_only_or_none():
    index, kinds = Index([*NOTES, "刘表的事"]), Counter()
    for seed in range(1000):
        _, chosen, right, found = augment(
            asked("刘表字什么？", "刘表，字景升。")["messages"], [NOTES[0]], index, 2, 0.4, random.Random(seed)
        )
        assert right == (NOTES[0] in chosen) and found
        kinds["right" if right else "wrong" if chosen else "none"] += 1
    assert 550 < kinds["right"] < 650 and 150 < kinds["wrong"] < 250 and 150 < kinds["none"] < 250


def augmented(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["retrieve.py", *words])
    retrieve.main()
    return capsys.readouterr().out


def test_the_command_writes_every_chat_that_fits_and_counts_the_others(tmp_path, small, monkeypatch, capsys):
    small.save(tmp_path / "tokenizer")
    (tmp_path / "notes").mkdir()
    names = [chr(0x4E00 + n) + chr(0x5E00 + n) for n in range(30)]
    notes = [f"{name}的字是{name[::-1]}。" for name in names]
    (tmp_path / "notes/a.txt").write_text("\n".join(notes), encoding="utf-8")
    chats = [
        asked(f"{name}的字是什么？", note, kind="name", **({"passage": f" {note}\n"} if ord(name[0]) % 2 else {}))
        for name, note in zip(names, notes)
    ]
    path = write_lines(tmp_path / "chats.jsonl", [*chats, asked("长" * 300, "长。")])
    words = [
        "--input",
        path,
        "--retrieve",
        str(tmp_path / "notes"),
        "--output",
        str(tmp_path / "new/out.jsonl"),
        "--passages",
        "2",
        "--without",
        "0",
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--chat_format",
        "bos",
    ]

    def lines():
        return [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_text(encoding="utf-8").splitlines()]

    said = augmented(monkeypatch, capsys, *words)
    assert "30 chats, 30 with the right passage, 0 with wrong ones only, 0 with none" in said
    assert "in 30 of them a right passage is among the 2 best" in said
    assert "1 chats longer than 256 tokens left out: " in said and "chats.jsonl:31 (" in said
    for line, item, note in zip(lines(), chats, notes):
        content = line["messages"][0]["content"]
        assert f". {note}\n" in content and content.startswith("资料：\n1. ") and "\n2. " in content
        assert content.endswith(f"\n\n问题：{item['messages'][0]['content']}")
        assert {**line, "messages": item["messages"]} == item and line["messages"][1] == item["messages"][1]
    sizes = [len(chat.render(line["messages"], small, "bos")[0]) for line in lines()]
    said = augmented(monkeypatch, capsys, *words, "--max_tokens", str(max(sizes) - 1))
    fitting = [size for size in sizes if size < max(sizes)]
    assert (
        f"{len(fitting)} chats, " in said
        and f"\n{31 - len(fitting)} chats longer than {max(sizes) - 1} tokens left out" in said
    )
    assert [len(chat.render(line["messages"], small, "bos")[0]) for line in lines()] == fitting
    made = []
    for more in ([], [], ["--seed", "2"], ["--without", "0.9"]):
        augmented(monkeypatch, capsys, *words, *more)
        made.append((tmp_path / "new/out.jsonl").read_bytes())
    assert made[0] == made[1] and len(set(made)) == 3, "the same seed, the same file"
    for extra, said in (
        ([], "chats and passages are missing"),
        (["--input", path], "chats and passages are missing"),
        ([*words, "--output", path], "would be written over"),
        ([*words, "--max_tokens", "3"], "no chats of at most 3"),
        ([*words, "--gold", "kind", "--passage_chars", "2"], "must be at least 4"),
        ([*words, "--gold", "messages"], "text or a list"),
    ):
        with pytest.raises(UserError, match=said):
            augmented(monkeypatch, capsys, *extra)
    for bad in (
        {"text": "x"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": asked("x", "y")["messages"][::-1]},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
        {"messages": "xy"},
    ):
        path = write_lines(tmp_path / "bad.jsonl", [bad])
        with pytest.raises(UserError, match=r"bad\.jsonl:1: needs messages that end with a question and its answer"):
            augmented(monkeypatch, capsys, *words, "--input", path)


# Asking ---------------------------------------------------------------------------------------------------------------


def test_passages_that_have_no_room_are_left_out_the_worst_first(tmp_path, small):
    (tmp_path / "a.txt").write_text("\n".join(["刘表刘表字", "刘表" + "甲" * 20, "刘表" + "乙" * 30]), encoding="utf-8")

    def ids(messages):
        return chat.render(messages, small, "bos", generation=True)[0]

    cfg, found = RetrievalConfig(retrieve=str(tmp_path)), None
    for room in range(400, 0, -1):
        messages, passages, left_out = Shelf(cfg, ids, room).put("刘表字什么？")
        assert len(passages) + left_out == 3 and (found or passages)[: len(passages)] == passages
        assert messages == with_passages([{"role": "user", "content": "刘表字什么？"}], passages)
        assert not passages or len(ids(messages)) <= room
        found = found or passages
    assert found[0] == "刘表刘表字" and passages == [] and left_out == 3
    with pytest.raises(tokenizer.TokenizerError):
        Shelf(cfg, ids, 99).put([{"role": "assistant", "content": "x"}])


@pytest.fixture
def ask(home, tmp_path, monkeypatch, capsys):
    """sample.py of a small chat model, with these words behind it -> what it said."""

    def run(*more: str):
        words = ["--model", str(home / "chat"), "--device", "cpu", "--temperature", "0", "--max_new_tokens", "5", *more]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        sample.main()
        return capsys.readouterr()

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("\n".join(NOTES), encoding="utf-8")
    return run


def test_sample_asks_with_the_passages_and_tells_them(ask, home, tmp_path):
    plain = ask("--prompt", "资料：\n1. 孔融，字文举。\n\n问题：孔融的字").out
    said = command(
        tmp_path,
        "sample.py",
        "--model",
        str(home / "chat"),
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max_new_tokens",
        "5",
        "--retrieve",
        "notes",
        "--passages",
        "1",
        "--prompt",
        "孔融的字",
    )
    assert said == plain + "note: notes: 5 passages of 1 files\npassages: 1. 孔融，字文举。\n"
    notes = ["--retrieve", "notes", "--passages", "1"]
    assert ask(*notes, "--prompt", "鿿").err.endswith("passages: none\n")
    (tmp_path / "red.txt").write_text("孔融\x1b[31m", encoding="utf-8")
    assert ask("--retrieve", "red.txt", "--prompt", "孔融").err.endswith("passages: 1. 孔融?[31m\n")
    prompts = write_lines(tmp_path / "prompts.jsonl", [asked("孔融的字", "文举"), asked("鿿", "？")])
    ask(*notes, "--prompts", prompts, "--output", "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["passages"] for line in lines] == [["孔融，字文举。"], []]
    assert lines[0]["prompt"] == asked("孔融的字")["messages"][:1] and lines[0]["answer"] == plain.strip()
    with pytest.raises(UserError, match="--retrieve needs a chat model"):
        ask(*notes, "--model", str(home / "chat-base"), "--prompt", "孔融")


def test_passages_that_leave_no_room_for_the_answer_are_left_out_and_told(ask, small, tmp_path):
    def size(count: int) -> int:
        put = with_passages([{"role": "user", "content": "孔融"}], ["孔融，字文举。", "孔融" + "在" * count])
        return len(chat.render(put, small, "bos", generation=True)[0])

    fits = max(count for count in range(200) if size(count) <= 128 - 5)  # positions, and max_new_tokens
    for count, told in ((fits, "。 2. 孔融" + "在" * fits), (fits + 1, "。 (1 more had no room)")):
        (tmp_path / "notes/a.txt").write_text("孔融，字文举。\n孔融" + "在" * count, encoding="utf-8")
        assert ask("--retrieve", "notes", "--prompt", "孔融").err.endswith(f"passages: 1. 孔融，字文举{told}\n")
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "孔融"}] * 3)
    said = ask("--retrieve", "notes", "--prompts", prompts)
    assert "note: 3 of the passages that were found had no room in their prompts\n" in said.err
    assert all(json.loads(line)["passages"] == ["孔融，字文举。"] for line in said.out.splitlines())


def test_in_a_conversation_only_the_newest_question_has_passages(ask, home, monkeypatch):
    seen, encode = [], Chat.encode
    monkeypatch.setattr(Chat, "encode", lambda self, prompt: seen.append(prompt) or encode(self, prompt))
    turns = iter(["孔融？", "李典？"])
    monkeypatch.setattr("builtins.input", lambda _: next(turns, ""))
    ask("--model", str(home / "long"), "--chat", "--retrieve", "notes", "--passages", "1")
    questions = [message["content"] for message in seen[-1] if message["role"] == "user"]
    assert questions == ["孔融？", "资料：\n1. 李典，字曼成。\n\n问题：李典？"]


def test_an_empty_folder_is_refused_in_one_line(ask, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: ask("--retrieve", "empty", "--prompt", "孔融"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: empty: no .txt or .jsonl files -- --retrieve FOLDER\n"

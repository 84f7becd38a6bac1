"""Promises of extras/evaluation's metrics, generation and promptcblue: the numbers are those of the packages they name.

Oracles: sacrebleu, rouge-chinese, transformers' BasicTokenizer, and counts made by hand.
"""

import json
import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import ANY_TEXT

from assembly.inference import Generator, InferenceConfig, open_generator
from core import hf_folder
from core.errors import UserError
from core.generate import SamplingConfig
from extras.decoding.batching import continued
from extras.evaluation import generation, metrics, promptcblue
from extras.evaluation.generation import Answer
from extras.evaluation.report import Progress
from model import ModelConfig


@pytest.fixture(scope="module")
def pairs(request) -> list[tuple[str, str]]:
    """300 answers with their references, of real texts: near, far, cut, mixed with English, empty."""
    shared = request.getfixturevalue("shared_data")
    texts = [
        turn["value"]
        for line in (shared / "medical/medicalgpt_medical_sft_1K.jsonl").open(encoding="utf-8")
        for turn in json.loads(line)["conversations"]
    ]
    english = 'The U.S. rate was 3.5% in 2019-2020; don\'t ask why (see "A&B", p. 7, 1,000 cases). HIV-1, IL-6.'
    chance, made = random.Random(0), []
    for text in chance.sample([t for t in texts if len(t) > 10], 300):
        reference = text[: chance.randint(10, 120)]
        words = chance.sample(english.split(), 4)
        cut = sorted(chance.randint(0, len(reference)) for _ in range(2))
        answer = chance.choice(
            [
                reference,
                reference[cut[0] : cut[1]],
                reference[cut[1] :] + reference[: cut[1]],
                "",
                english[:60],
                reference[: cut[0]] + " ".join(words) + reference[cut[1] :],
                chance.choice(texts)[:100],
                "，".join(reference.split("，")[::-1]),
                " ".join(reference[: cut[1]]) + "\n" + reference,
            ]
        )
        made.append((answer, reference if chance.random() < 0.8 else f"{words[0]} {reference}, {words[1]}"))
    return made


# BLEU -----------------------------------------------------------------------------------------------------------------


def test_bleu_equals_sacrebleu_on_300_real_pairs(pairs):
    sacrebleu = pytest.importorskip("sacrebleu")
    for some in (pairs, pairs[:1], pairs[100:120]):
        theirs = sacrebleu.corpus_bleu([a for a, _ in some], [[b for _, b in some]], tokenize="zh").score
        assert metrics.corpus_bleu(*zip(*some)) == pytest.approx(theirs, abs=1e-6)
    got = [metrics.sentence_bleu(a, b) for a, b in pairs]
    assert got == pytest.approx([sacrebleu.sentence_bleu(a, [b], tokenize="zh").score for a, b in pairs], abs=1e-6)
    assert min(got) == 0 and max(got) > 99 and len(set(got)) > 100, "the pairs are of all kinds"


MIXED = (
    st.lists(
        st.sampled_from(
            [
                *"你好，。“”…—·～3 7.,-'/%&(\n",
                "ab",
                "𠀀",
                "\u2000",
                "\u2001",
                "\u200b",
                "\u2a6d",
                "\u2a6e",
                "é",
                "龥",
                "龼",
            ]
        ),
        max_size=14,
    ).map("".join)
    | ANY_TEXT
)


@given(text=MIXED)
def test_any_text_is_cut_as_sacrebleu_cuts_it(text):
    zh = pytest.importorskip("sacrebleu.tokenizers.tokenizer_zh").TokenizerZh()
    assert metrics.bleu_tokens(text) == zh(text.rstrip()).split()


@given(some=st.lists(st.tuples(MIXED, MIXED), min_size=1, max_size=4))
def test_bleu_of_any_texts_equals_sacrebleu(some):
    sacrebleu = pytest.importorskip("sacrebleu")
    theirs = sacrebleu.corpus_bleu([a for a, _ in some], [[b for _, b in some]], tokenize="zh").score
    assert metrics.corpus_bleu(*zip(*some)) == pytest.approx(theirs, abs=1e-6)
    for a, b in some:
        assert metrics.sentence_bleu(a, b) == pytest.approx(
            sacrebleu.sentence_bleu(a, [b], tokenize="zh").score, abs=1e-6
        )


# ROUGE ----------------------------------------------------------------------------------------------------------------


def test_rouge_equals_rouge_chinese_on_300_real_pairs(pairs):
    package = pytest.importorskip("rouge_chinese").Rouge()
    empty = 0
    for a, b in pairs:
        got = metrics.rouge(metrics.characters(a), metrics.characters(b))
        if not a:  # refused by the package
            assert got == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}
            empty += 1
            continue
        (theirs,) = package.get_scores(*(" ".join("".join(text.split())) for text in (a, b)))
        expected = {
            "rouge_1": theirs["rouge-1"]["f"],
            "rouge_2": theirs["rouge-2"]["f"],
            "rouge_l": theirs["rouge-l"]["f"],
        }
        assert got == pytest.approx(expected, abs=1e-12)
    assert 5 < empty < 100


@given(a=st.text("天地玄黄。！？ .a", min_size=1), b=st.text("天地玄黄。！？ .a", min_size=1))
def test_rouge_of_any_texts_equals_rouge_chinese(a, b):
    package = pytest.importorskip("rouge_chinese").Rouge()
    mine, theirs = metrics.characters(a), metrics.characters(b)
    if mine and theirs:
        (expected,) = package.get_scores(" ".join(mine), " ".join(theirs))
        got = metrics.rouge(mine, theirs)
        for ours, name in (("rouge_1", "rouge-1"), ("rouge_2", "rouge-2"), ("rouge_l", "rouge-l")):
            assert got[ours] == pytest.approx(expected[name]["f"], abs=1e-12)


def table(a, b) -> int:
    """The longest common subsequence by the textbook."""
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            rows[i][j] = rows[i - 1][j - 1] + 1 if x == y else max(rows[i - 1][j], rows[i][j - 1])
    return rows[-1][-1]


@given(a=st.text("abc", max_size=80), b=st.text("abcd", max_size=80))
def test_the_longest_common_subsequence_equals_the_table(a, b):
    assert metrics.common_subsequence(a, b) == metrics.common_subsequence(b, a) == table(a, b)


def test_rouge_of_2000_characters_takes_a_fraction_of_a_second():
    chance = random.Random(1)
    a, b = ([chance.choice("的一是不了人我在有他这为之大来") for _ in range(2000)] for _ in range(2))
    begun = time.perf_counter()
    metrics.rouge(a, b)
    assert time.perf_counter() - begun < 0.5


@given(text=ANY_TEXT | st.text(st.sampled_from("汉字，Hello-WORLD é\u0301３ 㐀𠀀豈\u200b\t\n$^+_“”")))
def test_words_are_those_of_the_tokenizer_that_the_benchmark_uses(text):
    basic = pytest.importorskip("transformers").BasicTokenizer(tokenize_chinese_chars=True)
    # Line separators and the like are spaces here, and nothing or a letter there; no answer has them.
    text = "".join(c for c in text if c not in "\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029\ufffd\0")
    assert metrics.words(text) == basic.tokenize(text)


# Exact match and F1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reference, f1",
    [
        ("曹操字孟德", "曹操，字孟德。", 10 / 12),
        ("", "好", 0.0),
        ("", "", 1.0),
        ("好 好\n", "好好", 1.0),
        ("好好", "好", 2 / 3),
        ("ab", "cd", 0.0),
    ],
)
def test_f1_counts_each_character_as_often_as_it_is_in_both(answer, reference, f1):
    assert metrics.char_f1(answer, reference) == pytest.approx(f1)


def test_exact_match_forgives_spaces_around_and_nothing_else():
    assert metrics.exact_match(" 蓝的。\n", "蓝的。") == 1
    assert metrics.exact_match("蓝的", "蓝的。") == metrics.exact_match("蓝 的。", "蓝的。") == 0


# Answers of a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(small, tmp_path_factory) -> Generator:
    """A random chat model."""
    from conftest import lively

    folder = tmp_path_factory.mktemp("chat")
    config = ModelConfig(
        vocab_size=small.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    hf_folder.save_model(folder, lively(config), small, {"chat_format": "bos"})
    return open_generator(InferenceConfig(model=str(folder), device="cpu"))


GREEDY = SamplingConfig(temperature=0, max_new_tokens=8)


def asked(path, **changes):
    return SimpleNamespace(**{"data": str(path), "limit": 0, "batch": 2, "prompts": ()} | changes)


def lines(path, items):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


def test_the_last_turn_is_held_back_and_compared_by_kind(generator, tmp_path):
    questions = ["是非成败", "青山", "几度夕阳红", "白发", "渔樵江渚"]
    said = []
    for question in questions:
        ids = generator.encode([{"role": "user", "content": question}])
        ((text,),) = continued(generator.model, [ids], GREEDY, generator.stop_ids, rows=1)
        said.append(generator.decode(ids, text.added))
    turns = [{"role": "user", "content": questions[0]}, {"role": "assistant", "content": said[0]}]
    items = [{"messages": turns, "kind": "right"}]
    items += [{"prompt": q, "target": a, "kind": "right"} for q, a in zip(questions[1:3], said[1:3])]
    items += [{"prompt": q, "target": "不对", "kind": "wrong"} for q in questions[3:]]
    report = generation.run(generator, asked(lines(tmp_path / "q.jsonl", items)), GREEDY, Progress(None, {}))
    kinds = {row[0]: dict(zip(report.tables[0].columns[1:], row[1:])) for row in report.tables[0].rows}
    assert {kind: (row["n"], row["exact_match"]) for kind, row in kinds.items()} == {
        "right": (3, 1.0),
        "wrong": (2, 0.0),
        "all": (5, 0.6),
    }
    assert kinds["right"]["bleu"] == pytest.approx(100) and kinds["right"]["rouge_l"] == pytest.approx(1, abs=1e-6)
    assert report.scores == {k: v for k, v in kinds["all"].items() if k != "n"}
    assert [row[1] for row in report.tables[1].rows] == said
    assert any("5 of 5 answers were cut off" in note for note in report.notes), "eight tokens of a random model"


def test_an_answer_in_the_journal_is_not_asked_for_again(generator, tmp_path):
    items = [{"prompt": q, "target": "红"} for q in ("青山", "夕阳", "长江", "浪花")]
    cfg, path = asked(lines(tmp_path / "q.jsonl", items), batch=1), tmp_path / "report.json"
    whole = generation.run(generator, cfg, GREEDY, Progress(path, {"a": 1}, tell=str))
    journal = path.with_name("report.json.part")
    kept = journal.read_text(encoding="utf-8").split("\n")[:3]
    assert len(kept) == 3
    kept[1] = json.dumps(["0", ["红", "stop", 2, 0.1]], ensure_ascii=False)
    journal.write_text("\n".join(kept) + "\n", encoding="utf-8")
    again = generation.run(generator, cfg, GREEDY, Progress(path, {"a": 1}, tell=str))
    assert again.tables[1].rows[0][1] == "红" and again.tables[1].rows[1:] == whole.tables[1].rows[1:]


def test_a_prompt_without_room_is_counted_and_its_answer_empty(generator, tmp_path):
    items = [{"prompt": "青山" * 200, "target": "红"}, {"prompt": "青山", "target": "红"}]
    cfg = asked(lines(tmp_path / "q.jsonl", items))
    report = generation.run(generator, cfg, GREEDY, Progress(None, {}))
    assert report.tables[1].rows[0][1:] == ["", "红", "no room"]
    assert any(note.startswith("1 of 2 prompts are longer than the model's context") for note in report.notes)
    left = SamplingConfig(temperature=0, max_new_tokens=8, truncate="left")
    report = generation.run(generator, cfg, left, Progress(None, {}))
    assert report.tables[1].rows[0][3] == "length"
    lost = len(generator.encode("青山" * 200)) - (64 - 8)
    said = f"1 of 2 prompts were asked without their first tokens, {lost} altogether"
    assert any(note.startswith(said) for note in report.notes)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "好"},
        {"prompt": "好", "target": " "},
        {"messages": []},
        {"target": "好"},
        {"messages": [{"role": "user", "content": "好"}]},
        {"messages": [{"role": "assistant", "content": "好"}]},
    ],
    ids=str,
)
def test_a_line_without_a_question_or_a_reference_is_refused_with_its_place(line, tmp_path):
    with pytest.raises(UserError, match=r"q\.jsonl:2: needs messages that end with"):
        generation.read(str(lines(tmp_path / "q.jsonl", [{"prompt": "好", "target": "好"}, line])))


# PromptCBLUE ----------------------------------------------------------------------------------------------------------


def told(text: str) -> Answer:
    return Answer(text, "stop", 1, 0.0)


@pytest.fixture(scope="module")
def benchmark(request) -> list[promptcblue.Question]:
    """The 16 tasks of the real files, five lines of each from both."""
    folder = request.getfixturevalue("shared_data") / "medical"
    files = [promptcblue.read(str(folder / f"promptcblue_toy_{part}.jsonl")) for part in ("dev", "train")]
    assert len(files[0]) == len(files[1]) == 16
    return [q for file in files for group in file.values() for q in group]


def test_the_targets_as_answers_score_one_in_every_task(benchmark):
    report = promptcblue.evaluate(benchmark, [told(q.target) for q in benchmark])
    assert len(report.scores) == 17 and list(report.scores.values()) == pytest.approx([1.0] * 17, abs=1e-7)
    assert [row[3] for row in report.tables[0].rows] == [0] * 16


def test_empty_answers_score_nothing_where_something_was_wanted(benchmark):
    report = promptcblue.evaluate(benchmark, [told("")] * len(benchmark))
    assert [row[3] for row in report.tables[0].rows] == [10] * 16, "all unparsed"
    assert {name: value for name, value in report.scores.items() if not name.endswith("rouge_l") and value} == {
        "overall": report.scores["overall"]
    }
    # 无。 stands for an empty answer, and shares its full stop with most references.
    assert 0 < report.scores["MedDG rouge_l"] < 0.2 < report.scores["IMCS-V2-MRG rouge_l"] < 0.4
    for task in ("MedDG", "IMCS-V2-MRG"):
        said = f"{task}: empty answers would score {report.scores[f'{task} rouge_l']:.3f}"
        assert any(note.startswith(said) for note in report.notes)


def naive(task: str, pairs: list[tuple[str, str]]) -> float:
    """The benchmark's score of (answer, target) pairs in the wanted form, by splitting at the marks of its format."""
    package, basic = pytest.importorskip("rouge_chinese").Rouge(), pytest.importorskip("transformers").BasicTokenizer()

    def rouge(some):
        spaced = [[" ".join(basic.tokenize(text)) or "无 。" for text in pair] for pair in some]
        return sum(package.get_scores(a, b)[0]["rouge-l"]["f"] for a, b in spaced) / len(spaced)

    if task == "MedDG":
        return rouge(pairs)
    if task == "IMCS-V2-MRG":
        return rouge(
            [
                pair
                for a, b in pairs
                for pair in zip(*([line.split("：", 1)[1] for line in text.split("\n")[1:]] for text in (a, b)))
            ]
        )
    if task in ("CHIP-STS", "CHIP-CTC", "KUAKE-IR", "KUAKE-QIC", "KUAKE-QQR", "KUAKE-QTR", "IMCS-V2-DAC"):
        labels, scores = {label for pair in pairs for label in pair}, {}
        for label in labels:
            both = sum(a == b == label for a, b in pairs)
            scores[label] = 2 * both / (sum(a == label for a, _ in pairs) + sum(b == label for _, b in pairs))
        if task in ("CHIP-CTC", "KUAKE-QIC", "IMCS-V2-DAC"):
            return sum(scores.values()) / len(labels)
        return sum(scores[b] for _, b in pairs) / len(pairs)

    def items(text):
        if task == "CHIP-CDN":
            return set(text.split("，")) - {"没有对应的标准化实体"}
        found = set()
        for line in text.split("\n")[1:] if task != "CMeIE" else text.split("\n"):
            head, tail = line.split("：", 1)
            if task == "CMeIE":
                found |= {(head, pair) for pair in tail.split("。") if pair}
            elif task in ("CMeEE-V2", "IMCS-V2-NER"):
                found |= {(head, name) for name in tail.split("，") if name}
            else:
                found.add(line)
        return found

    sets = [(items(a), items(b)) for a, b in pairs]
    both = sum(len(a & b) for a, b in sets)
    return 2 * both / sum(len(a) + len(b) for a, b in sets)


def test_answers_that_are_in_part_wrong_score_what_is_counted_by_hand(benchmark):
    chance, groups = random.Random(3), {}
    for q in benchmark:
        groups.setdefault((q.task, q.type), []).append(q)
    answers, expected = {}, {}
    for (task, kind), group in groups.items():
        pairs = []
        for k, q in enumerate(group):
            said = q.target
            if kind in ("cls", "matching") and k % 2:
                said = chance.choice(q.choices)
            elif kind == "normalization":
                said = "，".join(chance.sample(q.choices, chance.randint(1, len(q.choices))))
            elif kind == "report_generation":
                lead, *rest = q.target.split("\n")
                said = "\n".join([lead, *(line[: chance.randint(line.index("：") + 1, len(line))] for line in rest)])
            elif kind == "response_generation":
                said = q.target[: len(q.target) // 2]
            elif "\n" in q.target:  # a line lost, and one of another answer
                other = chance.choice(group).target.split("\n")
                mine = q.target.split("\n")
                mine.pop(chance.randint(1, len(mine) - 1)) if len(mine) > 2 else None
                allowed = [line for line in other[1:] if kind != "ner" or line.split("实体：")[0] in q.choices]
                said = "\n".join([*mine, *allowed[:1]])
            answers[q.where] = told(said)
            pairs.append((said, q.target))
        expected[task] = naive(task, pairs)
    report = promptcblue.evaluate(benchmark, [answers[q.where] for q in benchmark])
    got = {row[0]: row[5] for row in report.tables[0].rows}
    assert got == pytest.approx(expected, abs=1e-9)
    assert all(0.05 < value < 0.99 for task, value in got.items() if task != "IMCS-V2-DAC"), got
    assert report.scores["overall"] == pytest.approx(sum(expected.values()) / 16)


TYPES = ["疾病", "药物"]


@pytest.mark.parametrize(
    "parse, choices, text, expected",
    [
        (
            "ner",
            TYPES,
            "上述句子中的实体包含：\n疾病实体：肺炎， 咳嗽\n药物实体：",
            {("疾病", "肺炎"), ("疾病", "咳嗽")},
        ),
        ("ner", TYPES, "疾病实体：肺炎", {("疾病", "肺炎")}),
        ("ner", TYPES, "身体部位实体：肺", None),
        ("ner", TYPES, "上述句子没有指定类型实体", set()),
        ("ner", TYPES, "肺炎是一种疾病", None),
        (
            "spo_generation",
            ["同义词"],
            "具有同义词关系的头尾实体对如下：头实体为甲，尾实体为乙。头实体为丙，尾实体为丁。",
            {("同义词", "甲", "乙"), ("同义词", "丙", "丁")},
        ),
        ("spo_generation", ["同义词"], "具有同义词关系的头尾实体对如下：\n", set()),
        ("spo_generation", ["相关（转化）"], " 具有相关（转化）关系的头尾实体对如下：头实体为甲。尾实体为乙。", set()),
        ("spo_generation", ["同义词"], "头实体为甲，尾实体为乙。", None),
        ("attr_cls", ["有", "没有"], "判断如下：\n咳嗽：有\n发烧：不好说", {("咳嗽", "有"), ("发烧", "不好说")}),
        ("attr_cls", ["有", "没有"], "判断如下：\n发烧：不好说", None),
        ("attr_cls", ["有", "没有"], "判断如下：", None),
        (
            "event_extraction",
            None,
            "如下：\n主体词：痛；发生状态：否定；描述词：胀，轻；解剖部位：\n主体词：咳",
            {("痛", "否定", ("胀", "轻"), ()), ("咳", "", (), ())},
        ),
        ("event_extraction", None, "发生状态：否定；描述词：胀", None),
        ("normalization", ["甲病", "乙病"], "标准词：\n甲病，丙病", {("甲病",)}),
        ("normalization", ["甲病", "乙病"], "没有对应的标准化实体", set()),
        ("normalization", ["甲病", "乙病"], "丙病", None),
        ("cls", ["相关", "不相关"], "不相关", "不相关"),
        ("cls", ["相关", "不相关"], "答案是：不相关。", "不相关"),
        ("cls", ["相关", "不相关"], "相关，还是不相关？", None),
        ("cls", ["疾病", "疾病分期"], "属于疾病分期。", "疾病分期"),
        ("cls", ["相关", "不相关"], "不知道", None),
        ("cls", ["相关", "不相关"], "非上述类型", "非上述类型"),
        ("matching", ["是的", "不是"], "不是的，意思不同", "不是"),
        ("matching", ["是的", "不是"], "相同", "是的"),
        ("matching", ["部分匹配", "完全匹配"], "意思相同", None),
        (
            "report_generation",
            None,
            "如下：\n主诉：咳嗽。\n诊断： 感冒：轻\n医生：好",
            {"主诉": "咳嗽。", "诊断": "感冒：轻"},
        ),
        ("report_generation", None, "病人咳嗽。", None),
        ("response_generation", None, " 多喝水。\n", "多喝水。"),
        ("response_generation", None, " \n", None),
    ],
)
def test_an_answer_is_read_in_the_form_of_its_task_or_counted_as_unparsed(parse, choices, text, expected):
    assert promptcblue.PARSERS[parse](text, choices or []) == expected


def test_an_answer_without_a_label_is_wrong_but_no_label():
    scores = promptcblue.score_labels(["甲", None, "乙", "甲"], ["甲", "甲", "乙", "乙"])
    assert scores["accuracy"] == 0.5 and scores["micro_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert scores["macro_f1"] == pytest.approx((2 / 4 + 2 / 3) / 2) == pytest.approx(scores["weighted_f1"])


LINE = {"input": "问", "target": "甲", "answer_choices": ["甲", "乙"], "task_type": "cls", "task_dataset": "X"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"input": None}, "input is missing"),
        ({"task_type": "tree"}, "task_type 'tree' is not known"),
        ({"answer_choices": "甲"}, "answer_choices is not a list"),
        ({"target": "丙"}, "the target is not in the form of cls"),
    ],
    ids=str,
)
def test_a_wrong_line_of_the_benchmark_is_refused_with_its_place(change, said, tmp_path):
    with pytest.raises(UserError, match=rf"b\.jsonl:2: {said}"):
        promptcblue.read(str(lines(tmp_path / "b.jsonl", [LINE, LINE | change])))


def test_the_limit_is_for_each_task_and_unparsed_answers_are_told(generator, tmp_path):
    items = [LINE | {"task_dataset": task} for task in ("X", "X", "X", "Y", "Y")]
    report = promptcblue.run(generator, asked(lines(tmp_path / "b.jsonl", items), limit=2), GREEDY, Progress(None, {}))
    assert [row[:3] for row in report.tables[0].rows] == [["X", "cls", 2], ["Y", "cls", 2]]
    assert "4 of 4 answers had nothing in the form" in report.notes[1]

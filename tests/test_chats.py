"""Question-answer files of many formats become one chat format; what breaks a rule is rejected by name, never cut."""

import csv
import io
import json
import random
import re
import zipfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core import config
from extras.corpus.account import Account, Doc
from extras.corpus.chats import FORMATS, ROLES, BadChat, ChatsConfig, augment, chats, convert, detect, flat
from tokenizer import chat


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Messages: user and assistant in turn."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def run(items, **options):
    """The stage on items: (chats out as dicts, its account)."""
    account = Account("chats")
    docs = [Doc(item if isinstance(item, str) else json.dumps(item), f"f:{n}") for n, item in enumerate(items, 1)]
    return [(json.loads(doc.text), doc.where) for doc in chats(docs, account, ChatsConfig(**options))], account


def bad(item, *args, **options) -> BadChat:
    with pytest.raises(BadChat) as caught:
        convert(item, *args, **options)
    return caught.value


# ---------------------------------------------------------------- formats

# (format, item, messages, fields beside them)
GOLDEN = [
    (
        "alpaca",
        {"instruction": "头痛怎么办？", "input": "", "output": "多休息。"},
        turns("头痛怎么办？", "多休息。"),
        {},
    ),
    ("alpaca", {"instruction": "翻译：\n", "input": " 你好 ", "output": "hello"}, turns("翻译：\n你好", "hello"), {}),
    ("alpaca", {"instruction": "", "input": "只有输入", "output": "好"}, turns("只有输入", "好"), {}),
    ("alpaca", {"instruction": "问", "output": "答", "id": 7}, turns("问", "答"), {"id": 7}),
    ("alpaca", {"instruction": "问", "input": None, "output": "答", "history": None}, turns("问", "答"), {}),
    (
        "alpaca",
        {"instruction": "三", "input": "", "output": "叁", "history": [["一", "壹"], ["二", "贰"]], "cate1": "内科"},
        turns("一", "壹", "二", "贰", "三", "叁"),
        {"cate1": "内科"},
    ),
    (
        "alpaca",
        {"instruction": "三", "output": "叁", "history": [], "system": "你是医生"},
        turns("三", "叁", system="你是医生"),
        {},
    ),
    ("alpaca", {"instruction": "列表", "output": ["只有一个答案"]}, turns("列表", "只有一个答案"), {}),
    (
        "alpaca",
        {"instruction": "解释 <user>: 是什么", "output": "一种标记"},
        turns("解释 <user>: 是什么", "一种标记"),
        {},
    ),
    (
        "flattened",
        {"instruction": " <user>: 甲？ <bot>: 乙。 <user>: 丙？", "input": "", "output": "丁。", "id": 3},
        turns("甲？", "乙。", "丙？", "丁。"),
        {"id": 3},
    ),
    ("flattened", {"instruction": "<user>：甲？", "output": "乙。"}, turns("甲？", "乙。"), {}),
    ("instruct-output", {"instruct": "安全吗？", "output": "请咨询医生。"}, turns("安全吗？", "请咨询医生。"), {}),
    ("prompt-response", {"prompt": "哪种好？", "response": "都好。"}, turns("哪种好？", "都好。"), {}),
    (
        "prompt-response",
        {"prompt": "二", "response": "贰", "history": [["一", "壹"]]},
        turns("一", "壹", "二", "贰"),
        {},
    ),
    ("query-response", {"query": "孩子咳嗽", "response": "多喝水"}, turns("孩子咳嗽", "多喝水"), {}),
    ("prompt-answer", {"prompt": "NaN", "answer": "NA"}, turns("NaN", "NA"), {}),
    (
        "question-answer",
        {"question": "几点？", "answer": "八点", "history": "既往体健"},
        turns("几点？", "八点"),
        {"history": "既往体健"},
    ),
    (
        "toyhom",
        {"department": "心血管科", "title": "能吃党参吗？", "ask": "我有高血压。", "answer": "可以。"},
        turns("能吃党参吗？\n我有高血压。", "可以。"),
        {"department": "心血管科"},
    ),
    ("toyhom", {"title": "能吃吗？", "ask": "党参能吃吗？", "answer": "可以。"}, turns("党参能吃吗？", "可以。"), {}),
    ("toyhom", {"ask": "党参能吃吗？", "answer": "可以。"}, turns("党参能吃吗？", "可以。"), {}),
    (
        "zhihu-kol",
        {"INSTRUCTION": "如何看待？", "RESPONSE": "谢邀。", "SOURCE": "Zhihu"},
        turns("如何看待？", "谢邀。"),
        {"SOURCE": "Zhihu"},
    ),
    (
        "promptcblue",
        {
            "input": "是否相关？\n答：",
            "target": "不相关",
            "answer_choices": ["相关", "不相关"],
            "task_type": "cls",
            "task_dataset": "KUAKE-IR",
            "sample_id": "train-1",
        },
        turns("是否相关？\n答：", "不相关"),
        {"answer_choices": ["相关", "不相关"], "task_type": "cls", "task_dataset": "KUAKE-IR", "sample_id": "train-1"},
    ),
    (
        "huatuo",
        {"data": ["问：咳血？", "答：去医院。", "问:要紧吗\n问：真的？", "答: 看情况。"]},
        turns("咳血？", "去医院。", "要紧吗\n问：真的？", "看情况。"),
        {},
    ),
    ("messages", {"messages": turns("一", "壹", system="短"), "id": "x"}, turns("一", "壹", system="短"), {"id": "x"}),
    ("messages", {"messages": turns("一", "壹"), "system": "短"}, turns("一", "壹", system="短"), {}),
    ("messages", {"messages": turns("一", "壹", system=" ")}, turns("一", "壹"), {}),
    (
        "messages",
        {
            "messages": [{"role": "usr", "content": "订房", "dialog_act": []}, {"role": "sys", "content": "好的"}],
            "goal": [1],
        },
        turns("订房", "好的"),
        {"goal": [1]},
    ),
    (
        "kdconv",
        {"messages": [{"message": "看过吗？"}, {"attrs": [{"x": 1}], "message": "看过。"}], "name": "电影"},
        turns("看过吗？", "看过。"),
        {"name": "电影"},
    ),
    (
        "dialogue",
        {"dialogue": [{"role": "usr", "content": "订房"}, {"role": "sys", "content": "好的"}]},
        turns("订房", "好的"),
        {},
    ),
    (
        "conversation",
        {"_id": 1, "conversation": turns("一", "壹", "二", "贰")},
        turns("一", "壹", "二", "贰"),
        {"_id": 1},
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "短"},
                {"from": "human", "value": "一"},
                {"from": "gpt", "value": "壹"},
            ]
        },
        turns("一", "壹", system="短"),
        {},
    ),
    ("sharegpt", {"conversations": turns("一", "壹")}, turns("一", "壹"), {}),
    (
        "dpo",
        {
            "conversations": [{"from": "human", "value": "一"}],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        turns("一", "好"),
        {"rejected": {"from": "gpt", "value": "坏"}},
    ),
    (
        "dpo",
        {"conversations": [{"from": "human", "value": "一"}], "chosen": "好", "rejected": "坏"},
        turns("一", "好"),
        {"rejected": "坏"},
    ),
    ("prompt-chosen", {"prompt": "一", "chosen": "好", "rejected": "坏"}, turns("一", "好"), {"rejected": "坏"}),
    (
        "instruction-chosen",
        {"instruction": "一", "input": "二", "chosen": "好", "rejected": "坏"},
        turns("一\n二", "好"),
        {"rejected": "坏"},
    ),
    (
        "question-chosen",
        {"system": "", "history": [], "question": "一", "response_chosen": "好", "response_rejected": "坏"},
        turns("一", "好"),
        {"response_rejected": "坏"},
    ),
]


@pytest.mark.parametrize("name, item, messages, extra", GOLDEN)
def test_each_format_gives_the_chat_that_it_says(name, item, messages, extra):
    before = json.dumps(item)
    assert detect(item) == name
    for named in ("auto", name):
        assert convert(item, named) == {"messages": messages, **extra}
    assert json.dumps(item) == before, "the item was changed"
    chat._check(messages, False)


def test_every_format_stands_in_the_golden_table():
    assert {name for name, *_ in GOLDEN} == FORMATS.keys()


def test_a_converted_chat_converts_to_itself():
    for _, item, _, _ in GOLDEN:
        once = convert(item)
        assert convert(once) == once


def test_a_table_joined_from_two_files_is_told_apart_by_what_is_not_null():
    rows = [
        {"instruct": "问", "instruction": None, "output": "答"},
        {"instruct": None, "instruction": "问", "output": "答"},
    ]
    assert [detect(row) for row in rows] == ["instruct-output", "alpaca"]


@pytest.mark.parametrize(
    "item, reason",
    [
        ({"text": "一篇文章", "id": 1}, "unknown format: fields ['id', 'text']"),
        ({}, "unknown format: fields []"),
        ({"instruction": "问"}, "unknown format: fields ['instruction']"),
        (
            {"instruction": "问", "input": "", "target": "答"},
            "unknown format: fields ['input', 'instruction', 'target']",
        ),
        (
            {"prompt": "问", "answer": "答", "response": "应"},
            "prompt-response or prompt-answer: fields ['answer', 'prompt', 'response']",
        ),
        (
            {"messages": [], "instruction": "问", "output": "答"},
            "alpaca or messages: fields ['instruction', 'messages', 'output']",
        ),
        ({"prompt\n\ud800": 1}, "unknown format: fields ['prompt\\n\\ud800']"),
    ],
)
def test_an_unknown_or_ambiguous_format_is_rejected_with_its_fields(item, reason):
    assert bad(item).reason == reason
    assert len(bad({"长" * 9999: 1}).reason) < 200  # it goes into reports


def test_a_named_format_settles_what_is_ambiguous_and_says_what_it_misses():
    item = {"prompt": "问", "answer": "答", "response": "应"}
    assert convert(item, "prompt-answer") == {"messages": turns("问", "答"), "response": "应"}
    assert bad(item, "alpaca").reason == "alpaca needs instruction, output"
    assert (
        bad({"messages": 1, "prompt": "问", "answer": "答"}, "prompt-answer").reason
        == "prompt-answer with a field messages"
    )


# ---------------------------------------------------------------- what is rejected


def said(roles: str) -> dict:
    """s, u, a: a turn of system, user, assistant; capital: an empty one; x: an unknown role."""
    names = {"s": "system", "u": "user", "a": "assistant", "x": "doctor"}
    return {"messages": [{"role": names[c.lower()], "content": "" if c.isupper() else "文"} for c in roles]}


ORDERS = [
    ("", "no turns", "messages"),
    ("s", "no turns", "messages[0]"),
    ("S", "no turns", "messages[0]"),
    ("u", "last question without answer", "messages[0]"),
    ("uau", "last question without answer", "messages[2]"),
    ("su", "last question without answer", "messages[1]"),
    ("uauau", "last question without answer", "messages[4]"),
    ("a", "assistant speaks first", "messages[0]"),
    ("au", "assistant speaks first", "messages[0]"),
    ("aua", "assistant speaks first", "messages[0]"),
    ("sa", "assistant speaks first", "messages[1]"),
    ("Sa", "assistant speaks first", "messages[1]"),
    ("uu", "two user turns in a row", "messages[1]"),
    ("uua", "two user turns in a row", "messages[1]"),
    ("suua", "two user turns in a row", "messages[2]"),
    ("uauua", "two user turns in a row", "messages[3]"),
    ("uaa", "two assistant turns in a row", "messages[2]"),
    ("uaaa", "two assistant turns in a row", "messages[2]"),
    ("uauaa", "two assistant turns in a row", "messages[4]"),
    ("suaau", "two assistant turns in a row", "messages[3]"),
    ("ss", "system message not first", "messages[1]"),
    ("Ssua", "system message not first", "messages[1]"),
    ("usa", "system message not first", "messages[1]"),
    ("uas", "system message not first", "messages[2]"),
    ("uaSua", "system message not first", "messages[2]"),
    ("x", "unknown role", "messages[0]: 'doctor'"),
    ("ux", "unknown role", "messages[1]: 'doctor'"),
    ("uaxa", "unknown role", "messages[2]: 'doctor'"),
    ("uA", "empty answer", "messages[1]"),
    ("uAua", "empty answer", "messages[1]"),
    ("suauA", "empty answer", "messages[4]"),
    ("Ua", "empty prompt", "messages[0]"),
    ("uaUa", "empty prompt", "messages[2]"),
]


@pytest.mark.parametrize("roles, reason, detail", ORDERS)
def test_turns_out_of_order_are_rejected_by_number(roles, reason, detail):
    error = bad(said(roles))
    assert (error.reason, error.detail) == (reason, detail)


@given(st.text("suaUASx", max_size=7))
def test_exactly_the_orders_that_training_takes_are_accepted(roles):
    """The oracle is the check of the renderer; only empty questions and empty system messages are ours."""
    try:
        chat._check(said(roles)["messages"], False)
        fine = "U" not in roles
    except chat.TokenizerError:
        fine = False
    try:
        convert(said(roles))
        accepted = True
    except BadChat:
        accepted = False
    assert accepted == fine


PAIR = {"instruction": "问", "output": "答"}


@pytest.mark.parametrize(
    "item, reason, detail",
    [
        (["问", "答"], "not an object", "list"),
        ("问", "not an object", "str"),
        (None, "not an object", "NoneType"),
        ({None: ["多"], **PAIR}, "a field without a name", ""),
        ({"instruction": "问", "output": None}, "not a text", "output: null"),
        ({"instruction": None, "output": "答"}, "not a text", "instruction: null"),
        ({"instruction": 3, "output": "答"}, "not a text", "instruction: int"),
        ({"instruction": "问", "output": float("nan")}, "not a text", "output: float"),
        ({"instruction": "问", "output": {"text": "答"}}, "not a text", "output: dict"),
        ({"instruction": "问", "output": []}, "not a text", "output: list"),
        ({"instruction": "问", "output": ["答", 1]}, "not a text", "output: list"),
        ({"instruction": "问", "output": ["一", "二", "三"]}, "several texts for one", "output: 3"),
        ({"instruction": "问", "output": ["一", "二"]}, "several texts for one", "output: 2"),
        (PAIR | {"input": 0}, "not a text", "input: int"),
        (PAIR | {"system": {}}, "not a text", "system: dict"),
        (PAIR | {"history": "一"}, "not a list", "history: str"),
        (PAIR | {"history": [["一"]]}, "not a pair of question and answer", "history[0]"),
        (PAIR | {"history": [["一", "壹"], "二贰"]}, "not a pair of question and answer", "history[1]"),
        (PAIR | {"history": [["一", "壹"], ["二", None]]}, "not a text", "history[1][1]: null"),
        (PAIR | {"history": [["一", " "]]}, "empty answer", "history[0][1]"),
        ({"instruction": "  ", "input": "\u3000", "output": "答"}, "empty prompt", "instruction"),
        ({"instruction": "问", "output": " \n"}, "empty answer", "output"),
        ({"instruction": "<user>: 一", "input": "二", "output": "答"}, "text outside the turns", "input"),
        ({"instruction": "<user>: 一 <user>: 二", "output": "答"}, "two user turns in a row", "instruction, turn 1"),
        ({"instruction": "<user>: 一 <bot>: 二", "output": "答"}, "two assistant turns in a row", "output"),
        ({"data": "问：一"}, "not a list", "data: str"),
        ({"data": ["问：一", "壹"]}, "neither 问： nor 答：", "data[1]"),
        ({"data": ["问：一", None]}, "not a text", "data[1]: null"),
        ({"data": ["答：一", "问：二"]}, "assistant speaks first", "data[0]"),
        ({"messages": {"role": "user"}}, "not a list", "messages: dict"),
        ({"messages": ["你好"]}, "turn without role and content", "messages[0]"),
        ({"messages": [*turns("一", "壹"), {"role": "user"}]}, "turn without role and content", "messages[2]"),
        ({"messages": [{"role": ["user"], "content": "一"}]}, "unknown role", "messages[0]: ['user']"),
        ({"messages": [{"role": "User", "content": "一"}]}, "unknown role", "messages[0]: 'User'"),
        ({"messages": [{"role": "user", "content": None}]}, "not a text", "messages[0]: null"),
        ({"messages": [{"message": "一"}, {"content": "二"}]}, "turn without message", "messages[1]"),
        (
            {"messages": [{"message": "一"}, {"message": "二"}, {"message": "三"}]},
            "last question without answer",
            "messages[2]",
        ),
        (
            {"conversations": [{"from": "human", "value": "一"}], "chosen": {"from": "human", "value": "二"}},
            "two user turns in a row",
            "chosen",
        ),
        (
            {"conversations": [{"from": "human", "value": "一"}], "chosen": None},
            "last question without answer",
            "conversations[0]",
        ),
        ({"ask": "问", "title": 5, "answer": "答"}, "not a text", "title: int"),
        (
            PAIR | {"score": float("nan")},
            "a field that JSON cannot hold",
            "Out of range float values are not JSON compliant",
        ),
        (PAIR | {"time": {1, 2}}, "a field that JSON cannot hold", "Object of type set is not JSON serializable"),
        ({"instruction": "问\ud800", "output": "答"}, "half a character, which UTF-8 does not have", ""),
    ],
)
def test_what_cannot_be_used_is_rejected_with_its_field(item, reason, detail):
    error = bad(item)
    assert error.reason == reason and error.detail.startswith(detail) and bool(error.detail) == bool(detail)
    assert str(error) == (f"{reason}: {error.detail}" if detail else reason)


def test_a_csv_row_with_too_many_or_too_few_cells_is_rejected():
    rows = list(csv.DictReader(io.StringIO("prompt,answer\n问,答\n问,答,多\n问\nNA,NaN\n")))
    assert convert(rows[0]) == {"messages": turns("问", "答")}
    assert bad(rows[1]).reason == "a field without a name"
    assert bad(rows[2]).detail == "answer: null"
    assert convert(rows[3])["messages"] == turns("NA", "NaN")


# ---------------------------------------------------------------- options


def test_long_questions_and_answers_are_rejected_and_none_is_cut():
    item = {"messages": turns("12345", "1234567", "123", "12", system="x" * 99)}
    whole = convert(item)
    assert convert(item, max_prompt_chars=5, max_answer_chars=7) == whole
    assert (error := bad(item, max_prompt_chars=4)).reason == "prompt too long" and error.detail == "messages[1]: 5"
    assert (error := bad(item, max_answer_chars=6)).reason == "answer too long" and error.detail == "messages[2]: 7"
    out, account = run([item, PAIR], max_answer_chars=6)
    assert [messages for messages, _ in out] == [{"messages": turns("问", "答")}]
    assert account.rejected == {"answer too long": 1}


def test_an_empty_prompt_is_accepted_only_where_it_is_allowed():
    item = {"prompt": " ", "answer": "很久以前"}
    assert bad(item).reason == "empty prompt"
    assert convert(item, allow_empty_prompt=True) == {"messages": turns("", "很久以前")}
    assert bad({"prompt": "", "answer": ""}, allow_empty_prompt=True).reason == "empty answer"
    chat._check(turns("", "很久以前"), False)


def test_the_system_option_fills_in_and_never_replaces():
    assert convert(PAIR, system="你是医生 ")["messages"] == turns("问", "答", system="你是医生")
    assert convert(PAIR | {"system": "短"}, system="你是医生")["messages"] == turns("问", "答", system="短")
    assert convert(PAIR | {"system": " "}, system="你是医生")["messages"] == turns("问", "答", system="你是医生")
    assert convert({"messages": turns("一", "壹", system="")}, system="甲")["messages"] == turns(
        "一", "壹", system="甲"
    )


def test_the_stage_hands_every_option_on():
    item = {"prompt": "问题", "answer": "答", "response": "应"}
    assert run([item], sft_format="prompt-answer")[0][0][0] == {"messages": turns("问题", "答"), "response": "应"}
    assert run([PAIR, {"prompt": "问题", "answer": "答"}], max_prompt_chars=1)[1].rejected == {"prompt too long": 1}
    assert run([PAIR], system="短")[0][0][0] == {"messages": turns("问", "答", system="短")}
    assert run([{"prompt": "", "answer": "答"}], allow_empty_prompt=True)[0][0][0] == {"messages": turns("", "答")}


@pytest.mark.parametrize(
    "nonsense",
    [
        {"sft_format": "alpacca"},
        {"sft_format": ""},
        {"max_prompt_chars": -1},
        {"max_answer_chars": -1},
        {"augment": -0.1},
        {"augment": 1.1},
        {"augment": float("nan")},
        {"system": "  "},
    ],
)
def test_options_that_make_no_sense_are_refused(nonsense):
    with pytest.raises(ValueError, match=next(iter(nonsense))):
        ChatsConfig(**nonsense)


def test_the_options_are_a_section_of_a_command():
    cfg = config.load("doc", {"chats": ChatsConfig}, ["--sft_format", "dpo", "--augment", "0.1"])
    assert cfg.chats == ChatsConfig(sft_format="dpo", augment=0.1)


# ---------------------------------------------------------------- any input

KNOWN = sorted(
    {key for form in FORMATS.values() for key in form.keys | form.may} | {"role", "content", "from", "value", "message"}
)
TEXTS = st.sampled_from(["", " ", "文", "问：甲", "答：乙", "<user>: 甲 <bot>: 乙 <user>: 丙", "NaN"]) | st.text(
    st.characters(), max_size=5
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(sorted(ROLES))
TURN = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(sorted(ROLES)), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KNOWN) | TEXTS, inner, max_size=4),
    max_leaves=8,
)
FIELD = st.one_of(TEXTS, st.lists(TURN, max_size=4), st.lists(TEXTS, max_size=3), VALUES)


@st.composite
def nearly_good(draw) -> dict:
    """An item of the golden table with up to two of its values, at any depth, replaced by anything."""
    item = json.loads(json.dumps(draw(st.sampled_from([row[1] for row in GOLDEN]))))
    for _ in range(draw(st.integers(0, 2))):
        place = item
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not place[key] or not isinstance(place[key], (dict, list)) or draw(st.booleans()):
                break
            place = place[key]
        place[key] = draw(FIELD)
    return item


# Most items have all the fields of some format: names alone would seldom meet.
ITEMS = st.one_of(
    VALUES,
    nearly_good(),
    nearly_good(),
    st.dictionaries(st.sampled_from(KNOWN), FIELD, max_size=4),
    st.sampled_from(sorted(FORMATS)).flatmap(
        lambda name: st.fixed_dictionaries(
            dict.fromkeys(sorted(FORMATS[name].keys), FIELD),
            optional=dict.fromkeys(sorted(FORMATS[name].may | {"extra"}), FIELD),
        )
    ),
)


def test_any_value_is_a_valid_chat_or_rejected_by_name():
    accepted, reasons = [], set()

    @settings(max_examples=1000)
    @given(ITEMS, st.just("auto") | st.sampled_from(sorted(FORMATS)), st.booleans(), st.sampled_from(["", "系统"]))
    @example({"messages": [{"role": {}, "content": "x"}]}, "auto", False, "")
    def check(item, name, empty, system):
        try:
            result = convert(item, name, allow_empty_prompt=empty, system=system)
        except BadChat as e:
            assert e.reason and len(e.reason) < 300
            f"{e} {e.reason}".encode()  # goes into reports
            reasons.add(e.reason)
            return
        chat._check(result["messages"], False)
        assert all(m["content"] == m["content"].strip() for m in result["messages"])
        assert json.loads(json.dumps(result, ensure_ascii=False).encode()) == result
        used = FORMATS[detect(item) if name == "auto" else name]
        extra = {key: value for key, value in item.items() if key not in used.keys | used.may}
        assert {key: value for key, value in result.items() if key != "messages"} == extra
        accepted.append(detect(item) if name == "auto" else name)

    check()
    assert len(set(accepted)) > 12 and len(reasons) > 25, "the examples reach too little"


@given(st.lists(ITEMS | st.just(PAIR), max_size=6), st.sampled_from([0, 0.3]))
def test_the_stage_accounts_for_every_document(items, share):
    texts = [*map(json.dumps, items), "{", "NaN", "[" * 100_000, "", '{"a": ' + "9" * 5000 + "}"]
    out, account = run(texts, augment=share)
    assert account.seen == len(texts) and account.missing == 0 and account.kept == account.out == len(out)
    rejects = account.take_rejects()
    assert {r.where for r in rejects} | {where for _, where in out} == {f"f:{n}" for n in range(1, len(texts) + 1)}
    assert sum(account.rejected.values()) == len(rejects) and account.rejected["not JSON"] == 4


def test_the_stage_writes_readable_lines_and_names_what_it_leaves_out():
    docs = [
        Doc(json.dumps(PAIR), "a.json:3"),
        Doc('{"instruction": "问", "output": ""}', "a.json:4"),
        Doc("{", "a.json:5"),
    ]
    account = Account("chats", keep_texts=True)
    out = list(chats(docs, account, ChatsConfig()))
    line = '{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}'
    assert out == [Doc(line, "a.json:3")] and "\n" not in line
    assert [(r.where, r.reason, r.text) for r in account.take_rejects()] == [
        ("a.json:4", "empty answer", docs[1].text),
        ("a.json:5", "not JSON", "{"),
    ]


# Signs that stand in no message; private use, so that no other text has them.
SECRET = st.text("\ue000\ue001", min_size=3, max_size=6)


@given(
    st.text("甲乙 丙\n", min_size=1).filter(str.strip),
    st.sampled_from(["是", "否"]),
    st.lists(SECRET, max_size=3),
    st.dictionaries(
        st.sampled_from(["task_type", "task_dataset", "sample_id", "type", "title", "history", "system"]), SECRET
    ),
)
def test_what_is_there_to_grade_answers_never_enters_a_message(question, answer, choices, fields):
    item = {"input": question, "target": answer, "answer_choices": choices, **fields}
    result = convert(item)
    assert result.pop("messages") == turns(question.strip(), answer)
    assert result == {"answer_choices": choices, **fields}


# ---------------------------------------------------------------- plain text and augmentation


def test_a_dialogue_as_plain_text():
    messages = turns("一", "壹", "二", "贰")
    assert flat(messages) == "一\n壹\n二\n贰"
    assert flat(messages, between="") == "一壹二贰"
    assert flat(turns("一", "壹", system="短"), roles=True) == "系统：短\n问：一\n答：壹"


@given(st.text(max_size=30), st.integers(), st.floats(0, 1))
def test_augmentation_repeats_with_its_seed_and_only_deletes_and_repeats(text, seed, share):
    changed = augment(text, random.Random(seed), share)
    assert changed == augment(text, random.Random(seed), share)
    # In order, every character of the text 0, 1 or 2 times, and nothing else.
    assert re.fullmatch("".join(f"{re.escape(char)}{{0,2}}" for char in text), changed)
    assert bool(changed) == bool(text) and bool(changed.strip()) == bool(text.strip())
    assert augment(text, random.Random(seed), 0) == (text.strip() or text)


def test_augmentation_touches_the_share_that_was_asked_for():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))  # all different
    changed = augment(text, random.Random(0), 0.1)
    deleted = len(set(text) - set(changed))
    assert 900 < deleted < 1100 and 900 < len(changed) - (len(text) - deleted) < 1100


def test_augmentation_changes_questions_only_and_depends_on_seed_and_place_alone():
    items = [
        {
            "conversations": turns(
                "一二三四五六七八九十", "壹贰叁肆", "甲乙丙丁戊己庚辛", "子丑寅卯", system="系统系统"
            ),
            "note": "注释",
        }
    ] * 40
    plain, _ = run(items)
    out, account = run(items, augment=0.3)
    assert account.changed["augmented"] > 30 and len({json.dumps(c) for c, _ in out}) > 30  # each place its own
    for (new, _), (old, _) in zip(out, plain):
        assert new["note"] == old["note"]
        assert [m for m in new["messages"] if m["role"] != "user"] == [
            m for m in old["messages"] if m["role"] != "user"
        ]
        chat._check(new["messages"], False)
    assert run(items, augment=0.3)[0] == out != run(items, augment=0.3, augment_seed=1)[0]
    # Alone or after others: what another process takes changes nothing.
    doc = Doc(json.dumps(items[0]), "f:40")
    (line,) = chats([doc], Account("chats"), ChatsConfig(augment=0.3))
    assert json.loads(line.text) == out[-1][0]
    list(chats([Doc(doc.text, "no\udc80utf\ud800")], Account("chats"), ChatsConfig(augment=0.3)))  # any file name


# ---------------------------------------------------------------- real files


def items_of(path) -> list[dict]:
    """Every item of a real file."""
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_text("gb18030"), newline="")))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return list(json.loads(archive.read(*archive.namelist())).values())  # CrossWOZ: dialogue number -> dialogue
    text = path.read_text("utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


# (file, items, what is left out: reason -> items)
FILES = [
    ("sft/alpaca_chinese_part00.json", 10021, {"empty answer": 6}),  # translated without an answer
    ("sft/belle_1k.json", 1000, {}),
    ("sft/chatlm_train_3k.parquet", 3000, {}),
    ("sft/crosswoz_val.json.zip", 500, {}),
    ("sft/kdconv_film_dev.json", 150, {"last question without answer": 2}),  # the first speaker has the last word
    ("sft/llamafactory_alpaca_zh_demo.json", 1000, {}),
    ("sft/llamafactory_identity.json", 91, {}),
    ("medical/huatuo_liver_cancer.json", 1000, {}),
    ("medical/huatuo_llama_data.json", 8658, {}),
    ("medical/medicalgpt_medical_sft_1K.jsonl", 1000, {}),
    ("medical/promptcblue_toy_dev.jsonl", 80, {}),
    ("medical/promptcblue_toy_train.jsonl", 80, {}),
    ("medical/toyhom_内科5000-6000.gb18030.csv", 7644, {}),
    ("medical/zhongjing_CMtMedQA_test.json", 1144, {}),
    ("derived/cmrc2019_stories.jsonl", 439, {"unknown format: fields ['id', 'text']": 439}),  # stories: nobody asks
    ("derived/disc_med_pref_cmd.jsonl", 66, {}),
    ("dpo/llamafactory_dpo_zh_demo.json", 300, {}),
    ("dpo/medicalgpt_dpo_zh_500.jsonl", 499, {}),
]
NO_COUNT = {"sft/belle_1k.json", "medical/toyhom_内科5000-6000.gb18030.csv"}  # the manifest does not say


@pytest.mark.parametrize("name, count, rejected", FILES)
def test_a_real_file_converts_to_its_last_item(shared_data, name, count, rejected):
    items = items_of(shared_data / name)
    out, account = run(items)
    assert (account.seen, account.kept, dict(account.rejected)) == (count, count - sum(rejected.values()), rejected)
    assert account.missing == 0 and len(out) == account.kept
    for converted, _ in out:
        chat._check(converted["messages"], False)
    notes = {
        line.split("\t")[0]: line.split("\t")[-1] for line in (shared_data / "MANIFEST.tsv").read_text().splitlines()
    }
    assert name in NO_COUNT or str(count) in re.findall(r"\d+", notes[name])


def test_every_real_chat_file_is_in_the_table(shared_data):
    there = {
        p.relative_to(shared_data).as_posix()
        for d in ("sft", "medical", "derived", "dpo")
        for p in (shared_data / d).iterdir()
    }
    assert {name for name in there if not name.endswith(".txt")} == {name for name, _, _ in FILES}


def test_no_text_of_a_real_dialogue_is_lost(shared_data):
    """Counted another way: turns and characters as the files have them."""
    for item in items_of(shared_data / "medical/zhongjing_CMtMedQA_test.json"):
        pairs = [*item.get("history", []), (item.get("instruction", item.get("instruct")), item["output"])]
        assert [m["content"] for m in convert(item)["messages"]] == [text.strip() for pair in pairs for text in pair]
    crosswoz = [convert(item)["messages"] for item in items_of(shared_data / "sft/crosswoz_val.json.zip")]
    assert sum(map(len, crosswoz)) == 8458  # utterances, by the manifest
    for item in items_of(shared_data / "medical/huatuo_liver_cancer.json"):
        joined = "".join(
            f"<{'user' if m['role'] == 'user' else 'bot'}>:{m['content']}" for m in convert(item)["messages"]
        )
        assert "".join(joined.split()) == "".join(f"{item['instruction']}<bot>:{item['output']}".split())
    for item in items_of(shared_data / "sft/alpaca_chinese_part00.json"):
        if item["output"]:
            question = item["instruction"] + ("\n" + item["input"] if item["input"] else "")
            assert convert(item)["messages"] == turns(question, item["output"])


@pytest.mark.parametrize("name", ["medical/promptcblue_toy_dev.jsonl", "medical/promptcblue_toy_train.jsonl"])
def test_real_promptcblue_messages_are_input_and_target_and_nothing_else(shared_data, name):
    for item in items_of(shared_data / name):
        result = convert(item)
        assert result.pop("messages") == turns(item.pop("input").strip(), item.pop("target").strip())
        assert result == item and result.keys() >= {"answer_choices", "sample_id"}

"""Promises of `tokenizer.chat`: ids and mask by construction, equal to transformers' templates, nothing forged."""

import functools
import json
import os
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tokenizer import TokenizerError, load
from tokenizer.chat import FORMATS, end_ids, render, template
from tokenizer.sentencepiece_model import CONTROL, Piece, parse_model
from tokenizer.sentencepiece_writer import write_model
from tokenizer.train import CONTROL_PIECES, train

DATA = Path(__file__).resolve().parents[2] / "shared/data"

TALK = [
    {"role": "user", "content": "曹操字什么？"},
    {"role": "assistant", "content": "曹操字孟德。"},
    {"role": "user", "content": " And Liu Bei?\n"},
    {"role": "assistant", "content": "He is 玄德。 "},
]
SYSTEM = {"role": "system", "content": "你精通《三国演义》。"}
# The whole text of TALK in each format, written by hand from the formats' own descriptions; [ ] around what is trained.
WRITTEN = {
    "bos": "曹操字什么？<s>[曹操字孟德。</s>] And Liu Bei?\n<s>[He is 玄德。 </s>]",
    "user-assistant": "<s>User:曹操字什么？</s>\n Assistant:[曹操字孟德。</s>]\n User: And Liu Bei?\n</s>\n Assistant:"
    "[He is 玄德。 </s>]",
    "human-assistant": "<s>Human: 曹操字什么？\nAssistant:[ 曹操字孟德。</s>]\nHuman:  And Liu Bei?\n\nAssistant:"
    "[ He is 玄德。 </s>]",
    "llama2": "<s>{INST} 曹操字什么？ {/INST}[ 曹操字孟德。 </s>]<s>{INST} And Liu Bei? {/INST}[ He is 玄德。 </s>]",
    "chatml": "<|im_start|>user\n曹操字什么？<|im_end|>\n<|im_start|>assistant\n[曹操字孟德。<|im_end|>]\n"
    "<|im_start|>user\n And Liu Bei?\n<|im_end|>\n<|im_start|>assistant\n[He is 玄德。 <|im_end|>]",
}
WRITTEN_WITH_SYSTEM = {
    "bos": "你精通《三国演义》。\n曹操字什么？<s>",
    "user-assistant": "<s>User:你精通《三国演义》。\n曹操字什么？</s>\n Assistant:",
    "human-assistant": "<s>Human: 你精通《三国演义》。\n曹操字什么？\nAssistant:",
    "llama2": "<s>{INST} <<SYS>>\n你精通《三国演义》。\n<</SYS>>\n\n曹操字什么？ {/INST}",
    "chatml": "<|im_start|>system\n你精通《三国演义》。<|im_end|>\n<|im_start|>user\n曹操字什么？<|im_end|>\n"
    "<|im_start|>assistant\n",
}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    line = '曹操字孟德，刘备字玄德。User:你是谁？Assistant: 我是"孔明"。:“好” Human: [INST] hello [/INST] system'
    return load(train([line] * 30, tmp_path_factory.mktemp("small") / "tokenizer.model", 360))


@pytest.fixture(scope="session")
def small_with_prefix(small, tmp_path_factory):
    """The same with the dummy prefix that Llama and ChatGLM have."""
    model = small._backend.model
    normalizer = (*(f for f in model.normalizer if f[0] != 3), (3, 0, 1))
    path = tmp_path_factory.mktemp("prefix") / "tokenizer.model"
    path.write_bytes(write_model(replace(model, normalizer=normalizer)))
    return load(path)


@pytest.fixture(params=["small", "small_with_prefix"])
def tok(request):
    return request.getfixturevalue(request.param)


def with_chat_pieces(name, folder):
    """A real vocabulary with the control pieces of chatml added behind."""
    path = DATA / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    model = parse_model(path.read_bytes())
    pieces = [*model.pieces, *(Piece(text, 0.0, CONTROL) for text in CONTROL_PIECES)]
    (folder / "tokenizer.model").write_bytes(write_model(replace(model, pieces=pieces)))
    return load(folder)


@functools.cache
def real_chats():
    """Human dialogues of several turns, the speakers in turn as user and assistant."""
    if not (DATA / "sft/kdconv_film_dev.json").exists():
        pytest.skip(f"{DATA / 'sft'} is not here")
    talks = [
        [m["message"] for m in d["messages"]]
        for d in json.loads((DATA / "sft/kdconv_film_dev.json").read_text(encoding="utf-8"))
    ]
    with zipfile.ZipFile(DATA / "sft/crosswoz_val.json.zip") as archive:
        crosswoz = json.loads(archive.read(archive.namelist()[0]))
    talks += [[m["content"] for m in d["messages"]] for d in crosswoz.values()]
    chats = []
    for talk in talks:
        talk = talk[: len(talk) // 2 * 2]
        if all(text.strip() for text in talk):
            chats.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)])
    return chats


def trained_text(tok, ids, mask):
    """The whole text with [ ] around what the mask says; braces for the format's own brackets."""
    out, inside, run = "", 0, []
    for i, m in [*zip(ids, mask), (None, 0)]:
        if m != inside or i is None:
            text = "".join(
                tok.decode([j], skip_special=False) if j in tok.special_ids.values() else chr(0xE000 + j) for j in run
            )
            out += f"[{decode_runs(tok, text)}]" if inside else decode_runs(tok, text)
            run, inside = [], m
        run.append(i)
    return out


def decode_runs(tok, text):
    """Ids written as private-use characters back to text, run by run."""
    out, ids = "", []
    for char in text + "\0":
        if ord(char) >= 0xE000:
            ids.append(ord(char) - 0xE000)
            continue
        raw = b"".join(tok._backend.id_bytes[i] for i in ids).decode()
        out, ids = out + raw.replace("[", "{").replace("]", "}") + char, []
    return out[:-1]


@pytest.mark.parametrize("name", FORMATS)
def test_a_chat_is_written_and_masked_as_the_format_says(small, name):
    ids, mask = render(TALK, small, name)
    assert len(ids) == len(mask)
    assert trained_text(small, ids, mask) == WRITTEN[name]
    ids, mask = render([SYSTEM, TALK[0]], small, name, generation=True)
    assert trained_text(small, ids, mask) == WRITTEN_WITH_SYSTEM[name]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_generated_from_is_the_beginning_of_what_is_trained_on(tok, name):
    for answer in ("曹操。", "“好”", " 空格", "\n换行", "[", "123", "s", "://", "a"):
        chat = [SYSTEM, *TALK, TALK[0], {"role": "assistant", "content": answer}]
        ids, mask = render(chat, tok, name)
        for end in (2, 4, 6):
            prompt, prompt_mask = render(chat[:end], tok, name, generation=True)
            assert (ids[: len(prompt)], mask[: len(prompt)]) == (prompt, prompt_mask)
            assert mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_every_answer_ends_with_a_trained_end_id(tok, name):
    ids, mask = render([SYSTEM, *TALK], tok, name)
    ends = [i for i, following in zip(range(len(ids)), [*mask[1:], 0]) if mask[i] and not following]
    assert len(ends) == 2 and {ids[i] for i in ends} <= end_ids(tok, name)
    assert end_ids(tok, name) == {tok.eos_id} | ({tok.special_ids["<|im_end|>"]} if name == "chatml" else set())


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_trained_on_is_the_answers_and_their_ends_in_ten_thousand_random_chats(small, name):
    """Off by one on either side would lose or add a character or an end."""
    rng, inside = random.Random(name), '曹操字孟德刘备玄abz 1:。\n"[]<>/'
    ends = end_ids(small, name)
    for _ in range(2000):
        texts = ["".join(rng.choices(inside, k=rng.randrange(1, 9))) for _ in range(2 * rng.randrange(1, 4))]
        texts = [text if text.strip() else "空" for text in texts]
        ids, mask = render(
            [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)], small, name
        )
        answers, run = [], []
        for i, trained in [*zip(ids, mask), (0, 0)]:
            if trained:
                run.append(i)
            elif run:
                assert run[-1] in ends and not ends & set(run[:-1])
                answers.append(small.decode(run))
                run = []
        written = {"human-assistant": " {}", "llama2": " {} "}.get(name, "{}")
        assert answers == [written.format(text.strip() if name == "llama2" else text) for text in texts[1::2]]


@pytest.mark.parametrize("name", FORMATS)
def test_training_on_all_changes_the_mask_and_no_id(tok, name):
    ids, mask = render(TALK, tok, name, train_on="all")
    assert ids == render(TALK, tok, name)[0]
    assert mask == [0] + [1] * (len(ids) - 1)


@pytest.mark.parametrize("name", FORMATS)
def test_special_token_text_in_a_message_forges_nothing(tok, name):
    forged = "".join(tok.special_ids) + "{content}{system}[/INST]"
    plain = [SYSTEM, *TALK]
    evil = [m | {"content": m["content"].strip() + forged} for m in plain]

    def controls(messages):
        return [i for i in render(messages, tok, name)[0] if i in tok.special_ids.values()]

    assert controls(evil) == controls(plain)
    assert tok.decode(render(evil, tok, name)[0]).count(forged) == len(evil)


@pytest.fixture(scope="session", params=["small", "small_with_prefix", "chatglm2-6b", "llama2-32k"])
def with_transformers(request, tmp_path_factory):
    """A vocabulary and what transformers makes of its folder."""
    transformers = pytest.importorskip("transformers")
    name, folder = request.param, tmp_path_factory.mktemp("auto")
    tok = with_chat_pieces(f"{name}.tokenizer.model", folder) if "-" in name else request.getfixturevalue(name)
    tok.save(folder, chat_format="bos")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == template("bos")
    return tok, theirs


@pytest.mark.parametrize("name", FORMATS)
def test_apply_chat_template_gives_the_same_ids_on_real_chats(with_transformers, name):
    tok, theirs = with_transformers
    different = []
    for chat in [TALK, [SYSTEM, *TALK], *random.Random(name).sample(real_chats(), 20)]:
        for messages, generation in ((chat, False), (chat[:-1], True)):
            ids = render(messages, tok, name, generation=generation)[0]
            if ids != theirs.apply_chat_template(messages, chat_template=template(name), return_dict=False):
                different.append(messages)
    if name == "user-assistant":
        # A piece such as `:“` joins the marker to an answer in a template, never in `render`.
        crossing = {p[p.index(":") + 1] for p in tok._backend.pieces if ":" in p[:-1]}
        different = [c for c in different if not crossing & {m["content"][0] for m in c if m["role"] == "assistant"}]
    assert not different


def test_the_template_refuses_what_render_refuses(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path, chat_format="llama2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="alternate"):
        theirs.apply_chat_template([TALK[0], TALK[0]])


USER, ASSISTANT = TALK[:2]
BAD = [
    ([], "at least one"),
    ("text", "list"),
    ([USER, "text"], "message 1: needs role"),
    ([{"role": "user"}], "message 0: needs role and content"),
    ([USER | {"role": "robot"}, ASSISTANT], "message 0: unknown role 'robot'"),
    ([USER, USER], "message 1: role user where assistant"),
    ([ASSISTANT], "message 0: role assistant where user"),
    ([USER, ASSISTANT, SYSTEM], "message 2: system may only be the first"),
    ([SYSTEM], "message 0: there is no user message"),
    ([USER, ASSISTANT, USER], "message 2: role user has no answer"),
    ([USER, ASSISTANT | {"content": " \n"}], "message 1: the assistant's content is empty"),
    ([USER | {"content": None}, ASSISTANT], "message 0: content is NoneType"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD)
def test_a_bad_chat_is_refused_with_the_number_of_the_message(small, messages, reason):
    with pytest.raises(TokenizerError, match=reason):
        render(messages, small, "bos")


def test_generation_needs_a_question_at_the_end(small):
    with pytest.raises(TokenizerError, match=r"message 1: .* end with user"):
        render(TALK[:2], small, "bos", generation=True)


def test_unknown_choices_are_refused(small):
    with pytest.raises(TokenizerError, match="bos, user-assistant"):
        render(TALK, small, "vicuna")
    with pytest.raises(TokenizerError, match="assistant, last, all"):
        render(TALK, small, "bos", train_on="user")


@pytest.mark.parametrize("name", FORMATS)
def test_the_last_answer_alone_is_trained_on_where_that_is_asked_for(tok, name):
    ids, every = render(TALK, tok, name)
    same, last = render(TALK, tok, name, train_on="last")
    second = every.index(0, every.index(1))  # behind the first answer
    assert same == ids and last == [0] * second + every[second:] and sum(every[:second]) and sum(last)


def test_a_format_without_its_control_pieces_names_the_formats_that_work(small, tmp_path):
    model = small._backend.model
    pieces = [p for p in model.pieces if p.text not in CONTROL_PIECES]
    (tmp_path / "tokenizer.model").write_bytes(write_model(replace(model, pieces=pieces)))
    tok = load(tmp_path)
    for call in (lambda: render(TALK, tok, "chatml"), lambda: tok.save(tmp_path / "out", "chatml")):
        with pytest.raises(TokenizerError, match=r"choose one of bos, user-assistant, human-assistant, llama2$"):
            call()
    assert not os.path.exists(tmp_path / "out")
    assert render(TALK, tok, "llama2")[0]


def test_every_format_has_a_template_on_one_line():
    assert all("\n" not in template(name) for name in FORMATS)

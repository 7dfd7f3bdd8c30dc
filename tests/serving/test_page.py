"""The page, in a browser: what streams in, what is said, and what is asked."""

import json
from urllib import request
from urllib.error import HTTPError

import pytest
from webdriver import (
    CHROMIUM,
    CONTROL,
    DRIVER,
    ENTER,
    HOME,
    RIGHT,
    Browser,
    wait_for,
)

pytestmark = pytest.mark.skipif(
    not (DRIVER and CHROMIUM), reason="needs chromedriver and chromium"
)

PROMPT = "translate English to German: Tom is a student at the university."
OTHER = "translate English to German: The street is beautiful."

#: What the answer consists of: the class and the text of each of its children.
SPANS = """
return [...document.getElementById("answer").childNodes]
    .map((each) => [each.nodeName, each.className, each.textContent]);
"""

#: The server's answer up to the first words of it; the rest never comes.
HOLD = r"""
window.real = window.fetch;
window.fetch = async (url, options) => {
    const response = await real(url, options);
    const reader = response.body.getReader();
    const start = async (controller) => {
        options.signal.onabort = () => controller.error(options.signal.reason);
        const decoder = new TextDecoder();
        for (let text = "", first = null; !first; ) {
            const { value } = await reader.read();
            text += decoder.decode(value, { stream: true });
            first = /^[^]*?"text": ?"[^"][^]*?\n\n/.exec(text);
            if (first) controller.enqueue(new TextEncoder().encode(first[0]));
        }
    };
    return new Response(new ReadableStream({ start }), response);
};
"""

#: In the server's place: what is asked is kept, and bytes come when a test sends them.
SCRIPT = """
const [init] = arguments;
window.asked = [];
window.bodies = [];
window.fetch = async (url, options) => {
    if (!options.body) return new Response('{"data": [{"id": "scripted"}]}');
    asked.push({ ...options.headers, ...JSON.parse(options.body) });
    if (!init) throw new TypeError("no network");
    const start = (controller) => bodies.push(controller);
    return new Response(new ReadableStream({ start }), init);
};
"""

#: Every byte by itself: all that can be cut is cut.
SEND = """
const [body, bytes, end] = arguments;
for (const byte of bytes) bodies[body].enqueue(new Uint8Array([byte]));
if (end) bodies[body].close();
"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    browser.log()  # an earlier test's
    browser.open(server.url)
    return browser


@pytest.fixture
def scripted(page):
    """A function that has the page's next answers come from the test instead."""

    def script(status: int = 200, **headers):
        page.run(SCRIPT, {"status": status, "headers": headers} if status else None)
        return page

    return script


def send(page, text: str, body: int = 0, end: bool = True) -> None:
    wait_for(lambda: page.run("return bodies.length") > body)
    page.run(SEND, body, list(text.encode()), end)


def event(*pieces, reason=None, **more) -> str:
    text = "".join(text for text, _ in pieces)
    choice = {"index": 0, "text": text, "pieces": pieces, "finish_reason": reason}
    chunk = {"choices": [choice], **more}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def ask(server, **fields) -> dict:
    """What the server answers to a request that is not streamed."""
    headers = {"Content-Type": "application/json"}
    raw = json.dumps(fields).encode()
    asked = request.Request(f"{server.url}/v1/completions", raw, headers)
    try:
        with request.build_opener(request.ProxyHandler({})).open(asked) as answer:
            return json.load(answer)
    except HTTPError as error:
        with error:
            return json.load(error)


def until_idle(page) -> str:
    """The status once nothing streams any more."""
    wait_for(lambda: page.text("go") == "Generate")
    return page.text("status")


def failed(page) -> bool:
    return page.run("return document.getElementById('status').className") == "error"


def test_it_loads_and_asks_nobody_else(page, server):
    assert wait_for(lambda: page.text("model"), lambda text: text.isidentifier())
    code = "return performance.getEntriesByType('resource').map((each) => each.name)"
    assert {name for name in page.run(code) if not name.startswith(server.url)} == set()
    assert page.log() == []
    assert page.run("return document.getElementById('prompt').value") == PROMPT
    fields = "[...document.querySelectorAll('input, textarea')]"
    assert page.run(f"return {fields}.every((each) => each.labels.length === 1)")


def test_an_answer_streams_in(page, server):
    page.press("num-draft", HOME, *[RIGHT] * 6)
    page.type("prompt", PROMPT)
    page.click("go")
    wait_for(lambda: page.text("answer"))
    assert until_idle(page) == "Done."
    text = ask(server, prompt=PROMPT, num_draft=5)["choices"][0]["text"]
    spans = page.run(SPANS)
    assert "".join(each for _, _, each in spans) == text == page.text("answer")
    assert {name for name, _, _ in spans} == {"SPAN"}
    assert "drafted" in {kind for _, kind, _ in spans} <= {"", "drafted"}
    assert "tokens per pass" in page.text("figures")
    assert float(page.text("per-pass")) > 1
    assert 0 < float(page.text("alpha")) <= 1
    assert float(page.text("tokens")) >= len(spans)
    assert float(page.text("seconds")) > 0
    assert page.log() == []


def test_stop_and_then_another(page, server):
    """What came before the stop stays until then, and none of it is in the next."""
    page.run(HOLD)
    page.click("go")
    begun = wait_for(lambda: page.text("answer"))
    assert page.text("go") == "Stop"
    page.click("go")
    assert until_idle(page) == "Stopped."
    assert page.text("answer") == begun
    page.run("window.fetch = window.real")
    page.type("prompt", OTHER)
    page.press("prompt", CONTROL, ENTER)
    wait_for(lambda: page.text("status") == "Done.")
    assert page.text("answer") == ask(server, prompt=OTHER)["choices"][0]["text"]


def test_a_late_answer_is_not_shown(scripted):
    page = scripted()
    page.click("go")
    send(page, event(["old", True]), end=False)
    assert wait_for(lambda: page.text("answer")) == "old"
    page.press("prompt", CONTROL, ENTER)
    send(page, event(["new", False]), body=1, end=False)
    send(page, event([" late", True], reason="stop") + "data: [DONE]\n\n", end=False)
    send(page, event(["er", False], reason="stop"), body=1)
    assert until_idle(page) == "Done."
    assert page.text("answer") == "newer"


def test_a_bad_value(page, server):
    page.type("max-tokens", "0")
    page.click("go")
    wait_for(lambda: failed(page))
    said = ask(server, prompt=PROMPT, max_tokens=0)["error"]["message"]
    assert until_idle(page) == said
    assert page.text("answer") == ""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_any_text_is_text(scripted, line_end):
    """Markup too, and characters whose bytes come one by one."""
    pieces = [
        ['<img src="x" onerror="document.title=1">', True],
        ["ü😀\n  &lt;", False],
    ]
    text = "".join(text for text, _ in pieces)
    stream = ": a comment\n\n" + event(*pieces) + event(reason="length")
    stream += 'data: {"choices": [],\ndata: "usage": {"completion_tokens": 2}}\n\n'
    page = scripted()
    page.click("go")
    send(page, (stream + "data: [DONE]\n\n").replace("\n", line_end))
    assert "no more tokens" in until_idle(page)
    assert page.text("answer") == text
    assert page.run(SPANS) == [
        ["SPAN", "drafted", pieces[0][0]],
        ["SPAN", "", pieces[1][0]],
    ]
    assert page.text("tokens") == "2"


def test_an_answer_without_pieces(scripted):
    """Figures that there are none of, as without a draft, are left out."""
    page = scripted()
    page.click("go")
    choice = {"index": 0, "text": "plain", "finish_reason": "stop"}
    chunk = {"choices": [choice], "speculation": {"tokens_per_pass": 1, "alpha": None}}
    send(page, f"data: {json.dumps(chunk)}\n\n")
    assert until_idle(page) == "Done."
    assert page.run(SPANS) == [["SPAN", "", "plain"]]
    assert [page.text(name) for name in ("per-pass", "alpha")] == ["1.00", "–"]


MESSAGE = json.dumps({"error": {"message": "no room."}})


@pytest.mark.parametrize(
    "status, body, line",
    [
        (429, MESSAGE, "no room. (try again in 3 s)"),
        (503, MESSAGE, "no room. (try again in 3 s)"),
        (502, "<h1>Bad Gateway</h1>", "The server answered 502. (try again in 3 s)"),
        (200, f"{event(['so', False])}data: {MESSAGE}\n\n", "no room."),
        (200, event(["so", False]), "The connection ended before the text did."),
        (0, None, "The server cannot be reached."),
    ],
    ids=["busy", "loading", "proxy", "in mid-stream", "cut off", "unreachable"],
)
def test_what_goes_wrong_is_said_in_a_line(scripted, status, body, line):
    page = scripted(status, **{"Retry-After": "3"})
    page.click("go")
    if body is not None:
        send(page, body)
    wait_for(lambda: failed(page))
    assert until_idle(page) == line
    assert page.text("answer") == ("so" if status == 200 else "")


def test_a_key_is_asked_for_when_it_is_wanted(scripted):
    page = scripted(401)
    hidden = "return document.getElementById('key-field').hidden"
    assert page.run(hidden)
    page.click("go")
    send(page, MESSAGE)
    assert until_idle(page) == "no room."
    assert not page.run(hidden)
    page.type("key", "secret")
    page.press("key", ENTER)
    wait_for(lambda: page.run("return asked.length") == 2)
    first, second = page.run("return asked")
    assert "Authorization" not in first
    assert second["Authorization"] == "Bearer secret"


def test_what_is_asked(scripted):
    """A field that is left alone is the server's to choose."""
    page = scripted()
    page.click("go")
    page.press("num-draft", HOME, RIGHT)
    page.press("delta", HOME, RIGHT)
    page.press("temperature", HOME, RIGHT, RIGHT)
    page.type("max-tokens", "7")
    page.type("seed", "3")
    page.press("prompt", CONTROL, ENTER)
    wait_for(lambda: page.run("return asked.length") == 2)
    first, second = page.run("return asked")
    assert not {"num_draft", "max_tokens", "seed"} & set(first)
    set_to = {
        "num_draft": 0,
        "delta": 0.05,
        "temperature": 0.1,
        "max_tokens": 7,
        "seed": 3,
    }
    assert second | set_to == second
    assert second["stream"] and second["show_drafted"]

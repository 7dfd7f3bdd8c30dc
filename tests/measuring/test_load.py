"""benchmark.py --serve: clients, what they count, and servers that come and go."""

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from conftest import HANG

import benchmark
from measuring import load, servers
from measuring.load import Asked, Events, Reply, draw, percentile, plain_texts, row_of
from measuring.servers import Terminated, models_of, running
from measuring.table import LOAD_COLUMNS, table
from measuring.their_server import app_of
from pair import LOOKUP, Pair
from speculation.lookup import Lookup
from system.errors import InputError

PROMPTS = ["the cat on", "cat sat", "a b c", "the the", "on sat e"]


def event(text: str = "", reason: str | None = None, **fields) -> bytes:
    choices = [{"index": 0, "text": text, "finish_reason": reason}]
    return f"data: {json.dumps({'choices': choices, **fields})}\n\n".encode()


def whole(text: str, tokens: int, passes: int = 2) -> bytes:
    """A stream as it is to be: two pieces, a reason, the usage, and its end."""
    so_far = {"passes": passes, "tokens_per_pass": tokens / passes}
    return (
        event(text[:2], speculation={"passes": 1, "tokens_per_pass": 1.0})
        + event(text[2:], speculation=so_far)
        + event(reason="stop", speculation=so_far)
        + f'data: {{"choices": [], "usage": {{"completion_tokens": {tokens}}}}}\n\n'
        "data: [DONE]\n\n".encode()
    )


@asynccontextmanager
async def answering(answer: Callable[[dict], bytes | int], step: int | None = None):
    """A server of what ``answer`` makes of a request: the bytes of its stream, ``step``
    at a time, or an error's status; its address, and the requests that came."""
    asked = []

    async def connected(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length: ")[2].split()[0])
        asked.append(json.loads(await reader.readexactly(size)))
        answered = answer(asked[-1])
        if isinstance(answered, int):
            body = json.dumps({"error": {"message": "come\nback"}}).encode()
            status, answered = f"{answered} No", body
        else:
            status = "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nconnection: close\r\n\r\n".encode())
        for first in range(0, len(answered), step or len(answered) or 1):
            writer.write(answered[first : first + (step or len(answered))])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", asked


def replies_of(answer, requests, clients=2, step=None) -> list[Reply]:
    async def ask():
        async with answering(answer, step) as (url, asked):
            replies, seconds = await load.load(url, requests, clients, quiet=True)
        assert seconds > 0
        assert len(asked) == len(requests)
        return replies

    return asyncio.run(ask())


def test_events_are_found_however_bytes_are_cut():
    stream = (
        'data: {"a": "ä漢"}\r\n\r\n: a comment\n\nevent: x\ndata:one\r\rdata: two\n'
    )
    stream = (stream + "data: three\n\ndata: [DONE]\n\ndata: of no end").encode()
    expected = ['{"a": "ä漢"}', "one", "two\nthree", "[DONE]"]
    assert Events().push(stream) == expected
    for cut in range(len(stream) + 1):
        events = Events()
        assert [*events.push(stream[:cut]), *events.push(stream[cut:])] == expected
    events = Events()
    assert [x for byte in stream for x in events.push(bytes([byte]))] == expected


@pytest.mark.parametrize("step", [None, 1])
def test_clients_read_streams_to_their_ends(step):
    requests = [Asked(prompt, 4 + place) for place, prompt in enumerate(PROMPTS)]
    seen = []

    def answer(asked):
        seen.append(asked)
        return whole(asked["prompt"].upper() + "ä", asked["max_tokens"])

    replies = replies_of(answer, requests, step=step)
    for asked, reply in zip(requests, replies, strict=True):
        assert reply.lost is None
        assert reply.text == asked.prompt.upper() + "ä"
        assert reply.tokens == asked.max_tokens
        assert (reply.passes, reply.per_pass) == (2, asked.max_tokens / 2)
        assert reply.finish_reason == "stop"
        assert 0 < reply.first <= reply.seconds
    for asked in seen:
        assert asked["stream"] is True
        assert asked["stream_options"] == {"include_usage": True}
        assert Asked(asked["prompt"], asked["max_tokens"]) in requests


@pytest.mark.parametrize(
    "answered, why",
    [
        (429, "429: come back"),
        (b"", "ended without [DONE]"),
        (event("a") + event(reason="stop"), "ended without [DONE]"),
        (event("a") + b"data: [DONE]\n\n", "without a finish_reason"),
        (event("a") + b'data: {"error": {"message": "no room"}}\n\n', "no room"),
        (event("a") + b"data: {broken\n\n", "an event that is none"),
        (event("a") + b"data: 3\n\n", "an event that is none"),
        (event("a") + b"data: \xff\n\n", "an event that is none"),
    ],
)
def test_a_lost_request_says_why(answered, why):
    requests = [Asked("a", 4), Asked("b", 4)]
    (good, lost) = replies_of(
        lambda asked: answered if asked["prompt"] == "b" else whole("text", 3), requests
    )
    assert good.lost is None
    assert why in lost.lost
    row = row_of("x", 1, requests, [good, lost], 2.0, dict.fromkeys(requests, "text"))
    assert (row.requests, row.lost, row.different) == (2, 1, 0)
    assert row.requests_per_second == 0.5
    assert row.tokens_per_second == 1.5
    assert row.why == lost.lost


def test_nobody_there():
    (reply,) = asyncio.run(load.load("http://127.0.0.1:1", [Asked("a", 4)], 1))[0]
    assert reply.lost and reply.first is reply.seconds is None


def test_so_many_clients_at_once():
    """Each sends its next request once its last has ended."""
    now = most = 0

    async def ask():
        nonlocal now, most

        async def one(client, url, asked, reply):
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1
            reply.text = asked.prompt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "_ask", one)
            requests = [Asked(str(number), 4) for number in range(20)]
            replies, _ = await load.load("", requests, 3, quiet=True)
        assert [reply.text for reply in replies] == [one.prompt for one in requests]

    asyncio.run(ask())
    assert most == 3


def test_percentiles_are_values_that_were_measured():
    values = [float(number) for number in range(100, 0, -1)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([*values, 0.0], 99) == 99
    assert percentile(values[:3], 50) == 99
    assert percentile(values[:3], 99) == 100
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7
    assert percentile([], 50) is None


def test_figures():
    """Those of whole answers, over the seconds of all."""
    requests = [Asked(prompt, 9) for prompt in "abcd"]
    replies = [
        Reply("a", 0.1, 1.0, "stop", 4, 2, 2.0),
        Reply("b", 0.3, 3.0, "length", 9, 3, 3.0),
        Reply("", None, 2.0, "stop", 1, 1, 1.0),
        Reply("d", 9.0, None, None, None, 5, 1.0, lost="gone"),
    ]
    expected = {one: one.prompt for one in requests}
    row = row_of("x", 8, requests, replies, 10.0, expected)
    assert (row.requests_per_second, row.tokens_per_second) == (0.3, 1.4)
    assert (row.first_p50, row.first_p99) == (0.1, 0.3)
    assert (row.end_p50, row.end_p99) == (2.0, 3.0)
    assert (row.lost, row.why, row.different) == (1, "gone", 1)
    assert row.tokens_per_pass == pytest.approx(14 / 6)
    head, line = table([row], LOAD_COLUMNS)
    shown = ["x", "0.30", "1", "0.100", "0.300", "2.000", "3.000", "1", "1", "2.33"]
    assert line.split() == shown
    assert head.split("  ")[-1] == "per pass"
    # Of a server that counts nothing there is nothing to show, and no 0.
    for reply in replies:
        reply.tokens = reply.passes = None
    row = row_of("x", None, requests, replies, 10.0, expected)
    assert row.tokens_per_second is row.tokens_per_pass is None
    assert "tokens/s" not in next(table([row], LOAD_COLUMNS))
    # Nor of one that answers nothing.
    row = row_of("x", 1, requests[3:], replies[3:], 10.0, expected)
    assert (row.requests_per_second, row.lost) == (0, 1)
    assert row.first_p50 is row.end_p99 is None


def test_requests_are_the_same_every_time():
    requests = draw(PROMPTS, 12, 9)
    assert requests == draw(PROMPTS, 12, 9)
    assert [one.prompt for one in requests] == (PROMPTS * 3)[:12]
    assert {one.max_tokens for one in draw(PROMPTS, 500, 9)} == {4, 5, 6, 7, 8, 9}
    assert {one.max_tokens for one in draw(PROMPTS, 9, 2)} == {2}


def test_their_server(make):
    """Over the network: transformers' greedy texts are the pair's, piece by piece."""
    import uvicorn

    pair = Pair.load(str(make()[2]), str(make(noise=0.05)[2]))
    requests = draw(PROMPTS, 10, 20)
    expected = plain_texts(pair, requests)
    for asked, text in expected.items():
        answer = pair.generate(asked.prompt, max_tokens=asked.max_tokens).finish()
        assert answer.text == text

    async def ask():
        config = uvicorn.Config(
            app_of(pair), port=0, log_level="warning", lifespan="off"
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            url = f"http://127.0.0.1:{port}"
            return await load.load(url, requests, 4, quiet=True)
        finally:
            server.should_exit = True
            await running

    replies, seconds = asyncio.run(ask())
    assert [reply.lost for reply in replies] == [None] * 10
    row = row_of("theirs", None, requests, replies, seconds, expected)
    assert (row.lost, row.different, row.tokens_per_pass) == (0, 0, None)
    for asked, reply in zip(requests, replies, strict=True):
        answer = pair.generate(asked.prompt, max_tokens=asked.max_tokens).finish()
        assert reply.tokens == len(answer.tokens)
        names = {"eos": "stop", "length": "length"}
        assert reply.finish_reason == names[answer.finish_reason]
    broken = dict.fromkeys(requests, "another text")
    assert row_of("theirs", None, requests, replies, 1.0, broken).different == 10


def test_models_by_flags(make, tmp_path):
    pair = Pair.load(str(make()[2]))
    target = ["--model", str(make()[2])]
    assert models_of(pair) == (target, ["--draft-model", "none"])
    pair.lookup = Lookup(2)
    assert models_of(pair).all == [*target, "--draft-model", LOOKUP]
    pair.draft_folder = tmp_path
    assert models_of(pair).draft == ["--draft-model", str(tmp_path), "--lookup"]


#: serve.py as far as it is asked here: it knows all answers.
FAKE = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

looks = 0

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        global looks
        looks += 1  # at first it is loading
        self.send_response(200 if looks > 1 else 503)
        self.end_headers()

    def do_POST(self):
        size = int(self.headers["content-length"])
        asked = json.loads(self.rfile.read(size))
        self.send_response(200)
        self.end_headers()
        text = TEXTS[asked["prompt"]][str(asked["max_tokens"])]
        for event in (
            {"choices": [{"text": text, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"completion_tokens": 3}},
        ):
            self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

print("some words", file=sys.stderr)
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"x: listening on http://127.0.0.1:{server.server_port}", file=sys.stderr)
print(os.getpid(), *sys.argv[1:], file=sys.stderr)
server.serve_forever()
"""


@pytest.fixture
def script(tmp_path):
    """A function that makes a program: the command that runs it."""

    def write(code: str) -> list[str]:
        (tmp_path / "program.py").write_text(textwrap.dedent(code))
        return [sys.executable, str(tmp_path / "program.py")]

    return write


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_a_server_ends_with_its_measurement(script, error):
    async def ask(url):
        return await load.load(url, [Asked("a", 4)], 1, quiet=True)

    def measure():
        nonlocal pid
        with running(
            "x", [*script("TEXTS = {'a': {'4': 'b'}}\n" + FAKE), "--flag"]
        ) as s:
            ((reply,), _) = asyncio.run(ask(s.url))
            assert (reply.text, reply.lost) == ("b", None)
            pid, flag = s.last.split()
            assert flag == "--flag" and is_alive(int(pid))
            if error:
                raise error

    pid = 0
    before = signal.getsignal(signal.SIGTERM)
    if error:
        with pytest.raises(error):
            measure()
    else:
        measure()
    assert not is_alive(int(pid))
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_it_as_well(script):
    with (
        pytest.raises(Terminated),
        running("x", script("TEXTS = {}\n" + FAKE)) as server,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert not is_alive(int(server.last))


def test_a_server_that_does_not_want_to_end_is_killed(script, monkeypatch):
    monkeypatch.setattr(servers, "GRACE", 0)
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nTEXTS = {}\n"
    with running("x", script(code + FAKE)) as server:
        pass
    assert not is_alive(int(server.last))


@pytest.mark.parametrize(
    "code, words",
    [
        ("import sys; print('one', file=sys.stderr); exit('two')", "status 1: two"),
        ("exit(3)", "status 3"),
    ],
)
def test_a_server_that_ends_at_once(script, code, words):
    with (
        pytest.raises(InputError) as raised,
        running("my server", script(code)),
    ):
        raise AssertionError("it runs")
    assert str(raised.value) == f"my server does not come up: it ended with {words}"


def test_a_server_that_is_never_ready(script, monkeypatch):
    monkeypatch.setattr(servers, "START", 0)
    with (
        pytest.raises(InputError, match="not ready within 0 seconds"),
        running("x", script(f"import time\ntime.sleep({HANG})")),
    ):
        raise AssertionError("it runs")


@pytest.fixture
def bench(call, monkeypatch, tmp_path):
    """Run benchmark.py in this process, with a cache of its own: (status, stdout,
    stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return partial(call, program=benchmark)


def test_whole_run(bench, make, script, monkeypatch, tmp_path):
    """A line for each limit and for transformers, the same in the JSON. The fake server
    has one text that differs."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    pair = Pair.load(str(make()[2]))
    texts = {prompt: {} for prompt in PROMPTS}
    for asked, text in plain_texts(pair, draw(PROMPTS, 12, 6)).items():
        texts[asked.prompt][str(asked.max_tokens)] = text
    last = draw(PROMPTS, 12, 6)[-1]
    texts[last.prompt][str(last.max_tokens)] += "!"
    same = draw(PROMPTS, 12, 6).count(last)
    program = script(f"TEXTS = {texts!r}\n{FAKE}")[1]
    monkeypatch.setattr(servers, "SERVE", program)
    status, out, err = bench(
        *("--model", make()[2], "--draft-model", "none", "--prompts", prompts),
        *("--serve", "1,8", "--clients", 3, "--limit", 12, "--max-tokens", 6),
        *("--baseline", "transformers", "--json", tmp_path / "f.json"),
    )
    assert status == 0, err
    names = ["serve.py, max-batch 1", "serve.py, max-batch 8"]
    names += ["transformers, one at a time"]
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == names
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["requests"], figures["clients"]) == (12, 3)
    assert "repeats" not in figures
    rows = figures["rows"]
    assert [row["name"] for row in rows] == names
    assert [row["max_batch"] for row in rows] == [1, 8, None]
    assert [row["lost"] for row in rows] == [0, 0, 0]
    assert [row["different"] for row in rows] == [same, same, 0]


@pytest.mark.parametrize(
    "runs, error, expected",
    [
        (2, KeyboardInterrupt, (0, 1)),
        (1, KeyboardInterrupt, (130, 0)),
        (2, Terminated, (130, 0)),
    ],
)
def test_ctrl_c_keeps_the_servers_that_are_done(
    bench, make, script, monkeypatch, tmp_path, runs, error, expected
):
    """The table is of those; SIGTERM leaves none."""
    left = iter([None, None] * (runs - 1))  # a warm-up and a run of each

    async def interrupted(url, requests, clients, quiet=False):
        if next(left, error) is error:
            raise error
        return [Reply("", 1.0, 1.0, "stop", 1) for _ in requests], 1.0

    (tmp_path / "prompts.txt").write_text("the cat\n")
    monkeypatch.setattr(servers, "load", interrupted)
    monkeypatch.setattr(servers, "SERVE", script("TEXTS = {}\n" + FAKE)[1])
    status, out, err = bench(
        *("--model", make()[2], "--draft-model", "none", "--limit", 2),
        *("--prompts", tmp_path / "prompts.txt", "--serve", "1,2,4"),
    )
    assert (status, len(out.splitlines()[1:])) == expected
    assert ("nothing is known of serve.py, max-batch 2" in err) == (status == 0)


def test_what_serving_does_not_go_with(bench, tmp_path):
    for flags, words in (
        (["--batch-size", "1"], "--batch-size"),
        (["--num-draft", "1"], "--num-draft"),
        (["--temperature", "0"], "--temperature"),
        (["--simulate-alpha", "0"], "--simulate-alpha"),
        (["--calibrate"], "--calibrate"),
        (["--repeats", "2"], "--repeats"),
        (["--unverified"], "--unverified"),
        (["--plot", tmp_path / "p.svg"], "--plot"),
        (["--baseline", "ctranslate2"], "no server of ctranslate2"),
        (["--clients", "5000"], "at most 4096"),
    ):
        status, out, err = bench("--serve", "1,8", *flags)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    status, _, err = bench("--clients", "3")
    assert status == 2 and "--serve as well" in err
    status, _, err = bench("--serve", "0,8")
    assert status == 2 and "at least 1" in err


def test_a_server_that_fails_is_one_line(bench, make, script, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n")
    monkeypatch.setattr(servers, "SERVE", script("exit('no such model')")[1])
    status, out, err = bench(
        *("--model", make()[2], "--draft-model", "none", "--limit", 2),
        *("--prompts", tmp_path / "prompts.txt", "--serve", "1"),
    )
    assert (status, out) == (2, "")
    assert "max-batch 1 does not come up" in err.splitlines()[-1]
    assert "no such model" in err.splitlines()[-1]

"""The whole server: OpenAI's own client, raw HTTP, and texts as main.py has them."""

import http.client
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import openai
import pytest
from running import PROJECT

from pair import Pair
from speculation.sampling import Sampling

PROMPT = "translate English to German: Tom is a student at the university."
LINES = (PROJECT / "demo" / "test.tsv").read_text("utf-8").splitlines()
LINES = [line.split("\t")[0] for line in LINES]
PROMPTS = [f"translate English to German: {line}" for line in LINES]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="module")
def pair():
    return Pair.load(str(PROJECT / "demo/target"), str(PROJECT / "demo/draft"))


def written(prompts, *flags):
    """What main.py writes for each."""
    done = subprocess.run(
        [sys.executable, "main.py", "--json", "--prompt", "-", *flags],
        input="\n".join(prompts) + "\n",
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def raw(server, body, path="/v1/completions", method="POST", **headers):
    """(status, headers, value) of an answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    with closing(connection):
        body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        its = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method, path, body, its)
        answer = connection.getresponse()
        text = answer.read().decode()
        kind = answer.headers["Content-Type"] or ""
        value = json.loads(text) if kind.startswith("application/json") else text
        return answer.status, answer.headers, value


def address(server):
    return server.url.rpartition("/")[2].split(":")


def until_idle(server):
    """The engine has nothing left to do, and no row is anybody's."""
    for _ in range(600):
        if not (server.metric("t5_texts_waiting") or server.metric("t5_texts_running")):
            return
        time.sleep(0.05)
    raise AssertionError(server.get("/metrics"))


OPTIONS = [
    (["--max-tokens", "24"], {"max_tokens": 24}),
    (
        ["--num-draft", "3", "--delta", "0.5", "--max-tokens", "24"],
        {"num_draft": 3, "delta": 0.5, "max_tokens": 24},
    ),
    (
        ["--temperature", "0.8", "--top-k", "40", "--seed", "5", "--max-tokens", "20"],
        {"temperature": 0.8, "top_k": 40, "seed": 5, "max_tokens": 20},
    ),
    (
        [
            *("--repetition-penalty", "1.3", "--no-repeat-ngram-size", "2"),
            *("--min-new-tokens", "6", "--bad-words", "Tom", "--keep-special"),
        ],
        {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "min_new_tokens": 6,
            "bad_words": ["Tom"],
            "keep_special": True,
        },
    ),
]


@pytest.mark.parametrize(
    "flags, options", OPTIONS, ids=["greedy", "delta", "p", "rules"]
)
def test_texts_are_those_of_main(client, pair, flags, options):
    """All at once, and each as it would be alone."""
    prompts = PROMPTS[:15]
    extra = {k: v for k, v in options.items() if k not in ("max_tokens", "temperature")}
    top = {k: v for k, v in options.items() if k in ("max_tokens", "temperature")}
    if "seed" in options:
        # A prompt's place tells its random numbers from others': each is the first.
        (first,) = written(prompts[:1], *flags)
        sampling = Sampling(temperature=0.8, top_k=40, seed=5)
        answers = [
            pair.generate(prompt, sampling=sampling, max_tokens=20).finish()
            for prompt in prompts
        ]
        expected = [answer.text for answer in answers]
        assert expected[0] == first["text"]
    else:
        expected = [one["text"] for one in written(prompts, *flags)]

    def ask(prompt):
        one = client.completions.create(
            model="bundled", prompt=prompt, extra_body=extra, **top
        )
        return one.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, prompts))
    assert texts == expected


def test_a_completion(client):
    one = client.completions.create(model="bundled", prompt=PROMPT)
    (choice,) = one.choices
    assert (choice.text, choice.finish_reason) == (
        "Tom ist Student an der Universität.",
        "stop",
    )
    usage = one.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert one.object == "text_completion" and one.id.startswith("cmpl-")
    figures = one.model_extra["speculation"]
    assert figures["passes"] * figures["tokens_per_pass"] == pytest.approx(
        usage.completion_tokens, rel=0.01
    )
    short = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3
    assert choice.text.startswith(short.choices[0].text)


def test_a_chat(client):
    """T5 is asked what the user said last."""
    one = client.chat.completions.create(
        model="bundled",
        messages=[
            {"role": "system", "content": "You are a translator."},
            {"role": "user", "content": "translate English to German: Good morning."},
            {"role": "assistant", "content": "Guten Morgen."},
            {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
        ],
        max_completion_tokens=40,
    )
    (choice,) = one.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Tom ist Student an der Universität."
    assert one.object == "chat.completion"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="bundled", messages=[{"role": "system", "content": "x"}]
        )
    assert caught.value.param == "messages"


def test_streams(client):
    """Bit by bit the same text, and the same figures at the end."""
    for prompt in PROMPTS[:5]:
        whole = client.completions.create(model="bundled", prompt=prompt)
        chunks = list(
            client.completions.create(
                model="bundled",
                prompt=prompt,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"show_drafted": True},
            )
        )
        *texts, last = chunks
        assert last.choices == [] and last.usage == whole.usage
        assert all(chunk.usage is None for chunk in texts)
        its = [chunk.choices[0] for chunk in texts]
        assert "".join(one.text for one in its) == whole.choices[0].text
        assert [one.finish_reason for one in its] == [None] * (len(its) - 1) + ["stop"]
        for one in its:
            pieces = one.model_extra["pieces"]
            assert "".join(text for text, _ in pieces) == one.text
        assert len({chunk.id for chunk in chunks}) == 1
        told = list(
            client.chat.completions.create(
                model="bundled",
                messages=[{"role": "user", "content": prompt}],
                stream=True,
            )
        )
        assert told[0].choices[0].delta.role == "assistant"
        text = "".join(one.choices[0].delta.content or "" for one in told)
        assert text == whole.choices[0].text


def test_several_texts(client):
    """n of them, each with an index; sampled ones differ, and from request to request,
    unless there is a seed."""

    def sample(**options):
        one = client.completions.create(
            model="bundled",
            prompt=PROMPT,
            n=6,
            temperature=2.0,
            max_tokens=10,
            **options,
        )
        assert [choice.index for choice in one.choices] == list(range(6))
        return [choice.text for choice in one.choices]

    first, second = sample(), sample()
    assert len(set(first)) > 3 and first != second
    assert sample(seed=7) == sample(seed=7) != first
    mixed = client.completions.create(model="bundled", prompt=PROMPTS[:3])
    alone = [
        client.completions.create(model="bundled", prompt=prompt).choices[0].text
        for prompt in PROMPTS[:3]
    ]
    assert [choice.text for choice in mixed.choices] == alone
    chunks = client.completions.create(
        model="bundled", prompt=PROMPTS[:3], stream=True, stop=["."]
    )
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [text.partition(".")[0] for text in alone]


@pytest.mark.parametrize("num_draft", [0, 1, 5, None])
def test_stop_strings_cut_exactly(client, num_draft):
    """Wherever they are in the text, whatever was drafted; what came before them is the
    text, and all of it."""
    whole = "Tom ist Student an der Universität."
    for size in (1, 2, 5, 12):
        for start in range(0, len(whole) - size, 3):
            stop = whole[start : start + size]
            for stream in (False, True):
                one = client.completions.create(
                    model="bundled",
                    prompt=PROMPT,
                    stop=[stop, "never there"],
                    stream=stream,
                    extra_body={"num_draft": num_draft},
                )
                its = [chunk.choices[0] for chunk in one] if stream else one.choices
                text = "".join(each.text for each in its)
                assert text == whole.partition(stop)[0]
                assert its[-1].finish_reason == "stop"


def test_num_draft_of_a_request(client):
    """As many as it says, beside texts that draft otherwise."""

    def drafted(number):
        one = client.completions.create(
            model="bundled", prompt=PROMPT, extra_body={"num_draft": number}
        )
        return one.model_extra["speculation"]["drafted"]

    with ThreadPoolExecutor(6) as pool:
        none, *some = pool.map(drafted, [0, 1, 5, 16])
    assert none == 0
    assert all(some)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").id == "bundled"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_as_the_client_knows_them(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    for options, param in (
        ({"temperature": 5, "presence_penalty": 1}, "presence_penalty"),
        ({"logprobs": 3}, "logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"extra_body": {"num_draft": 17}}, "num_draft"),
        ({"extra_body": {"suppress_tokens": [10**6]}}, None),
        ({"extra_body": {"bad_words": [" "]}}, "bad_words"),
        ({"prompt": "x " * 9000}, "prompt"),
        ({"prompt": ["x"] * 100}, "prompt"),  # more than may wait
        ({"n": 100, "temperature": 1}, "n"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                asked = {"model": "bundled", "prompt": PROMPT, "stream": stream}
                client.completions.create(**{**asked, **options})
            assert caught.value.param == param, (options, caught.value.message)


def test_addresses(server):
    assert raw(server, None, "/nothing", "GET")[0] == 404
    status, headers, value = raw(server, None, "/v1/completions", "GET")
    assert status == 405 and headers["Allow"] == "POST"
    assert "does not take GET" in value["error"]["message"]
    assert raw(server, None, "/v1/completions/", "POST")[0] == 404
    status, headers, _ = raw(server, None, "/", "GET")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert json.loads(server.get("/health"))["status"] == "ok"


def test_what_a_browser_may_send_from_elsewhere(server):
    """Nothing: not without asking, and not under another name."""
    assert raw(server, {"prompt": "x"}, Content_Type="text/plain")[0] == 415
    assert raw(server, {"prompt": "x"}, Host="evil.example")[0] == 421
    assert raw(server, {"prompt": "x"}, Host="[::1]:80")[0] == 200
    assert raw(server, None, "/", "OPTIONS", Origin="http://x.example")[0] == 405


def test_what_is_no_http(server):
    """An error object, and the end."""
    for what in (
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\x00\xff\r\n\r\n",
    ):
        with closing(socket.create_connection(address(server))) as s:
            s.sendall(what)
            text = b""
            while more := s.recv(4096):
                text += more
        head, _, body = text.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_old_http(server):
    """A load balancer's question, without a Host."""
    with closing(socket.create_connection(address(server))) as s:
        s.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert s.recv(4096).startswith(b"HTTP/1.1 200")


def test_large_bodies(server):
    status, _, value = raw(server, {"prompt": "x" * (1 << 20)})
    assert status == 413 and "1,048,576 bytes" in value["error"]["message"]
    with closing(socket.create_connection(address(server))) as s:
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with pytest.raises(OSError):
            for _ in range(800):  # 50 MB are not read to their end
                s.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    until_idle(server)


def test_bodies_that_are_cut_off(server):
    host = address(server)
    for part in (b"", b'{"prompt":', b'{"prompt": "x"}'):
        with closing(socket.create_connection(host)) as s:
            s.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n" + part
            )
    for line in (b"\r\n", b"GET\r\n\r\n", b"\x00\xff" * 50, b"GET / HTTP/9.9\r\n\r\n"):
        with closing(socket.create_connection(host)) as s:
            s.sendall(line)
    until_idle(server)
    assert raw(server, {"prompt": PROMPT})[0] == 200


def open_stream(server, **options):
    """A socket that has got the beginning of a stream."""
    s = socket.create_connection(address(server))
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 2000, **options}
    body = json.dumps(body).encode()
    s.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    while b"data:" not in s.recv(4096):
        pass
    return s


ENDLESS = {"min_new_tokens": 2000, "num_draft": 0}


def test_clients_that_vanish(server, client):
    """Their rows are free at once, and others' texts are what they are."""
    before = server.metric('t5_tokens_total{kind="completion"}')
    gone = [open_stream(server, **ENDLESS) for _ in range(6)]
    one = client.completions.create(model="bundled", prompt=PROMPT, timeout=60)
    assert one.choices[0].text == "Tom ist Student an der Universität."
    for s in gone:
        s.close()
    until_idle(server)
    after = server.metric('t5_tokens_total{kind="completion"}')
    assert after - before < 6 * 2000  # they were not written to their end


def test_a_slow_reader_holds_nobody_up(server, client):
    s = open_stream(server, **ENDLESS)
    with closing(s):
        for prompt in PROMPTS[:5]:
            client.completions.create(model="bundled", prompt=prompt, timeout=60)
    until_idle(server)


def test_a_full_queue(server):
    """Who comes then is told when to come again, and then is answered."""
    many = {"prompt": PROMPT, "n": 70, "temperature": 1, **ENDLESS}
    with closing(open_stream(server, **many)):
        status, headers, value = raw(server, {"prompt": PROMPTS[:8]})
        assert status == 429 and int(headers["Retry-After"]) >= 1
        assert value["error"]["type"] == "rate_limit_error"
        assert server.metric("t5_texts_waiting") >= 50
    until_idle(server)
    assert raw(server, {"prompt": PROMPTS[:8]})[0] == 200

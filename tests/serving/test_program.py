"""Flags, signals, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from running import PROJECT, Running
from test_serve import ENDLESS, open_stream, raw

from serving.arguments import KEY, is_loopback, parse_arguments
from system.errors import InputError


def start(*flags, **more):
    """serve.py with flags that it ends of by itself: (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "serve.py", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        **more,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--port", "x"], "port"),
        (["--port", "70000"], "65535"),
        (["--port", "-1"], "at least 0"),
        (["--max-batch", "0"], "neither auto nor a number"),
        (["--max-queue", "-1"], "at least 0"),
        (["--max-tokens", "0"], "at least 1"),
        (["--grace", "nan"], "at least 0"),
        (["--host", ""], "empty"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "::"], "--api-key"),
        (["--host", "example.invalid"], "--api-key"),
        (["--api-key", ""], "at least one"),
        (["--api-key", "ü"], "ASCII"),
        (["--api-key", "k", "--no-api-key"], "does not go with"),
        (["--api-key", " k "], "space"),
        (["--api-key", "  "], "at least one"),
        (["--grace", "1e300"], "at most 1,000,000"),
        (["--lookup", "--draft-model", "none"], "target alone"),
        (["--unheard-of"], "--help"),
    ],
)
def test_odd_flags(flags, words, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(InputError, match=words):
        parse_arguments(flags)


def test_flags_that_go(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    assert parse_arguments([]).api_key == "secret"
    assert parse_arguments(["--api-key", "mine"]).api_key == "mine"
    assert parse_arguments(["--host", "0.0.0.0"]).api_key == "secret"
    assert parse_arguments(["--no-api-key", "--host", "::"]).api_key is None
    monkeypatch.setenv(KEY, "")
    assert parse_arguments([]).api_key is None


@pytest.mark.parametrize(
    "host, loopback",
    [
        *(("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1), ("[::1]", 1)),
        *(("localhost", 1), ("0.0.0.0", 0), ("::", 0), ("10.0.0.1", 0), ("", 0)),
        *(("localhost.evil.example", 0), ("127.0.0.1.evil.example", 0)),
    ],
)
def test_what_this_machine_alone_can_reach(host, loopback):
    assert is_loopback(host) == bool(loopback)


def test_one_line_and_status_2(tmp_path):
    """A port that is taken, an address that is none, a model that is none."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        for flags, words in (
            (["--port", port], "--port"),
            (["--host", "256.1.1.1", "--no-api-key"], "256.1.1.1"),
            (["--host", "a..b", "--no-api-key"], "a..b"),
            (["--port", "0", "--model", str(tmp_path / "none")], "none"),
        ):
            status, out, said = start(*flags)
            lines = [line for line in said.splitlines() if "listening" not in line]
            assert (status, out, len(lines)) == (2, "", 1), said
            assert lines[0].startswith("serve.py: ") and words in lines[0]


def test_without_what_it_needs(tmp_path):
    """Not installed: said in a line."""
    (tmp_path / "starlette.py").write_text("raise ImportError(name='starlette')")
    status, _, said = start(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert status == 2
    assert said == (
        "serve.py: starlette is missing: pip install -r requirements-serve.txt\n"
    )


def test_a_key():
    """For all that answers, but not to see whether it lives; from other hosts too."""
    env = {**os.environ, KEY: "open sesame"}
    running = Running("--host", "0.0.0.0", "--max-batch", "1", env=env)
    try:
        assert json.loads(running.get("/health"))["status"] == "ok"
        assert "<html" in running.get("/") or running.get("/") == ""
        for path in ("/metrics", "/v1/models"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic open sesame"},
                {"Authorization": "Bearer ü".encode().decode("latin-1")},
            ):
                ask = urllib.request.Request(running.url + path, headers=headers)
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(ask, timeout=60)
                with caught.value as error:
                    assert error.code == 401
                    assert json.load(error)["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer open sesame", "Host": "my.machine.example"}
        assert raw(running, {"prompt": "x"}, **right)[0] == 200
        assert raw(running, {"prompt": "x"})[0] == 401
    finally:
        assert running.end() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_runs_may_finish(number):
    """No new requests, and those that are being answered come to their end."""
    running = Running("--max-batch", "2")
    host = running.url.rpartition("/")[2].split(":")
    with closing(open_stream(running, max_tokens=200, min_new_tokens=200)) as s:
        running.process.send_signal(number)
        text = b""
        while b"[DONE]" not in text and (more := s.recv(65536)):
            text += more
        assert b'"finish_reason":"length"' in text and b"[DONE]" in text
    with pytest.raises(OSError):
        socket.create_connection(host).close()
    assert running.end() == (0, "")


def test_but_not_for_ever():
    """After --grace it ends, though a client still waits."""
    running = Running("--grace", "1", "--max-batch", "1")
    with closing(open_stream(running, **ENDLESS)):
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=60) == 0
    assert running.end() == (0, "")
    assert not any("Traceback" in line for line in running.said), running.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(number):
    running = Running("--grace", "500", "--max-batch", "1")
    with closing(open_stream(running, **ENDLESS)):
        for _ in range(2):
            running.process.send_signal(number)
            time.sleep(0.3)
        assert running.process.wait(timeout=60) == 0
    assert running.end() == (0, "")
    assert not any("Traceback" in line for line in running.said), running.said


def test_who_still_waits_is_told():
    """After --grace: in mid-stream by an event, before that by a status."""
    running = Running("--grace", "1", "--max-batch", "1")
    body = {"prompt": "x", "max_tokens": 2000, **ENDLESS}
    with ThreadPoolExecutor(1) as pool, closing(open_stream(running, **ENDLESS)) as s:
        waiting = pool.submit(raw, running, body)
        while running.metric("t5_texts_waiting") == 0:
            pass
        running.process.send_signal(signal.SIGTERM)
        text = b""
        while more := s.recv(65536):
            text += more
        status, _, value = waiting.result()
    assert (status, value["error"]["code"]) == (503, "stopping")
    assert b'"code":"stopping"' in text and b"[DONE]" not in text
    assert running.end() == (0, "")


def test_connections_that_ask_for_nothing():
    """More of them than there may be open files: that is not said a thousand times,
    and when they are gone others are answered."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))"
    start_it = f"{limit}; sys.argv[0] = 'serve.py'; import runpy; "
    start_it += "runpy.run_path('serve.py', run_name='__main__')"
    running = Running(command=[sys.executable, "-c", start_it])
    host = running.url.rpartition("/")[2].split(":")
    held = []
    try:
        for _ in range(150):
            held.append(socket.create_connection(host))
    finally:
        for s in held:
            s.close()
    for _ in range(100):
        try:
            assert json.loads(running.get("/health"))["status"] == "ok"
            break
        except OSError:  # their turn to be closed comes before
            time.sleep(0.1)
    else:
        raise AssertionError(running.said[:10])
    assert running.end() == (0, "")
    assert len(running.said) < 10, running.said[:10]


def test_while_it_loads():
    """It can be ended, too."""
    running = Running(wait=False)
    try:
        running.until("listening")
    finally:
        running.process.send_signal(signal.SIGTERM)
        status, out = running.end()
    assert (status, out) == (0, "")

"""The thread that has the models, with an app in this process."""

import asyncio
import json
import threading
import time
from queue import SimpleQueue

import httpx2 as httpx
import pytest
from running import PROJECT

from pair import Pair
from serving import app as app_module
from serving.app import make_app
from serving.bodies import Asked
from serving.jobs import Added, Begun, FullError, Job
from serving.metrics import Metrics
from serving.worker import Worker
from system.errors import InputError

PROMPTS = [
    f"translate English to German: {line}"
    for line in ("Good morning.", "Tom is here.", "I like it.", "She has a dog.")
]


@pytest.fixture(scope="module")
def pair():
    return Pair.load(str(PROJECT / "demo/target"), str(PROJECT / "demo/draft"))


class Harness:
    """A worker that answers with a pair that it loads, and jobs of it."""

    def __init__(self, rows=4, waiting=100, load=None):
        self.metrics = Metrics()

        def loaded():
            pair = Pair.load(str(PROJECT / "demo/target"), str(PROJECT / "demo/draft"))
            return pair, "it"

        self.worker = Worker(
            load or loaded,
            rows=rows,
            waiting=waiting,
            most_tokens=4096,
            most_prompt=100,
            metrics=self.metrics,
        )

    def __enter__(self):
        self.worker.start()
        while not (self.worker.ready or self.worker.fault):
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.worker.stop(60)
        assert not self.worker._thread.is_alive()

    def submit(self, prompt=PROMPTS[0], count=1, **options):
        events = SimpleQueue()
        asked = Asked(False, None, [prompt], count, **options)
        job = Job(asked, events.put)
        self.worker.submit(job)
        return job, events

    def idle(self):
        """Nothing is anybody's any more."""
        deadline = time.monotonic() + 60
        while self.worker.count or self.worker._engine.busy:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not self.worker._rows and not self.worker._engine._texts


def text_of(events, texts=1):
    """What the events of a job make; raises what they end with."""
    pieces = []
    while texts:
        event = events.get(timeout=60)
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Added):
            pieces += event.pieces
            texts -= event.finish_reason is not None
    return "".join(text for text, _ in pieces)


def test_texts_come_and_rows_are_free(pair):
    with Harness() as it:
        jobs = [it.submit(prompt) for prompt in PROMPTS]
        for (_, events), prompt in zip(jobs, PROMPTS, strict=True):
            assert isinstance(events.get(timeout=60), Begun)
            assert text_of(events) == pair.generate(prompt).finish().text
        it.idle()


LONG = {"given": {"min_new_tokens": 4000, "max_tokens": 4000}}


def test_given_up_at_every_stage(pair):
    """While it waits, while it is encoded, between rounds, when it is done, twice."""
    with Harness(rows=2) as it:
        running = [it.submit(**LONG) for _ in range(2)]
        waiting = [it.submit(**LONG) for _ in range(3)]
        for _, events in running:
            while not isinstance(events.get(timeout=60), Added):
                pass
        for job, _ in (*waiting, running[0], running[0]):
            it.worker.give_up(job)
        _, events = it.submit()
        assert text_of(events) == pair.generate(PROMPTS[0]).finish().text
        for steps in range(12):
            job, _ = it.submit(PROMPTS[steps % 4], **LONG)
            time.sleep(steps / 1000)
            it.worker.give_up(job)
        it.worker.give_up(running[1][0])
        it.idle()


def test_room_for_so_many(pair):
    with Harness(rows=1, waiting=3) as it:
        with pytest.raises(FullError):
            it.submit(count=5, given={"temperature": 1.0})
        jobs = [it.submit(**LONG) for _ in range(4)]
        with pytest.raises(FullError):
            it.submit()
        it.worker.give_up(jobs[0][0])
        for _ in range(600):
            try:
                _, events = it.submit()
                break
            except FullError:
                time.sleep(0.01)
        for job, _ in jobs[1:]:
            it.worker.give_up(job)
        assert text_of(events) == pair.generate(PROMPTS[0]).finish().text
        it.idle()


def test_a_round_that_fails(pair, monkeypatch, capfd):
    """Those who were in it are told; who comes then is answered."""
    with Harness() as it:
        _, events = it.submit(**LONG)
        while not isinstance(events.get(timeout=60), Added):
            pass

        def fails():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(it.worker._engine, "step", fails)
        with pytest.raises(RuntimeError, match="the device is gone"):
            text_of(events)
        _, events = it.submit(PROMPTS[1])
        assert text_of(events) == pair.generate(PROMPTS[1]).finish().text
        it.idle()
    assert "the device is gone" in capfd.readouterr().err  # a defect is not hidden


@pytest.mark.parametrize("what", ["decode", "admit", "cancel", "encode"])
def test_one_text_that_fails(pair, monkeypatch, capfd, what):
    """Nobody else does, or those who come after are answered."""
    with Harness(rows=2) as it:

        def fails(*_):
            raise ValueError("it broke")

        engine, tokenizer = it.worker._engine, it.worker._pair.tokenizer
        with monkeypatch.context() as patch:
            if what == "decode":
                _, others = it.submit(PROMPTS[1])
                patch.setattr(it.worker._pair, "_decode_with_special", fails)
                job, events = it.submit(keep_special=True)
            elif what == "encode":
                patch.setattr(tokenizer, "encode", fails)
                job, events = it.submit()
            else:
                job, events = it.submit(**({} if what == "admit" else LONG))
                while what == "cancel" and not isinstance(
                    events.get(timeout=60), Added
                ):
                    pass
                patch.setattr(engine, what, fails)
                it.worker.give_up(job) if what == "cancel" else None
                if what == "admit":
                    _, events = it.submit(PROMPTS[2])
            if what in ("decode", "encode", "admit"):
                with pytest.raises(ValueError, match="it broke"):
                    while True:
                        text_of(events)
            if what == "decode":
                assert text_of(others) == pair.generate(PROMPTS[1]).finish().text
            for _ in range(500):
                if it.worker.count == 0:
                    break
                time.sleep(0.01)
        _, events = it.submit(PROMPTS[1])
        assert text_of(events) == pair.generate(PROMPTS[1]).finish().text
        it.idle()
    assert "it broke" in capfd.readouterr().err


def test_jobs_take_turns(pair):
    """One with many texts does not go before all of another's."""
    with Harness(rows=2, waiting=200) as it:
        events = SimpleQueue()
        first = Job(Asked(False, None, PROMPTS * 15), events.put)
        it.worker.submit(first)
        while not isinstance(events.get(timeout=60), Added):
            pass
        _, others = it.submit(PROMPTS[1])
        assert text_of(others) == pair.generate(PROMPTS[1]).finish().text
        assert first.texts > 45
        finished = 60 - text_of_all(events, first.texts)
        assert finished == 60
        it.idle()


def text_of_all(events, left):
    """Wait for so many texts to be finished, others before them; how many are not."""
    while left:
        event = events.get(timeout=60)
        left -= isinstance(event, Added) and event.finish_reason is not None
    return left


def test_one_that_cannot_be_begun_with(pair):
    with Harness() as it:
        for prompt, options in (
            ("", {}),
            ("x " * 200, {}),
            ("x", {"given": {"suppress_tokens": (10**6,)}}),
            ("x", {"num_draft": 99}),
            ("x", {"given": {"max_tokens": 10**6}}),
            ([{"role": "system", "content": "x"}], {}),
            ("x", {"bad_words": ("",)}),
        ):
            _, events = it.submit(prompt, **options)
            with pytest.raises(InputError):
                text_of(events)
        it.idle()
        _, events = it.submit()
        assert text_of(events) == pair.generate(PROMPTS[0]).finish().text


def test_it_is_stopped():
    """Whoever waits is told, and who comes later."""
    it = Harness(rows=1)
    with it:
        jobs = [it.submit(**LONG) for _ in range(3)]
    for _, events in jobs:
        with pytest.raises(InputError, match="stopping"):
            text_of(events)
    with pytest.raises(InputError, match="stopping"):
        it.submit()


def test_models_that_cannot_be_loaded():
    def load():
        raise InputError("there is none")

    with Harness(load=load) as it:
        assert str(it.worker.failed) == "there is none"
        assert not it.worker.ready


def ask(app, *requests):
    """The answers of an app, (status, headers, value): all asked at once."""

    async def all_of():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=60
        ) as client:
            return await asyncio.gather(
                *(client.post(path, json=body) for path, body in requests)
            )

    return asyncio.run(all_of())


def test_while_it_loads_and_when_it_is_over():
    """503, and when to come again."""
    go = threading.Event()

    def load():
        go.wait(60)
        raise InputError("there is none")

    it = Harness(load=load)
    app = make_app(it.worker, it.metrics)
    it.worker.start()
    (answer,) = ask(app, ("/v1/completions", {"prompt": "x"}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert answer.headers["Retry-After"]
    go.set()
    it.worker.stop(60)
    (answer,) = ask(app, ("/v1/completions", {"prompt": "x"}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")


def test_a_defect_is_an_error_object(monkeypatch):
    """And the others are answered."""
    with Harness() as it:
        app = make_app(it.worker, it.metrics)

        def fails(*_):
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(it.worker, "_requests", fails)
            (answer,) = ask(app, ("/v1/completions", {"prompt": "x"}))
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
            body = {"prompt": "x", "stream": True}
            (answer,) = ask(app, ("/v1/completions", body))
            assert answer.status_code == 500
        (answer,) = ask(app, ("/v1/completions", {"prompt": PROMPTS[0]}))
        assert answer.status_code == 200
        it.idle()


def test_an_error_in_mid_stream(monkeypatch):
    """It is the last event, and there is no [DONE]."""
    with Harness() as it:
        app = make_app(it.worker, it.metrics)
        step, rounds = it.worker._engine.step, []

        def fails_later():
            rounds.append(1)
            if len(rounds) > 3:
                raise RuntimeError("the device is gone")
            return step()

        monkeypatch.setattr(it.worker._engine, "step", fails_later)
        body = {"prompt": "x", "stream": True, "min_new_tokens": 200, "num_draft": 0}
        (answer,) = ask(app, ("/v1/completions", body))
        *_, last, end = answer.text.split("\n\n")
        assert end == "" and "[DONE]" not in answer.text
        assert (
            json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        )


def test_bodies_that_take_too_long(monkeypatch):
    monkeypatch.setattr(app_module, "SLOWEST", 0.05)

    async def never(*_):
        await asyncio.sleep(60)

    async def asking():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions",
            "headers": [(b"host", b"[::1]"), (b"content-type", b"application/json")],
            "query_string": b"", "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        it = Harness()
        await make_app(it.worker, it.metrics)(scope, never, send)
        return sent

    start, *_ = asyncio.run(asking())
    assert start["status"] == 408

"""Beam search over HTTP: texts are those of a plain search of the pair's target."""

import json
import re
import shutil
from queue import SimpleQueue

import pytest
from conftest import tiny_tokenizer
from running import PROJECT
from test_worker import LONG, PROMPTS, Harness, ask, text_of
from tiny_causal import tiny_causal

from pair import Pair
from serving import worker
from serving.app import make_app
from serving.bodies import Asked
from serving.jobs import Added, FullError, Job
from speculation.beams import Beams
from speculation.sampling import Sampling
from system.errors import InputError

TARGET, DRAFT = str(PROJECT / "demo/target"), str(PROJECT / "demo/draft")
SEARCH = {"num_beams": 4, "max_tokens": 24}


@pytest.fixture(scope="module")
def plain():
    """The best texts of a prompt, searched for without a draft."""
    pair = Pair.load(TARGET)

    def best(prompt, count=1, rules=None, **search):
        answers = pair.samples(
            prompt,
            count,
            beams=Beams(**{"num_beams": 4, **search}),
            sampling=Sampling(**(rules or {})),
            max_tokens=24,
        )
        return [answer.finish() for answer in answers]

    return best


@pytest.fixture(scope="module")
def asking():
    """A function that has requests answered, all at once."""
    with Harness(rows=8) as it:
        app = make_app(it.worker, it.metrics)

        def answers(*bodies, chat=False):
            path = "/v1/chat/completions" if chat else "/v1/completions"
            return ask(app, *((path, body) for body in bodies))

        yield answers
        it.idle()


def value_of(answer) -> dict:
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(answer) -> list[dict]:
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


WAYS = {
    "as they are": ({}, {}),
    "longer": ({"length_penalty": 3.0, "early_stopping": True}, {}),
    "two": ({"num_beams": 2, "early_stopping": "never"}, {}),
    "rules": ({"length_penalty": -1.0}, {"repetition_penalty": 1.4}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_draft", [0, 4, None])
def test_the_best_of_one_search(asking, plain, way, num_draft):
    """Numbered best first, with their scores; passes are not counted for each."""
    search, rules = WAYS[way]
    count = search.get("num_beams", 3)
    best = plain(PROMPTS[1], count, rules, **search)
    body = {"prompt": PROMPTS[1], **SEARCH, **search, **rules, "num_draft": num_draft}
    for names in ({"n": count}, {"num_return_sequences": count}):
        (answer,) = asking({**body, **names})
        value = value_of(answer)
        choices = value["choices"]
        assert [one["index"] for one in choices] == list(range(count))
        assert [one["text"] for one in choices] == [one.text for one in best]
        assert [one["finish_reason"] for one in choices] == ["stop"] * count
        assert [one["score"] for one in choices] == pytest.approx(
            [one.score for one in best], rel=1e-4
        )
        sizes = [len(one.tokens) for one in best]
        assert value["usage"]["completion_tokens"] == sum(sizes)
        its = value["speculation"]
        assert its["passes"] * its["tokens_per_pass"] == pytest.approx(sizes[0], 0.01)
        assert its["passes"] <= best[0].stats.rounds
        assert (its["drafted"] > 0) >= (num_draft == 4)


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_streams(asking, plain, chat):
    """The best text as far as it is certain, the others at the end."""
    best = plain(PROMPTS[1], 3)
    question = [{"role": "user", "content": PROMPTS[1]}]
    asked = {"messages": question} if chat else {"prompt": PROMPTS[1]}
    body = {**asked, **SEARCH, "n": 3, "num_draft": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "show_drafted": True}
    (answer,) = asking(body, chat=chat)
    *events, last = events_of(answer)
    choices = [event["choices"][0] for event in events]
    if chat:
        assert [one["index"] for one in choices[:3]] == [0, 1, 2]
        assert all(one.pop("delta")["role"] == "assistant" for one in choices[:3])
        del choices[:3]
    texts, order = ["", "", ""], []
    for one in choices:
        text = one["delta"].get("content", "") if chat else one["text"]
        assert "".join(bit for bit, _ in one["pieces"]) == text
        texts[one["index"]] += text
        order.append(one["index"])
        assert ("score" in one) == (one["finish_reason"] == "stop")
    assert texts == [one.text for one in best]
    assert order == [*[0] * (len(order) - 2), 1, 2]
    assert order.count(0) > 1
    scores = [one["score"] for one in choices[-3:]]
    assert scores == pytest.approx([one.score for one in best], rel=1e-4)
    sizes = [len(one.tokens) for one in best]
    assert last["usage"]["completion_tokens"] == sum(sizes)
    assert last["speculation"]["passes"] == best[0].stats.rounds


def test_several_prompts(asking, plain):
    for stream in (False, True):
        body = {"prompt": PROMPTS, "n": 2, "stream": stream, **SEARCH, "num_beams": 2}
        (answer,) = asking(body)
        texts = [""] * 8
        for value in events_of(answer) if stream else [value_of(answer)]:
            for choice in value["choices"]:
                texts[choice["index"]] += choice["text"]
        expected = [one.text for p in PROMPTS for one in plain(p, 2, num_beams=2)]
        assert texts == expected


@pytest.mark.parametrize("num_draft", [0, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(asking, plain, stream, num_draft):
    """Each text is cut by itself, and one that is cut has no score."""
    best = plain(PROMPTS[3], 3)
    whole = best[0].text
    for count in (1, 3):
        for start in range(0, len(whole) - 3, 3):
            stop = whole[start : start + 3]
            body = {"prompt": PROMPTS[3], **SEARCH, "n": count, "stop": [stop]}
            (answer,) = asking({**body, "num_draft": num_draft, "stream": stream})
            texts, ends = [""] * count, {}
            for value in events_of(answer) if stream else [value_of(answer)]:
                for choice in value["choices"]:
                    texts[choice["index"]] += choice["text"]
                    if choice["finish_reason"]:
                        assert ends.setdefault(choice["index"], choice) is choice
            its = best[:count]
            assert texts == [one.text.partition(stop)[0] for one in its]
            for index, one in enumerate(its):
                assert ends[index]["finish_reason"] == "stop"
                assert ("score" in ends[index]) == (stop not in one.text)
            if not stream:
                assert value["usage"]["completion_tokens"] <= sum(
                    len(one.tokens) for one in its
                )


def test_a_search_is_over_where_its_text_is(asking):
    """Not where the search would be."""
    body = {"prompt": PROMPTS[1], "num_beams": 2, "min_new_tokens": 60}
    body |= {"max_tokens": 60, "num_draft": 0}
    whole, cut = map(value_of, asking(body, {**body, "stop": "Tom"}))
    assert whole["choices"][0]["text"].startswith("Tom")
    assert cut["choices"][0]["text"] == ""
    assert cut["speculation"]["passes"] < 20 < whole["speculation"]["passes"]


def test_all_kinds_at_once(asking, plain):
    """Whoever waits for others' end is answered as well, and as if alone."""
    bodies = [
        {"prompt": prompt, "num_beams": count, "max_tokens": 24, **more}
        for prompt in PROMPTS
        for count, more in (
            (1, {}),
            (2, {}),
            (1, {"seed": 3, "temperature": 1}),
            (4, {}),
        )
    ]
    texts = [value_of(answer)["choices"][0]["text"] for answer in asking(*bodies)]
    pair = Pair.load(TARGET)
    for body, text in zip(bodies, texts, strict=True):
        prompt, count = body["prompt"], body["num_beams"]
        if count > 1:
            expected = plain(prompt, num_beams=count)[0].text
        else:
            heat = {"temperature": 1.0, "seed": 3} if "seed" in body else {}
            expected = pair.generate(prompt, sampling=Sampling(**heat)).finish().text
        assert text == expected, body


def test_fewer_texts_than_are_asked_for(asking):
    ids = list(range(Pair.load(TARGET).target.vocabulary))
    body = {"prompt": PROMPTS[0], "num_beams": 4, "max_tokens": 1}
    body["suppress_tokens"] = [token for token in ids if token not in (50, 60)]
    for stream in (False, True):
        two, four = asking(
            {**body, "n": 2, "stream": stream}, {**body, "n": 4, "stream": stream}
        )
        assert (two.status_code, four.status_code) == (200, 200 if stream else 400)
        last = four.text
        if stream:  # it had begun
            assert "[DONE]" in two.text and "[DONE]" not in four.text
            *_, last, _ = four.text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "there are only 2 texts" in error["message"]


def numbers(metrics) -> dict[str, float]:
    found = re.findall(r"^(t5_\w+(?:{.*?})?) (\S+)$", metrics.text().decode(), re.M)
    return {name: float(value) for name, value in found}


@pytest.mark.parametrize("num_draft", [0, 4])
def test_metrics(num_draft):
    """Rounds also where nothing was certain after one; what each text has got."""
    with Harness() as it:
        app = make_app(it.worker, it.metrics)
        body = {"prompt": PROMPTS[1], "n": 3, **SEARCH, "num_draft": num_draft}
        (answer,) = ask(app, ("/v1/completions", body))
        value = value_of(answer)
        it.idle()
        found = numbers(it.metrics)
        its = value["speculation"]
        assert found["t5_rounds_total"] == its["passes"]
        assert found["t5_round_texts_count"] == its["passes"]
        assert found["t5_round_texts_sum"] == its["passes"]
        tokens = found['t5_tokens_total{kind="completion"}']
        assert tokens == value["usage"]["completion_tokens"]
        assert found['t5_draft_tokens_total{fate="accepted"}'] == its["accepted"]
        assert (found['t5_draft_tokens_total{fate="rejected"}'] > 0) <= bool(num_draft)


ENDLESS = {"given": {**LONG["given"], "num_beams": 4}}


def first_text(events):
    while not isinstance(event := events.get(timeout=60), Added):
        assert not isinstance(event, Exception), event


def test_room_is_that_of_the_beams(plain):
    with Harness(rows=2, waiting=8) as it:
        app = make_app(it.worker, it.metrics)
        for body, name in (
            ({"prompt": "x", "num_beams": 11}, "num_beams"),
            ({"prompt": ["x"] * 3, "num_beams": 4, "n": 2}, "num_beams"),
            ({"prompt": "x", "temperature": 1, "n": 11}, "n"),
            ({"prompt": ["x"] * 11}, "prompt"),
        ):
            (answer,) = ask(app, ("/v1/completions", body))
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name)
            assert "at most 10 are taken" in error["message"]
        jobs = [it.submit(**ENDLESS) for _ in range(2)]
        assert it.worker.count == 8
        with pytest.raises(FullError):
            it.submit(given={"num_beams": 3})
        first_text(jobs[0][1])
        (answer,) = ask(app, ("/v1/completions", {"prompt": "x", "num_beams": 4}))
        assert answer.status_code == 429
        for job, _ in jobs:
            it.worker.give_up(job)
        it.idle()
        _, events = it.submit(given={"num_beams": 4})
        assert text_of(events) == plain(PROMPTS[0])[0].text


@pytest.mark.parametrize("beams, most", [(2, 2), (4, 1), (6, 1)])
def test_a_batch_has_room_for_so_many_beams(plain, monkeypatch, beams, most):
    with Harness(rows=4) as it:
        step, decoded = it.worker._engine.step, []

        def counting():
            commits = step()
            decoded.append(it.worker._engine.decoded)
            return commits

        monkeypatch.setattr(it.worker._engine, "step", counting)
        jobs = [it.submit(prompt, given={"num_beams": beams}) for prompt in PROMPTS]
        for (_, events), prompt in zip(jobs, PROMPTS, strict=True):
            assert text_of(events) == plain(prompt, num_beams=beams)[0].text
        assert max(decoded) == most
        it.idle()


def test_who_waits_for_room_goes_first():
    """Others that could be begun with do not go before it for ever."""
    with Harness(rows=4) as it:
        running, events = it.submit(**LONG)
        first_text(events)
        told = SimpleQueue()

        def submit(name, **given):
            asked = Asked(False, None, [PROMPTS[1]], given=given)
            job = Job(asked, lambda event: told.put((name, event)))
            it.worker.submit(job)

        submit("searched", num_beams=4)
        for _ in range(6):
            submit("other")
        for _ in range(60):  # in which they could be answered
            first_text(events)
        done = []
        it.worker.give_up(running)
        while len(done) < 7:
            name, event = told.get(timeout=60)
            assert not isinstance(event, Exception)
            if isinstance(event, Added) and event.finish_reason:
                done.append(name)
        assert done[0] == "searched"
        it.idle()


@pytest.mark.parametrize("pause", [worker._PAUSE, -1], ids=["", "hurried"])
def test_nor_do_all_of_many_go_before_it(monkeypatch, pause):
    """Of jobs that came before: those that are begun with."""
    monkeypatch.setattr(worker, "_PAUSE", pause)
    with Harness(rows=4) as it:
        many = SimpleQueue()
        for _ in range(4):
            it.worker.submit(Job(Asked(False, None, PROMPTS * 4), many.put))
        while not isinstance(many.get(timeout=60), Added):
            pass
        _, events = it.submit(given={"num_beams": 4})
        text_of(events)
        ended = 0
        while not many.empty():
            event = many.get()
            ended += isinstance(event, Added) and event.finish_reason is not None
        assert ended < 40
        assert text_of(many, 64 - ended)
        it.idle()


def test_given_up_at_every_stage(plain):
    with Harness(rows=4) as it:
        for steps in range(12):
            job, events = it.submit(PROMPTS[steps % 4], count=1 + steps % 4, **ENDLESS)
            if steps % 2:
                first_text(events)
            it.worker.give_up(job)
        _, events = it.submit(count=1, given={"num_beams": 4})
        assert text_of(events) == plain(PROMPTS[0])[0].text
        it.idle()
        assert it.worker.count == 0


@pytest.fixture
def asking_for_beams(tmp_path):
    """The bundled target as one whose makers ask for a search."""
    folder = shutil.copytree(TARGET, tmp_path / "target")
    path = folder / "generation_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "num_beams": 4, "length_penalty": 2.0}))
    return lambda: (Pair.load(str(folder), DRAFT), "it")


def test_beams_of_the_models_files(asking_for_beams, plain, capfd):
    """They are counted as well, once they are known, and not applied unasked."""
    with Harness(load=asking_for_beams) as it:
        app = make_app(it.worker, it.metrics)
        body = {"prompt": PROMPTS[1], "task_defaults": True, "max_tokens": 24}
        greedy, few, many, off = ask(
            app,
            ("/v1/completions", {**body, "task_defaults": False}),
            ("/v1/completions", {**body, "n": 3}),
            ("/v1/completions", {**body, "n": 5}),
            ("/v1/completions", {**body, "num_beams": 1}),
        )
        best = plain(PROMPTS[1], 3, length_penalty=2.0)
        its = value_of(few)["choices"]
        assert [one["text"] for one in its] == [one.text for one in best]
        assert "score" not in value_of(greedy)["choices"][0]
        assert value_of(off)["choices"] == value_of(greedy)["choices"]
        assert (many.status_code, many.json()["error"]["param"]) == (400, "n")
        it.idle()
        assert it.worker.count == 0
        job, events = it.submit(task_defaults=True, **LONG)
        first_text(events)
        assert it.worker.count == job.room == 4
        it.worker.give_up(job)
        it.idle()
        assert it.worker.count == 0
    assert "num_beams 4, length_penalty 2" in capfd.readouterr().err


def test_models_without_an_encoder(tmp_path):
    tiny_causal("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with Harness(load=lambda: (Pair.load(str(tmp_path)), "it")) as it:
        app = make_app(it.worker, it.metrics)
        for task_defaults in (False, True):
            body = {"prompt": "the cat", "num_beams": 2, "task_defaults": task_defaults}
            (answer,) = ask(app, ("/v1/completions", body))
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "num_beams")
            assert "with an encoder" in error["message"]
        it.idle()
        _, events = it.submit("the cat")
        text_of(events)


def test_one_that_cannot_be_begun_with():
    with Harness() as it:
        for given in ({"num_beams": 65}, {"num_beams": 4, "temperature": 1.0}):
            _, events = it.submit(given=given)
            with pytest.raises(InputError, match="num-beams"):
                text_of(events)
        it.idle()
        assert it.worker.count == 0

"""Any number of prompts: each is answered as it is alone, in order, and no further
ahead than it takes."""

from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answering
from answering import Question
from pair import Pair
from speculation.sampling import Sampling
from system.errors import InputError, PromptError

WORDS = ["the", "cat", "sat", "on", "a", "b", "c", "e", "t", "s"]
OPTIONS = {"max_tokens": 8}


def prompts(number):
    return [
        " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 2 + i % 9))
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def pair(make):
    return Pair.load(str(make()[2]), str(make(noise=0.05)[2]))


@settings(max_examples=12)
@given(st.data())
def test_each_is_what_it_is_alone(pair, data):
    asked = prompts(data.draw(st.integers(0, 30)))
    options = OPTIONS | {"num_draft": data.draw(st.integers(0, 3))}
    options["sampling"] = data.draw(
        st.sampled_from(
            [
                Sampling(),
                Sampling(temperature=1.0, seed=3),
                Sampling(temperature=1.0, seed=3, coupling="residual"),
            ]
        )
    )
    size = data.draw(st.sampled_from([None, 1, 2, 5, 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "WINDOW", data.draw(st.integers(1, 4)))
        found = list(pair.answers(iter(asked), batch_size=size, **options))
    assert [one.prompt for one in found] == asked
    for place, one in enumerate(found):
        alone = pair.generate(asked[place], stream=place, **options).finish()
        assert (one.text, one.tokens) == (alone.text, alone.tokens)
        assert one.finish_reason == alone.finish_reason


def test_as_they_finish(pair):
    asked = [
        Question(prompt, {"max_tokens": 1 + (7 * place) % 20}, tag=place)
        for place, prompt in enumerate(prompts(20))
    ]
    found = list(pair.answers(asked, batch_size=4, in_order=False))
    places = [one.tag for one in found]
    assert sorted(places) == list(range(20))
    assert places != sorted(places)
    for one in found:
        alone = pair.generate(one.prompt, max_tokens=1 + (7 * one.tag) % 20).finish()
        assert one.tokens == alone.tokens


def test_nothing_is_read_before_it_is_asked_for(pair):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield "the cat"

    answers = pair.answers(endless(), batch_size=2, **OPTIONS)
    assert read == []
    assert len(list(islice(answers, 40))) == 40
    assert len(read) <= 40 + 4 * answering.WINDOW * answering.WINDOW
    answers.close()


def test_what_cannot_be_answered(pair):
    asked = [
        "the cat",
        "",
        Question("sat", {"max_tokens": 0}),
        Question("sat", {"sampling": Sampling(suppress_tokens=(10**7,))}),
        Question("x", error=PromptError("known before"), tag=7),
        None,
        "a\0b",
        [{"role": "user", "content": "no template"}],
        "sat on",
    ]
    found = list(pair.answers(asked, batch_size=3, **OPTIONS))
    assert [bool(one.error) for one in found] == [False, *[True] * 7, False]
    assert [one.finish_reason == "error" for one in found[1:-1]] == [True] * 7
    assert "max-tokens" in str(found[2].error)
    assert "no token 10000000" in str(found[3].error)
    assert (str(found[4].error), found[4].tag) == ("known before", 7)
    for one in (found[0], found[-1]):
        assert one.text == pair.generate(one.prompt, **OPTIONS).finish().text


@pytest.mark.parametrize("size", [0, -1])
def test_options_that_concern_all(pair, size):
    with pytest.raises(InputError, match="batch-size"):
        list(pair.answers([], batch_size=size))
    with pytest.raises(InputError, match="max-tokens"):
        list(pair.answers(["the cat"], max_tokens=0))
    with pytest.raises(InputError, match="no token"):
        list(pair.answers(["a"], sampling=Sampling(suppress_tokens=(10**7,))))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("in_order", [True, False])
def test_another_generation_begins(pair, size, in_order):
    """It is what it would have been, and the answers say that they are over."""
    asked = prompts(20)
    expected = pair.generate(asked[3], max_tokens=20).finish().text
    answers = pair.answers(asked, batch_size=size, in_order=in_order, max_tokens=20)
    next(answers)
    other = pair.generate(asked[3], max_tokens=20)
    pieces = iter(other)
    next(pieces)
    with pytest.raises(RuntimeError, match="another generation"):
        list(answers)
    assert other.finish().text == expected


def test_what_the_prompts_raise(pair):
    def failing():
        yield "the cat"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(pair.answers(failing(), **OPTIONS))
    assert pair.generate("the cat", **OPTIONS).finish().tokens


def test_a_source_that_has_nothing_yet(pair):
    """What is there is answered meanwhile; nobody waits but for the next one."""
    script = iter(["the cat", None, None, "sat on", None, "a b c"])
    waited = []

    def source(wait):
        item = next(script)
        waited.append(wait)
        if item is None and wait:
            item = next(each for each in script if each)
        return None if item is None else Question(item)

    answers = pair.answers(source, batch_size=2, **OPTIONS)
    assert next(answers).prompt == "the cat"
    assert [one.prompt for one in answers] == ["sat on", "a b c"]
    assert waited[0]


def test_batch_size_by_the_memory(pair, monkeypatch):
    """Powers of two, and one row where there is next to nothing."""
    monkeypatch.setattr("system.memory.free", lambda: None)
    assert pair.batch_size(10, 10, 5) == 32
    seen = []
    for free in (10**3, 10**6, 10**7, 10**9):
        monkeypatch.setattr("system.memory.free", lambda free=free: free)
        seen.append(pair.batch_size(100, 256, 5))
    assert seen[0] == 1
    assert seen[-1] == 32
    assert seen == sorted(seen)
    assert len(set(seen)) > 2

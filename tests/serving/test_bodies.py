"""What a body may say: all else is refused by its name."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from console.arguments import parse_arguments
from serving import bodies
from serving.bodies import RefusedError, read
from speculation.beams import Beams
from speculation.sampling import Sampling


def asked(chat=False, **body):
    first = {"messages": [{"role": "user", "content": "hi"}]} if chat else {}
    first = first or {"prompt": "hi"}
    return read(json.dumps({**first, **body}).encode(), chat)


def refused(chat=False, **body):
    with pytest.raises(RefusedError) as caught:
        asked(chat, **body)
    assert caught.value.status == 400
    value = caught.value.as_dict()["error"]
    assert value["type"] == "invalid_request_error"
    return value["param"], value["message"]


def test_nothing_but_a_prompt():
    it = asked()
    assert (it.prompts, it.given, it.stops, it.count) == (["hi"], {}, (), 1)
    assert not (it.stream or it.usage or it.chat or it.show_drafted)
    assert asked(prompt=["a", "b"], n=3, temperature=1).texts == 6


def test_every_flag_has_a_field():
    """Under the same name, but for what is the server's or the console's."""
    flags = set(vars(parse_arguments([])))
    elsewhere = {
        *(
            "model",
            "draft_model",
            "lookup",
            "unverified",
            "dtype",
            "compile",
        ),  # serve.py's
        *("input", "output", "batch_size", "resume", "interactive", "compare"),
        *("color", "json", "separator", "verbose", "chat", "system", "keep_turns"),
        "num_samples",  # n
        "regular_decode",  # num_draft: 0
        "parallel",  # a server's requests are not lines to share
    }
    assert flags - elsewhere <= set(bodies._Completion.__struct_fields__)


def test_every_option_of_sampling_arrives():
    given_ = {
        "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 10**30,
        "coupling": "shared", "repetition_penalty": 1.5, "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3, "min_new_tokens": 4,
        "suppress_tokens": [5, 6], "forced_bos_token_id": 7,
    }  # fmt: skip
    it = asked(**given_, max_tokens=9)
    assert it.given == {**given_, "max_tokens": 9}
    names = {field.name for field in fields(Sampling)}
    assert names - set(given_) == {"bad_words_ids", "processors"}
    assert asked(bad_words=["x"]).bad_words == ("x",)


def test_every_option_of_a_search_arrives():
    search = {"num_beams": 4, "length_penalty": -2.0, "early_stopping": "never"}
    assert asked(**search).given == search
    assert set(search) == {field.name for field in fields(Beams)}
    for value in (True, False):
        its = asked(num_beams=2, early_stopping=value).given["early_stopping"]
        assert its is value
    # One beam is none, and so are neutral values.
    asked(num_beams=1, length_penalty=1, early_stopping=False, num_return_sequences=1)


def test_the_best_of_a_search():
    """By either name; room is that of the beams."""
    for names in (["n"], ["num_return_sequences"], ["n", "num_return_sequences"]):
        it = asked(num_beams=4, prompt=["a", "b"], **dict.fromkeys(names, 3))
        assert (it.count, it.texts, it.room) == (3, 6, 8)
    assert asked(n=3, temperature=1).room == asked(num_beams=3).room == 3
    # The model's files may bring beams.
    assert asked(num_return_sequences=3, task_defaults=True).count == 3
    assert asked(length_penalty=2, task_defaults=True).given == {"length_penalty": 2.0}


def test_openais_other_names():
    it = asked(True, max_completion_tokens=7)
    assert it.given == {"max_tokens": 7}
    it = asked(stream=True, stream_options={"include_usage": True}, stop="x")
    assert it.stream and it.usage and it.stops == ("x",)
    assert asked(stop=["x", "y"]).stops == ("x", "y")
    assert asked(stop=None, n=None, temperature=None, seed=None).given == {}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    it = asked(True, messages=[{"role": "user", "content": parts}])
    assert it.prompts == [[{"role": "user", "content": "ab"}]]


def test_filters_at_temperature_0_leave_the_best():
    """As many programs send them; where no temperature is named they are refused."""
    options = {"top_p": 0.9, "top_k": 5, "min_p": 0.1}
    assert asked(temperature=0, **options).given == {"temperature": 0.0}
    assert refused(**options)[0] in options


@pytest.mark.parametrize("name", sorted(bodies._IDLE))
def test_what_has_no_bearing_is_passed_over(name):
    assert asked(**{name: {"a": 1}}) == asked()


@pytest.mark.parametrize("name", sorted(bodies._REFUSED))
@pytest.mark.parametrize("value", [2, True, "x", {"x": 1}, [1]])
def test_what_is_not_done_is_refused(name, value):
    param, message = refused(**{name: value})
    assert param == name and message.startswith(f"{name} is not supported here")


@pytest.mark.parametrize("name, neutral", sorted(bodies._REFUSED.items(), key=str))
def test_unless_it_asks_for_nothing(name, neutral):
    for value in neutral:
        assert asked(**{name: value}) == asked()
    assert refused(presence_penalty=False)[0] == "presence_penalty"
    assert refused(logprobs=0)[0] == "logprobs"  # that of the token itself


WRONG = {
    "prompt": [5, None, [], [[1]], {"a": 1}, [5], ["a"] * 1000],
    "n": [0, -1, 1.5, "2", True, 1000, 2],  # 2: greedy texts are the same
    "stop": ["", [""], ["x"] * 100, "x" * 5000, 5, [5], "\0"],
    "temperature": [-1, "hot", -0.5, True],
    "top_p": [0, 1.5, -1],
    "top_k": [-1, 5, 1.5],  # 5: at temperature 0
    "max_tokens": [0, -5, 1.5, "9", 2**40],
    "delta": [-0.1, 1.1, "x"],
    "num_draft": [-1, "auto", 1.5],
    "coupling": ["x", 5],
    "seed": [-1, 1.5, "x"],
    "repetition_penalty": [0, -1],
    "stream": [1, "yes"],
    "stream_options": [{"x": 1}, 5, {"include_usage": True}],  # without stream
    "suppress_tokens": [[-1], ["x"], 5],
    "bad_words": ["x", [5]],
    "model": [5],
    "best_of": [2, "x"],
    "num_beams": [0, -1, 65, 1.5, "2", True],
    "length_penalty": [11, -11, "x", 2],  # 2: without beams
    "early_stopping": ["always", 1, True, "never"],  # likewise the last ones
    "num_return_sequences": [0, -1, 1000, "2", 3],
    "unheard_of": [1],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_name_their_field(name):
    for value in WRONG[name]:
        raw = {name: value}
        if name == "top_p" or (name == "coupling" and value == 5):
            raw["temperature"] = 1
        param, message = refused(**raw)
        assert param == name, (value, param, message)
        assert message and "\n" not in message


@pytest.mark.parametrize("more", [{}, {"task_defaults": True}], ids=str)
@pytest.mark.parametrize(
    "options, name",
    [
        ({"temperature": 1}, "num_beams"),
        ({"delta": 0.5}, "delta"),
        ({"n": 5}, "n"),
        ({"num_return_sequences": 5}, "num_return_sequences"),
        ({"n": 2, "num_return_sequences": 3}, "n"),
        ({"n": 1, "num_return_sequences": 2}, "n"),
        ({"top_p": 0.5}, "top_p"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"best_of": 3}, "best_of"),
    ],
    ids=str,
)
def test_what_does_not_go_with_beams(options, name, more):
    for chat in (False, True):
        if not (chat and name == "best_of"):
            assert refused(chat, num_beams=4, **options, **more)[0] == name


def test_conversations():
    for messages in (
        [],
        [5],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "hi",
    ):
        assert refused(True, messages=messages)[0] == "messages"
    assert refused(True, prompt="x")[0] == "prompt"
    assert refused(messages=[])[0] == "messages"


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b"[",
            b"[]",
            b"5",
            b"null",
            b'"x"',
            b"\xff",
            b'{"prompt": NaN}',
            b"{}{}",
        ),
        *(b"[" * 100_000, b'{"prompt": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}"),
        *(b'{"prompt": "\\ud800"}', b'{"prompt": 1e999}', b'{"temperature": 1e999}'),
        b'{"prompt": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_001,
        b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_none(raw):
    for chat in (False, True):
        with pytest.raises(RefusedError) as caught:
            read(raw, chat)
        assert caught.value.status == 400
        assert len(json.dumps(caught.value.as_dict())) < 2000


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda its: st.lists(its, max_size=3) | st.dictionaries(st.text(), its, max_size=3),
    max_leaves=6,
)
names = st.text(max_size=5) | st.sampled_from(
    [
        *bodies._Chat.__struct_fields__,
        *bodies._Completion.__struct_fields__,
        *bodies._REFUSED,
        *bodies._IDLE,
    ]
)


@given(st.dictionaries(names, values, max_size=4) | values, st.booleans())
def test_any_json_is_read_or_refused(value, chat):
    if isinstance(value, dict) and not chat:
        value = {"prompt": "x", **value}
    try:
        it = read(json.dumps(value).encode("utf-8", "surrogatepass"), chat)
    except RefusedError as error:
        assert error.status == 400
        json.dumps(error.as_dict())
    else:
        assert it.texts >= 1

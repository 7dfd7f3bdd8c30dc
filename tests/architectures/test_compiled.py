"""Compiled passes against those that are not."""

import weakref

import mlx.core as mx
import numpy as np
import pytest
from test_model import FAMILIES, TOLERANCE, prompt_of

from architectures import t5, t5_session
from architectures.loading import Loading
from architectures.t5_session import T5Session, source_room
from decoder import generate
from pair import Pair
from speculation.drafting import ModelDrafter

#: The layouts, and how many shapes the walk below has in each.
LAYOUTS = FAMILIES | {
    "a bias for each layer": {"seed": 5, "kind": "umt5", "num_layers": 3},
    "mt5": {"seed": 4, "kind": "mt5", "feed_forward_proj": "gated-gelu"},
}


@pytest.fixture(autouse=True)
def compiling():
    """Fused kernels are made by g++, where there is one."""
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture(params=LAYOUTS, ids=lambda name: name.replace(" ", "-"))
def sessions(request, make):
    """Of one model, plain and compiled."""
    folder = make(**LAYOUTS[request.param])[2]
    banned = [5, 9]
    return [
        t5.session(t5.load(folder, Loading(compiled=compiled)), 90, banned, compiled)
        for compiled in (False, True)
    ]


def same(sessions, tokens):
    """The logits after tokens, which are both sessions'."""
    plain, compiled = (np.array(each.extend(mx.array(tokens))) for each in sessions)
    assert plain.shape == compiled.shape
    np.testing.assert_array_equal(np.isneginf(plain), np.isneginf(compiled))
    finite = np.isfinite(plain)
    error = np.abs(plain[finite] - compiled[finite]).max()
    error /= np.abs(plain[finite]).max()
    assert error < TOLERANCE
    return plain


def each(sessions, name, *arguments):
    for session in sessions:
        getattr(session, name)(*arguments)


def test_every_kind_of_pass(sessions):
    """Rows that are together and apart, rewinds, caches that grow, rows that come and
    go, sources of other lengths."""
    prompts = [prompt_of(9), prompt_of(4, 1), prompt_of(30, 2)]
    for prompt in ([prompts[1]], prompts):
        each(sessions, "start", prompt)
        rows = len(prompt)
        same(sessions, [prompt_of(1, row) for row in range(rows)])
        same(sessions, [prompt_of(5, row) for row in range(rows)])
        each(sessions, "rewind", [2 + row for row in range(rows)])
        same(sessions, [prompt_of(5, 7 + row) for row in range(rows)])
        same(sessions, [prompt_of(20, row) for row in range(rows)])
        each(sessions, "rewind", [3] * rows)
        same(sessions, [prompt_of(1, row) for row in range(rows)])
    each(sessions, "take", [2, 0], 1)
    each(sessions, "rewind", [2, 4, 0])
    same(sessions, [prompt_of(2, row) for row in range(3)])
    for session in sessions:
        preparing = session.prepare([prompt_of(17, 4)])
        with pytest.raises(StopIteration) as done:
            while True:
                next(preparing)
        session.put([1], done.value.value)
    same(sessions, [prompt_of(3, row) for row in range(3)])
    each(sessions, "wipe", [0])
    same(sessions, [prompt_of(3, row) for row in range(3)])


def texts(target, draft, num_draft):
    prompts = [prompt_of(9), prompt_of(4, 1), prompt_of(14, 2)]
    found = [[] for _ in prompts]
    drafter = ModelDrafter(draft)
    for commit in generate(
        target,
        drafter,
        prompts,
        num_draft=num_draft,
        eos_tokens=frozenset([1]),
        max_tokens=30,
    ):
        found[commit.id] += commit.tokens
    return found


@pytest.mark.parametrize("num_draft", [0, 3])
def test_the_same_texts(make, num_draft):
    """Whichever of the two models is compiled."""
    fields = {"seed": 3, "untied": True, "feed_forward_proj": "gated-gelu"}
    folders = [make(**fields, noise=noise)[2] for noise in (0.0, 0.05)]
    plain, compiled = (
        [T5Session(t5.load(folder), compiled=way) for folder in folders]
        for way in (False, True)
    )
    mx.enable_compile()
    expected = texts(*plain, num_draft)
    assert texts(*compiled, num_draft) == expected
    assert texts(plain[0], compiled[1], num_draft) == expected
    assert texts(compiled[0], plain[1], num_draft) == expected


def test_few_shapes_are_traced(make, monkeypatch):
    """One for each number of tokens, each capacity, and a few lengths of a source."""
    traced = []
    trace = t5_session._Traced.__call__

    def watched(self, tokens, places, biases, padding, arrays):
        traced.append((tokens.shape, arrays[0][0].shape[2], arrays[0][2].shape[2]))
        return trace(self, tokens, places, biases, padding, arrays)

    monkeypatch.setattr(t5_session._Traced, "__call__", watched)
    session = T5Session(t5.load(make()[2], Loading(compiled=True)), compiled=True)
    for length in range(2, 40):
        session.start([prompt_of(length)])
        for size in (1, 3, 1, 3, 20):
            mx.eval(session.extend(mx.array([prompt_of(size)])))
    rooms = {source_room(length) for length in range(2, 40)}
    assert {room for _, _, room in traced} == rooms
    assert len(traced) == len(set(traced)) == 3 * len(rooms)


def test_traces_are_forgotten_when_there_are_many(make, monkeypatch):
    """And made again: a text is the same."""
    monkeypatch.setattr(t5_session, "MOST_TRACES", 2)
    folder = make()[2]
    sessions = [
        T5Session(t5.load(folder, Loading(compiled=way)), compiled=way)
        for way in (False, True)
    ]
    each(sessions, "start", [prompt_of(9)])
    made = [sessions[1]._compiled]
    for size in (1, 2, 3, 1, 2, 4, 1):
        same(sessions, [prompt_of(size)])
        made.append(sessions[1]._compiled)
    assert len({id(each) for each in made}) == 3
    assert len(sessions[1]._shapes) <= 2


def test_nothing_is_held_for_good(make):
    """Weights go when the session does, traces or not."""
    model = t5.load(make()[2], Loading(compiled=True))
    session = T5Session(model, compiled=True)
    session.start([prompt_of(9)])
    mx.eval(session.extend(mx.array([[4]])))
    gone = weakref.ref(model)
    del model, session  # at once
    assert gone() is None


def test_a_cache_is_not_copied(make):
    """Compiled or not, the new keys are written into the old ones' buffer."""
    for compiled in (False, True):
        model = t5.load(make()[2], Loading(compiled=compiled))
        session = T5Session(model, compiled=compiled)
        session.start([prompt_of(9)])
        for _ in range(2):
            mx.eval(session.extend(mx.array([[4]])))
        before = np.array(session._caches[0].keys, copy=False).ctypes.data
        mx.eval(session.extend(mx.array([[4, 5]])))
        assert np.array(session._caches[0].keys, copy=False).ctypes.data == before


def test_flags(make, call):
    """On and off; what is no T5 cannot be compiled."""
    folder = make()[2]
    flags = ["--model", str(folder), "--draft-model", str(folder), "--prompt", "a cat"]
    out = {call(*flags, "--compile", way)[1] for way in ("on", "off", "auto")}
    assert len(out) == 1 and out != {""}
    pair = Pair.load(str(folder), compiled=True)
    assert pair.target._compiled and pair.how.compiled

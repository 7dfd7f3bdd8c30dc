"""Which graphs 200 rounds are made of: few, by the shapes of their passes.

Buffers are used again by their size, kernels are chosen by it, and whoever compiles a
pass pays for each shape of it.
"""

import pytest
from counting import LAYOUTS, NEVER, PROMPTS, cpu

import decoder
from architectures import t5
from architectures.slim import slim
from architectures.t5_session import T5Session
from decoder import Engine
from speculation import proposing
from speculation.drafting import ModelDrafter
from speculation.policy import Auto
from speculation.requests import Request

ROUNDS = 200
#: Drafts that a policy chooses among.
SIZES = {*range(1, 9), 10, 12, 16}


@pytest.fixture(autouse=True)
def device():
    with cpu():
        yield


class Clock:
    """Seconds that go by with what is computed, and not otherwise."""

    def __init__(self):
        self.seconds = 0.0

    def perf_counter(self):
        return self.seconds


class Recorded(T5Session):
    """A session that notes the shapes of its passes: (B, T, C, S)."""

    def __init__(self, model, clock, seconds):
        """``seconds``: that a pass takes, and for each position beside the first."""
        super().__init__(model)
        self.shapes = set()
        self._clock, self._seconds = clock, seconds

    def extend(self, tokens):
        logits = super().extend(tokens)
        source = self._caches[0].source_keys.shape[2]
        self.shapes.add((*tokens.shape, self._capacity, source))
        first, more = self._seconds
        self._clock.seconds += first + more * (tokens.shape[1] - 1)
        return logits


def shapes_of(make, monkeypatch, policy, batch, noise, step):
    """Those of the target and of the draft.

    Args:
        step: seconds of a step of the draft, where a pass of the target takes one.
    """
    clock = Clock()
    for module in (decoder, proposing):
        monkeypatch.setattr(module, "time", clock)
    sessions = []
    for fields, seconds in (({}, (1.0, 0.1)), ({"noise": noise}, (step, step / 10))):
        model = t5.load(make(**LAYOUTS["t5 1.0"] | fields)[2])
        slim(model)
        sessions.append(Recorded(model, clock, seconds))
    target, draft = sessions
    engine = Engine(target, ModelDrafter(draft), num_draft=policy, rows=batch)
    for place, prompt in enumerate(PROMPTS[:batch]):
        engine.admit(Request(prompt, NEVER, 4000, stream=(place,)))
    for _ in range(ROUNDS):
        engine.step()
    assert len(engine._active) == batch
    return target.shapes, draft.shapes


@pytest.mark.parametrize("batch, noise", [(1, 0.05), (4, 0.2)])
def test_shapes_of_a_number(make, monkeypatch, batch, noise):
    """A pass as long as what stood of the draft, a room for each length: a new graph
    every round."""
    target, draft = shapes_of(make, monkeypatch, 4, batch, noise, 0.1)
    assert {shape[1] for shape in target} == {5}
    # A step, and catching up after a draft that stood.
    assert {shape[1] for shape in draft} == {1, 2}
    assert_few(target | draft, batch)


@pytest.mark.parametrize("batch, noise, step", [(1, 0.02, 0.1), (4, 0.2, 0.4)])
def test_shapes_of_auto(make, monkeypatch, batch, noise, step):
    """The same; and as many lengths of a draft as there are numbers."""
    target, draft = shapes_of(make, monkeypatch, Auto(), batch, noise, step)
    assert len({shape[1] for shape in target}) > 2, "nothing varied"
    assert {shape[1] for shape in target} <= {1, *(1 + size for size in SIZES)}
    # What it has to catch up with after plain rounds, and how often, is any number.
    assert len({shape[1] for shape in draft}) <= 8
    assert_few(target | draft, batch)


def assert_few(shapes, batch):
    """One batch, one source; and rooms that double."""
    assert {shape[0] for shape in shapes} == {batch}
    assert {shape[2] for shape in shapes} <= {16 << times for times in range(9)}
    assert len({shape[3] for shape in shapes}) == 1

"""How often the host waits for the device: once a round, for its verdict.

A wait takes as long as what is still under way, and then the device has nothing to do
until the host has built what comes next.
"""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY
from counting import (
    LAYOUTS,
    NEVER,
    PROMPTS,
    begin,
    cpu,
    is_evaluated,
    load,
    sequences,
    unevaluated,
)
from scripted import Cycle

from decoder import Engine
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.requests import Request
from speculation.rounds import launch
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.sampling import Sampling

#: What waits for an array, as methods of it and as functions.
METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
METHODS += ("__repr__", "__format__")
FUNCTIONS = ((mx, "eval"), (np, "array"), (np, "asarray"), (np, "ascontiguousarray"))


@pytest.fixture(autouse=True)
def device():
    with cpu():
        yield


class Waits(Counter):
    """Counts by name what waits for the device: reads of arrays that nobody has waited
    for yet. Those that were evaluated already are none, as a draft's tokens after the
    verdict on them."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self._inside = False
        unevaluated(patch)
        for name in METHODS:
            self._watch(patch, mx.array, name)
        for owner, name in FUNCTIONS:
            self._watch(patch, owner, name)
        self._watch(patch, mx, "synchronize", always=True)

    def _watch(self, patch, owner, name, always=False):
        original = getattr(owner, name)

        def watched(*arguments, **named):
            if not self._inside:
                self._inside = True
                try:
                    if always or not is_evaluated([*arguments]):
                        self[f"{owner.__name__}.{name}"] += 1
                finally:
                    self._inside = False
            return original(*arguments, **named)

        patch.setattr(owner, name, watched)

    def of(self, work) -> dict[str, int]:
        """Those of a piece of work."""
        self.clear()
        work()
        return dict(self)


def test_every_kind_of_wait_is_seen(monkeypatch):
    waits = Waits(monkeypatch)
    one = mx.array([1.0])
    mx.eval(one)
    for what, work in {
        "array.item": lambda: (one + 1).item(),
        "array.tolist": lambda: (one + 1).tolist(),
        "array.__bool__": lambda: bool(one + 1),
        "array.__int__": lambda: int(one + 1),
        "array.__float__": lambda: float(one + 1),
        "array.__repr__": lambda: repr(one + 1),
        "numpy.array": lambda: np.array(one + 1),
        "numpy.asarray": lambda: np.asarray(one + 1),
        "mlx.core.eval": lambda: mx.eval([{"of a tree": one + 1}]),
        "mlx.core.synchronize": mx.synchronize,
    }.items():
        assert waits.of(work) == {what: 1}
    assert waits.of(lambda: (np.array(one), one.tolist(), mx.eval(one))) == {}


#: What drafts, how many tokens, and how they are chosen.
WAYS = {
    "plain": (None, 0, Sampling()),
    "plain, sampled": (None, 0, Sampling(temperature=1.0)),
    "drafted": ("model", 4, Sampling()),
    "looked up": ("lookup", 4, Sampling()),
    "both": ("both", 4, Sampling()),
    "residual": ("model", 4, Sampling(temperature=1.0)),
    "shared": ("model", 4, Sampling(temperature=1.0, seed=7)),
    "ruled": ("model", 4, Sampling(no_repeat_ngram_size=2, repetition_penalty=1.2)),
}


@pytest.fixture
def pair(make, monkeypatch):
    """A function: target and draft, and whether on a CPU or as if on a GPU."""

    def build(form, capacity):
        folders = make(**LAYOUTS["t5 1.0"]), make(**LAYOUTS["t5 1.0"], noise=0.05)
        made = [load(folder, "slim", monkeypatch) for *_, folder in folders]
        for session in made:
            session.first_capacity = capacity
        if form == "gpu":
            monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        return made

    return build


def engine_of(pair, form, way, batch, capacity=64, policy=None, rows=None):
    """An engine with a batch of texts, none of them begun."""
    drafts, num_draft, sampling = WAYS[way]
    target, draft = pair(form, capacity)
    model = ModelDrafter(draft) if drafts in ("model", "both") else None
    lookup = Lookup() if drafts in ("lookup", "both") else None
    engine = Engine(
        target,
        model or lookup,
        num_draft=num_draft if policy is None else policy,
        lookup=lookup if model else None,
        rows=rows or batch,
    )
    for place, prompt in enumerate(PROMPTS[:batch]):
        # Something to look up, and texts that end at different times.
        prompt = [*prompt[:-1], *prompt]
        engine.admit(Request(prompt, NEVER, 28 - place, 0.0, sampling, (place,)))
    return engine


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", ["cpu", "gpu"])
@pytest.mark.parametrize("way", WAYS)
def test_a_round_waits_once(pair, monkeypatch, way, form, batch):
    """A read of a draft's token, of logits, of how many were accepted. Rounds that are
    built ahead, as plain ones are, wait no more than others."""
    engine = engine_of(pair, form, way, batch)
    waits = Waits(monkeypatch)
    engine.step()  # which encodes
    rounds = 0
    while engine.busy and all(engine._rows):  # a smaller batch is another's matter
        assert waits.of(engine.step) == {"numpy.array": 1}
        rounds += 1
    assert rounds >= 4


def test_what_else_waits(pair, monkeypatch):
    """Where a round has other waits, they are these: for prompts that are encoded and
    rows that move, for a draft that is far behind, for larger caches' biases."""
    verdict, caches, biases, follow = ({"numpy.array": 1}, *[{"mlx.core.eval": 1}] * 3)

    def steps(count, *expected):
        before = waits.of(engine.step)
        assert before == dict(sum(map(Counter, expected), Counter()))
        for _ in range(count - 1):
            assert waits.of(engine.step) == verdict

    # The draft is given the prompt when it is first asked: six tokens behind.
    engine = engine_of(pair, "cpu", "drafted", 1, 32, Cycle(0, 0, 0, 0, 0, 0, 4))
    waits = Waits(monkeypatch)
    steps(6, caches, biases, verdict)
    steps(1, caches, biases, follow, verdict)
    steps(6, verdict)
    steps(1, follow, verdict)

    # A second text comes: both models' batches get a row, and that its prompt.
    engine = engine_of(pair, "cpu", "drafted", 1, rows=2)
    steps(5, *[caches, biases] * 2, verdict)
    engine.admit(Request(PROMPTS[1], NEVER, 20))
    steps(4, *[caches] * 4, verdict)
    engine.cancel(0)
    steps(2, *[caches] * 2, verdict)


def test_growth_waits_for_the_biases(pair, monkeypatch):
    """The position biases of a capacity are made once; so are those of the next."""
    engine = engine_of(pair, "cpu", "drafted", 1, capacity=16)
    waits = Waits(monkeypatch)
    engine.step()
    sessions, grown = (engine._target, engine._drafts._drafter.session), 0
    while engine.busy:
        before = [session._capacity for session in sessions]
        done = waits.of(engine.step)
        after = [session._capacity for session in sessions]
        more = sum(old < new for old, new in zip(before, after, strict=True))
        assert done == {"numpy.array": 1} | ({"mlx.core.eval": more} if more else {})
        grown += more
    assert grown >= 2


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][0] == "model"])
def test_no_number_is_looked_at_before_the_verdict(make, monkeypatch, way, batch):
    """The same, whatever the way to read: MLX refuses to trace what reads a number that
    depends on the models, from the draft's first step to the verdict."""
    unevaluated(monkeypatch)
    folders = make(**LAYOUTS["t5 1.0"]), make(**LAYOUTS["t5 1.0"], noise=0.05)
    target, draft = (load(folder, "cpu", monkeypatch) for *_, folder in folders)
    drafter = ModelDrafter(draft)
    begin(target, batch)
    drafter.start(PROMPTS[:batch])
    drafter.follow(sequences(batch))
    rules = Rules(VOCABULARY, WAYS[way][2])
    rows = [RowSampler(rules, [0, 20], PROMPTS[row], 0, (row,)) for row in range(batch)]
    sampler = RoundSampler(rows, 4)

    def round_of(target_rows, draft_rows):
        target.model.embedding.weight = target_rows
        draft.model.embedding.weight = draft_rows
        proposed = drafter.propose(sequences(batch), 4, sampler)
        return launch(target, sampler, proposed).report

    weights = target.model.embedding.weight, draft.model.embedding.weight
    mx.enable_compile()
    try:
        mx.compile(round_of)(*weights)
    finally:
        mx.disable_compile()

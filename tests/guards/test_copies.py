"""What a round copies: of a cache nothing, unless its capacity grows.

A cache is written in place as long as nobody else holds it. Who does, has each write
copy the whole, in every layer, and no result shows it. What shows it is memory: a copy
lies elsewhere, and at first beside its original. The caches here are far larger than
all else in a round.
"""

import mlx.core as mx
import numpy as np
import pytest
from counting import NEVER, PROMPTS, cpu
from scripted import Cycle, Scripted

from architectures import t5
from architectures.slim import slim
from architectures.t5_session import T5Session
from decoder import Engine
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.requests import Request
from speculation.sampling import Sampling

CAPACITY = 512
LARGE = {"num_heads": 2, "d_kv": 128}


@pytest.fixture(autouse=True)
def device():
    with cpu():
        yield


@pytest.fixture
def build(make):
    """A function: a session whose caches are large."""

    def made(**fields):
        model = t5.load(make(**LARGE | fields)[2])
        slim(model)
        session = T5Session(model)
        session.first_capacity = CAPACITY
        return session

    return made


def copied(work, session):
    """How much more memory than before a piece of work needs, in caches of keys."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return (mx.get_peak_memory() - before) / session._caches[0].keys.nbytes


def places(*sessions):
    """Where in memory the sessions' caches of keys and values lie."""
    return [
        np.asarray(array).__array_interface__["data"][0]
        for session in sessions
        for cache in session._caches
        for array in (cache.keys, cache.values)
    ]


#: Drafters by how much of theirs stands.
DRAFTERS = {
    "none": lambda build: None,
    "model": lambda build: ModelDrafter(build(noise=0.02)),
    "the target itself": lambda build: ModelDrafter(build()),
    "never right": lambda build: Scripted(lambda sequence, n: [-1] * n),
    "lookup": lambda build: Lookup(1),
}
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0)}


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", DRAFTERS)
def test_no_round_copies_a_cache(build, name, batch, how):
    """Somebody who holds on to a cache: of a round that was built ahead, of the one
    before, of a view; and a write that is not in place, of rows at one length or at
    different ones."""
    target, drafter = build(), DRAFTERS[name](build)
    policy = Cycle(1, 4, 2, 0, 3) if drafter else 0
    engine = Engine(target, drafter, num_draft=policy, rows=batch)
    for place, prompt in enumerate(PROMPTS[:batch]):
        sampling = SAMPLINGS[how]
        engine.admit(Request(prompt, NEVER, 40, 0.0, sampling, (place,)))
    for _ in range(5):  # the first writes are to what all layers share: see start()
        engine.step()
    models = [target]
    if isinstance(drafter, ModelDrafter):
        models.append(drafter.session)
    assert_no_copies(engine, models, 0.6)


def assert_no_copies(engine, models, most):
    """Of all rounds to come: that the models' caches stay where they are, and that no
    round needs as much memory as ``most`` of the target's keys of a layer."""
    rounds, lie = 0, places(*models)
    while engine.busy and all(engine._rows):
        more = copied(engine.step, models[0])
        assert more < most, f"round {rounds}: {more:.2f} caches more than before"
        now = places(*models)
        moved = sum(old != new for old, new in zip(lie, now, strict=True))
        assert not moved, f"round {rounds}: {moved} of {len(now)} caches are copies"
        rounds += 1
    assert rounds >= 5


@pytest.mark.parametrize("lengths", [[300], [300, 200]], ids=["one", "ragged"])
def test_only_growth_copies(build, lengths):
    """More positions than there is room for: a copy then, and none after it."""
    session = build()
    session.start(PROMPTS[: len(lengths)])

    def extend(size):
        tokens = mx.zeros((len(lengths), size), mx.int32)
        return copied(lambda: mx.eval(session.extend(tokens)), session)

    extend(CAPACITY - 2)
    assert extend(2) < 0.6
    session.rewind(lengths)
    assert extend(5) < 0.6
    session.rewind([length - 3 for length in lengths])
    assert extend(1) < 0.6
    extend(CAPACITY - max(session.lengths))
    assert extend(1) > 0.6, "what is seen here as a copy is none"
    assert session._capacity == 2 * CAPACITY
    assert extend(1) < 0.6

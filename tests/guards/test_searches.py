"""The same guards for beam searches: a wait per round, no copies of caches, and nothing
moved when beams are chosen."""

import pytest
from counting import LAYOUTS, NEVER, PROMPTS, cpu, load
from scripted import Cycle
from test_copies import assert_no_copies, build  # noqa: F401
from test_waits import Waits

from architectures import t5
from architectures.t5_session import T5Session
from decoder import Engine
from speculation.beams import Beams
from speculation.drafting import ModelDrafter
from speculation.requests import Request
from speculation.sampling import Sampling

RULES = {
    "none": Sampling(),
    "some": Sampling(no_repeat_ngram_size=2, repetition_penalty=1.2),
}


@pytest.fixture(autouse=True)
def device():
    with cpu():
        yield


def engine_of(target, draft, num_draft, batch, sampling, max_tokens=24):
    engine = Engine(
        target,
        ModelDrafter(draft) if draft else None,
        num_draft=num_draft,
        rows=batch,
    )
    for prompt in PROMPTS[:batch]:
        beams = Beams(4, early_stopping="never")
        engine.admit(Request(prompt, NEVER, max_tokens, 0.0, sampling, beams=beams))
    return engine


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("num_draft", [0, 3])
def test_a_round_waits_once(make, monkeypatch, num_draft, rules, batch):
    """Choosing beams on the host, step by step, would be a wait for each."""
    folders = make(**LAYOUTS["t5 1.0"]), make(**LAYOUTS["t5 1.0"], noise=0.05)
    target, draft = (load(folder, "slim", monkeypatch) for *_, folder in folders)
    for session in (target, draft):
        session.first_capacity = 256
    draft = draft if num_draft else None
    engine = engine_of(target, draft, num_draft, batch, RULES[rules])
    waits = Waits(monkeypatch)
    engine.step()  # which encodes
    rounds = 0
    while engine.busy and all(engine._rows):
        assert waits.of(engine.step) == {"mlx.core.eval": 1}
        rounds += 1
    assert rounds >= 4


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("noise", [None, 0.0, 0.05])
def test_no_round_copies_a_cache(build, noise, batch):  # noqa: F811
    """Beams that change places, whatever stands of the draft, leave all keys and values
    where they are."""
    target, draft = build(), None if noise is None else build(noise=noise)
    policy = Cycle(1, 2, 0) if draft else 0
    engine = engine_of(target, draft, policy, batch, Sampling(), 40)
    for _ in range(5):
        engine.step()
    models = [session for session in (target, draft) if session]
    assert_no_copies(engine, models, 1.9)  # masks are larger than those of a text


def test_slots_are_used_again(make):
    """What no beam goes through makes room: the cache is as large as the tree of what
    runs, not as all that was ever looked at."""

    class Watched(T5Session):
        slots = 0

        def extend_tree(self, tokens, slots, back):
            self.slots = max(self.slots, int(slots.max()) + 1)
            return super().extend_tree(tokens, slots, back)

    target = Watched(t5.load(make()[2]))
    draft = ModelDrafter(T5Session(t5.load(make(noise=0.05)[2])))
    engine = Engine(target, draft, num_draft=3)
    beams = Beams(4, early_stopping="never")
    engine.admit(Request(PROMPTS[0], NEVER, 100, beams=beams))
    needed = 0
    while engine.busy:
        engine.step()
        for row in engine._active:
            line = {node for leaf in row.search.running for node in leaf.line()}
            needed = max(needed, len(line))
    # And a round's own: its four beams, three levels of eight, and one to spare.
    assert needed <= 4 * 100 and target.slots <= needed + 4 + 3 * 8 + 1

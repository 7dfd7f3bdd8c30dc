"""Whoever drafts, whenever: the draft model is given a prompt when it is first asked,
lookup goes before it, and a policy changes its mind from round to round."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Cycle, Scripted, Whims
from test_decoder import NEVER, check, decode
from test_engine import EAGER, PROMPTS, RULES, build_families, run
from tiny_causal import tiny_causal

from architectures import causal_model
from architectures.causal_session import CausalSession
from decoder import Engine
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.policy import Auto, Fixed
from speculation.requests import Request, Stats
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.session import finish
from system.errors import NoRoomError, PromptError, TooLongError


@pytest.fixture(scope="module")
def families(tiny, make, tmp_path_factory):
    return build_families(tiny, make, tmp_path_factory)


def drafted(stats):
    """Tokens of the model's that were judged, and those that stood."""
    return stats.tested - stats.found, stats.accepted - stats.found_accepted


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@settings(max_examples=8)
@given(data=st.data())
def test_a_draft_that_enters_late_has_all_it_needs(families, kind, data):
    """One that is its target is always right, however late it was given a prompt, and
    whatever became of its rows: a hole in a cache would show as a rejection."""
    family = families[kind]
    chosen = data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=10))
    requests = [
        Request(PROMPTS[place], NEVER, data.draw(st.integers(1, 30)))
        for place in chosen
    ]
    admit_at = [data.draw(st.integers(0, 12)) for _ in requests]
    cancelled = st.lists(st.integers(0, 9), max_size=2)
    cancel_at = data.draw(st.dictionaries(st.integers(1, 20), cancelled, max_size=3))
    engine = Engine(
        family.target,
        ModelDrafter(family.alone),
        num_draft=Whims(data.draw(st.integers(0, 99))),
        lookup=data.draw(st.sampled_from([None, Lookup(EAGER)])),
        rows=data.draw(st.integers(1, 8)),
    )
    for _ in range(2):  # and again, on the same caches
        tokens, last = run(engine, requests, admit_at, cancel_at)
        for place, commit in last.items():
            judged, stood = drafted(commit.stats)
            assert judged == stood
            if commit.finish_reason:
                check(commit.stats, tokens[place])


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("least", [EAGER, 3])
def test_neighbours_do_not_show_where_lookup_goes_first(families, kind, least):
    """At one number of draft tokens: texts and figures are those of every batch."""
    family = families[kind]
    requests = [
        Request(
            PROMPTS[place % len(PROMPTS)],
            frozenset({3, 1}),
            10 + place % 7,
            sampling=RULES[place % len(RULES)],
            stream=(place, 0),
        )
        for place in range(18)
    ]
    seen = []
    for rows in (1, 4, 16):
        engine = Engine(
            family.target,
            family.drafters["good"],
            num_draft=3,
            lookup=Lookup(least),
            rows=rows,
        )
        tokens, last = run(engine, requests)
        stats = {place: commit.stats for place, commit in last.items()}
        seen.append(
            [
                (tokens[place], s.rounds, s.drafted, s.accepted, s.found, s.sizes)
                for place, s in sorted(stats.items())
            ]
        )
        for place, its in stats.items():
            check(its, tokens[place])
    assert seen[0] == seen[1] == seen[2]
    if least == EAGER:  # both kinds of draft occur
        assert sum(its.found for its in stats.values()) > 10
    assert sum(drafted(its)[1] for its in stats.values()) > 10


class Brief(Scripted):
    """A drafter that has come to an end in all rows after three tokens."""

    def __init__(self):
        super().__init__(lambda sequence, n: [1] * n)

    def propose(self, sequences, num_draft, sampler):
        return super().propose(sequences, min(num_draft, 3), sampler)


def test_what_was_found_is_judged_whatever_the_model_drafts(families):
    """That it would come to an end says nothing of a row that was looked up."""
    words = list(range(10, 20))
    requests = [
        Request([*words, 0], frozenset({1}), 30, delta=1.0),  # after 0 it begins again
        Request([40, 41], frozenset({1}), 30),
        Request([*words, 0, *words], frozenset({1}), 30, delta=1.0),
    ]
    seen = []
    for rows in (1, 4):
        engine = Engine(
            families["llama"].target,
            Brief(),
            num_draft=8,
            lookup=Lookup(EAGER),
            rows=rows,
        )
        tokens, last = run(engine, requests)
        seen.append([(tokens[p], last[p].stats.accepted) for p in range(3)])
    assert seen[0] == seen[1]
    assert seen[0][2][1] > 8


class Narrow(ModelDrafter):
    """A draft that there is no room for where a prompt has more than 8 tokens."""

    def __init__(self, session, error):
        super().__init__(session)
        self.error = error
        self.refused = 0

    def start(self, prompts):
        self._require(prompts)
        super().start(prompts)

    def prepare(self, prompts):
        yield
        self._require(prompts)
        return (yield from super().prepare(prompts))

    def _require(self, prompts):
        if max(map(len, prompts)) > 8:
            self.refused += 1
            raise self.error("there is no room")


@pytest.mark.parametrize(
    "kind, error",
    [("t5", NoRoomError), ("gpt2", TooLongError), ("llama", PromptError)],
)
def test_a_draft_without_room_leaves_its_rows_to_the_target(families, kind, error):
    """Nobody fails for it, and its neighbours have their drafts."""
    family = families[kind]
    requests = [Request(prompt, NEVER, 9) for prompt in PROMPTS]
    alone = [
        decode(family.alone, None, [prompt], max_tokens=9)[0][0] for prompt in PROMPTS
    ]
    for policy in (Fixed(4), Auto(4), Whims(0, 4)):
        for admit_at in (None, range(8)):
            drafter = Narrow(family.drafters["good"].session, error)
            engine = Engine(family.target, drafter, num_draft=policy, rows=4)
            tokens, last = run(engine, requests, admit_at)
            for place, request in enumerate(requests):
                assert last[place].error is None
                assert tokens[place] == alone[place]
                if isinstance(policy, Fixed):
                    fits = len(request.prompt) <= 8
                    assert (last[place].stats.drafted > 0) == fits
            if isinstance(policy, Fixed):
                assert drafter.refused


class Counted(CausalSession):
    """A session that sees to it that no row is fed more than it has positions for."""

    def extend(self, tokens):
        assert max(self.lengths) + tokens.shape[1] <= self.positions
        return super().extend(tokens)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A draft for GPT-2, its target but for its positions: for 24 tokens alone."""
    folder = tmp_path_factory.mktemp("short")
    tiny_causal("gpt2", positions=24).save_pretrained(folder)
    return Counted(causal_model.load(folder).model, VOCABULARY, positions=24)


@settings(max_examples=12)
@given(data=st.data())
def test_positions_of_a_draft_that_end(families, short, data):
    """Beside rows that go on drafting."""
    family = families["gpt2"]
    requests = [
        Request(
            PROMPTS[data.draw(st.integers(0, 7))], NEVER, data.draw(st.integers(1, 40))
        )
        for _ in range(data.draw(st.integers(1, 8)))
    ]
    most = data.draw(st.sampled_from([1, 3, 8, 40]))
    policy = data.draw(
        st.sampled_from([Fixed(most), Auto(most), Whims(most, most), Cycle(most, 0, 1)])
    )
    engine = Engine(
        family.target,
        ModelDrafter(short),
        num_draft=policy,
        lookup=data.draw(st.sampled_from([None, Lookup(EAGER)])),
        rows=data.draw(st.integers(1, 6)),
    )
    admit_at = [data.draw(st.integers(0, 9)) for _ in requests]
    tokens, last = run(engine, requests, admit_at)
    for place, request in enumerate(requests):
        alone = decode(
            family.alone, None, [request.prompt], max_tokens=request.max_tokens
        )
        assert tokens[place] == alone[0][0]
        check(last[place].stats, tokens[place])


def test_a_long_draft_ends_with_the_positions_of_its_model(families, short):
    """As much as is asked for, where there is room for it."""
    requests = [Request(PROMPTS[3], NEVER, 60)]
    engine = Engine(families["gpt2"].target, ModelDrafter(short), num_draft=1000)
    _, last = run(engine, requests)
    assert last[0].stats.drafted > 6


def test_figures_of_a_batch(families):
    family = families["t5"]
    engine = Engine(
        family.target,
        family.drafters["good"],
        num_draft=Whims(3),
        lookup=Lookup(EAGER),
        rows=4,
    )
    _, last = run(engine, [Request(prompt, NEVER, 20) for prompt in PROMPTS])
    rows = [commit.stats for commit in last.values()]
    for together, all_of in ((True, max), (False, sum)):
        batch = Stats.of_batch(rows, together)
        assert batch.rounds == all_of(row.rounds for row in rows)
        names = [
            "new_tokens",
            "drafted",
            "tested",
            "accepted",
            "found",
            "found_accepted",
        ]
        for name in names:
            assert getattr(batch, name) == sum(getattr(row, name) for row in rows) > 0
        histogram = batch.accept_histogram
        assert sum(histogram) == sum(row.rounds for row in rows)
        assert sum(i * times for i, times in enumerate(histogram)) == batch.accepted
    assert Stats.of_batch(rows[:1]) == rows[0]
    assert SimpleNamespace(**batch.as_dict()).found == batch.found


def test_a_draft_enters_in_the_middle_of_a_text(families):
    """What a drafter with new caches proposes, and its neighbour, too, up to date."""
    session = families["t5"].alone
    samplers = [RowSampler(Rules(VOCABULARY), [0]) for _ in range(2)]

    def propose(drafter, *sequences):
        draft = drafter.propose(list(sequences), 3, RoundSampler(samplers, 3))
        return np.array(draft.tokens).tolist()

    late, text = ModelDrafter(session), [0, *range(20, 32)]
    late.start([PROMPTS[0], [0]])
    first = propose(late, text, [0])[0]
    text += first[:2]
    late.put([1], finish(late.prepare([PROMPTS[1]])))
    found = propose(late, text, [0, *range(40, 60)])
    fresh = ModelDrafter(session)
    fresh.start(PROMPTS[:2])
    assert found == propose(fresh, text, [0, *range(40, 60)])


class Slow(Scripted):
    """A drafter that takes long to take in what was written before it is asked."""

    def __init__(self, clock):
        super().__init__(lambda sequence, n: [1] * n)
        self.clock, self.followed = clock, 0

    def start(self, prompts):
        self.clock.now += 1000

    def follow(self, sequences):
        self.clock.now += 1000
        self.followed += 1


class Seen(Cycle):
    """Keeps the seconds of its rounds, and of what was before them."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seconds, self.entering = [], []

    def observe(self, batch, plan, fates, seconds, entering=0.0, entered=0):
        self.seconds.append(seconds)
        self.entering.append(entering)


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_what_a_draft_lacked_is_no_part_of_a_round(families, monkeypatch):
    """A late entry, and what it was not asked about, count by themselves."""
    clock, policy = Clock(), Seen(2, 0, 0, 0, 0, 0)
    monkeypatch.setattr(time, "perf_counter", clock)
    drafter = Slow(clock)
    engine = Engine(families["t5"].target, drafter, num_draft=policy, rows=1)
    engine.admit(Request([5, 6, 7], frozenset(), 120))
    while engine.busy:
        engine.step()
    assert len(policy.seconds) > 20
    assert min(policy.seconds) > 0 and max(policy.seconds) < 100
    assert drafter.followed > 0
    assert sum(policy.entering) // 1000 == 1 + drafter.followed


@settings(max_examples=15)
@given(data=st.data())
def test_texts_with_a_number_of_their_own(families, data):
    """Each text is what it is alone, and has no more draft tokens than it asks for,
    whoever else is in the batch; alone it drafts as if all did."""
    family = families[data.draw(st.sampled_from(["t5", "gpt2"]))]
    numbers = data.draw(
        st.lists(st.sampled_from([None, 0, 1, 3, 8]), min_size=4, max_size=4)
    )
    requests = [
        Request(prompt, frozenset({1}), 20, num_draft=number)
        for prompt, number in zip(PROMPTS, numbers, strict=False)
    ]
    drafter = family.drafters[data.draw(st.sampled_from(["good", "now and then"]))]
    policy = data.draw(st.sampled_from([Auto(8), Whims(3), Fixed(2)]))
    rows = data.draw(st.sampled_from([1, 4]))
    engine = Engine(family.target, drafter, num_draft=policy, rows=rows)
    tokens, last = run(engine, requests)
    for place, request in enumerate(requests):
        plain = Engine(family.target, None)
        assert tokens[place] == run(plain, [replace(request, num_draft=None)])[0][0]
        its = last[place].stats
        if request.num_draft is not None:
            assert all(size <= request.num_draft for size, _ in its.sizes)
        if request.num_draft == 0:
            assert its.drafted == 0
        if rows == 1 and request.num_draft and policy.most >= request.num_draft:
            alone = Engine(family.target, drafter, num_draft=request.num_draft)
            asked = replace(request, num_draft=None)
            if not isinstance(policy, Whims):
                assert run(alone, [asked])[1][0].stats.sizes == its.sizes

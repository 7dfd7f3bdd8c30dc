"""The engine: rows that come and go do not know of each other."""

from copy import copy, deepcopy
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted, Whims
from test_decoder import NEVER, Checked, check, decode
from tiny_causal import tiny_causal

import decoder
import model
from architectures import causal_model, causal_session, t5, t5_session
from architectures.causal_session import CausalSession
from architectures.t5_session import T5Session
from decoder import Engine
from speculation import session
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.policy import Auto
from speculation.requests import Request, Stats
from speculation.sampling import GREEDY, Sampling
from system import fast_blas, memory
from system.errors import InputError, NoRoomError

#: Of mixed lengths; the tiny models answer them with varied texts.
PROMPTS = [
    [10, 11, 12, 40],
    [*range(24, 32)],
    [31, 32],
    [7],
    [*range(40, 90, 2)],
    [5, 9, 5, 9, 5],
    [*range(60, 20, -3), 2],
    [33, 32, 31],
]
#: That a token's embedding is NaN in the models of some tests.
POISON = 95


def run(engine, requests, admit_at=None, cancel_at=None):
    """Every request's tokens, last commit and, where it failed, error.

    Args:
        admit_at: the step before which each is admitted; all at once by default.
        cancel_at: steps before which requests, by their place, are cancelled.
    """
    admit_at = admit_at or [0] * len(requests)
    cancel_at = cancel_at or {}
    tokens, last, ids = {}, {}, {}
    step = 0
    while engine.busy or step <= max([*admit_at, *cancel_at]):
        for place, request in enumerate(requests):
            if admit_at[place] == step:
                ids[engine.admit(request)] = place
        for place in cancel_at.get(step, ()):
            engine.cancel({v: k for k, v in ids.items()}.get(place, -1))
        for commit in engine.step():
            place = ids[commit.id]
            assert place not in last or last[place].finish_reason is None
            tokens.setdefault(place, []).extend(commit.tokens)
            last[place] = commit
        step += 1
        assert step < 2000
    return tokens, last


@pytest.fixture(scope="module")
def families(tiny, make, tmp_path_factory):
    return build_families(tiny, make, tmp_path_factory)


def build_families(tiny, make, tmp_path_factory):
    """For each family a target, drafts for it, and a copy of the target for texts
    alone."""

    def causal(kind, **options):
        oracle = tiny_causal(kind, **options)
        folder = tmp_path_factory.mktemp(kind)
        oracle.save_pretrained(folder)
        return CausalSession(causal_model.load(folder).model, VOCABULARY)

    found = {
        "t5": (
            Checked(tiny[1]),
            Checked(tiny[1]),
            Checked(t5.load(make(noise=0.05)[2])),
        )
    }
    for kind in ("gpt2", "llama"):
        found[kind] = causal(kind), causal(kind), causal(kind, noise=0.03)
    return {
        kind: SimpleNamespace(
            target=target,
            alone=alone,
            drafters={
                "good": ModelDrafter(good),
                "no such id": Scripted(lambda s, n: ([10**6, -5] * n)[:n]),
                "always the end": Scripted(lambda s, n: [1] * n),
                "now and then": Scripted(lambda s, n: [s[-1]] * n, ragged=len),
                "lookup": Lookup(),
            },
        )
        for kind, (target, alone, good) in found.items()
    }


DRAFTERS = ["good", "no such id", "always the end", "now and then", "lookup"]
#: Looks for what followed a single word, which is often something and often wrong.
EAGER = 1


def any_plan(data):
    """A policy or a number for an engine, and maybe a lookup before its drafter."""
    kind = data.draw(st.sampled_from(["number", "whims", "whims", "auto"]))
    most = data.draw(st.integers(0, 8))
    policy = most
    if kind == "whims":
        policy = Whims(data.draw(st.integers(0, 99)), most)
    elif kind == "auto":
        policy = Auto(most)
    lookup = data.draw(st.sampled_from([None, EAGER, 2]))
    return {"num_draft": policy, "lookup": lookup and Lookup(lookup)}


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@settings(max_examples=24)
@given(data=st.data())
def test_every_row_is_what_it_is_alone(families, kind, data):
    """Whatever is beside it, before it in its row, and whenever it comes or leaves;
    and however long an encoding is cut up."""
    family = families[kind]
    drafter = family.drafters[data.draw(st.sampled_from(DRAFTERS))]
    plan = any_plan(data)
    places = st.integers(0, len(PROMPTS) - 1)
    chosen = data.draw(st.lists(places, min_size=1, max_size=12))
    ends = st.frozensets(st.integers(1, 94), max_size=12)
    requests = [
        Request(PROMPTS[place], data.draw(ends), data.draw(st.integers(1, 24)))
        for place in chosen
    ]
    admit_at = [data.draw(st.integers(0, 12)) for _ in requests]
    cancel_at = data.draw(
        st.dictionaries(
            st.integers(1, 20), st.lists(st.integers(0, 11), max_size=2), max_size=3
        )
    )
    gone = {place for places in cancel_at.values() for place in places}
    chunk = data.draw(st.sampled_from([1, 5, 512]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "CHUNK", chunk)
        patch.setattr(causal_session, "CHUNK", chunk)
        engine = Engine(
            family.target,
            drafter,
            **plan,
            rows=data.draw(st.integers(1, 16)),
        )
        tokens, last = run(engine, requests, admit_at, cancel_at)
    for place, request in enumerate(requests):
        alone, reasons, _ = decode(
            family.alone,
            None,
            [request.prompt],
            eos_tokens=request.eos_tokens,
            max_tokens=request.max_tokens,
        )
        got = tokens.get(place, [])
        if place in gone and got != alone[0]:
            assert got == alone[0][: len(got)]
            continue
        assert got == alone[0]
        assert last[place].finish_reason == reasons[0]
        check(last[place].stats, got)


RULES = [
    GREEDY,
    Sampling(repetition_penalty=1.4, no_repeat_ngram_size=2),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_k=20, seed=4, coupling="residual"),
    Sampling(temperature=0.8, top_k=20, seed=5, coupling="residual"),
    Sampling(temperature=0.8, top_k=20, seed=5),
    Sampling(temperature=1.3, top_p=0.9, encoder_no_repeat_ngram_size=1, seed=1),
]


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("drafter", ["good", "lookup", "always the end"])
@pytest.mark.parametrize("num_draft", [0, 3])
def test_rules_of_their_own(families, kind, drafter, num_draft):
    """One batch with greedy and sampled texts, penalties, seeds, couplings and delta:
    each is what its own rules make of it alone. Batches of 1, 4 and 16 give the same
    texts."""
    family = families[kind]
    requests = [
        Request(
            PROMPTS[place % len(PROMPTS)],
            frozenset({3, 1}),
            10 + place % 7,
            0.3 if place % 4 == 0 else 0.0,
            RULES[place % len(RULES)],
            (place, 0),
        )
        for place in range(18)
    ]
    texts, figures = [], []
    for rows in (1, 4, 16):
        engine = Engine(
            family.target, family.drafters[drafter], num_draft=num_draft, rows=rows
        )
        tokens, last = run(engine, requests)
        texts.append(tokens)
        # The draft, too, knows nothing of who was in a row before.
        stats = {place: commit.stats for place, commit in last.items()}
        figures.append(
            {place: (s.rounds, s.drafted, s.accepted) for place, s in stats.items()}
        )
    assert texts[0] == texts[1] == texts[2]
    assert figures[0] == figures[1] == figures[2]
    assert len({tuple(text) for text in texts[0].values()}) > 10


#: Sampled with shared noise, under rules of every kind.
SHARED = [
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=1.0, seed=4),
    Sampling(temperature=0.8, top_k=20, repetition_penalty=1.4, seed=10**30),
    Sampling(temperature=1.3, top_p=0.9, no_repeat_ngram_size=2, seed=0),
    Sampling(temperature=1.0, min_p=0.01, min_new_tokens=9, coupling="shared"),
    Sampling(temperature=1.5, bad_words_ids=((7,), (8, 9)), seed=7),
]


class Changing(ModelDrafter):
    """Drafts another number of tokens each round."""

    def propose(self, sequences, num_draft, sampler):
        size = 1 + sum(map(len, sequences)) % num_draft
        return super().propose(sequences, size, sampler)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@settings(max_examples=12)
@given(data=st.data())
def test_the_same_seed_the_same_text(families, kind, data):
    """Token for token what the target samples alone, cut off where the budget ends:
    with any draft, any K, any batch, whatever the rules of the texts beside it."""
    family = families[kind]
    name = data.draw(st.sampled_from([*DRAFTERS, "changing"]))
    drafter = family.drafters.get(name) or Changing(family.drafters["good"].session)
    rules = st.sampled_from([*SHARED, *RULES])
    requests = [
        Request(
            PROMPTS[data.draw(st.integers(0, len(PROMPTS) - 1))],
            frozenset({1, 3}),
            data.draw(st.integers(1, 20)),
            sampling=data.draw(rules),
            stream=(data.draw(st.integers(0, 2)), 2**40),
        )
        for _ in range(data.draw(st.integers(1, 10)))
    ]
    engine = Engine(
        family.target,
        drafter,
        **any_plan(data),
        rows=data.draw(st.sampled_from([1, 4, 16])),
    )
    tokens, _ = run(engine, requests, [data.draw(st.integers(0, 9)) for _ in requests])
    for place, request in enumerate(requests):
        if request.sampling.coupling == "residual":
            continue
        alone = decode(
            family.alone,
            None,
            [request.prompt],
            eos_tokens=request.eos_tokens,
            max_tokens=20,
            sampling=request.sampling,
            streams=[request.stream],
        )
        assert tokens[place] == alone[0][0][: request.max_tokens]


def test_rows_that_share_rules_are_computed_together(families):
    """And those that do not are not: by the operations' shapes."""
    family = families["t5"]
    seen = []

    class Watched:
        def __call__(self, logits, prefix):
            seen.append(len(logits))
            return logits

    rule = Watched()
    requests = [
        Request(prompt, NEVER, 4, sampling=Sampling(processors=(rule,), seed=seed))
        for seed, prompt in enumerate(PROMPTS[:4])
    ]
    run(Engine(family.target, None, rows=4), requests)
    assert set(seen) == {4}
    seen.clear()
    mixed = [*requests[:3], Request(PROMPTS[3], NEVER, 4)]
    run(Engine(family.target, None, rows=4), mixed)
    assert set(seen) == {3}


@pytest.fixture(scope="module")
def poisoned(make):
    """A target that makes NaN of one token, and of that alone."""
    loaded = t5.load(make()[2])
    weight = np.array(loaded.embedding.weight)
    loaded.head = model.Linear(weight.shape[1], len(weight))  # no longer the embedding
    loaded.head.weight = mx.array(weight)
    weight[POISON] = np.nan
    loaded.embedding.weight = mx.array(weight)
    return T5Session(loaded)


@pytest.fixture
def poisoned_llama(families):
    """Likewise, decoder-only: what a prompt begins with may be cached."""
    session = copy(families["llama"].target)
    session.model = deepcopy(session.model)
    weight = np.array(session.model.model.embed_tokens.weight)
    weight[POISON] = np.nan
    session.model.model.embed_tokens.weight = mx.array(weight)
    session.forget()
    return session


@pytest.mark.parametrize("num_draft", [0, 3])
def test_a_row_that_fails_fails_alone(poisoned, families, num_draft):
    """Its neighbours go on, and who comes into its row is not touched."""
    drafter = families["t5"].drafters["good"]
    bad = [4, POISON, 5]
    prompts = [PROMPTS[0], bad, PROMPTS[1], *PROMPTS[2:], bad, *PROMPTS]
    requests = [Request(prompt, NEVER, 12) for prompt in prompts]
    for rows in (2, 4):
        engine = Engine(poisoned, drafter, num_draft=num_draft, rows=rows)
        tokens, last = run(engine, requests)
        for place, prompt in enumerate(prompts):
            if prompt is bad:
                assert "not finite" in str(last[place].error)
                assert last[place].finish_reason == "error"
                assert tokens[place] == []
            else:
                alone = decode(families["t5"].alone, None, [prompt], max_tokens=12)
                assert tokens[place] == alone[0][0]


@pytest.mark.parametrize("max_tokens", range(6, 14))
def test_a_draft_token_that_is_poison_is_rejected(poisoned, families, max_tokens):
    """What it leaves in the caches reaches nothing, though the last drafts are
    shorter."""
    drafter = Scripted(lambda sequence, n: [POISON] * n)
    requests = [Request(prompt, NEVER, max_tokens) for prompt in PROMPTS[:3]]
    tokens, _ = run(Engine(poisoned, drafter, num_draft=4, rows=3), requests)
    for place, request in enumerate(requests):
        alone = decode(
            families["t5"].alone, None, [request.prompt], max_tokens=max_tokens
        )
        assert tokens[place] == alone[0][0]


def test_what_is_drafted_for_nobody_harms_nobody(families, poisoned_llama):
    """A row that goes on without a draft beside one that has it, and a drafter that
    proposes poison where nothing is asked of it."""
    family, poisoned = families["llama"], poisoned_llama
    odd = len(PROMPTS[1]) + 2

    def guess(sequence, n):
        return [POISON if sequence == [0] or len(sequence) == odd else 7] * n

    requests = [Request(PROMPTS[1], NEVER, 6), Request(PROMPTS[2], NEVER, 5)]
    tokens, last = run(Engine(poisoned, Scripted(guess), num_draft=3, rows=2), requests)
    for place, request in enumerate(requests):
        alone = decode(
            family.alone, None, [request.prompt], max_tokens=request.max_tokens
        )
        assert tokens[place] == alone[0][0]
    assert last[0].stats.drafted < 3 * last[0].stats.rounds


def test_nothing_left_to_choose_ends_one_row(families):
    everything = tuple(range(VOCABULARY))
    odd = Request(PROMPTS[0], NEVER, 5, sampling=Sampling(suppress_tokens=everything))
    fine = Request(PROMPTS[1], NEVER, 5)
    tokens, last = run(Engine(families["t5"].target, None, rows=2), [odd, fine])
    assert "no token is left" in str(last[0].error)
    assert (
        tokens[1]
        == decode(families["t5"].alone, None, [PROMPTS[1]], max_tokens=5)[0][0]
    )


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_prompt_that_cannot_be_begun_with(families, kind):
    """An id that does not exist, no token at all: named, the others unharmed."""
    family = families[kind]
    prompts = [PROMPTS[0], [VOCABULARY + 7], PROMPTS[1], [], *PROMPTS[2:]]
    requests = [Request(prompt, NEVER, 6) for prompt in prompts]
    for admit_at in (None, [0, 3, 3, 3, *[2] * 6]):
        engine = Engine(family.target, family.drafters["good"], num_draft=2, rows=4)
        tokens, last = run(engine, requests, admit_at)
        assert "token id" in str(last[1].error)
        assert "empty" in str(last[3].error)
        for place in (0, 2, *range(4, len(prompts))):
            alone = decode(family.alone, None, [prompts[place]], max_tokens=6)
            assert tokens[place] == alone[0][0]


def test_too_little_memory_for_all_at_once(families, monkeypatch):
    """Who does not fit beside the others waits for them; who fits nowhere is told."""
    family = families["t5"]

    def require_room(length, size):
        most = 30 if family.target.lengths else 60
        if length > most:
            raise NoRoomError(f"{length} tokens are too many")

    monkeypatch.setattr(t5_session, "require_room", require_room)
    long, longer = [9, *range(4, 54)], [9] * 70
    prompts = [PROMPTS[0], PROMPTS[1], long, PROMPTS[2], longer, PROMPTS[3]]
    requests = [Request(prompt, NEVER, 6) for prompt in prompts]
    family.target.forget()

    engine = Engine(family.target, None, rows=2)
    start = family.target.start

    def starting(prompts):
        family.target.forget()
        return start(prompts)

    monkeypatch.setattr(family.target, "start", starting)
    tokens, last = run(engine, requests)
    assert "too many" in str(last[4].error)
    monkeypatch.undo()
    for place in (0, 1, 2, 3, 5):
        alone = decode(family.alone, None, [prompts[place]], max_tokens=6)
        assert tokens[place] == alone[0][0]


def test_the_batch_grows_no_further_than_the_memory(families, monkeypatch):
    family = families["t5"]
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free", lambda: family.target.batch_bytes(4, 25, 6))
    engine = Engine(family.target, None, rows=16)
    requests = [Request(prompt, NEVER, 6) for prompt in PROMPTS * 2]
    engine.admit(requests[0])
    engine.step()
    for request in requests[1:]:
        engine.admit(request)
    rows = []
    while engine.busy:
        engine.step()
        rows.append(len(engine._rows))
    assert max(rows) == 4


def test_row_counts_are_few(families):
    """Powers of two, and no more rows than texts for long."""
    family = families["t5"]
    engine = Engine(family.target, None, rows=16)
    for place in range(21):
        engine.admit(Request(PROMPTS[place % 8], NEVER, 3 + 2 * place))
    seen = []
    while engine.busy:
        engine.step()
        seen.append(len(engine._rows))
    assert set(seen) == {16, 8, 4, 2, 1}
    assert seen == sorted(seen, reverse=True)


def test_commits_keep_their_figures(families):
    """Each has a copy: those of earlier rounds do not change."""
    engine = Engine(families["t5"].target, None, rows=1)
    engine.admit(Request(PROMPTS[0], NEVER, 5))
    commits = []
    while engine.busy:
        commits += engine.step()
    assert [commit.stats.new_tokens for commit in commits] == [1, 2, 3, 4, 5]
    assert [sum(c.stats.accept_histogram) for c in commits] == [1, 2, 3, 4, 5]
    assert isinstance(commits[0].stats, Stats)


def test_cancelled_before_it_began_and_all_cancelled(families):
    engine = Engine(families["t5"].target, None, rows=1)
    first = engine.admit(Request(PROMPTS[0], NEVER, 50))
    second = engine.admit(Request(PROMPTS[1], NEVER, 50))
    engine.step()
    engine.cancel(second)
    engine.cancel(first)
    engine.cancel(99)
    assert not engine.busy
    assert engine.step() == []
    tokens, _ = run(engine, [Request(PROMPTS[2], NEVER, 5)])
    alone = decode(families["t5"].alone, None, [PROMPTS[2]], max_tokens=5)
    assert tokens[0] == alone[0][0]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_cancelled_while_it_arrives(families, kind, monkeypatch):
    """Nothing more is encoded for it, and nothing is said of it."""
    monkeypatch.setattr(session, "CHUNK", 4)
    monkeypatch.setattr(causal_session, "CHUNK", 4)
    family = families[kind]
    engine = Engine(family.target, None, rows=2)
    short = engine.admit(Request(PROMPTS[0], NEVER, 12))
    engine.step()
    long = engine.admit(Request([*range(4, 60)], NEVER, 3, sampling=RULES[1]))
    while engine._arriving is None:
        engine.step()
    engine.cancel(long)
    assert engine._arriving is None
    seen = []
    while engine.busy:
        seen += [commit.id for commit in engine.step()]
    assert set(seen) == {short}


def test_who_waits_for_memory_is_cancelled(families, monkeypatch):
    """Those behind it need not wait any longer."""
    family = families["t5"]
    family.target.forget()
    engine = Engine(family.target, None, rows=4)
    engine.admit(Request(PROMPTS[0], NEVER, 40))
    engine.step()

    def require_room(length, size):
        if length > 20:
            raise NoRoomError("too many")

    monkeypatch.setattr(t5_session, "require_room", require_room)
    held = engine.admit(Request([9] * 30, NEVER, 3))
    engine.step()
    engine.step()
    behind = engine.admit(Request(PROMPTS[1], NEVER, 3))
    assert not any(commit.id == behind for commit in engine.step() + engine.step())
    engine.cancel(held)
    steps = 0
    while not any(commit.id == behind for commit in engine.step()):
        steps += 1
    assert steps < 4


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_an_idle_engine_after_others_used_the_session(families, kind):
    family = families[kind]
    engine = Engine(family.target, family.drafters["good"], num_draft=2, rows=4)
    requests = [Request(prompt, NEVER, 5) for prompt in PROMPTS[:3]]
    first = run(engine, requests)[0]
    decode(family.target, None, [PROMPTS[4]], max_tokens=9)
    assert run(engine, requests)[0] == first
    family.target.forget()
    assert run(engine, requests)[0] == first


def test_not_finite_before_is_not_finite_no_more(families, poisoned_llama):
    """Of a decoder-only model, whose next prompt may begin as the last one did."""
    family, poisoned = families["llama"], poisoned_llama
    with pytest.raises(InputError, match="not finite"):
        decode(poisoned, None, [[4, 4, 4, *[POISON] * 20]])
    requests = [Request([4, 4, 9], NEVER, 9), Request([*range(20, 60)], NEVER, 9)]
    tokens, _ = run(Engine(poisoned, None, rows=4), requests, [0, 1])
    for place, request in enumerate(requests):
        alone = decode(family.alone, None, [request.prompt], max_tokens=9)
        assert tokens[place] == alone[0][0]


def test_not_finite_and_cancelled(families, poisoned_llama):
    """Who uses the caches next does not find it."""
    family, poisoned = families["llama"], poisoned_llama
    engine = Engine(poisoned, Scripted(lambda s, n: [POISON] * n), num_draft=20)
    number = engine.admit(Request([4, 4, 9], NEVER, 30))
    engine.step()
    engine.cancel(number)
    requests = [Request([4, 4, 9], NEVER, 9), Request([*range(20, 60)], NEVER, 9)]
    tokens, _ = run(Engine(poisoned, None, rows=4), requests, [0, 1])
    for place, request in enumerate(requests):
        alone = decode(family.alone, None, [request.prompt], max_tokens=9)
        assert tokens[place] == alone[0][0]


def test_what_takes_too_long_to_wait_for(families, monkeypatch):
    """It is encoded when those that are being decoded have ended, and its text is what
    it is alone."""
    monkeypatch.setattr(decoder, "LONGEST_BESIDE", 20)
    family = families["t5"]
    prompts = [PROMPTS[0], [9, *range(4, 44)], PROMPTS[1], [*range(50, 80)]]
    requests = [Request(prompt, NEVER, 8) for prompt in prompts]
    engine = Engine(family.target, family.drafters["good"], num_draft=2, rows=2)
    ended = []
    while len(ended) < 4:
        if not engine.busy:
            for request in requests:
                engine.admit(request)
        ended += [c.id for c in engine.step() if c.finish_reason]
    assert ended[0] == 0
    tokens, _ = run(engine, requests)
    for place, prompt in enumerate(prompts):
        alone = decode(family.alone, None, [prompt], max_tokens=8)
        assert tokens[place] == alone[0][0]


def test_what_is_encoded_together_is_of_a_like_length(families, monkeypatch):
    family = families["t5"]
    seen = []
    start, prepare = family.target.start, family.target.prepare
    monkeypatch.setattr(family.target, "start", lambda p: (seen.append(p), start(p))[1])
    monkeypatch.setattr(
        family.target, "prepare", lambda p: (seen.append(p), prepare(p))[1]
    )
    prompts = [*PROMPTS[:2], [9] * 700, *PROMPTS[2:4], [8] * 600]
    run(
        Engine(family.target, None, rows=8),
        [Request(prompt, NEVER, 4) for prompt in prompts],
    )
    assert [list(map(len, each)) for each in seen] == [[4, 8], [700, 2, 1, 600]] or [
        max(map(len, each)) * len(each) <= 2 * sum(map(len, each)) + session.CHUNK
        for each in seen
    ] == [True] * len(seen)


def test_30_000_that_wait_and_leave(families):
    """Neither takes the longer the more there are."""
    engine = Engine(families["t5"].target, None, rows=4)
    ids = [engine.admit(Request([5], NEVER, 2)) for _ in range(30_000)]
    for number in ids[:-3]:
        engine.cancel(number)
    assert engine.wanted == 1
    tokens = []
    while engine.busy:
        tokens += [commit.id for commit in engine.step()]
    assert set(tokens) == set(ids[-3:])


def test_threads_fit_the_rows(families, monkeypatch):
    """One is right for a row of a small model, and not for 16."""
    asked = []
    monkeypatch.setattr(fast_blas, "fit_threads", asked.append)
    family = families["t5"]
    engine = Engine(family.target, None, rows=16)
    for place in range(16):
        engine.admit(Request(PROMPTS[place % 8], NEVER, 2 + place))
    while engine.busy:
        engine.step()
    rows = [parameters // family.target.parameters for parameters in asked]
    assert (rows[0], rows[-1]) == (16, 1)
    assert rows == sorted(set(rows), reverse=True)


def test_samples_beyond_the_memory_wait(families, monkeypatch):
    """A batch begins with no more rows than there is room for."""
    family = families["t5"]
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free", lambda: family.target.batch_bytes(4, 4, 6))
    requests = [Request(PROMPTS[0], NEVER, 6) for _ in range(11)]
    engine = Engine(family.target, None, rows=11)
    rows = []
    for request in requests:
        engine.admit(request)
    while engine.busy:
        engine.step()
        rows.append(len(engine._rows))
    assert max(rows) == 4


def test_nothing_is_left_of_a_batch_whose_last_text_fails(poisoned, families):
    """While another is still being encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "CHUNK", 2)
        engine = Engine(poisoned, None, rows=2)
        engine.admit(Request(PROMPTS[0], NEVER, 2))
        engine.step()
        bad = engine.admit(Request([4, POISON, 5], NEVER, 5))
        good = engine.admit(Request([*range(4, 60)], NEVER, 5))
        commits = []
        while engine.busy:
            commits += engine.step()
    assert [c.finish_reason for c in commits if c.id == bad] == ["error"]
    alone = decode(families["t5"].alone, None, [[*range(4, 60)]], max_tokens=5)
    assert [t for c in commits if c.id == good for t in c.tokens] == alone[0][0]


@pytest.mark.parametrize("stream", [(-1,), (0.5,), ("x",)], ids=str)
def test_an_odd_stream(stream):
    with pytest.raises(InputError, match="stream"):
        Request([5], NEVER, stream=stream)


def test_lists_will_do(families):
    listed = Sampling(suppress_tokens=[5, 6], bad_words_ids=[[7], [8, 9]])
    tupled = Sampling(suppress_tokens=(5, 6), bad_words_ids=((7,), (8, 9)))
    texts = [
        decode(families["t5"].alone, None, PROMPTS[:1], sampling=sampling)[0]
        for sampling in (listed, tupled)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_long_prompt_does_not_stop_the_others(families, kind, monkeypatch):
    """While it is encoded they have their rounds."""
    monkeypatch.setattr(session, "CHUNK", 8)
    monkeypatch.setattr(causal_session, "CHUNK", 8)
    family = families[kind]
    engine = Engine(family.target, None, rows=2)
    short = engine.admit(Request(PROMPTS[0], NEVER, 60))
    for _ in range(3):
        engine.step()
    long = engine.admit(Request([*range(4, 90)], NEVER, 3))
    before = 0
    while True:
        commits = engine.step()
        if any(commit.id == long for commit in commits):
            break
        assert [commit.id for commit in commits] == [short]
        before += 1
    assert before >= 2


@pytest.mark.parametrize("rows", [0, -1])
def test_no_rows(families, rows):
    with pytest.raises(InputError, match="batch-size"):
        Engine(families["t5"].target, None, rows=rows)


def test_a_draft_without_room_for_one_prompt_drafts_for_the_others(families, tmp_path):
    """Of a draft with few positions: what it cannot be given is decoded by the target
    alone, and it drafts again in that row for who comes next."""
    oracle = tiny_causal("gpt2", positions=16)
    oracle.save_pretrained(tmp_path)
    small = CausalSession(causal_model.load(tmp_path).model, VOCABULARY, positions=16)
    family = families["gpt2"]
    prompts = [PROMPTS[4], PROMPTS[2], PROMPTS[3], PROMPTS[4], PROMPTS[0]]
    requests = [Request(prompt, NEVER, 20) for prompt in prompts]
    engine = Engine(family.target, ModelDrafter(small), num_draft=3, rows=2)
    tokens, last = run(engine, requests)
    for place, prompt in enumerate(prompts):
        alone = decode(family.alone, None, [prompt], max_tokens=20)
        assert tokens[place] == alone[0][0]
        assert (last[place].stats.drafted > 0) == (len(prompt) < 16)

"""Beam search: transformers' texts and scores, plain and speculative, alone and in
batches."""

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from beam_oracle import NOTHING, Model, search, theirs
from conftest import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Cycle, Scripted
from test_decoder import Checked, broken
from test_engine import PROMPTS, run
from test_family import FAMILY
from tiny_causal import tiny_causal

import model
from architectures import causal_model, t5
from architectures.causal_session import CausalSession
from architectures.t5_session import T5Session
from decoder import Engine, generate
from pair import Pair
from speculation.beams import Beams
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.policy import Fixed
from speculation.requests import Request
from speculation.sampling import GREEDY, Sampling
from system.errors import InputError

#: Two sums of log-probabilities nearer than this may change places by rounding.
TIE = 1e-4
#: One member of the family for each way to compute: others differ in their files.
LAYOUTS = {
    (member.kind, member.untied, *member.fields.items()): name
    for name, member in reversed(FAMILY.items())
}
LAYOUTS = sorted(LAYOUTS.values())
LENGTH_PENALTIES = [-1.0, 0.0, 0.3, 0.6, 1.0, 2.0]


class Ties:
    """Counts texts that rounding decided, and sees to it that they are few."""

    def __init__(self):
        self.counted = Counter()

    def count(self, tied: bool) -> None:
        self.counted[tied] += 1
        assert self.counted[True] <= 1 + 0.02 * self.counted.total(), self.counted


@pytest.fixture(scope="module")
def ties():
    return Ties()


def decode(target, drafter, prompt, **options):
    """A text's tokens and its last commit; what holds of all commits is checked."""
    tokens, last, seen = [], None, None
    for commit in generate(target, drafter, [prompt], **options):
        assert last is None or last.finish_reason is None, "text follows the end"
        assert commit.tokens and 0 <= commit.accepted <= len(commit.tokens)
        assert commit.finish_reason or not commit.hypotheses
        tokens += commit.tokens
        last, seen = commit, commit.stats
    check(tokens, last, options["beams"], options["eos_tokens"], options["max_tokens"])
    assert seen.new_tokens == len(tokens)
    return tokens, last


def check(tokens, last, beams, ends, max_tokens) -> None:
    """What must hold of the last commit of any text that was searched for."""
    found, stats = last.hypotheses, last.stats
    assert last.error is None
    assert 1 <= len(found) <= beams.num_beams
    assert found[0].tokens == tokens, "what was committed is the best text"
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert all(score > NOTHING for score in scores)
    assert len({tuple(each.tokens) for each in found}) == len(found)
    for each in found:
        *before, end = each.tokens
        assert not ends & set(before)
        assert end in ends or len(each.tokens) == max_tokens
        assert each.finish_reason == ("eos" if end in ends else "length")
    assert last.finish_reason == ("eos" if tokens[-1] in ends else "length")
    assert 1 <= stats.rounds <= max_tokens
    assert stats.accepted <= stats.tested <= stats.drafted
    histogram = stats.accept_histogram
    assert sum(histogram) == stats.rounds
    assert sum(i * count for i, count in enumerate(histogram)) == stats.accepted
    assert sum(times for _, times in stats.sizes) == stats.rounds
    assert sum(size * times for size, times in stats.sizes) == stats.drafted
    assert stats.found == stats.found_accepted == 0


def close(length_penalty: float, tokens: list[int]) -> float:
    """How far two scores of a text may be apart: of a sum of so many numbers."""
    return 1e-4 * max(1, len(tokens) ** -length_penalty)


def same(got, expected, beams, margin) -> bool:
    """Whether the n best are the same; where they are not, rounding has to have
    decided."""
    if [each[0] for each in got] != [each[0] for each in expected]:
        assert margin() < TIE, (got, expected)
        return False
    for (tokens, score, *_), (_, other, *_) in zip(got, expected, strict=True):
        assert abs(score - other) < close(beams.length_penalty, tokens)
    return True


# Against transformers.


def layout(make, name, **more):
    """The PyTorch model and the MLX one of a member's layout."""
    member = FAMILY[name]
    oracle, _, folder = make(
        11, member.untied, kind=member.kind, **member.fields | more
    )
    return oracle, t5.load(folder)


_LIKELY = {}


def likely(oracle, prompt) -> list[int]:
    """Tokens that are among the best somewhere on the way."""
    key = id(oracle), *prompt
    if key not in _LIKELY:
        text, found = [0], Counter()
        for _ in range(8):
            with torch.no_grad():
                logits = oracle(
                    torch.tensor([prompt]), decoder_input_ids=torch.tensor([text])
                ).logits[0, -1]
            best = logits.topk(6)[1].tolist()
            found.update(best)
            text.append(best[0])
        _LIKELY[key] = [token for token, _ in found.most_common()]
    return _LIKELY[key]


def any_beams(data, most=8) -> Beams:
    return Beams(
        data.draw(st.integers(2, most)),
        length_penalty=data.draw(st.sampled_from(LENGTH_PENALTIES)),
        early_stopping=data.draw(st.sampled_from([False, True, "never"])),
    )


def any_ends(data, usual) -> frozenset[int]:
    """Ends that come often, seldom, or never."""
    size = data.draw(st.sampled_from([0, 1, 2, 4, 6]))
    often = st.lists(st.sampled_from(usual[:12]), min_size=size, max_size=size)
    seldom = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=3)
    return frozenset(data.draw(often) + data.draw(seldom))


def any_rules(data, usual, max_tokens) -> Sampling:
    """Up to three of transformers' processors."""
    token = st.one_of(st.sampled_from(usual), st.integers(0, VOCABULARY - 1))
    word = st.lists(token, min_size=1, max_size=3).map(tuple)
    each = {
        "repetition_penalty": st.sampled_from([0.7, 1.3, 2.5]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, max_tokens),
        "bad_words_ids": st.lists(word, min_size=1, max_size=4).map(tuple),
        "suppress_tokens": st.lists(token, min_size=1, max_size=4).map(tuple),
        "forced_bos_token_id": token,
    }
    names = data.draw(st.lists(st.sampled_from(list(each)), unique=True, max_size=3))
    drawn = {name: data.draw(each[name]) for name in names}
    if drawn.get("forced_bos_token_id") in drawn.get("suppress_tokens", ()):
        del drawn["suppress_tokens"]
    return Sampling(**drawn)


def any_prompt(data) -> list[int]:
    long = st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=12)
    return data.draw(st.one_of(st.sampled_from(PROMPTS), long))


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=8)
@given(data=st.data())
def test_n_best_are_those_of_transformers(make, ties, name, data):
    """Every member, penalty, way to stop and rule: texts and scores. Where rules leave
    fewer texts than beams, the texts that there are."""
    oracle, ours = layout(make, name)
    prompt, beams = any_prompt(data), any_beams(data)
    usual = likely(oracle, prompt)
    ends = any_ends(data, usual)
    max_tokens = data.draw(st.integers(1, 16))
    sampling = any_rules(data, usual, max_tokens)
    expected, table = theirs(oracle, prompt, beams, ends, max_tokens, sampling)
    forced = sampling.forced_bos_token_id is not None
    found = search(
        table,
        ends,
        beams.num_beams,
        beams.length_penalty,
        beams.early_stopping,
        max_tokens,
        forced,
    )
    if not found.short:  # the search here is theirs
        same(found.hypotheses, expected, beams, lambda: found.margin)
    _, last = decode(
        Checked(ours),
        None,
        prompt,
        num_draft=0,
        eos_tokens=ends,
        max_tokens=max_tokens,
        beams=beams,
        sampling=sampling,
    )
    tied = not same(last.hypotheses, found.hypotheses, beams, lambda: found.margin)
    ties.count(tied)
    for each in last.hypotheses if tied else ():
        other = table.score(each.tokens, beams.length_penalty)
        assert abs(each.score - other) < close(beams.length_penalty, each.tokens)
    if not tied:
        assert last.stats.rounds == found.steps


@pytest.mark.parametrize("length_penalty", [-1.0, 0.6, 2.0])
def test_the_three_ways_to_stop(make, length_penalty):
    """Where ends come often they are three: each takes as many steps as transformers'
    does."""
    oracle, ours = layout(make, "t5-1.1")
    steps = {way: [] for way in (True, False, "never")}
    for prompt in PROMPTS[:4]:
        ends = frozenset(likely(oracle, prompt)[2:9])
        for way, its in steps.items():
            beams = Beams(2, length_penalty, way)
            expected, table = theirs(oracle, prompt, beams, ends, 14, GREEDY)
            found = search(table, ends, 2, length_penalty, way, 14)
            assert same(found.hypotheses, expected, beams, lambda: 1)
            options = {"eos_tokens": ends, "max_tokens": 14, "beams": beams}
            _, last = decode(Checked(ours), None, prompt, num_draft=0, **options)
            assert same(last.hypotheses, expected, beams, lambda: 1)
            assert last.stats.rounds == found.steps == max(map(len, table.rows)) + 1
            its.append(found.steps)
    assert sum(steps[True]) < sum(steps["never"])
    assert (sum(steps[False]) < sum(steps["never"])) == (length_penalty > 0)


def test_padding_of_the_embedding_is_no_token(make):
    """It is never emitted; of the probability it has its share, as in transformers when
    it is told to suppress it."""
    oracle, ours = layout(make, "t5-1.1", vocab_size=VOCABULARY + 7)
    session = Checked(ours, VOCABULARY, banned=(40, 50))
    banned = (40, 50, *range(VOCABULARY, VOCABULARY + 7))
    for prompt in PROMPTS[:4]:
        beams, ends = Beams(4), frozenset({1, 3})
        rules = Sampling(suppress_tokens=banned)
        expected, _ = theirs(oracle, prompt, beams, ends, 12, rules)
        request = {"eos_tokens": ends, "max_tokens": 12, "beams": beams}
        for sampling in (GREEDY, Sampling(min_new_tokens=1)):
            _, last = decode(
                session, None, prompt, num_draft=0, sampling=sampling, **request
            )
            if sampling.min_new_tokens:
                more = replace(rules, min_new_tokens=1)
                expected, _ = theirs(oracle, prompt, beams, ends, 12, more)
            assert same(last.hypotheses, expected, beams, lambda: 1)


def test_one_beam_is_none(tiny, drafters):
    """The text is the greedy one, with rules as well: there they act on logits."""
    session = Checked(tiny[1])
    for sampling in (GREEDY, Sampling(repetition_penalty=1.4, no_repeat_ngram_size=2)):
        for prompt in PROMPTS[:4]:
            options = {"eos_tokens": {1, 3}, "max_tokens": 12, "sampling": sampling}
            for num_draft in (0, 3):
                texts = [
                    [
                        token
                        for commit in generate(
                            session,
                            drafters["good"],
                            [prompt],
                            num_draft=num_draft,
                            **options,
                            **more,
                        )
                        for token in commit.tokens
                    ]
                    for more in ({}, {"beams": Beams(1)})
                ]
                assert texts[0] == texts[1]


def test_a_forced_end_is_the_only_text(tiny):
    """What transformers adds to it are copies of it."""
    forced = Sampling(forced_bos_token_id=1)
    options = {"eos_tokens": frozenset({1}), "max_tokens": 5, "beams": Beams(4)}
    for num_draft in (0, 3):
        drafter = ModelDrafter(Checked(tiny[1]))
        tokens, last = decode(
            Checked(tiny[1]),
            drafter,
            PROMPTS[0],
            num_draft=num_draft,
            sampling=forced,
            **options,
        )
        assert (tokens, last.finish_reason) == ([1], "eos")
        assert last.hypotheses == (([1], 0.0, "eos"),)


# Drafts.


def always(folder, token=None) -> model.T5:
    """A model that says the same whatever it is asked: a token, or nothing at all, all
    being alike."""
    loaded = t5.load(folder)
    loaded.embedding.weight = mx.ones_like(loaded.embedding.weight)
    for layer in loaded.decoder.layers:
        for part in (layer.attention.o, layer.cross_attention.o, layer.feed_forward.wo):
            part.weight = mx.zeros_like(part.weight)
    head = np.zeros(loaded.embedding.weight.shape, np.float32)
    if token is not None:
        head[token] = 1
    loaded.head.weight = mx.array(head)
    return loaded


@pytest.fixture(scope="module")
def drafters(tiny, make):
    """Good but imperfect, unrelated, and those that only do harm."""
    untied = make(seed=4, untied=True)[2]
    models = {
        "same": tiny[1],
        "good": t5.load(make(noise=0.05)[2]),
        "random": t5.load(make(seed=9, num_decoder_layers=1)[2]),
        "nothing": always(untied),
        "constant": always(untied, 17),
        "end": always(untied, 1),
        "NaN": broken(make()[2]),
        "more ids than the target": t5.load(
            make(seed=4, vocab_size=VOCABULARY + 40)[2]
        ),
        "fewer ids than the target": t5.load(
            make(seed=4, vocab_size=VOCABULARY - 40)[2]
        ),
    }
    return {name: ModelDrafter(Checked(each)) for name, each in models.items()}


NAMES = [
    "same",
    "good",
    "random",
    "nothing",
    "constant",
    "end",
    "NaN",
    "more ids than the target",
    "fewer ids than the target",
]


def test_models_that_say_the_same_do(make):
    """The drafts above are what they are called."""
    untied = make(seed=4, untied=True)[2]
    for token in (None, 17):
        session = T5Session(always(untied, token))
        session.start([PROMPTS[0]])
        logits = np.array(session.extend(mx.array([[0, 5, 70]])))[0]
        assert (logits == logits[0]).all()
        assert set(logits.argmax(-1)) == {token or 0}
        assert (np.ptp(logits) > 5) == (token is not None)


@pytest.fixture(scope="module")
def target(tiny):
    return Checked(tiny[1])


def nearest(oracle, request) -> float:
    """How close a search's closest decision is."""
    beams, sampling = request["beams"], request["sampling"]
    found = search(
        Model(oracle, request["prompt"], request["eos_tokens"], sampling),
        request["eos_tokens"],
        beams.num_beams,
        beams.length_penalty,
        beams.early_stopping,
        request["max_tokens"],
        sampling.forced_bos_token_id is not None,
    )
    return found.margin


def any_request(data, oracle, most=8, tokens=16) -> dict:
    prompt = any_prompt(data)
    usual = likely(oracle, prompt)
    max_tokens = data.draw(st.integers(1, tokens))
    plain = data.draw(st.booleans())
    return {
        "prompt": prompt,
        "eos_tokens": any_ends(data, usual),
        "max_tokens": max_tokens,
        "beams": any_beams(data, most),
        "sampling": GREEDY if plain else any_rules(data, usual, max_tokens),
    }


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6)
@given(data=st.data())
def test_speculative_equals_plain(tiny, target, drafters, ties, name, data):
    """Whatever is drafted, good or bad, and however much of it: the n best and their
    scores are those of the target alone."""
    request = any_request(data, tiny[0])
    beams = request["beams"]
    _, plain = decode(target, None, num_draft=0, **request)
    for num_draft in data.draw(st.sets(st.integers(1, 6), min_size=1, max_size=2)):
        _, last = decode(target, drafters[name], num_draft=num_draft, **request)
        alike = same(
            last.hypotheses,
            plain.hypotheses,
            beams,
            lambda: nearest(tiny[0], request),
        )
        ties.count(not alike)
        for ours, its in zip(last.hypotheses, plain.hypotheses, strict=True):
            if alike:
                bound = close(beams.length_penalty, ours.tokens) / 10
                assert abs(ours.score - its.score) < bound
        if alike:
            assert last.stats.rounds <= plain.stats.rounds
            assert last.finish_reason == plain.finish_reason


@pytest.mark.parametrize("num_beams", [2, 4, 8])
def test_a_draft_that_is_right_saves_rounds(target, drafters, num_beams):
    """The same model: what it proposes is what the target finds, up to K steps of it;
    and what is judged stands."""
    never = frozenset({-1})
    options = {"eos_tokens": never, "max_tokens": 24, "beams": Beams(num_beams)}
    few = Counter()
    for prompt in PROMPTS[:4]:
        _, plain = decode(target, None, prompt, num_draft=0, **options)
        assert plain.stats.rounds == 24
        for num_draft in (1, 4):
            _, last = decode(
                target, drafters["same"], prompt, num_draft=num_draft, **options
            )
            assert last.hypotheses[0].tokens == plain.hypotheses[0].tokens
            few[num_draft] += last.stats.rounds <= -(-24 // (num_draft + 1)) + 2
    assert few[1] >= 3 and few[4] >= 3


def test_a_draft_that_is_good_saves_rounds(target, drafters):
    """Of a noisy copy something stands, and not all."""
    options = {"eos_tokens": frozenset({-1}), "max_tokens": 24, "beams": Beams(4)}
    rounds = [
        decode(target, drafters["good"], prompt, num_draft=3, **options)[1].stats.rounds
        for prompt in PROMPTS
    ]
    assert 6 * len(PROMPTS) < sum(rounds) < 22 * len(PROMPTS)


@pytest.mark.parametrize("drafter", ["lookup", "scripted"])
def test_who_cannot_draft_beams_is_not_asked(target, drafter):
    """Texts beside them are still drafted for; the beams go on without."""
    drafters = {
        "lookup": Lookup(),
        "scripted": Scripted(lambda sequence, n: [sequence[-1]] * n),
    }
    request = {
        "eos_tokens": frozenset({1, 3}),
        "max_tokens": 12,
        "beams": Beams(4),
        "prompt": PROMPTS[0],
    }
    _, plain = decode(target, None, num_draft=0, **request)
    _, last = decode(target, drafters[drafter], num_draft=3, **request)
    assert last.hypotheses == plain.hypotheses
    engine = Engine(target, drafters[drafter], num_draft=3, rows=2)
    requests = [Request(**request), Request(PROMPTS[1], frozenset({-1}), 12)]
    _, last = run(engine, requests)
    assert last[0].hypotheses == plain.hypotheses
    assert last[0].stats.drafted == 0
    assert drafter == "lookup" or last[1].stats.drafted > 0


@pytest.mark.parametrize("num_draft", [None, 3])
def test_beams_and_a_policy(target, drafters, num_draft):
    """However much is drafted, by whomever it is decided."""
    request = {
        "eos_tokens": frozenset({1, 3}),
        "max_tokens": 16,
        "beams": Beams(4, early_stopping=True),
    }
    for prompt in PROMPTS:
        _, plain = decode(target, None, prompt, num_draft=0, **request)
        _, last = decode(target, drafters["good"], prompt, **request)
        assert [h.tokens for h in last.hypotheses] == [
            h.tokens for h in plain.hypotheses
        ]


class Lifted:
    """A rule of a caller's own, after which numbers are no log-probabilities: a text
    may gain by going on."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.more = rng.uniform(-0.5, 2.5, VOCABULARY).astype(np.float32)

    def __call__(self, logits, prefix):
        return logits + mx.array(self.more)


@settings(max_examples=6)
@given(data=st.data())
def test_rules_that_lift_scores(tiny, target, drafters, data):
    """Beams without scores are not taken to fall behind there."""
    request = any_request(data, tiny[0], most=5, tokens=10)
    beams, lifted = request["beams"], Lifted(data.draw(st.integers(0, 99)))
    request["sampling"] = replace(request["sampling"], processors=(lifted,))
    model = Model(
        tiny[0], request["prompt"], request["eos_tokens"], request["sampling"]
    )
    found = search(
        lambda prefix: model(prefix) + lifted.more,
        request["eos_tokens"],
        beams.num_beams,
        beams.length_penalty,
        beams.early_stopping,
        request["max_tokens"],
        request["sampling"].forced_bos_token_id is not None,
    )
    for num_draft in (0, 3):
        _, last = decode(target, drafters["good"], num_draft=num_draft, **request)
        same(last.hypotheses, found.hypotheses, beams, lambda: found.margin)


@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("ends", [(), (-5, 10**6, 3)], ids=str)
def test_ends_that_are_no_tokens(tiny, target, drafters, ends, num_draft):
    """Or none at all."""
    request = {"prompt": PROMPTS[0], "max_tokens": 8, "sampling": GREEDY}
    request |= {"eos_tokens": frozenset(ends), "beams": Beams(4)}
    model = Model(tiny[0], PROMPTS[0], {3}, GREEDY)
    found = search(model, set(ends) & {3}, 4, 1.0, False, 8)
    _, last = decode(target, drafters["good"], num_draft=num_draft, **request)
    assert same(last.hypotheses, found.hypotheses, request["beams"], lambda: 1)


@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("num_beams", [40, 64])
def test_more_beams_than_there_are_tokens(tiny, target, drafters, num_beams, num_draft):
    """Or almost: a draft that is to be wider than its target has fewer than it could
    use."""
    request = {"prompt": PROMPTS[0], "max_tokens": 4, "sampling": GREEDY}
    request |= {"eos_tokens": frozenset({1, 3}), "beams": Beams(num_beams)}
    model = Model(tiny[0], PROMPTS[0], {1, 3}, GREEDY)
    found = search(model, {1, 3}, num_beams, 1.0, False, 4)
    _, last = decode(target, drafters["good"], num_draft=num_draft, **request)
    same(last.hypotheses, found.hypotheses, request["beams"], lambda: found.margin)


def test_long_texts(tiny, target, drafters):
    """The caches grow in the middle of a search; what is certain is said before the
    end."""
    beams, ends = Beams(4), frozenset({95})
    expected, table = theirs(tiny[0], PROMPTS[0], beams, ends, 100, GREEDY)
    margin = search(table, ends, 4, 1.0, False, 100).margin
    for name, num_draft in ((None, 0), ("same", 6), ("good", 3), ("random", 2)):
        commits = list(
            generate(
                target,
                name and drafters[name],
                PROMPTS[:1],
                num_draft=num_draft,
                eos_tokens=ends,
                max_tokens=100,
                beams=beams,
            )
        )
        assert same(commits[-1].hypotheses, expected, beams, lambda: margin)
        assert len(commits) > 5
        accepted = sum(commit.accepted for commit in commits)
        assert (accepted > 0) == (name in ("same", "good")) or name == "random"


def test_closing_early_leaves_sessions_that_work(target, drafters):
    """Ctrl-C between rounds, then other texts on the same models."""
    options = {"eos_tokens": frozenset({-1}), "max_tokens": 30}
    for num_draft in (0, 3):
        expected = [
            list(generate(target, None, PROMPTS[:1], num_draft=0, **options, **more))
            for more in ({}, {"beams": Beams(3)})
        ]
        commits = generate(
            target,
            drafters["good"],
            PROMPTS[:2],
            num_draft=num_draft,
            beams=Beams(4),
            **options,
        )
        next(commits)
        commits.close()
        for before, more in zip(expected, ({}, {"beams": Beams(3)}), strict=True):
            after = generate(
                target,
                drafters["good"],
                PROMPTS[:1],
                num_draft=num_draft,
                **options,
                **more,
            )
            tokens = [token for commit in after for token in commit.tokens]
            assert tokens == [token for commit in before for token in commit.tokens]


# Batches.


RULES = [
    {},
    {"sampling": Sampling(repetition_penalty=1.4, no_repeat_ngram_size=2)},
    {"sampling": Sampling(temperature=1.0, seed=3)},
    {"sampling": Sampling(min_new_tokens=4, encoder_no_repeat_ngram_size=2)},
    {"sampling": Sampling(suppress_tokens=(40, 41, 42), bad_words_ids=((7,), (8, 9)))},
]


def alone(session, request):
    """A text's tokens and last commit, without a draft and beside nothing."""
    tokens, last = run(Engine(session, None, num_draft=0), [request])
    return tokens[0], last[0]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@settings(max_examples=6)
@given(data=st.data())
def test_every_text_is_what_it_is_alone(tiny, target, drafters, ties, rows, data):
    """With beams of any number and without, whatever is beside it, before it in its
    rows, and whenever it comes or leaves."""
    name = data.draw(st.sampled_from([None, "same", "good", "random", "NaN"]))
    requests = []
    for place in range(data.draw(st.integers(1, 8))):
        asked = any_request(data, tiny[0], most=4)
        beams = data.draw(st.sampled_from([None, 2, 4]))
        asked["beams"] = beams and replace(asked["beams"], num_beams=beams)
        if beams is None:
            asked |= data.draw(st.sampled_from(RULES))
        requests.append(Request(**asked, stream=(place,)))
    admit_at = [data.draw(st.integers(0, 10)) for _ in requests]
    places = st.lists(st.integers(0, len(requests) - 1), max_size=2)
    cancel_at = data.draw(st.dictionaries(st.integers(1, 15), places, max_size=2))
    gone = {place for places in cancel_at.values() for place in places}
    num_draft = data.draw(st.integers(0, 5))
    engine = Engine(target, name and drafters[name], num_draft=num_draft, rows=rows)
    tokens, last = run(engine, requests, admit_at, cancel_at)
    for place, request in enumerate(requests):
        beams = request.beams
        expected, end = alone(Checked(tiny[1]), request)
        got = tokens.get(place, [])
        reason = place in last and last[place].finish_reason
        if place in gone and not reason:
            assert got == expected[: len(got)]
            continue
        assert reason == end.finish_reason
        if beams is None:
            assert got == expected
            continue
        asked = {
            "prompt": request.prompt,
            "eos_tokens": request.eos_tokens,
            "max_tokens": request.max_tokens,
            "beams": beams,
            "sampling": request.sampling,
        }
        check(got, last[place], beams, request.eos_tokens, request.max_tokens)
        alike = same(
            last[place].hypotheses,
            end.hypotheses,
            beams,
            lambda asked=asked: nearest(tiny[0], asked),
        )
        ties.count(not alike)


@pytest.mark.parametrize("num_draft", [1, 5])
@pytest.mark.parametrize("most", [1, 4])
def test_ends_of_their_own(target, drafters, most, num_draft):
    """What is known of a beam has as many ends as the batch had then."""
    long = Request(PROMPTS[0], frozenset({1}), 12, beams=Beams(2))
    short = Request(PROMPTS[0], frozenset({1, 60, 61, 62}), most, beams=Beams(2))
    for requests in ([long, short, long], [short, long, short, long]):
        engine = Engine(target, drafters["good"], num_draft=num_draft, rows=2)
        tokens, _ = run(engine, requests)
        for place, request in enumerate(requests):
            assert tokens[place] == alone(target, request)[0]


@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_nobody_starves(target, drafters, rows, num_draft):
    """Those that came first are not overtaken by more than there is room for, and one
    that is short does not wait for a long one that it is beside."""
    never = frozenset({-1})
    requests = []
    for place in range(12):
        beams = (None, Beams(4), None, Beams(2))[place % 4]
        requests.append(Request(PROMPTS[place % 8], never, 6, beams=beams))
    engine = Engine(target, drafters["good"], num_draft=num_draft, rows=rows)
    ids = [engine.admit(request) for request in requests]
    ended, steps = [], 0
    while engine.busy:
        ended += [commit.id for commit in engine.step() if commit.finish_reason]
        steps += 1
        # Even one after the other they would take no longer, encoding counted.
        assert steps <= 12 * (6 + 2)
    assert sorted(ended) == ids
    for place, number in enumerate(ended):
        assert abs(place - number) <= max(rows, 4) + 4


@pytest.mark.parametrize("num_draft", [0, 2])
@pytest.mark.parametrize("beams", [None, Beams(2), Beams(4)])
def test_a_short_text_ends_beside_a_long_one(target, drafters, beams, num_draft):
    """Of as many beams, or none: others come after those."""
    never = frozenset({-1})
    engine = Engine(target, drafters["good"], num_draft=num_draft, rows=8)
    slow = engine.admit(Request(PROMPTS[0], never, 60, beams=beams))
    quick = engine.admit(Request(PROMPTS[1], never, 4, beams=beams))
    other = engine.admit(Request(PROMPTS[1], never, 4, beams=Beams(3)))
    late, ended = None, []
    while engine.busy:
        ended += [c.id for c in engine.step() if c.finish_reason]
        if late is None and ended == [quick]:
            late = engine.admit(Request(PROMPTS[2], never, 4, beams=beams))
    assert ended.index(quick) < ended.index(slow) < ended.index(other)
    assert sorted(ended) == [slow, quick, other, late]


def test_cancelled_searches_leave_nothing(target, drafters):
    """Before they begin, in the middle and at once; who comes after is unharmed."""
    never = frozenset({-1})
    request = Request(PROMPTS[0], never, 12, beams=Beams(4))
    _, expected = alone(target, request)
    engine = Engine(target, drafters["good"], num_draft=3, rows=4)
    for steps in range(4):
        numbers = [engine.admit(request) for _ in range(3)]
        for _ in range(steps):
            engine.step()
        for number in numbers:
            engine.cancel(number)
        assert not engine.busy
        assert engine.step() == []
    _, last = run(engine, [request])
    assert [h.tokens for h in last[0].hypotheses] == [
        h.tokens for h in expected.hypotheses
    ]


# What goes wrong.


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": Sampling(temperature=0.7)},
        {"sampling": Sampling(temperature=1.0, seed=3)},
        {"delta": 0.1},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_what_does_not_go_with_beams(target, options):
    with pytest.raises(InputError):
        Request(PROMPTS[0], frozenset({1}), **options, beams=Beams(2))
    with pytest.raises(InputError):
        list(
            generate(
                target,
                None,
                PROMPTS[:1],
                eos_tokens=frozenset({1}),
                beams=Beams(2),
                **options,
            )
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoder_only_models_have_no_beams(tmp_path, kind):
    """Refused when it is asked for, not later; others are unharmed."""
    tiny_causal(kind).save_pretrained(tmp_path)
    session = CausalSession(causal_model.load(tmp_path).model, VOCABULARY)
    engine = Engine(session, None, rows=2)
    with pytest.raises(InputError):
        engine.admit(Request(PROMPTS[0], frozenset({1}), 5, beams=Beams(2)))
    tokens, last = run(engine, [Request(PROMPTS[0], frozenset({-1}), 5)])
    assert len(tokens[0]) == 5 and last[0].error is None


@pytest.mark.parametrize("num_draft", [0, 3])
def test_broken_weights_are_named(make, drafters, num_draft):
    """Not searched in for ever; the engine goes on."""
    session = Checked(broken(make()[2]))
    options = {"eos_tokens": frozenset({1}), "max_tokens": 8, "beams": Beams(3)}
    with pytest.raises(InputError, match="not finite"):
        list(
            generate(
                session, drafters["good"], PROMPTS[:1], num_draft=num_draft, **options
            )
        )
    engine = Engine(session, drafters["good"], num_draft=num_draft, rows=4)
    requests = [Request(prompt, **options) for prompt in PROMPTS[:6]]
    _, last = run(engine, requests)
    assert {last[place].finish_reason for place in range(6)} == {"error"}
    assert all(last[place].hypotheses == () for place in range(6))


#: That a token's embedding is NaN in the models of some tests.
POISON = 95


def poison(folder, banned=()):
    """A target that makes NaN of one token, and of that alone."""
    loaded = t5.load(folder)
    weight = np.array(loaded.embedding.weight)
    weight[POISON] = np.nan
    loaded.embedding.weight = mx.array(weight)
    return T5Session(loaded, banned=banned)


@pytest.fixture(scope="module")
def untied(make):
    return make(seed=5, untied=True)


@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_search_that_fails_fails_alone(untied, num_draft, rows):
    """Its neighbours go on, and who comes into its rows is not touched."""
    clean = Checked(t5.load(untied[2]), banned=(POISON,))
    session = poison(untied[2], banned=(POISON,))
    drafter = ModelDrafter(Checked(t5.load(untied[2])))
    bad, never = [4, POISON, 5], frozenset({-1})
    prompts = [PROMPTS[0], bad, PROMPTS[1], *PROMPTS[2:5], bad, *PROMPTS[:3]]
    requests = [
        Request(prompt, never, 8, beams=(Beams(3), None, Beams(2))[place % 3])
        for place, prompt in enumerate(prompts)
    ]
    tokens, last = run(
        Engine(session, drafter, num_draft=num_draft, rows=rows), requests
    )
    for place, request in enumerate(requests):
        if request.prompt is bad:
            assert "not finite" in str(last[place].error)
            assert last[place].finish_reason == "error"
        else:
            assert tokens[place] == alone(clean, request)[0]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_drafted_token_that_is_poison_does_no_harm(untied, rows):
    """A draft full of what the target never says and makes NaN of."""
    clean = Checked(t5.load(untied[2]), banned=(POISON,))
    session = poison(untied[2], banned=(POISON,))
    drafter = ModelDrafter(T5Session(always(untied[2], POISON)))
    requests = [
        Request(prompt, frozenset({1, 3}), 9, beams=beams)
        for prompt in PROMPTS[:4]
        for beams in (Beams(2), Beams(4), None)
    ]
    tokens, last = run(Engine(session, drafter, num_draft=3, rows=rows), requests)
    for place, request in enumerate(requests):
        assert last[place].error is None
        assert tokens[place] == alone(clean, request)[0]


def test_a_beam_that_is_poison(untied):
    """One that the target itself goes on with: named, with any draft."""
    session = poison(untied[2])
    drafter = ModelDrafter(Checked(t5.load(untied[2])))
    options = {"sampling": Sampling(forced_bos_token_id=POISON), "beams": Beams(3)}
    for num_draft in (0, 3):
        engine = Engine(session, drafter, num_draft=num_draft, rows=2)
        requests = [
            Request(PROMPTS[0], frozenset({1}), 8, **options),
            Request(PROMPTS[1], frozenset({1}), 1, **options),
        ]
        _, last = run(engine, requests)
        assert "not finite" in str(last[0].error)
        assert last[1].hypotheses == (([POISON], 0.0, "length"),)


def test_a_prompt_that_cannot_be_begun_with(target, drafters):
    """An id that does not exist, no token at all: named, the others unharmed."""
    options = {"eos_tokens": frozenset({1}), "max_tokens": 6, "beams": Beams(3)}
    prompts = [PROMPTS[0], [VOCABULARY + 7], PROMPTS[1], []]
    requests = [Request(prompt, **options) for prompt in prompts]
    engine = Engine(target, drafters["good"], num_draft=2, rows=4)
    tokens, last = run(engine, requests)
    assert "token id" in str(last[1].error)
    assert "empty" in str(last[3].error)
    for place in (0, 2):
        assert tokens[place] == alone(target, requests[place])[0]


@pytest.mark.parametrize("num_draft", [0, 3])
def test_nothing_left_to_choose(target, drafters, num_draft):
    """Named, where not even one text is left; its neighbour is unharmed."""
    everything = Sampling(suppress_tokens=tuple(range(VOCABULARY)))
    odd = Request(PROMPTS[0], {1}, 5, sampling=everything, beams=Beams(3))
    fine = Request(PROMPTS[1], {1}, 5, beams=Beams(3))
    engine = Engine(target, drafters["good"], num_draft=num_draft, rows=4)
    tokens, last = run(engine, [odd, fine])
    assert "no token is left" in str(last[0].error)
    assert tokens[1] == alone(target, fine)[0]


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("num_draft", [0, 3])
def test_fewer_texts_than_beams(tiny, target, drafters, left, num_draft):
    """All that there are, each once, with any draft."""
    tokens = [1, 30, 31][:left]
    banned = tuple(token for token in range(VOCABULARY) if token not in tokens)
    for max_tokens in (1, 2, 3):
        request = {
            "prompt": PROMPTS[0],
            "eos_tokens": frozenset({1}),
            "max_tokens": max_tokens,
            "sampling": Sampling(suppress_tokens=banned),
            "beams": Beams(8, early_stopping="never"),
        }
        texts = {()}
        whole = set()
        for _ in range(max_tokens):
            texts = {(*text, token) for text in texts for token in tokens}
            whole |= {text for text in texts if text[-1] == 1}
            texts -= whole
        whole |= texts
        _, last = decode(target, drafters["good"], num_draft=num_draft, **request)
        found = {tuple(each.tokens) for each in last.hypotheses}
        if len(whole) <= 8:
            assert found == whole
        else:
            assert found <= whole and len(found) == 8


# From a prompt's text.


@pytest.fixture(scope="module")
def pair(make):
    return Pair.load(str(make()[2]), str(make(noise=0.05)[2]))


TEXTS = ["the cat", "sat on the cat", "b c e t s", "a a a b"]


@pytest.mark.parametrize("num_draft", [None, 0, 3])
def test_a_pair_searches(tiny, pair, num_draft):
    """The best text, the n best with their scores, and many prompts: as transformers
    has them."""
    beams = Beams(4, length_penalty=0.6)
    options = {"beams": beams, "max_tokens": 12, "num_draft": num_draft}
    best = []
    for text in TEXTS:
        ids = pair.tokenizer.encode(text)
        expected, _ = theirs(tiny[0], ids, beams, pair.eos_tokens, 12, GREEDY)
        (first, score), *_ = expected
        answer = pair.generate(text, **options).finish()
        assert answer.tokens == first
        assert abs(answer.score - score) < 1e-4
        best.append(first)
        for count in (1, 3, 4):
            found = [each.finish() for each in pair.samples(text, count, **options)]
            assert [each.tokens for each in found] == [
                tokens for tokens, _ in expected[:count]
            ]
            for each, (_, score) in zip(found, expected, strict=False):
                assert abs(each.score - score) < 1e-4
    for size in (None, 1, 3):
        answers = pair.answers(TEXTS, batch_size=size, **options)
        assert [answer.tokens for answer in answers] == best
    assert pair.generate(TEXTS[0], max_tokens=3).finish().score is None


@pytest.mark.parametrize("count", [3, 5])
def test_more_answers_than_beams(pair, count):
    with pytest.raises(InputError):
        [each.finish() for each in pair.samples(TEXTS[0], count, beams=Beams(2))]


def test_a_deep_text_that_nobody_drafts_for(tiny, make):
    """It has a longer path for the rules than those beside it that are drafted for:
    the draft has no room for its prompt."""
    beams, sampling = Beams(3, early_stopping="never"), Sampling(no_repeat_ngram_size=3)
    long, short = [*range(10, 60), 1], [5, 9, 1]

    def request(prompt):
        return Request(prompt, frozenset({1}), 20, sampling=sampling, beams=beams)

    def texts(drafter, rows, at):
        engine = Engine(Checked(tiny[1]), drafter, num_draft=2, rows=rows)
        _, last = run(engine, [request(long), request(short)], at)
        return [last[place].hypotheses for place in range(2)], last

    drafter = ModelDrafter(Checked(t5.load(make(noise=0.05)[2])))
    drafter.positions = 20
    got, last = texts(drafter, 2, [0, 6])
    alone, _ = texts(None, 1, [0, 0])
    assert [[each.tokens for each in its] for its in got] == [
        [each.tokens for each in its] for its in alone
    ]
    assert last[0].stats.drafted == last[0].stats.tested == 0
    assert 0 < last[1].stats.accepted <= last[1].stats.tested


def test_a_draft_that_no_search_uses_reads_no_newcomer(tiny, make):
    """Whether it pays is another question for plain texts, whose policy says nothing
    of searches."""

    class Counted(ModelDrafter):
        read = 0

        def prepare(self, prompts):
            self.read += len(prompts)
            return super().prepare(prompts)

    its = Cycle(2, *[0] * 100)
    its.drafting = False
    policy = Fixed(2)
    policy.of = lambda width: its
    drafter = Counted(T5Session(t5.load(make(noise=0.05)[2])))
    engine = Engine(Checked(tiny[1]), drafter, num_draft=policy, rows=2)
    beams = Beams(3, early_stopping="never")
    requests = [Request(prompt, frozenset({-1}), 20, beams=beams) for prompt in PROMPTS]
    _, last = run(engine, requests[:3], [0, 4, 9])
    assert last[0].stats.drafted == 2 and drafter.read == 0

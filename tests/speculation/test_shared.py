"""Shared noise: the law of what is chosen by it, and what it depends on.

The seeds are fixed, so a test passes always or never. For other seeds each chi-square
test would fail by chance with probability LEAST.
"""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import mlx.core as mx
import numpy as np
import pytest
from law import END, PROMPT, WAYS, TinyPair, chi_square, exact_law, sample

from architectures.t5_session import T5Session
from decoder import generate
from speculation import samplers
from speculation.drafting import ModelDrafter
from speculation.requests import Request
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.sampling import GREEDY, Sampling, gumbel
from system.errors import InputError

LEAST = 1e-4
STREAMS = 3000
SHARED = Sampling(temperature=1.0, coupling="shared")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return TinyPair.make(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("coupling", [None, "residual", "shared"])
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_which_coupling(seed, coupling, delta):
    """And what it is does not get lost with the seed, which rows do not share."""
    sampling = Sampling(temperature=1.0, seed=seed, coupling=coupling)
    if (coupling, delta) == ("shared", 0.5):
        for refuse in (Request, Rules):
            with pytest.raises(InputError, match="coupling is shared"):
                refuse(
                    *(([5], frozenset(), 9) if refuse is Request else (8,)),
                    sampling=sampling,
                    delta=delta,
                )
        Request([5], frozenset(), 9, delta, replace(sampling, temperature=0.0))
        return
    by_default = "shared" if seed == 3 and delta == 0 else "residual"
    assert sampling.coupling_at(delta) == (coupling or by_default)
    resolved = replace(sampling, seed=None, coupling=sampling.coupling_at(delta))
    assert resolved.coupling_at(delta) == sampling.coupling_at(delta)
    assert replace(sampling, temperature=0.0).coupling_at(delta) is None


def choices(logits, positions=2, seed=0, streams=range(STREAMS), sampling=SHARED):
    """What is chosen by the same logits (V,): (streams, positions)."""
    rules = Rules(len(logits), sampling)
    rows = [RowSampler(rules, [0], seed=seed, stream=(each,)) for each in streams]
    sampler = RoundSampler(rows, positions)
    every = mx.broadcast_to(mx.array(logits, mx.float32), (len(rows), len(logits)))
    tokens = []
    for _ in range(positions):
        tokens.append(sampler.draft(every, tokens)[0])
    return np.stack(tokens, axis=1)


def law_p_value(seen, law) -> float:
    counts = Counter((int(token),) for token in np.ravel(seen))
    return chi_square(counts, {(token,): p for token, p in enumerate(law) if p > 0})


def test_each_choice_is_a_draw():
    """From laws written out here, rare and banned tokens among them, also through the
    filters."""
    law = np.array([0.4, 0, 0.3, 0.2, 0.09, 0.009, 0.001])
    with np.errstate(divide="ignore"):
        logits = np.log(law) + 3
    assert law_p_value(choices(logits), law) > LEAST
    nucleus = np.where(law >= 0.2, law, 0) / 0.9
    for narrowed in ({"top_k": 3}, {"top_p": 0.85}, {"min_p": 0.4}):
        seen = choices(logits, sampling=replace(SHARED, **narrowed))
        assert law_p_value(seen, nucleus) > LEAST
    warm = law**2 / (law**2).sum()
    seen = choices(logits, sampling=replace(SHARED, temperature=0.5))
    assert law_p_value(seen, warm) > LEAST
    assert law_p_value(choices(logits), warm) < LEAST  # the test can tell them apart


def independence_p_values():
    """Of pairs of choices among four: of positions, and of neighbouring streams."""
    seen = choices(np.zeros(4), positions=4)
    even = {(a, b): 1 / 16 for a in range(4) for b in range(4)}
    paired = [seen[:, list(both)] for both in combinations(range(seen.shape[1]), 2)]
    paired += [np.stack([seen[:-1:2, k], seen[1::2, k]], axis=1) for k in range(2)]
    for pairs in paired:
        yield chi_square(Counter(map(tuple, pairs.tolist())), even)


def test_choices_are_independent():
    assert min(independence_p_values()) > LEAST
    others = [choices(np.zeros(4), seed=seed) for seed in range(3)]
    even = {(a, b): 1 / 16 for a in range(4) for b in range(4)}
    for one, other in combinations(others, 2):
        both = Counter(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True))
        assert chi_square(both, even) > LEAST


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 97, 32128])
def test_noise_of_a_row_is_its_own(vocabulary):
    """Bit by bit the same alone and in a batch, and never without bounds."""
    rules = Rules(vocabulary, SHARED)
    keys = np.concatenate(
        [RowSampler(rules, [0], seed=9, stream=(s, 1)).keys(0, 3) for s in range(5)]
    )
    together = np.array(gumbel(mx.array(keys), vocabulary))
    for key, noise in zip(keys, together, strict=True):
        assert np.array_equal(gumbel(mx.array(key[None]), vocabulary)[0], noise)
    assert np.isfinite(together).all()
    assert len(np.unique(together[:, 0])) == len(keys)


@pytest.mark.parametrize("seed", [0, 1, 2**64, 10**40])
@pytest.mark.parametrize("stream", [(), (0,), (3, 1), (2**70, 5)])
def test_keys_are_of_positions(seed, stream):
    """However the text came there: the rounds do not matter, nor what it begins with,
    nor whether its tokens are kept for processors."""
    plain, penalized = (
        Rules(8, replace(SHARED, repetition_penalty=penalty)) for penalty in (1.0, 2.0)
    )
    row = RowSampler(plain, [0], seed=seed, stream=stream)
    keys = row.keys(0, 9)
    assert len({tuple(key) for key in keys.tolist()}) == 9
    other = RowSampler(penalized, [4, 5, 6], seed=seed, stream=stream)
    done = 0
    for size in (1, 3, 2):
        for each in (row, other):
            assert np.array_equal(each.keys(0, 3), keys[done : done + 3])
            assert np.array_equal(each.keys(1, 1), keys[done + 1 : done + 2])
            each.append([3] * size)
        done += size


def test_one_token_is_left():
    """The only one that is not banned is chosen, whatever its noise."""
    logits = np.full(50, -np.inf)
    logits[31] = -5
    assert (choices(logits) == 31).all()


def test_a_narrow_or_wide_draft():
    """The draft's noise is the target's, whatever padding its vocabulary has."""
    rules = Rules(12, SHARED)
    logits = mx.random.normal((3, 20), key=mx.random.key(3))

    def drafted(size):
        rows = [RowSampler(rules, [0], stream=(each,)) for each in range(3)]
        return RoundSampler(rows, 1).draft(logits[:, :size], [])[0]

    assert mx.array_equal(drafted(20), drafted(12)).item()
    cut = mx.where(mx.arange(12) < 9, logits[:, :12], -mx.inf)
    rows = [RowSampler(rules, [0], stream=(each,)) for each in range(3)]
    assert mx.array_equal(drafted(9), RoundSampler(rows, 1).draft(cut, [])[0]).item()


LEGIT = [
    ("temperature 1", None, 0),
    ("top-k 5, top-p 0.8", "model", 4),
    ("no bigram twice", None, 0),
]


@pytest.mark.parametrize("way, kind, num_draft", LEGIT)
def test_law_is_the_targets(pair, way, kind, num_draft):
    """The joint law of the first tokens, against transformers' logits."""
    sampling = replace(WAYS[way], seed=1)
    seen, *_ = sample(pair, kind and pair.drafter, sampling, num_draft, STREAMS)
    assert chi_square(seen, exact_law(pair, sampling)) > LEAST


def require_the_same_text(pair) -> None:
    """Alone and in a batch, plain and with drafts; and what the target's own model
    drafts stands."""

    def texts(drafter, num_draft, streams):
        found, stood, tested = [[] for _ in streams], 0, 0
        for commit in generate(
            pair.target,
            drafter,
            [PROMPT] * len(streams),
            eos_tokens={END},
            max_tokens=9,
            num_draft=num_draft,
            sampling=replace(WAYS["temperature 1"], seed=8),
            streams=streams,
        ):
            found[commit.id] += commit.tokens
            if commit.finish_reason:
                stood += commit.stats.accepted
                tested += commit.stats.tested
        return found, stood, tested

    streams = [(each,) for each in range(12)]
    plain = texts(None, 0, streams)[0]
    assert [texts(None, 0, [each])[0][0] for each in streams] == plain
    for num_draft in (1, 4):
        assert texts(pair.drafter, num_draft, streams)[0] == plain
    same = ModelDrafter(T5Session(pair.target.model))
    found, stood, tested = texts(same, 3, streams)
    assert (found, stood) == (plain, tested)


def test_the_same_text(pair):
    require_the_same_text(pair)


def noise_of_rounds(monkeypatch):
    def keys(self, ahead, count):
        self._round += 1
        return self._random.keys(9 * self._round, count)

    monkeypatch.setattr(RowSampler, "keys", keys)


def the_round_ahead_is_one_behind(monkeypatch):
    keys = RowSampler.keys
    monkeypatch.setattr(RowSampler, "keys", lambda self, _, n: keys(self, 0, n))


def a_position_too_far_with_drafts(monkeypatch):
    keys = RowSampler.keys
    monkeypatch.setattr(
        RowSampler, "keys", lambda self, ahead, n: keys(self, ahead + (n > 1), n)
    )


def other_noise_for_the_draft(monkeypatch):
    draft = samplers._Group.draft

    def broken(self, logits, drafted):
        noise, keys = self._noise, self._keys
        self._noise, self._keys = [], self._keys + 1
        token = draft(self, logits, drafted)
        self._noise, self._keys = noise, keys
        return token

    monkeypatch.setattr(samplers._Group, "draft", broken)


def noise_of_places_in_the_batch(monkeypatch):
    def noise(keys, vocabulary):
        return gumbel(
            keys + mx.arange(len(keys))[:, None].astype(mx.uint32), vocabulary
        )

    monkeypatch.setattr(samplers, "gumbel", noise)


def one_draft_token_more(monkeypatch):
    verify = samplers.verify_chosen

    def broken(chosen, draft, counts, finite):
        verdict = verify(chosen, draft, counts, finite)
        more = mx.minimum(verdict.accepted + 1, draft.shape[1])
        return verdict._replace(accepted=more)

    monkeypatch.setattr(samplers, "verify_chosen", broken)


@pytest.mark.parametrize(
    "breakage",
    [
        noise_of_rounds,
        the_round_ahead_is_one_behind,
        a_position_too_far_with_drafts,
        other_noise_for_the_draft,
        noise_of_places_in_the_batch,
        one_draft_token_more,
    ],
    ids=lambda value: value.__name__,
)
def test_another_text_is_noticed(pair, monkeypatch, breakage):
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        require_the_same_text(pair)


def the_same_noise_everywhere(monkeypatch):
    keys = RowSampler.keys
    monkeypatch.setattr(
        RowSampler, "keys", lambda self, ahead, n: keys(self, ahead, 1).repeat(n, 0)
    )


def noise_of_pairs_of_streams(monkeypatch):
    before = RowSampler.__init__

    def begin(self, rules, start, prompt=(), seed=0, stream=(0,)):
        before(self, rules, start, prompt, seed, (stream[0] // 2,))

    monkeypatch.setattr(RowSampler, "__init__", begin)


@pytest.mark.parametrize(
    "breakage", [the_same_noise_everywhere, noise_of_pairs_of_streams]
)
def test_dependence_is_noticed(monkeypatch, breakage):
    breakage(monkeypatch)
    assert min(independence_p_values()) < LEAST / 100


def exponentials(keys, vocabulary):
    return mx.exp(-gumbel(keys, vocabulary))


def uniforms(keys, vocabulary):
    return mx.exp(-mx.exp(-gumbel(keys, vocabulary)))


@pytest.mark.parametrize("noise", [exponentials, uniforms])
def test_another_noise_is_noticed(monkeypatch, noise):
    law = np.array([0.5, 0.3, 0.2])
    monkeypatch.setattr(samplers, "gumbel", noise)
    assert law_p_value(choices(np.log(law), streams=range(1000)), law) < LEAST / 100


def test_greedy_has_no_noise():
    assert not Rules(8, replace(GREEDY, seed=3)).shared

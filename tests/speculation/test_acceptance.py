"""acceptance.py against the rule written out in plain Python."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.acceptance import accept_probability, residual, verify, verify_greedy


def expected(logits: np.ndarray, draft: list[int], delta: float) -> tuple[int, int]:
    """(accepted, next token) of one row, token by token."""
    for place, token in enumerate(draft):
        row = logits[place]
        stands = token == int(row.argmax())
        if delta > 0 and 0 <= token < len(row) and math.isfinite(row[token]):
            least = -math.inf if delta == 1 else math.log1p(-delta)
            stands = stands or row[token] >= row.max() + np.float32(least)
        if not stands:
            return place, int(row.argmax())
    return len(draft), int(logits[len(draft)].argmax())


@st.composite
def rounds(draw):
    rows, size, vocabulary = (draw(st.integers(1, 4)) for _ in range(3))
    size -= 1
    # Few distinct values, so that ties and near misses are common.
    value = st.sampled_from([-math.inf, -2.0, -1.0, -0.5, 0.0, 0.25])
    shape = (rows, size + 1, vocabulary + 1)
    logits = draw(st.lists(value, min_size=math.prod(shape), max_size=math.prod(shape)))
    logits = np.array(logits, np.float32).reshape(shape)
    logits[..., 0] = np.maximum(logits[..., 0], -3)  # a row has a finite logit
    token = st.integers(-1, vocabulary + 2)
    draft = [draw(st.lists(token, min_size=size, max_size=size)) for _ in range(rows)]
    counts = [draw(st.integers(0, size)) for _ in range(rows)]
    return logits, draft, counts, draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))


@given(rounds())
def test_greedy_rule(case):
    """Every index of rejection, ragged counts, ids outside the vocabulary, bans."""
    logits, draft, counts, delta = case
    tokens = mx.array(np.array(draft, np.int32).reshape(len(draft), -1))
    full = verify_greedy(mx.array(logits), tokens, None, delta)
    ragged = verify_greedy(mx.array(logits), tokens, mx.array(counts), delta)
    for row in range(len(draft)):
        got = full.accepted[row].item(), full.next_token[row].item()
        assert got == expected(logits[row], draft[row], delta)
        got = ragged.accepted[row].item(), ragged.next_token[row].item()
        assert got == expected(logits[row], draft[row][: counts[row]], delta)
    assert full.finite.tolist() == [logits.shape[1]] * len(draft)


@pytest.mark.parametrize("probability, stands", [(0.51, True), (0.49, False)])
def test_delta_is_a_share_of_the_best_probability(probability, stands):
    """delta 0.5 accepts a token at least half as probable as the best one."""
    best = 1 / (1 + probability)
    logits = mx.log(mx.array([[[best, probability * best], [0.5, 0.5]]]))
    verdict = verify_greedy(logits, mx.array([[1]]), None, 0.5)
    assert verdict.accepted.item() == stands


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_reported(bad):
    """argmax over NaN returns a token as if nothing were wrong."""
    logits = np.zeros((2, 3, 5), np.float32)
    logits[1, 2, 3] = bad  # among finite ones
    verdict = verify_greedy(mx.array(logits), mx.zeros((2, 2), mx.int32), None, 0.0)
    assert verdict.finite.tolist() == [3, 2]
    logits[1, 2] = -math.inf  # nothing left to emit
    logits[0, 0] = -math.inf
    verdict = verify_greedy(mx.array(logits), mx.zeros((2, 2), mx.int32), None, 0.0)
    assert verdict.finite.tolist() == [0, 2]


def test_half_precision_logits():
    """The threshold is computed in float32: bfloat16 near 100 has steps of 0.5."""
    logits = mx.array([[[100.0, 99.5], [0.0, 1.0]]]).astype(mx.bfloat16)
    verdict = verify_greedy(logits, mx.array([[1]]), None, 0.3)  # log(0.7) = -0.36
    assert verdict.accepted.item() == 0


def laws(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """(count, size) distributions: spread, peaked, with zeros, one-hot."""
    weights = rng.exponential(size=(count, size)) ** rng.choice([0.1, 1, 6], (count, 1))
    zeros = rng.random((count, size)) < rng.choice([0, 0.3, 0.8], (count, 1))
    weights = np.where(zeros, 0, weights)
    weights[np.arange(count), rng.integers(0, size, count)] += 0.1  # never all zero
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_emitted_law(size, delta):
    """What one draft token and its replacement emit, added up over all tokens."""
    rng = np.random.default_rng(size)
    p, q = laws(rng, 1000, size), laws(rng, 1000, size)
    q[:100] = p[:100]  # nothing left to the residual
    q[100:150] = 0  # the token after the draft
    near = p[150:250] * (1 + 1e-6 * rng.standard_normal((100, size)))
    q[150:250] = near / near.sum(-1, keepdims=True)
    stands = np.array(accept_probability(mx.array(p), mx.array(q), delta), np.float64)
    after = np.array(residual(mx.array(p), mx.array(q)), np.float64)
    assert ((stands >= 0) & (stands <= 1)).all()
    assert np.abs(after.sum(-1) - 1).max() < 1e-5
    emitted = q * stands + (1 - (q * stands).sum(-1, keepdims=True)) * after
    if delta == 0:
        assert np.abs(emitted - p).max() < 1e-6
    if delta < 1:
        assert (emitted <= p / (1 - delta) + 1e-6).all()
    proper = np.ones(len(p), bool)
    proper[100:150] = False  # a q of zeros is no distribution
    from_p = np.abs(emitted - p)[proper].sum(-1) / 2
    bound = np.minimum(delta, np.abs(p - q)[proper].sum(-1) / 2)
    assert (from_p <= bound + 1e-6).all()
    if delta == 1:
        assert np.abs(emitted - q)[proper].max() < 1e-6


def test_broken_draft_leaves_the_targets_law():
    """q of NaN: its token is rejected, and p itself replaces it."""
    p, q = mx.array([0.25, 0.75]), mx.array([math.nan, math.nan])
    for delta in (0.0, 0.5):
        assert accept_probability(p, q, delta).tolist() == [0, 0]
    assert residual(p, q).tolist() == [0.25, 0.75]


@st.composite
def sampled_rounds(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows, size, vocabulary = (draw(st.integers(1, 4)) for _ in range(3))
    size -= 1
    p = laws(rng, rows * (size + 1), vocabulary).reshape(rows, size + 1, vocabulary)
    q = laws(rng, rows * size, vocabulary).reshape(rows, size, vocabulary)
    token = st.integers(-1, vocabulary)  # some do not exist
    draft = [draw(st.lists(token, min_size=size, max_size=size)) for _ in range(rows)]
    uniform = rng.random((rows, size + 1), np.float32)
    return p, q, draft, uniform, draw(st.sampled_from([0.0, 0.4, 1.0])), rng


def reference(p, q, draft, allowed, uniform, delta) -> tuple[int, int]:
    """(accepted, next token) of one row, token by token."""
    last = p[len(draft)]
    accepted = len(draft)
    for place, token in enumerate(draft):
        stands = 0.0
        if 0 <= token < p.shape[-1] and allowed[place]:
            of_q = 1.0 if q is None else q[place, token]
            least = (1 - delta) * of_q
            of_p = p[place, token]
            stands = 1.0 if delta == 1 or of_p >= least > 0 else 0.0
            if delta < 1 and least > of_p:
                stands = of_p / least
            if delta < 1 and of_p > 0 == least:
                stands = 1.0
        if not uniform[1 + place] < stands:
            rejected = np.zeros(p.shape[-1], np.float32)
            if q is not None:
                rejected = q[place]
            elif 0 <= token < p.shape[-1]:
                rejected[token] = 1
            left = np.maximum(p[place] - rejected, 0)
            last = left if left.sum() > 0 else p[place]
            accepted = place
            break
    cumulative = np.cumsum(last, dtype=np.float32)
    return accepted, int(np.argmax(cumulative >= cumulative[-1] * (1 - uniform[0])))


@given(sampled_rounds())
def test_sampled_rule(case):
    """Ragged counts, certain drafts, bans, ids outside the vocabulary."""
    p, q, draft, uniform, delta, rng = case
    tokens = mx.array(np.array(draft, np.int32).reshape(len(draft), -1))
    size = tokens.shape[1]
    counts = rng.integers(0, size + 1, len(draft)).tolist()
    allowed = rng.random((len(draft), size)) < 0.8
    all_allowed = np.ones_like(allowed)
    arrays = mx.array(p), tokens
    random = delta, mx.array(uniform)
    for of_q in (q, None):
        told = None if of_q is None else mx.array(of_q)
        full = verify(*arrays, told, None, *random)
        ragged = verify(*arrays, told, mx.array(counts), *random, mx.array(allowed))
        for row in range(len(draft)):
            its_q = None if of_q is None else of_q[row]
            numbers = uniform[row], delta
            expect = reference(p[row], its_q, draft[row], all_allowed[row], *numbers)
            assert (full.accepted[row].item(), full.next_token[row].item()) == expect
            cut = draft[row][: counts[row]]
            expect = reference(p[row], its_q, cut, allowed[row], *numbers)
            got = ragged.accepted[row].item(), ragged.next_token[row].item()
            assert got == expect


def test_probabilities_that_are_nan_are_reported():
    p = np.full((2, 3, 4), 0.25, np.float32)
    p[1, 1] = math.nan
    tokens, uniform = mx.zeros((2, 2), mx.int32), mx.zeros((2, 3))
    verdict = verify(mx.array(p), tokens, None, None, 0.0, uniform)
    assert verdict.finite.tolist() == [3, 1]

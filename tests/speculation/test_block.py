"""verify_block() against the published algorithm, and the law that comes of it.

Sun et al., arXiv 2403.10444. Every block that a draft can be is enumerated: a tree,
with a p and a q of its own behind every prefix, hostile ones among them.
"""

import math
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from speculation import acceptance
from speculation.acceptance import Draft, accept_probability, verify, verify_block
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.sampling import Sampling

NEVER = 1.0  # no h is above


def laws(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """(*shape, V) distributions: spread, peaked, with zeros, one-hot."""
    each = (*shape[:-1], 1)
    weights = rng.exponential(size=shape) ** rng.choice([0.1, 1, 6], each)
    weights *= rng.random(shape) >= rng.choice([0, 0.3, 0.8], each)
    kept = rng.integers(0, shape[-1], each)
    weights += 0.1 * (np.arange(shape[-1]) == kept)  # never all zero
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def trees(
    rng: np.random.Generator, many: int, vocabulary: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All blocks of ``many`` trees: p (many, V^K, K + 1, V), q and the tokens (V^K, K).

    Where blocks begin alike, they have the same p and q.
    """
    blocks = np.array([*product(range(vocabulary), repeat=size)], np.int32)
    p, q = [], []
    for depth in range(size + 1):
        nodes = (many, vocabulary**depth, vocabulary)
        of_p, of_q = laws(rng, nodes), laws(rng, nodes)
        kind = rng.integers(0, 8, nodes[:2])
        of_q[kind == 0] = of_p[kind == 0]
        near = of_p * (1 + 1e-6 * rng.standard_normal(nodes).astype(np.float32))
        of_q[kind == 1] = (near / near.sum(-1, keepdims=True))[kind == 1]
        disjoint = np.roll(np.eye(vocabulary, dtype=np.float32), 1, axis=0)
        of_q[kind == 2] = disjoint[of_p.argmax(-1)][kind == 2]
        repeat = vocabulary ** (size - depth)
        p.append(np.repeat(of_p, repeat, axis=1))
        q.append(np.repeat(of_q, repeat, axis=1))
    return np.stack(p, 2), np.stack(q[:-1], 2), blocks


def pick(laws: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The probabilities of the blocks' tokens."""
    blocks = np.broadcast_to(blocks, laws.shape[:-1])
    return np.take_along_axis(laws, blocks[..., None], -1)[..., 0].astype(np.float64)


def published(
    p: np.ndarray, q: np.ndarray, block: list[int], uniform: np.ndarray
) -> tuple[int, np.ndarray, list[float]]:
    """One row of the paper's algorithm 2, in float64, line by line.

    Returns:
        tau, the law of the next token, and every h.
    """
    p, q = p.astype(np.float64), q.astype(np.float64)
    tau, share, law, thresholds = 0, 1.0, None, []
    gamma = len(block)

    def rest(place):
        return np.maximum(share * p[place] - q[place], 0)

    if gamma:
        law = rest(0)
    for place, token in enumerate(block, start=1):
        of_q = q[place - 1, token]
        share = min(share * p[place - 1, token] / of_q, 1.0) if of_q > 0 else 0.0
        if place == gamma:
            h = share
        else:
            mass = rest(place).sum()
            total = mass + 1 - share
            h = mass / total if total > 1e-12 else share
        thresholds.append(h)
        if uniform[place] < h:
            tau = place
            law = rest(place) if place < gamma else None
    if law is None or law.sum() <= 0:
        law = p[tau]
    return tau, law / law.sum(), thresholds


def emitted(
    p: np.ndarray, q: np.ndarray, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The law of the first K + 1 tokens that the code's own h, P and residuals give,
    for every tree (many, V, V, ...); and how many tokens stand on average."""
    many, _, positions, vocabulary = p.shape
    size = positions - 1
    drafted = pick(q, blocks).prod(-1)
    h, share = _code(p, q, blocks)
    # Behind the last that stands all have failed.
    fails = np.cumprod((1 - h)[..., ::-1], axis=-1)[..., ::-1]
    stands = np.concatenate([fails[..., :1], h], -1)
    stands[..., 1:-1] *= fails[..., 1:]
    stands *= drafted[..., None]

    whole = np.zeros((many, vocabulary**positions))
    index = vocabulary ** np.arange(size, -1, -1)
    texts = np.array([*product(range(vocabulary), repeat=positions)])
    for tau in range(positions):
        of_q = mx.array(q[:, :, tau] if tau < size else np.zeros_like(p[:, :, 0]))
        its = mx.array(share[..., tau : tau + 1]) if tau < size else 1.0
        after = acceptance.residual(mx.array(p[:, :, tau]), of_q, its)
        after = np.array(after, np.float64)
        assert np.abs(after.sum(-1) - 1).max() < 1e-5
        mass = stands[..., tau, None] * after  # (many, rows, V), of X^tau and then x
        beginnings = (blocks[:, :tau] * index[:tau]).sum(-1)
        for token in range(vocabulary):
            at = beginnings + token * index[tau]
            for row in np.flatnonzero(mass[..., token].any(0)):
                span = slice(at[row], at[row] + index[tau])
                whole[:, span] += mass[:, row, token, None] * _onward(
                    p, texts[span], tau + 1
                )
    return whole, (stands * np.arange(positions)).sum((1, 2))


def _code(p, q, blocks, counts=None) -> tuple[np.ndarray, np.ndarray]:
    """The code's h (many, rows, K) in float64, and its P."""
    many, rows, positions, vocabulary = p.shape
    size = positions - 1
    h, share = acceptance.block_probabilities(
        mx.array(p.reshape(-1, positions, vocabulary)),
        mx.array(np.tile(blocks, (many, 1))),
        mx.array(q.reshape(-1, size, vocabulary)),
        counts,
    )
    h = np.array(h, np.float64).reshape(many, rows, size)
    assert ((h >= 0) & (h <= 1)).all()
    return h, np.array(share).reshape(many, rows, positions)


def _onward(p: np.ndarray, texts: np.ndarray, start: int) -> np.ndarray:
    """(many, N): the target's probability of the texts' tokens from ``start`` on, each
    given those before it."""
    positions, vocabulary = p.shape[2:]
    found = np.ones((len(p), len(texts)))
    for place in range(start, positions):
        # Any block that begins with the text's first `place` tokens.
        power = vocabulary ** np.arange(positions - 2, positions - 2 - place, -1)
        row = (texts[:, :place] * power).sum(-1)
        found *= p[:, row, place, texts[:, place]]
    return found


def targets(p: np.ndarray) -> np.ndarray:
    positions, vocabulary = p.shape[2:]
    texts = np.array([*product(range(vocabulary), repeat=positions)])
    return _onward(p.astype(np.float64), texts, 0)


SHAPES = [(2, 1, 400), (2, 2, 600), (2, 4, 300), (3, 2, 500), (3, 3, 200), (4, 3, 60)]


def farthest(vocabulary: int, size: int, many: int) -> float:
    """By how much the probability of a text is off, at most."""
    rng = np.random.default_rng(vocabulary * 10 + size)
    p, q, blocks = trees(rng, many, vocabulary, size)
    law, _ = emitted(p, q, blocks)
    return np.abs(law - targets(p)).max()


@pytest.mark.parametrize("vocabulary, size, many", [*SHAPES, (4, 4, 10)])
def test_law_is_the_targets(vocabulary, size, many):
    assert farthest(vocabulary, size, many) < 1e-6


@pytest.mark.parametrize("vocabulary, size, many", SHAPES)
def test_no_fewer_stand_than_token_by_token(vocabulary, size, many):
    rng = np.random.default_rng(vocabulary * 10 + size)
    p, q, blocks = trees(rng, many, vocabulary, size)
    _, stand = emitted(p, q, blocks)
    own, its = pick(p[:, :, :-1], blocks), pick(q, blocks)
    accept = np.array(accept_probability(mx.array(own), mx.array(its), 0.0))
    expected = (its.prod(-1) * np.cumprod(accept, -1).sum(-1)).sum(-1)
    assert (stand >= expected - 1e-6).all()
    if size == 1:  # there is one rule then
        assert np.abs(stand - expected).max() < 1e-6
    else:
        assert (stand > expected + 0.01).any()


@pytest.mark.parametrize("vocabulary, size, many", SHAPES)
def test_decisions_are_those_of_the_published_algorithm(vocabulary, size, many):
    """Random blocks and uniforms, then uniforms on both sides of every h."""
    rng = np.random.default_rng(vocabulary * 10 + size)
    many = min(many, 200)
    p, q, blocks = trees(rng, many, vocabulary, size)
    row, each = rng.integers(0, len(blocks), many), np.arange(many)
    p, q, block = p[each, row], q[each, row], blocks[row]
    uniform = rng.random((many, size + 1), np.float32)
    told = mx.array(p), mx.array(block), mx.array(q)
    verdict = verify_block(*told, None, mx.array(uniform))
    accepted, tokens = verdict.accepted.tolist(), verdict.next_token.tolist()
    h = np.array(acceptance.block_probabilities(*told, None)[0])
    compared = 0
    for each in range(many):
        tau, law, thresholds = published(
            p[each], q[each], block[each].tolist(), uniform[each]
        )
        possible = pick(q[each], block[each]).all()
        if not possible:
            continue  # the draft does not propose it
        # What divides rounding errors, where q is nearly p, is of no consequence.
        if np.abs(h[each] - thresholds).max() > 1e-4:
            assert np.abs(p[each, :-1] - q[each]).max(-1).min() < 1e-5
            continue
        if np.abs(h[each] - uniform[each, 1:]).min() > 1e-4:
            assert accepted[each] == tau
            compared += 1
        if accepted[each] == tau:
            reach = 1 - uniform[each, 0]
            assert law[: tokens[each] + 1].sum() > reach - 1e-4
            assert law[: tokens[each]].sum() < reach + 1e-4
    assert compared > many / 10
    for place in range(size):
        below = np.maximum(np.nextafter(h, -1), 0)
        for side, stands in ((below, h > 0), (h, np.zeros_like(h))):
            at = np.full_like(uniform, NEVER)
            at[:, 1 + place] = side[:, place]
            got = np.array(verify_block(*told, None, mx.array(at)).accepted)
            assert (got == (1 + place) * stands[:, place]).all()


def test_by_hand():
    """Two tokens. p is the same everywhere, (1/2, 1/2); q is (3/4, 1/4).

    Of "0 1": P_1 = 1/2 / 3/4 = 2/3 and P_2 = min(1, 2/3 * 1/2 / 1/4) = 1. The first
    stops there with S_1 = max(1/3 - 3/4, 0) + max(1/3 - 1/4, 0) = 1/12, that is
    h_1 = 1/12 / (1/12 + 1/3) = 1/5; the whole always stands, though the first token
    alone would be rejected in one case of three.
    """
    p, q = mx.full((1, 3, 2), 0.5), mx.array([[[0.75, 0.25]] * 2])
    draft = mx.array([[0, 1]])
    h, share = acceptance.block_probabilities(p, draft, q, None)
    assert np.allclose(share, [[1, 2 / 3, 1]], atol=1e-6)
    assert np.allclose(h, [[1 / 5, 1]], atol=1e-6)
    assert verify_block(p, draft, q, None, mx.array([[0, 0.9, 0.9]])).accepted == 2
    assert verify(p, draft, q, None, 0.0, mx.array([[0, 0.9, 0.9]])).accepted == 0
    # Of "0 0": P_2 = (2/3)^2, S_1 is the same; behind one token 1 alone is left.
    draft = mx.array([[0, 0]])
    h, share = acceptance.block_probabilities(p, draft, q, None)
    assert np.allclose(share, [[1, 2 / 3, 4 / 9]], atol=1e-6)
    assert np.allclose(h, [[1 / 5, 4 / 9]], atol=1e-6)
    for numbers, expected in (
        ([0.7, 0.19, 0.44], (2, 0)),
        ([0.2, 0.19, 0.44], (2, 1)),
        ([0.7, 0.19, 0.45], (1, 1)),
        ([0.7, 0.21, 0.45], (0, 1)),
    ):
        verdict = verify_block(p, draft, q, None, mx.array([numbers]))
        assert (verdict.accepted.item(), verdict.next_token.item()) == expected


def test_counts():
    """What is not real does not matter: a row is as if cut off behind its own."""
    rng = np.random.default_rng(0)
    rows, size, vocabulary = 60, 4, 3
    p, q = (laws(rng, (rows, size + more, vocabulary)) for more in (1, 0))
    draft = (q + 1e-6).cumsum(-1).argmax(-1).astype(np.int32)
    draft = np.where(rng.random(draft.shape) < 0.5, q.argmax(-1), draft)
    counts = rng.integers(0, size + 1, rows)
    uniform = rng.random((rows, size + 1), np.float32)
    for row, count in enumerate(counts):
        q[row, count:] = rng.choice([0, math.nan, 1])
        draft[row, count:] = rng.integers(-2, vocabulary + 2, size - count)
        p[row, count + 1 :] = rng.choice([math.nan, 0.5])
    ragged = verify_block(
        *(mx.array(each) for each in (p, draft, q, counts.astype(np.int32), uniform))
    )
    assert len({*ragged.accepted.tolist()}) == size + 1
    for row, count in enumerate(counts):
        alone = verify_block(
            mx.array(p[row : row + 1, : count + 1]),
            mx.array(draft[row : row + 1, :count].astype(np.int32)),
            mx.array(q[row : row + 1, :count]),
            None,
            mx.array(uniform[row : row + 1, : count + 1]),
        )
        assert alone.accepted.item() == ragged.accepted[row].item() <= count
        assert alone.next_token.item() == ragged.next_token[row].item()
        assert alone.finite.item() <= ragged.finite[row].item()


@pytest.mark.parametrize(
    "token, of_q",
    [(2, [0.5, 0.5, 0]), (-1, None), (3, None), (0, [math.nan] * 3), (0, [0.0] * 3)],
    ids=["q of 0", "negative", "too high", "q of NaN", "q of zeros"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_broken_draft(place, token, of_q):
    """Neither that token stands nor one behind it, and what is emitted keeps p's law:
    it is that of a draft without them where there is no q."""
    p = np.tile(np.array([0.5, 0.2, 0.3], np.float32), (1, 4, 1))
    q = np.tile(np.array([0.4, 0.5, 0.1], np.float32), (1, 3, 1))
    draft = np.array([[1, 2, 0]], np.int32)
    draft[0, place] = token
    if of_q:
        q[0, place] = of_q
    told = mx.array(p), mx.array(draft), mx.array(q)
    h, share = acceptance.block_probabilities(*told, None)
    assert (np.array(share)[0, place + 1 :] == 0).all()
    assert (np.array(h)[0, place:] == 0).all()
    uniform = np.zeros((1, 4), np.float32)  # whatever may stand does
    assert verify_block(*told, None, mx.array(uniform)).accepted.item() == place
    if of_q and not np.nansum(of_q):
        cut = mx.array(p), mx.array(draft), mx.array(np.nan_to_num(q))
        count = mx.array([place], mx.int32)
        cut_h, _ = acceptance.block_probabilities(*cut, count)
        assert np.allclose(h, cut_h)
        for number in np.linspace(0, 0.999, 40, dtype=np.float32):
            uniform[0, 0] = number
            broken = verify_block(*told, None, mx.array(uniform)).next_token
            assert broken == verify_block(*cut, count, mx.array(uniform)).next_token


def test_what_underflows_chooses_no_token_without_a_probability():
    """P is 0, or next to it, while p and q are positive."""
    p = np.array([[[0, 1e-30, 1 - 1e-30]] * 4], np.float32)
    q = np.array([[[0, 1, 0]] * 3], np.float32)
    draft = mx.array([[1, 1, 1]])
    for count in range(4):
        for first in (0.0, 0.5, 1 - 2**-24):
            uniform = mx.array([[first, 0, 0, 0]])
            told = mx.array(p), draft, mx.array(q), mx.array([count]), uniform
            assert verify_block(*told).next_token.item() > 0
            q_nan = np.where(np.arange(3)[:, None] >= 1, math.nan, q)
            told = mx.array(p), draft, mx.array(q_nan), mx.array([count]), uniform
            assert verify_block(*told).next_token.item() > 0


def test_probabilities_that_are_nan_are_reported():
    """Where they are not reached they change nothing."""
    p = np.full((2, 3, 4), 0.25, np.float32)
    p[1, 1] = math.nan
    q, tokens = mx.full((2, 2, 4), 0.25), mx.zeros((2, 2), mx.int32)
    verdict = verify_block(mx.array(p), tokens, q, None, mx.zeros((2, 3)))
    assert verdict.finite.tolist() == [3, 1]
    assert verdict.accepted.tolist() == [2, 1]


@pytest.mark.parametrize(
    "temperature, delta, certain, used",
    [
        (1.0, 0.0, False, True),
        (1.0, 0.3, False, False),
        (1.0, 1.0, False, False),
        (1.0, 0.0, True, False),
        (0.0, 0.0, True, False),
    ],
)
def test_where_it_is_the_rule(monkeypatch, temperature, delta, certain, used):
    calls = []

    def spy(*args):
        calls.append(args)
        return verify_block(*args)

    monkeypatch.setattr("speculation.samplers.verify_block", spy)
    rules = Rules(4, Sampling(temperature=temperature), delta)
    round_ = RoundSampler([RowSampler(rules, [0]), RowSampler(rules, [1], seed=1)], 2)
    q = None if certain else mx.full((2, 2, 4), 0.25)
    draft = Draft(mx.array([[1, 2], [3, 0]]), q, [2, 1])
    verdict = round_.judge(mx.zeros((2, 3, 4)), draft)
    assert bool(calls) == used
    if used:  # p is q
        assert verdict.accepted.tolist() == [2, 1]


def test_what_is_drafted_behind_an_end_changes_nothing():
    """A neighbour that is still at it has a row draft on behind its own end."""
    rng = np.random.default_rng(0)
    rows, size, vocabulary, end = 300, 5, 4, 2
    logits = mx.log(mx.array(laws(rng, (rows, size + 1, vocabulary)) + 1e-3))
    q = mx.array(laws(rng, (rows, size, vocabulary)))
    q = (q + mx.softmax(logits[:, :size], axis=-1)) / 2
    tokens = rng.integers(0, vocabulary, (rows, size)).astype(np.int32)
    tokens[tokens == end] = 0
    place = size - 3
    tokens[:, place] = end
    rules = Rules(vocabulary, Sampling(temperature=1.0), eos_tokens=frozenset({end}))
    found = []
    for most in (size, place + 1):
        samplers = [RowSampler(rules, [0], seed=row) for row in range(rows)]
        draft = Draft(mx.array(tokens[:, :most]), q[:, :most])
        verdict = RoundSampler(samplers, most).judge(logits[:, : most + 1], draft)
        accepted = np.array(verdict.accepted)
        # Behind an end that stands nobody looks.
        token = np.where(accepted > place, -1, np.array(verdict.next_token))
        found.append((np.minimum(accepted, place + 1).tolist(), token.tolist()))
    assert found[0] == found[1]
    assert len({*found[0][0]}) == place + 2


def residual_of_p_itself(monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda p, q, share=1.0: p)


def residual_of_the_whole_p(monkeypatch):
    residual = acceptance.residual
    monkeypatch.setattr(
        acceptance, "residual", lambda p, q, share=1.0: residual(p, q, 1.0)
    )


def changed(change):
    """A planted bug: what the code's h and P are made to be."""

    def plant(monkeypatch):
        right = acceptance.block_probabilities

        def wrong(p, draft, q, counts):
            return change(*right(p, draft, q, counts), p, draft, q)

        monkeypatch.setattr(acceptance, "block_probabilities", wrong)

    return plant


def ratios(p, draft, q) -> mx.array:
    index = draft[..., None]
    own, its = (mx.take_along_axis(a, index, -1)[..., 0] for a in (p[:, :-1], q))
    return mx.where(its > 0, own / mx.where(its > 0, its, 1), 0)


BUGS = {
    # The product is cut at 1 at its end alone, not on the way.
    "not cut on the way": lambda h, share, p, draft, q: (
        mx.concatenate(
            [h[:, :-1], mx.minimum(mx.cumprod(ratios(p, draft, q), 1), 1)[:, -1:]], 1
        ),
        share,
    ),
    # As if h were P everywhere.
    "h is P": lambda h, share, p, draft, q: (share[:, 1:], share),
    # One draft token's own probability, without those before it.
    "without those before": lambda h, share, p, draft, q: (
        mx.concatenate([h[:, :-1], mx.minimum(ratios(p, draft, q), 1)[:, -1:]], 1),
        share,
    ),
    # S / (S + P).
    "a wrong share of the rest": lambda h, share, p, draft, q: (
        mx.concatenate([(h * share[:, 1:])[:, :-1], h[:, -1:]], 1),
        share,
    ),
    "the last never stops": lambda h, share, p, draft, q: (
        h * (mx.arange(h.shape[1]) < h.shape[1] - 1),
        share,
    ),
    "P of the token before": lambda h, share, p, draft, q: (
        h,
        mx.concatenate([share[:, :1], share[:, :-1]], 1),
    ),
}


@pytest.mark.parametrize(
    "plant",
    [
        residual_of_p_itself,
        residual_of_the_whole_p,
        *(pytest.param(changed(bug), id=name) for name, bug in BUGS.items()),
    ],
)
def test_a_planted_bug_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    assert farthest(3, 3, 50) > 1e-3

"""acceptance.py against the rule written out in plain Python."""

import fast_blas  # noqa: F401  (before mlx: see there)

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acceptance import verify_greedy


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
    assert full.finite.tolist() == [True] * len(draft)


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
    assert verdict.finite.tolist() == [True, False]
    logits[1, 2] = -math.inf  # nothing left to emit
    verdict = verify_greedy(mx.array(logits), mx.zeros((2, 2), mx.int32), None, 0.0)
    assert verdict.finite.tolist() == [True, False]


def test_half_precision_logits():
    """The threshold is computed in float32: bfloat16 near 100 has steps of 0.5."""
    logits = mx.array([[[100.0, 99.5], [0.0, 1.0]]]).astype(mx.bfloat16)
    verdict = verify_greedy(logits, mx.array([[1]]), None, 0.3)  # log(0.7) = -0.36
    assert verdict.accepted.item() == 0

"""Which draft tokens the target keeps: pure functions on arrays.

p is the target, q the draft. Shapes: B = batch, K = draft tokens, V = vocabulary.
Leviathan, Kalman, Matias: "Fast Inference from Transformers via Speculative Decoding",
arXiv 2211.17192. Sun, Mendlovic, Leviathan, Aharoni, Ro, Beirami, Suresh: "Block
Verification Accelerates Speculative Decoding", arXiv 2403.10444. Daliri, Musco, Suresh:
"Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv
2408.07978.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from speculation.sampling import draw


@dataclass
class Draft:
    """Proposed tokens for one round.

    Attributes:
        tokens: (B, K) int32, right-padded.
        probs: (B, K, V) float32, the q that each token was drawn from; None when each
            was certain (greedy drafts, looked up ones) or q does not matter.
        counts: how many of the K are real, row by row; None when all are.
    """

    tokens: mx.array
    probs: mx.array | None = None
    counts: list[int] | None = None


class Verdict(NamedTuple):
    """What becomes of one round's draft.

    Attributes:
        accepted: (B,) int32, how many draft tokens stand, from the left.
        next_token: (B,) int32, the target's own token after those.
        finite: (B,) int32, how many positions, from the left, have usable logits: no
            NaN, no inf, not only -inf. Fewer than what is committed is an error; a
            position that is not reached does not matter.
    """

    accepted: mx.array
    next_token: mx.array
    finite: mx.array


def verify_chosen(
    chosen: mx.array, draft: mx.array, counts: mx.array | None, finite: mx.array
) -> Verdict:
    """Accept the draft tokens that are what the target chooses itself.

    Args:
        chosen: (B, K + 1) int32, its tokens; that at k is for draft token k.
        draft: (B, K) int32, any ids.
        counts: (B,) int32, how many of the K are real; None when all are.
        finite: (B, K + 1) bool, whether a position has usable logits.
    """
    return _keep(draft == chosen[:, :-1], chosen, counts, finite)


def verify_greedy(
    logits: mx.array, draft: mx.array, counts: mx.array | None, delta: float
) -> Verdict:
    """Accept the draft tokens that the target would have chosen itself.

    With ``delta`` above 0 also a token whose logit is within log(1 - delta) of the
    largest, that is, at temperature 1, whose probability is at least 1 - delta times
    that of the best. No guarantee on the text's law goes with that. An id outside the
    vocabulary, or one that is banned by a logit of -inf, is never accepted.

    Args:
        logits: (B, K + 1, V) of the target; those at k are for draft token k.
        draft: (B, K) int32.
        counts: (B,) int32, how many of the K are real; None when all are.
        delta: in [0, 1]; 0 accepts equality with the argmax alone.
    """
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    highest = logits.max(axis=-1)  # NaN wherever there is one; argmax may pass it over
    finite = is_finite(highest)
    size = draft.shape[1]
    if delta == 0 or size == 0:
        return verify_chosen(best, draft, counts, finite)
    inside = (draft >= 0) & (draft < logits.shape[-1])
    index = mx.where(inside, draft, 0)[..., None]
    own = mx.take_along_axis(logits[:, :size], index, axis=-1)[..., 0]
    least = -math.inf if delta == 1 else math.log1p(-delta)
    near = own.astype(mx.float32) >= highest[:, :size].astype(mx.float32) + least
    near = near & inside & is_finite(own)
    return _keep((draft == best[:, :size]) | near, best, counts, finite)


def accept_probability(p: mx.array, q: mx.array, delta: float) -> mx.array:
    """With which probability a draft token stands: min(1, p / ((1 - delta) q)).

    At ``delta`` 0 it is the rule of section 2.3 of the paper, else that of its appendix
    A.5 with the lenience 1 - delta; at 1 every token stands.

    Args:
        p: the target's probabilities of the draft's tokens, any shape.
        q: the draft's, likewise; NaN, of a broken draft, is accepted at ``delta`` 1
            alone.
    """
    if delta == 1:
        return mx.ones_like(p)
    least = (1 - delta) * q
    # Division only where it is safe: p below, hence q above 0.
    below = p < least
    share = mx.where(below, p / mx.where(below, least, 1), p > 0)
    return mx.where(mx.isnan(q), 0, share)


def residual(p: mx.array, q: mx.array, share: mx.array | float = 1.0) -> mx.array:
    """The law of the token in a rejected one's place: normalize(max(share p - q, 0)).

    Where nothing is left, which is where q is p up to rounding, it is p; so it is where
    q is 0, which is the token after a draft that stood as a whole.

    Args:
        p: (..., V) of the target.
        q: (..., V) of the draft; a row of NaN counts as 0.
        share: (..., 1) of p, in (0, 1]: the P of :func:`block_probabilities`.
    """
    shared = share * p
    left = mx.where(shared > q, shared - q, 0)
    mass = left.sum(axis=-1, keepdims=True)
    return mx.where(mass > 0, left / mx.where(mass > 0, mass, 1), p)


def verify(
    p: mx.array,
    draft: mx.array,
    q: mx.array | None,
    counts: mx.array | None,
    delta: float,
    uniform: mx.array,
    allowed: mx.array | None = None,
) -> Verdict:
    """Accept or reject sampled draft tokens so that the text keeps the target's law.

    For each token given those before it, at any ``delta``: no token x is emitted with a
    probability above p(x) / (1 - delta), and the total variation distance of what is
    emitted from p is at most min(delta, TV(p, q)). At ``delta`` 0 that is p exactly:
    appendix A.1 of the paper.

    Args:
        p: (B, K + 1, V) of the target; those at k are for draft token k.
        draft: (B, K) int32.
        q: (B, K, V) that the draft tokens were drawn from; None when each was certain.
        counts: (B,) int32, how many of the K are real; None when all are.
        delta: in [0, 1].
        uniform: (B, K + 1) in [0, 1), independent of the draft: the first for the
            target's own token, the others for the draft's.
        allowed: (B, K) bool, False for tokens that must not stand even at ``delta`` 1;
            None when all may. An id outside the vocabulary never does.
    """
    finite = _usable(p)
    if draft.shape[1] == 0:
        return _undrafted(p, uniform, finite)
    inside, p_draft, q_draft = _of_draft(p, draft, q)
    accept = uniform[:, 1:] < accept_probability(p_draft, q_draft, delta)
    accept = accept & inside if allowed is None else accept & inside & allowed
    accepted = _from_the_left(accept, counts)
    next_token = draw(_next_law(p, draft, q, counts, accepted), uniform[:, 0])
    return Verdict(accepted, next_token, finite)


def block_probabilities(
    p: mx.array, draft: mx.array, q: mx.array, counts: mx.array | None
) -> tuple[mx.array, mx.array]:
    """What :func:`verify_block` decides by: h and P of section 4 of that paper.

    P_0 = 1 and P_i = min(1, P_{i-1} p(X_i) / q(X_i)), each given the tokens before it,
    is how much of the target's law the first i tokens may carry. h_i is for stopping
    behind the i-th where those after it have failed, so that with them P_i comes out:
    S_i / (S_i + 1 - P_i) with S_i = sum max(P_i p - q, 0), and P itself at the last.

    A token that is not in the vocabulary, that has no p or that cannot be of q (0, NaN)
    ends it: from there on P is 0. The one before a q of NaN is the last.

    Args:
        p, draft, q, counts: as in :func:`verify_block`, with K > 0.

    Returns:
        h (B, K) from h_1 on, 0 for tokens that are not real, and P (B, K + 1).
    """
    size = draft.shape[1]
    inside, p_draft, q_draft = _of_draft(p, draft, q)
    sound = inside & (p_draft > 0) & (q_draft > 0)  # NaN is not
    p_draft, q_draft = mx.where(sound, p_draft, 0), mx.where(sound, q_draft, 1)
    shares = [mx.ones_like(p_draft[:, 0])]
    for place in range(size):
        share = shares[-1] * p_draft[:, place] / q_draft[:, place]
        shares.append(mx.minimum(share, 1))
    share = mx.stack(shares, axis=1)

    h = share[:, 1:]
    if size > 1:
        within = share[:, 1:-1]
        left = within[..., None] * p[:, 1:size] - q[:, 1:]
        left = mx.maximum(left, 0).sum(axis=-1)  # NaN if p or q is
        total = left + (1 - within)
        # Where total is 0, q is p up to rounding, and P is 1.
        stop = mx.where(total > 0, left / mx.where(total > 0, total, 1), within)
        if counts is not None:
            stop = mx.where(mx.arange(1, size) < counts[:, None], stop, within)
        h = mx.concatenate([stop, h[:, -1:]], axis=1)
    if counts is not None:
        h = mx.where(mx.arange(size) < counts[:, None], h, 0)
    return h, share


def verify_block(
    p: mx.array,
    draft: mx.array,
    q: mx.array,
    counts: mx.array | None,
    uniform: mx.array,
) -> Verdict:
    """As :func:`verify` at ``delta`` 0, but the draft tokens are judged together.

    The text keeps the target's law, and no rule that does so by the draft alone has
    more tokens stand on average (section 4 of that paper): :func:`verify` has not. A
    token that is improbable by itself may stand where those around it make up for it:
    what stands are the first tokens up to the last i with ``uniform`` below h_i.

    Which ones do depends on how many were drafted. The law does not.

    Args:
        p: (B, K + 1, V) of the target; those at k are for draft token k.
        draft: (B, K) int32.
        q: (B, K, V) that the draft tokens were drawn from.
        counts: (B,) int32, how many of the K are real; None when all are.
        uniform: (B, K + 1) as in :func:`verify`.
    """
    size = draft.shape[1]
    finite = _usable(p)
    if size == 0:
        return _undrafted(p, uniform, finite)
    h, share = block_probabilities(p, draft, q, counts)
    reached = mx.where(uniform[:, 1:] < h, mx.arange(1, size + 1), 0)
    accepted = reached.max(axis=1).astype(mx.int32)
    law = _next_law(p, draft, q, counts, accepted, share)
    return Verdict(accepted, draw(law, uniform[:, 0]), finite)


def _usable(p: mx.array) -> mx.array:
    """``finite`` of a verdict on p (B, K + 1, V)."""
    # NaN, inf or only -inf among a row's logits make all its probabilities NaN.
    return _from_the_left(is_finite(p[..., 0]))


def _undrafted(p: mx.array, uniform: mx.array, finite: mx.array) -> Verdict:
    """The verdict where nothing was drafted."""
    none = mx.zeros(p.shape[0], mx.int32)
    return Verdict(none, draw(p[:, 0], uniform[:, 0]), finite)


def _of_draft(
    p: mx.array, draft: mx.array, q: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Which draft tokens are in the vocabulary, and their p and q; (B, K) each."""
    inside = (draft >= 0) & (draft < p.shape[-1])
    index = mx.where(inside, draft, 0)[..., None]
    p_draft = mx.take_along_axis(p[:, : draft.shape[1]], index, axis=-1)[..., 0]
    if q is None:
        return inside, p_draft, mx.ones_like(p_draft)
    return inside, p_draft, mx.take_along_axis(q, index, axis=-1)[..., 0]


def _next_law(
    p: mx.array,
    draft: mx.array,
    q: mx.array | None,
    counts: mx.array | None,
    accepted: mx.array,
    share: mx.array | None = None,
) -> mx.array:
    """The law (B, V) of the target's own token, after those ``accepted`` (B,).

    Args:
        share: (B, K + 1), P; None where it is 1.
    """
    # Only the first rejection's place matters. Beyond the draft's last token q is 0,
    # and so the residual is p itself.
    size = draft.shape[1]
    place = mx.minimum(accepted, size - 1)[:, None]
    rejected = (accepted < (size if counts is None else counts))[:, None]
    if q is not None:
        q_there = mx.take_along_axis(q, place[..., None], axis=1)[:, 0]
    else:
        q_there = mx.arange(p.shape[-1]) == mx.take_along_axis(draft, place, axis=1)
    q_there = mx.where(rejected, q_there, 0.0)
    p_there = mx.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]
    if share is None:
        return residual(p_there, q_there)
    its = mx.take_along_axis(share, accepted[:, None], axis=1)
    return residual(p_there, q_there, mx.where(rejected, its, 1))


def _keep(
    accept: mx.array, chosen: mx.array, counts: mx.array | None, finite: mx.array
) -> Verdict:
    """What stands of a draft, and after it the target's choice there."""
    finite = _from_the_left(finite)
    if accept.shape[1] == 0:
        return Verdict(mx.zeros(len(chosen), mx.int32), chosen[:, 0], finite)
    accepted = _from_the_left(accept, counts)
    next_token = mx.take_along_axis(chosen, accepted[:, None], axis=1)[:, 0]
    return Verdict(accepted, next_token, finite)


def is_finite(x: mx.array) -> mx.array:
    """``mx.isfinite``, from less than half of its operations; NaN is not less."""
    return mx.abs(x) < math.inf


def _from_the_left(fine: mx.array, counts: mx.array | None = None) -> mx.array:
    """How many stand (B,): one stands only if all those before it do.

    Args:
        fine: (B, N) bool.
        counts: (B,) how many of the N are real; None when all are.
    """
    if counts is not None:
        fine = fine & (mx.arange(fine.shape[1]) < counts[:, None])
    if fine.shape[1] == 1:
        return fine[:, 0].astype(mx.int32)
    return mx.cumprod(fine.astype(mx.int32), axis=1).sum(axis=1)

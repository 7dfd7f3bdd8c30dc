"""Which draft tokens the target keeps: pure functions on arrays.

p is the target, q the draft. Shapes: B = batch, K = draft tokens, V = vocabulary.
Leviathan, Kalman, Matias: "Fast Inference from Transformers via Speculative Decoding",
arXiv 2211.17192.
"""

import fast_blas  # noqa: F401  (before mlx: see there)

import math
from typing import NamedTuple

import mlx.core as mx


class Verdict(NamedTuple):
    """What becomes of one round's draft.

    Attributes:
        accepted: (B,) int32, how many draft tokens stand, from the left.
        next_token: (B,) int32, the target's own token after those.
        finite: (B,) bool, False where the target's logits hold NaN, inf or only -inf.
    """

    accepted: mx.array
    next_token: mx.array
    finite: mx.array


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
    finite = mx.isfinite(highest).all(axis=-1)
    size = draft.shape[1]
    if size == 0:
        return Verdict(mx.zeros(best.shape[0], mx.int32), best[:, 0], finite)

    accept = draft == best[:, :size]
    if delta > 0:
        inside = (draft >= 0) & (draft < logits.shape[-1])
        index = mx.where(inside, draft, 0)[..., None]
        own = mx.take_along_axis(logits[:, :size], index, axis=-1)[..., 0]
        least = -math.inf if delta == 1 else math.log1p(-delta)
        near = own.astype(mx.float32) >= highest[:, :size].astype(mx.float32) + least
        accept = accept | (near & inside & mx.isfinite(own))
    if counts is not None:
        accept = accept & (mx.arange(size) < counts[:, None])
    # A token stands only if all those before it do.
    accepted = mx.cumprod(accept.astype(mx.int32), axis=1).sum(axis=1)
    next_token = mx.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
    return Verdict(accepted, next_token, finite)

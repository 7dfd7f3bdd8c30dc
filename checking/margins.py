"""Two texts that should be one: how close the tokens were where they part.

A pass over several tokens adds up in another order than one over a single token, and so
its logits differ in rounding. Where two tokens are as likely as each other within that,
either may win. Where they are not, something is wrong.
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

from typing import Any

import mlx.core as mx
import numpy as np

from speculation.session import Session

#: Roundings of the largest logit by which two candidates may be apart for the order of
#: adding up to decide between them: a logit has been through every layer. Those of the
#: bundled pair's in float32 differ by up to 10 between passes over one token and over
#: five (2 cores of an AMD EPYC), and of two candidates one may gain what the other
#: loses.
TIES = 20.0


def compare(logits: np.ndarray, own: int, other: int, epsilon: float) -> dict[str, Any]:
    """How far two candidates are apart.

    Args:
        logits: (V,), plain decoding's, where the texts part.
        own, other: the ids that plain decoding and the other way have there.
        epsilon: of the dtype that they were computed in, relative.

    Returns:
        ``margin``, the difference of the two logits; ``roundings``, the same in
        epsilons of the largest logit; ``tie``, whether rounding explains it.
    """
    margin = float(logits[own]) - float(logits[other])
    largest = float(np.abs(logits[np.isfinite(logits)]).max())
    roundings = abs(margin) / (epsilon * largest) if largest else 0.0
    # What is banned or broken has no finite margin, and JSON has no infinity.
    finite = bool(np.isfinite(margin))
    return {
        "margin": margin if finite else None,
        "roundings": roundings if finite else None,
        "tie": finite and roundings <= TIES,
    }


def flip(
    session: Session, prompt: list[int], plain: list[int], other: list[int]
) -> dict[str, Any]:
    """What is said of two texts that differ: where, and :func:`compare` of it.

    Args:
        session: the target's; its batch is gone afterwards.
        prompt: token ids.
        plain, other: the tokens of both, end-of-sequence included.
    """
    common = min(len(plain), len(other))
    place = next((i for i in range(common) if plain[i] != other[i]), common)
    if place == common:  # one is the beginning of the other: none is to be
        return {"place": place, "margin": None, "roundings": None, "tie": False}
    (logits,) = _one_by_one(session, prompt, plain[:place], 1)
    compared = compare(logits, plain[place], other[place], epsilon(session))
    return {"place": place, "tokens": [plain[place], other[place]], **compared}


def rounding(
    session: Session, prompt: list[int], plain: list[int], rows: int
) -> float | None:
    """By how many epsilons of the largest logit a pass over ``rows`` tokens differs at
    most from passes over one, at the end of a text; None where that is too short."""
    known = len(plain) - rows
    if known < 1:
        return None
    single = np.stack(_one_by_one(session, prompt, plain[:-1], rows))
    session.rewind([known])
    whole = _numbers(session.extend(mx.array([plain[known - 1 : -1]]))[0])
    finite = np.isfinite(single)
    difference = np.abs(np.where(finite, whole - single, 0)).max()
    return float(difference / (epsilon(session) * np.abs(single[finite]).max()))


def epsilon(session: Session) -> float:
    """Of the dtype that a model computes in, relative."""
    return float(mx.finfo(session.model.dtype).eps)


def _one_by_one(
    session: Session, prompt: list[int], text: list[int], count: int
) -> list[np.ndarray]:
    """Logits (V,) after each of the last ``count`` tokens of a text, or of what it
    starts from, all of which have a pass of their own."""
    (begin,) = session.start([prompt])
    sequence, found = [*begin, *text], []
    for place, token in enumerate(sequence):
        logits = session.extend(mx.array([[token]]))
        mx.eval(logits)
        if place >= len(sequence) - count:
            found.append(_numbers(logits[0, -1]))
    return found


def _numbers(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32))

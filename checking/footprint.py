"""Memory: what the weights take, what MLX had allocated at most, and the process."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import resource
import sys
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from speculation.session import Session

#: What is more than this many times the weights, and so many bytes, is unexpected:
#: caches of a text are small beside it, and loading has a tensor twice at a time.
TIMES, BYTES = 1.5, 250_000_000


def now() -> dict[str, int]:
    """Bytes: by MLX at most since the last :func:`entry`, and resident at most in this
    process's life."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak": mx.get_peak_memory(),
        "resident": most if sys.platform == "darwin" else most << 10,
    }


def weights(*sessions: Session) -> int:
    """Bytes of their models' parameters, as they are computed with."""
    return sum(
        value.nbytes
        for session in sessions
        for _, value in tree_flatten(session.model.parameters())
    )


def expected(weights: int) -> int:
    """Bytes that decoding one text is expected to take at most."""
    return int(TIMES * weights) + BYTES


def entry(name: str, size: int) -> dict[str, Any]:
    """A line of the report's table of memory: what was allocated at most from the last
    one on, beside weights of ``size`` bytes."""
    peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    return {
        "name": name,
        "weights": size,
        "peak": peak,
        "expected": expected(size),
    }

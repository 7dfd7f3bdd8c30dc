"""How models are loaded, as whoever runs them wants it."""

from typing import NamedTuple


class Loading(NamedTuple):
    """What there is to choose about it.

    Attributes:
        unverified: take decoder-only models, too, whose text nobody has compared with
            transformers' (:mod:`verified`).
        dtype: what T5 computes in: "float32", "bfloat16" or "float16"; None for what
            the weights are stored in, on a CPU for float32.
        compiled: whether T5's decoder passes are compiled (:mod:`t5_session`).
    """

    unverified: bool = False
    dtype: str | None = None
    compiled: bool = False


#: As it is where nobody says anything.
USUAL = Loading()

"""How models are loaded, as whoever runs them wants it."""

from typing import NamedTuple

from system import remembering
from system.device import on_gpu
from system.ranks import Ranks

#: What is remembered of this machine: whether compiled passes are faster.
COMPILE = "compiled passes"


class Loading(NamedTuple):
    """What there is to choose about it.

    Attributes:
        unverified: take decoder-only models, too, whose text nobody has compared with
            transformers' (:mod:`verified`).
        dtype: what T5 computes in: "float32", "bfloat16" or "float16"; None for what
            the weights are stored in, on a CPU for float32.
        compiled: whether T5's decoder passes are compiled (:mod:`t5_session`); None for
            where that is known to be faster.
        ranks: among which the model is divided; None where each has it whole.
    """

    unverified: bool = False
    dtype: str | None = None
    compiled: bool | None = None
    ranks: Ranks | None = None

    @property
    def compiles(self) -> bool:
        """Whether a T5's passes are compiled."""
        if self.compiled is None:
            return on_gpu() and remembering.recall(COMPILE) is True
        return self.compiled


#: As it is where nobody says anything.
USUAL = Loading()

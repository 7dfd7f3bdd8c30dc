"""How likely a draft token is of use, from what became of those before."""

from collections.abc import Iterable

import numpy as np

#: After how many judged tokens an observation counts half.
_MEMORIES = (6, 24, 96, 512)
#: What the first drafts are expected to be worth, and how firmly.
_PRIOR, _FIRMNESS = 0.7, 1.0
#: How many observations at its own place weigh as much as what the place before says.
_NEIGHBOUR = 4.0
#: What a judged token leaves of how far a memory has been wrong.
_FORGIVING = 0.97
#: Of judged tokens that a memory, the one at this place, has of late, how many leave as
#: much doubt as not.
_FAIR, _DOUBT = 1, 6.0
#: No chance is nearer to 0 or 1.
_LEAST = 0.005


class Chances:
    """For each place of a draft the chance that its token is committed, if those before
    it are.

    Only such tokens are counted, so what a rejection hides biases nothing. A token
    behind the end of a text is of no use, and counts as rejected ones do. Several
    memories, short and long, are mixed by how well each has foretold what came.
    """

    def __init__(self, most: int):
        """``most``: places."""
        self._keep = 0.5 ** (1 / np.array(_MEMORIES))
        self._taken = np.zeros((len(_MEMORIES), most))
        self._judged = np.zeros((len(_MEMORIES), most))
        self._losses = np.zeros(len(_MEMORIES))
        self._places: list[list[float]] | None = None  # of each memory
        self._tokens: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """The tokens to expect of a round with a draft of so many, at [K]: (most + 1,).

        1 + a1 + a1 a2 + ..., of the chances a.
        """
        if self._tokens is None:
            weights = np.exp(self._losses.min() - self._losses)
            mixed = weights @ np.array(self._by_memory) / weights.sum()
            self._tokens = 1 + np.cumsum(np.concatenate([[0.0], np.cumprod(mixed)]))
        return self._tokens

    @property
    def sure(self) -> float:
        """How far that goes by what was seen, from 0 to 1."""
        seen = float(self._judged[_FAIR].sum())
        return seen / (seen + _DOUBT)

    @property
    def _by_memory(self) -> list[list[float]]:
        """The chance at each place, as each memory has it."""
        if self._places is None:
            self._places = [
                _places(taken, judged)
                for taken, judged in zip(
                    self._taken.tolist(), self._judged.tolist(), strict=True
                )
            ]
        return self._places

    def observe(self, drafts: Iterable[tuple[int, int]]) -> None:
        """Take in one round's (drafted, taken) of each row."""
        taken, lost = np.zeros((2, self._taken.shape[1]))
        last = 0
        for drafted, stood in drafts:
            taken[:stood] += 1
            if stood < drafted:
                lost[stood] += 1
            last = max(last, min(stood + 1, drafted))
        if not last:
            return
        tests = int(taken.sum() + lost.sum())
        places = np.array([chances[:last] for chances in self._by_memory])
        loss = -np.log(places) @ taken[:last] - np.log(1 - places) @ lost[:last]
        # Rows of a batch are seen at once: their mean counts for one of them.
        self._losses *= _FORGIVING ** min(tests, last)
        self._losses += loss * min(1.0, last / tests)
        keep = (self._keep**tests)[:, None]
        self._taken = self._taken * keep + taken
        self._judged = self._judged * keep + taken + lost
        self._places = self._tokens = None

    def as_list(self) -> list[list[list[float]]]:
        """What :meth:`restore` takes, for a file."""
        return np.round([self._taken, self._judged], 3).tolist()

    def restore(self, value: list[list[list[float]]]) -> None:
        """Go on from what :meth:`as_list` gave.

        Raises:
            ValueError, TypeError: it is odd.
        """
        counts = np.array(value, float)
        if counts.shape != (2, *self._taken.shape):
            raise ValueError("these are counts of something else")
        taken, judged = counts
        if not ((taken >= 0) & (taken <= judged) & (judged < 1e6)).all():
            raise ValueError("these are no counts")
        self._taken, self._judged = taken, judged
        self._places = self._tokens = None


def _places(taken: list[float], judged: list[float]) -> list[float]:
    """The chance at each place, from counts there and at the place before."""
    after = len(judged)
    while after and judged[after - 1] < 0.01:
        after -= 1
    before = (sum(taken) + _PRIOR * _FIRMNESS) / (sum(judged) + _FIRMNESS)
    found = []
    for stood, of in zip(taken[:after], judged[:after], strict=True):
        before = (stood + _NEIGHBOUR * before) / (of + _NEIGHBOUR)
        found.append(min(max(before, _LEAST), 1 - _LEAST))
    last = min(max(before, _LEAST), 1 - _LEAST)
    return found + [last] * (len(judged) - after)

"""How likely a draft token is of use, from what became of those before."""

import math
from collections.abc import Iterable

import numpy as np

#: After how many judged tokens an observation counts half.
_MEMORIES = (6, 32, 256)
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
#: Weights beyond which counts are scaled down.
_HEAVY = 1e12


class Chances:
    """For each place of a draft the chance that its token is committed, if those before
    it are.

    Only such tokens are counted, so what a rejection hides biases nothing. A token
    behind the end of a text is of no use, and counts as rejected ones do. Several
    memories, short and long, are mixed by how well each has foretold what came.

    Plain Python, as it is between every two rounds: for so few numbers that is quicker
    than arrays.
    """

    def __init__(self, most: int):
        """``most``: places."""
        self._most = most
        self._memories = [_Memory(size, most) for size in _MEMORIES]
        self._losses = [0.0] * len(_MEMORIES)
        self._tokens: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """The tokens to expect of a round with a draft of so many, at [K]: (most + 1,).

        1 + a1 + a1 a2 + ..., of the chances a.
        """
        if self._tokens is None:
            least = min(self._losses)
            weights = [math.exp(least - loss) for loss in self._losses]
            total = sum(weights)
            weights = [weight / total for weight in weights]
            its = [memory.places for memory in self._memories]
            used = max(map(len, its))
            its = [places + places[-1:] * (used - len(places)) for places in its]
            tokens, chain, found = 1.0, 1.0, [1.0]
            mixed = 0.0
            for place in range(self._most):
                if place < used:
                    mixed = 0.0
                    for weight, places in zip(weights, its, strict=True):
                        mixed += weight * places[place]
                chain *= mixed
                tokens += chain
                found.append(tokens)
            self._tokens = np.array(found)
        return self._tokens

    @property
    def sure(self) -> float:
        """How far that goes by what was seen, from 0 to 1."""
        seen = self._memories[_FAIR].total
        return seen / (seen + _DOUBT)

    def observe(self, drafts: Iterable[tuple[int, int]]) -> None:
        """Take in one round's (drafted, taken) of each row."""
        counts: dict[tuple[int, bool], int] = {}
        last = tests = 0
        for drafted, taken in drafts:
            tests += min(taken + 1, drafted)
            last = max(last, min(taken + 1, drafted))
            for place in range(taken):
                counts[place, True] = counts.get((place, True), 0) + 1
            if taken < drafted:
                counts[taken, False] = counts.get((taken, False), 0) + 1
        if not tests:
            return
        # Rows of a batch are seen at once: their mean counts for one of them.
        share = min(1.0, last / tests)
        forgiven = _FORGIVING ** min(tests, last)
        for number, memory in enumerate(self._memories):
            places = memory.places
            loss = 0.0
            for (place, stood), times in counts.items():
                chance = places[min(place, len(places) - 1)]
                loss -= times * math.log(chance if stood else 1 - chance)
            self._losses[number] = forgiven * self._losses[number] + share * loss
            memory.observe(counts, tests)
        self._tokens = None

    def as_list(self) -> list[list[list[float]]]:
        """What :meth:`restore` takes, for a file."""
        return [memory.as_list() for memory in self._memories]

    def restore(self, value: list[list[list[float]]]) -> None:
        """Go on from what :meth:`as_list` gave.

        Raises:
            ValueError, TypeError: it is odd.
        """
        for memory, counts in zip(self._memories, value, strict=True):
            memory.restore(counts, self._most)
        self._tokens = None


class _Memory:
    """Counts by place that fade: what is new weighs ever more."""

    def __init__(self, size: int, most: int):
        self._growth = 2 ** (1 / size)
        self._weight = 1.0  # of one observation now
        self._taken = [0.0] * most
        self._judged = [0.0] * most
        self._used = 0  # places that were ever judged
        self._places: list[float] | None = None

    @property
    def total(self) -> float:
        """How many judged tokens it has, as much as they still count."""
        return sum(self._judged[: self._used]) / self._weight

    @property
    def places(self) -> list[float]:
        """The chance at each place, up to one that was never judged: from there on it
        stays the same."""
        if self._places is not None:
            return self._places
        weight, used = self._weight, self._used
        before = sum(self._taken[:used]) + _PRIOR * _FIRMNESS * weight
        before /= sum(self._judged[:used]) + _FIRMNESS * weight
        found = []
        neighbour = _NEIGHBOUR * weight
        for taken, judged in zip(self._taken[:used], self._judged, strict=False):
            before = (taken + neighbour * before) / (judged + neighbour)
            found.append(before)
        found.append(before)
        self._places = [
            _LEAST if each < _LEAST else 1 - _LEAST if each > 1 - _LEAST else each
            for each in found
        ]
        return self._places

    def observe(self, counts: dict[tuple[int, bool], int], tests: int) -> None:
        """Take in how often a token at a place stood or fell."""
        self._places = None
        self._weight *= self._growth**tests
        for (place, stood), times in counts.items():
            self._judged[place] += self._weight * times
            if stood:
                self._taken[place] += self._weight * times
            self._used = max(self._used, place + 1)
        if self._weight > _HEAVY:
            self._taken = [each / self._weight for each in self._taken]
            self._judged = [each / self._weight for each in self._judged]
            self._weight = 1.0

    def as_list(self) -> list[list[float]]:
        """The counts as they weigh now."""
        return [
            [round(each / self._weight, 4) for each in counts]
            for counts in (self._taken, self._judged)
        ]

    def restore(self, value: list[list[float]], most: int) -> None:
        """Go on from them.

        Raises:
            ValueError, TypeError: they are odd.
        """
        taken, judged = ([float(each) for each in counts] for counts in value)
        if not len(taken) == len(judged) == most or not all(
            0 <= a <= b < 1e6 for a, b in zip(taken, judged, strict=True)
        ):
            raise ValueError("these are no counts")
        self._taken, self._judged, self._weight = taken, judged, 1.0
        self._places = None
        used = [place for place, each in enumerate(judged) if each > 0]
        self._used = used[-1] + 1 if used else 0

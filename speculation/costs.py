"""What a round costs, from the seconds that rounds have taken."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

#: How much of a surprise is the machine's, which is slower or faster than it was: that
#: of a plain round, and that of another, of which the latter share is the round's own.
_PLAIN_GAIN, _SPEED_GAIN, _KIND_GAIN = 0.3, 0.06, 0.03
#: The largest surprise that is taken at its word, as a logarithm.
_SURPRISE = 0.4
#: Observations after which a round's cost is known.
KNOWN = 3.0
#: The most observations that are remembered of one, and the most that it lends to
#: others.
_MOST_SEEN, _MOST_LENT = 32.0, 4.0
#: How little is sure about a cost that was never measured, as a share of it.
_UNSURE = 0.07
#: No round is thought to cost less than that beyond a plain one.
_LEAST = 0.02
#: Rounds after which what was seen counts half.
_STALE = 512


class Costs:
    """Costs of rounds with one number of rows, in plain rounds.

    The seconds of a round are a product: the machine's speed of the moment, what models
    of these sizes are expected to take, and what such a round turned out to take beside
    that. The last is kept for every number of tokens, drafted by the model or without
    it; where it was never measured it goes by its nearest neighbours.

    Attributes:
        rounds: that were timed.
        plain_seen: how often a plain one was, lately.
        seen: (2, most + 1), how often others were, as :attr:`of` has them.
    """

    def __init__(
        self,
        most: int,
        step: float,
        token: float,
        like: "Costs | None" = None,
        times: float = 1.0,
    ):
        """
        Args:
            most: the most tokens of a draft.
            step: what a step of the draft is expected to cost.
            token: likewise another token of the target's pass.
            like: what is known of another number of rows, which is expected instead.
            times: how many times as many rows there are here.
        """
        self.rounds = 0
        self.plain_seen = 0.0
        self._plain: float | None = None  # log seconds of a plain round
        # Of rounds that draft (without, with) the model, at [K]; plain ones at 0.
        size = np.arange(most + 1)
        steps = np.stack([0 * size, size])
        self._expected = np.log(1 + token * size + step * steps)
        if like:
            # More rows cost more beside plain rounds, though not as many times.
            beyond = (like.of - 1) * math.sqrt(times)
            self._expected = np.log1p(np.maximum(beyond, _LEAST))
        self._corrections = np.zeros((2, most + 1))  # to add, logarithms
        self.seen = np.zeros((2, most + 1))  # how often, lately
        far = (steps.reshape(-1, 1) - steps.reshape(-1)) ** 2
        far += (np.tile(size, 2)[:, None] - np.tile(size, 2)) ** 2
        self._near = 1 / (1 + 4 * far) - np.eye(2 * (most + 1))
        self._of: np.ndarray | None = None
        self._farthest: int | None = None

    @property
    def plain_seconds(self) -> float | None:
        """What a plain round takes now; None as long as there was none at all."""
        return None if self._plain is None else math.exp(self._plain)

    @property
    def farthest(self) -> int:
        """The most tokens of a draft that has a cost of its own."""
        if self._farthest is None:
            self._farthest = int(
                (self.seen >= 1).any(axis=0).nonzero()[0].max(initial=0)
            )
        return self._farthest

    @property
    def of(self) -> np.ndarray:
        """What rounds cost (2, most + 1): without and with steps of the model, at [K]
        tokens."""
        if self._of is None:
            seen, expected = self.seen.reshape(-1), self._expected.reshape(-1)
            own = expected + self._corrections.reshape(-1)
            # What a round costs beyond a plain one goes for its neighbours as well.
            share = np.log(np.maximum(np.exp(own) - 1, _LEAST))
            share -= np.log(np.maximum(np.exp(expected) - 1, _LEAST))
            lent = self._near * np.minimum(seen, _MOST_LENT)
            weight = lent.sum(axis=1) + 1e-4
            beyond = np.maximum(np.exp(expected) - 1, _LEAST)
            beyond *= np.exp(lent @ share / weight)
            # At first it goes by them, then ever more by itself.
            total = (weight * np.log1p(beyond) + seen * own) / (weight + seen)
            self._of = np.exp(total).reshape(self.seen.shape)
            self._of[:, 0] = 1
        return self._of

    @property
    def hope(self) -> np.ndarray:
        """How much less they may cost than it seems, while that is a guess: factors."""
        return 1 - _UNSURE / (1 + self.seen)

    def observe(self, model: bool, size: int, seconds: float) -> None:
        """Take in the seconds of a round that drafted ``size`` tokens."""
        self._fade()
        cost = math.log(self.of[int(model), size])
        took = math.log(max(seconds, 1e-9))
        if self._plain is None:
            self._plain = took - cost
        surprise = took - self._plain - cost
        if size:
            self._observe_draft((int(model), size), surprise)
        else:
            self._observe_plain(surprise)

    def doubt(self, model: bool, size: int) -> None:
        """What such rounds cost is to be found out again, nearly: it was long ago."""
        kind = int(model), size
        self.seen[kind] = min(self.seen[kind], KNOWN)

    def _observe_draft(self, kind: tuple[int, int], surprise: float) -> None:
        seen = self.seen[kind]
        # What is off by much may be the device's first round of its kind, or an
        # interruption.
        weight = 1.0 if abs(surprise) < _SURPRISE else 0.5
        surprise = _bounded(surprise)
        if seen < KNOWN:
            if not seen:
                self._corrections[kind] = math.log(self.of[kind]) - self._expected[kind]
            self.seen[kind] = seen + weight
            self._corrections[kind] += surprise * weight / (seen + weight)
            self._of = self._farthest = None
            return
        self._plain += _SPEED_GAIN * surprise
        self._corrections[kind] += max(_KIND_GAIN, 1 / (seen + 1)) * surprise
        self.seen[kind] = min(seen + 1, _MOST_SEEN)
        if self.rounds % 8 == 0:  # it changes little
            self._of = self._farthest = None

    def _observe_plain(self, surprise: float) -> None:
        if self.plain_seen >= KNOWN:
            self._plain += _PLAIN_GAIN * _bounded(surprise)
            self.plain_seen = min(self.plain_seen + 1, _MOST_SEEN)
            return
        # All else was measured in what a plain round was thought to take.
        self.plain_seen += 1
        share = surprise / self.plain_seen
        self._plain += share
        self._corrections[self.seen > 0] -= share
        self._of = self._farthest = None

    def _fade(self) -> None:
        """What was measured long ago is less sure."""
        self.rounds += 1
        if self.rounds % _STALE == 0:
            self.plain_seen /= 2
            self.seen /= 2
            self._of = self._farthest = None

    def calibrate(
        self, plain: float, rounds: Mapping[tuple[bool, int], float], seen: float
    ) -> None:
        """Go by this from now on, instead of what was known of such rounds.

        Args:
            plain: seconds of a plain round.
            rounds: by (model, size) of :meth:`observe`, what they cost in plain ones.
            seen: how many independent observations that is from.

        Raises:
            ValueError: these are no costs.
        """
        if not all(0 < each < math.inf for each in (plain, *rounds.values(), seen)):
            raise ValueError("these are no costs")
        seen = min(max(seen, 1.0), _MOST_SEEN)
        self._plain, self.plain_seen = math.log(plain), max(seen, KNOWN)
        for (model, size), cost in rounds.items():
            if not size:
                continue  # a plain one costs one
            kind = int(model), size
            self._corrections[kind] = math.log(cost) - self._expected[kind]
            self.seen[kind] = seen
        self._of = self._farthest = None

    def as_dict(self) -> dict[str, Any]:
        """What :meth:`restore` takes, for a file: costs, not the machine's speed."""
        return {
            "rounds": self.rounds,
            "plain_seen": round(self.plain_seen, 2),
            "seen": np.round(self.seen, 2).tolist(),
            "costs": np.round(self._expected + self._corrections, 4).tolist(),
        }

    def restore(self, value: dict[str, Any]) -> None:
        """Go on from what :meth:`as_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: it is odd.
        """
        seen = np.array(value["seen"], float)
        costs = np.array(value["costs"], float)
        if not seen.shape == costs.shape == self.seen.shape:
            raise ValueError("these are costs of something else")
        plain_seen = float(value["plain_seen"])
        sound = (np.abs(costs) < 10).all() and (seen >= 0).all()
        if not (sound and plain_seen >= 0):  # NaN is neither
            raise ValueError("these are no costs")
        self.rounds = min(max(int(value["rounds"]), 0), _STALE)
        # Another day is another machine, a little.
        self.plain_seen = min(plain_seen, 2 * KNOWN)
        self.seen = np.minimum(seen, 2 * KNOWN)
        self._corrections = costs - self._expected
        self._of = self._farthest = None


def _bounded(surprise: float) -> float:
    """As much of it as is taken at its word."""
    return min(max(surprise, -_SURPRISE), _SURPRISE)

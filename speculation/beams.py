"""Beam search over one text: what it asks for, and its steps on the host.

The reference behaviour is transformers' ``generate(num_beams=N, do_sample=False)`` of
version 5. A step takes the best continuations of all beams by the sum of their
log-probabilities. Those that end the text are finished, if they are among the N best;
of the others the N best go on. At last the finished ones are compared by that sum over
a power of their length.

A step needs of each beam no more than its few best continuations. Who scored them, and
how many steps ahead, makes no difference here: that is what speculation rests on.
"""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from system.errors import InputError

#: The most beams, and the largest power of a length.
MOST_BEAMS, MOST_PENALTY = 64, 10.0
#: A third way to stop early, beside True and False.
NEVER = "never"
#: By how much a beam that was not scored has to be behind.
_MARGIN = 1e-5


@dataclass(frozen=True)
class Beams:
    """A beam search, under the names of transformers.

    Attributes:
        num_beams: N; 1 for no beams.
        length_penalty: the power of a text's length, its end counted, that the sum of
            its log-probabilities is divided by: above 0 longer texts gain.
        early_stopping: True ends the search as soon as there are N finished texts;
            False when the best beam, ended as it is, would be no better than the worst
            of those; "never" when it could not become so, however long it gets.

    Raises:
        InputError: an option out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        count, penalty, how = self.num_beams, self.length_penalty, self.early_stopping
        whole = isinstance(count, Integral) and not isinstance(count, bool)
        if not (whole and 1 <= count <= MOST_BEAMS):
            raise InputError(
                f"num-beams is {count!r}: it has to be a whole number from 1 to "
                f"{MOST_BEAMS}"
            )
        number = isinstance(penalty, Real) and not isinstance(penalty, bool)
        if not (number and abs(penalty) <= MOST_PENALTY):  # NaN too
            raise InputError(
                f"length-penalty is {penalty!r}: it has to be a number from "
                f"{-MOST_PENALTY:g} to {MOST_PENALTY:g}"
            )
        if not (isinstance(how, bool) or how == NEVER):
            raise InputError(
                f"early-stopping is {how!r}: it has to be true, false or {NEVER}"
            )


class Hypothesis(NamedTuple):
    """A finished text.

    Attributes:
        tokens: that were generated, end-of-sequence included where it was.
        score: the sum of their log-probabilities over the power of their number:
            transformers' ``sequences_scores``.
        finish_reason: "eos" where it ended, else "length".
    """

    tokens: list[int]
    score: float
    finish_reason: str


class Table(NamedTuple):
    """A beam's best continuations, best first: as many as there are beams, and one more
    for each id that ends a text.

    Attributes:
        scores: float32, their log-probabilities; -inf for what must not be.
        tokens: their ids.
    """

    scores: np.ndarray
    tokens: np.ndarray


class Node:
    """A token of a text that may go on in several ways, and those before it.

    Attributes:
        token: its id.
        parent: the one before it; None of the first.
        depth: how many are before it.
        drafted: whether a draft proposed it.
        slot: the position of the caches that has it; None as long as none has.
        entered: whether the draft model's cache has it there as well.
        table: how it goes on; None where that is not known.
    """

    __slots__ = (
        "_back",
        "depth",
        "drafted",
        "entered",
        "parent",
        "slot",
        "table",
        "token",
    )

    def __init__(self, token: int, parent: "Node | None" = None, drafted: bool = False):
        self.token, self.parent, self.drafted = token, parent, drafted
        self.depth = parent.depth + 1 if parent else 0
        self.slot: int | None = None
        self.entered = False
        self.table: Table | None = None
        self._back: np.ndarray | None = None

    @property
    def back(self) -> np.ndarray:
        """How many tokens back each position of the caches is (n,) int32, its own the
        last; -1 for those that are none of its text."""
        if self._back is None:
            known, slots = self, []  # up to one that knows it
            while known and known._back is None:
                slots.append(known.slot)
                known = known.parent
            before = known._back if known else np.zeros(0, np.int32)
            back = np.full(max(len(before), max(slots) + 1), -1, np.int32)
            back[: len(before)] = np.where(before < 0, -1, before + len(slots))
            back[slots] = np.arange(len(slots))
            self._back = back
        return self._back

    def forget(self) -> None:
        """Be one that others follow, and no more."""
        self.table = self._back = None

    def line(self) -> "Iterator[Node]":
        """It and those before it, the first one last."""
        node: Node | None = self
        while node:
            yield node
            node = node.parent

    def unentered(self) -> "Iterator[Node]":
        """Of those before it the ones that the draft model's cache has not."""
        node = self.parent
        while node and not node.entered:
            yield node
            node = node.parent

    def tokens(self, since: "Node | None" = None) -> list[int]:
        """The tokens after ``since``, which is before it; without one, after the
        first."""
        found = []
        for node in self.line():
            if node is since or not node.parent:
                break
            found.append(node.token)
        return found[::-1]


def common(nodes: list[Node]) -> Node:
    """The last one that all have, each its own last."""
    first, *others = nodes
    for other in others:
        while first is not other:
            if first.depth >= other.depth:
                first = first.parent
            else:
                other = other.parent
    return first


class Search:
    """One text's search.

    Attributes:
        running: the beams that go on, best first; at most N.
        finished: texts with their scores, best first; at most N.
        steps: that were taken.
        over: whether it is to take no more.
    """

    def __init__(
        self,
        beams: Beams,
        ends: AbstractSet[int],
        most: int,
        root: Node,
        bounded: bool = True,
    ):
        """
        Args:
            ends: ids that end a text.
            most: tokens of a text.
            root: the token that decoding starts from.
            bounded: whether no score of a :class:`Table` is above 0.
        """
        self.running = [root]
        self.finished: list[tuple[float, Node]] = []
        self.steps = 0
        self.over = False
        self.scores = np.zeros(1, np.float32)  # sums, of those that run
        self._beams, self._ends, self._most = beams, ends, most
        self._bounded = bounded
        self._hopeful = True  # whether a beam may still become one of the finished

    def step(self, known: Mapping[tuple[Node, int], Node]) -> bool:
        """Take a step, if what is known of the beams decides it.

        A beam without a table does not matter where, even if it went on for sure, N
        others would be before it.

        Args:
            known: by the node before and their token, those that are there already.

        Returns:
            False where it was not decided, and nothing has changed.
        """
        count = self._beams.num_beams
        best = self._best()
        going_on = [each for each in best if each[2] not in self._ends][:count]
        unknown = [
            score
            for node, score in zip(self.running, self.scores, strict=True)
            if node.table is None
        ]
        if unknown and not (
            self._bounded
            and len(going_on) == count
            and going_on[-1][0] > max(unknown) + _MARGIN
        ):
            return False
        self.steps += 1
        last = self.steps == self._most
        full = len(self.finished) == count and self._beams.early_stopping is True
        if self._hopeful and not full:
            for score, parent, token in best[:count]:
                if last or token in self._ends:
                    node = known.get((parent, token)) or Node(token, parent)
                    self.finished.append((self._by_length(score, self.steps), node))
            self.finished.sort(key=lambda each: -each[0])  # stable
            del self.finished[count:]
        if last:
            going_on = []
        self.running = [
            known.get((parent, token)) or Node(token, parent)
            for _, parent, token in going_on
        ]
        self.scores = np.array([score for score, *_ in going_on], np.float32)
        self._look()
        return True

    def _best(self) -> list[tuple[np.float32, Node, int]]:
        """The best continuations of those with a table: enough of them that, even if
        others end the text, N go on."""
        pairs = [
            (node, score)
            for node, score in zip(self.running, self.scores, strict=True)
            if node.table is not None
        ]
        if not pairs:
            return []
        # A table may have more, for another text that more ids end.
        size = self._beams.num_beams + len(self._ends)
        scores = np.stack([node.table.scores[:size] + score for node, score in pairs])
        size = scores.shape[1]
        keep = self._beams.num_beams * (1 + len(self._ends))
        order = np.argsort(-scores, axis=None, kind="stable")[:keep].tolist()
        flat = scores.reshape(-1)
        return [
            (flat[place], node, int(node.table.tokens[place % size]))
            for place in order
            if flat[place] > -math.inf
            for node in [pairs[place // size][0]]
        ]

    def _by_length(self, score: float, length: int) -> float:
        return float(score) / length**self._beams.length_penalty

    def _look(self) -> None:
        """Whether there is any use in going on."""
        how, count = self._beams.early_stopping, self._beams.num_beams
        full = len(self.finished) == count
        if full and self.running:
            longest = how == NEVER and self._beams.length_penalty > 0
            length = self._most if longest else self.steps
            possible = self._by_length(self.scores[0], length)
            self._hopeful &= possible > self.finished[-1][0]
        done = full and how is True
        self.over = done or not (self._hopeful and self.running)

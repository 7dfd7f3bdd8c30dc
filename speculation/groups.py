"""A text that is searched for with several beams: one row of the batch, and a tree."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from speculation.beams import Hypothesis, Node, Search, Table, common
from speculation.requests import Commit, Request
from speculation.rows import Row
from speculation.samplers import Rules
from system.errors import InputError


class Growth(NamedTuple):
    """What a round has found out about one row's tree.

    Attributes:
        fed: the nodes that lacked scores, and ``tables``, those.
        roots: what the draft went on from, best first.
        drafted: (K, 2, W), step by step which node of the one before each of the
            draft's nodes follows, and its token.
        slots: (K W,) of those nodes, and ``scored``, their tables.
    """

    fed: list[Node]
    tables: list[Table]
    roots: list[Node]
    drafted: np.ndarray
    slots: np.ndarray
    scored: list[Table]

    @property
    def size(self) -> int:
        """K; 0 where nothing was drafted for this row."""
        return len(self.drafted) if self.roots else 0

    @property
    def found(self) -> bool:
        """Nothing of it was looked up."""
        return False

    @property
    def finite(self) -> int:
        """1 where all that was scored has usable logits, else 0."""
        return int(all(map(_usable, [*self.tables, *self.scored])))

    def plant(self) -> dict[tuple[Node, int], Node]:
        """The draft's nodes, by the node before and their token; tables and slots are
        where they belong from now on."""
        for node, table in zip(self.fed, self.tables, strict=True):
            node.table = table
        known: dict[tuple[Node, int], Node] = {}
        before: list[Node | None] = list(self.roots)
        for step, (parents, tokens) in enumerate(self.drafted.tolist()):
            level: list[Node | None] = []
            for place, (which, token) in enumerate(zip(parents, tokens, strict=True)):
                parent = before[which] if which < len(before) else None
                at = step * len(parents) + place
                if parent is None or not _usable(self.scored[at]):
                    level.append(None)
                    continue
                node = Node(token, parent, drafted=True)
                node.slot, node.table = int(self.slots[at]), self.scored[at]
                node.entered = step < self.size - 1
                level.append(known.setdefault((parent, token), node))
            before = level
        return known


class Group(Row):
    """As :class:`Row`, for a beam search.

    Attributes:
        search: how far it has come.
    """

    def __init__(self, number: int, request: Request, rules: Rules):
        super().__init__(number, request, rules)
        self.width = request.width

    def begin(
        self, first: list[int], positions: int, seconds: float, now: float
    ) -> None:
        """As :class:`Row` has it."""
        super().begin(first, positions, seconds, now)
        root = Node(first[-1])
        self.search = Search(
            self.request.beams,
            self.request.eos_tokens,
            self.budget,
            root,
            # What a caller's own processors do to scores is not known.
            bounded=not self.request.sampling.processors,
        )
        self._said = root  # up to there the text is known
        self._kept: list[Node] = []  # that know what is before them

    @property
    def prompt(self) -> list[int]:
        """What it answers."""
        return self.request.prompt

    @property
    def cached(self) -> int:
        """As :class:`Row` has it."""
        return len(self._taken())

    def free(self, count: int) -> np.ndarray:
        """The first slots that no beam goes through."""
        taken = self._taken()
        there = np.flatnonzero(~taken)[:count]
        return np.concatenate([there, len(taken) + np.arange(count - len(there))])

    def holes(self) -> list[int]:
        """The slots that are free and lie before others that are not."""
        return np.flatnonzero(~self._taken()).tolist()

    def _cached(self) -> list[Node]:
        """Of each beam that runs the last node that the caches have."""
        nodes = [
            node if node.slot is not None else node.parent
            for node in self.search.running
        ]
        return [node for node in nodes if node]

    def _forget(self, nodes: list[Node]) -> None:
        """Keep of these what those that run need: a text may get long."""
        kept = self._cached()
        for node in kept:
            _ = node.back  # of what is before it
        for node in {*nodes, *self._kept} - {*kept, *self.search.running}:
            node.forget()
        self._kept = kept

    def _taken(self) -> np.ndarray:
        """Which slots beams go through, up to the last one: bool."""
        backs = [node.back for node in self._cached()]
        taken = np.zeros(max(map(len, backs), default=0), bool)
        for back in backs:
            taken[: len(back)] |= back >= 0
        return taken

    def commit(self, outcome: Growth, fault: Callable[[], InputError]) -> Commit | None:
        """Take the steps of the search that a round's scores decide.

        Args:
            fault: why a beam has no scores, where it has none.

        Returns:
            None where nothing more of the text is certain.
        """
        search, before = self.search, self.search.steps
        known = outcome.plant()
        if not all(_usable(node.table) for node in outcome.fed):
            for node in outcome.fed:
                node.table = None
            if outcome.size:
                # It may be the draft that the target makes no numbers of, which reach
                # whatever attends beside it.
                self._go_undrafted(outcome)
                return None
            return self.fail(fault())
        while not search.over and search.step(known):
            pass
        self._forget([*outcome.fed, *outcome.roots, *known.values()])
        steps = search.steps - before
        self.budget -= steps
        accepted = min(steps - 1, outcome.size)
        self.taken, self.added = accepted, steps
        judged = 0 if search.over else min(1, outcome.size - accepted)
        self._count(outcome, accepted, judged)
        if not search.over:
            return self._more(common([*search.running, *self._ends()]), None)
        if not search.finished:
            return self.fail(fault())
        self.finished = True
        ends = self.request.eos_tokens
        found = tuple(
            Hypothesis(node.tokens(), score, "eos" if node.token in ends else "length")
            for score, node in search.finished
        )
        return self._more(search.finished[0][1], found[0].finish_reason, found)

    def _ends(self) -> list[Node]:
        return [node for _, node in self.search.finished]

    def _more(
        self, last: Node, reason: str | None, found: tuple[Hypothesis, ...] = ()
    ) -> Commit | None:
        """What is certain of the text up to this node, and was not before."""
        tokens = last.tokens(since=self._said)
        if not tokens:
            return None
        drafted = 0
        for node in list(last.line())[len(tokens) - 1 :: -1]:
            if not node.drafted:
                break
            drafted += 1
        self._said = last
        return self._commit(tokens, drafted, reason, found)


def _usable(table: Table | None) -> bool:
    """Whether it is made of numbers."""
    return table is not None and not np.isnan(table.scores).any()

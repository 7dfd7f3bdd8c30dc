"""A round of beam searches on its way through the device: texts that go on in several
ways are one row, whose cache has a tree.

Every node of it has a position of the cache, a slot, and attends to those before it in
its own text, wherever they lie. So nothing of a cache is moved or copied when beams are
chosen: a slot that no beam goes through is taken by another node. The target and the
draft have every node in the same slot.

     committed       the draft's, K = 2
     ... a ── b ──┬─ c ── e        one pass of the target over b, g, c, d, h, e, f, i
         │        └─ d ── f        scores all of them, and the host takes the steps of
         └─ g ─────── h ── i       plain beam search, as far as these numbers reach

Shapes: B = batch, N = beams, W = those of the draft, K = its steps, U = nodes without
scores, T = U + K W, those of the pass, n = slots, V = vocabulary, k = continuations of
a node.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from speculation.beams import Node, Table
from speculation.groups import Group, Growth
from speculation.policy import Plan
from speculation.processors import Prefix
from speculation.rounds import fault_of
from speculation.samplers import Rules, fitted
from speculation.session import Session
from system.errors import InputError

#: How many times as many beams the draft has: which of the last ones the target keeps
#: is what it guesses worst.
WIDER = 2
#: Neighbours among the ids, of which the best is looked at first.
_NEIGHBOURS = 64


@dataclass
class TreeRound:
    """A round on its way through the device; as :class:`rounds.Round`."""

    scores: mx.array  # (B, T, k) float32
    tokens: mx.array  # (B, T, k) int32
    drafted: list[tuple[mx.array, mx.array]]  # K of (B, W) int32: parents, tokens
    logits: mx.array
    fed: list[list[Node]]
    roots: list[list[Node]]
    slots: np.ndarray  # (B, K W), of what was drafted
    rows: "list[Group | None]"
    width: int  # W
    plan: Plan | None = None
    positions = 1

    def read(self) -> list[Growth]:
        """Wait for it: what each row's tree has got."""
        mx.eval(self.scores, self.tokens, self.drafted)
        scores, tokens = np.array(self.scores), np.array(self.tokens)
        order = np.lexsort((tokens, -scores), axis=-1)
        scores = np.take_along_axis(scores, order, axis=-1)
        tokens = np.take_along_axis(tokens, order, axis=-1)
        steps = len(self.drafted)
        drafted = np.zeros((steps, 2, len(scores), self.width), np.int32)
        for step, pair in enumerate(self.drafted):
            drafted[step] = [np.array(each) for each in pair]
        size = self.scores.shape[1] - steps * self.width
        found = []
        for row, (fed, roots) in enumerate(zip(self.fed, self.roots, strict=True)):
            tables = [
                Table(*each) for each in zip(scores[row], tokens[row], strict=True)
            ]
            found.append(
                Growth(
                    fed,
                    tables[: len(fed)],
                    roots,
                    drafted[:, :, row],
                    self.slots[row],
                    tables[size:],
                )
            )
        return found

    def fault(self, row: int) -> InputError:
        """Why there is no next token in that row."""
        return fault_of(self.logits[row])


class _Fed(NamedTuple):
    """What is fed to a model: arrays of the host.

    Attributes:
        tokens, slots: (B, T).
        back: (B, T, n), of :attr:`Node.back`.
    """

    tokens: np.ndarray
    slots: np.ndarray
    back: np.ndarray

    @classmethod
    def of(
        cls, nodes: "list[list[Node | None]]", scratch: np.ndarray, slots: int
    ) -> "_Fed":
        """These nodes of each row. What is nobody's is all in one slot, ``scratch``
        (B,), and sees that alone."""
        size = max(map(len, nodes))
        tokens = np.zeros((len(nodes), size), np.int32)
        at = np.repeat(scratch[:, None], size, axis=1)
        back = np.full((len(nodes), size, slots), -1, np.int32)
        for row, its in enumerate(nodes):
            back[row, :, scratch[row]] = 0
            for place, node in enumerate(its):
                if node:
                    tokens[row, place], at[row, place] = node.token, node.slot
                    back[row, place, scratch[row]] = -1
                    back[row, place, : len(node.back)] = node.back
        return cls(tokens, at, back)


def launch_trees(
    target: Session, draft: Session | None, rows: "list[Group | None]", steps: int
) -> TreeRound:
    """Build a round's graph: grow the trees by ``steps`` of the draft, and score them.

    Args:
        draft: asked where ``steps`` is above 0, about the rows that it was given.
    """
    beams = max(row.width for row in rows if row)
    width = WIDER * beams
    fed = [
        [node for node in row.search.running if node.table is None] if row else []
        for row in rows
    ]
    size = max(map(len, fed))
    free = _slots(rows, size + steps * width + 1)
    for its, room in zip(fed, free.tolist(), strict=True):
        for node, slot in zip(its, room, strict=False):
            if node.slot is None:  # else it is fed once more
                node.slot = slot
    levels, scratch = free[:, size:-1], free[:, -1]
    slots = max(1 + int(free.max()), *(row.cached for row in rows if row))
    scorer = _Scorer(rows)
    whole = _Fed.of(fed, scratch, slots)
    grown = [_Level(mx.array(whole.tokens), mx.array(whole.back), scorer.paths(fed))]
    roots: list[list[Node]] = [[] for _ in rows]
    if steps:
        growing = _Growing(draft, rows, scorer, scratch, slots, width)
        roots = growing.roots
        grown += [growing.step(at) for at in np.split(levels, steps, axis=1)]
    tokens = _joined(each.tokens for each in grown)
    if steps and not all(roots):
        # What is not judged is nothing that could do harm.
        safe = mx.array([row.sequence[0] if row else 0 for row in rows])[:, None]
        judged = mx.array([bool(its) for its in roots])[:, None]
        tokens = mx.where(judged | (mx.arange(tokens.shape[1]) < size), tokens, safe)
    inside = mx.clip(tokens, 0, target.vocabulary - 1)
    at = np.concatenate([whole.slots, levels], axis=1)
    back = _joined(each.back for each in grown)
    logits, total = target.extend_tree(inside, at, back)
    paths = _Level.paths_of(grown) if scorer.chained else None
    scores, tokens = scorer(logits, total, paths, beams)
    drafted = [(each.parents, each.tokens) for each in grown[1:]]
    return TreeRound(scores, tokens, drafted, logits, fed, roots, levels, rows, width)


def _slots(rows: "list[Group | None]", count: int) -> np.ndarray:
    """So many that are free in each row (B, count)."""
    free = [row.free(count) if row else np.arange(count) for row in rows]
    return np.stack(free).astype(np.int32)


def _joined(parts: Iterable[mx.array]) -> mx.array:
    """Along their second axis."""
    first, *others = parts
    return mx.concatenate([first, *others], axis=1) if others else first


class _Level(NamedTuple):
    """Nodes that are as deep as each other, row by row.

    Attributes:
        tokens: (B, P) int32.
        back: (B, P, n), of :attr:`Node.back`.
        path: (B, P, L) int32, the tokens up to each, -1 before a row's first; None
            where nobody looks at them.
        parents: (B, P) int32, which node of the level before each follows; None of the
            first.
    """

    tokens: mx.array
    back: mx.array
    path: mx.array | None
    parents: mx.array | None = None

    @staticmethod
    def paths_of(levels: "list[_Level]") -> mx.array:
        """The paths of several levels (B, T, L), the shorter ones padded."""
        longest = max(each.path.shape[2] for each in levels)
        return _joined(
            mx.pad(
                each.path,
                [(0, 0), (0, 0), (longest - each.path.shape[2], 0)],
                constant_values=-1,
            )
            for each in levels
        )


class _Growing:
    """The draft's own beam search, from where the target's is."""

    def __init__(
        self,
        draft: Session,
        rows: "list[Group | None]",
        scorer: "_Scorer",
        scratch: np.ndarray,
        slots: int,
        width: int,
    ):
        self._draft, self._scorer, self._width = draft, scorer, width
        #: What it goes on from, in the rows that it was given.
        self.roots = [
            list(row.search.running) if row and row.entered and row.drafted else []
            for row in rows
        ]
        most = max(1, *map(len, self.roots))
        fed: list[list[Node | None]] = []
        scores = np.full((len(rows), most), -np.inf, np.float32)
        for place, (row, its) in enumerate(zip(rows, self.roots, strict=True)):
            lacking = dict.fromkeys(node for leaf in its for node in leaf.unentered())
            fed.append([*its, *[None] * (most - len(its)), *lacking])
            for node in fed[-1]:
                if node:
                    node.entered = True
            if its:
                scores[place, : len(its)] = row.search.scores
        first = _Fed.of(fed, scratch, slots)
        for its in fed:
            for node in its[most:]:
                node.forget()
        self._logits = self._feed(
            mx.array(first.tokens), first.slots, mx.array(first.back)
        )[:, :most]
        self._scores = mx.array(scores)
        self._level = _Level(
            mx.array(first.tokens[:, :most]),
            mx.array(first.back[:, :most]),
            scorer.paths([its[:most] for its in fed]),
        )
        self._fed: np.ndarray | None = None

    def step(self, slots: np.ndarray) -> _Level:
        """The next level, whose nodes have these slots (B, W)."""
        level = self._level
        if self._fed is not None:
            self._logits = self._feed(level.tokens, self._fed, level.back)
        scores, tokens = self._scorer.guess(self._logits, level.path, self._width)
        size = scores.shape[2]
        scores = scores + self._scores[:, :, None]
        if size * scores.shape[1] < self._width:  # there are not so many tokens
            size = self._width
            more = [(0, 0), (0, 0), (0, size - scores.shape[2])]
            scores = mx.pad(scores, more, constant_values=-math.inf)
            tokens = mx.pad(tokens, more)
        scores = scores.flatten(1)
        best = mx.argsort(-scores, axis=1)[:, : self._width]
        self._scores = mx.take_along_axis(scores, best, axis=1)
        token = mx.take_along_axis(tokens.flatten(1), best, axis=1)
        parent = (best // size).astype(mx.int32)
        mx.async_eval(token)  # it runs while the next step is being built
        before = mx.take_along_axis(level.back, parent[:, :, None], axis=1)
        own = mx.arange(before.shape[2]) == mx.array(slots)[:, :, None]
        back = mx.where(own, 0, mx.where(before < 0, -1, before + 1))
        path = None
        if level.path is not None:
            path = mx.take_along_axis(level.path, parent[:, :, None], axis=1)
            path = mx.concatenate([path, token[:, :, None]], axis=2)
        self._level, self._fed = _Level(token, back, path, parent), slots
        return self._level

    def _feed(self, tokens: mx.array, slots: np.ndarray, back: mx.array) -> mx.array:
        # A target with more ids than the draft: a bad guess follows, not a bad read.
        inside = mx.clip(tokens, 0, self._draft.vocabulary - 1)
        return self._draft.extend_tree(inside, slots, back)[0]


class _Scorer:
    """How nodes go on, by the rules of their rows.

    Attributes:
        chained: whether there are processors.
    """

    def __init__(self, rows: "list[Group | None]"):
        self._vocabulary = next(row.rules.vocabulary for row in rows if row)
        self._rows = rows
        places: dict[Rules, list[int]] = {}
        for place, row in enumerate(rows):
            if row:
                places.setdefault(row.rules, []).append(place)
        self._places = {rules: its for rules, its in places.items() if rules.chain}
        self.chained = bool(self._places)
        ends = [sorted(row.rules.eos_tokens) if row else [] for row in rows]
        self._most_ends = max(map(len, ends))
        known = [[*its, *[-1] * (self._most_ends - len(its))] for its in ends]
        self._ends = mx.array(known, mx.int32).reshape(len(rows), 1, 1, -1)

    def paths(self, nodes: "list[list[Node | None]]") -> mx.array | None:
        """Of a :class:`_Level` of these nodes."""
        if not self.chained:
            return None
        found = [[node and list(node.line()) for node in its] for its in nodes]
        longest = max((len(line) for its in found for line in its if line), default=1)
        paths = np.full((len(nodes), max(map(len, nodes)), longest), -1, np.int32)
        for row, its in enumerate(found):
            for place, line in enumerate(its):
                if line:
                    tokens = [node.token for node in line]
                    paths[row, place, -len(tokens) :] = tokens[::-1]
        return mx.array(paths)

    def __call__(
        self, logits: mx.array, total: mx.array, paths: mx.array | None, width: int
    ) -> tuple[mx.array, mx.array]:
        """The tables of nodes: as many continuations as a search looks at.

        Args:
            logits: (B, T, V), of the target.
            total: (B, T, 1), the logarithm that makes them log-probabilities.
            paths: (B, T, L), of :class:`_Level`.

        Returns:
            Their log-probabilities (B, T, k) float32, and their tokens (B, T, k).
        """
        size = width + self._most_ends
        if not self.chained:
            best, tokens, _ = best_of(logits.astype(mx.float32), size)
            return best - total, tokens
        scores, tokens, _ = best_of(self._processed(logits - total, paths), size)
        return scores, tokens

    def guess(
        self, logits: mx.array, path: mx.array | None, width: int
    ) -> tuple[mx.array, mx.array]:
        """The same of the draft, roughly, and without what ends a text.

        Args:
            logits: (B, P, V), of the draft.
            path: (B, P, L), of :class:`_Level`.
        """
        logits = fitted(logits, self._vocabulary).astype(mx.float32)
        size = width + self._most_ends
        if self.chained:
            total = mx.logsumexp(logits, axis=-1, keepdims=True)
            scores, tokens, _ = best_of(self._processed(logits - total, path), size)
        else:
            # Of all other tokens next to nothing is left.
            scores, tokens, near = best_of(logits, size)
            scores = scores - mx.logsumexp(near, axis=-1, keepdims=True)
        ends = (tokens[..., None] == self._ends).any(axis=-1)
        return mx.where(ends, -math.inf, scores), tokens

    def _processed(self, scores: mx.array, paths: mx.array) -> mx.array:
        """Log-probabilities (B, T, V) as the processors have them."""
        scores = scores.astype(mx.float32)
        batch, size, _ = scores.shape
        for rules, places in self._places.items():
            rows = mx.array(places)
            its = scores[rows].reshape(len(places) * size, 1, -1)
            tokens = paths[rows].reshape(len(places) * size, -1)
            prompts = [self._rows[place].prompt for place in places]
            prompt = np.full((len(places), max(map(len, prompts))), -1, np.int32)
            for row, words in enumerate(prompts):
                prompt[row, : len(words)] = words
            generated = (tokens >= 0).sum(axis=1, keepdims=True) - 1
            prefix = Prefix(
                tokens,
                generated.astype(mx.int32),
                mx.repeat(mx.array(prompt), size, axis=0),
            )
            for processor in rules.chain:
                its = processor(its, prefix)
            its = its.reshape(len(places), size, -1)
            if len(places) == batch:
                return its
            scores[rows] = its
        return scores


def best_of(scores: mx.array, size: int) -> tuple[mx.array, mx.array, mx.array]:
    """The largest of each row, in no order.

    First the best of neighbours, so that few are compared with each other: a sort, or a
    partition, of a vocabulary takes as long as a pass over a small model.

    Args:
        scores: (..., V).

    Returns:
        So many of them (..., size), or V, their places, int32, and a few hundred
        others that are large.
    """
    length = scores.shape[-1]
    groups = length // _NEIGHBOURS
    if groups <= 2 * size:
        size = min(size, length)
        order = mx.argpartition(-scores, kth=size - 1, axis=-1)[..., :size]
        order = order.astype(mx.int32)
        return mx.take_along_axis(scores, order, axis=-1), order, scores
    whole = groups * _NEIGHBOURS
    shape = (*scores.shape[:-1], groups, _NEIGHBOURS)
    top = scores[..., :whole].reshape(shape).max(axis=-1)
    which = mx.argpartition(-top, kth=size - 1, axis=-1)[..., :size, None]
    places = (which.astype(mx.int32) * _NEIGHBOURS + mx.arange(_NEIGHBOURS)).flatten(-2)
    if whole < length:
        rest = mx.arange(whole, length)
        rest = mx.broadcast_to(rest, (*places.shape[:-1], length - whole))
        places = mx.concatenate([places, rest], axis=-1)
    near = mx.take_along_axis(scores, places, axis=-1)
    order = mx.argpartition(-near, kth=size - 1, axis=-1)[..., :size]
    best = mx.take_along_axis(near, order, axis=-1)
    return best, mx.take_along_axis(places, order, axis=-1), near

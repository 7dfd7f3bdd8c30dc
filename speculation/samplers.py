"""How the tokens of rows are chosen, round after round: the draft's and the target's
alike.

Shapes: B = batch, K = draft tokens, T = positions, V = vocabulary, L = length.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from speculation.acceptance import (
    Draft,
    Verdict,
    is_finite,
    verify,
    verify_block,
    verify_chosen,
    verify_greedy,
)
from speculation.processors import Prefix, Processor
from speculation.sampling import GREEDY, SHARED, Sampling, draw, gumbel
from system.errors import InputError


@dataclass(frozen=True, eq=False)
class Rules:
    """By what a row's tokens are chosen and judged; rows may share them.

    Attributes:
        vocabulary: V of the target; a draft's logits are cut or padded to it.
        sampling: the seed aside, which is a row's own.
        delta: of :func:`acceptance.verify_greedy` and :func:`acceptance.verify`; at 0
            :func:`acceptance.verify_block` judges what was sampled by both.
        eos_tokens: what ends a row, also for the processors that spare or ban it.
        chain: the processors, in order.
        shared: whether draft and target choose with the same noise, see
            :meth:`Sampling.coupling_at`.

    Raises:
        InputError: an id outside the vocabulary, or a coupling that does not go with
            the delta.
    """

    vocabulary: int
    sampling: Sampling = GREEDY
    delta: float = 0.0
    eos_tokens: frozenset[int] = frozenset()
    chain: tuple[Processor, ...] = field(init=False)
    shared: bool = field(init=False)

    def __post_init__(self) -> None:
        chain = self.sampling.chain(self.vocabulary, self.eos_tokens)
        object.__setattr__(self, "chain", chain)
        shared = self.sampling.coupling_at(self.delta) == SHARED
        object.__setattr__(self, "shared", shared)

    @property
    def kind(self) -> str:
        """What rules have in common that accept alike, more or less."""
        sampling = self.sampling
        if sampling.greedy:
            return f"greedy, delta {self.delta:.1f}"
        how = "shared" if self.shared else f"delta {self.delta:.1f}"
        return f"temperature {sampling.temperature:.1f}, {how}"

    @property
    def chosen(self) -> bool:
        """Whether a draft token has to be the one that the target chooses."""
        return self.delta == 0 and (self.sampling.greedy or self.shared)


class RowSampler:
    """What one row's choices depend on: its rules, random numbers and tokens so far.

    Attributes:
        rules: of the row; rows that share them are computed together.
        last: the last committed token.
        prompt: (S,) int32, what it answers; only where there are processors.
    """

    def __init__(
        self,
        rules: Rules,
        start: list[int],
        prompt: Collection[int] = (),
        seed: int = 0,
        stream: tuple[int, ...] = (0,),
    ):
        """
        Args:
            start: the tokens that its decoding starts from.
            prompt: what it answers, for the processors that look at it.
            seed, stream: what its random numbers depend on, and on nothing else.

        Raises:
            InputError: a first token is forced where there is none to choose.
        """
        if rules.sampling.forced_bos_token_id is not None and len(start) > 1:
            raise InputError(
                "forced-bos-token-id is for models with an encoder: others have a "
                "prompt where that token would be"
            )
        self.rules = rules
        # Of its own for each row: its text must not depend on its neighbours.
        self._random = None if rules.sampling.greedy else _Random(seed, stream)
        self._round = 0
        self._start = len(start)
        self._length = 0
        if rules.chain:  # nobody else asks
            self.prompt = np.array(prompt, np.int32)
            self._tokens = np.zeros(64 + len(start), np.int32)
        self.append(start)

    def append(self, tokens: list[int]) -> None:
        """Take in tokens that were committed."""
        self.last = tokens[-1]
        end = self._length + len(tokens)
        if self.rules.chain:
            if end > len(self._tokens):
                grown = np.zeros(2 * end, np.int32)
                grown[: self._length] = self._tokens[: self._length]
                self._tokens = grown
            self._tokens[self._length : end] = tokens
        self._length = end

    def next_uniform(self, count: int) -> np.ndarray:
        """The first ``count`` random numbers of the row's next round, in [0, 1)."""
        number, self._round = self._round, self._round + 1
        return self._random.of_round(number, count)

    def keys(self, ahead: int, count: int) -> np.ndarray:
        """The keys (count, 2) of the noise of its next positions, those left out that
        are ``ahead`` of them."""
        return self._random.keys(self.generated(self._length) + ahead, count)

    def before(self, last: bool) -> np.ndarray:
        """The committed tokens, with the ``last`` or without it."""
        return self._tokens[: self._length - (not last)]

    def generated(self, length: int) -> int:
        """How many of the row's first ``length`` tokens were generated."""
        return length - self._start


class _Random:
    """A row's random numbers: those in [0, 1) of its rounds, and keys of noise for its
    positions.

    A round's do not depend on how many of them are used, by it or by those before: with
    the same seed another budget gives the same text, cut off. A position's key depends
    on nothing else: neither do the text's tokens, whatever the rounds were.
    """

    def __init__(self, seed: int, key: tuple[int, ...]):
        sequence = np.random.SeedSequence(seed, spawn_key=key)
        self._bits = np.random.Philox(sequence)
        self._numbers = np.random.Generator(self._bits)
        self._state = self._bits.state

    def of_round(self, number: int, count: int) -> np.ndarray:
        """The first ``count`` numbers of a round, float32."""
        # Philox counts: its third word is the round's, the first two count within it.
        self._state["state"]["counter"] = np.array([0, 0, number, 0], np.uint64)
        self._bits.state = self._state
        return self._numbers.random(count, dtype=np.float32)

    def keys(self, position: int, count: int) -> np.ndarray:
        """Keys (count, 2), uint32, of positions: how many tokens come before each."""
        # Philox makes four words of a count, and the first will do. Its fourth word
        # tells these counts from those of rounds.
        self._state["state"]["counter"] = np.array([position, 0, 0, 1], np.uint64)
        self._bits.state = self._state
        words = np.ascontiguousarray(self._bits.random_raw(4 * count)[::4])
        return words.view(np.uint32).reshape(count, 2)


class RoundSampler:
    """Chooses the tokens of one round, the draft's and the target's by the same rules.

    Everything that it does stays on the device. Rows that share their rules, as all of
    a batch mostly do, are computed together.

    Attributes:
        last: (B,) the last committed token of each row.
        ends: for each row the ids that end it.
    """

    def __init__(
        self,
        rows: list[RowSampler | None],
        num_draft: int = 0,
        following: mx.array | None = None,
        certain: Collection[bool] | None = None,
    ):
        """
        Args:
            rows: None where nobody's tokens are: what is chosen there means nothing. At
                least one is somebody's.
            num_draft: the most tokens that are drafted.
            following: (B,) the token after the committed ones, where only the device
                has it yet.
            certain: for each row, whether its draft has no law; None for none.
        """
        self.last = following
        if following is None:
            self.last = mx.array([row.last if row else 0 for row in rows])
        self.ends = [row.rules.eos_tokens if row else frozenset() for row in rows]
        # Nobody's rows are of the first group, so that one may be the whole batch.
        certain = certain or [False] * len(rows)
        first = next(
            (row.rules, sure) for row, sure in zip(rows, certain, strict=True) if row
        )
        places: dict[tuple[Rules, bool], list[int]] = {}
        for place, (row, sure) in enumerate(zip(rows, certain, strict=True)):
            places.setdefault((row.rules, sure) if row else first, []).append(place)
        self._groups = [
            _Group(
                rules,
                [rows[place] for place in its],
                num_draft,
                self.last if len(places) == 1 else self.last[mx.array(its)],
                following is not None,
            )
            for (rules, _), its in places.items()
        ]
        self._certain = [sure for _, sure in places]
        if len(places) > 1:
            self._rows = [mx.array(its) for its in places.values()]
            self._order = mx.argsort(mx.concatenate(self._rows))

    def draft(
        self, logits: mx.array, drafted: list[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """The draft's next token.

        Args:
            logits: (B, V) of the draft.
            drafted: (B,) each, the tokens that it proposed before.

        Returns:
            The token (B,) int32, and q (B, V); None when it matters to no row.
        """
        if len(self._groups) == 1:
            return self._groups[0].draft(logits, drafted)
        parts = [
            group.draft(logits[rows], [tokens[rows] for tokens in drafted])
            for group, rows in zip(self._groups, self._rows, strict=True)
        ]
        sampled = next((q for _, q in parts if q is not None), None)
        if sampled is not None:  # where it is None it is not looked at
            none = mx.zeros_like(sampled[:1])
            sampled = self._join(
                mx.broadcast_to(none, (len(token), none.shape[1])) if q is None else q
                for token, q in parts
            )
        return self._join(token for token, _ in parts), sampled

    def judge(self, logits: mx.array, draft: Draft) -> Verdict:
        """What becomes of a draft, by the rule that goes with how tokens are chosen.

        Args:
            logits: (B, K + 1, V) of the target.
        """
        counts = None if draft.counts is None else mx.array(draft.counts)
        if len(self._groups) == 1:
            return self._groups[0].judge(logits, draft.tokens, draft.probs, counts)
        verdicts = [
            group.judge(
                logits[rows],
                draft.tokens[rows],
                None if draft.probs is None or certain else draft.probs[rows],
                None if counts is None else counts[rows],
            )
            for group, rows, certain in zip(
                self._groups, self._rows, self._certain, strict=True
            )
        ]
        return Verdict(*map(self._join, zip(*verdicts, strict=True)))

    def _join(self, parts: Collection[mx.array]) -> mx.array:
        """What the groups have of rows, in the batch's order."""
        return mx.concatenate(list(parts))[self._order]


class _Group:
    """The rows of a round that share their rules; B counts these alone."""

    def __init__(
        self,
        rules: Rules,
        rows: list[RowSampler | None],
        num_draft: int,
        last: mx.array,
        follows: bool,
    ):
        """
        Args:
            follows: whether ``last`` (B,) comes after the committed tokens.
        """
        self._rules = rules
        self._last = last
        if rules.chain:
            self._read(rows, follows)
        if rules.shared:
            keys = np.zeros((len(rows), 1 + num_draft, 2), np.uint32)
            for place, row in enumerate(rows):
                if row:
                    keys[place] = row.keys(int(follows), 1 + num_draft)
            self._keys = mx.array(keys)
            # Of the first positions, as they are asked for.
            self._noise: list[mx.array] = []
        elif not rules.sampling.greedy:
            # For the target's own token, then for each draft token one to draw it by
            # and one to judge it by.
            uniform = np.zeros((len(rows), 1 + 2 * num_draft), np.float32)
            for place, row in enumerate(rows):
                if row:
                    uniform[place] = row.next_uniform(uniform.shape[1])
            self._drawing = mx.array(uniform[:, 1::2])
            self._judging = mx.array(uniform[:, [0, *range(2, uniform.shape[1], 2)]])

    def _read(self, rows: list[RowSampler | None], follows: bool) -> None:
        """What the processors look at, as arrays."""
        none = np.zeros(0, np.int32)
        before = [row.before(follows) if row else none for row in rows]
        prompts = [row.prompt if row else none for row in rows]
        committed = np.full((len(rows), max(map(len, before))), -1, np.int32)
        prompt = np.full((len(rows), max(map(len, prompts))), -1, np.int32)
        for row, (tokens, words) in enumerate(zip(before, prompts, strict=True)):
            committed[row, committed.shape[1] - len(tokens) :] = tokens
            prompt[row, : len(words)] = words
        self._committed, self._prompt = mx.array(committed), mx.array(prompt)
        # With `last`, which comes after those.
        self._generated = np.array(
            [
                row.generated(len(tokens) + 1) if row else 0
                for row, tokens in zip(rows, before, strict=True)
            ]
        )

    def process(self, logits: mx.array, block: mx.array) -> mx.array:
        """Apply the processors.

        Args:
            logits: (B, T, V) for the positions after the last T tokens of ``block``.
            block: (B, T' >= T), the last committed token and what was drafted.
        """
        if not self._rules.chain:
            return logits
        size, positions = block.shape[1], logits.shape[1]
        after = np.arange(size - positions, size)
        prefix = Prefix(
            mx.concatenate([self._committed, block], axis=1),
            mx.array((self._generated[:, None] + after).astype(np.int32)),
            self._prompt,
        )
        logits = logits.astype(mx.float32)
        for processor in self._rules.chain:
            logits = processor(logits, prefix)
        return logits

    def draft(
        self, logits: mx.array, drafted: list[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """As :meth:`RoundSampler.draft`."""
        rules = self._rules
        logits = fitted(logits, rules.vocabulary)
        if rules.chain:
            block = mx.stack([self._last, *drafted], axis=1)
            logits = self.process(logits[:, None], block)[:, 0]
        if rules.sampling.greedy:
            return mx.argmax(logits, axis=-1).astype(mx.int32), None
        if rules.shared:
            weights = rules.sampling.log_weights(logits)
            return self.choose(weights, len(drafted)), None
        q = rules.sampling.probs(logits)
        return draw(q, self._drawing[:, len(drafted)]), q

    def choose(self, weights: mx.array, place: int) -> mx.array:
        """The tokens (B,) of a position, by the noise that draft and target share.

        Args:
            weights: (B, V), logarithms of the law.
            place: which of the round's positions.
        """
        while len(self._noise) <= place:
            keys = self._keys[:, len(self._noise)]
            self._noise.append(gumbel(keys, self._rules.vocabulary))
        return mx.argmax(weights + self._noise[place], axis=-1).astype(mx.int32)

    def judging(self, drafted: int) -> mx.array:
        """Random numbers (B, K + 1): the first for the target's own token, the others
        for judging ``drafted`` tokens. None of them is used for drafting."""
        return self._judging[:, : 1 + drafted]

    def judge(
        self,
        logits: mx.array,
        tokens: mx.array,
        q: mx.array | None,
        counts: mx.array | None,
    ) -> Verdict:
        """As :meth:`RoundSampler.judge`, of tokens (B, K) and their q (B, K, V)."""
        size = tokens.shape[1]
        block = self._last[:, None]
        if size:
            block = mx.concatenate([block, tokens], axis=1)
        logits = self.process(logits, block)
        sampling, delta = self._rules.sampling, self._rules.delta
        if sampling.greedy:
            return verify_greedy(logits, tokens, counts, delta)
        if self._rules.shared:
            weights = sampling.log_weights(logits)
            positions = range(size + 1)
            chosen = [self.choose(weights[:, place], place) for place in positions]
            finite = is_finite(weights.max(axis=-1))
            return verify_chosen(mx.stack(chosen, axis=1), tokens, counts, finite)
        allowed = None
        if delta == 1 and size:  # below 1 a probability of 0 is enough to reject
            index = mx.clip(tokens, 0, logits.shape[-1] - 1)[..., None]
            own = mx.take_along_axis(logits[:, :size], index, axis=-1)[..., 0]
            allowed = own > -math.inf
        p = sampling.probs(logits)
        if delta == 0 and q is not None:
            counts = self._up_to_end(tokens, counts)
            return verify_block(p, tokens, q, counts, self.judging(size))
        return verify(p, tokens, q, counts, delta, self.judging(size), allowed)

    def _up_to_end(self, tokens: mx.array, counts: mx.array | None) -> mx.array | None:
        """``counts`` without what is behind a draft's first end of the sequence.

        How much that is depends on the neighbours, which may still be at it, and
        tokens that are judged together depend on how many they are.
        """
        if not self._rules.eos_tokens:
            return counts
        ends = mx.array(sorted(self._rules.eos_tokens))
        is_end = (tokens[..., None] == ends).any(axis=-1).astype(mx.int32)
        ended = mx.cumsum(is_end, axis=1, inclusive=False)
        real = (ended == 0).astype(mx.int32).sum(axis=1)
        return real if counts is None else mx.minimum(real, counts)


def fitted(logits: mx.array, vocabulary: int) -> mx.array:
    """A draft's logits (..., V) cut to the target's ids, or -inf for those it lacks."""
    missing = vocabulary - logits.shape[-1]
    if missing > 0:
        more = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
        logits = mx.pad(logits, more, constant_values=-math.inf)
    return logits[..., :vocabulary]

"""Rules that change logits by what comes before: transformers' processors, at every
position of a block at once.

Shapes: B = batch, T = positions, V = vocabulary, L = length of a prefix.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Prefix(NamedTuple):
    """What comes before each of T positions, for processors.

    Attributes:
        tokens: (B, L) int32, -1 before a row's first one; position t is preceded by
            the first L - T + 1 + t of them. The token that decoding starts from is
            among them, as in transformers.
        generated: (B, T) int32, how many of those were generated.
        prompt: (B, S) int32, what each row answers, -1 beyond its end. A decoder-only
            model has it in ``tokens`` as well.
    """

    tokens: mx.array
    generated: mx.array
    prompt: mx.array

    def seen(self) -> mx.array:
        """(B or 1, T, L) bool: whether position t comes after token l."""
        length, size = self.tokens.shape[1], self.generated.shape[1]
        last = mx.arange(length - size, length)[:, None]
        return (mx.arange(length) <= last) & (self.tokens >= 0)[:, None]


#: Changes logits (B, T, V), float32, by what comes before; -inf bans a token.
Processor = Callable[[mx.array, Prefix], mx.array]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Keskar et al., arXiv 1909.05858, section 4.1, with transformers' signs."""

    penalty: float

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        occurred = _mark(prefix.seen(), prefix.tokens, logits.shape)
        factor = mx.where(logits < 0, self.penalty, 1 / self.penalty)
        return mx.where(occurred, logits * factor, logits)


@dataclass(frozen=True)
class NoRepeatNgram:
    """Bans what would complete an n-gram that occurred before."""

    size: int

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        return _ban_ngrams(logits, prefix, prefix.tokens, prefix.seen(), self.size)


@dataclass(frozen=True)
class NoPromptNgram:
    """Bans what would complete an n-gram of the prompt, as transformers'
    ``encoder_no_repeat_ngram_size``: of size 1 the prompt's own end as well."""

    size: int

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        there = (prefix.prompt >= 0)[:, None]
        return _ban_ngrams(logits, prefix, prefix.prompt, there, self.size)


class BadWords:
    """Bans the last token of a word where its others precede it.

    Words of like length are compared at once, the shorter ones padded.
    """

    _ANY = -2  # matches whatever there is, or is not

    def __init__(self, words: Collection[tuple[int, ...]], vocabulary: int):
        """
        Args:
            words: ids, at least one each, below ``vocabulary``.
        """
        alone = [word[0] for word in words if len(word) == 1]
        self._alone = ban(vocabulary, alone) if alone else None
        longer: dict[int, list[tuple[int, ...]]] = {}  # by length, in powers of two
        for word in words:
            if len(word) > 1:
                size = 1 << (len(word) - 2).bit_length()
                padded = (self._ANY,) * (size + 1 - len(word)) + tuple(word)
                longer.setdefault(size, []).append(padded)
        self._longer = [mx.array(longer[size]) for size in sorted(longer)]

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        if self._alone is not None:
            logits = logits + self._alone
        for words in self._longer:  # (W, n)
            before, last = words[:, :-1], words[:, -1]
            back = mx.arange(before.shape[1], 0, -1)
            latest = _latest(prefix.tokens, logits.shape[1], back)[:, :, None]
            complete = ((latest == before) | (before == self._ANY)).all(axis=-1)
            lasts = mx.broadcast_to(last, (len(logits), len(words)))
            logits = mx.where(_mark(complete, lasts, logits.shape), -math.inf, logits)
        return logits


@dataclass(frozen=True)
class MinNewTokens:
    """Bans the end of the sequence (``ends``: -inf there) before ``count`` tokens."""

    count: int
    ends: mx.array  # (V,)

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        early = (prefix.generated < self.count)[..., None]
        return logits + mx.where(early, self.ends, 0)


@dataclass(frozen=True)
class ForcedFirstToken:
    """Bans all but one token (``others``: 0 for it, -inf elsewhere) at the first
    position."""

    others: mx.array  # (V,)

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        first = (prefix.generated == 0)[..., None]
        # Whatever other rules say of that token.
        return mx.where(first, self.others, logits)


@dataclass(frozen=True)
class SuppressTokens:
    """Bans tokens (``ban``: -inf there) everywhere."""

    ban: mx.array  # (V,)

    def __call__(self, logits: mx.array, prefix: Prefix) -> mx.array:
        return logits + self.ban


def ban(vocabulary: int, tokens: Collection[int]) -> mx.array:
    """(V,) zeros with -inf at ``tokens``."""
    logits = np.zeros(vocabulary, np.float32)
    logits[list(tokens)] = -np.inf
    return mx.array(logits)


def _latest(tokens: mx.array, positions: int, back: mx.array) -> mx.array:
    """(B, T, N) the tokens so far back from each position; -1 where there is none.

    Args:
        tokens: (B, L), of a :class:`Prefix`.
        positions: T.
        back: (N,), 1 for the token just before it.
    """
    length = tokens.shape[1]
    places = mx.arange(length - positions, length)[:, None] - (back - 1)
    return mx.where(places >= 0, tokens[:, mx.maximum(places, 0)], -1)


def _ban_ngrams(
    logits: mx.array, prefix: Prefix, text: mx.array, there: mx.array, size: int
) -> mx.array:
    """Ban what would complete an n-gram of a text.

    Args:
        text: (B, N) ids.
        there: (B or 1, T or 1, N) bool, which of them each position looks at.
    """
    length, before = text.shape[1], size - 1
    if length <= before:
        return logits
    # complete[b, t, i]: at i ends an n-gram that the tokens before t began again.
    complete = there[..., before:]
    for back in range(1, before + 1):
        latest = _latest(prefix.tokens, logits.shape[1], mx.array([back]))
        earlier = text[:, before - back : length - back]
        same = earlier[:, None] == latest
        complete = complete & same & (earlier >= 0)[:, None]
    shape = (*logits.shape[:2], length - before)
    banned = _mark(mx.broadcast_to(complete, shape), text[:, before:], logits.shape)
    return mx.where(banned, -math.inf, logits)


def _mark(where: mx.array, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Which of V tokens stand at the marked places.

    Args:
        where: (B, T, N) bool.
        tokens: (B, N) ids; those outside the vocabulary mark nothing.
        shape: (B, T, V), of the result.
    """
    batch, positions, vocabulary = shape
    inside = (tokens >= 0) & (tokens < vocabulary)
    # What is not marked goes to a column of its own, which is cut off.
    index = mx.where(where & inside[:, None], tokens[:, None], vocabulary)
    index = mx.broadcast_to(index, (batch, positions, tokens.shape[1]))
    marks = mx.zeros((batch, positions, vocabulary + 1), mx.bool_)
    marks = mx.put_along_axis(marks, index, mx.array(True), axis=-1)
    return marks[..., :vocabulary]

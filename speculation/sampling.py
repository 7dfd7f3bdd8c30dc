"""From logits to the distribution that the next token is drawn from.

The same chain for p, the target, and q, the draft: processors (repetition penalty and
the like), temperature, top-k, top-p, min-p, in the order of transformers' ``generate``.
What the chain gives is what "p" and "q" mean to :mod:`acceptance`: speculation is exact
for the filtered distribution only if both are filtered alike.

Shapes: B = batch, T = positions, V = vocabulary, L = length of a prefix.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from system.errors import InputError

# What float32 can multiply and divide by; beyond, nothing changes any more.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30


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
class Sampling:
    """How tokens are chosen. Names and meanings are those of transformers.

    Attributes:
        temperature: 0 takes the most probable token, 1 samples the model's own law.
        top_k: sample among the k most probable tokens, those that tie with the k-th
            included; 0 for all.
        top_p: sample among the most probable tokens that together reach this
            probability, those that tie with the last one included.
        min_p: leave out tokens less probable than this share of the most probable.
        seed: the same seed gives the same text.
        repetition_penalty: above 1 makes tokens that occurred less probable: logits
            are divided by it, negative ones multiplied.
        no_repeat_ngram_size: no n-gram of this size occurs twice; 0 for no such rule.
        encoder_no_repeat_ngram_size: none that the prompt has occurs; likewise.
        bad_words_ids: sequences of ids that never occur; an end of the sequence alone,
            which ``generate`` passes over, is none.
        min_new_tokens: no end of the sequence before so many tokens.
        suppress_tokens: ids that are never chosen.
        forced_bos_token_id: the first token, of a text that starts from one token:
            with a decoder-only model there is none.
        processors: more rules, applied after those above.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, range_: str) -> None:  # NaN is never fine
            if not fine:
                value = getattr(self, name.replace("-", "_"))
                raise InputError(f"{name} is {value}: it has to be {range_}")

        check("temperature", 0 <= self.temperature < math.inf, "at least 0")
        check("top-k", self.top_k >= 0, "at least 0 (0: all tokens)")
        check("top-p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min-p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("seed", self.seed >= 0, "at least 0")
        check("repetition-penalty", 0 < self.repetition_penalty < math.inf, "above 0")
        check("no-repeat-ngram-size", self.no_repeat_ngram_size >= 0, "at least 0")
        size = self.encoder_no_repeat_ngram_size
        check("encoder-no-repeat-ngram-size", size >= 0, "at least 0")
        if not all(self.bad_words_ids):
            raise InputError("a bad word is empty: it has to have at least one token")
        check("min-new-tokens", self.min_new_tokens >= 0, "at least 0")
        filters = {"top-k": self.top_k, "top-p": self.top_p < 1, "min-p": self.min_p}
        unused = [name for name, used in filters.items() if used]
        if self.temperature == 0 and unused:
            raise InputError(
                f"{unused[0]} chooses among sampled tokens: give a temperature above 0"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without chance."""
        return self.temperature == 0

    def chain(
        self, vocabulary: int, eos_tokens: Collection[int]
    ) -> tuple[Processor, ...]:
        """The processors that these options ask for, in transformers' order.

        Raises:
            InputError: an id outside the vocabulary.
        """
        forced = self.forced_bos_token_id
        named = [*self.suppress_tokens, *([] if forced is None else [forced])]
        named += [token for word in self.bad_words_ids for token in word]
        for token in named:
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"there is no token {token}: the ids go from 0 to {vocabulary - 1}"
                )
        if forced in self.suppress_tokens:
            raise InputError(f"token {forced} is both forced and suppressed")
        chain: list[Processor] = []
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenalty(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            chain.append(NoRepeatNgram(self.no_repeat_ngram_size))
        if self.encoder_no_repeat_ngram_size:
            chain.append(NoPromptNgram(self.encoder_no_repeat_ngram_size))
        words = [w for w in self.bad_words_ids if len(w) > 1 or w[0] not in eos_tokens]
        if words:
            chain.append(BadWords(words, vocabulary))
        if self.min_new_tokens:
            ends = [token for token in eos_tokens if 0 <= token < vocabulary]
            chain.append(MinNewTokens(self.min_new_tokens, ban(vocabulary, ends)))
        if forced is not None:
            others = [token for token in range(vocabulary) if token != forced]
            chain.append(ForcedFirstToken(ban(vocabulary, others)))
        if self.suppress_tokens:
            chain.append(SuppressTokens(ban(vocabulary, self.suppress_tokens)))
        return (*chain, *self.processors)

    def probs(self, logits: mx.array) -> mx.array:
        """Temperature and filters: processed logits (..., V) -> probabilities, float32.

        A row without a finite maximum (NaN, inf, only -inf) becomes NaN throughout.
        """
        logits = logits.astype(mx.float32)
        # The largest becomes 0, so that no temperature overflows.
        logits = logits - logits.max(axis=-1, keepdims=True)
        if self.temperature != 1:
            temperature = max(self.temperature, _LEAST_TEMPERATURE)
            logits = logits * (1 / min(temperature, _MOST_TEMPERATURE))
        largest = None  # the k largest, in any order
        if 0 < self.top_k < logits.shape[-1]:
            largest = mx.topk(logits, self.top_k, axis=-1)
            kth = largest.min(axis=-1, keepdims=True)
            logits = mx.where(logits >= kth, logits, -math.inf)
        probs = mx.softmax(logits, axis=-1)
        if self.top_p == 1 and self.min_p == 0:
            return probs
        least = self.min_p * probs.max(axis=-1, keepdims=True)
        if self.top_p < 1:
            few = probs if largest is None else mx.topk(probs, self.top_k, axis=-1)
            ascending = mx.sort(few, axis=-1)
            above = mx.cumsum(ascending, axis=-1, reverse=True, inclusive=False)
            nucleus = mx.where(above < self.top_p, ascending, math.inf)
            least = mx.maximum(least, nucleus.min(axis=-1, keepdims=True))
        probs = mx.where(probs >= least, probs, 0)
        return probs / probs.sum(axis=-1, keepdims=True)


GREEDY = Sampling()


def draw(probs: mx.array, uniform: mx.array) -> mx.array:
    """Draw a token: the inverse of the cumulative distribution.

    Args:
        probs: (..., V), not necessarily normalized, never all zero.
        uniform: (...), in [0, 1).

    Returns:
        (...) int32, never a token of probability 0.
    """
    # A scan in parallel may round a sum up where nothing was added.
    cumulative = mx.where(probs > 0, mx.cumsum(probs, axis=-1), 0)
    # In (0, total], so that the first place that reaches it has a probability.
    reach = cumulative.max(axis=-1, keepdims=True) * (1 - uniform[..., None])
    return mx.argmax(cumulative >= reach, axis=-1).astype(mx.int32)


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


class Choices:
    """How a batch's tokens are chosen, round after round."""

    def __init__(
        self,
        sampling: Sampling,
        starts: list[list[int]],
        vocabulary: int,
        *,
        eos_tokens: Collection[int] = (),
        prompts: list[list[int]] | None = None,
        streams: list[tuple[int, ...]] | None = None,
    ):
        """
        Args:
            starts: the tokens that each row's decoding starts from.
            vocabulary: V of the target; a draft's logits are cut or padded to it.
            eos_tokens: what ends a row, for the rules that spare or ban it.
            prompts: what the rows answer, for the rules that look at it.
            streams: what tells the rows' random numbers apart, beside the seed; by
                default the row's number.

        Raises:
            InputError: an id outside the vocabulary.
        """
        self.sampling = sampling
        self.vocabulary = vocabulary
        self.chain = sampling.chain(vocabulary, eos_tokens)
        self.eos_tokens = frozenset(eos_tokens)
        self._round = 0
        self._starts = np.array([len(start) for start in starts])
        self._prompts = prompts or [[] for _ in starts]
        if sampling.forced_bos_token_id is not None and self._starts.max() > 1:
            raise InputError(
                "forced-bos-token-id is for models with an encoder: others have a "
                "prompt where that token would be"
            )
        # Of its own for each row: its text must not depend on its neighbours.
        self._random: list[_Random] = []
        if not sampling.greedy:
            keys = streams or [(row,) for row in range(len(starts))]
            self._random = [_Random(sampling.seed, key) for key in keys]

    @cached_property
    def prompt(self) -> mx.array:
        """(B, S) int32, what each row answers, -1 beyond its end."""
        padded = np.full(
            (len(self._prompts), max(map(len, self._prompts))), -1, np.int32
        )
        for row, prompt in enumerate(self._prompts):
            padded[row, : len(prompt)] = prompt
        return mx.array(padded)

    def begin(
        self,
        sequences: list[list[int]],
        num_draft: int = 0,
        *,
        following: mx.array | None = None,
    ) -> "Chooser":
        """Begin a round.

        Args:
            sequences: for each row the committed tokens, with those it started from.
            num_draft: the most tokens that it drafts.
            following: (B,) the token after those, where only the device has it yet.
        """
        last = following
        if last is None:
            last = mx.array([sequence[-1] for sequence in sequences])
        committed = generated = None
        if self.chain:
            if following is None:
                sequences = [sequence[:-1] for sequence in sequences]
            lengths = np.array([len(sequence) for sequence in sequences])
            committed = np.full((len(sequences), lengths.max()), -1, np.int32)
            for row, sequence in enumerate(sequences):
                committed[row, len(committed[row]) - len(sequence) :] = sequence
            generated = lengths + 1 - self._starts
        number, self._round = self._round, self._round + 1
        size = 1 + 2 * num_draft
        rows = [row.of_round(number, size) for row in self._random]
        uniform = np.stack(rows) if rows else None
        return Chooser(self, last, committed, generated, uniform)


class _Random:
    """A row's random numbers, in [0, 1).

    A round's do not depend on how many of them are used, by it or by those before: with
    the same seed another budget gives the same text, cut off.
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


class Chooser:
    """Chooses the tokens of one round, the draft's and the target's by the same rules.

    Everything that it does stays on the device.

    Attributes:
        last: (B,) the last committed token of each row.
        eos_tokens: the ids that end a row.
    """

    def __init__(
        self,
        choices: Choices,
        last: mx.array,
        committed: np.ndarray | None,
        generated: np.ndarray | None,
        uniform: np.ndarray | None,
    ):
        """
        Args:
            committed: (B, L) the tokens before ``last``, left-padded with -1; None
                where no processor asks for them.
            generated: (B,) how many of the committed, ``last`` included, were
                generated; likewise.
            uniform: (B, 1 + 2K) in [0, 1): for the target's own token, then for each
                of K draft tokens one to draw it by and one to judge it by; None when
                greedy.
        """
        self.sampling = choices.sampling
        self.eos_tokens = choices.eos_tokens
        self.last = last
        self._choices = choices
        self._generated = generated
        if uniform is not None:
            self._drawing = mx.array(uniform[:, 1::2])
            self._judging = mx.array(uniform[:, [0, *range(2, uniform.shape[1], 2)]])
        if committed is not None:
            self._committed = mx.array(committed)

    def process(self, logits: mx.array, block: mx.array) -> mx.array:
        """Apply the processors.

        Args:
            logits: (B, T, V) for the positions after the last T tokens of ``block``.
            block: (B, T' >= T), the last committed token and what was drafted.
        """
        if not self._choices.chain:
            return logits
        size, positions = block.shape[1], logits.shape[1]
        after = np.arange(size - positions, size)
        prefix = Prefix(
            mx.concatenate([self._committed, block], axis=1),
            mx.array((self._generated[:, None] + after).astype(np.int32)),
            self._choices.prompt,
        )
        logits = logits.astype(mx.float32)
        for processor in self._choices.chain:
            logits = processor(logits, prefix)
        return logits

    def draft(
        self, logits: mx.array, drafted: list[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """The draft's next token.

        Args:
            logits: (B, V) of the draft.
            drafted: (B,) each, the tokens that it proposed before.

        Returns:
            The token (B,) int32, and q (B, V); None when the choice is greedy.
        """
        missing = self._choices.vocabulary - logits.shape[-1]
        if missing > 0:
            logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-math.inf)
        logits = logits[:, : self._choices.vocabulary]
        if self._choices.chain:
            block = mx.stack([self.last, *drafted], axis=1)
            logits = self.process(logits[:, None], block)[:, 0]
        if self.sampling.greedy:
            return mx.argmax(logits, axis=-1).astype(mx.int32), None
        q = self.sampling.probs(logits)
        return draw(q, self._drawing[:, len(drafted)]), q

    def judging(self, drafted: int) -> mx.array:
        """Random numbers (B, K + 1): the first for the target's own token, the others
        for judging ``drafted`` tokens. None of them is used for drafting."""
        return self._judging[:, : 1 + drafted]

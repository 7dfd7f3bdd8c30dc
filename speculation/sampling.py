"""From logits to the distribution that the next token is drawn from.

The same chain for p, the target, and q, the draft: processors (repetition penalty and
the like), temperature, top-k, top-p, min-p, in the order of transformers' ``generate``.
What the chain gives is what "p" and "q" mean to :mod:`acceptance`: speculation is exact
for the filtered distribution only if both are filtered alike.

Shapes: V = vocabulary.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral

import mlx.core as mx

from speculation.processors import (
    BadWords,
    ForcedFirstToken,
    MinNewTokens,
    NoPromptNgram,
    NoRepeatNgram,
    Processor,
    RepetitionPenalty,
    SuppressTokens,
    ban,
)
from system.errors import InputError

# What float32 can multiply and divide by; beyond, nothing changes any more.
_LEAST, _MOST = 1e-30, 1e30
_MOST_TOKENS = 2**31 - 1  # of int32

RESIDUAL, SHARED = COUPLINGS = "residual", "shared"


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
        seed: the same seed gives the same text; None where none is asked for, which
            draws as 0 does.
        coupling: what a sampled draft has to do with the target. "shared": both choose
            with the same noise, and the text is what the target samples alone,
            token for token. "residual": they draw each for itself, and the text has the
            target's law; a little more stands. None: see :meth:`coupling_at`.
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
    seed: int | None = None
    coupling: str | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        # Lists will do; what is kept has to be hashable.
        words = tuple(map(tuple, self.bad_words_ids))
        object.__setattr__(self, "bad_words_ids", words)
        for name in ("suppress_tokens", "processors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

        def check(name: str, fine: bool, range_: str) -> None:  # NaN is never fine
            if not fine:
                value = getattr(self, name.replace("-", "_"))
                raise InputError(f"{name} is {value}: it has to be {range_}")

        check("temperature", 0 <= self.temperature < math.inf, "a number from 0 on")
        check("top-k", self.top_k >= 0, "at least 0 (0: all tokens)")
        check("top-p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min-p", 0 <= self.min_p <= 1, "between 0 and 1")
        whole = isinstance(self.seed, Integral)
        check("seed", self.seed is None or (whole and self.seed >= 0), "at least 0")
        known = (None, *COUPLINGS)
        check("coupling", self.coupling in known, " or ".join(COUPLINGS))
        penalty = self.repetition_penalty
        check("repetition-penalty", 0 < penalty < math.inf, "a number above 0")
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

    def coupling_at(self, delta: float) -> str | None:
        """What the coupling is: unless it is given, shared where a seed is given and
        the text is the target's own, else residual. None where nothing is drawn.

        Args:
            delta: of :class:`requests.Request`.

        Raises:
            InputError: it is to be shared, but the text is not the target's own.
        """
        if self.greedy:
            return None
        if self.coupling == SHARED and delta > 0:
            raise InputError(
                f"coupling is {SHARED}: with a delta above 0 it has to be {RESIDUAL}, "
                "as such a text is not the target's own"
            )
        own = self.seed is not None and delta == 0
        return self.coupling or (SHARED if own else RESIDUAL)

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
            penalty = min(max(self.repetition_penalty, _LEAST), _MOST)
            chain.append(RepetitionPenalty(penalty))
        if self.no_repeat_ngram_size:
            chain.append(NoRepeatNgram(self.no_repeat_ngram_size))
        if self.encoder_no_repeat_ngram_size:
            chain.append(NoPromptNgram(self.encoder_no_repeat_ngram_size))
        words = [w for w in self.bad_words_ids if len(w) > 1 or w[0] not in eos_tokens]
        if words:
            chain.append(BadWords(words, vocabulary))
        if self.min_new_tokens:
            ends = [token for token in eos_tokens if 0 <= token < vocabulary]
            least = min(self.min_new_tokens, _MOST_TOKENS)
            chain.append(MinNewTokens(least, ban(vocabulary, ends)))
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
        probs = mx.softmax(self._scaled(logits), axis=-1)
        if self._by_rank:
            return probs
        least = self.min_p * probs.max(axis=-1, keepdims=True)
        if self.top_p < 1:
            few = probs
            if 0 < self.top_k < probs.shape[-1]:
                few = mx.topk(probs, self.top_k, axis=-1)
            ascending = mx.sort(few, axis=-1)
            above = mx.cumsum(ascending, axis=-1, reverse=True, inclusive=False)
            nucleus = mx.where(above < max(self.top_p, _LEAST), ascending, math.inf)
            least = mx.maximum(least, nucleus.min(axis=-1, keepdims=True))
        probs = mx.where(probs >= least, probs, 0)
        return probs / probs.sum(axis=-1, keepdims=True)

    def log_weights(self, logits: mx.array) -> mx.array:
        """The logarithms of :meth:`probs`, but for a number that is a row's own.

        A row without a finite maximum has none afterwards.
        """
        return self._scaled(logits) if self._by_rank else mx.log(self.probs(logits))

    @property
    def _by_rank(self) -> bool:
        """Whether no filter looks at probabilities."""
        return self.top_p == 1 and self.min_p == 0

    def _scaled(self, logits: mx.array) -> mx.array:
        """Temperature and top-k."""
        logits = logits.astype(mx.float32)
        # The largest becomes 0, so that no temperature overflows.
        logits = logits - logits.max(axis=-1, keepdims=True)
        if self.temperature != 1:
            temperature = max(self.temperature, _LEAST)
            logits = logits * (1 / min(temperature, _MOST))
        if 0 < self.top_k < logits.shape[-1]:
            kth = mx.topk(logits, self.top_k, axis=-1).min(axis=-1, keepdims=True)
            logits = mx.where(logits >= kth, logits, -math.inf)
        return logits


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


def gumbel(keys: mx.array, vocabulary: int) -> mx.array:
    """Noise: where its sum with the logarithms of a law is largest, is a draw from it.

    Args:
        keys: (B, 2) uint32. What comes of one depends on it and on V alone.

    Returns:
        (B, V) float32, finite.
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(vocabulary,), key=key))(keys)
    # 1 - u, since what decides is small here: near 0 u has steps of 2**-32, near 1
    # coarse ones.
    return -mx.log(-mx.log1p(-mx.maximum(uniform, 2.0**-33)))

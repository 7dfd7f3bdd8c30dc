"""A text that is asked for, and what comes of it bit by bit."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from speculation.beams import Beams, Hypothesis
from speculation.sampling import GREEDY, Sampling
from system.errors import InputError

MAX_TOKENS = 256
DELTA = 0.0


@dataclass
class Stats:
    """What decoding one prompt took. Times are seconds of wall clock, sizes bytes.

    Attributes:
        new_tokens: committed tokens, end-of-sequence counted.
        rounds: forward passes of the target's decoder.
        drafted: draft tokens proposed.
        tested: draft tokens that were judged. What follows the first rejection, the
            end of the sequence or the budget was drafted in vain but not judged.
        accepted: draft tokens committed.
        accept_histogram: at [i] the rounds that committed i draft tokens, up to the
            most that one did.
        found: of ``tested``, those that were looked up.
        found_accepted: of ``accepted``, likewise.
        sizes: how many tokens its rounds drafted, in order, as (tokens, rounds).
        encode_seconds: encoding the prompt, by both models.
        decode_seconds: from there to the last token of this prompt, what the caller
            does between the commits included.
        peak_memory_bytes: of MLX's allocations since the prompt was started.
    """

    new_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    accept_histogram: list[int] = field(default_factory=list)
    found: int = 0
    found_accepted: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def alpha(self) -> float | None:
        """The share of judged draft tokens that stood; None when none was judged."""
        return self.accepted / self.tested if self.tested else None

    @property
    def tokens_per_round(self) -> float:
        """Tokens committed per forward pass of the target."""
        return self.new_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens committed per second of decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def copy(self) -> "Stats":
        """The figures as they are now."""
        return replace(
            self, accept_histogram=list(self.accept_histogram), sizes=list(self.sizes)
        )

    @classmethod
    def of_batch(cls, rows: "list[Stats]", together: bool = True) -> "Stats":
        """The figures of rows as one.

        Args:
            together: whether they were decoded at once, or one after another.
        """
        all_of = max if together else sum
        histograms = [row.accept_histogram for row in rows]
        return cls(
            new_tokens=sum(row.new_tokens for row in rows),
            rounds=all_of(row.rounds for row in rows),
            drafted=sum(row.drafted for row in rows),
            tested=sum(row.tested for row in rows),
            accepted=sum(row.accepted for row in rows),
            # A row that was never begun has none.
            accept_histogram=list(map(sum, zip_longest(*histograms, fillvalue=0))),
            found=sum(row.found for row in rows),
            found_accepted=sum(row.found_accepted for row in rows),
            sizes=rows[0].sizes if len(rows) == 1 else [],
            encode_seconds=all_of(row.encode_seconds for row in rows),
            decode_seconds=all_of(row.decode_seconds for row in rows),
            peak_memory_bytes=max(row.peak_memory_bytes for row in rows),
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures by the names that ``main.py --json`` has for them."""
        return {
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "alpha": self.alpha,
            "tokens_per_round": self.tokens_per_round,
            "accept_histogram": self.accept_histogram,
            "found": self.found,
            "found_accepted": self.found_accepted,
            "encode_seconds": self.encode_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, eq=False)
class Request:
    """A text that is asked for.

    Attributes:
        prompt: token ids, at least one.
        eos_tokens: ids that end the text; the one produced is part of its tokens.
        max_tokens: the most tokens it may get, end-of-sequence counted. A target with a
            limited number of positions may end it earlier. Where a draft's positions
            end, the target goes on alone.
        delta: how far the text may leave the target's, see
            :func:`acceptance.verify_greedy` and :func:`acceptance.verify`; at 0 it is
            the target's own, token for token or, sampled by the residual rule, in
            distribution.
        sampling: how tokens are chosen, by both models.
        stream: what tells its random numbers from those of others, beside the seed.
        num_draft: K for this text alone, as far as the engine drafts so many; None for
            what the engine decides. Texts beside it may have as many.
        beams: a beam search for it; None, or one beam, for none.

    Raises:
        InputError: an option out of range.
    """

    prompt: list[int]
    eos_tokens: AbstractSet[int]
    max_tokens: int = MAX_TOKENS
    delta: float = DELTA
    sampling: Sampling = GREEDY
    stream: tuple[int, ...] = (0,)
    num_draft: int | None = None
    beams: Beams | None = None

    def __post_init__(self) -> None:
        check_options(self.max_tokens, self.num_draft or 0, self.delta)
        check_beams(self.beams, self.sampling, self.delta)
        self.sampling.coupling_at(self.delta)  # raises where they do not go together
        if not all(isinstance(n, int) and n >= 0 for n in self.stream):
            raise InputError(
                f"stream is {self.stream}: it has to be integers from 0 on"
            )

    @property
    def width(self) -> int:
        """Beams that it is searched for with; 1 for none."""
        return int(self.beams.num_beams) if self.beams else 1


@dataclass(frozen=True)
class Commit:
    """Tokens that one round added to one text.

    Attributes:
        id: of the request, as :meth:`Engine.admit` returned it.
        tokens: ids, at least one but where it failed; ends with end-of-sequence where
            that was reached.
        accepted: how many of them, from the left, the draft had proposed.
        finish_reason: "eos", "length" or "error" with a text's last commit, else None.
        stats: its figures so far.
        error: why it failed: its prompt could not be begun with, or there was no next
            token to choose.
        hypotheses: with the last commit of a beam search all texts that it finished,
            best first: the first is the text of all its commits. At most as many as
            beams, and fewer where its rules leave fewer.
    """

    id: int
    tokens: list[int]
    accepted: int
    finish_reason: str | None
    stats: Stats
    error: InputError | None = None
    hypotheses: tuple[Hypothesis, ...] = ()

    def others(self, count: int) -> "Iterator[Commit]":
        """The last commit of a search as ``count`` texts have it but the best, which
        are numbered from 1 on."""
        for number in range(1, count):
            if self.error or number >= len(self.hypotheses):
                error = self.error or InputError(
                    f"there are only {len(self.hypotheses)} texts: the rules leave no "
                    "more of them"
                )
                yield Commit(number, [], 0, "error", self.stats, error)
                continue
            its = self.hypotheses[number]
            stats = replace(self.stats, new_tokens=len(its.tokens))
            reason = its.finish_reason
            yield Commit(number, its.tokens, 0, reason, stats, hypotheses=(its,))


def check_beams(beams: Beams | None, sampling: Sampling, delta: float) -> None:
    """Raise an InputError where a beam search does not go with the other options."""
    if beams is None or beams.num_beams == 1:
        return
    if not sampling.greedy:
        raise InputError(
            "num-beams is above 1, and a beam search draws nothing: leave the "
            "temperature at 0"
        )
    if delta > 0:
        raise InputError(
            "delta is above 0, and a beam search is exactly the target's: leave it at 0"
        )


def check_searched(width: int, trees: bool) -> None:
    """Raise an InputError where a model's texts, whose session has no ``trees``, are to
    be searched for with several beams."""
    if width > 1 and not trees:
        raise InputError(
            "num-beams is above 1, but only models with an encoder are searched with "
            "beams here"
        )


def check_options(max_tokens: int, num_draft: int, delta: float) -> None:
    """Raise an InputError for options that :func:`generate` cannot work with."""
    if max_tokens < 1:
        raise InputError(f"max-tokens is {max_tokens}: it has to be at least 1")
    if num_draft < 0:
        raise InputError(f"num-draft is {num_draft}: it has to be at least 0")
    if not 0 <= delta <= 1:  # NaN too
        raise InputError(f"delta is {delta}: it has to be between 0 and 1")

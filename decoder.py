"""The decoding loop. There is one: plain decoding is the loop with nothing drafted.

A round proposes K tokens, runs the target once over the last committed token and the
K drafts, and keeps what the acceptance rule lets stand, plus one token of the target's
own. The host waits for the device once per round.

      committed so far          drafted                 target's logits
      ... t7                    d1 d2 d3
      fed to the target: t7     d1 d2 d3    ->    after t7, after d1, d2, d3
      d1 and d2 stand, d3 does not  ->  commit d1 d2 and the target's token after d2
"""

import fast_blas  # noqa: F401  (before mlx: see there)

import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from acceptance import verify_greedy
from drafting import Draft, Drafter, Session
from errors import InputError

MAX_TOKENS = 256
NUM_DRAFT = 5
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
        accept_histogram: at [i] the rounds that committed i draft tokens.
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

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, as ``main.py --json`` prints them."""
        return {
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "alpha": self.alpha,
            "tokens_per_round": self.tokens_per_round,
            "accept_histogram": self.accept_histogram,
            "encode_seconds": self.encode_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Commit:
    """Tokens that one round added to one row.

    Attributes:
        row: the prompt's place in the batch.
        tokens: at least one id; ends with end-of-sequence where that was reached.
        accepted: how many of them, from the left, the draft had proposed.
        finish_reason: "eos" or "length" with a row's last tokens, else None.
        stats: the row's figures so far; final once it has finished.
    """

    row: int
    tokens: list[int]
    accepted: int
    finish_reason: str | None
    stats: Stats


def check_options(max_tokens: int, num_draft: int, delta: float) -> None:
    """Raise an InputError for options that :func:`generate` cannot work with."""
    if max_tokens < 1:
        raise InputError(f"max-tokens is {max_tokens}: it has to be at least 1")
    if num_draft < 0:
        raise InputError(f"num-draft is {num_draft}: it has to be at least 0")
    if not 0 <= delta <= 1:  # NaN too
        raise InputError(f"delta is {delta}: it has to be between 0 and 1")


def generate(
    target: Session,
    drafter: Drafter | None,
    prompts: list[list[int]],
    *,
    eos_tokens: AbstractSet[int],
    max_tokens: int = MAX_TOKENS,
    num_draft: int = NUM_DRAFT,
    delta: float = DELTA,
) -> Iterator[Commit]:
    """Decode a batch of prompts greedily, yielding each row's tokens as they stand.

    Args:
        target: the model whose text this is.
        drafter: who guesses; None, or ``num_draft`` 0, decodes with the target alone.
        prompts: B lists of token ids, none empty.
        eos_tokens: ids that end a row; the one produced is part of its tokens.
        max_tokens: the most tokens a row may get, end-of-sequence counted.
        num_draft: K, draft tokens per round.
        delta: how much worse than the target's own choice a draft token may be, see
            :func:`acceptance.verify_greedy`; at 0 the text is the target's own, token
            for token.

    Raises:
        InputError: an option out of range, a prompt that cannot be encoded, or logits
            that are not finite.
    """
    check_options(max_tokens, num_draft, delta)
    num_draft = min(num_draft, max_tokens - 1) if drafter else 0
    if num_draft == 0:
        drafter = None
    mx.reset_peak_memory()
    started = time.perf_counter()
    sequences = [list(first) for first in target.start(prompts)]
    if drafter is not None:
        drafter.start(prompts)
    encoded = time.perf_counter()

    rows = [
        _Row(row, sequence, eos_tokens, max_tokens, num_draft, encoded)
        for row, sequence in enumerate(sequences)
    ]
    for row in rows:
        row.stats.encode_seconds = encoded - started

    ahead: _Round | None = None
    while active := [row for row in rows if not row.finished]:
        # The target adds a token of its own to every draft: more is never needed.
        left = max(row.left for row in active)
        if ahead is not None:
            current = ahead
        else:
            size = min(num_draft, left - 1)
            draft = drafter.propose(sequences, size) if drafter and size else None
            last = mx.array([sequence[-1] for sequence in sequences])
            current = _launch(target, last, draft, delta)
        if drafter is None and left > 1:
            # All that the next plain round needs of this one is its token, which the
            # device has: build it while this one runs, and on a GPU queue it as well.
            # On a CPU, with no latency to hide, a last round in vain would cost more.
            mx.async_eval(current.report)
            ahead = _launch(target, current.next_token, None, delta)
            if mx.default_device() == mx.gpu:
                mx.async_eval(ahead.report)
        accepted, next_tokens, drafts = current.read()
        commits = [
            row.commit(drafts[row.index], accepted[row.index], next_tokens[row.index])
            for row in active
        ]
        if drafter is not None:
            target.rewind([len(sequence) - 1 for sequence in sequences])
        yield from commits


@dataclass
class _Round:
    """A round on its way through the device."""

    next_token: mx.array  # (B,) int32
    report: mx.array  # (B, 3 + K) int32: accepted, finite, next token, draft
    counts: list[int] | None

    def read(self) -> tuple[list[int], list[int], list[list[int]]]:
        """Wait for it: accepted counts, next tokens and drafts, row by row."""
        report = np.array(self.report).tolist()
        if not all(row[1] for row in report):
            raise InputError(
                "the model's logits are not finite: its activations overflow in this "
                "dtype or its weights are damaged; convert it again, with --dtype "
                "bfloat16 or float32"
            )
        counts = self.counts or [None] * len(report)
        return (
            [row[0] for row in report],
            [row[2] for row in report],
            [row[3:][:count] for row, count in zip(report, counts, strict=True)],
        )


def _launch(
    target: Session, last: mx.array, draft: Draft | None, delta: float
) -> _Round:
    """Build a round's graph: run the target over ``last`` (B,) and the draft; judge."""
    tokens, counts = mx.zeros((last.shape[0], 0), mx.int32), None
    fed = last[:, None]
    if draft is not None:
        tokens, counts = draft.tokens, draft.counts
        # No device checks an embedding's bounds. An id cut here is rejected later.
        inside = mx.clip(tokens, 0, target.vocabulary - 1)
        fed = mx.concatenate([fed, inside], axis=1)
    verdict = verify_greedy(
        target.extend(fed), tokens, None if counts is None else mx.array(counts), delta
    )
    verdict_columns = (verdict.accepted, verdict.finite, verdict.next_token)
    columns = [column[:, None].astype(mx.int32) for column in verdict_columns]
    report = mx.concatenate([*columns, tokens], axis=1)
    return _Round(verdict.next_token, report, counts)


class _Row:
    """One prompt's committed tokens, and the only place that knows when it ends."""

    def __init__(
        self,
        index: int,
        sequence: list[int],
        eos_tokens: AbstractSet[int],
        max_tokens: int,
        num_draft: int,
        started: float,
    ):
        self.index = index
        self.left = max_tokens
        self.finished = False
        self.stats = Stats(accept_histogram=[0] * (num_draft + 1))
        self._sequence = sequence
        self._eos_tokens = eos_tokens
        self._started = started

    def commit(self, draft: list[int], accepted: int, next_token: int) -> Commit:
        """Take what stands of ``draft`` and the target's ``next_token``, up to the end.

        The end is the first end-of-sequence, anywhere in the block, or the budget.
        """
        block = [*draft[:accepted], next_token][: self.left]
        end = next((i for i, t in enumerate(block) if t in self._eos_tokens), None)
        if end is not None:
            block = block[: end + 1]
        self._sequence += block
        self.left -= len(block)
        reason = "eos" if end is not None else "length" if not self.left else None
        self.finished = reason is not None

        taken = min(accepted, len(block))
        rejected = taken < len(block) and accepted < len(draft)
        stats = self.stats
        stats.rounds += 1
        stats.new_tokens += len(block)
        stats.drafted += len(draft)
        stats.accepted += taken
        stats.tested += taken + rejected
        stats.accept_histogram[taken] += 1
        stats.decode_seconds = time.perf_counter() - self._started
        stats.peak_memory_bytes = mx.get_peak_memory()
        return Commit(self.index, block, taken, reason, stats)

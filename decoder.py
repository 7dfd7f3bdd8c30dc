"""The decoding loop. There is one: plain decoding is the loop with nothing drafted.

A round proposes K tokens, runs the target once over the last committed token and the
K drafts, and keeps what the acceptance rule lets stand, plus one token of the target's
own. The host waits for the device once per round.

      committed so far          drafted                 target's logits
      ... t7                    d1 d2 d3
      fed to the target: t7     d1 d2 d3    ->    after t7, after d1, d2, d3
      d1 and d2 stand, d3 does not  ->  commit d1 d2 and the target's token after d2
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import math
import sys
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx
import numpy as np

from speculation.acceptance import Verdict, verify, verify_greedy
from speculation.drafting import Draft, Drafter, up_to_end
from speculation.samplers import BatchSampler, RoundSampler
from speculation.sampling import GREEDY, Sampling
from speculation.session import Session
from system.device import on_gpu
from system.errors import InputError

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
        accept_histogram: at [i] the rounds that committed i draft tokens, up to the
            most that one did.
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
    sampling: Sampling = GREEDY,
    streams: list[tuple[int, ...]] | None = None,
) -> Iterator[Commit]:
    """Decode a batch of prompts, yielding each row's tokens as they stand.

    Args:
        target: the model whose text this is.
        drafter: who guesses; None, or ``num_draft`` 0, decodes with the target alone.
        prompts: B lists of token ids, none empty.
        eos_tokens: ids that end a row; the one produced is part of its tokens.
        max_tokens: the most tokens a row may get, end-of-sequence counted. A target
            with a limited number of positions may end a row earlier. Where a draft's
            positions end, the target goes on alone.
        num_draft: K, draft tokens per round.
        delta: how far the text may leave the target's, see
            :func:`acceptance.verify_greedy` and :func:`acceptance.verify`; at 0 it is
            the target's own, token for token or, sampled, in distribution.
        sampling: how tokens are chosen, by both models.
        streams: what tells the rows' random numbers apart, beside the seed: a few
            integers each; by default the row's number. A row's text depends on them,
            not on the rows beside it, but where one of those reaches the model's last
            position: then the others have no draft, and other numbers.

    Raises:
        InputError: an option out of range, a prompt that cannot be encoded, or logits
            that are not finite.
    """
    check_options(max_tokens, num_draft, delta)
    draft_positions = (drafter and drafter.positions) or sys.maxsize
    if num_draft == 0 or max(map(len, prompts)) >= draft_positions:
        drafter = None
    mx.reset_peak_memory()
    started = time.perf_counter()
    sequences = [list(first) for first in target.start(prompts)]
    if drafter is not None:
        drafter.start(prompts)
    encoded = time.perf_counter()
    batch_sampler = BatchSampler(
        sampling,
        sequences,
        target.vocabulary,
        eos_tokens=eos_tokens,
        prompts=prompts,
        streams=streams,
    )
    # The last token of a budget is the target's own, where that is what a draft token
    # would have to be. Elsewhere it may be a draft token: a larger budget must give the
    # same text. Nothing is drafted for what comes after it.
    last = 1 if sampling.greedy and delta == 0 else 0

    target_positions = target.positions or sys.maxsize
    positions = min(target_positions, draft_positions)  # for a draft and its check
    rows = [
        _Row(
            row,
            sequence,
            eos_tokens,
            min(max_tokens, target_positions - len(sequence)),
            encoded,
        )
        for row, sequence in enumerate(sequences)
    ]
    if any(row.budget < 1 for row in rows):
        raise InputError(
            f"the prompt leaves no position for an answer: there are {target_positions}"
        )
    for row in rows:
        row.stats.encode_seconds = encoded - started
    ahead: Round | None = None
    while active := [row for row in rows if not row.finished]:
        budget = max(row.budget for row in active)
        if ahead is not None:
            current = ahead
        else:
            # A row without room would be fed what it has no positions for.
            size = 0
            if drafter:
                longest = max(map(len, sequences))
                size = min(num_draft, budget - last, positions - longest)
            sampler = batch_sampler.round(sequences, max(size, 0))
            draft = None
            if size > 0:
                draft = drafter.propose(sequences, size, sampler)
                draft.counts = _counts(draft, [row.budget - last for row in rows])
            current = launch(target, sampler, draft, delta)
        if drafter is None and budget > 1:
            # All that the next plain round needs of this one is its token, which the
            # device has: build it while this one runs, and on a GPU queue it as well.
            # On a CPU, with no latency to hide, a last round in vain would cost more.
            mx.async_eval(current.report)
            sampler = batch_sampler.round(sequences, following=current.next_token)
            ahead = launch(target, sampler, None, delta)
            if on_gpu():
                mx.async_eval(ahead.report)
        outcomes = current.read()
        commits = [row.commit(outcomes[row.index]) for row in active]
        if any(outcomes[one.row].finite < len(one.tokens) for one in commits):
            current.complain()
        if drafter is not None:
            target.rewind([len(sequence) - 1 for sequence in sequences])
        yield from commits


def _counts(draft: Draft, budgets: list[int]) -> list[int] | None:
    """How many tokens of each row's draft are to be judged; None for all.

    No more than its budget can take: where a neighbour has more left, this row's text
    is still the one it would have alone.
    """
    size = draft.tokens.shape[1]
    counts = draft.counts or [size] * len(budgets)
    counts = [
        min(count, max(budget, 0))
        for count, budget in zip(counts, budgets, strict=True)
    ]
    return None if min(counts) == size else counts


@dataclass
class Round:
    """A round on its way through the device."""

    next_token: mx.array  # (B,) int32
    report: mx.array  # (B, 3 + K) int32: accepted, finite, next token, draft
    counts: list[int] | None
    logits: mx.array  # the model's own, to say what is wrong with them

    def read(self) -> list["_Outcome"]:
        """Wait for it: what became of each row's draft."""
        report = np.array(self.report).tolist()
        counts = self.counts or [None] * len(report)
        return [
            _Outcome(accepted, finite, next_token, draft[:count])
            for (accepted, finite, next_token, *draft), count in zip(
                report, counts, strict=True
            )
        ]

    def complain(self) -> NoReturn:
        """Say why there is no next token."""
        if mx.isfinite(self.logits.max(axis=-1)).all().item():
            raise InputError(
                "no token is left to choose: the rules together (suppressed tokens, "
                "no-repeat-ngram-size, min-new-tokens, ...) ban them all"
            )
        raise InputError(
            "the model's logits are not finite: its activations overflow in this dtype "
            "or its weights are damaged; convert it again, with --dtype bfloat16 or "
            "float32"
        )


class _Outcome(NamedTuple):
    """What became of one row's draft."""

    accepted: int  # tokens that stand, from the left
    finite: int  # positions with usable logits, from the left
    next_token: int  # the target's own, after those
    draft: list[int]


def launch(
    target: Session, sampler: RoundSampler, draft: Draft | None, delta: float
) -> Round:
    """Build a round's graph: run the target over last token and draft, and judge."""
    last = sampler.last
    draft = draft or Draft(mx.zeros((last.shape[0], 0), mx.int32))
    block = fed = last[:, None]
    if draft.tokens.shape[1]:
        # No device checks an embedding's bounds. An id cut here is rejected later.
        inside = mx.clip(draft.tokens, 0, target.vocabulary - 1)
        fed = mx.concatenate([fed, inside], axis=1)
        block = mx.concatenate([block, draft.tokens], axis=1)
    logits = target.extend(fed)
    verdict = _judge(sampler, sampler.process(logits, block), draft, delta)
    verdict_columns = (verdict.accepted, verdict.finite, verdict.next_token)
    columns = [column[:, None].astype(mx.int32) for column in verdict_columns]
    report = mx.concatenate([*columns, draft.tokens], axis=1)
    return Round(verdict.next_token, report, draft.counts, logits)


def _judge(
    sampler: RoundSampler, logits: mx.array, draft: Draft, delta: float
) -> Verdict:
    """Apply the rule of acceptance that goes with the way tokens are chosen."""
    tokens = draft.tokens
    counts = None if draft.counts is None else mx.array(draft.counts)
    if sampler.sampling.greedy:
        return verify_greedy(logits, tokens, counts, delta)
    allowed = None
    size = tokens.shape[1]
    if delta == 1 and size:  # below 1 a probability of 0 is enough to reject
        index = mx.clip(tokens, 0, logits.shape[-1] - 1)[..., None]
        own = mx.take_along_axis(logits[:, :size], index, axis=-1)[..., 0]
        allowed = own > -math.inf
    p = sampler.sampling.probs(logits)
    uniform = sampler.judging(size)
    return verify(p, tokens, draft.probs, counts, delta, uniform, allowed)


class _Row:
    """One prompt's committed tokens, and the only place that knows when it ends.

    Attributes:
        budget: tokens that it may still get.
        finished: whether it gets no more.
        stats: its figures so far.
    """

    def __init__(
        self,
        index: int,
        sequence: list[int],
        eos_tokens: AbstractSet[int],
        max_tokens: int,
        started: float,
    ):
        self.index = index
        self.budget = max_tokens
        self.finished = False
        self.stats = Stats()
        self._sequence = sequence
        self._eos_tokens = eos_tokens
        self._started = started

    def commit(self, outcome: _Outcome) -> Commit:
        """Take what stands of the draft and the target's own token, up to the end.

        The end is the first end-of-sequence, anywhere in the block, or the budget.
        """
        accepted, draft = outcome.accepted, outcome.draft
        block = [*draft[:accepted], outcome.next_token][: self.budget]
        block = up_to_end(block, self._eos_tokens)
        self._sequence += block
        self.budget -= len(block)
        ended = block[-1] in self._eos_tokens
        reason = "eos" if ended else "length" if not self.budget else None
        self.finished = reason is not None

        taken = min(accepted, len(block))
        rejected = taken < len(block) and accepted < len(draft)
        stats = self.stats
        stats.rounds += 1
        stats.new_tokens += len(block)
        stats.drafted += len(draft)
        stats.accepted += taken
        stats.tested += taken + rejected
        stats.accept_histogram += [0] * (taken + 1 - len(stats.accept_histogram))
        stats.accept_histogram[taken] += 1
        stats.decode_seconds = time.perf_counter() - self._started
        stats.peak_memory_bytes = mx.get_peak_memory()
        return Commit(self.index, block, taken, reason, stats)

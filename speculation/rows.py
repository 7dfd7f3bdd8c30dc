"""A text in a row of the batch: what is committed of it, and when it ends."""

import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from speculation.beams import Hypothesis
from speculation.drafting import up_to_end
from speculation.requests import Commit, Request, Stats
from speculation.samplers import RowSampler, Rules
from system.errors import InputError


class Outcome(NamedTuple):
    """What became of one row's draft."""

    accepted: int  # tokens that stand, from the left
    finite: int  # positions with usable logits, from the left
    next_token: int  # the target's own, after those
    draft: list[int]
    found: bool = False  # whether that was looked up

    @property
    def size(self) -> int:
        """How many tokens were drafted."""
        return len(self.draft)


class Row:
    """One text: its committed tokens, and the only place that knows when it ends.

    Attributes:
        id: its request's number.
        rules: how its tokens are chosen, and ``kind``, theirs.
        sampler: how its tokens are chosen.
        sequence: the tokens that decoding started from and those committed since.
        budget: tokens that it may still get.
        drafted: whether anything is drafted for it.
        asked: whether the draft model may be asked.
        entered: whether the draft model has its prompt.
        followed: how many of its tokens there were when the draft model last drafted.
        apart: whether it is to be begun with by itself.
        finished: whether it gets no more.
        width: beams that it is searched for with; 1 for none.
        taken, added: draft tokens that its last round committed, and all that it did.
    """

    width = 1

    def __init__(self, number: int, request: Request, rules: Rules):
        self.id = number
        self.request = request
        self.sampler: RowSampler | None = None
        self.sequence: list[int] = []
        self.budget = request.max_tokens
        self.drafted = True
        self.asked = self.entered = self.apart = self.finished = False
        self.followed = self.taken = self.added = 0
        self.kind = rules.kind
        self.rules = rules
        self._stats = Stats()
        # The last token of a budget is the target's own, where that is what a draft
        # token would have to be. Elsewhere it may be a draft token: a larger budget
        # must give the same text. Nothing is drafted for what comes after it.
        self._last = 1 if rules.chosen else 0

    @property
    def cached(self) -> int:
        """How many positions of the caches are its own, but for what is fed next."""
        return len(self.sequence) - 1

    def holes(self) -> list[int]:
        """Of these positions those that are nobody's."""
        return []

    @property
    def most_drafted(self) -> int:
        """How many draft tokens may be judged in its next round."""
        if not self.drafted:
            return 0
        most = max(0, self.budget - self._last)
        asked = self.request.num_draft
        return most if asked is None else min(most, asked)

    def begin(
        self, first: list[int], positions: int, seconds: float, now: float
    ) -> None:
        """Its prompt is encoded.

        Args:
            first: the tokens that decoding starts from.
            positions: how many the target has.
            seconds: that encoding took.

        Raises:
            InputError: there is no room for an answer, or no first token to force.
        """
        self.sequence = list(first)
        self.followed = len(first)
        self.budget = min(self.budget, positions - len(first))
        if self.budget < 1:
            raise InputError(
                f"the prompt leaves no position for an answer: there are {positions}"
            )
        request = self.request
        self.sampler = RowSampler(
            self.rules,
            first,
            request.prompt,
            request.sampling.seed or 0,
            request.stream,
        )
        self._stats.encode_seconds = seconds
        self._started = now

    def fail(self, error: InputError) -> Commit:
        """It ends without another token."""
        self.finished = True
        return Commit(self.id, [], 0, "error", self._stats.copy(), error)

    def commit(
        self, outcome: Outcome, fault: Callable[[], InputError]
    ) -> Commit | None:
        """Take what stands of the draft and the target's own token, up to the end.

        The end is the first end-of-sequence, anywhere in the block, or the budget.

        Args:
            fault: why there is no next token, where there is none.

        Returns:
            None where it may have been the draft that the target makes no numbers of:
            then it goes on without one.
        """
        accepted, draft = outcome.accepted, outcome.draft
        ends = self.rules.eos_tokens
        block = [*draft[:accepted], outcome.next_token][: self.budget]
        block = up_to_end(block, ends)
        if outcome.finite < len(block):
            if draft:
                self._go_undrafted(outcome)
                return None
            return self.fail(fault())
        self.sequence += block
        self.sampler.append(block)
        self.budget -= len(block)
        reason = "eos" if block[-1] in ends else "length" if not self.budget else None
        self.finished = reason is not None

        taken = min(accepted, len(block))
        self.taken, self.added = taken, len(block)
        rejected = taken < len(block) and accepted < len(draft)
        self._count(outcome, taken, rejected)
        return self._commit(block, taken, reason)

    def _commit(
        self,
        tokens: list[int],
        accepted: int,
        reason: str | None,
        hypotheses: tuple[Hypothesis, ...] = (),
    ) -> Commit:
        stats = self._stats
        stats.new_tokens += len(tokens)
        stats.decode_seconds = time.perf_counter() - self._started
        stats.peak_memory_bytes = mx.get_peak_memory()
        return Commit(
            self.id, tokens, accepted, reason, stats.copy(), hypotheses=hypotheses
        )

    def _go_undrafted(self, outcome: Outcome) -> None:
        """A round was in vain, maybe for what was drafted: nothing is any more."""
        self.drafted = False
        self.taken = self.added = 0
        self._count(outcome, 0, 0)

    def _count(self, outcome: Outcome, accepted: int, rejected: int) -> None:
        """A round, of which so many draft tokens were judged."""
        stats, drafted = self._stats, outcome.size
        stats.rounds += 1
        stats.drafted += drafted
        stats.accepted += accepted
        stats.tested += accepted + rejected
        if outcome.found:
            stats.found += accepted + rejected
            stats.found_accepted += accepted
        stats.accept_histogram += [0] * (accepted + 1 - len(stats.accept_histogram))
        stats.accept_histogram[accepted] += 1
        last, times = stats.sizes.pop() if stats.sizes else (drafted, 0)
        stats.sizes += (
            [(last, times + 1)] if last == drafted else [(last, times), (drafted, 1)]
        )

"""Who drafts for the rows of a batch: a draft model, what was looked up, or nobody."""

import sys
import time
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from speculation.acceptance import Draft
from speculation.drafting import Drafter
from speculation.lookup import NOTHING, Found, Lookup
from speculation.policy import Fate, Fixed, Plan, Policy, Prospect
from speculation.rows import Outcome, Row
from speculation.samplers import RoundSampler
from speculation.session import Preparing, Session, finish
from system.errors import PromptError

#: What is fed to a row that the draft model does not have.
NOBODYS = [0]


#: The most tokens that the draft model catches up with in a round, which would take
#: longer than others of its kind.
_BEHIND = 3


class Proposer:
    """The drafts of a batch, as a policy wants them.

    What was looked up costs nothing and is there before a round is planned; the draft
    model is given a prompt only when it is first asked about its row.

    Attributes:
        policy: decides what is drafted.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        lookup: Lookup | None,
        policy: Policy,
        positions: int,
    ):
        """``positions``: that the target has."""
        self.policy = policy
        self._drafter = drafter
        self._lookup = lookup
        self._positions = positions
        self._draft_positions = (drafter and drafter.positions) or sys.maxsize
        # Of a draft that is longer than that no prompt would be left.
        self._most = min(policy.most, self._draft_positions // 2)
        self._begun = False  # whether the draft model has the batch
        self._found: list[Found] = []
        self._told = False  # whether the round drafts what its texts ask for
        self._entering, self._entered = 0.0, 0  # before the round: seconds, rows

    @property
    def session(self) -> Session | None:
        """The draft model's, where it can grow trees."""
        session = getattr(self._drafter, "session", None)
        return session if session is not None and session.trees else None

    @staticmethod
    def _width(rows: Iterable[Row | None]) -> int:
        """Beams of each text, which all of a batch have alike."""
        return next((row.width for row in rows if row), 1)

    def _policy_of(self, rows: Iterable[Row | None]) -> Policy:
        """What decides for such texts."""
        width = self._width(rows)
        return self.policy if width == 1 else self.policy.of(width)

    # Rows.

    def start(self, rows: list[Row]) -> None:
        """A batch begins with these rows."""
        self._begun = False
        self._admit(rows)
        if self._lookup:
            self._lookup.start([row.request.prompt for row in rows])

    def prepare(self, newcomers: list[Row]) -> Preparing:
        """Give the draft model the prompts of rows that are to come, if it is in use;
        as :meth:`Session.prepare`."""
        self._admit(newcomers)
        if not (self._begun and self._policy_of(newcomers).drafting):
            return None
        try:
            return (yield from self._drafter.prepare(_prompts(newcomers)))
        except PromptError:
            return None  # whose fault it is shows when it is asked about them

    def put(self, places: list[int], newcomers: list[Row], prepared: object) -> None:
        """Have what was prepared in these rows of the batch."""
        if prepared is not None:
            self._drafter.put(places, prepared)
            for row in newcomers:
                row.entered = row.asked
        if self._lookup:
            self._lookup.put(places, [row.request.prompt for row in newcomers])

    def take(self, rows: list[int], blank: int) -> None:
        """As :meth:`Session.take`."""
        if self._begun:
            self._drafter.take(rows, blank)
        if self._lookup:
            self._lookup.take(rows, blank)

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """As :meth:`Session.batch_bytes`."""
        if self._drafter is None:
            return 0
        return self._drafter.batch_bytes(rows, prompt, answer)

    def _admit(self, rows: list[Row]) -> None:
        for row in rows:
            room = len(row.request.prompt) < self._draft_positions
            row.asked = self._drafter is not None and room
            row.asked &= row.width == 1 or self.session is not None
            row.entered = False

    # Rounds.

    def plan(self, rows: list[Row | None]) -> Plan:
        """What is drafted in the next round; the draft model has what it needs for
        that."""
        while True:
            prospects = self._prospects(rows)
            plan = self._policy_of(rows).choose(len(rows), prospects)
            asked = self._asked(rows)
            self._told = asked > plan.size
            if self._told:
                plan = Fixed(asked).choose(len(rows), prospects)
            if not plan.steps:
                return plan
            began = time.perf_counter()
            ready = self._enter(rows, plan)
            if ready and self._width(rows) == 1:
                self._follow(rows)
            self._entering += time.perf_counter() - began
            if ready:
                return plan

    def stays_plain(self, rows: list[Row | None]) -> bool:
        """As :meth:`Policy.stays_plain`."""
        if self._asked(rows):
            return False
        policy = self._policy_of(rows)
        return policy.stays_plain(len(rows), self._prospects(rows))

    def _asked(self, rows: list[Row | None]) -> int:
        """How many draft tokens texts ask for by themselves."""
        asking = (row for row in rows if row and row.request.num_draft)
        return min(self._most, max((row.most_drafted for row in asking), default=0))

    def propose(
        self, rows: list[Row | None], plan: Plan, sampler: RoundSampler
    ) -> Draft | None:
        """The draft of a round; None of a plain one."""
        if not plan.size:
            return None
        found = self.looked_up(rows, plan)
        size = plan.size
        if plan.steps:
            draft = self._drafter.propose(_sequences(rows), plan.steps, sampler)
            size = draft.tokens.shape[1]
        else:
            draft = Draft(mx.zeros((len(rows), size), mx.int32))
        counts = draft.counts or [size] * len(rows)
        if any(found):
            lengths = [len(each.tokens) for each in self._found]
            longest = max(n for n, has in zip(lengths, found, strict=True) if has)
            more = min(longest, plan.size) - size
            if more > 0:  # the model's drafts have come to an end before
                size += more
                draft.tokens = mx.pad(draft.tokens, [(0, 0), (0, more)])
                if draft.probs is not None:
                    draft.probs = mx.pad(draft.probs, [(0, 0), (0, more), (0, 0)])
            known = np.zeros((len(rows), size), np.int32)
            for place, has in enumerate(found):
                if has:
                    tokens = self._found[place].tokens[:size]
                    known[place, : len(tokens)] = tokens
            draft.tokens = mx.where(
                mx.array(found)[:, None], mx.array(known), draft.tokens
            )
        judged = []
        for place, row in enumerate(rows):
            its = counts[place]
            if row and found[place]:
                its = len(self._found[place].tokens)
            elif row and not (plan.steps and row.entered):
                its = 0
            # No more than its budget can take: where a neighbour has more left, this
            # row's text is still the one it would have alone.
            judged.append(min(its, size, row.most_drafted) if row else size)
        draft.counts = None if min(judged) == size else judged
        return draft

    def looked_up(self, rows: list[Row | None], plan: Plan) -> list[bool]:
        """Which rows, nobody's too, take what was found for them."""
        chosen = iter(plan.looked_up)
        return [bool(row) and next(chosen) for row in rows]

    def observe(
        self,
        plan: Plan,
        seen: list[tuple[int, Row, Outcome]],
        batch: int,
        seconds: float | None,
    ) -> None:
        """Have the policy know what became of a round of so many rows.

        Args:
            seen: the places of rows, and what became of their drafts.
            seconds: from :meth:`plan` on; None where they say nothing.
        """
        fates = [
            Fate(
                row.kind,
                self._found[place].match if outcome.found else 0,
                outcome.size,
                row.taken,
                row.added,
                row.finished,
            )
            for place, row, outcome in seen
        ]
        if seconds is not None:
            seconds -= self._entering
        if plan.steps:
            for _, row, _ in seen:
                row.followed = len(row.sequence) if row.entered else row.followed
        # Of what it did not choose it has nothing to answer for.
        if seen and not self._told:
            self._policy_of(row for _, row, _ in seen).observe(
                batch, plan, fates, seconds, self._entering, self._entered
            )
        self._entering, self._entered = 0.0, 0

    def _prospects(self, rows: list[Row | None]) -> list[Prospect]:
        """What there could be for each row that is somebody's."""
        longest = max(len(row.sequence) for row in rows if row)
        # A row without room would be fed what it has no positions for.
        left = self._positions - longest
        self._found = [NOTHING] * len(rows)
        prospects = []
        for place, row in enumerate(rows):
            if row is None:
                continue
            # For any draft: that of a neighbour with more budget may be longer.
            row.asked &= self._draft_positions - len(row.sequence) >= self._most
            row.entered &= row.asked  # or it would be fed, beside others
            most = max(0, min(self._most, row.most_drafted, left))
            if self._lookup and most and row.width == 1:
                self._found[place] = self._lookup.find(
                    place, row.sequence, most, row.request.eos_tokens
                )
            found = self._found[place]
            prospects.append(
                Prospect(
                    row.kind,
                    most,
                    row.asked,
                    row.entered,
                    len(found.tokens),
                    found.match,
                )
            )
        return prospects

    def _enter(self, rows: list[Row | None], plan: Plan) -> bool:
        """Give the draft model the prompts that a plan needs; False where it has no
        room for all of them: about those it has none for it is asked no more."""
        found = self.looked_up(rows, plan)
        places = [
            place
            for place, row in enumerate(rows)
            if row
            and row.asked
            and row.drafted
            and not row.entered
            and not found[place]
        ]
        if not places:
            return True
        newcomers = [rows[place] for place in places]
        if not self._give(rows, places):
            # Each by itself shows whose fault it is.
            for row, place in zip(newcomers, places, strict=True):
                row.asked = len(places) > 1 and self._give(rows, [place])
        self._entered += sum(row.entered for row in newcomers)
        return all(row.entered for row in newcomers)

    def _follow(self, rows: list[Row | None]) -> None:
        """Have the draft model up to date, where it is far behind."""
        behind = (
            len(row.sequence) - row.followed for row in rows if row and row.entered
        )
        if max(behind, default=0) > _BEHIND:
            self._drafter.follow(_sequences(rows))

    def _give(self, rows: list[Row | None], places: list[int]) -> bool:
        """Give the draft model the prompts of these rows; False where it has no room
        for them."""
        newcomers = [rows[place] for place in places]
        try:
            if self._begun:
                prepared = finish(self._drafter.prepare(_prompts(newcomers)))
                self._drafter.put(places, prepared)
            else:
                prompts = [NOBODYS] * len(rows)
                for place in places:
                    prompts[place] = rows[place].request.prompt
                self._drafter.start(prompts)
                self._begun = True
        except PromptError:
            return False
        for row in newcomers:
            row.entered = True
        return True


def _sequences(rows: list[Row | None]) -> list[list[int]]:
    """What the draft model is to go on from."""
    return [row.sequence if row and row.entered else NOBODYS for row in rows]


def _prompts(rows: list[Row]) -> list[list[int]]:
    """What the draft model is given: of a prompt that it has no room for, nothing."""
    return [row.request.prompt if row.asked else NOBODYS for row in rows]

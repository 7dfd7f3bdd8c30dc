"""How many tokens to draft: as many as pay, and none where none do.

Before each round the policy is told what could be drafted, and says what is; after it,
what became of that and how long it took. It knows neither models nor clocks: a
simulation drives it as the engine does.

A round's gain is the tokens that it is expected to commit over what it costs. Costs are
counted in plain rounds, those of the target alone with as many rows, so that a machine
that slows down slows both sides of a comparison.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from speculation.beams import MOST_BEAMS
from speculation.chances import Chances
from speculation.costs import KNOWN, Costs

#: The most tokens that are drafted where nobody says how many.
MOST = 16

#: The sizes of drafts that are tried: the longer, the less it matters by how much.
_SIZES = {*range(1, 9), 10, 12, 16}
#: How much longer than any before a draft may be.
_STRIDE = 2
#: Rounds after which a draft as long as may be is tried, if no loss has to be feared: a
#: cost that rises in steps may hide what lies behind one.
_LOOK_FAR = 24
#: Rounds after which another size than the best is tried, at first and at most, and how
#: much of what the best gains it has to promise.
_LOOK_FIRST, _LOOK_MOST, _WORTH = 12, 48, 0.6
#: What is less than this is no gain.
_LEAST_GAIN = 1.02
#: Plain rounds that a try may cost without further thought.
_CHEAP = 0.05
#: Plain rounds before drafting is tried again: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 2, 512
#: Plain rounds that may be lost at first, what share of all besides, and how much of
#: what was saved may be lost again.
_FIRST_CREDIT, _CREDIT, _MOST_CREDIT = 0.75, 0.01, 4.0
#: Giving the draft a prompt, in plain rounds, before it was timed.
_ENTRY = 0.5
#: Seconds that no round takes.
_LONGEST = 600.0
#: Plain rounds that follow one that is to be timed, where the first takes longer.
_PLAIN_RUN = 2
#: Tokens and texts that the mean length begins with.
_TEXT = 32.0, 1.0
#: Draft tokens that were taken and those of them that ended a text, to begin with.
_CLOSING = 8.0, 0.1
#: The most steps that a draft grows beams by, and the most numbers of beams that are
#: remembered.
_MOST_STEPS, _MOST_WIDTHS = 8, 16
#: The most kinds of rules whose acceptance is kept.
_MOST_KINDS = 64
#: Of :attr:`samplers.Rules.kind`.
_KIND = re.compile(r"(greedy|temperature \d+\.\d), (shared|delta \d\.\d)")
#: Tokens after which the mean length of texts goes by half.
_MOST_TOKENS = 4096


class Prospect(NamedTuple):
    """What may be drafted for a row.

    Attributes:
        kind: by which rules its tokens are judged: each has its own acceptance.
        most: tokens that may be judged; 0 where nothing is drafted.
        model: whether the draft model may be asked.
        entered: whether the draft model has the row's prompt.
        found: tokens that are known without it.
        match: how many tokens agree where those were found.
    """

    kind: str
    most: int
    model: bool = True
    entered: bool = True
    found: int = 0
    match: int = 0


class Plan(NamedTuple):
    """What is drafted in a round.

    Attributes:
        steps: of the draft model; 0 where it is left alone.
        size: K, the most tokens of a row; 0 for a plain round.
        looked_up: for each row, whether it takes what was found.
        gain: tokens that a row is expected to get, over those of plain rounds.
    """

    steps: int
    size: int
    looked_up: tuple[bool, ...]
    gain: float = 1.0


class Fate(NamedTuple):
    """What became of a row in a round.

    Attributes:
        kind, match: of its :class:`Prospect`; ``match`` is 0 for the model's draft.
        drafted: tokens that were judged, or could have been.
        taken: draft tokens that were committed.
        tokens: all that were.
        ended: whether its text is finished.
    """

    kind: str
    match: int
    drafted: int
    taken: int
    tokens: int
    ended: bool = False


class Policy(Protocol):
    """Who decides what is drafted.

    Attributes:
        most: the most tokens of a draft.
        drafting: whether newcomers' prompts should go to the draft model at once.
    """

    most: int
    drafting: bool

    def of(self, width: int) -> "Policy":
        """Who decides about texts that are searched for with so many beams."""

    def choose(self, batch: int, rows: Sequence[Prospect]) -> Plan:
        """What to draft in the next round of ``batch`` rows, of which ``rows`` are
        somebody's."""

    def stays_plain(self, batch: int, rows: Sequence[Prospect]) -> bool:
        """Whether the round after a plain one will be plain as well, whatever comes of
        that one."""

    def observe(
        self,
        batch: int,
        plan: Plan,
        fates: Iterable[Fate],
        seconds: float | None,
        entering: float = 0.0,
        entered: int = 0,
    ) -> None:
        """Take in a round.

        Args:
            fates: of its rows.
            seconds: that it took; None where they say nothing.
            entering: seconds that it took before that to give the draft model the
                prompts of so many rows, ``entered``, and what it lacked of their texts.
        """


class Fixed:
    """So many tokens in every round."""

    def __init__(self, num_draft: int):
        self.most = num_draft
        self.drafting = num_draft > 0

    def of(self, width: int) -> "Fixed":
        """As :class:`Policy` has it."""
        return self

    def choose(self, batch: int, rows: Sequence[Prospect]) -> Plan:
        """As :class:`Policy` has it."""
        size = min(self.most, max((row.most for row in rows), default=0))
        looked_up = tuple(row.found > 0 for row in rows)
        asked = any(
            row.model and row.most and not has
            for row, has in zip(rows, looked_up, strict=True)
        )
        found = max((min(row.found, row.most, size) for row in rows), default=0)
        return Plan(size if asked else 0, size if asked else found, looked_up)

    def stays_plain(self, batch: int, rows: Sequence[Prospect]) -> bool:
        """As :class:`Policy` has it."""
        return self.most == 0

    def observe(self, *_: Any, **__: Any) -> None:
        """As :class:`Policy` has it: nothing follows from it."""


class Auto:
    """As many tokens as are expected to gain most, or none.

    Whatever the draft is, little is lost beside plain decoding: drafting is tried in
    small steps, and only while what all tries have cost stays a small share of all the
    work. Lattimore and Szepesvári, "Bandit Algorithms", has the like under
    conservative bandits.

    Attributes:
        most, drafting: of :class:`Policy`.
        rounds: how many drafted so many tokens, at [K].
    """

    def __init__(
        self,
        most: int = MOST,
        *,
        step: float = 0.1,
        token: float = 0.1,
        ahead: bool = False,
    ):
        """
        Args:
            most: the most tokens of a draft.
            step, token: of :class:`Costs`, before anything was measured.
            ahead: whether a plain round after another takes less time than one alone.
        """
        self.most = most
        self.drafting = True
        self.rounds = [0] * (most + 1)
        self._sizes = np.arange(most + 1)
        self._skipped = np.array([size not in _SIZES for size in self._sizes])
        self._prior = step, token
        self._plain_run = _PLAIN_RUN if ahead else 0
        self._costs: dict[int, Costs] = {}
        self._chances: dict[tuple[str, int], Chances] = {}
        self._entering: float | None = None  # seconds: the draft takes in a prompt
        self._tokens, self._texts = _TEXT  # that were committed, that ended
        self._taken, self._closing = _CLOSING  # draft tokens that were; those that end
        self._look = _LOOK_FIRST  # rounds after which another size is tried
        self._steady = self._other = 0  # those since one was; how many were
        self._pause = _FIRST_PAUSE  # plain rounds after which drafting is tried again
        self._quiet = 0  # those since it was
        self._plain_more = 0  # plain rounds that are to come, to be timed
        self._settled = False  # whether the last plain round was for want of a gain
        self._balance = 0.0  # plain rounds that drafting has saved, lost if negative
        self._worth = 0.0  # plain rounds that all tokens would have taken
        self._searching: dict[int, Auto] = {}  # by the number of beams

    def of(self, width: int) -> "Auto":
        """As :class:`Policy` has it. Where ``choose`` speaks of tokens, those are steps
        of the search."""
        if width not in self._searching:
            step, token = self._prior
            its = Auto(min(self.most, _MOST_STEPS), step=step, token=token * width)
            self._searching[width] = its
        return self._searching[width]

    def choose(self, batch: int, rows: Sequence[Prospect]) -> Plan:
        """As :class:`Policy` has it."""
        costs = self._costs_of(batch)
        plain = Plan(0, 0, (False,) * len(rows))
        self._settled = False
        if costs.rounds and costs.plain_seen < min(1 + costs.rounds / 8, KNOWN):
            # What it costs has to be known, to compare with.
            self._plain_more = self._plain_run
            return plain
        self._plain_more = 0
        options = self._options(costs, rows)
        gains = np.where(options.risk <= self._credit, options.gain, -math.inf)
        if gains.max() >= _LEAST_GAIN:
            # What was not measured yet may cost less than it seems.
            hopes = gains / costs.hope[:, : gains.shape[1]]
            model, size = np.unravel_index(hopes.argmax(), hopes.shape)
            if self._quiet:
                self._quiet, self._pause = 0, _FIRST_PAUSE
            else:
                model, size = self._explore(costs, options, model, size)
        else:
            self._settled = True
            if gains.max() == -math.inf or self._quiet < self._pause:
                self.drafting = False
                return plain
            # The most promising of what costs little, or least.
            cheap = max(_CHEAP, options.risk[gains > -math.inf].min())
            gains = np.where(options.risk <= cheap, gains, -math.inf)
            model, size = np.unravel_index(gains.argmax(), gains.shape)
        looked_up = options.prefers[:, size].tolist() if model else options.matched
        gain = max(float(options.gain[model, size]), 1e-9)
        # Newcomers' prompts are for the draft as well, if that pays.
        share = len(rows) * self._entry(costs) * self._texts / self._tokens
        self.drafting = bool(model) and 1 / (1 / gain + share) >= _LEAST_GAIN
        return Plan(int(size) if model else 0, int(size), tuple(looked_up), gain)

    def _explore(
        self, costs: Costs, options: "_Options", model: int, size: int
    ) -> tuple[int, int]:
        """What is drafted, ``size`` or, once in a while, as much as may be, or what
        was long not tried: it may have turned out dear by chance."""
        its = options.gain[model]
        longest = int(np.flatnonzero(its > -math.inf).max())
        if (
            costs.rounds % _LOOK_FAR == 0
            and longest > costs.farthest + _STRIDE
            and options.risk[model, longest] <= 0
        ):
            return model, longest
        self._steady += 1
        if self._steady < self._look:
            return model, size
        self._steady, self._look = 0, min(2 * self._look, _LOOK_MOST)
        self._other += 1
        wanted = (size // 2, 2 * size, 1)[self._other % 3]
        fit = [
            n
            for n in range(1, len(its))
            if n != size and its[n] > _WORTH * its[size] and options.risk[model, n] <= 0
        ]
        other = min(fit, key=lambda n: abs(n - wanted), default=size)
        if other != size:
            costs.doubt(bool(model), other)
        return model, other

    def stays_plain(self, batch: int, rows: Sequence[Prospect]) -> bool:
        """As :class:`Policy` has it."""
        if self._plain_more:
            self._plain_more -= 1
            return True
        if not self._settled or self._quiet + 1 >= self._pause:
            return False
        if not any(row.found for row in rows):
            return True
        return self._options(self._costs_of(batch), rows).gain.max() < _LEAST_GAIN

    def observe(
        self,
        batch: int,
        plan: Plan,
        fates: Iterable[Fate],
        seconds: float | None,
        entering: float = 0.0,
        entered: int = 0,
    ) -> None:
        """As :class:`Policy` has it."""
        fates = list(fates)
        self.rounds[plan.size] += 1
        # A clock may jump, and a process be stopped.
        if seconds is not None and not 0 < seconds < _LONGEST:
            seconds = None
        if not 0 <= entering < _LONGEST:
            entering, entered = 0.0, 0
        costs = self._costs_of(batch)
        model = int(plan.steps > 0)
        if seconds is not None:
            costs.observe(bool(model), plan.size, seconds)
        if entered:
            each = entering / entered
            known = self._entering
            self._entering = each if known is None else known + 0.2 * (each - known)
        drafts: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for fate in fates:
            self._tokens += fate.tokens
            self._texts += fate.ended
            self._taken += fate.taken
            self._closing += 0 < fate.taken == fate.tokens
            if fate.drafted:
                its = drafts.setdefault((fate.kind, fate.match), [])
                its.append((fate.drafted, fate.taken))
        if self._tokens > _MOST_TOKENS:
            self._tokens, self._texts = self._tokens / 2, self._texts / 2
        if self._taken > _MOST_TOKENS:
            self._taken, self._closing = self._taken / 2, self._closing / 2
        for key, its in drafts.items():
            self._chances_of(*key).observe(its)
        worth = sum(fate.tokens for fate in fates) / max(1, len(fates))
        self._worth += worth
        if plan.size:
            self._balance += worth - costs.of[model, plan.size]
            if costs.plain_seconds:  # a first time may take ever so long
                self._balance -= min(entering / costs.plain_seconds, _MOST_CREDIT)
            self._balance = min(self._balance, _MOST_CREDIT)
            # It was a try; one without seconds is followed by another, that has them.
            if self._settled and seconds is not None:
                stood = any(fate.taken for fate in fates)
                # Tries may take a hundredth of the time.
                most = (costs.of[model, plan.size] - 1) / _CREDIT
                longer = min(
                    max(2 * self._pause, _FIRST_PAUSE),
                    max(_FIRST_PAUSE, most),
                    _LONGEST_PAUSE,
                )
                self._quiet, self._pause = 0, 0 if stood else longer
        elif self._settled:
            self._quiet += 1

    @property
    def _credit(self) -> float:
        """How many plain rounds the next draft may cost in vain."""
        return max(0.0, _FIRST_CREDIT + _CREDIT * self._worth + self._balance)

    def _options(self, costs: Costs, rows: Sequence[Prospect]) -> "_Options":
        """What could be drafted."""
        most = min(self.most, max((row.most for row in rows), default=0))
        if not costs.rounds or costs.rounds % _LOOK_FAR:
            reach = costs.farthest + _STRIDE
            most = min(most, next((n for n in sorted(_SIZES) if n >= reach), most))
        sizes = self._sizes[: most + 1]
        found = np.array([min(row.found, row.most) for row in rows])
        asked = np.array([row.model and row.most > 0 for row in rows])
        by_match, by_model = self._expected(rows, sizes, found, asked)
        prefers = (found > 0)[:, None] & (by_match >= by_model)
        uses = asked[:, None] & ~prefers
        mixed = np.where(prefers, by_match, by_model)
        tokens = np.stack([by_match.sum(axis=0), mixed.sum(axis=0)]) / len(rows)

        cost, risk = costs.of[:, : most + 1].copy(), costs.of[:, : most + 1].copy()
        lacking = asked & ~np.array([row.entered for row in rows])
        if lacking.any():
            # To begin with a draft takes time, of which each round has a share.
            entry = (uses & lacking[:, None]).sum(axis=0) * self._entry(costs)
            cost[1] += entry * tokens[1] / max(self._tokens / self._texts, 1.0)
            if self._entering is not None:
                risk[1] += entry
        sure = min(
            self._chances_of(row.kind, 0 if row.model else row.match).sure
            for row in rows
        )
        risk -= 1 + sure * (tokens - 1)
        gain = tokens / cost
        gain[:, self._skipped[: most + 1]] = -math.inf
        gain[0, sizes > found.max()] = -math.inf
        gain[1, ~uses.any(axis=0)] = -math.inf
        return _Options(gain, risk, prefers, (found > 0).tolist())

    def _expected(
        self,
        rows: Sequence[Prospect],
        sizes: np.ndarray,
        found: np.ndarray,
        asked: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens to expect of each row, (rows, sizes) each: with what was found for
        it, and with the model's draft.

        One that ends the text is followed by none of the target's own.
        """
        by_match, by_model = np.ones((2, len(rows), len(sizes)))
        goes_on = 1 - self._closing / self._taken
        for place, row in enumerate(rows):
            if found[place]:
                tokens = self._chances_of(row.kind, row.match).tokens
                tokens = tokens[np.minimum(sizes, found[place])]
                by_match[place] += goes_on * (tokens - 1)
            if asked[place]:
                tokens = self._chances_of(row.kind, 0).tokens
                tokens = tokens[np.minimum(sizes, row.most)]
                by_model[place] += goes_on * (tokens - 1)
        return by_match, by_model

    def _entry(self, costs: Costs) -> float:
        """What it takes to give the draft a prompt, in plain rounds."""
        if self._entering is None or costs.plain_seconds is None:
            return _ENTRY
        return self._entering / costs.plain_seconds

    def reasons(self) -> list[str]:
        """What it goes by, for a person: a line for each number of rows and for each
        kind of draft."""
        lines = []
        for rows, costs in sorted(self._costs.items()):
            seconds = costs.plain_seconds
            if seconds is None:
                continue
            line = f"rounds of {rows}: plain {seconds * 1e3:.1f} ms"
            for model, name in enumerate(("looked up", "drafted")):
                known = [
                    f"{size} x{costs.of[model, size]:.2f}"
                    for size in self._sizes
                    if costs.seen[model, size] >= 1
                ]
                line += f"; {name} {', '.join(known)}" if known else ""
            lines.append(line)
        for (kind, match), chances in sorted(self._chances.items()):
            tokens = chances.tokens
            of = f"looked up by {match}" if match else "drafted"
            shown = ", ".join(f"{tokens[size]:.2f}" for size in self._sizes[1:9])
            lines.append(f"{kind}, {of}: tokens to expect of 1, 2, ... {shown}")
        for width, its in sorted(self._searching.items()):
            lines += [f"{width} beams: {line}" for line in its.reasons()]
        return lines

    def calibrate(
        self,
        batch: int,
        plain: float,
        rounds: Mapping[tuple[bool, int], float],
        seen: float,
    ) -> None:
        """Have the costs of rounds of ``batch`` rows, where they were measured by
        themselves: as :meth:`Costs.calibrate`."""
        self._costs_of(batch).calibrate(plain, rounds, seen)

    def as_dict(self) -> dict[str, Any]:
        """What :meth:`restore` takes, for a file."""
        return {
            "most": self.most,
            "costs": {str(rows): each.as_dict() for rows, each in self._costs.items()},
            "chances": [
                [kind, match, each.as_list()]
                for (kind, match), each in list(self._chances.items())[-_MOST_KINDS:]
            ],
            "entering": self._entering,
            "length": self._tokens / self._texts,
            "closing": self._closing / self._taken,
            "pause": self._pause,
            "balance": self._balance,
            "worth": min(self._worth, _MOST_TOKENS),
            "beams": {
                str(width): its.as_dict()
                for width, its in list(self._searching.items())[-_MOST_WIDTHS:]
            },
        }

    def restore(self, value: Any) -> None:
        """Go on from what :meth:`as_dict` gave; from nothing, where that is odd."""
        try:
            self._restore(value)
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
            self._costs, self._chances, self._entering = {}, {}, None
            self._tokens, self._texts, self._pause = *_TEXT, _FIRST_PAUSE
            self._taken, self._closing = _CLOSING
            self._balance = self._worth = 0.0
            self._searching = {}

    def _restore(self, value: Any) -> None:
        if value["most"] != self.most:
            raise ValueError("this is of another policy")
        for rows, its in value["costs"].items():
            self._costs_of(int(rows)).restore(its)
        for kind, match, its in value["chances"]:
            if not _KIND.fullmatch(kind):
                raise ValueError("there are no such rules")
            self._chances_of(kind, int(match)).restore(its)
        entering, length = value["entering"], float(value["length"])
        if entering is not None and not 0 <= float(entering) < 3600:
            raise ValueError("this is no time")
        if not 1 <= length < 1e6:
            raise ValueError("this is no length")
        closing = float(value["closing"])
        if not 0 <= closing <= 1:
            raise ValueError("this is no share")
        balance, worth = float(value["balance"]), float(value["worth"])
        if not (abs(balance) <= _MOST_TOKENS and 0 <= worth <= _MOST_TOKENS):
            raise ValueError("these are no rounds")
        self._balance, self._worth = min(balance, _MOST_CREDIT), worth
        self._entering = None if entering is None else float(entering)
        self._tokens, self._texts = 4 * length, 4.0
        self._taken, self._closing = _TEXT[0], _TEXT[0] * closing
        self._pause = min(max(int(value["pause"]), _FIRST_PAUSE), _LONGEST_PAUSE)
        for width, its in value.get("beams", {}).items():
            if 1 < int(width) <= MOST_BEAMS:
                self.of(int(width)).restore({**its, "beams": {}})

    def _costs_of(self, batch: int) -> Costs:
        if batch not in self._costs:
            known = [each for each in self._costs if self._costs[each].farthest]
            near = min(known, key=lambda rows: abs(rows - batch), default=None)
            like, times = (near and self._costs[near]), batch / (near or batch)
            self._costs[batch] = Costs(self.most, *self._prior, like, times)
        return self._costs[batch]

    def _chances_of(self, kind: str, match: int) -> Chances:
        key = kind, match
        if key not in self._chances:
            self._chances[key] = Chances(self.most)
        return self._chances[key]


class _Options(NamedTuple):
    """What could be drafted in a round: (2, most + 1) are without and with the model,
    at [K] tokens.

    Attributes:
        gain: (2, most + 1), of :class:`Plan`; -inf for what is none.
        risk: (2, most + 1) plain rounds that are lost if all is in vain.
        prefers: (rows, most + 1), whether a row takes what was found for it, beside
            rows that ask the model.
        matched: whether it does where nobody asks it.
    """

    gain: np.ndarray
    risk: np.ndarray
    prefers: np.ndarray
    matched: list[bool]

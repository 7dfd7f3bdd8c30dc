"""What rounds cost on this machine: the curve that ``--num-draft auto`` goes by.

Real rounds of the engine are timed, as it times them for its policy. They are a chain:
each begins with the token that the one before ended with, so that nothing runs beside
another. K changes in short blocks, in an order that is drawn anew for each sweep over
all of them, so that a machine that slows down slows all of them; a cost is a block's
seconds over those of the plain rounds in the same sweep.

Between blocks is a pause. Work on several rows or tokens heats a processor as one token
at a time, which waits for memory, does not: without pauses it slows down under the
former and not under the latter, and the longer one measures, the more a draft seems to
cost. In use there are pauses as well, and a policy that is in use goes on to learn.

A round is timed twice for each K: with the draft model's tokens, and with as many that
are there without it, which is a pass of the target over K + 1 tokens and no more. The
difference is the draft's.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from decoder import Engine
from speculation.drafting import Drafter
from speculation.lookup import LONGEST, Found, Lookup
from speculation.policy import Fate, Plan, Policy, Prospect
from speculation.requests import Request
from speculation.session import Session
from system.device import on_gpu
from system.errors import InputError, say

#: Seconds for a batch size, pauses included, unless so few sweeps take longer.
SECONDS, FEWEST_SWEEPS = 50.0, 3
#: Rounds of a block: the first ones, which are not timed, and those that are.
FIRST, TIMED = 1, 3
#: Blocks of plain rounds in a sweep; of all others there is one.
PLAIN_BLOCKS = 4
#: A pause, as a share of the block before it, and the most seconds of one.
PAUSE, LONGEST_PAUSE = 0.5, 2.0
#: Above what quotient of its quartiles a plain round says that the machine is busy.
_RESTLESS = 1.3
#: The share of a text in which all rows have to have begun.
_BEGINNING = 0.25


class Kind(NamedTuple):
    """Rounds that draft ``size`` tokens, by the model or without it."""

    model: bool
    size: int


PLAIN = Kind(False, 0)


@dataclass(frozen=True)
class CostRow:
    """A line of the table: rounds with K draft tokens of every row.

    Attributes:
        ms: milliseconds, the median; half of all rounds are from ``low`` to ``high``.
        rounds: that were timed.
        cost: in plain rounds, the median over sweeps; half of those are from
            ``cost_low`` to ``cost_high``.
        c: a draft step, in plain rounds; None without a draft model.
        v: a round that drafts K tokens without the model, which is the target's pass.
        break_even: from which constant acceptance rate on the round is worth its cost;
            None where none is enough.
    """

    name: str
    batch_size: int
    num_draft: int
    ms: float
    low: float
    high: float
    rounds: int
    cost: float
    cost_low: float
    cost_high: float
    c: float | None
    v: float
    break_even: float | None


@dataclass(frozen=True)
class Curve:
    """What rounds with one number of rows cost.

    Attributes:
        plain: seconds of a plain round.
        costs: of every kind of round that was timed, in plain ones.
        sweeps: from how many that is.
        complete: whether it was measured to the end.
    """

    batch_size: int
    plain: float
    costs: dict[Kind, float]
    rows: list[CostRow]
    sweeps: int
    complete: bool

    @property
    def restless(self) -> bool:
        """Whether the machine was busy with other things: even plain rounds differed
        much."""
        return self.rows[0].high > _RESTLESS * self.rows[0].low


def calibrate(
    target: Session,
    drafter: Drafter | None,
    prompts: list[list[int]],
    batch_size: int,
    max_tokens: int,
    most: int,
    seconds: float | None = None,
) -> Curve:
    """Time rounds of so many rows with 0 to ``most`` draft tokens.

    After Ctrl-C, what the sweeps say that were complete by then, if there are any.

    Args:
        drafter: the draft model; None for none.
        prompts: token ids; texts go on from them, past any end, to ``max_tokens``.
        seconds: of all sweeps, unless the fewest take longer; by default
            :data:`SECONDS`.

    Raises:
        InputError: there is no room for such rounds.
    """
    seconds = SECONDS if seconds is None else seconds
    texts = _Texts(target, drafter, prompts, batch_size, max_tokens, most)
    # Every cost is over the plain ones.
    kinds = [
        *[PLAIN] * PLAIN_BLOCKS,
        *(Kind(False, size) for size in range(1, most + 1)),
    ]
    if drafter:
        kinds += [Kind(True, size) for size in range(1, most + 1)]
    rng = np.random.default_rng(0)
    sweeps: list[dict[Kind, list[float]]] = []
    began, longest, complete = time.perf_counter(), 0.0, True
    unit = "sweep" if batch_size == 1 else f"sweep of batch {batch_size}"
    bar = tqdm(unit=unit, disable=None)
    try:
        while len(sweeps) < FEWEST_SWEEPS or _elapsed(began) + longest < seconds:
            started, sweep = time.perf_counter(), {kind: [] for kind in kinds}
            for place in rng.permutation(len(kinds)):
                block = time.perf_counter()
                sweep[kinds[place]] += texts.block(kinds[place])
                time.sleep(min(PAUSE * _elapsed(block), LONGEST_PAUSE))
            sweeps.append(sweep)
            longest = max(longest, _elapsed(started))
            bar.update()
    except KeyboardInterrupt:
        if not sweeps:
            raise
        say(f"interrupted: what follows is of {len(sweeps)} sweeps, and is not kept")
        complete = False
    finally:
        bar.close()
    return curve_of(sweeps, batch_size, complete)


def calibrate_each(
    target: Session,
    drafter: Drafter | None,
    prompts: list[list[int]],
    batch_sizes: Iterable[int],
    max_tokens: int,
    policy: Policy,
) -> Iterator[Curve]:
    """Time rounds of each batch size, and have the policy go by what was measured to
    the end.

    After Ctrl-C there is no further one.

    Args:
        target, drafter, prompts, max_tokens: of :func:`calibrate`.

    Raises:
        InputError: there is no room for such rounds.
    """
    known = False
    for size in batch_sizes:
        try:
            curve = calibrate(target, drafter, prompts, size, max_tokens, policy.most)
        except KeyboardInterrupt:
            if not known:
                raise
            say(f"interrupted: nothing is known of batch {size}")
            return
        known = True
        if curve.complete:
            policy.calibrate(size, curve.plain, curve.costs, curve.sweeps)
        yield curve
        if not curve.complete:
            return


def curve_of(
    sweeps: Sequence[dict[Kind, list[float]]], batch_size: int, complete: bool = True
) -> Curve:
    """The figures of sweeps: for each of them the seconds of each kind of round."""
    each = {
        kind: [
            statistics.median(sweep[kind]) / statistics.median(sweep[PLAIN])
            for sweep in sweeps
        ]
        for kind in sweeps[0]
    }
    costs = {kind: statistics.median(its) for kind, its in each.items()}
    with_model = any(kind.model for kind in costs)
    rows = []
    for kind in costs:
        if with_model and not kind.model and kind.size:
            continue  # it is in the model's line, as v
        its = [seconds for sweep in sweeps for seconds in sweep[kind]]
        low, ms, high = (1e3 * each for each in np.percentile(its, [25, 50, 75]))
        cost_low, cost_high = np.percentile(each[kind], [25, 75])
        cost, verify = costs[kind], costs[Kind(False, kind.size)]
        rows.append(
            CostRow(
                f"batch {batch_size}, num-draft {kind.size}",
                batch_size,
                kind.size,
                float(ms),
                float(low),
                float(high),
                len(its),
                cost,
                float(cost_low),
                float(cost_high),
                (cost - verify) / kind.size if kind.model else None,
                verify,
                break_even(kind.size, cost) if kind.size else None,
            )
        )
    plain = [seconds for sweep in sweeps for seconds in sweep[PLAIN]]
    middle = statistics.median(plain)
    return Curve(batch_size, middle, costs, rows, len(sweeps), complete)


def break_even(size: int, cost: float) -> float | None:
    """The constant acceptance rate from which ``size`` draft tokens are worth ``cost``
    plain rounds; None where they are not if all stand.

    Where (1 - a^(K+1)) / (1 - a), which is 1 + a + ... + a^K, is the cost.
    """
    if cost > size + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**power for power in range(size + 1)) < cost:
            low = middle
        else:
            high = middle
    return high if high > 1e-9 else 0.0


def _elapsed(since: float) -> float:
    return time.perf_counter() - since


class _Texts:
    """An engine at work on texts that do not end; others are begun with where there is
    no more room in them."""

    def __init__(
        self,
        target: Session,
        drafter: Drafter | None,
        prompts: list[list[int]],
        rows: int,
        max_tokens: int,
        most: int,
    ):
        self._target, self._drafter = target, drafter
        self._prompts = sorted(prompts, key=len)  # those of a like length together
        self._rows = rows
        self._policy = _Blocks(most)
        self._lookup = _Anything(most, target.vocabulary)
        self._random = np.random.default_rng(0)
        self._engine: Engine | None = None
        self._numbers: list[int] = []
        self._length = 0  # of the longest text
        sessions = [target, *([drafter] if drafter else [])]
        positions = [session.positions for session in sessions if session.positions]
        taken = 1 if target.has_encoder else len(self._prompts[-1])
        # (Where as many as may be drafted have no positions, the engine drafts fewer.)
        self._room = min([max_tokens, *(each - taken - most for each in positions)])
        self._max_tokens = max_tokens
        needed = int(_rounds(most) * (most + 1) / (1 - _BEGINNING)) + 1
        if self._room < needed:
            raise InputError(
                f"rounds with up to {most} draft tokens need texts of {needed} tokens, "
                f"and there is room for {self._room}: give a larger --max-tokens, or "
                "shorter prompts"
            )

    def block(self, kind: Kind) -> list[float]:
        """Rounds of a kind: the seconds of those that count."""
        rounds = _rounds(kind.size)
        if self._engine is None or (
            self._length + rounds * (kind.size + 1) >= self._room
        ):
            self._begin()
        self._policy.kind = kind
        self._policy.seconds = []
        for number in range(rounds):
            self._policy.counts = number >= FIRST
            self._policy.last = number == rounds - 1
            self._step()
        return self._policy.seconds

    def _begin(self) -> None:
        """Texts from other prompts, one in every row."""
        for number in self._numbers:
            self._engine.cancel(number)
        policy, count = self._policy, len(self._prompts)
        policy.kind, policy.last, policy.rows = PLAIN, True, 0
        self._engine = Engine(
            self._target,
            self._drafter,
            num_draft=policy,
            lookup=self._lookup,
            rows=self._rows,
        )
        first = int(self._random.integers(count))
        self._numbers = [
            self._engine.admit(
                Request(
                    self._prompts[(first + place) % count],
                    frozenset(),  # a row that ended would be empty from there on
                    self._max_tokens,
                    stream=(place,),
                )
            )
            for place in range(self._rows)
        ]
        self._length = 0
        while policy.rows < self._rows:
            if self._length > _BEGINNING * self._room:
                raise InputError(
                    f"{self._rows} texts are not decoded at once here: the memory has "
                    "no room for them, or the prompts' lengths differ too much"
                )
            self._step()

    def _step(self) -> None:
        for commit in self._engine.step():
            if commit.error:
                raise commit.error
            self._length = max(self._length, commit.stats.new_tokens)


def _rounds(size: int) -> int:
    """Of a block: on a GPU the last plain one is not timed, as none is queued behind
    it."""
    return FIRST + TIMED + (size == 0 and on_gpu())


class _Blocks:
    """A policy that drafts what it is told to, and keeps the seconds.

    Attributes:
        most, drafting: of :class:`policy.Policy`.
        kind: of the rounds that are wanted.
        last: whether the next one is the last of them.
        counts: whether its seconds are kept.
        seconds: those that were.
        rows: texts that the last round was for.
    """

    def __init__(self, most: int):
        self.most = most
        self.drafting = True
        self.kind = PLAIN
        self.last = self.counts = False
        self.seconds: list[float] = []
        self.rows = 0

    def choose(self, batch: int, rows: Sequence[Prospect]) -> Plan:
        """As :class:`Policy` has it."""
        model, size = self.kind
        found = size > 0 and not model
        return Plan(size if model else 0, size, (found,) * len(rows))

    def stays_plain(self, batch: int, rows: Sequence[Prospect]) -> bool:
        """As :class:`Policy` has it."""
        return not self.kind.size and not self.last

    def observe(
        self,
        batch: int,
        plan: Plan,
        fates: Iterable[Fate],
        seconds: float | None,
        *_: Any,
    ) -> None:
        """As :class:`Policy` has it."""
        self.rows = len(list(fates))
        if self.counts and seconds is not None:
            self.seconds.append(seconds)


class _Anything(Lookup):
    """Finds tokens everywhere, and any: all that matters is how many there are."""

    def __init__(self, most: int, vocabulary: int):
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(0, vocabulary, most).tolist()

    def start(self, prompts: list[list[int]]) -> None:
        """As :class:`Lookup` has it."""

    def put(self, rows: list[int], prompts: list[list[int]]) -> None:
        """As :class:`Lookup` has it."""

    def take(self, rows: list[int], blank: int = 0) -> None:
        """As :class:`Lookup` has it."""

    def find(
        self, row: int, sequence: list[int], most: int, ends: AbstractSet[int]
    ) -> Found:
        """As :class:`Lookup` has it."""
        return Found(self._tokens[:most], LONGEST)

"""The decoding loop. There is one: plain decoding is the loop with nothing drafted.

A round proposes K tokens, runs the target once over the last committed token and the
K drafts, and keeps what the acceptance rule lets stand, plus one token of the target's
own. The host waits for the device once per round.

      committed so far          drafted                 target's logits
      ... t7                    d1 d2 d3
      fed to the target: t7     d1 d2 d3    ->    after t7, after d1, d2, d3
      d1 and d2 stand, d3 does not  ->  commit d1 d2 and the target's token after d2

A batch has rows for several texts, which end at different times. Between two rounds a
row that has become free takes the next text that waits; where none waits, the batch is
made smaller.

A text that is searched for with beams is a row as well, whose cache has a tree, and a
round of such rows takes steps of the search where others commit tokens: see ``trees``.
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from numbers import Integral
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import mlx.core as mx

from speculation.drafting import Drafter
from speculation.groups import Group
from speculation.lookup import Lookup
from speculation.policy import Auto, Fixed, Plan, Policy
from speculation.proposing import Proposer
from speculation.requests import (
    Commit,
    Request,
    check_options,
    check_searched,
)
from speculation.rounds import Round, launch
from speculation.rows import Row
from speculation.samplers import RoundSampler, Rules
from speculation.session import CHUNK, Session
from speculation.trees import TreeRound, launch_trees
from system import fast_blas, memory
from system.device import on_gpu
from system.errors import InputError, NoRoomError, PromptError, blame_prompt

#: How many times as many tokens, padding included, newcomers may be encoded as.
PADDED = 2

#: Tokens of a prompt that is encoded beside no others: a layer of the encoder, which is
#: what they would wait for, takes time by the square.
LONGEST_BESIDE = 4096


def generate(
    target: Session,
    drafter: Drafter | Lookup | None,
    prompts: list[list[int]],
    *,
    num_draft: int | Policy | None = None,
    lookup: Lookup | None = None,
    streams: list[tuple[int, ...]] | None = None,
    **options: Any,
) -> Iterator[Commit]:
    """Decode prompts together, yielding each one's tokens as they stand.

    Args:
        target, drafter, num_draft, lookup: of :class:`Engine`.
        prompts: token ids; a commit's ``id`` is its prompt's place among them.
        streams: of the requests, by default their places.
        options: more of :class:`Request`.

    Raises:
        InputError: an option out of range, a prompt that cannot be encoded, or logits
            that are not finite.
    """
    engine = Engine(
        target, drafter, num_draft=num_draft, lookup=lookup, rows=len(prompts)
    )
    for place, prompt in enumerate(prompts):
        stream = streams[place] if streams else (place,)
        engine.admit(Request(prompt, stream=stream, **options))
    while engine.busy:
        for commit in engine.step():
            if commit.error:
                raise commit.error
            yield commit


class Engine:
    """One target, maybe a drafter, and a batch whose rows come and go.

    A text depends on its request, not on the texts beside it; where it is greedy or
    sampled with shared noise, and ``delta`` is 0, on nothing else. Otherwise on the
    draft and on ``num_draft`` as well; and where another text reaches the model's last
    position, the others have shorter drafts meanwhile: what is sampled by the residual
    rule has other random numbers then, and with a ``delta`` above 0 another draft token
    may stand.

    Texts with as many beams are decoded together, or without any: who waits first and
    has another number, waits for all others to end.

    What :meth:`step` raises (Ctrl-C, a processor's error) leaves an engine that is of
    no more use; what concerns one text comes as its last commit.

    Attributes:
        decoded: how many texts the last step had a round of; 0 where it had none.
    """

    def __init__(
        self,
        target: Session,
        drafter: Drafter | Lookup | None,
        *,
        num_draft: int | Policy | None = None,
        lookup: Lookup | None = None,
        rows: int = 1,
    ):
        """
        Args:
            target: the model whose text this is. Nobody else may use it or the drafter
                while there is anything to do.
            drafter: a model that guesses, or a lookup; None for none.
            num_draft: K, draft tokens per round, 0 for the target alone; or a policy
                that decides on it, by default one of its own.
            lookup: goes before the model, where it has something to say.
            rows: the most texts that are decoded at once.

        Raises:
            InputError: an option out of range.
        """
        policy = Auto() if num_draft is None else num_draft
        if isinstance(policy, Integral):
            check_options(1, policy, 0)
            policy = Fixed(int(policy))
        elif not hasattr(policy, "choose"):
            raise InputError(
                f"num-draft is {policy!r}: it has to be a whole number, or None for as "
                "many as pay"
            )
        if isinstance(drafter, Lookup):
            drafter, lookup = None, drafter
        if drafter is None and lookup is None:
            policy = Fixed(0)
        elif policy.most == 0:
            drafter = lookup = None
        if rows < 1:
            raise InputError(f"batch-size is {rows}: it has to be at least 1")
        self.decoded = 0
        self._target = target
        self._most = rows
        self._target_positions = target.positions or sys.maxsize
        self._drafts = Proposer(drafter, lookup, policy, self._target_positions)
        self._ids = count()
        self._rules: WeakValueDictionary[Any, Rules] = WeakValueDictionary()
        self._texts: dict[int, Row] = {}  # those that are not finished
        self._waiting: deque[Row] = deque()
        self._gone = 0  # how many of them were cancelled
        self._rows: list[Row | None] = []
        self._width = 1  # beams of each of their texts
        self._arriving: _Arriving | None = None
        self._ahead: Round | None = None
        self._failed: list[Commit] = []
        self._held = False  # whether who waits first, waits for all others to end
        self._odd: set[int] = set()  # rows with numbers that are not finite

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._texts or self._failed)

    @property
    def wanted(self) -> int:
        """How many more requests there should be, for no row to have to wait."""
        return max(0, self._most - self._queued)

    @property
    def _queued(self) -> int:
        """How many wait and were not cancelled."""
        return len(self._waiting) - self._gone

    @property
    def _active(self) -> "list[Row]":
        return [row for row in self._rows if row]

    def admit(self, request: Request) -> int:
        """Have a text decoded, as soon as there is a row for it.

        Returns:
            Its number, from 0 on.

        Raises:
            InputError: its rules ask for what there is not.
        """
        # Rows with other seeds share rules: what a seed decides is decided here.
        coupling = request.sampling.coupling_at(request.delta)
        sampling = replace(request.sampling, seed=None, coupling=coupling)
        ends = frozenset(request.eos_tokens)
        plain = replace(sampling, processors=()) if sampling.processors else sampling
        key = plain, tuple(map(id, sampling.processors)), request.delta, ends
        rules = self._rules.get(key)
        if rules is None:
            rules = Rules(self._target.vocabulary, sampling, request.delta, ends)
            self._rules[key] = rules
        check_searched(request.width, self._target.trees)
        row = (Group if request.width > 1 else Row)(next(self._ids), request, rules)
        self._texts[row.id] = row
        self._waiting.append(row)
        return row.id

    def cancel(self, number: int) -> None:
        """Have no more of a text: its row is free at once."""
        row = self._texts.pop(number, None)
        if row is None:
            return
        row.finished = True
        arriving = self._arriving.rows if self._arriving else []
        if row in self._rows:
            self._free_rows()
        elif row not in arriving:
            self._gone += 1
            if self._held and self._waiting[0] is row:
                self._held = False
        elif all(each.finished for each in arriving):
            self._arriving.chunks.close()
            self._arriving = None
        self._forget_odd()

    def step(self) -> list[Commit]:
        """One round of every row.

        Returns:
            What it added, text by text; nothing where a prompt is still being encoded.
        """
        current, self._ahead = self._ahead, None
        self.decoded = 0
        began, was_ahead = time.perf_counter(), True
        if current is None or not self._active:
            self._settle()
            self._change_rows()
            began, was_ahead = time.perf_counter(), False
            current = self._launch()
        failed, self._failed = self._failed, []
        if current is None:
            return failed
        changes = self._changes_wait()
        if not (current.plan.size or changes) and self._drafts.stays_plain(self._rows):
            self._ahead = self._launch_ahead(current)
        outcomes = current.read()
        seconds = time.perf_counter() - began
        commits, seen = [], []
        for place, outcome in enumerate(outcomes):
            row = current.rows[place]
            if row and not row.finished:
                commit = row.commit(outcome, partial(current.fault, place))
                commits += [commit] if commit else []
                seen.append((place, row, outcome))
            if outcome.finite < current.positions:
                self._odd.add(place)
        # A GPU is kept busy with plain rounds that were queued ahead: others of them
        # take longer.
        typical = current.plan.size or changes or (was_ahead and self._ahead)
        typical = typical or not on_gpu()
        self._drafts.observe(
            current.plan, seen, len(outcomes), seconds if typical else None
        )
        self.decoded = len(seen)
        self._free_rows()
        self._forget_odd()
        return failed + commits

    # Rounds.

    def _settle(self) -> None:
        """Have the target's caches hold what is committed, but for each last token."""
        if not self._active and self._arriving is None:
            return  # what begins next finds out itself what it can use
        self._target.rewind([row.cached if row else 0 for row in self._rows])
        if self._odd:
            odd = sorted(self._odd)
            rows = [self._rows[place] for place in odd]
            self._target.wipe(odd, [row.holes() if row else [] for row in rows])
            self._odd.clear()

    def _forget_odd(self) -> None:
        """Leave nothing in the caches that is not finite, when all is over: who uses
        them next would not know."""
        if self._odd and not self._active and self._arriving is None:
            self._target.forget()
            self._odd.clear()

    def _launch(self) -> "Round | TreeRound | None":
        """The next round, on its way; None where no row is anybody's."""
        active = self._active
        if not active:
            return None
        plan = self._drafts.plan(self._rows)
        if self._width > 1:
            tree = launch_trees(
                self._target, self._drafts.session, self._rows, plan.steps
            )
            tree.plan = plan
            return tree
        found = self._drafts.looked_up(self._rows, plan)
        samplers = [row and row.sampler for row in self._rows]
        sampler = RoundSampler(samplers, plan.size, certain=found)
        draft = self._drafts.propose(self._rows, plan, sampler)
        current = launch(self._target, sampler, draft)
        current.rows, current.plan, current.found = self._rows, plan, found
        return current

    def _launch_ahead(self, current: "Round") -> "Round | None":
        """The plain round after the current one, before that has been read.

        All that it needs of it is its token, which the device has: it is built while
        that one runs, and on a GPU queued as well. On a CPU, with no latency to hide, a
        last round in vain would cost more.
        """
        # How beams go on is decided by the host.
        if self._width > 1 or all(row.budget < 2 for row in self._active):
            return None
        mx.async_eval(current.report)
        if None in self._rows:  # which stay at their beginning, whatever they are fed
            self._target.rewind([len(row.sequence) if row else 0 for row in self._rows])
        samplers = [row and row.sampler for row in self._rows]
        sampler = RoundSampler(samplers, following=current.next_token)
        ahead = launch(self._target, sampler, None)
        ahead.rows, ahead.plan = self._rows, Plan(0, 0, ())
        if on_gpu():
            mx.async_eval(ahead.report)
        return ahead

    # Rows.

    def _free_rows(self) -> None:
        """Rows whose texts are finished are nobody's."""
        for row in self._active:
            if row.finished:
                self._texts.pop(row.id, None)
        self._rows = [row if row and not row.finished else None for row in self._rows]

    def _changes_wait(self) -> bool:
        """Whether the rows are to change before the next round but one."""
        if self._arriving or (self._queued and not self._held):
            return True
        return self._size_for(len(self._active)) < len(self._rows)

    def _size_for(self, texts: int) -> int:
        """How many rows a batch has for so many texts: few different numbers."""
        return min(self._most, 1 << max(0, texts - 1).bit_length())

    def _change_rows(self) -> None:
        """Begin with those who wait, as far as there is room, or be done with rows that
        nobody needs any more."""
        if self._arriving is None:
            if not self._active:
                self._start()
                return
            self._resize()
            self._arriving = self._next_arriving()
        if self._arriving is None:
            return
        try:
            with blame_prompt():
                next(self._arriving.chunks)
        except StopIteration:
            self._arriving = None
        except PromptError as error:
            rows, self._arriving = self._arriving.rows, None
            self._try_apart(rows, error)

    def _start(self) -> None:
        """Begin a batch with those who wait, if there are any."""
        self._rows, self._held = [], False
        mx.reset_peak_memory()
        while not self._rows and (newcomers := self._next_waiting(self._most)):
            size = self._size_for(len(newcomers))
            while len(newcomers) > 1 and not self._has_room(size, newcomers):
                half = len(newcomers) // 2
                self._waiting.extendleft(reversed(newcomers[half:]))
                del newcomers[half:]
                size = self._size_for(half)
            self._width = newcomers[0].width
            self._have_threads(size)
            memory.wire(self, self._bytes(size, newcomers))
            started = time.perf_counter()
            try:
                with blame_prompt():
                    prompts = [row.request.prompt for row in newcomers]
                    firsts = self._target.start(prompts)
                    self._drafts.start(newcomers)
            except PromptError as error:
                self._try_apart(newcomers, error)
                continue
            blank = size - len(newcomers)
            if blank:
                self._take(list(range(len(newcomers))), blank)
            self._begin(newcomers, firsts, started)
            self._rows = [*newcomers, *[None] * blank]
            self._free_rows()

    def _next_arriving(self) -> "_Arriving | None":
        """Those who are to be begun with beside others, if it is time to."""
        free = [place for place, row in enumerate(self._rows) if not row]
        # A few at once are encoded in less time than one after the other.
        few = min(self._queued, max(1, len(self._rows) // 8))
        if self._held or not few or len(free) < few:
            return None
        newcomers = self._next_waiting(len(free))
        if newcomers and newcomers[0].width != self._width:
            self._waiting.extendleft(reversed(newcomers))
            self._held = True
            return None
        longest = max((len(row.request.prompt) for row in newcomers), default=0)
        if self._target.has_encoder and longest > LONGEST_BESIDE:
            self._waiting.extendleft(reversed(newcomers))
            self._held = True
            return None
        texts = [*self._active, *newcomers]
        memory.wire(self, self._bytes(len(self._rows), texts))
        return _Arriving(newcomers, self._arrive(newcomers, free[: len(newcomers)]))

    def _arrive(self, newcomers: "list[Row]", places: list[int]) -> Iterator[None]:
        """Encode newcomers into rows that are free, a chunk at a time."""
        started = time.perf_counter()
        prompts = [row.request.prompt for row in newcomers]
        prepared = yield from self._target.prepare(prompts)
        drafts = yield from self._drafts.prepare(newcomers)
        self._drafts.put(places, newcomers, drafts)
        firsts = self._target.put(places, prepared)
        self._begin(newcomers, firsts, started)
        for place, row in zip(places, newcomers, strict=True):
            self._rows[place] = row
        self._free_rows()

    def _begin(
        self, newcomers: "list[Row]", firsts: list[list[int]], started: float
    ) -> None:
        """They are encoded: their texts begin with these tokens."""
        now = time.perf_counter()
        for row, first in zip(newcomers, firsts, strict=True):
            try:
                row.begin(first, self._target_positions, now - started, now)
            except InputError as error:
                self._fail(row, error)

    def _fail(self, row: Row, error: InputError) -> None:
        """A text ends before it has begun."""
        if not row.finished:
            self._failed.append(row.fail(error))
            self._texts.pop(row.id)

    def _next_waiting(self, most: int) -> "list[Row]":
        """Those whose turn it is, so many at most."""
        newcomers: list[Row] = []
        longest = sum_of = 0
        while self._waiting and len(newcomers) < most:
            row = self._waiting[0]
            if row.finished:
                self._waiting.popleft()
                self._gone -= 1
                continue
            size = len(row.request.prompt)
            longest, sum_of = max(longest, size), sum_of + size
            if newcomers and (
                row.apart
                or newcomers[0].apart
                # A batch has trees with as many beams, or none.
                or newcomers[0].width != row.width
                # What is encoded together is padded to the longest.
                or (len(newcomers) + 1) * longest > PADDED * sum_of + CHUNK
            ):
                break
            newcomers.append(self._waiting.popleft())
        return newcomers

    def _try_apart(self, newcomers: "list[Row]", error: PromptError) -> None:
        """They cannot be begun with: each is tried by itself, which shows whose fault
        it is, and where the memory does not do, once nothing else is in it."""
        held = isinstance(error, NoRoomError) and bool(self._active)
        newcomers = [row for row in newcomers if not row.finished]
        if len(newcomers) == 1 and not held:
            self._fail(newcomers[0], error)
            return
        for row in newcomers:
            row.apart = True
        self._waiting.extendleft(reversed(newcomers))
        self._held = held and len(newcomers) == 1

    def _resize(self) -> None:
        """Have as many rows as there are texts for."""
        active = [place for place, row in enumerate(self._rows) if row]
        others = self._waiting and self._waiting[0].width != self._width
        waiting = 0 if self._held or others else self._queued
        size = self._size_for(len(active) + waiting)
        have = len(self._rows)
        texts = [*self._active, *islice(self._waiting, size)]
        if size > have and self._has_room(size, texts):
            memory.wire(self, self._bytes(size, texts))
            self._take(list(range(have)), size - have)
            self._rows += [None] * (size - have)
        elif size < have:
            self._take(active, size - len(active))
            rows = [self._rows[place] for place in active]
            self._rows = [*rows, *[None] * (size - len(active))]

    def _take(self, rows: list[int], blank: int) -> None:
        self._have_threads(len(rows) + blank)
        self._target.take(rows, blank)
        self._drafts.take(rows, blank)

    def _has_room(self, rows: int, texts: list[Row]) -> bool:
        """Whether the memory does for so many rows, with these texts in them."""
        size = self._bytes(rows, texts)
        return size <= memory.SMALL or memory.fits(size)

    def _bytes(self, rows: int, texts: list[Row]) -> int:
        """What the caches of so many rows take, with these texts in them."""
        prompt = max(len(row.request.prompt) for row in texts)
        answer = max(row.request.max_tokens * row.width for row in texts)
        size = self._target.batch_bytes(rows, prompt, answer)
        return size + self._drafts.batch_bytes(rows, prompt, answer)

    def _have_threads(self, rows: int) -> None:
        fast_blas.fit_threads(self._target.parameters * rows * self._width)


class _Arriving(NamedTuple):
    """Newcomers that are being encoded beside others."""

    rows: "list[Row]"
    chunks: Iterator[None]

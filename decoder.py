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
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import sys
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import count, zip_longest
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np

from speculation.acceptance import Draft
from speculation.drafting import Drafter, up_to_end
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.sampling import GREEDY, Sampling
from speculation.session import Session
from system import fast_blas, memory
from system.device import on_gpu
from system.errors import InputError, NoRoomError, PromptError

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

    def copy(self) -> "Stats":
        """The figures as they are now."""
        return replace(self, accept_histogram=list(self.accept_histogram))

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
            the target's own, token for token or, sampled, in distribution.
        sampling: how tokens are chosen, by both models.
        stream: what tells its random numbers from those of others, beside the seed.

    Raises:
        InputError: an option out of range.
    """

    prompt: list[int]
    eos_tokens: AbstractSet[int]
    max_tokens: int = MAX_TOKENS
    delta: float = DELTA
    sampling: Sampling = GREEDY
    stream: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        check_options(self.max_tokens, 0, self.delta)


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
    """

    id: int
    tokens: list[int]
    accepted: int
    finish_reason: str | None
    stats: Stats
    error: InputError | None = None


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
    num_draft: int = NUM_DRAFT,
    streams: list[tuple[int, ...]] | None = None,
    **options: Any,
) -> Iterator[Commit]:
    """Decode prompts together, yielding each one's tokens as they stand.

    Args:
        target, drafter, num_draft: of :class:`Engine`.
        prompts: token ids; a commit's ``id`` is its prompt's place among them.
        streams: of the requests, by default their places.
        options: more of :class:`Request`.

    Raises:
        InputError: an option out of range, a prompt that cannot be encoded, or logits
            that are not finite.
    """
    engine = Engine(target, drafter, num_draft=num_draft, rows=len(prompts))
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

    A text depends on its request and on ``num_draft``, not on the texts beside it. Only
    where one of those reaches the model's last position, the others have shorter drafts
    meanwhile, and what is sampled has other random numbers.
    """

    def __init__(
        self,
        target: Session,
        drafter: Drafter | None,
        *,
        num_draft: int = NUM_DRAFT,
        rows: int = 1,
    ):
        """
        Args:
            target: the model whose text this is. Nobody else may use it or the drafter
                while there is anything to do.
            drafter: who guesses; None, or ``num_draft`` 0, decodes with the target
                alone.
            num_draft: K, draft tokens per round.
            rows: the most texts that are decoded at once.

        Raises:
            InputError: an option out of range.
        """
        check_options(1, num_draft, 0)
        if rows < 1:
            raise InputError(f"batch-size is {rows}: it has to be at least 1")
        self._target = target
        self._drafter = drafter if num_draft else None
        self._num_draft = num_draft
        self._most = rows
        self._target_positions = target.positions or sys.maxsize
        self._draft_positions = (drafter and drafter.positions) or sys.maxsize
        self._ids = count()
        self._rules: WeakValueDictionary[Any, Rules] = WeakValueDictionary()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row | None] = []
        self._arriving: _Arriving | None = None
        self._ahead: Round | None = None
        self._failed: list[Commit] = []
        self._held = False  # whether who waits first, waits for all others to end
        self._odd: set[int] = set()  # rows with numbers that are not finite

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._failed or self._arriving or self._active)

    @property
    def wanted(self) -> int:
        """How many more requests there should be, for no row to have to wait."""
        return max(0, self._most - len(self._waiting))

    @property
    def _active(self) -> "list[_Row]":
        return [row for row in self._rows if row]

    def admit(self, request: Request) -> int:
        """Have a text decoded, as soon as there is a row for it.

        Returns:
            Its number, from 0 on.

        Raises:
            InputError: its rules ask for what there is not.
        """
        key = (
            replace(request.sampling, seed=0, processors=()),
            tuple(map(id, request.sampling.processors)),
            request.delta,
            frozenset(request.eos_tokens),
        )
        rules = self._rules.get(key)
        if rules is None:
            rules = Rules(
                self._target.vocabulary,
                replace(request.sampling, seed=0),
                request.delta,
                key[-1],
            )
            self._rules[key] = rules
        row = _Row(next(self._ids), request, rules)
        self._waiting.append(row)
        return row.id

    def cancel(self, number: int) -> None:
        """Have no more of a text: its row is free at once."""
        self._waiting = deque(row for row in self._waiting if row.id != number)
        for row in [*self._active, *(self._arriving.rows if self._arriving else ())]:
            if row.id == number:
                row.finished = True
        self._free_rows()

    def step(self) -> list[Commit]:
        """One round of every row.

        Returns:
            What it added, text by text; nothing where a prompt is still being encoded.
        """
        current, self._ahead = self._ahead, None
        if current is None:
            self._settle()
            self._change_rows()
            current = self._launch()
        failed, self._failed = self._failed, []
        if current is None:
            return failed
        if self._drafter is None and not self._changes_wait():
            self._ahead = self._launch_ahead(current)
        commits = []
        for place, outcome in enumerate(current.read()):
            row = current.rows[place]
            if row and not row.finished:
                commit = row.commit(outcome, current, place)
                commits += [commit] if commit else []
            if outcome.finite < current.positions:
                self._odd.add(place)
        self._free_rows()
        return failed + commits

    # Rounds.

    def _settle(self) -> None:
        """Have the target's caches hold what is committed, but for each last token."""
        if not self._rows:
            return
        self._target.rewind([len(row.sequence) - 1 if row else 0 for row in self._rows])
        if self._odd:
            self._target.wipe(sorted(self._odd))
            self._odd.clear()

    def _launch(self) -> "Round | None":
        """The next round, on its way; None where no row is anybody's."""
        active = self._active
        if not active:
            return None
        size = self._draft_size(active)
        sampler = RoundSampler([row and row.sampler for row in self._rows], size)
        draft = None
        if size > 0:
            guessed = [
                row.sequence if row and row.drafted else _NOBODYS for row in self._rows
            ]
            draft = self._drafter.propose(guessed, size, sampler)
            draft.counts = _counts(
                draft, [row.most_drafted if row else size for row in self._rows]
            )
        current = launch(self._target, sampler, draft)
        current.rows = self._rows
        return current

    def _draft_size(self, active: "list[_Row]") -> int:
        """How many tokens are to be drafted."""
        if self._drafter is None:
            return 0
        for row in active:
            # The draft's caches have no room for what it would be fed.
            left = self._draft_positions - len(row.sequence)
            row.drafted &= left >= min(self._num_draft, row.most_drafted)
        longest = max(len(row.sequence) for row in active)
        budgets = [row.most_drafted for row in active if row.drafted]
        # A row without room would be fed what it has no positions for.
        left = self._target_positions - longest
        return max(0, min(self._num_draft, left, max(budgets, default=0)))

    def _launch_ahead(self, current: "Round") -> "Round | None":
        """The plain round after the current one, before that has been read.

        All that it needs of it is its token, which the device has: it is built while
        that one runs, and on a GPU queued as well. On a CPU, with no latency to hide, a
        last round in vain would cost more.
        """
        if all(row.budget < 2 for row in self._active):
            return None
        mx.async_eval(current.report)
        if None in self._rows:  # which stay at their beginning, whatever they are fed
            self._target.rewind([len(row.sequence) if row else 0 for row in self._rows])
        samplers = [row and row.sampler for row in self._rows]
        sampler = RoundSampler(samplers, following=current.next_token)
        ahead = launch(self._target, sampler, None)
        ahead.rows = self._rows
        if on_gpu():
            mx.async_eval(ahead.report)
        return ahead

    # Rows.

    def _free_rows(self) -> None:
        """Rows whose texts are finished are nobody's."""
        self._rows = [row if row and not row.finished else None for row in self._rows]

    def _changes_wait(self) -> bool:
        """Whether the rows are to change before the next round but one."""
        if self._arriving or self._waiting:
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
            next(self._arriving.chunks)
        except StopIteration:
            self._arriving = None
        except PromptError as error:
            rows, self._arriving = self._arriving.rows, None
            self._try_apart(rows, error)

    def _start(self) -> None:
        """Begin a batch with those who wait, if there are any."""
        self._rows, self._held = [], False
        self._odd.clear()
        mx.reset_peak_memory()
        while not self._rows and (newcomers := self._next_waiting(self._most)):
            size = self._size_for(len(newcomers))
            self._have_threads(size)
            started = time.perf_counter()
            try:
                firsts = self._target.start([row.request.prompt for row in newcomers])
                if self._drafter:
                    self._drafter.start(self._draft_prompts(newcomers))
            except PromptError as error:
                self._try_apart(newcomers, error)
                continue
            blank = size - len(newcomers)
            if blank:
                self._take(list(range(len(newcomers))), blank)
            self._rows = [*newcomers, *[None] * blank]
            self._begin(newcomers, firsts, started)

    def _next_arriving(self) -> "_Arriving | None":
        """Those who are to be begun with beside others, if it is time to."""
        free = [place for place, row in enumerate(self._rows) if not row]
        # A few at once are encoded in less time than one after the other.
        few = min(len(self._waiting), max(1, len(self._rows) // 8))
        if self._held or not few or len(free) < few:
            return None
        newcomers = self._next_waiting(len(free))
        return _Arriving(newcomers, self._arrive(newcomers, free[: len(newcomers)]))

    def _arrive(self, newcomers: "list[_Row]", places: list[int]) -> Iterator[None]:
        """Encode newcomers into rows that are free, a chunk at a time."""
        started = time.perf_counter()
        prompts = [row.request.prompt for row in newcomers]
        prepared = yield from self._target.prepare(prompts)
        if self._drafter:
            drafts = yield from self._drafter.prepare(self._draft_prompts(newcomers))
            self._drafter.put(places, drafts)
        firsts = self._target.put(places, prepared)
        for place, row in zip(places, newcomers, strict=True):
            self._rows[place] = row
        self._begin(newcomers, firsts, started)

    def _draft_prompts(self, newcomers: "list[_Row]") -> list[list[int]]:
        """What the drafter is given: of a prompt that it has no room for, nothing."""
        for row in newcomers:
            row.drafted = len(row.request.prompt) < self._draft_positions
        return [row.request.prompt if row.drafted else _NOBODYS for row in newcomers]

    def _begin(
        self, newcomers: "list[_Row]", firsts: list[list[int]], started: float
    ) -> None:
        """They are encoded: their texts begin with these tokens."""
        now = time.perf_counter()
        for row, first in zip(newcomers, firsts, strict=True):
            try:
                row.begin(first, self._target_positions, now - started, now)
            except InputError as error:
                self._failed.append(row.fail(error))
        self._free_rows()

    def _next_waiting(self, most: int) -> "list[_Row]":
        """Those whose turn it is, so many at most."""
        newcomers: list[_Row] = []
        while self._waiting and len(newcomers) < most:
            if self._waiting[0].apart and newcomers:
                break
            newcomers.append(self._waiting.popleft())
            if newcomers[0].apart:
                break
        return newcomers

    def _try_apart(self, newcomers: "list[_Row]", error: PromptError) -> None:
        """They cannot be begun with: each is tried by itself, which shows whose fault
        it is, and where the memory does not do, once nothing else is in it."""
        held = isinstance(error, NoRoomError) and bool(self._active)
        if len(newcomers) == 1 and not held:
            self._failed.append(newcomers[0].fail(error))
            return
        for row in newcomers:
            row.apart = True
        self._waiting.extendleft(reversed(newcomers))
        self._held = held and len(newcomers) == 1

    def _resize(self) -> None:
        """Have as many rows as there are texts for."""
        active = [place for place, row in enumerate(self._rows) if row]
        waiting = 0 if self._held else len(self._waiting)
        size = self._size_for(len(active) + waiting)
        have = len(self._rows)
        if size > have and self._has_room(size):
            self._take(list(range(have)), size - have)
            self._rows += [None] * (size - have)
        elif size < have:
            self._take(active, size - len(active))
            rows = [self._rows[place] for place in active]
            self._rows = [*rows, *[None] * (size - len(active))]

    def _take(self, rows: list[int], blank: int) -> None:
        self._have_threads(len(rows) + blank)
        self._target.take(rows, blank)
        if self._drafter:
            self._drafter.take(rows, blank)

    def _has_room(self, rows: int) -> bool:
        """Whether the memory does for so many rows."""
        texts = [*self._active, *list(self._waiting)[:rows]]
        prompt = max(len(row.request.prompt) for row in texts)
        answer = max(row.request.max_tokens for row in texts)
        more = rows - len(self._rows)
        size = self._target.batch_bytes(more, prompt, answer)
        if self._drafter:
            size += self._drafter.batch_bytes(more, prompt, answer)
        return size <= memory.SMALL or memory.fits(size)

    def _have_threads(self, rows: int) -> None:
        fast_blas.fit_threads(self._target.parameters * rows)


#: What is fed to a row that is nobody's.
_NOBODYS = [0]


class _Arriving(NamedTuple):
    """Newcomers that are being encoded beside others."""

    rows: "list[_Row]"
    chunks: Iterator[None]


def _counts(draft: Draft, most: list[int]) -> list[int] | None:
    """How many tokens of each row's draft are to be judged; None for all.

    No more than its budget can take: where a neighbour has more left, this row's text
    is still the one it would have alone.
    """
    size = draft.tokens.shape[1]
    counts = draft.counts or [size] * len(most)
    counts = [min(pair) for pair in zip(counts, most, strict=True)]
    return None if min(counts) == size else counts


@dataclass
class Round:
    """A round on its way through the device."""

    next_token: mx.array  # (B,) int32
    report: mx.array  # (B, 3 + K) int32: accepted, finite, next token, draft
    counts: list[int] | None
    logits: mx.array  # the model's own, to say what is wrong with them
    rows: "list[_Row | None]" = field(default_factory=list)  # whose it is

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

    @property
    def positions(self) -> int:
        """K + 1."""
        return self.report.shape[1] - 2

    def fault(self, row: int) -> InputError:
        """Why there is no next token in that row."""
        if mx.isfinite(self.logits[row].max(axis=-1)).all().item():
            return InputError(
                "no token is left to choose: the rules together (suppressed tokens, "
                "no-repeat-ngram-size, min-new-tokens, ...) ban them all"
            )
        return InputError(
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


def launch(target: Session, sampler: RoundSampler, draft: Draft | None) -> Round:
    """Build a round's graph: run the target over last token and draft, and judge."""
    last = sampler.last
    draft = draft or Draft(mx.zeros((last.shape[0], 0), mx.int32))
    fed = last[:, None]
    if draft.tokens.shape[1]:
        # No device checks an embedding's bounds. An id cut here is rejected later.
        inside = mx.clip(draft.tokens, 0, target.vocabulary - 1)
        if draft.counts:
            # What is not judged is nothing that could do harm.
            real = mx.arange(inside.shape[1]) < mx.array(draft.counts)[:, None]
            inside = mx.where(real, inside, fed)
        fed = mx.concatenate([fed, inside], axis=1)
    logits = target.extend(fed)
    verdict = sampler.judge(logits, draft)
    verdict_columns = (verdict.accepted, verdict.finite, verdict.next_token)
    columns = [column[:, None].astype(mx.int32) for column in verdict_columns]
    report = mx.concatenate([*columns, draft.tokens], axis=1)
    return Round(verdict.next_token, report, draft.counts, logits)


class _Row:
    """One text: its committed tokens, and the only place that knows when it ends.

    Attributes:
        id: its request's number.
        sampler: how its tokens are chosen.
        sequence: the tokens that decoding started from and those committed since.
        budget: tokens that it may still get.
        drafted: whether the drafter has it.
        apart: whether it is to be begun with by itself.
        finished: whether it gets no more.
    """

    def __init__(self, number: int, request: Request, rules: Rules):
        self.id = number
        self.request = request
        self.sampler: RowSampler | None = None
        self.sequence: list[int] = []
        self.budget = request.max_tokens
        self.drafted = self.apart = self.finished = False
        self._rules = rules
        self._stats = Stats()
        # The last token of a budget is the target's own, where that is what a draft
        # token would have to be. Elsewhere it may be a draft token: a larger budget
        # must give the same text. Nothing is drafted for what comes after it.
        self._last = 1 if request.sampling.greedy and request.delta == 0 else 0

    @property
    def most_drafted(self) -> int:
        """How many draft tokens may be judged in its next round."""
        return max(0, self.budget - self._last) if self.drafted else 0

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
        self.budget = min(self.budget, positions - len(first))
        if self.budget < 1:
            raise InputError(
                f"the prompt leaves no position for an answer: there are {positions}"
            )
        request = self.request
        self.sampler = RowSampler(
            self._rules, first, request.prompt, request.sampling.seed, request.stream
        )
        self._stats.encode_seconds = seconds
        self._started = now

    def fail(self, error: InputError) -> Commit:
        """It ends without another token."""
        self.finished = True
        return Commit(self.id, [], 0, "error", self._stats.copy(), error)

    def commit(self, outcome: _Outcome, current: Round, place: int) -> Commit | None:
        """Take what stands of the draft and the target's own token, up to the end.

        The end is the first end-of-sequence, anywhere in the block, or the budget.

        Args:
            place: its row in the round.

        Returns:
            None where it may have been the draft that the target makes no numbers of:
            then it goes on without one.
        """
        accepted, draft = outcome.accepted, outcome.draft
        ends = self._rules.eos_tokens
        block = [*draft[:accepted], outcome.next_token][: self.budget]
        block = up_to_end(block, ends)
        if outcome.finite < len(block):
            if draft:
                self.drafted = False
                self._count(len(draft), 0, 0)
                return None
            return self.fail(current.fault(place))
        self.sequence += block
        self.sampler.append(block)
        self.budget -= len(block)
        reason = "eos" if block[-1] in ends else "length" if not self.budget else None
        self.finished = reason is not None

        taken = min(accepted, len(block))
        self._count(len(draft), taken, taken < len(block) and accepted < len(draft))
        stats = self._stats
        stats.new_tokens += len(block)
        stats.decode_seconds = time.perf_counter() - self._started
        stats.peak_memory_bytes = mx.get_peak_memory()
        return Commit(self.id, block, taken, reason, stats.copy())

    def _count(self, drafted: int, accepted: int, rejected: int) -> None:
        """A round, of which so many draft tokens were judged."""
        stats = self._stats
        stats.rounds += 1
        stats.drafted += drafted
        stats.accepted += accepted
        stats.tested += accepted + rejected
        stats.accept_histogram += [0] * (accepted + 1 - len(stats.accept_histogram))
        stats.accept_histogram[accepted] += 1

"""The thread that has the models: jobs in, what becomes of them out.

Everything of MLX happens here. Between two rounds of the engine jobs are begun with and
given up; their texts share its batch, whatever rules each of them has.
"""

import secrets
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import mlx.core as mx

from console.rules import Rules, Texts
from pair import Pair
from serving.bodies import Asked
from serving.jobs import Begun, FullError, Job, Row, Text
from serving.metrics import Metrics
from speculation.requests import Commit, Request
from system.errors import InputError, TooLongError
from text.messages import Messages, last_text

#: Seconds between two times that what was measured is kept.
_KEEPING = 60.0
#: Seconds that others' rounds wait for those who come.
_PAUSE = 0.02
#: Characters of a prompt, for each token that it may have.
_CHARACTERS = 32


class Worker:
    """Has the models, and answers jobs one round after another.

    Attributes:
        name: of the model; None until it is loaded.
        rows: the most texts that are decoded at once; 0 until that is known.
        most_drafted: the most draft tokens of a round.
        fault: why nobody answers any more.
        failed: what ended it, if it was not told to stop.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Pair, str]],
        *,
        rows: int | None,
        waiting: int,
        most_tokens: int,
        most_prompt: int,
        metrics: Metrics,
    ):
        """
        Args:
            load: the pair and the target's name; called in the worker's thread.
            rows: the most texts at once; None for as many as the memory has room for.
            waiting: the most texts beside those.
            most_tokens, most_prompt: of a text, and of a prompt.
        """
        self.name: str | None = None
        self.most_drafted = 0
        self.fault: BaseException | None = None
        self.failed: BaseException | None = None
        self._load, self.rows, self._waiting = load, rows or 0, waiting
        self._most_tokens, self._most_prompt = most_tokens, most_prompt
        self._metrics = metrics
        self._orders: SimpleQueue[tuple[str, Job | None]] = SimpleQueue()
        self._lock = Lock()
        self._count = 0  # the room of those who were taken and are not done with
        self._rows: dict[int, Row] = {}  # by the engine's number
        self._turns: deque[Job] = deque()  # jobs that have more to begin with
        self._said: set[str] = set()
        self._kept = time.monotonic()
        self._thread = Thread(target=self._run, name="models", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether jobs are answered."""
        return self.name is not None and self.fault is None

    @property
    def most(self) -> int:
        """The most texts that there may be at once, those that wait included; a search
        takes the room of as many as it has beams."""
        return self.rows + self._waiting

    @property
    def count(self) -> int:
        """How many there are."""
        return self._count

    # For other threads.

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job answered.

        Raises:
            FullError: there is no room for so many texts more.
            InputError: nobody answers any more.
        """
        with self._lock:
            if self.fault:
                raise InputError("the server is stopping")
            if self._count + job.room > self.most:
                raise FullError
            self._count += job.room
            self._orders.put(("begin", job))

    def give_up(self, job: Job) -> None:
        """Nobody wants the rest of it."""
        self._orders.put(("give up", job))

    def stop(self, seconds: float) -> None:
        """End, after the round that is running; wait for it so long."""
        self._orders.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join(seconds)

    # In its own.

    def _run(self) -> None:
        try:
            pair, name = self._load()
            if not self.rows:
                self.rows = pair.batch_size(self._most_prompt, self._most_tokens, None)
            self.rows = self.rows if pair.batches else 1
            self._pair = pair
            self.most_drafted = pair.policy.most if pair.drafts else 0
            self._engine = pair.engine(self.rows)
            self.name = name
            while self._go_on():
                pass
            self._keep(0.0)
            mx.synchronize()
            self._end(InputError("the server is stopping"))
        except BaseException as error:
            self.failed = error
            self._end(error)

    def _go_on(self) -> bool:
        """Do what was ordered, then one round; whether there is to be another."""
        try:
            if not self._take_orders():
                return False
            self._begin_some()
            self._step()
        except Exception as error:
            self._recover(error)
        return True

    def _end(self, fault: BaseException) -> None:
        """Whoever waits gets no answer any more."""
        with self._lock:
            self.fault = fault
        told = fault if isinstance(fault, Exception) else RuntimeError("it was ended")
        for job in self._jobs():
            job.tell(told)
        with suppress(Empty):
            while True:
                order, job = self._orders.get(block=False)
                if order == "begin":
                    job.tell(told)

    def _take_orders(self) -> bool:
        """Do what others have asked for; whether to go on."""
        while True:
            idle = not (self._engine.busy or self._turns)
            self._metrics.waiting(max(0, self._count - self.rows))
            if idle:
                self._metrics.idle()
                self._keep(_KEEPING)
            try:
                order, job = self._orders.get(block=idle)
            except Empty:
                return True
            if order == "stop":
                return False
            if order == "begin":
                self._turns.append(job)
            else:
                self._drop(job)

    def _begin_some(self) -> None:
        """Read prompts and fill the engine's rows, job by job in turn: one with many
        texts does not go before all of another's. Others' rounds wait meanwhile, so
        not for long."""
        began, idle = time.monotonic(), 0
        held: Job | None = None  # who waits for room in the batch, and goes first
        while self._turns and idle < len(self._turns):
            job = self._turns.popleft()
            self._turns.append(job)
            idle += 1
            if job.unread:
                self._read(job)
                idle = 0
            elif self._engine.wanted and not held:
                if not self._has_room(job.requests[0]):
                    held = job
                    continue
                self._admit(job, job.requests.popleft())
                if not job.requests:
                    self._turns.remove(job)
                idle = 0
            if self._engine.busy and time.monotonic() - began > _PAUSE:
                break
        while held and self._turns[0] is not held:
            self._turns.rotate()

    def _has_room(self, request: Request) -> bool:
        """Whether a search has as many rows to itself as it has beams."""
        taken = sum(row.room for row in self._rows.values())
        return request.width == 1 or not taken or taken + request.width <= self.rows

    def _admit(self, job: Job, request: Request) -> None:
        number = self._engine.admit(request)
        job.numbers.append(number)
        decode = self._pair.decoder(job.asked.keep_special)
        size = job.asked.count if request.width > 1 else 1
        texts = [
            Text(job, job.choices + place, decode, best=not place, alone=size == 1)
            for place in range(size)
        ]
        job.choices += size
        self._rows[number] = Row(job, texts, request.width)

    def _read(self, job: Job) -> None:
        """Encode the next of its prompts; when all are, it has begun."""
        place, prompt = job.unread.popleft()
        try:
            job.rules = job.rules or self._rules(job.asked)
            requests = self._requests(job.asked, job.rules, place, prompt)
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exception(error)
            self._fail(job, error)
            return
        # How many beams the model's files bring is known now.
        self._release(job, job.asked.width - sum(each.width for each in requests))
        job.requests.extend(requests)
        job.prompt_tokens += len(requests[0].prompt)
        if not job.unread:
            job.tell(Begun(job.prompt_tokens))
            self._metrics.prompt(job.prompt_tokens)

    def _rules(self, asked: Asked) -> Rules:
        """How the prompts of a job are answered.

        Raises:
            InputError: they cannot be answered so.
        """
        if asked.num_draft is not None and asked.num_draft > self.most_drafted:
            raise InputError(
                f"num_draft is {asked.num_draft}: at most {self.most_drafted} are "
                "drafted here"
            )
        return Rules(
            self._pair,
            asked.given,
            bad_words=asked.bad_words,
            task_defaults=asked.task_defaults,
            texts=Texts(asked.count, asked.counted),
            delta=asked.delta,
            said=self._said,
        )

    def _requests(
        self, asked: Asked, rules: Rules, place: int, prompt: "str | Messages"
    ) -> list[Request]:
        """What to ask the engine for: each text of a prompt, or one search.

        Raises:
            InputError: it is odd.
        """
        question = self._question(prompt)
        text = last_text(question)
        if len(text) > _CHARACTERS * self._most_prompt:
            raise TooLongError(
                f"the prompt has {len(text)} characters: at most "
                f"{_CHARACTERS * self._most_prompt} are read here"
            )
        way = rules.of(question)
        if way.max_tokens > self._most_tokens:
            raise InputError(
                f"max_tokens is {way.max_tokens}: at most {self._most_tokens} are "
                "written here"
            )
        # With a seed the text that main.py writes for it; else another each time.
        stream = secrets.randbits(31) if way.sampling.seed is None else place
        first = self._pair.request(
            question,
            delta=asked.delta,
            stream=stream,
            num_draft=asked.num_draft,
            **way._asdict(),
        )
        size = len(first.prompt)
        if size > self._most_prompt:
            raise TooLongError(
                f"the prompt has {size} tokens: at most {self._most_prompt} are read "
                "here"
            )
        if way.beams:
            return [first]
        return [
            replace(first, stream=(stream, sample)) for sample in range(asked.count)
        ]

    def _question(self, prompt: "str | Messages") -> "str | Messages":
        """What is encoded: T5 knows no conversations, and is asked what the user said
        last."""
        if isinstance(prompt, str) or not self._pair.target.has_encoder:
            return prompt
        said = [each["content"] for each in prompt if each["role"] == "user"]
        if not said:
            raise InputError("messages has none of the user's")
        return said[-1]

    def _step(self) -> None:
        """One round, and what came of it."""
        commits = self._engine.step()
        self._metrics.round(self._engine.decoded)
        for commit in commits:
            row = self._rows.get(commit.id)
            if row is None:
                continue  # another text of its job has failed
            its = [commit]
            if commit.finish_reason:
                its += commit.others(len(row.texts))
            failed = [each.error for each in its if each.error]
            if failed:
                self._fail(row.job, failed[0])
                continue
            try:
                self._take(row, its)
            except Exception as error:  # a tokenizer's process may die
                traceback.print_exception(error)
                self._fail(row.job, error)

    def _take(self, row: Row, its: list[Commit]) -> None:
        """What a commit adds to the texts of a row, and at last those of the others."""
        pairs = zip(row.texts, its, strict=False)
        added = [text.take(commit) for text, commit in pairs]
        self._metrics.written(sum(len(commit.tokens) for commit in its))
        if added[0].finish_reason:
            stats = its[0].stats
            self._metrics.finished(stats.accepted, stats.tested - stats.accepted)
            self._finish(its[0].id, row)
        for each in added:
            row.job.tell(each)

    def _recover(self, error: Exception) -> None:
        """Go on without those who were in the engine: whose fault it was is not known,
        and it is of no more use."""
        traceback.print_exception(error)
        self._pair.forget()
        self._engine = self._pair.engine(self.rows)
        for job in self._jobs():
            self._fail(job, error)

    def _jobs(self) -> "set[Job]":
        """Those that are not done with."""
        return {*self._turns, *(row.job for row in self._rows.values())}

    def _finish(self, number: int, row: Row) -> None:
        """Its texts are finished, if only because a stop string occurred."""
        del self._rows[number]
        row.job.texts -= len(row.texts)
        self._release(row.job, row.room)
        self._engine.cancel(number)

    def _drop(self, job: Job) -> None:
        """Do no more for a job."""
        with suppress(ValueError):
            self._turns.remove(job)
        left = [number for number in job.numbers if self._rows.pop(number, None)]
        self._release(job, job.room)
        job.texts = 0
        for number in left:
            self._engine.cancel(number)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.texts:
            job.tell(error)
        self._drop(job)

    def _release(self, job: Job, room: int) -> None:
        job.room -= room
        with self._lock:
            self._count -= room

    def _keep(self, seconds: float) -> None:
        """Keep what was measured for the next run, if the last time is long ago."""
        if time.monotonic() - self._kept >= seconds:
            self._kept = time.monotonic()
            self._pair.remember()

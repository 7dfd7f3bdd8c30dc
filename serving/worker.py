"""The thread that has the models: jobs in, what becomes of them out.

Everything of MLX happens here. Between two rounds of the engine jobs are begun with and
given up; their texts share its batch, whatever rules each of them has.
"""

import secrets
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import mlx.core as mx

from console.rules import Rules
from pair import Pair
from serving.bodies import Asked
from serving.metrics import Metrics
from serving.stops import Cut
from speculation.requests import Commit, Request, Stats
from system.errors import InputError, TooLongError
from text.messages import Messages
from text.tokenizer import TextStream

#: Seconds between two times that what was measured is kept.
_KEEPING = 60.0


@dataclass(frozen=True)
class Added:
    """What a text has got.

    Attributes:
        choice: which of the job's.
        pieces: bits of text, and whether a draft token completed each.
        stats: its figures so far.
        finish_reason: "stop" or "length" if that was all, else None.
    """

    choice: int
    pieces: list[tuple[str, bool]]
    stats: Stats
    finish_reason: str | None


@dataclass(frozen=True)
class Begun:
    """A job is under way: its prompts have so many tokens in all."""

    prompt_tokens: int


#: What is told of a job: at first that it has begun, at last an error or that all its
#: texts are finished.
Event = Begun | Added | Exception


class FullError(Exception):
    """There is no more room for who waits."""


class Job:
    """One client's request.

    Attributes:
        asked: what it asks for.
        tell: takes an event, in the worker's thread.
        texts: that are neither finished nor given up.
    """

    def __init__(self, asked: Asked, tell: Callable[[Event], None]):
        self.asked = asked
        self.tell = tell
        self.texts = asked.texts
        self.numbers: list[int] = []  # the engine's


class _Text:
    """A text on its way: from tokens to pieces."""

    def __init__(self, job: Job, choice: int, decode: Callable[[list[int]], str]):
        self.job, self.choice = job, choice
        self._stream = TextStream(decode)
        self._cut = Cut(job.asked.stops)

    def take(self, commit: Commit) -> Added:
        """What a commit adds to it."""
        pieces: list[tuple[str, bool]] = []
        stats, drafted = commit.stats, False
        for place, token in enumerate(commit.tokens):
            drafted = place < commit.accepted
            pieces += self._push(self._stream.push(token), drafted)
            if self._cut.ended:
                # What came after it in the same round is of no text.
                stats.new_tokens -= len(commit.tokens) - place - 1
                return Added(self.choice, pieces, stats, "stop")
        reason = commit.finish_reason
        if reason:
            pieces += self._push(self._stream.finish(), drafted)
            reason = "stop" if reason == "eos" or self._cut.ended else reason
            pieces += self._cut.finish()
        return Added(self.choice, pieces, stats, reason)

    def _push(self, text: str, drafted: bool) -> list[tuple[str, bool]]:
        return self._cut.push(text, drafted) if text and not self._cut.ended else []


class Worker:
    """Has the models, and answers jobs one round after another.

    Attributes:
        name: of the model; None until it is loaded.
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
        self._load, self._rows, self._waiting = load, rows or 0, waiting
        self._most_tokens, self._most_prompt = most_tokens, most_prompt
        self._metrics = metrics
        self._orders: SimpleQueue[tuple[str, Job | None]] = SimpleQueue()
        self._lock = Lock()
        self._count = 0  # texts that were taken and are not done with
        self._texts: dict[int, _Text] = {}
        self._said: set[str] = set()
        self._kept = time.monotonic()
        self._thread = Thread(target=self._run, name="models", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether jobs are answered."""
        return self.name is not None and self.fault is None

    @property
    def most(self) -> int:
        """The most texts that there may be at once, those that wait included."""
        return self._rows + self._waiting

    @property
    def rows(self) -> int:
        """The most that are decoded at once."""
        return self._rows

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
            if self._count + job.texts > self.most:
                raise FullError
            self._count += job.texts
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
            if not self._rows:
                self._rows = pair.batch_size(self._most_prompt, self._most_tokens, None)
            self._rows = self._rows if pair.batches else 1
            self._pair = pair
            self.most_drafted = pair.policy.most if pair.drafts else 0
            self._engine = pair.engine(self._rows)
            self.name = name
            while self._take_orders():
                self._step()
            self._keep(0.0)
            mx.synchronize()
            self._end(InputError("the server is stopping"))
        except BaseException as error:
            self.failed = error
            self._end(error)

    def _end(self, fault: BaseException) -> None:
        """Whoever waits gets no answer any more."""
        with self._lock:
            self.fault = fault
        told = fault if isinstance(fault, Exception) else RuntimeError("it was ended")
        for job in {text.job for text in self._texts.values()}:
            job.tell(told)
        with suppress(Empty):
            while True:
                order, job = self._orders.get(block=False)
                if order == "begin":
                    job.tell(told)

    def _take_orders(self) -> bool:
        """Do what others have asked for; whether to go on."""
        while True:
            idle = not self._engine.busy
            self._metrics.waiting(max(0, self._count - self._rows))
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
                self._begin(job)
            else:
                self._drop(job)

    def _begin(self, job: Job) -> None:
        try:
            requests = self._requests(job.asked)
        except Exception as error:
            self._fail(job, error)
            return
        sizes = {id(request.prompt): len(request.prompt) for request in requests}
        job.tell(Begun(sum(sizes.values())))
        self._metrics.prompt(sum(sizes.values()))
        decode = self._pair.decoder(job.asked.keep_special)
        for choice, request in enumerate(requests):
            number = self._engine.admit(request)
            job.numbers.append(number)
            self._texts[number] = _Text(job, choice, decode)

    def _requests(self, asked: Asked) -> list[Request]:
        """What to ask the engine for: choice by choice.

        Raises:
            InputError: it is odd.
        """
        if asked.num_draft is not None and asked.num_draft > self.most_drafted:
            raise InputError(
                f"num_draft is {asked.num_draft}: at most {self.most_drafted} are "
                "drafted here"
            )
        rules = Rules(
            self._pair,
            asked.given,
            bad_words=asked.bad_words,
            task_defaults=asked.task_defaults,
            num_samples=asked.count,
            delta=asked.delta,
            said=self._said,
        )
        found = []
        for place, prompt in enumerate(asked.prompts):
            question = self._question(prompt)
            sampling, most = rules.of(question)
            if most > self._most_tokens:
                raise InputError(
                    f"max_tokens is {most}: at most {self._most_tokens} are written "
                    "here"
                )
            # With a seed the text that main.py writes for it; else another each time.
            stream = secrets.randbits(31) if sampling.seed is None else place
            first = self._pair.request(
                question,
                max_tokens=most,
                delta=asked.delta,
                sampling=sampling,
                stream=stream,
                num_draft=asked.num_draft,
            )
            size = len(first.prompt)
            if size > self._most_prompt:
                raise TooLongError(
                    f"the prompt has {size} tokens: at most {self._most_prompt} are "
                    "read here"
                )
            found += [
                replace(first, stream=(stream, sample)) for sample in range(asked.count)
            ]
        return found

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
        try:
            commits = self._engine.step()
        except Exception as error:
            # Whose fault it was is not known, and the engine is of no more use.
            traceback.print_exception(error)
            self._pair.forget()
            self._engine = self._pair.engine(self._rows)
            for job in {text.job for text in self._texts.values()}:
                self._fail(job, error)
            return
        self._metrics.round(commits)
        for commit in commits:
            text = self._texts.get(commit.id)
            if text is None:
                continue  # its neighbour's stop string was the last of the job
            if commit.error:
                self._fail(text.job, commit.error)
                continue
            added = text.take(commit)
            if added.finish_reason:
                stats = added.stats
                self._metrics.finished(stats.accepted, stats.tested - stats.accepted)
                self._finish(commit.id, text)
            text.job.tell(added)

    def _finish(self, number: int, text: _Text) -> None:
        """A text is finished, if only because a stop string occurred."""
        self._engine.cancel(number)
        del self._texts[number]
        text.job.texts -= 1
        self._release(1)

    def _drop(self, job: Job) -> None:
        """Do no more for a job."""
        for number in job.numbers:
            if self._texts.pop(number, None):
                self._engine.cancel(number)
        self._release(job.texts)
        job.texts = 0

    def _fail(self, job: Job, error: Exception) -> None:
        if job.texts:
            job.tell(error)
        self._drop(job)

    def _release(self, texts: int) -> None:
        with self._lock:
            self._count -= texts

    def _keep(self, seconds: float) -> None:
        """Keep what was measured for the next run, if the last time is long ago."""
        if time.monotonic() - self._kept >= seconds:
            self._kept = time.monotonic()
            self._pair.remember()

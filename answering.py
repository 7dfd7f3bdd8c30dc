"""Answers: one as it comes out, or those of any number of prompts, in order.

prompts ──► a window of them, by length ──► engine ──► in order again
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from decoder import Engine
from speculation.requests import Commit, Request, Stats
from system.errors import InputError, PromptError
from text.messages import Messages
from text.tokenizer import TextStream

#: What tokenizers write for bytes that are no character.
_BROKEN = "\ufffd"

#: Prompts that are read ahead, to be sorted by length, for each row of a batch.
WINDOW = 16
#: Tokens that are read ahead at most, in prompts however long.
AHEAD = 1_000_000


@dataclass(frozen=True)
class Piece:
    """A bit of text, as soon as it stands.

    Attributes:
        text: characters, never part of one; all pieces joined are the text.
        drafted: whether the token that completed it was a draft token.
    """

    text: str
    drafted: bool


@dataclass(frozen=True)
class Question:
    """A prompt with options of its own.

    Attributes:
        prompt: a text or a conversation, as :meth:`pair.Pair.samples` takes it.
        options: of :meth:`pair.Pair.request`, in place of those of all prompts.
        error: why it cannot be answered, where that is known already.
        tag: whatever the answer is to be recognised by.
    """

    prompt: str | Messages
    options: Mapping[str, Any] = field(default_factory=dict)
    error: PromptError | None = None
    tag: Any = None


class Generation:
    """One prompt being answered: iterate once for the pieces; the rest fills up.

    Attributes:
        prompt: as given.
        text: what has been yielded so far.
        tokens: committed ids, with end-of-sequence where that was produced.
        finish_reason: "eos" or "length" once finished, None before; "error" where it
            came to no end.
        stats: the figures so far (:class:`requests.Stats`).
        error: why it came to no end.
        score: what a beam search gives it (:class:`beams.Hypothesis`), else None.
        searched: whether it comes of a beam search.
        tag: its :class:`Question`'s.
    """

    def __init__(
        self,
        prompt: str,
        decode: Callable[[list[int]], str],
        commits: Iterable[Commit] = (),
        tag: Any = None,
        searched: bool = False,
    ):
        self.prompt = prompt
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.stats = Stats()
        self.error: InputError | None = None
        self.score: float | None = None
        self.searched = searched
        self.tag = tag
        self._decode = decode
        self._pieces = self._stream(commits)

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def finish(self) -> "Generation":
        """Decode to the end, and return this very object."""
        for _ in self:
            pass
        return self

    def take(self, commit: Commit) -> bool:
        """Take in what is its own; whether that was the last of it. Its text then is
        what iterating would have made of it."""
        self._take(commit)
        if commit.finish_reason is None:
            return False
        self.text = self._decode(self.tokens)
        if _BROKEN in self.text:  # of which there may be more or less bit by bit
            stream = TextStream(self._decode)
            self.text = "".join([stream.push(t) for t in self.tokens])
            self.text += stream.finish()
        return True

    def fail(self, error: InputError) -> None:
        """It comes to no end."""
        self.error, self.finish_reason = error, "error"

    def _take(self, commit: Commit) -> None:
        self.stats = commit.stats
        self.finish_reason = commit.finish_reason
        self.error = commit.error
        self.tokens += commit.tokens
        if commit.hypotheses:
            self.score = commit.hypotheses[0].score

    def _stream(self, commits: Iterable[Commit]) -> Iterator[Piece]:
        stream = TextStream(self._decode)
        drafted = False
        for commit in commits:
            self._take(commit)
            for place, token in enumerate(commit.tokens):
                drafted = place < commit.accepted
                yield from self._piece(stream.push(token), drafted)
            if commit.error:
                raise commit.error
        yield from self._piece(stream.finish(), drafted)

    def _piece(self, text: str, drafted: bool) -> Iterator[Piece]:
        if text:
            self.text += text
            yield Piece(text, drafted)


class Source(Protocol):
    """Where questions come from, one after another."""

    def __call__(self, wait: bool) -> Question | None:
        """The next one; None where there is none yet, and nobody is to wait for it.

        Raises:
            StopIteration: there are no more.
        """


def source_of(prompts: "Iterable[str | Messages | Question]") -> Source:
    """A source of prompts that are there, or take their time."""
    iterator = iter(prompts)

    def following(wait: bool) -> Question:
        prompt = next(iterator)
        return prompt if isinstance(prompt, Question) else Question(prompt)

    return following


class Answers:
    """Answers questions in batches.

    Prompts of a like length are decoded together: a window of questions is read, sorted
    and begun with until it is empty; then comes the next one, sorted the other way
    round, so that lengths do not jump.
    """

    def __init__(
        self,
        source: Source,
        begin: Callable[[Question, int], tuple[Generation, Request | None]],
        engine_for: Callable[[list[Request]], tuple[Engine, int]],
        in_order: bool,
        require_own: Callable[[], None],
    ):
        """
        Args:
            begin: of a question and its place: its answer, which may have failed
                already, and what asks the engine for it.
            engine_for: the engine, and its rows, for requests like these.
            in_order: whether answers come as their questions do, or as they finish.
            require_own: raises an error where somebody else uses the models by now.
        """
        self._source = source
        self._begin = begin
        self._engine_for = engine_for
        self._in_order = in_order
        self._require_own = require_own
        self._engine: Engine | None = None
        self._rows = 1
        self._ended = False
        self._read = self._out = 0  # questions that came, answers that went
        self._window: deque[tuple[Request, int, Generation, bool]] = deque()
        self._downwards = False  # at first what is soon done
        self._running: dict[int, tuple[int, Generation]] = {}  # by the engine's number
        self._done: dict[int, Generation] = {}  # by place

    def __iter__(self) -> Iterator[Generation]:
        while True:
            self._require_own()
            if not self._window and not self._ended:
                self._fill_window()
            self._feed()
            if self._running:
                for commit in self._engine.step():
                    place, answer = self._running[commit.id]
                    if answer.take(commit):
                        del self._running[commit.id]
                        self._done[place] = answer
            yield from self._ready()
            if self._ended and not (self._window or self._running or self._done):
                return

    def _ready(self) -> Iterator[Generation]:
        """The answers that may go."""
        if not self._in_order:
            done, self._done = self._done, {}
            self._out += len(done)
            yield from done.values()
            return
        while self._out in self._done:
            self._out += 1
            yield self._done.pop(self._out - 1)

    def _fill_window(self) -> None:
        """Read what is there of the next questions; wait for one where there is nothing
        else to do."""
        most = WINDOW * self._rows if self._engine else WINDOW
        read: list[tuple[Request, int, Generation, bool]] = []
        tokens = 0
        while len(read) < most and tokens < AHEAD:
            # Answers that wait for an earlier one take memory as well.
            if self._read - self._out > 2 * WINDOW * max(self._rows, WINDOW):
                break
            idle = not read and not self._running and not self._done
            try:
                question = self._source(idle)
            except StopIteration:
                self._ended = True
                break
            if question is None:
                break
            place, self._read = self._read, self._read + 1
            answer, request = self._begin(question, place)
            if request is None:
                self._done[place] = answer
            else:
                tokens += len(request.prompt)
                read.append((request, place, answer, bool(question.options)))
        # Of searches only those with as many beams are decoded together.
        read.sort(
            key=lambda one: (one[0].width, len(one[0].prompt)), reverse=self._downwards
        )
        self._window.extend(read)
        self._downwards = not self._downwards

    def _feed(self) -> None:
        """Give the engine as much as it can use."""
        if self._window and self._engine is None:
            self._engine, self._rows = self._engine_for(
                [request for request, *_ in self._window]
            )
        while self._window and self._engine.wanted:
            request, place, answer, own = self._window.popleft()
            try:
                self._running[self._engine.admit(request)] = place, answer
            except InputError as error:
                if not own:  # they are everybody's
                    raise
                answer.fail(error)
                self._done[place] = answer

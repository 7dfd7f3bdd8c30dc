"""What a client asks of the worker, and what it is told bit by bit."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from console.rules import Rules
from serving.bodies import Asked
from serving.stops import Cut
from speculation.requests import Commit, Request, Stats
from text.tokenizer import TextStream


@dataclass(frozen=True)
class Added:
    """What a text has got.

    Attributes:
        choice: which of the job's.
        pieces: bits of text, and whether a draft token completed each.
        tokens: how many it has so far.
        stats: its figures so far; None where they are those of the search that another
            choice is the best text of.
        finish_reason: "stop" or "length" if that was all, else None.
        score: what a search gives it, once it has found all of it.
    """

    choice: int
    pieces: list[tuple[str, bool]]
    tokens: int
    stats: Stats | None
    finish_reason: str | None
    score: float | None = None


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
        room: how many texts' room it takes.
        unread: prompts that are not encoded yet, and their places.
        requests: what the engine is still to be asked for.
        numbers: the engine's, of what it was asked for, and ``choices``, how many texts
            that makes.
        prompt_tokens: of the prompts that are encoded.
        rules: how they are answered, once the first is.
    """

    def __init__(self, asked: Asked, tell: Callable[[Event], None]):
        self.asked = asked
        self.tell = tell
        self.texts = asked.texts
        self.room = asked.room
        self.unread = deque(enumerate(asked.prompts))
        self.requests: deque[Request] = deque()
        self.numbers: list[int] = []
        self.choices = 0
        self.prompt_tokens = 0
        self.rules: Rules | None = None


class Text:
    """A text on its way: from tokens to pieces."""

    def __init__(
        self,
        job: Job,
        choice: int,
        decode: Callable[[list[int]], str],
        best: bool = True,
        alone: bool = True,
    ):
        """
        Args:
            best: whether the figures of its row are its own, and not another's.
            alone: whether its row is done with where a stop string ends it.
        """
        self._choice, self._best, self._alone = choice, best, alone
        self._stream = TextStream(decode)
        self._cut = Cut(job.asked.stops)
        self._tokens = 0

    def take(self, commit: Commit) -> Added:
        """What a commit adds to it."""
        pieces: list[tuple[str, bool]] = []
        drafted, reason, score = False, commit.finish_reason, None
        for place, token in enumerate(commit.tokens):
            if self._cut.ended:
                break  # what comes after it is of no text
            drafted = place < commit.accepted
            pieces += self._push(self._stream.push(token), drafted)
            self._tokens += 1
        if reason and not self._cut.ended:
            pieces += self._push(self._stream.finish(), drafted)
            pieces += self._cut.finish()
        if self._cut.ended:
            reason = "stop" if reason or self._alone else None
        elif reason and commit.hypotheses:
            score = commit.hypotheses[0].score
        reason = "stop" if reason == "eos" else reason
        stats = commit.stats
        stats.new_tokens = self._tokens
        its = stats if self._best else None
        return Added(self._choice, pieces, self._tokens, its, reason, score)

    def _push(self, text: str, drafted: bool) -> list[tuple[str, bool]]:
        return self._cut.push(text, drafted) if text and not self._cut.ended else []


@dataclass(frozen=True)
class Row:
    """What the engine has a number for: a text, or the best ones of a search.

    Attributes:
        job: whose they are.
        texts: best first.
        room: how many texts' room it takes.
    """

    job: Job
    texts: list[Text]
    room: int

"""A job whose lines several processes answer: what --parallel data does.

                         ┌──► this rank's pair ──┐
lines ──► Desk, waiting ─┤                       ├─► Desk, done ──► rank 0 writes,
                         └──► the others' pairs ─┘                  in order

Rank 0 alone has the input and the output. A rank that is faster gets more lines: what
it has answered so far says how many it is given ahead.
"""

import queue
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from threading import Condition, Thread
from typing import Any

from answering import WINDOW, Generation, Question
from console.questions import Questions, Tag
from console.rules import Rules
from pair import MOST_ROWS, Pair
from speculation.requests import Stats
from system.errors import PromptError, say
from system.ranks import Ranks
from text.messages import Messages

#: Bytes of lines that are read and whose answers are not written, about.
_MOST_BYTES = 1 << 24


class Desk:
    """Lines that wait for who answers them, and answers that wait for earlier ones.

    Threads bring lines and answers and take lines; what waits is bounded: nobody runs
    on without end while another is slow.

    Attributes:
        answered: how many lines each rank has answered.
        faulty: how many were nobody's to answer.
    """

    def __init__(self, ranks: int, rows: int):
        """``rows``: how many lines a rank may answer at once."""
        self.answered = [0] * ranks
        self.faulty = 0
        self._rows = rows
        # Each rank may have as many as it would keep ahead on its own.
        self._most = ranks * 2 * WINDOW * max(rows, WINDOW)
        self._news = Condition()
        self._waiting: deque[Tag] = deque()
        self._held: list[dict[int, Tag]] = [{} for _ in range(ranks)]  # by line
        self._done: dict[int, tuple[int, Generation]] = {}  # with the rank, by line
        self._order: deque[Tag] = deque()  # all of these, as they came
        self._bytes = 0
        self._ended = False
        self._error: Exception | None = None

    def put(self, tag: Tag) -> None:
        """Another line, as soon as there is room for it."""
        with self._news:
            self._news.wait_for(
                lambda: len(self._order) < self._most and self._bytes < _MOST_BYTES
            )
            self._order.append(tag)
            self._bytes += len(tag.raw)
            if tag.error:
                answer = Generation("", lambda _: "", tag=tag)
                answer.fail(tag.error)
                self.faulty += 1
                self._done[tag.line.number] = 0, answer
            else:
                self._waiting.append(tag)
            self._news.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """There are no more lines, or something failed, which rank 0 is to raise."""
        with self._news:
            self._ended = True
            self._error = self._error or error
            self._news.notify_all()

    def take(self, rank: int) -> Tag | None:
        """A line for a rank to answer; None where it is to have none yet.

        Raises:
            StopIteration: there are no more.
            Whatever failed.
        """
        with self._news:
            if self._error:
                raise self._error
            if self._is_for(rank):
                return self._hand_to(rank)
            if self._ended and not self._waiting:
                raise StopIteration
            return None

    def take_some(self, rank: int) -> list[Tag]:
        """What a rank may have, once that is a line; nothing where no more come."""
        with self._news:
            self._news.wait_for(
                lambda: self._is_for(rank) or (self._ended and not self._waiting)
            )
            taken = []
            while self._is_for(rank):
                taken.append(self._hand_to(rank))
            return taken

    def bring(self, rank: int, number: int, answer: Generation) -> None:
        """What a rank answers to the line with this number."""
        with self._news:
            answer.tag = self._held[rank].pop(number)
            self._done[number] = rank, answer
            self.answered[rank] += 1
            self._news.notify_all()

    def ready(self) -> Iterator[tuple[int, Generation]]:
        """The answers whose turn it is, and whose they are."""
        while True:
            with self._news:
                if not self._is_ready():
                    return
                tag = self._order.popleft()
                self._bytes -= len(tag.raw)
                done = self._done.pop(tag.line.number)
                self._news.notify_all()
            yield done

    def wait(self, rank: int) -> bool:
        """Wait until there is a line for a rank, or an answer whose turn it is; whether
        there ever will be.

        Raises:
            Whatever failed.
        """
        with self._news:
            self._news.wait_for(
                lambda: (
                    self._error
                    or self._is_ready()
                    or self._is_for(rank)
                    or (self._ended and not self._order)
                )
            )
            if self._error:
                raise self._error
            return bool(self._order)

    def _is_ready(self) -> bool:
        return bool(self._order) and self._order[0].line.number in self._done

    def _is_for(self, rank: int) -> bool:
        """Whether a rank is to have a line.

        It may keep a batch going, or its part of what is left, if that is less; and
        where more wait, as many of them as it has answered of those before.
        """
        waiting, held = len(self._waiting), len(self._held[rank])
        left = waiting + sum(map(len, self._held))
        part = -(-left // len(self._held))
        ahead = waiting * self.answered[rank] // max(1, sum(self.answered))
        return waiting > 0 and held < max(min(self._rows + 1, part), ahead)

    def _hand_to(self, rank: int) -> Tag:
        tag = self._waiting.popleft()
        self._held[rank][tag.line.number] = tag
        return tag


class Sharing:
    """On rank 0: has all ranks answer lines, itself as well."""

    def __init__(self, arguments: Namespace, ranks: Ranks, questions: Questions):
        self._ranks = ranks
        self._questions = questions
        self._verbose = arguments.verbose
        self._desk = Desk(ranks.size, arguments.batch_size or MOST_ROWS)

    def run(
        self,
        next_line: Callable[[bool], Tag | None],
        write: Callable[[Generation], None],
    ) -> list[str]:
        """Have what is left of the input answered, and written in order.

        Args:
            next_line: as :class:`answering.Source` has it, of lines.

        Returns:
            Who answered how many of them, in words.

        Raises:
            InputError: a line cannot be read, or an answer not be written.
        """
        self._write = write
        self._start(self._read, next_line)
        for number in range(1, self._ranks.size):
            self._start(self._take_in, number)
        answers = self._questions.answers(self._next_question, in_order=False)
        for answer in answers:
            self._desk.bring(0, answer.tag.line.number, answer)
            self._write_ready()
        while self._desk.wait(0):
            self._write_ready()
        answered = self._desk.answered
        total = sum(answered) + self._desk.faulty
        return [
            f"rank {rank} answered {count:,} of {total:,} lines"
            for rank, count in enumerate(answered)
        ]

    def _next_question(self, wait: bool) -> Question | None:
        """As :class:`answering.Source` has it. Who waits writes meanwhile what others
        answer."""
        while True:
            self._write_ready()
            tag = self._desk.take(0)
            if tag:
                return self._questions.of(tag.line.number, tag.line.prompt, tag)
            if not wait:
                return None
            self._desk.wait(0)

    def _write_ready(self) -> None:
        for rank, answer in self._desk.ready():
            if rank:  # for what there is to say of the line, which is rank 0's to say
                line = answer.tag.line
                self._questions.of(line.number, line.prompt, None)
            self._write(answer)

    # Threads: of the input, and two of each other rank, so that none waits for another.

    def _start(self, work: Callable[[Any], None], argument: Any) -> None:
        def guarded() -> None:
            try:
                work(argument)
            except Exception as error:
                self._desk.end(error)

        Thread(target=guarded, daemon=True).start()

    def _read(self, next_line: Callable[[bool], Tag | None]) -> None:
        while True:
            try:
                tag = next_line(True)
            except StopIteration:
                self._desk.end()
                return
            self._desk.put(tag)

    def _take_in(self, number: int) -> None:
        self._ranks.hear_from(number)  # it has loaded its models
        if self._verbose:
            say(f"rank {number} is ready")
        self._start(self._hand_out, number)
        while True:
            line, answer = _received(self._ranks.hear_from(number))
            self._desk.bring(number, line, answer)

    def _hand_out(self, number: int) -> None:
        lines = None
        while lines != []:  # which says that no more come
            tags = self._desk.take_some(number)
            lines = [[tag.line.number, tag.line.prompt] for tag in tags]
            self._ranks.tell_one(number, lines)


class Part:
    """On another rank: answers the lines that rank 0 sends."""

    def __init__(self, arguments: Namespace, ranks: Ranks):
        self._arguments = arguments
        self._ranks = ranks
        self._came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lines: deque[tuple[int, str | Messages]] = deque()

    def run(self, pair: Pair, rules: Rules, system: Messages) -> int:
        """Answer what comes; the process ends here, when rank 0 has."""
        self._questions = Questions(self._arguments, pair, rules, system)
        Thread(target=self._take_in, daemon=True).start()
        self._ranks.answer(None)  # ready
        answers = self._questions.answers(self._next_question, in_order=False)
        for answer in answers:
            self._ranks.answer(_sent(answer))
        while True:
            self._ranks.hear()

    def _take_in(self) -> None:
        """A thread: has lines here before they are asked for."""
        lines = None
        while lines != []:
            try:
                lines = self._ranks.hear()
            except Exception as error:
                self._came.put(error)
                return
            self._came.put(lines)

    def _next_question(self, wait: bool) -> Question | None:
        """As :class:`answering.Source` has it."""
        if not self._lines:
            try:
                came = self._came.get(block=wait)
            except queue.Empty:
                return None
            if isinstance(came, Exception):
                raise came
            self._lines.extend(came)
        if not self._lines:
            raise StopIteration
        number, prompt = self._lines.popleft()
        return self._questions.of(number, prompt, number)


def _sent(answer: Generation) -> dict[str, Any]:
    """A finished answer, tagged with its line's number, as it goes over a wire."""
    return {
        "line": answer.tag,
        "prompt": answer.prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "score": answer.score,
        "searched": answer.searched,
        "error": None if answer.error is None else str(answer.error),
        "stats": asdict(answer.stats),
    }


def _received(sent: dict[str, Any]) -> tuple[int, Generation]:
    """The line's number, and its answer as it was."""
    answer = Generation(sent["prompt"], lambda _: "", searched=sent["searched"])
    answer.text, answer.tokens = sent["text"], sent["tokens"]
    answer.finish_reason, answer.score = sent["finish_reason"], sent["score"]
    answer.stats = Stats(**sent["stats"])
    answer.stats.sizes = [tuple(size) for size in answer.stats.sizes]
    if sent["error"] is not None:
        answer.error = PromptError(sent["error"])
    return sent["line"], answer

"""How far a job is: in place on a terminal, now and then in a log."""

import sys
import time
from collections import Counter
from contextlib import suppress

from console.lines import LineReader
from speculation.requests import Stats
from system.errors import one_line, say

#: Seconds between two reports.
_TERMINAL, _LOG = 0.5, 60.0

#: Lines whose faults are said as they come; all are counted.
NAMED = 10


class Progress:
    """Lines that were answered, and what there is to say of them.

    Attributes:
        failed: how many could not be.
    """

    def __init__(self, name: str, reader: LineReader, before: int, failed: int):
        """
        Args:
            reader: of the input, behind what is answered already.
            before: lines that an earlier run answered.
            failed: how many of them could not be.
        """
        self._name = name
        self._size, self._offset = reader.size, reader.consumed
        self._before, self._failed_before = before, failed
        self._done = self._offset
        self._lines = self._tokens = self._rounds = 0
        self._began = self._said = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._shown = False
        self.failed = failed
        self._why: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # fault by its kind

    def answered(self, consumed: int, stats: Stats) -> None:
        """A line is answered, which the input has up to byte ``consumed``."""
        self._lines += 1
        self._tokens += stats.new_tokens
        self._rounds += stats.rounds
        self._done = consumed
        now = time.perf_counter()
        if now - self._said >= (_TERMINAL if self._terminal else _LOG):
            self._said = now
            self._show()

    def fault(self, line: int, message: str) -> None:
        """A line could not be answered."""
        self.failed += 1
        message = one_line(message)
        kind = "".join("0" if c.isdigit() else c for c in message)
        self._why[kind] += 1
        self._first.setdefault(kind, f"line {line}: {message}")
        named = self.failed - self._failed_before
        if named <= NAMED:
            self.say(f"{self._name}: line {line}: {message}")
        elif named == NAMED + 1:
            self.say(f"{self._name}: more lines cannot be answered: counted at the end")

    def say(self, line: str) -> None:
        """Something else, above what is in place."""
        self.close()
        say(line)

    def close(self) -> None:
        """Nothing is in place any more."""
        if self._shown:
            _rewrite("")
            self._shown = False

    def finish(self) -> None:
        """The sum of it."""
        say(self._rates())
        if self._rounds:
            say(f"{self._tokens / self._rounds:.2f} tokens per pass of the target")
        if self.failed:
            say(f"{self.failed:,} could not be answered:")
        if self._failed_before:
            say(f"  {self._failed_before:,} of an earlier run")
        for kind, count in self._why.most_common(NAMED):
            say(f"  {count:,} like {self._first[kind]}")
        if len(self._why) > NAMED:
            rest = self._why.most_common()[NAMED:]
            say(f"  {sum(count for _, count in rest):,} others")

    def _show(self) -> None:
        text = self._rates()
        spent = time.perf_counter() - self._began
        if self._size and self._offset < self._done <= self._size:
            left = (self._size - self._done) / (self._done - self._offset) * spent
            text += f", {self._done / self._size:.0%}, {_clock(left)} left"
        if self._terminal:
            _rewrite(text)
            self._shown = True
        else:
            say(text)

    def _rates(self) -> str:
        spent = time.perf_counter() - self._began
        lines = f"{self._before + self._lines:,} lines"
        if self._before:
            lines += f" ({self._before:,} of them before)"
        return (
            f"{lines} in {_clock(spent)}: {self._lines / spent:.1f} lines/s, "
            f"{self._tokens / spent:.0f} tokens/s"
        )


def _rewrite(text: str) -> None:
    """What is in place on the terminal; lost where that takes none, as with ``say``."""
    with suppress(OSError):
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""What the lines of a job ask of a pair, as flags and the model's files have it."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

from answering import Generation, Question, Source
from console.lines import Line
from console.rules import Rules
from pair import Pair
from system.errors import PromptError
from text.messages import Messages


class Blank(PromptError):
    """Nothing is asked: the answer is nothing."""


class Tag(NamedTuple):
    """What an answer is to be written with: its line, also as it was, and how many
    bytes of the input there are up to its end."""

    line: Line
    raw: bytes
    consumed: int

    @property
    def error(self) -> PromptError | None:
        """Why the line cannot be answered, whatever the pair; None for nothing."""
        if self.line.blank:
            return Blank("the line is empty")
        return PromptError(self.line.fault) if self.line.fault else None


class Questions:
    """Makes questions of lines, and has a pair answer them."""

    def __init__(
        self, arguments: Namespace, pair: Pair, rules: Rules, system: Messages
    ):
        """``system``: what every conversation begins with."""
        self._arguments = arguments
        self._pair = pair
        self._rules = rules
        self._system = system

    def of(self, number: int, prompt: str | Messages, tag: Any) -> Question:
        """What the line with this number asks; its texts are the same whoever answers
        it, and with whatever others."""
        if self._arguments.chat and isinstance(prompt, str):
            prompt = [*self._system, {"role": "user", "content": prompt}]
        try:
            way = self._rules.of(prompt)
        except PromptError as error:
            return Question("", error=error, tag=tag)
        return Question(prompt, {**way._asdict(), "stream": number - 1}, tag=tag)

    def answers(self, source: Source, in_order: bool = True) -> Iterator[Generation]:
        """The answers to what a source asks, see :meth:`pair.Pair.answers`."""
        arguments = self._arguments
        return self._pair.answers(
            source,
            batch_size=arguments.batch_size,
            num_draft=arguments.num_draft,
            delta=arguments.delta,
            in_order=in_order,
            keep_special=arguments.keep_special,
        )

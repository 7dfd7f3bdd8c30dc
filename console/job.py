"""A file of prompts, answered several at a time: what --input does.

lines ──► questions ──► pair.answers ──► outlet, in the order of the lines
"""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from answering import Generation, Question
from checkpoints.converted import CONFIG
from console.answers import described, json_line
from console.arguments import NAME
from console.lines import Asked, Line, LineReader
from console.outlet import Outlet
from console.progress import Progress
from console.rules import Rules
from pair import Pair
from system.errors import InputError, PromptError
from text.messages import Messages

#: Flags that no answer depends on.
_OTHERS = {
    *("model", "draft_model", "input", "output", "batch_size", "resume", "verbose"),
    *("prompt", "interactive", "compare", "color", "separator", "keep_turns"),
    *("num_samples", "unverified"),
}

#: What weights are stored as.
_WEIGHTS = ("*.npz", "*.safetensors")


class _Blank(PromptError):
    """Nothing is asked: the answer is nothing."""


class _Tag(NamedTuple):
    """What an answer is to be written with: its line, also as it was, and how many
    bytes of the input there are up to its end."""

    line: Line
    raw: bytes
    consumed: int


class Job:
    """The lines of one input and their answers."""

    def __init__(
        self,
        arguments: Namespace,
        pair: Pair,
        rules: Rules,
        system: Messages,
        reader: LineReader,
    ):
        """
        Args:
            system: what every conversation begins with.

        Raises:
            InputError: the output cannot be written, or is not this job's.
        """
        self._arguments = arguments
        self._pair = pair
        self._rules = rules
        self._system = system
        self._reader = reader
        self._asked = Asked(arguments.input)
        output = arguments.output or "-"
        self._outlet = Outlet(output, describe(arguments, pair), arguments.resume)
        try:
            for place in range(self._outlet.known):
                self._skip(place)
        except BaseException:
            self._outlet.close()
            raise
        self._progress = Progress(
            NAME, reader.size, self._outlet.known, reader.consumed
        )
        self._said: set[str] = set()

    def run(self) -> int:
        """Answer what is left; the exit status."""
        arguments = self._arguments
        try:
            for answer in self._pair.answers(
                self._next_question,
                batch_size=arguments.batch_size,
                num_draft=arguments.num_draft,
                delta=arguments.delta,
                keep_special=arguments.keep_special,
            ):
                self._write(answer)
            self._outlet.done()
        finally:
            self._progress.clear()
            self._outlet.close()
        self._progress.finish()
        return 2 if self._progress.failed else 0

    def _skip(self, place: int) -> None:
        """Pass over a line that is answered already."""
        try:
            raw, long = self._reader.take(wait=True)
        except StopIteration:
            raise InputError(
                f"{self._arguments.output} was begun with another input: this one has "
                f"only {place:,} lines"
            ) from None
        self._outlet.require_same(place, raw)
        self._asked.of(raw, long)

    def _next_question(self, wait: bool) -> Question | None:
        """As :class:`answering.Source` has it."""
        taken = self._reader.take(wait)
        if taken is None:
            return None
        line = self._asked.of(*taken)
        tag = _Tag(line, taken[0], self._reader.consumed)
        if line.blank:
            return Question("", error=_Blank("the line is empty"), tag=tag)
        if line.fault:
            return Question("", error=PromptError(line.fault), tag=tag)
        prompt = line.prompt
        if self._arguments.chat and isinstance(prompt, str):
            prompt = [*self._system, {"role": "user", "content": prompt}]
        try:
            sampling, most = self._rules.of(prompt)
        except PromptError as error:
            return Question("", error=error, tag=tag)
        options = {"sampling": sampling, "max_tokens": most, "stream": line.number - 1}
        return Question(prompt, options, tag=tag)

    def _write(self, answer: Generation) -> None:
        line, raw, consumed = answer.tag
        blank = isinstance(answer.error, _Blank)
        if answer.error and not blank:
            self._progress.fault(line.number, str(answer.error))
        if self._arguments.json or self._asked.json:
            text = self._object(line, answer, blank)
        else:
            text = self._escaped("" if answer.error else answer.text)
        self._outlet.write(text, raw)
        self._progress.answered(consumed, answer.stats)

    def _object(self, line: Line, answer: Generation, blank: bool) -> str:
        if line.fields is None:
            shown = line.prompt.encode("utf-8", "surrogateescape")
            fields = {"prompt": shown.decode("utf-8", "replace")}
        else:
            fields = line.fields
        if answer.error and not blank:
            if "prompt" not in fields:
                fields = {"line": line.number, **fields}
            return json_line({**fields, "error": str(answer.error)})
        own = described(answer)
        if blank:
            own["finish_reason"] = None
        for name in own:
            if name in fields:
                self._say_once(
                    f"the input's field '{name}' is replaced by the answer's"
                )
        return json_line({**fields, **own})

    def _escaped(self, text: str) -> str:
        if "\n" not in text and "\r" not in text:
            return text
        self._say_once(
            r"an answer has line breaks of its own, written \n: --json keeps them"
        )
        return text.replace("\r", r"\r").replace("\n", r"\n")

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._progress.say(message)


def describe(arguments: Namespace, pair: Pair) -> dict[str, Any]:
    """What the answers of a job depend on, the input aside, by the names of flags."""
    job = {
        name.replace("_", "-"): value
        for name, value in vars(arguments).items()
        if name not in _OTHERS
    }
    plain = arguments.regular_decode or not arguments.num_draft or not pair.drafter
    job["model"] = _identity(pair.folder)
    job["draft-model"] = None if plain else _identity(pair.draft_folder)
    return job


def _identity(folder: Path | None) -> str:
    """What tells a model from another, wherever it lies."""
    if folder is None:
        return "prompt-lookup"
    digest = hashlib.blake2b((folder / CONFIG).read_bytes(), digest_size=8)
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return f"{folder.name} {digest.hexdigest()}"

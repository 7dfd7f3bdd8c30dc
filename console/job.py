"""A file of prompts, answered several at a time: what --input does.

lines ──► questions ──► pair.answers ──► outlet, in the order of the lines
      (or, of several processes, each one's)
"""

import hashlib
from argparse import Namespace
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from answering import Generation, Question
from checkpoints.converted import CONFIG
from console.answers import described, json_line
from console.arguments import NAME
from console.lines import Asked, Line, LineReader
from console.outlet import Outlet
from console.progress import Progress
from console.questions import Blank, Questions, Tag
from console.rules import Rules
from console.shared_job import Sharing
from pair import Pair
from speculation.beams import Beams
from speculation.requests import MAX_TOKENS
from speculation.sampling import GREEDY, SHARED, Sampling
from system.errors import InputError, say
from system.ranks import Ranks
from text.messages import Messages

#: Flags that no answer depends on.
_OTHERS = {
    *("model", "draft_model", "input", "output", "batch_size", "resume", "verbose"),
    *("prompt", "interactive", "compare", "color", "separator", "keep_turns"),
    *("num_samples", "num_return_sequences", "unverified", "coupling", "compile"),
    "parallel",
}

#: The flags of a beam search where there is none.
_NO_BEAMS = asdict(Beams(1))

#: What weights are stored as.
_WEIGHTS = ("*.npz", "*.safetensors")


class Job:
    """The lines of one input and their answers."""

    def __init__(self, arguments: Namespace, ranks: Ranks | None = None):
        """
        Args:
            ranks: on rank 0, those that answer lines as well.

        Raises:
            InputError: the input cannot be read, or the output not be written.
        """
        output = arguments.output or "-"
        self._arguments = arguments
        self._ranks = ranks
        self._reader = LineReader(arguments.input)
        self._asked = Asked(arguments.input)
        self._outlet = Outlet(output, arguments.resume)
        try:
            self._outlet.require_apart(self._reader.file)
        except BaseException:
            self.close()
            raise
        self._said: set[str] = set()

    def close(self) -> None:
        """Leave the output to others."""
        self._outlet.close()

    def run(self, pair: Pair, rules: Rules, system: Messages) -> int:
        """Answer what is to be answered; the exit status.

        Args:
            system: what every conversation begins with.

        Raises:
            InputError: the output is not this job's.
        """
        self._questions = Questions(self._arguments, pair, rules, system)
        outlet = self._outlet
        outlet.read(describe(self._arguments, pair))
        if outlet.unrecorded:
            return self._complete()
        for place in range(outlet.known):
            self._skip(place)
        outlet.begin()
        progress = self._progress = Progress(
            NAME, self._reader, outlet.known, outlet.failed
        )
        with closing(progress):
            shares = self._answer()
        outlet.done()
        progress.finish()
        for line in shares if self._arguments.verbose else ():
            say(line)
        return 2 if progress.failed else 0

    def _complete(self) -> int:
        """The output has no record: it may be a job's that is done. The exit status.

        Raises:
            InputError: it is not.
        """
        count = 0
        with suppress(StopIteration):
            while True:
                self._reader.take(wait=True)
                count += 1
        if count != self._outlet.unknown:
            raise InputError(
                f"nothing says that {self._arguments.output} is of a job that was "
                f"interrupted: remove it, or name another"
            )
        say(f"{self._arguments.output} has a line for each of the input: done")
        return 0

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

    def _answer(self) -> list[str]:
        """Answer the lines that are left; which of several processes answered how
        many, in words."""
        if self._ranks:
            sharing = Sharing(self._arguments, self._ranks, self._questions)
            return sharing.run(self._next_line, self._write)
        for answer in self._questions.answers(self._next_question):
            self._write(answer)
        return []

    def _next_line(self, wait: bool) -> Tag | None:
        """As :class:`answering.Source` has it, of lines."""
        taken = self._reader.take(wait)
        if taken is None:
            return None
        return Tag(self._asked.of(*taken), taken[0], self._reader.consumed)

    def _next_question(self, wait: bool) -> Question | None:
        """As :class:`answering.Source` has it."""
        tag = self._next_line(wait)
        if tag is None:
            return None
        if tag.error:
            return Question("", error=tag.error, tag=tag)
        return self._questions.of(tag.line.number, tag.line.prompt, tag)

    def _write(self, answer: Generation) -> None:
        line, raw, consumed = answer.tag
        blank = isinstance(answer.error, Blank)
        failed = bool(answer.error) and not blank
        if failed:
            self._progress.fault(line.number, str(answer.error))
        if self._arguments.json or self._asked.json:
            text = self._object(line, answer, blank)
        else:
            text = self._escaped("" if answer.error else answer.text)
        self._outlet.write(text, raw, failed)
        self._progress.answered(consumed, answer.stats)

    def _object(self, line: Line, answer: Generation, blank: bool) -> str:
        if line.fields is None:
            shown = line.prompt.encode("utf-8", "surrogateescape")
            fields = {"prompt": shown.decode("utf-8", "replace")}
        else:
            fields = line.fields
        own = described(answer)
        if answer.error and not blank:
            own = {"error": str(answer.error)}
            if "prompt" not in fields:
                fields = {"line": line.number, **fields}
        elif blank:
            own["finish_reason"] = None
        ours = {*described(answer), "error"}
        if answer.searched or (self._arguments.num_beams or 1) > 1:
            ours.add("score")
        for name in sorted(ours & set(fields)):
            self._say_once(f"the input's field '{name}' gives way to the answer's")
        fields = {name: v for name, v in fields.items() if name not in ours}
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
    job = {}
    # Those that the model's files may decide on.
    usual = {} if arguments.task_defaults else {"max_tokens": MAX_TOKENS, **_NO_BEAMS}
    for name, value in vars(arguments).items():
        if name not in _OTHERS:
            default = getattr(GREEDY, name, usual.get(name))
            job[name.replace("_", "-")] = default if value is None else value
    job["seed"] = arguments.seed or 0
    if _coupling(arguments) == SHARED:
        job["coupling"] = SHARED
    # What earlier records do not have.
    earlier = {"lookup": False, "dtype": "auto"}
    earlier |= {name: usual.get(name) for name in _NO_BEAMS}
    for name, without in earlier.items():
        if job[name.replace("_", "-")] == without:
            del job[name.replace("_", "-")]
    plain = arguments.regular_decode or arguments.num_draft == 0
    plain = plain or not pair.drafts
    job["model"] = _identity(pair.folder)
    job["draft-model"] = None if plain else _identity(pair.draft_folder)
    return job


def _coupling(arguments: Namespace) -> str | None:
    """What :meth:`Sampling.coupling_at` says of the job's texts."""
    temperature = arguments.temperature
    if temperature is None:  # the model's files may ask for sampling
        temperature = 1.0 if arguments.task_defaults else GREEDY.temperature
    sampling = Sampling(temperature, seed=arguments.seed, coupling=arguments.coupling)
    return sampling.coupling_at(arguments.delta)


def _identity(folder: Path | None) -> str:
    """What tells a model from another, wherever it lies."""
    if folder is None:
        return "prompt-lookup"
    digest = hashlib.blake2b((folder / CONFIG).read_bytes(), digest_size=8)
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return f"{folder.name} {digest.hexdigest()}"

"""What main.py does: flags in, answers out."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from itertools import count

from answering import Generation
from console.answers import Writer, report, report_search
from console.arguments import NAME, check_flags, parse_arguments
from console.choosing import BUNDLED, choose_pair, loading_of
from console.comparing import compare, describe_machine
from console.job import Job
from console.prompts import EXAMPLE_TASK, read_prompts, read_system, require_answerable
from console.rules import Rules, check_given, read_given, read_texts
from console.shared_job import Part
from pair import DATA, TENSOR, Pair
from speculation.requests import MAX_TOKENS, Stats, check_options
from system import fast_blas
from system.errors import PromptError, one_line, say
from system.ranks import meet
from text.messages import Messages


class Program:
    """Answers as the flags ask for them, of a pair that is loaded."""

    def __init__(self, arguments: Namespace, pair: Pair, write: Writer):
        self._arguments = arguments
        self._pair = pair
        self._write = write
        self._rules = Rules.of_flags(arguments, pair)
        self._count = read_texts(arguments).count
        self._system = read_system(pair, arguments.chat, arguments.system)

    def answer_prompts(self) -> int:
        """Answer what the flags name or standard input has; the exit status."""
        arguments = self._arguments
        status = 0
        for number, (line, prompt, fault) in enumerate(read_prompts(arguments.prompt)):
            if arguments.prompt in (None, "-") and sys.stderr.isatty():
                # Bytes that were not UTF-8 are shown escaped; the answer names them.
                say("> " + prompt.encode("utf-8", "backslashreplace").decode())
            try:
                require_answerable(fault)
                begin = self._ready(number, prompt)
                answers = begin(arguments.num_draft)
                self._write(answers)
            except PromptError as error:
                if line is None:
                    raise
                say(f"{NAME}: line {line}: {one_line(str(error))}")
                status = 2
                continue
            if not arguments.json or arguments.verbose:
                self._report(answers)
            if arguments.compare:
                compare(begin, arguments.num_draft, self._pair.forget)
        return status

    def answer_file(self, job: Job | Part) -> int:
        """Answer the lines of a file, several at once, or of those that are another
        process's to answer; the exit status."""
        return job.run(self._pair, self._rules, self._system)

    def converse(self) -> None:
        """Answer lines as they are typed."""
        from console.interactive import converse  # of no use to others

        bundled = self._pair.folder.resolve() == BUNDLED[0]
        number = count()  # asked again, a prompt has another answer
        converse(
            lambda prompt, before, roomy: self._ready(
                next(number), prompt, before, roomy
            )(self._arguments.num_draft),
            self._write,
            self._report,
            prefix=EXAMPLE_TASK if bundled else "",
            chat=self._arguments.chat,
            system=self._system,
            keep_turns=self._arguments.keep_turns,
        )

    def _ready(
        self,
        stream: int,
        prompt: str,
        before: Messages | None = None,
        roomy: bool = False,
    ) -> Callable[[int | None], list[Generation]]:
        """What begins the answers to a prompt, with so many draft tokens a round.

        Args:
            before: what was said before it; None for what every conversation begins
                with.
            roomy: there has to be room for as many tokens as they may have.
        """
        arguments = self._arguments
        question: str | Messages = prompt
        if arguments.chat:
            said = self._system if before is None else before
            question = [*said, {"role": "user", "content": prompt}]
        way = self._rules.of(question)
        if roomy:
            self._pair.require_positions(question, way.max_tokens)
        return lambda num_draft: self._pair.samples(
            question,
            self._count,
            num_draft=num_draft,
            delta=arguments.delta,
            stream=stream,
            keep_special=arguments.keep_special,
            **way._asdict(),
        )

    def _report(self, answers: list[Generation]) -> None:
        """Say the figures of a prompt's answers."""
        verbose = self._arguments.verbose
        if answers[0].searched:  # all have the figures of their one search
            report_search(answers[0].stats, verbose)
        else:
            stats = [one.stats for one in answers]
            report(Stats.of_batch(stats, self._pair.batches), verbose)
        if verbose and self._arguments.num_draft is None and self._pair.drafts:
            for line in self._pair.policy.reasons():
                say(line)
        if verbose and self._pair.how.ranks and self._pair.target.has_encoder:
            say(self._pair.how.ranks.traffic())


def main() -> int:
    """Answer as the command line says; the exit status.

    Raises:
        InputError: the flags, the models or the prompts are not what they have to be.
    """
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    ranks = meet(NAME)
    arguments = parse_arguments()
    check_flags(arguments)
    write = Writer(arguments)
    most = MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    check_options(most, arguments.num_draft or 0, arguments.delta)
    check_given(
        read_given(arguments),
        read_texts(arguments),
        arguments.delta,
        arguments.task_defaults,
    )

    shared = ranks if arguments.parallel == DATA else None
    if shared and shared.rank:
        return _answer(arguments, write, Part(arguments, shared))
    if ranks and ranks.rank:
        _load(arguments)  # its part, to the end
    if arguments.input is None:
        return _answer(arguments, write)
    with closing(Job(arguments, shared)) as job:
        return _answer(arguments, write, job)


def _answer(arguments: Namespace, write: Writer, job: Job | Part | None = None) -> int:
    """Load the models that the flags name, and answer; the exit status."""
    if fast_blas.hint:
        say(fast_blas.hint)
    if arguments.verbose:
        describe_machine()
    pair = _load(arguments)
    program = Program(arguments, pair, write)
    try:
        if job:
            return program.answer_file(job)
        if arguments.interactive:
            program.converse()
            return 0
        return program.answer_prompts()
    finally:
        pair.remember()


def _load(arguments: Namespace) -> Pair:
    return choose_pair(
        arguments.model,
        arguments.draft_model,
        plain=arguments.regular_decode or arguments.num_draft == 0,
        how=loading_of(arguments),
        lookup=arguments.lookup,
        parallel=arguments.parallel or TENSOR,
    )

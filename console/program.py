"""What main.py does: flags in, answers out."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import sys
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

from console.answers import Writer, report
from console.arguments import NAME, check_flags, parse_arguments
from console.choosing import BUNDLED, choose_pair
from console.comparing import compare, describe_machine
from console.interactive import converse
from console.prompts import EXAMPLE_TASK, read_prompts, read_system, require_answerable
from console.rules import Rules, read_given, read_sampling
from decoder import MAX_TOKENS, Stats, check_options
from pair import Generation
from system import fast_blas
from system.errors import PromptError, one_line, say


def main() -> int:
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    arguments = parse_arguments()
    check_flags(arguments)
    write = Writer(arguments)
    most = MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    check_options(most, arguments.num_draft, arguments.delta)
    # What the files ask for is known later, and may make these go together.
    if not arguments.task_defaults:
        read_sampling(read_given(arguments), arguments.num_samples)

    if fast_blas.hint:
        say(fast_blas.hint)
    if arguments.verbose:
        describe_machine()
    pair = choose_pair(
        arguments.model,
        arguments.draft_model,
        plain=arguments.regular_decode or arguments.num_draft == 0,
        unverified=arguments.unverified,
    )
    rules = Rules(arguments, pair)
    system = read_system(pair, arguments.chat, arguments.system)

    def answer(
        stream: int,
        prompt: str,
        num_draft: int = arguments.num_draft,
        before: Sequence[dict[str, Any]] = system,
        roomy: bool = False,
    ) -> list[Generation]:
        chat = [*before, {"role": "user", "content": prompt}]
        question = chat if arguments.chat else prompt
        sampling, most = rules.of(question)
        if roomy:
            pair.require_positions(question, most)
        return pair.samples(
            question,
            arguments.num_samples,
            max_tokens=most,
            num_draft=num_draft,
            delta=arguments.delta,
            sampling=sampling,
            stream=stream,
            keep_special=arguments.keep_special,
        )

    def figures(answers: list[Generation]) -> None:
        stats = [one.stats for one in answers]
        report(Stats.of_batch(stats, pair.batches), arguments.verbose)

    if arguments.interactive:
        bundled = pair.folder.resolve() == BUNDLED[0]
        number = count()  # asked again, a prompt has another answer
        converse(
            lambda prompt, before, roomy: answer(
                next(number), prompt, before=before, roomy=roomy
            ),
            write,
            figures,
            prefix=EXAMPLE_TASK if bundled else "",
            chat=arguments.chat,
            system=system,
            keep_turns=arguments.keep_turns,
        )
        return 0
    status = 0
    for number, (line, prompt, fault) in enumerate(read_prompts(arguments.prompt)):
        if arguments.prompt in (None, "-") and sys.stderr.isatty():
            # Bytes that were not UTF-8 are shown escaped; the answer names them.
            say("> " + prompt.encode("utf-8", "backslashreplace").decode())
        try:
            require_answerable(fault)
            answers = answer(number, prompt)
            write(answers)
        except PromptError as error:
            if line is None:
                raise
            say(f"{NAME}: line {line}: {one_line(str(error))}")
            status = 2
            continue
        if not arguments.json or arguments.verbose:
            figures(answers)
        if arguments.compare:
            compare(partial(answer, number, prompt), arguments.num_draft, pair.forget)
    return status

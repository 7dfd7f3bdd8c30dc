"""Answers on their way out, and their figures."""

import json
import os
import re
import sys
from argparse import Namespace
from typing import Any

from answering import Generation
from pair import require_text
from speculation.requests import Stats
from system.errors import InputError, blame_prompt, say

_DRAFTED, _RESET = "\x1b[32m", "\x1b[0m"  # green


def read_separator(text: str | None) -> str:
    """What goes after each answer.

    Raises:
        InputError: nothing, or what is no text.
    """
    if text is None:
        return "\n"
    if not text:
        raise InputError("the separator is empty; a NUL is written '\\0', in quotes")
    require_text(text, "the separator")
    escapes = {"n": "\n", "t": "\t", "0": "\0", "\\": "\\"}
    return re.sub(r"\\([nt0\\])", lambda found: escapes[found[1]], text)


def write_text(answer: Generation, color: bool, separator: str) -> None:
    """Stream the text to stdout, the draft's tokens in green if ``color``.

    Interrupted, what is out stays, on a line of its own.
    """
    green = started = False
    try:
        for piece in answer:
            if color and piece.drafted != green:
                green = piece.drafted
                print(_DRAFTED if green else _RESET, end="")
            print(piece.text, end="", flush=True)
            started = True
    except BaseException:
        if started:
            print(_RESET if green else "", flush=True)
        raise
    print(_RESET if green else "", end=separator, flush=True)


def write_json(answer: Generation, sample: int | None) -> None:
    """One object on stdout, with the keys that the README lists."""
    answer.finish()
    value = {"prompt": answer.prompt, **described(answer)}
    if sample is not None:
        value["sample"] = sample
    print(json_line(value), flush=True)


def described(answer: Generation) -> dict[str, Any]:
    """A finished answer as JSON has it."""
    score = {} if answer.score is None else {"score": answer.score}
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        **score,
        "stats": answer.stats.as_dict(),
    }


def json_line(value: dict[str, Any]) -> str:
    """An object on one line, whatever its texts are."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        return json.dumps(value)  # half a character, that no UTF-8 has
    # Some readers take these for the end of a line.
    for separator in "\x85\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text


def report(stats: Stats, verbose: bool) -> None:
    """The figures of a prompt's answers, in a block that a person reads."""
    say("")
    rounds = f"{stats.new_tokens} tokens in {stats.rounds} target passes"
    say(f"{rounds} ({stats.tokens_per_round:.2f} per pass)")
    _report_draft(stats, "judged")
    if stats.found:
        say(f"looked up: {stats.found_accepted} of {stats.found} of these")
    _report_rest(stats, verbose, "tokens")


def report_search(stats: Stats, verbose: bool) -> None:
    """The figures of a beam search, likewise: what is drafted are its steps."""
    say("")
    steps = stats.rounds + stats.accepted  # one of each round is the target's own
    per_pass = steps / stats.rounds if stats.rounds else 0.0
    say(
        f"{stats.new_tokens} tokens, by {steps} steps in {stats.rounds} target passes "
        f"({per_pass:.2f} per pass)"
    )
    _report_draft(stats, "judged steps")
    _report_rest(stats, verbose, "steps")


def _report_draft(stats: Stats, judged: str) -> None:
    if stats.alpha is not None:
        stood = f"{stats.accepted} of {stats.tested} {judged} stood"
        say(f"draft: {stood} (alpha {stats.alpha:.2f}), {stats.drafted} proposed")


def _report_rest(stats: Stats, verbose: bool, drafted: str) -> None:
    say(
        f"time: {stats.encode_seconds:.3f} s encoding, {stats.decode_seconds:.3f} s "
        f"decoding ({stats.tokens_per_second:.1f} tokens/s)"
    )
    say(f"memory: {stats.peak_memory_bytes / 1e6:.0f} MB at most")
    if verbose:
        say(f"rounds by draft {drafted} committed: {stats.accept_histogram}")
        if stats.sizes:
            say(f"draft {drafted} by round: {in_runs(stats.sizes)}")


def in_runs(sizes: list[tuple[int, int]]) -> str:
    """``[(0, 1), (5, 3)]`` as ``0, 5 x3``; the last of many."""
    shown = [
        str(size) if times == 1 else f"{size} x{times}" for size, times in sizes[-40:]
    ]
    return ", ".join([*(["..."] if len(sizes) > 40 else []), *shown])


class Writer:
    """Answers on stdout, as the flags ask for them."""

    def __init__(self, arguments: Namespace):
        self._json = arguments.json
        self._separator = read_separator(arguments.separator)
        terminal = sys.stdout.isatty()
        self._color = arguments.color and terminal and "NO_COLOR" not in os.environ
        # Whether a reader has to tell where an answer ends, and has only lines for it.
        self._lines = (
            not arguments.json
            and arguments.separator is None
            and (
                arguments.num_samples > 1
                or (arguments.num_return_sequences or 1) > 1
                or arguments.prompt == "-"
                or (arguments.interactive and not terminal)
            )
        )

    def __call__(self, answers: list[Generation]) -> None:
        """
        Raises:
            PromptError: they cannot be made.
        """
        for sample, one in enumerate(answers):
            with blame_prompt():
                if self._json:
                    write_json(one, sample if len(answers) > 1 else None)
                else:
                    write_text(one, self._color, self._separator)
            if self._lines and one.text and one.text.splitlines() != [one.text]:
                self._lines = False  # once is enough
                say(
                    "an answer has line breaks of its own: --json or --separator TEXT "
                    "show where the next one begins"
                )

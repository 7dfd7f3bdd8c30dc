"""What is to be answered: prompts as they come in."""

import sys
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from pair import Pair, require_text
from system.errors import InputError, PromptError
from text.messages import Messages

EXAMPLE_TASK = "translate English to German: "

EXAMPLE = EXAMPLE_TASK + "The children are playing in the garden."

#: Characters of a line; the longest prompts that models take have a million tokens.
MOST_CHARACTERS = 10_000_000

#: What UTF-8 may begin with: of a shell's "$(cat FILE)" it is left.
MARK = "\ufeff"

#: The marks that UTF-16 begins with, as bytes that are no UTF-8 are read.
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")


class Line(NamedTuple):
    """A prompt as it came in.

    Attributes:
        number: of the line of standard input; None for a flag's.
        fault: why it cannot be answered; None where nothing is known of that.
    """

    number: int | None
    prompt: str
    fault: str | None = None


def read_prompts(prompt: str | None) -> Iterator[Line]:
    """The prompts to answer, as they come in.

    Raises:
        InputError: standard input begins as UTF-16 does.
    """
    if prompt != "-":
        yield Line(None, EXAMPLE if prompt is None else prompt.removeprefix(MARK))
        return
    open_input()
    for number in count(1):
        line, fault = read_line()
        if not line:
            return
        if number == 1:
            check_start(line)
        if line.strip():
            yield Line(number, line.rstrip("\r\n"), fault)


def require_answerable(fault: str | None) -> None:
    """Raise a PromptError for a line that cannot be answered, for what :class:`Line`
    says."""
    if fault:
        raise PromptError(fault)


def read_line() -> tuple[str, str | None]:
    """A line of standard input, with its end, and why it cannot be answered.

    Of one that is too long, as an endless one is, the beginning. Nothing at the end.
    """
    size = MOST_CHARACTERS + 1  # with its end
    line = more = sys.stdin.readline(size)
    while len(more) == size and not more.endswith("\n"):
        more = sys.stdin.readline(size)
    fault = None
    if more is not line:
        line = line[:80]
        fault = too_long()
    return line, fault


def too_long() -> str:
    """Why a line with more characters than any may have cannot be answered."""
    return f"it has over {MOST_CHARACTERS:,} characters: shorten it"


def read_system(pair: Pair, chat: bool, text: str | None) -> Messages:
    """The messages that every conversation begins with.

    Raises:
        InputError: there is no chat template, or it has no place for the system's.
    """
    if chat:
        pair.tokenizer.require_chat()
    if text is None:
        return []
    require_text(text, "the system's message")
    system = [{"role": "system", "content": text}]
    try:
        pair.tokenizer.encode_chat([*system, {"role": "user", "content": "?"}])
    except PromptError as error:
        raise InputError(f"--system does not go with this model: {error}") from None
    return system


def open_input() -> None:
    """Have standard input read as UTF-8, without the mark that it may begin with.

    Bytes that are not UTF-8 are named as the prompt that they are in.
    """
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


def check_start(line: str, name: str = "standard input") -> None:
    """Raise an InputError for a first line that is UTF-16's or UTF-32's, as all the
    others are."""
    if line.startswith((*_UTF16, "\0\0\udcfe\udcff")):
        kind = "UTF-32" if "\0\0" in line[:4] else "UTF-16"
        raise InputError(
            f"{name} is {kind}, not UTF-8: convert it (iconv -f {kind} -t UTF-8)"
        )

"""What is to be answered: prompts as they come in."""

import sys
from collections.abc import Iterator

from pair import Pair, require_text
from system.errors import (
    InputError,
    PromptError,
)
from text.messages import Messages

EXAMPLE_TASK = "translate English to German: "

EXAMPLE = EXAMPLE_TASK + "The children are playing in the garden."


def read_prompts(prompt: str | None) -> Iterator[tuple[int | None, str]]:
    """The prompts to answer, as they come in, each with the line that it is of standard
    input.

    Raises:
        InputError: that begins as UTF-16 does.
    """
    if prompt != "-":
        yield None, EXAMPLE if prompt is None else prompt
        return
    open_input()
    for number, line in enumerate(sys.stdin, 1):
        if number == 1:
            check_start(line)
        if line.strip():
            yield number, line.rstrip("\r\n")


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


#: The marks that UTF-16 begins with, as bytes that are no UTF-8 are read.
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")


def open_input() -> None:
    """Have standard input read as UTF-8, without the mark that it may begin with.

    Bytes that are not UTF-8 are named as the prompt that they are in.
    """
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


def check_start(line: str) -> None:
    """Raise an InputError for a first line that is UTF-16's, as all the others are."""
    if line.startswith(_UTF16):
        raise InputError(
            "standard input is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)"
        )

"""The prompt loop of ``main.py --interactive``: a line in, an answer out."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from errors import InputError, one_line

if TYPE_CHECKING:
    from pair import Generation

HELP = """\
a line is a prompt; these are commands:
:stats         the figures of the last answer
:prefix TEXT   put TEXT before every line; alone, nothing
:new           begin another conversation (with --chat)
:q             leave, like Ctrl-D (Ctrl-C stops an answer)"""


def say(line: str) -> None:
    print(line, file=sys.stderr)


def converse(
    answer: Callable[[str, list[dict[str, str]]], list["Generation"]],
    write: Callable[[list["Generation"]], None],
    report: Callable[[list["Generation"]], None],
    prefix: str,
    chat: bool = False,
) -> None:
    """Read lines until the end of input and answer each.

    Args:
        answer: begins the answers to a prompt, after the messages before it.
        write: streams them out.
        report: says their figures.
        prefix: put before each line, until ``:prefix`` sets another.
        chat: whether a line goes on with the conversation, until ``:new``.
    """
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  (gives input() line editing and a history)
    # Bytes that are not UTF-8 are named as the prompt that they are in.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say(":help says what there is; Ctrl-D leaves")
        if prefix:
            say(f"before each line goes '{prefix}' (:prefix changes it)")
    last: list[Generation] | None = None
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print()  # the line that was begun is dropped, as in a shell
            continue
        command, _, argument = line.partition(" ")
        if line in (":q", ":quit"):
            return
        if not line:
            continue
        if line == ":stats":
            if last is None:
                say("nothing has been answered yet")
            else:
                report(last)
        elif command == ":prefix":
            prefix = f"{argument.strip()} " if argument.strip() else ""
        elif line == ":new":
            messages.clear()
        elif line == ":help":
            say(HELP)
        elif line.startswith(":"):
            say(f"there is no {command}: :help says what there is")
        else:
            try:
                current = answer(prefix + line, messages)
                try:
                    write(current)
                except KeyboardInterrupt:
                    say("stopped")
                last = current
                if chat and current[0].text.strip():  # the first of several goes on
                    messages.append({"role": "user", "content": prefix + line})
                    said = current[0].text
                    messages.append({"role": "assistant", "content": said})
            except InputError as error:
                say(one_line(str(error)))

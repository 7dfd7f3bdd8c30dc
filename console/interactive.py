"""The prompt loop of ``main.py --interactive``: a line in, an answer out."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from answering import Generation
from console.prompts import check_start, open_input, read_line
from system.errors import InputError, TooLongError, one_line, say
from text.messages import Messages

HELP = """\
a line is a prompt, spaces at its start included; one that begins with a colon is a
command, but not with a space before the colon:
:stats         the figures of the last answer
:prefix TEXT   put TEXT before every line; alone, nothing
:new           begin another conversation (with --chat)
:q             leave, like Ctrl-D (Ctrl-C stops an answer)"""


class Conversation:
    """What has been said, from the system's message on, as far as it is kept.

    Attributes:
        messages: those before the next one.
    """

    def __init__(self, system: Messages, keep_turns: int | None):
        """
        Args:
            system: what every conversation begins with.
            keep_turns: how many turns are not dropped for it to fit; None for all.
        """
        self._system = list(system)
        self._keep = keep_turns
        self.clear()

    def clear(self) -> None:
        """Forget all but the system's message."""
        self.messages = list(self._system)
        self._said = False

    def add(self, prompt: str, answer: str) -> None:
        """Go on with a turn: what was asked, and what was answered."""
        self.messages.append({"role": "user", "content": prompt})
        self.messages.append({"role": "assistant", "content": answer})

    def fit(self, respond: Callable[[Messages, bool], None]) -> None:
        """Call ``respond`` with the messages; while that is too much, with fewer.

        It is told whether there is something left to drop: then the answer has to have
        all the room that it may take.

        Raises:
            TooLongError: it is too much without all that may be dropped; nothing is.
        """
        first, dropped = len(self._system), 0
        while True:
            messages = self._system + self.messages[first + 2 * dropped :]
            turns = (len(messages) - first) // 2
            droppable = self._keep is not None and turns > self._keep
            try:
                respond(messages, droppable)
            except TooLongError as error:
                if droppable:
                    dropped += 1
                    continue
                if not turns:
                    raise
                advice = "or begin another conversation with :new"
                raise TooLongError(f"{error}, {advice}") from None
            if dropped and not self._said:
                self._said = True
                say("the conversation is too long: its oldest turns are dropped")
            self.messages = messages
            return


def converse(
    answer: Callable[[str, Messages, bool], list[Generation]],
    write: Callable[[list[Generation]], None],
    report: Callable[[list[Generation]], None],
    prefix: str,
    chat: bool = False,
    system: Messages = (),
    keep_turns: int | None = None,
) -> None:
    """Read lines until the end of input and answer each.

    Args:
        answer: begins the answers to a prompt, after the messages before it; and
            whether there has to be room for as many tokens as they may have.
        write: streams them out.
        report: says their figures.
        prefix: put before each line, until ``:prefix`` sets another.
        chat: whether a line goes on with the conversation, until ``:new``.
        system: the messages that each conversation begins with.
        keep_turns: of :class:`Conversation`.

    Raises:
        InputError: standard input is UTF-16.
    """
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  (gives input() line editing and a history)
    open_input()
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say(":help says what there is; Ctrl-D leaves")
        if prefix:
            say(f"before each line goes '{prefix}' (:prefix changes it)")
    talk = Talk(answer, write, report, prefix, chat, Conversation(system, keep_turns))
    first = True
    while True:
        try:
            line, fault = (input("> "), None) if terminal else read_line()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()  # the line that was begun is dropped, as in a shell
            continue
        if not line and not terminal:
            return
        if first:
            check_start(line)
            first = False
        if fault:
            say(fault)
        elif line.strip() and not talk.take(line.removesuffix("\n")):
            return


class Talk:
    """What lines do, one after the other."""

    def __init__(
        self,
        answer: Callable[[str, Messages, bool], list[Generation]],
        write: Callable[[list[Generation]], None],
        report: Callable[[list[Generation]], None],
        prefix: str,
        chat: bool,
        conversation: Conversation,
    ):
        """The arguments are those of :func:`converse`."""
        self._answer, self._write, self._report = answer, write, report
        self._prefix, self._chat = prefix, chat
        self._conversation = conversation
        self._last: list[Generation] | None = None

    def take(self, line: str) -> bool:
        """Do what a line asks for; False where that is to leave."""
        if line.startswith(":"):
            return self._command(line)
        prompt = self._prefix + line
        try:
            self._conversation.fit(partial(self._respond, prompt))
        except InputError as error:
            say(one_line(str(error)))
            return True
        text = self._last[0].text  # the first of several goes on
        if self._chat and text.strip():
            self._conversation.add(prompt, text)
        return True

    def _command(self, line: str) -> bool:
        command, _, argument = line.rstrip().partition(" ")
        argument = argument.strip()
        if command == ":prefix":
            self._prefix = f"{argument} " if argument else ""
            return True
        if argument or command not in (":q", ":quit", ":stats", ":new", ":help"):
            say(f"there is no {one_line(line)}: :help says what there is")
        elif command == ":stats" and self._last is None:
            say("nothing has been answered yet")
        elif command == ":stats":
            self._report(self._last)
        elif command == ":new":
            self._conversation.clear()
        elif command == ":help":
            say(HELP)
        else:
            return False
        return True

    def _respond(self, prompt: str, messages: Messages, roomy: bool) -> None:
        current = self._answer(prompt, messages, roomy)
        try:
            self._write(current)
        except KeyboardInterrupt:
            say("stopped")
        self._last = current

"""The prompt loop, from a pipe and in a terminal."""

import fast_blas  # noqa: F401  (before mlx: see there)

import os
import pty
import select
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import HANG

import main
from pair import Pair

PROMPT = "the cat on"


@pytest.fixture(scope="module")
def command(make):
    models = ["--model", str(make()[2]), "--draft-model", str(make(noise=0.05)[2])]
    return [sys.executable, main.__file__, *models, "--interactive"]


def text_of(make, prompt: str, max_tokens: int) -> str:
    pair = Pair.load(str(make()[2]), str(make(noise=0.05)[2]))
    return pair.generate(prompt, max_tokens=max_tokens).finish().text


def test_from_a_pipe(command, make):
    """Answers alone on stdout; a bad line is answered and the loop goes on."""
    lines = [":stats", PROMPT, "", ":stats", ":nothing", ":prefix the cat", "on", ":q"]
    done = subprocess.run(
        [*command, "--max-tokens", "12"],
        input="\n".join([*lines, "after"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{text_of(make, PROMPT, 12)}\n" * 2
    assert "nothing has been answered" in done.stderr
    assert "12 tokens in" in done.stderr
    assert "no :nothing" in done.stderr


def test_errors_do_not_end_it(command):
    done = subprocess.run(
        [*command, "--max-tokens", "4"],
        input=f"\udcff\n{PROMPT}\n".encode("utf-8", "surrogateescape"),
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert b"not valid UTF-8" in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("flags", [["--prompt", "x"], ["--compare"]])
def test_what_it_does_not_go_with(command, flags):
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--interactive" in done.stderr


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, command: list[str]):
        self._own, theirs = pty.openpty()
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environment,
            preexec_fn=self._control,
        )
        os.close(theirs)
        self.seen = ""
        self._expected = 0

    @staticmethod
    def _control() -> None:
        """Make the terminal the one whose Ctrl-C reaches the program."""
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def expect(self, text: str) -> None:
        """Wait for a text that comes after those expected before."""
        while text not in self.seen[self._expected :]:
            self.read()
        self._expected = self.seen.index(text, self._expected) + len(text)

    def read(self) -> None:
        ready, _, _ = select.select([self._own], [], [], HANG)
        assert ready, f"nothing came after: {self.seen}"
        some = os.read(self._own, 1000)
        if not some:
            raise OSError("closed")
        self.seen += some.decode(errors="replace")

    def wait_for_readline(self) -> None:
        """Until the program waits for a line: its prompt is out before that, and a
        signal between the two is not seen."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():  # no Linux
            time.sleep(1)
        else:
            while "State:\tS" not in status.read_text():
                time.sleep(0.01)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


def test_in_a_terminal(command):
    """Ctrl-C stops an answer, then drops a line; Ctrl-D ends with status 0."""
    with closing(Terminal([*command, "--max-tokens", "100000"])) as terminal:
        talk(terminal)


def talk(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type(PROMPT + "\n")
    terminal.expect("\n")
    echoed = len(terminal.seen)
    while len(terminal.seen) < echoed + 40:  # the answer streams
        terminal.read()
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect("> ")
    terminal.wait_for_readline()
    terminal.type("half a li\x03")
    terminal.expect("> ")
    terminal.type(":stats\n")
    terminal.expect("tokens in")
    terminal.expect("> ")
    terminal.type("\x04")
    with suppress(OSError):  # the other side has closed
        while True:  # some systems keep a process that has output left
            terminal.read()
    assert terminal.process.wait(timeout=HANG) == 0
    assert "Traceback" not in terminal.seen

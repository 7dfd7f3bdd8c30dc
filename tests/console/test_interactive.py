"""The prompt loop, from a pipe and in a terminal."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HANG, VOCABULARY, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import main
from console import interactive
from pair import Pair
from system.errors import TooLongError

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


def test_a_mark_at_the_start(command):
    """Of UTF-8 it is no part of a line; after UTF-16's nothing can be read."""
    for raw, status, said in (
        (b"\xef\xbb\xbf:q\n", 0, b""),
        ("\ufeffthe cat\n".encode("utf-16-le"), 2, b"is UTF-16, not UTF-8"),
    ):
        done = subprocess.run([*command], input=raw, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (status, b""), done.stderr
        assert said in done.stderr


@pytest.fixture
def talk_to(monkeypatch, capsys):
    """Type lines: what was asked, each with the messages before it, and stderr.

    An answer is the question in capitals; what is longer than ``limit`` characters in
    all is too long.
    """

    def run(*lines: str, limit: int = 1000, **options):
        asked = []

        def answer(prompt, before, roomy):
            return [SimpleNamespace(text=prompt.upper(), before=before, prompt=prompt)]

        def write(current):
            (one,) = current
            size = sum(len(each["content"]) for each in one.before) + len(one.prompt)
            if size > limit:
                raise TooLongError("the prompt is too long: shorten it")
            asked.append((one.prompt, [each["content"] for each in one.before]))

        raw = io.BytesIO("\n".join(lines).encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(raw))
        interactive.converse(
            answer, write, lambda _: None, **({"prefix": ""} | options)
        )
        return asked, capsys.readouterr().err

    return run


def test_spaces_at_the_start_are_the_prompts(talk_to):
    """So a command begins with its colon."""
    lines = [
        "    return",
        " :q",
        "  ",
        "\t:new ",
        ":help ",
        ":prefix  a b ",
        " c",
        ":q ",
    ]
    asked, err = talk_to(*lines, "after")
    prompts = [prompt for prompt, _ in asked]
    assert prompts == ["    return", " :q", "\t:new ", "a b  c"]
    assert interactive.HELP in err
    assert "no :news" in talk_to(":news now")[1]


SYSTEM = [{"role": "system", "content": "s"}]


def test_a_conversation_with_a_system_message(talk_to):
    """It is there from the first line on, and after :new."""
    asked, _ = talk_to("a", "b", ":new", "c", chat=True, system=SYSTEM)
    assert asked == [("a", ["s"]), ("b", ["s", "a", "A"]), ("c", ["s"])]


def test_a_conversation_that_is_too_long(talk_to):
    """Without --keep-turns nothing is dropped: it is said what to do."""
    lines = ["aaaa", "bbb", "c", ":new", "c", "ddddddddddd"]
    asked, err = talk_to(*lines, limit=10, chat=True)
    assert asked == [("aaaa", []), ("c", ["aaaa", "AAAA"]), ("c", [])]
    said = "shorten it, or begin another conversation with :new\n"
    assert err.count(said) == 2
    err = talk_to("e" * 11, limit=10, chat=True)[1]
    assert err == "the prompt is too long: shorten it\n"


def test_turns_that_are_dropped(talk_to):
    """The oldest, as many as it takes, but not the last ones and not the system's."""
    lines = ["aa", "bb", "cc", "dd", "eeeeee"]
    options = {"limit": 11, "chat": True, "system": SYSTEM}
    asked, err = talk_to(*lines, keep_turns=1, **options)
    assert asked == [
        ("aa", ["s"]),
        ("bb", ["s", "aa", "AA"]),
        ("cc", ["s", "aa", "AA", "bb", "BB"]),
        ("dd", ["s", "bb", "BB", "cc", "CC"]),
        ("eeeeee", ["s", "dd", "DD"]),
    ]
    assert err.count("oldest turns are dropped") == 1
    asked, err = talk_to(*lines[:3], "f" * 9, "g", keep_turns=1, **options)
    assert ":new" in err
    assert asked[-1] == ("g", ["s", "bb", "BB", "cc", "CC"])
    asked, err = talk_to(*lines[:3], "f" * 9, keep_turns=0, **options)
    assert asked[-1] == ("f" * 9, ["s"])
    assert ":new" not in err


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system here') }}{% endif %}{{ m.content }} {% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture
def chatting(tmp_path, call, monkeypatch, confined_here):
    """Chat with a tiny Llama of 30 positions: (status, prompts of the answers, err)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=1,
        max_position_embeddings=30,
        eos_token_id=1,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def run(lines: bytes, *flags: str, template: str = PLAIN):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        models = ["--model", tmp_path, "--draft-model", "none", "--max-tokens", "3"]
        suppressed = ["--suppress-tokens", "1", *map(str, range(14, 96))]
        more = ["--chat", "--json", *suppressed, *flags]
        status, out, err = call(*models, *more)
        return status, [json.loads(line)["prompt"] for line in out.splitlines()], err

    return run


def test_a_conversation_beyond_the_positions(chatting):
    lines = b"the cat sat on the cat sat\n" * 4 + b":new\nthe cat\n"
    _, answered, err = chatting(lines, "--interactive")
    assert len(answered) < 5
    assert "begin another conversation with :new" in err
    _, answered, err = chatting(lines, "--interactive", "--keep-turns", "1")
    assert len(answered) == 5, err
    assert err.count("oldest turns are dropped") == 1
    _, answered, err = chatting(b"the cat " * 20 + b"\nthe\n", "--prompt", "-")
    assert answered == ["the"]
    assert err.startswith("main.py: line 1: the prompt has ")


def test_system_messages(chatting):
    """They go before what is asked, and a template may have no place for them."""
    asked = ("--prompt", "the cat")
    for flags in (["--system", "on on"], ["--system", ""]):
        assert chatting(b"", *asked, *flags)[:2] == (0, ["the cat"])
    long = ("--system", "the cat " * 20)
    status, _, err = chatting(b"", *asked, *long)
    assert status == 2 and "positions for 30" in err
    status, _, err = chatting(b"", *asked, "--system", "x", template=STRICT)
    assert (status, err.count("\n")) == (2, 1)
    assert "--system does not go with this model" in err
    assert "no system here" in err
    assert chatting(b"", *asked, template=STRICT)[0] == 0
    assert "not valid UTF-8" in chatting(b"", *asked, "--system", "\udcff")[2]


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
    terminal.wait_for_readline()  # else Ctrl-C may come when the line still waits
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


def test_dropping_turns_leaves_room_for_the_answer():
    """All that may be dropped is, before an answer is cut short; then it is cut."""
    asked = []

    def respond(messages, roomy):
        asked.append((len(messages) // 2, roomy))
        if len(messages) > 4 or (roomy and len(messages) > 2):
            raise TooLongError("too long")

    for keep, expected in (
        (0, [(3, True), (2, True), (1, True)]),
        (2, [(3, True), (2, False)]),
        (3, [(3, False)]),
    ):
        conversation = interactive.Conversation([], keep)
        for turn in range(3):
            conversation.add(f"q{turn}", f"a{turn}")
        asked.clear()
        if keep == 3:
            with pytest.raises(TooLongError, match="with :new"):
                conversation.fit(respond)
        else:
            conversation.fit(respond)
        assert asked == expected


def test_new_is_no_advice_for_a_line_that_is_too_long_alone():
    def respond(messages, roomy):
        raise TooLongError("too long")

    conversation = interactive.Conversation([], 0)
    conversation.add("q", "a")
    with pytest.raises(TooLongError, match=r"^too long$"):
        conversation.fit(respond)

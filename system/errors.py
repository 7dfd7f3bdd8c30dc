"""Bad input ends in one line on stderr and exit status 2: the whole mechanism.

Whatever the user can cause (a flag, a file, a checkpoint) is raised as
:class:`InputError`, with a message that says what is wrong and what to do.
Anything else that escapes is a defect of this program and keeps its traceback.
"""

import argparse
import atexit
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any, NoReturn, TextIO

#: Characters of a message.
LENGTH = 600

#: How allocators say that there is no memory: MLX's, CUDA's, C++'s.
_NO_MEMORY = re.compile(r"malloc|bad_alloc|out of memory|allocate", re.IGNORECASE)
#: How MLX says that another rank is gone, and seconds in which that is noticed and said
#: where it is known which (:mod:`system.ranks`).
_GONE = re.compile(r"\[(ring|jaccl|nccl|mpi)\]", re.IGNORECASE)
_NOTICED = 5.0


class InputError(Exception):
    """Something the user gave is wrong; the message says what to do about it."""


class PromptError(InputError):
    """It is the prompt, or what became of it: another prompt may be answered."""


class TooLongError(PromptError):
    """The prompt is too long, for the model's positions or for the memory; nothing has
    been computed. A shorter one may be answered."""


class NoRoomError(TooLongError):
    """It is the memory, with all that is in it now."""


class Parser(argparse.ArgumentParser):
    """``argparse`` with its errors in one line: no usage dump."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for given in sys.argv[1:] if args is None else args:
            if given.startswith("--") and given.endswith("=--"):
                # Python below 3.13 makes an empty list of it.
                self.error(f"'--' is no value of {given.removesuffix('=--')}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: TextIO | None = None) -> None:
        """To stdout; ``argparse`` itself says nothing of a disk that is full."""
        print(self.format_help(), end="", file=file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Done(status)


class _Done(SystemExit):
    """There is nothing more to do, as after --help."""


def say(line: str) -> None:
    """A line for the person, not for the pipe; lost where stderr takes none."""
    _voice.say(line)


def _write(line: str) -> None:
    with suppress(OSError):
        # In one piece: a thread may say something meanwhile.
        sys.stderr.write(f"{line}\n")


class _Voice:
    """By what a line is said, and by what why the program fails."""

    def __init__(self) -> None:
        self.say: Callable[[str], None] = _write
        self.fail: Callable[[str], None] | None = None


_voice = _Voice()

#: When Python last came to a Ctrl-C (``time.monotonic``): not while a library computes.
interrupts: list[float] = [0.0]


def speak_by(say: Callable[[str], None], fail: Callable[[str], None]) -> None:
    """Have lines said by another process than this one.

    Args:
        fail: is told why the program ends, which is said without its name.
    """
    _voice.say, _voice.fail = say, fail


def _fail(name: str, reason: str) -> None:
    """Say why the program ends."""
    if _voice.fail:
        _voice.fail(reason)
    else:
        say(f"{name}: {one_line(reason)}")


@contextmanager
def blame_prompt() -> Iterator[None]:
    """Whatever input error happens inside is the prompt's, and so is a lack of memory.

    Raises:
        PromptError: instead of those.
    """
    try:
        yield
    except PromptError:
        raise
    except InputError as error:
        raise PromptError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise PromptError(_no_memory(error)) from None


def _is_memory(error: Exception) -> bool:
    """Whether there was no memory: MLX has no exception of its own for that."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def _no_memory(error: Exception) -> str:
    reason = str(error) or type(error).__name__
    return f"no memory is left ({reason}): shorten the prompt, or take a smaller model"


#: What is done when the process ends, by :func:`leave` too.
_last: list[Callable[[], object]] = []


def at_end(do: Callable[[], object]) -> None:
    """Have something done when the process ends, in whatever order; once or twice."""
    _last.append(do)
    atexit.register(do)


def leave(status: int) -> NoReturn:
    """End the process with what it has written, and nothing of it taken down."""
    for do in _last:
        do()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def run(main: Callable[[], int | None], name: str) -> int:
    """Call ``main`` and return the exit status that a command line should have.

    0 when it returns, or what it returns, also when whoever read our output stopped
    reading; 2 with one line on stderr for an :class:`InputError`, for files, disks and
    memory that fail, and for a library that ends the program; 130 after Ctrl-C.
    """
    status = 0
    interrupted = False

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        interrupts[0] = time.monotonic()
        if not _has(frame, lambda code: code is _answer.__code__):
            return  # it is over: a second Ctrl-C has nothing to interrupt
        if _has(frame, lambda code: code.co_filename.startswith("<frozen importlib")):
            # Extensions abort when they are interrupted as they are made, and there
            # is nothing to clean up.
            os._exit(130)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        status = _answer(main)
    except InputError as error:
        _fail(name, str(error))
        status = 2
    except SystemExit as error:  # a library's, of which no user is to know
        _fail(name, f"a library ended the program: {error.code}")
        status = 2
    except (MemoryError, RuntimeError) as error:
        if _is_memory(error):
            _fail(name, _no_memory(error))
        elif _GONE.search(str(error)):
            time.sleep(_NOTICED)
            _fail(name, f"another rank is gone: {error}")
        else:
            raise
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        _fail(name, str(error))
        status = 2
    except ImportError:
        # A library that is being imported makes an error of its own of a Ctrl-C.
        if not interrupted:
            raise
        status = 130
    finally:
        signal.signal(signal.SIGINT, before)
    _settle_device()
    return status


def _answer(main: Callable[[], int | None]) -> int:
    """What ``main`` returns, once all that it printed is out."""
    try:
        status = main() or 0
    except _Done as done:
        status = done.code
    sys.stdout.flush()
    return status


def _has(frame: FrameType | None, wanted: Callable[[CodeType], bool]) -> bool:
    """Whether code that is wanted is being run by :func:`run` where ``frame`` is."""
    while frame is not None and frame.f_code is not run.__code__:
        if wanted(frame.f_code):
            return True
        frame = frame.f_back
    return False


def one_line(message: str) -> str:
    """A message fit for a terminal, whatever a stranger's file put into it.

    One line, not endless, and without the escape sequences that terminals obey.
    """
    words = " ".join(message.split())
    if len(words) > LENGTH:
        words = f"{words[: LENGTH // 2]} ... {words[-LENGTH // 2 :]}"
    return "".join(c if c.isprintable() else f"\\x{_byte(c):02x}" for c in words)


def _byte(character: str) -> int:
    """A character's number; of one that stands for a byte, which is no text, that."""
    number = ord(character)
    return number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else number


def _drop_stdout() -> None:
    """Give the interpreter's last flush somewhere to go: stdout takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settle_device() -> None:
    """Wait for work in flight: MLX can abort a process that exits under it."""
    mlx = sys.modules.get("mlx.core")
    if mlx is not None:
        mlx.synchronize()

"""Bad input ends in one line on stderr and exit status 2: the whole mechanism.

Whatever the user can cause (a flag, a file, a checkpoint) is raised as
:class:`InputError`, with a message that says what is wrong and what to do.
Anything else that escapes is a defect of this program and keeps its traceback.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

#: Characters of a message.
LENGTH = 600


class InputError(Exception):
    """Something the user gave is wrong; the message says what to do about it."""


class Parser(argparse.ArgumentParser):
    """``argparse`` with its errors in one line: no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], None], name: str) -> int:
    """Call ``main`` and return the exit status that a command line should have.

    0 when it returns, also when whoever read our output stopped reading; 2 with
    one line on stderr for an :class:`InputError` and for files and disks that fail;
    130 after Ctrl-C.
    """
    status = 0
    interrupted = False

    def interrupt(*_: object) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"{name}: {one_line(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        print(f"{name}: {one_line(str(error))}", file=sys.stderr)
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


def one_line(message: str) -> str:
    """A message fit for a terminal, whatever a stranger's file put into it.

    One line, not endless, and without the escape sequences that terminals obey.
    """
    words = " ".join(message.split())
    if len(words) > LENGTH:
        words = f"{words[: LENGTH // 2]} ... {words[-LENGTH // 2 :]}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in words)


def _drop_stdout() -> None:
    """Give the interpreter's last flush somewhere to go: stdout takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settle_device() -> None:
    """Wait for work in flight: MLX can abort a process that exits under it."""
    mlx = sys.modules.get("mlx.core")
    if mlx is not None:
        mlx.synchronize()

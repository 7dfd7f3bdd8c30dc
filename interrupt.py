"""Ctrl-C from the first moment on: a program that a person runs imports this first.

Python answers it with a traceback of whatever was being imported, and libraries turn it
into errors of their own. Until errors.run takes over there is nothing to clean up: the
program just ends, with the status of an interrupted one.

Not for a module that others import, and importing next to nothing itself.
"""

import os
import signal


def leave(*_: object) -> None:
    """End at once."""
    os._exit(130)  # 128 and the signal's number


# Where it is ignored (nohup), it stays so.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)

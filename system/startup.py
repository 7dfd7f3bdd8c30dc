"""What a program that a person runs imports before anything else.

Ctrl-C from the first moment on: Python answers it with a traceback of whatever was
being imported, and libraries turn it into errors of their own. Until errors.run takes
over there is nothing to clean up: the program just ends, as an interrupted one.

A current folder that has been deleted is said, as MKL would say something else.

Streams that are closed (cron, ``>&-``) become the null device: else the next file that
is opened takes their number, and gets what is meant for a person.

Not for a module that others import, and importing next to nothing itself.
"""

import _signal as signal  # the module around it imports others, for 10 ms
import atexit
import os
import sys


def leave(*_: object) -> None:
    """End at once."""
    os._exit(130)  # 128 and the signal's number


# Where it is ignored (nohup), it stays so.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
    # Registered first, called last: everything is out, and taking large libraries down
    # lasts a while, in which Python would have it kill the process.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

try:
    os.getcwd()  # noqa: PTH109  (pathlib takes longer to import than all else here)
except OSError:  # libraries end the process, with a reason that is none
    line = f"{sys.argv[0].rpartition('/')[2]}: the current folder is gone: leave it\n"
    if sys.stderr is not None:
        sys.stderr.write(line)
    os._exit(2)

for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)
        mode = "r" if number == 0 else "w"
        # Python's own stderr takes any character, whatever the locale says.
        null = os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace")
        setattr(sys, name, null)

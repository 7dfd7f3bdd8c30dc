"""Check on this machine that the program is exact, and how fast: one report of it.

    python check.py [--quick] [--fresh]

What it does is in ``checking/``. This file is short so that Python has read it at once:
from there on Ctrl-C is clean.
"""

if __name__ == "__main__":
    import system.startup  # noqa: F401  (first: see there)

import os
import sys
from contextlib import suppress

from system.errors import run


def main() -> int:
    """Check as the command line says; the exit status."""
    from checking import program

    return program.main()


if __name__ == "__main__":
    status = run(main, "check.py")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # A section's result is out: what MLX or PyTorch do as they are taken down is none.
    os._exit(status)

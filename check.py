"""Check on this machine that the program is exact, and how fast: one report of it.

    python check.py [--quick] [--fresh]

What it does is in ``checking/``. This file is short so that Python has read it at once:
from there on Ctrl-C is clean.
"""

if __name__ == "__main__":
    import system.startup  # noqa: F401  (first: see there)

from system.errors import leave, run


def main() -> int:
    """Check as the command line says; the exit status."""
    from checking import program

    return program.main()


if __name__ == "__main__":
    # A section's result is out: what MLX or PyTorch do as they are taken down is none.
    leave(run(main, "check.py"))

"""Generate text with T5, several tokens per pass of the large model.

    python main.py --model t5-11b --draft-model t5-small --prompt TEXT

A small draft model proposes tokens and the large target model checks them all at once:
the text is what the target alone would write. Text goes to stdout, all else to stderr.

What it does is in ``console/``. This file is short so that Python has read it at once:
from there on Ctrl-C is clean.
"""

if __name__ == "__main__":
    import system.startup  # noqa: F401  (first: see there)

import sys

from system.errors import run


def main() -> int:
    """Answer as the command line says; the exit status."""
    from console import program

    return program.main()


if __name__ == "__main__":
    sys.exit(run(main, "main.py"))

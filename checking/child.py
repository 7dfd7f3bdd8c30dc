"""A section in a process of its own: its task comes in, its result goes out."""

import importlib
import json
import os
import sys

from checking.task import SECTIONS, Task
from system.errors import InputError


def main(name: str) -> int:
    """Read a task from stdin, and write the section's result to stdout, a JSON object a
    line: whenever there is more of it, all that there is. The last one counts.

    Raises:
        InputError: there is no such section, or it says so.
    """
    if name not in SECTIONS:
        raise InputError(f"there is no section {name}")
    # Libraries print what they like: that is for whoever reads stderr.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = Task(**json.load(sys.stdin))
    from checking import footprint

    section = importlib.import_module(f"checking.{name}").section
    with results:
        for result in section(task):
            line = json.dumps({**result, "footprint": footprint.now()})
            results.write(f"{line}\n")
            results.flush()
    return 0

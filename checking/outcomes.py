"""A plugin of pytest's: each test's outcome in a file as it comes, and no test twice.

    pytest -p checking.outcomes --outcomes FILE [--reached FILE]

It works with xdist's workers as without. A line of the file is a JSON object:
``tests``, how many were collected, once for each process that did; else ``id`` and
``outcome`` ("passed", "failed" or "skipped"), and the reason of a failure as ``why``.
Tests that the other file names, an id in each line, are not run.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Characters of a reason.
_REASON = 300


def pytest_addoption(parser: Any) -> None:
    """Two flags, which the workers get as well."""
    parser.addoption("--outcomes", metavar="FILE")
    parser.addoption("--reached", metavar="FILE")


def pytest_configure(config: Any) -> None:
    """Listen, where the flag is given."""
    if config.getoption("outcomes"):
        config.pluginmanager.register(_Outcomes(config), "check-outcomes")


class _Outcomes:
    """What writes them."""

    def __init__(self, config: Any):
        self._path = Path(config.getoption("outcomes"))
        reached = config.getoption("reached")
        self._reached = set(
            Path(reached).read_text("utf-8").split("\n") if reached else ()
        )

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out what was reached before. Every worker comes to the same."""
        self._write({"tests": len(items)})
        gone = [item for item in items if _line(item.nodeid) in self._reached]
        items[:] = [item for item in items if _line(item.nodeid) not in self._reached]
        if gone:
            config.hook.pytest_deselected(items=gone)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test is over. What a worker says, who started it says again, and
        of a worker that crashed it alone says so."""
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"id": _line(report.nodeid), "outcome": report.outcome}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = getattr(crash, "message", None) or str(report.longrepr)
            line["why"] = " ".join(why.split())[:_REASON]
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        # In one piece, as workers write as well.
        with self._path.open("ab", buffering=0) as file:
            file.write(f"{json.dumps(line)}\n".encode())


def _line(name: str) -> str:
    """An id without line feeds."""
    return name.replace("\n", " ")


def read(text: str, before: dict[str, Any]) -> dict[str, Any]:
    """What a file has of outcomes, with those that were there before.

    Args:
        before: what this returned for an earlier file, or nothing.

    Returns:
        ``tests``, how many there are, None while nobody knows; ``passed`` and
        ``skipped``, ids; ``failed``, reasons by ids. An id is in one of them: a test
        whose end fails after it passed has failed.
    """
    outcomes = dict.fromkeys(before.get("passed", ()), "passed")
    outcomes |= dict.fromkeys(before.get("skipped", ()), "skipped")
    failed = dict(before.get("failed", {}))
    tests = before.get("tests")
    for line in _objects(text.split("\n")):
        if "tests" in line:
            tests = line["tests"]
        elif line["outcome"] == "failed":
            outcomes.pop(line["id"], None)
            failed.setdefault(line["id"], line.get("why", ""))
        elif line["id"] not in failed:
            outcomes[line["id"]] = line["outcome"]
    ids = {
        outcome: [name for name, its in outcomes.items() if its == outcome]
        for outcome in ("passed", "skipped")
    }
    return {"tests": tests, **ids, "failed": failed}


def _objects(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """What is whole: whoever wrote it may have been ended."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue

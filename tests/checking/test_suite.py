"""The test suite as a section: each test's outcome, what was not reached, going on."""

import time

import pytest

from checking import outcomes, suite
from checking.task import Task

TESTS = """\
import os, signal, time
import pytest

def note(name):
    with open({log!r}, "a") as file:
        file.write(name + "\\n")

@pytest.mark.parametrize("n", [1, 2, 3])
def test_good(n):
    note(f"good {{n}}")

def test_bad():
    note("bad")
    assert 1 == 2, "one is\\nnot two"

@pytest.mark.skip
def test_skipped():
    note("skipped")

@pytest.fixture
def fragile():
    yield
    raise RuntimeError("it broke")

def test_ends_badly(fragile):
    note("ends badly")

@pytest.fixture
def broken():
    raise RuntimeError("it was broken")

def test_begins_badly(broken):
    note("begins badly")
"""

GOOD = [f"test_it.py::test_good[{n}]" for n in (1, 2, 3)]
FAILED = ["test_bad", "test_ends_badly", "test_begins_badly"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Some tests; what was run is in its ``log``."""
    monkeypatch.setattr(suite, "_OFTEN", 0.0)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take a second
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    here = tmp_path / "here"
    here.mkdir()
    (here / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    text = TESTS.format(log=str(tmp_path / "log"))
    (here / "test_it.py").write_text(text)
    return here


def run(folder, before=None, seconds=900.0, count=2):
    """The last result, and what was run for it."""
    log = folder.parent / "log"
    log.write_text("")
    task = Task(True, seconds, before)
    *_, last = suite.results(task, folder, count)
    return last, sorted(log.read_text().splitlines())


CRASHES = "\ndef test_crashes():\n    os.kill(os.getpid(), signal.SIGABRT)\n"


@pytest.mark.parametrize("count", [0, 2])
def test_outcomes(folder, count):
    """By id, without workers and with; each test was run once. A worker that crashes is
    a test that failed."""
    crashes = ["test_crashes"] if count else []
    if count:
        with (folder / "test_it.py").open("a") as file:
            file.write(CRASHES)
    last, ran = run(folder, count=count)
    assert last["complete"] and last["tests"] == 7 + len(crashes)
    assert sorted(last["passed"]) == GOOD
    assert last["skipped"] == ["test_it.py::test_skipped"]
    names = sorted(f"test_it.py::{name}" for name in FAILED + crashes)
    assert sorted(last["failed"]) == names
    assert "one is not two" in last["failed"]["test_it.py::test_bad"]
    assert "it broke" in last["failed"]["test_it.py::test_ends_badly"]
    assert not count or "crashed" in last["failed"]["test_it.py::test_crashes"]
    assert ran == ["bad", "ends badly", "good 1", "good 2", "good 3"]
    assert "said" not in last


def test_what_was_reached_is_not_run_again(folder):
    before = {
        "tests": 7,
        "passed": GOOD[:2],
        "skipped": ["test_it.py::test_skipped"],
        "failed": {"test_it.py::test_bad": "as it was"},
    }
    last, ran = run(folder, before, count=0)
    assert ran == ["ends badly", "good 3"]
    assert last["tests"] == 7 and last["complete"]
    assert sorted(last["passed"]) == GOOD
    assert last["failed"]["test_it.py::test_bad"] == "as it was"
    assert len(last["failed"]) == 3
    last, ran = run(folder, last, count=0)  # nothing is left, which is no fault
    assert ran == [] and last["complete"] and "said" not in last


def test_where_the_time_is_over_it_is_ended(folder):
    """With what came by then; none of it is lost."""
    text = (folder / "test_it.py").read_text()
    text += "\ndef test_that_hangs():\n    note('hangs')\n    time.sleep(9999)\n"
    (folder / "test_it.py").write_text(text)
    log, results = folder.parent / "log", []
    task = Task(True, 900.0)
    for result in suite.results(task, folder, 0):
        results.append(result)
        if log.exists() and "hangs" in log.read_text():
            task.seconds = 0.0
    found = results[-1]
    assert not found["complete"] and found["tests"] == 8
    assert sorted(found["passed"]) == GOOD and len(found["failed"]) == 3
    assert not any("hangs" in name for name in found["passed"])


def test_where_it_does_not_even_begin_it_says_why(folder):
    (folder / "conftest.py").write_text("import nothing_by_this_name\n")
    last, _ = run(folder, count=0)
    assert "nothing_by_this_name" in last["said"]
    assert not last["complete"] and last["tests"] is None


def test_without_what_it_needs_it_is_not_begun(monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "torch" else 1)
    assert list(suite.section(Task(True, 9.0))) == [
        {"installed": False, "missing": ["torch"]}
    ]


@pytest.mark.parametrize(
    "free, cores, count",
    [(None, 8, 8), (100e9, 8, 8), (7e9, 8, 3), (1e9, 8, 1), (9e9, None, 1)],
)
def test_workers_have_a_core_and_memory(monkeypatch, free, cores, count):
    monkeypatch.setattr(suite.memory, "free", lambda: free and int(free))
    monkeypatch.setattr(suite.os, "cpu_count", lambda: cores)
    assert suite.workers() == count


def test_lines_that_are_half_written_are_none():
    text = '{"tests": 3}\n{"id": "a", "outcome": "passed"}\n{"id": "b", "outc'
    found = outcomes.read(text, {})
    assert found == {"tests": 3, "passed": ["a"], "skipped": [], "failed": {}}


def test_a_task_knows_what_is_left():
    task = Task(True, 50.0, began=time.monotonic() - 60)
    assert task.left <= -10

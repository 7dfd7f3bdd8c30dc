"""The test suite's own result on this device, as far as the time goes."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checking import outcomes
from checking.task import Task
from system import memory

PROJECT = Path(__file__).resolve().parents[1]

#: What the suite cannot begin without; what single tests need as well, they say.
NEEDED = (
    *("pytest", "xdist", "hypothesis", "torch", "transformers", "mlx_lm", "uvicorn"),
    *("starlette", "openai"),
)
#: Bytes that a worker may take.
WORKER = 2_000_000_000
#: Seconds between two looks, and between two results.
_PAUSE, _OFTEN = 0.2, 3.0
#: Seconds in which pytest has to end when it is told to.
_END = 2.0
#: Its last lines, where it failed before any test.
_LINES = 8


def section(task: Task) -> Iterator[dict[str, Any]]:
    """The tests that are left, each once."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        yield {"installed": False, "missing": missing}
        return
    yield from results(task, PROJECT, workers())


def workers() -> int:
    """As many as there are cores, and memory for them."""
    free = memory.free()
    most = os.cpu_count() or 1
    return max(1, most if free is None else min(most, free // WORKER))


def results(task: Task, folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Run pytest in a folder; what has come of it so far, every few seconds.

    ``complete`` says whether it came to its end, ``said`` what it ended with where that
    was neither tests that passed nor tests that failed.
    """
    before = task.before or {}
    with tempfile.TemporaryDirectory() as temporary:
        log, reached = Path(temporary, "outcomes"), Path(temporary, "reached")
        log.touch()
        names = (before.get(each, ()) for each in ("passed", "skipped", "failed"))
        reached.write_text("\n".join(name for its in names for name in its), "utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "checking.outcomes"]
        # (In one word each, or it would look for tests there.)
        command += [f"--outcomes={log}", f"--reached={reached}"]
        command += ["-p", "no:cacheprovider", f"--numprocesses={count}", "--tb=short"]

        def result(complete: bool = False, said: str | None = None) -> dict[str, Any]:
            found = outcomes.read(log.read_text("utf-8", "replace"), before)
            about = {"installed": True, "workers": count, "complete": complete}
            return about | found | ({"said": said} if said else {})

        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
            )
            try:
                told = time.monotonic()
                while process.poll() is None and task.left > _END:
                    time.sleep(_PAUSE)
                    if time.monotonic() - told > _OFTEN:
                        told = time.monotonic()
                        yield result()
            finally:
                status = process.poll()
                _end(process)
            out.seek(0)
            last = [line.rstrip() for line in out if line.strip()][-_LINES:]
        # 0: all passed; 1: some failed; 5: none was left.
        fine = status in (0, 1, 5, None)
        yield result(status in (0, 1, 5), None if fine else "\n".join(last))


def _end(process: subprocess.Popen) -> None:
    """Have it ended; its workers end with it, or with the section."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

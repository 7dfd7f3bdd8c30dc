"""A section's process, from outside: begun, watched, ended in time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

CHECK = Path(__file__).resolve().parents[1] / "check.py"

#: What became of one. DONE: it ended by itself; FAILED: with an error; CRASHED: by a
#: signal; HUNG: it was ended, as its time was over; INTERRUPTED: by Ctrl-C.
DONE, FAILED, CRASHED, HUNG, INTERRUPTED = (
    *("done", "failed", "crashed", "hung", "interrupted"),
)

#: Seconds between two looks.
_PAUSE = 0.1
#: Lines of stderr that are kept, and characters of each.
_LINES, _LENGTH = 12, 300
#: The exit status after Ctrl-C.
_STOPPED = 130


def command_of(name: str) -> list[str]:
    """What begins a section."""
    return [sys.executable, str(CHECK), "--section", name]


def run(
    command: list[str],
    task: Mapping[str, Any],
    seconds: float,
    tick: Callable[[], None],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Run a section.

    Args:
        task: the fields of :class:`task.Task`, for the process's stdin.
        seconds: after which it is ended, with all that it has started.
        tick: called every moment.
        environment: what it has beside this process's.

    Returns:
        ``status``; ``seconds``; ``result``, the last that it wrote, None for none; and,
        unless all went well, ``signal`` or ``exit`` and the last lines of ``stderr``.
        After Ctrl-C as well: its status says so.
    """
    began = time.monotonic()
    with (
        tempfile.TemporaryFile() as told,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        told.write(json.dumps(task).encode())
        told.seek(0)
        # A session of its own: Ctrl-C is this process's, and no grandchild is left.
        process = subprocess.Popen(
            command,
            stdin=told,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        status = HUNG
        try:
            while time.monotonic() - began < seconds:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PAUSE)
                    status = _status(process.returncode)
                    break
                tick()
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            _end(process)
        record: dict[str, Any] = {
            "status": status,
            "seconds": round(time.monotonic() - began, 2),
            "result": _result(out),
        }
        if status == DONE and record["result"] is None:
            record["status"] = FAILED
        if record["status"] not in (DONE, INTERRUPTED):
            record |= _ending(process.returncode, status) | {"stderr": _last(err)}
    return record


def _status(code: int) -> str:
    if code < 0:
        return CRASHED
    return {0: DONE, _STOPPED: INTERRUPTED}.get(code, FAILED)


def _ending(code: int, status: str) -> dict[str, Any]:
    """How it ended, but where it was ended by :func:`run`."""
    if status == HUNG:
        return {}
    if code >= 0:
        return {"exit": code}
    try:
        return {"signal": signal.Signals(-code).name}
    except ValueError:  # a real-time signal
        return {"signal": f"signal {-code}"}


def _end(process: subprocess.Popen) -> None:
    """End it, and whatever it has started; a second Ctrl-C changes nothing."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def _result(out: IO[bytes]) -> dict[str, Any] | None:
    """The last whole line that is a result."""
    out.seek(0)
    for line in reversed(out.read().split(b"\n")):
        with suppress(ValueError):
            result = json.loads(line)
            if isinstance(result, dict):
                return result
    return None


def _last(err: IO[bytes]) -> list[str]:
    err.seek(0)
    lines = err.read().decode("utf-8", "replace").splitlines()
    kept = [line.rstrip()[:_LENGTH] for line in lines if line.strip()]
    return kept[-_LINES:]

"""Several processes of one program, begun together as a launcher does it."""

import fcntl
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from conftest import HANG

import main

PROJECT = Path(main.__file__).parent

#: The program with the bundled pair, and the prompts that this likes.
PROGRAM = [sys.executable, "main.py", "--model", "demo/target"]
PROGRAM += ["--draft-model", "demo/draft"]
ASKED = "translate English to German: The old man is reading a book."

#: What other launchers than this one would say.
_SAID = ("MLX_", "OMPI_", "PMI_", "NCCL_")


class Ended(NamedTuple):
    """What a process left."""

    status: int
    out: str
    err: str


def free_ports(count: int) -> int:
    """The first of so many ports on end that nobody uses: below those that a system
    gives to who connects, which come and go."""
    choose = random.Random(os.urandom(8))
    while True:
        first = choose.randrange(20000, 32000)
        held = []
        try:
            for port in range(first, first + count):
                held.append(socket.socket())
                held[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for each in held:
                each.close()
        return first


class Ranked:
    """The ranks of a program on this machine, each a process.

    Attributes:
        processes: by rank.
        port: of the first rank; where rank 0 listens is the one after the last.
    """

    def __init__(self, count, command, *, folders=None, commands=None, env=None):
        """
        Args:
            command: of all, but those that ``commands`` has another for, by rank.
            folders: where each runs, by rank; the project by default.
            env: more of the environment.
        """
        # One at a time: what waits for a sum takes a core, and two take four.
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "alone")
        self._turn = (Path(tempfile.gettempdir()) / f"ranks-of-tests-{run}").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        self._left = tempfile.TemporaryDirectory(prefix="ranks-of-tests-")
        self._folder = Path(self._left.name)
        self.count, self.port = count, free_ports(count + 1)
        hosts = [[f"127.0.0.1:{self.port + rank}"] for rank in range(count)]
        (self._folder / "hosts.json").write_text(json.dumps(hosts))
        self.began = time.monotonic()
        self.processes = []
        for rank in range(count):
            self.processes.append(
                self._begin(
                    rank,
                    (commands or {}).get(rank, command),
                    (folders or {}).get(rank, PROJECT),
                    env or {},
                )
            )

    def _begin(self, rank, command, folder, env):
        said = {k: v for k, v in os.environ.items() if not k.startswith(_SAID)}
        said |= {
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(self._folder / "hosts.json"),
            **env,
        }
        with (
            self._file(rank, "out").open("wb") as out,
            self._file(rank, "err").open("wb") as err,
        ):
            return subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env=said,
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=out,
                stderr=err,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()  # also where it was stopped
                process.wait()
        self.processes[0].stdin.close()
        self._left.cleanup()
        self._turn.close()

    def _file(self, rank, what):
        return self._folder / f"{what}{rank}"

    def out(self, rank=0):
        """What it has written so far."""
        return self._file(rank, "out").read_text()

    def err(self):
        """What all of them have said, together."""
        return "".join(self._file(r, "err").read_text() for r in range(self.count))

    def type(self, text):
        """For rank 0 to read."""
        self.processes[0].stdin.write(text.encode())
        self.processes[0].stdin.flush()

    def until(self, seen):
        """Wait for something to be so, while rank 0 runs."""
        until = time.monotonic() + HANG
        while not seen():
            assert self.processes[0].poll() is None, self.err()
            assert time.monotonic() < until, f"it hangs: {self.err()}"
            time.sleep(0.002)

    def takes_signals(self):
        """Whether the ranks have come to the program's own code: before, Python answers
        a Ctrl-C."""
        maps = [Path(f"/proc/{process.pid}/maps") for process in self.processes]
        if not maps[0].exists():  # no Linux
            time.sleep(2)
            return True
        return all("mlx" in each.read_text() for each in maps)

    def signal(self, which, *ranks):
        """Send a signal to these; to all where none is named."""
        for rank in ranks or range(self.count):
            with suppress(ProcessLookupError):
                self.processes[rank].send_signal(which)

    def end(self):
        """What each left, once all have ended."""
        self.processes[0].stdin.close()
        until = time.monotonic() + HANG
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} hangs: {self.err()}") from None
        return [
            Ended(
                process.returncode, self.out(rank), self._file(rank, "err").read_text()
            )
            for rank, process in enumerate(self.processes)
        ]


def run(count, command, **more):
    """What each rank of a program leaves."""
    with Ranked(count, command, **more) as ranked:
        return ranked.end()


def asked_in(count, jobs, folder):
    """What rank 0 finds out of each of these jobs; see ``parallel_jobs.py``."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).parent / "parallel_jobs.py"
    env = {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(script.parent)])}
    first, *others = run(count, [sys.executable, script, path], env=env)
    assert first.status == 0, (first, others)
    assert [each.status for each in others] == [0] * (count - 1), (first, others)
    assert [each.err for each in others] == [""] * (count - 1)
    return json.loads(first.out)

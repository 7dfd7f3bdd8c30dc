"""Servers to measure: each in a process of its own, which ends with its measurement."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from types import FrameType
from typing import IO, NamedTuple

from measuring.load import WARM, Asked, LoadRow, http, load, row_of
from pair import LOOKUP, Pair
from system.errors import InputError, say

#: Requests that wait at a server: more than there can be clients.
QUEUE = 4096
#: Seconds within which a server has to be ready.
START = 120.0
#: Seconds that one has to end by itself, once it is told to.
GRACE = 10.0
#: Seconds between two looks at one that is starting.
_PAUSE = 0.1

_LISTENS = "listening on "
#: Where modules are found by their names.
_PROJECT = Path(__file__).resolve().parents[1]
SERVE = _PROJECT / "serve.py"


class Terminated(KeyboardInterrupt):
    """The program is told to end: it is to do so, and not to make the best of it."""


class Models(NamedTuple):
    """A pair by flags: of its target, and of who drafts."""

    target: list[str]
    draft: list[str]

    @property
    def all(self) -> list[str]:
        """Both."""
        return [*self.target, *self.draft]


def models_of(pair: Pair) -> Models:
    """The flags that have serve.py load what was loaded here."""
    draft = [] if pair.draft_folder is None else [str(pair.draft_folder.absolute())]
    looks = pair.lookup is not None
    flags = ["--draft-model", *(draft or [LOOKUP if looks else "none"])]
    flags += ["--lookup"] if draft and looks else []
    return Models(["--model", str(pair.folder.absolute())], flags)


class Server:
    """One that runs.

    Attributes:
        url: where it is asked, ``http://127.0.0.1:8080`` say.
        last: the last line that it wrote to stderr; empty before any.
    """

    def __init__(self, stderr: IO[str]):
        self.url = ""
        self.last = ""
        self._urls: Queue[str] = Queue()
        # Somebody has to read on: a server whose pipe is full would wait.
        self._reader = threading.Thread(target=self._read, args=(stderr,), daemon=True)
        self._reader.start()

    def _read(self, stderr: IO[str]) -> None:
        with stderr:
            for line in stderr:
                self.last = line.strip() or self.last
                _, found, url = line.partition(_LISTENS)
                if found:
                    self._urls.put(url.split()[0])

    def listens(self, seconds: float) -> bool:
        """Whether it has said where it is asked, at the latest after some seconds."""
        with suppress(Empty):
            self.url = self.url or self._urls.get(timeout=seconds)
        return bool(self.url)

    def heard_out(self) -> None:
        """Wait for the last words of one whose process has ended."""
        # Not for long: a process that it has left behind may have its stderr.
        self._reader.join(1)


def servers_of(
    models: Models, limits: Iterable[int], max_tokens: int, *, others: bool
) -> Iterator[tuple[str, int | None, list[str]]]:
    """The servers to measure: a name, the batch limit, and what starts it.

    Args:
        limits: of ours, which take requests of up to ``max_tokens``.
        others: the usual one is among them, which has no limit.
    """
    for size in dict.fromkeys(limits):
        most = {"max-batch": size, "max-queue": QUEUE, "max-tokens": max_tokens}
        flags = [flag for name, n in most.items() for flag in (f"--{name}", str(n))]
        command = [sys.executable, str(SERVE), "--port", "0", *flags]
        yield f"serve.py, max-batch {size}", size, [*command, *models.all]
    if others:
        command = [sys.executable, "-m", "measuring.their_server", *models.target]
        yield "transformers, one at a time", None, command


def measure_servers(
    servers: Iterable[tuple[str, int | None, list[str]]],
    requests: Sequence[Asked],
    clients: int,
    expected: Mapping[Asked, str],
) -> list[LoadRow]:
    """Start each, have so many clients ask it, and end it; a row for each.

    After Ctrl-C, those that are done by then, if there are any.

    Args:
        servers: of :func:`servers_of`.
        expected: plain decoding's texts.

    Raises:
        InputError: one does not come up.
        Terminated: on SIGTERM.
    """
    rows: list[LoadRow] = []
    for name, size, command in servers:
        try:
            with running(name, command) as server:
                asyncio.run(load(server.url, requests[:WARM], clients, quiet=True))
                replies, seconds = asyncio.run(load(server.url, requests, clients))
        except KeyboardInterrupt as error:
            if not rows or isinstance(error, Terminated):
                raise
            say(f"interrupted: nothing is known of {name}")
            break
        row = row_of(name, size, requests, replies, seconds, expected)
        rows.append(row)
        if row.lost:
            say(f"{name}: {row.lost} requests are lost, the first: {row.why}")
            say(f"its last line: {server.last or 'none'}")
    return rows


@contextmanager
def running(name: str, command: list[str]) -> Iterator[Server]:
    """Start a server, and end it whatever happens: errors, Ctrl-C, SIGTERM.

    Args:
        name: what messages call it.
        command: run in the project's folder. It has to write ``listening on URL`` to
            stderr, and to answer GET /health with 200 once it is ready, within
            :data:`START` seconds.

    Raises:
        InputError: it does not come up; the message has its last line on stderr.
        Terminated: on SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        process = subprocess.Popen(
            command,
            cwd=_PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        try:
            server = Server(process.stderr)
            _wait(name, process, server)
            yield server
        finally:
            _end(process)
        server.heard_out()
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_: int, __: FrameType | None) -> None:
    """As ``timeout`` ends a program: the servers are not to outlive it."""
    raise Terminated


def _wait(name: str, process: subprocess.Popen, server: Server) -> None:
    library, until = http(), time.monotonic() + START
    with library.Client(trust_env=False) as client:
        while True:
            if server.listens(_PAUSE):
                with suppress(library.TransportError):
                    if client.get(f"{server.url}/health").status_code == 200:
                        return
                time.sleep(_PAUSE)
            why = ""
            if process.poll() is not None:
                server.heard_out()
                why = f"it ended with status {process.returncode}"
            elif time.monotonic() > until:
                why = f"it was not ready within {START:g} seconds"
            if why:
                raise InputError(
                    f"{name} does not come up: {why}"
                    + (f": {server.last}" if server.last else "")
                )


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        process.kill()
        process.wait()

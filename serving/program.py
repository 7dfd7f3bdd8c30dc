"""What serve.py does: listen, load, answer, and end in order."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import asyncio
import errno
import math
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from console.choosing import BUNDLED, choose_pair, loading_of
from pair import Pair
from serving.app import make_app
from serving.arguments import NAME, parse_arguments
from serving.connection import BACKLOG, Connection
from serving.metrics import Metrics
from serving.worker import Worker
from system import fast_blas
from system.errors import InputError, say
from system.ranks import meet

#: Seconds that the round which is running may take to end, and that clients may take
#: to read that there is no more.
_LAST_ROUND, _LAST_WORDS = 30.0, 5.0
#: Errors of a system that has no more of something.
_USED_UP = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class _Server(uvicorn.Server):
    """Ends in order at Ctrl-C and SIGTERM; at once, when told so again.

    Attributes:
        begun: called once signals are taken.
    """

    begun: Callable[[], None]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own would have the signal kill the process afterwards."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        self.begun()
        yield


def main() -> int:
    """Serve as the command line says; the exit status.

    Raises:
        InputError: the flags or the models are not what they have to be, or the port
            is taken.
    """
    ranks = meet(NAME)
    arguments = parse_arguments()
    if fast_blas.hint:
        say(fast_blas.hint)
    if ranks and ranks.rank:
        _load(arguments)  # its part, to the end
    with _listen(arguments.host, arguments.port) as listening:
        return _serve(arguments, listening)


def _serve(arguments: Namespace, listening: socket.socket) -> int:
    metrics = Metrics()
    worker = Worker(
        lambda: _load(arguments),
        rows=arguments.max_batch,
        waiting=arguments.max_queue,
        most_tokens=arguments.max_tokens,
        most_prompt=arguments.max_prompt,
        metrics=metrics,
    )
    app = make_app(worker, metrics, host=arguments.host, key=arguments.api_key)
    config = uvicorn.Config(
        app,
        http=Connection,
        backlog=BACKLOG,
        lifespan="off",
        log_level="info" if arguments.verbose else "error",
        access_log=arguments.verbose,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(arguments.grace + _LAST_WORDS),
        ws="none",
    )
    server = _Server(config)
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    server.begun = lambda: say(f"{NAME}: listening on http://{host}:{port}")
    asyncio.run(_until_told(server, listening, worker, arguments.grace))
    worker.stop(_LAST_ROUND)
    if isinstance(worker.failed, InputError):
        raise worker.failed
    if worker.failed:
        raise RuntimeError("the models' thread has ended") from worker.failed
    return 0


async def _until_told(
    server: uvicorn.Server, listening: socket.socket, worker: Worker, grace: float
) -> None:
    """Serve, until a signal comes or there is nobody to answer; then for ``grace``
    seconds more those who are being answered."""
    worker.start()
    asyncio.get_running_loop().set_exception_handler(_once())

    async def watch() -> None:
        said = False
        while not (worker.fault or server.should_exit):
            if worker.ready and not said:
                said = True
                say(f"{NAME}: ready: {worker.name}, up to {worker.rows} texts at once")
            await asyncio.sleep(0.05)
        server.should_exit = True
        await asyncio.sleep(grace)
        worker.stop(0)  # who still waits is told so

    watching = asyncio.ensure_future(watch())
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()


def _once() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What is done about errors of no request: asyncio would tell of every connection
    that cannot be taken, thousands of times a second."""
    said = False

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        if getattr(context.get("exception"), "errno", None) not in _USED_UP:
            loop.default_exception_handler(context)
        elif not said:
            said = True
            say(f"{NAME}: too many connections: no more files can be opened for them")

    return handle


def _load(arguments: Namespace) -> tuple[Pair, str]:
    pair = choose_pair(
        arguments.model,
        arguments.draft_model,
        plain=False,
        how=loading_of(arguments),
        lookup=arguments.lookup,
    )
    if pair.folder.resolve() == BUNDLED[0]:
        return pair, "bundled"
    return pair, Path(arguments.model or pair.folder).name or pair.folder.name


def _listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        InputError: nobody can listen there.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} is no address here: {error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise InputError(
            f"nobody can listen on {host}, port {port} ({error.strerror}): name "
            "another with --port, or 0 for any"
        ) from None
    return listening

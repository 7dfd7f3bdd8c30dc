"""A client's connection: uvicorn's, with limits for those who ask for nothing."""

import asyncio
import json
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.bodies import RefusedError

#: Seconds that the first line and the headers of a request may take to come.
SLOWEST = 30.0
#: Connections that wait to be accepted, and files that are open beside them.
BACKLOG, _OTHERS = 128, 64
#: Files that a process needs at most.
_MOST_FILES = 65_536


def most_connections() -> int:
    """How many there may be at once; a process has only so many open files, of which
    this takes as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_FILES if hard == unlimited else min(hard, _MOST_FILES)
    if soft != unlimited and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # macOS has a limit of its own below that
            pass
    files = _MOST_FILES if soft == unlimited else min(soft, _MOST_FILES)
    return max(files // 4, files - _OTHERS - BACKLOG)


class Connection(H11Protocol):
    """Closed when a request does not come within its time, or where there are too many
    others.

    Attributes:
        most: connections at once.
    """

    most = most_connections()

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """It begins."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        self._settle()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._settle()  # its headers are here
        elif self._due is None:
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """It is no HTTP: said as all that is wrong."""
        error = RefusedError(400, "this is no HTTP request that could be read")
        body = json.dumps(error.as_dict()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _watch(self) -> None:
        self._due = self.loop.call_later(SLOWEST, self._give_up)

    def _settle(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        self._due = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

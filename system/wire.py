"""A connection between two processes of one program: JSON messages, whole ones.

Nothing that comes over it is ever run: who can reach the port may disturb, not more.
"""

import errno
import json
import socket
import struct
import sys
import time
from contextlib import suppress
from threading import Lock
from typing import Any

_LENGTH = struct.Struct("!Q")
#: Bytes of a message at most; a batch of the longest prompts has some of them.
_MOST = 1 << 32
#: Seconds of silence until a machine is asked whether it is there, and then between
#: asking, so many times.
_IDLE, _BETWEEN, _TIMES = 2, 1, 4


class GoneError(Exception):
    """The other end has closed, or does not answer."""


class Wire:
    """One end of a connection. Messages of several threads do not mix.

    Attributes:
        where: the other machine's address, for a person.
    """

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._socket.settimeout(None)
        self.where = str(connected.getpeername()[0])
        self._sending = Lock()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _watch(connected)

    def send(self, message: Any) -> None:
        """
        Raises:
            GoneError: nobody takes it.
        """
        data = json.dumps(message).encode()
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise GoneError(str(error)) from None

    def receive(self, within: float | None = None) -> Any:
        """The next message.

        Args:
            within: seconds in which it has to begin and go on; None for any time.

        Raises:
            GoneError: there will be none.
        """
        try:
            self._socket.settimeout(within)
        except OSError as error:
            raise GoneError(str(error)) from None
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length > _MOST:
            raise GoneError("what it says is no message")
        try:
            return json.loads(self._take(length))
        except (ValueError, RecursionError):
            raise GoneError("what it says is no message") from None

    def close(self) -> None:
        """Say no more; who waits for a message at either end is told so."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                got = self._socket.recv(min(count - len(data), 1 << 20))
            except OSError as error:
                raise GoneError(str(error)) from None
            if not got:
                raise GoneError("the connection was closed")
            data += got
        return bytes(data)


def _watch(connected: socket.socket) -> None:
    """Have the system notice when the other machine is no more: a process that ends
    closes its connections, one whose power or cable is gone does not."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    for name, value in (
        (idle, _IDLE),
        ("TCP_KEEPINTVL", _BETWEEN),
        ("TCP_KEEPCNT", _TIMES),
    ):
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(host: str, port: int, ends: int) -> socket.socket:
    """
    Raises:
        OSError: nobody can listen there.
    """
    family, kind, protocol, _, address = _found(host, port)
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(ends)
    except OSError:
        listening.close()
        raise
    return listening


def connect(host: str, port: int, until: float) -> socket.socket:
    """A connection to who listens there, or will before ``until`` (of
    ``time.monotonic``).

    Raises:
        OSError: nobody does.
    """
    while True:
        family, kind, protocol, _, address = _found(host, port)
        trying = socket.socket(family, kind, protocol)
        trying.settimeout(max(0.1, until - time.monotonic()))
        try:
            trying.connect(address)
            # On this machine a system may connect whom nobody listens to with itself.
            if trying.getsockname() != trying.getpeername():
                return trying
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
        except OSError:
            trying.close()
            if time.monotonic() + 0.1 > until:
                raise
            time.sleep(0.1)


def _found(host: str, port: int) -> tuple[Any, ...]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]

"""Connections that ask for nothing, or take their time."""

import asyncio
import contextlib
import resource

import pytest
import uvicorn

from serving import connection
from serving.connection import Connection, most_connections


@contextlib.asynccontextmanager
async def answering():
    """A server that says "hi", on a port: yields that."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"hi"})

    config = uvicorn.Config(app, http=Connection, lifespan="off", log_level="error")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    made = lambda: Connection(config, server.server_state, {})  # noqa: E731
    listening = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def sent(port, *parts, pause=0.0):
    """What comes back, up to the end, of parts with pauses between them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize("parts", [(), (b"GET",), (GET,), (GET + b"\r\n", GET)])
def test_headers_that_do_not_come(monkeypatch, parts):
    """The first request's, or a later one's on the same connection."""
    monkeypatch.setattr(connection, "SLOWEST", 0.2)

    async def run():
        async with answering() as port:
            return await sent(port, *parts, pause=0.05)

    assert asyncio.run(run()).count(b"hi") == len(parts) // 2


def test_bodies_are_another_matter(monkeypatch):
    """They have a time of their own."""
    monkeypatch.setattr(connection, "SLOWEST", 0.1)

    async def run():
        async with answering() as port:
            last = b"b" + GET + b"Connection: close\r\n\r\n"
            return await sent(port, POST, b"a", last, pause=0.3)

    assert asyncio.run(run()).count(b"hi") == 2


def test_too_many(monkeypatch):
    """What is beyond is closed at once, the others are answered."""
    monkeypatch.setattr(Connection, "most", 3)

    async def run():
        async with answering() as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            with contextlib.suppress(OSError):
                assert await sent(port, GET + b"\r\n", pause=0.1) == b""
            for reader, writer in held:
                writer.write(GET + b"Connection: close\r\n\r\n")
                assert (await asyncio.wait_for(reader.read(), 20)).endswith(b"hi")
                writer.close()
                await writer.wait_closed()
            return await sent(port, GET + b"Connection: close\r\n\r\n")

    assert asyncio.run(run()).endswith(b"hi")


@pytest.mark.parametrize(
    "limits, most",
    [
        ((1024, 1024), 832),
        ((96, 96), 24),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 65_344),
        ((256, 4096), 3904),  # as many as it may have
        ((256, resource.RLIM_INFINITY), 65_344),
    ],
)
def test_as_many_as_there_are_files(monkeypatch, limits, most):
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: asked.append(new))
    assert most_connections() == most
    assert all(soft <= 65_536 and hard == limits[1] for soft, hard in asked)
    if limits[0] == 256:

        def refuses(*_):
            raise ValueError

        monkeypatch.setattr(resource, "setrlimit", refuses)
        assert most_connections() == 64

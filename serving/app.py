"""Addresses, keys and limits: what is asked for where, and by whom."""

import asyncio
import hmac
import time
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.arguments import is_loopback
from serving.bodies import RefusedError, read
from serving.metrics import Metrics
from serving.replies import Reply, error_response, unavailable
from serving.worker import Worker

#: Bytes of a body, and seconds that it may take to come.
LARGEST, SLOWEST = 1 << 20, 30.0
#: Bytes that are taken from who sends too many: while it sends it hears no answer.
_TAKEN = 16 << 20

_PAGE = Path(__file__).with_name("page.html")
_PAGE_MAY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_OPEN = {"/", "/health"}  # without a key


def make_app(
    worker: Worker, metrics: Metrics, *, host: str = "127.0.0.1", key: str | None = None
) -> ASGIApp:
    """What answers requests.

    Args:
        host: where it listens; one that is this machine's alone is not to be reached
            by other names, as a page that a browser shows might try.
        key: what clients have to know.
    """
    started = int(time.time())

    async def health(_: Request) -> Response:
        if worker.ready:
            return JSONResponse({"status": "ok", "model": worker.name})
        return error_response(unavailable(worker))

    def described() -> dict[str, Any]:
        return {
            "id": worker.name,
            "object": "model",
            "created": started,
            "owned_by": "local",
        }

    async def models(_: Request) -> Response:
        _require_ready()
        return JSONResponse({"object": "list", "data": [described()]})

    async def model(request: Request) -> Response:
        _require_ready()
        _require_name(request.path_params["name"])
        return JSONResponse(described())

    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    async def chat(request: Request) -> Response:
        return await answer(request, chat=True)

    async def answer(request: Request, chat: bool) -> Response:
        asked = read(await _read_body(request), chat)
        _require_ready()
        _require_name(asked.model)
        return Reply(worker, asked, metrics)

    async def page(_: Request) -> Response:
        headers = {
            "Content-Security-Policy": _PAGE_MAY,
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(_PAGE.read_bytes(), 200, headers, "text/html; charset=utf-8")

    async def shown_metrics(_: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(metrics.text(), media_type=kind)

    def _require_ready() -> None:
        if not worker.ready:
            raise unavailable(worker)

    def _require_name(name: str | None) -> None:
        if name not in (None, worker.name):
            raise RefusedError(
                404,
                f"there is no model {name!r} here: it is {worker.name!r}",
                param="model",
                code="model_not_found",
            )

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/metrics", shown_metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            RefusedError: _on_refused,
            HTTPException: _on_http,
            ClientDisconnect: _on_gone,
            500: _on_defect,
        },
    )
    app.router.redirect_slashes = False
    known = {route.path for route in routes}
    return _Door(app, known, metrics, host, key)


class _Door:
    """Lets in who may, and counts."""

    def __init__(
        self,
        app: ASGIApp,
        known: set[str],
        metrics: Metrics,
        host: str,
        key: str | None,
    ):
        self._app, self._known, self._metrics = app, known, metrics
        self._key = key
        self._alone = not key and is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, began = scope["path"], time.monotonic()
        shown = path if path in self._known else "other"
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope)(scope, receive, counted)
        except asyncio.CancelledError:
            pass  # the server has ended, and did not wait any longer
        finally:
            self._metrics.request(shown, status, time.monotonic() - began)

    def _let_in(self, scope: Scope) -> ASGIApp:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        # Without a Host, as in HTTP/1.0, it is no browser.
        name = _host_of(headers.get(b"host", "localhost"))
        if self._alone and not is_loopback(name):
            return error_response(
                RefusedError(421, "this server is for this machine alone")
            )
        if self._key and scope["path"] not in _OPEN:
            kind, _, given = headers.get(b"authorization", "").partition(" ")
            same = hmac.compare_digest(
                given.strip().encode("latin-1"), self._key.encode()
            )
            if kind.lower() != "bearer" or not same:
                error = RefusedError(
                    401,
                    "the key is missing or wrong: send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return error_response(error)
        return self._app


def _host_of(value: str) -> str:
    """The name in a Host header, which may have a port."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].removesuffix(".")


async def _read_body(request: Request) -> bytes:
    """
    Raises:
        RefusedError: it is too large, too slow, or no JSON by its type.
        ClientDisconnect: the client has left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of any site may send others without asking.
        raise RefusedError(415, "the body has to be of Content-Type application/json")
    body, taken = bytearray(), 0

    async def receive() -> None:
        nonlocal taken
        async for chunk in request.stream():
            taken += len(chunk)
            if taken <= LARGEST:
                body.extend(chunk)
            elif taken > _TAKEN:
                return

    try:
        await asyncio.wait_for(receive(), SLOWEST)
    except (TimeoutError, asyncio.TimeoutError):  # two of them in Python 3.10
        raise RefusedError(
            408, "the body takes too long to come", headers={"Connection": "close"}
        ) from None
    if taken > LARGEST:
        raise RefusedError(
            413,
            f"the body is too large: {LARGEST:,} bytes are read",
            headers={"Connection": "close"},
        )
    return bytes(body)


async def _on_refused(_: Request, error: RefusedError) -> Response:
    return error_response(error)


async def _on_http(request: Request, error: HTTPException) -> Response:
    what = f"there is no {request.url.path} here"
    if error.status_code == 405:
        what = f"{request.url.path} does not take {request.method}"
    refused = RefusedError(error.status_code, what, headers=dict(error.headers or {}))
    return error_response(refused)


async def _on_gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it; it is counted


async def _on_defect(_: Request, __: Exception) -> Response:
    return error_response(RefusedError(500, "the server failed at this request"))

"""What is sent for a job: all at once, or as it comes."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from serving.bodies import Asked, RefusedError, blamed
from serving.jobs import Added, Begun, Event, FullError, Job
from serving.metrics import Metrics
from serving.worker import Worker
from speculation.requests import Stats
from system.errors import InputError, say

#: Seconds that a client may take to read what waits for it.
SLOW = 60.0
_DONE = b"data: [DONE]\n\n"


class GoneError(Exception):
    """The client is not there any more."""


class Reply(Response):
    """Answers what was asked, as the worker gets on with it."""

    def __init__(self, worker: Worker, asked: Asked, metrics: Metrics):
        self._worker, self._asked, self._metrics = worker, asked, metrics
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._id = f"{kind}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._tokens = [0] * asked.texts
        self._stats = [Stats() for _ in self._tokens]
        self._prompt_tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(self._asked, _teller(loop, events))
        try:
            self._worker.submit(job)
        except (FullError, InputError) as error:
            await error_response(self._unanswered(error))(scope, receive, send)
            return
        gone = asyncio.ensure_future(_until_gone(receive))
        self._began = time.monotonic()
        answer = self._stream if self._asked.stream else self._whole
        try:
            await answer(self._events(events, gone), scope, receive, _patient(send))
        except (GoneError, TimeoutError, asyncio.TimeoutError, OSError):
            pass  # nobody is there to be told
        finally:
            gone.cancel()
            self._worker.give_up(job)  # of what is finished nothing is left

    async def _events(
        self, events: "asyncio.Queue[Event]", gone: "asyncio.Future[None]"
    ) -> AsyncIterator[list[Added]]:
        """What the worker tells, all that there is at a time: at first nothing, when
        it has begun.

        Raises:
            RefusedError: it cannot be answered.
            GoneError: the client has left.
        """
        left = self._asked.texts
        while left:
            event = asyncio.ensure_future(events.get())
            await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                raise GoneError
            told = [event.result()]
            while not events.empty():
                told.append(events.get_nowait())
            added = []
            for each in told:
                if isinstance(each, Exception):
                    raise self._unanswered(each)
                if isinstance(each, Begun):
                    self._prompt_tokens = each.prompt_tokens
                    continue
                if not any(self._tokens):
                    self._metrics.first_text(time.monotonic() - self._began)
                self._tokens[each.choice] = each.tokens
                if each.stats:
                    self._stats[each.choice] = each.stats
                left -= each.finish_reason is not None
                added.append(each)
            yield added

    async def _whole(
        self,
        events: AsyncIterator[list[Added]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """One object."""
        pieces: list[list[tuple[str, bool]]] = [[] for _ in self._stats]
        ends: list[dict[str, Any]] = [{} for _ in pieces]
        try:
            async for added in events:
                for each in added:
                    pieces[each.choice] += each.pieces
                    ends[each.choice] = _end_of(each)
        except RefusedError as error:
            await error_response(error)(scope, receive, send)
            return
        choices = []
        for index, its in enumerate(pieces):
            text = "".join(bit for bit, _ in its)
            choice: dict[str, Any] = {"index": index}
            if self._asked.chat:
                message = {"role": "assistant", "content": text, "refusal": None}
                choice["message"] = message
            else:
                choice["text"] = text
            choice |= {"logprobs": None, **ends[index]}
            if self._asked.show_drafted:
                choice["pieces"] = _merged(its)
            choices.append(choice)
        value = {**self._head(""), "choices": choices, "usage": self._usage()}
        value["speculation"] = self._speculation()
        await JSONResponse(value)(scope, receive, send)

    async def _stream(
        self,
        events: AsyncIterator[list[Added]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Server-sent events: one or more for each round."""
        started = False
        try:
            async for added in events:
                body = b""
                if not started:
                    await send(_start())
                    started = True
                    if self._asked.chat:
                        body = b"".join(map(self._role, range(len(self._stats))))
                body += b"".join(map(self._chunk, added))
                if body:
                    await send(_body(body))
        except RefusedError as error:
            if not started:
                await error_response(error)(scope, receive, send)
                return
            await send(_body(_event(error.as_dict()), more=False))
            return
        end = _DONE
        if self._asked.usage:
            value = {**self._head(".chunk"), "choices": [], "usage": self._usage()}
            end = _event({**value, "speculation": self._speculation()}) + end
        await send(_body(end, more=False))

    def _role(self, choice: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        end = {"finish_reason": None}
        return self._chunk_of({"index": choice, "delta": delta}, end)

    def _chunk(self, added: Added) -> bytes:
        """What a text got in a round; nothing where that is not known yet."""
        if not added.pieces and not added.finish_reason:
            return b""
        text = "".join(bit for bit, _ in added.pieces)
        choice: dict[str, Any] = {"index": added.choice}
        if self._asked.chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = text
        if self._asked.show_drafted:
            choice["pieces"] = _merged(added.pieces)
        return self._chunk_of(choice, _end_of(added))

    def _chunk_of(self, choice: dict[str, Any], end: dict[str, Any]) -> bytes:
        choice |= {"logprobs": None, **end}
        value = {**self._head(".chunk"), "choices": [choice]}
        if self._asked.usage:
            value["usage"] = None  # as of all chunks but the last
        return _event({**value, "speculation": self._speculation()})

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self._asked.chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._worker.name,
        }

    def _usage(self) -> dict[str, int]:
        tokens = sum(self._tokens)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }

    def _speculation(self) -> dict[str, Any]:
        """The figures so far, of all texts."""
        whole = Stats.of_batch(self._stats, together=False)
        return {
            "tokens_per_pass": round(whole.tokens_per_round, 3),
            "alpha": None if whole.alpha is None else round(whole.alpha, 3),
            "passes": whole.rounds,
            "drafted": whole.drafted,
            "accepted": whole.accepted,
        }

    def _several(self) -> str:
        """The field that asks for many texts."""
        asked = self._asked
        if asked.given.get("num_beams", 1) > 1:
            return "num_beams"
        if asked.count > 1:
            return asked.counted.replace("-", "_")
        return "messages" if asked.chat else "prompt"

    def _unanswered(self, error: Exception) -> RefusedError:
        """What a client is told of why there is no answer."""
        if isinstance(error, FullError):
            room = self._asked.room
            if room > self._worker.most:
                return RefusedError(
                    400,
                    f"{room} texts are asked for, a search counted by its beams: at "
                    f"most {self._worker.most} are taken at once",
                    param=self._several(),
                )
            return RefusedError(
                429,
                "too many requests wait: come again",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        if self._worker.fault is not None:
            return unavailable(self._worker)
        if isinstance(error, InputError):
            return blamed(error, self._asked.chat)
        return RefusedError(500, "the server failed at this request")


def unavailable(worker: Worker) -> RefusedError:
    """Why nobody answers now."""
    what = "loading" if worker.fault is None else "stopping"
    return RefusedError(
        503, f"the server is {what}", code=what, headers={"Retry-After": "1"}
    )


def error_response(error: RefusedError) -> Response:
    """An error object."""
    return JSONResponse(error.as_dict(), error.status, error.headers)


def _teller(
    loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]"
) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:
            say("a client was left without an answer")  # the loop has ended

    return tell


async def _until_gone(receive: Receive) -> None:
    """Wait for the client to leave."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _patient(send: Send) -> Send:
    """Gives a client up that reads nothing for long."""

    async def sending(message: Message) -> None:
        await asyncio.wait_for(send(message), SLOW)

    return sending


def _start() -> Message:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _body(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _event(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def _end_of(added: Added) -> dict[str, Any]:
    """How a text has ended, if it has, and with what score, if there is one."""
    score = {} if added.score is None else {"score": added.score}
    return {"finish_reason": added.finish_reason, **score}


def _merged(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours of the same kind as one."""
    found: list[tuple[str, bool]] = []
    for text, drafted in pieces:
        if found and found[-1][1] == drafted:
            found[-1] = found[-1][0] + text, drafted
        else:
            found.append((text, drafted))
    return found

"""A server under load: many clients at once, how long each waits, and what is lost.

It is asked as any server of OpenAI's style is, ``POST /v1/completions`` with
``"stream": true``, so that the same clients measure ours and others.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from answering import Question
from pair import Pair
from system.errors import InputError, one_line

#: Of the numbers that are drawn for max_tokens, so that all runs ask for the same.
SEED = 0
#: The least of them.
LEAST = 4
#: Seconds without a byte after which a request is given up: whoever comes last waits
#: for all others where they are answered one after another.
PATIENCE = 600.0
#: Requests that warm a server up.
WARM = 8

_DONE = "[DONE]"
#: The ends of lines in a stream of events. A carriage return that comes last waits: a
#: line feed may follow.
_LINE_END = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """A request: a prompt, and the most tokens of its answer."""

    prompt: str
    max_tokens: int


@dataclass
class Reply:
    """What became of a request.

    Attributes:
        text: what has come of it.
        first: seconds from asking to the first text; None where there was none.
        seconds: to the end.
        finish_reason: why the text ended.
        tokens: those of the text, as the server counts them.
        passes, per_pass: passes of the target's decoder and tokens of each, where the
            server says so.
        lost: why there is no whole answer; None of one that ended with a
            ``finish_reason`` and ``[DONE]``.
    """

    text: str = ""
    first: float | None = None
    seconds: float | None = None
    finish_reason: str | None = None
    tokens: int | None = None
    passes: int | None = None
    per_pass: float | None = None
    lost: str | None = None

    def take(self, event: dict[str, Any], now: float) -> None:
        """Take in an event that came after so many seconds."""
        if event.get("error"):
            self.lost = self.lost or str(event["error"]["message"])
            return
        for choice in event.get("choices") or ():
            text = choice.get("text") or ""
            if text and self.first is None:
                self.first = now
            self.text += text
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if event.get("usage"):
            self.tokens = int(event["usage"]["completion_tokens"])
        speculation = event.get("speculation")
        if speculation:
            self.passes = int(speculation["passes"])
            self.per_pass = float(speculation["tokens_per_pass"])


@dataclass(frozen=True)
class LoadRow:
    """A line of the table.

    Attributes:
        max_batch: the most texts that the server decodes at once; None for another
            program.
        requests: how many were sent; ``lost``: how many of them had no whole answer,
            and ``why``, of the first. Nothing below counts those.
        requests_per_second, tokens_per_second: over the seconds from the first request
            to the last answer; tokens as the server counts them, None where it does
            not.
        first_p50, first_p99: seconds from asking to the first text, of those that have
            any, waiting for a place included; ``end_p50``, ``end_p99``: to the end.
        different: texts that are not plain decoding's.
        tokens_per_pass: of a text's passes of the target; None where the server does
            not say.
    """

    name: str
    max_batch: int | None
    requests: int
    requests_per_second: float
    tokens_per_second: float | None
    first_p50: float | None
    first_p99: float | None
    end_p50: float | None
    end_p99: float | None
    lost: int
    different: int
    tokens_per_pass: float | None = None
    why: str | None = None


class Events:
    """The events of a stream (SSE), however its bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def push(self, data: bytes) -> list[str]:
        """The data of the events that these bytes complete.

        Raises:
            UnicodeDecodeError: a line is no UTF-8.
        """
        *lines, self._rest = _LINE_END.split(self._rest + data)
        events = []
        for line in lines:
            field, _, value = line.decode().partition(":")
            if field == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


def draw(prompts: Sequence[str], count: int, max_tokens: int) -> list[Asked]:
    """So many requests: the prompts, from the first again after the last, each with a
    drawn number of tokens from :data:`LEAST` to ``max_tokens``; the same every time."""
    numbers = np.random.default_rng(SEED).integers(
        min(LEAST, max_tokens), max_tokens + 1, count
    )
    chosen = islice(cycle(prompts), count)
    return [Asked(*one) for one in zip(chosen, numbers.tolist(), strict=True)]


def plain_texts(pair: Pair, requests: Sequence[Asked]) -> dict[Asked, str]:
    """What the target alone answers.

    Raises:
        InputError: it cannot answer one of them.
    """
    once = list(dict.fromkeys(requests))
    answers = pair.answers(
        [Question(one.prompt, {"max_tokens": one.max_tokens}) for one in once],
        num_draft=0,
    )
    texts = {}
    for asked, answer in zip(
        once, tqdm(answers, total=len(once), unit="text", disable=None), strict=True
    ):
        if answer.error:
            raise answer.error
        texts[asked] = answer.text
    return texts


def http() -> ModuleType:
    """The library that asks.

    Raises:
        InputError: it is not installed.
    """
    try:
        import httpx2
    except ImportError:
        raise InputError("--serve needs httpx2: pip install httpx2") from None
    return httpx2


async def load(
    url: str, requests: Sequence[Asked], clients: int, *, quiet: bool = False
) -> tuple[list[Reply], float]:
    """Have so many clients send requests, each its next one once the last has ended.

    Args:
        url: of the server, ``http://127.0.0.1:8080`` say.
        quiet: show no progress.

    Returns:
        The replies, in the order of the requests, and the seconds that all took.

    Raises:
        InputError: there is nothing to ask with.
    """
    library = http()
    replies = [Reply() for _ in requests]
    places = iter(range(len(requests)))
    options = {
        "timeout": PATIENCE,
        # A client keeps its connection, as a user's program does.
        "limits": library.Limits(max_connections=None, max_keepalive_connections=None),
        "trust_env": False,  # no proxy is to be asked for what is here
    }
    with tqdm(
        total=len(requests), unit="request", disable=True if quiet else None
    ) as progress:

        async def one_after_another() -> None:
            for place in places:
                await _ask(client, url, requests[place], replies[place])
                progress.update()

        async with library.AsyncClient(**options) as client:
            began = time.perf_counter()
            await asyncio.gather(
                *(one_after_another() for _ in range(min(clients, len(requests))))
            )
            return replies, time.perf_counter() - began


async def _ask(client: Any, url: str, asked: Asked, reply: Reply) -> None:
    """Send a request and fill in the reply; whatever goes wrong is in it as well."""
    body = {
        "prompt": asked.prompt,
        "max_tokens": asked.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events, ended = Events(), None
    began = time.perf_counter()
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                reply.lost = _refusal(answer.status_code, await answer.aread())
                return
            async for data in answer.aiter_bytes():
                now = time.perf_counter() - began
                for event in events.push(data):
                    if event == _DONE:
                        ended = now
                    else:
                        reply.take(json.loads(event), now)
    except http().HTTPError as error:
        if ended is None:  # else it came whole
            reply.lost = reply.lost or str(error) or type(error).__name__
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reply.lost = f"an event that is none: {error!r}"
    if ended is None:
        reply.lost = reply.lost or f"the stream ended without {_DONE}"
    elif reply.finish_reason is None:
        reply.lost = reply.lost or "it ended without a finish_reason"
    reply.seconds = ended


def _refusal(status: int, body: bytes) -> str:
    """What an answer with an error's status says, in a line."""
    text = body.decode(errors="replace")
    # Another program's is shown as it is.
    with suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]["message"]
    return one_line(f"{status}: {text}")


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least value that so many percent of the values do not exceed; None of none.

    One of the values itself, and none between two.
    """
    if not values:
        return None
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def row_of(
    name: str,
    max_batch: int | None,
    requests: Sequence[Asked],
    replies: Sequence[Reply],
    seconds: float,
    expected: Mapping[Asked, str],
) -> LoadRow:
    """The figures of a run; see :class:`LoadRow`.

    Args:
        replies: in the order of the requests.
        seconds: that all took.
        expected: plain decoding's texts.
    """
    whole = [
        (asked, reply)
        for asked, reply in zip(requests, replies, strict=True)
        if reply.lost is None
    ]
    reasons = [reply.lost for reply in replies if reply.lost is not None]
    done = [reply for _, reply in whole]
    firsts = [reply.first for reply in done if reply.first is not None]
    ends = [reply.seconds for reply in done]
    counted = [reply.tokens for reply in done if reply.tokens is not None]
    passes = sum(reply.passes or 0 for reply in done)
    return LoadRow(
        name,
        max_batch,
        len(requests),
        len(done) / seconds,
        sum(counted) / seconds if len(counted) == len(done) else None,
        percentile(firsts, 50),
        percentile(firsts, 99),
        percentile(ends, 50),
        percentile(ends, 99),
        len(reasons),
        sum(reply.text != expected[asked] for asked, reply in whole),
        sum(r.per_pass * r.passes for r in done if r.passes) / passes
        if passes
        else None,
        reasons[0] if reasons else None,
    )

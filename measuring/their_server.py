"""A server around transformers, as they are usually written: what ours is beside.

    python -m measuring.their_server --model NAME [--port 0]

One request at a time behind a lock, ``generate`` in a thread, and the text of
transformers' own streamer as the events of ``POST /v1/completions``: always streamed
and greedy, and for nobody but :mod:`measuring.load` to ask.
"""

if __name__ == "__main__":
    import system.startup  # (first: see there)

import system.fast_blas  # noqa: F401  (before mlx: see there)

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from measuring.baselines import greedy_transformers
from pair import Pair
from system.errors import InputError, Parser, run, say
from text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.applications import Starlette


class _Decoder:
    """The part of transformers' tokenizers that their streamers use."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def decode(self, tokens: list[int] | int) -> str:
        return self._tokenizer.decode(tokens if isinstance(tokens, list) else [tokens])


def app_of(pair: Pair) -> "Starlette":
    """The server of the pair's target; the pair itself is not kept.

    Raises:
        InputError: what it needs is not installed, or it is no T5.
    """
    reference, options = greedy_transformers(pair)
    tokenizer, ends = pair.tokenizer, pair.eos_tokens
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import iterate_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise InputError(f"their server needs starlette and uvicorn: {error}") from None
    import torch
    from transformers import TextIteratorStreamer

    def generate(
        ids: list[int], max_tokens: int, streamer: TextIteratorStreamer
    ) -> list[int]:
        try:
            prompt = torch.tensor([ids], device=reference.device)
            with torch.inference_mode():
                out = reference.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    max_new_tokens=max_tokens,
                    **options,
                )
            return out[0, 1:].tolist()
        finally:
            streamer.end()  # or whoever reads it would wait after an error

    async def events(prompt: str, max_tokens: int) -> AsyncIterator[str]:
        ids = tokenizer.encode(prompt)
        # No lock of threads: those that wait for it would be all that there are.
        async with lock:
            streamer = TextIteratorStreamer(_Decoder(tokenizer), skip_prompt=True)
            work = asyncio.create_task(
                asyncio.to_thread(generate, ids, max_tokens, streamer)
            )
            async for text in iterate_in_threadpool(streamer):
                if text:
                    yield _event(choices=[_choice(text)])
            tokens = await work
        reason = "stop" if tokens[-1] in ends else "length"
        yield _event(choices=[_choice("", reason)])
        counts = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        total = sum(counts.values())
        yield _event(choices=[], usage={**counts, "total_tokens": total})
        yield "data: [DONE]\n\n"

    async def complete(request: Request) -> Response:
        asked = await request.json()
        return StreamingResponse(
            events(asked["prompt"], asked["max_tokens"]), media_type="text/event-stream"
        )

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    lock = asyncio.Lock()
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/completions", complete, methods=["POST"]),
        ]
    )


def _choice(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": reason}


def _event(**fields: Any) -> str:
    return f"data: {json.dumps({'object': 'text_completion', **fields})}\n\n"


def main() -> None:
    """Serve until somebody ends it.

    Raises:
        InputError: the model cannot be loaded, or what serves it is not installed.
    """
    parser = Parser(prog="their_server", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="0: any")
    args = parser.parse_args()
    app = app_of(Pair.load(args.model))
    import uvicorn

    with socket.create_server(("127.0.0.1", args.port)) as listening:
        say(f"their_server: listening on http://127.0.0.1:{listening.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(run(main, "their_server"))

"""What the decoding loop asks of a model: its session, one batch and its caches."""

from collections.abc import Collection, Generator, Iterator
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from system.errors import PromptError

#: Tokens that go through a model at a time while other rows wait for their next round.
CHUNK = 512


class Session(Protocol):
    """One model with its caches and one batch (see ``architectures/t5_session.py``).

    Attributes:
        vocabulary: ids below it may be fed and are what the logits are of.
        positions: how many may be fed to a row; None for any number.
        batches: whether several rows at once are known to get the right text.
        has_encoder: whether decoding starts from a token of its own, not from the
            prompt.
        trees: whether a row may be a tree: whether there is :meth:`extend_tree`.
        parameters: how many numbers the model has.
    """

    vocabulary: int
    positions: int | None
    batches: bool
    has_encoder: bool
    trees: bool
    parameters: int

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """Encode or prefill a batch; the tokens that each row's decoding starts
        from."""

    def require(self, prompts: list[list[int]], beside: bool) -> None:
        """See to it that prompts can be begun with, ``beside`` a batch or alone, before
        anything is computed."""

    def prepare(self, prompts: list[list[int]]) -> "Preparing":
        """Encode or prefill prompts that are to come into a batch, a chunk at a time:
        rows of it may be extended whenever this yields."""

    def put(self, rows: list[int], prepared: Any) -> list[list[int]]:
        """Have what was prepared in these rows of the batch; what :meth:`start` would
        have returned for it."""

    def take(self, rows: list[int], blank: int = 0) -> None:
        """Have these rows instead, of which some may be the same, and behind them some
        that are nobody's."""

    def wipe(self, rows: list[int], holes: Collection[list[int]] = ()) -> None:
        """Have zeros behind the cached positions of these rows, and in the holes
        between those: what is masked there spreads if it is not finite."""

    def extend(self, tokens: mx.array) -> mx.array:
        """Append tokens (B, T); logits (B, T, V), those at t for the token after it."""

    def extend_tree(
        self, tokens: mx.array, slots: np.ndarray, back: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Put tokens (B, T) anywhere in the caches, each to attend to what is said;
        see :meth:`T5Session.extend_tree`."""

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` cached positions of each row b."""

    def forget(self) -> None:
        """Drop the batch: the next one reuses nothing of it."""

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """What a batch takes whose prompts and answers have up to so many tokens."""


#: Yields while there is more to do; returns what :meth:`Session.put` is to be given.
Preparing = Generator[None, None, Any]


def finish(preparing: Preparing) -> Any:
    """What it returns in the end, at once."""
    while True:
        try:
            next(preparing)
        except StopIteration as done:
            return done.value


def chunks(sizes: Iterator[int]) -> Iterator[bool]:
    """For each piece of work of so many tokens whether others have waited enough."""
    done = 0
    for size in sizes:
        done += size
        yield done >= CHUNK
        if done >= CHUNK:
            done = 0


def check_prompts(prompts: list[list[int]], rows: int) -> None:
    """Raise a PromptError for an empty prompt, or for one with an id that the
    embedding, of ``rows`` rows, does not have: the device would read beyond it."""
    for prompt in prompts:
        if not prompt:
            raise PromptError("the prompt is empty")
        if max(prompt) >= rows or min(prompt) < 0:
            odd = max(prompt) if max(prompt) >= rows else min(prompt)
            raise PromptError(
                f"the prompt has the token id {odd}, but the model's "
                f"embedding has {rows} rows: it was not trained with that token"
            )


def distinct(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The different ones among the prompts, and which of those each of them is."""
    number: dict[tuple[int, ...], int] = {}
    which = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    return [list(prompt) for prompt in number], which


def check_rewind(cached: list[int], lengths: list[int]) -> None:
    """Raise a ValueError for rows that have not ``lengths[b]`` cached positions."""
    if len(lengths) != len(cached) or not all(
        0 <= new <= old for new, old in zip(lengths, cached, strict=False)
    ):
        raise ValueError(f"cannot rewind from {cached} to {lengths}")


def take_rows(array: mx.array, rows: list[int], blank: int) -> mx.array:
    """These rows of the first axis, and so many of zeros."""
    if rows != list(range(len(array))):
        array = mx.take(array, mx.array(rows, mx.int32), axis=0)
    if blank:
        array = mx.pad(array, [(0, blank)] + [(0, 0)] * (array.ndim - 1))
    return array


def put_row(cache: mx.array, row: int, new: mx.array) -> mx.array:
    """A cache (B, ...) with another row (1, ...); in place where nobody else holds
    it. (On a CPU a scatter of several rows takes as long as copying the whole.)"""
    return mx.slice_update(cache, new, mx.array([row]), axes=(0,))


def wipe_row(cache: mx.array, row: int, length: int) -> mx.array:
    """A cache (B, H, C, D) with zeros behind the first positions of a row."""
    zeros = mx.zeros((1, cache.shape[1], cache.shape[2] - length, cache.shape[3]))
    return mx.slice_update(
        cache, zeros.astype(cache.dtype), mx.array([row, length]), axes=(0, 2)
    )

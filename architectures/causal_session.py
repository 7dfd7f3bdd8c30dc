"""The session of a decoder-only model: what the decoding loop asks of it.

mlx-lm computes the forward pass (:mod:`causal_model`); prefill, extending and rewinding
to a length are here.
"""

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from speculation.processors import ban
from speculation.session import check_prompts, check_rewind
from system.errors import InputError, TooLongError

PREFILL = 2048  # prompt tokens that go through the model at a time
ROOM = 256  # positions by which a cache grows


class CausalSession:
    """One mlx-lm model and the decoding state of one batch of prompts.

    One prompt uses mlx-lm's own caches, and what it begins with in common with the text
    before it stays cached. In a batch, whose rows are at different lengths, each layer
    has a cache with a length for each row.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int,
        banned: Collection[int] = (),
        positions: int | None = None,
        batches: bool = True,
    ):
        """
        Args:
            vocabulary: how many ids may be emitted: logits are cut to it.
            banned: ids below it that stand for nothing: their logits are -inf.
            positions: the most that may be fed.
            batches: whether the model is known to be right about rows of different
                lengths.

        Raises:
            InputError: the model's caches cannot be rewound.
        """
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        self.model = model
        self.vocabulary = vocabulary
        self.positions = positions
        self.batches = batches
        self.has_encoder = False
        self.lengths: list[int] = []
        self._ban = ban(vocabulary, banned) if banned else None
        self._new_caches = lambda: make_prompt_cache(model)
        self._caches: list[Any] = self._new_caches()
        # What was fed to a single row: (place, tokens) in order.
        self._fed: list[tuple[int, mx.array]] = []
        for cache in self._caches:
            if type(cache) is not KVCache:
                raise InputError(
                    f"this model keeps its state in a {type(cache).__name__}, which "
                    f"cannot be rewound: sliding windows and state-space layers do "
                    f"not go with speculative decoding"
                )

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """Prefill a batch of prompts (B lists of ids, none empty), but the last token
        of each. Returns when the device has finished.

        Returns:
            The prompts: decoding goes on from their last tokens.

        Raises:
            InputError: an empty prompt, or one that leaves no position to write to.
        """
        check_prompts(prompts, self.vocabulary)
        for prompt in prompts:
            if self.positions and len(prompt) >= self.positions:
                raise TooLongError(
                    f"the prompt has {len(prompt)} tokens, but the model has positions "
                    f"for {self.positions} with its answer: shorten it"
                )
        known = 0
        if len(prompts) == 1:
            known = self._reuse(prompts[0])
        else:
            self._caches = [
                RowCache(len(prompts), self.positions) for _ in self._new_caches()
            ]
        longest = max(map(len, prompts)) - 1
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt) - 1] = prompt[:-1]
        self.lengths = [known] * len(prompts)
        for place in range(known, longest, PREFILL):
            mx.eval(self.extend(mx.array(tokens[:, place : place + PREFILL]))[:, -1:])
        self.rewind([len(prompt) - 1 for prompt in prompts])
        return [list(prompt) for prompt in prompts]

    def extend(self, tokens: mx.array) -> mx.array:
        """Append tokens (B, T), each row at its own length.

        Returns:
            Logits (B, T, vocabulary): those at [b, t] are for the token after it.
        """
        if len(self.lengths) == 1:
            self._fed.append((self.lengths[0], tokens))
        logits = self.model(tokens, cache=self._caches)
        self.lengths = [length + tokens.shape[1] for length in self.lengths]
        logits = logits[..., : self.vocabulary]
        return logits if self._ban is None else logits + self._ban.astype(logits.dtype)

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` cached positions of each row b.

        Raises:
            ValueError: a length beyond what is cached.
        """
        check_rewind(self.lengths, lengths)
        for cache in self._caches:
            if isinstance(cache, RowCache):
                cache.rewind(lengths)
            else:
                # To a place, not by a count: a pass that Ctrl-C cut short may have
                # reached some layers and not others.
                cache.trim(cache.offset - lengths[0])
        self.lengths = list(lengths)

    def forget(self) -> None:
        """Drop the batch and its caches: nothing of it is kept for the next prompt."""
        self._caches, self._fed = self._new_caches(), []
        self.lengths = []

    def _reuse(self, prompt: list[int]) -> int:
        """Keep of the cache what ``prompt`` begins with; how many positions that is."""
        held: list[int] = []
        if len(self.lengths) == 1:
            for place, tokens in self._fed:
                held[place:] = np.array(tokens)[0].tolist()
            held = held[: self.lengths[0]]
        else:
            self._caches = self._new_caches()
            self.lengths = [0]
        known = 0
        for cached, token in zip(held, prompt[:-1], strict=False):
            if cached != token:
                break
            known += 1
        self.rewind([known])
        self._fed = [(0, mx.array([held[:known]], mx.int32))]
        return known


class RowCache:
    """Keys and values of one layer, with a length of its own for each row.

    It stands where mlx-lm's caches do: models ask it for ``offset``, for a mask, and to
    take in new keys and values. What lies beyond a row's length is masked and later
    overwritten, so a rewind only changes lengths.
    """

    def __init__(self, rows: int, positions: int | None):
        self._lengths = np.zeros(rows, np.int32)
        # A finished row is fed on while others are not: not beyond the last position.
        self._last = (positions or np.iinfo(np.int32).max) - 1
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def size(self) -> int:
        """How many positions the longest row has."""
        return int(self._lengths.max())

    @property
    def offset(self) -> mx.array:
        """(B,) int32, where each row's next position is."""
        return mx.array(np.minimum(self._lengths, self._last))

    def rewind(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, np.int32)

    def make_mask(
        self, size: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array:
        """(B, 1, T, keys) bool: what each of ``size`` new positions may attend to."""
        places = self._lengths[:, None] + np.arange(size)
        keys = np.arange(places.max() + 1)
        seen = keys <= places[..., None]
        if window_size is not None:
            seen &= keys > places[..., None] - window_size
        return mx.array(seen[:, None])

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, H, T, D); all of them, up to the longest row."""
        size = keys.shape[2]
        places = self._lengths[:, None] + np.arange(size, dtype=np.int32)
        end = int(places.max()) + 1
        self._keys = _with_room(self._keys, keys, end)
        self._values = _with_room(self._values, values, end)
        at = mx.array(places[:, None, :, None])
        self._keys = mx.put_along_axis(
            self._keys, mx.broadcast_to(at, keys.shape), keys, 2
        )
        self._values = mx.put_along_axis(
            self._values, mx.broadcast_to(at, values.shape), values, 2
        )
        self._lengths = self._lengths + size
        return self._keys[:, :, :end], self._values[:, :, :end]


def _with_room(held: mx.array | None, new: mx.array, end: int) -> mx.array:
    """``held`` with at least ``end`` positions, zeroed: masked NaN would spread."""
    batch, heads, _, size = new.shape
    have = 0 if held is None else held.shape[2]
    if end <= have:
        return held
    room = -(-end // ROOM) * ROOM - have
    empty = mx.zeros((batch, heads, room, size), new.dtype)
    return empty if held is None else mx.concatenate([held, empty], axis=2)

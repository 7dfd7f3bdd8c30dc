"""The cache of one layer of a decoder-only model, with a length for each row."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, create_attention_mask

from speculation.session import put_row, take_rows, wipe_row

ROOM = 256  # positions by which a cache grows


class RowCache(KVCache):
    """Keys and values of one layer, with a length of its own for each row.

    It stands where mlx-lm's own stands: models ask it for ``offset``, for a mask, and
    to take in new keys and values. Where all rows are equally long, as one alone is, it
    answers as that does. What lies beyond a row's length is masked and later
    overwritten, so a rewind only changes lengths.
    """

    def __init__(self, rows: int, positions: int | None):
        """
        Args:
            rows: B.
            positions: the most that a row may have; None for any number.
        """
        self.keys = self.values = None
        # A finished row is fed on while others are not: not beyond the last position.
        self._last = (positions or np.iinfo(np.int32).max) - 1
        self.rewind([0] * rows)

    def rewind(self, lengths: list[int]) -> None:
        """Have ``lengths[b]`` positions of each row b count, and no others."""
        self._lengths = np.array(lengths, np.int32)
        # Every layer is asked for these in every pass.
        self._longest = max(lengths, default=0)
        self._together = min(lengths, default=0) == self._longest

    @property
    def nbytes(self) -> int:
        """Of keys and values, with the room there is."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def size(self) -> int:
        """How many positions the longest row has."""
        return self._longest

    @property
    def offset(self) -> int | mx.array:
        """Where the rows' next positions are: one number, or (B,) int32."""
        if self._together:
            return min(self._longest, self._last)
        return mx.array(np.minimum(self._lengths, self._last))

    def trim(self, count: int) -> int:
        """Forget the last ``count`` positions of each row, or what there is; how many
        that was of the longest."""
        before = self._longest
        self.rewind([max(length - count, 0) for length in self._lengths.tolist()])
        return before - self._longest

    def take(self, rows: list[int], blank: int = 0) -> None:
        """Have these rows instead, of which some may be the same, and so many empty
        ones behind them; not much more room than they need."""
        lengths = [*self._lengths[rows].tolist(), *[0] * blank]
        if self.keys is not None:  # of a prompt of one token nothing is fed
            room = _rounded(max(lengths, default=0))
            if room > self.keys.shape[2] // 2:
                room = self.keys.shape[2]
            self.keys = take_rows(self.keys[:, :, :room], rows, blank)
            self.values = take_rows(self.values[:, :, :room], rows, blank)
        self.rewind(lengths)

    def put(self, rows: list[int], other: "RowCache", which: list[int]) -> None:
        """Have another cache's rows, ``which[i]`` of it as ``rows[i]``."""
        lengths = self._lengths.tolist()
        for row, its in zip(rows, which, strict=True):
            lengths[row] = int(other._lengths[its])
        if other.keys is not None:  # prompts of one token have none
            for name in ("keys", "values"):
                mine, theirs = getattr(self, name), getattr(other, name)
                if mine is None:
                    mine = mx.zeros((len(lengths), *theirs.shape[1:]), theirs.dtype)
                mine, theirs = _with_room(mine, theirs), _with_room(theirs, mine)
                setattr(self, name, None)  # so that it is written in place
                for row, its in zip(rows, which, strict=True):
                    mine = put_row(mine, row, theirs[its : its + 1])
                setattr(self, name, mine)
        self.rewind(lengths)

    def wipe(self, rows: list[int]) -> None:
        """Have zeros behind the positions that count, in these rows."""
        for row in rows:
            length = int(self._lengths[row])
            if self.keys is not None and length < self.keys.shape[2]:
                self.keys = wipe_row(self.keys, row, length)
                self.values = wipe_row(self.values, row, length)

    def make_mask(
        self, size: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What each of ``size`` new positions may attend to: bool, (T, keys) or
        (B, 1, T, keys); or "causal", or None for everything."""
        if self._together:
            return create_attention_mask(size, self._longest, return_array, window_size)
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
        end = self._longest + size
        self.keys = self._append(self.keys, keys, end)
        self.values = self._append(self.values, values, end)
        self._lengths = self._lengths + size
        self._longest = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _append(self, held: mx.array | None, new: mx.array, end: int) -> mx.array:
        """``held`` with ``new`` (B, H, T, D) after each row's length.

        It has ``end`` positions then at least, zeroed: masked NaN would spread.
        """
        batch, heads, size, head_size = new.shape
        have = 0 if held is None else held.shape[2]
        if end > have:
            room = _rounded(end) - have
            empty = mx.zeros((batch, heads, room, head_size), new.dtype)
            held = empty if held is None else mx.concatenate([held, empty], axis=2)
        if self._together:
            held[:, :, end - size : end] = new
            return held
        places = self._lengths[:, None] + np.arange(size, dtype=np.int32)
        at = mx.broadcast_to(mx.array(places[:, None, :, None]), new.shape)
        return mx.put_along_axis(held, at, new, 2)


def _rounded(positions: int) -> int:
    return max(1, -(-positions // ROOM)) * ROOM


def _with_room(cache: mx.array, other: mx.array) -> mx.array:
    """A cache (B, H, C, D) with at least the other's positions, the new ones zero."""
    more = other.shape[2] - cache.shape[2]
    if more <= 0:
        return cache
    return mx.pad(cache, [(0, 0), (0, 0), (0, more), (0, 0)])

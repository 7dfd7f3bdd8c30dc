"""Tensors read out of a file that is mapped: whole, or a part of each.

A machine that holds a share of a model's rows or columns reads that share straight into
arrays of MLX's own, and neither reads nor makes room for the rest.
"""

import io
import json
import math
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

_SAFETENSORS_DTYPES = {
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    np.dtype("<V2"): "BF16",
    np.dtype("<u4"): "U32",
    np.dtype("|u1"): "U8",
}

_PIECE = 1 << 23  # bytes that a thread reads at a time
#: Bytes of a row up to which it is read whole, and what is wanted cut out in memory: a
#: read of its own for each run takes as long as 16 to 32 KiB that are passed over.
_SHORT_ROW = 1 << 15
_ROWS = 1 << 19  # bytes of such rows that a thread holds at a time


class Part(NamedTuple):
    """Which indices of a tensor's axis are wanted: 0 or 1, and (start, stop) pairs.

    The pairs are in order and do not overlap; some may be empty. Without any the tensor
    is not wanted at all.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]


class Stored(NamedTuple):
    """A tensor in the file: mapped, the offset of its data, and what is wanted of it.

    ``shape`` and ``nbytes`` are those of the part that is wanted.
    """

    view: np.ndarray
    offset: int
    part: Part | None = None

    def only(self, part: Part | None) -> "Stored":
        """The tensor, of which only this part is wanted; None for all of it.

        Raises:
            ValueError: it has no such axis, or a range is not inside it.
        """
        if part and part.ranges:
            shape = self.view.shape
            if part.axis not in range(min(len(shape), 2)):
                raise ValueError(f"there is no axis {part.axis} to cut in {shape}")
            for start, stop in part.ranges:
                if not 0 <= start <= stop <= shape[part.axis]:
                    raise ValueError(
                        f"{start} to {stop} is outside axis {part.axis} of {shape}"
                    )
        return self._replace(part=part)

    @property
    def wanted(self) -> bool:
        return self.part is None or bool(self.part.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.part is None:
            return self.view.shape
        before, after = self._around()
        return (*before, sum(b - a for a, b in self.part.ranges), *after)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.view.itemsize

    def cut(self) -> np.ndarray:
        """The part, as an array: mapped where it is in one piece, else a copy."""
        if self.part is None:
            return self.view
        every = (slice(None),) * self.part.axis
        pieces = [self.view[(*every, slice(a, b))] for a, b in self.part.ranges]
        return np.concatenate(pieces, self.part.axis) if pieces[1:] else pieces[0]

    def place(self, start: int) -> "_Place":
        """Where a tensor in C order is, whose part is to begin at ``start``."""
        size = self.view.nbytes
        whole = _Place(start, self.offset, 1, size, ((0, size),))
        if self.part is None:
            return whole
        before, after = self._around()
        rows, each = math.prod(before), math.prod(after) * self.view.itemsize
        spans: list[tuple[int, int]] = []
        for a, b in self.part.ranges:
            if spans and spans[-1][1] == a * each:
                spans[-1] = (spans[-1][0], b * each)
            else:
                spans.append((a * each, b * each))
        if spans == [(0, size // rows)]:
            return whole
        return _Place(start, self.offset, rows, size // rows, tuple(spans))

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The lengths of the axes before and after the one that is cut."""
        axis = self.part.axis
        return self.view.shape[:axis], self.view.shape[axis + 1 :]


class _Place(NamedTuple):
    """Where the bytes of a part are: from each row of ``stride`` bytes the same spans.

    A tensor that is whole or cut along its first axis is a single row. In the made-up
    file the part is in one piece, from ``start``.
    """

    start: int
    offset: int
    rows: int
    stride: int
    spans: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """How many bytes of a row are wanted."""
        return sum(b - a for a, b in self.spans)

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.width

    @property
    def by_rows(self) -> bool:
        """Whether rows are read whole, then cut."""
        return self.rows > 1 and self.stride <= _SHORT_ROW

    @property
    def piece(self) -> int:
        """How many bytes of the part a thread reads at a time."""
        if self.by_rows:
            return max(_ROWS // self.stride, 1) * self.width
        return _PIECE

    def runs(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs of the file, as (offset, length), that are a range of the part."""
        width = self.width
        for row in range(at // width, -(-end // width)):
            before = row * width
            for start, stop in self.spans:
                low, high = max(at - before, 0), min(end - before, stop - start)
                if low < high:
                    yield self.offset + row * self.stride + start + low, high - low
                before += stop - start


class SafetensorsStream(io.RawIOBase):
    """A file, presented as the safetensors file that it could have been.

    MLX reads safetensors straight into its own buffers; arrays made from numpy's cost a
    second copy, and on most systems the time of it. All that differs is where the data
    are, so this is a header made up, in which the parts that are wanted lie one after
    the other, and what is asked of them is read from where they are. Large reads are
    shared among threads, which doubles their speed.
    """

    def __init__(self, file: int, tensors: Mapping[str, Stored]):
        """
        Args:
            tensors: those not in C order, and parts without a number, are passed over.
        """
        super().__init__()
        header = {}
        self._places: list[_Place] = []
        at = 0
        for name, stored in tensors.items():
            if stored.view.flags.c_contiguous and stored.nbytes:
                place = stored.place(at)
                at = place.stop
                self._places.append(place)
                header[name] = {
                    "dtype": _SAFETENSORS_DTYPES[stored.view.dtype],
                    "shape": list(stored.shape),
                    "data_offsets": [place.start, place.stop],
                }
        text = json.dumps(header).encode()
        self._header = struct.pack("<Q", len(text)) + text
        self._end = len(self._header) + at
        self._file = file
        self._at = 0
        self._threads = ThreadPoolExecutor(4)
        self.error: OSError | None = None

    def close(self) -> None:
        self._threads.shutdown()
        super().close()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        if self._at < len(self._header):
            part = self._header[self._at : self._at + len(into)]
            into[: len(part)] = part
            self._at += len(part)
            return len(part)
        into = into[: max(self._end - self._at, 0)]
        pieces = self._pieces(into, self._at - len(self._header))
        # MLX asks from a thread of its own, which an exception would take down along
        # with the process: it is kept for later.
        try:
            list(self._threads.map(lambda piece: self._fill(*piece), pieces))
        except OSError as error:
            self.error = error
        self._at += len(into)
        return len(into)

    def read(self, size: int = -1) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])

    def _pieces(
        self, into: memoryview, start: int
    ) -> Iterator[tuple[memoryview, _Place, int, int]]:
        """What threads read one each of, from ``start`` on: bytes of a single part."""
        stop = start + len(into)
        first = bisect_right(self._places, start, key=lambda place: place.start) - 1
        for place in self._places[max(first, 0) :]:
            last = min(stop, place.stop)
            for at in range(max(start, place.start), last, place.piece):
                end = min(at + place.piece, last)
                piece = into[at - start : end - start]
                yield piece, place, at - place.start, end - place.start

    def _fill(self, into: memoryview, place: _Place, at: int, end: int) -> None:
        """Read the bytes ``at`` to ``end`` of a part."""
        if place.by_rows:
            self._cut(into, place, at, end)
            return
        for offset, length in place.runs(at, end):
            self._read(into[:length], offset)
            into = into[length:]

    def _cut(self, into: memoryview, place: _Place, at: int, end: int) -> None:
        """The same, of rows that are read whole."""
        first, last = at // place.width, -(-end // place.width)
        rows = np.empty((last - first, place.stride), np.uint8)
        self._read(memoryview(rows).cast("B"), place.offset + first * place.stride)
        cut = np.concatenate([rows[:, a:b] for a, b in place.spans], 1).reshape(-1)
        before = first * place.width
        into[:] = cut[at - before : end - before].data

    def _read(self, into: memoryview, offset: int) -> None:
        """Read as much as there is room for."""
        while into:
            got = os.preadv(self._file, [into], offset)
            if not got:
                raise OSError("the file has become shorter")
            into, offset = into[got:], offset + got

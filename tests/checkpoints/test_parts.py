"""Parts of tensors, read out of an npz: against numpy's slices of the same file."""

import os
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import reading
from checkpoints.converted import WEIGHTS, MappedWeights
from checkpoints.reading import Part
from system.errors import InputError

DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("V2"),
    "uint32": np.dtype("<u4"),
    "uint8": np.dtype("|u1"),
}
PIECE = 1 << 23
#: What makes rows be read whole, and what makes a read of every run.
ROWS, RUNS = 1 << 30, 0


def array(shape, dtype, seed=0, order="C"):
    """Random bits."""
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    bits = np.random.default_rng(seed).bytes(size)
    return np.frombuffer(bits, DTYPES[dtype]).reshape(shape).copy(order)


def save(folder, **arrays):
    path = Path(folder) / WEIGHTS
    np.savez(path, **arrays)
    return path


def shapes(arrays):
    """What is expected of the file: each tensor, whole."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: mx.zeros(value.shape, getattr(mx, names[value.dtype]))
        for name, value in arrays.items()
    }


def cut(whole, part):
    """The oracle."""
    if part is None:
        return whole
    slices = [whole[a:b] if part.axis == 0 else whole[:, a:b] for a, b in part.ranges]
    return np.concatenate(slices, part.axis)


def require_same(value, expected, dtype):
    """To the bit: a NaN too, and bfloat16 as numpy has it."""
    assert value.dtype == getattr(mx, dtype)
    assert value.shape == expected.shape
    bits = mx.contiguous(value).reshape(-1).view(mx.uint8)
    assert np.array(bits).tobytes() == expected.tobytes()


def require_parts(path, arrays, parts):
    """What is loaded, and its size, are those of numpy's slices of the file."""
    stored = MappedWeights(path)
    loaded = stored.load(shapes(arrays), part=parts.get)
    wanted = [name for name in arrays if parts.get(name) != Part(0, ())]
    assert list(loaded) == wanted
    size = 0
    with np.load(path) as theirs:
        for name in wanted:
            expected = cut(theirs[name], parts.get(name))
            kind = next(n for n, d in DTYPES.items() if d == expected.dtype)
            require_same(loaded[name], expected, kind)
            size += expected.nbytes
    assert stored.bytes(parts.get) == size


@st.composite
def tensors(draw):
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from(list(DTYPES)))
    order = draw(st.sampled_from("CCF"))
    whole = array(shape, dtype, draw(st.integers(0, 99)), order)
    axis = draw(st.integers(0, min(len(shape), 2) - 1))
    ends = draw(st.lists(st.integers(0, shape[axis]), max_size=8))
    ends = sorted(ends[: len(ends) // 2 * 2])
    ranges = tuple(zip(ends[::2], ends[1::2], strict=True))
    part = Part(axis, ranges) if ranges else draw(st.sampled_from([None, Part(0, ())]))
    return whole, part


@given(
    st.lists(tensors(), min_size=1, max_size=4),
    st.sampled_from([1, 5, 64, PIECE]),
    st.sampled_from([ROWS, RUNS]),
)
def test_any_parts(drawn, piece, short):
    arrays = {f"t{i}": whole for i, (whole, _) in enumerate(drawn)}
    parts = {f"t{i}": part for i, (_, part) in enumerate(drawn)}
    sizes = {"_PIECE": piece, "_ROWS": piece, "_SHORT_ROW": short}
    with TemporaryDirectory() as folder, mock.patch.multiple(reading, **sizes):
        require_parts(save(folder, **arrays), arrays, parts)


@pytest.mark.parametrize(
    "shape, part",
    [
        ((2100, 5000), None),
        ((2100, 5000), Part(0, ((1, 900), (901, 902), (1000, 2100)))),
        ((2100, 5000), Part(1, ((7, 7), (8, 2400), (2500, 5000)))),
        ((220, 50000), Part(1, ((3, 20001), (30000, 50000)))),
        ((10_000_000,), Part(0, ((3, 5_000_001), (5_000_001, 9_999_999)))),
    ],
)
def test_parts_of_several_pieces(tmp_path, shape, part):
    """Short rows and long ones, more than two pieces each, and another behind them."""
    arrays = {"large": array(shape, "bfloat16"), "small": array((3, 5), "uint32")}
    path = save(tmp_path, **arrays)
    require_parts(path, arrays, {"large": part, "small": Part(1, ((1, 3),))})
    size = MappedWeights(path).bytes({"large": part, "small": Part(0, ())}.get)
    assert size > 2 * PIECE


@pytest.mark.parametrize("short", [ROWS, RUNS])
def test_any_range_of_the_stream(tmp_path, monkeypatch, short):
    """MLX asks for a tensor at a time, but need not."""
    arrays = {"a": array((5, 7), "uint8"), "b": array((6,), "uint32", 1)}
    stored = MappedWeights(save(tmp_path, **arrays))._stored
    parts = {"a": Part(1, ((1, 3), (4, 7))), "b": Part(0, ((0, 2), (3, 6)))}
    monkeypatch.setattr(reading, "_SHORT_ROW", short)
    monkeypatch.setattr(reading, "_ROWS", 20)
    expected = b"".join(cut(arrays[name], parts[name]).tobytes() for name in arrays)
    with (tmp_path / WEIGHTS).open("rb") as file:
        wanted = {name: stored[name].only(parts[name]) for name in arrays}
        stream = reading.SafetensorsStream(file.fileno(), wanted)
        end = stream.seek(0, os.SEEK_END)
        begin = end - len(expected)
        for start in range(len(expected) + 1):
            for stop in range(start, len(expected) + 1):
                stream.seek(begin + start)
                assert stream.read(stop - start) == expected[start:stop]
                assert stream.tell() == begin + stop
        assert stream.read(8) == b""
        stream.close()


def test_converted(tmp_path):
    """A part's numbers, and no others, become the dtype that is wished for."""
    whole = np.array([[1, 2, 3], [4, 1e5, 6]], np.float32)
    stored = MappedWeights(save(tmp_path, x=whole))
    expected = {"x": mx.zeros((2, 3))}
    rest = Part(1, ((0, 1), (2, 3)))
    half = stored.load(expected, lambda name: mx.float16, lambda name: rest)["x"]
    assert half.dtype == mx.float16
    assert half.tolist() == [[1, 3], [4, 6]]
    with pytest.raises(InputError, match="x has numbers beyond float16"):
        stored.load(expected, lambda name: mx.float16, lambda name: Part(1, ((1, 2),)))
    none = stored.load(
        expected, lambda name: mx.float16, lambda name: Part(1, ((2, 2),))
    )
    assert (none["x"].dtype, none["x"].shape) == (mx.float16, (2, 0))


@pytest.mark.parametrize(
    "shape, part",
    [
        ((3, 4), Part(0, ((0, 4),))),
        ((3, 4), Part(1, ((0, 1), (2, 5)))),
        ((3, 4), Part(1, ((5, 5),))),
        ((3, 4), Part(0, ((-1, 2),))),
        ((3, 4), Part(0, ((2, 1),))),
        ((3, 4), Part(-1, ((0, 1),))),
        ((3, 4, 5), Part(2, ((0, 1),))),
        ((3,), Part(1, ((0, 1),))),
        ((), Part(0, ((0, 1),))),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_outside_the_tensor(tmp_path, shape, part, order):
    arrays = {"x": array(shape, "float32", order=order)}
    stored = MappedWeights(save(tmp_path, **arrays))
    with pytest.raises(ValueError, match="axis"):
        stored.load(shapes(arrays), part=lambda name: part)
    with pytest.raises(ValueError, match="axis"):
        stored.bytes(lambda name: part)


@pytest.fixture
def reads(monkeypatch):
    """The reads that were asked for: (offset, length)."""
    asked, preadv = [], os.preadv

    def counted(file, buffers, offset):
        asked.extend((offset, memoryview(each).nbytes) for each in buffers)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return asked


def test_what_is_not_wanted_is_checked_all_the_same(tmp_path, reads):
    """Against the shape of all of it, as is what is wanted in part."""
    arrays = {"x": array((4, 4), "float32"), "y": array((4, 4), "uint8")}
    stored = MappedWeights(save(tmp_path, **arrays))
    parts = {"x": Part(0, ()), "y": Part(0, ((0, 2),))}
    for name, wrong in [("x", (2, 4)), ("y", (2, 4))]:
        expected = shapes(arrays) | {name: mx.zeros(wrong)}
        with pytest.raises(InputError, match=f"{name} has the shape"):
            stored.load(expected, part=parts.get)
    assert not reads
    assert stored.load(shapes(arrays), part=lambda name: Part(0, ())) == {}
    assert not reads


@pytest.mark.parametrize(
    "shape, part, runs",
    [
        ((100, 300), None, [(0, 30000)]),
        ((100, 300), Part(0, ((0, 100),)), [(0, 30000)]),
        ((2, 40000), Part(1, ((0, 1), (1, 40000))), [(0, 80000)]),
        (
            (9, 300),
            Part(0, ((1, 2), (2, 4), (5, 5), (6, 9))),
            [(300, 900), (1800, 900)],
        ),
        ((1, 300), Part(1, ((10, 20), (30, 60))), [(10, 10), (30, 30)]),
        ((300,), Part(0, ((10, 20), (30, 60))), [(10, 10), (30, 30)]),
        ((100, 300), Part(1, ((0, 0),)), []),
        # Of a short row all is read, of a long one what is wanted.
        ((100, 300), Part(1, ((0, 10), (20, 30))), [(0, 30000)]),
        ((2, 1 << 15), Part(1, ((0, 10),)), [(0, 1 << 16)]),
        (
            (2, 40000),
            Part(1, ((0, 10), (20, 50))),
            [(0, 10), (20, 30), (40000, 10), (40020, 30)],
        ),
    ],
)
def test_only_a_part_is_read(tmp_path, reads, shape, part, runs):
    """Other tensors and the rest of this one stay where they are; what adjoins is one
    read."""
    arrays = {
        "before": array((50, 50), "float32"),
        "x": array(shape, "uint8"),
        "after": array((50, 50), "float32"),
    }
    stored = MappedWeights(save(tmp_path, **arrays))
    parts = {"before": Part(0, ()), "x": part, "after": Part(0, ())}
    stored.load(shapes(arrays), part=parts.get)
    offset = stored._stored["x"].offset
    assert reads == [(offset + start, length) for start, length in runs]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(6000, 4000), (400, 60000)])
def test_no_room_is_made_for_the_rest(tmp_path, axis, shape):
    """In MLX's memory the part; besides, little for the rows that threads cut."""
    arrays = {"x": array(shape, "float16")}
    stored, expected = MappedWeights(save(tmp_path, **arrays)), shapes(arrays)
    half = Part(axis, ((0, 100), (200, 200 + shape[axis] // 4)))
    size = stored.bytes(lambda name: half)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    loaded = stored.load(expected, part=lambda name: half)
    _, besides = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded["x"].nbytes == size
    assert mx.get_peak_memory() - before < size + (1 << 16)
    assert besides < 5 << 20


@pytest.mark.parametrize("shape", [(100, 300), (100, 40000)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_file_that_becomes_shorter(tmp_path, shape, axis):
    """Where it ends before what is read of it: else nobody notices."""
    arrays = {"x": array(shape, "uint8")}
    path = save(tmp_path, **arrays)
    stored = MappedWeights(path)
    os.truncate(path, stored._stored["x"].offset + arrays["x"].size - shape[1] - 1)
    with pytest.raises(InputError, match=r"cannot read .* become shorter"):
        stored.load(shapes(arrays), part=lambda name: Part(axis, ((60, 99),)))
    there = Part(0, ((0, 98),))
    loaded = stored.load(shapes(arrays), part=lambda name: there)
    require_same(loaded["x"], arrays["x"][:98], "uint8")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_disk_that_fails(tmp_path, monkeypatch, axis):
    def fail(*_):
        raise OSError("the disk is on fire")

    arrays = {"x": array((10, 10), "uint8")}
    stored = MappedWeights(save(tmp_path, **arrays))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(InputError, match=r"cannot read .* on fire"):
        stored.load(shapes(arrays), part=lambda name: Part(axis, ((1, 3),)))


@pytest.mark.parametrize("axis", [0, 1])
def test_reads_that_fall_short(tmp_path, monkeypatch, axis):
    """The system may give less than was asked for: the rest is asked for again."""
    preadv = os.preadv

    def little(file, buffers, offset):
        (buffer,) = buffers
        return preadv(file, [memoryview(buffer)[:7]], offset)

    monkeypatch.setattr(os, "preadv", little)
    arrays = {"x": array((20, 30), "uint8")}
    path = save(tmp_path, **arrays)
    require_parts(path, arrays, {"x": Part(axis, ((1, 9), (10, 19)))})

"""The folder of a converted model: where it lies, its config, and its weights.

``weights.npz`` is an uncompressed zip64 archive of npy members in C order, whose
data start at multiples of 64 bytes, bfloat16 as ``<V2`` (what MLX itself writes).
So ``mx.load`` opens it, and :class:`MappedWeights` has MLX read every tensor straight
into an array of its own, as fast as it reads safetensors; ``mx.load`` takes an npz
through Python's zipfile, several times slower.
"""

import math
import mmap
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from checkpoints.archive import member_spans
from checkpoints.reading import Part, SafetensorsStream, Stored
from checkpoints.replacing import recover
from system.errors import InputError
from system.files import map_file

WEIGHTS = "weights.npz"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

MODELS = Path(__file__).resolve().parents[1] / "models"

_ALIGNMENT = 64  # bytes: a cache line, and at least every dtype's own alignment
_LOCAL_HEADER_BYTES = 30  # zip's local file header, without name and extra field
_ZIP64_EXTRA = 20  # bytes that zipfile appends to the local header's extra field
_PADDING_ID = 0xD935  # the extra-field id that Android's zipalign pads with

_NPY_DTYPES = {
    mx.float32: "<f4",
    mx.float16: "<f2",
    mx.bfloat16: "<V2",
    mx.uint32: "<u4",
    mx.uint8: "|u1",
}
_MLX_DTYPES = {np.dtype(descr): dtype for dtype, descr in _NPY_DTYPES.items()}

#: What an npy header may say a dtype is; numpy's own spelling of bytes, too.
_STORED_DTYPES = {*_NPY_DTYPES.values(), "|V2"}
_NPY_HEADERS = {(1, 0): struct.Struct("<H"), (2, 0): struct.Struct("<I")}
_NPY_TEXT_BYTES = 4096
_NPY_TEXT = re.compile(
    rb"\{'descr': '([<|]\w\d)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? ?\} *\n?"
)


def locate(name: str) -> Path:
    """The folder of a converted model: ``name`` itself, else ``models/name``."""
    folders = (Path(name), MODELS / name)
    try:
        for folder in folders:
            if (folder / WEIGHTS).is_file():
                return folder
            earlier = recover(folder)
            if earlier:
                return earlier
        unconverted = next((folder for folder in folders if folder.is_dir()), None)
    except (
        OSError,
        ValueError,
    ) as error:  # a name that no file system takes, a folder barred
        raise InputError(f"cannot look for the model: {error}") from None
    if unconverted:
        raise InputError(
            f"{unconverted} holds no {WEIGHTS}: convert the checkpoint first "
            f"(python convert.py --model {name})"
        )
    raise InputError(
        f"no model '{name}': neither a folder nor in {MODELS}; convert it first "
        f"(python convert.py --model {name})"
    )


class WeightsWriter:
    """Writes tensors one by one into an npz that can be mapped into memory.

    The bytes depend on the tensors and their order alone, not on the time.
    """

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._zip.close()

    def write(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: mx.Dtype,
        blocks: Iterable[mx.array],
    ) -> None:
        """Append the tensor that ``blocks`` make up, one after the other in C order.

        Raises:
            ValueError: the blocks are not ``shape`` and ``dtype`` in all.
        """
        header = _npy_header(shape, dtype)
        member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01
        before = _LOCAL_HEADER_BYTES + len(member.filename.encode()) + _ZIP64_EXTRA
        before += self._zip.start_dir + 4  # 4: the padding's own id and length
        padding = -(before + len(header)) % _ALIGNMENT
        member.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        left = math.prod(shape)
        unlike = f"{name} was not written as {shape} of {dtype}"
        with self._zip.open(member, "w", force_zip64=True) as file:
            file.write(header)
            for block in blocks:
                left -= block.size
                if block.dtype != dtype or left < 0:
                    raise ValueError(unlike)
                bits = block.view(mx.uint16) if dtype == mx.bfloat16 else block
                bits = np.ascontiguousarray(np.array(bits, copy=False)).reshape(-1)
                file.write(bits.view(np.uint8).data)
        if left:
            raise ValueError(unlike)


def _npy_header(shape: tuple[int, ...], dtype: mx.Dtype) -> bytes:
    """The npy format's version 1.0 header (numpy.lib.format) of a C-order array."""
    described = {
        "descr": _NPY_DTYPES[dtype],
        "fortran_order": False,
        "shape": tuple(shape),
    }
    text = repr(described).encode("latin1")
    length = len(text) + 1 + -(10 + len(text) + 1) % _ALIGNMENT
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", length)
    return start + text.ljust(length - 1) + b"\n"


def dtype_of(name: str, dtype: mx.Dtype | None) -> mx.Dtype | None:
    """What a tensor is stored and computed in, in a T5 of this dtype: what exceeds
    float16 when it is computed with stays float32. None, for any, remains None."""
    if dtype is not None and dtype == mx.float16 and ".feed_forward.wo." in name:
        return mx.float32
    return dtype


def as_dtype(value: mx.array, dtype: mx.Dtype, name: str) -> mx.array:
    """A tensor in another dtype.

    Raises:
        InputError: a number of it is beyond that.
    """
    value = value.astype(dtype)
    if dtype == mx.float16 and not mx.isfinite(value).all().item():
        raise InputError(f"{name} has numbers beyond float16: give another --dtype")
    return value


class MappedWeights:
    """The tensors of an npz, mapped into memory; nothing is read until :meth:`load`.

    Any npz without compression will do: :class:`WeightsWriter`'s, MLX's or numpy's.
    """

    def __init__(self, path: Path):
        """
        Raises:
            InputError: the file is missing, or not a whole npz.
        """
        self._path = path
        try:
            self._stored = _map_members(map_file(path))
        except InputError:
            raise
        except Exception as error:  # damaged bytes make the parsers raise anything
            raise InputError(
                f"{path} is damaged or not an npz ({error}): convert the model again"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __len__(self) -> int:
        """How many tensors there are that are not empty."""
        return sum(stored.view.size > 0 for stored in self._stored.values())

    def dtypes(self) -> set[mx.Dtype]:
        """The dtypes that occur."""
        return {_MLX_DTYPES[stored.view.dtype] for stored in self._stored.values()}

    def bytes(self, part: Callable[[str], Part | None] = lambda name: None) -> int:
        """How many bytes the tensors take, or a part of each, as stored.

        Raises:
            ValueError: a part is not inside its tensor.
        """
        return sum(stored.nbytes for stored in self._parts(part).values())

    def load(
        self,
        expected: Mapping[str, mx.array],
        dtype: Callable[[str], mx.Dtype | None] = lambda name: None,
        part: Callable[[str], Part | None] = lambda name: None,
    ) -> dict[str, mx.array]:
        """Copy every tensor once, from the mapped file into an array of its own.

        Args:
            expected: an array (that is never computed) for each tensor that has to be
                there, of the shape it has when whole and of its kind: floating-point
                numbers of any width, or exactly these integers.
            dtype: what to convert a tensor's floating-point numbers to, one after the
                other; None leaves them as stored.
            part: what to read of a tensor; None reads all of it. One of which nothing
                is wanted is checked too, but not among those returned.

        Raises:
            InputError: the tensors are not those expected, and all of them are checked
                before any is read; or a number is beyond what it is converted to.
            ValueError: a part is not inside its tensor.
        """
        _check(self._path, self._stored, expected)
        parts = self._parts(part)
        with self._path.open("rb", buffering=0) as file:
            stream = SafetensorsStream(file.fileno(), parts)
            direct = mx.load(stream, format="safetensors")
            loaded = {}
            for name, stored in parts.items():
                value = direct.pop(name, None)
                if value is None:
                    value = _copy(stored.cut())
                # One by one: what is read and what it is converted to never add up.
                kind = dtype(name)
                if kind and mx.issubdtype(value.dtype, mx.floating):
                    try:
                        value = as_dtype(value, kind, f"{self._path}: {name}")
                    except InputError:
                        stream.close()
                        raise
                loaded[name] = value
                mx.eval(loaded[name])
            stream.close()
        if stream.error:
            raise InputError(f"cannot read {self._path}: {stream.error}")
        return loaded

    def _parts(self, part: Callable[[str], Part | None]) -> dict[str, Stored]:
        """The tensors of which something is wanted, and what."""
        parts = {name: each.only(part(name)) for name, each in self._stored.items()}
        return {name: stored for name, stored in parts.items() if stored.wanted}


def _copy(view: np.ndarray) -> mx.array:
    """An array from one that safetensors has no form for: transposed, or empty."""
    if _MLX_DTYPES[view.dtype] == mx.bfloat16:
        return mx.array(view.view(np.uint16)).view(mx.bfloat16)
    return mx.array(view)


def _map_members(mapped: mmap.mmap) -> dict[str, Stored]:
    """Every member of the archive as an array over the mapping."""
    tensors = {}
    for member, (start, size) in member_spans(mapped).items():
        name = member.removesuffix(".npy")
        tensors[name] = _map_npy(mapped, name, start, size)
    return tensors


def _map_npy(mapped: mmap.mmap, name: str, start: int, size: int) -> Stored:
    """The npy file at ``mapped[start : start + size]`` as an array.

    Its header (numpy.lib.format, version 1.0 or 2.0) is a Python literal in general;
    what numpy and MLX write for an array of numbers is matched, and nothing evaluated.
    """
    magic, major, minor = struct.unpack_from("<6s2B", mapped, start)
    if magic != b"\x93NUMPY" or (major, minor) not in _NPY_HEADERS:
        raise ValueError(f"{name} is no npy file of version 1 or 2")
    length = _NPY_HEADERS[major, minor]
    (text,) = length.unpack_from(mapped, start + 8)
    offset = start + 8 + length.size + text
    header = mapped[start + 8 + length.size : min(offset, start + size)]
    match = _NPY_TEXT.fullmatch(header) if text <= _NPY_TEXT_BYTES else None
    if not match:
        raise ValueError(f"{name} has an npy header that no array of numbers has")
    described, fortran_order = match[1].decode(), match[2] == b"True"
    shape = tuple(int(length) for length in match[3].split(b",") if length.strip())
    if described not in _STORED_DTYPES:
        raise ValueError(f"{name} has the dtype {described}")
    dtype = np.dtype(described)
    if offset - start + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} has not the size that its shape says")
    order = "F" if fortran_order else "C"
    return Stored(np.ndarray(shape, dtype, mapped, offset, order=order), offset)


def _check(
    path: Path, found: Mapping[str, Stored], expected: Mapping[str, mx.array]
) -> None:
    """Names, shapes and kinds agree, or an error names the first that does not."""
    again = "the folder's files do not belong together: convert the model again"
    for name, wanted in expected.items():
        if name not in found:
            raise InputError(f"{path} lacks {name}, which its config asks for; {again}")
        view = found[name].view
        if view.shape != tuple(wanted.shape):
            raise InputError(
                f"{path}: {name} has the shape {view.shape}, but its config asks for "
                f"{tuple(wanted.shape)}; {again}"
            )
        dtype = _MLX_DTYPES[view.dtype]
        floating = mx.issubdtype(wanted.dtype, mx.floating)
        if dtype != wanted.dtype and not (
            floating and mx.issubdtype(dtype, mx.floating)
        ):
            raise InputError(
                f"{path}: {name} holds {_short(dtype)}, but its config asks for "
                f"{'floating-point numbers' if floating else _short(wanted.dtype)}; "
                f"{again}"
            )
    extra = next((name for name in found if name not in expected), None)
    if extra:
        raise InputError(
            f"{path} has {extra}, which its config has no use for; {again}"
        )


def _short(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]

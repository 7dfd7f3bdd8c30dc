"""PyTorch's checkpoint files (``pytorch_model.bin``), read without PyTorch.

Both formats are mapped into memory, so a tensor costs nothing until it is read: the zip
archives that torch.save writes since version 1.6, and the concatenated pickles that it
wrote before (t5-11b's 45 GB of 2020 are one). Pickles can name any function to be
called; here they may name what makes up a tensor, and everything else is refused.
"""

import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint import member_spans
from errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

#: Storage classes -> (dtype as safetensors names it, numpy's, bfloat16 as raw bits).
_STORAGES = {
    "FloatStorage": ("F32", np.dtype("<f4")),
    "HalfStorage": ("F16", np.dtype("<f2")),
    "BFloat16Storage": ("BF16", np.dtype("<u2")),
    "DoubleStorage": ("F64", np.dtype("<f8")),
    "LongStorage": ("I64", np.dtype("<i8")),
    "IntStorage": ("I32", np.dtype("<i4")),
    "ShortStorage": ("I16", np.dtype("<i2")),
    "CharStorage": ("I8", np.dtype("i1")),
    "ByteStorage": ("U8", np.dtype("u1")),
    "BoolStorage": ("BOOL", np.dtype("?")),
}


class TorchTensor(NamedTuple):
    """A mapped tensor: its dtype as safetensors names it, and its bits."""

    dtype: str
    bits: np.ndarray


def read_torch(path: Path) -> dict[str, TorchTensor]:
    """Map the tensors of a state dict that torch.save wrote.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors by name.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            zipped = zipfile.is_zipfile(file)
            state = _read_zip(file, mapped) if zipped else _read_legacy(mapped)
        return {name: tensor.resolve() for name, tensor in _named(state)}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is incomplete") from None
    except _RefusedError as refused:
        raise InputError(f"{path} {refused}") from None
    except Exception as error:  # damaged bytes make the parsers raise anything
        raise InputError(f"{path} is damaged ({error}): fetch it again") from None


class _RefusedError(Exception):
    """The file is whole, but not what is read here."""


@dataclass
class _Storage:
    """A run of elements in the file, that tensors are views of."""

    dtype: str
    numpy: np.dtype
    size: int  # elements
    mapped: mmap.mmap | None = None
    start: int = 0  # bytes

    def place(self, mapped: mmap.mmap, start: int) -> int:
        """Say where in the file the elements lie; where they end."""
        self.mapped, self.start = mapped, start
        end = start + self.size * self.numpy.itemsize
        if end > len(mapped):
            raise ValueError("a tensor ends beyond the file")
        return end


@dataclass
class _View:
    """A tensor as pickled: a strided view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def resolve(self) -> TorchTensor:
        storage = self.storage
        if min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError("a tensor has a negative size, stride or offset")
        if len(self.shape) != len(self.strides):
            raise ValueError("a tensor has not one stride per dimension")
        last = sum((n - 1) * by for n, by in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) and self.offset + last >= storage.size:
            raise ValueError("a tensor reaches beyond its storage")
        if storage.mapped is None:
            raise ValueError("a tensor's storage is not in the file")
        width = storage.numpy.itemsize
        bits = np.ndarray(
            self.shape,
            storage.numpy,
            storage.mapped,
            storage.start + self.offset * width if math.prod(self.shape) else 0,
            tuple(by * width for by in self.strides),
        )
        return TorchTensor(storage.dtype, bits)


def _named(state: Any) -> list[tuple[str, _View]]:
    """The state dict's items, checked to be tensors by name."""
    if not isinstance(state, dict):
        raise _RefusedError(f"holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            kind = type(value).__name__
            raise _RefusedError(
                f"holds a {kind} under '{name}', where a tensor belongs"
            )
    return list(state.items())


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles dicts of tensors; refuses, by name, whatever else is asked for."""

    def __init__(self, file: Any, storage: Callable[..., _Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in allowed:
            raise _RefusedError(
                f"asks for {module}.{name}, which no tensor needs and which could run "
                f"code: it is not read"
            )
        return allowed[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, *rest = identity
        if kind != "storage":
            raise _RefusedError(f"holds a {kind}, not tensors alone")
        return self._storage(*rest)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> _View:
    return _View(storage, int(offset), tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _View, *_: Any) -> _View:
    return tensor


def _read_zip(file: Any, mapped: mmap.mmap) -> Any:
    """The archive's data.pkl, whose storages are members named data/KEY."""
    spans = member_spans(file, mapped)
    pickles = [name for name in spans if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _RefusedError("is a zip archive, but not one that torch.save wrote")
    folder = pickles[0].removesuffix("data.pkl")
    order = spans.get(f"{folder}byteorder")
    if order and mapped[order[0] : sum(order)] != b"little":
        raise _RefusedError("was written on a big-endian machine")

    def storage(kind: tuple, key: str, location: str, size: int) -> _Storage:
        start, length = spans[f"{folder}data/{key}"]
        found = _Storage(*kind, size)
        if found.place(mapped, start) > start + length:
            raise ValueError(f"storage {key} is shorter than its tensors")
        return found

    start, _ = spans[pickles[0]]
    mapped.seek(start)
    return _TensorUnpickler(mapped, storage).load()


def _read_legacy(mapped: mmap.mmap) -> Any:
    """Pickles in a row (magic, protocol, system, tensors, keys), then the storages."""

    def load(storage: Callable[..., _Storage] = _no_storage) -> Any:
        return _TensorUnpickler(mapped, storage).load()

    try:
        magic = load()
    except Exception:
        magic = None
    if magic != _LEGACY_MAGIC:
        raise _RefusedError("is no file that torch.save wrote, or an incomplete one")
    if load() != _LEGACY_PROTOCOL or not load()["little_endian"]:
        raise _RefusedError("is of a version or a machine that is not read here")
    storages: dict[str, _Storage] = {}

    def storage(
        kind: tuple, key: str, location: str, size: int, view: Any = None
    ) -> _Storage:
        if view is not None:
            raise _RefusedError("holds views of storages, which PyTorch 0.1 wrote")
        return storages.setdefault(key, _Storage(*kind, size))

    state = load(storage)
    keys = load()
    at = mapped.tell()
    for key in keys:
        (size,) = struct.unpack_from("<q", mapped, at)
        if size != storages[key].size:
            raise ValueError(f"storage {key} has not the size that its tensors say")
        at = storages[key].place(mapped, at + 8)
    return state


def _no_storage(*_: Any) -> _Storage:
    raise _RefusedError("has a tensor where none belongs")

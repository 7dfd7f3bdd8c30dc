"""PyTorch's checkpoint files (``pytorch_model.bin``), read without PyTorch.

Both formats are mapped into memory, so a tensor costs nothing until it is read: the zip
archives that torch.save writes since version 1.6, and the concatenated pickles that it
wrote before (t5-11b's 45 GB of 2020 are one). What a pickle may say is decided in
:mod:`torch_pickle`; here tensors get their place in the file.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints import torch_pickle
from checkpoints.archive import member_spans
from checkpoints.torch_pickle import RefusedError, Storage, View
from system.errors import InputError
from system.files import map_file

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

#: numpy's dtypes by safetensors' names; bfloat16 as raw bits.
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

#: All tensors together may be this many times the file: shared ones count each time,
#: and T5's embedding is in some checkpoints four times.
_SHARING = 8

#: Where Lightning, and others by habit, put a state dict.
_INSIDE = ("state_dict", "model_state_dict", "model")


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
        mapped = map_file(path)
        # What zipfile.is_zipfile looks for may stand anywhere in a legacy file.
        zipped = mapped[:4] == b"PK\x03\x04"
        views, places = (_read_zip if zipped else _read_legacy)(mapped)
        return {name: _map(view, mapped, places) for name, view in views.items()}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is incomplete") from None
    except RefusedError as refused:
        raise InputError(f"{path} {refused}") from None
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the parsers raise anything
        raise InputError(f"{path} is damaged ({error}): fetch it again") from None


def _named(state: Any, size: int) -> dict[str, View]:
    """The state dict of a file of ``size`` bytes, checked to be tensors by name.

    Frameworks keep it inside another one, beside what training needs.
    """
    if isinstance(state, dict):
        inside = [state[name] for name in _INSIDE if isinstance(state.get(name), dict)]
        state = inside[0] if inside else state
    if not isinstance(state, dict):
        raise RefusedError(f"holds {_a(state)}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise RefusedError(
                f"holds {_a(value)} under '{name}', where a tensor belongs: it is no "
                f"model, or the state of a training"
            )
    sizes = (view.size * _width(view.storage) for view in state.values())
    if sum(sizes) > _SHARING * size:
        raise RefusedError("has tensors that are many times as large as the file")
    return state


def _a(value: Any) -> str:
    """The name of its type, with an article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _width(storage: Storage) -> int:
    """Bytes of an element."""
    return _DTYPES[storage.dtype].itemsize


def _map(view: View, mapped: mmap.mmap, places: dict[str, int]) -> TorchTensor:
    """The view as an array over the file, its storage being where ``places`` says."""
    storage, width = view.storage, _width(view.storage)
    start = places[storage.key]
    if start + storage.size * width > len(mapped):
        raise ValueError("a tensor ends beyond the file")
    bits = np.ndarray(
        view.shape,
        _DTYPES[storage.dtype],
        mapped,
        start + view.offset * width if view.size else 0,
        # An empty tensor's strides lead nowhere, and numpy limits what they may be.
        tuple(by * width for by in view.strides) if view.size else None,
    )
    return TorchTensor(storage.dtype, bits)


def _read_zip(mapped: mmap.mmap) -> tuple[dict[str, View], dict[str, int]]:
    """The tensors of data.pkl, and where their storages begin: members data/KEY."""
    spans = member_spans(mapped)
    pickles = [name for name in spans if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedError("is a zip archive, but not one that torch.save wrote")
    folder = pickles[0].removesuffix("data.pkl")
    order = spans.get(f"{folder}byteorder")
    if order and mapped[order[0] : sum(order)] != b"little":
        raise RefusedError("was written on a big-endian machine")
    start, length = spans[pickles[0]]
    state, end = torch_pickle.load(mapped, start)
    if end > start + length:
        raise ValueError("the pickle ends beyond its member")
    views, places = _named(state, len(mapped)), {}
    for view in views.values():
        key = view.storage.key
        places[key], length = spans[f"{folder}data/{key}"]
        if view.storage.size * _width(view.storage) > length:
            raise ValueError(f"storage {key} is shorter than its tensors")
    return views, places


def _read_legacy(mapped: mmap.mmap) -> tuple[dict[str, View], dict[str, int]]:
    """Pickles in a row (magic, protocol, system, tensors, keys), then the storages."""
    try:
        magic, at = torch_pickle.load(mapped, 0, tensors=False)
    except (ValueError, KeyError, RefusedError):
        magic = None
    if magic != _LEGACY_MAGIC:
        raise RefusedError("is no file that torch.save wrote, or an incomplete one")
    protocol, at = torch_pickle.load(mapped, at, tensors=False)
    system, at = torch_pickle.load(mapped, at, tensors=False)
    little = isinstance(system, dict) and system.get("little_endian") is True
    if protocol != _LEGACY_PROTOCOL or not little:
        raise RefusedError("is of a version or a machine that is not read here")
    state, at = torch_pickle.load(mapped, at)
    keys, at = torch_pickle.load(mapped, at, tensors=False)
    views = _named(state, len(mapped))
    storages = {view.storage.key: view.storage for view in views.values()}
    if any(view.storage != storages[view.storage.key] for view in views.values()):
        raise ValueError("a storage is named with two sizes")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the storages have no names")
    places = {}
    for key in keys:
        (size,) = struct.unpack_from("<q", mapped, at)
        if key not in storages:
            raise RefusedError("holds more than a model: the state of a training")
        if size != storages[key].size:
            raise ValueError(f"storage {key} has not the size that its tensors say")
        places[key] = at + 8
        at = places[key] + size * _width(storages[key])
    return views, places

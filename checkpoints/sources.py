"""Checkpoints as Hugging Face has them: on the hub, in safetensors, in PyTorch's files.

Everything is mapped into memory: a checkpoint of 45 GB opens in an instant, and a
tensor costs memory while it is read.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta, Struct

from system.errors import InputError
from system.files import INDEX_BYTES, is_file, map_file, read_json, require_files, typed

#: Weight files, the preferred ones first: (single file, index of shards).
SAFETENSORS = "model.safetensors", "model.safetensors.index.json"
TORCH = "pytorch_model.bin", "pytorch_model.bin.index.json"

#: What belongs to a checkpoint beside its weights: configs, and tokenizers of any kind.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)

ADAPTER = (
    "holds an adapter (LoRA), not a model: merge it into its base model first (peft: "
    "merge_and_unload, then save_pretrained)"
)

#: Bytes of a tensor that are read at a time.
BLOCK = 1 << 23

#: Weights that are floating-point numbers: as safetensors names them.
FLOATS = ("F32", "F16", "BF16", "F64")

#: What safetensors stores, and numpy's dtype of the same width to map it by; bfloat16
#: and floats of 8 bits as raw bits.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "BOOL": "?",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
}

#: Bytes of a safetensors header, and tensors and files of a checkpoint: of t5-11b's
#: one file 0.1 million bytes and 1,300 tensors; of a model of 671 billion parameters
#: 91,000 tensors in 163 files.
HEADER_BYTES = 1 << 24
TENSORS = 1 << 18
FILES = 2000

_Place = Annotated[int, Meta(ge=0, le=1 << 48)]


class _Entry(Struct):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: Annotated[list[_Place], Meta(max_length=16)]
    data_offsets: tuple[_Place, _Place]


class _Index(Struct):
    """A sharded checkpoint's index: which file has which tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the source checkpoint, mapped and not yet read."""

    name: str
    dtype: str  # as safetensors names them
    bits: Any  # numpy array over the mapping, maybe strided; bfloat16 as uint16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def require_floats(self) -> None:
        """
        Raises:
            InputError: they are no floating-point numbers of 16 bits or more.
        """
        if self.dtype not in FLOATS:
            raise InputError(
                f"{self.name} has the dtype {self.dtype}: no weight does, but those of "
                f"quantized checkpoints; convert the one that it was made from"
            )

    def blocks(self) -> Iterator[Any]:
        """The values as ``mx.array`` blocks of rows, some megabytes each.

        Memory that is used again and again stays in the caches and needs no new pages:
        this is faster than a whole tensor at once.

        Raises:
            InputError: they are no floating-point numbers of 16 or 32 bits.
        """
        import mlx.core as mx

        self.require_floats()
        rows = len(self.bits)
        step = max(1, BLOCK // max(1, self.bits.nbytes // max(1, rows)))
        for start in range(0, rows, step):
            part = self.bits[start : start + step]
            # A GPU has no float64; nor has what is written.
            block = mx.array(part.astype("f4") if self.dtype == "F64" else part)
            yield block.view(mx.bfloat16) if self.dtype == "BF16" else block


#: By the names of ours, the tensors that each stacks, by rows.
Steps: TypeAlias = Mapping[str, list[Tensor]]


def stacked_shape(parts: list[Tensor]) -> tuple[int, ...]:
    """The shape of all parts, one below the other."""
    if any(not part.shape for part in parts):
        return ()  # a number stacks with nothing, and no weight is one
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Map every tensor of a checkpoint: safetensors or PyTorch, single or sharded.

    Raises:
        InputError: no weights, a shard is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}")
    require_files(folder)
    paths = weight_files(folder)
    if not paths:
        if is_file(folder / "adapter_config.json"):
            raise InputError(f"{folder} {ADAPTER}")
        names = ", ".join((*SAFETENSORS, *TORCH))
        raise InputError(f"{folder} holds no weights: none of {names}")
    safe = any(is_file(folder / name) for name in SAFETENSORS)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for path in paths:
        found = (_read_safetensors if safe else _read_bin)(path)
        its = path.stat()
        if (its.st_dev, its.st_ino) in seen:
            raise InputError(f"{path} is a file that its index has named before")
        seen.add((its.st_dev, its.st_ino))
        again = next((name for name in found if name in tensors), None)
        if again:
            raise InputError(f"{again} is in two files of {folder}")
        tensors |= found
        if len(tensors) > TENSORS:
            raise InputError(f"{folder} has over {TENSORS:,} tensors: no model does")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that :func:`open_checkpoint` reads, safetensors before PyTorch's.

    Raises:
        InputError: an index is damaged, or names what is not in the folder.
    """
    for single, index in (SAFETENSORS, TORCH):
        if is_file(folder / single):
            return [folder / single]
        if is_file(folder / index):
            return [folder / shard for shard in _shards(folder / index)]
    return []


def _shards(index: Path) -> list[str]:
    """The files that an index names, in order: of its own folder, no other."""
    values = read_json(index, limit=INDEX_BYTES)
    files = set(typed(values, _Index, str(index)).weight_map.values())
    if len(files) > FILES:
        raise InputError(f"{index} names over {FILES} files: no model has so many")
    for file in files:
        odd = file in ("", "..") or "\\" in file or "\0" in file
        if odd or file != Path(file).name:
            raise InputError(f"{index} names {file}, which is no file of its folder")
    return sorted(files)


def _read_bin(path: Path) -> dict[str, Tensor]:
    from checkpoints.torch_file import read_torch

    return {name: Tensor(name, *found) for name, found in read_torch(path).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of one file."""
    try:
        mapped = map_file(path)
        start, entries = _read_header(mapped)
        return {
            name: _map_tensor(mapped, start, name, entry)
            for name, entry in entries.items()
        }
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is incomplete") from None
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the parsers raise anything
        raise InputError(f"{path} is damaged ({error}): fetch it again") from None


def _read_header(mapped: mmap.mmap) -> tuple[int, dict[str, _Entry]]:
    """Where a safetensors file's data begin, and what its header says of each tensor.

    8 bytes of header size, a JSON header, the data: as the format wants it, tensors
    fill what follows the header, none lies over another.
    """
    (size,) = struct.unpack_from("<Q", mapped)
    if size > min(HEADER_BYTES, len(mapped) - 8):
        raise ValueError("its header is larger than it may be")
    header = msgspec.json.decode(mapped[8 : 8 + size], type=dict[str, msgspec.Raw])
    header.pop("__metadata__", None)
    if len(header) > TENSORS:
        raise ValueError(f"it has over {TENSORS:,} tensors")
    entries = {
        name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()
    }
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets[0] != end:
            raise ValueError(f"{name} does not begin where another one ends")
        end = entry.data_offsets[1]
    if 8 + size + end != len(mapped):
        raise ValueError("it has not the length that its header says")
    return 8 + size, entries


def _map_tensor(mapped: mmap.mmap, start: int, name: str, entry: _Entry) -> Tensor:
    """The tensor that a safetensors header's ``entry`` describes, data at ``start``."""
    import numpy as np

    if entry.dtype not in _DTYPES:
        raise InputError(f"{name} has the dtype {entry.dtype}: no weight does")
    dtype, shape = np.dtype(_DTYPES[entry.dtype]), tuple(entry.shape)
    begin, end = entry.data_offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has not the size that its shape says")
    bits = np.ndarray(shape, dtype, mapped, start + begin if end > begin else 0)
    return Tensor(name, entry.dtype, bits)

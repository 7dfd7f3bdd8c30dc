"""How the weights are stored: in what dtype, whether quantized, block by block."""

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from checkpoints.config import QUANTIZED, Quantization
from checkpoints.converted import WeightsWriter, dtype_of
from checkpoints.sources import Steps, Tensor, stacked_shape
from system.errors import InputError, say

#: Above this, ``--dtype auto`` stores float32 checkpoints as bfloat16.
BILLION = 1_000_000_000


#: What weights are stored in, by what safetensors calls it.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def choose_dtype(wanted: str, tensors: Mapping[str, Tensor]) -> str:
    """The dtype to store: as asked, or for ``auto`` what most of the checkpoint is in,
    but bfloat16 for float32 models of over a billion parameters."""
    if wanted != "auto":
        return wanted
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    most = max(sizes, key=sizes.__getitem__, default="F32")
    if most == "F32" and sizes.total() > BILLION:
        say("storing bfloat16, half of float32 (--dtype says else)")
        return "bfloat16"
    return DTYPES.get(most, "float32")


@dataclass(frozen=True)
class Storage:
    """How the tensors are stored: in what dtype, and whether quantized."""

    dtype: str
    quantization: Quantization | None = None

    def dtype_of(self, name: str) -> mx.Dtype:
        """As :func:`converted.dtype_of`."""
        return dtype_of(name, getattr(mx, self.dtype))

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Matrices whose rows are whole groups; position biases are none."""
        return (
            self.quantization is not None
            and len(shape) == 2
            and "position_bias" not in name
            and shape[1] % self.quantization.group_size == 0
        )

    def bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """What a tensor takes."""
        width = self.dtype_of(name).size
        if not self.quantizes(name, shape):
            return width * math.prod(shape)
        groups = math.prod(shape) // self.quantization.group_size
        affine = self.quantization.mode == "affine"
        packed = math.prod(shape) * self.quantization.bits // 8
        return packed + groups * (2 * width if affine else 1)


def require_space(folder: Path, steps: Steps, storage: Storage) -> None:
    """
    Raises:
        InputError: the weights need more than the folder's disk has left.
    """
    needed = sum(
        storage.bytes(name, stacked_shape(parts)) for name, parts in steps.items()
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the weights need {needed / 1e9:.1f} GB, but the disk of {folder.parent} "
            f"has {free / 1e9:.1f} GB left"
        )


def write_weights(path: Path, steps: Steps, storage: Storage) -> None:
    """Stream the source's tensors into an npz, with a progress bar.

    Raises:
        InputError: a number is beyond float16, which is to be stored.
    """
    total = sum(part.bits.nbytes for parts in steps.values() for part in parts)
    with (
        WeightsWriter(path) as writer,
        _progress(total) as progress,
    ):
        for name, parts in steps.items():
            dtype = storage.dtype_of(name)
            blocks = _blocks(parts, dtype, progress)
            if storage.quantizes(name, stacked_shape(parts)):
                packed = _quantized(blocks, storage.quantization)
                for part, value in zip(QUANTIZED, packed, strict=False):
                    member = name.removesuffix("weight") + part
                    writer.write(member, value.shape, value.dtype, [value])
            else:
                writer.write(name, stacked_shape(parts), dtype, blocks)


def _blocks(parts: list[Tensor], dtype: Any, progress: Any) -> Iterator[Any]:
    """The rows of all parts, one part after the other, converted.

    Raises:
        InputError: a number is beyond float16, which is to be stored.
    """

    for part in parts:
        for block in part.blocks():
            converted = block.astype(dtype)
            if dtype == mx.float16 and not mx.isfinite(converted).all().item():
                raise InputError(
                    f"{part.name} has numbers beyond float16: give another --dtype"
                )
            yield converted
            progress.update(block.nbytes)


def _quantized(blocks: Iterator[Any], how: Quantization) -> list[Any]:
    """A matrix packed block by block: its integers, scales and, for affine, biases."""

    packed = []
    for block in blocks:
        packed.append(mx.quantize(block, **asdict(how)))
        mx.eval(packed[-1])
    return [mx.concatenate(part) for part in zip(*packed, strict=True)]


def _progress(total: int) -> Any:
    """A progress bar over bytes, with rate and time left; none in a log file."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None)

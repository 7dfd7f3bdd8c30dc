"""Checkpoints as Hugging Face has them: on the hub, in safetensors, in PyTorch's files.

Everything is mapped into memory: a checkpoint of 45 GB opens in an instant, and a
tensor costs memory while it is read.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import InputError

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
    "merges.txt",
    "chat_template.jinja",
)

#: Bytes of a tensor that are read at a time.
BLOCK = 1 << 23

#: Weights that are floating-point numbers: as safetensors names them.
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the source checkpoint, mapped and not yet read."""

    name: str
    dtype: str  # as safetensors names them
    bits: Any  # numpy array over the mapping, maybe strided; bfloat16 as uint16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def blocks(self) -> Iterator[Any]:
        """The values as ``mx.array`` blocks of rows, some megabytes each.

        Memory that is used again and again stays in the caches and needs no new pages:
        this is faster than a whole tensor at once.

        Raises:
            InputError: they are no floating-point numbers of 16 or 32 bits.
        """
        import mlx.core as mx

        if self.dtype not in FLOATS:
            raise InputError(f"{self.name} has the dtype {self.dtype}: no weight does")
        rows = len(self.bits)
        step = max(1, BLOCK // max(1, self.bits.nbytes // max(1, rows)))
        for start in range(0, rows, step):
            block = mx.array(self.bits[start : start + step])
            yield block.view(mx.bfloat16) if self.dtype == "BF16" else block


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Map every tensor of a checkpoint: safetensors or PyTorch, single or sharded.

    Raises:
        InputError: no weights, a shard is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}")
    for (single, index), read in ((SAFETENSORS, _read_safetensors), (TORCH, _read_bin)):
        if (folder / single).is_file():
            return read(folder / single)
        if (folder / index).is_file():
            tensors: dict[str, Tensor] = {}
            for shard in _shards(folder / index):
                tensors |= read(folder / shard)
            return tensors
    names = ", ".join((*SAFETENSORS, *TORCH))
    raise InputError(f"{folder} holds no weights: none of {names}")


def _shards(index: Path) -> list[str]:
    """The files that an index names, in order."""
    from checkpoint import read_json

    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(file, str) for file in files.values()
    ):
        raise InputError(f"{index} has no weight_map from tensors to files")
    return sorted(set(files.values()))


def _read_bin(path: Path) -> dict[str, Tensor]:
    from torch_file import read_torch

    return {name: Tensor(name, *found) for name, found in read_torch(path).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of one file: 8 bytes of header size, a JSON header, the data."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (size,) = struct.unpack_from("<Q", mapped)
        header = json.loads(mapped[8 : 8 + size])
        header.pop("__metadata__", None)
        return {
            name: _map_tensor(mapped, 8 + size, name, entry)
            for name, entry in header.items()
        }
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is incomplete") from None
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the parsers raise anything
        raise InputError(f"{path} is damaged ({error}): fetch it again") from None


def _map_tensor(
    mapped: mmap.mmap, start: int, name: str, entry: Mapping[str, Any]
) -> Tensor:
    """The tensor that a safetensors header's ``entry`` describes, data at ``start``."""
    import numpy as np

    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if entry["dtype"] not in dtypes:
        raise InputError(f"{name} has the dtype {entry['dtype']}: no weight does")
    dtype, shape = np.dtype(dtypes[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has not the size that its shape says")
    bits = np.ndarray(shape, dtype, mapped, start + begin)
    return Tensor(name, entry["dtype"], bits)


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``name`` itself, or the hub's model of that name.

    From the hub come the files that are needed and not in its cache yet.

    Raises:
        InputError: neither a folder nor a model on the hub, no access, no network.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a folder: --revision is for models on the hub")
        return Path(name)
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        files = [
            file.rfilename
            for file in HfApi().model_info(name, revision=revision).siblings or ()
        ]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=needed(files))
        )
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its conditions on its page on the hub, then log "
            f"in (hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision '{revision}' on the hub") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"'{name}' is neither a folder nor a model on the hub, or a private one "
            f"(hf auth login)"
        ) from None
    except Exception as error:  # whatever the network stack raises
        return _cached(name, revision, error)


def fetch_causal(name: str) -> Path | None:
    """The folder of a decoder-only model on the hub; None if it is a T5.

    Its config alone decides, before any weights are fetched.

    Raises:
        InputError: there is no such model, no access, no network.
    """
    from huggingface_hub import hf_hub_download

    from checkpoint import CONFIG, read_json
    from config import FAMILY

    try:
        config = hf_hub_download(name, CONFIG)
    except Exception:  # whatever the network stack raises
        raise InputError(f"'{name}' is no model on the hub, or out of reach") from None
    if read_json(Path(config)).get("model_type") in FAMILY:
        return None
    return fetch(name)


def _cached(name: str, revision: str | None, error: Exception) -> Path:
    """What an earlier download left in the hub's cache, the hub being out of reach."""
    from huggingface_hub import snapshot_download

    for single, index in (SAFETENSORS, TORCH):
        patterns = [*COMPANIONS, single, index, single.replace(".", "-*.")]
        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=patterns,
                    local_files_only=True,
                )
            )
        except Exception:  # nothing there, or not all of it
            continue
        if (folder / single).is_file() or (folder / index).is_file():
            return folder
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise InputError(
        f"cannot fetch {name} from the hub ({reason}): check the network and run this "
        f"again (a download resumes where it stopped), or give a folder"
    ) from None


def needed(files: list[str]) -> list[str]:
    """Which of a repository's files make up the checkpoint.

    Safetensors where there are any, else PyTorch's; no TensorFlow, Flax or ONNX twins.

    Raises:
        InputError: there are no weights among them.
    """
    companions = [file for file in COMPANIONS if file in files]
    for single, index in (SAFETENSORS, TORCH):
        if single in files:
            return [*companions, single]
        if index in files:
            stem, _, suffix = single.rpartition(".")
            shards = [
                file
                for file in files
                if file.startswith(f"{stem}-") and file.endswith(f".{suffix}")
            ]
            return [*companions, index, *shards]
    raise InputError(
        "the model has weights neither in safetensors nor in PyTorch's form"
    )

"""The bundled pair in other dtypes: its weights rounded, or packed, and stored."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from checkpoints.config import QUANTIZED, Quantization, T5Config
from checkpoints.converted import CONFIG, WEIGHTS, MappedWeights, WeightsWriter
from checkpoints.storing import Storage
from console.choosing import BUNDLED
from model import T5
from pair import Pair
from system.files import read_json

VARIANTS = {
    "float32": Storage("float32"),
    "bfloat16": Storage("bfloat16"),
    "float16": Storage("float16"),
    "8 bits": Storage("bfloat16", Quantization.choose(bits=8)),
    "4 bits": Storage("bfloat16", Quantization.choose(bits=4)),
}


def load(storage: Storage, folder: Path, sources: tuple[Path, Path] = BUNDLED) -> Pair:
    """A pair as ``storage`` has it, by way of two folders that are made in ``folder``.

    Args:
        sources: the target and the draft, neither of them quantized.
    """
    folders = folder / "target", folder / "draft"
    for source, its in zip(sources, folders, strict=True):
        store(source, its, storage)
    return Pair.load(*map(str, folders))


def store(source: Path, folder: Path, storage: Storage) -> None:
    """A converted model once more, in another dtype."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in (WEIGHTS, CONFIG):
            shutil.copy(path, folder)
    config = read_json(source / CONFIG)
    if storage.quantization:
        config["quantization"] = asdict(storage.quantization)
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    stored = MappedWeights(source / WEIGHTS)
    model = T5(T5Config.read(source), tied="head.weight" not in stored)
    weights = stored.load(dict(tree_flatten(model.parameters())))
    with WeightsWriter(folder / WEIGHTS) as writer:
        for name, value in weights.items():
            value = value.astype(storage.dtype_of(name))
            if not storage.quantizes(name, value.shape):
                writer.write(name, value.shape, value.dtype, [value])
                continue
            packed = mx.quantize(value, **asdict(storage.quantization))
            for part, its in zip(QUANTIZED, packed, strict=True):
                member = name.removesuffix("weight") + part
                writer.write(member, its.shape, its.dtype, [its])

"""A model's parameters: their shapes and number, and those that are quantized."""

import math
from collections.abc import Collection
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from checkpoints.config import QUANTIZED, Quantization
from model import T5
from system.errors import InputError


def linear_paths(model: nn.Module) -> list[str]:
    """The modules whose weight can be quantized: matrices, but no position bias."""
    return [
        path
        for path, module in tree_flatten(
            model.leaf_modules(), is_leaf=nn.Module.is_module
        )
        if isinstance(module, nn.Linear | nn.Embedding)
    ]


def quantize(model: T5, how: Quantization | None, paths: Collection[str]) -> None:
    """Make the modules at ``paths`` quantized ones, whose weights are to be loaded.

    Raises:
        InputError: the config does not say how.
    """
    if how is None:
        raise InputError(
            "the weights are quantized, but the config does not say how: convert the "
            "model again"
        )
    modules = dict(model.named_modules())
    for path in paths:
        columns = modules[path].weight.shape[-1]
        if columns % how.group_size:
            raise InputError(
                f"{path} is quantized, but its {columns} columns are no whole groups "
                f"of {how.group_size}: convert the model again"
            )
    nn.quantize(model, class_predicate=lambda path, _: path in paths, **asdict(how))


def dequantize(weights: dict[str, mx.array], path: str, how: Quantization) -> mx.array:
    """Take a quantized matrix out of ``weights``, as float32."""
    packed = [weights.pop(f"{path}.{part}", None) for part in QUANTIZED]
    whole = mx.dequantize(*packed, **asdict(how)).astype(mx.float32)
    mx.eval(whole)  # one at a time
    return whole


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter."""
    return {name: value.shape for name, value in tree_flatten(model.parameters())}


def parameter_count(model: nn.Module) -> int:
    """How many numbers the parameters are; packed ones count as they are packed."""
    return sum(map(math.prod, parameter_shapes(model).values()))

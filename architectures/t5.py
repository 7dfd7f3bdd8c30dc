"""A T5 made: from a converted folder, or from its shapes alone."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from architectures.loading import USUAL, Loading
from architectures.parallel import join, open_part
from architectures.parameters import (
    dequantize,
    linear_paths,
    parameter_shapes,
    quantize,
)
from architectures.parts import Share
from architectures.slim import slim
from architectures.t5_session import T5Session
from checkpoints.config import T5Config
from checkpoints.converted import WEIGHTS, MappedWeights, as_dtype, dtype_of
from checkpoints.sources import Steps, Tensor
from model import T5
from speculation.session import Session
from system.device import on_cpu, prepare
from system.memory import prepare_memory, wire
from text.tokenizer import Tokenizer

#: What a config names whose checkpoint has no head.
BARE = ["T5Model"]


def load(folder: Path, how: Loading = USUAL) -> T5:
    """Load a converted model, or this rank's part of one.

    On a CPU quantized weights are unpacked.

    Raises:
        InputError: the folder lacks a file, or its files do not belong together, or a
            number is beyond the dtype that is wanted.
    """
    config = T5Config.read(folder)
    stored = MappedWeights(folder / WEIGHTS)
    config.require(len(stored), stored.bytes())
    dtype = prepare(how.dtype, how.compiles)
    become = partial(dtype_of, dtype=dtype)
    whole = T5(config, tied="head.weight" not in stored)
    quantized = [path for path in linear_paths(whole) if f"{path}.scales" in stored]
    if quantized:
        quantize(whole, config.quantization, quantized)
    expected = dict(tree_flatten(whole.parameters()))
    rank, ranks = (how.ranks.rank, how.ranks.size) if how.ranks else (0, 1)
    share = Share.of(config, rank, ranks, bool(quantized))
    parts = share.parts(expected)
    model = T5(share.config, tied="head" not in whole or not share.head)
    quantized = [path for path in quantized if share.head or path != "head"]
    unpacked = set(quantized) if on_cpu() else set()
    if unpacked or (dtype and not quantized):
        size = _bytes(parameter_shapes(model), become)
    else:
        size = stored.bytes(parts.get)
    prepare_memory(size, folder)
    weights = stored.load(
        expected,
        # What packed numbers are multiplied with: they are rounded once, unpacked.
        lambda name: (
            mx.float32 if name.rpartition(".")[0] in unpacked else become(name)
        ),
        parts.get,
    )
    for path in unpacked:
        name = f"{path}.weight"
        value = dequantize(weights, path, config.quantization)
        weights[name] = as_dtype(value, become(name), f"{folder / WEIGHTS}: {name}")
        mx.eval(weights[name])
    if quantized and not unpacked:
        quantize(model, config.quantization, quantized)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    wire(model, size)
    if how.ranks:
        join(model, share, how.ranks)
    return model


def random(config: T5Config, name: str, how: Loading = USUAL) -> T5:
    """A T5 with random weights, float32 on a CPU, else bfloat16, if nobody says.

    Raises:
        InputError: it does not fit the memory.
    """
    dtype = prepare(how.dtype, how.compiles) or mx.bfloat16
    become = partial(dtype_of, dtype=dtype)
    model = T5(config, tied=config.scale_outputs)
    size = _bytes(parameter_shapes(model), become)
    prepare_memory(size, Path(name))
    mx.random.seed(0)

    def fill(name: str, weight: mx.array) -> mx.array:
        dtype = become(name)
        if weight.ndim == 1:
            return mx.ones(weight.shape, dtype)
        value = mx.random.normal(weight.shape, dtype, scale=weight.shape[1] ** -0.5)
        mx.eval(value)  # one at a time: a model may take most of the memory
        return value

    model.update(tree_map_with_path(fill, model.parameters()))
    mx.eval(model.parameters())
    wire(model, size)
    return model


def _bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: Callable[[str], mx.Dtype]
) -> int:
    return sum(dtype(name).size * math.prod(shape) for name, shape in shapes.items())


def session(
    model: T5,
    vocabulary: int | None = None,
    banned: Collection[int] = (),
    compiled: bool = False,
) -> T5Session:
    """The model, as fast as this device can run it, with a batch's decoding state.

    Whatever else holds the model's weights, loses them: see :func:`slim.slim`.

    Args:
        vocabulary, banned, compiled: of :class:`T5Session`.
    """
    slim(model)
    return T5Session(model, vocabulary, banned, compiled)


def plan(
    config: Mapping[str, Any], source: Path, tensors: dict[str, Tensor]
) -> tuple[Steps, list[str]]:
    """The source tensors of each of ours, and what is odd about them, in lines.

    Args:
        config: the source's, as it stands.

    Raises:
        InputError: see :func:`t5_checkpoint.plan`.
    """
    from architectures import t5_checkpoint  # of no use where nothing is converted

    tensors = t5_checkpoint.by_t5s_names(tensors)
    steps = t5_checkpoint.plan(T5Config.read(source), tensors)
    odd = []
    left = t5_checkpoint.unused(steps, tensors)
    if left:
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        odd.append(f"not used, as T5 has no place for them: {names}")
    untied = config.get("tie_word_embeddings") is False
    if "head.weight" not in steps and (untied or config.get("architectures") == BARE):
        odd.append(
            "the checkpoint has no output head, which its config wants: the embedding "
            "takes its place"
        )
    return steps, odd


def embedding_rows(folder: Path) -> int:
    """How many ids a model has embeddings for."""
    return T5Config.read(folder).vocab_size


def eos_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text."""
    return T5Config.read(folder).eos_tokens


def open_session(
    folder: Path, tokenizer: Tokenizer, vocabulary: int, how: Loading
) -> Session:
    """Load a model into a session that emits the tokenizer's ids alone.

    Raises:
        InputError: as :func:`load`.
    """
    # Loaded before anything is as large as the config says: it fits the weights then.
    how = how._replace(compiled=how.compiles)  # it is looked up once
    model = load(folder, how)
    if how.ranks and how.ranks.rank:  # where no logits are
        return open_part(session(model, compiled=how.compiles), how.ranks)
    one = session(model, vocabulary, tokenizer.gaps(vocabulary), how.compiles)
    return open_part(one, how.ranks) if how.ranks else one

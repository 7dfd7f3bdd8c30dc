"""Loading decoder-only models: mlx-lm's, made to compute what transformers does.

mlx-lm has the layers. What its models pass over in a config is put right here for the
architectures of :mod:`verified`: position embeddings, activations, windows, heads.
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from architectures import verified
from architectures.causal_layers import HEAD, gpt2, mend
from architectures.verified import Verified
from checkpoints.config import find_size, with_text
from checkpoints.converted import CONFIG
from checkpoints.sources import Tensor, open_checkpoint, weight_files
from system.device import prepare
from system.errors import InputError
from system.files import read_json
from system.memory import prepare_memory, wire
from system.ranks import Ranks

#: What a config may call the number of its layers, and the most of anything else that
#: it counts: heads, experts, inputs.
_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
_MOST = 4096
#: What it may call the number of its queries' heads, and of its keys'.
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class Causal:
    """A decoder-only model, loaded.

    Attributes:
        model: ids (B, T) and caches -> logits (B, T, V).
        rows: V, how many ids it has logits for.
        heads: of the queries; None where its config does not say.
        positions: how many it takes: those that it was trained with, and has an
            embedding for where they are not computed; None where nothing says.
        verified: whether its text is known to be transformers', in batches too.
    """

    model: nn.Module
    rows: int
    heads: int | None
    positions: int | None
    verified: bool


def load(folder: Path, unverified: bool = False, ranks: Ranks | None = None) -> Causal:
    """Load a checkpoint as it is: Hugging Face's or mlx-community's, quantized or not.

    On a CPU the weights become float32, quantized ones too.

    Args:
        unverified: load an architecture that :mod:`verified` does not have as well.
        ranks: among which it is divided, by mlx-lm; None for the whole.

    Raises:
        ImportError: mlx-lm is missing.
        InputError: it does not have this architecture, that or one of its fields is not
            verified, the files are damaged, or the weights do not fit the memory; or
            mlx-lm cannot divide it.
    """
    config = read_json(folder / CONFIG)
    refuse_code(config, folder)
    known = verified.require(config, str(folder / CONFIG), unverified)
    quantization = _quantization(config, folder)
    tensors = require_weights(config, folder)
    dtype = prepare()
    try:
        model = _build(config, known, folder, tensors, quantization)
    except (InputError, ImportError):
        raise
    except (Exception, SystemExit) as error:  # of any kind, for whatever a folder holds
        raise InputError(f"mlx-lm cannot load {folder}: {error}") from None
    if dtype is not None:
        from mlx_lm.utils import dequantize_model

        model = dequantize_model(model)
        model.update(tree_map(_widen, model.parameters()))
    heads = find_size(config, *_HEADS)
    if ranks:
        _divide(model, config, ranks, folder)
        heads = heads // ranks.size
    if known is not None:
        mend(model, known)
    weights = tree_flatten(model.parameters())
    size = sum(weight.nbytes for _, weight in weights)
    prepare_memory(size, folder, "one that mlx-lm quantized (mlx-community)")
    mx.eval(model.parameters())
    wire(model, size)
    model.eval()
    positions = known.positions if known else _positions(config, model)
    return Causal(model, _rows(model), heads, positions, known is not None)


def refuse_code(config: dict[str, Any], folder: Path) -> None:
    """See to it that the folder's model is one of mlx-lm's, not Python that it brings.

    No code of a folder is ever run. ``auto_map`` names code as well; where transformers
    has the architecture itself, as it has Phi-3, that is a leftover and not needed.

    Raises:
        InputError: the model is defined by code in its folder.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise InputError(f"{folder / CONFIG} has no model_type that is a name")
    needed = "model_file" if config.get("model_file") is not None else None
    if not needed and config.get("auto_map") is not None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        needed = None if kind in CONFIG_MAPPING_NAMES else "auto_map"
    if needed:
        raise InputError(
            f"{folder / CONFIG} wants Python of the folder run ({needed}): no code "
            f"that comes with a model is run here"
        )


def _quantization(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """How mlx-lm quantized the weights; None where nobody did.

    Raises:
        InputError: another program did.
    """
    ours = config.get("quantization")
    theirs = config.get("quantization_config")
    if isinstance(theirs, dict) and "quant_method" in theirs and ours is None:
        raise InputError(
            f"{folder} is quantized by another program ({theirs['quant_method']}): "
            f"take what it was made from, or what mlx-lm quantized (mlx-community)"
        )
    ours = ours or theirs
    if ours is not None and not isinstance(ours, dict):
        raise InputError(f"{folder / CONFIG} has an odd value in quantization")
    return ours


def require_weights(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """See to it that the weights are whole, and that there are some for every layer.

    mlx-lm makes the layers that a config asks for before it looks at the weights.

    Returns:
        The checkpoint's tensors, mapped.

    Raises:
        InputError: they are damaged, missing, or fewer than the layers.
    """
    tensors = open_checkpoint(folder)
    filled = sum(tensor.bits.size > 0 for tensor in tensors.values())
    for values in with_text(config):
        for name, value in values.items():
            most = _most(name, filled)
            number = isinstance(value, int | float)
            if most is not None and number and not value <= most:
                raise InputError(
                    f"{folder / CONFIG} does not fit the weights: its {name} is over "
                    f"{most}, and they are {filled} tensors"
                )
    return tensors


def _most(name: str, tensors: int) -> int | None:
    """The most that a number of this name may be, with so many tensors; None for one
    that counts nothing."""
    if name.endswith(("_size", "_dim")):
        return 1 << 24
    if name in _LAYERS:
        return min(tensors // 2, 1000)
    counts = any(word in name for word in ("num_", "layers", "expert"))
    return _MOST if counts else None


def _build(
    config: dict[str, Any],
    known: Verified | None,
    folder: Path,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any] | None,
) -> nn.Module:
    """mlx-lm's model with the folder's weights, nothing of it computed."""
    try:
        # What its modules print at import is for no answer's reader.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            from mlx_lm.utils import _get_classes

            model_class, arguments = _get_classes(config)
    except SystemExit:
        said = printed.getvalue().strip() or "its module asks to end the program"
        raise InputError(f"mlx-lm cannot load {folder}: {said}") from None
    if known is not None and config["model_type"] == "gpt2":
        model_class = gpt2(model_class, known)
    model = model_class(arguments.from_dict(known.arguments if known else config))
    weights = _weights(folder, tensors)
    if known is not None:
        weights = _without_copies(weights, known.tied, folder)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    if quantization is not None:
        _quantize(model, weights, quantization)
    model.load_weights(list(weights.items()), strict=True)
    return model


def _divide(
    model: nn.Module, config: dict[str, Any], ranks: Ranks, folder: Path
) -> None:
    """Leave this rank its part of a model, and have it add up with the others.

    Raises:
        InputError: mlx-lm cannot do that, or not for so many ranks.
    """
    kind = config.get("model_type")
    if not hasattr(model, "shard"):
        raise InputError(
            f"mlx-lm cannot divide {folder}, a {kind}, among ranks: run it on one "
            f"machine"
        )
    heads = find_size(config, *_HEADS)
    keys = find_size(config, *_KEY_HEADS) or heads
    for count in (heads, keys):
        # It would cut through a head, and say nothing.
        if count is None or count % ranks.size:
            raise InputError(
                f"{folder} has {heads} heads, of keys {keys}, which {ranks.size} ranks "
                f"cannot divide evenly: take another number of them"
            )
    try:
        model.shard(ranks.group)
    except ValueError as error:
        raise InputError(
            f"mlx-lm cannot divide {folder} among {ranks.size} ranks: {error}"
        ) from None


def _weights(folder: Path, tensors: dict[str, Tensor]) -> dict[str, mx.array]:
    """A checkpoint's tensors by name; read from safetensors as they are needed."""
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            weights |= mx.load(str(path))
    if not weights:
        for name, tensor in tensors.items():
            bits = mx.array(np.ascontiguousarray(tensor.bits))
            weights[name] = bits.view(mx.bfloat16) if tensor.dtype == "BF16" else bits
    return weights


def _without_copies(
    weights: dict[str, mx.array], tied: bool, folder: Path
) -> dict[str, mx.array]:
    """Without what older checkpoints store and no model reads: frequencies that are
    computed, and a tied head, which is the embedding once more.

    Raises:
        InputError: a head is another matrix than the embedding that it should be tied
            to; transformers would then not tie it.
    """
    weights = {
        name: weight
        for name, weight in weights.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if not tied or HEAD not in weights:
        return weights
    ends = ("embed_tokens.weight", "wte.weight")
    embedding = next((w for name, w in weights.items() if name.endswith(ends)), None)
    if embedding is not None:
        if not mx.array_equal(weights[HEAD], embedding).item():
            raise InputError(
                f"{folder / CONFIG} says that the head is tied, and {HEAD} is another "
                f"matrix than the embedding"
            )
        del weights[HEAD]
    return weights


def _quantize(
    model: nn.Module, weights: dict[str, mx.array], quantization: dict[str, Any]
) -> None:
    """Turn those layers into quantized ones that have scales among the weights."""

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        own = quantization.get(path)
        return own if isinstance(own, dict) else True

    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=settings,
    )


def _widen(weight: mx.array) -> mx.array:
    floating = mx.issubdtype(weight.dtype, mx.floating)
    return weight.astype(mx.float32) if floating else weight


def _rows(model: nn.Module) -> int:
    """How many ids a model has logits for, whatever its config says.

    Raises:
        InputError: its parts do not go together.
    """
    try:
        return model(mx.array([[0]])).shape[-1]  # lazy: nothing is computed
    except Exception as error:  # of any kind, for whatever a config may say
        raise InputError(f"mlx-lm cannot run this model: {error}") from None


def _positions(config: dict[str, Any], model: nn.Module) -> int | None:
    """How many positions a model takes that is not verified."""
    said = find_size(config, "n_positions", "max_position_embeddings")
    learned = [
        weight.shape[0]
        for name, weight in tree_flatten(model.parameters())
        if name.endswith(("wpe.weight", "embed_positions.weight"))
    ]
    if said is not None:
        learned.append(min(said, np.iinfo(np.int32).max))
    return min(learned, default=None)

"""What a T5 checkpoint holds: the names of its tensors, and what they make up here."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from architectures.parameters import parameter_shapes
from checkpoints.sources import ADAPTER, FLOATS, Tensor, stacked_shape
from model import T5
from system.errors import InputError

#: Where the embedding may be; the others are copies. MADLAD-400 has no shared.weight.
EMBEDDINGS = (
    "shared.weight",
    "decoder.embed_tokens.weight",
    "encoder.embed_tokens.weight",
)

#: A bias that old checkpoints have and nothing reads.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

#: What frameworks put before every name: DataParallel, torch.compile, Lightning, and
#: transformers where the T5 is a part of a model.
PREFIXES = {"module", "_orig_mod", "model", "transformer"}

#: What reinforcement learning leaves, and nothing that is written depends on.
VALUE_HEADS = ("v_head.", "value_head.")

CLASSIFIERS = ("classification_head.", "qa_outputs.", "classifier.")


def recipe(
    config: Any, tied: bool, embedding: str = EMBEDDINGS[0]
) -> dict[str, list[str]]:
    """For every tensor of ours the checkpoint's tensors that it stacks, by rows.

    Projections of the same input are one matrix here: q, k and v of self-attention, k
    and v of cross-attention, the two of a gated feed-forward.
    """
    names = {"embedding.weight": [embedding]}
    if not tied:
        names["head.weight"] = ["lm_head.weight"]

    for stack, layers in (
        ("encoder", config.num_layers),
        ("decoder", config.num_decoder_layers),
    ):
        names[f"{stack}.norm.weight"] = [f"{stack}.final_layer_norm.weight"]
        for layer in range(1 if config.shared_bias else layers):
            bias = "position_bias" if config.shared_bias else f"position_bias.{layer}"
            names[f"{stack}.{bias}.weight"] = [
                f"{stack}.block.{layer}.layer.0.SelfAttention"
                ".relative_attention_bias.weight"
            ]
        for layer in range(layers):
            ours = f"{stack}.layers.{layer}"
            theirs = [f"{stack}.block.{layer}.layer.{part}" for part in range(3)]

            def add(name: str, *sources: str, ours: str = ours) -> None:
                names[f"{ours}.{name}.weight"] = [f"{name}.weight" for name in sources]

            attention = f"{theirs[0]}.SelfAttention"
            add("attention_norm", f"{theirs[0]}.layer_norm")
            add("attention.qkv", *(f"{attention}.{part}" for part in "qkv"))
            add("attention.o", f"{attention}.o")
            if stack == "decoder":
                cross = f"{theirs[1]}.EncDecAttention"
                add("cross_attention_norm", f"{theirs[1]}.layer_norm")
                add("cross_attention.q", f"{cross}.q")
                add("cross_attention.kv", f"{cross}.k", f"{cross}.v")
                add("cross_attention.o", f"{cross}.o")
            last = theirs[2] if stack == "decoder" else theirs[1]
            feed_forward = f"{last}.DenseReluDense"
            add("feed_forward_norm", f"{last}.layer_norm")
            inputs = ("wi_0", "wi_1") if config.gated else ("wi",)
            add("feed_forward.wi", *(f"{feed_forward}.{part}" for part in inputs))
            add("feed_forward.wo", f"{feed_forward}.wo")
    return names


def plan(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The source tensors of each of ours.

    Raises:
        InputError: a tensor is missing, or has another shape than the config says; or
            they are no T5 that writes text.
    """
    _require_t5(tensors)
    sizes = [tensor.bits.nbytes for tensor in tensors.values()]
    config.require(sum(map(bool, sizes)), sum(sizes))
    embedding = next((name for name in EMBEDDINGS if name in tensors), EMBEDDINGS[0])
    tied = _is_tied(tensors, embedding)
    names = recipe(config, tied, embedding)
    shapes = parameter_shapes(T5(config, tied))
    assert names.keys() == shapes.keys()
    steps: dict[str, list[Tensor]] = {}
    for ours, theirs in names.items():
        missing = next((name for name in theirs if name not in tensors), None)
        if missing:
            raise InputError(f"the checkpoint has no {missing}, which its config needs")
        parts = [tensors[name] for name in theirs]
        stacked = stacked_shape(parts)
        if stacked != shapes[ours] or len({part.shape for part in parts}) > 1:
            found = ", ".join(f"{part.name} {part.shape}" for part in parts)
            raise InputError(
                f"the config does not fit the weights: {found} would make "
                f"{stacked}, but the config asks for {shapes[ours]}"
            )
        steps[ours] = parts
    for parts in steps.values():
        for part in parts:
            part.require_floats()
    for name in EMBEDDINGS:
        if name in tensors and not _are_equal(tensors[name], tensors[embedding]):
            raise InputError(f"{name} is another than {embedding}: a T5 has one")
    return steps


def unused(
    steps: Mapping[str, list[Tensor]], tensors: Mapping[str, Tensor]
) -> list[str]:
    """The tensors that a T5 has no place for and that change nothing.

    Args:
        steps: what :func:`plan` made of ``tensors``.

    Raises:
        InputError: one of them may change what the model writes.
    """
    used = {id(part) for parts in steps.values() for part in parts}
    copies = {*EMBEDDINGS, UNUSED, "lm_head.weight"}
    left = [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in used and name not in copies
    ]
    for name in left:
        value_head = name.startswith(VALUE_HEADS)
        if not (value_head or _is_buffer(tensors[name]) or _is_zero(tensors[name])):
            raise InputError(f"the checkpoint has {name}, which T5 has no place for")
    return left


def _is_buffer(tensor: Tensor) -> bool:
    """Whether it holds counters or masks: integers, where weights are none."""
    return tensor.dtype not in FLOATS and not tensor.name.endswith(".weight")


def _is_zero(tensor: Tensor) -> bool:
    """Whether it adds nothing: t5-small of 2020 had biases of its norms, all 0."""
    return tensor.name.endswith(".bias") and not tensor.bits.any()


def _require_t5(tensors: Mapping[str, Tensor]) -> None:
    """
    Raises:
        InputError: the tensors are of something else that is made from T5s.
    """
    if any("lora_" in name for name in tensors):
        raise InputError(f"the checkpoint {ADAPTER}")
    if any(name.startswith(CLASSIFIERS) for name in tensors):
        raise InputError(
            "the checkpoint is a T5 with a classification head, which writes no text"
        )
    if not any(name.startswith("decoder.") for name in tensors) and any(
        name.startswith("encoder.") for name in tensors
    ):
        raise InputError(
            "the checkpoint is an encoder alone (as sentence-t5 and text encoders of "
            "image models are), which writes no text"
        )


def by_t5s_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that frameworks put before all names.

    Raises:
        InputError: two have one name then.
    """
    first = "encoder.block.0.layer.0.SelfAttention.q.weight"
    whole = next((name for name in tensors if name.endswith(first)), first)
    prefix = whole.removesuffix(first)
    if not prefix or not {*prefix.rstrip(".").split(".")} <= PREFIXES:
        return dict(tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in named:
            raise InputError(f"the checkpoint has {short} twice, once as {name}")
        named[short] = tensor
    return named


def _is_tied(tensors: Mapping[str, Tensor], embedding: str) -> bool:
    """Whether the output head is the embedding: there is no other, or it is a copy."""
    head, shared = tensors.get("lm_head.weight"), tensors.get(embedding)
    if head is None or shared is None:
        return head is None
    return _are_equal(head, shared)


def _are_equal(head: Tensor, shared: Tensor) -> bool:
    """Whether two tensors hold the same."""
    if head is shared:
        return True
    if head.shape != shared.shape:
        return False
    if head.dtype != shared.dtype:  # of files that were saved differently
        rows = [*map(_wide, (head, shared))]
        return np.array_equal(*rows, equal_nan=True)
    # A thousand rows at a time: mT5's largest would take a gigabyte at once. By their
    # bits, of which even what is no number has some.
    rows = head.shape[0] if head.shape else 0
    for start in range(0, rows, 1024):
        part = slice(start, start + 1024)
        bits = [np.ascontiguousarray(each.bits[part]) for each in (head, shared)]
        if not np.array_equal(*(each.view("u1") for each in bits)):
            return False
    return True


def _wide(tensor: Tensor) -> Any:
    """A tensor as float32."""
    return np.concatenate(
        [np.array(block.astype(mx.float32)) for block in tensor.blocks()]
    )

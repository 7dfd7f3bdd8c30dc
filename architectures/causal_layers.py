"""What mlx-lm's models lack: layers for what configs ask for and they pass over."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from architectures.rotary import Rotary
from architectures.verified import Verified
from model import activation

HEAD = "lm_head.weight"


def gpt2(model_class: type, known: Verified) -> type:
    """GPT-2 as transformers has it: a feed-forward of any width, a head that may be
    untied, and weights by the names of any generation. mlx-lm has those of the first
    checkpoints, that the hub's ``gpt2`` to ``gpt2-xl`` still have."""
    width = known.arguments.get("n_inner")
    tied = known.arguments["tie_word_embeddings"]

    class GPT2(model_class):
        def __init__(self, args: Any):
            super().__init__(args)
            if width is not None:
                for block in self.model.h:
                    block.mlp.c_fc = nn.Linear(args.n_embd, width)
                    block.mlp.c_proj = nn.Linear(width, args.n_embd)
            if not tied:
                self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            if tied:
                return super().__call__(inputs, cache)
            return self.lm_head(self.model(inputs, cache))

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            head = weights.get(HEAD)
            found = super().sanitize(
                {
                    name.removeprefix("transformer."): weight
                    for name, weight in weights.items()
                    if name != HEAD and not name.endswith(".attn.masked_bias")
                }
            )
            return found if head is None else {**found, HEAD: head}

    return GPT2


def mend(model: nn.Module, known: Verified) -> None:
    """Give a model what its config asks for and mlx-lm's passes over."""
    row = known.row
    for number, layer in enumerate(model.layers):
        attention = layer[row.attention]
        if known.rotary is not None and isinstance(attention.rope, nn.RoPE):
            attention.rope = Turned(known.rotary)
        if known.activation is not None:
            matrices = [layer.mlp[name] for name in row.feed_forward]
            layer.mlp = FeedForward(matrices, known.activation, row.fused)
        if known.arguments["model_type"] == "gpt2":
            attention.scale = _gpt2_scale(known.arguments, attention.head_dim, number)
        window = known.windows[number] if known.windows else None
        if window is not None or known.grouped:
            setattr(layer, row.attention, Masked(attention, window, known.grouped))


def _gpt2_scale(arguments: dict[str, Any], size: int, layer: int) -> float:
    scale = size**-0.5 if arguments["scale_attn_weights"] else 1.0
    return scale / (layer + 1 if arguments["scale_attn_by_inverse_layer_idx"] else 1)


class Turned(nn.Module):
    """A rotary embedding of any kind, in the place of mlx-lm's own."""

    def __init__(self, rotary: Rotary):
        super().__init__()
        self._size, self._factor = rotary.size, rotary.factor
        self._lengths = mx.array(1 / rotary.frequencies)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Turn (B, H, T, D) by positions from ``offset`` on, an int or (B,)."""
        if self._factor != 1:
            x = mx.concatenate(
                [x[..., : self._size] * self._factor, x[..., self._size :]], axis=-1
            )
        return mx.fast.rope(
            x,
            self._size,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._lengths,
        )


class FeedForward(nn.Module):
    """A layer's feed-forward with another activation than mlx-lm's model has."""

    def __init__(self, matrices: list[nn.Module], name: str, fused: bool):
        """
        Args:
            matrices: in and out; or gate, in and out.
            fused: whether the first of two is gate and in as one.
        """
        super().__init__()
        self.matrices = matrices
        self._activation = activation(name)
        self._fused = fused

    def __call__(self, x: mx.array) -> mx.array:
        *inner, out = self.matrices
        states = [matrix(x) for matrix in inner]
        if self._fused:
            states = mx.split(states[0], 2, axis=-1)
        states[0] = self._activation(states[0])
        return out(states[0] * states[1] if len(states) == 2 else states[0])


class Masked(nn.Module):
    """An attention with the mask that it needs, which mlx-lm's model does not make.

    For a window, that is, and where groups of heads have an axis of their own, along
    which a mask for rows of different lengths has to be repeated.
    """

    def __init__(self, attention: nn.Module, window: int | None, grouped: bool):
        super().__init__()
        self.attention = attention
        self._window, self._grouped = window, grouped

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        size = x.shape[1]
        held = 0 if cache is None else cache.size()
        if self._window is not None and held + size > self._window:
            mask = cache.make_mask(size, return_array=True, window_size=self._window)
        if self._grouped and isinstance(mask, mx.array) and mask.ndim == 4:
            mask = mask[:, :, None]
        return self.attention(x, mask, cache)

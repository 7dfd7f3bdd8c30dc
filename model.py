"""T5 in MLX: its weights and the forward passes over them, which keep no state.

The architecture is that of Raffel et al., "Exploring the Limits of Transfer Learning
with a Unified Text-to-Text Transformer" (arXiv 1910.10683), and of T5 1.1; the
reference behaviour is that of Hugging Face transformers. Its particulars: RMS norms
before every block, attention without a scale, and a position bias added to the
attention logits that depends on the distance alone; a stack's layers share one, but
umT5's have one each (Chung et al., arXiv 2304.09151).

Shapes: B = batch, T = new decoder positions, S = source length, C = cache capacity,
H = heads, D = head size, V = vocabulary.
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from checkpoints.config import T5Config
from system.device import compute_early, on_gpu

#: Decoder layers that a CPU begins with at once: fewer take longer to hand over.
LAYERS_AT_ONCE = 2


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """A feed-forward's activation by transformers' name (``config.ACTIVATIONS``)."""
    return {
        "gelu": nn.gelu,
        "gelu_10": lambda x: mx.clip(nn.gelu(x), -10, 10),
        "gelu_python": nn.gelu,
        "hardswish": nn.hardswish,
        "laplace": lambda x: 0.5 * (1 + mx.erf((x - 0.707107) / (0.282095 * 2**0.5))),
        "leaky_relu": nn.leaky_relu,
        "linear": lambda x: x,
        "mish": nn.mish,
        "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
        "relu": nn.relu,
        "relu2": lambda x: mx.square(nn.relu(x)),
        "relu6": nn.relu6,
        "sigmoid": mx.sigmoid,
        "silu": nn.silu,
        "sqrtsoftplus": lambda x: mx.sqrt(nn.softplus(x)),
        "swish": nn.silu,
        "tanh": mx.tanh,
    }.get(name, nn.gelu_approx)  # the other names are the same approximation


def position_buckets(
    distances: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """The relative position bucket of each distance.

    Half of the buckets hold one distance each, the others logarithmically more up to
    ``max_distance``; bidirectional attention splits the buckets between the two signs.
    Computed in float32, as the models were trained: a distance on a bucket's edge moves
    with the rounding.

    Args:
        distances: key position minus query position, any shape.
        bidirectional: whether keys after the query are seen (the encoder's case).

    Returns:
        Bucket numbers, int32, of the shape of ``distances``.
    """
    offset = np.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = (distances > 0) * num_buckets
        away = np.abs(distances)
    else:
        away = np.maximum(-distances, 0)
    exact = num_buckets // 2
    ratio = np.maximum(away, 1).astype(np.float32) / np.float32(exact)
    scale = np.float32(math.log(max_distance / exact))
    steps = np.log(ratio) / scale * np.float32(num_buckets - exact)
    far = np.minimum(exact + np.maximum(steps, 0).astype(np.int32), num_buckets - 1)
    return (offset + np.where(away < exact, away, far)).astype(np.int32)


class Norm(nn.RMSNorm):
    """RMS norm whose result has the dtype of its weight, which is the matrices' too.

    The stream it reads is wider where that is float16: see :class:`T5`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(self.weight.dtype)


class PositionBias(nn.Module):
    """A relative position bias, a stack's or a layer's: a value per head and bucket.

    A plain weight rather than an ``nn.Embedding``: quantizing a model leaves it alone.
    """

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.weight = mx.zeros((config.num_buckets, config.num_heads))
        self._buckets = (bidirectional, config.num_buckets, config.max_distance)

    def __call__(self, distances: np.ndarray) -> mx.array:
        """Key position minus query position (N,) -> bias (H, N)."""
        buckets = position_buckets(distances, *self._buckets)
        return self.weight[mx.array(buckets)].T


def attend(q: mx.array, k: mx.array, v: mx.array, bias: mx.array | None) -> mx.array:
    """Unscaled attention with an additive bias to (B, H, T, keys); -> (B, H, T, D).

    Queries are (B, H, T, D), keys and values (B, H, keys, D).
    """
    if on_gpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
    # On a CPU that is no kernel, but these operations and a product with the scale.
    k = k.swapaxes(-1, -2)
    logits = q @ k if bias is None else mx.addmm(bias, q, k)
    return mx.softmax(logits, axis=-1, precise=True) @ v


class Linear(nn.Linear):
    """A matrix without a bias, whose product can be added to a stream as it is made."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def add_to(self, x: mx.array, y: mx.array) -> mx.array:
        """``x + self(y)``, in one operation where all are of the same dtype."""
        if not x.dtype == y.dtype == self.weight.dtype:
            return x + self(y)
        return mx.addmm(x, y, self.weight.T)

    def to_quantized(self, *how: Any, **more: Any) -> "QuantizedLinear":
        """What :func:`mlx.nn.quantize` puts in its place."""
        return QuantizedLinear.from_linear(self, *how, **more)


class QuantizedLinear(nn.QuantizedLinear):
    """The same, packed."""

    def add_to(self, x: mx.array, y: mx.array) -> mx.array:
        """``x + self(y)``."""
        return x + self(y)


class Attention(nn.Module):
    """The projections of multi-head attention."""

    def __init__(self, config: T5Config, cross: bool = False):
        super().__init__()
        inner = config.num_heads * config.d_kv
        if cross:
            self.q = Linear(config.d_model, inner)
            self.kv = Linear(config.d_model, 2 * inner)
        else:
            self.qkv = Linear(config.d_model, 3 * inner)
        self.o = Linear(inner, config.d_model)
        self._head_size = config.d_kv

    def _heads(self, x: mx.array, batch: int) -> mx.array:
        """(B * T, any number of heads * D) -> (B, those, T, D)."""
        if x.shape[0] == batch:  # T = 1: nothing to swap
            return x.reshape(batch, -1, 1, self._head_size)
        return x.reshape(batch, x.shape[0] // batch, -1, self._head_size).swapaxes(1, 2)

    def project(self, x: mx.array, batch: int) -> tuple[mx.array, mx.array, mx.array]:
        """(B * T, d_model) -> queries, keys and values, each (B, H, T, D)."""
        q, k, v = mx.split(self._heads(self.qkv(x), batch), 3, axis=1)
        return q, k, v

    def project_query(self, x: mx.array, batch: int) -> mx.array:
        """(B * T, d_model) -> cross-attention queries (B, H, T, D)."""
        return self._heads(self.q(x), batch)

    def project_source(self, source: mx.array) -> tuple[mx.array, mx.array]:
        """(B, S, d_model) -> cross-attention keys and values, each (B, H, S, D)."""
        heads = self._heads(self.kv(source.flatten(0, 1)), len(source))
        k, v = mx.split(heads, 2, axis=1)
        # Views into one array would keep every later step's reads strided.
        return mx.contiguous(k), mx.contiguous(v)

    def merge(self, x: mx.array, attended: mx.array) -> mx.array:
        """Add what was attended to, (B, H, T, D), to the stream (B * T, d_model)."""
        if attended.shape[2] > 1:
            attended = attended.swapaxes(1, 2)
        return self.o.add_to(x, attended.reshape(len(x), -1))


class FeedForward(nn.Module):
    """T5 1.0's two projections, or T5 1.1's three with a gate.

    What the last one yields exceeds float16: then it is computed in float32.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        columns = 2 if config.gated else 1
        self.wi = Linear(config.d_model, columns * config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self._gated = config.gated
        self._activation = activation(config.activation)

    def __call__(self, x: mx.array, normed: mx.array) -> mx.array:
        """Add what it makes of ``normed`` to the stream ``x``, both (N, d_model)."""
        y = self.wi(normed)
        if self._gated:
            gate, y = mx.split(y, 2, axis=-1)
            y = self._activation(gate) * y
        else:
            y = self._activation(y)
        y = y.astype(mx.float32) if y.dtype == mx.float16 else y
        return self.wo.add_to(x, y)


class EncoderLayer(nn.Module):
    """(B * S, d_model) -> the same, attending to all of S; bias (B or 1, H, S, S)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = Norm(config.d_model, config.epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.d_model, config.epsilon)
        self.feed_forward = FeedForward(config)

    def __call__(self, x: mx.array, bias: mx.array, batch: int) -> mx.array:
        q, k, v = self.attention.project(self.attention_norm(x), batch)
        x = self.attention.merge(x, attend(q, k, v, bias))
        return self.feed_forward(x, self.feed_forward_norm(x))


class DecoderLayer(nn.Module):
    """(B * T, d_model) -> the same, attending to the cache and to the source."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = Norm(config.d_model, config.epsilon)
        self.attention = Attention(config)
        self.cross_attention_norm = Norm(config.d_model, config.epsilon)
        self.cross_attention = Attention(config, cross=True)
        self.feed_forward_norm = Norm(config.d_model, config.epsilon)
        self.feed_forward = FeedForward(config)

    def __call__(
        self, x: mx.array, cache: "LayerCache", step: "Step", past: mx.array
    ) -> mx.array:
        batch = len(cache.keys)
        q, k, v = self.attention.project(self.attention_norm(x), batch)
        keys = cache.keys = step.write(cache.keys, k)
        values = cache.values = step.write(cache.values, v)
        x = self.attention.merge(x, attend(q, keys, values, past))
        cross = self.cross_attention
        q = cross.project_query(self.cross_attention_norm(x), batch)
        keys, values = cache.source_keys, cache.source_values
        x = cross.merge(x, attend(q, keys, values, step.source))
        return self.feed_forward(x, self.feed_forward_norm(x))


class Stack(nn.Module):
    """An encoder or a decoder: its layers, their position bias, a last norm."""

    def __init__(self, config: T5Config, layers: list[nn.Module], bidirectional: bool):
        super().__init__()
        self.layers = layers
        if config.shared_bias:
            self.position_bias = PositionBias(config, bidirectional)
        else:
            self.position_bias = [PositionBias(config, bidirectional) for _ in layers]
        self.norm = Norm(config.d_model, config.epsilon)

    @property
    def bias_count(self) -> int:
        return len(self.position_bias) if isinstance(self.position_bias, list) else 1

    def biases(self, distances: np.ndarray) -> list[mx.array]:
        """The bias (H, N) by distance (N,), one for each layer or one for all."""
        if isinstance(self.position_bias, list):
            return [bias(distances) for bias in self.position_bias]
        return [self.position_bias(distances)]


class T5(nn.Module):
    """The weights, and the two forward passes over them; it keeps no state.

    In float16 the stream that layers add to, and the feed-forward's last matrix, are
    float32, as in transformers: T5's activations exceed float16's range.
    """

    def __init__(self, config: T5Config, tied: bool):
        """``tied``: the output head is the embedding (T5 1.0), no matrix of its own."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        encoder = [EncoderLayer(config) for _ in range(config.num_layers)]
        decoder = [DecoderLayer(config) for _ in range(config.num_decoder_layers)]
        self.encoder = Stack(config, encoder, bidirectional=True)
        self.decoder = Stack(config, decoder, bidirectional=False)
        if not tied:
            self.head = Linear(config.d_model, config.vocab_size)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations, biases and caches."""
        return self.decoder.norm.weight.dtype

    def _embed(self, tokens: mx.array) -> mx.array:
        """(B, T) ids -> (B * T, d_model): no product has to flatten it."""
        wide = mx.float32 if self.dtype == mx.float16 else self.dtype
        return self.embedding(tokens.flatten()).astype(wide)

    def encode(self, tokens: mx.array, padding: mx.array | None = None) -> mx.array:
        """Run the encoder.

        Args:
            tokens: (B, S) ids, right-padded.
            padding: additive mask (B, 1, 1, S), -inf at padding; None without any.

        Returns:
            (B, S, d_model); rows at padding mean nothing.
        """
        *_, source = self.encoding(tokens, padding)
        return source

    def encoding(
        self, tokens: mx.array, padding: mx.array | None
    ) -> Iterator[mx.array]:
        """The same layer by layer: the stream after each, and in the end the result."""
        x = self._embed(tokens)
        batch, length = tokens.shape
        # One row of bias per distance, gathered to a square: [i, j] is at j - i.
        places = np.arange(length, dtype=np.int32)
        square = mx.array(places[None, :] - places[:, None] + np.int32(length - 1))
        biases = []
        for by_distance in self.encoder.biases(np.arange(1 - length, length)):
            bias = mx.take(by_distance, square, axis=1)[None]
            biases.append(bias if padding is None else bias + padding)
        for layer, bias in zip(self.encoder.layers, cycle(biases), strict=False):
            x = layer(x, bias, batch)
            compute_early(x)
            yield x
        yield self.encoder.norm(x).reshape(batch, length, -1)

    def decode(
        self,
        tokens: mx.array,
        caches: list["LayerCache"],
        step: "Step",
        early: bool = True,
    ) -> mx.array:
        """Run the decoder over new positions, writing their keys and values.

        Args:
            tokens: (B, T) ids.
            caches: one per layer; updated.
            step: where the new positions lie and what they may attend to.
            early: whether a CPU may begin with the first layers before the last are
                built.

        Returns:
            Logits (B, T, V).
        """
        x = self._embed(tokens)
        # Verifying is never in vain, as the plain round that is built ahead can be.
        early &= tokens.shape[1] > 1
        for number, (layer, cache, past) in enumerate(
            zip(self.decoder.layers, caches, cycle(step.past), strict=False)
        ):
            if early and number and number % LAYERS_AT_ONCE == 0:
                compute_early(x)
            x = layer(x, cache, step, past)
        x = self.decoder.norm(x)
        if self.config.scale_outputs:
            x = x * self.config.d_model**-0.5
        logits = self.head(x) if "head" in self else self.embedding.as_linear(x)
        return logits.reshape(*tokens.shape, -1)


@dataclass
class LayerCache:
    """One decoder layer's keys and values: of the positions so far, of the source."""

    keys: mx.array  # (B, H, C, D)
    values: mx.array  # (B, H, C, D)
    source_keys: mx.array  # (B, H, S, D)
    source_values: mx.array  # (B, H, S, D)


class Places(NamedTuple):
    """Where the T new positions of a pass lie in the cache.

    Attributes:
        at: (1,) the first, where they are every row's; (B, 1, T, 1) each row's else.
        back: (B, T, C) how far each of C positions is behind them; C where it is not.
    """

    at: mx.array
    back: mx.array

    @classmethod
    def of(cls, rows: np.ndarray, capacity: int) -> "Places":
        """Those at ``rows`` (B, T), consecutive in each row."""
        back = rows[:, :, None] - np.arange(capacity, dtype=np.int32)
        back = np.where(back < 0, capacity, back)
        together = (rows == rows[0]).all()
        at = rows[0, :1] if together else rows[:, None, :, None]
        return cls(mx.array(at), mx.array(back))


class Step:
    """One decoder pass: where its T new positions lie, and what they may attend to.

    Attributes:
        past: additive masks (B, H, T, C) over the cache, one for each layer or one for
            all: the position bias, -inf where a key is not to be seen.
        source: additive mask (B, 1, 1, S), -inf at padding; None without any.
    """

    def __init__(
        self, places: "Places", biases: list[mx.array], source: mx.array | None
    ) -> None:
        """
        Args:
            biases: (H, C + 1) each, column d for a key d positions back, the last one
                -inf; one for each layer or one for all.
            source: as the attribute.
        """
        # (H, B, T, C) -> (B, H, T, C); a transposed mask is copied in every layer.
        self.past = [
            mx.contiguous(mx.take(bias, places.back, axis=1).swapaxes(0, 1))
            for bias in biases
        ]
        self.source = source
        self._at = places.at
        self._wide: mx.array | None = None

    def write(self, cache: mx.array, new: mx.array) -> mx.array:
        """``cache`` (B, H, C, D) with ``new`` (B, H, T, D) in its place.

        The buffer is reused, not copied, once nothing else holds the old array. MLX
        checks no bounds here: the caller has made sure that C is enough.
        """
        if self._at.ndim == 1:
            return mx.slice_update(cache, new, self._at, axes=(2,))
        if self._wide is None:  # every layer's shape
            self._wide = mx.broadcast_to(self._at, new.shape)
        return mx.put_along_axis(cache, self._wide, new, 2)

"""T5 in MLX: stateless weights, and the session that holds one batch's decoding state.

The architecture is that of Raffel et al., "Exploring the Limits of Transfer Learning
with a Unified Text-to-Text Transformer" (arXiv 1910.10683), and of T5 1.1; the
reference behaviour is that of Hugging Face transformers. Its particulars: RMS norms
before every block, attention without a scale, and a position bias added to the
attention logits that depends on the distance alone and is shared by a stack's layers.

Shapes: B = batch, T = new decoder positions, S = source length, C = cache capacity,
H = heads, D = head size, V = vocabulary.
"""

import fast_blas  # noqa: F401  (before mlx: see there)

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from checkpoint import CONFIG, GENERATION_CONFIG, WEIGHTS, MappedWeights, read_json
from errors import InputError

_ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "silu": nn.silu,
}


@dataclass(frozen=True)
class T5Config:
    """What of a Hugging Face ``config.json`` shapes the computation."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    num_buckets: int
    max_distance: int
    epsilon: float
    activation: str
    gated: bool
    scale_outputs: bool
    start_token: int
    eos_tokens: frozenset[int]

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> "T5Config":
        """Read ``config.json`` and ``generation_config.json`` (may be empty).

        Raises:
            InputError: another architecture, or a field that is missing or odd.
        """
        kind = config.get("model_type")
        if kind != "t5":
            raise InputError(f"model_type '{kind}' is not supported: t5 is")
        try:
            feed_forward = config.get("feed_forward_proj", "relu")
            *gated, activation = feed_forward.split("-")
            if feed_forward == "gated-gelu":
                activation = "gelu_new"  # transformers' reading of T5 1.1's configs
            if activation not in _ACTIVATIONS or gated not in ([], ["gated"]):
                raise InputError(f"feed_forward_proj '{feed_forward}' is not supported")
            start = generation.get(
                "decoder_start_token_id", config.get("decoder_start_token_id")
            )
            eos = generation.get("eos_token_id", config.get("eos_token_id", 1))
            result = cls(
                vocab_size=int(config["vocab_size"]),
                d_model=int(config["d_model"]),
                d_kv=int(config["d_kv"]),
                d_ff=int(config["d_ff"]),
                num_heads=int(config["num_heads"]),
                num_layers=int(config["num_layers"]),
                num_decoder_layers=int(
                    config.get("num_decoder_layers") or config["num_layers"]
                ),
                num_buckets=int(config.get("relative_attention_num_buckets", 32)),
                max_distance=int(config.get("relative_attention_max_distance", 128)),
                epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
                activation=activation,
                gated=bool(gated),
                scale_outputs=_scales_outputs(config),
                start_token=int(
                    config.get("pad_token_id", 0) if start is None else start
                ),
                eos_tokens=frozenset(map(int, eos if isinstance(eos, list) else [eos])),
            )
        except KeyError as error:
            raise InputError(f"the config has no {error.args[0]}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the config has an odd value: {error}") from None
        result._check()
        return result

    @classmethod
    def read(cls, folder: Path) -> "T5Config":
        """The config of a checkpoint folder, Hugging Face's or converted."""
        return cls.from_dict(
            read_json(folder / CONFIG),
            read_json(folder / GENERATION_CONFIG, optional=True),
        )

    def _check(self) -> None:
        """Refuse what would make an index run out of its array: MLX does not."""
        sizes = (
            *(self.vocab_size, self.d_model, self.d_kv, self.d_ff, self.num_heads),
            *(self.num_layers, self.num_decoder_layers),
        )
        if not all(1 <= size < 1 << 31 for size in sizes):
            raise InputError("the config has a size below 1 or beyond all reason")
        if not 0 <= self.start_token < self.vocab_size:
            raise InputError(
                f"decoding would start from token {self.start_token}, but the config "
                f"has {self.vocab_size}"
            )
        # Below these there is no logarithm to number the distant buckets by.
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise InputError(
                f"no relative position bias has {self.num_buckets} buckets for "
                f"distances up to {self.max_distance}"
            )


def _scales_outputs(config: Mapping[str, Any]) -> bool:
    """Whether the decoder's output is multiplied by d_model^-0.5 before the head.

    T5 1.0 does, T5 1.1 does not. transformers 5 says so in a field of its own,
    and then writes ``tie_word_embeddings: true`` whatever it was; before, T5 1.0 was
    told from 1.1 by that field.
    """
    explicit = config.get("scale_decoder_outputs")
    if explicit is not None:
        return bool(explicit)
    return config.get("tie_word_embeddings") is not False


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


class PositionBias(nn.Module):
    """The relative position bias of one stack: a learned value per head and bucket.

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


class Attention(nn.Module):
    """Multi-head attention, unscaled, over keys and values that are handed in."""

    def __init__(self, config: T5Config, cross: bool = False):
        super().__init__()
        inner = config.num_heads * config.d_kv
        if cross:
            self.q = nn.Linear(config.d_model, inner, bias=False)
            self.kv = nn.Linear(config.d_model, 2 * inner, bias=False)
        else:
            self.qkv = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self._head_size = config.d_kv

    def heads(self, x: mx.array) -> mx.array:
        """(B, T, N * D) -> (B, N, T, D)."""
        return x.reshape(*x.shape[:2], -1, self._head_size).swapaxes(1, 2)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(B, T, d_model) -> queries, keys and values, each (B, H, T, D)."""
        q, k, v = mx.split(self.heads(self.qkv(x)), 3, axis=1)
        return q, k, v

    def project_source(self, source: mx.array) -> tuple[mx.array, mx.array]:
        """(B, S, d_model) -> cross-attention keys and values, each (B, H, S, D)."""
        k, v = mx.split(self.heads(self.kv(source)), 2, axis=1)
        # Views into one array would keep every later step's reads strided.
        return mx.contiguous(k), mx.contiguous(v)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, bias: mx.array | None
    ) -> mx.array:
        """Queries (B, H, T, D), additive bias to (B, H, T, keys) -> (B, T, d_model)."""
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
        return self.o(x.swapaxes(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """T5 1.0's two projections, or T5 1.1's three with a gate."""

    def __init__(self, config: T5Config):
        super().__init__()
        columns = 2 if config.gated else 1
        self.wi = nn.Linear(config.d_model, columns * config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self._gated = config.gated
        self._activation = _ACTIVATIONS[config.activation]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.wi(x)
        if self._gated:
            gate, x = mx.split(x, 2, axis=-1)
            return self.wo(self._activation(gate) * x)
        return self.wo(self._activation(x))


class EncoderLayer(nn.Module):
    """(B, S, d_model) -> the same, attending to all of S; bias (B or 1, H, S, S)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.feed_forward = FeedForward(config)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        x = x + self.attention.attend(
            *self.attention.project(self.attention_norm(x)), bias
        )
        return x + self.feed_forward(self.feed_forward_norm(x))


class DecoderLayer(nn.Module):
    """(B, T, d_model) -> the same, attending to the cache and to the source."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.attention = Attention(config)
        self.cross_attention_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.cross_attention = Attention(config, cross=True)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.feed_forward = FeedForward(config)

    def __call__(self, x: mx.array, cache: "LayerCache", step: "Step") -> mx.array:
        q, k, v = self.attention.project(self.attention_norm(x))
        cache.keys = step.write(cache.keys, k)
        cache.values = step.write(cache.values, v)
        x = x + self.attention.attend(q, cache.keys, cache.values, step.past)
        cross = self.cross_attention
        q = cross.heads(cross.q(self.cross_attention_norm(x)))
        source = cache.source_keys, cache.source_values
        x = x + cross.attend(q, *source, step.source)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Stack(nn.Module):
    """An encoder or a decoder: its layers, their shared position bias, a last norm."""

    def __init__(self, config: T5Config, layers: list[nn.Module], bidirectional: bool):
        super().__init__()
        self.layers = layers
        self.position_bias = PositionBias(config, bidirectional)
        self.norm = nn.RMSNorm(config.d_model, config.epsilon)


class T5(nn.Module):
    """The weights, and the two forward passes over them; it keeps no state."""

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
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations, biases and caches."""
        return self.decoder.norm.weight.dtype

    def encode(self, tokens: mx.array, padding: mx.array | None = None) -> mx.array:
        """Run the encoder.

        Args:
            tokens: (B, S) ids, right-padded.
            padding: additive mask (B, 1, 1, S), -inf at padding; None without any.

        Returns:
            (B, S, d_model); rows at padding mean nothing.
        """
        x = self.embedding(tokens)
        length = tokens.shape[1]
        # One row of bias per distance, gathered to a square: [i, j] is at j - i.
        by_distance = self.encoder.position_bias(np.arange(1 - length, length))
        square = np.arange(length)[None, :] - np.arange(length)[:, None] + length - 1
        bias = mx.take(by_distance, mx.array(square.astype(np.int32)), axis=1)[None]
        if padding is not None:
            bias = bias + padding
        for layer in self.encoder.layers:
            x = layer(x, bias)
        return self.encoder.norm(x)

    def decode(
        self, tokens: mx.array, caches: list["LayerCache"], step: "Step"
    ) -> mx.array:
        """Run the decoder over new positions, writing their keys and values.

        Args:
            tokens: (B, T) ids.
            caches: one per layer; updated.
            step: where the new positions lie and what they may attend to.

        Returns:
            Logits (B, T, V).
        """
        x = self.embedding(tokens)
        for layer, cache in zip(self.decoder.layers, caches, strict=True):
            x = layer(x, cache, step)
        x = self.decoder.norm(x)
        if self.config.scale_outputs:
            x = x * self.config.d_model**-0.5
        return self.head(x) if "head" in self else self.embedding.as_linear(x)


@dataclass
class LayerCache:
    """One decoder layer's keys and values: of the positions so far, of the source."""

    keys: mx.array  # (B, H, C, D)
    values: mx.array  # (B, H, C, D)
    source_keys: mx.array  # (B, H, S, D)
    source_values: mx.array  # (B, H, S, D)


class Step:
    """One decoder pass: where its T new positions lie, and what they may attend to.

    Attributes:
        past: additive mask (B, H, T, C) over the cache: the position bias, -inf where a
            key is not to be seen.
        source: additive mask (B, 1, 1, S), -inf at padding; None without any.
    """

    def __init__(
        self, rows: np.ndarray, bias: mx.array, source: mx.array | None
    ) -> None:
        """
        Args:
            rows: (B, T) cache positions, consecutive in each row.
            bias: (H, C + 1), column d for a key d positions back, the last one -inf.
            source: as the attribute.
        """
        capacity = bias.shape[1] - 1
        back = rows[:, :, None] - np.arange(capacity, dtype=np.int32)
        back = np.where(back < 0, capacity, back)
        # (H, B, T, C) -> (B, H, T, C); a transposed mask is copied in every layer.
        past = mx.take(bias, mx.array(back), axis=1).swapaxes(0, 1)
        self.past = mx.contiguous(past)
        self.source = source
        self._together = bool((rows == rows[0]).all())
        self._at = mx.array(rows[0, :1] if self._together else rows[:, None, :, None])

    def write(self, cache: mx.array, new: mx.array) -> mx.array:
        """``cache`` (B, H, C, D) with ``new`` (B, H, T, D) in its place.

        The buffer is reused, not copied, once nothing else holds the old array. MLX
        checks no bounds here: the caller has made sure that C is enough.
        """
        if self._together:
            return mx.slice_update(cache, new, self._at, axes=(2,))
        return mx.put_along_axis(cache, mx.broadcast_to(self._at, new.shape), new, 2)


class T5Session:
    """One T5 and the decoding state of one batch of prompts.

    The caches have room for C positions, which doubles when it is used up. A row's
    length is how many of them count; what lies beyond is masked and later overwritten,
    so a rewind only changes lengths.
    """

    def __init__(
        self,
        model: T5,
        vocabulary: int | None = None,
        banned: Collection[int] = (),
    ):
        """
        Args:
            vocabulary: how many ids may be emitted: logits are cut to it. Embeddings
                often have rows of padding beyond the tokenizer's ids.
            banned: ids below it that stand for nothing either: their logits are -inf.
        """
        self.model = model
        self.vocabulary = min(vocabulary or math.inf, model.config.vocab_size)
        self.lengths: list[int] = []
        self._ban: mx.array | None = None
        if banned:
            ban = np.zeros(self.vocabulary, np.float32)
            ban[list(banned)] = -np.inf
            self._ban = mx.array(ban).astype(model.dtype)

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """Encode a batch of prompts (B lists of ids, none empty) and reset the state.

        Equal prompts are encoded once. Returns when the device has finished.

        Returns:
            For each row the tokens that decoding starts from.

        Raises:
            InputError: an empty prompt, or an id that the embedding has no row for.
        """
        rows = self.model.config.vocab_size
        for prompt in prompts:
            if not prompt:
                raise InputError("the prompt is empty")
            if max(prompt) >= rows or min(prompt) < 0:
                raise InputError(
                    f"the prompt has the token id {max(prompt)}, but the model's "
                    f"embedding has {rows} rows: it was not trained with that token"
                )
        once: dict[tuple[int, ...], int] = {}
        copy_of = [once.setdefault(tuple(prompt), len(once)) for prompt in prompts]
        longest = max(map(len, once))
        tokens = np.zeros((len(once), longest), np.int32)
        padding = np.full((len(once), 1, 1, longest), -np.inf, np.float32)
        for row, prompt in enumerate(once):
            tokens[row, : len(prompt)] = prompt
            padding[row, ..., : len(prompt)] = 0
        ragged = any(len(prompt) < longest for prompt in once)
        mask = mx.array(padding).astype(self.model.dtype) if ragged else None
        source = self.model.encode(mx.array(tokens), mask)

        def spread(rows: mx.array) -> mx.array:
            """One row for each different prompt -> one for each prompt."""
            return rows if len(once) == len(prompts) else rows[mx.array(copy_of)]

        self._padding = spread(mask) if ragged else None
        self._caches = []
        for layer in self.model.decoder.layers:
            k, v = map(spread, layer.cross_attention.project_source(source))
            empty = mx.zeros((*k.shape[:2], 0, k.shape[3]), k.dtype)
            self._caches.append(LayerCache(empty, empty, k, v))
        self._capacity = 0
        self.lengths = [0] * len(prompts)
        mx.eval([vars(cache) for cache in self._caches])
        return [[self.model.config.start_token] for _ in prompts]

    def extend(self, tokens: mx.array) -> mx.array:
        """Append tokens (B, T), each row at its own length.

        Returns:
            Logits (B, T, vocabulary): those at [b, t] are for the token after it.
        """
        new = tokens.shape[1]
        self._reserve(max(self.lengths) + new)
        rows = np.array(self.lengths, np.int32)[:, None] + np.arange(
            new, dtype=np.int32
        )
        step = Step(rows, self._bias, self._padding)
        logits = self.model.decode(tokens, self._caches, step)
        self.lengths = [length + new for length in self.lengths]
        logits = logits[..., : self.vocabulary]
        return logits if self._ban is None else logits + self._ban

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` cached positions of each row b.

        Raises:
            ValueError: a length beyond what is cached.
        """
        if len(lengths) != len(self.lengths) or not all(
            0 <= new <= old for new, old in zip(lengths, self.lengths, strict=False)
        ):
            raise ValueError(f"cannot rewind from {self.lengths} to {lengths}")
        self.lengths = list(lengths)

    def _reserve(self, length: int) -> None:
        """Make room for ``length`` positions, zeroed: masked NaN would still spread."""
        if length <= self._capacity:
            return
        capacity = max(64, 1 << (length - 1).bit_length())
        widths = [(0, 0), (0, 0), (0, capacity - self._capacity), (0, 0)]
        for cache in self._caches:
            cache.keys = mx.pad(cache.keys, widths)
            cache.values = mx.pad(cache.values, widths)
        self._capacity = capacity
        # Column d is the bias of the key d positions back; the last one means "not to
        # be seen".
        bias = self.model.decoder.position_bias(-np.arange(capacity))
        unseen = mx.full((bias.shape[0], 1), -math.inf, bias.dtype)
        self._bias = mx.concatenate([bias, unseen], axis=1)


def load(folder: Path) -> T5:
    """Load a converted model.

    On a CPU the weights become float32: half precision is slow there.

    Raises:
        InputError: the folder lacks a file, or its files do not belong together.
    """
    config = T5Config.read(folder)
    stored = MappedWeights(folder / WEIGHTS)
    model = T5(config, tied="head.weight" not in stored)
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        # MLX would have g++ compile each fused kernel, for seconds, and gain little.
        mx.disable_compile()
    prepare_memory(stored.bytes(mx.float32 if on_cpu else None), folder)
    weights = stored.load(parameter_shapes(model), mx.float32 if on_cpu else None)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def prepare_memory(size: int, folder: Path) -> None:
    """See to it that weights of ``size`` bytes fit the device, before they are read.

    On Metal, weights beyond the recommended working set would be swapped in and out at
    every token: they are refused, and what fits is kept wired.

    Raises:
        InputError: they do not fit.
    """
    if mx.metal.is_available():
        limit = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(limit)
    elif mx.default_device() == mx.cpu:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return  # CUDA says so itself, and can page
    if mx.get_active_memory() + size > limit:
        raise InputError(
            f"{folder} needs {size / 1e9:.1f} GB for its weights, and this machine has "
            f"{limit / 1e9:.1f} GB for them: take a smaller model, or convert this one "
            f"with --dtype bfloat16 if it is stored in float32 (a CPU computes in "
            f"float32 in any case)"
        )


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter."""
    return {name: value.shape for name, value in tree_flatten(model.parameters())}

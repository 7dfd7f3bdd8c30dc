"""The session of a T5: what the decoding loop asks of it.

:mod:`model` computes the forward passes; encoding into rows, extending, rewinding to a
length and the caches' room are here. Shapes are named as there.
"""

import math
from collections.abc import Collection, Generator
from itertools import repeat
from typing import Any

import mlx.core as mx
import numpy as np

from architectures.parameters import parameter_count
from model import T5, LayerCache, Places, Step
from speculation.processors import ban
from speculation.session import (
    Preparing,
    check_prompts,
    check_rewind,
    chunks,
    distinct,
    finish,
    put_row,
    take_rows,
    wipe_row,
)
from system.device import FUSED, compute_early, fewest_keys, on_cpu
from system.memory import require_room

#: Numbers that are added up one after the other.
SUMMED = 64
#: Shapes of passes that are kept compiled.
MOST_TRACES = 128


def source_room(length: int) -> int:
    """The source length that caches have for prompts up to this one: few different
    ones, by up to a quarter larger."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def log_total(logits: mx.array) -> mx.array:
    """The logarithm of the sum of their exponentials (..., 1).

    On a CPU ``mx.logsumexp`` adds one after the other, and what is small next to the
    sum so far is lost: some 2e-5 of a vocabulary of 4,096, which is more than all of a
    T5's layers are off.
    """
    highest = logits.max(axis=-1, keepdims=True)
    each = mx.exp(logits - highest)
    whole = each.shape[-1] // SUMMED * SUMMED
    shape = (*each.shape[:-1], whole // SUMMED, SUMMED)
    parts = each[..., :whole].reshape(shape).sum(axis=-1)
    total = parts.sum(axis=-1, keepdims=True)
    total = total + each[..., whole:].sum(axis=-1, keepdims=True)
    return highest + mx.log(total)


class _Logits:
    """A decoder pass, of the ids that may be emitted."""

    def __init__(self, model: T5, vocabulary: int, banned: Collection[int]):
        self._decode = model.decode
        self._vocabulary = vocabulary
        self._ban: mx.array | None = None
        if banned:
            self._ban = ban(vocabulary, banned).astype(model.dtype)

    def __call__(
        self, tokens: mx.array, caches: list[LayerCache], step: Step, early: bool
    ) -> mx.array:
        return self._emitted(self._decode(tokens, caches, step, early))

    def _emitted(self, logits: mx.array) -> mx.array:
        logits = logits[..., : self._vocabulary]
        return logits if self._ban is None else logits + self._ban


class _Scores(_Logits):
    """The same, and the logarithm that makes them log-probabilities (B, T, 1): that of
    all ids, those too that may not be emitted."""

    def __call__(
        self, tokens: mx.array, caches: list[LayerCache], step: Step, early: bool
    ) -> tuple[mx.array, mx.array]:
        logits = self._decode(tokens, caches, step, early)
        return self._emitted(logits), log_total(logits.astype(mx.float32))


class _Traced:
    """The same as a function of arrays alone."""

    def __init__(self, logits: _Logits):
        self._logits = logits

    def __call__(
        self,
        tokens: mx.array,
        places: Places,
        biases: list[mx.array],
        padding: mx.array | None,
        arrays: list[list[mx.array]],
    ) -> tuple[Any, list[tuple[mx.array, mx.array]]]:
        """What it is of, and each layer's keys and values then."""
        caches = [LayerCache(*each) for each in arrays]
        step = Step(Places(*places), biases, padding)
        logits = self._logits(tokens, caches, step, early=False)  # there are no values
        return logits, [(cache.keys, cache.values) for cache in caches]


class T5Session:
    """One T5 and the decoding state of one batch of prompts.

    The caches have room for C positions, which doubles when it is used up, and for S
    tokens of a source. A row's length is how many positions count; what lies beyond is
    masked and later overwritten, so a rewind only changes lengths.
    """

    first_capacity = 16  # positions that a batch's caches begin with

    def __init__(
        self,
        model: T5,
        vocabulary: int | None = None,
        banned: Collection[int] = (),
        compiled: bool = False,
    ):
        """
        Args:
            vocabulary: how many ids may be emitted: logits are cut to it. Embeddings
                often have rows of padding beyond the tokenizer's ids.
            banned: ids below it that stand for nothing either: their logits are -inf.
            compiled: have MLX trace a decoder pass once for each of its shapes, of
                which there are few then: a source has room for some more tokens.
        """
        self.model = model
        self.vocabulary = min(vocabulary or math.inf, model.config.vocab_size)
        self.positions = None  # a relative position bias has no end
        self.batches = True
        self.has_encoder = self.trees = True
        self.parameters = parameter_count(model)
        self._bias_of: dict[int, list[mx.array]] = {}  # by capacity
        self._logits = _Logits(model, self.vocabulary, banned)
        self._scores = _Scores(model, self.vocabulary, banned)
        self._compiled = self._traced() if compiled else None
        self._shapes: set[Any] = set()  # that were traced
        self.forget()

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """Encode a batch of prompts (B lists of ids, none empty) and reset the state.

        Equal prompts are encoded once. Returns when the device has finished.

        Returns:
            For each row the tokens that decoding starts from.

        Raises:
            PromptError: an empty prompt, or an id that the embedding has no row for.
            TooLongError: the memory does not do; nothing has been computed.
        """
        sources = finish(self._encode(prompts, beside=False))
        longest = max(map(len, prompts))
        room = source_room(longest) if self._compiled else max(longest, fewest_keys())
        sources = [(_with_room(k, room), _with_room(v, room)) for k, v in sources]
        self._capacity = self.first_capacity
        # One for all: the first write to it makes a copy.
        shape = (*sources[0][0].shape[:2], self._capacity, sources[0][0].shape[3])
        empty = mx.zeros(shape, sources[0][0].dtype)
        self._caches = [LayerCache(empty, empty, *kv) for kv in sources]
        self.lengths = [0] * len(prompts)
        self._sources = [len(prompt) for prompt in prompts]
        self._padding = self._mask(self._sources, room)
        mx.eval([vars(cache) for cache in self._caches])
        return [[self.model.config.start_token] for _ in prompts]

    def prepare(self, prompts: list[list[int]]) -> Preparing:
        """Encode prompts that are to come into the batch, in chunks of layers where
        they are long; its rows may be extended whenever this yields.

        Raises:
            PromptError, TooLongError: as :meth:`start`.
        """
        sources = yield from self._encode(prompts, beside=True)
        return prompts, sources

    def require(self, prompts: list[list[int]], beside: bool) -> None:
        """See to it that prompts can be encoded.

        Args:
            beside: whether they are to come into a batch that there is.

        Raises:
            PromptError, TooLongError: as :meth:`start`.
        """
        check_prompts(prompts, self.model.config.vocab_size)
        if beside:
            self._require_room(prompts)
        once, _ = distinct(prompts)
        longest = max(map(len, once))
        ragged = any(len(prompt) < longest for prompt in once)
        size = self._encoding_bytes(len(once), longest, len(prompts), ragged)
        require_room(longest, size)

    def put(
        self,
        rows: list[int],
        prepared: tuple[list[list[int]], list[tuple[mx.array, mx.array]]],
    ) -> list[list[int]]:
        """Have prompts that were prepared in these rows of the batch; as :meth:`start`
        for the rest."""
        prompts, sources = prepared
        for row, prompt in zip(rows, prompts, strict=True):
            self.lengths[row] = 0
            self._sources[row] = len(prompt)
        self._fit()
        room = self._caches[0].source_keys.shape[2]
        for cache, (k, v) in zip(self._caches, sources, strict=True):
            k, v = _with_room(k, room), _with_room(v, room)
            for which, row in enumerate(rows):
                one = slice(which, which + 1)
                cache.source_keys = put_row(cache.source_keys, row, k[one])
                cache.source_values = put_row(cache.source_values, row, v[one])
        mx.eval([vars(cache) for cache in self._caches])
        return [[self.model.config.start_token] for _ in prompts]

    def take(self, rows: list[int], blank: int = 0) -> None:
        """Have these rows instead, of which some may be the same, and behind them some
        that are nobody's: they may be fed, and mean nothing."""
        for cache in self._caches:
            for name, array in vars(cache).items():
                setattr(cache, name, take_rows(array, rows, blank))
        self.lengths = [self.lengths[row] for row in rows] + [0] * blank
        self._sources = [self._sources[row] for row in rows] + [1] * blank
        self._fit()
        mx.eval([vars(cache) for cache in self._caches])

    def wipe(self, rows: list[int], holes: Collection[list[int]] = ()) -> None:
        """Have zeros behind the cached positions of these rows, and in the holes
        between those: what is masked there spreads if it is not finite."""
        for cache in self._caches:
            for row in rows:
                cache.keys = wipe_row(cache.keys, row, self.lengths[row])
                cache.values = wipe_row(cache.values, row, self.lengths[row])
            for row, its in zip(rows, holes, strict=False):
                if its:
                    cache.keys[row, :, mx.array(its)] = 0
                    cache.values[row, :, mx.array(its)] = 0

    def _encode(
        self, prompts: list[list[int]], beside: bool
    ) -> Generator[None, None, list[tuple[mx.array, mx.array]]]:
        """The keys and values (B, H, S, D) of prompts for each layer of the decoder.

        Args:
            beside: whether others wait, for whom this yields.
        """
        self.require(prompts, beside)
        once, copy_of = distinct(prompts)
        longest = max(map(len, once))
        tokens = np.zeros((len(once), longest), np.int32)
        for row, prompt in enumerate(once):
            tokens[row, : len(prompt)] = prompt
        mask = self._mask([len(prompt) for prompt in once], longest)
        steps = self.model.encoding(mx.array(tokens), mask)
        layer = tokens.size // len(self.model.encoder.layers)
        for source, long in zip(steps, chunks(repeat(layer)), strict=False):
            if long and beside:
                mx.eval(source)
                yield
        sources = []
        for layer in self.model.decoder.layers:
            k, v = layer.cross_attention.project_source(source)
            if len(once) < len(prompts):
                k, v = k[mx.array(copy_of)], v[mx.array(copy_of)]
            compute_early(k, v)
            sources.append((k, v))
        return sources

    def _mask(self, lengths: list[int], room: int) -> mx.array | None:
        """Additive mask (B, 1, 1, S) of sources so long; None where S is no more."""
        if min(lengths) == room and not self._compiled:  # that would be another shape
            return None
        padding = np.where(np.arange(room) < np.array(lengths)[:, None], 0, -np.inf)
        return mx.array(padding[:, None, None].astype(np.float32)).astype(
            self.model.dtype
        )

    def _fit(self) -> None:
        """Have as much room as the rows ask for, in a few sizes: not much more."""
        room = self._caches[0].source_keys.shape[2]
        longest = max(self._sources)
        wanted = source_room(longest)
        if longest > room or wanted <= room // 2:
            room = wanted
            for cache in self._caches:
                cache.source_keys = _with_room(cache.source_keys, room)
                cache.source_values = _with_room(cache.source_values, room)
        self._padding = self._mask(self._sources, room)
        wanted = self._room_for(max(self.lengths) + 1)
        if wanted <= self._capacity // 4:
            self._have_capacity(wanted)

    def _require_room(self, prompts: list[list[int]]) -> None:
        """See to it that there is memory for a longer source in every row."""
        longest = max(map(len, prompts))
        room = self._caches[0].source_keys.shape[2]
        if longest > room:
            config = self.model.config
            each = 2 * config.num_decoder_layers * config.num_heads * config.d_kv
            more = source_room(longest) * len(self.lengths) * each
            require_room(longest, more * self.model.dtype.size)

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
        places = Places.of(rows, self._capacity)
        logits = self._pass(self._logits, tokens, places)
        self.lengths = [length + new for length in self.lengths]
        return logits

    def extend_tree(
        self, tokens: mx.array, slots: np.ndarray, back: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Put tokens (B, T) anywhere in the caches, each to attend to what is said.

        Args:
            slots: (B, T), the position of each.
            back: (B, T, n), how many tokens before each those of the first n positions
                are, itself 0 before; -1 for what it does not see.

        Returns:
            Logits (B, T, vocabulary), and the logarithm that makes them
            log-probabilities, float32 (B, T, 1).
        """
        self._reserve(max(int(slots.max()) + 1, back.shape[2]))
        room = self._capacity
        if back.shape[2] < room:
            more = [(0, 0), (0, 0), (0, room - back.shape[2])]
            back = mx.pad(back, more, constant_values=-1)
        # The bias of what is not seen comes last.
        back = mx.where(back < 0, room, back)
        places = Places(mx.array(slots[:, None, :, None]), back)
        scored = self._pass(self._scores, tokens, places)
        used = (slots.max(axis=1) + 1).tolist()
        self.lengths = list(map(max, self.lengths, used))
        return scored

    def _pass(self, of: _Logits, tokens: mx.array, places: Places) -> Any:
        """A pass over the decoder."""
        if not self._compiled:
            step = Step(places, self._biases(), self._padding)
            return of(tokens, self._caches, step, early=True)
        self._count_shape(of is self._scores, tokens.shape, places.at.ndim)
        arrays = [list(vars(cache).values()) for cache in self._caches]
        found, written = self._compiled[of](
            tokens, places, self._biases(), self._padding, arrays
        )
        for cache, (keys, values) in zip(self._caches, written, strict=True):
            cache.keys, cache.values = keys, values
        return found

    def _count_shape(self, *shape: Any) -> None:
        """Forget all traces, when there are many: each takes a megabyte, for good."""
        room = self._caches[0].source_keys.shape[2]
        self._shapes.add((*shape, self._capacity, room))
        if len(self._shapes) > MOST_TRACES:
            self._shapes.clear()
            self._compiled = self._traced()

    def _traced(self) -> dict[_Logits, Any]:
        """The passes, to be traced once for each shape."""
        # They know nothing of this session, which would have to wait for a collection.
        return {of: mx.compile(_Traced(of)) for of in (self._logits, self._scores)}

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` cached positions of each row b.

        Raises:
            ValueError: a length beyond what is cached.
        """
        check_rewind(self.lengths, lengths)
        self.lengths = list(lengths)

    def forget(self) -> None:
        """Drop the batch and its caches."""
        self.lengths: list[int] = []
        self._sources: list[int] = []  # tokens of each row's source
        self._caches: list[LayerCache] = []
        self._padding: mx.array | None = None

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """What the caches of a batch take with prompts and answers of up to so many
        tokens, and a pass over one token of each row."""
        config = self.model.config
        inner = config.num_heads * config.d_kv
        positions = source_room(prompt) + self._room_for(answer)
        numbers = 2 * config.num_decoder_layers * inner * positions + self.vocabulary
        return rows * numbers * self.model.dtype.size

    def _encoding_bytes(
        self, prompts: int, length: int, rows: int, ragged: bool
    ) -> int:
        """What encoding takes at once, of so many prompts of this length for ``rows``.

        As ``mx.get_peak_memory`` has it, within a tenth: what goes through two layers,
        which are under way at once, and then either attention's squares or the keys and
        values for the decoder.
        """
        config, heads = self.model.config, self.model.config.num_heads
        inner = heads * config.d_kv
        columns = 3 if config.gated else 2
        layer = 4 * config.d_model + 7 * inner + columns * config.d_ff
        # The bias of every two tokens, of each layer where those have their own.
        squares = heads * (self.model.encoder.bias_count * (prompts if ragged else 1))
        squares += heads if ragged else 0
        if on_cpu() or config.d_kv not in FUSED:
            squares += 2 * prompts * heads  # logits and their softmax
        squares += 1  # which distance each is
        sources = 2 * config.num_decoder_layers * rows * length * inner
        numbers = 2 * prompts * length * layer + max(squares * length**2, sources)
        return numbers * self.model.dtype.size * 11 // 10

    def _room_for(self, length: int) -> int:
        """The capacity for so many positions."""
        return max(self.first_capacity, 1 << (length - 1).bit_length())

    def _reserve(self, length: int) -> None:
        """Make room for ``length`` positions."""
        if length > self._capacity:
            self._have_capacity(self._room_for(length))

    def _have_capacity(self, capacity: int) -> None:
        for cache in self._caches:
            cache.keys = _with_room(cache.keys, capacity)
            cache.values = _with_room(cache.values, capacity)
        self._capacity = capacity

    def _biases(self) -> list[mx.array]:
        """The decoder's position bias (H, C + 1), for each layer or one for all.

        Column d is for the key d positions back; the last one means "not to be seen".
        """
        if self._capacity not in self._bias_of:
            biases = self.model.decoder.biases(-np.arange(self._capacity))
            unseen = mx.full((biases[0].shape[0], 1), -math.inf, biases[0].dtype)
            biases = [mx.concatenate([bias, unseen], axis=1) for bias in biases]
            mx.eval(biases)  # used by every pass, of every prompt
            self._bias_of[self._capacity] = biases
        return self._bias_of[self._capacity]


def _with_room(cache: mx.array, room: int) -> mx.array:
    """A cache (B, H, C, D) with another C; what is new is zero: masked NaN would still
    spread."""
    more = room - cache.shape[2]
    if more < 0:
        return mx.contiguous(cache[:, :, :room])
    return mx.pad(cache, [(0, 0), (0, 0), (0, more), (0, 0)]) if more else cache

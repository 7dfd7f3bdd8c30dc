"""The session of a decoder-only model: what the decoding loop asks of it.

mlx-lm computes the forward pass (:mod:`causal_model`); prefill, extending and rewinding
to a length are here.
"""

from collections.abc import Collection, Iterator
from copy import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from architectures.parameters import parameter_count
from architectures.row_cache import ROOM, RowCache
from speculation.processors import ban
from speculation.session import (
    CHUNK,
    Preparing,
    check_prompts,
    check_rewind,
    distinct,
)
from system.device import FUSED, on_cpu
from system.errors import InputError, TooLongError
from system.memory import require_room

PREFILL = 2048  # prompt tokens that go through the model at a time


class CausalSession:
    """One mlx-lm model and the decoding state of one batch of prompts.

    Each layer has a cache with a length for each row. What a prompt, alone, begins with
    in common with the text before it stays cached.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int,
        banned: Collection[int] = (),
        positions: int | None = None,
        batches: bool = True,
        heads: int | None = None,
    ):
        """
        Args:
            vocabulary: how many ids may be emitted: logits are cut to it.
            banned: ids below it that stand for nothing: their logits are -inf.
            positions: the most that may be fed.
            batches: of :class:`speculation.session.Session`.
            heads: of the queries; None where nobody knows.

        Raises:
            InputError: the model's caches cannot be rewound.
        """
        self.model = model
        self.vocabulary = vocabulary
        self.positions = positions
        self.batches = batches
        self.has_encoder = self.trees = False
        self.parameters = parameter_count(model)
        self.lengths: list[int] = []
        self._ban = ban(vocabulary, banned) if banned else None
        # What was fed to a single row, (place, tokens) in order; None for what it was
        # taken from.
        self._fed: list[tuple[int, mx.array]] | None = []
        caches = make_prompt_cache(model)
        for cache in caches:
            if type(cache) is not KVCache:
                raise InputError(
                    f"this model keeps its state in a {type(cache).__name__}, which "
                    f"cannot be rewound: sliding windows and state-space layers do "
                    f"not go with speculative decoding"
                )
        self._layers = len(caches)
        self._begin(rows=1)
        model(mx.array([[0]]), cache=self._caches)  # never computed: for shapes alone
        self._heads, self._head_size = self._caches[0].keys.shape[1::2]
        self._heads = heads or self._heads
        self._dtype = self._caches[0].keys.dtype
        self._position_bytes = sum(cache.nbytes // ROOM for cache in self._caches)
        self._begin(rows=1)

    def _begin(self, rows: int) -> None:
        """Empty caches for so many rows."""
        self.lengths = []  # interrupted, nothing of the batch is believed: see _reuse
        self._caches = [RowCache(rows, self.positions) for _ in range(self._layers)]
        self._fed = []
        self.lengths = [0] * rows

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """Prefill a batch of prompts (B lists of ids, none empty), but the last token
        of each; equal ones once. Returns when the device has finished.

        Returns:
            The prompts: decoding goes on from their last tokens.

        Raises:
            PromptError: an empty prompt.
            TooLongError: one that leaves no position to write to, or for which the
                memory does not do.
        """
        self._check(prompts)
        once, copy_of = distinct(prompts)
        known = 0
        if len(once) == 1:
            known = self._reuse(prompts[0])
        else:
            self._begin(len(once))
        self._require_room(once, known, len(prompts))
        for _ in self._prefill(once, known, PREFILL):
            pass
        if len(once) < len(prompts):
            self.take(copy_of)
        self.lengths = [len(prompt) - 1 for prompt in prompts]
        return [list(prompt) for prompt in prompts]

    def prepare(self, prompts: list[list[int]]) -> Preparing:
        """Prefill prompts that are to come into the batch, a chunk at a time; its rows
        may be extended whenever this yields.

        Raises:
            PromptError, TooLongError: as :meth:`start`.
        """
        self._check(prompts)
        once, copy_of = distinct(prompts)
        self._require_room(once, 0, len(prompts))
        apart = copy(self)  # the same model, caches of its own
        apart._begin(len(once))
        yield from apart._prefill(once, 0, max(1, CHUNK // len(once)))
        return prompts, apart._caches, copy_of

    def require(self, prompts: list[list[int]], beside: bool) -> None:
        """See to it that prompts can be prefilled, whatever is cached of them.

        Raises:
            PromptError, TooLongError: as :meth:`start`.
        """
        self._check(prompts)
        once, _ = distinct(prompts)
        self._require_room(once, 0, len(prompts))

    def put(
        self,
        rows: list[int],
        prepared: tuple[list[list[int]], list[RowCache], list[int]],
    ) -> list[list[int]]:
        """Have prompts that were prepared in these rows of the batch; as :meth:`start`
        for the rest."""
        prompts, caches, copy_of = prepared
        self._fed = None
        for mine, theirs in zip(self._caches, caches, strict=True):
            mine.put(rows, theirs, copy_of)
        for row, prompt in zip(rows, prompts, strict=True):
            self.lengths[row] = len(prompt) - 1
        mx.eval([(cache.keys, cache.values) for cache in self._caches])
        return [list(prompt) for prompt in prompts]

    def take(self, rows: list[int], blank: int = 0) -> None:
        """Have these rows instead, of which some may be the same, and behind them some
        that are nobody's: they may be fed, and mean nothing."""
        lengths = [self.lengths[row] for row in rows] + [0] * blank
        self.lengths = []  # as in _begin
        self._fed = None
        for cache in self._caches:
            cache.take(rows, blank)
        mx.eval([(cache.keys, cache.values) for cache in self._caches])
        self.lengths = lengths

    def wipe(self, rows: list[int], holes: Collection[list[int]] = ()) -> None:
        """Have zeros behind the cached positions of these rows, which have no holes:
        what is masked there spreads if it is not finite."""
        for cache in self._caches:
            cache.wipe(rows)

    def _check(self, prompts: list[list[int]]) -> None:
        check_prompts(prompts, self.vocabulary)
        for prompt in prompts:
            if self.positions and len(prompt) >= self.positions:
                raise TooLongError(
                    f"the prompt has {len(prompt)} tokens, but the model has positions "
                    f"for {self.positions} with its answer: shorten it"
                )

    def _require_room(self, prompts: list[list[int]], known: int, copies: int) -> None:
        longest = max(map(len, prompts)) - 1
        if longest > known:
            size = self._prefill_bytes(len(prompts), known, longest, copies)
            require_room(longest + 1, size)

    def _prefill(
        self, prompts: list[list[int]], known: int, chunk: int
    ) -> Iterator[None]:
        """Feed prompts, a row each, but their last tokens and the ``known`` first; so
        many tokens of each at a time, and a pause between."""
        longest = max(map(len, prompts)) - 1
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt) - 1] = prompt[:-1]
        self.lengths = [known] * len(prompts)
        for place in range(known, longest, chunk):
            if place > known:
                yield
            self.extend(mx.array(tokens[:, place : place + chunk]))
            # Not the logits: a head over every position would take the most memory.
            mx.eval([(cache.keys, cache.values) for cache in self._caches])
        self.rewind([len(prompt) - 1 for prompt in prompts])

    def extend(self, tokens: mx.array) -> mx.array:
        """Append tokens (B, T), each row at its own length.

        Returns:
            Logits (B, T, vocabulary): those at [b, t] are for the token after it.
        """
        if len(self.lengths) == 1 and self._fed is not None:
            self._fed.append((self.lengths[0], tokens))
        logits = self.model(tokens, cache=self._caches)
        self.lengths = [length + tokens.shape[1] for length in self.lengths]
        logits = logits[..., : self.vocabulary]
        return logits if self._ban is None else logits + self._ban.astype(logits.dtype)

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` cached positions of each row b.

        Raises:
            ValueError: a length beyond what is cached.
        """
        check_rewind(self.lengths, lengths)
        for cache in self._caches:
            # To a place, not by a count: a pass that Ctrl-C cut short may have reached
            # some layers and not others.
            cache.rewind(lengths)
        self.lengths = list(lengths)

    def forget(self) -> None:
        """Drop the batch and its caches: nothing of it is kept for the next prompt."""
        self._begin(rows=0)

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """What the caches of a batch take with prompts and answers of up to so many
        tokens, and a pass over one token of each row."""
        room = -(-(prompt + answer) // ROOM) * ROOM
        return rows * (self._position_bytes * room + self.vocabulary * self._dtype.size)

    def _prefill_bytes(self, rows: int, known: int, length: int, copies: int) -> int:
        """What prefilling takes at once, of ``rows`` prompts up to this length, that
        become ``copies`` rows.

        As ``mx.get_peak_memory`` has it, from above: the caches, which are copied as
        they grow, and for a chunk attention's squares and what a layer makes of it.
        """
        starts = range(known, length, PREFILL)
        chunks = [(start, min(start + PREFILL, length)) for start in starts]
        numbers = min(PREFILL, length - known) * _width(self.model)
        squares = max((end - start) * end for start, end in chunks)
        if on_cpu() or self._head_size not in FUSED:
            numbers += self._heads * squares
        room = -(-length // ROOM) * ROOM
        caches = self._position_bytes * (room + room // self._layers)
        size = rows * (caches + numbers * self._dtype.size * 11 // 10 + squares)
        return size if copies == rows else size + copies * self._position_bytes * room

    def _reuse(self, prompt: list[int]) -> int:
        """Keep of the cache what ``prompt`` begins with; how many positions that is."""
        if len(self.lengths) != 1 or self._fed is None:
            self._begin(rows=1)
        held: list[int] = []
        for place, tokens in self._fed:
            held[place:] = np.array(tokens)[0].tolist()
        held = held[: self.lengths[0]]
        known = 0
        for cached, token in zip(held, prompt[:-1], strict=False):
            if cached != token:
                break
            known += 1
        self.rewind([known])
        self._fed = [(0, mx.array([held[:known]], mx.int32))]
        return known


def _width(model: nn.Module) -> int:
    """How many numbers a layer makes of a token; of models that are built otherwise,
    none are known."""
    layers = getattr(model, "layers", None)
    if not layers:
        return 0
    weights = [weight for _, weight in tree_flatten(layers[0].parameters())]
    return 2 * sum(weight.shape[0] for weight in weights if weight.ndim > 1)

"""Tokens drawn for a batch, round after round: the draft's and the target's alike.

Shapes: B = batch, K = draft tokens, T = positions, V = vocabulary, L = length.
"""

import math
from collections.abc import Collection
from functools import cached_property

import mlx.core as mx
import numpy as np

from speculation.processors import Prefix
from speculation.sampling import Sampling, draw
from system.errors import InputError


class BatchSampler:
    """How a batch's tokens are chosen, round after round."""

    def __init__(
        self,
        sampling: Sampling,
        starts: list[list[int]],
        vocabulary: int,
        *,
        eos_tokens: Collection[int] = (),
        prompts: list[list[int]] | None = None,
        streams: list[tuple[int, ...]] | None = None,
    ):
        """
        Args:
            starts: the tokens that each row's decoding starts from.
            vocabulary: V of the target; a draft's logits are cut or padded to it.
            eos_tokens: what ends a row, for the rules that spare or ban it.
            prompts: what the rows answer, for the rules that look at it.
            streams: what tells the rows' random numbers apart, beside the seed; by
                default the row's number.

        Raises:
            InputError: an id outside the vocabulary.
        """
        self.sampling = sampling
        self.vocabulary = vocabulary
        self.chain = sampling.chain(vocabulary, eos_tokens)
        self.eos_tokens = frozenset(eos_tokens)
        self._round = 0
        self._starts = np.array([len(start) for start in starts])
        self._prompts = prompts or [[] for _ in starts]
        if sampling.forced_bos_token_id is not None and self._starts.max() > 1:
            raise InputError(
                "forced-bos-token-id is for models with an encoder: others have a "
                "prompt where that token would be"
            )
        # Of its own for each row: its text must not depend on its neighbours.
        self._random: list[_Random] = []
        if not sampling.greedy:
            keys = streams or [(row,) for row in range(len(starts))]
            self._random = [_Random(sampling.seed, key) for key in keys]

    @cached_property
    def prompt(self) -> mx.array:
        """(B, S) int32, what each row answers, -1 beyond its end."""
        padded = np.full(
            (len(self._prompts), max(map(len, self._prompts))), -1, np.int32
        )
        for row, prompt in enumerate(self._prompts):
            padded[row, : len(prompt)] = prompt
        return mx.array(padded)

    def round(
        self,
        sequences: list[list[int]],
        num_draft: int = 0,
        *,
        following: mx.array | None = None,
    ) -> "RoundSampler":
        """The sampler of the next round.

        Args:
            sequences: for each row the committed tokens, with those it started from.
            num_draft: the most tokens that it drafts.
            following: (B,) the token after those, where only the device has it yet.
        """
        last = following
        if last is None:
            last = mx.array([sequence[-1] for sequence in sequences])
        committed = generated = None
        if self.chain:
            if following is None:
                sequences = [sequence[:-1] for sequence in sequences]
            lengths = np.array([len(sequence) for sequence in sequences])
            committed = np.full((len(sequences), lengths.max()), -1, np.int32)
            for row, sequence in enumerate(sequences):
                committed[row, len(committed[row]) - len(sequence) :] = sequence
            generated = lengths + 1 - self._starts
        number, self._round = self._round, self._round + 1
        size = 1 + 2 * num_draft
        rows = [row.of_round(number, size) for row in self._random]
        uniform = np.stack(rows) if rows else None
        return RoundSampler(self, last, committed, generated, uniform)


class _Random:
    """A row's random numbers, in [0, 1).

    A round's do not depend on how many of them are used, by it or by those before: with
    the same seed another budget gives the same text, cut off.
    """

    def __init__(self, seed: int, key: tuple[int, ...]):
        sequence = np.random.SeedSequence(seed, spawn_key=key)
        self._bits = np.random.Philox(sequence)
        self._numbers = np.random.Generator(self._bits)
        self._state = self._bits.state

    def of_round(self, number: int, count: int) -> np.ndarray:
        """The first ``count`` numbers of a round, float32."""
        # Philox counts: its third word is the round's, the first two count within it.
        self._state["state"]["counter"] = np.array([0, 0, number, 0], np.uint64)
        self._bits.state = self._state
        return self._numbers.random(count, dtype=np.float32)


class RoundSampler:
    """Chooses the tokens of one round, the draft's and the target's by the same rules.

    Everything that it does stays on the device.

    Attributes:
        last: (B,) the last committed token of each row.
        eos_tokens: the ids that end a row.
    """

    def __init__(
        self,
        batch_sampler: BatchSampler,
        last: mx.array,
        committed: np.ndarray | None,
        generated: np.ndarray | None,
        uniform: np.ndarray | None,
    ):
        """
        Args:
            committed: (B, L) the tokens before ``last``, left-padded with -1; None
                where no processor asks for them.
            generated: (B,) how many of the committed, ``last`` included, were
                generated; likewise.
            uniform: (B, 1 + 2K) in [0, 1): for the target's own token, then for each
                of K draft tokens one to draw it by and one to judge it by; None when
                greedy.
        """
        self.sampling = batch_sampler.sampling
        self.eos_tokens = batch_sampler.eos_tokens
        self.last = last
        self._batch = batch_sampler
        self._generated = generated
        if uniform is not None:
            self._drawing = mx.array(uniform[:, 1::2])
            self._judging = mx.array(uniform[:, [0, *range(2, uniform.shape[1], 2)]])
        if committed is not None:
            self._committed = mx.array(committed)

    def process(self, logits: mx.array, block: mx.array) -> mx.array:
        """Apply the processors.

        Args:
            logits: (B, T, V) for the positions after the last T tokens of ``block``.
            block: (B, T' >= T), the last committed token and what was drafted.
        """
        if not self._batch.chain:
            return logits
        size, positions = block.shape[1], logits.shape[1]
        after = np.arange(size - positions, size)
        prefix = Prefix(
            mx.concatenate([self._committed, block], axis=1),
            mx.array((self._generated[:, None] + after).astype(np.int32)),
            self._batch.prompt,
        )
        logits = logits.astype(mx.float32)
        for processor in self._batch.chain:
            logits = processor(logits, prefix)
        return logits

    def draft(
        self, logits: mx.array, drafted: list[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """The draft's next token.

        Args:
            logits: (B, V) of the draft.
            drafted: (B,) each, the tokens that it proposed before.

        Returns:
            The token (B,) int32, and q (B, V); None when the choice is greedy.
        """
        missing = self._batch.vocabulary - logits.shape[-1]
        if missing > 0:
            logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-math.inf)
        logits = logits[:, : self._batch.vocabulary]
        if self._batch.chain:
            block = mx.stack([self.last, *drafted], axis=1)
            logits = self.process(logits[:, None], block)[:, 0]
        if self.sampling.greedy:
            return mx.argmax(logits, axis=-1).astype(mx.int32), None
        q = self.sampling.probs(logits)
        return draw(q, self._drawing[:, len(drafted)]), q

    def judging(self, drafted: int) -> mx.array:
        """Random numbers (B, K + 1): the first for the target's own token, the others
        for judging ``drafted`` tokens. None of them is used for drafting."""
        return self._judging[:, : 1 + drafted]

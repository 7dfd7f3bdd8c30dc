"""Who proposes draft tokens.

A drafter is told nothing about what became of its proposals. It is handed the committed
tokens each round and works out by itself how far its cache still agrees with them, so
that a fully accepted round, a rejection, a round that somebody else drafted and a round
without a draft are all the same case.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from speculation.samplers import RoundSampler
from speculation.session import Session

#: Draft steps after which a step's token is looked at: nothing is of use behind an end.
LOOK_BACK = 16


@dataclass
class Draft:
    """Proposed tokens for one round.

    Attributes:
        tokens: (B, K) int32, right-padded.
        probs: (B, K, V) float32, the q that each token was drawn from; None when each
            was certain: greedy drafts, looked up ones.
        counts: how many of the K are real, row by row; None when all are.
    """

    tokens: mx.array
    probs: mx.array | None = None
    counts: list[int] | None = None


class Drafter(Protocol):
    """Anything that can guess how a text goes on.

    Attributes:
        positions: how many tokens it can be given; None for any number.
    """

    positions: int | None

    def start(self, prompts: list[list[int]]) -> None:
        """Prepare for a batch of prompts (B lists of token ids)."""

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """Guess the next ``num_draft`` tokens of each row, or fewer where all rows
        would end before; wait for nothing that the device is not long done with.

        Args:
            sequences: for each row the committed tokens, with those it started from.
            num_draft: K, at least 1.
            sampler: chooses tokens from logits as the target will.
        """


class ModelDrafter:
    """Drafts with a smaller model, token by token.

    Attributes:
        session: the model and its caches.
    """

    def __init__(self, session: Session):
        self.session = session
        self.positions = session.positions

    def start(self, prompts: list[list[int]]) -> None:
        """As :class:`Drafter` has it."""
        firsts = self.session.start(prompts)
        # A row's cache holds `_agreed` positions that are known to be the committed
        # tokens', then those of the last proposal, which may have turned out wrong.
        self._agreed = [len(first) - 1 for first in firsts]
        self._proposed: mx.array | None = None

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """As :class:`Drafter` has it."""
        self._settle(sequences)
        logits = self._catch_up(sequences)
        tokens: list[mx.array] = []
        probs: list[mx.array | None] = []
        ended = np.zeros(len(sequences), bool)
        while True:
            token, q = sampler.draft(logits, tokens)
            mx.async_eval(token)  # it runs while the next step is being built
            tokens.append(token)
            probs.append(q)
            if len(tokens) == num_draft:
                break
            if len(tokens) > LOOK_BACK:
                # Long done, while those after it wait for their turn: no time is lost.
                old = np.array(tokens[-LOOK_BACK - 1])
                ended |= np.isin(old, list(sampler.eos_tokens))
                if ended.all():
                    break
            logits = self.session.extend(token[:, None])[:, -1]
        self._proposed = mx.stack(tokens, axis=1)
        return Draft(self._proposed, None if q is None else mx.stack(probs, axis=1))

    def _settle(self, sequences: list[list[int]]) -> None:
        """Count the cached positions that agree with what has been committed since."""
        if self._proposed is None:
            return
        # Evaluated when the round was verified: this waits for nothing.
        proposed = np.array(self._proposed).tolist()
        self._proposed = None
        for row, sequence in enumerate(sequences):
            fed = proposed[row][:-1]
            # The last committed token has to be fed again for its logits.
            known = sequence[self._agreed[row] : -1]
            for cached, committed in zip(fed, known, strict=False):
                if cached != committed:
                    break
                self._agreed[row] += 1

    def _catch_up(self, sequences: list[list[int]]) -> mx.array:
        """Feed what each row lacks of its committed tokens; the logits after (B, V).

        Rows may lack different counts. All feed as many as the worst: one that lacks
        fewer repeats some of its last tokens, one that is not even that long is padded.
        """
        lengths = [len(sequence) for sequence in sequences]
        # At least the last one, for its logits: nothing new may have been committed.
        width = max(1, *map(int.__sub__, lengths, self._agreed))
        starts = [max(length - width, 0) for length in lengths]
        chunk = np.zeros((len(sequences), width), np.int32)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            chunk[row, : len(sequence) - start] = sequence[start:]
        # A target with more ids than the draft: a bad guess follows, not a bad read.
        chunk = np.minimum(chunk, self.session.vocabulary - 1)
        self.session.rewind(starts)
        logits = self.session.extend(mx.array(chunk))
        self.session.rewind(lengths)
        last = mx.array(lengths) - mx.array(starts) - 1
        self._agreed = lengths
        return mx.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]


def up_to_end(tokens: list[int], eos_tokens: AbstractSet[int]) -> list[int]:
    """Tokens up to the first that ends a text, itself included."""
    end = next((i for i, token in enumerate(tokens) if token in eos_tokens), None)
    return tokens if end is None else tokens[: end + 1]

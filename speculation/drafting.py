"""Who proposes draft tokens.

A drafter is told nothing about what became of its proposals. It is handed the committed
tokens each round and works out by itself how far its cache still agrees with them, so
that a fully accepted round, a rejection, a round that somebody else drafted and a round
without a draft are all the same case.
"""

from collections.abc import Set as AbstractSet
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from speculation.acceptance import Draft
from speculation.samplers import RoundSampler
from speculation.session import Preparing, Session

#: Draft steps after which a step's token is looked at: nothing is of use behind an end.
LOOK_BACK = 16


class Drafter(Protocol):
    """Anything that can guess how a text goes on.

    Attributes:
        positions: how many tokens it can be given; None for any number.
    """

    positions: int | None

    def start(self, prompts: list[list[int]]) -> None:
        """Prepare for a batch of prompts (B lists of token ids)."""

    def prepare(self, prompts: list[list[int]]) -> Preparing:
        """As :meth:`Session.prepare`."""

    def put(self, rows: list[int], prepared: Any) -> None:
        """As :meth:`Session.put`."""

    def take(self, rows: list[int], blank: int = 0) -> None:
        """As :meth:`Session.take`."""

    def follow(self, sequences: list[list[int]]) -> None:
        """Take in, and wait for it, what was committed while others drafted or nobody
        did: ``sequences`` of :meth:`propose`, which would have to do it otherwise."""

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """Guess the next ``num_draft`` tokens of each row, or fewer where all rows
        would end before; wait for nothing that the device is not long done with.

        Args:
            sequences: for each row the committed tokens, with those it started from;
                any token where a row is nobody's.
            num_draft: K, at least 1.
            sampler: chooses tokens from logits as the target will.
        """

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """As :meth:`Session.batch_bytes`."""


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
        self._fed: list[list[int]] = [[] for _ in firsts]

    def prepare(self, prompts: list[list[int]]) -> Preparing:
        """As :class:`Drafter` has it."""
        return self.session.prepare(prompts)

    def put(self, rows: list[int], prepared: Any) -> None:
        """As :class:`Drafter` has it."""
        firsts = self.session.put(rows, prepared)
        self.session.wipe(rows)  # nobody looks at whether a draft's logits are finite
        self._read_proposed()
        for row, first in zip(rows, firsts, strict=True):
            self._agreed[row], self._fed[row] = len(first) - 1, []

    def take(self, rows: list[int], blank: int = 0) -> None:
        """As :class:`Drafter` has it."""
        self._read_proposed()
        self.session.take(rows, blank)
        self._agreed = [self._agreed[row] for row in rows] + [0] * blank
        self._fed = [self._fed[row] for row in rows] + [[] for _ in range(blank)]

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """As :class:`Drafter` has it."""
        return self.session.batch_bytes(rows, prompt, answer)

    def follow(self, sequences: list[list[int]]) -> None:
        """As :class:`Drafter` has it."""
        self._settle(sequences)
        mx.eval(self._catch_up([sequence[:-1] or sequence for sequence in sequences]))

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """As :class:`Drafter` has it."""
        self._settle(sequences)
        logits = self._catch_up(sequences)
        tokens: list[mx.array] = []
        probs: list[mx.array | None] = []
        ended = np.array([not ends for ends in sampler.ends])
        endless = ended.all()
        while True:
            token, q = sampler.draft(logits, tokens)
            mx.async_eval(token)  # it runs while the next step is being built
            tokens.append(token)
            probs.append(q)
            if len(tokens) == num_draft:
                break
            if len(tokens) > LOOK_BACK and not endless:
                # Long done, while those after it wait for their turn: no time is lost.
                old = np.array(tokens[-LOOK_BACK - 1]).tolist()
                ended |= [
                    each in ends for each, ends in zip(old, sampler.ends, strict=True)
                ]
                if ended.all():
                    break
            logits = self.session.extend(token[:, None])[:, -1]
        self._proposed = mx.stack(tokens, axis=1)
        return Draft(self._proposed, None if q is None else mx.stack(probs, axis=1))

    def _read_proposed(self) -> None:
        """Bring what was fed of the last proposal to the host, where it is changed."""
        if self._proposed is not None:
            # Evaluated when the round was verified: this waits for nothing.
            self._fed = np.array(self._proposed)[:, :-1].tolist()
            self._proposed = None

    def _settle(self, sequences: list[list[int]]) -> None:
        """Count the cached positions that agree with what has been committed since."""
        self._read_proposed()
        for row, sequence in enumerate(sequences):
            # The last committed token has to be fed again for its logits.
            known = sequence[self._agreed[row] : -1]
            for cached, committed in zip(self._fed[row], known, strict=False):
                if cached != committed:
                    break
                self._agreed[row] += 1
            self._fed[row] = []

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

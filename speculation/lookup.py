"""Drafting without a model: what followed the same words before."""

from copy import copy

import mlx.core as mx
import numpy as np

from speculation.acceptance import Draft
from speculation.drafting import up_to_end
from speculation.samplers import RoundSampler
from speculation.session import Preparing


class LookupDrafter:
    """Drafts what followed the last few tokens where they occurred before.

    In the text so far, and in the prompt where a decoder does not have that before its
    text. No model, no cost; nothing is proposed where nothing matches. Saxena, "Prompt
    Lookup Decoding", 2023.
    """

    positions = None

    def start(self, prompts: list[list[int]]) -> None:
        """As :class:`Drafter` has it."""
        self._rows = [_Occurrences(prompt) for prompt in prompts]

    def prepare(self, prompts: list[list[int]]) -> Preparing:
        """As :class:`Drafter` has it."""
        yield from ()
        return prompts

    def put(self, rows: list[int], prepared: list[list[int]]) -> None:
        """As :class:`Drafter` has it."""
        for row, prompt in zip(rows, prepared, strict=True):
            self._rows[row] = _Occurrences(prompt)

    def take(self, rows: list[int], blank: int = 0) -> None:
        """As :class:`Drafter` has it."""
        taken: dict[int, _Occurrences] = {}
        found = []
        for row in rows:
            found.append(taken[row].copy() if row in taken else self._rows[row])
            taken[row] = self._rows[row]
        self._rows = [*found, *(_Occurrences([]) for _ in range(blank))]

    def batch_bytes(self, rows: int, prompt: int, answer: int) -> int:
        """As :class:`Drafter` has it."""
        return 0

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """As :class:`Drafter` has it."""
        found = [
            up_to_end(row.after(sequence, num_draft), ends)
            for row, sequence, ends in zip(
                self._rows, sequences, sampler.ends, strict=True
            )
        ]
        counts = [len(tokens) for tokens in found]
        padded = np.zeros((len(found), max(counts)), np.int32)  # maybe no column
        for row, tokens in enumerate(found):
            padded[row, : len(tokens)] = tokens
        return Draft(mx.array(padded), counts=counts)


class _Occurrences:
    """What followed each n-gram of one row's text where it occurred last."""

    SIZES = (4, 3, 2)  # of n-grams, the longest match first

    def __init__(self, prompt: list[int]):
        """``prompt``: to look in as well, where the row's own text does not begin with
        it."""
        self._prompt: list[int] | None = prompt
        self._text: list[int] = []
        self._own = 0  # where the row's own text begins
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> the place after it
        self._indexed = 0

    def copy(self) -> "_Occurrences":
        """Another that goes on from the same text."""
        other = copy(self)
        other._text, other._next = list(self._text), dict(self._next)
        return other

    def after(self, sequence: list[int], count: int) -> list[int]:
        """Up to ``count`` tokens that followed what ``sequence`` ends with."""
        text = self._text
        if self._prompt is not None:
            if sequence[: len(self._prompt)] != self._prompt:
                text += self._prompt
            text.append(-1)  # which is in no n-gram that is looked for
            self._own = len(text)
            self._prompt = None
        text += sequence[len(text) - self._own :]  # what was there has not changed
        # The last n-grams are left out: they would find themselves.
        for end in range(self._indexed + 1, len(text)):
            for size in self.SIZES:
                if size <= end:
                    self._next[tuple(text[end - size : end])] = end
            self._indexed = end
        for size in self.SIZES:
            place = self._next.get(tuple(text[-size:]))
            if place is not None and size <= len(sequence):
                found = text[place : place + count]
                if -1 in found:
                    found = found[: found.index(-1)]
                if found:
                    return found
        return []

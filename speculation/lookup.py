"""Drafting without a model: what followed the same words before."""

import mlx.core as mx
import numpy as np

from speculation.drafting import Draft, up_to_end
from speculation.samplers import RoundSampler


class LookupDrafter:
    """Drafts what followed the last few tokens where they occurred before.

    In the text so far, and in the prompt where a decoder does not have that before its
    text. No model, no cost; nothing is proposed where nothing matches. Saxena, "Prompt
    Lookup Decoding", 2023.
    """

    positions = None

    def start(self, prompts: list[list[int]]) -> None:
        """As :class:`Drafter` has it."""
        self._prompts = prompts
        self._rows: list[_Occurrences] | None = None

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """As :class:`Drafter` has it."""
        if self._rows is None:
            self._rows = [
                _Occurrences([] if sequence[: len(prompt)] == prompt else prompt)
                for prompt, sequence in zip(self._prompts, sequences, strict=True)
            ]
        found = [
            row.after(sequence, num_draft)
            for row, sequence in zip(self._rows, sequences, strict=True)
        ]
        found = [up_to_end(tokens, sampler.eos_tokens) for tokens in found]
        counts = [len(tokens) for tokens in found]
        padded = np.zeros((len(found), max(counts)), np.int32)  # maybe no column
        for row, tokens in enumerate(found):
            padded[row, : len(tokens)] = tokens
        return Draft(mx.array(padded), counts=counts)


class _Occurrences:
    """What followed each n-gram of one row's text where it occurred last."""

    SIZES = (4, 3, 2)  # of n-grams, the longest match first

    def __init__(self, source: list[int]):
        """``source``: text to look in beside the row's own, maybe none."""
        self._text = [*source, -1]  # which is in no n-gram that is looked for
        self._own = len(self._text)  # where the row's own text begins
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> the place after it
        self._indexed = 0

    def after(self, sequence: list[int], count: int) -> list[int]:
        """Up to ``count`` tokens that followed what ``sequence`` ends with."""
        text = self._text
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

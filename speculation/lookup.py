"""Guesses without a model: what followed the same words before."""

from collections.abc import Set as AbstractSet
from copy import copy
from typing import NamedTuple

from speculation.drafting import up_to_end


class Found(NamedTuple):
    """What followed a text's last words where they occurred before.

    Attributes:
        tokens: maybe none.
        match: how many tokens agreed.
    """

    tokens: list[int]
    match: int


NOTHING = Found([], 0)

#: The longest n-gram that is looked for.
LONGEST = 4


class Lookup:
    """Guesses that what followed the last few tokens where they occurred before will
    follow again.

    In the text so far, and in the prompt where a decoder does not have that before its
    text. No model, no cost. Saxena, "Prompt Lookup Decoding", 2023.
    """

    def __init__(self, least: int = 2):
        """``least``: how many tokens have to agree."""
        self._sizes = tuple(range(max(LONGEST, least), least - 1, -1))
        self._rows: list[_Occurrences] = []

    def start(self, prompts: list[list[int]]) -> None:
        """Prepare for a batch of prompts (B lists of token ids)."""
        self._rows = [self._of(prompt) for prompt in prompts]

    def put(self, rows: list[int], prompts: list[list[int]]) -> None:
        """Have other prompts in these rows."""
        for row, prompt in zip(rows, prompts, strict=True):
            self._rows[row] = self._of(prompt)

    def take(self, rows: list[int], blank: int = 0) -> None:
        """Have these rows instead, of which some may be the same, and behind them some
        that are nobody's."""
        taken: dict[int, _Occurrences] = {}
        found = []
        for row in rows:
            found.append(taken[row].copy() if row in taken else self._rows[row])
            taken[row] = self._rows[row]
        self._rows = [*found, *(self._of([]) for _ in range(blank))]

    def find(
        self, row: int, sequence: list[int], most: int, ends: AbstractSet[int]
    ) -> Found:
        """Up to ``most`` tokens that may come after a row's ``sequence``, which only
        ever grows; none behind one that ends it."""
        tokens, match = self._rows[row].after(sequence, most)
        return Found(up_to_end(tokens, ends), match)

    def _of(self, prompt: list[int]) -> "_Occurrences":
        return _Occurrences(prompt, self._sizes)


class _Occurrences:
    """What followed each n-gram of one row's text where it occurred last."""

    def __init__(self, prompt: list[int], sizes: tuple[int, ...]):
        """
        Args:
            prompt: to look in as well, where the row's own text does not begin with it.
            sizes: of n-grams, the longest first.
        """
        self._sizes = sizes
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

    def after(self, sequence: list[int], count: int) -> Found:
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
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(text[end - size : end])] = end
            self._indexed = end
        for size in self._sizes:
            place = self._next.get(tuple(text[-size:]))
            if place is not None and size <= len(sequence):
                found = text[place : place + count]
                if -1 in found:
                    found = found[: found.index(-1)]
                if found:
                    return Found(found, size)
        return NOTHING

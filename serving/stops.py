"""Texts that end where a string occurs."""

from collections.abc import Sequence


class Cut:
    """Cuts a text, as it comes, where the first of some strings is complete.

    What comes out does not depend on how the text is divided: what may be the beginning
    of a stop string waits until it is known. Of strings that are complete with the same
    character the longest counts. The string itself is not part of the text.

    Attributes:
        ended: whether one has occurred.
    """

    def __init__(self, stops: Sequence[str]):
        """``stops``: none of them empty."""
        self.ended = False
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held: list[tuple[str, bool]] = []  # what waits, with its marks

    def push(self, text: str, mark: bool) -> list[tuple[str, bool]]:
        """What is certain to be of the text, now that ``text`` has come; each bit with
        the mark it came with."""
        self._held.append((text, mark))
        held = "".join(bit for bit, _ in self._held)
        first = len(held) - len(text)
        # Only what came now can have completed one.
        for end in range(first + 1, len(held) + 1):
            found = [len(stop) for stop in self._stops if held[:end].endswith(stop)]
            if found:
                self.ended = True
                return self._release(end - max(found))
        return self._release(len(held) - self._waits(held))

    def finish(self) -> list[tuple[str, bool]]:
        """What is left, as nothing more comes."""
        return [] if self.ended else self._release(sum(len(t) for t, _ in self._held))

    def _waits(self, held: str) -> int:
        """How many last characters may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(held)), 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, count: int) -> list[tuple[str, bool]]:
        """So many characters of what waits."""
        released = []
        while count > 0:
            text, mark = self._held.pop(0)
            if len(text) > count:
                self._held.insert(0, (text[count:], mark))
            released.append((text[:count], mark))
            count -= len(text)
        return [(text, mark) for text, mark in released if text]

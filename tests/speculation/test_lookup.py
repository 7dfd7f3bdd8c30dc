"""Lookup: what is found, for how much work, and whose it is as rows come and go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation import lookup
from speculation.lookup import LONGEST, NOTHING, Found, Lookup

NEVER = frozenset()


def by_hand(prompt, sequence, most, least, ends=NEVER):
    """What followed the longest n-gram where it occurred last, looked for anew."""
    texts = [sequence] if sequence[: len(prompt)] == prompt else [prompt, sequence]
    for size in range(max(LONGEST, least), least - 1, -1):
        words = sequence[-size:]
        if len(words) < size:
            continue
        for text in reversed(texts):
            for end in range(len(text) - (text is sequence), size - 1, -1):
                if text[end - size : end] == words and text[end:]:
                    found = text[end : end + most]
                    ended = [i for i, token in enumerate(found) if token in ends]
                    return Found(found[: ended[0] + 1] if ended else found, size)
    return NOTHING


tokens = st.lists(st.integers(0, 3), max_size=30)


@given(st.data())
def test_what_is_found(data):
    """In rows that come, go and become several, prompts contained or not."""
    least = data.draw(st.integers(1, 6))
    looking = Lookup(least)
    rows = []  # (prompt, sequence)

    def new():
        prompt = [*data.draw(tokens), 2]
        return prompt, list(prompt) if data.draw(st.booleans()) else [0]

    for _ in range(data.draw(st.integers(1, 12))):
        do = data.draw(st.sampled_from(["start", "put", "take", "grow", "grow"]))
        if do == "start" or not rows:
            rows = [new() for _ in range(data.draw(st.integers(1, 3)))]
            looking.start([prompt for prompt, _ in rows])
        elif do == "put":
            place = data.draw(st.integers(0, len(rows) - 1))
            rows[place] = new()
            looking.put([place], [rows[place][0]])
        elif do == "take":
            places = st.integers(0, len(rows) - 1)
            kept = data.draw(st.lists(places, min_size=1, max_size=4))
            blank = data.draw(st.integers(0, 2))
            looking.take(kept, blank)
            rows = [(rows[place][0], list(rows[place][1])) for place in kept]
            rows += [([], [0]) for _ in range(blank)]
        for _, sequence in rows:
            sequence += data.draw(tokens)
        for place, (prompt, sequence) in enumerate(rows):
            most = data.draw(st.integers(1, 9))
            ends = data.draw(st.sampled_from([NEVER, frozenset({3})]))
            expected = by_hand(prompt, sequence, most, least, ends)
            assert looking.find(place, sequence, most, ends) == expected


class Work(dict):
    """A dictionary that counts what is written to it."""

    written = 0

    def __setitem__(self, key, value):
        Work.written += 1
        super().__setitem__(key, value)


class Text(list):
    """A sequence that counts the tokens that are read of it by slices."""

    read = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(key, slice):
            Text.read += len(found)
        return found


@pytest.mark.parametrize("has_encoder", [True, False])
def test_the_work_is_the_texts_not_the_rounds_times_the_texts(has_encoder):
    prompt = [*range(500)] * 2
    looking = Lookup()
    looking.start([prompt])
    (row,) = looking._rows
    row._next = Work()
    Work.written = Text.read = 0
    sequence = Text([0] if has_encoder else prompt)
    rounds = 1000
    for place in range(rounds):
        sequence.append(place % 7)
        looking.find(0, sequence, 5, NEVER)
    length = len(prompt) + rounds
    sizes = LONGEST - 1
    assert length < Work.written <= sizes * length + sizes
    assert Text.read <= 2 * length


def test_least():
    looking = Lookup(3)
    looking.start([[5, 6, 7, 8, 9, 2]])
    assert looking.find(0, [0, 6, 7], 4, NEVER) == NOTHING
    assert looking.find(0, [0, 6, 7, 5, 6, 7], 4, NEVER) == Found([8, 9, 2], 3)
    assert lookup.LONGEST > 3

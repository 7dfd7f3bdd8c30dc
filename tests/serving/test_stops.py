"""Stop strings: a text is cut where the first one is complete."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.stops import Cut


def cut(text, stops):
    """As it is defined: the first end of any, and of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


texts = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(texts, stop_lists, st.lists(st.integers(0, 12), max_size=8))
@example("abab", ["abc", "ba"], [1, 2, 3])
@example("aab", ["ab"], [1, 2])
def test_however_the_text_is_divided(text, stops, places):
    """Every division gives the same, nothing is lost, and each bit keeps its mark."""
    places = sorted({0, len(text), *(p for p in places if p <= len(text))})
    it, out = Cut(stops), []
    for number, (start, end) in enumerate(pairwise(places)):
        if it.ended:
            break
        out += it.push(text[start:end], (number, start))
    if not it.ended:
        out += it.finish()
    expected, ended = cut(text, stops)
    assert ("".join(bit for bit, _ in out), it.ended) == (expected, ended)
    place = 0
    for bit, (number, start) in out:
        assert places[number] == start <= place < places[number + 1]
        assert bit == text[place : place + len(bit)]
        place += len(bit)


@given(texts, stop_lists)
def test_what_may_be_no_more_is_out_at_once(text, stops):
    """Nothing waits that is not the beginning of a stop string."""
    it = Cut(stops)
    out = "".join(bit for bit, _ in it.push(text, True)) if text else ""
    if not it.ended:
        waits = text[len(out) :]
        assert all(s[: len(waits)] == waits for s in stops if s.startswith(waits))
        assert not waits or any(s.startswith(waits) for s in stops)
        longer = [text[i:] for i in range(len(out))]
        assert not any(s.startswith(rest) for s in stops for rest in longer)


def test_without_any():
    it = Cut(())
    assert it.push("abc", False) == [("abc", False)]
    assert it.finish() == []
    assert not it.ended


@pytest.mark.parametrize("stop", ["ß", "😀", "\n\n", "e\u0301"])
def test_characters(stop):
    it = Cut((stop,))
    out = [
        bit for c in f"x{stop}y" for bit, _ in (it.push(c, 0) if not it.ended else [])
    ]
    assert ("".join(out), it.ended) == ("x", True)

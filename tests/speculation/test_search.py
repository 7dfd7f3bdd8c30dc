"""beams.py: what may be asked for. The search itself is compared with transformers' in
tests/test_beam_search.py."""

import math

import pytest

from speculation.beams import Beams
from speculation.requests import Request
from speculation.sampling import Sampling
from system.errors import InputError


@pytest.mark.parametrize("num_beams", [1, 2, 64])
@pytest.mark.parametrize("length_penalty", [-10, -0.5, 0, 1, 10.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_options_in_range(num_beams, length_penalty, early_stopping):
    beams = Beams(num_beams, length_penalty, early_stopping)
    assert beams == Beams(num_beams, length_penalty, early_stopping)
    assert {beams: 1}[beams]
    assert Request([5], {1}, beams=beams).beams == beams


def test_defaults_are_those_of_transformers():
    beams = Beams(num_beams=3)
    assert (beams.length_penalty, beams.early_stopping) == (1.0, False)
    assert Request([5], {1}).beams is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": -1},
        {"num_beams": 65},
        {"num_beams": 10**9},
        {"num_beams": math.nan},
        {"length_penalty": math.nan},
        {"length_penalty": math.inf},
        {"length_penalty": -math.inf},
        {"length_penalty": 10.5},
        {"length_penalty": -11},
        {"early_stopping": "always"},
        {"early_stopping": ""},
        {"early_stopping": None},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    """Each by its name."""
    (name,) = options
    with pytest.raises(InputError, match=name.replace("_", ".")):
        Beams(**{"num_beams": 4} | options)


@pytest.mark.parametrize("num_beams", [2.5, "4", None])
def test_a_number_of_beams_is_whole(num_beams):
    with pytest.raises(InputError, match=r"num.beams"):
        Beams(num_beams)


def test_beams_are_not_changed():
    with pytest.raises(AttributeError):
        Beams(4).num_beams = 5


@pytest.mark.parametrize("options", [{"delta": 0.5}, {"delta": 1.0}], ids=str)
def test_nothing_is_left_to_chance(options):
    """Neither are tokens sampled, nor may a draft's stand that are not the target's."""
    with pytest.raises(InputError):
        Request([5], {1}, beams=Beams(2), **options)
    for temperature in (0.1, 1.0):
        with pytest.raises(InputError):
            sampling = Sampling(temperature=temperature)
            Request([5], {1}, beams=Beams(2), sampling=sampling)

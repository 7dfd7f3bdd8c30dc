"""The sections that measure: dtypes, margins, curves, and what there is time for."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY

from architectures import loading
from architectures.loading import COMPILE
from checking import (
    compiled,
    curve,
    exactness,
    footprint,
    machine,
    margins,
    shapes,
    speed,
    variants,
)
from checking.shapes import Costs, plan
from checking.task import Task
from checking.variants import VARIANTS
from console import choosing
from measuring import calibration, timing
from measuring.simulation import SIZES
from measuring.variants import Answer
from pair import Pair

PROMPTS = ["the cat on", "cat sat", "a b c", "the the", "on sat e", "the cat sat on a"]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "SPIN_SECONDS", 0)
    monkeypatch.setattr(calibration, "FEWEST_SWEEPS", 2)
    monkeypatch.setattr(calibration, "PAUSE", 0)
    monkeypatch.setattr(exactness, "MAX_TOKENS", 8)
    monkeypatch.setattr(speed, "MAX_TOKENS", 8)


#: Columns in whole groups of 64, so that matrices can be packed.
WIDE = {"d_model": 64, "d_ff": 64, "d_kv": 16}


@pytest.fixture(scope="session")
def folders(make):
    return make(**WIDE)[2], make(noise=0.05, **WIDE)[2]


@pytest.fixture
def pair(folders):
    return Pair.load(*map(str, folders))


def task(seconds=900.0):
    return Task(True, seconds)


# Margins.


def test_a_margin_by_hand():
    """3.0 and 2.75 are apart by 0.25; the largest logit is 4, and in steps of an eighth
    of it, 0.5, that is half a rounding."""
    logits = np.array([1.0, 3.0, -4.0, 2.75, -np.inf])
    found = margins.compare(logits, own=1, other=3, epsilon=0.125)
    assert found == {"margin": 0.25, "roundings": 0.5, "tie": True}
    found = margins.compare(logits, own=1, other=3, epsilon=2**-10)
    assert found == {"margin": 0.25, "roundings": 64.0, "tie": False}


def test_the_edge_of_a_tie():
    logits = np.array([0.0, margins.TIES, 1.0, 100.0])
    assert margins.compare(logits, 1, 0, 0.01)["tie"]
    logits[1] += 0.01
    assert not margins.compare(logits, 1, 0, 0.01)["tie"]


def test_what_is_banned_is_no_tie():
    found = margins.compare(np.array([1.0, -np.inf]), 0, 1, 0.01)
    assert found == {"margin": None, "roundings": None, "tie": False}
    json.dumps(found, allow_nan=False)


def test_a_flip_is_judged_by_plain_decodings_logits(pair):
    """At the first token that differs, after those that do not."""
    ids = pair.tokenizer.encode(PROMPTS[0])
    plain = pair.generate(PROMPTS[0], max_tokens=12, num_draft=0).finish().tokens
    place = 5
    (begin,) = pair.target.start([ids])
    fed = mx.array([[*begin, *plain[:place]]])
    logits = np.array(pair.target.extend(fed)[0, -1])
    assert logits.argmax() == plain[place]
    other = int(logits.argsort()[-2])
    text = [*plain[:place], other, 7, 7]
    found = margins.flip(pair.target, ids, plain, text)
    assert (found["place"], found["tokens"]) == (place, [plain[place], other])
    expected = logits[plain[place]] - logits[other]
    assert found["margin"] == pytest.approx(expected, rel=1e-3)
    largest = np.abs(logits[np.isfinite(logits)]).max()
    roundings = expected / (2**-23 * largest)
    assert found["roundings"] == pytest.approx(roundings, rel=1e-3)
    assert not found["tie"]  # it is no tie, which float32 can tell


def test_a_text_that_only_ends_sooner_is_no_tie(pair):
    found = margins.flip(pair.target, [5, 1], [3, 4, 5], [3, 4])
    assert found["place"] == 2 and not found["tie"]


def test_rounding_is_small_and_compares_the_same_positions(pair):
    ids = pair.tokenizer.encode(PROMPTS[0])
    plain = pair.generate(PROMPTS[0], max_tokens=12, num_draft=0).finish().tokens
    assert len(plain) == 12
    assert 0 <= margins.rounding(pair.target, ids, plain, 5) < 100
    assert margins.rounding(pair.target, ids, plain[:5], 5) is None


# Dtypes.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_rounded_as_its_dtype_is(folders, pair, tmp_path, name):
    """Its texts are texts; float32 of these weights is the pair itself."""
    its = variants.load(VARIANTS[name], tmp_path, folders)
    stored = dict(mx.load(str(tmp_path / "target" / "weights.npz")))
    kinds = {str(value.dtype).rpartition(".")[2] for value in stored.values()}
    expected = {
        "float32": {"float32"},
        "bfloat16": {"bfloat16"},
        "float16": {"float16", "float32"},  # what exceeds it when it is computed with
        "8 bits": {"bfloat16", "uint32"},
        "4 bits": {"bfloat16", "uint32"},
    }
    assert kinds == expected[name]
    whole = dict(mx.load(str(folders[0] / "weights.npz")))
    source = whole["embedding.weight"].astype(mx.float32)
    if name.endswith("bits"):
        bits = int(name.split()[0])
        assert stored["embedding.weight"].shape[1] == 64 * bits // 32
        parts = [stored[f"embedding.{part}"] for part in ("weight", "scales", "biases")]
        value = mx.dequantize(*parts, bits=bits, group_size=64).astype(mx.float32)
    else:
        value = stored["embedding.weight"].astype(mx.float32)
    error = mx.abs(value - source).max().item() / mx.abs(source).max().item()
    low, high = {
        "float32": (0, 0),
        "bfloat16": (2**-13, 2**-8),
        "float16": (2**-16, 2**-11),
        "8 bits": (2**-12, 2**-6),
        "4 bits": (2**-7, 2**-2),
    }[name]
    assert low <= error <= high
    texts = [p.generate(PROMPTS[0], max_tokens=8).finish().tokens for p in (its, pair)]
    assert len(texts[0]) > 0
    assert name != "float32" or texts[0] == texts[1]


def test_comparing(pair):
    found = exactness.compare(pair, PROMPTS, task())
    assert found["texts"] == len(PROMPTS)
    assert found["differ"] == {"K = 4": 0, "auto": 0}
    assert (found["ties"], found["unexplained"], found["flips"]) == (0, 0, [])
    assert found["computed"] == "float32"
    assert found["rounding"] > 0


def test_comparing_stops_when_the_time_is_over(pair):
    assert exactness.compare(pair, PROMPTS, task(0.0))["texts"] == 1


def test_texts_that_differ_are_found(pair, monkeypatch):
    """The second prompt's with K = 4 is another one; and in a way that no rounding
    explains."""
    real = exactness._tokens

    def wrong(pair, prompt, size):
        tokens = real(pair, prompt, size)
        if size == 4 and prompt == PROMPTS[1]:
            tokens[3] = (tokens[3] + 1) % VOCABULARY
        return tokens

    monkeypatch.setattr(exactness, "_tokens", wrong)
    found = exactness.compare(pair, PROMPTS, task())
    assert found["differ"] == {"K = 4": 1, "auto": 0}
    assert (found["ties"], found["unexplained"]) == (0, 1)
    (flip,) = found["flips"]
    assert (flip["way"], flip["prompt"], flip["place"]) == ("K = 4", PROMPTS[1], 3)


def test_the_section_of_all_dtypes(folders, monkeypatch, tmp_path):
    """One result after the other, each with those before it."""
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("\n".join(PROMPTS[:2]))
    monkeypatch.setattr(exactness, "PROMPTS", prompts)
    monkeypatch.setattr(
        exactness, "load", lambda s, f: variants.load(s, f, sources=folders)
    )
    results = [json.loads(json.dumps(each)) for each in exactness.section(task())]
    assert [len(each["variants"]) for each in results] == [1, 2, 3, 4, 5]
    assert [each["all"] for each in results] == [False] * 4 + [True]
    last = results[-1]
    assert last["wanted"] == 2
    assert [each["name"] for each in last["variants"]] == list(VARIANTS)
    assert all(each["texts"] == 2 for each in last["variants"])
    assert all(each["peak"] >= each["weights"] > 0 for each in last["variants"])


# The curve.


@pytest.mark.parametrize(
    "passes, found",
    [
        ([1.0, 1.05, 1.1, 1.15, 1.2], []),
        ([1.0, 1.05, 1.1, 1.15, 1.2, 1.8, 1.85, 1.9], [(5, 0.6)]),
        ([1.0, 2.0, 2.05, 2.1, 2.1, 2.15], [(1, 1.0)]),
        ([1.0, 1.5, 2.0, 2.5, 3.0], []),  # each costs as much: no step
        ([1.0, 1.02, 1.04, 1.2, 1.22], []),  # too small
        ([1.0, 1.05, 1.8, 1.1, 1.15, 1.2], []),  # one that was slow by accident
        ([1.0, 0.9, 0.8, 0.7, 1.0], []),
        ([1.0], []),
    ],
)
def test_steps(passes, found):
    steps = [(step["rows"], round(step["more"], 6)) for step in curve.steps(passes)]
    assert steps == found


def test_what_a_curve_suggests():
    """By hand: at a = 0.6 one token more than K = 1 is worth 0.36, which costs 0.5, and
    at 0.9 K = 3 gains 3.439 / 1.3."""
    costs = {0: 1.0, 1: 1.1, 2: 1.6, 3: 1.3}
    rows = [SimpleNamespace(num_draft=k, cost=cost) for k, cost in costs.items()]
    assert curve.suggests(rows[:3]) == {"0.6": 1, "0.75": 1, "0.9": 1}
    assert curve.suggests(rows) == {"0.6": 3, "0.75": 3, "0.9": 3}
    assert curve.suggests(rows[:1]) == {"0.6": 0, "0.75": 0, "0.9": 0}


@pytest.fixture
def bundled(monkeypatch, folders, tmp_path):
    """The tiny pair in place of the bundled one, and few prompts."""
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("\n".join(PROMPTS))
    monkeypatch.setattr(curve, "MOST", 3)
    monkeypatch.setattr(speed, "SIZES", (0, 2, "auto"))
    for module in (compiled, curve, speed):
        monkeypatch.setattr(module, "BUNDLED", folders)
        monkeypatch.setattr(module, "PROMPTS", prompts)


def test_the_section_of_the_curve(bundled):
    (found,) = [json.loads(json.dumps(each)) for each in curve.section(task(0.0))]
    assert [row["num_draft"] for row in found["rows"]] == [0, 1, 2, 3]
    assert found["sweeps"] == 2  # as few as there are
    assert set(found["suggests"]) == {"0.6", "0.75", "0.9"}


# Compiled passes.


@pytest.mark.parametrize("gpu", [True, False])
def test_the_section_of_compiled_passes(bundled, monkeypatch, gpu):
    """Whose verdict is kept for main.py on a GPU."""
    kept = []
    monkeypatch.setattr(compiled, "on_gpu", lambda: gpu)
    monkeypatch.setattr(compiled.remembering, "remember", lambda *its: kept.append(its))
    (found,) = compiled.section(task(60.0))
    json.dumps(found)
    assert [row["name"] for row in found["rows"]] == ["num-draft 0", "num-draft 4"]
    assert [row["equal"] for row in found["rows"]] == [len(PROMPTS)] * 2
    assert kept == ([(COMPILE, found["faster"])] if gpu else [])
    assert found["used"] == gpu
    mx.disable_compile()


@pytest.mark.parametrize(
    "gains, faster",
    [((1.2, 1.1), True), ((1.2, 1.02), False), ((0.9, 1.2), False)],
)
def test_when_they_are_faster(bundled, monkeypatch, gains, faster):
    """With drafts and without, by 3 %."""
    seconds = [each for gain in gains for each in (gain, 1.0)]
    monkeypatch.setattr(
        compiled, "measure", lambda *_: [answers([each] * 8) for each in seconds]
    )
    pairs = [SimpleNamespace(how=SimpleNamespace(compiled=way)) for way in (0, 1)]
    found = compiled.compare(pairs, [], task())
    assert [row["speedup"] for row in found["rows"]] == pytest.approx(gains)
    assert found["faster"] == faster
    assert found["prompts"] == 8


def test_programs_go_by_it(monkeypatch):
    """On a GPU, where nobody says otherwise; a model that is no T5 is not refused."""
    monkeypatch.setattr(loading, "on_gpu", lambda: True)
    for kept, flag, expected in (
        (True, "auto", True),
        (False, "auto", False),
        (None, "auto", False),
        (True, "off", False),
        (False, "on", True),
    ):
        monkeypatch.setattr(loading.remembering, "recall", {COMPILE: kept}.get)
        flags = SimpleNamespace(compile=flag, dtype="auto", unverified=False)
        how = choosing.loading_of(flags)
        assert how.compiles == expected
        assert bool(how.compiled) == (flag == "on")
    monkeypatch.setattr(loading, "on_gpu", lambda: False)
    monkeypatch.setattr(loading.remembering, "recall", {COMPILE: True}.get)
    assert not loading.USUAL.compiles


# Speed.


def answers(seconds):
    return [Answer("", [1, 2], each) for each in seconds]


def test_which_number_of_tokens_is_the_fastest():
    """K = 5 here, twice as fast as plain decoding; auto is a tenth slower than it."""
    measured = [answers([2.0] * 8), answers([1.25] * 8), answers([1.0] * 8)]
    found = speed.compared((0, 3, 5, "auto"), [*measured, answers([1.25] * 8)])
    assert found["best"] == 5
    assert found["auto_over_best"] == pytest.approx((0.8, 0.8, 0.8))
    assert found["auto_over_plain"] == pytest.approx((1.6, 1.6, 1.6))


@pytest.mark.parametrize("installed", [True, False])
def test_the_section_of_speed(bundled, monkeypatch, installed):
    real = speed.find_spec
    monkeypatch.setattr(
        speed, "find_spec", lambda n: real(n) if installed or n != "torch" else None
    )
    results = [json.loads(json.dumps(each)) for each in speed.section(task(60.0))]
    last = results[-1]
    assert len(results) == 1 + installed
    assert [row["num_draft"] for row in last["rows"]] == [0, 2, "auto"]
    assert last["prompts"] == len(PROMPTS)
    assert all(row["equal"] == len(PROMPTS) for row in last["rows"])
    assert last["torch"] == installed
    assert bool(last["theirs"]) == installed
    if installed:
        assert last["theirs"]["name"] == "transformers, cpu"
        assert last["theirs"]["equal"] == last["theirs"]["prompts"]


def test_another_programs_fault_costs_its_line(bundled, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such\ndevice")

    monkeypatch.setattr(speed, "transformers_generate", broken)
    (found,) = speed.section(task(60.0))
    assert found["failed"] == "RuntimeError: no such device"
    assert found["theirs"] is None and len(found["rows"]) == 3


def test_another_program_is_not_begun_without_time(bundled, monkeypatch):
    (found,) = speed.section(task(0.0))
    assert found["torch"] and found["theirs"] is None and found["failed"] is None
    assert found["prompts"] == 1


def test_measuring_ends_in_time(pair):
    cells = [speed.ours(pair, speed.Cell(size), 8) for size in (0, 2)]
    each = timing.measure(cells, PROMPTS, 1, seconds=0.0)
    assert [len(its) for its in each] == [1, 1]
    each = timing.measure(cells, PROMPTS, 1)
    assert [len(its) for its in each] == [len(PROMPTS)] * 2


# Shapes.


@pytest.mark.parametrize(
    "step, left, share, expected",
    [
        # An answer of 64 tokens is 96 steps with the slack; 6 prompts are 41 answers.
        (1.0, 9999, 3937, (64, 6)),
        (1.0, 9999, 3935, (64, 5)),
        (1.0, 9999, 1000, (32, 2)),  # 17 answers of 48 steps
        (1.0, 9999, 10, (16, 1)),
        (1.0, 264, 10, (16, 1)),  # 11 answers of 24 steps
        (1.0, 263, 10, (16, 0)),
    ],
)
def test_what_there_is_time_for(step, left, share, expected):
    assert plan(Costs(0.0, step / 100), 100, left, share) == expected


def test_making_weights_takes_time_too():
    assert plan(Costs(1.0, 0.0), 100, 99, 99) == (16, 0)
    assert plan(Costs(1.0, 0.0), 100, 100, 100) == (64, 6)


@pytest.fixture
def small(monkeypatch):
    """Pairs of small shapes by the names of SIZES."""
    monkeypatch.setitem(SIZES, "large", (32, 8, 64, 4, 2))
    monkeypatch.setitem(SIZES, "small", (16, 8, 32, 2, 1))
    monkeypatch.setattr(shapes, "PAIRS", (("large", "small"),) * 2)
    monkeypatch.setattr(shapes, "TOKENS", (9,))
    monkeypatch.setattr(shapes, "FEWEST", 2)


def test_the_section_of_shapes(small):
    results = [json.loads(json.dumps(each)) for each in shapes.section(task())]
    assert [len(each["pairs"]) for each in results] == [1, 2]
    first = results[-1]["pairs"][0]
    assert [row["num_draft"] for row in first["rows"]] == [0, 3, 5, 7, "auto"]
    assert first["tokens"] == 9 and first["prompts"] == 2
    # The embedding alone is 32128 rows, in float32.
    assert 4 * 32128 * 48 < first["bytes"] < 4 * 32128 * 48 + 400_000


def test_a_shape_that_does_not_fit_is_left_out(small, monkeypatch):
    monkeypatch.setattr(shapes, "measure_costs", lambda _: Costs(0.0, 0.0))
    monkeypatch.setattr(shapes.memory, "fits", lambda size: False)
    *_, found = shapes.section(task())
    assert all("not enough memory" in pair["left_out"] for pair in found["pairs"])


def test_a_shape_that_takes_too_long_is_left_out(small, monkeypatch):
    monkeypatch.setattr(shapes, "measure_costs", lambda _: Costs(1.0, 1.0))
    *_, found = shapes.section(task(50.0))
    assert all("it would take" in pair["left_out"] for pair in found["pairs"])


# The machine, and memory.


def test_low_power_mode():
    said = " System-wide power settings:\nCurrently in use:\n lowpowermode         %d\n"
    assert machine.low_power(said % 1) is True
    assert machine.low_power(said % 0) is False
    assert machine.low_power(" sleep 1") is None
    assert machine.low_power(None) is None


def test_memory_is_counted_anew_for_each_line():
    mx.eval(mx.zeros((1000, 1000)))
    first = footprint.entry("large", 10)
    second = footprint.entry("small", 10)
    assert first["peak"] >= 4_000_000
    assert second["peak"] < first["peak"]
    assert first["expected"] == 15 + footprint.BYTES

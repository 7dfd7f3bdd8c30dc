"""benchmark.py --calibrate: which rounds are timed, what follows, and what is kept."""

import json
import math
from functools import partial
from itertools import count

import pytest
from conftest import VOCABULARY, tiny_tokenizer, tiny_torch
from tiny_causal import tiny_causal

import benchmark
import pair as pairs
from measuring import calibration
from measuring.calibration import PLAIN, Kind, break_even, calibrate, curve_of
from pair import LOOKUP, Pair
from speculation.costs import Costs
from system.errors import InputError

PROMPTS = ["the cat on", "cat sat", "a b c", "the the", "on sat e"]
MOST = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """As little as can be measured, and kept in a folder of the test's own."""
    monkeypatch.setattr(calibration, "SECONDS", 0)
    monkeypatch.setattr(calibration, "FEWEST_SWEEPS", 2)
    monkeypatch.setattr(calibration, "PAUSE", 0)
    monkeypatch.setattr(pairs, "most_drafted", lambda: MOST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bench(call):
    """Run benchmark.py --calibrate in this process: (status, stdout, stderr)."""
    return partial(call, "--calibrate", program=benchmark)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"{prompt}\tno matter" for prompt in PROMPTS))
    return path


@pytest.fixture
def models(make):
    return "--model", make()[2], "--draft-model", make(noise=0.05)[2]


def load(models) -> Pair:
    return Pair.load(str(models[1]), str(models[3]))


def test_whole_run(bench, models, prompts, tmp_path):
    """A table for each batch size, the same in the JSON, a drawing; and what was
    measured is what auto goes by, here and in the next process."""
    status, out, err = bench(
        *models,
        *("--prompts", prompts, "--batch-size", "1,3", "--max-tokens", 60),
        *("--json", tmp_path / "f.json", "--plot", tmp_path / "plot.svg"),
    )
    assert status == 0, err
    figures = json.loads((tmp_path / "f.json").read_text())
    rows = figures["rows"]
    names = [f"batch {size}, num-draft {k}" for size in (1, 3) for k in range(MOST + 1)]
    assert [row["name"] for row in rows] == names
    lines = [line for line in out.splitlines() if line.startswith("batch")]
    assert [line.split("  ")[0] for line in lines] == names
    for row in rows:
        size = row["num_draft"]
        assert row["low"] <= row["ms"] <= row["high"]
        assert row["cost_low"] <= row["cost"] <= row["cost_high"]
        blocks = 2 * (1 if size else calibration.PLAIN_BLOCKS)
        assert row["rounds"] == blocks * calibration.TIMED
        if size:
            assert row["cost"] == pytest.approx(row["v"] + size * row["c"])
        else:
            assert row["cost"] == row["v"] == 1
            assert row["c"] is row["break_even"] is None
    assert "draft tokens per round" in (tmp_path / "plot.svg").read_text()
    (kept,) = (tmp_path / "cache").rglob("costs-*.json")
    assert str(kept) in err.splitlines()[-1]
    policy = load(models).policy
    for row in rows:
        costs = policy._costs[row["batch_size"]]
        own = costs._expected[1, row["num_draft"]]
        own += costs._corrections[1, row["num_draft"]]
        if row["num_draft"]:
            assert own == pytest.approx(math.log(row["cost"]), abs=1e-3)
    assert policy._costs[1].farthest == MOST


def test_what_is_timed(models, monkeypatch):
    """Rounds of K + 1 tokens in every row, which are all somebody's; each after one of
    its kind that is not timed."""
    pair = load(models)
    ids = [pair.tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = calibration._Texts(pair.target, pair.drafter, ids, 3, 60, MOST)
    fed, drafted = [], []
    extend, propose = pair.target.extend, pair.drafter.propose

    def watched_extend(tokens):
        fed.append(tokens.shape)
        return extend(tokens)

    def watched_propose(sequences, num_draft, sampler):
        drafted.append(num_draft)
        return propose(sequences, num_draft, sampler)

    texts.block(PLAIN)
    monkeypatch.setattr(pair.target, "extend", watched_extend)
    monkeypatch.setattr(pair.drafter, "propose", watched_propose)
    first, timed = calibration.FIRST, calibration.TIMED
    for kind in (Kind(False, 2), Kind(True, 3), PLAIN, Kind(True, 1)) * 3:
        fed.clear()
        drafted.clear()
        seconds = texts.block(kind)
        assert len(seconds) == timed and min(seconds) > 0
        rounds = first + timed
        assert fed == [(3, kind.size + 1)] * rounds
        assert drafted == [kind.size] * rounds * kind.model
        assert texts._policy.rows == 3
        texts._begin()


def test_texts_are_begun_anew_where_they_become_long(models, monkeypatch):
    pair = load(models)
    ids = [pair.tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = calibration._Texts(pair.target, pair.drafter, ids, 2, 30, MOST)
    begun = []
    begin = texts._begin
    monkeypatch.setattr(texts, "_begin", lambda: begun.append(begin()))
    for _ in range(12):
        for kind in (PLAIN, Kind(False, MOST), Kind(True, MOST)):
            assert len(texts.block(kind)) == calibration.TIMED
            assert texts._length <= 30
    assert len(begun) >= 12 * (4 + 4 + 5) / 30


def test_without_a_draft_model(bench, make, prompts, tmp_path):
    """What rounds cost whose drafts are looked up: the target's pass."""
    flags = ("--model", make()[2], "--draft-model", LOOKUP, "--prompts", prompts)
    status, _, err = bench(*flags, "--json", tmp_path / "f.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["num_draft"] for row in rows] == list(range(MOST + 1))
    assert all(row["cost"] == row["v"] and row["c"] is None for row in rows)
    policy = Pair.load(str(make()[2]), LOOKUP).policy
    assert (policy._costs[1].seen[0, 1:] > 0).all()
    assert (policy._costs[1].seen[1, 1:] == 0).all()


def test_decoder_only(bench, tmp_path):
    """With positions that end, which the texts stay before."""
    folders = []
    for noise in (0.0, 0.03):
        folders.append(tmp_path / str(noise))
        tiny_causal("llama", noise=noise).save_pretrained(folders[-1])
        tiny_tokenizer(VOCABULARY).save_pretrained(folders[-1])
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join([*PROMPTS, "the cat sat on " * 70]))
    flags = ["--model", folders[0], "--draft-model", folders[1], "--prompts", prompts]
    status, _, err = bench(*flags, "--limit", 5)
    assert status == 0, err
    status, out, err = bench(*flags)
    assert (status, out) == (2, "")
    assert "shorter prompts" in err.splitlines()[-1]


def test_simulation(bench, tmp_path):
    """In shapes alone, several rows too; nothing is kept."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_torch(0).config.to_dict()))
    status, out, err = bench(
        *("--simulate-alpha", 0.7, "--target-config", config),
        *("--draft-config", config, "--batch-size", 2),
        *("--json", tmp_path / "f.json"),
    )
    assert status == 0, err
    assert out.count("batch 2") == MOST + 1
    assert "SIMULATION" in err and "kept" not in err
    assert not (tmp_path / "cache").exists()
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["simulation"].startswith("SIMULATION")


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-draft", "3"),
        ("--num-draft", "auto"),
        ("--delta", "0"),
        ("--temperature", "1"),
        ("--coupling", "shared"),
        ("--baseline", "transformers"),
        ("--batch-size", "2", "--baseline-batch-size", "2"),
        ("--repeats", "2"),
    ],
    ids=" ".join,
)
def test_flags_that_do_not_go_with_it(bench, flags):
    status, out, err = bench(*flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert flags[-2] in err


def test_what_cannot_be_measured(bench, make, models, prompts, monkeypatch):
    flags = (*models, "--prompts", prompts)
    for more, words in (
        (("--max-tokens", 12), "larger --max-tokens"),
        (("--draft-model", "none"), "no draft to measure"),
        (("--batch-size", "0"), "at least 1"),
    ):
        status, out, err = bench(*flags, *more)
        assert (status, out) == (2, "")
        assert words in err.splitlines()[-1]
    monkeypatch.setattr(Pair, "batches", False)
    status, _, err = bench(*flags, "--batch-size", "2")
    assert status == 2 and "one after another" in err
    monkeypatch.setattr("decoder.Engine._has_room", lambda *_: False)
    pair = load(models)
    ids = [pair.tokenizer.encode(prompt) for prompt in PROMPTS]
    with pytest.raises(InputError, match="not decoded at once"):
        calibrate(pair.target, pair.drafter, ids, 2, 60, MOST)


def test_what_cannot_be_kept(bench, models, prompts, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, out, err = bench(*models, "--prompts", prompts)
    assert status == 0 and out
    assert "nothing is kept" in err


def test_interrupted(bench, models, prompts, monkeypatch, tmp_path):
    """Ctrl-C in the second sweep: the first is shown, and nothing is kept; in the
    first: nothing is shown."""
    block = calibration._Texts.block
    sweep = 2 * MOST + calibration.PLAIN_BLOCKS
    for last, rows in ((sweep + 2, MOST + 1), (2, 0)):
        blocks = count()

        def interrupted(self, kind, last=last, blocks=blocks):
            if next(blocks) == last:
                raise KeyboardInterrupt
            return block(self, kind)

        monkeypatch.setattr(calibration._Texts, "block", interrupted)
        status, out, err = bench(*models, "--prompts", prompts)
        assert status == (0 if rows else 130)
        assert out.count("num-draft") == rows
        assert "Traceback" not in err
        assert not (tmp_path / "cache").exists()


def test_figures_of_sweeps():
    """A cost is over the plain rounds of its own sweep: that the machine was half as
    fast in one of them is no matter."""
    sweeps = [
        {
            PLAIN: [slow * s for s in (1.0, 1.0, 1.0, 9.0)],
            Kind(False, 2): [slow * 1.2] * 3,
            Kind(True, 2): [slow * s for s in (1.5, 1.6, 7.0)],
        }
        for slow in (1.0, 2.0, 1.0)
    ]
    curve = curve_of(sweeps, batch_size=4)
    assert curve.costs == pytest.approx(
        {PLAIN: 1.0, Kind(False, 2): 1.2, Kind(True, 2): 1.6}
    )
    plain, row = curve.rows
    assert (plain.num_draft, plain.cost, plain.rounds) == (0, 1, 12)
    assert (row.num_draft, row.rounds, row.v) == (2, 9, pytest.approx(1.2))
    assert row.c == pytest.approx(0.2)
    assert row.cost_low == row.cost == row.cost_high == pytest.approx(1.6)
    assert row.break_even == pytest.approx(break_even(2, 1.6))
    assert curve.sweeps == 3 and curve.complete and curve.restless


def test_break_even():
    """1 + a + ... + a^K is the cost there."""
    assert break_even(1, 1.4) == pytest.approx(0.4)
    found = break_even(5, 2.0)
    assert (1 - found**6) / (1 - found) == pytest.approx(2.0)
    assert break_even(3, 4.0) == pytest.approx(1.0)
    assert break_even(3, 4.1) is None
    assert break_even(3, 0.9) == 0


def test_costs_are_what_was_measured():
    """Whatever was known before, at once and for the next run; others stay."""
    costs = Costs(8, 0.1, 0.1)
    for _ in range(30):
        costs.observe(False, 0, 1.0)
        costs.observe(True, 4, 3.0)
        costs.observe(True, 8, 5.0)
    other = costs.of[1, 8]
    costs.calibrate(2.0, {(False, 0): 1.0, (True, 4): 1.3}, seen=32)
    assert costs.plain_seconds == pytest.approx(2.0)
    assert costs.of[1, 4] == pytest.approx(1.3, rel=0.1)
    assert costs.of[1, 8] == pytest.approx(other, rel=0.1)
    again = Costs(8, 0.1, 0.1)
    again.restore(costs.as_dict())
    assert again.of[1, 4] == pytest.approx(1.3, rel=0.25)
    for plain, cost in ((0.0, 1.0), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError):
            costs.calibrate(plain, {(True, 1): cost}, seen=3)

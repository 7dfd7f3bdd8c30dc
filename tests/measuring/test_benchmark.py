"""benchmark.py: its arithmetic, its table, and the models it compares with."""

import json
import math
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import VOCABULARY, save_checkpoint, tiny_tokenizer, tiny_torch
from tiny_causal import tiny_causal
from transformers import DynamicCache, EncoderDecoderCache

import benchmark
import convert
from console.choosing import NO_DRAFT, add_loading
from measuring import baselines, figures, timing, variants
from measuring.arguments import cells, parse_arguments, sweep
from measuring.prompts import read_prompts
from measuring.simulation import SimulatedPair
from measuring.timing import Cost
from measuring.variants import Answer, Cell, Variant
from pair import LOOKUP, Pair
from speculation.beams import Beams
from speculation.requests import Stats
from system.device import most_drafted

PROMPTS = ["the cat on", "cat sat", "a b c", "the the", "on sat e"]


@pytest.fixture
def bench(call, monkeypatch, tmp_path):
    """Run benchmark.py in this process, with a cache of its own: (status, stdout,
    stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "SPIN_SECONDS", 0)  # whose seconds are nobody's
    return partial(call, program=benchmark)


def test_whole_run(bench, make, tmp_path):
    """Every variant in the table, its text the plain one, and the same in the JSON."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{prompt}\t{prompt}" for prompt in PROMPTS))
    status, out, err = bench(
        *("--model", make(num_decoder_layers=3)[2]),
        *("--draft-model", make(num_decoder_layers=1)[2]),
        *("--prompts", prompts, "--num-draft", "3,0,2", "--max-tokens", 12),
        *(flag for name in baselines.MAKE for flag in ("--baseline", name)),
        *("--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.svg"),
    )
    assert status == 0, err
    names = ["num-draft 0", "num-draft 3", "num-draft 2"]
    names += ["transformers, cpu", "transformers assisted, cpu"]
    names += ["CTranslate2, float32", "CTranslate2, int8"]
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == names
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["prompts"] == 5
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == names
    exact = [row for row in rows.values() if "int8" not in row["name"]]
    assert {row["equal"] for row in exact} == {5}
    assert len({row["bleu"] for row in exact}) == 1
    plain = rows["num-draft 0"]
    assert plain["speedup"] == plain["tokens_per_round"] == 1
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.count("<!-- ") > 10 and "draft tokens per round" in drawn
    for k in (2, 3):
        row = rows[f"num-draft {k}"]
        assert 0 <= row["alpha"] <= 1
        assert 1 <= row["tokens_per_round"] <= k + 1
        assert row["low"] is row["high"] is None  # of 5 prompts
        assert min(row["c"], row["v"], row["expected"]) > 0


def test_batches(bench, make, tmp_path):
    """Lines per second: the same texts at every batch size, by whomever; the figures
    that need several runs where there are several."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{prompt}\t{prompt}" for prompt in PROMPTS))
    status, out, err = bench(
        *("--model", make()[2], "--draft-model", make(noise=0.05)[2]),
        *("--prompts", prompts, "--num-draft", "0,2", "--max-tokens", 12),
        *("--batch-size", "1,4", "--baseline-batch-size", "3", "--repeats", 2),
        *("--baseline", "transformers", "--baseline", "ctranslate2"),
        *("--json", tmp_path / "figures.json"),
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    names = [f"num-draft {k}, batch {size}" for k in (0, 2) for size in (1, 4)]
    names += ["transformers, cpu, batch 3", "CTranslate2, float32, batch 3"]
    assert [row["name"] for row in rows] == names
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == names
    for row in rows:
        assert row["equal"] == 5
        assert row["low"] <= row["lines_per_second"] <= row["high"]
        assert row["bleu"] == rows[0]["bleu"]
    assert rows[0]["speedup"] == 1
    assert [bool(row["peak_memory"]) for row in rows] == [*[True] * 4, False, False]
    assert rows[0]["tokens_per_round"] == 1
    assert rows[2]["tokens_per_round"] > 1


#: Of tiny models, with options that change their texts.
SEARCHES = {
    "length penalty": (1, ("--length-penalty", "-2"), Beams(3, -2.0)),
    "early stopping": (2, ("--early-stopping",), Beams(3, early_stopping=True)),
}


@pytest.mark.parametrize("seed, flags, beams", SEARCHES.values(), ids=SEARCHES)
def test_beams(bench, make, tmp_path, seed, flags, beams):
    """Whatever is measured searches as the flags say, plain decoding as well; the
    passes that a text takes are counted."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{prompt}\t{prompt}" for prompt in PROMPTS))
    folder = make(seed, num_decoder_layers=3)[2]
    draft = make(seed, num_decoder_layers=3, noise=0.05)[2]
    others = sorted(baselines.SEARCHING)
    status, out, err = bench(
        *("--model", folder, "--draft-model", draft, "--lookup"),
        *("--prompts", prompts, "--num-draft", "2,auto", "--max-tokens", 12),
        *("--num-beams", 3, *flags, "--json", tmp_path / "f.json"),
        *(flag for name in others for flag in ("--baseline", name)),
        *("--plot", tmp_path / "plot.svg"),
    )
    assert status == 0, err
    names = [f"num-draft {k}, beams 3" for k in (0, 2, "auto")]
    names += ["CTranslate2, float32, beams 3", "CTranslate2, int8, beams 3"]
    names += ["transformers, cpu, beams 3"]
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row["name"] for row in figures["rows"]] == names
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == names
    for name in ("num_beams", "length_penalty", "early_stopping"):
        assert figures[name] == getattr(beams, name)
    plain, drafted, auto, float32, _, theirs = figures["rows"]
    pair = Pair.load(str(folder))
    usual, wanted = (
        [pair.generate(p, max_tokens=12, beams=its).finish() for p in PROMPTS]
        for its in (Beams(3), beams)
    )
    assert [one.tokens for one in usual] != [one.tokens for one in wanted]
    for row in (plain, drafted, auto, float32, theirs):
        assert row["equal"] == 5
        count = sum(len(one.tokens) for one in wanted)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(count)
    assert plain["speedup"] == 1
    assert plain["passes"] == sum(one.stats.rounds for one in wanted) / 5
    assert plain["passes"] > drafted["passes"]
    assert plain["passes_low"] is drafted["passes_low"] is None  # of 5 prompts
    assert 0 < drafted["alpha"] <= 1
    assert {drafted["c"], drafted["v"], drafted["expected"]} == {None}
    assert "passes" in out and "same search" in err.splitlines()[-1]
    assert {theirs["passes"], float32["passes"]} == {None}


def test_beams_in_batches(bench, make, tmp_path):
    """Groups of a batch, and theirs: the same texts at every size."""
    seed, flags, beams = SEARCHES["length penalty"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    folder = make(seed, num_decoder_layers=3)[2]
    draft = make(seed, num_decoder_layers=3, noise=0.05)[2]
    status, _, err = bench(
        *("--model", folder, "--draft-model", draft, "--prompts", prompts),
        *("--num-draft", "0,2,auto", "--max-tokens", 12, "--batch-size", "1,4"),
        *("--num-beams", 3, *flags, "--baseline-batch-size", 3),
        *("--baseline", "transformers", "--baseline", "ctranslate2"),
        *("--json", tmp_path / "f.json"),
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    names = [
        f"num-draft {k}, beams 3, batch {n}" for k in (0, 2, "auto") for n in (1, 4)
    ]
    names += [
        f"{name}, beams 3, batch 3"
        for name in ("transformers, cpu", "CTranslate2, float32")
    ]
    assert [row["name"] for row in rows] == names
    assert [row["equal"] for row in rows] == [5] * len(names)
    pair = Pair.load(str(folder))
    done = [pair.generate(p, max_tokens=12, beams=beams).finish() for p in PROMPTS]
    count = sum(len(one.tokens) for one in done)
    for row in rows:
        each = row["tokens_per_second"] / row["lines_per_second"]
        assert each == pytest.approx(count / 5)
    assert rows[2]["tokens_per_round"] > rows[0]["tokens_per_round"]


def test_one_beam_is_greedy(bench, make, tmp_path):
    """What several beams are compared with: a pass is a token."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    status, _, err = bench(
        *("--model", make()[2], "--draft-model", make(noise=0.05)[2]),
        *("--prompts", tmp_path / "p.txt", "--num-draft", 2, "--max-tokens", 12),
        *("--num-beams", 1, "--json", tmp_path / "f.json"),
        *("--baseline", "transformers", "--baseline", "ctranslate2"),
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["equal"] for row in rows] == [5] * 4
    assert rows[0]["tokens_per_round"] == 1
    assert rows[0]["passes"] > rows[1]["passes"]
    assert [row["name"].split(", ")[-1] for row in rows] == ["beams 1"] * 4


def test_beams_that_cannot_be_measured(bench, make, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\n")
    prompts = ("--prompts", tmp_path / "p.txt")
    lookup = ("--model", make()[2], "--draft-model", LOOKUP, *prompts)
    for flags, words in (
        (["--num-beams", "0"], "num-beams is 0"),
        (["--num-beams", "65"], "num-beams is 65"),
        (["--num-beams", "x"], "--num-beams"),
        (["--num-beams", "4", "--length-penalty", "nan"], "length-penalty is nan"),
        (["--num-beams", "4", "--early-stopping", "no"], "none of true, false, never"),
        (["--length-penalty", "1"], "give --num-beams as well"),
        (["--early-stopping", "false"], "give --num-beams as well"),
        (["--num-beams", "4", "--temperature", "0,1"], "leave the temperature at 0"),
        (["--num-beams", "4", "--delta", "0.5"], "delta is above 0"),
        (["--num-beams", "4", "--calibrate"], "does not go with --num-beams"),
        (["--num-beams", "4", "--serve", "1"], "does not go with --num-beams"),
        (["--num-beams", "4", "--simulate-alpha", "1"], "not go with --num-beams"),
        (["--num-beams", "4", "--baseline", "mlx-lm"], "searches with no beams"),
        (
            ["--num-beams", "4", "--baseline", "transformers-assisted"],
            "searches with no beams",
        ),
        (["--num-beams", "4", *lookup], "nothing is looked up for beams"),
    ):
        status, out, err = bench(*flags)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    tiny_causal("llama").save_pretrained(tmp_path / "llama")
    tiny_tokenizer(VOCABULARY).save_pretrained(tmp_path / "llama")
    status, out, err = bench(
        *("--model", tmp_path / "llama", "--draft-model", tmp_path / "llama"),
        *("--num-beams", 4, "--num-draft", 1, *prompts),
    )
    assert (status, out) == (2, "")
    assert "only models with an encoder" in err.splitlines()[-1]


def test_auto(bench, make, tmp_path):
    """A line like others, that says how much was drafted in the mean, but not what a
    round costs; a star in the plot."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = ["--model", make()[2], "--draft-model", make(noise=0.05)[2]]
    flags += ["--prompts", prompts, "--num-draft", "2..3,auto", "--max-tokens", 12]
    flags += ["--json", tmp_path / "f.json"]
    status, out, err = bench(*flags, "--delta", "0,1", "--plot", tmp_path / "p.svg")
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    each = [2, 3, "auto"]
    assert [(row["num_draft"], row["delta"]) for row in rows] == [
        (0, 0),
        *((k, 0) for k in each),
        *((k, 1) for k in each),
    ]
    assert rows[3]["name"] == "num-draft auto"
    assert "num-draft auto, delta 1" in out and "mean K" in out
    for row in rows:
        if row["num_draft"] == "auto":
            assert 0 <= row["mean_draft"] <= 16
            assert row["c"] is row["v"] is row["expected"] is row["paper"] is None
            assert row["tokens_per_round"] >= 1
        elif row["num_draft"]:
            assert 0 < row["mean_draft"] <= row["num_draft"]
            assert row["expected"] > 0
        else:
            assert row["mean_draft"] is None
        assert row["delta"] or row["equal"] == 5
    drawn = (tmp_path / "p.svg").read_text()
    means = [row["mean_draft"] for row in rows if row["num_draft"] == "auto"]
    for name, mean in zip(("", ", delta 1"), means, strict=True):
        assert f"temperature 0{name}, auto ({mean:.1f} on average)" in drawn
    # By itself, over the deltas.
    flags[flags.index("2..3,auto")] = "auto"
    status, _, err = bench(*flags, "--delta", "0,1", "--plot", tmp_path / "p.svg")
    assert status == 0, err
    assert "delta, at as many draft tokens" in (tmp_path / "p.svg").read_text()
    status, out, err = bench(*flags, "--batch-size", "1,4")
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    names = ["num-draft auto, batch 1", "num-draft auto, batch 4"]
    assert [row["name"] for row in rows] == names
    assert all(row["num_draft"] == "auto" and row["mean_draft"] >= 0 for row in rows)
    assert [row["equal"] for row in rows] == [5, 5]


def test_auto_is_among_the_defaults():
    args = parse_arguments(add_loading, NO_DRAFT, [])
    assert args.num_draft == [*range(1, 9), "auto"]
    assert (args.delta, args.temperature, args.repeats) == ([0.0], [0.0], 1)
    found = [cell.num_draft for cell in cells(args)]
    assert found == [0, *range(1, 9), "auto"]


def test_sweeps():
    assert sweep("0..3") == [0, 1, 2, 3]
    assert sweep("5,0,2..4") == [5, 0, 2, 3, 4]
    assert sweep("auto,1..2", auto=True) == ["auto", 1, 2]
    for text in ("", "auto", "1,", "..2", "1..2..3", "-1", "2..1", "1..x", "1..99999"):
        with pytest.raises(ArgumentTypeError):
            sweep(text)
    with pytest.raises(ArgumentTypeError, match="nor auto"):
        sweep("1,automatic", auto=True)


def test_looked_up_drafts(bench, make, tmp_path):
    """They cost the target's pass; how long they are is not what was asked for."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = ["--model", make()[2], "--prompts", prompts, "--num-draft", "3,auto"]
    flags += ["--temperature", "0,1", "--max-tokens", 40, "--json", tmp_path / "f.json"]
    draft = ("--draft-model", make(noise=0.05)[2], "--lookup")
    for more in (("--draft-model", LOOKUP), draft):
        status, out, err = bench(*flags, *more)
        assert status == 0, err
        rows = json.loads((tmp_path / "f.json").read_text())["rows"]
        for row in rows:
            if row["num_draft"] == 3:
                assert row["v"] > 0 and row["expected"] is row["paper"] is None
                assert 0 < row["mean_draft"] <= 3
            else:
                assert row["v"] is None
        assert "mean K" in out
    status, _, err = bench(*flags, "--lookup", "--draft-model", "none")
    assert status == 2 and "--lookup drafts" in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "0"),
        ("--batch-size", "4", "--plot", "x.svg"),
        ("--baseline-batch-size", "4"),
        ("--batch-size", "4", "--simulate-alpha", "0.5"),
        ("--batch-size", "4", "--baseline", "mlx-lm"),
        ("--batch-size", "4", "--baseline", "transformers-assisted"),
    ],
    ids=" ".join,
)
def test_batches_that_cannot_be_measured(bench, make, tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("the cat\n")
    pair = ("--model", make()[2], "--draft-model", make(noise=0.05)[2])
    if "--simulate-alpha" not in flags:
        flags = (*flags, *pair, "--prompts", "p.txt")
    status, out, err = bench(*flags)
    assert (status, out) == (2, "")
    assert "batch" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "fields", [{}, {"num_decoder_layers": 3}, {"untied": True}, {"kind": "umt5"}]
)
def test_their_model_is_ours(make, fields):
    """The weights go back to transformers as they came, in float32."""
    fields = dict(fields)
    if fields.pop("untied", False):
        oracle, _, folder = make(untied=True, feed_forward_proj="gated-gelu", **fields)
    else:
        oracle, _, folder = make(**fields)
    ours = Pair.load(str(folder)).target.model
    theirs = baselines.to_transformers(ours, folder)
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.inference_mode():
        expected = oracle(input_ids=ids, decoder_input_ids=ids).logits
        logits = theirs(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(logits, expected)


def test_transformers_answers_as_generate_does(make):
    oracle, _, folder = make()
    pair = Pair.load(str(folder))
    variant = variants.theirs(pair, baselines.transformers_generate(pair, 9))
    ids = torch.tensor([pair.tokenizer.encode("the cat on")])
    expected = oracle.generate(
        ids,
        do_sample=False,
        max_new_tokens=9,
        cache=EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )[0, 1:].tolist()
    answer = variant.answer("the cat on", 0)
    assert answer.tokens == expected
    assert answer.text == pair.tokenizer.decode(expected)
    assert answer.seconds > 0


def answers(seconds: list[float], **stats) -> list[Answer]:
    return [Answer("", [3, 4], s, Stats(new_tokens=2, **stats)) for s in seconds]


def test_sampled_and_relaxed_sweep(bench, make, tmp_path):
    """Every combination, each compared with plain decoding at its temperature."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    status, out, err = bench(
        *("--model", make()[2], "--draft-model", make(noise=0.05)[2]),
        *("--prompts", prompts, "--num-draft", "2", "--max-tokens", 12),
        *("--temperature", "0,1", "--delta", "0,1", "--json", tmp_path / "f.json"),
        *("--plot", tmp_path / "plot.svg"),
    )
    assert status == 0, err
    assert "delta, at 2 draft tokens" in (tmp_path / "plot.svg").read_text()
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(r["temperature"], r["num_draft"], r["delta"]) for r in rows] == [
        *((0, 0, 0), (0, 2, 0), (0, 2, 1)),
        *((1, 0, 0), (1, 2, 0), (1, 2, 1)),
    ]
    assert [row["speedup"] for row in rows if not row["num_draft"]] == [1, 1]
    assert [row["equal"] for row in rows[3:]] == [None] * 3
    assert rows[2]["alpha"] == rows[5]["alpha"] == 1 > rows[4]["alpha"]
    assert rows[1]["equal"] == 5 > rows[2]["equal"]
    assert "BLEU" not in out


def test_sampled_with_shared_noise(bench, make, tmp_path):
    """Compared with plain decoding text by text."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    status, out, err = bench(
        *("--model", make()[2], "--draft-model", make(noise=0.05)[2]),
        *("--prompts", prompts, "--num-draft", "1,3", "--max-tokens", 12),
        *("--temperature", "1", "--coupling", "shared", "--json", tmp_path / "f.json"),
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["equal"] for row in rows] == [len(PROMPTS)] * 3
    assert "same text" in out


def test_beside_mlx_lm(bench, tmp_path):
    """A decoder-only pair, cell by cell; greedy texts are the same."""
    folders = []
    for noise in (0.0, 0.03):
        folders.append(tmp_path / str(noise))
        tiny_causal("llama", noise=noise).save_pretrained(folders[-1])
        tiny_tokenizer(VOCABULARY).save_pretrained(folders[-1])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = ["--model", folders[0], "--draft-model", folders[1], "--prompts", prompts]
    flags += ["--num-draft", "3", "--max-tokens", 20, "--json", tmp_path / "f.json"]
    status, _, err = bench(*flags, "--temperature", "0,1", "--baseline", "mlx-lm")
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    ours = {(row["num_draft"], row["temperature"]): row for row in rows[:4]}
    theirs = {row["name"]: row for row in rows[4:]}
    assert list(theirs) == [
        "mlx-lm, num-draft 0",
        "mlx-lm, num-draft 3",
        "mlx-lm, num-draft 0, temperature 1",
        "mlx-lm, num-draft 3, temperature 1",
    ]
    assert [row["equal"] for row in rows] == [5, 5, None, None] * 2
    plain, drafted = theirs["mlx-lm, num-draft 0"], theirs["mlx-lm, num-draft 3"]
    assert plain["tokens_per_round"] == 1
    per_round = ours[3, 0]["tokens_per_round"]
    assert drafted["tokens_per_round"] == pytest.approx(per_round, rel=0.01)
    status, _, err = bench(*flags, "--baseline", "transformers")
    assert status == 2 and "only mlx-lm" in err


def test_simulation(bench, tmp_path):
    """In the models' real shapes; alpha is what was asked for, and it is labelled."""
    sizes = {
        "model_type": "t5",
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_heads": 2,
        "num_layers": 2,
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(sizes))
    for alpha in (0.7, 1.0):
        status, out, err = bench(
            *("--simulate-alpha", alpha, "--num-draft", "1,4,auto"),
            *("--target-config", config, "--draft-config", tmp_path),
            *("--max-tokens", 100, "--limit", 2, "--json", tmp_path / "f.json"),
        )
        assert status == 0, err
        figures = json.loads((tmp_path / "f.json").read_text())
        assert figures["simulation"].startswith("SIMULATION")
        assert "SIMULATION" in err
        assert all("simulated" in line for line in out.splitlines()[1:])
        plain, *rows = figures["rows"]
        assert plain["tokens_per_round"] == 1
        for row in rows:
            assert row["equal"] == 2
            # Where a draft pays is the machine's matter.
            if row["num_draft"] != "auto":
                assert row["alpha"] == pytest.approx(alpha, abs=0.1)
        assert [row["num_draft"] for row in rows] == [1, 4, "auto"]
    status, _, err = bench("--simulate-alpha", 0.5, "--target-config", "t5-huge")
    assert status == 2 and "t5-huge" in err and "t5-11b" in err
    status, _, err = bench("--simulate-alpha", 0.5, "--temperature", 1)
    assert status == 2 and "--temperature" in err


def test_speedup_is_a_quotient_of_sums():
    base, other = answers([4.0, 2.0] * 3), answers([1.0, 2.0] * 3)
    ratio, low, high = figures.speedup(base, other)
    assert ratio == 2.0
    assert 1.0 < low < 2.0 < high < 4.0
    assert figures.speedup(base[:4], other[:4]) == (2.0, None, None)
    same = figures.speedup(answers([3.0] * 50), answers([2.0] * 50))
    assert same == (1.5, 1.5, 1.5)


def test_passes_of_a_text_have_an_interval():
    few, many = (answers([1.0] * 3, rounds=rounds) for rounds in (2, 6))
    variant = Variant("num-draft 0", Cell(0), lambda prompt, number: few[0])
    row = figures.summarise(variant, few + many, few + many, [[]] * 6)
    assert row.passes == 4
    assert 2 < row.passes_low < 4 < row.passes_high < 6
    row = figures.summarise(variant, few, few, [[]] * 3)
    assert (row.passes, row.passes_low, row.passes_high) == (2, None, None)


def test_expected_speedup_is_the_papers():
    """At c = 0.02 and v = 1, alpha 0.75 and 7 draft tokens: the paper's 3.2 times."""
    plain = answers([1.0] * 4, rounds=2)
    drafted = answers([0.5] * 4, rounds=1, tested=4, accepted=3)
    variant = Variant("num-draft 7", Cell(7), lambda prompt, number: drafted[0])
    cost = Cost(plain=1.0, verify=1.0, draft=0.14)
    row = figures.summarise(variant, drafted, plain, [[]] * 4, cost)
    assert row.alpha == 0.75
    assert row.tokens_per_round == 2
    expected = (1 - 0.75**8) / (0.25 * (7 * 0.02 + 1))
    assert row.expected == row.paper == pytest.approx(expected)
    slow = replace(cost, verify=2.0)
    row = figures.summarise(variant, drafted, plain, [[]] * 4, slow)
    assert row.expected == pytest.approx(row.paper * 1.14 / 2.14)
    ragged = replace(cost, always=False)
    row = figures.summarise(variant, drafted, plain, [[]] * 4, ragged)
    assert row.alpha == 0.75
    assert row.expected is row.paper is None
    assert row.bleu is None
    sure = answers([0.5] * 4, rounds=1, tested=4, accepted=4)
    row = figures.summarise(variant, sure, plain, [[]] * 4, cost)
    assert row.expected == pytest.approx(8 / 1.14)


def test_variants_take_turns():
    """Every variant once per repeat, in changing order; seconds are the medians."""
    asked = []

    def variant(name: str, seconds: list[float]) -> Variant:
        left = iter(seconds)

        def answer(prompt: str, number: int) -> Answer:
            asked.append(name)
            return Answer("", [], next(left))

        return Variant(name, None, answer)

    # The first of each is the warm-up.
    one = variant("a", [9, 1, 2, 9, 5, 5, 5])
    two = variant("b", [9, 7, 8, 7, 1, 3, 2])
    result = timing.measure([one, two], ["x", "y"], repeats=3)
    assert [[a.seconds for a in its] for its in result] == [[2, 5], [7, 2]]
    assert asked[:2] == ["a", "b"]
    turns = {"".join(asked[i : i + 2]) for i in range(2, 14, 2)}
    assert turns == {"ab", "ba"}


def test_first_answer_after_another_program_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "SPIN_SECONDS", 0)
    asked = []

    def variant(threads: str) -> Variant:
        def answer(prompt: str, number: int) -> Answer:
            asked.append(threads)
            return Answer("", [], len(asked))

        return Variant(threads, None, answer, threads=threads)

    result = timing.measure([variant("a"), variant("b")], ["x"], repeats=8)
    turns = asked[2:]
    switches = sum(one != other for one, other in pairwise(asked[1:]))
    assert len(turns) == 16 + switches  # an answer more after each
    assert [len(its) for its in result] == [1, 1]


def test_interrupted_run_keeps_what_it_has():
    """Ctrl-C in the third prompt: the table is of two, and of none before that."""

    def variant(answers: int) -> Variant:
        left = iter(range(answers))

        def answer(prompt: str, number: int) -> Answer:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return Answer(prompt, [], 1.0)

        return Variant("a", None, answer)

    result = timing.measure([variant(9), variant(3)], ["x", "y", "z"], repeats=1)
    assert [[a.text for a in its] for its in result] == [["x", "y"]] * 2
    with pytest.raises(KeyboardInterrupt):
        timing.measure([variant(1)], ["x", "y"], repeats=1)


@pytest.mark.parametrize(
    "module", ["system.fast_blas", "numpy", "speculation.sampling"]
)
def test_interrupted_start_is_quiet(module):
    """Ctrl-C when a module has just been imported."""
    command = [sys.executable, "-X", "importtime", benchmark.__file__]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split()[-1] == module:
            break
    else:
        raise AssertionError(f"{module} was never imported")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert "Traceback" not in err
    assert process.returncode in (-signal.SIGINT, 130)


def test_references_are_grouped_and_scored(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text("p\tthe cat sat on it\np\tit sat\nq\tall of us are here\n")
    prompts = read_prompts(path, None)
    assert prompts == {
        "p": ["the cat sat on it", "it sat"],
        "q": ["all of us are here"],
    }
    references = list(prompts.values())
    perfect = figures.sacrebleu(["the cat sat on it", "all of us are here"], references)
    assert perfect == pytest.approx(100)
    assert figures.sacrebleu(["no", "no"], references) < 5
    assert figures.sacrebleu(["a", "b"], [["a"], []]) is None
    assert read_prompts(path, 1).keys() == {"p"}
    lines = tmp_path / "prompts.jsonl"
    objects = (
        '{"prompt": "p", "reference": "r"}',
        '{"prompt": "q"}',
        '{"prompt": "p", "reference": ["s", "t"]}',
        '{"prompt": "q", "reference": null}',
    )
    lines.write_text("\n".join(objects), "utf-8-sig")
    assert read_prompts(lines, None) == {"p": ["r", "s", "t"], "q": []}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no prompts"),
        ("a\n\n \tb\n", "line 3: an empty prompt"),
        ('{"text": "x"}\n', "line 1: no JSON object"),
        ('{"prompt": 3}\n', "line 1: no JSON object"),
        ("{broken\n", "line 1: no JSON object"),
        ('{"prompt": "a", "reference": 3}\n', "line 1: a reference that is no text"),
    ],
)
def test_bad_prompt_files(bench, tmp_path, text, words):
    path = tmp_path / "prompts"
    path.write_text(text)
    status, out, err = bench("--prompts", path)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_bad_flags(bench, make, tmp_path):
    for arguments, words in (
        (["--num-draft", "x"], "neither a range"),
        (["--num-draft", "4..2"], "neither a range"),
        (["--repeats", "0"], "above 0"),
        (["--num-draft", "2,8", "--max-tokens", "8"], "at most 7 can be drafted"),
        (["--target-config", "t5-base"], "--simulate-alpha as well"),
        (["--plot", tmp_path / "x.pgf"], "a plot is one of"),
        (["--delta", "a"], "no list of numbers"),
        (["--delta", "2"], "delta is 2"),
        (["--temperature", "1", "--baseline", "ctranslate2"], "decode greedily"),
        (["--temperature", "-1"], "temperature is -1"),
        (
            ["--temperature", "1", "--coupling", "shared", "--delta", "0.5"],
            "coupling is shared",
        ),
        (["--simulate-alpha", "1.5"], "between 0 and 1"),
        (["--json", tmp_path / "no" / "f.json"], "no folder"),
        (["--json", tmp_path], "cannot write"),
        (["--plot", tmp_path / "f.sparkle"], "a plot is one of"),
        (["--prompts", tmp_path / "nowhere"], "cannot read"),
    ):
        status, out, err = bench(*arguments)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    (tmp_path / "p").write_text("the cat\n")
    status, _, err = bench(
        *("--model", make()[2], "--draft-model", "none", "--prompts", tmp_path / "p")
    )
    assert status == 2
    assert "no draft to measure" in err


def test_rows_of_padding_are_not_ctranslate2s(tmp_path):
    """Rows that no token stands for, which a random model would choose, and which its
    converter calls by a sentinel's name."""
    save_checkpoint(tiny_torch(8), tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    values = json.loads(path.read_text())
    del values["model"]["vocab"][79:]  # names for 80 of 96 rows, with this one
    like = values["added_tokens"][0]
    values["added_tokens"].append(like | {"id": 79, "content": "<extra_id_0>"})
    path.write_text(json.dumps(values))
    convert.convert(tmp_path / "hf", tmp_path / "mlx")
    pair = Pair.load(str(tmp_path / "mlx"))
    baseline = baselines.ctranslate2(pair, 30)
    for prompt in ("the cat", "a cat on", "the cat sat on the cat"):
        ids = pair.tokenizer.encode(prompt)
        expected = pair.generate(prompt, max_tokens=30).finish().tokens
        assert baseline.generate(ids)[0] == expected


def test_step_costs_are_of_the_right_steps(make, monkeypatch):
    """One token, K + 1 tokens and K draft tokens, always after the same prefix."""
    pair = Pair.load(str(make()[2]), str(make(noise=0.05)[2]))
    fed, drafted = [], []
    extend, propose = pair.target.extend, pair.drafter.propose

    def watched_extend(tokens):
        fed.append((*pair.target.lengths, tokens.shape[1]))
        return extend(tokens)

    def watched_propose(sequences, num_draft, sampler):
        drafted.append((len(sequences[0]), num_draft))
        return propose(sequences, num_draft, sampler)

    monkeypatch.setattr(pair.target, "extend", watched_extend)
    monkeypatch.setattr(pair.drafter, "propose", watched_propose)
    ids = pair.tokenizer.encode("the cat on")
    for temperature in (0.0, 1.0):
        fed.clear()
        cell = Cell(5, temperature=temperature)
        cost = timing.step_cost(pair.target, pair.drafter, ids, cell)
        prefix = timing.COST_PREFIX
        assert fed[0] == (0, prefix)
        assert set(fed[1::2]) == {(prefix, 1)}
        assert set(fed[2::2]) == {(prefix, 6)}
        pair.drafter.positions = len(ids) + prefix + 4
        assert timing.step_cost(pair.target, pair.drafter, ids, cell) is None
        pair.drafter.positions = None
    assert set(drafted) == {(prefix + 1, 5)}
    assert all(math.isfinite(x) and x > 0 for x in vars(cost).values())


def test_alpha_without_the_cost_of_steps():
    """As where a model has too few positions for those to be timed."""
    stats = Stats(new_tokens=6, rounds=2, drafted=8, tested=5, accepted=4)
    answer = Answer("", [0] * 6, 1.0, stats)
    variant = Variant("a", Cell(4), lambda *_: answer)
    row = figures.summarise(variant, [answer], [answer], [[]], None)
    assert (row.alpha, row.c, row.expected) == (0.8, None, None)


def test_a_simulation_takes_no_models(call):
    for flags in (
        ("--model", "x"),
        ("--prompts", "x"),
        ("--unverified",),
        ("--lookup",),
    ):
        status, _, err = call("--simulate-alpha", 0.5, *flags, program=benchmark)
        assert status == 2
        assert "goes with none of --model" in err


def test_a_simulation_goes_on_from_what_it_found_out(tmp_path):
    """Its policy is made as a pair's, and goes from prompt to prompt."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_torch(0).config.to_dict()))
    pair = SimulatedPair(str(tmp_path), str(tmp_path), alpha=1.0, max_tokens=40)
    assert pair.policy.most == most_drafted()
    assert pair.policy._prior[0] == 1.0  # a draft that is as large as its target
    rounds = 0
    for number in range(3):
        pair.prepare(number)
        assert sum(pair.policy.rounds) == rounds
        tokens, stats = pair.generate(number, None)
        assert len(tokens) == 40
        rounds += stats.rounds
    assert sum(pair.policy.rounds) == rounds > 0


def test_a_simulated_draft_may_be_long(tmp_path):
    """Longer than what is looked back at for an end."""
    config = tiny_torch(0).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    pair = SimulatedPair(str(tmp_path), str(tmp_path), alpha=1.0, max_tokens=40)
    pair.prepare(0)
    tokens, stats = pair.generate(0, num_draft=30)
    assert (len(tokens), stats.rounds) == (40, 2)

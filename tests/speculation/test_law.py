"""The law of sampled text is the target's: measured, and seen to fail when broken.

The seeds are fixed, so a test passes always or never. For other seeds each of the
LEGIT tests would fail by chance with probability LEAST: in all about one in 700.
``python tests/law.py`` tests every combination, with more samples.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from law import (
    END,
    LENGTH,
    PROMPT,
    WAYS,
    Point,
    TinyPair,
    chi_square,
    distance,
    exact_law,
    next_probs,
    sample,
)
from scripted import Cycle

from decoder import generate
from speculation import acceptance, samplers
from speculation.lookup import Lookup
from speculation.sampling import COUPLINGS

LEAST = 1e-4
SAMPLES = 5000

LEGIT = [
    ("temperature 0.5", "model", 1),
    ("temperature 1", "model", 3),
    ("temperature 1", "point", 3),
    ("temperature 1.5", "model", 5),
    ("top-k 5, top-p 0.8", "model", 3),
    ("top-k 5, top-p 0.8", "point", 1),
    ("no bigram twice", "model", 3),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return TinyPair.make(tmp_path_factory.mktemp("law"))


def p_value(pair, way, kind, num_draft, coupling="residual") -> float:
    options = replace(WAYS[way], seed=1, coupling=coupling)
    drafter = pair.drafter if kind == "model" else Point()
    seen, _, _ = sample(pair, drafter, options, num_draft, SAMPLES)
    return chi_square(seen, exact_law(pair, options))


@pytest.mark.parametrize("way, kind, num_draft", LEGIT)
def test_law_is_the_targets(pair, way, kind, num_draft):
    assert distance(pair, WAYS[way]) > 0.2  # the draft's would not pass
    assert p_value(pair, way, kind, num_draft) > LEAST


def test_law_of_drafts_that_a_budget_cuts_short(pair):
    """How many tokens are judged together differs from round to round."""
    options = replace(WAYS["temperature 1"], seed=1, coupling="residual")
    seen, _, _ = sample(pair, pair.drafter, options, 3, SAMPLES, most=LENGTH)
    assert chi_square(seen, exact_law(pair, options)) > LEAST


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("model", (0, 1, 4, 2)),
        ("model", (2, 0, 1)),
        ("lookup", (0, 1, 4)),
        ("model behind lookup", (0, 4, 1)),
        ("model behind lookup", (1, 2)),
    ],
    ids=str,
)
def test_law_under_a_plan(pair, kind, sizes):
    """That drafts another number of tokens each round, and what was found where
    something was: in one batch there are rows of both kinds."""
    options = replace(WAYS["temperature 1"], seed=1, coupling="residual")
    lookup = Lookup(1) if "lookup" in kind else None
    drafter = pair.drafter if "model" in kind else None
    plan = Cycle(*sizes)
    seen, _, judged = sample(
        pair, drafter, options, plan.most, SAMPLES, lookup=lookup, policy=plan
    )
    assert judged
    assert chi_square(seen, exact_law(pair, options)) > LEAST


def found_with_the_models_q(monkeypatch):
    """What was looked up is judged as if the model had drawn it."""
    init = samplers.RoundSampler.__init__

    def wrong(self, *args, certain=None, **options):
        init(self, *args, **options)

    monkeypatch.setattr(samplers.RoundSampler, "__init__", wrong)


def found_with_the_next_rows_q(monkeypatch):
    """Rows that were looked up, and those that were not, change places."""
    init = samplers.RoundSampler.__init__

    def wrong(self, *args, certain=None, **options):
        init(self, *args, certain=certain and [not sure for sure in certain], **options)

    monkeypatch.setattr(samplers.RoundSampler, "__init__", wrong)


@pytest.mark.parametrize(
    "breakage", [found_with_the_models_q, found_with_the_next_rows_q]
)
def test_a_broken_batch_of_both_kinds_is_noticed(pair, monkeypatch, breakage):
    breakage(monkeypatch)
    options = replace(WAYS["temperature 1"], seed=1, coupling="residual")
    looked = {"lookup": Lookup(1), "policy": Cycle(0, 4, 1)}
    seen, _, _ = sample(pair, pair.drafter, options, 3, SAMPLES, **looked)
    assert chi_square(seen, exact_law(pair, options)) < LEAST / 100


def test_plain_sampling(pair):
    """The target alone, whose next round is begun before this one has been read."""
    options = WAYS["no bigram twice"]
    seen, _, _ = sample(pair, None, options, 0, SAMPLES)
    assert chi_square(seen, exact_law(pair, options)) > LEAST


def no_residual(monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda p, q, share=1.0: p)


def token_by_token(monkeypatch):
    """Each draft token judged by itself, and yet the last that stands is looked for."""
    right = acceptance.block_probabilities

    def wrong(p, draft, q, counts):
        _, share = right(p, draft, q, counts)
        _, own, its = acceptance._of_draft(p, draft, q)
        return acceptance.accept_probability(own, its, 0.0), mx.ones_like(share)

    monkeypatch.setattr(acceptance, "block_probabilities", wrong)


def stops_by_p(monkeypatch):
    """With P behind every token, as behind the last."""
    right = acceptance.block_probabilities

    def wrong(*args):
        _, share = right(*args)
        return share[:, 1:], share

    monkeypatch.setattr(acceptance, "block_probabilities", wrong)


def same_numbers_for_drafting_and_judging(monkeypatch):
    def judging(self, drafted):
        own = self._judging[:, :1]
        return mx.concatenate([own, self._drawing[:, :drafted]], axis=1)

    monkeypatch.setattr(samplers._Group, "judging", judging)


def bonus_from_the_last_residual(monkeypatch):
    """As if the draft's last token had been rejected, when all have stood."""
    verify_block = acceptance.verify_block

    def broken(p, draft, q, counts, uniform):
        q = mx.pad(q, [(0, 0), (0, 1), (0, 0)], constant_values=0)
        q[:, -1] = q[:, -2]
        draft = mx.pad(draft, [(0, 0), (0, 1)], constant_values=-1)  # rejected
        p = mx.concatenate([p, p[:, -1:]], axis=1)
        uniform = mx.pad(uniform, [(0, 0), (0, 1)], constant_values=1)
        return verify_block(p, draft, q, None, uniform)

    monkeypatch.setattr(samplers, "verify_block", broken)


def unfiltered_q(monkeypatch):
    """The draft's tokens come from the filtered q, but another is told."""
    draft = samplers.RoundSampler.draft

    def told(self, logits, drafted):
        token, _ = draft(self, logits, drafted)
        return token, mx.softmax(logits, axis=-1)

    monkeypatch.setattr(samplers.RoundSampler, "draft", told)


@pytest.mark.parametrize(
    "way, num_draft, breakage",
    [
        ("temperature 1", 3, no_residual),
        ("temperature 1", 3, token_by_token),
        ("temperature 1", 3, stops_by_p),
        ("temperature 1", 3, same_numbers_for_drafting_and_judging),
        ("temperature 1", 1, bonus_from_the_last_residual),
        ("top-k 5, top-p 0.8", 3, unfiltered_q),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_rule_is_noticed(pair, monkeypatch, way, num_draft, breakage):
    breakage(monkeypatch)
    assert p_value(pair, way, "model", num_draft) < LEAST / 100


def test_alpha_is_the_overlap(pair):
    """Σ min(p, q), from transformers' logits: within 4.5 standard errors, which by
    chance is missed once in 150,000 seeds."""
    options = WAYS["temperature 1"]
    p = next_probs(pair.oracle, [0], [()], options)
    q = next_probs(pair.draft_oracle, [0], [()], options)
    overlap = float(np.minimum(p, q).sum())
    stood = sum(
        commit.accepted
        for commit in generate(
            pair.target,
            pair.drafter,
            [PROMPT] * SAMPLES,
            eos_tokens={END},
            max_tokens=2,
            num_draft=1,
            sampling=options,
        )
        if commit.stats.rounds == 1
    )
    error = (overlap * (1 - overlap) / SAMPLES) ** 0.5
    assert abs(stood / SAMPLES - overlap) < 4.5 * error


@pytest.mark.parametrize("num_draft", [0, 1, 4])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_row_alone_is_the_row_in_a_batch(pair, coupling, num_draft):
    """A row's text depends on its stream, not on its neighbours: neither on how far
    they are nor on what is left to them, so that a batch of one has the same law."""
    options = {
        "eos_tokens": {END},
        "max_tokens": 7,
        "num_draft": num_draft,
        "sampling": replace(WAYS["no bigram twice"], coupling=coupling),
    }
    rows = 40

    def texts(prompts, streams):
        found = [[] for _ in prompts]
        for commit in generate(
            pair.target, pair.drafter, prompts, streams=streams, **options
        ):
            found[commit.id] += commit.tokens
        return found

    together = texts([PROMPT] * rows, [(row,) for row in range(rows)])
    assert len({tuple(text) for text in together}) > rows / 2
    for row in range(rows):
        assert texts([PROMPT], [(row,)]) == [together[row]]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_seeds_and_streams(pair, coupling):
    """The same seed gives the same text; another seed or another stream another."""

    def text(seed, stream):
        options = replace(WAYS["temperature 1.5"], seed=seed, coupling=coupling)
        return [
            commit.tokens
            for commit in generate(
                pair.target,
                pair.drafter,
                [PROMPT] * 20,
                eos_tokens={END},
                max_tokens=6,
                num_draft=3,
                sampling=options,
                streams=[(stream, row) for row in range(20)],
            )
        ]

    assert text(1, 0) == text(1, 0)
    assert text(1, 0) != text(2, 0)
    assert text(1, 0) != text(1, 1)


@pytest.mark.parametrize("delta", [0.3, 0.7])
def test_delta_keeps_its_guarantee(pair, delta):
    """The first token's law, sampled: above 0 off the target's, but no further than
    the bound allows, within 5 standard errors."""
    options = WAYS["temperature 1"]
    p = next_probs(pair.oracle, [0], [()], options)[0]
    seen, _, _ = sample(pair, pair.drafter, options, 1, SAMPLES, delta=delta)
    law = np.zeros(len(p))
    for text, times in seen.items():
        law[text[0]] += times / SAMPLES
    error = 5 * (p * (1 - p) / SAMPLES) ** 0.5
    assert (law <= p / (1 - delta) + error).all()
    assert np.abs(law - p).sum() / 2 <= delta + error.sum() / 2
    assert np.abs(law - p).max() > error.max()  # it does change the law

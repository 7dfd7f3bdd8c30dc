"""sampling.py against transformers' logits processors and warpers."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from law import chain
from scripted import Scripted

from architectures import t5
from architectures.t5_session import T5Session
from decoder import generate
from speculation.drafting import ModelDrafter
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.sampling import Sampling, draw
from system.errors import InputError

PROMPTS = [[10, 11, 12, 1], [*range(24, 32), 1], [31, 32, 33, 34, 1]]


@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.sampled_from([0.05, 0.5, 1.0, 1.7]),
    st.integers(0, 70),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_are_those_of_transformers(
    seed, size, temperature, top_k, top_p, min_p
):
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.random.default_rng(seed).normal(0, 3, (3, 2, size)).astype(np.float32)
    logits[0, 0, size // 2 :] = -np.inf  # banned ones
    logits[0, 0, 0] = 1
    got = np.array(options.probs(mx.array(logits)))
    rows = torch.tensor(logits.reshape(6, size))
    expected = chain(options)(torch.zeros((6, 1), dtype=torch.long), rows)
    expected = expected.softmax(-1).numpy().reshape(got.shape)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_tied_tokens_stay_together():
    """Which of equals a sort puts first must not decide."""
    logits = mx.log(mx.array([0.3, 0.2, 0.2, 0.2, 0.1]))
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.6}):
        kept = np.array(Sampling(temperature=1.0, **options).probs(logits)) > 0
        assert kept.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1e3, 1e300])
def test_extreme_temperatures(temperature):
    logits = mx.array([[5.0, -3.0, 4.999, -math.inf, 1000.0], [0.0] * 5])
    probs = Sampling(temperature=temperature).probs(logits)
    assert np.isfinite(np.array(probs)).all()
    assert mx.allclose(probs.sum(-1), mx.ones(2)).item()
    if temperature <= 1e-3:
        assert probs[0].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_nothing_finite_becomes_nan_throughout(bad, options):
    """So that one look at a row tells."""
    logits = np.zeros((2, 5), np.float32)
    logits[0, 3] = bad
    if bad == -math.inf:
        logits[0] = bad
    probs = np.array(Sampling(temperature=1.0, **options).probs(mx.array(logits)))
    assert np.isnan(probs[0]).all()
    assert np.isfinite(probs[1]).all()


def test_draw_is_the_inverse_of_the_distribution():
    """Evenly spread numbers draw each token in its share; never one of none."""
    p = np.array([0, 0.25, 0, 0.5, 0.125, 0.125, 0], np.float32)
    uniform = (np.arange(4096, dtype=np.float32)) / 4096
    many = mx.broadcast_to(mx.array(p), (4096, len(p)))
    counts = np.bincount(np.array(draw(many, mx.array(uniform))), minlength=len(p))
    assert (counts / 4096).tolist() == p.tolist()
    ends = mx.array(np.array([0, np.nextafter(1, 0, dtype=np.float32)], np.float32))
    assert draw(many[:2] * 3e-20, ends).tolist() == [5, 1]


RULES = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "repetition bonus": {"repetition_penalty": 0.6},
    "no token twice": {"no_repeat_ngram_size": 1},
    "no bigram twice": {"no_repeat_ngram_size": 2},
    "no trigram twice": {"no_repeat_ngram_size": 3},
    "no token of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "no bigram of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "no trigram of the prompt": {"encoder_no_repeat_ngram_size": 3},
    "bad words": {"bad_words_ids": ((4,), (50, 17), (1,), (2, 3, 2), (5, 5))},
    "not before 9": {"min_new_tokens": 9},
    "suppressed": {"suppress_tokens": (4, 17, 50)},
    "forced": {"forced_bos_token_id": 33},
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
        "suppress_tokens": (4,),
        "forced_bos_token_id": 12,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": ((5,), (12,), (3, 2)),
    },
}


@given(st.sampled_from(list(RULES)), st.data())
def test_rules_at_every_position_of_a_block(rule, data):
    """Rows of different lengths, and each position with the prefix that it has."""
    vocabulary = 6
    options = {
        "suppressed": {"suppress_tokens": (2, 4)},
        "forced": {"forced_bos_token_id": 3},
        "bad words": {"bad_words_ids": ((4,), (5, 3), (1,), (2, 3, 2), (5, 5), (0, 2))},
        "all": RULES["all"] | {"forced_bos_token_id": 2, "bad_words_ids": ((5,), (2,))},
    }.get(rule, RULES[rule])
    options = Sampling(**options)
    size = data.draw(st.integers(1, 4))
    token = st.integers(0, vocabulary - 1)
    rows = data.draw(st.lists(st.lists(token, max_size=9), min_size=1, max_size=3))
    rows = [[0, *row] for row in rows]
    drafted = [data.draw(st.lists(token, min_size=size, max_size=size)) for _ in rows]
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    logits = rng.normal(size=(len(rows), size + 1, vocabulary)).astype(np.float32)
    prompts = [data.draw(st.lists(token, min_size=1, max_size=7)) for _ in rows]
    rules = Rules(vocabulary, options, eos_tokens=frozenset({1, 99}))

    def process(sequences, following=None):
        samplers = []
        for sequence, prompt in zip(sequences, prompts, strict=True):
            samplers.append(RowSampler(rules, [0], prompt))
            for token in sequence[1:]:
                samplers[-1].append([token])
        (group,) = RoundSampler(samplers, following=following)._groups
        return group.process(mx.array(logits), mx.array(block))

    block = [[row[-1], *draft] for row, draft in zip(rows, drafted, strict=True)]
    known = process(rows)
    # The same, where the device alone knows the last token.
    shorter = [row[:-1] for row in rows]
    if all(shorter):
        ahead = process(shorter, mx.array([row[-1] for row in rows]))
        assert mx.array_equal(ahead, known).item()
    for row, tokens in enumerate(rows):
        rule_of_transformers = chain(options, prompt=prompts[row])
        for place in range(size + 1):
            prefix = torch.tensor([[*tokens, *drafted[row][:place]]])
            expected = rule_of_transformers(
                prefix, torch.tensor(logits[row, place])[None]
            )
            # As laws: to the forced token transformers gives a logit of its own.
            got = torch.tensor(np.array(known[row, place])).softmax(-1)
            np.testing.assert_allclose(got, expected[0].softmax(-1), rtol=1e-5)


@pytest.fixture(scope="module")
def sessions(tiny, make):
    return tiny[0], T5Session(tiny[1]), t5.load(make(noise=0.05)[2])


@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_under_rules_is_that_of_transformers(sessions, rule):
    """Plain and speculative, alone and in a batch, beside ``generate``."""
    oracle, target, draft = sessions
    options = dict(RULES[rule])
    theirs = dict(options)
    if "suppress_tokens" in options:
        theirs["suppress_tokens"] = list(options["suppress_tokens"])
    if "bad_words_ids" in options:
        theirs["bad_words_ids"] = [list(word) for word in options["bad_words_ids"]]
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            text = oracle.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, **theirs
            )
        expected.append(text[0, 1:].tolist())
    drafters = [None, ModelDrafter(T5Session(draft))]
    stood = 0
    for drafter in drafters:
        for prompts in ([PROMPTS[0]], PROMPTS):
            texts = [[] for _ in prompts]
            for commit in generate(
                target,
                drafter,
                prompts,
                eos_tokens={1},
                max_tokens=30,
                num_draft=4,
                sampling=Sampling(**options),
            ):
                texts[commit.id] += commit.tokens
                stood += commit.accepted
            assert texts == expected[: len(texts)]
    assert stood > 20  # the rules apply to the draft as well


def test_rules_change_the_text(sessions):
    """The test above would pass if they did nothing at all."""
    _, target, _ = sessions
    texts = set()
    for options in [{}, *RULES.values()]:
        commits = generate(
            target,
            None,
            PROMPTS[:1],
            eos_tokens={1},
            max_tokens=30,
            sampling=Sampling(**options),
        )
        texts.add(tuple(token for commit in commits for token in commit.tokens))
    assert len(texts) >= 7


@pytest.mark.parametrize("delta", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_banned_is_never_emitted(sessions, temperature, delta):
    """Not even where delta takes whatever is proposed, for certain."""
    _, target, _ = sessions

    options = Sampling(temperature=temperature, suppress_tokens=(17,))
    commits = generate(
        target,
        Scripted(lambda sequence, n: [17] * n),
        PROMPTS,
        eos_tokens={-1},
        max_tokens=20,
        delta=delta,
        sampling=options,
    )
    assert all(17 not in commit.tokens for commit in commits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_own_processors(sessions, temperature):
    """A rule of one's own sees the logits and each position's prefix."""
    _, target, draft = sessions

    def rising(logits, prefix):
        """Each token is larger than the one before it."""
        size = logits.shape[1]
        before = prefix.tokens[:, -size:]
        return mx.where(mx.arange(VOCABULARY) > before[..., None], logits, -math.inf)

    options = Sampling(temperature=temperature, processors=(rising,))
    drafter = ModelDrafter(T5Session(draft))
    settings = {"eos_tokens": {95}, "max_tokens": 12, "sampling": options}
    tokens = []
    for commit in generate(target, drafter, PROMPTS[:1], **settings):
        tokens += commit.tokens
    assert tokens == sorted(set(tokens))


def test_no_token_left(sessions):
    """Named as what it is, not as broken weights."""
    _, target, _ = sessions
    everything = Sampling(suppress_tokens=tuple(range(VOCABULARY)))
    sampled = Sampling(temperature=1.0, suppress_tokens=tuple(range(VOCABULARY)))
    for options in (everything, sampled):
        with pytest.raises(InputError, match="no token is left"):
            list(generate(target, None, PROMPTS[:1], eos_tokens={1}, sampling=options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"seed": -1},
        {"coupling": "loose"},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"no_repeat_ngram_size": -1},
        {"min_new_tokens": -1},
        {"top_k": 5},  # without a temperature
    ],
    ids=str,
)
def test_options_out_of_range(options):
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(InputError, match=name):
        Sampling(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": (VOCABULARY,)},
        {"suppress_tokens": (-1,)},
        {"forced_bos_token_id": VOCABULARY},
        {"forced_bos_token_id": 5, "suppress_tokens": (5,)},
    ],
    ids=str,
)
def test_tokens_that_cannot_be(sessions, options):
    with pytest.raises(InputError, match="token"):
        list(
            generate(
                sessions[1],
                None,
                PROMPTS[:1],
                eos_tokens={1},
                sampling=Sampling(**options),
            )
        )

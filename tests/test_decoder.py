"""The decoding loop: greedy speculative text is the target's, whatever is drafted."""

import contextlib
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted

import model
from architectures import t5
from architectures.t5_session import T5Session
from decoder import generate
from speculation import drafting
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.sampling import Sampling
from system.errors import InputError

#: Prompts that the tiny target answers with varied texts.
PROMPTS = [[10, 11, 12, 1], [*range(24, 32), 1], [31, 32, 33, 34, 1]]
NEVER = frozenset({-1})  # no end of sequence


class Checked(T5Session):
    """A session that sees to it that no id is fed that the embedding has no row for:
    the device would read beyond the matrix without a word."""

    def extend(self, tokens):
        fed = np.array(tokens)
        assert fed.min() >= 0 and fed.max() < self.model.config.vocab_size
        return super().extend(tokens)


def broken(folder) -> model.T5:
    """The model with logits that are NaN."""
    damaged = t5.load(folder)
    wo = damaged.decoder.layers[0].feed_forward.wo
    wo.weight = wo.weight * float("nan")
    return damaged


def decode(target, drafter, prompts=None, **options):
    """The tokens, finish reasons and stats of every row."""
    prompts = PROMPTS[:1] if prompts is None else prompts
    options = {"eos_tokens": NEVER, "max_tokens": 24} | options
    tokens = [[] for _ in prompts]
    reasons, stats = [None] * len(prompts), [None] * len(prompts)
    for commit in generate(target, drafter, prompts, **options):
        assert reasons[commit.id] is None, "text follows the end"
        tokens[commit.id] += commit.tokens
        reasons[commit.id], stats[commit.id] = commit.finish_reason, commit.stats
    return tokens, reasons, stats


@pytest.fixture(scope="module")
def target(tiny):
    return Checked(tiny[1])


@pytest.fixture(scope="module")
def plain(target):
    """64 tokens of the target alone, without an end."""
    return decode(target, None, max_tokens=64)[0][0]


@pytest.fixture(scope="module")
def drafters(tiny, make):
    """Good but imperfect, unrelated, and those that only do harm."""
    _, _, folder = make(seed=9, num_decoder_layers=1)
    wide = t5.load(make(seed=4, vocab_size=VOCABULARY + 40)[2])
    narrow = t5.load(make(seed=4, vocab_size=VOCABULARY - 40)[2])
    return {
        "good": ModelDrafter(Checked(t5.load(make(noise=0.05)[2]))),
        "same": ModelDrafter(Checked(tiny[1])),
        "random": ModelDrafter(Checked(t5.load(folder))),
        "more ids than the target": ModelDrafter(Checked(wide)),
        "fewer ids than the target": ModelDrafter(Checked(narrow)),
        "always the end": Scripted(lambda sequence, n: [1] * n),
        "no such id": Scripted(lambda sequence, n: ([10**6, -5] * n)[:n]),
        "nothing, now and then": Scripted(lambda s, n: [s[-1]] * n, ragged=len),
        "lookup": Lookup(),
    }


def test_good_draft_is_good_but_not_perfect(target, drafters):
    """The tests below mean something: rejections happen at every index."""
    for num_draft in (1, 2, 3, 5):
        tokens, _, (stats,) = decode(
            target, drafters["good"], num_draft=num_draft, max_tokens=300
        )
        assert 0.3 < stats.alpha < 0.9
        assert all(stats.accept_histogram), stats.accept_histogram
        assert tokens == decode(target, None, max_tokens=300)[0]


NAMES = (
    "good",
    "same",
    "random",
    "more ids than the target",
    "fewer ids than the target",
    "always the end",
    "no such id",
    "nothing, now and then",
    "lookup",
)


@pytest.mark.parametrize("num_draft", range(1, 11))
@pytest.mark.parametrize("name", NAMES)
def test_speculative_equals_plain(target, plain, drafters, name, num_draft):
    tokens, reasons, (stats,) = decode(
        target, drafters[name], num_draft=num_draft, max_tokens=64
    )
    assert tokens == [plain]
    assert reasons == ["length"]
    check(stats, tokens[0])
    if name == "same":  # a hole in either cache would show as a rejection
        assert stats.alpha == 1
        assert stats.rounds == -(-64 // (num_draft + 1))


def test_always_wrong(target, plain):
    """Nothing is accepted, one token a round comes out."""
    after = dict(enumerate(plain, start=1))  # by the committed length, start included

    def wrong(sequence, n):
        return [(after.get(len(sequence) + i, 0) + 1) % VOCABULARY for i in range(n)]

    tokens, _, (stats,) = decode(target, Scripted(wrong), max_tokens=64)
    assert tokens == [plain]
    assert (stats.accepted, stats.rounds) == (0, 64)


@pytest.mark.parametrize("num_draft", [0, 1, 2, 3, 5, 8])
def test_end_of_sequence_at_every_position(target, plain, drafters, num_draft):
    """The end as first, middle, last draft token and as the target's own: nothing
    follows it, and it is the last token counted."""
    ends = [plain.index(token) for token in set(plain)]
    assert {end % (num_draft + 1) for end in ends} == set(range(num_draft + 1))
    for name in ("same", "good"):
        for end in ends:
            tokens, reasons, (stats,) = decode(
                target,
                drafters[name],
                num_draft=num_draft,
                eos_tokens={plain[end], -7},
                max_tokens=end + 6,
            )
            assert (tokens, reasons) == ([plain[: end + 1]], ["eos"])
            check(stats, tokens[0])


@pytest.mark.parametrize("max_tokens", range(1, 13))
def test_budget(target, plain, drafters, max_tokens):
    for name in ("same", "good", "always the end"):
        for num_draft in (0, 1, 2, 5, 10):
            tokens, reasons, (stats,) = decode(
                target, drafters[name], num_draft=num_draft, max_tokens=max_tokens
            )
            assert (tokens, reasons) == ([plain[:max_tokens]], ["length"])
            check(stats, tokens[0])
            # A draft longer than what may be committed would be for nothing.
            assert stats.drafted <= max(max_tokens - 1, 0) * stats.rounds


def test_end_of_sequence_on_the_last_token_of_the_budget(target, plain):
    """Both are true; the text is complete, so it is the end that counts."""
    first = plain.index(plain[4])
    _, reasons, _ = decode(target, None, eos_tokens={plain[4]}, max_tokens=first + 1)
    assert reasons == ["eos"]


def check(stats, tokens: list[int]) -> None:
    """What must hold of any finished row's figures."""
    histogram = stats.accept_histogram
    assert stats.new_tokens == len(tokens)
    assert sum(histogram) == stats.rounds
    assert sum(i * count for i, count in enumerate(histogram)) == stats.accepted
    assert stats.accepted <= stats.tested <= stats.drafted
    assert 0 <= stats.found_accepted <= stats.found <= stats.tested
    assert stats.found_accepted <= stats.accepted
    assert stats.found - stats.found_accepted <= stats.tested - stats.accepted
    assert sum(times for _, times in stats.sizes) == stats.rounds
    assert sum(size * times for size, times in stats.sizes) == stats.drafted
    assert all(a[0] != b[0] for a, b in pairwise(stats.sizes))
    # Every round adds the target's own token, but the last may end inside its draft.
    assert stats.new_tokens - stats.accepted in (stats.rounds, stats.rounds - 1)
    assert stats.alpha is None or stats.alpha == stats.accepted / stats.tested
    assert 0 < stats.decode_seconds < 60
    assert stats.peak_memory_bytes > 0


@given(st.data())
def test_batch_rows_equal_themselves_alone(tiny, target, drafters, data):
    """Rows end at different times and stand at different lengths; none disturbs
    another, and idle ones stay silent."""
    name = data.draw(st.sampled_from(NAMES))
    options = {
        "num_draft": data.draw(st.integers(0, 6)),
        "max_tokens": data.draw(st.integers(1, 40)),
        "eos_tokens": frozenset(data.draw(st.lists(st.integers(1, 95), max_size=12))),
    }
    size = data.draw(st.integers(1, 3))
    tokens, reasons, _ = decode(target, drafters[name], PROMPTS[:size], **options)
    for row in range(size):
        alone = decode(target, None, [PROMPTS[row]], **options | {"num_draft": 0})
        assert tokens[row] == alone[0][0]
        assert reasons[row] == alone[1][0]


@given(st.data())
def test_drafter_needs_no_feedback(tiny, data):
    """Whatever was committed since, a proposal is what a fresh drafter would propose.

    Covers rounds that somebody else drafted, rounds without a draft, rejections at any
    index, full acceptance, rows at different lengths, restarts, and being asked again.
    """
    used = ModelDrafter(Checked(tiny[1]))
    used.start(PROMPTS)
    token = st.integers(2, VOCABULARY - 1)
    sequences = [[0] for _ in PROMPTS]
    rules = Rules(VOCABULARY)
    for _ in range(data.draw(st.integers(1, 4))):
        num_draft = data.draw(st.integers(1, 5))
        sampler = RoundSampler([RowSampler(rules, each) for each in sequences])
        got = np.array(used.propose(sequences, num_draft, sampler).tokens)
        fresh = ModelDrafter(Checked(tiny[1]))
        fresh.start(PROMPTS)
        expected = np.array(fresh.propose(sequences, num_draft, sampler).tokens)
        np.testing.assert_array_equal(got, expected)
        for row, sequence in enumerate(sequences):
            kept = data.draw(st.integers(0, num_draft))
            sequence += got[row, :kept].tolist()
            sequence += data.draw(st.lists(token, max_size=7))


def test_delta_one_takes_every_draft_token(target, drafters):
    tokens, _, (stats,) = decode(
        target, drafters["random"], num_draft=3, delta=1.0, max_tokens=41
    )
    assert stats.alpha == 1
    assert len(tokens[0]) == 41
    # Ids that do not exist are not taken even then.
    tokens, _, _ = decode(target, drafters["no such id"], delta=1.0)
    assert tokens == decode(target, None)[0]


def test_delta_raises_acceptance(target, drafters):
    """More of the draft stands the larger delta is; at 0 the text is the target's."""
    options = {"num_draft": 3, "max_tokens": 300}
    alphas = [
        decode(target, drafters["good"], delta=delta, **options)[2][0].alpha
        for delta in (0.0, 0.001, 0.02, 1.0)  # the tiny model's logits lie close
    ]
    assert alphas[0] < alphas[1] < alphas[2] < alphas[3] == 1


def test_start_token_that_is_not_emitted(tiny, drafters):
    """Among an embedding's padding, say: it is fed all the same, as it is."""
    session = Checked(tiny[1], vocabulary=80)
    session.start = lambda prompts: [
        [90] for _ in type(session).start(session, prompts)
    ]
    plain = decode(session, None)[0]
    good = Scripted(lambda sequence, n: [5] * n)
    assert decode(session, good)[0] == plain


def test_closing_early_leaves_a_session_that_works(target, plain, drafters):
    """Ctrl-C between rounds, then another prompt on the same models."""
    for drafter in (drafters["good"], None):
        with contextlib.closing(
            generate(target, drafter, PROMPTS[:1], eos_tokens=NEVER)
        ) as commits:
            next(commits)
        assert decode(target, drafter, max_tokens=64)[0] == [plain]


def test_plain_decoding_has_one_kind_of_round(target, drafters):
    """However it is asked for; and no histogram of a billion entries."""
    for drafter, num_draft in ((None, 7), (drafters["good"], 0)):
        _, _, (stats,) = decode(target, drafter, num_draft=num_draft)
        assert stats.accept_histogram == [24]
    _, _, (stats,) = decode(target, drafters["same"], num_draft=10**9)
    assert stats.accept_histogram == [0] * 23 + [1]


@pytest.mark.parametrize("name", [None, "good", "always the end"])
def test_as_queued_on_a_gpu(target, plain, drafters, monkeypatch, name):
    """There a round is queued before the one before has been read; one that was queued
    in vain, after the end, changes nothing."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    drafter = drafters.get(name)
    for end in (3, 10, 20):
        options = {"eos_tokens": {plain[end]}, "max_tokens": 64}
        assert decode(target, drafter, **options)[0] == [
            plain[: plain.index(plain[end]) + 1]
        ]
    assert decode(target, drafter, max_tokens=64)[0] == [plain]
    prompts = decode(target, drafter, PROMPTS)[0]
    assert prompts == [decode(target, None, [prompt])[0][0] for prompt in PROMPTS]


def test_long_text_outgrows_the_caches(target, drafters):
    """The caches double at 64, 128, 256 positions, in the middle of rounds."""
    options = {"max_tokens": 300, "prompts": PROMPTS}
    assert (
        decode(target, drafters["good"], **options)[0]
        == decode(target, None, **options)[0]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_draft": -1},
        {"max_tokens": 0},
        {"delta": -0.1},
        {"delta": 1.1},
        {"delta": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range(target, drafters, options):
    with pytest.raises(InputError, match=next(iter(options)).replace("_", "-")):
        decode(target, drafters["good"], **options)


@pytest.mark.parametrize("num_draft", [0, 3])
def test_broken_weights_are_named(make, drafters, num_draft):
    """NaN logits would otherwise be decoded into text without an error."""
    session = Checked(broken(make()[2]))
    with pytest.raises(InputError, match="not finite"):
        decode(session, drafters["good"], num_draft=num_draft)


def test_broken_draft_cannot_harm(make, target, plain):
    """A draft full of NaN proposes nonsense, and nonsense is refused."""
    drafter = ModelDrafter(Checked(broken(make()[2])))
    assert decode(target, drafter, max_tokens=64)[0] == [plain]
    sampled = {"sampling": Sampling(temperature=1.0, seed=1)}
    assert decode(target, drafter, **sampled)[0] == decode(target, None, **sampled)[0]


@pytest.mark.parametrize("delta", [0.0, 0.4])
@pytest.mark.parametrize("name", ["good", "lookup", None])
def test_another_budget_cuts_the_text_off(target, drafters, name, delta):
    """What a round draws does not depend on how many tokens are left."""
    drafter = Lookup() if name == "lookup" else drafters.get(name)
    for seed, temperature in ((1, 0.7), (2, 1.0), (3, 0.0)):
        options = {
            "sampling": Sampling(temperature=temperature, seed=seed),
            "num_draft": 1 + 2 * seed,
            "delta": delta,
        }
        whole = decode(target, drafter, max_tokens=16, **options)[0]
        for most in (1, 2, 5, 9, 15):
            cut = decode(target, drafter, max_tokens=most, **options)[0]
            assert cut == [text[:most] for text in whole]


@pytest.mark.parametrize("name", NAMES)
def test_sampled_with_shared_noise(target, drafters, name):
    """With any draft and any K the text that the target samples alone."""
    sampled = {"sampling": Sampling(temperature=1.0, seed=6), "max_tokens": 40}
    alone = decode(target, None, **sampled)[0]
    for num_draft in (1, 4, 7):
        tokens, _, (stats,) = decode(
            target, drafters[name], num_draft=num_draft, **sampled
        )
        assert tokens == alone
        check(stats, tokens[0])
        if name == "same":
            assert stats.alpha == 1


def test_nothing_is_drafted_behind_an_end(target, drafters, plain):
    """However much is asked for: by a model that is soon told, by lookup at once."""
    end = plain[3]
    options = {"eos_tokens": {end}, "num_draft": 1000, "max_tokens": 1000}
    tokens, reasons, (stats,) = decode(target, drafters["same"], **options)
    assert (tokens[0], reasons) == (plain[: plain.index(end) + 1], ["eos"])
    assert stats.drafted < 4 + 2 * drafting.LOOK_BACK

"""Decoder-only models: the same loop over mlx-lm's, against transformers."""

import io
import json
import sys
from contextlib import suppress
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from causal_table import generated
from conftest import VOCABULARY, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from law import LENGTH, WAYS, Point, TinyPair, chi_square, distance, exact_law, sample
from scripted import Scripted
from test_decoder import check, decode
from tiny_causal import POSITIONS, tiny_causal

from architectures import causal, causal_model, causal_session
from architectures.causal_session import CausalSession
from architectures.row_cache import RowCache
from pair import LOOKUP, Pair
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from system import memory
from system.errors import InputError, TooLongError

PROMPTS = [[10, 11, 12, 40], [*range(24, 32)], [31, 32]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: (oracle, its checkpoint's folder)."""
    made = {}

    def build(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            oracle = tiny_causal(kind, **options)
            oracle.save_pretrained(folder)
            tiny_tokenizer(VOCABULARY).save_pretrained(folder)
            made[key] = oracle, folder
        return made[key]

    return build


def session(folder, **options):
    return CausalSession(causal_model.load(folder).model, VOCABULARY, **options)


def drafters(saved, kind):
    """Good but imperfect, unrelated, hostile, of another width, and without a model."""
    wide = CausalSession(
        causal_model.load(saved(kind, noise=0.03, size=VOCABULARY + 32)[1]).model,
        VOCABULARY,
    )
    return {
        "good": ModelDrafter(session(saved(kind, noise=0.03)[1])),
        "same": ModelDrafter(session(saved(kind)[1])),
        "random": ModelDrafter(session(saved(kind, seed=7, layers=1)[1])),
        "padded": ModelDrafter(wide),
        "no such id": Scripted(lambda sequence, n: ([10**6, -5] * n)[:n]),
        "now and then": Scripted(lambda s, n: [s[-1]] * n, ragged=len),
        "lookup": Lookup(),
    }


@pytest.mark.parametrize("kind", ["gpt2"])
def test_speculative_equals_plain_and_generate(saved, kind):
    oracle, folder = saved(kind)
    target = session(folder)
    expected = generated(oracle, PROMPTS[0], 40)
    assert len(set(expected)) > 12
    assert decode(target, None, PROMPTS[:1], max_tokens=40)[0] == [expected]
    alphas = {}
    for name, drafter in drafters(saved, kind).items():
        for num_draft in (1, 3, 4, 10):
            tokens, _, (stats,) = decode(
                target, drafter, PROMPTS[:1], num_draft=num_draft, max_tokens=40
            )
            assert tokens == [expected]
            check(stats, tokens[0])
        alphas[name] = stats.alpha
    assert alphas["same"] == 1
    assert 0.2 < alphas["good"] < 1


@pytest.mark.parametrize("kind", ["llama"])
def test_batches(saved, kind):
    """Rows of different lengths, which end at different times."""
    oracle, folder = saved(kind)
    target = session(folder)
    expected = [generated(oracle, prompt, 30) for prompt in PROMPTS]
    for name in ("good", "lookup"):
        for num_draft in (0, 1, 4):
            drafter = drafters(saved, kind)[name]
            options = {"num_draft": num_draft, "max_tokens": 30}
            assert decode(target, drafter, PROMPTS, **options)[0] == expected
            ends = {expected[0][4], expected[1][9]}
            got = decode(target, drafter, PROMPTS, eos_tokens=ends, **options)[0]
            for row, text in enumerate(expected):
                first = next((i for i, t in enumerate(text) if t in ends), len(text))
                assert got[row] == text[: first + 1]


def test_end_of_sequence_at_every_position(saved):
    oracle, folder = saved("llama")
    target = session(folder)
    text = generated(oracle, PROMPTS[0], 40)
    good = drafters(saved, "llama")["good"]
    for end in sorted(text.index(token) for token in set(text)):
        for drafter in (None, good, Lookup()):
            tokens, reasons, _ = decode(
                target, drafter, PROMPTS[:1], eos_tokens={text[end]}, max_tokens=45
            )
            assert (tokens, reasons) == ([text[: end + 1]], ["eos"])


def test_prefix_stays_cached(saved):
    """Another prompt feeds only what it does not have in common with the text so far,
    whatever was drafted and rejected in between."""
    oracle, folder = saved("qwen2")
    target = session(folder)
    good = drafters(saved, "qwen2")["good"]
    (answer,) = decode(target, good, PROMPTS[:1], max_tokens=20)[0]
    follow_up = [*PROMPTS[0], *answer, 50, 51, 52]
    fed = []
    extend = target.extend
    target.extend = lambda tokens: fed.append(tokens.shape[1]) or extend(tokens)
    expected = generated(oracle, follow_up, 20)
    assert decode(target, good, [follow_up], max_tokens=20)[0] == [expected]
    assert fed[0] <= 3
    fed.clear()
    other = [9, *follow_up]
    expected = generated(oracle, other, 20)
    assert decode(target, good, [other], max_tokens=20)[0] == [expected]
    assert fed[0] == len(other) - 1
    # After a batch nothing is known of a single row.
    decode(target, None, PROMPTS)
    assert decode(target, good, [other], max_tokens=20)[0] == [expected]


def test_a_pass_that_was_cut_short_leaves_no_trace(saved):
    """Ctrl-C when some layers have their keys already and others do not."""
    oracle, folder = saved("llama")
    target = session(folder)
    expected = generated(oracle, PROMPTS[0], 20)
    assert decode(target, None, PROMPTS[:1], max_tokens=20)[0] == [expected]
    inner = target.model.model.layers[1].mlp
    target.model.model.layers[1].mlp = None
    with pytest.raises(TypeError):
        target.extend(mx.array([[3]]))
    target.model.model.layers[1].mlp = inner
    assert decode(target, None, PROMPTS[:1], max_tokens=20)[0] == [expected]


@pytest.mark.parametrize("num_draft", [0, 1, 5])
@pytest.mark.parametrize("reach", [20, 12, 2])
def test_positions_end(saved, num_draft, reach):
    """No model reads a position that it does not have. Where the target's end, the text
    does; where the draft's do, the target goes on alone."""
    oracle, folder = saved("gpt2", positions=20)
    positions = causal_model.load(folder).positions
    target = session(folder, positions=positions)
    draft = session(saved("gpt2", positions=20, noise=0.03)[1], positions=reach)
    fed = {20: [0], reach: [0]}
    for each in (target, draft):
        inner = each.model

        class Watched:
            def __call__(self, tokens, cache, inner=inner, fed=fed[each.positions]):
                offset = np.array(cache[0].offset).max()
                fed.append(int(offset) + tokens.shape[1])
                return inner(tokens, cache=cache)

        each.model = Watched()
    for prompts in (PROMPTS[:1], PROMPTS, [[5] * 19]):
        tokens, reasons, _ = decode(
            target, ModelDrafter(draft), prompts, num_draft=num_draft, max_tokens=50
        )
        for row, prompt in enumerate(prompts):
            assert len(prompt) + len(tokens[row]) == 20
            assert reasons[row] == "length"
            assert tokens[row] == generated(oracle, prompt, 20 - len(prompt))
    assert all(max(its) <= end for end, its in fed.items())
    assert (max(fed[reach]) > 0) is (reach == 20 or (num_draft > 0 and reach == 12))
    with pytest.raises(
        InputError, match="20 tokens, but the model has positions for 20"
    ):
        decode(target, None, [[5] * 20])


def test_forgotten_prompt_is_fed_again(saved):
    """What is timed has to be timed whole."""
    one = session(saved("llama")[1])
    fed = []
    extend = one.extend
    one.extend = lambda tokens: fed.append(tokens.shape[1]) or extend(tokens)
    for forget in (False, False, True):
        if forget:
            one.forget()
        one.start([[3, 4, 5, 6]])
    assert fed == [3, 3]


def test_caches_that_cannot_be_rewound(saved):
    from mlx_lm.models.cache import RotatingKVCache

    model = causal_model.load(saved("llama")[1]).model
    model.make_cache = lambda: [RotatingKVCache(8), RotatingKVCache(8)]
    with pytest.raises(InputError, match="RotatingKVCache, which cannot be rewound"):
        CausalSession(model, VOCABULARY)


def test_rewinding_forward_is_refused(saved):
    one = session(saved("llama")[1])
    one.start([[3, 4, 5]])
    with pytest.raises(ValueError, match="cannot rewind"):
        one.rewind([3])


@pytest.mark.parametrize("prompt", [[], [VOCABULARY], [3, -1]])
def test_prompts_that_cannot_be_fed(saved, prompt):
    with pytest.raises(InputError, match="prompt"):
        session(saved("gpt2")[1]).start([prompt])


def test_law(saved, tmp_path):
    """The chi-square test of test_law.py, on a Llama with 8 tokens."""
    sessions, oracles = [], []
    for name, noise in (("target", 0.0), ("draft", 0.5)):
        oracle = tiny_causal("llama", seed=3, noise=noise, layers=1, size=8)
        with torch.no_grad():
            oracle.lm_head.weight *= 0.2
        oracle.save_pretrained(tmp_path / name)
        sessions.append(CausalSession(causal_model.load(tmp_path / name).model, 8))
        oracles.append(lambda prefixes, oracle=oracle: oracle(prefixes).logits[:, -1])
    prompt = [5, 3, 6, 4, 1]
    pair = TinyPair(sessions[0], ModelDrafter(sessions[1]), *oracles, prompt)
    assert LENGTH == 3
    for way, drafter, num_draft in (
        ("temperature 1", pair.drafter, 3),
        ("no bigram twice", pair.drafter, 2),
        ("top-k 5, top-p 0.8", Point(), 3),
    ):
        assert distance(pair, WAYS[way]) > 0.2
        seen, _, _ = sample(pair, drafter, WAYS[way], num_draft, 5000)
        assert chi_square(seen, exact_law(pair, WAYS[way])) > 1e-4


def lookup(prompt, sequences, count=5):
    """What the lookup proposes after each of the growing texts of one row."""
    its = Lookup()
    its.start([prompt])
    return [its.find(0, sequence, count, frozenset()).tokens for sequence in sequences]


def test_lookup_proposes_what_followed():
    source = [5, 6, 7, 8, 9, 1]
    assert lookup(source, [[0, 4], [0, 4, 6], [0, 4, 6, 7]]) == [[], [], [8, 9, 1]]
    assert lookup(source, [[0, 3, 4, 2, 3, 4]]) == [[2, 3, 4]]  # its own text
    # The longest match counts, then the latest; the end itself is no match.
    assert lookup([], [[1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3]], 1) == [[9]]
    assert lookup([], [[2, 3, 9, 2, 3, 8, 2, 3]], 1) == [[8]]
    # A decoder-only text has the prompt in it already.
    assert lookup([5, 6, 7], [[5, 6, 7, 5, 6]], 3) == [[7, 5, 6]]


@given(st.data())
def test_lookup_against_a_plain_search(data):
    """However the text grew, and whatever was looked up before."""
    token = st.integers(0, 3)
    source = data.draw(st.lists(token, max_size=8))
    text = data.draw(st.lists(token, min_size=1, max_size=30))
    cuts = data.draw(st.sets(st.integers(1, len(text))))
    text = [7, *text]  # it does not begin with the prompt
    found = lookup(source, [text[: cut + 1] for cut in sorted(cuts)], 4)
    for cut, got in zip(sorted(cuts), found, strict=True):
        own = text[: cut + 1]
        whole = [*source, -1, *own]
        expected = []
        for size in (4, 3, 2):
            places = [
                end
                for end in range(size, len(whole))
                if whole[end - size : end] == own[-size:] and len(own) >= size
            ]
            if places and not expected:
                follow = whole[places[-1] : places[-1] + 4]
                expected = follow[: follow.index(-1)] if -1 in follow else follow
        assert got == expected


def test_command(call, saved):
    """Checkpoints as they are, without a conversion; with a draft, lookup, nobody."""
    oracle, target = saved("gpt2")
    draft = saved("gpt2", noise=0.03)[1]
    texts = set()
    for flags in (["--draft-model", draft], ["--draft-model", LOOKUP], []):
        flags = ["--model", target, *flags, "--prompt", "the cat", "--max-tokens", 20]
        status, out, err = call(*flags)
        assert status == 0, err
        texts.add(out)
    assert "drafting by prompt lookup" in err
    status, out, _ = call(*flags, "--draft-model", "none", "--json")
    value = json.loads(out)
    assert texts == {value["text"] + "\n"}
    pair = Pair.load(str(target))
    assert value["tokens"] == generated(oracle, pair.tokenizer.encode("the cat"), 20)
    # A T5 and a model without an encoder are no pair.
    status, _, err = call(*flags, "--temperature", 1, "--num-samples", 3)
    assert status == 0, err


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} on {% endfor %}"
    "{% if add_generation_prompt %}sat{% endif %}"
)


def test_chat(call, saved, tmp_path, monkeypatch, confined_here):
    """The template is applied, and the conversation goes on from line to line."""
    oracle, folder = saved("qwen2")
    status, _, err = call("--model", folder, "--chat", "--prompt", "a")
    assert status == 2 and "no chat template" in err
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    oracle.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flags = ["--model", tmp_path, "--draft-model", LOOKUP, "--chat"]
    flags += ["--max-tokens", 6]
    first = call(*flags, "--prompt", "the cat")[1].rstrip("\n")
    pair = Pair.load(str(tmp_path))

    one = [{"role": "user", "content": "the cat"}]
    ids = pair.tokenizer.encode_chat(one)
    assert pair.tokenizer.decode(generated(oracle, ids, 6)) == first
    turns = [*one, {"role": "assistant", "content": first}]
    turns += [{"role": "user", "content": "a b"}]
    ids = pair.tokenizer.encode_chat(turns)
    second = pair.tokenizer.decode(generated(oracle, ids, 6))
    lines = b"the cat\na b\n:new\nthe cat\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    out = call(*flags, "--interactive")[1]
    assert out == f"{first}\n{second}\n{first}\n"


def test_without_mlx_lm(call, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    status, out, err = call("--model", saved("gpt2")[1], "--prompt", "a")
    assert (status, out) == (2, "")
    assert err == f"main.py: {causal.HINT}\n"


def test_damaged_checkpoints(call, saved, tmp_path):
    import shutil

    folder = saved("llama")[1]
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    status, _, err = call("--model", tmp_path / "a")
    assert status == 2 and err.count("\n") == 1 and "damaged" in err
    shutil.copytree(folder, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(
        json.dumps(config | {"model_type": "sparkle"})
    )
    status, _, err = call("--model", tmp_path / "b")
    assert status == 2 and err.count("\n") == 1 and "sparkle" in err


def test_ends(tmp_path):
    """generation_config.json, then the config, then the tokenizer; of the text model
    where a config has one."""

    def ends(config, generation=None, tokenizer=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
        return causal.eos_tokens(tmp_path, SimpleNamespace(end=tokenizer))

    assert ends({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, 8) == {6, 7}
    assert ends({"eos_token_id": 5}, {"eos_token_id": None}, 8) == {5}
    assert ends({"text_config": {"eos_token_id": [3, 4]}}, {}, 8) == {3, 4}
    assert ends({}, {"top_k": 5}, 8) == {8}
    assert ends({}) == frozenset()
    with pytest.raises(InputError, match="odd value in eos_token_id"):
        ends({}, {"eos_token_id": ["x"]})


def test_end_of_the_tokenizer(saved, tmp_path):
    """Where no config has one, as in mlx-lm."""
    oracle, _ = saved("llama")
    oracle.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | {"eos_token_id": None}))
    pair = Pair.load(str(tmp_path))
    assert pair.eos_tokens == {tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("rows, length", [(1, 250), (3, 200)])
def test_what_prefilling_takes_is_known(saved, kind, rows, length, monkeypatch):
    """Before it is tried: MLX does not survive a lack of memory."""
    loaded = causal_model.load(saved(kind, layers=4)[1])
    monkeypatch.setattr(causal_session, "PREFILL", 64)
    model = CausalSession(
        loaded.model, VOCABULARY, positions=POSITIONS, heads=loaded.heads
    )
    prompts = [[3 + (5 * i + row) % 90 for i in range(length)] for row in range(rows)]
    model.forget()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model.start(prompts)
    taken = mx.get_peak_memory() - before
    counted = model._prefill_bytes(rows, 0, length - 1, rows)
    assert 0.9 * taken < counted < 2 * taken

    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free", lambda: counted - 1)
    model.forget()
    with pytest.raises(TooLongError, match=f"has {length} tokens, for which the model"):
        model.start(prompts)
    assert len(prompts) > 1 or model.start([prompts[0][:9]])  # goes on with the next


def test_room_for_an_answer(saved):
    pair = Pair.load(str(saved("gpt2")[1]))
    length = len(pair.tokenizer.encode("the cat sat on the cat"))
    pair.require_positions("the cat sat on the cat", POSITIONS - length)
    with pytest.raises(TooLongError, match=f"leave {POSITIONS - length} for an answer"):
        pair.require_positions("the cat sat on the cat", POSITIONS - length + 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equal_prompts_are_prefilled_once(saved, kind, monkeypatch):
    """And what they begin with in common with the text before is not fed again."""
    alone, together = (session(saved(kind)[1]) for _ in range(2))
    long = [3 + (5 * i) % 90 for i in range(40)]
    fed = []
    extend = together.extend

    def watched(tokens):
        fed.append(tokens.shape)
        return extend(tokens)

    monkeypatch.setattr(together, "extend", watched)
    together.start([long[:30]])
    for prompts, expected in (
        ([long] * 3, [(1, 29), (1, 10)]),
        ([long, long[:7], long], [(2, 39)]),
        ([[5]] * 2, []),
    ):
        assert together.start(prompts) == prompts
        assert fed == expected
        fed.clear()
        block = mx.array([[*prompt[-1:], 9, 10] for prompt in prompts])
        logits = extend(block)
        for row, prompt in enumerate(prompts):
            alone.start([prompt])
            theirs = alone.extend(block[row : row + 1])
            assert mx.allclose(logits[row : row + 1], theirs, atol=1e-4).item()
        together.rewind([len(prompt) for prompt in prompts])
        assert together.lengths == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("name", ["take", "__init__", "rewind", "update_and_fetch"])
def test_interrupted_starts_leave_nothing_behind(saved, name, monkeypatch):
    """Wherever it was: the next prompt is answered as if nothing had been."""
    model = causal_model.load(saved("llama", layers=3)[1]).model
    text = [3 + (5 * i) % 90 for i in range(30)]
    fresh = CausalSession(model, VOCABULARY)
    fresh.start([text])
    expected = fresh.extend(mx.array([text[-1:]]))
    real = getattr(RowCache, name)
    for place in range(8):
        tested = CausalSession(model, VOCABULARY)
        tested.start([text[:20]])
        left = [place]

        def interrupted(self, *arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(self, *arguments)

        for prompts in ([text[:25]] * 3, [text[:9], text[9:]]):
            left[0] = place
            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(RowCache, name, interrupted)
                tested.start(prompts)
            tested.start([text])
            got = tested.extend(mx.array([text[-1:]]))
            assert mx.allclose(got, expected, atol=1e-4).item()

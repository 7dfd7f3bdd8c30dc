"""A target that several processes hold together is the one that a process holds alone.

The oracles are transformers, and one process of this program: what is divided may make
no difference, token for token. What a rank has of each matrix is checked against a
description of the matrices that is this file's own.
"""

import fcntl
import json
import math
import os
from argparse import Namespace

import mlx.core as mx
import numpy as np
import parallel_jobs
import pytest
import torch
from conftest import TINY
from hypothesis import assume, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from parallel_jobs import BLOCKS, KEPT, SOURCES, blocks
from ranked import asked_in

import convert
import pair
from architectures import parallel, t5
from architectures.loading import USUAL
from architectures.parameters import parameter_shapes
from architectures.parts import Share
from checkpoints.config import Quantization, T5Config
from model import T5, attend
from system.errors import InputError

#: Relative to the largest logit: of one process, and of transformers (as test_model.py
#: has it).
SAME, TOLERANCE = 1e-5, 1e-4

GATED = {"untied": True, "feed_forward_proj": "gated-gelu"}
LAYOUTS = {
    "t5": {"seed": 20},
    "t5 1.1": {"seed": 3, **GATED},
    "mt5": {"seed": 11, "kind": "mt5", **GATED},
    "umt5": {"seed": 11, "kind": "umt5", **GATED},
    "three heads": {"seed": 9, "num_heads": 3, "d_kv": 16, "d_ff": 50},
    "five heads": {"seed": 12, "num_heads": 5, "d_ff": 47, **GATED},
    "one head": {"seed": 19, "num_heads": 1, "d_kv": 64, "d_ff": 3},
}
#: Whose texts are compared in every way, in two ranks; the others' in a few.
IN_EVERY_WAY = "five heads"

WIDE = {"seed": 11, "d_model": 128, "d_kv": 32, "d_ff": 384}
#: How targets are quantized: fields of the model, how, and whether products are of
#: packed matrices, as on a GPU.
QUANTIZED = {
    "groups of two heads": (WIDE, Quantization("affine", 4, 64), True),
    "groups of four heads": (WIDE, Quantization("affine", 8, 128), True),
    "floating point": (WIDE | {"num_heads": 3}, Quantization("mxfp4", 4, 32), True),
    "some no whole groups": (
        {"seed": 20, "d_model": 64, "num_heads": 8, "d_ff": 80},
        Quantization("affine", 8, 64),
        True,
    ),
    "unpacked": (WIDE | {"d_ff": 192} | GATED, Quantization("affine", 4, 64), False),
}


def job(make, name, wanted, **how):
    model, draft = make(**LAYOUTS[name])[2], make(noise=0.05, **LAYOUTS[name])[2]
    return {"model": str(model), "draft": str(draft), "wanted": wanted, "how": how}


def alone(job, monkeypatch=None):
    """What one process finds out."""
    if job.get("packed"):
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    return parallel_jobs.ask(job)


def error_of(ours, reference):
    """The largest difference of two passes, relative to the largest number."""
    ours, reference = np.array(ours), np.array(reference)
    assert np.isfinite(ours).all()
    return np.abs(ours - reference).max() / np.abs(reference).max()


def logits_of(oracle):
    """What transformers has for the passes of :func:`parallel_jobs.logits`."""
    *passes, last = map(np.array, blocks())
    longest = max(map(len, SOURCES))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in SOURCES])
    mask = torch.tensor([[i < len(s) for i in range(longest)] for s in SOURCES])

    def run(rows, tokens):
        with torch.no_grad():
            return oracle(
                input_ids=ids[rows],
                attention_mask=mask[rows].long(),
                decoder_input_ids=torch.tensor(tokens),
            ).logits.numpy()

    fed = np.concatenate(passes, axis=1)
    together = run([0, 1, 2], fed)
    found = np.split(together, np.cumsum(BLOCKS)[:-1], axis=1)
    rows = []
    for row, kept in enumerate(KEPT):
        again = np.concatenate([fed[row, :kept], last[row]])[None]
        rows.append(run([row], again)[0, kept:])
    return [*found, np.array(rows)]


def found_by(count, jobs, folders):
    """What so many ranks find out: by the jobs' names each job and its findings. It
    takes a minute: once for all processes of the tests."""
    folder = folders.mktemp("ranks")
    kept = folder / "found.json"
    if "PYTEST_XDIST_WORKER" in os.environ:
        kept = folders.getbasetemp().parent / f"found by {count} ranks.json"
    with kept.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not kept.stat().st_size:
            json.dump(asked_in(count, list(jobs.values()), folder), file)
        file.seek(0)
        found = json.load(file)
    both = zip(jobs.values(), found, strict=True)
    return dict(zip(jobs, both, strict=True))


@pytest.fixture(scope="module")
def by_two(make, tmp_path_factory):
    """What two ranks find out of each layout, and of more."""
    jobs = {}
    for name in LAYOUTS:
        ways = "texts" if name == IN_EVERY_WAY else "few_texts"
        jobs[name] = job(make, name, ["logits", ways])
    jobs["counts"] = job(make, "t5", ["counts", "errors"])
    jobs["compiled"] = job(make, "t5", ["logits", "few_texts"], compiled=True)
    for dtype in ("float16", "bfloat16"):
        jobs[dtype] = job(make, "t5 1.1", ["logits", "few_texts"], dtype=dtype)
    for name, (fields, how, packed) in QUANTIZED.items():
        source, draft = make(**fields)[1], make(noise=0.05, **fields)[2]
        folder = tmp_path_factory.mktemp("packed")
        convert.convert(source, folder / "mlx", "float32", how)
        models = {"model": str(folder / "mlx"), "draft": str(draft)}
        wanted = ["logits", "few_texts"]
        jobs[name] = models | {"packed": packed, "wanted": wanted}
    return found_by(2, jobs, tmp_path_factory)


@pytest.fixture(scope="module")
def by_four(make, tmp_path_factory):
    """What four ranks find out of each layout. (They take turns where there are fewer
    cores, and each sum takes as long as that: so there are few texts.)"""
    jobs = {name: job(make, name, ["logits"]) for name in LAYOUTS}
    jobs["five heads"]["wanted"].append("few_texts")
    return found_by(4, jobs, tmp_path_factory)


@pytest.fixture
def divided(request, by):
    """What ranks find out, as many as the parameter ``by`` says."""
    return request.getfixturevalue(by)


BOTH = pytest.mark.parametrize("by", ["by_two", "by_four"])


@BOTH
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits(divided, make, name):
    """Of rank 0: prompts of several lengths, passes over any number of tokens, and rows
    that were rewound to different lengths."""
    asked, found = divided[name]
    whole = alone(asked | {"wanted": ["logits"]})["logits"]
    theirs = logits_of(make(**LAYOUTS[name])[0])
    assert len(found["logits"]) == len(whole) == len(theirs) == len(BLOCKS) + 1
    for ours, one, oracle in zip(found["logits"], whole, theirs, strict=True):
        assert error_of(ours, one) < SAME
        assert error_of(ours, oracle) < TOLERANCE


@pytest.mark.parametrize(
    "by, name", [*(("by_two", name) for name in LAYOUTS), ("by_four", "five heads")]
)
def test_texts(divided, name):
    """Token for token, in every way to decode, whatever is drafted."""
    asked, found = divided[name]
    whole = alone(asked)
    ways = asked["wanted"][1]
    for way, tokens in whole[ways].items():
        assert found[ways][way] == tokens, way
    found = found[ways]
    if ways == "few_texts":
        found = {"plain": found["0"], "three drafted": found["3"]}
    for way in ("three drafted", "auto", "hostile", "other numbers"):
        assert found.get(way, found["plain"]) == found["plain"]
    for beams in (2, 4):
        plain, drafted = (found.get(f"{beams} beams, {n} drafted") for n in (0, 3))
        assert plain == drafted
    assert any(len(set(text)) > 3 for text in found["plain"])


def test_compiled_passes(by_two):
    """As exact as others."""
    asked, found = by_two["compiled"]
    whole = alone(asked | {"how": {}})
    assert found["few_texts"] == whole["few_texts"]
    for ours, one in zip(found["logits"], whole["logits"], strict=True):
        assert error_of(ours, one) < SAME


@pytest.mark.parametrize("dtype, most", [("float16", 0.02), ("bfloat16", 0.1)])
def test_half_precision(by_two, dtype, most):
    """Sums of parts that are rounded one by one are other numbers than a sum that is
    rounded once: within the rounding of one process, which float32 is the measure of.
    """
    asked, found = by_two[dtype]
    exact = alone(asked | {"how": {}, "wanted": ["logits"]})["logits"]
    rounded = alone(asked | {"wanted": ["logits"]})["logits"]
    for ours, one, reference in zip(found["logits"], rounded, exact, strict=True):
        assert error_of(ours, reference) < max(most, 3 * error_of(one, reference))
    for texts in found["few_texts"].values():
        assert all(1 <= len(text) <= parallel_jobs.LONG for text in texts)


def test_how_often_ranks_meet(by_two):
    """Two sums an encoder layer, three a decoder layer and one for the tokens; and one
    message a round, however much of it there is to do before."""
    found = by_two["counts"][1]["counts"]
    layers = found["decoder layers"]
    assert found["encoding"] == 2 * found["encoder layers"]
    for kind in ("one token", "five", "tree"):
        assert found[kind] == 3 * layers + 1
    for kind in ("plain", "drafted", "beams"):
        assert len(found[kind]) > 2
        told = [messages for _, messages in found[kind]]
        # Where the next round was begun ahead, a step may have nothing left to say.
        assert max(told) == 1 and sum(told) >= len(told) - 1, found[kind]


def test_prompts_that_are_refused(by_two):
    """Before any rank begins with them: then the next one is answered."""
    asked, found = by_two["counts"]
    assert found["errors"] == alone(asked | {"wanted": ["errors"]})["errors"]
    assert "empty" in found["errors"][0] and "1000000" in found["errors"][1]


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_each_rank_has(make, name, size):
    """Its share alone: what is divided where it divides, and the embedding and norms,
    which all have. An output head of its own has rank 0."""
    folder = make(**LAYOUTS[name])[2]
    config = T5Config.read(folder)
    shapes = parameter_shapes(T5(config, "untied" not in LAYOUTS[name]))
    heads, head, columns, everywhere = (
        4 * sum(math.prod(shapes[key]) for key in shapes if kind == kind_of(key))
        for kind in ("heads", "head", "columns", "everywhere")
    )
    all_held = []
    for rank in range(size):
        model = t5.load(folder, USUAL._replace(ranks=Rank(rank, size)))
        held = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        most = everywhere + (head if rank == 0 else 0)
        most += heads // config.num_heads * -(-config.num_heads // size)
        most += columns // config.d_ff * -(-config.d_ff // size)
        assert held <= most
        if config.num_heads % size == config.d_ff % size == 0:
            assert held == most
        all_held.append(held)
    if config.num_heads >= size and config.d_ff >= size:
        assert sum(all_held) == heads + columns + head + size * everywhere


def kind_of(name):
    """What of a T5 a tensor belongs to, by its name."""
    if name.startswith("head."):
        return "head"
    if "norm" in name or name.startswith("embedding."):
        return "everywhere"
    return "columns" if "feed_forward" in name else "heads"


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_targets(by_two, monkeypatch, name):
    asked, found = by_two[name]
    whole = alone(asked, monkeypatch)
    assert found["few_texts"] == whole["few_texts"]
    for ours, one in zip(found["logits"], whole["logits"], strict=True):
        assert error_of(ours, one) < SAME


# What is whose, in one process.


def shares(config, size, groups=False):
    return [Share.of(config, rank, size, groups) for rank in range(size)]


def config_of(group=64, **fields):
    values = TINY | {"model_type": "t5", "feed_forward_proj": "relu"} | fields
    found = T5Config.from_dict(values, {})
    return found, Quantization("affine", 8, group)


SIZES = st.integers(1, 9)


@given(
    heads=st.integers(1, 40),
    d_kv=st.sampled_from([1, 8, 32, 48, 64, 80, 128]),
    d_ff=st.integers(1, 300),
    size=SIZES,
)
def test_shares_are_a_whole(heads, d_kv, d_ff, size):
    """What counts has every head and column once, in order, about as much each."""
    config, _ = config_of(num_heads=heads, d_kv=d_kv, d_ff=d_ff)
    every = shares(config, size)
    for count, ranges in (
        (heads, [(share.heads, share.silent_heads) for share in every]),
        (d_ff, [(share.columns, share.silent_columns) for share in every]),
    ):
        covered = [n for part, silent in ranges if not silent for n in range(*part)]
        assert covered == list(range(count))
        lengths = [stop - first for (first, stop), silent in ranges if not silent]
        assert max(lengths) - min(lengths) <= 1
        for (first, stop), _ in ranges:
            assert 0 <= first < stop <= count  # no arrays of nothing
    assert [share.head for share in every] == [True] + [False] * (size - 1)


@given(
    heads=st.integers(1, 24),
    d_kv=st.sampled_from([8, 32, 48, 64, 80, 128]),
    d_ff=st.integers(1, 600),
    group=st.sampled_from([32, 64, 128]),
    size=SIZES,
)
def test_shares_of_whole_groups(heads, d_kv, d_ff, group, size):
    """Where columns are quantized no group of them is divided. Where they are no whole
    groups they are not quantized, but others may be: nothing is lost."""
    config, how = config_of(group, num_heads=heads, d_kv=d_kv, d_ff=d_ff)
    config = T5Config(**vars(config) | {"quantization": how})
    every = shares(config, size, groups=True)
    for count, each, ranges in (
        (heads, d_kv, [(share.heads, share.silent_heads) for share in every]),
        (d_ff, 1, [(share.columns, share.silent_columns) for share in every]),
    ):
        covered = [n for part, silent in ranges if not silent for n in range(*part)]
        assert covered == list(range(count))
        for (first, stop), _ in ranges:
            assert 0 <= first < stop <= count
            if count * each % group == 0:
                assert first * each % group == stop * each % group == 0


def described(config, gated, tied, rng):
    """Matrices of a layout, and what of each belongs to some heads and columns: the
    layout as README and model.py have it, in numpy."""
    heads, size, wide, d_ff = (
        config.num_heads,
        config.d_kv,
        config.d_model,
        config.d_ff,
    )
    times = 2 if gated else 1

    def draw(*shape):
        return rng.integers(0, 1000, shape).astype(np.float32)

    def rows(count, each):
        """``count`` matrices on top of each other, each of the heads' rows."""
        parts = [draw(each, size, wide) for _ in range(count)]
        whole = np.concatenate([part.reshape(-1, wide) for part in parts])

        def some(heads, _):
            kept = [part[slice(*heads)].reshape(-1, wide) for part in parts]
            return np.concatenate(kept)

        return whole, some

    def o():
        parts = draw(wide, heads, size)
        return parts.reshape(wide, -1), lambda of, _: parts[:, slice(*of)].reshape(
            wide, -1
        )

    def wi():
        parts = [draw(d_ff, wide) for _ in range(times)]
        return np.concatenate(parts), lambda _, of: np.concatenate(
            [part[slice(*of)] for part in parts]
        )

    def wo():
        whole = draw(wide, d_ff)
        return whole, lambda _, of: whole[:, slice(*of)]

    def all_of(*shape):
        whole = draw(*shape)
        return whole, lambda *_: whole

    def bias():
        whole = draw(config.num_buckets, heads)
        return whole, lambda of, _: whole[:, slice(*of)]

    found = {"embedding.weight": all_of(config.vocab_size, wide)}
    if not tied:
        found["head.weight"] = all_of(config.vocab_size, wide)
    for stack, layers, cross in (
        ("encoder", config.num_layers, False),
        ("decoder", config.num_decoder_layers, True),
    ):
        found[f"{stack}.norm.weight"] = all_of(wide)
        numbers = [""] if config.shared_bias else [f".{n}" for n in range(layers)]
        for number in numbers:
            found[f"{stack}.position_bias{number}.weight"] = bias()
        for n in range(layers):
            layer = f"{stack}.layers.{n}"
            found[f"{layer}.attention_norm.weight"] = all_of(wide)
            found[f"{layer}.attention.qkv.weight"] = rows(3, heads)
            found[f"{layer}.attention.o.weight"] = o()
            if cross:
                found[f"{layer}.cross_attention_norm.weight"] = all_of(wide)
                found[f"{layer}.cross_attention.q.weight"] = rows(1, heads)
                found[f"{layer}.cross_attention.kv.weight"] = rows(2, heads)
                found[f"{layer}.cross_attention.o.weight"] = o()
            found[f"{layer}.feed_forward_norm.weight"] = all_of(wide)
            found[f"{layer}.feed_forward.wi.weight"] = wi()
            found[f"{layer}.feed_forward.wo.weight"] = wo()
    return found


def cut(whole, part):
    """What a part is of an array."""
    if part is None:
        return whole
    if not part.ranges:
        return None
    taken = [np.arange(*each) for each in part.ranges]
    return np.take(whole, np.concatenate(taken), axis=part.axis)


@given(
    kind=st.sampled_from(["t5", "umt5"]),
    gated=st.booleans(),
    tied=st.booleans(),
    heads=st.integers(1, 7),
    d_kv=st.sampled_from([1, 3, 8]),
    d_ff=st.integers(1, 20),
    size=SIZES,
)
def test_parts_of_every_tensor(kind, gated, tied, heads, d_kv, d_ff, size):
    config, _ = config_of(
        model_type=kind,
        num_heads=heads,
        d_kv=d_kv,
        d_ff=d_ff,
        d_model=6,
        vocab_size=7,
        num_decoder_layers=1,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    tensors = described(config, gated, tied, np.random.default_rng(0))
    shapes = parameter_shapes(T5(config, tied))
    assert shapes == {name: whole.shape for name, (whole, _) in tensors.items()}
    for share in shares(config, size):
        parts = share.parts({k: mx.array(whole) for k, (whole, _) in tensors.items()})
        for name, (whole, some) in tensors.items():
            mine = cut(whole, parts.get(name))
            if name == "head.weight" and not share.head:
                assert mine is None
            else:
                np.testing.assert_array_equal(mine, some(share.heads, share.columns))
        left = parameter_shapes(T5(share.config, tied or not share.head))
        for name, shape in left.items():
            assert cut(tensors[name][0], parts.get(name)).shape == shape


@given(
    heads=st.sampled_from([2, 3, 4, 6]),
    columns=st.sampled_from([128, 256, 384]),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    size=SIZES,
)
def test_parts_of_packed_tensors(heads, columns, bits, group, size):
    """A part of what is packed is what it would be if packed by itself: unpacked it is
    the part of what was unpacked."""
    assume(heads * 64 % group == 0)
    config, _ = config_of(num_heads=heads, d_kv=64, d_ff=columns, d_model=128)
    how = Quantization("affine", bits, group)
    config = T5Config(**vars(config) | {"quantization": how})
    rng = np.random.default_rng(1)
    layer = "decoder.layers.0"
    inner = heads * 64
    for path, shape in {
        f"{layer}.attention.qkv": (3 * inner, 128),
        f"{layer}.attention.o": (128, inner),
        f"{layer}.cross_attention.kv": (2 * inner, 128),
        f"{layer}.cross_attention.o": (128, inner),
        f"{layer}.feed_forward.wi": (columns, 128),
        f"{layer}.feed_forward.wo": (128, columns),
    }.items():
        matrix = mx.array(rng.normal(size=shape).astype(np.float32))
        stored = mx.quantize(matrix, group_size=group, bits=bits)
        names = [f"{path}.{kind}" for kind in ("weight", "scales", "biases")]
        whole = np.array(mx.dequantize(*stored, group_size=group, bits=bits))
        for share in shares(config, size, groups=True):
            parts = share.parts(dict(zip(names, stored, strict=True)))
            mine = [
                mx.array(cut(np.array(array), parts.get(name)))
                for name, array in zip(names, stored, strict=True)
            ]
            ours = np.array(mx.dequantize(*mine, group_size=group, bits=bits))
            first, stop = share.heads
            if path.endswith(("qkv", "kv")):
                each = whole.reshape(-1, heads, 64, 128)[:, first:stop]
                expected = each.reshape(-1, 128)
            elif path.endswith(".o"):
                expected = whole[:, 64 * first : 64 * stop]
            elif path.endswith(".wi"):
                expected = whole[slice(*share.columns)]
            else:
                expected = whole[:, slice(*share.columns)]
            np.testing.assert_array_equal(ours, expected)


class Rank:
    """What loading asks of the ranks."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def add_up(self, part):
        return part  # the test does it


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("name", ["t5", "umt5", "five heads", "one head"])
def test_contributions_add_up(make, name, size):
    """What each share contributes to a layer, added up here instead of by MLX, is what
    the whole layer does; nobody's is counted twice."""
    folder = make(**LAYOUTS[name])[2]
    whole = t5.load(folder)
    every = [
        t5.load(folder, USUAL._replace(ranks=Rank(rank, size))) for rank in range(size)
    ]
    rng = np.random.default_rng(2)
    x = mx.array(rng.normal(size=(6, TINY["d_model"])).astype(np.float32))
    source = mx.array(rng.normal(size=(2, 5, TINY["d_model"])).astype(np.float32))
    nothing = mx.zeros_like(x)

    def attended(model, stack, number):
        """Of three positions of two rows, of themselves and of a source."""
        layer = model[stack].layers[number]
        bias = model[stack].biases(np.arange(-2, 3))
        bias = bias[number % len(bias)][None, :, [[2, 3, 4], [1, 2, 3], [0, 1, 2]]]
        q, k, v = layer.attention.project(layer.attention_norm(x), 2)
        yield layer.attention.merge(nothing, attend(q, k, v, bias))
        if stack == "decoder":
            cross = layer.cross_attention
            q = cross.project_query(layer.cross_attention_norm(x), 2)
            yield cross.merge(nothing, attend(q, *cross.project_source(source), None))
        yield layer.feed_forward(nothing, layer.feed_forward_norm(x))

    for stack in ("encoder", "decoder"):
        for number in range(len(whole[stack].layers)):
            parts = [list(attended(model, stack, number)) for model in every]
            for place, expected in enumerate(attended(whole, stack, number)):
                added = sum(np.array(part[place]) for part in parts)
                assert error_of(added, np.array(expected)) < SAME


def test_what_does_not_count_is_not_added():
    """Even numbers that are none."""
    odd = parallel.Summed(lambda y: y * math.inf, Rank(1, 2), silent=True)
    assert odd.add_to(mx.ones(3), mx.ones(3)).tolist() == [1, 1, 1]


def test_a_part_has_no_more_parameters(make):
    """Nor does it keep what it was cut from."""
    folder = make(**LAYOUTS["t5 1.1"])[2]
    one = t5.load(folder, USUAL._replace(ranks=Rank(1, 2)))
    names = {name for name, _ in tree_flatten(one.parameters())}
    assert not any(name.startswith("head.") for name in names)


def test_a_second_target_is_refused(monkeypatch):
    """The others follow the first one: nobody would answer."""
    monkeypatch.setattr(pair, "meet", lambda: Namespace(rank=0, size=2, together=True))
    with pytest.raises(InputError, match="hold a target already"):
        pair.Pair.load("nowhere")

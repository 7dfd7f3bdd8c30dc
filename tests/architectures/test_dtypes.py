"""What a T5 computes in, where somebody says it."""

import mlx.core as mx
import numpy as np
import pytest
from test_family import GATED, PROMPT, Member, on_a_gpu, publish

import convert
from architectures import causal, t5
from architectures.loading import Loading
from architectures.slim import is_slim
from architectures.t5_session import T5Session
from checkpoints.config import Quantization
from console import choosing
from pair import Pair
from system import device
from system.errors import InputError

HALF = Loading(dtype="float16")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint, in each dtype and packed."""
    folder = tmp_path_factory.mktemp("dtypes")
    fields = GATED | {"d_model": 128, "d_kv": 32, "d_ff": 128}
    publish(Member(fields=fields), folder / "hf")
    for dtype in ("float32", "float16", "bfloat16"):
        convert.convert(folder / "hf", folder / dtype, dtype)
    packed = Quantization.choose(bits=8)
    convert.convert(folder / "hf", folder / "packed", "bfloat16", packed)
    return folder


def logits(model) -> np.ndarray:
    session = T5Session(model)
    session.start([[5, 6, 7, 1]])
    return np.array(session.extend(mx.array([[0, 5, 7, 9]])).astype(mx.float32))


def test_float16_is_what_is_converted_to_it(stored, monkeypatch):
    """Tensor for tensor and bit for bit, the wide ones as well."""
    on_a_gpu(monkeypatch)
    converted = t5.load(stored / "float16")
    loaded = t5.load(stored / "float32", HALF)
    wo = loaded.decoder.layers[0].feed_forward.wo
    assert loaded.dtype == mx.float16 and wo.weight.dtype == mx.float32
    np.testing.assert_array_equal(
        wo.weight, converted.decoder.layers[0].feed_forward.wo.weight
    )
    np.testing.assert_array_equal(logits(loaded), logits(converted))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["bfloat16", "packed"])
def test_near_to_float32(stored, monkeypatch, source, dtype):
    """Packed integers stay what they are; on a CPU they are unpacked."""
    exact = logits(t5.load(stored / source))
    on_cpu = t5.load(stored / source, Loading(dtype=dtype))
    assert on_cpu.dtype == getattr(mx, dtype)
    on_a_gpu(monkeypatch)
    on_gpu = t5.load(stored / source, Loading(dtype=dtype))
    assert on_gpu.dtype == getattr(mx, dtype)
    if source == "packed":
        layer = on_gpu.encoder.layers[0]
        assert layer.attention.qkv.weight.dtype == mx.uint32
        assert layer.attention.qkv.scales.dtype == getattr(mx, dtype)
        wide = mx.float32 if dtype == "float16" else getattr(mx, dtype)
        assert layer.feed_forward.wo.scales.dtype == wide
    bound = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}[dtype]
    for model in (on_cpu, on_gpu):
        assert np.abs(logits(model) - exact).max() < bound * np.abs(exact).max()


def test_whole_programs(stored, call):
    """A CPU does what it is told, and small models are not slimmed in half precision;
    what was measured in one dtype is not taken for another."""
    flags = ("--prompt", PROMPT, "--max-tokens", "8", "--draft-model", "none")
    texts = {
        call("--model", stored / "bfloat16", *flags, "--dtype", dtype)[:2]
        for dtype in ("auto", "float32", "float16", "bfloat16")
    }
    assert {status for status, _ in texts} == {0}
    status, _, err = call("--model", stored / "bfloat16", *flags, "--dtype", "int8")
    assert status == 2 and "invalid choice: 'int8'" in err
    pairs = [Pair.load(str(stored / "bfloat16"), dtype=d) for d in (None, "float16")]
    assert [is_slim(pair.target.model) for pair in pairs] == [True, False]
    assert pairs[0]._subject != pairs[1]._subject


def test_numbers_beyond_float16(tmp_path, call):
    def enlarge(oracle) -> None:
        oracle.lm_head.weight[3, 3] = 1e6

    publish(Member(), tmp_path / "hf", change=enlarge)
    convert.convert(tmp_path / "hf", tmp_path / "mlx", "float32")
    status, out, err = call("--model", tmp_path / "mlx", "--dtype", "float16")
    assert (status, out) == (2, "")
    assert "head.weight has numbers beyond float16: give another --dtype" in err


def test_unpacked_numbers_beyond_float16(tmp_path):
    """Which show when they are unpacked."""

    def enlarge(oracle) -> None:
        oracle.decoder.block[0].layer[0].SelfAttention.q.weight[3, 3] = 1e5

    fields = GATED | {"d_model": 128, "d_kv": 32, "d_ff": 128}
    publish(Member(fields=fields), tmp_path / "hf", change=enlarge)
    packed = Quantization.choose("mxfp8")
    convert.convert(tmp_path / "hf", tmp_path / "mlx", "bfloat16", packed)
    with pytest.raises(InputError, match=r"qkv\.weight has numbers beyond float16"):
        t5.load(tmp_path / "mlx", HALF)
    assert t5.load(tmp_path / "mlx").dtype == mx.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_numbers_are_rounded_once(stored, dtype):
    """On a CPU: what float32 has of them, in the dtype."""
    whole = t5.load(stored / "packed", Loading(dtype="float32"))
    half = t5.load(stored / "packed", Loading(dtype=dtype))
    for model in (whole, half):
        assert "scales" not in model.embedding
    kind = getattr(mx, dtype)
    assert mx.array_equal(
        whole.encoder.layers[0].attention.qkv.weight.astype(kind),
        half.encoder.layers[0].attention.qkv.weight,
    )


@pytest.mark.parametrize("dtype", ["auto", "int8", "float64", ""])
def test_dtypes_that_are_none(stored, dtype):
    with pytest.raises(InputError, match=r"dtype is .* it has to be None or one of"):
        Pair.load(str(stored / "float32"), dtype=dtype)


@pytest.mark.parametrize("how", [HALF, Loading(compiled=True)])
def test_models_that_are_no_t5(tmp_path, how):
    with pytest.raises(InputError, match=r"is no T5.*--dtype and --compile are for T5"):
        causal.open_session(tmp_path, None, 5, how)


@pytest.mark.parametrize(
    "architecture, emulates",
    [("applegpu_g13s", True), ("applegpu_g14g", True), ("applegpu_g15p", False)],
)
def test_a_mac_without_bfloat16(stored, monkeypatch, call, architecture, emulates):
    """It is told of float16, if that is what its weights are in."""
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert device.emulates_bfloat16() == emulates
    monkeypatch.undo()
    monkeypatch.setattr(choosing, "emulates_bfloat16", lambda: emulates)
    on_a_gpu(monkeypatch)
    for name, dtype, hinted in (
        ("bfloat16", "auto", emulates),
        ("bfloat16", "float16", False),
        ("float32", "auto", False),
    ):
        flags = ("--model", stored / name, "--draft-model", "none", "--dtype", dtype)
        err = call(*flags, "--prompt", PROMPT, "--max-tokens", "2")[2]
        assert ("--dtype float16 may be faster" in err) == hinted

"""What a decoder pass reads of the weights: each matrix that it needs, once, as it is.

For large models that is what a pass takes: it reads every weight, and computes little.
"""

import mlx.core as mx
import pytest
from counting import (
    FORMS,
    LAYOUTS,
    Graph,
    begin,
    cpu,
    load,
    unevaluated,
)
from mlx.utils import tree_flatten

from architectures.parameters import linear_paths, quantize
from checkpoints.config import QUANTIZED, Quantization

PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul"}
#: The kinds of operations that a row of the embedding is read by.
ROWS = {"Gather", "GatherAxis"}


@pytest.fixture(autouse=True)
def device():
    with cpu():
        yield


def arrays_of(model):
    """Every array that the model holds, its constants too, by name."""
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in model.named_modules()
        for key, value in module.items()
        if isinstance(value, mx.array)
    }


def needed(model):
    """The modules whose matrices a decoder pass needs."""
    head = "head" if "head" in model else "embedding"
    return {
        path
        for path, module in model.named_modules()
        if (path.startswith("decoder.layers") and path.endswith((".q", ".o", "qkv")))
        or (path.startswith("decoder.layers") and path.endswith((".wi", ".wo")))
        or path == head
    }


def smallest(config):
    """How many numbers a decoder pass has to multiply with."""
    inner = config.num_heads * config.d_kv
    layer = (3 + 1 + 1 + 1) * inner * config.d_model
    layer += (3 if config.gated else 2) * config.d_ff * config.d_model
    return config.num_decoder_layers * layer + config.vocab_size * config.d_model


#: Bytes of a number; with 4 bits, groups of 32 have a float32 scale and bias each.
WIDTHS = {"float32": 4, "bfloat16": 2, "4 bits": 4 / 8 + 2 * 4 / 32}
#: In which numbers the matrices are; only GPUs have others than float32.
NUMBERS = [
    *((form, "float32") for form in FORMS),
    ("gpu", "bfloat16"),
    ("gpu", "4 bits"),
]


@pytest.mark.parametrize("size", [1, 5], ids=["one-token", "five-tokens"])
@pytest.mark.parametrize("form, numbers", NUMBERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_matrix_is_read_once(make, monkeypatch, layout, form, numbers, size):
    """A matrix that is cast, copied, made whole again of its 4 bits, or read twice; one
    that no decoder pass needs; a copy of one, made before."""
    folder = make(**LAYOUTS[layout] | {"d_ff": 64})[2]
    session = load(folder, form, monkeypatch)
    model = session.model
    if numbers == "bfloat16":
        model.set_dtype(mx.bfloat16)
    elif numbers == "4 bits":
        quantize(model, Quantization.choose(group_size=32), linear_paths(model))
    mx.eval(model.parameters())
    begin(session, 1)
    weights = arrays_of(model)
    caches = {
        f"caches.{name}": array
        for name, array in tree_flatten([vars(cache) for cache in session._caches])
    }
    unevaluated(monkeypatch)
    logits = session.extend(mx.array([[*range(30, 30 + size)]]))
    biases = {f"bias.{n}": bias for n, bias in enumerate(session._biases())}
    graph = Graph(logits, **weights, **caches, **biases)

    assert logits.dtype == (mx.bfloat16 if numbers == "bfloat16" else mx.float32)
    read = {
        name: graph.readers(name)
        for name, array in weights.items()
        if array.ndim > 1 and (min(array.shape) > 1 or name.endswith(QUANTIZED))
    }
    wanted = needed(model)
    for name, readers in read.items():
        module, _, part = name.rpartition(".")
        products = [kind for kind in readers if kind in PRODUCTS]
        others = [kind for kind in readers if kind not in PRODUCTS]
        once = module in wanted and part in QUANTIZED
        assert len(products) == once, (
            f"{name} is read by {readers}, a product is {once}"
        )
        if module == "embedding":
            assert len(others) == 1 and set(others) <= ROWS, f"{name}: {others}"
        else:
            assert not others, f"{name} is read by {others}"

    # And nothing else is multiplied that was there before.
    known = {*weights, *caches, *biases}
    for number, kind in graph.kinds.items():
        if kind in PRODUCTS:
            for array in map(graph.source, graph.inputs[number]):
                assert array in known or array in graph.maker, (
                    f"{kind}: what is {array}?"
                )

    multiplied = [name for name in read if set(read[name]) & PRODUCTS]
    now = sum(weights[name].nbytes for name in multiplied)
    assert now == smallest(model.config) * WIDTHS[numbers], f"{now} bytes are read"

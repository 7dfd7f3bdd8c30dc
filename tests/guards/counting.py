"""What MLX is asked to do: the operations of a graph, and when the host waits.

Nothing here is timed: what is counted is the same on every device, a GPU's form of a
graph included.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from architectures import t5
from architectures.slim import slim
from architectures.t5_session import T5Session

#: The layouts: ReLU and a tied head; a gate and a head of its own.
LAYOUTS = {
    "t5 1.0": {"seed": 8},
    "t5 1.1": {"seed": 3, "untied": True, "feed_forward_proj": "gated-gelu"},
}
#: As a GPU runs a model, as a CPU does, and as a CPU does if the model is small.
FORMS = ("gpu", "cpu", "slim")
#: Of different lengths: together they are padded.
PROMPTS = [[10, 11, 12, 1], [*range(24, 32), 1], [31, 32, 33, 34, 1], [7, 1]]
#: What is cached of the texts that answer them.
LENGTHS = (6, 4, 6, 5)
#: No end of the sequence.
NEVER = frozenset({-1})
#: What another array of the same numbers is read through, without a copy.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"}
VIEWS |= {"Transpose", "Unflatten"}


class Graph:
    """The operations that arrays stand for as long as they are not evaluated.

    Attributes:
        kinds: by the number of an operation, what it is.
        inputs: likewise the arrays that it reads, in order.
        maker: by an array, the operation that it comes of.
    """

    def __init__(self, *arrays: mx.array, **names: mx.array):
        """``names``: of arrays that may be read in it; others are given letters."""
        file = io.StringIO()
        mx.export_to_dot(file, *arrays, **names)
        text = file.getvalue()
        self.kinds = dict(re.findall(r'(\d+) \[label ="(\w+)"', text))
        self.inputs: dict[str, list[str]] = {number: [] for number in self.kinds}
        self.maker: dict[str, str] = {}
        for start, end in re.findall(r'"?([^"\s]+)"? -> "?([^"\s]+)"?', text):
            if end in self.kinds:
                self.inputs[end].append(start)
            else:
                self.maker[end] = start

    def __len__(self) -> int:
        return len(self.kinds)

    def counter(self) -> Counter[str]:
        """How many operations there are of each kind."""
        return Counter(self.kinds.values())

    def readers(self, array: str) -> list[str]:
        """The kinds of the operations that read an array, or that read a view of it."""
        found = []
        for number, inputs in self.inputs.items():
            for _ in range(inputs.count(array)):
                if self.kinds[number] in VIEWS:
                    views = [view for view, at in self.maker.items() if at == number]
                    found += [kind for view in views for kind in self.readers(view)]
                else:
                    found.append(self.kinds[number])
        return found

    def source(self, array: str) -> str:
        """What an array is a view of; itself where it is none."""
        while self.kinds.get(self.maker.get(array)) in VIEWS:
            array = self.inputs[self.maker[array]][0]
        return array


def is_evaluated(value: object) -> bool:
    """Whether reading this, a tree of arrays say, leaves nothing to wait for."""
    arrays = [each for _, each in tree_flatten(value) if isinstance(each, mx.array)]
    return not arrays or not len(Graph(*arrays))


@contextmanager
def cpu() -> Iterator[None]:
    """Have a CPU compute, on whatever machine this is."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # as system.device.prepare() has it
    yield
    mx.set_default_device(before)
    if before != mx.cpu:
        mx.enable_compile()


def unevaluated(patch: pytest.MonkeyPatch) -> None:
    """Have nothing computed that nobody waits for, so that graphs stay whole."""
    patch.setattr(mx, "async_eval", lambda *arrays: None)


def on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Have graphs as a GPU is given them: what it has a kernel for is one operation,
    which stands for it, but computes nothing."""

    def attention(q, k, v, *, scale, mask=None):
        return one(q, k, v, *([] if mask is None else [mask]))

    def one(x, *others):
        return mx.depends([x], [*others] or [x])[0]

    patch.setattr(mx, "default_device", lambda: mx.gpu)
    patch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: one(x, weight))
    patch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    for name in ("relu", "gelu_approx"):  # which mx.compile makes one of there
        patch.setattr(nn, name, one)


def load(folder, form: str, patch: pytest.MonkeyPatch) -> T5Session:
    """A model in one of the :data:`FORMS`, and everything to come in it likewise."""
    if form == "gpu":
        on_a_gpu(patch)
        with pytest.MonkeyPatch.context() as loading:
            loading.setattr(mx, "default_device", lambda: mx.cpu)
            model = t5.load(folder)
    else:
        model = t5.load(folder)
    if form == "slim":
        slim(model)
    return T5Session(model)


def begin(session: T5Session, batch: int) -> None:
    """Have the session in the midst of texts, of several at different lengths."""
    session.start(PROMPTS[:batch])
    tokens = np.arange(20, 20 + max(LENGTHS))[None].repeat(batch, axis=0)
    mx.eval(session.extend(mx.array(tokens)))
    session.rewind([*LENGTHS[:batch]])


def sequences(batch: int, more: int = 0) -> list[list[int]]:
    """What is committed then: a token beyond what is cached, and so many more."""
    return [[0, *range(20, 20 + length + more)] for length in LENGTHS[:batch]]

"""The pickles inside PyTorch's checkpoints, read without Python's unpickler.

A pickle is a program for a stack machine that can call any function, give any object
any state and index its memo anywhere. A dict of tensors needs a few of its
instructions, and those are all that this interpreter knows. It builds nothing but
dicts, lists, tuples, strings, numbers and :class:`View`; every argument is checked
where it enters. Whatever else a pickle asks for is refused by name.

The instructions are those of the standard library's pickletools; what PyTorch writes
with them is found in torch/serialization.py and torch/_utils.py.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Limits, far beyond what a checkpoint has: t5-11b's has 1,300 tensors in 30,000
#: instructions, and no string of over 100 bytes.
INSTRUCTIONS = 1 << 21
TENSORS = 1 << 17
STRING_BYTES = 1 << 12
ALL_STRING_BYTES = 1 << 26
NUMBER_BYTES = 16
DIMENSIONS = 16
ELEMENTS = 1 << 48  # of a tensor, and its largest stride and offset

#: Storage classes -> what their elements are, as safetensors names it.
STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


class RefusedError(Exception):
    """The pickle is whole, but not what is read here; the message says ``has ...``."""


@dataclass(frozen=True)
class Storage:
    """A run of elements in the file, that tensors are views of."""

    key: str
    dtype: str  # as safetensors names it
    size: int  # elements


@dataclass(frozen=True)
class View:
    """A tensor as pickled: a strided view of a storage, and inside it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


def load(data: Any, at: int, tensors: bool = True) -> tuple[Any, int]:
    """Read the pickle that begins at ``data[at]``; it may say where it ends.

    Args:
        data: bytes, or a file mapped into memory.
        tensors: whether tensors may be in it.

    Returns:
        What it builds, and the place after it.

    Raises:
        RefusedError: it asks for what no dict of tensors needs.
        ValueError, KeyError: it is damaged.
    """
    machine = _Machine(data, at, tensors)
    return machine.run(), machine.at


class _Function:
    """A name that a pickle may call, and what stands in for it."""

    def __init__(self, call: Callable[..., Any]):
        self.call = call


class _Ordered(dict):
    """An OrderedDict: the only thing that is given a state, which is dropped."""


@dataclass(frozen=True)
class _StorageClass:
    dtype: str


class _Machine:
    """One run over one pickle."""

    def __init__(self, data: Any, at: int, tensors: bool):
        self.at = at
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []  # places in the stack, the latest last
        self._memo: dict[int, Any] = {}
        self._tensors_left = TENSORS if tensors else 0
        self._string_bytes_left = ALL_STRING_BYTES

    def run(self) -> Any:
        for _ in range(INSTRUCTIONS):
            code = self._number("B")
            if code == _STOP:
                value = self._pop()
                if self._stack or self._marks:
                    raise ValueError("a pickle ends before it is done")
                return value
            step = _INSTRUCTIONS.get(code)
            if step is None:
                raise RefusedError(
                    f"has the pickle instruction {bytes([code])!r}, which no tensor "
                    f"needs: it is not read"
                )
            step(self)
        raise RefusedError(f"has over {INSTRUCTIONS:,} instructions in a pickle")

    # What is read.

    def _take(self, size: int) -> bytes:
        found = self._data[self.at : self.at + size]
        if len(found) != size:
            raise ValueError("a pickle ends too early")
        self.at += size
        return found

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))
        return value

    def _string(self, size: int) -> str:
        self._string_bytes_left -= size
        if size > STRING_BYTES or self._string_bytes_left < 0:
            raise RefusedError(f"has a text of {size:,} bytes where a name belongs")
        return self._take(size).decode("utf-8")

    def _line(self) -> str:
        """The text up to the end of the line, which is left out."""
        end = self._data.find(b"\n", self.at, self.at + STRING_BYTES)
        if end < 0:
            raise ValueError("a name in a pickle does not end")
        text = self._string(end - self.at)
        self.at = end + 1
        return text

    # The stack.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("a pickle takes more than it has")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        value = self._pop()
        self._stack.append(value)
        if not isinstance(value, kind):
            raise ValueError(f"a pickle takes a {type(value).__name__} for another")
        return value

    def _above_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("a pickle closes what it did not open")
        place = self._marks.pop()
        values = self._stack[place:]
        del self._stack[place:]
        return values

    # The instructions.

    def protocol(self) -> None:
        if self._number("B") not in (2, 3, 4, 5):
            raise RefusedError("has a pickle of a protocol that PyTorch does not write")

    def frame(self) -> None:
        self._take(8)  # how long a part is: for readers that prefetch

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def tuple_above_mark(self) -> None:
        self._push(tuple(self._above_mark()))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._above_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self._above_mark())

    def _set_items(self, items: list[Any]) -> None:
        into = self._top(dict)
        if len(items) % 2:
            raise ValueError("a pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Larger numbers can be chosen to have one hash, and then take forever.
            if not isinstance(key, str) and _key_bits(key) > 32:
                raise ValueError(f"a pickle has a {type(key).__name__} as a key")
            into[key] = value

    def put(self, form: str) -> None:
        self._memo[self._number(form)] = self._top(object)

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._top(object)

    def get(self, form: str) -> None:
        self._push(self._memo[self._number(form)])

    def number(self, form: str) -> None:
        self._push(self._number(form))

    def long(self) -> None:
        size = self._number("B")
        if size > NUMBER_BYTES:
            raise RefusedError(f"has a number of {size} bytes in a pickle")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def real(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def string(self, form: str) -> None:
        size = self._number(form)
        if size < 0:
            raise ValueError("a text in a pickle has a negative size")
        self._push(self._string(size))

    def function(self) -> None:
        module = self._line()
        self._push(_find(module, self._line()))

    def stacked_function(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a pickle asks for a function without a name")
        self._push(_find(module, name))

    def call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            kind = type(function).__name__
            raise RefusedError(f"calls a {kind}, which no tensor needs: it is not read")
        self._push(function.call(self, *_arguments(function, arguments)))

    def build(self) -> None:
        """A state, which Module.state_dict leaves at its OrderedDict: its versions."""
        self._pop()
        if not isinstance(self._top(object), _Ordered):
            raise RefusedError("gives a state to what has none: it is not read")

    def persistent(self) -> None:
        """A storage by (kind, class, key, device, elements); before 1.6, and a view."""
        identity = self._pop()
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise ValueError("a pickle names a storage in no known way")
        kind, storage_class, key, _, size, *view = identity
        if not isinstance(kind, str) or kind != "storage":
            # What it is may be anything, and take forever to print.
            raise RefusedError("holds something else than tensors")
        if view not in ([], [None]):
            raise RefusedError("holds views of storages, which PyTorch 0.1 wrote")
        if not isinstance(storage_class, _StorageClass) or not isinstance(key, str):
            raise ValueError("a storage has no class, or no name")
        self._push(Storage(key, storage_class.dtype, _size(size)))

    def rebuild_tensor(self, storage: Any, offset: Any, shape: Any, by: Any) -> View:
        """torch._utils._rebuild_tensor: every argument of it comes from the file."""
        if not isinstance(storage, Storage):
            raise ValueError("a tensor has no storage")
        if not isinstance(shape, tuple) or not isinstance(by, tuple):
            raise ValueError("a tensor's sizes and strides are no tuples")
        if len(shape) != len(by) or len(shape) > DIMENSIONS:
            raise ValueError("a tensor has not one stride per dimension")
        view = View(storage, _size(offset), (*map(_size, shape),), (*map(_size, by),))
        if view.size:
            steps = zip(view.shape, view.strides, strict=True)
            last = view.offset + sum((n - 1) * step for n, step in steps)
            if last >= storage.size:
                raise ValueError("a tensor reaches beyond its storage")
            if view.size > storage.size:
                raise ValueError("a tensor has more elements than its storage")
        self._tensors_left -= 1
        if self._tensors_left < 0:
            raise RefusedError("has more tensors than belong there")
        return view


def _key_bits(key: Any) -> float:
    return key.bit_length() if isinstance(key, int) else math.inf


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= ELEMENTS:
        raise ValueError("a tensor's size, stride or offset is no size")
    return value


def _find(module: str, name: str) -> Any:
    """What stands for a name that a pickle asks for; most are refused."""
    if module in ("torch", "torch.storage") and name in STORAGES:
        return _StorageClass(STORAGES[name])
    if (module, name) not in _FUNCTIONS:
        raise RefusedError(
            f"asks for {module}.{name}, which no tensor needs and which could run "
            f"code: it is not read"
        )
    return _FUNCTIONS[module, name]


def _arguments(function: _Function, arguments: tuple) -> tuple:
    """Those that matter: PyTorch adds gradients and hooks, which weights have not."""
    least, most, used = _ARITY[function.call]
    if not least <= len(arguments) <= most:
        raise ValueError(f"a pickle calls a function with {len(arguments)} arguments")
    return arguments[:used]


def _ordered(_: _Machine) -> _Ordered:
    return _Ordered()


def _parameter(_: _Machine, tensor: Any) -> View:
    if not isinstance(tensor, View):
        raise ValueError("a parameter is no tensor")
    return tensor


_FUNCTIONS = {
    ("collections", "OrderedDict"): _Function(_ordered),
    ("torch._utils", "_rebuild_tensor"): _Function(_Machine.rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_Machine.rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
}
#: The fewest and the most arguments, and how many are used.
_ARITY = {
    _ordered: (0, 0, 0),
    _Machine.rebuild_tensor: (4, 7, 4),
    _parameter: (2, 3, 1),
}

_STOP = ord(".")


def _with(step: Callable[..., None], *arguments: Any) -> Callable[[_Machine], None]:
    return lambda machine: step(machine, *arguments)


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(value)


#: Every instruction that is known, by its byte; pickletools has their names.
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: step
    for code, step in {
        b"\x80": _Machine.protocol,
        b"\x95": _Machine.frame,
        b"(": _Machine.mark,
        b"N": _constant(None),
        b"\x88": _constant(True),
        b"\x89": _constant(False),
        b"}": lambda machine: machine._push({}),
        b"]": lambda machine: machine._push([]),
        b")": _constant(()),
        b"\x85": _with(_Machine.tuple_of, 1),
        b"\x86": _with(_Machine.tuple_of, 2),
        b"\x87": _with(_Machine.tuple_of, 3),
        b"t": _Machine.tuple_above_mark,
        b"a": _Machine.append,
        b"e": _Machine.appends,
        b"s": _Machine.set_item,
        b"u": _Machine.set_items,
        b"q": _with(_Machine.put, "B"),
        b"r": _with(_Machine.put, "I"),
        b"\x94": _Machine.memoize,
        b"h": _with(_Machine.get, "B"),
        b"j": _with(_Machine.get, "I"),
        b"K": _with(_Machine.number, "B"),
        b"M": _with(_Machine.number, "H"),
        b"J": _with(_Machine.number, "i"),
        b"\x8a": _Machine.long,
        b"G": _Machine.real,
        b"X": _with(_Machine.string, "I"),
        b"\x8c": _with(_Machine.string, "B"),
        b"U": _with(_Machine.string, "B"),  # Python 2's
        b"T": _with(_Machine.string, "i"),
        b"c": _Machine.function,
        b"\x93": _Machine.stacked_function,
        b"R": _Machine.call,
        b"b": _Machine.build,
        b"Q": _Machine.persistent,
    }.items()
}

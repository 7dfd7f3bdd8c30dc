"""torch_pickle.py: what a pickle may say, and what becomes of all that it may not."""

import collections
import io
import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch

from checkpoints import torch_pickle
from checkpoints.torch_file import read_torch
from checkpoints.torch_pickle import RefusedError, View, load
from system.errors import InputError


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + raw


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


#: Of torch.save's pickle for one tensor of 6 x 8, by part.
PARTS = {
    "kind": text("storage"),
    "class": b"ctorch\nFloatStorage\n",
    "key": text("0"),
    "device": text("cpu"),
    "size": number(48),
    "offset": number(0),
    "shape": sizes(6, 8),
    "strides": sizes(8, 1),
    "hooks": b"ccollections\nOrderedDict\n)R",
    "name": text("x"),
    "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
}


def program(**changed: bytes) -> bytes:
    """A state dict's pickle, with parts of it exchanged."""
    part = PARTS | changed
    storage = b"".join(part[name] for name in ("kind", "class", "key", "device"))
    return b"".join(
        (
            b"\x80\x02}(" + part["name"] + part["function"],
            b"((" + storage + part["size"] + b"tQ",
            part["offset"] + part["shape"] + part["strides"] + b"\x89" + part["hooks"],
            b"tRu.",
        )
    )


def archive(path, data: bytes):
    """A file as torch.save lays it out, with this pickle and 48 float32."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/data/0", np.arange(48, dtype="<f4").tobytes())
        file.writestr("a/byteorder", b"little")
        file.writestr("a/version", b"3\n")
    return path


def test_the_program_is_pytorchs(tmp_path):
    """The parts above are what torch.save writes: torch.load reads them."""
    path = archive(tmp_path / "x.bin", program())
    expected = torch.load(path, weights_only=True)["x"].numpy()
    assert expected[1, 0] == 8
    np.testing.assert_array_equal(read_torch(path)["x"].bits, expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path, protocol):
    state = {f"layer.{i}": torch.randn(3, 4) for i in range(300)}
    torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_torch(tmp_path / "x.bin")
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name].bits, state[name]) for name in state)


#: What a stranger may exchange, by name: an attack or a mistake each.
ODD = {
    "a dict with a state as dtype": {
        "class": b"ccollections\nOrderedDict\n)R" + b"}" + text("n") + b"Nsb"
    },
    "a class as the function": {"function": b"ccollections\nOrderedDict\n"},
    "a storage class as the function": {"function": b"ctorch\nFloatStorage\n"},
    "a function as the storage class": {"class": PARTS["function"]},
    "a text as the storage class": {"class": text("FloatStorage")},
    "a number as the key": {"key": number(0)},
    "a storage of nothing": {"key": text("7")},
    "a storage outside": {"key": text("../../etc/passwd")},
    "too few elements": {"size": number(47)},
    "more elements than the file": {"size": number(1 << 40)},
    "a negative size": {"size": number(-1)},
    "a truth as size": {"size": b"\x88"},
    "a dict as offset": {"offset": b"}"},
    "a negative offset": {"offset": number(-8)},
    "an offset beyond": {"offset": number(1)},
    "a huge offset": {"offset": number(1 << 62)},
    "a list as shape": {"shape": b"](" + number(6) + number(8) + b"e"},
    "a negative length": {"shape": sizes(-6, -8)},
    "lengths whose product overflows": {"shape": sizes(1 << 33, 1 << 33)},
    "seventeen dimensions": {"shape": sizes(*[1] * 17), "strides": sizes(*[1] * 17)},
    "fewer strides": {"strides": sizes(1)},
    "a stride out of the file": {"strides": sizes(1 << 40, 1)},
    "a negative stride": {"strides": sizes(-8, 1)},
    "a tensor of one element, many times": {
        "strides": sizes(0, 0),
        "shape": sizes(7, 8),
    },
    "a tensor as a shape": {"shape": b"}", "strides": b"}"},
    "another kind": {"kind": text("module")},
    "a kind that takes forever to print": {"kind": b"Kaq\0" + b"h\0h\0\x86q\0" * 60},
    "a kind that is too deep to print": {"kind": b"K\1" + b"\x85" * 100_000},
    "a name that is none": {"name": number(3)},
    "a name of 5,000 bytes": {"name": text("x" * 5000)},
    "a list as a name": {"name": b"]"},
    "os.system": {"function": b"cos\nsystem\n"},
    "eval": {"function": b"cbuiltins\neval\n"},
    "a name with a dot": {"function": b"ctorch\nFloatStorage.__init__\n"},
    "a method of the interpreter": {"function": b"ctorch._utils\n_Machine.load\n"},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_arguments_of_any_kind(tmp_path, change):
    """Refused, each; what torch.load would make of them does not matter."""
    with pytest.raises(InputError):
        read_torch(archive(tmp_path / "x.bin", program(**change)))


def test_a_state_is_dropped_and_only_from_a_dict():
    """BUILD sets attributes: of an OrderedDict they are dropped, else refused."""
    ordered = b"ccollections\nOrderedDict\n)R"
    state = b"}" + text("__class__") + text("x") + b"s"
    value, _ = load(ordered + state + b"b.", 0)
    assert value == {}
    assert not hasattr(value, "x") and not vars(value)
    for what in (b"}", b"]", b"N", text("a"), b"ctorch\nFloatStorage\n", sizes(1)):
        with pytest.raises(RefusedError, match="state"):
            load(what + state + b"b.", 0)


@pytest.mark.parametrize("code", range(256))
def test_every_instruction(code):
    """Alone, on all kinds of values and with all kinds of arguments: a value or an
    error, and never what Python's unpickler would have run."""
    before = [
        b"",
        b"(",
        b"N",
        b"}",
        b"]",
        b"(N",
        b"((",
        b")",
        text("a"),
        b"Nq\0",
        b"}N",
    ]
    before += [b"ctorch\nFloatStorage\n", PARTS["function"] + b")", b"}}", number(7)]
    after = [b"", b"\0", b"\xff" * 9, b"\1\0\0\0a", b"os\nsystem\n", b"3\n", b"x\n" * 3]
    known = (RefusedError, ValueError, KeyError)
    for stack in before:
        for arguments in after:
            for rest in (b".", b"0.", b"R.", b"b.", b"u."):
                data = stack + bytes([code]) + arguments + rest
                try:
                    load(data, 0)
                except known:
                    continue


def test_instructions_that_are_known_are_pickles():
    """Every one has its name in pickletools: none is made up, none of another kind."""
    names = {ord(op.code): op.name for op in pickletools.opcodes}
    known = {names[code] for code in torch_pickle._INSTRUCTIONS}
    assert not known & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "EXT1", "POP"}
    assert {"GLOBAL", "REDUCE", "BUILD", "BINPERSID"} < known


@pytest.mark.parametrize(
    "data, megabytes",
    [
        (b"Nr\xff\xff\xff\xff.", 1),  # a memo of 2^32 places
        (b"X\xff\xff\xff\x7f", 1),  # a text of 2 GB
        (b"\x8b\xff\xff\xff\x7f", 1),  # a number of 2 GB
        (b"\x8a\xff" + b"\1" * 255 + b".", 1),  # one of 255 bytes
        (b"(" * (1 << 17), 20),
        (b"]" * (1 << 17), 20),
        (b"}q\0" * (1 << 17), 20),
        (b"".join(b"}r" + struct.pack("<I", i) for i in range(1 << 16)), 20),
        (b"N\x85" + b"\x85" * (1 << 17) + b".", 20),  # tuples in tuples
        (b"](" + b"N" * (1 << 15) + b"e" + b"\x94h\0" * (1 << 15), 20),
        (text("a" * 4000) * 30_000, 80),
    ],
    ids=range(11),
)
def test_memory_that_a_pickle_can_take(monkeypatch, data, megabytes):
    """A few bytes of file take no gigabytes; nor do as many instructions as it may
    have, which are 32 times those here."""
    monkeypatch.setattr(torch_pickle, "INSTRUCTIONS", torch_pickle.INSTRUCTIONS // 32)
    tracemalloc.start()
    try:
        with suppress(RefusedError, ValueError, KeyError):
            load(data, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6


def test_numbers_of_one_hash():
    """Dict keys that collide would take a pickle of a megabyte hours."""
    colliding = b"".join(number((i + 3) * ((1 << 61) - 1)) + b"N" for i in range(9))
    with pytest.raises(ValueError, match="as a key"):
        load(b"}(" + colliding + b"u.", 0)


def test_mutations_read_nothing_else(tmp_path):
    """Python's own unpickler never runs, whatever bytes are changed."""
    whole = program()
    chance = random.Random(1)
    for _ in range(3000):
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            place = chance.randrange(len(raw))
            raw[place : place + chance.randrange(2)] = bytes([chance.randrange(256)])
        try:
            value, end = load(bytes(raw), 0)
        except (RefusedError, ValueError, KeyError):
            continue
        assert end <= len(raw)
        if isinstance(value, dict):
            for tensor in value.values():
                if isinstance(tensor, View):
                    assert tensor.size <= tensor.storage.size <= torch_pickle.ELEMENTS


def test_python_2_and_ordered_dicts(tmp_path):
    """As a module saves it: an OrderedDict, whose state has versions."""
    state = collections.OrderedDict(a=torch.ones(2))
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    buffer = io.BytesIO()
    pickle.Pickler(buffer, 2).dump(collections.OrderedDict(a=1))
    assert load(buffer.getvalue(), 0)[0] == {"a": 1}
    torch.save(state, tmp_path / "x.bin")
    assert list(read_torch(tmp_path / "x.bin")) == ["a"]
    assert load(b"}U\1aT\1\0\0\0bs.", 0)[0] == {"a": "b"}

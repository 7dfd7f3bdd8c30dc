"""memory.py: what is left, and what a prompt takes of it."""

import gc
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import HANG

import main
from architectures import t5
from architectures.t5_session import T5Session
from decoder import Engine
from pair import Pair
from speculation.requests import Request
from system import memory
from system.errors import TooLongError


@pytest.fixture
def files(tmp_path):
    """Write files of /proc and /sys/fs/cgroup: write(name, text)."""

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write.proc, write.groups = tmp_path / "proc", tmp_path / "cgroup"
    return write


def test_what_the_kernel_gives(files):
    assert [*memory._machine(files.proc)] == []
    files("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:  70 kB\nSwapFree: 3 kB\n")
    assert [*memory._machine(files.proc)] == [73 << 10]


def test_what_limits_leave(files, monkeypatch):
    files("proc/self/status", "Name:\tpython\nVmSize:\t 40 kB\nVmData:\t30 kB\n")
    limits = {resource.RLIMIT_AS: 1 << 20, resource.RLIMIT_DATA: 1 << 16}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], -1))
    left = [(1 << 20) - (40 << 10), (1 << 16) - (30 << 10)]
    assert [*memory._limits(files.proc)] == left
    limits[resource.RLIMIT_AS] = resource.RLIM_INFINITY
    assert [*memory._limits(files.proc)] == left[1:]


def test_what_control_groups_leave(files):
    """Of version 2: the process's and those around it; pages of files are not lost."""
    files("proc/self/cgroup", "0::/a/b\n")
    files("cgroup/a/b/memory.max", "max\n")
    files("cgroup/a/b/memory.current", "10\n")
    files("cgroup/a/memory.max", "1000\n")
    files("cgroup/a/memory.current", "800\n")
    files("cgroup/a/memory.stat", "anon 500\ninactive_file 250\n")
    assert [*memory._groups(files.proc, files.groups)] == [450]


def test_what_older_control_groups_leave(files):
    """In a container: its path is the outside's, and its own group at the root."""
    files("proc/self/cgroup", "5:cpu:/docker/x\n4:memory:/docker/x\n0::/docker/x\n")
    files("cgroup/memory/memory.limit_in_bytes", "1000\n")
    files("cgroup/memory/memory.usage_in_bytes", "300\n")
    files("cgroup/memory/memory.stat", "total_inactive_file 100\ninactive_file 1\n")
    assert [*memory._groups(files.proc, files.groups)] == [800]


def test_what_is_left(monkeypatch):
    """The least of all."""
    whole = memory.total()
    assert 0 < memory.free() <= whole
    monkeypatch.setattr(memory, "_limits", lambda _: iter([123]))
    assert memory.free() == 123
    assert memory.fits(123) and not memory.fits(124)
    monkeypatch.setattr(memory, "_limits", lambda _: iter([-5]))
    assert memory.free() == 0
    monkeypatch.setattr(memory, "total", lambda: None)
    assert memory.fits(1 << 60)


def test_room_for_a_prompt(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: 3 * 10**9)
    memory.require_room(5, 3 * 10**9)
    said = "prompt has 5,000 tokens.* needs 4.0 GB.* has 3.0 GB left"
    with pytest.raises(TooLongError, match=said):
        memory.require_room(5000, 4 * 10**9)


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "umt5", "num_layers": 3}, {"d_ff": 640, "num_layers": 4}]
)
@pytest.mark.parametrize("lengths", [[900], [1200] * 3, [700, 900, 300]])
def test_what_encoding_takes(make, fields, lengths):
    """As it is counted, so much it is, within a fifth."""
    session = T5Session(t5.load(make(**fields)[2]))
    prompts = [[5 + row] * length for row, length in enumerate(lengths)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    session.start(prompts)
    taken = mx.get_peak_memory() - before
    ragged = len(set(lengths)) > 1
    counted = session._encoding_bytes(len(prompts), max(lengths), len(prompts), ragged)
    assert 0.95 < counted / taken < 1.25


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such limit")
def test_a_prompt_beyond_the_limits():
    """It would end in a segmentation fault; the lines beside it are answered."""
    limit = 3_500_000 << 10
    text = "translate English to German: "
    long = text + "The dog sleeps in the garden. " * 1143
    done = subprocess.run(
        [sys.executable, main.__file__, "--prompt", "-", "--max-tokens", "3"],
        cwd=Path(main.__file__).parent,
        input=f"{text}A dog.\n{long}\n{text}A cat.\n",
        capture_output=True,
        text=True,
        timeout=HANG,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "main.py: line 2: the prompt has 9,150 tokens" in done.stderr


class Metal:
    """What Metal is told of the bytes to keep in memory."""

    def __init__(self, monkeypatch, most: int):
        self.limit, self.told = 7, []
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        info = {"max_recommended_working_set_size": most}
        monkeypatch.setattr(mx, "device_info", lambda: info)
        monkeypatch.setattr(mx, "set_wired_limit", self._set)

    def _set(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        self.told.append(limit)
        return before


class Owner:
    """Something that has weights."""


def test_what_is_wired(monkeypatch):
    """As much as is needed and no more than may be, as long as somebody needs it."""
    owners = Owner(), Owner()
    memory.wire(owners[0], 10)  # no Metal: nothing
    metal = Metal(monkeypatch, most=memory._PASSING + 120)
    memory.wire(owners[0], 10)
    assert metal.limit == memory._PASSING + 10
    memory.wire(owners[1], 70)
    memory.wire(owners[0], 30)
    assert metal.limit == memory._PASSING + 100
    memory.wire(owners[0], 10**9)
    assert metal.limit == memory._PASSING + 120
    del owners
    gc.collect()
    assert metal.limit == 7
    owner = Owner()
    memory.wire(owner, 5)
    assert metal.limit == memory._PASSING + 5
    del owner
    gc.collect()
    assert metal.limit == 7


def test_who_comes_later_is_wired_as_well(make, monkeypatch):
    """A long prompt that takes a row that has become free."""
    session = T5Session(t5.load(make()[2]))
    metal = Metal(monkeypatch, most=1 << 40)
    engine = Engine(session, None, rows=2)
    for length, most in ((5, 4), (5, 40), (300, 40)):
        engine.admit(Request([7] * length, frozenset(), most))
    while engine.busy:
        engine.step()
    assert max(metal.told) == memory._PASSING + session.batch_bytes(2, 300, 40)


def test_weights_and_caches_are_wired(make, monkeypatch):
    """What all of it takes, and not what there is; before a text begins, and not after
    the pair is gone."""
    folder = make()[2]
    weights = sum(each.nbytes for each in mx.load(str(folder / "weights.npz")).values())
    metal = Metal(monkeypatch, most=1 << 40)
    pair = Pair.load(str(folder), str(folder))
    assert metal.limit == memory._PASSING + 2 * weights
    answer = pair.generate("the cat", max_tokens=20)
    answer.finish()
    caches = max(metal.told) - memory._PASSING - 2 * weights
    prompt = len(pair.tokenizer.encode("the cat"))
    assert caches == 2 * pair.target.batch_bytes(1, prompt, 20)
    del pair, answer
    gc.collect()
    assert metal.limit == 7

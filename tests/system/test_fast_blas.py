"""Whose threads compute, on Linux machines without a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from system import fast_blas

PROJECT = Path(fast_blas.__file__).parents[1]

#: A product after somebody else's OpenMP is there, as torch brings one along.
PRODUCT = """
import sys
{first}
from system import fast_blas
import mlx.core as mx
fast_blas.fit_threads(10**9)
product = mx.ones((300, 300)) @ mx.ones((300, 300))
assert (product == 300).all().item()
loaded = {{line.split("/")[-1].strip() for line in open("/proc/self/maps")}}
print(fast_blas.shares_cores, *(sorted(n for n in loaded if "_thread.so" in n)))
"""


def threads_of(first: str = "", **environment: str) -> list[str]:
    """What a fresh process says: whether it shares cores, and MKL's threads."""
    others = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT.format(first=first)],
        env=others | environment | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_mkl = pytest.mark.skipif(
    "libmkl" not in (fast_blas.library or ""), reason="MKL is not what computes here"
)


@needs_mkl
@pytest.mark.parametrize(
    "module", ["pair", "model", "decoder", "convert", "benchmark", "console.program"]
)
def test_what_a_program_imports_brings_it(module):
    """Without a word about it: MKL computes, and there is nothing to hint at."""
    first = f"import {module}\nfrom system import fast_blas as b; assert not b.hint"
    assert threads_of(first)[0] == "True"


@needs_mkl
@pytest.mark.parametrize("first", ["", "import torch"])
def test_mkl_takes_threads_that_wait_for_nobody(first):
    shares, *libraries = threads_of(first)
    assert shares == "True"
    assert len(libraries) == 1
    assert libraries[0].startswith("libmkl_tbb_thread")


@needs_mkl
@pytest.mark.parametrize(
    "name, value",
    [("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"), ("MKL_THREADING_LAYER", "")],
)
def test_what_the_environment_says_holds(name, value):
    shares, *libraries = threads_of(**{name: value or "SEQUENTIAL"})
    assert shares == "False"
    assert libraries == []


@needs_mkl
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_one_thread_without_openmp(name):
    """Whose runtime reads what an earlier process of the same number has left in shared
    memory: nothing, where that one could not write; and dies of it."""
    first = """
import atexit, os
left = f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}"
os.close(os.open(left, os.O_CREAT))
atexit.register(os.unlink, left)
"""
    assert threads_of(first, **{name: "1"}) == ["False"]


@needs_mkl
@pytest.mark.parametrize("value", ["", "abc", "0", "-1", "99999999999"])
def test_settings_that_are_no_numbers_do_not_count(value):
    """OpenMP's runtime ends in a segmentation fault at the last."""
    assert threads_of(OMP_NUM_THREADS=value)[0] == "True"


@needs_mkl
def test_threads_that_the_environment_chooses_are_found():
    """MKL ends the process where nobody has loaded TBB for it."""
    libraries = threads_of(MKL_THREADING_LAYER="TBB")[1:]
    assert libraries and libraries[0].startswith("libmkl_tbb_thread")


@needs_mkl
@pytest.mark.parametrize("first", ["import mlx.core", "import mlx.nn"])
def test_too_late(first):
    """MLX has its own library then, and it is said."""
    ours = "from system import fast_blas; print(fast_blas.library, fast_blas.hint)"
    code = f"{first}\n{ours}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.stdout.startswith("None hint: MLX was imported before"), done.stderr


def test_without_mlx(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx", ModuleType("mlx"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert not fast_blas._computes_on_cpu()


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A folder like a wheel's, and what MKL was told."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "MKL_THREADING_LAYER"):
        monkeypatch.delenv(name, raising=False)
    said = []

    def tell(layer):
        said.append(layer)
        return layer

    def use(*names):
        for path in tmp_path.iterdir():
            path.unlink()
        for name in ("libmkl_rt.so.3", "libiomp5.so", *names):
            (tmp_path / name).touch()
        handle = SimpleNamespace(MKL_Set_Threading_Layer=tell)
        return fast_blas._use_tbb(str(tmp_path / "libmkl_rt.so.3"), handle)

    monkeypatch.setattr(fast_blas.ctypes, "CDLL", lambda path, mode: _opened(path))
    return SimpleNamespace(use=use, said=said)


def _opened(path):
    if not Path(path).is_file():
        raise OSError(path)


def test_libraries_that_are_not_there(parts):
    """MKL would end the process where it does not find what it is told to use."""
    both = "libmkl_tbb_thread.so.3", "libtbb.so.12"
    assert parts.use(*both) and parts.said == [fast_blas._TBB]
    for names in ((), both[:1], both[1:], ("libmkl_tbb_thread.so.2", both[1])):
        assert not parts.use(*names)
    assert parts.said == [fast_blas._TBB]
    for name in ("libopenblas.so.0", "libmkl_rt.so"):
        assert not fast_blas._use_tbb(name, None)


def test_threads_that_cannot_be_started(parts, monkeypatch):
    """A product would be handed on that was never made: one thread makes it."""

    def refused(*_):
        raise RuntimeError("can't start new thread")

    assert fast_blas._can_start_threads()
    monkeypatch.setattr(fast_blas._thread, "start_new_thread", refused)
    assert not parts.use("libmkl_tbb_thread.so.3", "libtbb.so.12")
    assert parts.said == [fast_blas._SEQUENTIAL]


def test_a_library_without_its_parts(tmp_path):
    library = tmp_path / "libmkl_rt.so.3"
    assert not fast_blas._is_whole(library)
    (tmp_path / "libmkl_core.so.3").touch()
    (tmp_path / "libmkl_intel_lp64.so.2").touch()
    assert not fast_blas._is_whole(library)
    (tmp_path / "libmkl_intel_lp64.so.3").touch()
    assert fast_blas._is_whole(library)
    assert fast_blas._is_whole(Path("libopenblas.so.0"))


@pytest.mark.parametrize(
    "cores, load, parameters, expected",
    [
        (8, 0.2, 10**9, 7),
        (8, 2.1, 10**9, 5),
        (8, 30.0, 10**9, 1),
        (2, 0.0, 10**9, 1),
        (8, 0.0, 10**6, 1),
    ],
)
def test_other_threads_leave_cores_free(monkeypatch, cores, load, parameters, expected):
    said = []
    handle = SimpleNamespace(openblas_set_num_threads=said.append)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fast_blas, "library", "libopenblas.so.0")
    monkeypatch.setattr(fast_blas, "_handle", handle)
    monkeypatch.setattr(fast_blas, "shares_cores", False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    fast_blas.fit_threads(parameters)
    assert said == [expected]

    def unknown(*_):
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    monkeypatch.setattr(os, "sched_getaffinity", unknown, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    fast_blas.fit_threads(10**9)
    assert said.pop() == 3
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    fast_blas.fit_threads(parameters)
    assert said == [expected]

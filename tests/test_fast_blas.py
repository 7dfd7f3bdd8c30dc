"""Whose threads compute, on Linux machines without a GPU."""

import fast_blas

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROJECT = Path(fast_blas.__file__).parent

#: A product after somebody else's OpenMP is there, as torch brings one along.
PRODUCT = """
import sys
{first}
import fast_blas
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
    assert not any("tbb" in library for library in libraries)


def test_libraries_that_are_not_there(tmp_path, monkeypatch):
    """MKL would end the process where it does not find what it is told to use."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "MKL_THREADING_LAYER"):
        monkeypatch.delenv(name, raising=False)
    handle = SimpleNamespace(MKL_Set_Threading_Layer=lambda layer: layer)
    for name in ("libopenblas.so.0", "libmkl_rt.so", str(tmp_path / "libmkl_rt.so.3")):
        assert not fast_blas._use_tbb(name, handle)
    (tmp_path / "libmkl_tbb_thread.so.3").touch()
    assert not fast_blas._use_tbb(str(tmp_path / "libmkl_rt.so.3"), handle)
    (tmp_path / "libtbb.so.12").write_text("no library")
    assert not fast_blas._use_tbb(str(tmp_path / "libmkl_rt.so.3"), handle)


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
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    fast_blas.fit_threads(parameters)
    assert said == [expected]

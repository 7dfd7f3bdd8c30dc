"""A tuned BLAS under MLX, on Linux machines without a GPU.

Import this module before ``mlx.core``. MLX's Linux CPU build links the reference
BLAS, whose float32 product is 20 to 50 times slower than a tuned one, and whose
cost grows with every row, so that verifying several tokens at once could never pay.
The dynamic linker resolves a symbol to the first library that has it: one that is
already loaded with its symbols global takes the reference library's place.

Elsewhere nothing happens: macOS has Accelerate, and a GPU needs no BLAS.
"""

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

HINT = (
    "hint: no tuned BLAS was found, and MLX's own is slow on this CPU: "
    "pip install mkl (x86-64) or apt-get install libopenblas0-pthread"
)


def _candidates() -> list[str]:
    """Libraries to try, the fastest first."""
    # The mkl wheel puts its libraries into the environment's own lib folder.
    wheels = [
        str(path)
        for prefix in dict.fromkeys((sys.prefix, sys.base_prefix))
        for path in sorted(Path(prefix, "lib").glob("libmkl_rt.so*"), reverse=True)
    ]
    return [*wheels, "libmkl_rt.so", "libopenblas.so.0", "libopenblas.so"]


def _computes_on_cpu() -> bool:
    """Whether this MLX is a Linux build without CUDA, judged without importing it."""
    mlx = find_spec("mlx")
    if not sys.platform.startswith("linux") or mlx is None:
        return False
    return not any(
        any(Path(folder).parent.glob("mlx_cuda*.dist-info"))
        for folder in mlx.submodule_search_locations or ()
    )


def _load() -> tuple[str | None, ctypes.CDLL | None]:
    for name in _candidates():
        try:
            return name, ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    return None, None


#: Whether a tuned BLAS is wanted on this machine.
wanted = _computes_on_cpu()

#: The library that was loaded; None where none is wanted or none was found.
library, _handle = _load() if wanted else (None, None)

#: Below so many parameters a model's products are over before a second thread is up:
#: measured on 2 cores, 6 million are 20 to 30 % faster with one, 60 million slower.
#: Such models are slimmed as well (slim.py).
SMALL = 20_000_000


def fit_threads(parameters: int) -> None:
    """Use as many threads as pay for a model with so many parameters.

    Where the environment says how many, that holds.
    """
    if _handle is None or {"MKL_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        return
    threads = 1 if parameters < SMALL else len(os.sched_getaffinity(0))
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads"):
        if hasattr(_handle, name):
            getattr(_handle, name)(threads)
            return

"""A tuned BLAS under MLX, on Linux machines without a GPU.

Import this module before ``mlx.core``. MLX's Linux CPU build links the reference
BLAS, whose float32 product is 20 to 50 times slower than a tuned one, and whose
cost grows with every row, so that verifying several tokens at once could never pay.
The dynamic linker resolves a symbol to the first library that has it: one that is
already loaded with its symbols global takes the reference library's place.

Elsewhere nothing happens: macOS has Accelerate, and a GPU needs no BLAS.

Threads. OpenMP's meet at every product, and whichever comes first spins until the
others have had a core. Beside another busy process that takes many times as long as one
thread would, in MKL and in OpenBLAS's own threads alike. MKL can use TBB's threads
instead, which take work where they find it and wait for nobody. Milliseconds for a pass
of SmolLM2-135M in float32 over 1 / 2 / 6 / 64 rows, 2 cores of an AMD EPYC:

    busy processes beside it  none             one              two
    MKL, OpenMP, 2 threads    85/112/158/440   91/254/571/1617  144/7616/11976/9442
    MKL, TBB                  67/72/112/351    96/110/183/510   160/126/267/858
    MKL, one thread           86/108/179/577   97/122/183/593   176/191/260/863
    OpenBLAS, 2 threads       139/148/184/469  225/307/402/656  2636/2976/4396/4984
    OpenBLAS, one thread      116/118/136/374  139/140/155/465  224/298/267/695

(Medians; the first two lines in turn in one run, the others in another.) So MKL gets
TBB where that is installed, as it is with MKL's wheel. Else a core is left free, and
one for each that was busy just before. Results do not depend on it: 144 products of 8
shapes, 25 times each, had the same bits, beside two busy processes as well.
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


def _is_chosen(name: str) -> bool:
    """Whether the environment says how many threads there are to be, or whose."""
    own = "OPENBLAS" if "openblas" in name else "MKL"
    says = {f"{own}_NUM_THREADS", "OMP_NUM_THREADS", "MKL_THREADING_LAYER"}
    return bool(says & os.environ.keys())


_TBB = 4  # of MKL_Set_Threading_Layer


def _use_tbb(name: str, handle: ctypes.CDLL) -> bool:
    """Whether MKL uses TBB's threads from now on, as it can before its first product.

    MKL ends the process where it does not find the libraries, so they are looked for.
    """
    folder = Path(name).parent
    tbb = folder / "libtbb.so.12"
    found = tbb.is_absolute() and any(folder.glob("libmkl_tbb_thread.so*"))
    if _is_chosen(name) or not found:
        return False
    try:
        ctypes.CDLL(str(tbb), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return handle.MKL_Set_Threading_Layer(_TBB) == _TBB


#: Whether a tuned BLAS is wanted on this machine.
wanted = _computes_on_cpu()

#: The library that was loaded; None where none is wanted or none was found.
library, _handle = _load() if wanted else (None, None)

#: Whether its threads share what cores there are.
shares_cores = library is not None and _use_tbb(library, _handle)

#: Below so many parameters a model's products are over before a second thread is up:
#: measured on 2 cores, 6 million are 20 to 30 % faster with one, 60 million slower.
#: Such models are slimmed as well (slim.py).
SMALL = 20_000_000


def fit_threads(parameters: int) -> None:
    """Use as many threads as pay for a model with so many parameters.

    Where the environment says how many, that holds.
    """
    if library is None or shares_cores or _is_chosen(library):
        return
    free = len(os.sched_getaffinity(0)) - 1 - round(os.getloadavg()[0])
    threads = 1 if parameters < SMALL else max(1, free)
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads"):
        if hasattr(_handle, name):
            getattr(_handle, name)(threads)
            return

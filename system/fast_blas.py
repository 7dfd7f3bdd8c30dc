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
one for each that was busy just before. With the same threads a product has the same
bits every time: 144 of 8 shapes, 25 times each, beside two busy processes as well. With
others some have not: 12 of 26 differ between TBB and two of OpenMP's, in rounding.
"""

import _thread
import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

_MISSING = (
    "hint: no tuned BLAS was found, and MLX's own is slow on this CPU: "
    "pip install mkl (x86-64) or apt-get install libopenblas0-pthread"
)
_LATE = (
    "hint: MLX was imported before a tuned BLAS could be, and its own is slow on this "
    "CPU: import pair, or system.fast_blas, first"
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
    try:
        mlx = find_spec("mlx")
    except ValueError:  # something else by that name was put into sys.modules
        return False
    if not sys.platform.startswith("linux") or mlx is None:
        return False
    return not any(
        any(Path(folder).parent.glob("mlx_cuda*.dist-info"))
        for folder in mlx.submodule_search_locations or ()
    )


def _load() -> tuple[str | None, ctypes.CDLL | None]:
    for name in _candidates():
        if not _is_whole(Path(name)):
            continue
        try:
            # Global only once it is known to be what it is called.
            if hasattr(ctypes.CDLL(name), "cblas_sgemm"):
                return name, ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    return None, None


def _is_whole(library: Path) -> bool:
    """Whether MKL's parts lie beside it: it ends the process where it misses one."""
    parts = ("libmkl_core", "libmkl_intel_lp64")
    return not library.is_absolute() or all(_beside(library, part) for part in parts)


def _beside(library: Path, part: str) -> bool:
    """Whether a part of the same version lies beside MKL's library."""
    return library.with_name(library.name.replace("libmkl_rt", part)).is_file()


#: The most threads that a setting is believed to ask for: OpenMP's runtime ends in a
#: segmentation fault at two billion.
_MOST = 4096


def _forget_odd_settings() -> None:
    """Take out of the environment what asks for no number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        parts = os.environ.get(name, "1").split(",")
        if not all(p.strip().isdecimal() and 0 < int(p) <= _MOST for p in parts):
            del os.environ[name]


def _number(name: str) -> str | None:
    """How many threads the environment says that there are to be."""
    own = "OPENBLAS" if "openblas" in name else "MKL"
    says = (f"{own}_NUM_THREADS", "OMP_NUM_THREADS")
    return next(filter(None, map(os.environ.get, says)), None)


def _is_chosen(name: str) -> bool:
    """Whether the environment says how many threads there are to be, or whose."""
    return bool(_number(name) or os.environ.get(_LAYER))


_LAYER = "MKL_THREADING_LAYER"
_SEQUENTIAL, _TBB = 1, 4  # of MKL_Set_Threading_Layer


def _use_tbb(name: str, handle: ctypes.CDLL) -> bool:
    """Whether MKL uses TBB's threads from now on, as it can before its first product.

    MKL ends the process where it does not find the libraries, so they are looked for.
    Where TBB cannot start a thread, MLX takes a product that was never made for one: so
    it is tried whether threads can be started.
    """
    path = Path(name)
    if not path.is_absolute():
        return False
    try:
        ctypes.CDLL(str(path.with_name("libtbb.so.12")), mode=ctypes.RTLD_GLOBAL)
        found = _beside(path, "libmkl_tbb_thread")
    except OSError:
        found = False
    if _is_chosen(name):
        # OpenMP's runtime is not needed for one thread. It keeps a file of each process
        # in shared memory, and ends one with a bus error whose number another had that
        # could not write it.
        if _number(name) == "1" and not os.environ.get(_LAYER):
            handle.MKL_Set_Threading_Layer(_SEQUENTIAL)
        return False
    if found and _can_start_threads():
        return handle.MKL_Set_Threading_Layer(_TBB) == _TBB
    if found or not path.with_name("libiomp5.so").is_file():
        handle.MKL_Set_Threading_Layer(_SEQUENTIAL)
    return False


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _can_start_threads() -> bool:
    """Whether as many threads as there are cores may run at once beside this one."""
    hold = _thread.allocate_lock()

    def wait() -> None:
        with hold:
            pass

    with hold:
        try:
            for _ in range(_cores()):
                _thread.start_new_thread(wait, ())
        except RuntimeError:
            return False
    return True


#: Whether a tuned BLAS is wanted on this machine.
wanted = _computes_on_cpu()

if wanted:
    _forget_odd_settings()

_late = "mlx.core" in sys.modules

#: The library that was loaded; None where none is wanted or none was found, or where
#: MLX has its own already.
library, _handle = _load() if wanted and not _late else (None, None)

#: What to tell a user whose products are slow; None where they are not.
hint = None if library or not wanted else _LATE if _late else _MISSING

#: Whether its threads share what cores there are.
shares_cores = library is not None and _use_tbb(library, _handle)

_mapped = False  # whether its kernels are

#: Below so many parameters a model's products are over before a second thread is up:
#: measured on 2 cores, 6 million are 20 to 30 % faster with one, 60 million slower.
#: Such models are slimmed as well (slim.py).
SMALL = 20_000_000


def bytes_to_map() -> int:
    """What MKL takes more of the address space at the first product."""
    return 0 if library is None or "mkl" not in library or _mapped else 400_000_000


def map_kernels() -> None:
    """Have MKL map what it computes with: where it cannot, it says so on stdout and
    ends the process, so it is to happen while there is room."""
    global _mapped
    if bytes_to_map():
        import mlx.core as mx

        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
    _mapped = True


def fit_threads(parameters: int) -> None:
    """Use as many threads as pay for a model with so many parameters.

    Where the environment says how many, that holds.
    """
    if library is None or shares_cores or _is_chosen(library):
        return
    try:
        busy = round(os.getloadavg()[0])
    except (AttributeError, OSError):
        busy = 0
    free = _cores() - 1 - busy
    threads = 1 if parameters < SMALL else max(1, free)
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads"):
        if hasattr(_handle, name):
            getattr(_handle, name)(threads)
            return

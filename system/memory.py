"""How much memory there is left, and a refusal of what needs more.

MLX does not survive an allocation that fails while it computes: on a CPU the process
ends in a segmentation fault, or is killed where memory was promised that is not there.
So what is large is counted before it is begun.
"""

import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from system import fast_blas
from system.device import on_cpu
from system.errors import InputError, NoRoomError

#: Bytes that a pass takes on its way.
_PASSING = 1 << 28

#: What is wired of whom, by their ids; and Metal's limit before that was.
_wired: dict[int, int] = {}
_limit_before: int | None = None

#: What is left where other ranks have least, and what MLX had here at that time.
_elsewhere: tuple[int, int] | None = None

#: Bytes for which nobody is asked what is left, as that takes a millisecond.
SMALL = 1 << 24

#: What makes a converted model's weights fewer bytes.
CONVERTED = (
    "convert this one with -q, or with --dtype bfloat16 if it is stored in float32"
)

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: Of cgroups version 2 and 1: the limit, what is used, and what of that are pages of
#: files, that the kernel takes back.
_NAMES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def total() -> int | None:
    """The bytes that the device can use well; None where it has to say so itself."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None  # CUDA can page


def free() -> int | None:
    """The bytes of it that can still be allocated, likewise.

    On Linux what the kernel, the process's limits and its control groups leave.
    """
    whole = total()
    if whole is None:
        return None
    left = [whole - mx.get_active_memory()]
    if on_cpu():
        left += [*_machine(_PROC), *_limits(_PROC), *_groups(_PROC, _GROUPS)]
    if _elsewhere:
        most, before = _elsewhere
        left.append(most + before - mx.get_active_memory())
    return max(0, min(left))


def limit(left: int) -> None:
    """Have other ranks' memory count, where no more than ``left`` bytes are left now:
    what is computed together takes as much there as here."""
    global _elsewhere
    _elsewhere = left, mx.get_active_memory()


def fits(size: int) -> bool:
    """Whether ``size`` bytes more can be allocated, as far as anything says."""
    left = free()
    if left is None or size <= left:
        return True
    mx.clear_cache()  # buffers that MLX keeps for what comes next
    return size <= free()


def in_words(size: int) -> str:
    """``size`` bytes for a person."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def require_room(tokens: int, size: int) -> None:
    """See to it that a prompt fits the memory, before it is computed.

    Args:
        tokens: how many it has, to say so.
        size: the bytes that computing it takes at once.

    Raises:
        NoRoomError: there is not as much left.
    """
    if size > SMALL and not fits(size):
        raise NoRoomError(
            f"the prompt has {tokens:,} tokens, for which the model needs "
            f"{in_words(size)}, and this machine has {in_words(free())} left: shorten "
            f"it"
        )


def prepare_memory(size: int, folder: Path, smaller: str = CONVERTED) -> None:
    """See to it that weights of ``size`` bytes fit the device, before they are read.

    On Metal, weights beyond the recommended working set would be swapped in and out at
    every token: they are refused. What fits is to be wired (:func:`wire`).

    Args:
        smaller: how there could be fewer on a GPU, in words.

    Raises:
        InputError: they do not fit.
    """
    library = fast_blas.bytes_to_map()
    if not fits(size + library):
        advice = "take a smaller model"
        if on_cpu():
            advice += ": a CPU computes in float32, whatever the weights are stored in"
        else:
            advice += f", or {smaller}"
        raise InputError(
            f"{folder} needs {in_words(size + library)} for its weights"
            f"{' and MKL' if library else ''}, and this machine has {in_words(free())} "
            f"for them: {advice}"
        )
    fast_blas.map_kernels()


def wire(owner: object, size: int) -> None:
    """Have Metal keep ``size`` bytes of an owner's in memory, as long as it lives: its
    weights, or its caches.

    What is not wired may be swapped out between two tokens where others need memory. No
    more than is needed is: wiring all that Metal allows has frozen small Macs. Once
    there are no owners any more, the limit is what it was.
    """
    if not mx.metal.is_available():
        return
    if id(owner) not in _wired:
        weakref.finalize(owner, _unwire, id(owner))
    _wired[id(owner)] = size
    _set_limit()


def _unwire(owner: int) -> None:
    del _wired[owner]
    _set_limit()


def _set_limit() -> None:
    global _limit_before
    needed = sum(_wired.values())
    if needed:
        # What a pass computes with, beside weights and caches.
        needed = min(needed + _PASSING, total())
        before = mx.set_wired_limit(needed)
        _limit_before = before if _limit_before is None else _limit_before
    elif _limit_before is not None:
        mx.set_wired_limit(_limit_before)
        _limit_before = None


def _machine(proc: Path) -> Iterator[int]:
    """What the kernel can give without killing anybody, swap included."""
    values = _fields(proc / "meminfo")
    if "MemAvailable" in values:
        yield (values["MemAvailable"] + values.get("SwapFree", 0)) << 10


def _limits(proc: Path) -> Iterator[int]:
    """What the process's own limits leave (ulimit -v and -d)."""
    used = _fields(proc / "self" / "status")
    for limit, name in (
        (resource.RLIMIT_AS, "VmSize"),
        (resource.RLIMIT_DATA, "VmData"),
    ):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and name in used:
            yield most - (used[name] << 10)


def _groups(proc: Path, groups: Path) -> Iterator[int]:
    """What the control groups leave that the process is in, and those around them."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, names = groups, _NAMES[0]
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", _NAMES[1]
        else:
            continue
        # A container may see its own group at the root, whatever its path is outside.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder == root or root in folder.parents:
                yield from _group(folder, *names)


def _group(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    with suppress(ValueError):  # "max", or no such file
        left = int(_text(folder / limit)) - int(_text(folder / used))
        yield left + _fields(folder / "memory.stat").get(cached, 0)


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file whose lines are a name, maybe a colon, and a number."""
    found = {}
    for line in _text(path).splitlines():
        name, *rest = line.replace(":", " ").split()[:2] or [""]
        if rest and rest[0].isdigit():
            found[name] = int(rest[0])
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""

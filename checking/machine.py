"""The machine: what computes, with what, and whether it is fit to be measured."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from checking.task import Task
from measuring.machine import header
from system import memory, remembering

PROJECT = Path(__file__).resolve().parents[1]

#: What changes how MLX or a BLAS computes.
VARIABLES = (
    "MLX_ENABLE_TF32",
    "MLX_METAL_FAST_SYNCH",
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_MAX_MB_PER_BUFFER",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_THREADING_LAYER",
    "OPENBLAS_NUM_THREADS",
)


def section(task: Task) -> Iterator[dict[str, Any]]:
    """What there is to say of it."""
    about = header(1)
    load = os.getloadavg()[0]
    yield {
        "identity": remembering.machine(),
        "device": about["device"],
        "kind": str(mx.default_device()).partition("(")[2].partition(",")[0],
        "metal": mx.metal.is_available(),
        "chip": _output("sysctl", "-n", "machdep.cpu.brand_string") or about["device"],
        "cores": about["cores"],
        "os": platform.platform(),
        "macos": platform.mac_ver()[0] or None,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "mlx": about["mlx"],
        "blas": Path(about["blas"]).name if about["blas"] else None,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free": memory.free(),
        "mlx_device": _device_info(),
        "rosetta": _output("sysctl", "-n", "sysctl.proc_translated") == "1",
        "power": power(),
        "low_power": low_power(_output("pmset", "-g")),
        "load": load,
        "variables": {
            name: os.environ[name] for name in VARIABLES if name in os.environ
        },
        "revision": revision(),
    }


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def power() -> str | None:
    """Where a machine's power comes from, "mains" or "battery"; None where it does not
    say so."""
    said = _output("pmset", "-g", "batt")
    if said:
        return "battery" if "Battery Power" in said else "mains"
    for state in sorted(Path("/sys/class/power_supply").glob("BAT*/status")):
        with suppress(OSError):
            return "battery" if state.read_text().strip() == "Discharging" else "mains"
    return None


def low_power(said: str | None) -> bool | None:
    """Whether low power mode is on, by what ``pmset -g`` said; None where it did not
    say so."""
    for line in (said or "").splitlines():
        words = line.split()
        if words[:1] == ["lowpowermode"] and len(words) > 1:
            return words[1] == "1"
    return None


def revision() -> str | None:
    """The project's git revision, with a + where files have changed; None where git
    does not know."""
    name = _output("git", "-C", str(PROJECT), "rev-parse", "--short=12", "HEAD")
    if not name:
        return None
    changed = _output("git", "-C", str(PROJECT), "status", "--porcelain", "-uno")
    return f"{name}+" if changed else name


def _device_info() -> dict[str, Any]:
    with suppress(Exception):  # a build without it, or one that has no device
        return {name: _plain(value) for name, value in mx.device_info().items()}
    return {}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | bool) else str(value)


def _output(*command: str) -> str | None:
    """What a command of the system's prints; None where there is none, or it fails."""
    if command[0] in ("sysctl", "pmset") and sys.platform != "darwin":
        return None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()
    return None

"""What the figures were measured on and with."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from system import fast_blas
from system.device import on_gpu


def header(repeats: int) -> dict[str, Any]:
    """What the figures were measured on and with."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "command": " ".join(["python benchmark.py", *sys.argv[1:]]),
        "device": mx.device_info().get("device_name", processor)
        if on_gpu()
        else processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "blas": fast_blas.library,
        "repeats": repeats,
    }

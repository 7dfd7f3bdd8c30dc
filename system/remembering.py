"""What was measured on this machine, kept for the next run.

A file of JSON per subject in the user's cache folder. All of it may be lost at any
time: where it cannot be read or written, it is not.
"""

import contextlib
import hashlib
import json
import os
import platform
import stat
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

#: In the folder that the platform has for caches.
NAME = "mlx-t5-speculative"
_FORM = 1  # of what is kept; another is not read
_LARGEST = 1 << 20
#: How many pieces of a file, and how large ones, tell it from another.
_SAMPLES, _SAMPLE = 16, 4096


def folder() -> Path:
    """Where it is kept: ``$XDG_CACHE_HOME`` counts on every platform."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given and Path(given).is_absolute():
        return Path(given) / NAME
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    return Path.home() / ".cache" / NAME


@lru_cache
def machine() -> str:
    """What computes, and with what: costs measured elsewhere say nothing here."""
    info = mx.device_info() if mx.default_device() == mx.gpu else {}
    parts = [
        platform.system(),
        platform.machine(),
        str(info.get("device_name", _processor())),
        str(os.cpu_count()),
        os.environ.get("OMP_NUM_THREADS", ""),
        str(mx.default_device()),
        mx.__version__,
    ]
    return " / ".join(parts)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def fingerprint(folder: Path) -> str:
    """What tells a model's folder from others: its config, and its weights' sizes and
    some of their bytes."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".npz", ".safetensors"):
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                with path.open("rb") as file:
                    for place in range(0, size, max(1, size // _SAMPLES)):
                        file.seek(place)
                        digest.update(file.read(_SAMPLE))
            elif path.name == "config.json":
                digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def recall(subject: str) -> Any:
    """What was kept of a subject on this machine; None if nothing is or can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError, RuntimeError):
        path = _path(subject)
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST:
            return None
        kept = json.loads(path.read_text("utf-8"))
        if isinstance(kept, dict) and kept.get("subject") == _full(subject):
            return kept.get("value")
    return None


def remember(subject: str, value: Any) -> Path | None:
    """Keep something, if it can be: where; None where it cannot."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no home folder
        path = _path(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.dumps({"subject": _full(subject), "value": value})
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(kept + "\n")
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise
        return path
    return None


def _full(subject: str) -> str:
    return f"{_FORM} / {machine()} / {subject}"


def _path(subject: str) -> Path:
    digest = hashlib.sha256(_full(subject).encode()).hexdigest()[:24]
    return folder() / f"costs-{digest}.json"

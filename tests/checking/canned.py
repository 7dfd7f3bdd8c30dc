"""Results of sections, as a machine without anything unexpected has them, and stand-ins
that come to them at once."""

import json
import sys
import textwrap
from copy import deepcopy
from pathlib import Path


def row(size, speedup, name=None):
    bounds = {"low": speedup - 0.1, "high": speedup + 0.1}
    return {
        "name": name or f"num-draft {size}",
        "num_draft": size,
        "speedup": speedup,
        **bounds,
        "tokens_per_second": 50 * speedup,
        "tokens_per_round": 2.0,
        "alpha": 0.8,
        "equal": 40,
    }


def variant(name):
    return {
        "name": name,
        "computed": "float32",
        "texts": 200,
        "differ": {"K = 4": 0, "auto": 0},
        "ties": 0,
        "unexplained": 0,
        "flips": [],
        "rounding": 8.5,
        "weights": 59_000_000,
        "peak": 62_000_000,
        "expected": 300_000_000,
    }


def cost(size):
    return {
        "num_draft": size,
        "ms": 10.0 + size,
        "low": 9.0 + size,
        "high": 11.0 + size,
        "cost": 1 + size / 10,
        "v": 1 + size / 20,
        "c": 0.05 if size else None,
        "break_even": 0.3 if size else None,
    }


_SPEED = {
    "prompts": 40,
    "rows": [row(0, 1.0), row(3, 1.9), row(5, 2.0), row("auto", 1.95)],
    "best": 5,
    "auto_over_best": [0.98, 0.95, 1.01],
    "auto_over_plain": [1.95, 1.85, 2.05],
}

_RESULTS = {
    "machine": {
        "identity": "a machine / 0.32.4",
        "device": "AMD EPYC",
        "kind": "cpu",
        "metal": False,
        "chip": "AMD EPYC",
        "cores": 2,
        "os": "Linux-6.1",
        "macos": None,
        "python": "3.11.7",
        "processor": "x86_64",
        "mlx": "0.32.4",
        "blas": "libmkl_rt.so.3",
        "torch": "2.13.0",
        "transformers": "5.24.0",
        "memory": 16_000_000_000,
        "free": 12_000_000_000,
        "mlx_device": {"architecture": "x86_64"},
        "rosetta": False,
        "power": None,
        "low_power": None,
        "load": 0.1,
        "variables": {},
        "revision": "0123456789ab",
    },
    "exactness": {
        "wanted": 200,
        "all": True,
        "variants": [
            variant(name)
            for name in ("float32", "bfloat16", "float16", "8 bits", "4 bits")
        ],
    },
    "curve": {
        "rows": [cost(size) for size in range(12)],
        "sweeps": 9,
        "restless": False,
        "steps": [],
        "suggests": {"0.6": 2, "0.75": 4, "0.9": 8},
        "name": "bundled pair",
        "weights": 59_000_000,
        "peak": 61_000_000,
        "expected": 300_000_000,
    },
    "speed": {
        **_SPEED,
        "name": "bundled pair",
        "weights": 59_000_000,
        "peak": 61_500_000,
        "expected": 300_000_000,
        "torch": True,
        "theirs": {"prompts": 20, **row(None, 0.4, "transformers, cpu")},
    },
    "compiled": {
        "prompts": 40,
        "rows": [
            {"name": "num-draft 0", "speedup": 1.2, "equal": 40},
            {"name": "num-draft 4", "speedup": 1.1, "low": 1, "high": 1.2, "equal": 40},
        ],
        "faster": True,
        "used": True,
        "name": "both pairs",
        "weights": 118_000_000,
        "peak": 121_000_000,
        "expected": 500_000_000,
    },
    "shapes": {
        "alpha": 0.75,
        "pairs": [
            {
                "target": "t5-base",
                "draft": "t5-small",
                "bytes": 1_130_000_000,
                **_SPEED,
                "tokens": 32,
                "name": "t5-base with t5-small",
                "weights": 1_130_000_000,
                "peak": 1_200_000_000,
                "expected": 2_000_000_000,
            }
        ],
    },
    "suite": {
        "installed": True,
        "workers": 2,
        "complete": True,
        "tests": 3,
        "passed": ["test_a.py::test_a", "test_a.py::test_b"],
        "skipped": ["test_a.py::test_c"],
        "failed": {},
    },
}


def results():
    """By section; each time others, to be changed."""
    return deepcopy(_RESULTS)


def report():
    """A whole one."""
    sections = {
        name: {"status": "done", "seconds": 20.0, "result": result}
        for name, result in results().items()
    }
    for record in sections.values():
        record["result"]["footprint"] = {"peak": 1, "resident": 220_000_000}
    return {
        "quick": True,
        "seconds": 187.4,
        "interrupted": False,
        "written": "2026-01-02 03:04 UTC",
        "sections": sections,
    }


#: What a stand-in does first: it says that it was begun, and with what task.
BEGIN = """\
import json, os, sys, time
task = json.load(sys.stdin)
with open({began!r}, "a") as file:
    file.write(json.dumps([{name!r}, task]) + "\\n")
"""


class Sections:
    """Stand-ins for the sections, each a few lines of Python."""

    def __init__(self, folder: Path):
        self.began = folder / "began"
        self.scripts = {
            name: f"print(json.dumps({result!r}))" for name, result in results().items()
        }

    def command(self, name):
        head = BEGIN.format(began=str(self.began), name=name)
        script = head + textwrap.dedent(self.scripts[name])
        return [sys.executable, "-S", "-c", script]

    def tasks(self):
        """Of all that were begun since it was asked last, by name."""
        lines = self.began.read_text().splitlines() if self.began.exists() else []
        self.began.unlink(missing_ok=True)
        return dict(map(json.loads, lines))

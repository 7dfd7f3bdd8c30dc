"""What rounds cost by how many tokens they draft, and where that makes a step."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from checking import footprint
from checking.exactness import PROMPTS
from checking.task import Task
from console.choosing import BUNDLED
from measuring.calibration import CostRow, calibrate
from measuring.prompts import read_prompts
from pair import Pair

#: The most draft tokens: passes are over 1 to 12.
MOST = 11
MAX_TOKENS = 128
_PROMPTS = 50
#: Acceptance rates for which the K is told that they suggest.
ALPHAS = (0.6, 0.75, 0.9)
#: A step is one row more that costs this much more, in plain passes, and so many times
#: what a row more mostly costs.
_STEP, _TIMES = 0.2, 3.0
#: Seconds that the sweeps leave for loading and the last of them.
_SPARE = 6.0


def section(task: Task) -> Iterator[dict[str, Any]]:
    """The curve of the bundled pair."""
    pair = Pair.load(*map(str, BUNDLED))
    size = footprint.weights(pair.target, pair.drafter.session)
    prompts = [
        pair.request(prompt).prompt for prompt in read_prompts(PROMPTS, _PROMPTS)
    ]
    curve = calibrate(
        pair.target,
        pair.drafter,
        prompts,
        1,
        MAX_TOKENS,
        MOST,
        seconds=max(0.0, task.left - _SPARE),
    )
    yield {
        "rows": [asdict(row) for row in curve.rows],
        "sweeps": curve.sweeps,
        "restless": curve.restless,
        "steps": steps([row.v for row in curve.rows]),
        "suggests": suggests(curve.rows),
        **footprint.entry("bundled pair", size),
    }


def steps(passes: Sequence[float]) -> list[dict[str, Any]]:
    """Where one row more in a pass costs much more than most rows do, and all further
    ones do as well: one that alone was slow was slow by accident.

    Args:
        passes: the cost of one over 1, 2, 3, ... rows, in those over one.

    Returns:
        For each: ``rows`` of the last pass before the step, ``more``, what the next one
        costs more, in plain passes. K is one less than the rows.
    """
    more = [after - before for before, after in pairwise(passes)]
    usual = max(0.0, statistics.median(more)) if more else 0.0
    return [
        {"rows": rows, "more": each}
        for rows, each in enumerate(more, 1)
        if each >= _TIMES * usual and min(passes[rows:]) - max(passes[:rows]) >= _STEP
    ]


def suggests(rows: Sequence[CostRow]) -> dict[str, int]:
    """The fastest K for each of some constant acceptance rates, by what rounds cost."""
    found = {}
    for alpha in ALPHAS:
        gains = {
            row.num_draft: sum(alpha**i for i in range(row.num_draft + 1)) / row.cost
            for row in rows
        }
        found[f"{alpha:g}"] = max(gains, key=gains.__getitem__)
    return found

"""Whether compiled passes are faster here, and have the same texts."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from architectures.loading import COMPILE
from checking import footprint
from checking.exactness import MAX_TOKENS, PROMPTS
from checking.task import Task
from console.choosing import BUNDLED
from measuring.figures import speedup
from measuring.prompts import read_prompts
from measuring.timing import measure
from measuring.variants import Answer, Cell, Variant, ours
from pair import Pair
from system import remembering
from system.device import on_gpu, prepare

SIZES = (0, 4)
#: From how many times the speed on it is worth the time that the first passes take.
WORTH = 1.03
_PROMPTS = 300
#: Prompts that all shapes are traced with, which are not timed; seconds that are left
#: for the last.
_TRACED, _SPARE = 12, 4.0


def section(task: Task) -> Iterator[dict[str, Any]]:
    """Plain decoding and K = 4, each compiled and not, in turn; on a GPU main.py goes
    by it from now on."""
    pairs = [Pair.load(*map(str, BUNDLED), compiled=way) for way in (False, True)]
    size = footprint.weights(*(s for p in pairs for s in (p.target, p.drafter.session)))
    result = compare(pairs, list(read_prompts(PROMPTS, _PROMPTS)), task)
    if on_gpu():
        remembering.remember(COMPILE, result["faster"])
    yield {**result, "used": on_gpu(), **footprint.entry("both pairs", size)}


def compare(pairs: list[Pair], prompts: list[str], task: Task) -> dict[str, Any]:
    """A pair that is not compiled, and the same one compiled."""
    variants = [_variant(pair, size) for size in SIZES for pair in pairs]
    for number, prompt in enumerate(prompts[:_TRACED]):
        for variant in variants:
            variant.answer(prompt, number)
    answers = measure(variants, prompts, 1, max(0.0, task.left - _SPARE))
    rows = []
    for number, size in enumerate(SIZES):
        plain, compiled = answers[2 * number : 2 * number + 2]
        ratio, low, high = speedup(plain, compiled)
        same = sum(a.tokens == b.tokens for a, b in zip(plain, compiled, strict=True))
        row = {"name": f"num-draft {size}", "speedup": ratio, "equal": same}
        rows.append(row | ({} if low is None else {"low": low, "high": high}))
    faster = all(
        row["speedup"] >= WORTH and row.get("low", WORTH) > 1.0 for row in rows
    )
    return {"prompts": len(answers[0]), "rows": rows, "faster": faster}


def _variant(pair: Pair, size: int) -> Variant:
    variant = ours(pair, Cell(size), MAX_TOKENS)

    def answer(prompt: str, number: int) -> Answer:
        prepare(compiled=pair.how.compiled)  # for a CPU that is the process's setting
        return variant.answer(prompt, number)

    return replace(variant, answer=answer)

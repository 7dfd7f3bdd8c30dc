"""How fast the bundled pair is, by K, and another program on the same weights."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from checking import footprint
from checking.exactness import MAX_TOKENS, PROMPTS
from checking.task import Task
from console.choosing import BUNDLED
from measuring.baselines import transformers_generate
from measuring.figures import Row, speedup, summarise
from measuring.prompts import read_prompts
from measuring.timing import measure
from measuring.variants import AUTO, Answer, Cell, Variant, ours, theirs
from pair import Pair
from system.errors import one_line

SIZES = (0, *range(1, 8), AUTO)
_PROMPTS = 300
#: Seconds that are left for the last prompt and the bootstrap; the share of the time
#: for another program; and its answers to the one prompt that has to be answered.
_SPARE, _THEIRS, _ANSWERS = 5.0, 0.3, 5


def section(task: Task) -> Iterator[dict[str, Any]]:
    """Plain, each K and auto in turn; then plain and transformers in turn."""
    prompts = list(read_prompts(PROMPTS, _PROMPTS))
    pair = Pair.load(*map(str, BUNDLED))
    size = footprint.weights(pair.target, pair.drafter.session)
    variants = [ours(pair, Cell(each), MAX_TOKENS) for each in SIZES]
    installed = all(map(find_spec, ("torch", "transformers")))
    other, failed = None, None
    if installed:
        try:  # whatever is wrong with another program, ours is measured
            other = theirs(pair, transformers_generate(pair, MAX_TOKENS))
            other.answer(prompts[0], 0)
            seconds = other.answer(prompts[0], 0).seconds
        except Exception as error:
            other, failed = None, one_line(f"{type(error).__name__}: {error}")
    left = task.left - _SPARE
    answers = measure(variants, prompts, 1, (1 - _THEIRS if other else 1) * left)
    result = {
        "prompts": len(answers[0]),
        "rows": rows(variants, answers),
        **compared(SIZES, answers),
        **footprint.entry("bundled pair", size),
        "torch": installed,
        "failed": failed,
        "theirs": None,
    }
    yield result
    if other and task.left - _SPARE > _ANSWERS * seconds:
        both = [variants[0], other]
        left = task.left - _SPARE
        answers = measure(both, prompts, 1, left - 2 * _ANSWERS * seconds)
        yield result | {
            "theirs": {"prompts": len(answers[0]), **rows(both, answers)[1]}
        }


def rows(variants: list[Variant], answers: list[list[Answer]]) -> list[dict[str, Any]]:
    """The table's lines; the first variant is plain decoding."""
    return [
        _row(summarise(variant, its, answers[0], [[] for _ in its]))
        for variant, its in zip(variants, answers, strict=True)
    ]


def compared(sizes: Sequence[int | str], answers: list[list[Answer]]) -> dict[str, Any]:
    """Which K was the fastest, and how fast auto was over that and over plain decoding:
    each a ratio and its 95 % interval, None from too few prompts.

    Args:
        sizes: 0, each K, and auto.
        answers: of each of them.
    """
    plain, *fixed, auto = answers
    ratios = [speedup(plain, its)[0] for its in fixed]
    best = max(range(len(fixed)), key=ratios.__getitem__)
    return {
        "best": sizes[1 + best],
        "auto_over_best": speedup(fixed[best], auto),
        "auto_over_plain": speedup(plain, auto),
    }


def _row(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if value is not None}

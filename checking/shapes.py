"""How fast pairs of real sizes would be: simulated, as their weights are not here."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import gc
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from architectures import t5
from architectures.parameters import parameter_count
from checking import footprint
from checking.speed import compared, rows
from checking.task import Task
from measuring.figures import FEWEST
from measuring.simulation import PROMPT_TOKENS, SimulatedPair, named_config
from measuring.timing import measure
from measuring.variants import AUTO, Cell, simulated
from model import T5
from system import memory
from system.device import prepare

PAIRS = (
    ("t5-base", "t5-small"),
    ("t5-large", "t5-small"),
    ("t5-v1_1-xl", "t5-v1_1-small"),
)
ALPHA = 0.75
SIZES = (0, 3, 5, 7, AUTO)
#: Tokens of an answer: as many as there is time for.
TOKENS = (64, 32, 16)
#: Of the draft alone, to know what a byte costs: passes, the first of which are not
#: timed.
_PASSES, _FIRST = 12, 2
#: A round with drafts may cost more than the tokens that it yields would without.
_SLACK = 1.5


class Costs(NamedTuple):
    """Seconds per byte of weights: of making them at random, and of a plain pass."""

    making: float
    step: float

    def seconds(self, size: int, tokens: int, answers: int) -> float:
        """What so many answers of a model of ``size`` bytes are expected to take."""
        return size * (self.making + _SLACK * answers * tokens * self.step)


def section(task: Task) -> Iterator[dict[str, Any]]:
    """The pairs that memory and time have room for, the smaller ones first."""
    costs = measure_costs(PAIRS[0][1])
    done: list[dict[str, Any]] = []
    for number, names in enumerate(PAIRS):
        target, draft = names
        left = max(1, len(PAIRS) - number)
        size = sum(map(weight_bytes, names))
        entry = {"target": target, "draft": draft, "bytes": size}
        # Beside the weights there is what making the largest of them takes.
        fits = memory.fits(int(1.2 * size))
        tokens, answers = plan(costs, size, task.left, task.left / left)
        if not fits:
            entry["left_out"] = (
                f"it needs {memory.in_words(size)}, and there is not enough memory"
            )
        elif not answers:
            needed = costs.seconds(size, TOKENS[-1], _answers(1))
            entry["left_out"] = (
                f"it would take {needed:.0f} s, and {max(0, task.left):.0f} s were left"
            )
        else:
            entry |= _measured(names, tokens, answers, task)
            entry |= footprint.entry(f"{target} with {draft}", size)
            costs = costs._replace(step=max(costs.step, entry.pop("step") / size))
        done.append(entry)
        gc.collect()
        mx.clear_cache()
        yield {"alpha": ALPHA, "pairs": done}


def weight_bytes(name: str) -> int:
    """Of a size, in the dtype that random weights have on this device."""
    config = named_config(name)
    dtype = prepare() or mx.bfloat16
    return parameter_count(T5(config, tied=config.scale_outputs)) * dtype.size


def plan(costs: Costs, size: int, left: float, share: float) -> tuple[int, int]:
    """How many tokens an answer has, and how many prompts there are: the most for which
    ``share`` seconds do, and at least the fewest for which those that are ``left`` do;
    no prompts where not even these."""
    for tokens in TOKENS:
        for prompts in range(FEWEST, 1, -1):
            if costs.seconds(size, tokens, _answers(prompts)) <= share:
                return tokens, prompts
    return TOKENS[-1], int(costs.seconds(size, TOKENS[-1], _answers(1)) <= left)


def _answers(prompts: int) -> int:
    """How many answers that many prompts take: one to know it, and one each way, which
    are warmed up once."""
    return prompts + len(SIZES) * (prompts + 1)


def measure_costs(name: str) -> Costs:
    """What weights cost here, found out with a small model."""
    size = weight_bytes(name)
    began = time.perf_counter()
    session = t5.session(t5.random(named_config(name), name))
    making = time.perf_counter() - began
    session.start([list(range(3, 3 + PROMPT_TOKENS))])
    seconds = math.inf
    for number in range(_PASSES):
        began = time.perf_counter()
        mx.eval(session.extend(mx.array([[number + 3]])))
        if number >= _FIRST:
            seconds = min(seconds, time.perf_counter() - began)
    return Costs(making / size, seconds / size)


def _measured(
    names: tuple[str, str], tokens: int, prompts: int, task: Task
) -> dict[str, Any]:
    """A pair's figures; ``step``, what a token of plain decoding takes."""
    pair = SimulatedPair(*names, ALPHA, tokens)
    for number in range(prompts):
        pair.prepare(number)
    variants = [simulated(pair, Cell(size)) for size in SIZES]
    texts = [str(number) for number in range(prompts)]
    answers = measure(variants, texts, 1, max(0.0, task.left))
    lines = rows(variants, answers)
    return {
        "tokens": tokens,
        "prompts": len(answers[0]),
        "rows": lines,
        **compared(SIZES, answers),
        "step": 1 / lines[0]["tokens_per_second"],
    }

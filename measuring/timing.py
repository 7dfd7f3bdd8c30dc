"""Seconds: of whole answers, every way in turn, and of a round's steps."""

import math
import statistics
import time
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from measuring.variants import Answer, Cell, Variant
from speculation.acceptance import Draft
from speculation.drafting import Drafter
from speculation.rounds import launch
from speculation.samplers import RoundSampler, RowSampler, Rules
from speculation.session import Session
from system.errors import say

COST_REPEATS = 60  # timings per entry of the cost table
COST_PREFIX = 8  # tokens decoded before the timed step

# OpenMP's idle threads spin for a fifth of a second before they sleep, on the cores
# that the next program needs: without this pause that one takes up to twice as long,
# and it still wakes slowly: the first answer after the pause is not timed.
SPIN_SECONDS = 0.25


@dataclass(frozen=True)
class Cost:
    """Seconds of the steps that a round is made of, medians.

    Attributes:
        plain: a pass of the target over one token, and choosing the next one.
        verify: a pass over K + 1, and judging them.
        draft: drafting K tokens.
        always: whether every round has K: prompt lookup's has what it finds.
    """

    plain: float
    verify: float
    draft: float
    always: bool = True


def measure(
    variants: list[Variant],
    prompts: list[str],
    repeats: int,
    seconds: float = math.inf,
) -> list[list[Answer]]:
    """Every variant's answer to every prompt, with the median seconds of its repeats.

    The first prompt is answered once more beforehand, to warm up. After Ctrl-C, the
    answers to the prompts that every variant has answered by then, if there are any.

    Args:
        seconds: after which no other prompt is begun, but the first.
    """
    until = time.perf_counter() + seconds
    for variant in variants:
        variant.answer(prompts[0], 0)
    answers: list[list[Answer]] = [[] for _ in variants]
    rng = np.random.default_rng(0)
    threads = variants[-1].threads  # which the warm-up ended with
    for number, prompt in enumerate(tqdm(prompts, unit="prompt", disable=None)):
        if number and time.perf_counter() > until:
            break
        runs: list[list[Answer]] = [[] for _ in variants]
        try:
            for _ in range(repeats):
                for which in rng.permutation(len(variants)):
                    mx.synchronize()  # what a variant may have left queued on a GPU
                    if variants[which].threads != threads:
                        threads = variants[which].threads
                        time.sleep(SPIN_SECONDS)
                        variants[which].answer(prompt, number)  # all is cold now
                    runs[which].append(variants[which].answer(prompt, number))
        except KeyboardInterrupt:
            if not number:
                raise
            say(f"interrupted: what follows is of the first {number} prompts")
            break
        for which, its in enumerate(runs):
            seconds = statistics.median(run.seconds for run in its)
            answers[which].append(replace(its[0], seconds=seconds))
    return answers


def step_cost(
    target: Session, drafter: Drafter | None, ids: list[int], cell: Cell
) -> Cost | None:
    """Time the steps of a round by themselves, alternating, on one prompt's ids.

    Args:
        drafter: the draft model; None where what is drafted is looked up.
        cell: with a number of draft tokens.

    Returns:
        None where a model has not enough positions for that.
    """
    vocabulary, size = target.vocabulary, cell.num_draft
    for positions in (target.positions, drafter and drafter.positions):
        if positions and len(ids) + COST_PREFIX + size > positions:
            return None
    begin = target.start([ids])[0]
    rng = np.random.default_rng(0)
    sequence = [*begin, *rng.integers(0, vocabulary, COST_PREFIX).tolist()]
    # A decoder-only model has its prompt's tokens already, but the last.
    mx.eval(target.extend(mx.array([sequence[len(begin) - 1 : -1]])))
    known = len(sequence) - 1
    if drafter:
        drafter.start([ids])
    row = RowSampler(Rules(vocabulary, cell.sampling, cell.delta), sequence)
    tokens = mx.array(rng.integers(0, vocabulary, (1, size)).astype(np.int32))
    probs = None
    if cell.temperature and drafter:
        probs = mx.full((1, size, vocabulary), 1 / vocabulary)
        mx.eval(probs)

    def judge(draft: Draft | None) -> float:
        began = time.perf_counter()
        # What is looked up has no law.
        sampler = RoundSampler([row], size, certain=[bool(draft) and not drafter])
        mx.eval(launch(target, sampler, draft).report)
        seconds = time.perf_counter() - began
        target.rewind([known])
        return seconds

    def draft() -> float:
        if drafter is None:
            return 0.0  # what is looked up costs next to nothing
        began = time.perf_counter()
        sampler = RoundSampler([row], size)
        mx.eval(drafter.propose([sequence], size, sampler).tokens)
        return time.perf_counter() - began

    timed = [
        (judge(None), judge(Draft(tokens, probs)), draft())
        for _ in range(COST_REPEATS + 2)
    ][2:]
    medians = (statistics.median(column) for column in zip(*timed, strict=True))
    return Cost(*medians, always=drafter is not None)

"""Lines per second of whole files: this program in batches, and others in theirs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from measuring.baselines import Baseline
from measuring.figures import sacrebleu
from measuring.timing import SPIN_SECONDS
from measuring.variants import Cell
from pair import Pair

#: Prompts that warm a variant up.
_WARM = 8


@dataclass(frozen=True)
class Answered:
    """What a variant made of all prompts: texts, tokens, passes where it counts them,
    the bytes that MLX had allocated at most, and the tokens that were drafted."""

    texts: list[str]
    tokens: list[list[int]]
    passes: int | None = None
    peak_memory: int | None = None
    drafted: int | None = None


@dataclass(frozen=True)
class BatchVariant:
    """One way to answer many prompts.

    Attributes:
        batch_size: the most at once.
        cell: ours; None for another program.
        threads: whose threads compute.
    """

    name: str
    batch_size: int
    cell: Cell | None
    answer: Callable[[list[str]], Answered]
    threads: str = "mlx"


@dataclass(frozen=True)
class BatchRow:
    """A line of the table.

    Attributes:
        lines_per_second: the median of the repeats; ``low`` and ``high`` the least and
            the most, None of a single one.
        speedup: over the first variant.
        mean_draft: draft tokens of a row's mean round; None without any drafting.
        equal: prompts whose tokens are the first variant's; None where it is sampled.
    """

    name: str
    batch_size: int
    num_draft: int | Literal["auto"] | None
    lines_per_second: float
    low: float | None
    high: float | None
    tokens_per_second: float
    speedup: float
    tokens_per_round: float | None = None
    mean_draft: float | None = None
    equal: int | None = None
    bleu: float | None = None
    peak_memory: int | None = None


def ours(pair: Pair, cell: Cell, size: int, max_tokens: int) -> BatchVariant:
    """This program's engine."""

    def answer(prompts: list[str]) -> Answered:
        pair.forget()
        mx.clear_cache()
        mx.reset_peak_memory()
        done = list(
            pair.answers(
                prompts,
                batch_size=size,
                num_draft=cell.asked,
                delta=cell.delta,
                sampling=cell.sampling,
                max_tokens=max_tokens,
                beams=cell.beams,
            )
        )
        for one in done:
            if one.error:
                raise one.error
        return Answered(
            [one.text for one in done],
            [one.tokens for one in done],
            sum(one.stats.rounds for one in done),
            mx.get_peak_memory(),
            sum(one.stats.drafted for one in done),
        )

    return BatchVariant(f"{cell}, batch {size}", size, cell, answer)


def theirs(pair: Pair, baseline: Baseline, size: int) -> BatchVariant:
    """Another program, which is given batches of prompts sorted by length."""

    def answer(prompts: list[str]) -> Answered:
        encoded = [pair.tokenizer.encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: -len(encoded[place]))
        tokens: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(order), size):
            places = order[first : first + size]
            for place, its in zip(
                places,
                baseline.generate_batch([encoded[place] for place in places]),
                strict=True,
            ):
                tokens[place] = its
        return Answered([pair.tokenizer.decode(its) for its in tokens], tokens)

    name = f"{baseline.name}, batch {size}"
    return BatchVariant(name, size, None, answer, baseline.threads)


def measure_batches(
    variants: list[BatchVariant],
    prompts: list[str],
    references: list[list[str]],
    repeats: int,
) -> list[BatchRow]:
    """Every variant over all prompts, in an order that is drawn for each repeat."""
    for variant in variants:
        variant.answer(prompts[:_WARM])
    seconds: list[list[float]] = [[] for _ in variants]
    answered: list[Answered | None] = [None] * len(variants)
    rng = np.random.default_rng(0)
    turns = [which for _ in range(repeats) for which in rng.permutation(len(variants))]
    threads = variants[-1].threads
    for which in tqdm(turns, unit="run", disable=None):
        variant = variants[which]
        if variant.threads != threads:
            threads = variant.threads
            time.sleep(SPIN_SECONDS)
            variant.answer(prompts[:_WARM])  # all is cold now
        began = time.perf_counter()
        answered[which] = variant.answer(prompts)
        seconds[which].append(time.perf_counter() - began)
    rows = []
    first = answered[0].tokens, statistics.median(seconds[0])
    for variant, took, done in zip(variants, seconds, answered, strict=True):
        median, several = statistics.median(took), len(took) > 1
        count = sum(map(len, done.tokens))
        sampled = variant.cell and variant.cell.temperature
        same = [a == b for a, b in zip(done.tokens, first[0], strict=True)]
        rows.append(
            BatchRow(
                variant.name,
                variant.batch_size,
                variant.cell and variant.cell.num_draft,
                len(prompts) / median,
                len(prompts) / max(took) if several else None,
                len(prompts) / min(took) if several else None,
                count / median,
                first[1] / median,
                done.passes and count / done.passes,
                done.drafted / done.passes
                if variant.cell and variant.cell.num_draft and done.passes
                else None,
                None if sampled else sum(same),
                sacrebleu(done.texts, references),
                done.peak_memory,
            )
        )
    return rows

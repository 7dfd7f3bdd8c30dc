"""From seconds to figures: speed-up with its interval, what theory expects, BLEU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, TypeAlias

import numpy as np

from measuring.timing import Cost, step_cost
from measuring.variants import Answer, Variant
from speculation.drafting import Drafter
from speculation.lookup import Lookup
from speculation.session import Session
from system.errors import InputError

RESAMPLES = 2000  # of the bootstrap
FEWEST = 6  # prompts from which an interval says something


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        speedup: over plain decoding, in seconds per token; ``low`` and ``high`` bound
            its 95 % interval, None for too few prompts.
        alpha: accepted over judged draft tokens; in a beam search, steps.
        passes: of the target, for a text; ``passes_low`` and ``passes_high`` as above.
        tokens_per_round: tokens per pass of the target, which is the speed-up in
            passes over plain decoding.
        mean_draft: draft tokens of the mean round; None without any drafting.
        c, v: a draft token's and the verifying pass's cost, in plain passes.
        expected: the speed-up of decoding that alpha, c and v predict.
        paper: likewise with v = 1, the paper's formula.
        equal: prompts whose tokens are plain decoding's; None where it is sampled.
        bleu: sacreBLEU, where there are references.
        peak_memory: bytes, of MLX's allocations.
    """

    name: str
    num_draft: int | Literal["auto"] | None
    delta: float | None
    temperature: float | None
    seconds: float
    tokens_per_second: float
    speedup: float
    low: float | None
    high: float | None
    alpha: float | None = None
    tokens_per_round: float | None = None
    mean_draft: float | None = None
    c: float | None = None
    v: float | None = None
    expected: float | None = None
    paper: float | None = None
    equal: int | None = None
    bleu: float | None = None
    peak_memory: int | None = None
    passes: float | None = None
    passes_low: float | None = None
    passes_high: float | None = None


Estimate: TypeAlias = tuple[float, float | None, float | None]


def estimate(each: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A figure of sums over prompts, and its 95 % interval.

    No interval from fewer than ``FEWEST`` prompts: a bootstrap would find it too small.

    Args:
        each: (prompts, n), what is summed.
        figure: of such sums (..., n).
    """
    value = float(figure(each.sum(axis=0)))
    if len(each) < FEWEST:
        return value, None, None
    rng = np.random.default_rng(0)
    drawn = each[rng.integers(0, len(each), (RESAMPLES, len(each)))].sum(axis=1)
    low, high = np.percentile(figure(drawn), [2.5, 97.5])
    return value, float(low), float(high)


def speedup(base: list[Answer], other: list[Answer]) -> Estimate:
    """Seconds per token of ``base`` over those of ``other``."""
    each = np.array(
        [
            [a.seconds, len(a.tokens), b.seconds, len(b.tokens)]
            for a, b in zip(base, other, strict=True)
        ]
    )

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    return estimate(each, ratio)


def sacrebleu(texts: list[str], references: list[list[str]]) -> float | None:
    """Corpus BLEU of the texts, each with its references; None where one has none."""
    if not all(references):
        return None
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise InputError(
            "the prompts have references, which needs sacrebleu: pip install sacrebleu"
        ) from None
    # One stream for the first references, one for the second, …
    streams = [list(stream) for stream in zip_longest(*references)]
    return corpus_bleu(texts, streams).score


def summarise(
    variant: Variant,
    answers: list[Answer],
    plain: list[Answer],
    references: list[list[str]],
    cost: Cost | None = None,
) -> Row:
    """One line of the table; ``cost`` for variants that draft a fixed number."""
    seconds = sum(answer.seconds for answer in answers)
    ratio, low, high = speedup(plain, answers)
    cell = variant.cell
    row = Row(
        name=variant.name,
        num_draft=cell and cell.num_draft,
        delta=cell and cell.delta,
        temperature=cell and cell.temperature,
        seconds=seconds,
        tokens_per_second=sum(len(answer.tokens) for answer in answers) / seconds,
        speedup=ratio,
        low=low,
        high=high,
        bleu=sacrebleu([answer.text for answer in answers], references),
    )
    if cell.compared if cell else not variant.temperature:
        same = [a.tokens == b.tokens for a, b in zip(answers, plain, strict=True)]
        row = replace(row, equal=sum(same))
    stats = [answer.stats for answer in answers if answer.stats]
    if not stats:
        return row
    tested = sum(each.tested for each in stats)
    rounds = sum(each.rounds for each in stats)
    drafted = sum(each.drafted for each in stats)
    counts = np.array([[each.rounds, 1] for each in stats])
    passes, fewest, most = estimate(counts, lambda sums: sums[..., 0] / sums[..., 1])
    row = replace(
        row,
        tokens_per_round=sum(each.new_tokens for each in stats) / rounds,
        mean_draft=drafted / rounds if cell and cell.num_draft else None,
        peak_memory=max(each.peak_memory_bytes for each in stats) or None,
        passes=passes,
        passes_low=fewest,
        passes_high=most,
    )
    if not tested:
        return row
    alpha = sum(each.accepted for each in stats) / tested
    row = replace(row, alpha=alpha)
    if cost is None:
        return row
    k = cell.num_draft
    c, v = cost.draft / k / cost.plain, cost.verify / cost.plain
    row = replace(row, c=c, v=v)
    if not cost.always:
        return row
    tokens = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    expected, paper = tokens / (k * c + v), tokens / (k * c + 1)
    return replace(row, expected=expected, paper=paper)


def rows_of(
    variants: list[Variant],
    answers: list[list[Answer]],
    references: list[list[str]],
    target: Session,
    drafter: Drafter | None,
    lookup: Lookup | None,
    ids: list[int],
) -> list[Row]:
    """The table's rows; what a round's steps cost is measured for each cell that has
    a number of draft tokens, and no beams."""
    plain = {
        variant.temperature: its
        for variant, its in zip(variants, answers, strict=True)
        if variant.cell and not variant.cell.num_draft
    }
    rows = []
    for variant, its in zip(variants, answers, strict=True):
        cost = None
        if variant.cell and variant.cell.asked and not variant.cell.beams:
            cost = step_cost(target, drafter, ids, variant.cell)
        if cost and lookup:  # a round drafts what is found, if anything is
            cost = replace(cost, always=False)
        base = plain[variant.temperature]
        rows.append(summarise(variant, its, base, references[: len(its)], cost))
    return rows

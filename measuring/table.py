"""The figures in lines, for a person."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from measuring.batches import BatchRow
from measuring.calibration import CostRow
from measuring.figures import Row
from measuring.load import LoadRow


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mean_draft(row: Row | BatchRow) -> str:
    """What a round drafted, where its name does not say it."""
    mean = _shown(row.mean_draft, ".1f")
    return "" if mean == f"{row.num_draft}.0" else mean


def _break_even(row: CostRow) -> str:
    """From where on a round pays, or that it never does."""
    never = row.num_draft and row.break_even is None
    return "never" if never else _shown(row.break_even, ".2f")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{low:.2f}-{high:.2f}"


#: What a column is called, how wide it is, and what it shows of a row.
Columns: TypeAlias = tuple[tuple[str, int, Callable[[Any], str]], ...]

_SPEEDUP: Columns = (("speed-up", 8, lambda r: f"{r.speedup:.2f}"),)
_FIRST: Columns = (
    *_SPEEDUP,
    ("95 %", 11, lambda r: _interval(r.low, r.high)),
    ("tokens/s", 8, lambda r: f"{r.tokens_per_second:.1f}"),
)
_PER_PASS: Columns = (
    ("per pass", 8, lambda r: _shown(r.tokens_per_round, ".2f")),
    ("mean K", 6, lambda r: _mean_draft(r)),
)
_ALPHA: Columns = (("alpha", 6, lambda r: _shown(r.alpha, ".3f")),)
_LAST: Columns = (
    ("same text", 9, lambda r: _shown(r.equal, "d")),
    ("BLEU", 5, lambda r: _shown(r.bleu, ".1f")),
    ("MB", 6, lambda r: _shown(r.peak_memory and r.peak_memory / 1e6, ".0f")),
)

COLUMNS: Columns = (
    *_FIRST,
    *_PER_PASS,
    *_ALPHA,
    ("c", 5, lambda r: _shown(r.c, ".2f")),
    ("v", 5, lambda r: _shown(r.v, ".2f")),
    ("expected", 8, lambda r: _shown(r.expected, ".2f")),
    ("paper", 5, lambda r: _shown(r.paper, ".2f")),
    *_LAST,
)


LEGEND = (
    "speed-up: seconds per token against the target alone, in this loop; per pass: "
    "tokens per pass of the target, the speed-up in passes; mean K: tokens drafted per "
    "round, where they are not what was asked for; c, v: a draft token and "
    "the verifying pass, in plain passes; expected: of decoding, by alpha, c and v; "
    "paper: the same with v = 1"
)


BEAM_COLUMNS: Columns = (
    *_FIRST,
    ("passes", 6, lambda r: _shown(r.passes, ".2f")),
    ("95 %", 11, lambda r: _interval(r.passes_low, r.passes_high)),
    *_PER_PASS,
    *_ALPHA,
    *_LAST,
)

BEAM_LEGEND = (
    "speed-up: seconds per token against the same search by the target alone, in this "
    "loop; passes: of the target, for a text; per pass: tokens of the best text per "
    "pass, whose search may go on beyond its end; mean K: steps drafted per round, "
    "where they are not what was asked for; alpha: of the steps that were judged, "
    "those that stood"
)


COST_COLUMNS: Columns = (
    ("ms", 8, lambda r: f"{r.ms:.2f}"),
    ("50 %", 15, lambda r: f"{r.low:.2f}-{r.high:.2f}"),
    ("rounds", 6, lambda r: f"{r.rounds}"),
    ("cost", 5, lambda r: f"{r.cost:.2f}"),
    ("50 %", 11, lambda r: f"{r.cost_low:.2f}-{r.cost_high:.2f}"),
    ("c", 5, lambda r: _shown(r.c, ".2f")),
    ("v", 5, lambda r: f"{r.v:.2f}"),
    ("pays from alpha", 15, _break_even),
)

COST_LEGEND = (
    "ms: of a round, the median and the middle half; cost: in plain rounds, of the "
    "same sweep; c: a draft step, v: the target's pass over num-draft + 1 tokens, in "
    "plain rounds; pays from alpha: the constant acceptance rate from which such "
    "rounds are faster than plain ones"
)


BATCH_COLUMNS: Columns = (
    ("lines/s", 8, lambda r: f"{r.lines_per_second:.1f}"),
    ("range", 13, lambda r: "" if r.low is None else f"{r.low:.1f}-{r.high:.1f}"),
    ("tokens/s", 8, lambda r: f"{r.tokens_per_second:.0f}"),
    *_SPEEDUP,
    *_PER_PASS,
    *_LAST,
)

BATCH_LEGEND = (
    "lines/s: the median of the repeats, all prompts after each other, encoding and "
    "detokenizing included; range: the slowest and the fastest repeat; speed-up, same "
    "text: against the first line; per pass: a row's tokens per pass of the target; "
    "mean K: those drafted, where they are not what was asked for"
)


LOAD_COLUMNS: Columns = (
    ("requests/s", 10, lambda r: f"{r.requests_per_second:.2f}"),
    ("tokens/s", 8, lambda r: _shown(r.tokens_per_second, ".0f")),
    ("first p50", 9, lambda r: _shown(r.first_p50, ".3f")),
    ("p99", 7, lambda r: _shown(r.first_p99, ".3f")),
    ("end p50", 7, lambda r: _shown(r.end_p50, ".3f")),
    ("p99", 7, lambda r: _shown(r.end_p99, ".3f")),
    ("lost", 5, lambda r: f"{r.lost}"),
    ("other text", 10, lambda r: f"{r.different}"),
    ("per pass", 8, lambda r: _shown(r.tokens_per_pass, ".2f")),
)

LOAD_LEGEND = (
    "first, end: seconds from asking to the first text, and to the last, of half of "
    "the requests and of 99 % of them; lost: requests without a whole answer, which "
    "count in nothing else; other text: answers that are not plain decoding's; per "
    "pass: a text's tokens per pass of the target"
)


def table(
    rows: list[Row] | list[BatchRow] | list[CostRow] | list[LoadRow],
    columns: Columns = COLUMNS,
) -> Iterator[str]:
    """The lines of the table, for a person, without columns that are empty."""
    names = max(len(row.name) for row in rows)
    columns = [column for column in columns if any(column[2](row) for row in rows)]
    yield "  ".join([" " * names, *(title.rjust(width) for title, width, _ in columns)])
    for row in rows:
        cells = (show(row).rjust(width) for _, width, show in columns)
        yield "  ".join([row.name.ljust(names), *cells]).rstrip()

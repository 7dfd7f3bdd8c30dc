"""The figures in lines, for a person."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from measuring.batches import BatchRow
from measuring.figures import Row


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


#: What a column is called, how wide it is, and what it shows of a row.
Columns: TypeAlias = tuple[tuple[str, int, Callable[[Any], str]], ...]

_SPEEDUP: Columns = (("speed-up", 8, lambda r: f"{r.speedup:.2f}"),)
_PER_PASS: Columns = (("per pass", 8, lambda r: _shown(r.tokens_per_round, ".2f")),)
_LAST: Columns = (
    ("same text", 9, lambda r: _shown(r.equal, "d")),
    ("BLEU", 5, lambda r: _shown(r.bleu, ".1f")),
    ("MB", 6, lambda r: _shown(r.peak_memory and r.peak_memory / 1e6, ".0f")),
)

COLUMNS: Columns = (
    *_SPEEDUP,
    ("95 %", 11, lambda r: "" if r.low is None else f"{r.low:.2f}-{r.high:.2f}"),
    ("tokens/s", 8, lambda r: f"{r.tokens_per_second:.1f}"),
    *_PER_PASS,
    ("alpha", 6, lambda r: _shown(r.alpha, ".3f")),
    ("c", 5, lambda r: _shown(r.c, ".2f")),
    ("v", 5, lambda r: _shown(r.v, ".2f")),
    ("expected", 8, lambda r: _shown(r.expected, ".2f")),
    ("paper", 5, lambda r: _shown(r.paper, ".2f")),
    *_LAST,
)


LEGEND = (
    "speed-up: seconds per token against the target alone, in this loop; per pass: "
    "tokens per pass of the target, the speed-up in passes; c, v: a draft token and "
    "the verifying pass, in plain passes; expected: of decoding, by alpha, c and v; "
    "paper: the same with v = 1"
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
    "text: against the first line; per pass: a row's tokens per pass of the target"
)


def table(
    rows: list[Row] | list[BatchRow], columns: Columns = COLUMNS
) -> Iterator[str]:
    """The lines of the table, for a person, without columns that are empty."""
    names = max(len(row.name) for row in rows)
    columns = [column for column in columns if any(column[2](row) for row in rows)]
    yield "  ".join([" " * names, *(title.rjust(width) for title, width, _ in columns)])
    for row in rows:
        cells = (show(row).rjust(width) for _, width, show in columns)
        yield "  ".join([row.name.ljust(names), *cells]).rstrip()

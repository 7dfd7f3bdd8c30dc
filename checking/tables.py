"""Tables in Markdown."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

#: What a column is called, and what it shows of a row.
Columns: TypeAlias = Iterable[tuple[str, Callable[[dict[str, Any]], Any]]]


def table(rows: Iterable[dict[str, Any]], columns: Columns) -> Iterator[str]:
    """The lines of one, and an empty one; None is an empty cell."""
    columns = list(columns)
    yield line(title for title, _ in columns)
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield line(show(row) for _, show in columns)
    yield ""


def line(cells: Iterable[Any]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cell(each) for each in cells)} |"


def cell(value: Any) -> str:
    """What is no part of the table's own syntax."""
    text = "" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def number(name: str, form: str) -> Callable[[dict[str, Any]], str | None]:
    """What shows a number of a row in a form; nothing where there is none."""

    def show(row: dict[str, Any]) -> str | None:
        value = row.get(name)
        return None if value is None else format(value, form)

    return show


def megabytes(name: str) -> Callable[[dict[str, Any]], str | None]:
    """What shows bytes."""

    def show(row: dict[str, Any]) -> str | None:
        value = row.get(name)
        return None if value is None else f"{value / 1e6:,.0f}"

    return show


def interval(row: dict[str, Any]) -> str:
    """A speed-up and, where it is known, its interval."""
    low = row.get("low")
    bounds = "" if low is None else f" ({low:.2f} to {row['high']:.2f})"
    return f"{row['speedup']:.2f}{bounds}"

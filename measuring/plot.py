"""The figures drawn."""

from pathlib import Path

from measuring.calibration import Curve
from measuring.figures import Row
from measuring.variants import AUTO
from system.errors import InputError


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Draw the speed-up, measured with its interval and as expected.

    Over draft tokens per round, a line for each temperature and delta, and a star where
    they were as many as pay, at their mean; or, where only deltas were swept, over
    those, with sacreBLEU beside it.
    """
    from matplotlib.figure import Figure  # without a display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.set_ylabel("speed-up over the target alone")
    axes.axhline(1, color="gray", linewidth=0.8)
    swept = [row for row in rows if row.num_draft]
    by_delta = (
        len({row.num_draft for row in swept}) == 1 < len({row.delta for row in swept})
    )
    x, other = ("delta", "num_draft") if by_delta else ("num_draft", "delta")
    if by_delta and swept[0].num_draft == AUTO:
        axes.set_xlabel("delta, at as many draft tokens per round as pay")
    elif by_delta:
        axes.set_xlabel(f"delta, at {swept[0].num_draft} draft tokens per round")
    else:
        axes.set_xlabel("draft tokens per round")
    lines: dict[tuple, list[Row]] = {}
    for row in swept:
        lines.setdefault((row.temperature, getattr(row, other)), []).append(row)
    quality = None
    for number, ((temperature, value), its) in enumerate(lines.items()):
        name = f"temperature {temperature:g}"
        if not by_delta:
            name += f", delta {value:g}" if value else ""
            for row in its:
                if row.num_draft == AUTO:
                    style = {"color": f"C{number}", "marker": "*", "markersize": 13}
                    style |= {"linestyle": "none", "capsize": 2, "zorder": 3}
                    label = f"{name}, auto ({row.mean_draft:.1f} on average)"
                    axes.errorbar(
                        [row.mean_draft],
                        [row.speedup],
                        _spread([row]),
                        label=label,
                        **style,
                    )
            its = [row for row in its if row.num_draft != AUTO]
            if not its:
                continue
        its.sort(key=lambda row: getattr(row, x))
        places = [getattr(row, x) for row in its]
        measured = [row.speedup for row in its]
        style = {"color": f"C{number}", "marker": "o", "capsize": 2}
        axes.errorbar(places, measured, _spread(its), label=name, **style)
        if not by_delta:
            predicted = [(row.num_draft, row.expected) for row in its if row.expected]
            style = {"color": f"C{number}", "linestyle": "--"}
            if predicted:
                expected = f"{name}, expected of decoding"
                axes.plot(*zip(*predicted, strict=True), label=expected, **style)
        elif all(row.bleu is not None for row in its):
            quality = quality or axes.twinx()
            quality.set_ylabel("sacreBLEU (dotted)")
            style = {"color": f"C{number}", "linestyle": ":", "marker": "."}
            quality.plot(places, [row.bleu for row in its], **style)
    for number, row in enumerate(row for row in rows if row.num_draft is None):
        style = {"color": f"C{number + len(lines)}", "linestyle": ":"}
        axes.axhline(row.speedup, label=row.name, **style)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="lower right" if by_delta else "best")
    figure.savefig(path, dpi=150)


def _spread(rows: list[Row]) -> list[list[float]] | None:
    """How far their intervals reach, down and up."""
    if rows[0].low is None:
        return None
    return [
        [row.speedup - row.low for row in rows],
        [row.high - row.speedup for row in rows],
    ]


def plot_costs(curves: list[Curve], path: Path, title: str) -> None:
    """Draw what rounds cost over their draft tokens, and the target's pass of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.set_xlabel("draft tokens per round")
    axes.set_ylabel("cost, in rounds of the target alone")
    axes.axhline(1, color="gray", linewidth=0.8)
    for number, curve in enumerate(curves):
        color, name = f"C{number}", f"batch {curve.batch_size}"
        places = [row.num_draft for row in curve.rows]
        middle = [row.cost_low for row in curve.rows], [r.cost_high for r in curve.rows]
        axes.fill_between(places, *middle, color=color, alpha=0.2, linewidth=0)
        costs = [row.cost for row in curve.rows]
        axes.plot(places, costs, color=color, marker="o", label=name)
        if any(row.c is not None for row in curve.rows):
            passes = [row.v for row in curve.rows]
            label = f"{name}, the target's pass"
            axes.plot(places, passes, color=color, linestyle="--", label=label)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def require_matplotlib(path: Path | None) -> None:
    """See to it that a plot can be drawn into a file, if there is to be one.

    Raises:
        InputError: matplotlib is missing, or has no such kind of file.
    """
    if path is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    kinds = Figure().canvas.get_supported_filetypes().keys() - {"pgf"}  # needs TeX
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"{path}: a plot is one of {', '.join(sorted(kinds))}")

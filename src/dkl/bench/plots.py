"""Figures of a benchmark, from its rows alone: the same rows give the same figure anywhere."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dkl.bench.floor import ROOFLINE, TWO_EXPS
from dkl.bench.rows import BenchRow
from dkl.bench.steps import DTYPES
from dkl.reports.style import (
    FAINT,
    INK,
    NEGATIVE,
    POSITIVE,
    add_legend,
    figure_style,
    look,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_WHAT = {
    "losses": "forward and backward",
    "linear": "head and loss, forward and backward",
    "train": "a training step",
    "evaluate": "an evaluation",
}
_MEASURES = {"time": "Time", "peak_memory": "Peak memory beyond the inputs"}
_LARGEST = 10.0  # where bars are cut: the pairwise form would leave no room for the others
_LIMITS = (ROOFLINE, TWO_EXPS)  # not methods, but what no method can beat


def save_plots(rows: Sequence[BenchRow], folder: Path | str) -> list[Path]:
    """Draw every figure that the rows have data for, as PNG files.

    Args:
        rows: of any tables.
        folder: where to write; it is made.

    Returns:
        One path per figure: "TABLE_time.png" and "TABLE_peak_memory.png" with ratios to the
        baseline, "losses_time_by_classes.png" and "losses_memory_by_classes.png".
    """
    directory = Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | None] = {}
    for table in dict.fromkeys(row.table for row in rows):
        own = [row for row in rows if row.table == table]
        for metric in _MEASURES:
            figures[f"{table}_{metric}"] = ratio_bars(own, metric)
        figures[f"{table}_time_by_classes"] = time_by_classes(own)
        figures[f"{table}_memory_by_classes"] = memory_by_classes(own)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(directory / f"{name}.png")
            with figure_style():
                figure.savefig(files[-1], dpi=160)
    return files


def ratio_bars(rows: Sequence[BenchRow], metric: str) -> "Figure | None":
    """Draw a panel per case: how often each method takes the time or memory of the baseline.

    Args:
        rows: of one table.
        metric: "time" or "peak_memory".

    Returns:
        The figure; None where nothing but the baseline was measured.
    """
    kept = [
        row
        for row in rows
        if row.metric == metric and row.ratio and row.method != row.baseline and not _is_swept(row)
    ]
    if not kept:
        return None
    cases = list(dict.fromkeys(row.case for row in kept))
    baselines = list(dict.fromkeys(str(row.baseline) for row in kept))
    with figure_style():
        most = max(sum(row.case == case for row in kept) for case in cases)
        names = [row.method for row in kept]
        fits_twice = max(map(len, names)) <= 16 and max(map(len, cases)) <= 40
        num_columns = 2 if fits_twice and len(cases) > 1 else 1
        num_rows = -(-len(cases) // num_columns)
        title = f"{_MEASURES[metric]} as a ratio to {' and '.join(baselines)}: {_what(rows)}"
        figure = new_figure(0.5 + num_rows * (0.55 + 0.19 * most), title)
        panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True)
        for axes, case in zip(panels.flat, cases, strict=False):
            _draw_bars(axes, [row for row in kept if row.case == case])
            axes.set_title(case)
        for axes in list(panels.flat)[len(cases) :]:
            axes.remove()
        _set_range(panels[0, 0], [float(row.ratio or 1.0) for row in kept])
        figure.supxlabel(_machine(kept), fontsize=8, x=0.012, ha="left")
    return figure


def _draw_bars(axes: "Axes", rows: Sequence[BenchRow]) -> None:
    for place, row in enumerate(rows):
        ratio = float(row.ratio or 1.0)
        colour = POSITIVE if ratio < 1.0 else NEGATIVE
        if row.method in _LIMITS:
            colour = FAINT
        # On a logarithmic axis a bar has no zero to start from; here it starts at the baseline.
        axes.barh(place, ratio - 1.0, left=1.0, height=0.72, color=colour, zorder=2)
        is_cut = ratio > _LARGEST
        if row.ratio_low is not None and row.ratio_high is not None and not is_cut:
            axes.plot([row.ratio_low, row.ratio_high], [place, place], color=INK, linewidth=1.0)
        is_right = ratio >= 1.0
        ends = (ratio, row.ratio_low or ratio, row.ratio_high or ratio)
        axes.annotate(
            f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}",
            (_LARGEST if is_cut else max(ends) if is_right else min(ends), place),
            xytext=(3 if is_right and not is_cut else -3, 0),
            textcoords="offset points",
            ha="left" if is_right and not is_cut else "right",
            va="center",
            fontsize=8,
            color="white" if is_cut else INK,
        )
    axes.set_xscale("log")
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="x", labelbottom=True)


def _set_range(axes: "Axes", ratios: Sequence[float]) -> None:
    """Leave room for the numbers at the ends of the bars; the panels share this axis."""
    low, high = min(*ratios, 1.0), min(max(*ratios, 1.0), _LARGEST)
    room = max(math.log10(high / low), 0.7) * 0.4
    low /= 10 ** (room if low < 1.0 else 0.1)
    if high < _LARGEST:
        high = min(high * 10 ** (room if high > 1.0 else 0.1), _LARGEST)
    axes.set_xlim(low, high)
    _plain_numbers(axes.xaxis, low, high)


def _plain_numbers(axis: "Axis", low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers; powers of ten alone where they are many."""
    from matplotlib.ticker import LogLocator, NullFormatter

    subs = (1.0, 2.0, 5.0) if high < 50 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def time_by_classes(rows: Sequence[BenchRow]) -> "Figure | None":
    """Draw the time of an element against the number of classes, with the roofline.

    Args:
        rows: of the table of losses.

    Returns:
        The figure; None without a sweep.
    """
    kept = [row for row in rows if row.metric == "time_per_element"]
    title = f"Time per element at constant N C: {_what(rows)}"
    return _by_classes(kept, title, "ns per element", 1e-9, is_log=True)


def memory_by_classes(rows: Sequence[BenchRow]) -> "Figure | None":
    """Draw the peak memory against the number of classes, with the size of the gradient.

    Args:
        rows: of the table of losses.

    Returns:
        The figure; None without a sweep that measured memory.
    """
    kept = [row for row in rows if row.metric == "peak_memory" and _is_swept(row)]
    title = f"Peak memory beyond the inputs at constant N C: {_what(rows)}"
    return _by_classes(kept, title, "MiB", 2.0**20, is_log=False)


def _by_classes(
    rows: Sequence[BenchRow], title: str, label: str, unit: float, *, is_log: bool
) -> "Figure | None":
    if not rows:
        return None
    with figure_style():
        figure = new_figure(3.6, title)
        axes = figure.subplots()
        methods = [name for name in dict.fromkeys(row.method for row in rows) if name != ROOFLINE]
        handles, labels = [], []
        for place, method in enumerate(methods):
            style = look(place)
            points = _points([row for row in rows if row.method == method], unit)
            classes = [num for num, *_ in points]
            lows, highs = [low for _, _, low, _ in points], [high for *_, high in points]
            axes.fill_between(classes, lows, highs, color=style.colour, alpha=0.18, linewidth=0)
            handles += axes.plot(
                classes,
                [value for _, value, _, _ in points],
                color=style.colour,
                linestyle=style.line,
                marker=style.marker,
                markersize=4.5,
                linewidth=1.6,
            )
            labels.append(method)
        floor, name = _floor(rows, unit)
        handles += axes.plot(*floor, color=INK, linestyle=(0, (5, 3)), linewidth=1.2)
        labels.append(name)
        axes.set(xscale="log", xlabel="classes C", ylabel=label)
        axes.set_xticks(floor[0], [f"{num:,}" for num in floor[0]])
        axes.minorticks_off()
        if is_log:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis, *axes.get_ylim())
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(_machine(rows), fontsize=8)
        add_legend(figure, handles, labels)
    return figure


def _points(rows: Iterable[BenchRow], unit: float) -> list[tuple[int, float, float, float]]:
    """Return C, value, low and high of each row, by C."""
    return sorted(
        (
            row.settings["shape"][1],
            row.value / unit,
            (row.value if row.low is None else row.low) / unit,
            (row.value if row.high is None else row.high) / unit,
        )
        for row in rows
    )


def _floor(rows: Sequence[BenchRow], unit: float) -> tuple[tuple[list[int], list[float]], str]:
    """Return the line that no method can go below, and its name."""
    points = _points([row for row in rows if row.method == ROOFLINE], unit)
    if points:
        line = [num for num, *_ in points], [value for _, value, *_ in points]
        return line, "roofline: bytes over measured copy bandwidth"
    sizes = {
        row.settings["shape"][1]: math.prod(row.settings["shape"])
        * DTYPES[row.settings["dtype"]].itemsize
        / unit
        for row in rows
    }
    classes = sorted(sizes)
    return (classes, [sizes[num] for num in classes]), "the gradient itself"


def _is_swept(row: BenchRow) -> bool:
    return bool(row.settings.get("sweep"))


def _what(rows: Sequence[BenchRow]) -> str:
    table = rows[0].table if rows else ""
    return _WHAT.get(table, table)


def _machine(rows: Sequence[BenchRow]) -> str:
    words = [str(rows[0].settings.get("dtype", "")), str(rows[0].origin.get("device", ""))]
    return ", ".join(word for word in words if word)

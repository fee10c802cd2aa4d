"""Figures per class: differences of class margins, and the class table as a heat map."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from dkl.reports.groups import Group, Spread, find_rows_by, group_runs
from dkl.reports.records import ResultRow, Run
from dkl.reports.style import INK, NEGATIVE, POSITIVE, figure_style, name_places, new_figure
from dkl.reports.tables import describe_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_NAMED = 30  # classes; more names than this do not fit side by side
_MAX_NAME = 16  # characters
_MAX_NUMBERS = 12  # classes; more numbers than this do not fit into the cells


def class_margin_differences(
    runs: Iterable[Run], *, method: str | None = None, reference: str | None = None
) -> "Figure | None":
    """Plot, per class, the margin of one recipe minus that of another (figure 3c of the paper).

    The margin of class y is the mean probability of y over the images of y, minus the largest mean
    probability of another class. Means over seeds; bars of the standard error where both recipes
    have several seeds.

    Args:
        runs: at least one run; their "class_margin" rows are shown.
        method: label of the recipe shown; by default the first one with "ikl" in it, else the last
            one; recipes tested under attack before others.
        reference: label of the recipe subtracted; by default the first one with "trades" in it.

    Returns:
        The figure; None where one of the two has no rows.

    Raises:
        ValueError: a label that no recipe has.
    """
    groups, _ = group_runs(runs)
    pair = margin_pair(groups, method, reference)
    if pair is None:
        return None
    shown, subtracted = (_margins(group) for group in pair)
    names = _class_names([run for group in pair for run in group.runs], len(shown))
    differences = [
        (shown[index].mean - subtracted[index].mean, _error(shown[index], subtracted[index]), name)
        for index, name in enumerate(names)
    ]
    with figure_style():
        seeds = "mean over seeds" if any(len(group.runs) > 1 for group in pair) else "one seed"
        title = f"Class margin: {pair[0].label} minus {pair[1].label}, {seeds}"
        figure = new_figure(3.4, title)
        axes = figure.subplots()
        if len(differences) > _MAX_NAMED:
            differences.sort(key=lambda difference: -difference[0])
            axes.set_xlabel(f"{len(differences)} classes, sorted by difference")
            axes.set_xticks([])
        else:
            axes.set_xlabel("class")
            name_places(axes, [_shorten(name) for name in names], width=6.0)
        _draw_bars(axes, [(value, error) for value, error, _ in differences])
        axes.set_ylabel("margin difference (probability)")
    return figure


def class_table_heat_map(runs: Iterable[Run], *, label: str | None = None) -> "Figure | None":
    """Plot the class table of a recipe: row y is the mean prediction for images of class y.

    Args:
        runs: at least one run.
        label: label of the recipe; by default the last one that has a table.

    Returns:
        The figure, mean over seeds; None where there is no table.

    Raises:
        ValueError: a label that no recipe has.
    """
    groups, _ = group_runs(runs)
    if label is not None:
        groups = [_named(groups, label)]
    found = [(g, tables) for g in groups if (tables := _tables(g))]
    if not found:
        return None
    group, tables = found[-1]
    num_classes = len(tables[0])
    mean_CC = [
        [fmean(table[row][column] for table in tables) for column in range(num_classes)]
        for row in range(num_classes)
    ]
    names = _class_names([run for run in group.runs if run.class_table], num_classes)
    with figure_style():
        from matplotlib.colors import PowerNorm

        seeds = f"mean over {len(tables)} seeds" if len(tables) > 1 else "one seed"
        figure = new_figure(5.4, f"Class table of {group.label}, {seeds}")
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(
            mean_CC, cmap="cividis", norm=PowerNorm(0.5, vmin=0.0, vmax=max(map(max, mean_CC)))
        )
        bar = figure.colorbar(image, ax=axes, label="mean probability (square-root colour scale)")
        bar.outline.set_visible(False)
        axes.set(xlabel="predicted class", ylabel="class of the images")
        if num_classes <= _MAX_NAMED:
            short = [_shorten(name) for name in names]
            name_places(axes, short, width=4.4)
            axes.set_yticks(range(num_classes), short)
        if num_classes <= _MAX_NUMBERS:
            _write_numbers(axes, mean_CC)
    return figure


def margin_pair(
    groups: Sequence[Group], method: str | None = None, reference: str | None = None
) -> tuple[Group, Group] | None:
    """Choose the two recipes of ``class_margin_differences``; None where one is missing."""
    asked = [_named(groups, label) for label in (method, reference) if label is not None]
    with_rows = [group for group in groups if _margins(group)]
    if any(group not in with_rows for group in asked):
        return None
    trades = [group for group in with_rows if "trades" in group.label.lower()]
    if reference is not None:
        trades = [_named(groups, reference)]
    if not trades:
        return None
    subtracted = trades[0]
    others = [
        group
        for group in with_rows
        if group is not subtracted and len(_margins(group)) == len(_margins(subtracted))
    ]
    # Sorting is stable: the first "ikl" of those tested comes last, else the last one tested.
    others = [g for g in others if not _is_ikl(g)] + [g for g in others if _is_ikl(g)][::-1]
    others.sort(key=_tested_under_attack)
    if method is not None:
        others = [group for group in others if group.label == method]
    return (others[-1], subtracted) if others else None


def _is_ikl(group: Group) -> bool:
    return "ikl" in group.label.lower()


def _named(groups: Sequence[Group], label: str) -> Group:
    for group in groups:
        if group.label == label:
            return group
    known = ", ".join(group.label for group in groups)
    raise ValueError(f"no recipe is labelled {label!r}; there are: {known}")


def _tested_under_attack(group: Group) -> bool:
    return any(
        row.epsilon is not None and describe_metric(row.metric) is not None
        for run in group.runs
        for row in run.results
    )


def per_class(group: Group, metric: str) -> list[Spread]:
    """Return a metric over seeds, one entry per class.

    Args:
        group: from ``group_runs``.
        metric: of rows with a class_index.

    Returns:
        Spreads by class; empty where rows lack or do not number the classes from 0.
    """
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for index, row in find_rows_by(run, metric, _class_index).items():
            values.setdefault(index, []).append(row.value)
    if sorted(values) != list(range(len(values))):
        return []
    return [Spread.of(values[index]) for index in range(len(values))]


def class_labels(runs: Iterable[Run], num_classes: int) -> list[str]:
    """Return names of the classes, short enough for an axis."""
    return [_shorten(name) for name in _class_names(runs, num_classes)]


def _margins(group: Group) -> list[Spread]:
    return per_class(group, "class_margin")


def _class_index(row: ResultRow) -> int:
    return -1 if row.class_index is None else row.class_index


def _error(first: Spread, second: Spread) -> float | None:
    """Return the standard error of the difference of two means."""
    if first.deviation is None or second.deviation is None:
        return None
    return math.sqrt(first.deviation**2 / first.num_seeds + second.deviation**2 / second.num_seeds)


def _draw_bars(axes: "Axes", bars: Sequence[tuple[float, float | None]]) -> None:
    values = [value for value, _ in bars]
    colours = [POSITIVE if value >= 0 else NEGATIVE for value in values]
    errors = [error for _, error in bars if error is not None]
    axes.bar(
        range(len(values)),
        values,
        color=colours,
        width=0.7,
        yerr=errors if len(errors) == len(values) else None,
        error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2.5},
    )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(visible=False, axis="x")


def _tables(group: Group) -> list[tuple[tuple[float, ...], ...]]:
    tables = [run.class_table for run in group.runs if run.class_table is not None]
    return [table for table in tables if len(table) == len(tables[0])]


def _class_names(runs: Iterable[Run], num_classes: int) -> list[str]:
    for run in runs:
        if len(run.class_names) == num_classes:
            return list(run.class_names)
    return [str(index) for index in range(num_classes)]


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 2] + ".."


def _write_numbers(axes: "Axes", mean_CC: Sequence[Sequence[float]]) -> None:
    largest = max(map(max, mean_CC))
    for row, values in enumerate(mean_CC):
        for column, value in enumerate(values):
            bright = math.sqrt(value / largest) > 0.6
            text = f"{value:.2f}" if value >= 0.005 else "0"
            colour = "#000000" if bright else "#ffffff"
            axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)

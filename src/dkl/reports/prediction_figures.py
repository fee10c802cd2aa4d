"""Figures of predictions: reliability, gain by class, and classes by their training images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dkl.reports.class_figures import class_labels
from dkl.reports.groups import Group, Spread, find_row, find_rows_by, group_runs
from dkl.reports.recipe_facts import setting
from dkl.reports.records import Run
from dkl.reports.style import (
    FAINT,
    INK,
    NEGATIVE,
    POSITIVE,
    add_legend,
    figure_style,
    look,
    name_places,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOT_METRICS = {
    "many": "many_accuracy",
    "medium": "medium_accuracy",
    "few": "few_accuracy",
    "all": "clean_accuracy",
}
_MAX_PANELS = 6
_MAX_BARS = 8  # recipes side by side over one group of classes
_MAX_NAMED = 30  # classes
_LACKING, _BEYOND = "#f0b48a", "#80cfb9"  # light tints of the palette's orange and green


@dataclass(frozen=True)
class _Bins:
    """A recipe's reliability, over the predictions of all its seeds."""

    group: Group
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    share: tuple[float, ...]
    error: Spread | None


def reliability_diagram(runs: Iterable[Run]) -> "Figure | None":
    """Plot accuracy against confidence, and how many predictions have that confidence.

    Args:
        runs: at least one run; their "reliability" rows are shown, of at most six recipes. Seeds
            are taken together.

    Returns:
        The figure, two panels per recipe; None where there are no such rows.
    """
    groups, _ = group_runs(runs)
    found = [bins for bins in map(_bins, groups) if bins is not None]
    if not found:
        return None
    shown = found[:_MAX_PANELS]
    most = max(share for bins in shown for share in bins.share)
    with figure_style():
        some = f", {len(shown)} of {len(found)} recipes" if len(found) > len(shown) else ""
        num_columns = 2 if len(shown) in (1, 2, 4) else 3
        num_rows = -(-len(shown) // num_columns)
        figure = new_figure(0.4 + 3.3 * num_rows, f"Reliability of predictions, test data{some}")
        grid = figure.subplots(
            2 * num_rows,
            num_columns,
            squeeze=False,
            sharex=True,
            height_ratios=[2.6, 1.0] * num_rows,
        )
        for place, bins in enumerate(shown):
            row, column = divmod(place, num_columns)
            above, below = grid[2 * row][column], grid[2 * row + 1][column]
            _draw_reliability(above, bins, first=column == 0)
            _draw_histogram(below, bins, most, first=column == 0)
        for place in range(len(shown), num_rows * num_columns):
            row, column = divmod(place, num_columns)
            grid[2 * row][column].remove()
            grid[2 * row + 1][column].remove()
    return figure


def _bins(group: Group) -> _Bins | None:
    """Add up the bins of a recipe's seeds; those with another number of bins stay out."""
    rows = [row for run in group.runs if (row := find_row(run, "reliability")) is not None]
    rows = [row for row in rows if len(row.details["count"]) == len(rows[0].details["count"])]
    if not rows:
        return None
    counts = [sum(numbers) for numbers in zip(*(r.details["count"] for r in rows), strict=True)]
    means: dict[str, tuple[float, ...]] = {}
    for name in ("confidence", "accuracy"):
        sums = [
            sum(row.details["count"][place] * row.details[name][place] for row in rows)
            for place in range(len(counts))
        ]
        means[name] = tuple(
            total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)
        )
    errors = [
        100 * row.value
        for run in group.runs
        if (row := find_row(run, "expected_calibration_error")) is not None
    ]
    return _Bins(
        group,
        means["confidence"],
        means["accuracy"],
        tuple(count / sum(counts) for count in counts),
        Spread.of(errors) if errors else None,
    )


def _draw_reliability(axes: "Axes", bins: _Bins, *, first: bool) -> None:
    """Draw a bar of accuracy per bin, its distance from the confidence, and the diagonal."""
    width = 1 / len(bins.share)
    for place, share in enumerate(bins.share):
        if share == 0:
            continue
        accuracy, confidence = bins.accuracy[place], bins.confidence[place]
        middle, low = (place + 0.5) * width, min(accuracy, confidence)
        colour = _LACKING if accuracy < confidence else _BEYOND
        apart = abs(accuracy - confidence)
        axes.bar(middle, low, width=0.92 * width, color=POSITIVE, linewidth=0)
        axes.bar(middle, apart, bottom=low, width=0.92 * width, color=colour, linewidth=0)
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=0.9)
    axes.set(xlim=(0, 1), ylim=(0, 1), title=_panel_title(bins))
    axes.tick_params(labelbottom=False)
    if first:
        axes.set_ylabel("accuracy")


def _panel_title(bins: _Bins) -> str:
    label = bins.group.label
    short = label if len(label) <= 32 else f"{label[:30]}.."
    if bins.error is None:
        return short
    spread = (
        "" if bins.error.deviation is None else f" \N{PLUS-MINUS SIGN} {bins.error.deviation:.1f}"
    )
    return f"{short}\nECE {bins.error.mean:.1f}{spread} %"


def _draw_histogram(axes: "Axes", bins: _Bins, most: float, *, first: bool) -> None:
    width = 1 / len(bins.share)
    middles = [(place + 0.5) * width for place in range(len(bins.share))]
    shares = [100 * share for share in bins.share]
    axes.bar(middles, shares, width=0.92 * width, color="#8a929b", linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 105 * most), xlabel="confidence")
    axes.tick_params(labelbottom=True)
    if first:
        axes.set_ylabel("images (%)")


def class_gain(
    runs: Iterable[Run], *, method: str | None = None, reference: str | None = None
) -> "Figure | None":
    """Plot, per class, the test accuracy of one recipe minus that of another, sorted.

    Where both have seeds in common the bars are means of differences by seed, with one standard
    deviation; otherwise differences of means.

    Args:
        runs: at least one run; their "class_accuracy" rows are shown.
        method: label of the recipe shown; by default the first one whose method is ikl_kd, else
            gkl_kd.
        reference: label of the recipe subtracted; by default the first one whose method is kd.

    Returns:
        The figure; None where one of the two has no rows, or they are of other data.

    Raises:
        ValueError: a label that no recipe has.
    """
    groups, _ = group_runs(runs)
    shown = _choose(groups, method, ("ikl_kd", "gkl_kd"))
    subtracted = _choose(groups, reference, ("kd",))
    if shown is None or subtracted is None or shown is subtracted:
        return None
    gains, is_paired = _gains(shown, subtracted)
    if not gains:
        return None
    names = class_labels([*shown.runs, *subtracted.runs], len(gains))
    order = sorted(gains, key=lambda index: -gains[index].mean)
    with figure_style():
        title = f"Accuracy by class: {shown.label} minus {subtracted.label}, {_seeds(gains)}"
        figure = new_figure(3.4, title)
        axes = figure.subplots()
        _draw_gains(axes, [gains[index] for index in order])
        if len(order) > _MAX_NAMED:
            axes.set_xlabel(f"{len(order)} classes, sorted by gain")
            axes.set_xticks([])
        else:
            axes.set_xlabel("class, sorted by gain")
            name_places(axes, [names[index] for index in order], width=6.0)
        axes.set_ylabel("gain (points)" if is_paired else "difference of means (points)")
    return figure


def _choose(groups: Sequence[Group], label: str | None, kinds: Sequence[str]) -> Group | None:
    """Return the recipe of a label, else the first with one of these methods and class rows."""
    if label is not None:
        named = [group for group in groups if group.label == label]
        if not named:
            known = ", ".join(group.label for group in groups)
            raise ValueError(f"no recipe is labelled {label!r}; there are: {known}")
        return named[0]
    for kind in kinds:
        for group in groups:
            if setting(group.recipe, "method.kind") == kind and any(
                _by_class(r) for r in group.runs
            ):
                return group
    return None


def _by_class(run: Run) -> dict[int, float]:
    rows = find_rows_by(
        run, "class_accuracy", lambda row: -1 if row.class_index is None else row.class_index
    )
    return {index: 100 * row.value for index, row in rows.items() if index >= 0}


def _gains(shown: Group, subtracted: Group) -> tuple[dict[int, Spread], bool]:
    """Return class -> gain over seeds, and whether seeds were paired; nothing for other data."""
    if setting(shown.recipe, "data.name") != setting(subtracted.recipe, "data.name"):
        return {}, False
    first = {run.seed: found for run in shown.runs if (found := _by_class(run))}
    second = {run.seed: found for run in subtracted.runs if (found := _by_class(run))}
    classes = {tuple(found) for found in (*first.values(), *second.values())}
    if not first or not second or len(classes) != 1:
        return {}, False
    seeds = sorted(first.keys() & second.keys())
    if seeds:
        by_class = {
            index: [first[seed][index] - second[seed][index] for seed in seeds]
            for index in classes.pop()
        }
        return {index: Spread.of(values) for index, values in by_class.items()}, True
    means = {
        index: Spread.of([found[index] for found in first.values()]).mean
        - Spread.of([found[index] for found in second.values()]).mean
        for index in classes.pop()
    }
    return {index: Spread(mean, None, 1) for index, mean in means.items()}, False


def _seeds(gains: Mapping[int, Spread]) -> str:
    most = max(gain.num_seeds for gain in gains.values())
    return "one seed" if most < 2 else f"mean over {most} seeds and one standard deviation"


def _draw_gains(axes: "Axes", gains: Sequence[Spread]) -> None:
    values = [gain.mean for gain in gains]
    deviations = [gain.deviation for gain in gains if gain.deviation is not None]
    axes.bar(
        range(len(values)),
        values,
        color=[POSITIVE if value >= 0 else NEGATIVE for value in values],
        width=0.7 if len(values) <= _MAX_NAMED else 0.9,
        yerr=deviations if len(deviations) == len(values) else None,
        error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2.5 if len(values) < 50 else 0},
    )
    mean = math.fsum(values) / len(values)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axhline(mean, color=INK, linewidth=0.9, linestyle=":")
    # Where there is room: bars fall from the left to the right.
    above = mean >= 0
    axes.annotate(
        f"mean {mean:+.2f}",
        (1 if above else 0, mean),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3) if above else (2, -3),
        textcoords="offset points",
        ha="right" if above else "left",
        va="bottom" if above else "top",
        fontsize=8.5,
    )
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.02)


def shot_accuracies(runs: Iterable[Run]) -> "Figure | None":
    """Plot test accuracy on classes with many, medium and few training images, and on all.

    Args:
        runs: at least one run; recipes with "many_accuracy", "medium_accuracy" or "few_accuracy"
            rows are shown, at most eight.

    Returns:
        The figure, bars of means over seeds with one standard deviation; None without such rows.
    """
    groups, _ = group_runs(runs)
    found = [(group, shots) for group in groups if len(shots := _shots(group)) > 1]
    if not found:
        return None
    shown = found[:_MAX_BARS]
    names = [name for name in SHOT_METRICS if any(name in shots for _, shots in shown)]
    with figure_style():
        some = f", {len(shown)} of {len(found)} recipes" if len(found) > len(shown) else ""
        several = any(spread.num_seeds > 1 for _, shots in shown for spread in shots.values())
        seeds = "mean over seeds and one standard deviation" if several else "one seed"
        title = f"Accuracy by training images of a class: {seeds}{some}"
        figure = new_figure(3.2, title)
        axes = figure.subplots()
        handles: dict[str, Any] = {}
        width = 0.8 / len(shown)
        for number, (group, shots) in enumerate(shown):
            places = [place for place, name in enumerate(names) if name in shots]
            spreads = [shots[names[place]] for place in places]
            handles[group.label] = axes.bar(
                [place + width * (number - (len(shown) - 1) / 2) for place in places],
                [spread.mean for spread in spreads],
                width=0.9 * width,
                color=look(number).colour,
                hatch=("", "///", "...")[number // 6 % 3],
                edgecolor="white",
                linewidth=0,
                yerr=[spread.deviation or 0.0 for spread in spreads] if several else None,
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2.5},
            )
        axes.axvline(len(names) - 1.5, color=FAINT, linewidth=0.8)
        sizes = _class_counts([group for group, _ in shown])
        ticks = [f"{name}\n{sizes[name]} classes" if name in sizes else name for name in names]
        axes.set_xticks(range(len(names)), ticks)
        axes.set_ylabel("test accuracy (%)")
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        add_legend(figure, [*handles.values()], [*handles])
    return figure


def _shots(group: Group) -> dict[str, Spread]:
    """Return group of classes -> accuracy over seeds; "all" alone counts as nothing."""
    shots = {}
    for name, metric in SHOT_METRICS.items():
        rows = [row for run in group.runs if (row := find_row(run, metric)) is not None]
        if rows:
            shots[name] = Spread.of([100 * row.value for row in rows])
    return shots


def _class_counts(groups: Sequence[Group]) -> dict[str, int]:
    """Return how many classes each group has, where all runs say the same."""
    counts: dict[str, set[int]] = {}
    for group in groups:
        for run in group.runs:
            for name, metric in SHOT_METRICS.items():
                row = find_row(run, metric)
                if row is not None and isinstance(row.details.get("classes"), int):
                    counts.setdefault(name, set()).add(row.details["classes"])
    return {name: found.pop() for name, found in counts.items() if len(found) == 1}

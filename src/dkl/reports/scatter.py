"""Clean against robust accuracy (figure 2 of the paper): our runs, and published rows in grey."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dkl.reports.groups import Group, find_row, format_epsilon, group_runs
from dkl.reports.labels import label_points
from dkl.reports.published import (
    PREVIOUS_BEST,
    ROBUST_ABLATION,
    ROBUST_METHODS,
    AugmentationClass,
    PublishedRow,
)
from dkl.reports.recipe_facts import augmentation_class, setting
from dkl.reports.records import Run
from dkl.reports.style import INK, add_legend, figure_style, look, new_figure
from dkl.reports.tables import describe_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS: Mapping[AugmentationClass, tuple[str, str]] = {
    "basic": ("o", "basic augmentation"),
    "autoaugment": ("^", "AutoAugment"),
    "generated": ("s", "generated images"),
}
_GREY = "#8a929b"
_DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_EPSILON = 8 / 255  # of the published rows
Point = tuple[float, float]


@dataclass(frozen=True)
class _Points:
    """One recipe in the scatter: a point per run."""

    place: int
    group: Group
    points: tuple[Point, ...]

    @property
    def mean(self) -> Point:
        return fmean(x for x, _ in self.points), fmean(y for _, y in self.points)


def clean_versus_robust(runs: Iterable[Run]) -> "Figure | None":
    """Plot robust against clean test accuracy: a marker per run, its shape by augmentation.

    The attack is the strongest that most runs were tested with, see ``robust_metric``. Published
    rows stand in grey: on the same axes where the runs are of the paper's data and attack (all
    CIFAR-10 or all CIFAR-100, AutoAttack, Linf 8/255), else in a panel of their own.

    Args:
        runs: at least one run.

    Returns:
        The figure; None where no run has both accuracies.
    """
    groups, _ = group_runs(runs)
    chosen = robust_metric(groups)
    found = _found(groups, chosen) if chosen is not None else []
    if chosen is None or not found:
        return None
    metric, norm, epsilon = chosen
    described = describe_metric(metric)
    assert described is not None
    attack = f"accuracy under {described[2]}"
    same_data = _paper_data(found, chosen)
    apart = () if same_data or not _is_robust(found) else _published("CIFAR-100")
    context = _published(same_data) if same_data else ()
    with figure_style():
        threat = f"({norm}, epsilon {format_epsilon(epsilon)})"
        several = any(len(one.points) > 1 for one in found)
        what = "small markers are runs, large ones means" if several else "one marker per run"
        title = f"Clean accuracy and {attack} {threat}: {what}"
        figure = new_figure(6.9 if apart else 4.3, title)
        panels = figure.subplots(2, 1, height_ratios=(4, 3)) if apart else [figure.subplots()]
        panels[0].set(xlabel="clean test accuracy (%)", ylabel=f"test {attack} (%)")
        _draw_runs(panels[0], found, context)
        _draw_published(panels[-1], context or apart)
        if apart:
            title = "Published, CIFAR-100, WRN-34-10 (generated images: WRN-28-10), Linf 8/255"
            panels[1].set_title(title)
            panels[1].set(xlabel="clean accuracy (%)", ylabel="accuracy under AutoAttack (%)")
            _limit(panels[1], [_point(row) for row in apart])
        _add_legend(figure, found, context or apart)
        _label(panels, found, context, apart)
    return figure


def robust_metric(groups: Sequence[Group]) -> tuple[str, str, float] | None:
    """Choose the attack for the scatter: the one most runs were tested with, then the strongest.

    Args:
        groups: from ``group_runs``.

    Returns:
        Metric, norm and epsilon; None where no run has an attacked and a clean accuracy.
    """
    votes: dict[tuple[str, str, float], set[int]] = {}
    for group in groups:
        for run in group.runs:
            for row in run.results:
                attacked = row.norm is not None and row.epsilon is not None
                if attacked and row.split == "test" and _is_standard(row.metric):
                    key = (row.metric, str(row.norm), float(row.epsilon or 0.0))
                    if find_row(run, "clean_accuracy"):
                        votes.setdefault(key, set()).add(id(run))

    def rank(key: tuple[str, str, float]) -> tuple[object, ...]:
        described = describe_metric(key[0])
        assert described is not None
        return len(votes[key]), described[:2], key[2], key[1]

    return max(votes, key=rank, default=None)


def _is_standard(metric: str) -> bool:
    """Tell whether an accuracy is under an attack that papers report in this figure."""
    unusual = ("square_accuracy", "worst_case_accuracy")
    return describe_metric(metric) is not None and metric not in unusual


def _found(groups: Sequence[Group], chosen: tuple[str, str, float]) -> list[_Points]:
    metric, norm, epsilon = chosen
    found = []
    for place, group in enumerate(groups):
        points = []
        for run in group.runs:
            clean = find_row(run, "clean_accuracy")
            robust = find_row(run, metric, norm=norm, epsilon=epsilon)
            if clean and robust:
                points.append((100 * clean.value, 100 * robust.value))
        if points:
            found.append(_Points(place, group, tuple(points)))
    return found


def _is_robust(found: Sequence[_Points]) -> bool:
    return any(one.mean[1] > 1.0 for one in found)


def _paper_data(found: Sequence[_Points], chosen: tuple[str, str, float]) -> str | None:
    """Return the dataset whose published rows may share the axes with the runs, if any."""
    names = {setting(one.group.recipe, "data.name") for one in found}
    metric, norm, epsilon = chosen
    same_attack = metric == "auto_attack_accuracy" and norm == "Linf"
    if len(names) != 1 or not same_attack or abs(epsilon - _EPSILON) > 1e-6:
        return None
    return _DATASETS.get(str(names.pop()))


def _published(dataset: str) -> tuple[PublishedRow, ...]:
    """Return published rows of a dataset, one per method and augmentation."""
    rows = [row for row in ROBUST_METHODS if row.dataset == dataset]
    if dataset == "CIFAR-100":  # tables 1 and 12; the best with generated images is DM-AT's row
        rows += [ROBUST_ABLATION[0], *PREVIOUS_BEST[:2]]
    return tuple(rows)


def _point(row: PublishedRow) -> Point:
    assert row.clean is not None
    assert row.auto_attack is not None
    return row.clean, row.auto_attack


def _draw_runs(axes: "Axes", found: Sequence[_Points], context: Sequence[PublishedRow]) -> None:
    for one in found:
        marker, colour = _marker(one), look(one.place).colour
        xs, ys = zip(*one.points, strict=True)
        several = len(one.points) > 1
        axes.scatter(
            xs,
            ys,
            color=colour,
            marker=marker,
            s=16 if several else 46,
            alpha=0.45 if several else 0.9,
            linewidths=0,
        )
        if several:
            axes.plot(*one.mean, color=colour, marker=marker, markersize=7, linestyle="")
    inside, outside = _split(found)
    _limit(axes, [p for one in inside for p in one.points] + [_point(row) for row in context])
    if outside:
        short = _short_labels(found)
        text = ", ".join(
            f"{short[one.place]} ({one.mean[0]:.1f}, {one.mean[1]:.1f})" for one in outside
        )
        axes.set_title(f"Outside the axes: {text}", fontsize=8.5)


def _split(found: Sequence[_Points]) -> tuple[list[_Points], list[_Points]]:
    """Return the recipes that the axes must hold, and those far below that would squeeze them."""
    best = max(one.mean[1] for one in found)
    inside = [one for one in found if one.mean[1] >= best / 4]
    if len(inside) < 2:
        return [*found], []
    return inside, [one for one in found if one not in inside]


def _draw_published(axes: "Axes", rows: Sequence[PublishedRow]) -> None:
    for row in rows:
        marker, _ = _MARKERS[row.augmentation]
        axes.plot(*_point(row), color=_GREY, marker=marker, markersize=5, linestyle="", zorder=1.5)


def _marker(one: _Points) -> str:
    return _MARKERS[augmentation_class(one.group.recipe)][0]


def _add_legend(
    figure: "Figure", found: Sequence[_Points], published: Sequence[PublishedRow]
) -> None:
    from matplotlib.lines import Line2D

    used = {augmentation_class(one.group.recipe) for one in found}
    used |= {row.augmentation for row in published}
    shapes = [pair for kind, pair in _MARKERS.items() if kind in used]
    handles: list[Any] = [
        Line2D([], [], color=INK, marker=marker, markersize=6, linestyle="") for marker, _ in shapes
    ]
    labels = [name for _, name in shapes]
    if published:
        handles.append(Line2D([], [], color=_GREY, marker="o", markersize=5, linestyle=""))
        labels.append("grey: published")
    add_legend(figure, handles, labels)


def _label(
    panels: "Sequence[Axes]",
    found: Sequence[_Points],
    context: Sequence[PublishedRow],
    apart: Sequence[PublishedRow],
) -> None:
    """Write the names; the layout is final when this is called."""
    short = _short_labels(found)
    shown, _ = _split(found)
    seeds = [point for one in shown for point in one.points]
    for axes, ours, rows in ((panels[0], shown, context), (panels[-1], (), apart)):
        points = [*(one.mean for one in ours), *map(_point, rows)]
        names = [*(short[one.place] for one in ours), *(row.label for row in rows)]
        colours = [INK] * len(ours) + [_GREY] * len(rows)
        label_points(axes, points, names, colours, obstacles=seeds if ours else ())


def _short_labels(found: Sequence[_Points]) -> dict[int, str]:
    """Return labels without the words that all of them begin and end with."""
    words = [one.group.label.split("_") for one in found]
    shared = [[*same] for same in zip(*words, strict=False)]
    start = next((i for i, same in enumerate(shared) if len({*same}) > 1), len(shared))
    turned = [
        [*same] for same in zip(*(list(reversed(one[start:])) for one in words), strict=False)
    ]
    end = next((i for i, same in enumerate(turned) if len({*same}) > 1), len(turned))
    if len(found) == 1 or not all(one[start : len(one) - end] for one in words):
        return {one.place: one.group.label for one in found}
    return {
        one.place: "_".join(parts[start : len(parts) - end])
        for one, parts in zip(found, words, strict=True)
    }


def _limit(axes: "Axes", points: Sequence[Point]) -> None:
    axes.set_xlim(*_limits([x for x, _ in points]))
    axes.set_ylim(*_limits([y for _, y in points]))


def _limits(percentages: Sequence[float]) -> tuple[float, float]:
    """Return axis limits with some room, at least two points wide, not far outside 0 to 100."""
    low, high = min(percentages), max(percentages)
    room = max(0.12 * (high - low), (2.0 - (high - low)) / 2, 0.2)
    return max(low - room, min(low, 0.0) - 0.08 * (high - low) - 0.5), high + room

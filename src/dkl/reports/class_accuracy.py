"""Accuracy class by class, on clean images and under attack."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dkl.reports.class_figures import class_labels, margin_pair, per_class
from dkl.reports.groups import Group, Spread, format_epsilon, group_runs
from dkl.reports.measures import attack_title
from dkl.reports.records import Run
from dkl.reports.style import FAINT, Look, add_legend, figure_style, look, name_places, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (("class_accuracy", "Clean images"), ("class_robust_accuracy", "Under attack"))
_MAX_RECIPES = 6  # more markers than this above one class cannot be told apart
_MAX_NAMED = 30  # classes; with more, they are sorted and drawn as curves
Accuracies = Sequence[Spread]
Shown = tuple[int, Group, list[Accuracies]]  # place in the report, recipe, a list per panel


def class_accuracies(runs: Iterable[Run]) -> "Figure | None":
    """Plot clean and robust test accuracy of every class, mean over seeds with one deviation.

    Args:
        runs: at least one run; their "class_accuracy" and "class_robust_accuracy" rows are shown,
            of at most six recipes. With more than 30 classes each recipe's
            classes are sorted by accuracy.

    Returns:
        The figure; None where there are no such rows.
    """
    groups, _ = group_runs(runs)
    found: list[Shown] = [
        (place, group, [_percent(group, metric) for metric, _ in _PANELS])
        for place, group in enumerate(groups)
    ]
    found = [one for one in found if any(one[2])]
    if not found:
        return None
    shown = _some(found, margin_pair(groups) or ())
    if len(shown) < len(found):  # six of many: colours that differ matter more than the same ones
        shown = [(place, group, both) for place, (_, group, both) in enumerate(shown)]
    panels = [place for place in range(len(_PANELS)) if any(one[2][place] for one in shown)]
    num_classes = max(len(accuracies) for *_, both in shown for accuracies in both)
    with figure_style():
        figure = new_figure(0.5 + 2.3 * len(panels), _title(shown, len(found)))
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flat
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=True):
            metric, title = _PANELS[panel]
            axes.set(title=_panel_title(shown, metric, title), ylabel="test accuracy (%)")
            drawn = [(place, group, both[panel]) for place, group, both in shown if both[panel]]
            for number, (place, group, accuracies) in enumerate(drawn):
                shift = 0.7 * ((number + 0.5) / len(drawn) - 0.5)
                handles[group.label] = _draw(axes, accuracies, look(place), shift)
            axes.grid(visible=False, axis="x")
            axes.set_ylim(-3, 103)
            for edge in range(1, num_classes if num_classes <= _MAX_NAMED else 0):
                axes.axvline(edge - 0.5, color=FAINT, linewidth=0.6, zorder=0.5)
        _name_classes(axes, [group for _, group, _ in shown], num_classes)
        add_legend(figure, [*handles.values()], [*handles])
    return figure


def _some(found: Sequence[Shown], preferred: Sequence[Group]) -> Sequence[Shown]:
    """Return at most six recipes in their order, IKL-AT and TRADES among them."""
    if len(found) <= _MAX_RECIPES:
        return found
    order = sorted(found, key=lambda one: all(one[1] is not group for group in preferred))
    return sorted(order[:_MAX_RECIPES], key=lambda one: one[0])


def _percent(group: Group, metric: str) -> Accuracies:
    return [
        Spread(
            100 * one.mean, None if one.deviation is None else 100 * one.deviation, one.num_seeds
        )
        for one in per_class(group, metric)
    ]


def _title(shown: Sequence[Shown], num_found: int) -> str:
    seeds = "one seed"
    if any(len(group.runs) > 1 for _, group, _ in shown):
        seeds = "mean over seeds and one standard deviation"
    some = f", {len(shown)} of {num_found} recipes" if num_found > len(shown) else ""
    return f"Accuracy by class: {seeds}{some}"


def _panel_title(shown: Sequence[Shown], metric: str, title: str) -> str:
    """Name the attack in the title where it is the same for all."""
    threats = {
        (str(row.norm), float(row.epsilon), str(row.details.get("attack") or ""))
        for _, group, _ in shown
        for run in group.runs
        for row in run.results
        if row.metric == metric and row.epsilon is not None
    }
    if len(threats) != 1:
        return title
    ((norm, epsilon, attack),) = threats
    known = f"Under {attack_title(attack)}" if attack else title
    return f"{known} ({norm}, epsilon {format_epsilon(epsilon)})"


def _draw(axes: "Axes", accuracies: Accuracies, style: Look, shift: float) -> Any:
    if len(accuracies) > _MAX_NAMED:
        means = sorted((one.mean for one in accuracies), reverse=True)
        (line,) = axes.plot(means, color=style.colour, linestyle=style.line, linewidth=1.6)
        return line
    return axes.errorbar(
        [index + shift for index in range(len(accuracies))],
        [one.mean for one in accuracies],
        yerr=[one.deviation or 0.0 for one in accuracies],
        color=style.colour,
        marker=style.marker,
        markersize=5,
        linestyle="",
        elinewidth=0.9,
    )


def _name_classes(axes: "Axes", groups: Sequence[Group], num_classes: int) -> None:
    if num_classes > _MAX_NAMED:
        axes.set_xlabel(f"{num_classes} classes, sorted by accuracy for each recipe")
        return
    axes.set_xlabel("class")
    name_places(
        axes, class_labels([run for group in groups for run in group.runs], num_classes), 6.0
    )

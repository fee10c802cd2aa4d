"""Figures of the report: from runs to matplotlib figures, no state, None where data lack."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dkl.reports.class_figures import class_margin_differences, class_table_heat_map
from dkl.reports.groups import Group, Spread, find_row, find_rows_by, format_epsilon, group_runs
from dkl.reports.records import Run
from dkl.reports.style import add_legend, draw_band, figure_style, look, new_figure
from dkl.reports.tables import describe_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "class_margin_differences",
    "class_table_heat_map",
    "clean_versus_robust",
    "robust_metric",
    "robustness_curve",
    "training_curves",
]

_PANELS = (
    ("train_loss", "Training loss", "loss", 1.0),
    ("train_accuracy", "Training accuracy, clean images", "accuracy (%)", 100.0),
    ("val_accuracy", "Validation accuracy, clean images", "accuracy (%)", 100.0),
    ("val_robust_accuracy", "Validation accuracy under attack", "accuracy (%)", 100.0),
)


def training_curves(runs: Iterable[Run]) -> "Figure | None":
    """Plot loss and accuracies over epochs, mean over seeds with a band of one deviation.

    Args:
        runs: at least one run.

    Returns:
        The figure; None where no run has epoch records.

    Example:
        >>> from pathlib import Path
        >>> untrained = Run(Path("runs/kd"), {"name": "digits_kd"}, (), (), (), None, ())
        >>> training_curves([untrained]) is None
        True
    """
    groups, _ = group_runs(runs)
    panels = [panel for panel in _PANELS if any(_epochs_with(g, panel[0]) for g in groups)]
    if not panels:
        return None
    with figure_style():
        num_rows = -(-len(panels) // 2)
        figure = new_figure(0.4 + 2.3 * num_rows, f"Training by epoch: {_over_seeds(groups)}")
        grid = figure.subplots(num_rows, min(2, len(panels)), squeeze=False)
        handles: dict[str, Any] = {}
        for axes, (key, title, unit, factor) in zip(grid.flat, panels, strict=False):
            for place, group in enumerate(groups):
                if curve := _epochs_with(group, key):
                    ys = [Spread.of([factor * value for value in curve[x]]) for x in curve]
                    handles[group.label] = draw_band(axes, [*curve], ys, look(place))
            axes.set(title=title, xlabel="epoch", ylabel=unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        add_legend(figure, [*handles.values()], [*handles])
    return figure


def clean_versus_robust(runs: Iterable[Run]) -> "Figure | None":
    """Plot robust against clean test accuracy, a marker per run and a colour per recipe.

    The attack is the strongest that most runs were tested with, see ``robust_metric``.

    Args:
        runs: at least one run.

    Returns:
        The figure; None where no run has both accuracies.
    """
    groups, _ = group_runs(runs)
    chosen = robust_metric(groups)
    if chosen is None:
        return None
    metric, norm, epsilon = chosen
    points: dict[int, list[tuple[float, float]]] = {}
    for place, group in enumerate(groups):
        for run in group.runs:
            clean = find_row(run, "clean_accuracy")
            robust = find_row(run, metric, norm=norm, epsilon=epsilon)
            if clean and robust:
                points.setdefault(place, []).append((100 * clean.value, 100 * robust.value))
    if not points:
        return None
    described = describe_metric(metric)
    assert described is not None
    attack = f"accuracy under {described[2]}"
    with figure_style():
        threat = f"({norm}, epsilon {format_epsilon(epsilon)})"
        figure = new_figure(3.9, f"Clean accuracy and {attack} {threat}, per run")
        axes = figure.subplots()
        handles = []
        for place, pairs in points.items():
            style = look(place)
            handles.append(
                axes.scatter(
                    [clean for clean, _ in pairs],
                    [robust for _, robust in pairs],
                    color=style.colour,
                    marker=style.marker,
                    s=46,
                    alpha=0.85,
                    linewidths=0,
                )
            )
        axes.set(xlabel="clean test accuracy (%)", ylabel=f"test {attack} (%)")
        axes.set_xlim(*_limits([clean for pairs in points.values() for clean, _ in pairs]))
        axes.set_ylim(*_limits([robust for pairs in points.values() for _, robust in pairs]))
        add_legend(figure, handles, [groups[place].label for place in points])
    return figure


def robustness_curve(runs: Iterable[Run]) -> "Figure | None":
    """Plot accuracy over the attack budget epsilon, mean over seeds with a band.

    Args:
        runs: at least one run; their "epsilon_sweep_accuracy" rows are shown.

    Returns:
        The figure, one panel per norm; None where there are no such rows.
    """
    groups, _ = group_runs(runs)
    curves = [_sweep(group) for group in groups]
    norms = sorted({norm for curve in curves for norm, _ in curve})
    if not norms:
        return None
    with figure_style():
        figure = new_figure(3.6, f"Accuracy by attack budget: {_over_seeds(groups)}")
        handles: dict[str, Any] = {}
        for axes, norm in zip(
            figure.subplots(1, len(norms), squeeze=False).flat, norms, strict=True
        ):
            scale, unit = _epsilon_unit({eps for curve in curves for n, eps in curve if n == norm})
            for place, (group, curve) in enumerate(zip(groups, curves, strict=True)):
                shown = {eps * scale: ys for (n, eps), ys in curve.items() if n == norm}
                if shown:
                    handles[group.label] = draw_band(axes, [*shown], [*shown.values()], look(place))
            axes.set(xlabel=f"epsilon ({norm}{unit})", ylabel="test accuracy under attack (%)")
            axes.set_ylim(bottom=0)
        add_legend(figure, [*handles.values()], [*handles])
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
                if attacked and row.split == "test" and describe_metric(row.metric):
                    key = (row.metric, str(row.norm), float(row.epsilon or 0.0))
                    if find_row(run, "clean_accuracy"):
                        votes.setdefault(key, set()).add(id(run))

    def rank(key: tuple[str, str, float]) -> tuple[object, ...]:
        described = describe_metric(key[0])
        assert described is not None
        return len(votes[key]), described[:2], key[2], key[1]

    return max(votes, key=rank, default=None)


def _epochs_with(group: Group, key: str) -> dict[int, list[float]]:
    """Return epoch (1-based) -> values of the seeds that have it."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for record in run.epochs:
            value = record.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.setdefault(int(record["epoch"]) + 1, []).append(float(value))
    return dict(sorted(values.items()))


def _sweep(group: Group) -> dict[tuple[str, float], Spread]:
    values: dict[tuple[str, float], list[float]] = {}
    for run in group.runs:
        rows = find_rows_by(
            run, "epsilon_sweep_accuracy", lambda row: (row.norm or "", row.epsilon or 0.0)
        )
        for threat, row in rows.items():
            values.setdefault(threat, []).append(100 * row.value)
    return {threat: Spread.of(values[threat]) for threat in sorted(values)}


def _epsilon_unit(epsilons: Iterable[float]) -> tuple[float, str]:
    shown = [format_epsilon(epsilon) for epsilon in epsilons]
    return (255.0, ", in 1/255") if any(text.endswith("/255") for text in shown) else (1.0, "")


def _limits(percentages: Sequence[float]) -> tuple[float, float]:
    """Return axis limits with some room, at least two points wide, not far outside 0 to 100."""
    low, high = min(percentages), max(percentages)
    room = max(0.08 * (high - low), (2.0 - (high - low)) / 2, 0.2)
    return max(low - room, min(low, 0.0) - 0.08 * (high - low) - 0.5), high + room


def _over_seeds(groups: Sequence[Group]) -> str:
    most = max(len(group.runs) for group in groups)
    return "mean over seeds, band of one standard deviation" if most > 1 else "one seed"

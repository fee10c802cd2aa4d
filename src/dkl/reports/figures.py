"""Figures of the report: from runs to matplotlib figures, no state, None where data lack."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dkl.reports.class_figures import class_margin_differences, class_table_heat_map
from dkl.reports.groups import Group, Spread, find_rows_by, format_epsilon, group_runs
from dkl.reports.measures import attack_strength, attack_title, sweep_attack
from dkl.reports.records import Run
from dkl.reports.scatter import clean_versus_robust, robust_metric
from dkl.reports.style import add_legend, draw_band, figure_style, look, new_figure

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


def robustness_curve(runs: Iterable[Run]) -> "Figure | None":
    """Plot accuracy over the attack budget epsilon, mean over seeds with a band.

    Args:
        runs: at least one run; their "epsilon_sweep_accuracy" rows are shown.

    Returns:
        The figure, one panel per norm and attack (the strongest first); None where there are no
        such rows.
    """
    groups, _ = group_runs(runs)
    curves = [_sweeps(group) for group in groups]
    panels = sorted({which for curve in curves for which in curve}, key=_weaker_later)
    if not panels:
        return None
    with figure_style():
        attacks = {attack for attack, _ in panels}
        known = attack_title(attacks.pop()) if len(attacks) == 1 and attacks != {""} else "attack"
        attacked = f"under {known}"
        title = f"Accuracy {attacked} by attack budget: {_over_seeds(groups)}"
        num_rows = -(-len(panels) // 2)
        figure = new_figure(0.4 + 3.2 * num_rows, title)
        grid = figure.subplots(num_rows, min(2, len(panels)), squeeze=False)
        handles: dict[str, Any] = {}
        for axes, which in zip(grid.flat, panels, strict=False):
            attack, norm = which
            scale, unit = _epsilon_unit(
                {epsilon for one in curves for epsilon in one.get(which, ())}
            )
            for place, (group, curve) in enumerate(zip(groups, curves, strict=True)):
                if ys := curve.get(which):
                    xs = [epsilon * scale for epsilon in ys]
                    handles[group.label] = draw_band(axes, xs, [*ys.values()], look(place))
            axes.set(xlabel=f"epsilon ({norm}{unit})", ylabel=f"test accuracy {attacked} (%)")
            axes.set_ylim(bottom=0)
            if len(panels) > 1:
                axes.set(title=f"{attack_title(attack)}, {norm}", ylabel="test accuracy (%)")
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        add_legend(figure, [*handles.values()], [*handles])
    return figure


def _weaker_later(which: tuple[str, str]) -> tuple[object, ...]:
    attack, norm = which
    group, steps = attack_strength(attack)
    return norm, -group, -steps, attack


def _epochs_with(group: Group, key: str) -> dict[int, list[float]]:
    """Return epoch (1-based) -> values of the seeds that have it."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for record in run.epochs:
            value = record.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.setdefault(int(record["epoch"]) + 1, []).append(float(value))
    return dict(sorted(values.items()))


def _sweeps(group: Group) -> dict[tuple[str, str], dict[float, Spread]]:
    """Return (attack, norm) -> epsilon -> accuracy over seeds."""
    values: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in group.runs:
        rows = find_rows_by(
            run,
            "epsilon_sweep_accuracy",
            lambda row: (sweep_attack(row), row.norm or "", row.epsilon or 0.0),
        )
        for (attack, norm, epsilon), row in rows.items():
            curve = values.setdefault((attack, norm), {})
            curve.setdefault(epsilon, []).append(100 * row.value)
    return {
        which: {epsilon: Spread.of(curve[epsilon]) for epsilon in sorted(curve)}
        for which, curve in values.items()
    }


def _epsilon_unit(epsilons: Iterable[float]) -> tuple[float, str]:
    shown = [format_epsilon(epsilon) for epsilon in epsilons]
    return (255.0, ", in 1/255") if any(text.endswith("/255") for text in shown) else (1.0, "")


def _over_seeds(groups: Sequence[Group]) -> str:
    most = max(len(group.runs) for group in groups)
    return "mean over seeds, band of one standard deviation" if most > 1 else "one seed"

"""The comparison table: recipes against metrics, mean and spread over seeds."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dkl.reports.groups import Group, Spread, find_row, format_epsilon, group_runs
from dkl.reports.likeness import Difference, row_differences
from dkl.reports.masking import masking_notes
from dkl.reports.records import ResultRow, Run
from dkl.reports.rendering import PLUS_MINUS, TextTable

FINE_SAMPLES = 5000  # from here on an image weighs 0.02 points: two decimals mean something
NATS = "nats"
# Measurements of predictions beside accuracies: title and unit, in the order of the columns.
PREDICTIONS = {
    "expected_calibration_error": ("ECE", "%"),
    "negative_log_likelihood": ("NLL", NATS),
    "teacher_agreement": ("agreement", "%"),
    "teacher_kl": ("KL to teacher", NATS),
}


@dataclass(frozen=True)
class Column:
    """A metric under one threat."""

    metric: str
    norm: str | None
    epsilon: float | None
    title: str
    unit: str = "%"

    @property
    def factor(self) -> float:
        """From the value of a result row to the unit."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class TableRow:
    """One recipe: a cell per column (None where there is no row), in the unit of the column."""

    label: str
    settings_hash: str
    seeds: tuple[int, ...]
    cells: tuple[Spread | None, ...]
    num_samples: tuple[tuple[int, ...], ...]
    train_seconds: Spread | None


@dataclass(frozen=True)
class Table(TextTable):
    """What ``compare`` found, and how to show it; values are percent unless a column says else.

    ``differences`` keep the rows from being like for like.
    """

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    decimals: int = 1
    differences: tuple[Difference, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What keeps the rows from being like for like, in sentences."""
        return tuple(difference.sentence for difference in self.differences)

    @property
    def header(self) -> list[str]:
        """Column titles."""
        titles = [f"{column.title} ({column.unit})" for column in self.columns]
        return ["recipe", *titles, "seeds", "test images", "train (s)"]

    def lines(self, plus_minus: str = PLUS_MINUS) -> list[list[str]]:
        """Return the rows as text, a cell per column of ``header``."""
        return [
            [
                row.label,
                *(
                    show_spread(cell, len(row.seeds), self._decimals(column), plus_minus)
                    for column, cell in zip(self.columns, row.cells, strict=True)
                ),
                str(len(row.seeds)),
                _show_samples(row.num_samples),
                _show_seconds(row.train_seconds),
            ]
            for row in self.rows
        ]

    def _decimals(self, column: Column) -> int:
        return self.decimals if column.unit == "%" else 3

    def to_json(self) -> str:
        """Return everything as JSON: means and sample standard deviations in percent or nats."""
        rows = [
            {
                "recipe": row.label,
                "settings_hash": row.settings_hash,
                "seeds": list(row.seeds),
                "train_seconds": spread_json(row.train_seconds),
                "metrics": [
                    {
                        "metric": column.metric,
                        "norm": column.norm,
                        "epsilon": column.epsilon,
                        "num_samples": list(num_samples),
                        "unit": "percent" if column.unit == "%" else column.unit,
                        **spread_json(cell),
                    }
                    for column, cell, num_samples in zip(
                        self.columns, row.cells, row.num_samples, strict=True
                    )
                    if cell is not None
                ],
            }
            for row in self.rows
        ]
        document = {
            "unit": "percent",
            "differences": [vars(difference) for difference in self.differences],
            "rows": rows,
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2)


def show_spread(
    spread: Spread | None, num_seeds: int, decimals: int, plus_minus: str = PLUS_MINUS
) -> str:
    """Write mean and deviation, with the number of seeds where it is 1 or not ``num_seeds``.

    Example:
        >>> show_spread(Spread(80.0, 1.25, 2), 3, 1, "+-"), show_spread(None, 3, 1)
        ('80.0 +- 1.2 (n=2)', '-')
    """
    if spread is None:
        return "-"
    text = f"{spread.mean:.{decimals}f}"
    if spread.deviation is not None:
        text += f" {plus_minus} {spread.deviation:.{decimals}f}"
    unusual = spread.num_seeds == 1 or spread.num_seeds != num_seeds
    return f"{text} (n={spread.num_seeds})" if unusual else text


def compare(runs: Iterable[Run]) -> Table:
    """Compare recipes by the test results of their runs.

    Runs are grouped by recipe and settings, seeds apart; a cell is the mean over seeds with the
    sample standard deviation. Rows of the best checkpoint are taken, those of the last one where
    there are no others. What keeps rows from being like for like (other data, epochs, models or
    numbers of images) stands in the warnings, what else makes them hard to compare in the notes.

    Args:
        runs: at least one run.

    Returns:
        The table, in percent (likelihoods and divergences in nats).

    Raises:
        ValueError: no runs.

    Example:
        >>> from pathlib import Path
        >>> row = ResultRow(run_name="digits_kd", seed=0, metric="clean_accuracy", value=0.985,
        ...                 num_samples=200, settings_hash="00")
        >>> run = Run(Path("runs/kd"), {"name": "digits_kd", "seed": 0}, (), (), (row,), None, ())
        >>> print(compare([run]).to_text())
        recipe     clean (%)   seeds  test images  train (s)
        ---------  ----------  -----  -----------  ---------
        digits_kd  98.5 (n=1)      1          200          -
        note: Seeds are few: no spread for digits_kd (n=1).
    """
    groups, notes = group_runs(runs)
    columns = _columns(groups)
    chosen = {group.label: [_rows_of(group, column) for column in columns] for group in groups}
    rows = tuple(
        TableRow(
            label=group.label,
            settings_hash=group.runs[0].settings_hash,
            seeds=tuple(sorted(run.seed for run in group.runs)),
            cells=tuple(
                Spread.of([column.factor * row.value for row in found]) if found else None
                for column, found in zip(columns, chosen[group.label], strict=True)
            ),
            num_samples=tuple(
                tuple(sorted({row.num_samples for row in found})) for found in chosen[group.label]
            ),
            train_seconds=_train_seconds(group),
        )
        for group in groups
    )
    apart = row_differences(groups, chosen, [column.title for column in columns])
    above = tuple(f"The recipes differ in {one.aspect} (" for one in apart)
    notes = [note for note in notes if not note.startswith(above)]
    notes = _threat_note(columns) + notes + _doubts(groups, columns, chosen)
    fewest = min((num for row in rows for nums in row.num_samples for num in nums), default=0)
    decimals = 2 if fewest >= FINE_SAMPLES else 1
    return Table(tuple(columns), rows, tuple(notes), decimals, apart)


def describe_metric(metric: str) -> tuple[int, int, str] | None:
    """Return sorting keys and the title of an accuracy that tables show, None for other metrics.

    Example:
        >>> describe_metric("pgd_20_accuracy"), describe_metric("class_margin")
        ((1, 20, 'PGD-20'), None)
    """
    whole = {
        "clean_accuracy": (0, 0, "clean"),
        "many_accuracy": (0, 1, "many"),
        "medium_accuracy": (0, 2, "medium"),
        "few_accuracy": (0, 3, "few"),
        "square_accuracy": (3, 0, "Square"),
        "auto_attack_fast_accuracy": (4, 0, "AutoAttack-fast"),
        "auto_attack_accuracy": (5, 0, "AutoAttack"),
        "worst_case_accuracy": (6, 0, "worst case"),
    }
    if match := re.fullmatch(r"(pgd|cw)_(\d+)_accuracy", metric):
        name, steps = match[1], int(match[2])
        return (1 if name == "pgd" else 2), steps, f"{name.upper()}-{steps}"
    return whole.get(metric)


def _describe_column(metric: str) -> tuple[int, int, str] | None:
    if metric in PREDICTIONS:
        return 9, [*PREDICTIONS].index(metric), PREDICTIONS[metric][0]
    return describe_metric(metric)


def _columns(groups: Sequence[Group]) -> list[Column]:
    found = {
        (*described, row.norm or "", row.epsilon or 0.0): row
        for group in groups
        for run in group.runs
        for row in run.results
        if row.split == "test" and (described := _describe_column(row.metric))
    }
    threats = {(row.norm, row.epsilon) for row in found.values() if row.epsilon is not None}
    columns = []
    for (_, _, title, _, _), row in sorted(found.items(), key=lambda item: item[0]):
        several = row.epsilon is not None and len(threats) > 1
        threat = f" {row.norm} {format_epsilon(row.epsilon or 0.0)}" if several else ""
        unit = PREDICTIONS.get(row.metric, ("", "%"))[1]
        columns.append(Column(row.metric, row.norm, row.epsilon, title + threat, unit))
    return columns


def _rows_of(group: Group, column: Column) -> list[ResultRow]:
    rows = (
        find_row(run, column.metric, norm=column.norm, epsilon=column.epsilon) for run in group.runs
    )
    return [row for row in rows if row is not None]


def _train_seconds(group: Group) -> Spread | None:
    totals = [
        sum(float(epoch.get("seconds", 0.0)) for epoch in run.epochs)
        for run in group.runs
        if run.epochs
    ]
    return Spread.of(totals) if totals else None


def _threat_note(columns: Sequence[Column]) -> list[str]:
    threats = {(c.norm, c.epsilon) for c in columns if c.epsilon is not None}
    if len(threats) != 1:
        return []
    ((norm, epsilon),) = threats
    assert epsilon is not None
    return [f"Attacks: {norm}, epsilon {format_epsilon(epsilon)}."]


def _doubts(
    groups: Sequence[Group],
    columns: Sequence[Column],
    chosen: Mapping[str, Sequence[Sequence[ResultRow]]],
) -> list[str]:
    notes = []
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        notes.append(f"Seeds are few: no spread for {', '.join(single)} (n=1).")
    if not columns:
        notes.append("No test results yet: `dkl evaluate RUN` makes them.")
    return notes + masking_notes(groups) + _sample_notes(columns, chosen) + row_doubts(chosen)


def row_doubts(chosen: Mapping[str, Sequence[Sequence[ResultRow]]]) -> list[str]:
    """Say which lines mix weights, or hold numbers of another checkpoint than the best one.

    Args:
        chosen: label of a line -> the rows behind each of its cells.

    Returns:
        Notes for the reader.
    """
    notes = []
    rows_per_run = _rows_per_run(chosen)
    last = [label for (label, _), rows in rows_per_run.items() if _checkpoints(rows) - {"best"}]
    if last:
        names = ", ".join(dict.fromkeys(last))
        notes.append(f"Numbers of another checkpoint where the best one has no row: {names}.")
    mixed = [
        f"{label} seed {seed}"
        for (label, seed), rows in rows_per_run.items()
        if len({row.weights_hash for row in rows if row.weights_hash}) > len(_checkpoints(rows))
    ]
    if mixed:
        notes.append(f"Rows of different weights in one line, evaluate again: {', '.join(mixed)}.")
    return notes


def _sample_notes(
    columns: Sequence[Column], chosen: Mapping[str, Sequence[Sequence[ResultRow]]]
) -> list[str]:
    shown = {}
    for place, column in enumerate(columns):
        numbers = {row.num_samples for rows in chosen.values() for row in rows[place]}
        shown[column.title] = " and ".join(map(str, sorted(numbers)))
    if len(set(shown.values())) < 2:
        return []
    parts = ", ".join(f"{title} {numbers}" for title, numbers in shown.items())
    return [f"Test images: {parts}."]


def _rows_per_run(
    chosen: Mapping[str, Sequence[Sequence[ResultRow]]],
) -> dict[tuple[str, int], list[ResultRow]]:
    per_run: dict[tuple[str, int], list[ResultRow]] = {}
    for label, columns in chosen.items():
        for rows in columns:
            for row in rows:
                per_run.setdefault((label, row.seed), []).append(row)
    return per_run


def _checkpoints(rows: Iterable[ResultRow]) -> set[str]:
    return {row.checkpoint for row in rows}


def _show_samples(num_samples: Sequence[Sequence[int]]) -> str:
    numbers = sorted({number for some in num_samples for number in some})
    if not numbers:
        return "-"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _show_seconds(seconds: Spread | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds.mean:.0f}" if seconds.mean >= 10 else f"{seconds.mean:.1f}"


def spread_json(spread: Spread | None) -> dict[str, Any]:
    """Return a spread as plain JSON values."""
    if spread is None:
        return {"mean": None, "deviation": None, "num_seeds": 0}
    return {
        "mean": spread.mean,
        "deviation": spread.deviation,
        "num_seeds": spread.num_seeds,
    }

"""Checks for gradient masking: whether a robust accuracy can be believed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dkl.reports.groups import Group, find_rows_by, group_runs
from dkl.reports.records import ResultRow, Run
from dkl.reports.rendering import PLUS_MINUS, TextTable

_HEADER = ("recipe", "check", "measured", "expected", "result")


@dataclass(frozen=True)
class CheckLine:
    """One check of one recipe: a row per seed."""

    label: str
    check: str
    rows: tuple[ResultRow, ...]

    @property
    def num_failed(self) -> int:
        """Seeds whose run did not pass."""
        return sum(row.value < 1 for row in self.rows)

    @property
    def cells(self) -> list[str]:
        """The line of the table."""
        measured = [_show(row.details.get("measured")) for row in self.rows]
        expected = dict.fromkeys(_show(row.details.get("expected")) for row in self.rows)
        count = len(self.rows)
        failed = f"FAILED ({self.num_failed} of {count} seeds)"
        passed = f"passed ({count} of {count} seeds)"
        result = failed if self.num_failed else passed
        return [
            self.label,
            self.check.replace("_", " "),
            "; ".join(measured),
            "; ".join(expected),
            result,
        ]


@dataclass(frozen=True)
class TransferLine:
    """Accuracy of one recipe on adversarial images that were made with another model."""

    label: str
    source: str
    rows: tuple[ResultRow, ...]

    @property
    def cells(self) -> list[str]:
        """The line of the table; it tells something, it passes or fails nothing."""
        values = [f"{100 * row.value:.1f} %" for row in self.rows]
        return [self.label, f"accuracy, attack made on {self.source}", "; ".join(values), "-", "-"]


@dataclass(frozen=True)
class MaskingChecks(TextTable):
    """What ``masking_checks`` found; ``failures`` has a sentence per failed check and seed."""

    checks: tuple[CheckLine, ...]
    transfers: tuple[TransferLine, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def header(self) -> list[str]:
        """Column titles."""
        return [*_HEADER]

    @property
    def summary(self) -> str:
        """How many checks there were and how many failed, over all seeds."""
        done = sum(len(line.rows) for line in self.checks)
        return f"{done - len(self.failures)} of {done} checks passed, {len(self.failures)} failed"

    @property
    def num_label_columns(self) -> int:
        """All columns hold words."""
        return len(_HEADER)

    def lines(self, plus_minus: str = PLUS_MINUS) -> list[list[str]]:
        """Return the rows as text, a cell per column of ``header``."""
        del plus_minus
        return [one.cells for one in self.checks] + [one.cells for one in self.transfers]


def masking_checks(runs: Iterable[Run]) -> MaskingChecks | None:
    """Collect the gradient-masking checks and the transfer attacks of some runs.

    Args:
        runs: at least one run; their "masking_check" and "transfer_accuracy" rows are shown.

    Returns:
        The table; None where there are no such rows.

    Example:
        >>> from pathlib import Path
        >>> row = ResultRow(
        ...     run_name="digits_trades", seed=0, metric="masking_check", value=0.0,
        ...     num_samples=100, settings_hash="00", details={"check": "large_epsilon",
        ...     "measured": 0.3, "expected": 0.0, "message": "images withstand any budget"})
        >>> run = Run(Path("r"), {"name": "digits_trades"}, (), (), (row,), None, ())
        >>> masking_checks([run]).failures
        ('digits_trades, seed 0: large epsilon: images withstand any budget',)
    """
    groups, _ = group_runs(runs)
    checks = [
        CheckLine(group.label, name, rows)
        for group in groups
        for name, rows in _rows(group, "masking_check", "check").items()
    ]
    transfers = [
        TransferLine(group.label, name, rows)
        for group in groups
        for name, rows in _rows(group, "transfer_accuracy", "source").items()
    ]
    if not checks and not transfers:
        return None
    failures = [
        f"{line.label}, seed {row.seed}: {line.check.replace('_', ' ')}: "
        f"{row.details.get('message') or 'no message'}"
        for line in checks
        for row in line.rows
        if row.value < 1
    ]
    notes = ["One number per seed where there are several."]
    return MaskingChecks(tuple(checks), tuple(transfers), tuple(failures), tuple(notes))


def masking_notes(groups: Iterable[Group]) -> list[str]:
    """Warn of failed checks, for the notes of a table.

    Args:
        groups: from ``group_runs``.

    Returns:
        One note, or none where no check failed.
    """
    failed = [
        f"{group.label} ({', '.join(names)})"
        for group in groups
        if (
            names := [
                name.replace("_", " ")
                for name, rows in _rows(group, "masking_check", "check").items()
                if any(row.value < 1 for row in rows)
            ]
        )
    ]
    if not failed:
        return []
    return [
        f"Robust accuracies may be too high, gradient masking is suspected: {', '.join(failed)}."
    ]


def _rows(group: Group, metric: str, detail: str) -> dict[str, tuple[ResultRow, ...]]:
    """Return value of the detail -> rows of the seeds, in the order in which they were measured."""
    found: dict[str, list[ResultRow]] = {}
    for run in sorted(group.runs, key=lambda run: run.seed):
        names = dict.fromkeys(
            str(row.details.get(detail)) for row in run.results if row.metric == metric
        )
        rows = find_rows_by(run, metric, lambda row: str(row.details.get(detail)))
        for name in names:
            if name in rows:
                found.setdefault(name, []).append(rows[name])
    return {name: tuple(rows) for name, rows in found.items()}


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float, Sequence)):
        return str(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ", ".join(map(_show, value))
    return f"{value:.4g}"

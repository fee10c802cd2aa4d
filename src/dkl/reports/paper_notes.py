"""What a reader must know before comparing the measured rows of a paper table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from dkl.reports.groups import Group, differences, format_epsilon
from dkl.reports.masking import masking_notes
from dkl.reports.measures import Measure, Reading
from dkl.reports.recipe_facts import dataset, network, num_epochs
from dkl.reports.records import ResultRow
from dkl.reports.tables import row_doubts


class MeasuredRow(Protocol):
    """What the notes need of a line of the table."""

    @property
    def label(self) -> str:
        """The line's first cell."""

    @property
    def group(self) -> Group | None:
        """Its runs."""

    @property
    def readings(self) -> Sequence[Mapping[int, Reading]]:
        """Per measured column, seed -> reading."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds with numbers."""


def measured_notes(rows: Sequence[MeasuredRow], measures: Sequence[Measure]) -> list[str]:
    """Say where the measured rows come from and what keeps them from being compared.

    Args:
        rows: of the table.
        measures: its measured columns.

    Returns:
        Notes: settings of the measured rows, missing seeds, rows of other attacks, of other numbers
        of images or of other weights, and differences between the recipes.
    """
    measured = [row for row in rows if row.seeds]
    if not measured:
        return ["No row has been measured."]
    groups = [replace(row.group, label=row.label) for row in measured if row.group is not None]
    chosen = {
        row.label: [[one for r in some.values() for one in r.rows] for some in row.readings]
        for row in measured
    }
    return [
        *masking_notes(groups),
        *_origins(measured),
        *_few_seeds(measured),
        *_fast(chosen, measures),
        *_threats(chosen),
        *_num_images(chosen, measures),
        *row_doubts(chosen),
        *differences(groups),
    ]


def _origins(rows: Sequence[MeasuredRow]) -> list[str]:
    origins: dict[str, list[MeasuredRow]] = {}
    is_attacked = any(one.epsilon for row in rows for one in _result_rows(row))
    for row in rows:
        assert row.group is not None
        recipe, epochs = row.group.recipe, num_epochs(row.group.recipe)
        attacked = _join({one.num_samples for one in _result_rows(row) if one.epsilon})
        parts = [
            dataset(recipe),
            network(recipe),
            "epochs not stated" if epochs is None else f"epochs {epochs}",
        ]
        if is_attacked:
            parts.append(f"{attacked or 'no'} attacked images")
        origins.setdefault(", ".join(parts), []).append(row)
    notes = []
    for origin, some in origins.items():
        most = max((row.seeds for row in some), key=len)
        labels = [
            row.label if row.seeds == most else f"{row.label} (seeds {_list(row.seeds)})"
            for row in some
        ]
        notes.append(f"Measured on {origin}, seeds {_list(most)}: {', '.join(labels)}.")
    return notes


def _result_rows(row: MeasuredRow) -> list[ResultRow]:
    return [one for some in row.readings for reading in some.values() for one in reading.rows]


def _list(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def _few_seeds(rows: Sequence[MeasuredRow]) -> list[str]:
    most = max(len(row.seeds) for row in rows)
    few = [f"{row.label} ({len(row.seeds)})" for row in rows if len(row.seeds) < most]
    notes = [f"Fewer seeds than the {most} of other rows: {', '.join(few)}."] if few else []
    if most == 1:
        notes.append("One seed has no spread (n=1).")
    trained = [
        f"{row.label} (seeds {', '.join(map(str, missing))})"
        for row in rows
        if row.group is not None
        and (missing := sorted({run.seed for run in row.group.runs} - {*row.seeds}))
    ]
    if trained:
        notes.append(f"Trained, but not evaluated: {', '.join(trained)}.")
    return notes


def _fast(
    chosen: Mapping[str, Sequence[Sequence[ResultRow]]], measures: Sequence[Measure]
) -> list[str]:
    place = next((i for i, one in enumerate(measures) if one.title == "AutoAttack"), None)
    if place is None:
        return []
    fast = [
        label
        for label, columns in chosen.items()
        if any(row.metric == "auto_attack_fast_accuracy" for row in columns[place])
    ]
    which = "AutoAttack-fast (APGD-CE and APGD-T only) in the AutoAttack column"
    return [f"{which}: {', '.join(fast)}."] if fast else []


def _threats(chosen: Mapping[str, Sequence[Sequence[ResultRow]]]) -> list[str]:
    """Name the threats; in a sweep the budget is in the column's title."""
    lines: dict[str, list[str]] = {}
    for label, columns in chosen.items():
        threats = sorted(
            {
                (str(row.norm), float(row.epsilon))
                for rows in columns
                for row in rows
                if row.epsilon is not None and row.metric != "epsilon_sweep_accuracy"
            }
        )
        text = " and ".join(f"{norm} {format_epsilon(epsilon)}" for norm, epsilon in threats)
        if text:
            lines.setdefault(text, []).append(label)
    if len(lines) == 1:
        return [f"Attacks on the measured rows: {next(iter(lines))}."]
    parts = "; ".join(f"{', '.join(who)}: {text}" for text, who in lines.items())
    return [f"The measured rows differ in the attack ({parts})."] if lines else []


def _num_images(
    chosen: Mapping[str, Sequence[Sequence[ResultRow]]], measures: Sequence[Measure]
) -> list[str]:
    notes: dict[str, list[str]] = {}
    for place, measure in enumerate(measures):
        numbers = {row.num_samples for columns in chosen.values() for row in columns[place]}
        if len(numbers) > 1:
            notes.setdefault(_join(numbers), []).append(measure.title)
    return [
        f"{', '.join(titles)}: measured on different numbers of images ({numbers})."
        for numbers, titles in notes.items()
    ]


def _join(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))

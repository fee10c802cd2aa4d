"""Lines of the paper's tables: published cells, the runs attached, and the paired comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from dkl.reports.groups import Group, Spread, group_runs
from dkl.reports.measures import Measure, Reading
from dkl.reports.paired import PairedDifference, paired_difference
from dkl.reports.paper_layout import Cell, Layout
from dkl.reports.published import PublishedRow
from dkl.reports.recipe_facts import dataset, network, num_epochs, setting
from dkl.reports.records import Run


@dataclass(frozen=True)
class PaperRow:
    """One line: a row of the paper and the runs attached to it; a row without runs has no group.

    ``readings`` holds, per measured column, seed -> reading; numbers are percent.
    """

    key: str
    label: str
    published: tuple[Cell, ...]
    group: Group | None
    readings: tuple[Mapping[int, Reading], ...]
    differences: tuple[PairedDifference | None, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds with at least one of the numbers."""
        return tuple(sorted({seed for readings in self.readings for seed in readings}))

    def spread(self, column: int) -> Spread | None:
        """Return mean and deviation over seeds of a measured column."""
        values = [reading.value for reading in self.readings[column].values()]
        return Spread.of(values) if values else None

    def num_samples(self, column: int) -> list[int]:
        """Return on how many images a measured column was measured."""
        readings = self.readings[column].values()
        return sorted({row.num_samples for reading in readings for row in reading.rows})


def attach(
    published: Sequence[PublishedRow],
    layout: Layout,
    runs: Mapping[str, Sequence[Run]],
    measures: Sequence[Measure],
) -> tuple[list[PaperRow], list[str]]:
    """Attach runs to the rows of the paper.

    Args:
        published: rows of the table; those of one key stand together.
        layout: of the table.
        runs: key -> runs.
        measures: the measured columns.

    Returns:
        A line per key, or per group of runs where a key has several, and notes.
    """
    rows: list[PaperRow] = []
    notes: list[str] = []
    for key, same in groupby(published, lambda row: row.key):
        own = [*same]
        cells = tuple(column.read(own) for column in layout.published)
        label = own[0].label
        if layout.settings:
            label = f"table {own[0].table}: {label}"
        groups: Sequence[Group | None] = [None]
        if given := runs.get(key):
            groups, doubts = group_runs(given)
            notes += [note for note in doubts if "given twice" in note]
        for place, group in enumerate(groups):
            several = f" [{group.label}]" if group is not None and len(groups) > 1 else ""
            readings = tuple(_read(group, measure) for measure in measures)
            shown = cells if place == 0 else (None,) * len(cells)
            rows.append(PaperRow(key, label + several, shown, group, readings))
    return rows, notes


def _read(group: Group | None, measure: Measure) -> Mapping[int, Reading]:
    found = {run.seed: measure.read(run) for run in group.runs} if group is not None else {}
    return {seed: reading for seed, reading in sorted(found.items()) if reading is not None}


def compare_with(
    rows: Sequence[PaperRow], baseline: str, columns: Sequence[int]
) -> tuple[list[PaperRow], list[str]]:
    """Return the rows with their differences from the baseline, and notes on what has none.

    Args:
        rows: of the table.
        baseline: key of a row with results.
        columns: places of the measured columns to compare.

    Returns:
        The rows, each with one difference per column, and notes.
    """
    candidates = [row for row in rows if row.key == baseline and row.seeds]
    compared, elsewhere = [], []
    for row in rows:
        reference = _counterpart(row, candidates)
        if row.seeds and row.key != baseline and reference is None:
            elsewhere.append(row.label)
        if reference is None or row.key == baseline:
            compared.append(replace(row, differences=(None,) * len(columns)))
            continue
        pairs = ((row.readings[place], reference.readings[place]) for place in columns)
        compared.append(replace(row, differences=tuple(_difference(*pair) for pair in pairs)))
    notes = [
        f"Differences from {candidates[0].label}: mean over the seeds that both have, with the "
        "sample standard deviation and the p-value of the two-sided paired t-test; with fewer than "
        "two common seeds there is none."
    ]
    if elsewhere:
        label = candidates[0].label
        notes.append(f"Not compared, {label} has no runs on their data: {', '.join(elsewhere)}.")
    return compared, notes


def _counterpart(row: PaperRow, candidates: Sequence[PaperRow]) -> PaperRow | None:
    """Return the baseline's row on the same dataset, with as much else in common as there is."""
    if row.group is None:
        return None
    recipe = row.group.recipe

    def likeness(other: PaperRow) -> tuple[bool, ...]:
        assert other.group is not None
        theirs = other.group.recipe
        pairs = ((fact(recipe), fact(theirs)) for fact in (dataset, network, num_epochs))
        return tuple(mine == yours for mine, yours in pairs)

    same_data = [
        other
        for other in candidates
        if other.group is not None
        and setting(other.group.recipe, "data.name") == setting(recipe, "data.name")
    ]
    return max(same_data, key=likeness, default=None)


def _difference(
    readings: Mapping[int, Reading], reference: Mapping[int, Reading]
) -> PairedDifference | None:
    same = [
        seed
        for seed, reading in readings.items()
        if seed in reference and reading.measurement == reference[seed].measurement
    ]
    return paired_difference(
        {seed: readings[seed].value for seed in same},
        {seed: reference[seed].value for seed in same},
    )

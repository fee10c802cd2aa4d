"""The paper's tables with our measured rows beside the published ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dkl.reports.distillation_layout import DISTILLATION_LAYOUTS
from dkl.reports.measures import Measure
from dkl.reports.paired import PairedDifference
from dkl.reports.paper_layout import LAYOUTS, Cell, Layout
from dkl.reports.paper_notes import measured_notes
from dkl.reports.paper_rows import PaperRow, attach, compare_with
from dkl.reports.published import CONFLICTS, PUBLISHED, SOURCE
from dkl.reports.published_distillation import DISTILLATION_CONFLICTS, PUBLISHED_DISTILLATION
from dkl.reports.recipe_facts import dataset, network, num_epochs, setting
from dkl.reports.records import Run
from dkl.reports.rendering import PLUS_MINUS, TextTable
from dkl.reports.tables import FINE_SAMPLES, show_spread, spread_json

__all__ = ["PaperRow", "PaperTable", "paper_table"]

_LAYOUTS = {**LAYOUTS, **DISTILLATION_LAYOUTS}
_PUBLISHED = {**PUBLISHED, **PUBLISHED_DISTILLATION}


@dataclass(frozen=True)
class PaperTable(TextTable):
    """What ``paper_table`` found, and how to show it; accuracies are percent.

    ``units`` and ``decimals`` are those of ``measures``; see ``Measure``.

    ``heads`` has a pair for each column: what a run of columns has in common, and the column's own
    title. ``header`` joins the two; an HTML table shows them in two lines (``head_spans``).
    """

    name: str
    title: str
    heads: tuple[tuple[str, str], ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]
    measures: tuple[str, ...]
    baseline: str | None
    setting_of: Mapping[str, str]
    units: tuple[str, ...]
    decimals: tuple[int | None, ...]
    published_decimals: int = 2

    @property
    def header(self) -> list[str]:
        """Column titles: the common head in full at its first column, its first word after it."""
        titles, last = [], ""
        for head, title in self.heads:
            short = head if head != last else head.partition(",")[0]
            colon = ":" if "," in short else ""
            titles.append(f"{short}{colon} {title}".strip())
            last = head
        return titles

    @property
    def head_spans(self) -> list[tuple[str, int]]:
        """Common heads with the number of columns below each."""
        return [(head, len([*some])) for head, some in groupby(self.heads, lambda pair: pair[0])]

    @property
    def breaks(self) -> frozenset[int]:
        """Places where the next setting's block starts (tables 7 to 9)."""
        kinds = [self.setting_of.get(row.key) for row in self.rows]
        return frozenset(
            place for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]
        )

    def lines(self, plus_minus: str = PLUS_MINUS) -> list[list[str]]:
        """Return the rows as text, a cell per column of ``header``."""
        most = max((len(row.seeds) for row in self.rows), default=0)
        lines = []
        for row in self.rows:
            published = (_show_published(cell, self.published_decimals) for cell in row.published)
            line = [row.label, *published]
            if self.setting_of:
                line.append(_show_setting(row, self.setting_of))
            cells = [
                self._show_measured(row, place, plus_minus) for place in range(len(self.measures))
            ]
            if not row.seeds and cells:
                cells[0] = "not run" if row.group is None else "not evaluated"
            count = len(row.seeds)
            seeds = str(count) if count in (0, most) else f"{count} of {most}"
            line += [*cells, seeds if count else "-"]
            if self.baseline is not None:
                is_baseline = row.key == self.baseline
                line += (
                    "baseline"
                    if is_baseline and count
                    else _show_difference(one, count, plus_minus)
                    for one in row.differences
                )
            lines.append(line)
        return lines

    def _show_measured(self, row: PaperRow, place: int, plus_minus: str) -> str:
        decimals, spread = self.decimals[place], row.spread(place)
        if decimals is None:
            decimals = 2 if self._fewest_samples(place) >= FINE_SAMPLES else 1
        elif not self.units[place] and spread is not None and spread.num_seeds == 1:
            return f"{spread.mean:,.{decimals}f}"  # a cost, which needs no seeds
        return show_spread(spread, len(row.seeds), decimals, plus_minus)

    def to_json(self) -> str:
        """Return everything as JSON: published and measured accuracies in percent."""
        num_published = len(self.rows[0].published)
        published_heads = [": ".join(pair) for pair in self.heads[1 : num_published + 1]]
        document = {
            "table": self.name,
            "title": self.title,
            "unit": "percent" if "%" in self.units else None,
            "source_of_published": SOURCE,
            "baseline": self.baseline,
            "rows": [self._row_json(row, published_heads) for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2)

    def _fewest_samples(self, column: int) -> int:
        return min((n for row in self.rows for n in row.num_samples(column)), default=0)

    def _row_json(self, row: PaperRow, published_heads: Sequence[str]) -> dict[str, Any]:
        measured = {}
        for place, title in enumerate(self.measures):
            rows = [one for reading in row.readings[place].values() for one in reading.rows]
            measured[title] = {
                **spread_json(row.spread(place)),
                "unit": "percent" if self.units[place] == "%" else self.units[place] or None,
                "num_samples": row.num_samples(place),
                "metrics": sorted({one.metric for one in rows}),
                "norms": sorted({one.norm for one in rows if one.norm is not None}),
                "epsilons": sorted({one.epsilon for one in rows if one.epsilon is not None}),
            }
        compared = self.heads[len(self.heads) - len(row.differences) :]
        recipe = row.group.recipe if row.group is not None else {}
        return {
            "key": row.key,
            "label": row.label,
            "published": dict(zip(published_heads, row.published, strict=True)),
            "seeds": list(row.seeds),
            "recipe": row.group.runs[0].name if row.group is not None else None,
            "settings_hash": row.group.runs[0].settings_hash if row.group is not None else None,
            "dataset": dataset(recipe) if recipe else None,
            "model": network(recipe) if recipe else None,
            "epochs": num_epochs(recipe),
            "setting": _setting_value(row, self.setting_of),
            "measured": measured if row.group is not None else None,
            "differences": {
                title: None if one is None else vars(one)
                for (_, title), one in zip(compared, row.differences, strict=True)
            },
        }


def paper_table(
    name: str, runs: Mapping[str, Sequence[Run]], *, baseline: str | None = None
) -> PaperTable:
    """Lay out a table of the paper with measured rows beside the published ones.

    A line is a row of the paper; runs of several settings under one key get a line each. Measured
    cells are mean and sample standard deviation over seeds. Where the baseline has runs on the same
    data, the others are compared with it over the seeds that both have: mean difference, its
    standard deviation and the p-value of the two-sided paired t-test, on numbers measured under the
    same attack only. What differs from the paper, and between the runs, stands in the notes.

    Args:
        name: "robust-ablation" (table 1), "robust-methods" (2 and 3), "hyperparameters" (7 to 9),
            "epsilon-sweep" (10) or "other-attacks" (11); "distillation" (13 and 14),
            "distillation-imagenet" (4, 15 and 1), "distillation-speed" (4) or "long-tailed" (5 and
            18).
        runs: key of a row (see ``dkl.reports.published``) -> its runs, one per seed; keys without
            runs may be absent.
        baseline: key of the row to compare with; by default "kl" in the ablation and for
            long-tailed data, "kd" for distillation, none for hyperparameters and speed, else
            "trades".

    Returns:
        The table.

    Raises:
        ValueError: a table or a row that the paper does not have.
        ImportError: scipy is missing and there is something to compare.

    Example:
        >>> table = paper_table("robust-ablation", {})
        >>> print(table.lines()[3][:4])
        ['DKL + BA + GI = IKL', '65.76', '31.91', '71.91']
    """
    if name not in _LAYOUTS:
        raise ValueError(f"no table is called {name!r}; there are: {', '.join(_LAYOUTS)}")
    layout, keys = _LAYOUTS[name], list(dict.fromkeys(row.key for row in _PUBLISHED[name]))
    asked = [*runs, *([baseline] if baseline is not None else [])]
    if unknown := [key for key in asked if key not in keys]:
        raise ValueError(
            f"table {name!r} has no row {', '.join(map(repr, unknown))}; its rows are: "
            + ", ".join(keys)
        )
    if layout.own is not None:
        runs = {key: [layout.own(key, run) for run in some] for key, some in runs.items()}
    everything = [run for some in runs.values() for run in some]
    what, measures = layout.measured(everything)
    rows, notes = attach(_PUBLISHED[name], layout, runs, measures)
    notes += layout.remarks(everything) if layout.remarks is not None else []
    measured = any(row.seeds for row in rows)
    wanted = layout.baseline if baseline is None else baseline
    label = next((row.label for row in rows if row.key == wanted), wanted)
    if measured and wanted is not None and not any(r.seeds for r in rows if r.key == wanted):
        notes.append(f"Nothing is compared: {label} has no results.")
    chosen = wanted if any(row.seeds for row in rows if row.key == wanted) else None
    compared = [place for place, one in enumerate(measures) if one.title in layout.compared]
    if chosen is not None:
        rows, more = compare_with(rows, chosen, compared)
        notes += more
    heads = [("", "setting" if layout.settings else "method")]
    heads += [(column.head, column.title) for column in layout.published]
    heads += [("", "measured setting")] if layout.settings else []
    heads += [*((_measured_head(one, what), one.title) for one in measures), ("", "seeds")]
    if chosen is not None:
        head = f"minus {label}, points"
        heads += [(head, measures[place].title) for place in compared]
    return PaperTable(
        name=name,
        title=layout.title,
        heads=tuple(heads),
        rows=tuple(rows),
        notes=(*_published_notes(name, layout), *notes, *measured_notes(rows, measures)),
        measures=tuple(one.title for one in measures),
        baseline=chosen,
        setting_of=_settings(keys, layout),
        units=tuple(one.unit for one in measures),
        decimals=tuple(one.decimals for one in measures),
        published_decimals=layout.decimals,
    )


def _measured_head(measure: Measure, what: str) -> str:
    return ", ".join(filter(None, ("measured", measure.unit, what)))


def _published_notes(name: str, layout: Layout) -> list[str]:
    tables = sorted({row.table for row in _PUBLISHED[name]} - {0})
    numbers = " and ".join(filter(None, (", ".join(map(str, tables[:-1])), str(tables[-1]))))
    word = "table" if len(tables) == 1 else "tables"
    attack, conflicts = "", DISTILLATION_CONFLICTS.get(name, ())
    if name in PUBLISHED:
        attack = " AA is AutoAttack;"
        conflicts = tuple(text for where, text in CONFLICTS if where & {*tables})
    return [
        f"Published numbers: {SOURCE}, {word} {numbers};{attack} - where the paper has no number.",
        *layout.notes,
        *(f"In the paper: {text}" for text in conflicts),
    ]


def _settings(keys: Sequence[str], layout: Layout) -> dict[str, str]:
    named = layout.settings or {}
    return {key: named[start] for key in keys if (start := key.partition("_")[0]) in named}


def _setting_value(row: PaperRow, setting_of: Mapping[str, str]) -> Any:
    if row.group is None or row.key not in setting_of:
        return None
    return setting(row.group.recipe, setting_of[row.key])


def _show_setting(row: PaperRow, setting_of: Mapping[str, str]) -> str:
    value = _setting_value(row, setting_of)
    if row.group is None:
        return "-"
    short = setting_of[row.key].rpartition(".")[2]
    return f"{short} {'not stated' if value is None else _plain(value)}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_published(cell: Cell, decimals: int) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.{decimals}f}"


def _show_difference(difference: PairedDifference | None, num_seeds: int, plus_minus: str) -> str:
    if difference is None:
        return "-"
    p = difference.p_value
    shown = "p -" if p is None else "p < 0.001" if p < 0.001 else f"p {p:.2g}"
    if difference.num_seeds != num_seeds:
        shown = f"n={difference.num_seeds}, {shown}"
    mean = f"{round(difference.mean, 2) + 0.0:+.2f}"  # + 0.0: no minus before a zero
    return f"{mean} {plus_minus} {difference.deviation:.2f} ({shown})"

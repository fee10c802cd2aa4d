"""What the bench commands write and print: rows, figures, tables."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from dkl.cli.output import (
    is_main_process,
    print_json,
    print_table,
    say,
    stdout_for_json_only,
)

if TYPE_CHECKING:
    from dkl.bench import BenchRow

_TITLES = {
    "time": "Time",
    "time_per_element": "Time per element",
    "slope": "Slope of log time per element against log C",
    "ratio_to_pairwise": "Time, as a ratio to the pairwise form",
    "copy_bandwidth_share": "Share of the copy bandwidth for the bytes that must move",
    "bandwidth": "Bandwidth",
    "peak_memory": "Peak memory beyond the inputs",
    "peak_memory_beyond_gradients": "Peak memory beyond inputs and gradients",
}
_SPREAD = "20 to 80 %"
IN_DETAILS = ("share", "phase_share")
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")),
    "bytes/s": ((1e9, "GB/s"), (1e6, "MB/s"), (1, "bytes/s")),
}


def check_places(out: Path | None, plot: Path | None) -> None:
    """Refuse before anything is measured what would fail afterwards."""
    if out is not None and out.is_dir():
        raise typer.BadParameter(f"{out} is a folder; name a file in it", param_hint="--out")
    if plot is not None and plot.exists() and not plot.is_dir():
        raise typer.BadParameter(f"{plot} is a file; name a folder", param_hint="--plot")
    if plot is not None and find_spec("matplotlib") is None:
        message = "figures need matplotlib: pip install 'dkl[train]'"
        raise typer.BadParameter(message, param_hint="--plot")


def measure(
    run: "Callable[[], list[BenchRow]]",
    as_json: bool,
    out: Path | None,
    plot: Path | None,
    details: "Callable[[Sequence[BenchRow]], str] | None" = None,
) -> None:
    """Run a benchmark, then write, draw and print its rows.

    Args:
        run: measures.
        as_json: print one JSON document on stdout, and nothing else there.
        out: the file for the rows.
        plot: the folder for the figures.
        details: returns text that stands below the tables, for the metrics in ``IN_DETAILS``.
    """
    with stdout_for_json_only(as_json):
        rows = run()
    if not is_main_process():
        return
    from dkl.bench import write_rows

    if out is not None:
        write_rows(out, rows)
        say(f"Rows in {out}")
    if plot is not None:
        from dkl.bench.plots import save_plots

        for file in save_plots(rows, plot):
            say(f"Figure in {file}")
    text = "" if details is None else details(rows)
    if as_json:
        document: dict[str, Any] = {"rows": [json.loads(row.to_json()) for row in rows]}
        print_json({**document, "details": text} if text else document)
        return
    for table in rows_tables(row for row in rows if not text or row.metric not in IN_DETAILS):
        print_table(table)
    if text:
        typer.echo(text)


def rows_tables(rows: "Iterable[BenchRow]") -> list[Table]:
    """Lay out rows: a table per metric, with columns for spread and ratio where there are any."""
    by_metric: dict[tuple[str, str], list[BenchRow]] = {}
    for row in rows:
        by_metric.setdefault((row.metric, row.unit), []).append(row)
    return [_metric_table(metric, own) for (metric, _), own in by_metric.items()]


def _metric_table(metric: str, rows: "list[BenchRow]") -> Table:
    title = _TITLES.get(metric, metric.replace("_", " ").capitalize())
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("method", no_wrap=True)
    baselines = list(dict.fromkeys(row.baseline for row in rows if row.baseline is not None))
    headings = ["median", _SPREAD, f"ratio to {' or '.join(baselines)}", _SPREAD]
    shows = partial(_with_unit, unit=rows[0].unit)
    cells = [
        [
            shows(row.value),
            _spread(row.low, row.high, shows),
            "" if row.ratio is None else _digits(row.ratio),
            _spread(row.ratio_low, row.ratio_high, _digits),
        ]
        for row in rows
    ]
    kept = [place for place in range(4) if any(line[place] for line in cells)]
    for place in kept:
        table.add_column(headings[place], justify="right")
    case = ""
    for row, line in zip(rows, cells, strict=True):
        if case and row.case != case:
            table.add_section()
        shown, case = "" if row.case == case else row.case, row.case
        table.add_row(Text(shown), Text(row.method), *(Text(line[place]) for place in kept))
    return table


def _spread(low: float | None, high: float | None, show: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def _with_unit(value: float, unit: str) -> str:
    if unit == "share":
        return f"{_digits(100 * value)} %"
    scales = _SCALES.get(unit, ())
    for size, name in scales:
        if abs(value) >= size or (size, name) == scales[-1]:
            return f"{_digits(value / size)} {name}"
    return _digits(value) if unit in ("1", "ratio") else f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Write three digits, and a thousand as a thousand."""
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"

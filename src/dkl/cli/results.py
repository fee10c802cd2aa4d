"""Commands that read run folders: compare, report."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dkl.cli.output import print_table
from dkl.cli.training import AsJson

Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN", help="Run folders, patterns, or folders that hold runs."),
]


def compare(
    runs: Runs,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Put runs of different datasets into one table, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a table of recipes: mean and spread over seeds.

    Rows that are not like for like (training images, epochs, models, test images) are
    named above the table. Runs of different datasets are refused.
    """
    folders = find_runs(runs)
    from dkl.reports import compare as compare_runs
    from dkl.reports import read_run
    from dkl.reports.likeness import DATASET

    table = compare_runs([read_run(folder) for folder in folders])
    apart = [one.sentence for one in table.differences if one.aspect == DATASET]
    if apart and not anyway:
        message = f"{apart[0]} Compare runs of the same data, or add --anyway"
        raise typer.BadParameter(message, param_hint="RUN")
    if as_json:
        typer.echo(table.to_json())
    else:
        print_table(table.to_rich())


def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The file to write, instead of report.html by the runs.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the figures as PNG files there too.")
    ] = None,
) -> None:
    """Write one self-contained HTML file with tables and figures."""
    folders = find_runs(runs)
    from dkl.reports import read_run, save_figures, write_report

    if out is None:
        parents = [folder.resolve().parent for folder in folders]
        beside = folders[0] if len(folders) == 1 else Path(os.path.commonpath(parents))
        out = beside / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    loaded = [read_run(folder) for folder in folders]
    write_report(loaded, out)
    typer.echo(str(out))
    for file in save_figures(loaded, figures) if figures is not None else []:
        typer.echo(str(file))


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """Expand patterns and folders that hold runs; each run once, in the order given."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        anchor = Path(path.anchor)
        relative = str(path.relative_to(anchor))
        matches = [path] if path.exists() else sorted(anchor.glob(relative))
        runs = [run for match in matches for run in _runs_below(match)]
        if not runs:
            message = f"no run (a folder with recipe.yaml) is there: {pattern}"
            raise typer.BadParameter(message, param_hint="RUN")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    # A run inside a run is its teacher, and trials of a search (which leaves trials.jsonl) have no
    # test results: both stay out unless they are named themselves.
    if (folder / "trials.jsonl").exists() or (folder / "study.journal").exists():
        return
    if (folder / "recipe.yaml").is_file():
        yield folder
    elif folder.is_dir():
        for child in sorted(folder.iterdir()):
            yield from _runs_below(child)

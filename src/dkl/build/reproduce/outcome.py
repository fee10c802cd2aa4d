"""From run folders to the table of the paper's form and the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dkl.build.reproduce import folders
from dkl.build.reproduce.experiments import COSTS, baseline_of, layout_of
from dkl.build.reproduce.jobs import Job
from dkl.build.runs import RECIPE_FILE, write_text
from dkl.reports import Run, read_run


def collect_runs(rows: Sequence[str], jobs: Sequence[Job]) -> dict[str, list[Run]]:
    """Return the measured runs of every row that has any, seeds in the order of the jobs.

    Args:
        rows: keys of the rows, in the order of the table.
        jobs: of all rows and seeds.

    Raises:
        ValueError: folders that hold other runs, or files in them that cannot be read.
    """
    folders.refuse_others(jobs)
    measured: dict[Path, Run] = {}
    for job in jobs:
        if (job.folder / RECIPE_FILE).is_file():
            run = read_run(job.folder)
            if run.results:
                measured[job.folder] = run
    found = {
        key: [measured[job.folder] for job in jobs if key in job.rows and job.folder in measured]
        for key in rows
    }
    return {key: runs for key, runs in found.items() if runs}


def make_table(experiment: str, runs: Mapping[str, Sequence[Run]]) -> Any:
    """Return ``dkl.reports.paper_table`` of an experiment, against its baseline where it is there.

    Args:
        experiment: its name.
        runs: key of the row -> its runs, one a seed; at least one row.
    """
    from dkl.reports import paper_table

    baseline = baseline_of(experiment)
    known = baseline if baseline in runs and experiment not in COSTS else None
    return paper_table(layout_of(experiment), runs, baseline=known)


def save_outcome(
    experiment: str, runs: Mapping[str, Sequence[Run]], table: Any, out: Path
) -> list[Path]:
    """Write the table as Markdown and JSON, and the report.

    Args:
        experiment: its name, which names the files.
        runs: key of the row -> its runs.
        table: what ``make_table`` returned.
        out: the folder of the files.

    Returns:
        The files.
    """
    from dkl.reports import write_report

    files = [out / f"{experiment}.{suffix}" for suffix in ("md", "json", "html")]
    write_text(files[0], table.to_markdown().rstrip("\n") + "\n")
    write_text(files[1], json.dumps(table_document(table), indent=2) + "\n")
    every = {run.path: run for of_row in runs.values() for run in of_row}
    write_report(list(every.values()), files[2], experiments={layout_of(experiment): runs})
    return files


def table_document(table: Any) -> Any:
    """Return a table as plain JSON values."""
    document = table.to_json()
    return json.loads(document) if isinstance(document, str) else document

"""The command that runs the paper's experiments and prints their tables."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dkl.cli.output import print_json, print_table, say, stdout_for_json_only
from dkl.cli.reproduce_output import (
    GIB,
    QueueDisplay,
    estimate_table,
    in_words,
    recipes_table,
)
from dkl.cli.training import AsJson, Overrides, parse_seeds

if TYPE_CHECKING:
    from dkl.build.reproduce import Job, QueueResult, Row

NEEDS_YES = 3


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="robust-ablation, robust-methods, epsilon-sweep, hyperparameters, other-attacks; "
            "distillation, distillation-PAIR, distillation-imagenet, distillation-speed, "
            "long-tailed.",
        ),
    ],
    overrides: Overrides = None,
    scale: Annotated[
        Literal["small", "paper"],
        typer.Option(help="Fashion-MNIST on a laptop, or CIFAR-100 as published."),
    ] = "small",
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="One run of every row with each of these.")
    ] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="Runs that are trained at a time.")] = 1,
    only: Annotated[
        str | None, typer.Option(metavar="KEY,KEY", help="Train these rows of the table alone.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of all runs, instead of runs/reproduce-SCALE."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Start no run later than this.")
    ] = None,
    table_only: Annotated[
        bool, typer.Option("--table", help="Print the table of what is there; train nothing.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Scale paper: start after the estimate without asking.")
    ] = False,
    on_cpu: Annotated[
        bool, typer.Option("--on-cpu", help="Scale paper: go on where there is no GPU.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment of the paper over seeds, then print its table and write its report.

    Runs are kept in one folder and shared by all experiments: what is trained and measured already
    is not done again, and the same command goes on where it was stopped.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("dkl reproduce starts its runs itself; start it without torchrun")
    with stdout_for_json_only(as_json):
        from dkl.build import reproduce as engine

        try:
            rows = engine.rows_of(name, scale)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="NAME") from None
        folder = out or Path("runs") / f"reproduce-{scale}"
        chosen = _choose(only, rows)
        if name in engine.COSTS:
            wanted_rows = {key: row for key, row in rows.items() if key in chosen}
            _report_costs(name, scale, wanted_rows, folder / name, seeds, overrides, as_json)
            return
        planned = engine.plan_jobs(
            rows, seeds=parse_seeds(seeds), out=folder, overrides=overrides or []
        )
        result = None
        if not table_only:
            wanted = [job for job in planned if not chosen.isdisjoint(job.rows)]
            engine.refuse_others(wanted)
            _prepare(wanted, rows, folder, scale, yes=yes, on_cpu=on_cpu)
            with QueueDisplay(wanted, jobs) as display:
                result = engine.run_queue(
                    wanted,
                    folder,
                    num_parallel=jobs,
                    hours=hours,
                    notify=display.notify,
                    on_stop=display.stopping,
                )
        table = _finish(name, rows, planned, folder, save=result is not None)
    if as_json:
        document = None if table is None else engine.table_document(table)
        print_json(_document(name, scale, folder, result, document))
    elif table is not None:
        print_table(table.to_rich())
    if result is not None:
        _leave(result)


def _report_costs(
    name: str,
    scale: str,
    rows: "Mapping[str, Row]",
    folder: Path,
    seeds: str,
    overrides: "list[str] | None",
    as_json: bool,
) -> None:
    """Time the steps of all rows in one run, as often as there are seeds, and print the table."""
    from dkl.build import reproduce as engine

    runs = engine.measure_costs(
        rows, folder, rounds=len(parse_seeds(seeds)), overrides=tuple(overrides or ()), progress=say
    )
    table = engine.make_table(name, runs)
    for file in engine.save_outcome(name, runs, table, folder):
        say(f"Wrote {file}")
    if as_json:
        print_json(_document(name, scale, folder, None, engine.table_document(table)))
    else:
        print_table(table.to_rich())


def _choose(only: str | None, rows: "Mapping[str, Row]") -> set[str]:
    """Return the keys of the rows to train."""
    if only is None:
        return set(rows)
    keys = [word.strip() for word in only.split(",")]
    if unknown := [key for key in keys if key not in rows]:
        message = f"no such rows: {', '.join(unknown)}; there are {', '.join(rows)}"
        raise typer.BadParameter(message, param_hint="--only")
    return set(keys)


def _prepare(
    jobs: "Sequence[Job]",
    rows: "Mapping[str, Row]",
    folder: Path,
    scale: str,
    *,
    yes: bool,
    on_cpu: bool,
) -> None:
    """Check what training needs before it starts; at full scale estimate it and ask."""
    from dkl.build import reproduce as engine

    left = [job for job in jobs if not engine.is_done(job)]
    if scale == "paper":
        print_table(recipes_table(jobs, rows))
    if not left:
        return
    facts, problems = engine.check_data(engine.recipes_of(left))
    if scale == "paper":
        problems += engine.check_device(on_cpu=on_cpu)
    _refuse(problems)
    if scale != "paper":
        return
    estimates = engine.estimate_jobs(
        left, facts, progress=lambda recipe: say(f"Measuring a few steps of {recipe}")
    )
    print_table(estimate_table(estimates))
    seconds = sum(one.total_seconds for one in estimates)
    needed = sum(one.total_bytes for one in estimates)
    devices = " and ".join(dict.fromkeys(one.cost.device for one in estimates))
    say(
        f"About {in_words(seconds)} on {devices}, one run at a time, "
        f"and {needed / GIB:.1f} GiB in {folder}"
    )
    if any(one.cost.is_extrapolated for one in estimates):
        say("(on a CPU few images are measured, and whole batches extrapolated)", "dim")
    _refuse(engine.check_disk(folder, needed))
    if not yes and not (sys.stdin.isatty() and typer.confirm("Start?", err=True)):
        say("Nothing was started; the same command with --yes starts it.", "yellow")
        raise typer.Exit(NEEDS_YES)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("not everything is there yet:\n  " + "\n  ".join(problems))


def _finish(
    name: str, rows: "Mapping[str, Row]", jobs: "Sequence[Job]", folder: Path, *, save: bool
) -> Any:
    """Make the table of whatever is measured; None where nothing is."""
    from dkl.build import reproduce as engine

    runs = engine.collect_runs(list(rows), jobs)
    if not runs:
        say(f"Nothing is measured yet in {folder}", "yellow")
        return None
    table = engine.make_table(name, runs)
    if save:
        for file in engine.save_outcome(name, runs, table, folder):
            say(f"Wrote {file}")
    if missing := [key for key in rows if key not in runs]:
        say(f"Rows without a measured run: {', '.join(missing)}", "yellow")
    return table


def _leave(result: "QueueResult") -> None:
    """Tell what is left, and exit with a code that says so."""
    for report in (failed := result.with_state("failed")):
        say(f"Failed: {report.job.folder}", "red")
        say(report.message)
    left = len(result.with_state("waiting", "stopped"))
    if failed:
        say(f"Failed runs: {len(failed)}; the same command tries them again", "red")
    if left:
        say(f"Runs left: {left}; the same command goes on where this one stopped", "yellow")
    if result.interrupted:
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


def _document(
    name: str, scale: str, folder: Path, result: "QueueResult | None", table: Any
) -> dict[str, Any]:
    reports = () if result is None else result.reports
    return {
        "experiment": name,
        "scale": scale,
        "out": str(folder),
        "interrupted": result is not None and result.interrupted,
        "jobs": [
            {
                "rows": list(report.job.rows),
                "seed": report.job.seed,
                "run_dir": str(report.job.folder),
                "state": report.state,
                "seconds": report.seconds,
                "message": report.message,
            }
            for report in reports
        ],
        "table": table,
    }

"""The command that looks before a long run leaps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from dkl.cli.output import print_json, print_table, say, stdout_for_json_only
from dkl.cli.reproduce_output import GIB, in_words
from dkl.cli.training import AsJson, Overrides, RecipeArgument

if TYPE_CHECKING:
    from dkl.build.doctor import Diagnosis

_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, instead of runs/RECIPE/seed_N.")
    ] = None,
    take_steps: Annotated[
        bool, typer.Option("--steps/--no-steps", help="Time a few real steps.")
    ] = True,
    all_images: Annotated[
        bool, typer.Option("--all-images", help="Decode every image file, not only some.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check what a recipe needs before a long run: packages, data, teacher, device, memory, disk.

    A few real steps are timed on this machine, and the run is estimated from them.
    Nothing is written. 1 is the exit code if there is a problem.
    """
    from dkl.config import load_recipe

    loaded = load_recipe(recipe, list(overrides or []))
    folder = out or Path("runs") / loaded.name / f"seed_{loaded.seed}"
    with stdout_for_json_only(as_json):
        from dkl.build.doctor import examine

        diagnosis = examine(
            loaded, folder, take_steps=take_steps, all_images=all_images, progress=say
        )
    if as_json:
        print_json({"recipe": loaded.name, "out": str(folder)} | diagnosis.document())
    else:
        _print(diagnosis)
    if not diagnosis.is_ready:
        raise typer.Exit(1)


def _print(diagnosis: "Diagnosis") -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("looked at", "found", ""):
        table.add_column(title)
    for one in diagnosis.findings:
        table.add_row(one.subject, Text(one.state, style=_STYLES[one.state]), Text(one.message))
    print_table(table)
    if (estimate := diagnosis.estimate) is not None:
        typer.echo(_in_a_sentence(estimate))
    problems = sum(one.state == "problem" for one in diagnosis.findings)
    if problems:
        say(f"Not ready: {problems} {'problem' if problems == 1 else 'problems'}", "red")
    else:
        say("Ready.", "green")


def _in_a_sentence(estimate: Any) -> str:
    parts = {
        "training": estimate.training_seconds,
        "its teacher": estimate.teacher_seconds,
        "evaluation": estimate.evaluation_seconds,
    }
    told = ", ".join(f"{name} {in_words(part)}" for name, part in parts.items() if part > 0)
    return (
        f"About {in_words(estimate.total_seconds)} on one {estimate.device} ({told}), "
        f"and {estimate.disk_bytes / GIB:.2f} GiB on the disk"
    )

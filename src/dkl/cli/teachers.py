"""Commands about published teachers: list, check."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from dkl.cli.output import print_json, print_table, say
from dkl.cli.training import AsJson


def list_teachers(as_json: AsJson = False) -> None:
    """List the published teachers that recipes use: where from, as which file, how accurate.

    Recipes look for the files in the folder `teachers` where they are run. Nothing
    is downloaded.
    """
    from dataclasses import asdict

    from dkl.build.teacher_files import PUBLISHED_TEACHERS

    if as_json:
        print_json([asdict(teacher) for teacher in PUBLISHED_TEACHERS])
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("teacher")
    table.add_column("top-1 %", justify="right")
    table.add_column("file in teachers/", no_wrap=True)
    table.add_column("from")
    for teacher in PUBLISHED_TEACHERS:
        table.add_row(
            Text(teacher.name, style="cyan"),
            f"{teacher.top1:.2f}",
            Text(teacher.file),
            Text(teacher.source),
        )
    print_table(table)


def check_teachers(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the files are.")] = Path(
        "teachers"
    ),
    as_json: AsJson = False,
) -> None:
    """Load every teacher that is in a folder into its network; 1 is the exit code if one is wrong.

    That names and shapes fit does not say how accurate it is: `dkl evaluate FILE`
    with the recipe of the teacher does.
    """
    from dkl.build.teacher_files import check_teachers as check

    checks = check(folder)
    if as_json:
        print_json(
            [
                {"name": one.teacher.name, "found": one.found, "message": one.message}
                for one in checks
            ]
        )
    else:
        table = Table(box=box.SIMPLE_HEAD)
        for title in ("teacher", "file", "found"):
            table.add_column(title)
        for one in checks:
            table.add_row(Text(one.teacher.name), Text(one.teacher.file), one.found)
        print_table(table)
        for one in checks:
            if one.message:
                say(one.message)
    if any(one.found == "wrong" for one in checks):
        raise typer.Exit(1)

"""Commands that bring generated data into a form from which single images can be read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dkl.cli.output import print_json, say
from dkl.cli.training import AsJson


def convert(
    parts: Annotated[
        list[Path], typer.Argument(metavar="PART...", help="Compressed npz files, in order.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files without compression.")],
    as_json: AsJson = False,
) -> None:
    """Write compressed npz files of generated images so that they can be mapped.

    A file appears when it is complete; the same command goes on after an
    interruption. Parts that can be mapped already are not copied.
    """
    from dkl.build import convert_npz

    with _progress_bar("Converting") as progress:
        paths = convert_npz(parts, out, progress=progress)
    unchanged = len(set(paths) & set(parts))
    if unchanged:
        say(f"{unchanged} of {len(paths)} parts can be mapped as they are.")
    _print_paths(paths, as_json)


def convert_carmon(
    file: Annotated[
        Path, typer.Argument(metavar="PICKLE", help="The pseudo-labelled images of Carmon 2019.")
    ],
    out: Annotated[Path, typer.Option(help="The npz file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write the pickle of Carmon et al. 2019 as an npz file of generated images.

    The pickle can build arrays of integers and nothing else: it runs no code.
    """
    from dkl.build import convert_carmon as convert_pickle

    if out.exists():
        raise typer.BadParameter(f"{out} exists; move it away", param_hint="--out")
    say(f"Reading {file}")
    _print_paths([convert_pickle(file, out)], as_json)


@contextmanager
def _progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield update


def _print_paths(paths: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({"parts": [str(path) for path in paths]})
    else:
        for path in paths:
            typer.echo(str(path))

"""Commands about data: generated images made readable one by one, sizes of long-tailed splits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from dkl.cli.output import print_json, print_table, say
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


def show_long_tailed(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A dataset, such as cifar100.")],
    imbalance: Annotated[
        float, typer.Option(help="Images of the largest class over those of the smallest.")
    ] = 100.0,
    kind: Annotated[
        Literal["exponential", "pareto"], typer.Option(help="Shape of the tail.")
    ] = "exponential",
    power: Annotated[float | None, typer.Option(help="Of pareto. (default: 6)")] = None,
    max_per_class: Annotated[
        int | None,
        typer.Option(help="Images of the largest class. (default: what every class has)"),
    ] = None,
    shuffle_classes: Annotated[
        bool, typer.Option("--shuffle-classes", help="Let the seed order the classes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which images are kept.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where the files are.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the files if they are not there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print how many images each class of a long-tailed split of all training images has.

    A run holds validation images out first: its classes are smaller by
    data.validation_fraction.
    """
    from dkl.build import long_tailed_classes

    classes = long_tailed_classes(
        name,
        folder=folder,
        download=download,
        imbalance=imbalance,
        kind=kind,
        power=power,
        max_per_class=max_per_class,
        shuffle_classes=shuffle_classes,
        seed=seed,
    )
    total = sum(one["images"] for one in classes)
    if as_json:
        print_json({"name": name, "images": total, "classes": classes})
        return
    table = Table(box=box.SIMPLE_HEAD, caption=f"{total} images", caption_justify="left")
    table.add_column("class")
    table.add_column("images", justify="right")
    table.add_column("group")
    for one in classes:
        table.add_row(one["class_name"], str(one["images"]), one["group"])
    print_table(table)


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

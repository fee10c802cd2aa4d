"""The command that asks a teacher once for all students of a recipe."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dkl.cli.output import is_main_process, print_json, say, stdout_for_json_only
from dkl.cli.training import AsJson, Overrides, RecipeArgument


def cache_teacher(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the cache, instead of runs/RECIPE/teacher_cache/seed_N."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the most likely classes, and the probability of the rest."),
    ] = None,
    float32: Annotated[
        bool, typer.Option("--float32", help="Keep four bytes of each number, not two.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a recipe's teacher about every image of every epoch, for students to read.

    Train with method.teacher.cache=DIR then. RECIPE is the student's; its
    teacher is a trained one, method.teacher.run or checkpoint. With augmentation
    the seed, the batch size and the number of epochs belong to the cache.

    The same command goes on after an interruption; processes of torchrun share
    the work.
    """
    from dkl.config import load_recipe

    given = list(overrides or [])
    loaded = load_recipe(recipe, given)
    folder = out or Path("runs") / loaded.name / "teacher_cache" / f"seed_{loaded.seed}"
    with stdout_for_json_only(as_json):
        from dkl.build.teacher_caching import prepare_caching, write_cache

        say(f"Caching the teacher of {loaded.name}, seed {loaded.seed}, in {folder}")
        work = prepare_caching(
            loaded, folder, top_k=top_k, dtype="float32" if float32 else "float16"
        )
        say(
            f"{work.num_answers} answers need {_size(work.num_bytes)}, of which "
            f"{_size(work.missing_bytes)} are still to come; {_size(work.free_bytes)} are free"
        )
        with _progress_bar() as progress:
            outcome = write_cache(work, progress=progress)
    if as_json:
        print_json(asdict(outcome))
    elif is_main_process():
        typer.echo(
            f"{outcome.folder}: {outcome.num_answers - outcome.num_missing} of "
            f"{outcome.num_answers} answers, {outcome.num_views} "
            f"{'view' if outcome.num_views == 1 else 'views'}, {_size(outcome.num_bytes)}, "
            f"{outcome.seconds:.0f} s"
        )
    if outcome.num_missing:
        say("Stopped; what is done is kept, and the same command goes on.", "yellow")
        return
    again = ["dkl", "train", recipe, *given, f"method.teacher.cache={outcome.folder}"]
    say(f"Train with it: {shlex.join(again)}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("Asking the teacher"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_main_process()) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update

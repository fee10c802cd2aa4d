"""Commands that train: train and tune."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dkl.cli.evaluating import measure_run
from dkl.cli.output import (
    is_main_process,
    print_json,
    print_table,
    row_document,
    say,
    stdout_for_json_only,
)

if TYPE_CHECKING:
    from dkl.reports import ResultRow

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or the path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe to change, values in YAML."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; with --seeds the folder that holds one run per seed."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the recipe's.")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Train once with each of these seeds.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure on the test data afterwards.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train a recipe, then measure it on the test data.

    A run is a folder with the recipe, records, checkpoints and results:
    runs/RECIPE/seed_N unless --out says otherwise.

    Ctrl-C and SIGTERM save a checkpoint; the same command with --resume goes on.
    """
    from dkl.config import load_recipe

    given = list(overrides or [])
    if seed is not None and seeds is not None:
        raise typer.BadParameter("give --seed or --seeds, not both", param_hint="--seeds")
    chosen = [seed] if seeds is None else parse_seeds(seeds)
    recipes = [
        load_recipe(recipe, given if number is None else [*given, f"seed={number}"])
        for number in chosen
    ]
    documents: list[dict[str, Any]] = []
    for one in recipes:
        base = Path("runs") / one.name if out is None else out
        folder = base if out is not None and seeds is None else base / f"seed_{one.seed}"
        place = f" ({len(documents) + 1} of {len(recipes)})" if len(recipes) > 1 else ""
        say(f"Training {one.name}, seed {one.seed}{place}, in {folder}")
        # Seeds are trained in order: those after the one that was stopped have yet to start.
        goes_on = resume and (not documents or (folder / "recipe.yaml").is_file())
        documents.append(_train_one(one, folder, resume=goes_on, measure=measure, as_json=as_json))
        if documents[-1]["stopped_early"]:
            options = {"--out": out, "--seed": seed, "--seeds": seeds}
            words = [word for pair in options.items() if pair[1] is not None for word in pair]
            again = ["dkl", "train", recipe, *given, *map(str, words), "--resume"]
            say(f"Stopped; a checkpoint is saved. Go on with: {shlex.join(again)}", "yellow")
            break
    if as_json:
        print_json({"recipe": recipes[0].name, "runs": documents})
    elif is_main_process():
        _print_runs(documents)


def tune(
    recipe: RecipeArgument,
    budget: Annotated[int, typer.Option(min=1, help="Number of trials in all.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the trials, instead of runs/RECIPE/tune.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search the recipe's tuning ranges on the validation split.

    The test data is never looked at. Trials are kept: the same command goes on
    where it stopped, and a larger budget adds to them.
    """
    from dkl.config import load_recipe

    given = list(overrides or [])
    loaded = load_recipe(recipe, given)
    folder = out or Path("runs") / loaded.name / "tune"

    def tell(trial: dict[str, Any]) -> None:
        settings = " ".join(trial["overrides"])
        say(f"Trial {trial['number']} ({trial['state']}): {trial['value']} with {settings}")

    say(f"Tuning {loaded.name}, {budget} trials, in {folder}")
    with stdout_for_json_only(as_json):
        from dkl.build import tune_recipe

        outcome = tune_recipe(loaded, budget=budget, out=folder, progress=tell)
    if as_json:
        print_json(
            {
                "recipe": loaded.name,
                "out": str(folder),
                "best_overrides": outcome.best_overrides,
                "best_value": outcome.best_value,
                "trials": outcome.trials,
            }
        )
    elif is_main_process():
        again = shlex.join(["dkl", "train", recipe, *given, *outcome.best_overrides])
        metric = loaded.training.best_metric
        typer.echo(f"Best of {len(outcome.trials)} trials: {metric} {outcome.best_value:.4f}")
        typer.echo(f"Train it with: {again}")


def _train_one(
    recipe: Any, folder: Path, *, resume: bool, measure: bool, as_json: bool
) -> dict[str, Any]:
    with stdout_for_json_only(as_json):
        from dkl.build import train_recipe

        outcome = train_recipe(recipe, folder, resume=resume)
    rows: Sequence[ResultRow] = []
    if measure and not outcome.stopped_early and is_main_process():
        which = "last" if recipe.training.best_metric is None else "best"
        rows = measure_run(outcome.run_dir, [], which, as_json)
    return {
        "run_dir": str(outcome.run_dir),
        "seed": recipe.seed,
        "stopped_early": outcome.stopped_early,
        "best_metric": outcome.best_metric,
        "best_value": outcome.best_value,
        "seconds": outcome.seconds,
        "results": [row_document(row) for row in rows],
    }


def parse_seeds(text: str) -> list[int]:
    """Read "0,1,2"; anything else is a usage error."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        message = f"needs different whole numbers such as 0,1,2; got {text!r}"
        raise typer.BadParameter(message, param_hint="--seeds")
    return [int(word) for word in words]


def _print_runs(documents: list[dict[str, Any]]) -> None:
    measured = [Path(one["run_dir"]) for one in documents if one["results"]]
    if measured:
        from dkl.reports import compare, read_run

        print_table(compare([read_run(folder) for folder in measured]).to_rich())
    for one in documents:
        best = ""
        if one["best_value"] is not None:
            best = f", best {one['best_metric']} {one['best_value']:.4f}"
        typer.echo(f"{one['run_dir']}: {one['seconds']:.0f} s{best}")

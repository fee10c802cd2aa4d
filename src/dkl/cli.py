"""The ``dkl`` command: one thin command per verb, and errors in one message."""

import contextlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

if TYPE_CHECKING:
    from dkl.build import TrainOutcome
    from dkl.reports import ResultRow

TRACEBACK = "--traceback"
_TRACEBACK_KEY = "dkl.cli.traceback"


class _Commands(TyperGroup):
    """Turns errors that a user can mend into one red message and an exit code."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Take ``--traceback`` from wherever it stands in the command line."""
        ctx.meta[_TRACEBACK_KEY] = TRACEBACK in args
        return super().parse_args(ctx, [word for word in args if word != TRACEBACK])

    def invoke(self, ctx: typer.Context) -> Any:
        """Run a command; exit 2 for a bad recipe, 1 for other failures, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("Interrupted." + _HOW_TO_GO_ON.get(ctx.invoked_subcommand or "", ""), "yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.meta[_TRACEBACK_KEY] or not _is_for_users(error):
                raise
            _say(f"Error: {error}", "red")
            if not _is_recipe_error(error):
                _say(f"(add {TRACEBACK} to see where it happened)", "dim")
            raise typer.Exit(2 if _is_recipe_error(error) else 1) from None


_HOW_TO_GO_ON = {
    "train": " The same command with --resume goes on from the last checkpoint.",
    "tune": " The same command goes on after the last finished trial.",
}

app = typer.Typer(
    name="dkl",
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    no_args_is_help=True, help="List, show and copy the recipes that come with dkl."
)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or the path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe to change, values in YAML."),
]
Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN", help="Run folders, patterns, or folders that hold runs."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="dkl")


def _examples(*commands: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        from dkl import __version__

        typer.echo(f"dkl {__version__}")
        raise typer.Exit


@app.callback(
    epilog=_examples("dkl recipes list", "dkl train digits_ikl_at", "dkl compare runs/digits_*")
)
def _common(
    version: Annotated[  # noqa: ARG001 - acts through its callback
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
    traceback: Annotated[  # noqa: ARG001 - read in _Commands.parse_args
        bool, typer.Option(TRACEBACK, help="Show the Python traceback of an error (anywhere).")
    ] = False,
) -> None:
    """Train, attack and compare networks with the decoupled KL losses (DKL, IKL, GKL)."""
    # Built anew for each call: the stream it writes to may differ.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dkl")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if _is_main_process() else logging.WARNING)


@app.command(
    epilog=_examples(
        "dkl train digits_ikl_at",
        "dkl train digits_trades --seeds 0,1,2 method.beta=12",
        "dkl train digits_ikl_kd method.teacher.run=runs/digits_natural/seed_0",
        "dkl train my_recipe.yaml method.attack.eps=8/255 --out runs/mine --resume",
    )
)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder (with --seeds: it holds them). [runs/RECIPE/seed_N]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the recipe's.")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Train once with each of these seeds.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure on the test data afterwards.")
    ] = True,
    json: AsJson = False,
) -> None:
    """Train a recipe, then measure it on the test data.

    A run is a folder with the recipe, records, checkpoints and results. Ctrl-C and SIGTERM save a
    checkpoint; the same command with --resume goes on from there, bit for bit on a CPU.
    """
    from dkl.config import load_recipe

    if seed is not None and seeds is not None:
        raise typer.BadParameter("give --seed or --seeds, not both", param_hint="--seeds")
    given = list(overrides or [])
    chosen = _parse_seeds(seeds) if seeds is not None else [seed]
    loaded = [
        load_recipe(recipe, given if number is None else [*given, f"seed={number}"])
        for number in chosen
    ]
    documents = []
    for number, one in enumerate(loaded, start=1):
        folder = out or Path("runs") / one.name
        if out is None or seeds is not None:
            folder = folder / f"seed_{one.seed}"
        _say(f"Training {one.name}, seed {one.seed} ({number} of {len(loaded)}) in {folder}")
        # Of several seeds some may not have begun yet.
        go_on = resume and (len(loaded) == 1 or folder.exists())
        with _stdout_for_json_only(json):
            from dkl.build import train_recipe

            outcome = train_recipe(one, folder, resume=go_on)
        rows: Sequence[ResultRow] = []
        if evaluate and not outcome.stopped_early and _is_main_process():
            which = "last" if one.training.best_metric is None else "best"
            rows = _evaluate(outcome.run_dir, [], which, json)
        documents.append(_outcome_document(outcome, one.seed, rows))
        if outcome.stopped_early:
            where = [] if out is None else ["--out", str(out)]
            which_seed = [] if seed is None else ["--seed", str(seed)]
            which_seed += [] if seeds is None else ["--seeds", seeds]
            words = ["dkl", "train", recipe, *given, *where, *which_seed, "--resume"]
            _say(f"Stopped early, checkpoint saved. Go on with: {shlex.join(words)}", "yellow")
            break
    _print_runs(documents, loaded[0].name, evaluated=evaluate, as_json=json)


@app.command(
    epilog=_examples(
        "dkl evaluate runs/digits_ikl_at/seed_0",
        "dkl evaluate runs/digits_ikl_at/seed_0 evaluation.num_images=1000",
        "dkl evaluate runs/digits_ikl_at/seed_0 --checkpoint last --json",
    )
)
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", exists=True, help="Run folder or checkpoint."),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Which checkpoint of the run.")
    ] = "best",
    json: AsJson = False,
) -> None:
    """Measure a trained model on the test data and add the results to its run.

    Settings may be changed in the sections evaluation and data of the run's recipe.
    """
    given = list(overrides or [])
    for override in given:
        if not override.startswith(("evaluation.", "data.")):
            raise typer.BadParameter(
                f"{override!r}: only evaluation.KEY=VALUE and data.KEY=VALUE can change what is "
                "measured; the rest was settled by training",
                param_hint="KEY=VALUE",
            )
    rows = _evaluate(path, given, checkpoint, json)
    if json:
        _print_json({"path": str(path), "results": [_row_document(row) for row in rows]})
    elif _is_main_process():
        Console().print(_results_table(rows))


@app.command(
    epilog=_examples("dkl compare runs/digits_trades runs/digits_ikl_at", "dkl compare runs")
)
def compare(runs: Runs, json: AsJson = False) -> None:
    """Print a table of recipes: mean and spread over seeds."""
    from dkl.reports import compare as compare_runs
    from dkl.reports import read_run

    table = compare_runs([read_run(folder) for folder in _find_runs(runs)])
    if json:
        typer.echo(table.to_json())
    else:
        Console().print(table.to_rich())


@app.command(epilog=_examples("dkl report runs --out report.html"))
def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The file to write. [report.html beside the runs]")
    ] = None,
) -> None:
    """Write one self-contained HTML file with tables and figures."""
    from dkl.reports import read_run, write_report

    folders = _find_runs(runs)
    if out is None:
        parents = [folder.resolve().parent for folder in folders]
        beside = folders[0] if len(folders) == 1 else Path(os.path.commonpath(parents))
        out = beside / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report([read_run(folder) for folder in folders], out)
    typer.echo(str(out))


@app.command(
    epilog=_examples(
        "dkl tune digits_ikl_at --budget 20",
        "dkl tune digits_trades --budget 20 training.epochs=20",
    )
)
def tune(
    recipe: RecipeArgument,
    budget: Annotated[int, typer.Option(min=1, help="Number of trials.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the trials. [runs/RECIPE/tune]")
    ] = None,
    json: AsJson = False,
) -> None:
    """Search settings on the validation split; the test data is never looked at.

    Trials are kept: the same command goes on where it stopped.
    """
    from dkl.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name / "tune"
    with _stdout_for_json_only(json):
        from dkl.build import tune_recipe

        outcome = tune_recipe(loaded, budget=budget, out=folder)
    if not _is_main_process():
        return
    if json:
        document = {"recipe": loaded.name, "out": str(folder), "trials": outcome.trials}
        best = {"best_overrides": outcome.best_overrides, "best_value": outcome.best_value}
        _print_json({**document, **best})
        return
    metric = loaded.training.best_metric or "validation"
    words = ["dkl", "train", recipe, *(overrides or []), *outcome.best_overrides]
    typer.echo(f"Best of {len(outcome.trials)} trials: {metric} {outcome.best_value:.4f}")
    typer.echo(f"Trials: {folder}\nTrain it with: {shlex.join(words)}")


@recipes_app.command("list")
def list_recipes(json: AsJson = False) -> None:
    """List the shipped recipes."""
    from dkl.config import list_recipes as names
    from dkl.config import load_recipe

    recipes = [load_recipe(name) for name in names()]
    if json:
        keys = ("name", "description")
        _print_json([{key: getattr(recipe, key) for key in keys} for recipe in recipes])
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for recipe in recipes:
        table.add_row(Text(recipe.name, style="cyan"), Text(recipe.description))
    Console().print(table)


RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")]


@recipes_app.command("show")
def show_recipe(name: RecipeName, json: AsJson = False) -> None:
    """Print a shipped recipe, comments included."""
    from dkl.config import load_recipe, recipe_text, resolved

    if json:
        _print_json(resolved(load_recipe(name)))
    else:
        typer.echo(recipe_text(name), nl=False)


@recipes_app.command("copy", epilog=_examples("dkl recipes copy digits_ikl_at my_recipe.yaml"))
def copy_recipe(
    name: RecipeName,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder. [NAME.yaml]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a shipped recipe to a file of your own, to change it."""
    from dkl.config import recipe_text

    text = recipe_text(name)
    file = destination or Path(f"{name}.yaml")
    if file.is_dir():
        file = file / f"{name}.yaml"
    if file.exists() and not force:
        raise typer.BadParameter(f"{file} exists; --force replaces it", param_hint="DEST")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    typer.echo(str(file))


def _evaluate(path: Path, overrides: list[str], which: str, json: bool) -> "Sequence[ResultRow]":
    with _stdout_for_json_only(json):
        from dkl.build import evaluate_run

        return evaluate_run(path, recipe_overrides=overrides, which=which)


def _parse_seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        message = f"must be different whole numbers such as 0,1,2; got {text!r}"
        raise typer.BadParameter(message, param_hint="--seeds")
    return [int(word) for word in words]


def _find_runs(patterns: Sequence[str]) -> list[Path]:
    """Expand patterns and folders that hold runs; each run once, in the order given."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.exists():
            matches = [path]
        else:
            anchor = Path(path.anchor)
            matches = sorted(anchor.glob(str(path.relative_to(path.anchor))))
        runs = [run for match in matches for run in _runs_below(match)]
        if not runs:
            what = f"no run (a folder with recipe.yaml) is there: {pattern}"
            raise typer.BadParameter(what, param_hint="RUN")
        found.update({run.resolve(): run for run in runs if run.resolve() not in found})
    return list(found.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    # A run inside a run is a teacher, and trials of a search are no results: both stay out, unless
    # they are named directly.
    if (folder / "recipe.yaml").is_file():
        yield folder
    elif folder.is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir() and child.name != "tune":
                yield from _runs_below(child)


def _outcome_document(
    outcome: "TrainOutcome", seed: int, rows: "Sequence[ResultRow]"
) -> dict[str, Any]:
    return {
        "run_dir": str(outcome.run_dir),
        "seed": seed,
        "stopped_early": outcome.stopped_early,
        "best_metric": outcome.best_metric,
        "best_value": outcome.best_value,
        "seconds": outcome.seconds,
        "results": [_row_document(row) for row in rows],
    }


def _row_document(row: "ResultRow") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(row.to_json())
    return document


def _print_runs(
    documents: list[dict[str, Any]], name: str, *, evaluated: bool, as_json: bool
) -> None:
    if as_json:
        _print_json({"recipe": name, "runs": documents})
        return
    if not _is_main_process():
        return
    finished = [Path(one["run_dir"]) for one in documents if not one["stopped_early"]]
    if evaluated and finished:
        from dkl.reports import compare as compare_runs
        from dkl.reports import read_run

        Console().print(compare_runs([read_run(folder) for folder in finished]).to_rich())
    for one in documents:
        best = ""
        if one["best_value"] is not None:
            best = f", best {one['best_metric']} {one['best_value']:.4f}"
        typer.echo(f"{one['run_dir']}: {one['seconds']:.0f} s{best}")


def _results_table(rows: "Sequence[ResultRow]") -> Table:
    from dkl.reports.tables import describe_metric

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("test metric")
    for title in ("threat", "%", "images"):
        table.add_column(title, justify="right")
    for row in rows:
        if row.class_index is not None:
            continue
        described = describe_metric(row.metric)
        title = row.metric if described is None else described[2]
        threat = "-" if row.epsilon is None else f"{row.norm} {row.epsilon:.4g}"
        table.add_row(Text(title), threat, f"{100 * row.value:.2f}", str(row.num_samples))
    return table


def _print_json(document: object) -> None:
    if _is_main_process():
        typer.echo(json.dumps(document, indent=2, default=str))


@contextlib.contextmanager
def _stdout_for_json_only(as_json: bool) -> Iterator[None]:
    """Send what others print to stderr, so that stdout holds one JSON document."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _say(message: str, style: str = "") -> None:
    if _is_main_process():
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(Text(message, style=style))


def _is_main_process() -> bool:
    """Tell whether this is the process that speaks, also under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _is_for_users(error: Exception) -> bool:
    """Tell errors that a user can mend from mistakes in the code."""
    is_ours = type(error).__module__.split(".")[0] == "dkl"
    return is_ours or (
        isinstance(error, ValueError | OSError | ImportError)
        and not isinstance(error, BrokenPipeError)
    )


def _is_recipe_error(error: Exception) -> bool:
    from dkl.config import RecipeError

    return isinstance(error, RecipeError)

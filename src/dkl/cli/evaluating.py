"""The command ``evaluate``, and what it shows while it measures."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text
from typing_extensions import Self

from dkl.cli.output import (
    is_main_process,
    print_json,
    print_table,
    results_table,
    row_document,
    say,
    stdout_for_json_only,
)

if TYPE_CHECKING:
    from dkl.reports import ResultRow

_OF_A_RUN = ("evaluation.", "data.", "method.teacher.run")
_OF_WEIGHTS = ("evaluation.", "data.", "model.", "method.teacher.")
_PREDICTIONS = {
    "expected_calibration_error": "expected calibration error {:.2%}",
    "negative_log_likelihood": "negative log-likelihood {:.4f} nats",
    "teacher_agreement": "agreement with the teacher {:.2%}",
    "teacher_kl": "mean KL divergence from the teacher {:.4f} nats",
}


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            exists=True,
            help="Run folder, a checkpoint in one, or a file of weights (with --recipe).",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="What to measure otherwise: evaluation.KEY=VALUE."
        ),
    ] = None,
    checkpoint: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="Which checkpoint of the run. (default: best)"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Model, data and attacks for a file of weights, as for train."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Results of a file of weights, instead of NAME_evaluation beside it."),
    ] = None,
    transfer_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", exists=True, help="Attack with images made on this run's model, too."
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what was measured before.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout.")
    ] = False,
) -> None:
    """Measure a trained model on the test data and add the results to its run.

    Results are kept as they come: the same command goes on where it stopped.
    Under torchrun, processes share the work.
    """
    given = list(overrides or [])
    # Left out where they were not asked for: they have no other meaning then.
    options: dict[str, Any] = {} if transfer_from is None else {"transfer_from": transfer_from}
    if again:
        options["again"] = True
    if os.environ.get("WORLD_SIZE", "1") != "1":
        options["distributed"] = True
    if recipe is None:
        _check_run(path, given, out)
        rows = measure_run(path, given, checkpoint or "best", as_json, **options)
    else:
        _check_weights(path, given, checkpoint)
        rows = _measure_weights(path, recipe, given, out, as_json, **options)
    if as_json:
        print_json({"path": str(path), "results": [row_document(row) for row in rows]})
    elif is_main_process():
        _print_results(rows)


def _check_run(path: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Refuse what a run has settled, and what only a file of weights needs."""
    if path.is_file():
        message = f"{path} is a file: name the recipe of its architecture with --recipe"
        raise typer.BadParameter(message, param_hint="RUN_OR_CHECKPOINT")
    if out is not None:
        message = "the results of a run stay in the run; --out is for a file of weights"
        raise typer.BadParameter(message, param_hint="--out")
    _refuse_others(
        overrides, _OF_A_RUN, "training has settled {}; change evaluation.KEY or data.KEY"
    )


def _check_weights(path: Path, overrides: Sequence[str], checkpoint: str | None) -> None:
    """Refuse what would be ignored for a file of weights."""
    if not path.is_file():
        message = f"--recipe is for a file of weights; {path} is a folder, whose run has a recipe"
        raise typer.BadParameter(message, param_hint="--recipe")
    if checkpoint is not None:
        message = f"{path} is one checkpoint; leave out --checkpoint"
        raise typer.BadParameter(message, param_hint="--checkpoint")
    _refuse_others(
        overrides,
        _OF_WEIGHTS,
        "{} would be ignored; change evaluation.KEY, data.KEY, model.KEY or method.teacher.KEY",
    )


def _refuse_others(overrides: Sequence[str], allowed: tuple[str, ...], message: str) -> None:
    others = [text for text in overrides if not text.startswith(allowed)]
    if others:
        raise typer.BadParameter(message.format(", ".join(others)), param_hint="KEY=VALUE")


def measure_run(
    path: Path, overrides: list[str], which: str, as_json: bool, **options: Any
) -> "Sequence[ResultRow]":
    """Measure a run and show how far it is; ``options`` are those of ``evaluate_run``."""
    with stdout_for_json_only(as_json), MeasuringProgress() as progress:
        from dkl.build import evaluate_run

        return evaluate_run(
            path, recipe_overrides=overrides, which=which, progress=progress, **options
        )


def _measure_weights(
    file: Path,
    recipe: str,
    overrides: list[str],
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> "Sequence[ResultRow]":
    from dkl.config import load_recipe

    attacks = [text for text in overrides if text.startswith("evaluation.")]
    loaded = load_recipe(recipe, [text for text in overrides if text not in attacks])
    with stdout_for_json_only(as_json), MeasuringProgress() as progress:
        from dkl.build.evaluating import evaluate_weights

        return evaluate_weights(
            file, loaded, recipe_overrides=attacks, out=out, progress=progress, **options
        )


def _print_results(rows: "Sequence[ResultRow]") -> None:
    """Print accuracies as a table; calibration, features and checks, which are none, as lines."""
    print_table(results_table([row for row in rows if row.metric.endswith("_accuracy")]))
    for row in rows:
        if row.metric in _PREDICTIONS:
            typer.echo(_PREDICTIONS[row.metric].format(row.value))
        if row.metric == "feature_compactness":
            measure = str(row.details["measure"]).replace("_", " ")
            typer.echo(f"features of {row.details['images']} images: {measure} {row.value:.3f}")
    checks = [row for row in rows if row.metric == "masking_check"]
    failed = [row for row in checks if row.value == 0]
    if checks:
        typer.echo(
            f"checks for masked gradients: {len(checks) - len(failed)} of {len(checks)} pass"
        )
    for row in failed:
        name = str(row.details["check"]).replace("_", " ")
        say(f"Check {name} failed: {row.details['message']}", "yellow")
    if failed:
        say("Robust accuracies above may be too high.", "yellow")


class MeasuringProgress:
    """Shows what is measured: a live line on a terminal, a line per measurement elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._said = ""

    def __call__(self, what: str, state: Any = None) -> None:
        """Tell what is measured; ``state`` is where an attack stands."""
        headline = f"Measuring {what}"
        if state is not None and state.num_attacks > 1:
            headline += f": {state.attack} ({state.attack_index + 1} of {state.num_attacks})"
        if self._status is None:
            if headline != self._said:
                say(headline)
            self._said = headline
            return
        if state is not None:
            headline += (
                f", {state.num_done}/{state.num_attacked} images, "
                f"{state.num_robust}/{state.num_samples} robust, {show_time(state.seconds)}"
            )
            if state.seconds_left is not None:
                headline += f", about {show_time(state.seconds_left)} left"
        self._status.update(Text(headline))

    def __enter__(self) -> Self:
        """Open the live line."""
        if self._console.is_terminal and is_main_process():
            self._status = self._console.status(Text("Loading"))
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the live line."""
        if self._status is not None:
            self._status.stop()


def show_time(seconds: float) -> str:
    """Write a duration as people read it.

    Example:
        >>> show_time(4.4), show_time(90), show_time(7300)
        ('4 s', '1:30 min', '2:01 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"

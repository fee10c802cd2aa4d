"""What the methods of an experiment cost: seconds of a step and trained parameters, in one run."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from dkl import config
from dkl.build.methods import build_method
from dkl.build.objects import build_data, build_model
from dkl.build.reproduce.experiments import Row, Rows
from dkl.build.reproduce.measure import seconds_per_step, shortened
from dkl.build.reproduce.stand_in_teachers import with_random_teacher
from dkl.build.runs import RECIPE_FILE, write_text
from dkl.build.teachers import load_teacher
from dkl.reports import ResultRow, Run, append_results, provenance, read_run

_NUM_STEPS = 50


def measure_costs(
    rows: Rows,
    out: Path,
    *,
    rounds: int,
    overrides: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Run]]:
    """Time the optimiser step of every row, all rows once in each round.

    A step is what it is in training: data, augmentation, teacher, student, loss, gradient, update.
    Its time is that of the second of two short epochs. Teachers have random weights, which cost the
    same. What a round has measured already is not measured again.

    Args:
        rows: of the experiment.
        out: folder; a round is ``out/round_N``, with rows for every method.
        rounds: how often each row is timed.
        overrides: ``key=value`` for all rows.
        progress: told what is measured.

    Returns:
        Key of the row -> one run a round.

    Raises:
        ValueError: settings that do not fit, or data that are not there.
    """
    if rounds < 1:
        raise ValueError(f"needs at least one round, got {rounds}")
    recipes = {key: _recipe(row, overrides) for key, row in rows.items()}
    found: list[Run] = []
    for number in range(rounds):
        folder = out / f"round_{number}"
        some = next(iter(recipes.values()))
        write_text(folder / RECIPE_FILE, config.to_yaml(some.model_copy(update={"seed": number})))
        done = {row.details.get("method") for row in read_run(folder).results}
        for key, recipe in recipes.items():
            if key not in done:
                progress(f"round {number + 1} of {rounds}: {key}")
                append_results(folder / "results.jsonl", _costs(key, recipe, number))
        found.append(read_run(folder))
    return dict.fromkeys(rows, found)


def _recipe(row: Row, overrides: tuple[str, ...]) -> config.Recipe:
    return config.load_recipe(row.recipe, (*row.overrides, *overrides))


def _costs(key: str, recipe: config.Recipe, round_number: int) -> list[ResultRow]:
    """Measure one row once."""
    with TemporaryDirectory(prefix="dkl-costs-") as scratch:
        ready = with_random_teacher(recipe, Path(scratch))
        short = shortened(ready, recipe.training.batch_size, _NUM_STEPS, {})
        seconds = seconds_per_step(short, Path(scratch) / "run", _NUM_STEPS)
        num_parameters, num_bytes = _own_size(short, Path(scratch))
    details = {
        "measure": "cost",
        "method": key,
        "batch_size": recipe.training.batch_size,
        "num_steps": _NUM_STEPS,
        "memory_bytes": num_bytes,
    }
    common: dict[str, Any] = {
        "run_name": recipe.name,
        "seed": round_number,
        "num_samples": _NUM_STEPS * recipe.training.batch_size,
        "checkpoint": "last",
        "details": details,
        **provenance(config.resolved(recipe)),
    }
    return [
        ResultRow(metric="seconds_per_iteration", value=seconds, **common),
        ResultRow(metric="extra_parameters", value=float(num_parameters), **common),
    ]


def _own_size(recipe: config.Recipe, scratch: Path) -> tuple[int, int]:
    """Return the parameters that the method trains beside the student, and bytes of its buffers."""
    data = build_data(recipe.data, recipe.seed).train
    student = build_model(recipe.model, data, recipe.seed)
    teacher: nn.Module | None = None
    if getattr(recipe.method, "teacher", None) is not None:
        teacher = load_teacher(recipe, scratch, data).model
    method = build_method(
        recipe.method, data.num_classes, 1, teacher, student=student, data=data, seed=recipe.seed
    )
    assert isinstance(method, nn.Module)
    own = sum(one.numel() for one in method.parameters() if one.requires_grad)
    return own, sum(one.numel() * one.element_size() for one in method.buffers())

"""Search of a recipe's stated ranges on the validation split, with Optuna."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkl import config
from dkl.build.runs import write_text
from dkl.build.training import train_recipe
from dkl.engine import NonFiniteLossError
from dkl.engine.state import has_checkpoint

TRIALS_FILE = "trials.jsonl"


@dataclass(frozen=True)
class TuneOutcome:
    """What a search found.

    Args:
        best_overrides: ``key=value`` of the best trial, for ``dkl train RECIPE ...``.
        best_value: its validation metric.
        trials: number, state, value, overrides and seconds of every trial, in order.
    """

    best_overrides: list[str]
    best_value: float
    trials: list[dict[str, Any]]


def tune_recipe(
    recipe: config.Recipe,
    *,
    budget: int,
    out: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> TuneOutcome:
    """Train ``budget`` trials of the recipe's ``tuning`` ranges and rank them on validation data.

    The first trial is the recipe as it stands; the others come from Optuna's TPE sampler, seeded
    by the recipe. Calling it again with the same folder goes on: finished trials count towards the
    budget, and one that was cut short is resumed. The test split is never looked at.

    Args:
        recipe: with a ``tuning`` section and ``training.best_metric``.
        budget: number of trials in all.
        out: folder of the search: one run per trial, the study's journal and ``trials.jsonl``.
        progress: called with the record of every finished trial.

    Returns:
        The best trial and all of them.

    Raises:
        ValueError: no ranges, or a folder that holds the search of another recipe.
    """
    if recipe.tuning is None or recipe.training.best_metric is None:
        raise ValueError(
            f"{recipe.name} states no ranges to search: give it a tuning section with a space, and "
            "a training.best_metric to rank trials by"
        )
    if budget < 1:
        raise ValueError(f"the budget must be at least one trial, got {budget}")
    first = _own_values(recipe)
    study = _open_study(recipe, out, first)
    for trial in study.trials:
        if trial.state.name == "RUNNING":  # cut short by a crash or a kill
            _run_trial(study, trial, recipe, out, progress)
    while sum(trial.state.is_finished() for trial in study.trials) < budget:
        trial = study.ask(_distributions(recipe))
        _run_trial(study, trial, recipe, out, progress)
    if not any(trial.state.name == "COMPLETE" for trial in study.trials):
        raise ValueError(f"every trial diverged; see {out / TRIALS_FILE} and narrow tuning.space")
    best = study.best_trial
    return TuneOutcome(_overrides(best.params), float(best.value), _records(study))


def _open_study(recipe: config.Recipe, out: Path, first: dict[str, Any]) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    recipe_file = out / "recipe.yaml"
    text = config.to_yaml(recipe)
    if recipe_file.exists() and recipe_file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{out} holds the search of another recipe (see {recipe_file}); choose another --out"
        )
    write_text(recipe_file, text)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / "study.journal"))),
        study_name=recipe.name,
        direction="maximize",
        load_if_exists=True,
    )
    # A resumed search must not draw the random first trials once more.
    seed = recipe.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=6)
    if not study.trials:
        study.enqueue_trial(first)
    return study


def _distributions(recipe: config.Recipe) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    assert recipe.tuning is not None
    return {
        key: (
            CategoricalDistribution(list(choice.choices))
            if isinstance(choice, config.Choices)
            else FloatDistribution(choice.low, choice.high, log=choice.log)
        )
        for key, choice in recipe.tuning.space.items()
    }


def _own_values(recipe: config.Recipe) -> dict[str, Any]:
    """Return what the recipe itself says for each searched key: the first trial.

    Raises:
        ValueError: a value that the search could not propose.
    """
    assert recipe.tuning is not None
    own: dict[str, Any] = {}
    for key, space in recipe.tuning.space.items():
        value: Any = config.resolved(recipe)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(space, config.Choices):
            fits, what = value in space.choices, f"one of {list(space.choices)}"
        else:
            low, high = space.ends
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            fits, what = is_number and low <= value <= high, f"between {low:g} and {high:g}"
        if not fits:
            raise ValueError(
                f"the first trial is the recipe itself, whose {key} is {json.dumps(value)}; "
                f"tuning.space wants it {what}. Change the recipe's value or the range"
            )
        own[key] = value
    return own


def _overrides(params: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in sorted(params.items())]


def _run_trial(
    study: Any,
    trial: Any,
    recipe: config.Recipe,
    out: Path,
    progress: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Train one trial, resuming it where an earlier call was cut short, and record its value."""
    from optuna.trial import TrialState

    run = out / f"trial_{trial.number:04d}"
    trial_recipe = config.override(recipe, _overrides(trial.params))
    try:
        outcome = train_recipe(trial_recipe, run, resume=has_checkpoint(run))
    except NonFiniteLossError:
        study.tell(trial.number, state=TrialState.FAIL)
    else:
        if outcome.stopped_early:
            raise KeyboardInterrupt("the search was stopped; the same command goes on with it")
        study.tell(trial.number, outcome.best_value)
    records = _records(study)
    write_text(out / TRIALS_FILE, "".join(json.dumps(record) + "\n" for record in records))
    if progress is not None:
        progress(records[trial.number])


def _records(study: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": "trial",
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "overrides": _overrides(trial.params),
            "seconds": None if trial.duration is None else trial.duration.total_seconds(),
        }
        for trial in study.trials
    ]

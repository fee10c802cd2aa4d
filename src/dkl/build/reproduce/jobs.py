"""From rows and seeds to jobs: one run folder each, shared by all rows that train the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dkl import config
from dkl.build.reproduce.experiments import Row, Rows
from dkl.reports.origin import NOT_SETTINGS, PLACES

# The one part of `evaluation` that training reads is what its validation attack is.
_MEASURED_LATER = "evaluation."
_READ_BY_TRAINING = "evaluation.validation_"
_TEACHER_RUN = "method.teacher.run"


@dataclass(frozen=True)
class Job:
    """One training run and what is measured on it.

    Args:
        recipe: what ``dkl train`` is given.
        overrides: what is changed in it for training.
        wanted: the resolved recipe, seed included.
        folder: the run folder.
        evaluations: overrides of each evaluation, in order; the empty one is the recipe's own.
        rows: keys of the rows that it serves.
        teacher: the run folder of its teacher, which has to be trained first; None without.
    """

    recipe: str
    overrides: tuple[str, ...]
    wanted: config.Recipe
    folder: Path
    evaluations: tuple[tuple[str, ...], ...]
    rows: tuple[str, ...]
    teacher: Path | None = None

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.wanted.seed

    @property
    def name(self) -> str:
        """Name of the folder above the run: the recipe, with a hash where it is changed."""
        return self.folder.parent.name

    @property
    def which(self) -> Literal["best", "last"]:
        """Return the checkpoint that is measured: "best", or "last" where none is chosen."""
        return "last" if self.wanted.training.best_metric is None else "best"


def plan_jobs(
    rows: Rows, *, seeds: Sequence[int], out: Path, overrides: Iterable[str] = ()
) -> list[Job]:
    """Return the jobs of some rows: each run once, all rows of the first seed first.

    Args:
        rows: key -> row.
        seeds: a run of every row with each of these.
        out: folder of all runs; a run is ``out/RECIPE[-HASH]/seed_N``.
        overrides: the user's own ``key=value`` for all rows.

    Raises:
        ValueError: settings that do not fit (``RecipeError``), that rows differ in, or rows that
            want different runs in one folder.

    Example:
        >>> rows = {"a": Row("digits_trades"), "b": Row("digits_trades", ("method.beta=6.3",))}
        >>> for job in plan_jobs(rows, seeds=[0, 1], out=Path("runs")):
        ...     print(job.folder.as_posix(), job.rows)
        runs/digits_trades/seed_0 ('a', 'b')
        runs/digits_trades/seed_1 ('a', 'b')
    """
    training, measuring = _sorted_overrides(overrides)
    first: dict[Path, Job] = {}
    for key, row in rows.items():
        teacher = _teacher_of(row, first, seeds)
        taught = () if teacher is None else (f"{_TEACHER_RUN}={json.dumps(str(teacher))}",)
        complete = replace(row, overrides=(*row.overrides, *taught))
        job = replace(_job(key, complete, out, training, measuring), teacher=teacher)
        if (known := first.get(job.folder)) is not None:
            if known.wanted != job.wanted:
                raise ValueError(
                    f"rows {known.rows[0]} and {key} want different runs in {job.folder}; give "
                    "their recipes different names"
                )
            evaluations = tuple(dict.fromkeys((*known.evaluations, *job.evaluations)))
            job = replace(known, evaluations=evaluations, rows=(*known.rows, key))
        first[job.folder] = job
    return [
        _with_seed(job, seed)
        for seed in seeds
        for job in first.values()
        if seed == seeds[0] or not all(rows[key].once for key in job.rows)
    ]


def _teacher_of(row: Row, before: Mapping[Path, Job], seeds: Sequence[int]) -> Path | None:
    """Return where a row's teacher will lie: a run of an earlier row, of the first seed."""
    if not row.teacher:
        return None
    folder = next(job.folder for job in before.values() if row.teacher in job.rows)
    return folder / f"seed_{seeds[0]}"


def _with_seed(job: Job, seed: int) -> Job:
    wanted = job.wanted.model_copy(update={"seed": seed})
    return replace(job, wanted=wanted, folder=job.folder / f"seed_{seed}")


def _job(key: str, row: Row, out: Path, training: dict[str, str], measuring: dict[str, str]) -> Job:
    """Return the job of a row without its seed: ``folder`` is that of all its runs."""
    own_training, own_measuring = _sorted_overrides(row.overrides)
    blocked = [*own_training, *row.scaled]
    for mine, text in training.items():
        if clash := [other for other in blocked if _overlap(mine, other)]:
            raise ValueError(f"{clash[0]} is what row {key} differs in; leave out {text}")
    base = config.load_recipe(row.recipe, training.values())
    scaled = {
        name: f"{name}={_number(base, name) * factor:.6g}"
        for name, factor in row.scaled.items()
        if factor != 1
    }
    changes = tuple((training | own_training | scaled).values())
    wanted = config.load_recipe(row.recipe, changes)
    evaluation = tuple((own_measuring | measuring).values())
    config.override(wanted, evaluation)  # wrong settings show before anything is trained
    suffix = _suffix(config.load_recipe(row.recipe), wanted)
    return Job(row.recipe, changes, wanted, out / f"{wanted.name}{suffix}", (evaluation,), (key,))


def _sorted_overrides(overrides: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the overrides of training and those of the evaluation, by key."""
    training: dict[str, str] = {}
    measuring: dict[str, str] = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"override {text!r} must look like key.sub=value")
        if key in ("seed", "name", "evaluation"):
            instead = {"seed": "use --seeds", "name": "runs are found by the recipe's own name"}
            advice = instead.get(key, "give evaluation.KEY=VALUE, one key at a time")
            raise ValueError(f"{key} cannot be changed here: {advice}")
        later = key.startswith(_MEASURED_LATER) and not key.startswith(_READ_BY_TRAINING)
        chosen = measuring if later else training
        if key in chosen:
            raise ValueError(f"{key} is given twice; give it once")
        chosen[key] = text
    return training, measuring


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _number(recipe: config.Recipe, key: str) -> float:
    value: Any = config.resolved(recipe)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{recipe.name} has no number {key} to scale; it holds {value!r}")
    return float(value)


def _suffix(own: config.Recipe, wanted: config.Recipe) -> str:
    """Return "-" and a hash of what differs from the shipped recipe, or nothing."""
    before, after = _flat(config.resolved(own)), _flat(config.resolved(wanted))
    changed = {
        key: after.get(key)
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
        and key not in PLACES
        and key.partition(".")[0] not in NOT_SETTINGS
    }
    if not changed:
        return ""
    return "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

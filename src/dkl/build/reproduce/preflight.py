"""Whether data, device and disk are there, found out before a queue of days is started."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dkl import config
from dkl.build.objects import Splits, build_data
from dkl.build.reproduce.jobs import Job
from dkl.engine.plan import count_steps

GIB = 2**30


@dataclass(frozen=True)
class DataFacts:
    """How much there is of the data of a recipe.

    Args:
        num_epoch: samples of an epoch.
        num_validation: images held out.
        num_test: test images.
    """

    num_epoch: int
    num_validation: int
    num_test: int


def recipes_of(jobs: Sequence[Job]) -> list[config.Recipe]:
    """Return the recipe of each job, those of other seeds left out."""
    return list({job.folder.parent: job.wanted for job in jobs}.values())


def check_data(recipes: Sequence[config.Recipe]) -> tuple[dict[str, DataFacts], list[str]]:
    """Load the data of all recipes once, downloading where a recipe allows it.

    Args:
        recipes: resolved.

    Returns:
        Facts by ``data_key``, and one message with advice for everything that is missing.

    Example:
        >>> facts, problems = check_data([config.load_recipe("digits_trades")])
        >>> list(facts.values()), problems
        ([DataFacts(num_epoch=1154, num_validation=288, num_test=355)], [])
    """
    facts: dict[str, DataFacts] = {}
    problems: dict[str, list[str]] = {}
    seen: set[str] = set()
    for recipe in recipes:
        for missing in missing_parts(recipe):
            problems.setdefault(missing, []).append(recipe.name)
        key = data_key(recipe)
        if key in seen:
            continue
        seen.add(key)
        try:
            splits = build_data(recipe.data, recipe.seed)
        except (ValueError, OSError, ImportError) as error:
            problems.setdefault(str(error), []).append(recipe.name)
            continue
        facts[key] = facts_of(recipe, splits)
    return facts, [f"{why} (needed by {', '.join(names)})" for why, names in problems.items()]


def facts_of(recipe: config.Recipe, splits: Splits) -> DataFacts:
    """Return how much there is of loaded data."""
    drawn = recipe.data.generated or recipe.data.class_balanced
    num_epoch = None if drawn is None else drawn.samples_per_epoch
    return DataFacts(
        num_epoch=len(splits.train) if num_epoch is None else num_epoch,
        num_validation=0 if splits.validation is None else len(splits.validation),
        num_test=len(splits.test),
    )


def data_key(recipe: config.Recipe) -> str:
    """Name what decides ``DataFacts`` of a recipe."""
    excluded = {"augment", "views"}
    return recipe.data.model_dump_json(exclude=excluded)


def steps_per_epoch(recipe: config.Recipe, facts: DataFacts) -> int:
    """Return the optimiser steps of an epoch."""
    return count_steps(facts.num_epoch, recipe.training.batch_size, recipe.training.drop_last)


def missing_parts(recipe: config.Recipe) -> list[str]:
    """Return a message for each file of generated images that is not there."""
    generated = recipe.data.generated
    parts = [] if generated is None else [Path(part).expanduser() for part in generated.parts]
    return [
        f"generated images {part} were not found; name the npz files that hold them: "
        "data.generated.parts=[FILE, ...]"
        for part in parts
        if not part.is_file()
    ]


def check_device(*, on_cpu: bool) -> list[str]:
    """Return a problem where there is no CUDA device, unless the CPU is wanted."""
    if on_cpu or torch.cuda.is_available():
        return []
    return ["no CUDA device was found; --on-cpu trains on the CPU all the same (for months)"]


def check_disk(out: Path, needed_bytes: int) -> list[str]:
    """Return a problem where the disk of a folder, which need not exist, has too little room.

    Example:
        >>> check_disk(Path("runs"), 0), len(check_disk(Path("runs"), 2**80))
        ([], 1)
    """
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free >= needed_bytes:
        return []
    return [
        f"the runs need about {needed_bytes / GIB:.1f} GiB and {place} has {free / GIB:.1f} GiB "
        "free; make room or choose another --out"
    ]

"""Shipped digits recipes, cut down until a test can train them."""

import json
from pathlib import Path

import torch
from torch import Tensor

from dkl.build.objects import Splits, build_data
from dkl.config import DataSettings, Recipe, load_recipe
from dkl.engine import find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows

SHORT = ("training.epochs=1", "training.batch_size=32", "trackers=[]", "model.kwargs={width: 4}")
ATTACK = ("method.attack.num_steps=2", "method.attack.step_size=0.1")
MEASURE = (
    "evaluation.num_images=8",
    "evaluation.pgd_steps=[2]",
    "evaluation.cw_steps=[2]",
    "evaluation.auto_attack=null",
    "evaluation.sweep=[0.1]",
    "evaluation.validation_attack_steps=1",
)


def small(name: str, *overrides: str) -> Recipe:
    """Return a shipped digits recipe with a narrow network, one epoch and short attacks."""
    recipe = load_recipe(name)
    own = [*SHORT]
    if hasattr(recipe.method, "attack"):
        own += ATTACK
    if recipe.evaluation.eps is not None:
        own += MEASURE
    given = {override.partition("=")[0] for override in overrides}
    kept = [override for override in own if override.partition("=")[0] not in given]
    return load_recipe(name, [*kept, *overrides])


def few_digits(settings: DataSettings, seed: int) -> Splits:
    """Stand in for ``build_data``: the same splits with a few images each."""
    splits = build_data(settings, seed)

    def cut(data, count):
        return None if data is None else data.subset(torch.arange(min(count, len(data))))

    return Splits(cut(splits.train, 100), cut(splits.validation, 24), cut(splits.test, 40))


def use_few_digits(patch) -> None:
    for module in ("training", "evaluating", "teachers", "teacher_caching"):
        patch.setattr(f"dkl.build.{module}.build_data", few_digits)


def weights(run: Path, which: str = "last") -> dict[str, Tensor]:
    """Return weights and averaged weights of a checkpoint under distinct names."""
    checkpoint = load_checkpoint(find_checkpoint(run, which))
    average = {f"average.{name}": value for name, value in (checkpoint.average or {}).items()}
    return {**checkpoint.model, **average}


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same_method_state(first: Path, second: Path) -> bool:
    one, other = (
        load_checkpoint(find_checkpoint(run)).training["method"] for run in (first, second)
    )
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def records(run: Path) -> list[dict]:
    """Return the rows of a run without the times."""
    rows = read_rows(run / "records.jsonl")
    for row in rows:
        row.pop("seconds", None)
        row.pop("images_per_second", None)
    return rows


def results(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]

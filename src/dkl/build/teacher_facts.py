"""What decides a teacher's answers in training: the facts that a teacher cache is known by."""

import hashlib
from pathlib import Path
from typing import Any

from dkl import config
from dkl.build.runs import hash_weights, load_run_weights, read_recipe
from dkl.build.teachers import teacher_settings
from dkl.data import ImageData


def cache_facts(recipe: config.Recipe, data: ImageData, teacher: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides what a teacher is asked and what it answers.

    Noise is drawn by seed, step and image, so that with augmentation the seed, the batch size and
    whether the last step is left out belong to it: they say in which step of an epoch an image
    comes. Without augmentation they do not. How steps are split over processes and micro-batches
    never matters.

    Args:
        recipe: of the student.
        data: its training images.
        teacher: from ``teacher_facts``.

    Returns:
        JSON-ready facts.
    """
    training, augment = recipe.training, recipe.data.augment
    facts: dict[str, Any] = {
        "teacher": teacher,
        "images": hash_weights({"images": data.images}),
        "dtype": training.dtype,
        "mixed_precision": training.mixed_precision,
        "augment": None if augment is None else augment.model_dump(mode="json"),
    }
    if augment is not None:
        facts |= {
            "seed": recipe.seed,
            "batch_size": training.batch_size,
            "drop_last": training.drop_last,
        }
    return facts


def teacher_facts(recipe: config.Recipe) -> dict[str, Any]:
    """Return what tells the teacher that a recipe names from others, without building its network.

    Args:
        recipe: of the student; its method has a teacher.

    Returns:
        Hash of the weights and their network, of a run also its recipe and seed. Of a teacher that
        is named by recipe alone, recipe and seed: those that a run of the student would train it
        with.

    Raises:
        ValueError: a run or file is not there.
    """
    settings = teacher_settings(recipe)
    if settings is None:
        raise ValueError(
            f"method {recipe.method.kind} has no teacher; choose one on logits, such as kd"
        )
    if settings.checkpoint is not None and settings.model is not None:
        return {
            "file": _hash_file(Path(settings.checkpoint)),
            "model": settings.model.model_dump(mode="json"),
        }
    if settings.run is None:
        name = config.load_recipe(str(settings.recipe)).name
        return {"recipe": name, "seed": recipe.seed}
    run, teaching = read_recipe(Path(settings.run))
    which = "last" if teaching.training.best_metric is None else "best"
    return {
        "recipe": teaching.name,
        "seed": teaching.seed,
        "weights": hash_weights(load_run_weights(run, which)),
        "model": teaching.model.model_dump(mode="json"),
    }


def _hash_file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"there is no {path}, the teacher's checkpoint; say where it is now: "
            "method.teacher.checkpoint=FILE"
        )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

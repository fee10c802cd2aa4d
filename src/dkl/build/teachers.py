"""The teacher of a run, loaded from where its recipe says; nothing is trained here."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dkl import config, evaluation
from dkl.build.image_access import LabelledImages
from dkl.build.objects import build_data, load_teacher_checkpoint
from dkl.build.runs import RECIPE_FILE, hash_weights, load_run_model, read_recipe

TEACHER_FOLDER = "teacher"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher.

    Args:
        model: in evaluation mode, on the CPU.
        source: where it comes from, in words.
        weights_hash: of the model.
        channels_last: the memory format of its training.
    """

    model: nn.Module
    source: str
    weights_hash: str
    channels_last: bool = False


def teacher_settings(recipe: config.Recipe) -> config.TeacherSettings | None:
    """Return where the method's teacher comes from, None where it has none."""
    settings: config.TeacherSettings | None = getattr(recipe.method, "teacher", None)
    return settings


def teaching_recipe(recipe: config.Recipe) -> config.Recipe:
    """Return the recipe by which the teacher is trained, with the student's seed.

    Data of the same name are where the student's are: their place is said once.

    Raises:
        ValueError: the method names no recipe for its teacher.
    """
    settings = teacher_settings(recipe)
    if settings is None or settings.recipe is None:
        raise ValueError(f"{recipe.name} names no recipe for its teacher: method.teacher.recipe")
    teaching = config.load_recipe(settings.recipe, [f"seed={recipe.seed}"])
    if teaching.data.name != recipe.data.name:
        return teaching
    places = {"folder": recipe.data.folder, "download": recipe.data.download}
    return teaching.model_copy(update={"data": teaching.data.model_copy(update=places)})


def load_teacher(recipe: config.Recipe, folder: Path, data: LabelledImages) -> Teacher:
    """Load the teacher of a run.

    Args:
        recipe: of the student; its method has a teacher.
        folder: the student's run, whose ``teacher`` folder holds a teacher that is named by recipe.
        data: the student's training data, for a teacher from a checkpoint file.

    Returns:
        The teacher.

    Raises:
        ValueError: no teacher is there, it is of other data, or its weights do not fit.
    """
    settings = teacher_settings(recipe)
    if settings is None:
        raise ValueError(f"method {recipe.method.kind} has no teacher; choose one that distils")
    if settings.checkpoint is not None:
        file = Path(settings.checkpoint)
        model = load_teacher_checkpoint(settings, data).eval()
        return Teacher(model, f"checkpoint {file.name}", hash_weights(model.state_dict()))
    run = folder / TEACHER_FOLDER if settings.run is None else Path(settings.run)
    if settings.run is None and not (run / RECIPE_FILE).is_file():  # or the student's own is found
        raise ValueError(
            f"the teacher is not there: {run} holds no run, and an evaluation trains none. Bring "
            "the folder back, or say where the teacher is now: method.teacher.run=DIR"
        )
    run, teaching = read_recipe(run)
    if teaching.data.name != recipe.data.name:
        raise ValueError(
            f"the teacher of {run} was trained on {teaching.data.name}, the student's data is "
            f"{recipe.data.name}: choose a teacher of the same data"
        )
    which = "last" if teaching.training.best_metric is None else "best"
    # Its own training images, whose mean and deviation its weights were trained with.
    places = {"folder": recipe.data.folder, "download": recipe.data.download}
    own = build_data(teaching.data.model_copy(update=places), teaching.seed)
    _tell_other_sizes(run, own.train, data, teaching.data.long_tailed, recipe.data.long_tailed)
    model, weights_hash = load_run_model(run, teaching, own.train, which)
    source = f"{teaching.name}, seed {teaching.seed}, {which} checkpoint"
    return Teacher(model, source, weights_hash, teaching.training.channels_last)


def _tell_other_sizes(
    run: Path,
    taught: LabelledImages,
    data: LabelledImages,
    tail: config.LongTailedSettings | None,
    own_tail: config.LongTailedSettings | None,
) -> None:
    """Say that a teacher has seen another long tail than its student, or none, which is allowed.

    Args:
        run: of the teacher.
        taught: its training images.
        data: those of the student.
        tail: settings of the teacher's long tail.
        own_tail: likewise of the student.
    """
    if tail == own_tail:
        return
    counts, own = (evaluation.class_counts(one.labels, one.num_classes) for one in (taught, data))
    logger.warning(
        "the teacher of %s was trained on %d to %d images of each class, its student on %d to %d",
        run,
        *(int(count) for count in (counts.min(), counts.max(), own.min(), own.max())),
    )

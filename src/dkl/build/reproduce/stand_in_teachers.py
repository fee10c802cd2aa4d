"""A teacher with random weights, whose answers cost what those of the real one do."""

from pathlib import Path

from dkl import config
from dkl.build.objects import build_data, build_model
from dkl.build.runs import RECIPE_FILE, read_recipe
from dkl.build.teachers import teacher_settings
from dkl.models import save_weights

_FILE = "teacher.safetensors"


def with_random_teacher(recipe: config.Recipe, scratch: Path) -> config.Recipe:
    """Name a teacher with random weights, of the network that the recipe's teacher has.

    So a step can be timed before the teacher is trained or fetched. Of a cache the live teacher is
    timed, which costs more.

    Args:
        recipe: resolved.
        scratch: folder that the weights are written into.

    Returns:
        The recipe, with a checkpoint file as teacher; as it was where its method has none.

    Raises:
        ValueError: it names a run that is not there and no recipe.
    """
    settings = teacher_settings(recipe)
    if settings is None:
        return recipe
    network = _network_of(recipe, settings)
    few = recipe.data.model_copy(update={"train_limit": 1000})
    data = build_data(few, recipe.seed).train
    save_weights(build_model(network, data, seed=0).state_dict(), scratch / _FILE)
    values = config.resolved(recipe)
    values["method"]["teacher"] = {
        "checkpoint": str(scratch / _FILE),
        "model": network.model_dump(mode="json"),
    }
    return config.Recipe.model_validate(values)


def _network_of(recipe: config.Recipe, settings: config.TeacherSettings) -> config.ModelSettings:
    if settings.model is not None:
        return settings.model
    if settings.run is not None and (Path(settings.run) / RECIPE_FILE).is_file():
        return read_recipe(Path(settings.run))[1].model
    if settings.recipe is not None:
        return config.load_recipe(settings.recipe).model
    raise ValueError(
        f"the teacher of {recipe.name} is not there: {settings.run} holds no run. Train it, or say "
        "where it is: method.teacher.run=DIR"
    )

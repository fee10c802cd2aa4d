"""Recipes from names, files and overrides, and back to plain values."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dkl.config.base import Problem
from dkl.config.errors import (
    RecipeError,
    merge_problems,
    problems_of,
    sections_with_errors,
    show,
    suggestion,
)
from dkl.config.inheritance import inherit
from dkl.config.overrides import apply_overrides
from dkl.config.recipe import Recipe, section_problems
from dkl.config.recipe_tables import table_recipes
from dkl.config.tuning import Choices
from dkl.config.yaml_text import parse_yaml

_SUFFIXES = (".yaml", ".yml")


def list_recipes() -> list[str]:
    """Name the shipped recipes, sorted.

    Example:
        >>> "digits_ikl_at" in list_recipes()
        True
    """
    folder = resources.files("dkl").joinpath("recipes")
    names = (Path(entry.name) for entry in folder.iterdir())
    # What only serves as the base of others begins with "_".
    files = (n.stem for n in names if n.suffix == ".yaml" and not n.stem.startswith("_"))
    return sorted([*files, *table_recipes()])


def describe_recipes(pattern: str = "*") -> dict[str, str]:
    """Return the descriptions of the shipped recipes, by name, without checking them.

    Args:
        pattern: part of the names that are wanted; or a whole name, in which "*" stands for any
            text.

    Raises:
        RecipeError: no name fits.

    Example:
        >>> list(describe_recipes("cifar100_ikl_kd_vgg13*"))[:1]
        ['cifar100_ikl_kd_vgg13_mobilenet_v2_half']
    """
    wanted = pattern if "*" in pattern else f"*{pattern}*"
    names = [name for name in list_recipes() if fnmatchcase(name, wanted)]
    if not names:
        near = _nearest(pattern.strip("*"))
        raise RecipeError(pattern, [("", f"no shipped recipe has such a name; {near}")])
    tables = table_recipes()
    return {
        name: tables[name].description
        if name in tables
        else str(parse_yaml(recipe_text(name))[0]["description"])
        for name in names
    }


def recipe_text(name: str) -> str:
    """Return the text of a shipped recipe, comments included.

    Raises:
        RecipeError: no such recipe; the message names the nearest one.
    """
    if name in table_recipes():
        return table_recipes()[name].text
    file = resources.files("dkl").joinpath("recipes").joinpath(f"{name}.yaml")
    if not file.is_file():
        message = f"no shipped recipe has this name; {_nearest(name)}"
        hint = " A file of your own must exist and end in .yaml"
        raise RecipeError(name, [("", message + hint)])
    return file.read_text("utf-8")


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    A recipe may name another one as its ``base`` (a shipped name, or a path from its own folder)
    and state only what differs; see ``dkl.config.inheritance``.

    Args:
        name_or_path: name of a shipped recipe, or path of a YAML file.
        overrides: ``key.sub=value`` each, the value in YAML.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: with everything that is wrong, at once.

    Example:
        >>> load_recipe("digits_trades", ["method.attack.eps=8/255"]).method.attack.eps == 8 / 255
        True
    """
    text = _read(name_or_path)
    what = str(name_or_path)
    values, problems = parse_yaml(text)
    if not isinstance(values, dict):
        if not problems:
            problems = [("", f"must hold keys and values, {_what(values)}")]
        raise RecipeError(what, problems)
    folder = Path(name_or_path).parent if _is_path(name_or_path) else None
    values, wrong_bases = inherit(values, lambda name: _read_base(name, folder))
    return _checked(what, values, overrides, [*problems, *wrong_bases])


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """Return a recipe with settings changed by ``key.sub=value`` texts.

    Raises:
        RecipeError: with everything that is wrong, at once.

    Example:
        >>> recipe = load_recipe("digits_natural")
        >>> override(recipe, ["evaluation.num_images=50"]).evaluation.num_images
        50
    """
    return _checked(recipe.name, resolved(recipe), overrides, [])


def _checked(
    what: str, values: dict[str, Any], overrides: Iterable[str], problems: list[Problem]
) -> Recipe:
    values, wrong_overrides = apply_overrides(values, overrides)
    recipe, wrong_values = check_values(values)
    if recipe is not None:
        wrong_values += [*_teacher_problems(recipe), *_tuning_problems(recipe)]
    found = merge_problems(problems, wrong_overrides, wrong_values)
    if recipe is None or found:
        raise RecipeError(what, found)
    return recipe


def check_values(values: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Check plain values; return the recipe (None if they are no recipe) and the problems."""
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        # Checks between sections run only when every section is valid; where some are not, those
        # that need valid sections alone are run here, so that all problems show at once.
        broken = sections_with_errors(error)
        sections: dict[str, Any] = {}
        for name, field in Recipe.model_fields.items():
            if name in broken:
                continue
            if name not in values:
                sections[name] = field.get_default(call_default_factory=True, validated_data={})
                continue
            adapter: TypeAdapter[Any] = TypeAdapter(Recipe.__annotations__[name])
            sections[name] = adapter.validate_python(values[name])
        return None, merge_problems(problems_of(error), section_problems(sections))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return all values of a recipe, defaults included, as plain JSON and YAML types.

    Example:
        >>> recipe = load_recipe("digits_natural")
        >>> Recipe.model_validate(resolved(recipe)) == recipe
        True
    """
    return recipe.model_dump(mode="json")


def to_yaml(recipe: Recipe) -> str:
    """Write a resolved recipe as YAML, which ``load_recipe`` reads back to an equal recipe."""
    return yaml.safe_dump(resolved(recipe), sort_keys=False, width=100)


def _nearest(name: str) -> str:
    found = suggestion(name, list_recipes())
    # There are too many to name them all.
    return found if found.startswith("did you mean") else "`dkl recipes list` shows what there is"


def _what(values: object) -> str:
    return "but is empty" if values is None else f"not {show(values)}"


def _is_path(name_or_path: str | Path) -> bool:
    path = Path(name_or_path)
    return isinstance(name_or_path, Path) or path.suffix in _SUFFIXES or len(path.parts) > 1


def _read_base(name: str, folder: Path | None) -> tuple[Any, list[Problem]]:
    """Read the values of a base; paths are relative to the folder of the recipe that names it."""
    try:
        return parse_yaml(_read((folder or Path()) / name if _is_path(name) else name))
    except RecipeError as error:
        return None, [("", f"{error.what}: {message}") for _, message in error.problems]


def _read(name_or_path: str | Path) -> str:
    if not _is_path(name_or_path):
        return recipe_text(str(name_or_path))
    path = Path(name_or_path)
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        near = _nearest(path.stem)
        raise RecipeError(
            str(path), [("", f"there is no such file; of the shipped recipes: {near}")]
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [("", f"cannot be read: {error}")]) from None


def _teacher_problems(recipe: Recipe) -> list[Problem]:
    teacher = getattr(recipe.method, "teacher", None)
    if teacher is None or teacher.recipe is None or teacher.run is not None:
        return []
    try:
        teaching = load_recipe(teacher.recipe)
    except RecipeError as error:
        return [
            ("method.teacher.recipe", ": ".join(filter(None, (error.what, key, message))))
            for key, message in error.problems
        ]
    if teaching.data.name != recipe.data.name:
        return [
            (
                "method.teacher.recipe",
                f"is trained on {teaching.data.name}, but the student on {recipe.data.name}",
            )
        ]
    return []


def _tuning_problems(recipe: Recipe) -> list[Problem]:
    """Check that each value at the ends of the search gives a valid recipe."""
    if recipe.tuning is None:
        return []
    values = {**resolved(recipe), "tuning": None}
    problems = []
    for key, space in recipe.tuning.space.items():
        candidates = space.choices if isinstance(space, Choices) else space.ends
        for candidate in candidates:
            text = json.dumps(candidate)
            changed, wrong = apply_overrides(values, [f"{key}={text}"])
            found = [*wrong, *check_values(changed)[1]]
            problems += [
                (f"tuning.space.{key}", f"{text} is no value for it: {name}: {message}")
                for name, message in found[:1]
            ]
    return problems

"""From what pydantic found to one message that says what to change."""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dkl.config.base import Problem, Section
from dkl.config.recipe import Recipe
from dkl.config.tuning import Choices, Range

_UNIONS = ("method", "optimizer", "schedule")
_SECTION = "must be a section with keys of its own"
_LIST = "must be a list such as [10, 20]"
_IN_WORDS = {
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dict_type": _SECTION,
    "tuple_type": _LIST,
    "int_type": "must be an integer",
    "float_type": "must be a number such as 0.03 or 8/255",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "finite_number": "must be a finite number",
    "string_pattern_mismatch": 'must be letters, digits, "_", "-" and "." only',
}


class RecipeError(ValueError):
    """All that is wrong with a recipe.

    Args:
        what: the recipe at hand, for the first line.
        problems: pairs of dotted key and message; the key may be empty.

    Example:
        >>> print(RecipeError("mine", [("seed", "is negative"), ("name", "missing")]))
        2 problems in recipe mine:
          seed: is negative
          name: missing
    """

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.what = what
        self.problems = tuple(problems)
        lines = [f"{key}: {message}" if key else message for key, message in self.problems]
        number = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n  ".join([f"{number} in recipe {what}:", *lines]))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Say what was probably meant, or list everything known if nothing is near.

    Example:
        >>> suggestion("epochz", ["epochs", "seed"])
        "did you mean 'epochs'?"
        >>> suggestion("zzz", ["epochs", "seed"])
        'there are: epochs, seed'
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there are: {', '.join(names)}" if names else "none is known here"


def problems_of(error: ValidationError) -> list[Problem]:
    """Translate every finding of pydantic into a dotted key and a message."""
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        location = details["loc"]
        if details["type"] == "combination":
            prefix = _dotted(location)
            for key, message in details["ctx"]["problems"]:
                problems.append((f"{prefix}.{key}" if prefix else key, message))
        else:
            problems.append(_translate(details))
    return list(dict.fromkeys(problems))


def sections_with_errors(error: ValidationError) -> set[str]:
    """Name the top-level sections in which something is wrong."""
    return {str(details["loc"][0]) for details in error.errors() if details["loc"]}


def _translate(details: ErrorDetails) -> Problem:
    location, kind, value = details["loc"], details["type"], details["input"]
    key = _dotted(location)
    if kind == "extra_forbidden":
        return key, _unknown_key(location)
    if kind == "missing":
        return key, "missing; it has no default, so the recipe must say it"
    context = details.get("ctx", {})
    if kind == "union_tag_not_found":
        return f"{key}.kind", f"missing; one of {', '.join(_kinds(str(location[0])))}"
    if kind == "union_tag_invalid":
        tag, kinds = str(context["tag"]), _kinds(str(location[0]))
        near = difflib.get_close_matches(tag, kinds, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{key}.kind = {show(tag)}", f"must be one of {', '.join(kinds)}{hint}"
    message = details["msg"].replace("Input should", "must")
    message = _IN_WORDS.get(kind, message)
    if kind == "literal_error" and isinstance(value, str):
        options = [
            part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")
        ]
        near = difflib.get_close_matches(value, options, n=1)
        message += f"; did you mean '{near[0]}'?" if near else ""
    return f"{key} = {show(value)}", message


def _unknown_key(location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    model = _model_at(location[:-1])
    if model is None:
        return "unknown key"
    message = model.hints.get(name) or f"unknown key; {suggestion(name, model.model_fields)}"
    if len(location) == 3 and location[0] in _UNIONS:
        others = _kinds(str(location[0]))
        having = [kind for kind, other in others.items() if name in other.model_fields]
        if having:
            reason = model.hints.get(name) or f"kind {location[1]} has no such key"
            message = (
                f"{reason} (kinds with it: {', '.join(having)}); to change the kind, replace the "
                f"whole section: '{location[0]}={{kind: ..., ...}}'"
            )
    return message


def _dotted(location: tuple[int | str, ...]) -> str:
    """Join a location to a key, without the kind that pydantic adds to tagged sections."""
    parts = list(location)
    if len(parts) > 1 and parts[0] in _UNIONS:
        del parts[1]
    if len(parts) > 3 and parts[:2] == ["tuning", "space"]:
        del parts[3]
    return ".".join(str(part) for part in parts)


def _kinds(section: str) -> dict[str, type[Section]]:
    models = _models(Recipe.model_fields[section].annotation)
    return {get_args(model.model_fields["kind"].annotation)[0]: model for model in models}


def _models(annotation: Any) -> list[type[Section]]:
    """List the sections that a field may hold."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation] if issubclass(annotation, Section) else []
    return [model for part in get_args(annotation) for model in _models(part)]


def _model_at(location: tuple[int | str, ...]) -> type[Section] | None:
    model: type[Section] = Recipe
    parts = list(location)
    if len(parts) > 1 and parts[0] in _UNIONS:
        model = _kinds(str(parts[0])).get(str(parts[1]), Recipe)
        parts = parts[2:]
    if len(parts) > 3 and parts[:2] == ["tuning", "space"]:
        return Choices if parts[3] == "choices" else Range
    for part in parts:
        field = model.model_fields.get(str(part))
        candidates = [] if field is None else _models(field.annotation)
        if len(candidates) != 1:
            return None
        model = candidates[0]
    return model


def show(value: object) -> str:
    """Write a value as a recipe would, shortened.

    Example:
        >>> show("8/255"), show([1, 2]), show(None)
        ('"8/255"', '[1, 2]', 'null')
    """
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def merge_problems(*groups: Iterable[Problem]) -> list[Problem]:
    """Join problems in order, each once."""
    return list(dict.fromkeys(problem for group in groups for problem in group))

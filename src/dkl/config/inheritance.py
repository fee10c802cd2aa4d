"""Recipes that state only how they differ from another one, by the key ``base``."""

from collections.abc import Callable, Mapping
from typing import Any

from dkl.config.base import Problem

KEY = "base"
_MAX_DEPTH = 8


def inherit(
    values: Mapping[str, Any], read: Callable[[str], tuple[Any, list[Problem]]]
) -> tuple[dict[str, Any], list[Problem]]:
    """Lay a recipe over the one that it names as its base, and that over its own base.

    Sections are merged key by key; everything else is replaced. A section whose ``kind`` is another
    one than the base's replaces the base's as a whole.

    Args:
        values: what the recipe says.
        read: from the name of a base to its values and what is wrong with its text.

    Returns:
        The merged values without the key ``base``, and problems.

    Example:
        >>> bases = {"_b": {"data": {"name": "digits"}, "seed": 3}}
        >>> inherit({"base": "_b", "data": {"folder": None}}, lambda name: (bases[name], []))
        ({'data': {'name': 'digits', 'folder': None}, 'seed': 3}, [])
    """
    layers, problems, names = [dict(values)], list[Problem](), list[str]()
    while KEY in layers[-1]:
        name = layers[-1].pop(KEY)
        if not isinstance(name, str):
            problems.append((KEY, "must be the name of a recipe or the path of a YAML file"))
            break
        if name in names or len(names) == _MAX_DEPTH:
            problems.append((KEY, f"leads in a circle or too deep: {' -> '.join([*names, name])}"))
            break
        names.append(name)
        below, wrong = read(name)
        problems += [(KEY, f"{name}: {key}: {text}" if key else text) for key, text in wrong]
        if not isinstance(below, Mapping):
            break
        layers.append(dict(below))
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged, problems


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay sections over others, key by key; one of another ``kind`` replaces as a whole.

    Example:
        >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _other_kind(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _other_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in old and "kind" in new and old["kind"] != new["kind"]

"""Overrides ``key.sub=value`` laid over the plain values of a recipe."""

import copy
from collections.abc import Iterable
from typing import Any

from dkl.config.base import Problem
from dkl.config.yaml_text import parse_yaml


def apply_overrides(
    values: dict[str, Any], overrides: Iterable[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return a copy of ``values`` with the overrides laid over it, and what went wrong.

    Args:
        values: nested plain values, as YAML gives them.
        overrides: ``key.sub=value``; the value is YAML, and a whole section may be given as
            ``'section={key: value}'``. A key below a null section makes that section.

    Example:
        >>> apply_overrides({"a": {"b": 1}}, ["a.b=[2, 3]", "c.d=8/255"])
        ({'a': {'b': [2, 3]}, 'c': {'d': '8/255'}}, [])
    """
    result = copy.deepcopy(values)
    problems: list[Problem] = []
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        parts = key.split(".")
        if not equals or not all(parts):
            problems.append(("", f"override {override!r} must look like key.sub=value"))
            continue
        if key in seen:
            problems.append((key, "overridden twice; give it once"))
            continue
        seen.add(key)
        value, wrong = parse_yaml(text)
        if wrong:
            problems += [(key, f"{message} (in {text!r})") for _, message in wrong]
            continue
        blocked = _put(result, parts, value)
        if blocked:
            problems.append((key, f"{blocked} is a single value and has no keys"))
    return result, problems


def _put(values: dict[str, Any], parts: list[str], value: object) -> str:
    """Set a nested value in place; return the key in the way, if there is one."""
    section = values
    for depth, part in enumerate(parts[:-1]):
        if section.get(part) is None:
            section[part] = {}
        inner = section[part]
        if not isinstance(inner, dict):
            return ".".join(parts[: depth + 1])
        section = inner
    section[parts[-1]] = value
    return ""

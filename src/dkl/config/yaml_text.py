"""YAML text to plain values: safe, and strict about keys that are given twice."""

from collections.abc import Hashable
from typing import Any

import yaml

from dkl.config.base import Problem


class _StrictLoader(yaml.SafeLoader):
    """Safe loader that notes repeated keys, of which YAML would silently keep the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[Problem] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping after noting the keys that occur twice in it."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                self.repeated.append((key, f"given twice, in lines {seen[key]} and {line}"))
            seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> tuple[Any, list[Problem]]:
    r"""Parse one YAML document.

    Args:
        text: YAML.

    Returns:
        The value (None where the text is no YAML) and what is wrong with the text.

    Example:
        >>> parse_yaml("a: 1\na: 2")
        ({'a': 2}, [('a', 'given twice, in lines 1 and 2')])
    """
    try:
        loader = _StrictLoader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        reason = error.problem or error.context or "cannot be read"
        return None, [("", f"not valid YAML: {place}{reason}")]
    except yaml.YAMLError as error:
        return None, [("", f"not valid YAML: {' '.join(str(error).split())}")]
    return value, loader.repeated

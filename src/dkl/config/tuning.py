"""Section ``tuning``: the ranges that ``dkl tune`` searches."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from dkl.config.base import Number, Problem, Section


class Choices(Section):
    """One of several values, such as ``choices: [1, 2, 4]``."""

    choices: Annotated[tuple[bool | int | float | str | None, ...], Field(strict=False)]

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if len(self.choices) < 2:
            yield "choices", "must hold two values at least; one alone needs no search"


class Range(Section):
    """A number between ``low`` and ``high``, drawn on a logarithmic scale if ``log``."""

    low: Number
    high: Number
    log: bool = False

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.low >= self.high:
            yield "low", f"must be below high ({self.high:g})"
        if self.log and self.low <= 0:
            yield "low", "must be > 0 on a logarithmic scale"

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high


def _shape(value: Any) -> str:
    has_choices = isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value)
    return "choices" if has_choices else "range"


SearchSpace = Annotated[
    Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")], Discriminator(_shape)
]


class TuningSettings(Section):
    """What is searched.

    Args:
        space: dotted key of this recipe -> ``{low, high, log}`` or ``{choices}``.
    """

    space: Annotated[dict[str, SearchSpace], Field(min_length=1)]

"""What every section of a recipe shares: strict, frozen models and numbers such as "8/255"."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

Norm = Literal["Linf", "L2"]
EvaluationNorm = Literal["Linf", "L2", "L1"]

Problem = tuple[str, str]
"""A dotted key and what is wrong with it."""


def parse_number(value: object) -> object:
    """Turn text such as "8/255" or "2e-4" into a float; other values pass through unchanged.

    YAML reads ``2e-4`` (no dot) and ``8/255`` as text, so numbers arrive as text quite often.

    Example:
        >>> parse_number("8/255") == 8 / 255, parse_number("2e-4"), parse_number(3)
        (True, 0.0002, 3)
    """
    if not isinstance(value, str):
        return value
    numerator, slash, denominator = value.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise PydanticCustomError("number", "must be a number such as 0.03 or 8/255") from None


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: frozen, typed strictly, and unknown keys are errors.

    A subclass lists combinations that make no sense in ``problems``, and in ``hints`` keys that
    people expect here although they belong elsewhere.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), validate_default=True
    )
    hints: ClassVar[Mapping[str, str]] = {}

    def problems(self) -> Iterator[Problem]:
        """Yield (key inside this section, message) for each impossible combination."""
        return iter(())

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> Self:
        found = list(self.problems())
        if found:
            raise combination_error(found)
        return self


def combination_error(problems: list[Problem]) -> PydanticCustomError:
    """Pack several problems into the one error that a validator may raise."""
    text = "; ".join(f"{key}: {message}" for key, message in problems)
    context: dict[str, Any] = {"problems": problems, "text": text}
    return PydanticCustomError("combination", "{text}", context)


def epsilon_problems(key: str, norm: EvaluationNorm, eps: float) -> Iterator[Problem]:
    """Yield a problem if ``eps`` covers more than the whole range of pixels in [0, 1].

    Example:
        >>> list(epsilon_problems("eps", "Linf", 0.03)), list(epsilon_problems("eps", "L2", 8))
        ([], [])
    """
    if norm == "Linf" and eps > 1:
        yield key, f"pixels lie in [0, 1], so a Linf eps is at most 1; did you mean {eps:g}/255?"

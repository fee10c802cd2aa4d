"""Section ``evaluation``: what is measured on the test data, and the attack of validation."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dkl.config.base import (
    Count,
    CountOrZero,
    NonNegativeNumber,
    Norm,
    PositiveNumber,
    Problem,
    Section,
    epsilon_problems,
)

Counts = Annotated[tuple[Count, ...], Field(strict=False)]
Epsilons = Annotated[tuple[NonNegativeNumber, ...], Field(strict=False)]


class EvaluationSettings(Section):
    """What is measured.

    Args:
        clean: accuracy on clean images.
        pgd_steps: one PGD (cross-entropy) row for each number of steps.
        cw_steps: one CW (margin loss) row for each number of steps.
        auto_attack: which AutoAttack; null means none. "fast" is APGD-CE and APGD-T only.
        norm: the norm that bounds all these attacks.
        eps: their bound, for pixels in [0, 1]; "8/255" is understood.
        step_size: of PGD and CW, in the units of ``eps``.
        num_images: attack this many test images only; null means all.
        sweep: further epsilons for the robustness curve: PGD with the most of ``pgd_steps`` and
            ``step_size`` scaled by epsilon / eps.
        batch_size: images attacked at a time.
        validation_attack_steps: PGD steps of the robust validation accuracy; 0 means none.
        validation_attack: what that attack maximises: "margin" (CW) or "ce" (PGD). The margin is
            the default because it tracks AutoAttack more closely.
    """

    clean: bool = True
    pgd_steps: Counts = ()
    cw_steps: Counts = ()
    auto_attack: Literal["standard", "fast"] | None = None
    norm: Norm = "Linf"
    eps: PositiveNumber | None = None
    step_size: PositiveNumber | None = None
    num_images: Count | None = None
    sweep: Epsilons = ()
    batch_size: Count = 256
    validation_attack_steps: CountOrZero = 0
    validation_attack: Literal["margin", "ce"] = "margin"

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        steps = {
            "pgd_steps": bool(self.pgd_steps),
            "cw_steps": bool(self.cw_steps),
            "sweep": bool(self.sweep),
            "validation_attack_steps": self.validation_attack_steps > 0,
        }
        stepping = [key for key, used in steps.items() if used]
        attacking = stepping + ["auto_attack"] * (self.auto_attack is not None)
        if attacking and self.eps is None:
            yield "eps", f"needed by {', '.join(attacking)}"
        if stepping and self.step_size is None:
            yield "step_size", f"needed by {', '.join(stepping)}"
        if self.sweep and not self.pgd_steps:
            yield "sweep", "uses the most of evaluation.pgd_steps, which is empty"
        if self.eps is not None:
            yield from epsilon_problems("eps", self.norm, self.eps)
        for epsilon in self.sweep:
            yield from epsilon_problems("sweep", self.norm, epsilon)

"""Section ``evaluation``: what is measured on the test data, and the attack of validation."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dkl.config.base import (
    Count,
    CountOrZero,
    EvaluationNorm,
    NonNegativeNumber,
    PositiveNumber,
    Problem,
    Section,
    epsilon_problems,
)

Counts = Annotated[tuple[Count, ...], Field(strict=False)]
Epsilons = Annotated[tuple[NonNegativeNumber, ...], Field(strict=False)]


SHOT_THRESHOLDS = (20, 100)  # as published for ImageNet-LT
SweepAttack = Literal["pgd", "cw", "auto_attack_fast", "auto_attack"]


class EvaluationSettings(Section):
    """What is measured.

    Args:
        clean: accuracy on clean images, of all and class by class, and the margins of classes.
        pgd_steps: one PGD (cross-entropy) row for each number of steps.
        cw_steps: one CW (margin loss) row for each number of steps.
        auto_attack: which AutoAttack; null means none. "fast" is APGD-CE and APGD-T only.
        square: Square alone, which sees logits only: a check of the attacks by gradients.
        norm: the norm that bounds all these attacks; L1 for AutoAttack and Square alone.
        eps: their bound, for pixels in [0, 1]; "8/255" is understood.
        step_size: of PGD and CW, in the units of ``eps``.
        num_images: attack this many test images only; null means all.
        sweep: further epsilons for the robustness curve.
        sweep_attack: what attacks there: "pgd" with the most of ``pgd_steps`` or "cw" with the most
            of ``cw_steps``, ``step_size`` scaled by epsilon / eps; or an AutoAttack.
        masking_checks: look for the signs of masked gradients.
        features: keep the features of this many test images of each class, at most 20 classes,
            clean and under PGD with the most of ``pgd_steps``; 0 means none.
        calibration: calibration error, reliability and likelihood on clean images.
        fidelity: how closely the student follows its teacher on clean images.
        shot_thresholds: for long-tailed data; with ``clean``, the accuracy on classes with fewer
            training images than the first ("few"), more than the second ("many"), and others.
        batch_size: images attacked at a time.
        validation_attack_steps: PGD steps of the robust validation accuracy; 0 means none.
        validation_attack: what that attack maximises: "margin" (CW) or "ce" (PGD). The margin is
            the default because it tracks AutoAttack more closely.
    """

    clean: bool = True
    pgd_steps: Counts = ()
    cw_steps: Counts = ()
    auto_attack: Literal["standard", "fast"] | None = None
    square: bool = False
    norm: EvaluationNorm = "Linf"
    eps: PositiveNumber | None = None
    step_size: PositiveNumber | None = None
    num_images: Count | None = None
    sweep: Epsilons = ()
    sweep_attack: SweepAttack = "pgd"
    masking_checks: bool = False
    features: CountOrZero = 0
    calibration: bool = False
    fidelity: bool = False
    shot_thresholds: Annotated[tuple[Count, Count], Field(strict=False)] = SHOT_THRESHOLDS
    batch_size: Count = 256
    validation_attack_steps: CountOrZero = 0
    validation_attack: Literal["margin", "ce"] = "margin"

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        stepping = self._used(
            pgd_steps=bool(self.pgd_steps),
            cw_steps=bool(self.cw_steps),
            sweep=bool(self.sweep) and self.sweep_attack in ("pgd", "cw"),
            features=self.features > 0,
            validation_attack_steps=self.validation_attack_steps > 0,
        )
        by_gradient = stepping + self._used(masking_checks=self.masking_checks)
        attacking = by_gradient + self._used(
            sweep=bool(self.sweep) and "sweep" not in stepping,
            auto_attack=self.auto_attack is not None,
            square=self.square,
        )
        if attacking and self.eps is None:
            yield "eps", f"needed by {', '.join(attacking)}"
        if stepping and self.step_size is None:
            yield "step_size", f"needed by {', '.join(stepping)}"
        if by_gradient and self.norm == "L1":
            names = ", ".join(by_gradient)
            yield "norm", f"L1 is for auto_attack and square; Linf or L2 is needed by {names}"
        yield from self._missing_steps()
        few, many = self.shot_thresholds
        if few > many:
            yield (
                "shot_thresholds",
                f"must ascend: few below the first, many above the second; got {few}, {many}",
            )
        if self.eps is not None:
            yield from epsilon_problems("eps", self.norm, self.eps)
        for epsilon in self.sweep:
            yield from epsilon_problems("sweep", self.norm, epsilon)

    def _missing_steps(self) -> Iterator[Problem]:
        """Yield what takes its number of steps from a list that is empty."""
        if self.sweep and self.sweep_attack == "pgd" and not self.pgd_steps:
            yield "sweep", "uses the most of evaluation.pgd_steps, which is empty"
        if self.sweep and self.sweep_attack == "cw" and not self.cw_steps:
            yield "sweep_attack", "cw uses the most of evaluation.cw_steps, which is empty"
        if self.features and not self.pgd_steps:
            yield "features", "uses the most of evaluation.pgd_steps, which is empty"

    @staticmethod
    def _used(**names: bool) -> list[str]:
        return [name for name, used in names.items() if used]

"""Section ``method``: what is trained, one model per ``kind``."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dkl.config.adversarial import (
    DAJAT,
    GKLAT,
    IKLAT,
    LASAT,
    LBGAT,
    MART,
    PGDAT,
    TRADES,
    LabelSmoothing,
)
from dkl.config.base import CountOrZero, NonNegativeNumber, PositiveNumber, Problem, Section
from dkl.config.data import ModelSettings


class TeacherSettings(Section):
    """Where the teacher comes from: a recipe, a run, or a checkpoint file.

    Args:
        recipe: shipped name or YAML path; trained first, with the student's seed, in the
            ``teacher`` folder of the run. Not trained when ``run`` is given too.
        run: folder of a finished run.
        checkpoint: file of weights; ``model`` says what network they belong to.
        model: network of ``checkpoint``.
    """

    recipe: str | None = None
    run: str | None = None
    checkpoint: str | None = None
    model: ModelSettings | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.recipe is None and self.run is None and self.checkpoint is None:
            yield "recipe", "give the teacher as one of recipe, run or checkpoint"
        if self.checkpoint is not None:
            for key in ("recipe", "run"):
                if getattr(self, key) is not None:
                    yield key, "would be ignored: checkpoint is given; set one of them to null"
            if self.model is None:
                yield "model", "needed with checkpoint, to know what network the weights belong to"
        elif self.model is not None:
            yield "model", "would be ignored: only a checkpoint file needs it"


class Natural(Section):
    """Cross-entropy on clean images."""

    kind: Literal["natural"]
    label_smoothing: LabelSmoothing = 0.0


class KD(Section):
    """ce_weight CE(z, y) + kd_weight T^2 KL(teacher || student) at temperature T.

    Args:
        teacher: where the teacher comes from.
        temperature: T, divides both logits.
        ce_weight: weight of the hard-label cross-entropy.
        kd_weight: weight of the distillation term.
    """

    kind: Literal["kd"]
    teacher: TeacherSettings
    temperature: PositiveNumber = 4.0
    ce_weight: NonNegativeNumber = 0.1
    kd_weight: NonNegativeNumber = 0.9
    hints: ClassVar = {"hard_weight": "is called ce_weight for kind kd"}

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.kd_weight == 0:
            yield "kd_weight", "0 never looks at the teacher; use kind: natural"


class _DecoupledKD(Section):
    """What IKL-KD and GKL-KD share.

    Args:
        teacher: where the teacher comes from.
        mse_weight: weight of the weighted mean squared error on logits (paper's a).
        ce_weight: weight of the soft cross-entropy (paper's b).
        hard_weight: weight of the hard-label cross-entropy.
        temperature: divides both logits in the soft cross-entropy (without a factor T^2).
        weight_temperature: temperature of the softmax that the weights are made from.
        class_weights: weights are the teacher's class means of the last epoch (GI).
        warmup_epochs: the distillation terms grow linearly over these first epochs; 0 means none.
    """

    teacher: TeacherSettings
    mse_weight: NonNegativeNumber = 1.0
    ce_weight: NonNegativeNumber = 1.0
    hard_weight: NonNegativeNumber = 1.0
    temperature: PositiveNumber = 4.0
    weight_temperature: PositiveNumber = 1.0
    class_weights: bool = True
    warmup_epochs: CountOrZero = 0

    def problems(self) -> Iterator[Problem]:
        if self.mse_weight == 0 and self.ce_weight == 0:
            yield "mse_weight", "0 beside ce_weight 0 never looks at the teacher; use kind: natural"


class IKLKD(_DecoupledKD):
    """hard_weight CE(z, y) + IKL(student, teacher); arguments as in ``_DecoupledKD``."""

    kind: Literal["ikl_kd"]
    hints: ClassVar = {"gamma": "is the exponent of GKL's weights; use method.kind gkl_kd"}


class GKLKD(_DecoupledKD):
    """hard_weight CE(z, y) + GKL(student, teacher); ``gamma`` is the exponent of the weights."""

    kind: Literal["gkl_kd"]
    gamma: NonNegativeNumber = 1.0


MethodSettings = Annotated[
    Natural | PGDAT | TRADES | MART | LBGAT | LASAT | DAJAT | IKLAT | GKLAT | KD | IKLKD | GKLKD,
    Field(discriminator="kind"),
]

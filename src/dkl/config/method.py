"""Section ``method``: what is trained, one model per ``kind``."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from dkl.config.base import (
    Count,
    CountOrZero,
    NonNegativeNumber,
    Norm,
    Number,
    PositiveNumber,
    Problem,
    Section,
    epsilon_problems,
)
from dkl.config.data import ModelSettings


def _check_ramp(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or value == "all" or is_count:
        return value
    raise PydanticCustomError("ramp", 'must be a number of epochs >= 1, "all" or null')


Ramp = Annotated[int | Literal["all"] | None, BeforeValidator(_check_ramp)]
LabelSmoothing = Annotated[Number, Field(ge=0, lt=1)]


class AttackSettings(Section):
    """The attack that training images go through.

    Args:
        norm: the norm that bounds the perturbation.
        eps: its bound, for pixels in [0, 1]; "8/255" is understood.
        num_steps: ascent steps; null when ``budget`` decides.
        step_size: length of a step, in the units of ``eps``; null when ``budget`` decides.
        random_start: "uniform" in the ball, "gaussian" of deviation 0.001, or "none".
        batch_norm: batch-norm mode while attacking: running statistics ("eval"), statistics of the
            batch ("batch-stats"), or those with the running ones updated as well ("train").
        epsilon_ramp_epochs: eps grows linearly over this many first epochs, or over "all".
        budget: published step schedules, relative to the eps of the epoch: "low" 2 steps of eps,
            "high" 5 steps of eps/2, "high_intended" 2, 3, 4, 5 steps in the quarters of training.
    """

    norm: Norm = "Linf"
    eps: NonNegativeNumber
    num_steps: Count | None = None
    step_size: PositiveNumber | None = None
    random_start: Literal["none", "uniform", "gaussian"] = "gaussian"
    batch_norm: Literal["eval", "train", "batch-stats"] = "eval"
    epsilon_ramp_epochs: Ramp = None
    budget: Literal["low", "high", "high_intended"] | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        yield from epsilon_problems("eps", self.norm, self.eps)
        for key in ("num_steps", "step_size"):
            given = getattr(self, key) is not None
            if given and self.budget is not None:
                yield key, f'budget "{self.budget}" decides it; set one of the two to null'
            if not given and self.budget is None:
                yield key, 'needed when there is no budget (or set budget: "low" or "high")'


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


class PGDAT(Section):
    """Adversarial training on cross-entropy: CE(z(x'), y)."""

    kind: Literal["pgd_at"]
    attack: AttackSettings
    label_smoothing: LabelSmoothing = 0.0


class TRADES(Section):
    """CE(z(x), y) + beta KL(p(x) || p(x'))."""

    kind: Literal["trades"]
    attack: AttackSettings
    beta: NonNegativeNumber = 6.0


class _DecoupledAT(Section):
    """What IKL-AT and GKL-AT share.

    Args:
        attack: the attack of training images.
        mse_weight: weight of the weighted mean squared error on logits (paper's a).
        ce_weight: weight of the soft cross-entropy (paper's b).
        weight_temperature: temperature of the softmax that the weights are made from.
        class_weights: weights are class means of the last epoch (GI), not the sample's own.
        break_asymmetry: the squared error moves both predictions (BA), not the clean one alone.
        inner: what the attack maximises: the loss itself with both weights 1, or KL.
    """

    attack: AttackSettings
    mse_weight: NonNegativeNumber = 20.0
    ce_weight: NonNegativeNumber = 4.0
    weight_temperature: PositiveNumber = 4.0
    class_weights: bool = True
    break_asymmetry: bool = True
    inner: Literal["loss", "kl"] = "loss"

    def problems(self) -> Iterator[Problem]:
        if self.mse_weight == 0 and self.ce_weight == 0:
            yield "mse_weight", "0 beside ce_weight 0 leaves no robust loss; use kind: natural"


class IKLAT(_DecoupledAT):
    """CE(z(x), y) + IKL(z(x'), z(x)); arguments as in ``_DecoupledAT``."""

    kind: Literal["ikl_at"]
    hints: ClassVar = {"gamma": "is the exponent of GKL's weights; use method.kind gkl_at"}


class GKLAT(_DecoupledAT):
    """CE(z(x), y) + GKL(z(x'), z(x)); ``gamma`` is the exponent of the weights."""

    kind: Literal["gkl_at"]
    gamma: NonNegativeNumber = 1.0


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
    Natural | PGDAT | TRADES | IKLAT | GKLAT | KD | IKLKD | GKLKD, Field(discriminator="kind")
]

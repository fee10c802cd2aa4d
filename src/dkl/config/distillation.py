"""Section ``method`` of distillation: a teacher, and what of it the student learns from."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dkl.config.base import (
    Count,
    CountOrZero,
    NonNegativeNumber,
    Number,
    PositiveNumber,
    Problem,
    Section,
)
from dkl.config.data import ModelSettings

HardLoss = Literal["ce", "bce"]
ModuleNames = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class TeacherSettings(Section):
    """Where the teacher comes from: a recipe, a run, or a checkpoint file.

    Args:
        recipe: shipped name or YAML path; trained first, with the student's seed, in the
            ``teacher`` folder of the run. Not trained when ``run`` is given too.
        run: folder of a finished run.
        checkpoint: file of weights; ``model`` says what network they belong to.
        model: network of ``checkpoint``.
        cache: folder of ``dkl cache-teacher``; its log-probabilities take the teacher's place, for
            methods on logits. No teacher is trained or loaded then: ``recipe``, ``run`` or
            ``checkpoint`` say which one the cache must be of.
    """

    recipe: str | None = None
    run: str | None = None
    checkpoint: str | None = None
    model: ModelSettings | None = None
    cache: str | None = None

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


class _Distillation(Section):
    """What methods of distillation share.

    Args:
        teacher: where the teacher comes from.
        hard_loss: the loss against the labels: "ce", cross-entropy; or "bce", the mean over classes
            of binary cross-entropies.
        warmup_epochs: the terms of the teacher grow linearly over these first epochs; 0: none.
    """

    teacher: TeacherSettings
    hard_loss: HardLoss = "ce"
    warmup_epochs: CountOrZero = 0

    # The weights of the terms that look at the teacher.
    teacher_weights: ClassVar[tuple[str, ...]] = ("weight",)

    def problems(self) -> Iterator[Problem]:
        if not any(getattr(self, name) for name in self.teacher_weights):
            words = " beside ".join(f"{name} 0" for name in self.teacher_weights)
            first, _, rest = words.partition(" ")
            yield first, f"{rest} never looks at the teacher; use kind: natural"


class KD(_Distillation):
    """ce_weight L(z, y) + kd_weight T^2 KL(teacher || student) at temperature T.

    Args:
        temperature: T, divides both logits.
        ce_weight: weight of the loss against the labels.
        kd_weight: weight of the distillation term.
    """

    kind: Literal["kd"]
    temperature: PositiveNumber = 4.0
    ce_weight: NonNegativeNumber = 0.1
    kd_weight: NonNegativeNumber = 0.9
    teacher_weights: ClassVar = ("kd_weight",)
    hints: ClassVar = {"hard_weight": "is called ce_weight for kind kd"}


class _HardWeighted(_Distillation):
    """Distillation with ``hard_weight`` times the loss against the labels."""

    hard_weight: NonNegativeNumber = 1.0


class JSDKD(_HardWeighted):
    """hard_weight L(z, y) + weight T^2 JSD(teacher, student) at temperature T.

    Args:
        temperature: T, divides both logits.
        weight: of the term of the teacher.
    """

    kind: Literal["jsd_kd"]
    temperature: PositiveNumber = 1.0
    weight: NonNegativeNumber = 1.0


class DKD(_HardWeighted):
    """hard_weight L(z, y) + T^2 DKD(student, teacher); see ``dkl.losses.dkd_loss``.

    Args:
        temperature: T, divides both logits.
        alpha: weight of the label against the rest.
        beta: weight of the other classes among themselves.
    """

    kind: Literal["dkd"]
    temperature: PositiveNumber = 4.0
    alpha: NonNegativeNumber = 1.0
    beta: NonNegativeNumber = 8.0
    teacher_weights: ClassVar = ("alpha", "beta")


class DIST(_HardWeighted):
    """hard_weight L(z, y) + weight T^2 DIST(student, teacher); see ``dkl.losses.dist_loss``.

    Args:
        temperature: T, divides both logits.
        weight: of the term of the teacher.
        beta: weight of the correlation between classes.
        gamma: weight of the correlation between samples.
    """

    kind: Literal["dist"]
    temperature: PositiveNumber = 4.0
    weight: NonNegativeNumber = 2.0
    beta: NonNegativeNumber = 1.0
    gamma: NonNegativeNumber = 1.0

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        yield from super().problems()
        if self.beta == 0 and self.gamma == 0:
            yield "beta", "0 beside gamma 0 never looks at the teacher; use kind: natural"


class _DecoupledKD(_HardWeighted):
    """What IKL-KD and GKL-KD share.

    Args:
        mse_weight: weight of the weighted mean squared error on logits (paper's a).
        ce_weight: weight of the soft cross-entropy (paper's b).
        temperature: divides both logits in the soft cross-entropy (without a factor T^2).
        weight_temperature: temperature of the softmax that the weights are made from.
        class_weights: weights are the teacher's class means of the last epoch (GI).
    """

    mse_weight: NonNegativeNumber = 1.0
    ce_weight: NonNegativeNumber = 1.0
    temperature: PositiveNumber = 4.0
    weight_temperature: PositiveNumber = 1.0
    class_weights: bool = True
    teacher_weights: ClassVar = ("mse_weight", "ce_weight")


class IKLKD(_DecoupledKD):
    """hard_weight L(z, y) + IKL(student, teacher); arguments as in ``_DecoupledKD``."""

    kind: Literal["ikl_kd"]
    hints: ClassVar = {"gamma": "is the exponent of GKL's weights; use method.kind gkl_kd"}


class GKLKD(_DecoupledKD):
    """hard_weight L(z, y) + GKL(student, teacher); ``gamma`` is the exponent of the weights."""

    kind: Literal["gkl_kd"]
    gamma: NonNegativeNumber = 1.0


class _FeatureDistillation(_HardWeighted):
    """What methods share that compare features.

    Args:
        student_taps: names of the student's modules whose outputs are its feature maps; null: where
            the network says that they are.
        teacher_taps: likewise of the teacher.
    """

    student_taps: ModuleNames | None = None
    teacher_taps: ModuleNames | None = None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.teacher.cache is not None:
            yield (
                "teacher.cache",
                "must be null for methods on features, which are not cached: the cache holds "
                "log-probabilities",
            )


class AT(_FeatureDistillation):
    """Attention transfer on all stages after the stem.

    Args:
        weight: of the term of the teacher.
    """

    kind: Literal["at"]
    weight: NonNegativeNumber = 1000.0


class FitNet(_FeatureDistillation):
    """Hints: the squared error of one map, after a trained regressor.

    Args:
        weight: of the term of the teacher.
        stage: which map; 0 is the stem's.
    """

    kind: Literal["fitnet"]
    weight: NonNegativeNumber = 100.0
    stage: CountOrZero = 2


class RKD(_FeatureDistillation):
    """Relations between the pooled features of samples.

    Args:
        distance_weight: weight of the distances.
        angle_weight: weight of the angles.
        chunk_size: anchors whose angles are in memory at a time; null: by their size.
    """

    kind: Literal["rkd"]
    distance_weight: NonNegativeNumber = 25.0
    angle_weight: NonNegativeNumber = 50.0
    chunk_size: Count | None = None
    teacher_weights: ClassVar = ("distance_weight", "angle_weight")


class CRD(_FeatureDistillation):
    """Contrast of pooled features with those of other classes, from memory banks.

    Args:
        weight: of the term of the teacher.
        num_features: size of both embeddings.
        num_negatives: drawn for each sample from the other classes, with replacement.
        temperature: divides inner products.
        momentum: share that a bank's old row keeps, in [0, 1).
    """

    kind: Literal["crd"]
    weight: NonNegativeNumber = 0.8
    num_features: Count = 128
    num_negatives: Count = 16384
    temperature: PositiveNumber = 0.07
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.5


class OFD(_FeatureDistillation):
    """Partial distances of the maps before their activation, after trained connectors.

    Args:
        weight: of the term of the teacher.
        teacher_mode: "batch-stats", with which the published code normalises the teacher's maps; or
            "eval", its running statistics as everywhere else.
    """

    kind: Literal["ofd"]
    weight: NonNegativeNumber = 1e-3
    teacher_mode: Literal["batch-stats", "eval"] = "batch-stats"


class ReviewKD(_FeatureDistillation):
    """Maps fused from deep to shallow against those of the teacher.

    Args:
        weight: of the term of the teacher.
        max_channels: bound of the channels in between.
        pre_activations: fuse the student's maps before their activation.
    """

    kind: Literal["reviewkd"]
    weight: NonNegativeNumber = 1.0
    max_channels: Count = 512
    pre_activations: bool = False


FEATURE_METHODS = (AT, FitNet, RKD, CRD, OFD, ReviewKD)
LOGIT_METHODS = (KD, JSDKD, DKD, DIST, IKLKD, GKLKD)

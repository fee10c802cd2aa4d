"""Distillation on features: attention transfer, FitNet and RKD as settings of one method.

Shapes: B samples, C channels, H x W positions.
"""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from dkl.losses import (
    attention_transfer_loss,
    hint_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)
from dkl.losses.rows import check_number
from dkl.methods.features import Comparison, FeaturePair, Features, MapShape
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import (
    FrozenTeacher,
    HardLoss,
    TrainingMethod,
    hard_loss_of,
    step_output,
    warmup_factor,
)

TeacherMode = Literal["eval", "batch-stats"]


class FeatureDistillation(TrainingMethod):
    """Train a student on labels and on a fixed teacher's features of the same images.

    The layers of ``comparison`` are submodules: the loop's optimiser trains them together with the
    student, and checkpoints hold them. The student alone is the result.

    Args:
        teacher: a trained model; it gets no gradients.
        pair: how features are read, and their sizes.
        comparison: the loss between features, with its layers.
        weight: weight of that loss.
        hard_weight: weight of the loss against the labels.
        hard_loss: that loss, "ce" or "bce"; see ``hard_loss_of``.
        warmup_epochs: the loss between features grows linearly over these epochs; 0: none.
        teacher_mode: "eval"; or "batch-stats", where batch-norm layers of the teacher normalise by
            the statistics of the micro-batch (and remember none), so that samples are coupled.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(
        self,
        teacher: nn.Module,
        pair: FeaturePair,
        comparison: Comparison,
        *,
        weight: float = 1.0,
        hard_weight: float = 1.0,
        hard_loss: HardLoss = "ce",
        warmup_epochs: int = 0,
        teacher_mode: TeacherMode = "eval",
    ) -> None:
        super().__init__()
        check_number("weight", weight)
        check_number("hard_weight", hard_weight)
        self.teacher = FrozenTeacher(teacher)
        self.pair = pair
        self.comparison = comparison
        self.weight = weight
        self.hard_weight = hard_weight
        self.hard_loss = hard_loss
        self.warmup_epochs = warmup_epochs
        self.teacher_mode = teacher_mode

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of a sample depends on its micro-batch.

        Layers of the method's own with batch-norm take the statistics of the micro-batch.
        """
        normalizes = any(isinstance(layer, nn.BatchNorm2d) for layer in self.comparison.modules())
        return normalizes or self.comparison.couples_samples or self.teacher_mode == "batch-stats"

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:  # noqa: ARG002
        """Ask the teacher for its features."""
        read = self.pair.read_teacher
        features = self.teacher.read(batch.images, read, self.teacher_mode)
        targets = self.comparison.of_teacher(features)
        named = {f"teacher_feature_{place}": value for place, value in enumerate(targets)}
        return replace(batch, extras={**batch.extras, **named})

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the loss against the labels and that between features."""
        features: Features = self.pair.read_student(model, batch.images)
        inputs = self.comparison.of_student(features)
        targets = [batch.extras[f"teacher_feature_{place}"] for place in range(len(inputs))]
        distance = self.comparison(inputs, targets, batch.mask, context.num_items)
        factor = self.weight * warmup_factor(context, self.warmup_epochs)
        hard = hard_loss_of(features.logits, batch, context, self.hard_loss)
        terms = {f"hard_{self.hard_loss}": self.hard_weight * hard, "feature": factor * distance}
        return step_output(terms, features.logits, batch, context)


class Attention(Comparison):
    """Attention maps of all stages after the stem."""

    def of_student(self, features: Features) -> list[Tensor]:
        """Return the maps after the stem."""
        return list(features.maps[1:])

    of_teacher = of_student

    def forward(
        self, inputs: list[Tensor], targets: list[Tensor], mask: Tensor, num_items: Tensor
    ) -> Tensor:
        """Return the loss of attention transfer."""
        return attention_transfer_loss(inputs, targets, mask=mask, num_items=num_items)


class Hint(Comparison):
    """One map of the student, regressed to that of the teacher.

    Args:
        stage: which map; 0 is the stem's.
        student: (C, H, W) of the student's map.
        teacher: (C, H, W) of the teacher's.

    Raises:
        ValueError: no layer leads from one size to the other.
    """

    def __init__(self, stage: int, student: MapShape, teacher: MapShape) -> None:
        super().__init__()
        self.stage = stage
        self.regressor = nn.Sequential(
            _resizing(student, teacher), nn.BatchNorm2d(teacher[0]), nn.ReLU()
        )

    def of_student(self, features: Features) -> list[Tensor]:
        """Return the map."""
        return [features.maps[self.stage]]

    of_teacher = of_student

    def forward(
        self, inputs: list[Tensor], targets: list[Tensor], mask: Tensor, num_items: Tensor
    ) -> Tensor:
        """Return the squared error of the regressed map."""
        return hint_loss(self.regressor(inputs[0]), targets[0], mask=mask, num_items=num_items)


def _resizing(student: MapShape, teacher: MapShape) -> nn.Module:
    """Return the layer of FitNet between two sizes of maps."""
    (channels, *size), (wanted, *goal) = student, teacher
    if size == [2 * side for side in goal]:
        return nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
    if [2 * side for side in size] == goal:
        return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
    if all(have >= want for have, want in zip(size, goal, strict=True)):
        kernel = (size[0] - goal[0] + 1, size[1] - goal[1] + 1)
        return nn.Conv2d(channels, wanted, kernel)
    raise ValueError(
        f"no layer leads from the student's map {list(student)} to the teacher's {list(teacher)}: "
        "it must be as large or larger, or half as large; choose another stage or other taps"
    )


class Relations(Comparison):
    """Distances and angles between the pooled features of the samples of a micro-batch.

    Args:
        distance_weight: weight >= 0 of the distances.
        angle_weight: weight >= 0 of the angles.
        chunk_size: anchors of a chunk of angles; None: by their size.
    """

    couples_samples = True

    def __init__(
        self, distance_weight: float, angle_weight: float, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        check_number("distance_weight", distance_weight)
        check_number("angle_weight", angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.chunk_size = chunk_size

    def of_student(self, features: Features) -> list[Tensor]:
        """Return the pooled features."""
        return [features.pooled]

    of_teacher = of_student

    def forward(
        self, inputs: list[Tensor], targets: list[Tensor], mask: Tensor, num_items: Tensor
    ) -> Tensor:
        """Return the weighted losses of distances and angles; a weight of 0 computes nothing."""
        total = inputs[0].new_zeros(())
        if self.distance_weight > 0:
            distance = rkd_distance_loss(inputs[0], targets[0], mask=mask, num_items=num_items)
            total = total + self.distance_weight * distance
        if self.angle_weight > 0:
            angle = rkd_angle_loss(
                inputs[0], targets[0], chunk_size=self.chunk_size, mask=mask, num_items=num_items
            )
            total = total + self.angle_weight * angle
        return total


def attention_transfer(
    teacher: nn.Module, pair: FeaturePair, *, weight: float = 1000.0, **options: Any
) -> FeatureDistillation:
    """Build attention transfer: hard loss + weight AT (Zagoruyko and Komodakis, ICLR 2017).

    Args:
        teacher: a trained model.
        pair: how features are read; both networks have equally many stages after the stem.
        weight: of the loss of attention maps; published in the distillation tables: 1000.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``FeatureDistillation``.

    Returns:
        The method, without parameters of its own.

    Raises:
        ValueError: stages that do not correspond.
    """
    pair.stages()
    return FeatureDistillation(teacher, pair, Attention(), weight=weight, **options)


def fitnet(
    teacher: nn.Module,
    pair: FeaturePair,
    *,
    weight: float = 100.0,
    stage: int = 2,
    **options: Any,
) -> FeatureDistillation:
    """Build FitNet: hard loss + weight MSE(regressor(student), teacher) (Romero et al., ICLR 2015).

    The regressor (convolution, batch-norm, ReLU) is trained with the student from the start, as in
    the distillation tables, where the original has two phases.

    Args:
        teacher: a trained model.
        pair: how features are read.
        weight: of the squared error; published in the distillation tables: 100.
        stage: which map; 0 is the stem's.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``FeatureDistillation``.

    Returns:
        The method; its regressor is trained along.

    Raises:
        ValueError: there is no such map, or no layer leads from one size to the other.
    """
    for name, shapes in (("student", pair.student), ("teacher", pair.teacher)):
        if not 0 <= stage < len(shapes.maps):
            raise ValueError(
                f"stage {stage} needs a map that the {name} does not have: it has "
                f"{len(shapes.maps)}, numbered from 0; choose another stage or other taps"
            )
    hint = Hint(stage, pair.student.maps[stage], pair.teacher.maps[stage])
    return FeatureDistillation(teacher, pair, hint, weight=weight, **options)


def rkd(
    teacher: nn.Module,
    pair: FeaturePair,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    chunk_size: int | None = None,
    **options: Any,
) -> FeatureDistillation:
    """Build relational distillation: hard loss + distances + angles (Park et al., CVPR 2019).

    It compares the samples of a micro-batch with each other, so splitting a batch changes it.

    Args:
        teacher: a trained model.
        pair: how features are read.
        distance_weight: weight >= 0 of the distances; published: 25.
        angle_weight: weight >= 0 of the angles; published: 50.
        chunk_size: anchors of a chunk of angles, which take memory of B^2 each; None: by size.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``FeatureDistillation``.

    Returns:
        The method, without parameters of its own.

    Raises:
        ValueError: a negative weight.
    """
    relations = Relations(distance_weight, angle_weight, chunk_size)
    return FeatureDistillation(teacher, pair, relations, **options)

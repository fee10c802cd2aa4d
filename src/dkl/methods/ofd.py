"""OFD: the maps of all stages before their activation, at a partial distance.

Shapes: B samples, C channels, H x W positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dkl.losses import ofd_loss, ofd_margins
from dkl.methods.feature_distillation import FeatureDistillation, TeacherMode
from dkl.methods.features import Comparison, FeaturePair, Features, StageShapes


class Overhaul(Comparison):
    """Connectors of the student's stages, and the margins of the teacher's.

    Args:
        stages: (C, H, W) of the maps before their activation.
        margins: [C] of each stage of the teacher.
    """

    def __init__(self, stages: StageShapes, margins: Sequence[Tensor]) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(student[0], teacher[0], 1, bias=False), nn.BatchNorm2d(teacher[0])
            )
            for student, teacher in zip(stages.student, stages.teacher, strict=True)
        )
        # They follow from the teacher, so checkpoints need not hold them.
        for place, margin_C in enumerate(margins):
            self.register_buffer(f"margin_{place}", margin_C, persistent=False)

    def of_student(self, features: Features) -> list[Tensor]:
        """Return the maps after the stem, before their activation."""
        return list(features.pre_activations[1:])

    of_teacher = of_student

    def forward(
        self, inputs: list[Tensor], targets: list[Tensor], mask: Tensor, num_items: Tensor
    ) -> Tensor:
        """Return the partial distance of the connected maps."""
        connected = [
            connector(value) for connector, value in zip(self.connectors, inputs, strict=True)
        ]
        margins = [getattr(self, f"margin_{place}") for place in range(len(targets))]
        return ofd_loss(connected, targets, margins, mask=mask, num_items=num_items)


def ofd(
    teacher: nn.Module,
    pair: FeaturePair,
    norms: Sequence[nn.Module | None],
    *,
    weight: float = 1e-3,
    teacher_mode: TeacherMode = "batch-stats",
    **options: Any,
) -> FeatureDistillation:
    """Build the overhaul of feature distillation: hard loss + weight OFD (Heo et al., ICCV 2019).

    The published code leaves the teacher in train mode, so that its batch-norm layers normalise by
    the batch; ``teacher_mode="batch-stats"`` is that without touching the running statistics.

    Args:
        teacher: a trained model.
        pair: how features are read; both networks have equally many stages after the stem.
        norms: the batch-norm layers that make the teacher's maps before their activation, one for
            each, the stem's first (of which none is needed); see ``dkl.models.tap_norms``.
        weight: of the sum over maps; published: 1e-3 on CIFAR, 1e-4 on ImageNet.
        teacher_mode: "batch-stats" or "eval".
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``FeatureDistillation``.

    Returns:
        The method; its connectors are trained along.

    Raises:
        ValueError: stages that do not correspond, or one without batch-norm.
    """
    stages = pair.stages(pre_activations=(True, True))
    margins = []
    for place, norm in enumerate(norms[1:], start=1):
        weight_C, bias_C = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if not isinstance(weight_C, Tensor) or not isinstance(bias_C, Tensor):
            raise ValueError(
                f"OFD needs the batch-norm layer before the activation of each stage of the "
                f"teacher, and stage {place} has {norm!r}; choose another teacher or method"
            )
        margins.append(ofd_margins(weight_C, bias_C))
    if len(margins) != len(stages.teacher):
        raise ValueError(
            f"OFD needs one batch-norm layer for each of the {len(stages.teacher)} stages of the "
            f"teacher, got {len(margins)}; give all that dkl.models.tap_norms returns"
        )
    comparison = Overhaul(stages, [torch.as_tensor(margin_C) for margin_C in margins])
    return FeatureDistillation(
        teacher, pair, comparison, weight=weight, teacher_mode=teacher_mode, **options
    )

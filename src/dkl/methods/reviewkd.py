"""ReviewKD: maps fused from deep to shallow learn from the teacher's maps of each stage.

Shapes: B samples, C channels, H x W positions, M channels in between.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.losses import hcl_loss
from dkl.methods.feature_distillation import FeatureDistillation
from dkl.methods.features import Comparison, FeaturePair, Features, MapShape


class Fusion(nn.Module):
    """One step of the review: a stage's map, mixed with what came from the deeper stages.

    Both are brought to M channels, mixed position by position with two attention maps, handed on to
    the shallower stages, and turned into a map like the teacher's.

    Args:
        student: (C, H, W) of the student's map.
        teacher: (C, H, W) of the teacher's.
        channels: M.
        has_deeper: False for the deepest stage, which mixes nothing.
    """

    def __init__(
        self, student: MapShape, teacher: MapShape, channels: int, *, has_deeper: bool
    ) -> None:
        super().__init__()
        self.size = teacher[1:]
        self.reduce = nn.Sequential(
            nn.Conv2d(student[0], channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.expand = nn.Sequential(
            nn.Conv2d(channels, teacher[0], 3, padding=1, bias=False), nn.BatchNorm2d(teacher[0])
        )
        self.attention = nn.Conv2d(2 * channels, 2, 1) if has_deeper else None
        for layer in (*self.reduce, *self.expand):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, map_BCHW: Tensor, deeper_BMhw: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map for the teacher's stage, and [B, M, H, W] for the next one."""
        mixed_BMHW: Tensor = self.reduce(map_BCHW)
        if self.attention is not None:
            assert deeper_BMhw is not None  # the deepest stage alone has none
            deeper_BMHW = F.interpolate(deeper_BMhw, mixed_BMHW.shape[2:], mode="nearest")
            both = torch.cat([mixed_BMHW, deeper_BMHW], 1)
            own_B1HW, other_B1HW = self.attention(both).sigmoid().split(1, 1)
            mixed_BMHW = mixed_BMHW * own_B1HW + deeper_BMHW * other_B1HW
        at_goal = mixed_BMHW
        if mixed_BMHW.shape[2:] != self.size:
            at_goal = F.interpolate(mixed_BMHW, self.size, mode="nearest")
        return self.expand(at_goal), mixed_BMHW


class Review(Comparison):
    """Fused maps of all stages and of the pooled features.

    Args:
        students: (C, H, W) of the student's maps after the stem, and (D, 1, 1).
        teachers: likewise of the teacher, as many.
        max_channels: bound of M, which is at most the channels of the deepest stage.
        pre_activations: take the student's maps before their activation.
    """

    def __init__(
        self,
        students: Sequence[MapShape],
        teachers: Sequence[MapShape],
        *,
        max_channels: int = 512,
        pre_activations: bool = False,
    ) -> None:
        super().__init__()
        self.pre_activations = pre_activations
        channels = min(max_channels, students[-1][0])
        deepest = len(students) - 1
        self.fusions = nn.ModuleList(
            Fusion(student, teacher, channels, has_deeper=place < deepest)
            for place, (student, teacher) in enumerate(zip(students, teachers, strict=True))
        )

    def of_student(self, features: Features) -> list[Tensor]:
        """Return the maps after the stem and the pooled features as a map."""
        maps = features.pre_activations if self.pre_activations else features.maps
        return [*maps[1:], features.pooled[:, :, None, None]]

    def of_teacher(self, features: Features) -> list[Tensor]:
        """Return the maps before their activation, and the pooled features as a map."""
        return [*features.pre_activations[1:], features.pooled[:, :, None, None]]

    def forward(
        self, inputs: list[Tensor], targets: list[Tensor], mask: Tensor, num_items: Tensor
    ) -> Tensor:
        """Return the hierarchical context loss of the fused maps."""
        fused: list[Tensor] = []
        handed_on: Tensor | None = None
        for fusion, value in zip(reversed(self.fusions), reversed(inputs), strict=True):
            map_BCHW, handed_on = fusion(value, handed_on)
            fused.append(map_BCHW)
        return hcl_loss(fused[::-1], targets, mask=mask, num_items=num_items)


def reviewkd(
    teacher: nn.Module,
    pair: FeaturePair,
    *,
    weight: float = 1.0,
    max_channels: int = 512,
    pre_activations: bool = False,
    **options: Any,
) -> FeatureDistillation:
    """Build ReviewKD: hard loss + weight HCL of fused maps (Chen et al., CVPR 2021).

    Args:
        teacher: a trained model.
        pair: how features are read; both networks have equally many stages after the stem.
        weight: of the hierarchical context loss; published: 0.6 to 8 by pair.
        max_channels: bound of the channels between the layers; published: 512.
        pre_activations: take the student's maps before their activation (published for ImageNet);
            the teacher's always are.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` (published: 20) of
            ``FeatureDistillation``.

    Returns:
        The method; its layers are trained along.

    Raises:
        ValueError: stages that do not correspond.
    """
    stages = pair.stages(pre_activations=(pre_activations, True))
    review = Review(
        [*stages.student, (pair.student.num_features, 1, 1)],
        [*stages.teacher, (pair.teacher.num_features, 1, 1)],
        max_channels=max_channels,
        pre_activations=pre_activations,
    )
    return FeatureDistillation(teacher, pair, review, weight=weight, **options)

"""Features of two networks side by side: what methods read, and in which sizes.

Where a network keeps its features is no matter of this folder: methods are given functions that
read them, such as ``dkl.models.feature_maps``; ``dkl.build.feature_pair`` makes a whole pair.

Shapes: B samples, C channels, H x W positions, D pooled features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

MapShape = tuple[int, int, int]
"""(C, H, W) of a feature map."""


class Features(Protocol):
    """What one call of a network computed; ``dkl.models.FeatureMaps`` is one."""

    @property
    def maps(self) -> Sequence[Tensor]:
        """Feature maps [B, C, H, W], from the stem's to the last stage's."""

    @property
    def pre_activations(self) -> Sequence[Tensor]:
        """The maps before their activation; empty where they are not known."""

    @property
    def pooled(self) -> Tensor:
        """[B, D], the input of the last linear layer."""

    @property
    def logits(self) -> Tensor:
        """[B, K]."""


class FeatureShapes(Protocol):
    """Sizes of ``Features``; ``dkl.models.TapShapes`` is one."""

    @property
    def maps(self) -> Sequence[MapShape]:
        """(C, H, W) of each map."""

    @property
    def pre_activations(self) -> Sequence[MapShape]:
        """(C, H, W) of each pre-activation."""

    @property
    def num_features(self) -> int:
        """D."""


ReadFeatures = Callable[[nn.Module, Tensor], Any]
"""(network, images) -> ``Features`` of one call of the network."""


@dataclass(frozen=True)
class FeaturePair:
    """How the features of student and teacher are read, and how large they are.

    Args:
        read_student: network and images to ``Features``; gradients flow through them.
        read_teacher: likewise.
        student: sizes of the student's features.
        teacher: sizes of the teacher's.
    """

    read_student: ReadFeatures
    read_teacher: ReadFeatures
    student: FeatureShapes
    teacher: FeatureShapes

    def stages(self, *, pre_activations: tuple[bool, bool] = (False, False)) -> "StageShapes":
        """Return the sizes of the maps after the stem, stage by stage.

        Args:
            pre_activations: of (student, teacher): their maps before the activation instead.

        Raises:
            ValueError: the networks have different numbers of stages, or what is wanted is not
                known of one of them.
        """
        found: list[Sequence[MapShape]] = []
        names = ("student", "teacher")
        for name, shapes, pre in zip(
            names, (self.student, self.teacher), pre_activations, strict=True
        ):
            maps = shapes.pre_activations if pre else shapes.maps
            if len(maps) < 2:
                what = "maps before an activation" if pre else "feature maps"
                raise ValueError(
                    f"the {name} needs at least two {what}, the stem's and a stage's, and has "
                    f"{len(maps)}; name its modules by {name}_taps, or choose a method on logits"
                )
            found.append(maps[1:])
        if len(found[0]) != len(found[1]):
            raise ValueError(
                f"student and teacher must have equally many stages after the stem, got "
                f"{len(found[0])} and {len(found[1])}: choose maps by student_taps and "
                "teacher_taps, the stem's first"
            )
        return StageShapes(*found)


@dataclass(frozen=True)
class StageShapes:
    """(C, H, W) of the stages of both networks, equally many."""

    student: Sequence[MapShape]
    teacher: Sequence[MapShape]


class Comparison(nn.Module):
    """What a method compares, with the layers that adapt the student's features.

    Subclasses say which features they take, and return the loss of a batch. ``couples_samples`` is
    True when samples of a micro-batch are compared with each other.
    """

    couples_samples = False

    def of_student(self, features: Features) -> list[Tensor]:
        """Return the student's features that are compared."""
        raise NotImplementedError

    def of_teacher(self, features: Features) -> list[Tensor]:
        """Return the teacher's features that are compared."""
        raise NotImplementedError

    def forward(
        self, inputs: list[Tensor], targets: list[Tensor], mask: Tensor, num_items: Tensor
    ) -> Tensor:
        """Return the sum over the samples that count, over ``num_items``."""
        raise NotImplementedError

"""Every method of distillation on small networks with taps, for tests."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dkl import methods
from dkl.methods.features import FeaturePair
from dkl.models import feature_maps, tap_norms, tap_shapes
from dkl.models.tap_points import TapPoints, outputs_of

NUM_CLASSES = 5
IMAGE_SHAPE = (1, 4, 4)


class SmallNetwork(nn.Module):
    """A stem and two stages, with batch-norm or without."""

    def __init__(self, width: int, *, batch_norm: bool = True, activation: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.act1 = nn.ReLU() if activation else nn.Tanh()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=not batch_norm)
        self.bn2 = nn.BatchNorm2d(2 * width) if batch_norm else nn.Identity()
        self.act2 = nn.ReLU() if activation else nn.Tanh()
        self.fc = nn.Linear(2 * width, NUM_CLASSES)

    def tap_points(self) -> TapPoints:
        return TapPoints(
            outputs_of("stem", "act1", "act2"),
            "fc",
            outputs_of("stem", "bn1", "bn2"),
            (None, "bn1", "bn2"),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.act1(self.bn1(self.conv1(self.stem(images))))
        features = self.act2(self.bn2(self.conv2(features)))
        return self.fc(features.mean((2, 3)))


def networks(*, batch_norm: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return a student and a teacher, which has batch-norm in any case; float64."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        student = SmallNetwork(3, batch_norm=batch_norm, activation=batch_norm)
        teacher = SmallNetwork(4)
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.running_mean, -0.2, 0.2)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.5, 0.5)
    return student.double(), teacher.double().eval()


def labels_of_data(num_samples: int) -> Tensor:
    return (torch.arange(num_samples) * 7) % NUM_CLASSES


def make(name: str, student: nn.Module, teacher: nn.Module, num_samples: int = 64) -> nn.Module:
    """Build a method, its own layers drawn from a fixed seed."""
    pair = FeaturePair(
        feature_maps,
        feature_maps,
        tap_shapes(student, IMAGE_SHAPE),
        tap_shapes(teacher, IMAGE_SHAPE),
    )
    norms = tap_norms(teacher)
    labels = labels_of_data(num_samples)
    builders: dict[str, Callable[[], nn.Module]] = {
        "kd": partial(methods.kd, teacher),
        "jsd_kd": partial(methods.jsd_kd, teacher, temperature=2.0),
        "dkd": partial(methods.dkd, teacher, beta=2.0, warmup_epochs=2),
        "dist": partial(methods.dist, teacher),
        "ikl_kd": partial(methods.ikl_kd, teacher, NUM_CLASSES, mse_weight=2.0),
        "gkl_kd": partial(methods.ikl_kd, teacher, NUM_CLASSES, gamma=0.5),
        "at": partial(methods.attention_transfer, teacher, pair, weight=50.0),
        "fitnet": partial(methods.fitnet, teacher, pair, weight=5.0, stage=1),
        "rkd": partial(methods.rkd, teacher, pair, distance_weight=2.0, angle_weight=4.0),
        "crd": partial(methods.crd, teacher, pair, labels, num_features=6, num_negatives=20),
        "ofd": partial(methods.ofd, teacher, pair, norms, weight=0.1),
        "ofd_eval": partial(methods.ofd, teacher, pair, norms, weight=0.1, teacher_mode="eval"),
        "reviewkd": partial(methods.reviewkd, teacher, pair, weight=2.0, warmup_epochs=2),
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return builders[name]().double()


NAMES = (
    "kd", "jsd_kd", "dkd", "dist", "ikl_kd", "gkl_kd",
    "at", "fitnet", "rkd", "crd", "ofd", "ofd_eval", "reviewkd",
)  # fmt: skip
OWN_BATCH_NORM = {"fitnet", "ofd", "ofd_eval", "reviewkd"}
"""Methods whose own layers take the statistics of a micro-batch."""
COUPLED = {"dist", "rkd"} | OWN_BATCH_NORM
"""Methods that declare that they couple the samples of a micro-batch."""

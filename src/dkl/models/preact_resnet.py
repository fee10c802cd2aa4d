"""Pre-activation residual networks for small images.

The networks of the robustness literature on CIFAR: a 3x3 stem without pooling and four stages
(He et al. 2016, "Identity mappings in deep residual networks"). The names of the parameters are
those of the field's checkpoints: ``conv1``, ``layer{1..4}.{i}.{bn1,conv1,bn2,conv2,shortcut.0}``,
``bn``, ``linear``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive
from dkl.models.tap_points import TapPoints, outputs_of


class PreActBlock(nn.Module):
    """Batch-norm, ReLU, 3x3 convolution, twice, and a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        activated = F.relu(self.bn1(inputs))
        shortcut: Tensor = inputs if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + shortcut


class PreActResNet(ImageClassifier):
    """A stem, four stages of pre-activation blocks with strides 1, 2, 2, 2, and a linear layer.

    Weights are drawn as torch draws them by default, as in the training codes of the field.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        num_blocks: blocks of each stage.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
    """

    def __init__(
        self, num_classes: int, in_channels: int, num_blocks: tuple[int, int, int, int], width: int
    ) -> None:
        check_positive("width", width)
        super().__init__(num_classes, in_channels, 8 * width)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, num_blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, num_blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, num_blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, num_blocks[3], stride=2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.linear

    def tap_points(self) -> TapPoints:
        """Return the raw sums of the stages; each is normalised where the next one begins."""
        norms = ("layer2.0.bn1", "layer3.0.bn1", "layer4.0.bn1", "bn")
        return TapPoints(
            outputs_of("conv1", "layer1", "layer2", "layer3", "layer4"), "linear",
            outputs_of("conv1", *norms), (None, *norms),
        )  # fmt: skip

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, H / 8, W / 8] after its ReLU."""
        features = self.layer2(self.layer1(self.conv1(images_NCHW)))
        return F.relu(self.bn(self.layer4(self.layer3(features))))


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_channels, out_channels, stride)
    rest = [PreActBlock(out_channels, out_channels, stride=1) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)


def preact_resnet10(num_classes: int, in_channels: int = 3, *, width: int = 64) -> PreActResNet:
    """Build a pre-activation ResNet with one block per stage (4.9 million parameters).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        width: channels of the first stage.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> preact_resnet10(10, in_channels=1, width=16).num_features
        128
    """
    return PreActResNet(num_classes, in_channels, (1, 1, 1, 1), width)


def preact_resnet18(num_classes: int, in_channels: int = 3, *, width: int = 64) -> PreActResNet:
    """Build a pre-activation ResNet with two blocks per stage (11.2 million parameters).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        width: channels of the first stage.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> preact_resnet18(100, width=8).num_classes
        100
    """
    return PreActResNet(num_classes, in_channels, (2, 2, 2, 2), width)

"""Residual networks of three stages for images of 32x32 (He et al. 2016, section 4.2).

Networks of the original, post-activation kind. The names of the parameters are those of the
distillation literature's checkpoints: ``conv1``, ``bn1``,
``layer{1..3}.{i}.{conv1,bn1,conv2,bn2}``, ``layer{k}.0.downsample.{0,1}``, ``fc``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive, draw_convolutions
from dkl.models.tap_points import Tap, TapPoints, outputs_of


class CifarBlock(nn.Module):
    """3x3 convolution, batch-norm, ReLU, 3x3 convolution, batch-norm, plus a shortcut, ReLU.

    Where the shape changes, the shortcut is a 1x1 convolution and a batch-norm.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        residual: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inputs)))))
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        outputs: Tensor = self.relu(residual + shortcut)
        return outputs


class CifarResNet(ImageClassifier):
    """A stem, three stages of basic blocks with strides 1, 2, 2, and a linear layer.

    The stages have 1, 2 and 4 times ``multiplier * width`` channels. The stem has ``width`` of
    them, and twice as many where the stages are widened. Convolutions start from
    N(0, 2 / (kernel_size^2 out_channels)).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        depth: number of layers; 8, 14, 20, 32, 44, 56, 110, ...
        multiplier: factor on the channels of the stages; 4 in resnet8x4 and resnet32x4.
        width: channels of the stem and of the first stage before they are widened.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> sum(p.numel() for p in CifarResNet(100, depth=20).parameters())
        278324
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int,
        multiplier: int = 1,
        width: int = 16,
    ) -> None:
        check_positive("depth", depth)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"the depth of this ResNet must be 6 n + 2 with n >= 1, got {depth}")
        check_positive("multiplier", multiplier)
        check_positive("width", width)
        num_blocks = (depth - 2) // 6
        stem, base = width * min(multiplier, 2), width * multiplier
        super().__init__(num_classes, in_channels, 4 * base)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, base, num_blocks, stride=1)
        self.layer2 = _stage(base, 2 * base, num_blocks, stride=2)
        self.layer3 = _stage(2 * base, 4 * base, num_blocks, stride=2)
        self.fc = nn.Linear(4 * base, num_classes)
        draw_convolutions(self)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.fc

    def tap_points(self) -> TapPoints:
        """Return the stem after its ReLU, and every stage after and before its last ReLU."""
        last = len(self.layer1) - 1
        stages = ("layer1", "layer2", "layer3")
        return TapPoints(
            outputs_of("relu", *stages),
            "fc",
            (Tap("relu"), *(Tap(f"{stage}.{last}.relu", "input") for stage in stages)),
            (None, *(f"{stage}.{last}.bn2" for stage in stages)),
        )

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, ceil(H / 4), ceil(W / 4)] after ReLU."""
        features = self.relu(self.bn1(self.conv1(images_NCHW)))
        stages: Tensor = self.layer3(self.layer2(self.layer1(features)))
        return stages


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = CifarBlock(in_channels, out_channels, stride)
    rest = [CifarBlock(out_channels, out_channels, stride=1) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)

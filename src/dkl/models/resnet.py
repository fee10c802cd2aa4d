"""Residual networks of four stages for small images.

Networks of the original, post-activation kind (He et al. 2016, "Deep residual learning for image
recognition") with a 3x3 stem and no pooling after it. The names of the parameters are those of the
distillation literature's checkpoints: ``conv1``, ``bn1``,
``layer{1..4}.{i}.{conv1,bn1,conv2,bn2}`` and ``conv3``, ``bn3`` in bottlenecks,
``layer{1..4}.0.shortcut.{0,1}``, ``linear``.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive, draw_convolutions
from dkl.models.tap_points import Tap, TapPoints, outputs_of


class BasicBlock(nn.Module):
    """3x3 convolution, batch-norm, ReLU, 3x3 convolution, batch-norm, plus a shortcut, ReLU.

    Where the shape changes, the shortcut is a 1x1 convolution and a batch-norm.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    expansion = 1
    last_norm = "bn2"

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        residual: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inputs)))))
        outputs: Tensor = self.relu(residual + self.shortcut(inputs))
        return outputs


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch-norm and ReLU between, plus a shortcut, ReLU.

    The 3x3 convolution has the stride and a quarter of the output's channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of 4.
        stride: stride of the 3x3 convolution and of the shortcut.
    """

    expansion = 4
    last_norm = "bn3"

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        residual: Tensor = self.bn3(self.conv3(hidden))
        outputs: Tensor = self.relu(residual + self.shortcut(inputs))
        return outputs


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(ImageClassifier):
    """A stem, four stages of blocks and a linear layer.

    Weights are drawn as torch draws them by default, as in the training codes of the field.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        block: kind of the blocks.
        num_blocks: blocks of each stage.
        width: channels of the stem; the stages have 1, 2, 4 and 8 times as many, and bottlenecks
            put out four times those.
        strides: stride of the first block of each stage.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: tuple[int, int, int, int],
        width: int,
        strides: Sequence[int],
    ) -> None:
        check_positive("width", width)
        if not isinstance(strides, Sequence) or len(strides) != 4 or set(strides) - {1, 2}:
            raise ValueError(
                "strides must be four numbers, 1 or 2, one for each stage, such as (1, 2, 2, 2); "
                f"got {strides!r}"
            )
        base = width * block.expansion
        super().__init__(num_classes, in_channels, 8 * base)
        self._last_norm = block.last_norm
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, width, base, num_blocks[0], strides[0])
        self.layer2 = _stage(block, base, 2 * base, num_blocks[1], strides[1])
        self.layer3 = _stage(block, 2 * base, 4 * base, num_blocks[2], strides[2])
        self.layer4 = _stage(block, 4 * base, 8 * base, num_blocks[3], strides[3])
        self.linear = nn.Linear(8 * base, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.linear

    def tap_points(self) -> TapPoints:
        """Return the stem after its ReLU, and every stage after and before its last ReLU."""
        stages = {
            name: f"{name}.{len(self.get_submodule(name)) - 1}"  # type: ignore[arg-type]
            for name in ("layer1", "layer2", "layer3", "layer4")
        }
        return TapPoints(
            outputs_of("relu", *stages),
            "linear",
            (Tap("relu"), *(Tap(f"{last}.relu", "input") for last in stages.values())),
            (None, *(f"{last}.{self._last_norm}" for last in stages.values())),
        )

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, H', W'] after its ReLU.

        H' is H divided by the product of the strides, rounded up; so is W'.
        """
        features = self.relu(self.bn1(self.conv1(images_NCHW)))
        stages: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return stages


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    out_channels: int,
    num_blocks: int,
    stride: int,
) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    rest = [block(out_channels, out_channels, stride=1) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet18_cifar(
    num_classes: int,
    in_channels: int = 3,
    *,
    width: int = 64,
    strides: Sequence[int] = (1, 2, 2, 2),
) -> ResNet:
    """Build a ResNet with two blocks per stage (11.2 million parameters).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        width: channels of the first stage.
        strides: stride of each of the four stages, 1 or 2. (1, 1, 2, 2) is the teacher of LBGAT,
            whose last feature map is twice as wide and high; names and shapes of the weights are
            the same.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer, or there are not four strides of 1 or 2.

    Example:
        >>> import torch
        >>> model = resnet18_cifar(10, width=8, strides=(1, 1, 2, 2))
        >>> model.forward_features(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 64, 8, 8])
    """
    return ResNet(num_classes, in_channels, BasicBlock, (2, 2, 2, 2), width, strides)


def resnet50_cifar(num_classes: int, in_channels: int = 3, *, width: int = 64) -> ResNet:
    """Build a ResNet of bottlenecks, 3, 4, 6 and 3 per stage (23.7 million parameters).

    Convolutions start from N(0, 2 / (kernel_size^2 out_channels)).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        width: channels of the stem; the last stage puts out 32 times as many.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> resnet50_cifar(100, width=4).num_features
        128
    """
    model = ResNet(num_classes, in_channels, Bottleneck, (3, 4, 6, 3), width, (1, 2, 2, 2))
    draw_convolutions(model)
    return model

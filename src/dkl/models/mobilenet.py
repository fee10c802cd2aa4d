"""MobileNets: version 2 for small images, version 1 for ImageNet.

Version 2 (Sandler et al. 2018) as the distillation literature has it: half as wide, ReLU instead
of ReLU6, strides for 32x32. Names of its parameters: ``conv1.{0,1}``,
``blocks.{g}.{j}.conv.{0,1,3,4,6,7}``, ``conv2.{0,1}``, ``classifier.0``. Version 1 (Howard et al.
2017) has ``model.0.{0,1}``, ``model.{1..13}.{0,1,3,4}`` and ``fc``.
"""

from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive, draw_convolutions
from dkl.models.tap_points import Tap, TapPoints, outputs_of

# Per group: expansion, output channels at full width, number of blocks, stride of the first.
_GROUPS_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
# Of these groups the outputs are feature maps.
_TAPPED_V2 = (1, 2, 4, 6)
# Per layer: output channels in multiples of the stem's, and stride.
_LAYERS_V1 = (
    (2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1), (16, 1), (16, 1), (16, 1), (16, 1),
    (32, 2), (32, 1),
)  # fmt: skip
_TAPPED_V1 = (3, 5, 11, 13)


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 on each channel, linear 1x1 to few; plus the input if it fits.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the 3x3 convolution.
        expansion: factor on ``in_channels`` for the channels between.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.adds_input = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        outputs: Tensor = self.conv(inputs)
        return inputs + outputs if self.adds_input else outputs


class MobileNetV2(ImageClassifier):
    """A stem with stride 2, seven groups of inverted residuals, a 1x1 convolution, linear layer.

    Convolutions start from N(0, 2 / (kernel_size^2 out_channels)), the linear layer from
    N(0, 0.01^2) and its bias from 0. Use ``mobilenet_v2_half`` for the shipped size.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: factor on the channels of stem and groups; products are rounded down.
    """

    def __init__(self, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__(num_classes, in_channels, 1280)
        channels = int(32 * width)
        self.conv1 = _convolution(in_channels, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for expansion, full, number, stride in _GROUPS_V2:
            blocks = []
            for index in range(number):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, int(full * width), step, expansion))
                channels = int(full * width)
            self.blocks.append(nn.Sequential(*blocks))
        self.conv2 = _convolution(channels, self.num_features, 1)
        self.classifier = nn.Sequential(nn.Linear(self.num_features, num_classes))
        draw_convolutions(self)
        nn.init.normal_(self.get_classifier().weight, std=0.01)
        nn.init.zeros_(self.get_classifier().bias)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        layer: nn.Linear = self.classifier[0]  # type: ignore[assignment]
        return layer

    def tap_points(self) -> TapPoints:
        """Return the stem after its ReLU and the outputs of four groups.

        Bottlenecks end without an activation, so that a map is its own pre-activation.
        """
        places = outputs_of("conv1", *(f"blocks.{group}" for group in _TAPPED_V2))
        last = [f"blocks.{group}.{_GROUPS_V2[group][2] - 1}.conv.7" for group in _TAPPED_V2]
        return TapPoints(places, "classifier.0", places, (None, *last))

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, 1280, ceil(H / 16), ceil(W / 16)] after its ReLU."""
        features = self.conv1(images_NCHW)
        for group in self.blocks:
            features = group(features)
        outputs: Tensor = self.conv2(features)
        return outputs


def mobilenet_v2_half(num_classes: int, in_channels: int = 3) -> MobileNetV2:
    """Build the MobileNetV2 of half the width for small images (0.8 million parameters).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more, made for 32x32.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> sum(p.numel() for p in mobilenet_v2_half(100).parameters())
        812836
    """
    return MobileNetV2(num_classes, in_channels, width=0.5)


class MobileNetV1(ImageClassifier):
    """A stem with stride 2, 13 depthwise separable convolutions and a linear layer.

    Weights are drawn as torch draws them by default.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more, made for 224x224.
        width: channels of the stem; the last layer has 32 times as many.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> MobileNetV1(10, width=4).num_features
        128
    """

    def __init__(self, num_classes: int, in_channels: int = 3, *, width: int = 32) -> None:
        check_positive("width", width)
        super().__init__(num_classes, in_channels, 32 * width)
        layers = [_convolution(in_channels, width, 3, stride=2)]
        channels = width
        for factor, stride in _LAYERS_V1:
            layers.append(_separable(channels, factor * width, stride))
            channels = factor * width
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.fc

    def tap_points(self) -> TapPoints:
        """Return stem and last layers of the four resolutions, after and before their ReLU."""
        layers = [f"model.{index}" for index in _TAPPED_V1]
        return TapPoints(
            outputs_of("model.0", *layers),
            "fc",
            (Tap("model.0"), *(Tap(f"{layer}.5", "input") for layer in layers)),
            (None, *(f"{layer}.4" for layer in layers)),
        )

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, ceil(H / 32), ceil(W / 32)] after ReLU."""
        features: Tensor = self.model(images_NCHW)
        return features


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )

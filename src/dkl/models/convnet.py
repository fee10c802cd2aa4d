"""A small convolutional network for quick runs on a CPU."""

from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive
from dkl.models.tap_points import Tap, TapPoints, outputs_of


class ConvNet(ImageClassifier):
    """Convolutions with batch-norm and ReLU, global average pooling, one linear layer.

    Use ``convnet_small`` for the shipped size.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        widths: output channels of each 3x3 convolution.
        strides: its stride; one per convolution.
    """

    def __init__(
        self, num_classes: int, in_channels: int, widths: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__(num_classes, in_channels, widths[-1])
        self.conv = nn.ModuleList(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
            for channels_in, channels_out, stride in zip(
                (in_channels, *widths[:-1]), widths, strides, strict=True
            )
        )
        self.bn = nn.ModuleList(nn.BatchNorm2d(channels) for channels in widths)
        self.relu = nn.ModuleList(nn.ReLU() for _ in widths)
        self.fc = nn.Linear(widths[-1], num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.fc

    def tap_points(self) -> TapPoints:
        """Return the map of every convolution, after and before its ReLU."""
        acts = [f"relu.{i}" for i in range(len(self.relu))]
        return TapPoints(
            outputs_of(*acts), "fc", tuple(Tap(name, "input") for name in acts),
            tuple(f"bn.{i}" for i in range(len(self.bn))),
        )  # fmt: skip

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, H / 4, W / 4] after its ReLU."""
        features = images_NCHW
        for conv, bn, relu in zip(self.conv, self.bn, self.relu, strict=True):
            features = relu(bn(conv(features)))
        return features


def convnet_small(num_classes: int, in_channels: int = 3, *, width: int = 32) -> ConvNet:
    """Build a network of about 57k parameters for images of 8x8 and more.

    Three 3x3 convolutions of 1, 2 and 2 times ``width`` channels with strides 1, 2, 2.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first convolution.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> sum(parameter.numel() for parameter in convnet_small(10, in_channels=1).parameters())
        56554
    """
    check_positive("width", width)
    return ConvNet(num_classes, in_channels, (width, 2 * width, 2 * width), (1, 2, 2))

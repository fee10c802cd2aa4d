"""VGG networks with batch-norm for small images (Simonyan and Zisserman 2015).

Five blocks of 3x3 convolutions and one linear layer. The names of the parameters are those of the
distillation literature's checkpoints: ``block{0..4}.{i}``, numbered as convolution, batch-norm,
ReLU, convolution, ..., and ``classifier``. The last ReLU of a block stands outside of it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive, draw_convolutions
from dkl.models.tap_points import Tap, TapPoints, outputs_of

# Convolutions in each block, by the number of layers that have weights.
_NUM_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_LEAST_SIZE = 8
# From this size on, the fourth block is followed by a pooling as well.
_LARGE_SIZE = 64


class VGG(ImageClassifier):
    """Blocks of 1, 2, 4, 8 and 8 times ``width`` channels, pooled after the first three.

    The fourth is followed by a pooling too where the images are of 64x64 and more. Convolutions
    start from N(0, 2 / (kernel_size^2 out_channels)), the linear layer from N(0, 0.01^2), and every
    bias from 0.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        depth: 8, 11, 13, 16 or 19.
        width: channels of the first block.

    Raises:
        ValueError: a number is out of its range; or, when called, the images are smaller than 8x8.

    Example:
        >>> sum(p.numel() for p in VGG(100, depth=8).parameters())
        3965028
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, depth: int, width: int = 64
    ) -> None:
        if depth not in _NUM_CONVOLUTIONS:
            known = ", ".join(str(number) for number in _NUM_CONVOLUTIONS)
            raise ValueError(f"the depth of a VGG must be one of {known}, got {depth!r}")
        check_positive("width", width)
        super().__init__(num_classes, in_channels, 8 * width)
        channels = (in_channels, width, 2 * width, 4 * width, 8 * width, 8 * width)
        for index, number in enumerate(_NUM_CONVOLUTIONS[depth]):
            block = _block(channels[index], channels[index + 1], number)
            self.add_module(f"block{index}", block)
        self.relu = nn.ModuleList(nn.ReLU() for _ in range(5))
        self.classifier = nn.Linear(8 * width, num_classes)
        draw_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.classifier

    def tap_points(self) -> TapPoints:
        """Return every block after its ReLU and before its pooling, and all but the first before.

        The first pre-activation is the first map, as the literature has it.
        """
        acts = [f"relu.{index}" for index in range(5)]
        blocks = {f"block{index}": getattr(self, f"block{index}") for index in range(1, 5)}
        return TapPoints(
            outputs_of(*acts),
            "classifier",
            (Tap(acts[0]), *(Tap(act, "input") for act in acts[1:])),
            (None, *(f"{name}.{len(block) - 1}" for name, block in blocks.items())),
        )

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, H / 8, W / 8], rounded down, after ReLU.

        Height and width are half of that where both are at least 64 in the images.
        """
        size = min(images_NCHW.shape[-2:])
        if size < _LEAST_SIZE:
            raise ValueError(
                f"VGG halves its maps three times and needs images of {_LEAST_SIZE}x{_LEAST_SIZE} "
                f"or more, got {list(images_NCHW.shape)}; enlarge the images"
            )
        num_poolings = 4 if size >= _LARGE_SIZE else 3
        features = images_NCHW
        for index, relu in enumerate(self.relu):
            features = relu(getattr(self, f"block{index}")(features))
            if index < num_poolings:
                features = F.max_pool2d(features, 2)
        return features


def _block(in_channels: int, out_channels: int, num_convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_convolutions):
        if index > 0:
            layers.append(nn.ReLU())
        source = out_channels if index > 0 else in_channels
        layers.append(nn.Conv2d(source, out_channels, 3, padding=1))
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers)

"""Wide residual networks WRN-depth-width (Zagoruyko and Komodakis 2016).

The names of the parameters are those that TRADES, its successors and the distillation literature
share: ``conv1``, ``block{1,2,3}.layer.{i}.{bn1,conv1,bn2,conv2}``,
``block{1,2,3}.layer.0.convShortcut``, ``bn1``, ``fc``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive, draw_convolutions
from dkl.models.tap_points import TapPoints, outputs_of


def blocks_per_stage(depth: int) -> int:
    """Return n of a depth of 6 n + 4: three stages of n blocks with two convolutions each.

    Args:
        depth: number of layers; 10, 16, 22, 28, 34, 40, ...

    Raises:
        ValueError: there is no wide ResNet of this depth.

    Example:
        >>> blocks_per_stage(34)
        5
    """
    check_positive("depth", depth)
    if depth < 10 or depth % 6 != 4:
        # The nearest valid depths, so that the message names something that works.
        below = max(10, depth - (depth - 4) % 6)
        raise ValueError(
            f"the depth of a wide ResNet must be 6 n + 4 with n >= 1, got {depth}; "
            f"the nearest are {below} and {below + 6}"
        )
    return (depth - 4) // 6


def initialise(model: ImageClassifier) -> None:
    """Draw convolutions from N(0, 2 / (kernel_size^2 out_channels)); the last bias becomes 0."""
    draw_convolutions(model)
    nn.init.zeros_(model.get_classifier().bias)


class WideBlock(nn.Module):
    """Batch-norm, ReLU, 3x3 convolution, twice, and a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input;
    elsewhere it is the raw input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        dropout: probability of dropping a value between the convolutions, in [0, 1).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        # With stride 2 the channels always change: a stage has at least twice as many as the last.
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        activated = F.relu(self.bn1(inputs))
        shortcut: Tensor = inputs if self.convShortcut is None else self.convShortcut(activated)
        hidden = F.relu(self.bn2(self.conv1(activated)))
        if self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout, self.training)
        residual: Tensor = self.conv2(hidden)
        return residual + shortcut


class WideStage(nn.Module):
    """Blocks in sequence, of which the first changes the shape.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_blocks: number of blocks.
        stride: stride of the first block.
        dropout: see ``WideBlock``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, stride: int, dropout: float
    ) -> None:
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride, dropout)
        rest = [WideBlock(out_channels, out_channels, 1, dropout) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        outputs: Tensor = self.layer(inputs)
        return outputs


class WideResNet(ImageClassifier):
    """A stem of 16 channels, three stages of 16, 32 and 64 times ``width`` channels, linear layer.

    Convolutions start from N(0, 2 / (kernel_size^2 out_channels)), batch-norm from scale 1 and
    shift 0, and the bias of the linear layer from 0.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        depth: number of layers; 10, 16, 22, 28, 34, 40, ...
        width: widening factor.
        dropout: probability of dropping a value between the convolutions of a block, in [0, 1).

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> sum(p.numel() for p in WideResNet(100, depth=16, width=2).parameters())
        703284
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, depth: int, width: int, dropout: float = 0
    ) -> None:
        num_blocks = blocks_per_stage(depth)
        check_positive("width", width)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {dropout!r}")
        super().__init__(num_classes, in_channels, 64 * width)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, 16 * width, num_blocks, 1, dropout)
        self.block2 = WideStage(16 * width, 32 * width, num_blocks, 2, dropout)
        self.block3 = WideStage(32 * width, 64 * width, num_blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        initialise(self)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.fc

    def tap_points(self) -> TapPoints:
        """Return the raw sums of the stages; each is normalised where the next one begins."""
        norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        return TapPoints(
            outputs_of("conv1", "block1", "block2", "block3"), "fc",
            outputs_of("conv1", *norms), (None, *norms),
        )  # fmt: skip

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, H / 4, W / 4] after its ReLU."""
        features = self.block3(self.block2(self.block1(self.conv1(images_NCHW))))
        return F.relu(self.bn1(features))

"""Wide residual networks with SiLU, as trained on generated data (Gowal et al. 2020).

They differ from ``dkl.models.wide_resnet`` in the activation, in the padding of convolutions with
stride 2 and in the names of the parameters, which are those of this family's checkpoints:
``init_conv``, ``layer.{0,1,2}.block.{i}.{batchnorm_0,conv_0,batchnorm_1,conv_1}``,
``layer.{0,1,2}.block.0.shortcut``, ``batchnorm``, ``logits``. So weights of one family never fit
the other. Published members normalise their input; build them with ``create_model``'s mean and std.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier, check_positive
from dkl.models.tap_points import TapPoints, outputs_of
from dkl.models.wide_resnet import blocks_per_stage, initialise


class SamePaddedConv2d(nn.Conv2d):
    """A 3x3 convolution without bias to ceil(size / stride), padded more at the end than before.

    It needs 2 rows (and columns) of zeros for stride 1 and for an odd size, 1 for stride 2 and an
    even size; half of them, rounded down, come before the image. With stride 2 and an even size
    that is none before and one after, where symmetric padding has one before and one unused after:
    the same weights look at pixels one row and column further on.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=0, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        padding = []
        for size in (input.shape[3], input.shape[2]):
            total = 2 if self.stride[0] == 1 else 1 + size % 2
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding))


class WideSiLUBlock(nn.Module):
    """Batch-norm, SiLU, 3x3 convolution, twice, and a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input;
    elsewhere it is the raw input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        momentum: share of a batch's statistics in the running ones of batch-norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels, momentum=momentum)
        self.conv_0 = SamePaddedConv2d(in_channels, out_channels, stride)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        # With stride 2 the channels always change: a stage has twice as many as the last.
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        activated = F.silu(self.batchnorm_0(inputs))
        shortcut: Tensor = inputs if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(activated))))
        return residual + shortcut


class WideSiLUStage(nn.Module):
    """Blocks in sequence, of which the first changes the shape.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_blocks: number of blocks.
        stride: stride of the first block.
        momentum: see ``WideSiLUBlock``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, stride: int, momentum: float
    ) -> None:
        super().__init__()
        first = WideSiLUBlock(in_channels, out_channels, stride, momentum)
        rest = [
            WideSiLUBlock(out_channels, out_channels, 1, momentum) for _ in range(num_blocks - 1)
        ]
        self.block = nn.Sequential(first, *rest)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        outputs: Tensor = self.block(inputs)
        return outputs


class WideResNetSiLU(ImageClassifier):
    """A stem of 16 channels, three stages of 16, 32 and 64 times ``width`` channels, linear layer.

    Initialised as ``WideResNet`` is.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.
        depth: number of layers; 10, 16, 22, 28, 34, 40, ...
        width: widening factor.
        batch_norm_momentum: share of a batch's statistics in the running ones, in (0, 1]. The
            default is this family's; runs of a few hundred steps need torch's 0.1.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = WideResNetSiLU(10, depth=28, width=10)
        >>> sum(p.numel() for p in model.parameters())
        36479194
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int,
        width: int,
        batch_norm_momentum: float = 0.01,
    ) -> None:
        num_blocks, momentum = blocks_per_stage(depth), batch_norm_momentum
        check_positive("width", width)
        if not 0 < momentum <= 1:
            raise ValueError(f"batch_norm_momentum is a share in (0, 1], got {momentum!r}")
        super().__init__(num_classes, in_channels, 64 * width)
        self.init_conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            WideSiLUStage(16, 16 * width, num_blocks, 1, momentum),
            WideSiLUStage(16 * width, 32 * width, num_blocks, 2, momentum),
            WideSiLUStage(32 * width, 64 * width, num_blocks, 2, momentum),
        )
        self.batchnorm = nn.BatchNorm2d(64 * width, momentum=momentum)
        self.logits = nn.Linear(64 * width, num_classes)
        initialise(self)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.logits

    def tap_points(self) -> TapPoints:
        """Return the raw sums of the stages; each is normalised where the next one begins."""
        norms = ("layer.1.block.0.batchnorm_0", "layer.2.block.0.batchnorm_0", "batchnorm")
        return TapPoints(
            outputs_of("init_conv", "layer.0", "layer.1", "layer.2"), "logits",
            outputs_of("init_conv", *norms), (None, *norms),
        )  # fmt: skip

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, ceil(H / 4), ceil(W / 4)] after SiLU."""
        return F.silu(self.batchnorm(self.layer(self.init_conv(images_NCHW))))

"""ShuffleNets for small images (Zhang et al. 2018, Ma et al. 2018).

As the distillation literature has them, with a 1x1 stem of 24 channels. The names of the parameters
are those of its checkpoints: ``conv1``, ``bn1``, ``layer{1..3}.{i}.{conv,bn}{1..5}``, ``linear``,
and in version 2 ``conv2`` and ``bn2`` before it. Weights are drawn as torch draws them by default.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.models.classifier import ImageClassifier
from dkl.models.tap_points import Tap, TapPoints, outputs_of

_STEM = 24
_GROUPS_V1 = 3
# Per stage: output channels and number of blocks.
_STAGES_V1 = ((240, 4), (480, 8), (960, 4))
_STAGES_V2 = ((116, 4), (232, 8), (464, 4))


def shuffle_channels(map_NCHW: Tensor, groups: int) -> Tensor:
    """Interleave groups of channels: the first of each group, then the second of each, ...

    Args:
        map_NCHW: [N, C, H, W].
        groups: number of groups; divides C.

    Example:
        >>> shuffle_channels(torch.arange(6).view(1, 6, 1, 1), 2).flatten()
        tensor([0, 3, 1, 4, 2, 5])
    """
    num, channels, height, width = map_NCHW.shape
    grouped = map_NCHW.reshape(num, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(num, channels, height, width)


class GroupedBlock(nn.Module):
    """Grouped 1x1 convolution, shuffle, 3x3 on each channel, grouped 1x1; plus a shortcut, ReLU.

    With stride 2 the shortcut is an average pooling, and its channels follow those of the branch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2; with 1, both numbers of channels are the same.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        branch = out_channels if stride == 1 else out_channels - in_channels
        middle = branch // 4
        # The few channels of the stem are not grouped.
        self.groups = 1 if in_channels == _STEM else _GROUPS_V1
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, branch, 1, groups=_GROUPS_V1, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        hidden = shuffle_channels(F.relu(self.bn1(self.conv1(inputs))), self.groups)
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        branch: Tensor = self.bn3(self.conv3(hidden))
        if self.stride == 1:
            total = branch + inputs
        else:
            pooled = F.avg_pool2d(inputs, 3, stride=2, padding=1)
            total = torch.cat([branch, pooled], dim=1)
        outputs: Tensor = self.relu(total)
        return outputs


class ShuffleNetV1(ImageClassifier):
    """A 1x1 stem, three stages of grouped blocks of which the first has stride 2, linear layer.

    Use ``shufflenet_v1`` to build it.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels, _STAGES_V1[-1][0])
        self.conv1 = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        channels = _STEM
        for index, (width, number) in enumerate(_STAGES_V1, start=1):
            rest = [GroupedBlock(width, width, stride=1) for _ in range(number - 1)]
            stage = nn.Sequential(GroupedBlock(channels, width, stride=2), *rest)
            self.add_module(f"layer{index}", stage)
            channels = width
        self.linear = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.linear

    def tap_points(self) -> TapPoints:
        """Return the stem after its ReLU, and every stage after and before its last ReLU."""
        last = [f"layer{k}.{number - 1}" for k, (_, number) in enumerate(_STAGES_V1, start=1)]
        return TapPoints(
            outputs_of("relu", "layer1", "layer2", "layer3"),
            "linear",
            (Tap("relu"), *(Tap(f"{block}.relu", "input") for block in last)),
            (None, *(f"{block}.bn3" for block in last)),
        )

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, 960, ceil(H / 8), ceil(W / 8)] after its ReLU."""
        features: Tensor = self.relu(self.bn1(self.conv1(images_NCHW)))
        for stage in ("layer1", "layer2", "layer3"):
            features = getattr(self, stage)(features)
        return features


def shufflenet_v1(num_classes: int, in_channels: int = 3) -> ShuffleNetV1:
    """Build the ShuffleNet of three groups for small images (0.95 million parameters).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> sum(p.numel() for p in shufflenet_v1(100).parameters())
        949258
    """
    return ShuffleNetV1(num_classes, in_channels)


class DownBlock(nn.Module):
    """Two branches that halve height and width, each half of the output's channels, shuffled.

    Left: 3x3 on each channel, then 1x1. Right: 1x1, 3x3 on each channel, 1x1.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; even.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / 2), ceil(W / 2)]."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(inputs)))))
        right = F.relu(self.bn3(self.conv3(inputs)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle_channels(torch.cat([left, right], dim=1), groups=2)


class SplitBlock(nn.Module):
    """Half of the channels as they are, half through 1x1, 3x3 on each channel and 1x1; shuffled.

    Args:
        channels: channels of input and output; even. The input is not negative, as the outputs of
            these blocks are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, channels, H, W] to the same shape."""
        kept, changed = inputs.chunk(2, dim=1)
        changed = F.relu(self.bn1(self.conv1(changed)))
        changed = self.bn3(self.conv3(self.bn2(self.conv2(changed))))
        # The kept half is not negative, so ReLU leaves it as it is; the input of ReLU is what the
        # literature calls the pre-activation of the block.
        joined: Tensor = self.relu(torch.cat([kept, changed], dim=1))
        return shuffle_channels(joined, groups=2)


class ShuffleNetV2(ImageClassifier):
    """A 1x1 stem, three stages that begin with a ``DownBlock``, a 1x1 convolution, linear layer.

    Use ``shufflenet_v2`` to build it.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels, 1024)
        self.conv1 = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        channels = _STEM
        for index, (width, number) in enumerate(_STAGES_V2, start=1):
            rest = [SplitBlock(width) for _ in range(number - 1)]
            self.add_module(f"layer{index}", nn.Sequential(DownBlock(channels, width), *rest))
            channels = width
        self.conv2 = nn.Conv2d(channels, self.num_features, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(self.num_features)
        self.linear = nn.Linear(self.num_features, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.linear

    def tap_points(self) -> TapPoints:
        """Return the stem after its ReLU, and every stage after its shuffle and before its ReLU.

        A pre-activation has its channels in the order before the shuffle, as the literature has it.
        Only its second half comes straight from a batch-norm, so no layer is named for it.
        """
        last = [f"layer{k}.{number - 1}" for k, (_, number) in enumerate(_STAGES_V2, start=1)]
        return TapPoints(
            outputs_of("relu", "layer1", "layer2", "layer3"),
            "linear",
            (Tap("relu"), *(Tap(f"{block}.relu", "input") for block in last)),
        )

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, 1024, ceil(H / 8), ceil(W / 8)] after its ReLU."""
        features: Tensor = self.relu(self.bn1(self.conv1(images_NCHW)))
        for stage in ("layer1", "layer2", "layer3"):
            features = getattr(self, stage)(features)
        return F.relu(self.bn2(self.conv2(features)))


def shufflenet_v2(num_classes: int, in_channels: int = 3) -> ShuffleNetV2:
    """Build the ShuffleNet version 2 of size 1 for small images (1.4 million parameters).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images; 8x8 and more.

    Returns:
        The network.

    Raises:
        ValueError: a number is not a positive integer.

    Example:
        >>> sum(p.numel() for p in shufflenet_v2(100).parameters())
        1355528
    """
    return ShuffleNetV2(num_classes, in_channels)

"""What every image classifier of this package has in common."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from dkl.models.tap_points import TapPoints

# Of the published CIFAR-100 teachers' images.
_CIFAR_MEAN, _CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def check_positive(name: str, value: int) -> int:
    """Return ``value`` if it is a positive integer.

    Args:
        name: what the number is, for the message.
        value: the number to check.

    Returns:
        The number itself.

    Raises:
        ValueError: it is not an integer or not positive.

    Example:
        >>> check_positive("width", 64)
        64
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def draw_convolutions(model: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 2 / (kernel_size^2 out_channels)).

    He et al. 2015 ("Delving deep into rectifiers"), with the fan-out. Biases are left alone;
    batch-norm layers start at scale 1 and shift 0 by themselves.

    Args:
        model: any model; changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, mean=0.0, std=math.sqrt(2 / fan_out))


class ImageClassifier(nn.Module, ABC):
    """Feature maps, global average pooling and one linear layer.

    It has the attributes and methods by which timm's models are used, and ``tap_points`` for
    ``dkl.models.feature_maps``. Built-in normalisation (see ``dkl.models.normalization``) belongs
    to calling the model: ``forward_features`` called alone takes images that are normalised
    already, as in timm.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        num_features: channels of the last feature map.
    """

    def __init__(self, num_classes: int, in_channels: int, num_features: int) -> None:
        super().__init__()
        self.num_classes = check_positive("num_classes", num_classes)
        self.in_chans = check_positive("in_channels", in_channels)
        self.num_features = check_positive("num_features", num_features)
        self.head_hidden_size = num_features

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm asks a model about its input.

        A model with built-in normalisation takes images in [0, 1], so that its mean is 0 and its
        deviation 1. Without it, images of three channels are taken to be normalised as those of the
        published CIFAR-100 teachers are, and others not to be.
        """
        as_they_are = hasattr(self, "input_mean") or self.in_chans != len(_CIFAR_MEAN)
        return {
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, 32, 32),
            "mean": (0.0,) * self.in_chans if as_they_are else _CIFAR_MEAN,
            "std": (1.0,) * self.in_chans if as_they_are else _CIFAR_STD,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "fixed_input_size": False,
            "classifier": self.tap_points().classifier,
        }

    @abstractmethod
    def tap_points(self) -> TapPoints:
        """Return where the feature maps are: first the stem's, then that of every stage."""

    @abstractmethod
    def get_classifier(self) -> nn.Linear:
        """Return the last layer, whose name differs between families of checkpoints."""

    @abstractmethod
    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return the last feature map [N, num_features, H', W'] after its activation."""

    def forward_head(self, features_NFHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits [N, num_classes], or the pooled features [N, num_features].

        Args:
            features_NFHW: [N, num_features, H', W'], what ``forward_features`` returned.
            pre_logits: True stops before the linear layer.
        """
        pooled_NF = features_NFHW.mean(dim=(2, 3))
        return pooled_NF if pre_logits else self.get_classifier()(pooled_NF)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, in_chans, H, W]."""
        return self.forward_head(self.forward_features(images_NCHW))

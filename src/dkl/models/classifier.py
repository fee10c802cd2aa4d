"""What every image classifier of this package has in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


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


class ImageClassifier(nn.Module, ABC):
    """Feature maps, global average pooling and one linear layer.

    It has the attributes and the three methods by which timm's models are used. Built-in
    normalisation (see ``dkl.models.normalization``) belongs to calling the model:
    ``forward_features`` called alone takes images that are normalised already, as in timm.

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

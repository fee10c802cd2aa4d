"""AutoAugment: torchvision's learned policy, driven by given random numbers.

Legend: B samples, C channels, H height, W width.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dkl.data.draws import Augment, Draw, check_images, draw_rows

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_NUM_DRAWS = 5
_POLICIES = {"cifar10": "CIFAR10"}


def auto_augment(policy: str = "cifar10") -> Augment:
    """Make the augmentation that applies a policy of torchvision's ``AutoAugment`` to each image.

    Source: Cubuk et al. 2019, "AutoAugment: Learning augmentation strategies from data". One of 25
    pairs of operations is chosen per image, and each of the two is applied with its probability and
    a random sign. Pixels that an operation moves in from outside are black.

    Each image is processed alone, as an 8-bit PIL image on the CPU (round(255 x), then / 255), in
    the place of an image of a data set; gradients do not pass. The five random choices of a sample
    come from its own row of ``draw(5)`` and from no global generator: the pair floor(25 u[0]), an
    operation where u[1] (u[2] for the second) is at most its probability, and its negative
    direction where u[3] (u[4]) is below 1/2. So the result does not depend on the batch.

    Args:
        policy: "cifar10".

    Returns:
        A function of (images [B, C, H, W] in [0, 1] with C = 1 or 3, draw) that returns new images
        of the same shape, type and device. On grey images the colour operation changes nothing.

    Raises:
        ValueError: unknown policy; when called: images that are not floats in [0, 1] of that
            shape, or draws of another shape.
        ImportError: torchvision is missing.

    Example:
        >>> augment = auto_augment()
        >>> images = torch.full((1, 1, 2, 2), 0.2)
        >>> numbers = torch.tensor([[0.0, 0.05, 0.9, 0.0, 0.0]])  # the first pair: Invert, Contrast
        >>> augment(images, lambda k: numbers)
        tensor([[[[0.8000, 0.8000],
                  [0.8000, 0.8000]]]])
    """
    if policy not in _POLICIES:
        raise ValueError(f"policy must be one of {', '.join(_POLICIES)}; got {policy!r}.")
    _make_transform(policy, iter(()))  # a missing package is told here, not at the first batch

    def augment(images_BCHW: Tensor, draw: Draw) -> Tensor:
        check_images(images_BCHW)
        bytes_BHWC = _to_bytes(images_BCHW)
        rows_B5 = draw_rows(draw, images_BCHW.shape[0], _NUM_DRAWS).tolist()
        changed_BCHW = torch.from_numpy(_apply(policy, bytes_BHWC, rows_B5)).permute(0, 3, 1, 2)
        on_device = changed_BCHW.to(images_BCHW.device)
        return on_device.to(images_BCHW.dtype, memory_format=torch.contiguous_format) / 255

    return augment


def _to_bytes(images_BCHW: Tensor) -> "Bytes":
    if images_BCHW.shape[1] not in (1, 3):
        raise ValueError(
            f"the policy is defined for images of 1 or 3 channels; got {images_BCHW.shape[1]} in "
            f"{tuple(images_BCHW.shape)}."
        )
    pixels = images_BCHW.detach().cpu().float()
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(
            f"images must lie in [0, 1], without NaN; got values from {float(pixels.min()):.3g} to "
            f"{float(pixels.max()):.3g}. Leave normalisation to the model (its mean and std)."
        )
    scaled = (pixels * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def _apply(policy: str, bytes_BHWC: "Bytes", rows_B5: list[list[float]]) -> "Bytes":
    import numpy as np
    from PIL import Image

    rows = iter(rows_B5)
    transform = _make_transform(policy, rows)
    is_grey = bytes_BHWC.shape[3] == 1
    result_BHWC = np.empty_like(bytes_BHWC)
    for image_HWC, result_HWC in zip(bytes_BHWC, result_BHWC, strict=True):
        image = Image.fromarray(image_HWC[:, :, 0] if is_grey else image_HWC)
        result_HWC[...] = np.asarray(transform(image)).reshape(result_HWC.shape)
    # Should a torchvision stop to ask ``get_params``, its choices would come from elsewhere.
    assert next(rows, None) is None, "torchvision's AutoAugment ignored the given random numbers"
    return result_BHWC


def _make_transform(policy: str, rows: Iterator[list[float]]) -> Any:
    """Return a transform that takes its choices for each image from the next row."""
    try:
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy
    except ImportError as error:
        raise ImportError(
            "AutoAugment needs torchvision; install it by: pip install 'dkl[train]'"
        ) from error

    def next_choices(num_pairs: int) -> tuple[int, tuple[float, float], tuple[int, int]]:
        pair, first, second, first_sign, second_sign = next(rows)
        number = min(int(pair * num_pairs), num_pairs - 1)
        return number, (first, second), (int(first_sign >= 0.5), int(second_sign >= 0.5))

    transform = AutoAugment(AutoAugmentPolicy[_POLICIES[policy]])
    transform.get_params = next_choices
    # The table of magnitudes depends on the image size alone, and costs more than an operation.
    transform._augmentation_space = functools.cache(transform._augmentation_space)
    return transform

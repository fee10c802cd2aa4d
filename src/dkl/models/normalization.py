"""Input normalisation inside a model, so that attacks and evaluation see images in [0, 1].

The mean and standard deviation are buffers of the model itself that are not saved, and a hook
applies them when the model is called. No wrapper is involved: parameter names, attributes and
``state_dict`` stay those of the bare model, and ``to``, ``double``, ``deepcopy`` and
``torch.compile`` treat the model as before. Methods such as ``forward_features`` that are called
directly bypass the hook; give them ``normalize_images(model, images)``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def add_normalization(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], in_channels: int
) -> None:
    """Make ``model(images)`` work on (images - mean) / std, per channel.

    Args:
        model: any model of images [N, in_channels, H, W]; changed in place.
        mean: ``in_channels`` numbers in [0, 1].
        std: ``in_channels`` positive numbers.
        in_channels: channels of the images.

    Raises:
        ValueError: wrong lengths or numbers, or the model normalises already.

    Example:
        >>> model = nn.Flatten()
        >>> add_normalization(model, mean=[0.5], std=[0.25], in_channels=1)
        >>> model(torch.full((1, 1, 1, 2), 0.75))
        tensor([[1., 1.]])
        >>> list(model.state_dict())
        []
    """
    if _normalizes(model):
        raise ValueError("the model has a normalisation already; build a new one to change it")
    mean = _one_per_channel("mean", mean, in_channels)
    std = _one_per_channel("std", std, in_channels)
    if not all(0 <= value <= 1 for value in mean):
        raise ValueError(
            f"mean must lie in [0, 1], as images do, got {mean}; "
            "divide mean and std by 255 if they are for pixels from 0 to 255"
        )
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"std must be positive, got {std}")
    like = next(model.parameters(), torch.empty(0))
    for name, values in (("input_mean", mean), ("input_std", std)):
        # [C, 1, 1] and not [1, C, 1, 1]: a conversion to channels_last must leave it alone.
        buffer_C11 = torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
        model.register_buffer(name, buffer_C11, persistent=False)
    model.register_forward_pre_hook(_normalize_input)


def normalize_images(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Return images as the layers of the model see them.

    Args:
        model: a model with or without built-in normalisation.
        images_NCHW: [N, C, H, W] floats in [0, 1].

    Returns:
        [N, C, H, W]; the images themselves if the model does not normalise.

    Raises:
        ValueError: integer images or another number of channels than the normalisation's.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> normalize_images(nn.Flatten(), images) is images
        True
    """
    # A compiled model hides the hooks of the one that it compiled.
    model = getattr(model, "_orig_mod", model)
    if not _normalizes(model):
        return images_NCHW
    mean_C11, std_C11 = model.get_buffer("input_mean"), model.get_buffer("input_std")
    if not images_NCHW.is_floating_point():
        raise ValueError(
            f"the model normalises images in [0, 1] and needs floats, got {images_NCHW.dtype}; "
            "convert with images.float() / 255"
        )
    # Without this check one channel would broadcast to three.
    if images_NCHW.dim() != 4 or images_NCHW.shape[1] != len(mean_C11):
        raise ValueError(
            f"the model needs images [N, {len(mean_C11)}, H, W], got {list(images_NCHW.shape)}"
        )
    return (images_NCHW - mean_C11) / std_C11


def _one_per_channel(name: str, values: Sequence[float], in_channels: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a list of {in_channels} numbers, got {values!r}"
        ) from None
    if len(numbers) != in_channels:
        raise ValueError(
            f"{name} needs one number for each of the {in_channels} channels, "
            f"got {len(numbers)}: {numbers}"
        )
    return numbers


def _normalizes(model: nn.Module) -> bool:
    return _normalize_input in model._forward_pre_hooks.values()


def _normalize_input(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # A function of the module and not a closure, so that copies and pickles of the model work.
    images_NCHW, *others = inputs
    return (normalize_images(model, images_NCHW), *others)

"""Random numbers for attacks, one row per sample, so that noise can be keyed by sample."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[int], Tensor]
"""``draw(k)`` gives fresh uniform numbers in [0, 1) of shape [N, k], one row per sample."""


def uniform_noise(images: Tensor, draw: Draw | None = None) -> Tensor:
    """Return uniform numbers in [0, 1) in the shape of ``images``, in at least float32.

    Args:
        images: [N, ...]; gives shape, device and precision.
        draw: source of the numbers; None takes torch's global generator.

    Returns:
        The numbers, shape of ``images``.

    Raises:
        ValueError: if ``draw`` does not return one row of numbers per sample.

    Example:
        >>> uniform_noise(torch.zeros(2, 1, 3, 3)).shape
        torch.Size([2, 1, 3, 3])
    """
    return _rows(images, _num_features(images), draw).reshape(images.shape)


def gaussian_noise(images: Tensor, draw: Draw | None = None) -> Tensor:
    """Return standard normal numbers in the shape of ``images``, in at least float32.

    Made from uniform numbers (Box and Muller, 1958), because uniform rows are what ``draw`` gives.

    Args:
        images: [N, ...]; gives shape, device and precision.
        draw: source of the uniform numbers; None takes torch's global generator.

    Returns:
        The numbers, shape of ``images``; always finite.

    Raises:
        ValueError: if ``draw`` does not return one row of numbers per sample.

    Example:
        >>> bool(gaussian_noise(torch.zeros(4, 100)).isfinite().all())
        True
    """
    num_features = _num_features(images)
    num_pairs = (num_features + 1) // 2
    radius_uniform, angle_uniform = _rows(images, 2 * num_pairs, draw).chunk(2, dim=1)
    # log1p(-u) is finite for every u in [0, 1): a draw of exactly 0 is common in large batches.
    radius = torch.sqrt(-2.0 * torch.log1p(-radius_uniform))
    angle = 2.0 * math.pi * angle_uniform
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pairs[:, :num_features].reshape(images.shape)


def uniform_per_sample(images: Tensor, draw: Draw | None = None) -> Tensor:
    """Return one uniform number in [0, 1) per sample, shaped to broadcast over ``images``.

    Args:
        images: [N, ...]; gives shape, device and precision.
        draw: source of the numbers; None takes torch's global generator.

    Returns:
        [N, 1, ...], in at least float32.

    Raises:
        ValueError: if ``draw`` does not return one row of numbers per sample.

    Example:
        >>> uniform_per_sample(torch.zeros(2, 1, 3, 3)).shape
        torch.Size([2, 1, 1, 1])
    """
    return _rows(images, 1, draw).reshape(-1, *[1] * (images.ndim - 1))


def _num_features(images: Tensor) -> int:
    return math.prod(images.shape[1:])


def _rows(images: Tensor, num_columns: int, draw: Draw | None) -> Tensor:
    dtype = torch.promote_types(images.dtype, torch.float32)
    expected = (len(images), num_columns)
    if draw is None:
        return torch.rand(expected, device=images.device, dtype=dtype)
    rows = draw(num_columns)
    if tuple(rows.shape) != expected:
        raise ValueError(
            f"draw({num_columns}) has to return one row per image, shape {expected}; "
            f"it returned shape {tuple(rows.shape)}. Make the draw for this batch."
        )
    return rows.to(images.device, dtype)

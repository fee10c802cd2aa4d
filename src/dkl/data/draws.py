"""What the augmentations of whole batches share: their types, checks, and boxes.

Legend: B samples, H height, W width, K random numbers of one sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[int], Tensor]
"""``draw(k)`` gives fresh uniform numbers in [0, 1) of shape [B, k], one row per sample."""

Augment = Callable[[Tensor, Draw], Tensor]
"""Takes images [B, C, H, W] of floats in [0, 1] and a ``Draw``; returns images of that shape."""


def check_images(images: Tensor) -> None:
    """Refuse anything but a batch of float images.

    Raises:
        ValueError: ``images`` are not floats of four dimensions.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floats in [0, 1] of shape [B, C, H, W]; got {images.dtype} of shape "
            f"{tuple(images.shape)}. Turn uint8 into images.float() / 255."
        )


def draw_rows(draw: Draw, num_images: int, num_draws: int) -> Tensor:
    """Draw one row of numbers for each image.

    Returns:
        uniform [B, K] in [0, 1).

    Raises:
        ValueError: the draw gave another shape.
    """
    uniform_BK = draw(num_draws)
    if tuple(uniform_BK.shape) != (num_images, num_draws):
        raise ValueError(
            f"draw({num_draws}) must give one row for each of the {num_images} images, "
            f"[{num_images}, {num_draws}]; got {tuple(uniform_BK.shape)}."
        )
    return uniform_BK


def pick(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Turn uniform numbers into integers: floor(u count), each of 0 to count - 1 equally likely.

    Example:
        >>> pick(torch.tensor([0.0, 0.49, 0.5, 0.99]), 2)
        tensor([0, 0, 1, 1])
    """
    # Rounding may give ``count`` itself for numbers next to 1.
    return (uniform * count).long().clamp(max=count - 1)


def box_mask(
    centre_row_B: Tensor,
    centre_column_B: Tensor,
    box_height_B: Tensor,
    box_width_B: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Mark one box in each image, clipped at the borders.

    A box of h rows around row r covers rows r - floor(h / 2) to r - floor(h / 2) + h - 1; columns
    likewise.

    Args:
        centre_row_B: [B] int64.
        centre_column_B: [B] int64.
        box_height_B: [B] int64, rows before clipping, from 0.
        box_width_B: [B] int64, columns before clipping, from 0.
        height: of the images.
        width: of the images.

    Returns:
        [B, H, W] bool, True inside.

    Example:
        >>> one, two = torch.tensor([1]), torch.tensor([2])
        >>> box_mask(one, 2 * one, two, two, height=2, width=4).int()
        tensor([[[0, 1, 1, 0], [0, 1, 1, 0]]], dtype=torch.int32)
    """
    inside_BH = _within(centre_row_B, box_height_B, height)
    inside_BW = _within(centre_column_B, box_width_B, width)
    return inside_BH[:, :, None] & inside_BW[:, None, :]


def _within(centre_B: Tensor, length_B: Tensor, size: int) -> Tensor:
    positions_L = torch.arange(size, device=centre_B.device)
    first_B1 = (centre_B - length_B // 2)[:, None]
    return (positions_L >= first_B1) & (positions_L < first_B1 + length_B[:, None])

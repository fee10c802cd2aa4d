"""Augmentation of whole batches on the images' device, driven by given random numbers.

Legend: B samples, C channels, H height, W width.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[int], Tensor]
"""``draw(k)`` gives fresh uniform numbers in [0, 1) of shape [B, k], one row per sample."""

Augment = Callable[[Tensor, Draw], Tensor]
"""Takes images [B, C, H, W] of floats in [0, 1] and a ``Draw``; returns images of that shape."""


def basic_augment(
    padding: int = 4,
    padding_mode: Literal["zeros", "reflect"] = "zeros",
    flip: bool = True,
) -> Augment:
    """Make the usual augmentation: pad, crop at a random place, mirror every second image.

    Pixels are moved, never interpolated. One row u of three numbers (two without ``flip``, one
    without ``padding``) decides about a sample: the crop starts at row floor(u[0] (2 padding + 1))
    and column floor(u[1] (2 padding + 1)) of the padded image, and is mirrored where the last
    number is below 1/2. What a sample becomes depends on its own row alone, not on its batch.

    Args:
        padding: pixels added on each side, from 0.
        padding_mode: "zeros" (black) or "reflect" (mirrored about the edge pixel; needs
            padding < H and padding < W).
        flip: whether to mirror; turn it off where left and right differ in meaning (digits).

    Returns:
        A function of (images [B, C, H, W], draw) that returns new images of the same shape, type
        and device; with neither padding nor flip, the images themselves.

    Raises:
        ValueError: negative padding or unknown mode; when called: images that are not floats of
            four dimensions, draws of another shape, or too small for reflection.

    Example:
        >>> images = torch.arange(4.0).reshape(1, 1, 1, 4) / 4
        >>> augment = basic_augment(padding=1, flip=True)
        >>> augment(images, lambda k: torch.tensor([[0.5, 0.0, 0.9]]))  # one to the right
        tensor([[[[0.0000, 0.0000, 0.2500, 0.5000]]]])
        >>> augment(images, lambda k: torch.tensor([[0.5, 0.0, 0.1]]))  # and mirrored
        tensor([[[[0.5000, 0.2500, 0.0000, 0.0000]]]])
    """
    if padding < 0:
        raise ValueError(f"padding must be 0 or more pixels; got {padding}.")
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"padding_mode must be 'zeros' or 'reflect'; got {padding_mode!r}.")
    num_draws = (2 if padding else 0) + (1 if flip else 0)

    def augment(images_BCHW: Tensor, draw: Draw) -> Tensor:
        _check_images(images_BCHW, padding if padding_mode == "reflect" else 0)
        if num_draws == 0:
            return images_BCHW
        uniform_BK = draw(num_draws)
        if tuple(uniform_BK.shape) != (images_BCHW.shape[0], num_draws):
            raise ValueError(
                f"draw({num_draws}) must give one row for each of the {images_BCHW.shape[0]} "
                f"images, [{images_BCHW.shape[0]}, {num_draws}]; got {tuple(uniform_BK.shape)}."
            )
        mode = "constant" if padding_mode == "zeros" else "reflect"
        padded_BCHW = F.pad(images_BCHW, (padding,) * 4, mode=mode)
        return _window(padded_BCHW, uniform_BK, padding, flip)

    return augment


def _window(padded_BCHW: Tensor, uniform_BK: Tensor, padding: int, flip: bool) -> Tensor:
    """Gather each sample's crop, mirrored or not, by one index per pixel."""
    batch, channels, padded_height, padded_width = padded_BCHW.shape
    height, width = padded_height - 2 * padding, padded_width - 2 * padding
    device = padded_BCHW.device
    rows_BH = torch.arange(height, device=device).expand(batch, height)
    columns_BW = torch.arange(width, device=device).expand(batch, width)
    if flip:
        mirrored_B1 = uniform_BK[:, -1:] < 0.5
        columns_BW = torch.where(mirrored_B1, columns_BW.flip(1), columns_BW)
    if padding:
        # Rounding may give 2 padding + 1 itself for numbers next to 1.
        offsets_B2 = (uniform_BK[:, :2] * (2 * padding + 1)).long().clamp(max=2 * padding)
        rows_BH = rows_BH + offsets_B2[:, :1]
        columns_BW = columns_BW + offsets_B2[:, 1:]
    positions_BP = (rows_BH[:, :, None] * padded_width + columns_BW[:, None, :]).flatten(1)
    index_BCP = positions_BP[:, None].expand(batch, channels, height * width)
    pixels_BCP = padded_BCHW.flatten(2).gather(2, index_BCP)
    return pixels_BCP.reshape(batch, channels, height, width)


def _check_images(images: Tensor, reflected: int) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floats in [0, 1] of shape [B, C, H, W]; got {images.dtype} of shape "
            f"{tuple(images.shape)}. Turn uint8 into images.float() / 255."
        )
    if reflected >= min(images.shape[2:]) and reflected > 0:
        raise ValueError(
            f"reflection by {reflected} pixels needs images larger than that; got "
            f"{images.shape[2]}x{images.shape[3]}. Use a smaller padding or padding_mode='zeros'."
        )

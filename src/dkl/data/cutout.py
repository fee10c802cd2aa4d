"""Cutout: a square of every image is blackened.

Legend: B samples, C channels, H height, W width.
"""

import torch
from torch import Tensor

from dkl.data.draws import Augment, Draw, box_mask, check_images, draw_rows, pick


def cutout(size: int) -> Augment:
    """Make the augmentation that sets a square of every image to zero.

    Source: DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with
    Cutout". The square's centre is uniform over the pixels, so that part of the square may lie
    outside: row floor(u[0] H) and column floor(u[1] W) for the sample's two numbers u. A square of
    side s around row r covers rows r - floor(s / 2) to r - floor(s / 2) + s - 1.

    Args:
        size: side of the square in pixels, from 1.

    Returns:
        A function of (images [B, C, H, W], draw) that returns new images of the same shape, type
        and device.

    Raises:
        ValueError: a size below 1; when called: images that are not floats of four dimensions, or
            draws of another shape.

    Example:
        >>> augment = cutout(size=2)
        >>> augment(torch.ones(1, 1, 2, 4), lambda k: torch.tensor([[0.5, 0.5]]))
        tensor([[[[1., 0., 0., 1.],
                  [1., 0., 0., 1.]]]])
    """
    if size < 1:
        raise ValueError(
            f"size must be 1 or more pixels, the side of the square; got {size}. "
            f"To cut nothing out, leave cutout away."
        )

    def augment(images_BCHW: Tensor, draw: Draw) -> Tensor:
        check_images(images_BCHW)
        batch, _, height, width = images_BCHW.shape
        uniform_B2 = draw_rows(draw, batch, 2)
        side_B = torch.full((batch,), size, device=uniform_B2.device)
        cut_BHW = box_mask(
            pick(uniform_B2[:, 0], height),
            pick(uniform_B2[:, 1], width),
            side_B,
            side_B,
            height,
            width,
        )
        return images_BCHW.masked_fill(cut_BHW[:, None], 0.0)

    return augment

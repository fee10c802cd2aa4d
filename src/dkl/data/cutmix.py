"""CutMix: a box of every image is replaced by the same box of another image.

Legend: B samples, C channels, H height, W width.
"""

import torch
from torch import Tensor

from dkl.data.draws import Draw, box_mask, check_images, draw_rows, pick


def cutmix(
    images_BCHW: Tensor,
    partners_BCHW: Tensor,
    draw: Draw,
    *,
    alpha: float = 1.0,
    probability: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Put a box of each partner image into its image.

    Source: Yun et al. 2019, "CutMix", section 3.1: lambda ~ Beta(alpha, alpha); the box has
    H sqrt(1 - lambda) rows and W sqrt(1 - lambda) columns (rounded down), its centre is uniform
    over the pixels, and it is clipped at the borders. The label becomes
    s y + (1 - s) y_partner, where s is the share of own pixels that clipping leaves. A sample takes
    four numbers of ``draw``: for lambda, the centre's row and column, and whether to mix.

    Args:
        images_BCHW: floats.
        partners_BCHW: what is put in; same shape, type and device.
        draw: uniform random numbers of the samples.
        alpha: 1, where lambda is uniform; other values would need a random number of a Beta
            distribution as a function of uniform ones, and are refused.
        probability: share of the samples that are mixed at all, 0 to 1.

    Returns:
        (mixed [B, C, H, W] of the images' type, s [B] float32, or float64 for float64 images): s is
        exactly the share of pixels that come from ``images_BCHW``.

    Raises:
        ValueError: alpha is not 1, probability outside [0, 1], or tensors that do not fit.

    Example:
        >>> own, other = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> mixed, share = cutmix(own, other, lambda k: torch.tensor([[0.75, 0.5, 0.0, 0.0]]))
        >>> mixed.flatten(), share  # lambda = 0.75: a box of 1 x 1 pixels
        (tensor([0., 0., 1., 0.]), tensor([0.7500]))
    """
    check_pair(images_BCHW, partners_BCHW)
    _check(alpha, probability)
    uniform_B4 = draw_rows(draw, len(images_BCHW), 4).to(images_BCHW.device)
    is_mixed_B = uniform_B4[:, 3] < probability
    boxes_BHW = cutmix_boxes(images_BCHW, uniform_B4[:, :3])
    return paste(images_BCHW, partners_BCHW, boxes_BHW & is_mixed_B[:, None, None])


def cutmix_boxes(images_BCHW: Tensor, uniform_B3: Tensor) -> Tensor:
    """Mark the box of each image.

    Args:
        images_BCHW: for their size.
        uniform_B3: numbers for lambda and the centre's row and column.

    Returns:
        [B, H, W] bool, True inside.
    """
    height, width = images_BCHW.shape[2:]
    # double: the square root of a half-precision number would round the box's side.
    side_B = (1 - uniform_B3[:, 0].double()).sqrt()
    return box_mask(
        pick(uniform_B3[:, 1], height),
        pick(uniform_B3[:, 2], width),
        (side_B * height).long(),
        (side_B * width).long(),
        height,
        width,
    )


def paste(images_BCHW: Tensor, partners_BCHW: Tensor, theirs_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Take the marked pixels from the partners.

    Returns:
        (mixed [B, C, H, W], share of own pixels [B] float32, or float64 for float64 images).
    """
    mixed_BCHW = torch.where(theirs_BHW[:, None], partners_BCHW, images_BCHW)
    share_type = torch.float64 if images_BCHW.dtype == torch.float64 else torch.float32
    theirs_B = theirs_BHW.flatten(1).sum(1).to(share_type)
    height, width = images_BCHW.shape[2:]
    return mixed_BCHW, 1 - theirs_B / (height * width)


def check_pair(images: Tensor, partners: Tensor) -> None:
    """Refuse anything but two batches of float images of one shape and type.

    Raises:
        ValueError: they do not fit.
    """
    check_images(images)
    if partners.shape != images.shape or partners.dtype != images.dtype:
        raise ValueError(
            f"partners must have the shape and type of images, {tuple(images.shape)} "
            f"{images.dtype}; got {tuple(partners.shape)} {partners.dtype}."
        )


def _check(alpha: float, probability: float) -> None:
    if alpha != 1:
        raise ValueError(
            f"alpha must be 1 (lambda uniform in [0, 1)), the value of the CutMix paper; got "
            f"{alpha}. Other Beta distributions are not available."
        )
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in 0 to 1; got {probability}.")

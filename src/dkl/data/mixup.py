"""mixup: every image becomes a weighted mean of itself and another image; or that or CutMix.

Legend: B samples, C channels, H height, W width.
"""

import torch
from torch import Tensor

from dkl.data.cutmix import check_pair, cutmix_boxes, paste
from dkl.data.draws import Draw, draw_rows

_PAIRS = 16  # of uniform numbers drawn at a time; nearly always enough for all samples
_MAX_ROUNDS = 64


def mixup(
    images_BCHW: Tensor,
    partners_BCHW: Tensor,
    draw: Draw,
    *,
    alpha: float = 1.0,
    probability: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Blend each image with its partner.

    x := lambda x + (1 - lambda) x_partner and y := lambda y + (1 - lambda) y_partner with
    lambda ~ Beta(alpha, alpha) for each sample. Source: Zhang et al. 2018, "mixup", section 2.

    Args:
        images_BCHW: floats.
        partners_BCHW: same shape, type and device.
        draw: uniform random numbers of the samples.
        alpha: in (0, 1]; small values mix most samples little.
        probability: share of the samples that are mixed at all, 0 to 1.

    Returns:
        (mixed [B, C, H, W] of the images' type, lambda [B] float32, or float64 for float64 images);
        lambda is 1 where nothing is mixed.

    Raises:
        ValueError: a number out of its range, or tensors that do not fit.

    Example:
        >>> own, other = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
        >>> mixed, share = mixup(own, other, lambda k: torch.full((1, k), 0.25))
        >>> mixed.flatten(), share  # two equal draws: lambda = 1/2
        (tensor([0.5000, 0.5000]), tensor([0.5000]))
    """
    return mixup_or_cutmix(
        images_BCHW,
        partners_BCHW,
        draw,
        mixup_probability=probability,
        cutmix_probability=0.0,
        alpha=alpha,
    )


def mixup_or_cutmix(
    images_BCHW: Tensor,
    partners_BCHW: Tensor,
    draw: Draw,
    *,
    mixup_probability: float = 0.5,
    cutmix_probability: float = 0.5,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner by mixup or by CutMix, chosen for each image.

    Half and half is timm's setting for the long recipes of ImageNet ("ResNet strikes back",
    Wightman et al. 2021), which chooses for a whole batch and draws one lambda for it; here a
    sample's choice and lambda are its own, so that batches may be split.

    Args:
        images_BCHW: floats.
        partners_BCHW: same shape, type and device.
        draw: uniform random numbers of the samples.
        mixup_probability: share of the samples that are blended, see ``mixup``.
        cutmix_probability: share of the samples that get a box, see ``cutmix``; with the other at
            most 1, and the rest stays as it is.
        alpha: of mixup's Beta distribution, in (0, 1]; CutMix has 1.

    Returns:
        (mixed [B, C, H, W] of the images' type, share of the own label [B] float32, or float64 for
        float64 images).

    Raises:
        ValueError: a number out of its range, or tensors that do not fit.

    Example:
        >>> own, other = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> draw = lambda k: torch.full((1, k), 0.75 if k < 4 else 0.25)
        >>> mixed, share = mixup_or_cutmix(own, other, draw)
        >>> mixed.flatten(), share  # the draw 0.75 chooses CutMix, and a box of one pixel
        (tensor([0., 0., 0., 1.]), tensor([0.7500]))
    """
    check_pair(images_BCHW, partners_BCHW)
    _check(mixup_probability, cutmix_probability, alpha)
    batch = len(images_BCHW)
    device = images_BCHW.device
    choice_B = draw_rows(draw, batch, 1)[:, 0].to(device)
    is_blended_B = choice_B < mixup_probability
    is_cut_B = ~is_blended_B & (choice_B < mixup_probability + cutmix_probability)
    boxes_BHW = cutmix_boxes(images_BCHW, draw_rows(draw, batch, 3).to(device))
    cut_BCHW, share_B = paste(images_BCHW, partners_BCHW, boxes_BHW & is_cut_B[:, None, None])
    # Last, because how many numbers are drawn depends on the whole batch.
    lambda_B = _beta(draw, batch, alpha).to(device, share_B.dtype)
    share_B = torch.where(is_blended_B, lambda_B, share_B)
    weight_B111 = share_B[:, None, None, None].to(images_BCHW.dtype)
    blended_BCHW = torch.lerp(partners_BCHW, images_BCHW, weight_B111)
    return torch.where(is_blended_B[:, None, None, None], blended_BCHW, cut_BCHW), share_B


def _beta(draw: Draw, num_samples: int, alpha: float) -> Tensor:
    """Draw from Beta(alpha, alpha), alpha in (0, 1], by rejection; exact.

    X = U^(1 / alpha), Y = V^(1 / alpha) with U, V uniform; X / (X + Y) of the first pair with
    X + Y <= 1 has this distribution (Joehnk 1964). In logarithms, where no power underflows.
    """
    value_B = torch.full((num_samples,), torch.nan, dtype=torch.float64)
    for _ in range(_MAX_ROUNDS):
        if not value_B.isnan().any():
            return value_B
        uniform_BK = draw_rows(draw, num_samples, 2 * _PAIRS).double().to(value_B.device)
        # Half a step of the draws' grid, so that zero has a logarithm.
        log_x_BP, log_y_BP = ((uniform_BK + 2.0**-25).log() / alpha).chunk(2, dim=1)
        is_good_BP = torch.logaddexp(log_x_BP, log_y_BP) <= 0
        first_B1 = is_good_BP.int().argmax(1, keepdim=True)
        found_B = (log_x_BP - log_y_BP).gather(1, first_B1)[:, 0].sigmoid()
        is_new_B = value_B.isnan() & is_good_BP.any(1)
        value_B = torch.where(is_new_B, found_B, value_B)
    raise ValueError(
        "draw must give fresh uniform numbers at every call: of "
        f"{_MAX_ROUNDS * _PAIRS} pairs none would do, which has a chance of about 1e-300."
    )


def _check(mixup_probability: float, cutmix_probability: float, alpha: float) -> None:
    both = (mixup_probability, cutmix_probability)
    if not all(0 <= share <= 1 for share in both) or sum(both) > 1 + 1e-9:
        raise ValueError(
            f"the shares of mixup and CutMix must lie in 0 to 1, together too; got {both}."
        )
    if not 0 < alpha <= 1:
        raise ValueError(
            f"alpha must be above 0 and at most 1, mixup's own values; got {alpha}. Larger ones, "
            "which mix nearly all images half and half, are not available."
        )

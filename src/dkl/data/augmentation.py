"""The usual augmentation of whole batches on the images' device, and how several are chained.

Legend: B samples, C channels, H height, W width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.data.auto_augment import auto_augment as apply_policy
from dkl.data.cutout import cutout as cut_square
from dkl.data.draws import Augment, Draw, check_images, draw_rows, pick


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
        uniform_BK = draw_rows(draw, images_BCHW.shape[0], num_draws)
        mode = "constant" if padding_mode == "zeros" else "reflect"
        padded_BCHW = F.pad(images_BCHW, (padding,) * 4, mode=mode)
        return _window(padded_BCHW, uniform_BK, padding, flip)

    return augment


def compose(*augments: Augment) -> Augment:
    """Chain augmentations: each one gets what the one before it returns.

    Each draws from ``draw`` in its turn, so that a sample's result is still a function of its own
    numbers alone.

    Args:
        augments: at least one.

    Returns:
        A function of (images [B, C, H, W], draw) that returns the last one's images.

    Raises:
        ValueError: nothing to chain.

    Example:
        >>> both = compose(lambda images, draw: images / 2, lambda images, draw: 1 - images)
        >>> both(torch.ones(1, 1, 1, 1), lambda k: torch.rand(1, k)).item()
        0.5
    """
    if not augments:
        raise ValueError("compose needs at least one augmentation; got none.")
    if len(augments) == 1:
        return augments[0]

    def augment(images_BCHW: Tensor, draw: Draw) -> Tensor:
        for one in augments:
            images_BCHW = one(images_BCHW, draw)
        return images_BCHW

    return augment


def make_augment(
    *,
    padding: int = 4,
    padding_mode: Literal["zeros", "reflect"] = "zeros",
    flip: bool = True,
    auto_augment: bool = False,
    cutout: int | None = None,
) -> Augment | None:
    """Make the augmentation of a recipe: policy, then crop and mirror, then cutout.

    The order is DAJAT's (Addepalli et al. 2022) for the policy and DeVries and Taylor's (2017) for
    cutout, whose black square is neither moved nor coloured.

    Args:
        padding: of ``basic_augment``.
        padding_mode: of ``basic_augment``.
        flip: of ``basic_augment``.
        auto_augment: whether torchvision's CIFAR-10 policy comes first; see ``auto_augment``.
        cutout: side of a black square in pixels; None for none.

    Returns:
        The augmentation, or None where all of it is turned off.

    Raises:
        ValueError: a setting is out of range.
        ImportError: torchvision is missing and the policy is wanted.

    Example:
        >>> make_augment(padding=0, flip=False) is None
        True
        >>> augment = make_augment(padding=0, flip=False, cutout=9)
        >>> augment(torch.ones(1, 1, 4, 4), lambda k: torch.zeros(1, k)).sum().item()
        0.0
    """
    basic = basic_augment(padding, padding_mode, flip)
    augments = [apply_policy()] if auto_augment else []
    if padding or flip:
        augments.append(basic)
    if cutout is not None:
        augments.append(cut_square(cutout))
    return compose(*augments) if augments else None


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
        offsets_B2 = pick(uniform_BK[:, :2], 2 * padding + 1)
        rows_BH = rows_BH + offsets_B2[:, :1]
        columns_BW = columns_BW + offsets_B2[:, 1:]
    positions_BP = (rows_BH[:, :, None] * padded_width + columns_BW[:, None, :]).flatten(1)
    index_BCP = positions_BP[:, None].expand(batch, channels, height * width)
    pixels_BCP = padded_BCHW.flatten(2).gather(2, index_BCP)
    return pixels_BCP.reshape(batch, channels, height, width)


def _check_images(images: Tensor, reflected: int) -> None:
    check_images(images)
    if reflected >= min(images.shape[2:]) and reflected > 0:
        raise ValueError(
            f"reflection by {reflected} pixels needs images larger than that; got "
            f"{images.shape[2]}x{images.shape[3]}. Use a smaller padding or padding_mode='zeros'."
        )

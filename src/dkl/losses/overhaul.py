"""Loss formulas of the overhaul of feature distillation (OFD): partial distance and margins.

Shapes: B samples, C channels, H x W positions. The method's weight (1e-3 on CIFAR) is its own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dkl.losses.chunks import without_autocast
from dkl.losses.reduction import reduce_rows
from dkl.losses.rows import compute_dtype
from dkl.losses.samples import (
    check_reducing,
    check_stages,
    counted_samples,
    to_one_size,
    to_samples,
)

_RARELY_NEGATIVE = 1e-3
"""A channel that is negative less often has no useful mean of negative values."""


def ofd_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    margins: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the partial squared distance of the overhaul of feature distillation.

    .. math::
        \sum_{l=1}^n 2^{l-n} \sum_k [s_k > \tilde t_k \lor t_k > 0] (s_k - \tilde t_k)^2,
        \quad \tilde t_k = \max(t_k, m_c)

    over all channels and positions k of stage l (Heo et al., "A Comprehensive Overhaul of Feature
    Distillation", ICCV 2019, arXiv 1904.01866): negative responses of the teacher only ask the
    student not to be above the margin m. It is a sum, hence the small weight (1e-3 on CIFAR) that
    methods give it. Of two maps the larger is average-pooled to the smaller.

    Args:
        inputs: the student's maps after its connectors, one [B, C, H, W] per stage, the deepest
            last; get the gradient.
        targets: the teacher's maps before their ReLU, with the same channels; get no gradient.
        margins: [C] per stage, of :func:`ofd_margins`; get no gradient.
        mask: [B] bool; True where a sample counts.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean", so that parts of a batch add up.

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> student, teacher = torch.tensor([-3.0, -1, 1]), torch.tensor([-2.0, -2, 2])
        >>> margin = torch.tensor([-1.5])
        >>> maps = [x.view(1, 1, 1, 3) for x in (student, teacher)]
        >>> ofd_loss(maps[:1], maps[1:], [margin])
        tensor(1.2500)
    """
    check_stages(inputs, targets, equal=False)
    check_reducing(reduction, num_items)
    _check_margins(inputs, targets, margins)
    counted = counted_samples(inputs[0], mask)
    dtype = compute_dtype(*inputs, *targets)
    values_B = inputs[0].new_zeros(inputs[0].shape[0], dtype=dtype)
    with without_autocast(inputs[0].device):
        for depth, (input, target, margin_C) in enumerate(
            zip(inputs, targets, margins, strict=True)
        ):
            student, teacher = to_one_size(
                to_samples(input, dtype, counted), to_samples(target.detach(), dtype, counted)
            )
            wanted = torch.maximum(teacher, margin_C.detach().to(dtype)[:, None, None])
            counts = (student > wanted) | (teacher > 0)
            error = (student - wanted).masked_fill(~counts, 0.0)
            stage_weight = 2.0 ** (depth + 1 - len(inputs))
            values_B = values_B + stage_weight * error.square().flatten(1).sum(1)
    return reduce_rows(values_B, reduction, counted, inputs[0].shape[:1], num_items)


def _check_margins(
    inputs: Sequence[Tensor], targets: Sequence[Tensor], margins: Sequence[Tensor]
) -> None:
    channels = [[map.shape[1] for map in maps] for maps in (inputs, targets)]
    if channels[0] != channels[1]:
        raise ValueError(
            "the student's maps need the teacher's channels (connect them by a 1x1 convolution), "
            f"got {channels[0]} and {channels[1]}"
        )
    if [list(margin.shape) for margin in margins] != [[count] for count in channels[1]]:
        raise ValueError(
            f"margins must have one value per channel and stage, {channels[1]}, got shapes "
            f"{[list(margin.shape) for margin in margins]}"
        )


def ofd_margins(weight: Tensor, bias: Tensor) -> Tensor:
    r"""Compute the margins of OFD from the batch norm that makes the teacher's responses.

    .. math:: m = E[x \mid x < 0] = \mu - \sigma \frac{\phi(\mu / \sigma)}{\Phi(-\mu / \sigma)}

    for x normal with mean mu = bias and deviation sigma = abs(weight) (Heo et al., ICCV 2019); a
    channel that is negative with a probability of at most 0.001 gets -3 sigma.

    Args:
        weight: [C] scale of the batch norm.
        bias: [C] shift of the batch norm.

    Returns:
        [C] margins <= 0, without gradient; float32 for half inputs.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Example:
        >>> ofd_margins(torch.tensor([1.0, -2.0, 0.1]), torch.tensor([0.0, 0.0, 2.0]))
        tensor([-0.7979, -1.5958, -0.3000])
    """
    if weight.shape != bias.shape or weight.ndim != 1 or not weight.is_floating_point():
        raise ValueError(
            "weight and bias must be those of a batch norm, floating-point [C], got "
            f"{weight.dtype} {list(weight.shape)} and {list(bias.shape)}"
        )
    dtype = compute_dtype(weight, bias)
    sigma_C, mean_C = weight.detach().to(dtype).abs(), bias.detach().to(dtype)
    ratio_C = mean_C / sigma_C.clamp(min=torch.finfo(dtype).tiny)
    log_density_C = -0.5 * ratio_C.square() - 0.5 * math.log(2 * math.pi)
    log_negative_C = torch.special.log_ndtr(-ratio_C)
    margin_C = mean_C - sigma_C * (log_density_C - log_negative_C).exp()
    return torch.where(log_negative_C <= math.log(_RARELY_NEGATIVE), -3.0 * sigma_C, margin_C)

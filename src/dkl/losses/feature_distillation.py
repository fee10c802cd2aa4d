"""Loss formulas of distillation methods that compare features: AT, FitNet, ReviewKD, VID.

Shapes: B samples, C channels, H x W positions. Every value is first one of a sample. Layers that
adapt the student's features, and the published weights of the losses (AT 1000, FitNet 100), belong
to the methods.
"""

from collections.abc import Sequence

from torch import Tensor

from dkl.losses.chunks import without_autocast
from dkl.losses.reduction import reduce_rows
from dkl.losses.rows import compute_dtype
from dkl.losses.samples import (
    average_pool,
    check_features,
    check_reducing,
    check_stages,
    counted_samples,
    to_one_size,
    to_samples,
    unit_vectors,
)

_POOLED_SIZES = (4, 2, 1)
"""Of ReviewKD's pyramid, below the full resolution."""


def attention_transfer_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the loss of attention transfer between maps of student and teacher.

    .. math::
        \sum_l \frac{1}{H_l W_l} \| \hat A(s_l) - \hat A(t_l) \|^2,
        \quad A(f) = \frac1C \sum_c f_c^2, \quad \hat A = A / \|A\|_2

    (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928, with squares and, as in the distillation
    tables, the mean over positions). Of two maps the larger is average-pooled to the smaller.

    Args:
        inputs: the student's maps, one [B, C, H, W] per stage; get the gradient.
        targets: the teacher's; channels and sizes may differ; get no gradient.
        mask: [B] bool; True where a sample counts.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean", so that parts of a batch add up.

    Returns:
        The sum over stages; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2)
        >>> student[0, 0, 0, 0], teacher[0, :, 1, 1] = 5.0, 1.0
        >>> attention_transfer_loss([student], [teacher])
        tensor(0.5000)
    """
    check_stages(inputs, targets, equal=False)
    check_reducing(reduction, num_items)
    counted = counted_samples(inputs[0], mask)
    dtype = compute_dtype(*inputs, *targets)
    values_B = inputs[0].new_zeros(inputs[0].shape[0], dtype=dtype)
    with without_autocast(inputs[0].device):
        for input, target in zip(inputs, targets, strict=True):
            pair = to_one_size(
                to_samples(input, dtype, counted), to_samples(target.detach(), dtype, counted)
            )
            student_BP, teacher_BP = (_attention(map_BCHW) for map_BCHW in pair)
            values_B = values_B + (student_BP - teacher_BP).square().mean(1)
    return reduce_rows(values_B, reduction, counted, inputs[0].shape[:1], num_items)


def _attention(map_BCHW: Tensor) -> Tensor:
    return unit_vectors(map_BCHW.square().mean(1).flatten(1))


def hint_loss(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute FitNet's loss: the mean squared error between features.

    .. math:: \frac1n \sum_k (s_k - t_k)^2

    over the n features of a sample (Romero et al., ICLR 2015, arXiv 1412.6550).

    Args:
        input: [B, ...] features of the student after its regressor; gets the gradient.
        target: features of the teacher, of input's shape; gets no gradient.
        mask: [B] bool; True where a sample counts.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean", so that parts of a batch add up.

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> hint_loss(torch.zeros(2, 8, 4, 4), torch.full((2, 8, 4, 4), 3.0))
        tensor(9.)
    """
    check_features(input, target, equal=True)
    check_reducing(reduction, num_items)
    counted = counted_samples(input, mask)
    dtype = compute_dtype(input, target)
    student, teacher = (to_samples(x, dtype, counted) for x in (input, target.detach()))
    values_B = _mean_square(student - teacher)
    return reduce_rows(values_B, reduction, counted, input.shape[:1], num_items)


def _mean_square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(1)


def hcl_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute ReviewKD's hierarchical context loss: squared errors on a pyramid of averages.

    .. math::
        \sum_l \frac{\sum_{i \ge 0} 2^{-i} \, mse(pool_i(s_l), pool_i(t_l))}{\sum_i 2^{-i}}

    where pool_0 is the full resolution, followed by those of the sizes 4, 2 and 1 that are smaller
    (Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044). A side
    that is shorter than a size keeps its length.

    Args:
        inputs: the student's fused maps, one [B, C, H, W] per stage; get the gradient.
        targets: the teacher's, of the same shapes; get no gradient.
        mask: [B] bool; True where a sample counts.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean", so that parts of a batch add up.

    Returns:
        The sum over stages; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 2, 2)
        >>> hcl_loss([checkers], [torch.zeros(1, 1, 2, 2)])
        tensor(0.6667)
    """
    check_stages(inputs, targets, equal=True)
    check_reducing(reduction, num_items)
    counted = counted_samples(inputs[0], mask)
    dtype = compute_dtype(*inputs, *targets)
    values_B = inputs[0].new_zeros(inputs[0].shape[0], dtype=dtype)
    with without_autocast(inputs[0].device):
        for input, target in zip(inputs, targets, strict=True):
            # Averages are linear: of the difference, one is enough.
            difference = to_samples(input, dtype, counted) - to_samples(
                target.detach(), dtype, counted
            )
            values_B = values_B + _pyramid(difference)
    return reduce_rows(values_B, reduction, counted, inputs[0].shape[:1], num_items)


def _pyramid(difference_BCHW: Tensor) -> Tensor:
    height, width = difference_BCHW.shape[2:]
    values_B = _mean_square(difference_BCHW)
    weight = total = 1.0
    for size in _POOLED_SIZES:
        if size < max(height, width):
            weight /= 2
            total += weight
            pooled = average_pool(difference_BCHW, min(size, height), min(size, width))
            values_B = values_B + weight * _mean_square(pooled)
    return values_B / total


def vid_loss(
    input: Tensor,
    target: Tensor,
    log_variance: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the loss of variational information distillation.

    .. math:: \frac{1}{C H W} \sum_{c,k} \tfrac12 \Big(\log v_c + (s_{ck} - t_{ck})^2 / v_c\Big)

    the negative log-likelihood of the teacher's features under a normal distribution, without its
    constant (Ahn et al., CVPR 2019, arXiv 1904.05835).

    Args:
        input: [B, C, ...] mean that the student's regressor predicts; gets a gradient.
        target: features of the teacher, of input's shape; gets no gradient.
        log_variance: [C] log v, which gets a gradient; published: v = softplus(rho) + 1e-5 with a
            trained rho, 5 at first.
        mask: [B] bool; True where a sample counts.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean", so that parts of a batch add up.

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> vid_loss(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.zeros(3))
        tensor(0.5000)
    """
    check_features(input, target, equal=True)
    check_reducing(reduction, num_items)
    if log_variance.shape != input.shape[1:2] or not log_variance.is_floating_point():
        raise ValueError(
            f"log_variance must be floating-point with one value per channel, [{input.shape[1]}], "
            f"got {log_variance.dtype} {list(log_variance.shape)}"
        )
    counted = counted_samples(input, mask)
    dtype = compute_dtype(input, target)
    student, teacher = (to_samples(x, dtype, counted) for x in (input, target.detach()))
    log_variance = log_variance.to(dtype).view(-1, *[1] * (input.ndim - 2))
    values = 0.5 * (log_variance + (student - teacher).square() * (-log_variance).exp())
    return reduce_rows(values.flatten(1).mean(1), reduction, counted, input.shape[:1], num_items)

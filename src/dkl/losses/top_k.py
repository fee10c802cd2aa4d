"""The IKL loss against a cached teacher's k most likely classes.

Shapes: N rows (tokens), V classes (the vocabulary), B = k + 1 buckets.
``buckets.py`` has the formula.
"""

from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from dkl.losses.buckets import (
    Buckets,
    blockwise_buckets,
    blockwise_gradient,
    check_teacher,
    rest_logits,
    student_buckets,
    take_teacher,
)
from dkl.losses.chunks import choose_rows
from dkl.losses.decoupled import DecoupledParts, decoupled_kl_loss
from dkl.losses.row_kernel import RowOptions
from dkl.losses.rows import NO_LABEL


class TopKOptions(TypedDict, total=False):
    """Keyword options of :func:`top_k_ikl_loss`, where they are explained."""

    target_tail_log_prob: Tensor | None
    labels: Tensor | None
    ignore_index: int
    mask: Tensor | None
    mse_weight: float
    ce_weight: float
    temperature: float
    weight_temperature: float
    gamma: float
    normalization: str
    break_asymmetry: bool
    reduction: str
    denominator: float | Tensor | None
    num_items: float | Tensor | None
    backend: str


class _StudentBuckets(torch.autograd.Function):
    """``student_buckets`` that saves nothing as large as its input but the input."""

    @staticmethod
    def forward(ctx: Any, input_NV: Tensor, target: Buckets) -> Tensor:
        logits_NB, total_N1 = blockwise_buckets(input_NV, target)
        ctx.save_for_backward(input_NV, total_N1)
        ctx.target = target
        return logits_NB

    @staticmethod
    def backward(ctx: Any, gradient_NB: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "top_k_ikl_loss has a second derivative (create_graph=True) with "
                "backend='reference' only"
            )
        input_NV, total_N1 = ctx.saved_tensors
        return blockwise_gradient(gradient_NB, input_NV, total_N1, ctx.target), None


@overload
def top_k_ikl_loss(
    input: Tensor,
    target_log_probs: Tensor,
    target_indices: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def top_k_ikl_loss(
    input: Tensor,
    target_log_probs: Tensor,
    target_indices: Tensor,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[TopKOptions],
) -> Tensor: ...
def top_k_ikl_loss(
    input: Tensor,
    target_log_probs: Tensor,
    target_indices: Tensor,
    *,
    target_tail_log_prob: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = NO_LABEL,
    mask: Tensor | None = None,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    normalization: str = "rows",
    break_asymmetry: bool = True,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DecoupledParts]:
    r"""Compute the IKL loss against a cached teacher's k most likely classes.

    It is :func:`ikl_loss` (equation 7 of arXiv 2305.13948) over k + 1 buckets: the listed classes
    I, and one for all others. With the cached :math:`l_j = \log softmax(m / T)_j`,

    .. math::
        M = T \Big(l_I, \log\big(1 - \sum_{j \in I} e^{l_j}\big)\Big), \quad
        N = \Big(n_I, T \log \sum_{j \notin I} e^{n_j / T}\Big)

    are the logits of teacher and student. Its terms do not notice a shift of a row, so that the
    log-probabilities do for the raw logits; with k = V it equals ``ikl_loss(input, m,
    temperature=T)``. Weights are softmax(M / weight_temperature) over the buckets. A bucket without
    probability (all classes listed, or a remainder of zero) has no weight.

    The temperature of a softmax cannot be changed once classes are left out: T is the temperature
    that was there when the teacher was cached.

    Args:
        input: [N, V] or [B, T, V] logits of the prediction, *classes last*.
        target_log_probs: [N, k] or [B, T, k] log-probabilities of the teacher at ``temperature``
            over all classes (not over the k); -inf pads a row that lists fewer.
        target_indices: integers of the same shape: the classes, different within a row (not
            checked); anything where padded.
        target_tail_log_prob: [N] or [B, T] logarithm of the rest's probability. Without it, one
            minus the listed; after rounding to half precision that is off by about 1e-3.
        labels: integers [N] or [B, T]; only tell by ``ignore_index`` which rows count.
        ignore_index: rows with this label do not count.
        mask: bool [N] or [B, T]; True where a row counts.
        mse_weight: a >= 0 of the weighted MSE.
        ce_weight: b >= 0 of the soft cross-entropy.
        temperature: T > 0 at which the teacher was cached.
        weight_temperature: > 0, of the weights.
        gamma: power of the weights, >= 0.
        normalization: "rows" or "weights", as in ``decoupled_kl_loss``.
        break_asymmetry: let the weighted MSE reach the input; without it the term has no gradient.
        reduction: "mean" over the rows that count, "sum", or "none": one value per row.
        denominator: as in ``decoupled_kl_loss``.
        num_items: as in ``decoupled_kl_loss``.
        return_parts: also return the two terms without their weights, detached.
        backend: as in ``decoupled_kl_loss``.

    Returns:
        The loss, or with ``return_parts`` the loss and ``DecoupledParts``. Only ``input`` gets
        gradients.

    Raises:
        ValueError: shapes, dtypes, numbers or options that do not fit.

    Example:
        >>> teacher, student = torch.randn(4, 1000), torch.randn(4, 1000, requires_grad=True)
        >>> top = teacher.log_softmax(-1).topk(64)
        >>> loss = top_k_ikl_loss(student, top.values, top.indices)
        >>> loss.backward()
        >>> every = teacher.log_softmax(-1).topk(1000)
        >>> from dkl import ikl_loss
        >>> dense = ikl_loss(student, teacher)
        >>> torch.allclose(top_k_ikl_loss(student, every.values, every.indices), dense)
        True
    """
    if input.ndim < 2 or not input.is_floating_point() or input.shape[-1] == 0:
        raise ValueError(
            "input must be floating-point logits [N, V] or [B, T, V], classes last, got "
            f"{input.dtype} {list(input.shape)}"
        )
    num_classes = input.shape[-1]
    teacher = target_log_probs, target_indices, target_tail_log_prob
    check_teacher(input.shape[:-1], num_classes, *teacher)
    rows = choose_rows("input", input, mask, labels, ignore_index)
    input_NV = rows.take(input)
    options = RowOptions(temperature, weight_temperature, gamma, break_asymmetry)
    target = take_teacher(rows, num_classes, input.dtype, *teacher, options)
    if backend == "reference":
        logits_NB, _ = student_buckets(input_NV, rest_logits(input_NV, target), target)
    else:
        logits_NB = _StudentBuckets.apply(input_NV, target)
    loss, parts = decoupled_kl_loss(
        logits_NB,
        target.logits,
        target.weights,
        mask=rows.counted_N,
        mse_weight=mse_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        normalization=normalization,
        break_asymmetry=break_asymmetry,
        reduction=reduction,
        denominator=denominator,
        num_items=num_items,
        return_parts=True,
        backend=backend,
    )
    loss, mse, ce = (rows.restore(x, reduction) for x in (loss, *parts))
    return (loss, DecoupledParts(mse, ce)) if return_parts else loss

"""Loss formulas of distillation methods that compare logits: DKD and DIST.

Shapes: N rows, C classes, R = C - 1 classes other than the label. KD, reverse KD and JSD are
``kl_loss``, ``reverse_kl_loss`` and ``jsd_loss``. No loss holds a factor T^2 or a warm-up: a method
multiplies them in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.losses.divergences import kl_loss
from dkl.losses.reduction import num_counted, reduce_rows
from dkl.losses.rows import (
    NO_LABEL,
    check_logits,
    check_number,
    compute_dtype,
    counted_rows,
    of_label,
    to_rows,
)
from dkl.losses.samples import check_reducing

# Part of DIST's definition: where two classes are rare, it outweighs the product of their norms.
_CORRELATION_EPSILON = 1e-8
_ROUNDING = 16
"""Values that differ by fewer roundings than this have no variance."""


def dkd_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the loss of decoupled knowledge distillation.

    .. math:: \alpha \, KL(b^t, b^s) + \beta \, KL(\hat p^t, \hat p^s)

    with p = softmax(z / T), b = (p_y, 1 - p_y) for the label y, and p-hat the softmax over the
    other classes alone (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv
    2203.08679). KD is alpha = 1 and, per row, beta = 1 - p^t_y. Published results use alpha 1,
    beta 2 to 8 and T = 4 with the factor T^2 = 16 and a warm-up of 20 epochs: neither is in here.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the student, C >= 2; gets the gradient.
        target: logits of the teacher, of input's shape; gets no gradient.
        labels: integers of input's shape without dim 1; rows with -100 do not count.
        alpha: weight >= 0 of the label against the rest.
        beta: weight >= 0 of the other classes among themselves; with C = 2 their term is zero.
        temperature: T > 0, divides both logits.
        mask: bool, labels' shape; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none" (one value per row).
        num_items: replaces the number of rows in "mean", so that parts of a batch add up.

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes, labels or options that do not fit.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
        >>> round(dkd_loss(student, teacher, torch.tensor([0]), beta=8.0).item(), 4)
        1.6405
    """
    check_logits(input, target)
    check_reducing(reduction, num_items)
    check_number("alpha", alpha)
    check_number("beta", beta)
    check_number("temperature", temperature, positive=True)
    if input.shape[1] < 2:
        raise ValueError(f"dkd_loss needs at least two classes, got logits {list(input.shape)}")
    counted = counted_rows(input, mask, labels, NO_LABEL)
    labels_N = labels.reshape(-1).long()
    if counted is not None:
        labels_N = labels_N.masked_fill(~counted, 0)
    dtype = compute_dtype(input, target)
    student_NC = to_rows(input, dtype, counted) / temperature
    teacher_NC = to_rows(target.detach(), dtype, counted) / temperature
    student_N2, student_NR = _label_and_others(student_NC, labels_N)
    teacher_N2, teacher_NR = _label_and_others(teacher_NC, labels_N)
    values_N = alpha * kl_loss(student_N2, teacher_N2, reduction="none")
    values_N = values_N + beta * kl_loss(student_NR, teacher_NR, reduction="none")
    row_shape = input.shape[:1] + input.shape[2:]
    return reduce_rows(values_N, reduction, counted, row_shape, num_items)


def _label_and_others(logits_NC: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log p_y, log(1 - p_y)) [N, 2] and the log-probabilities of the others [N, R].

    The others are picked, not pushed away by a large number: no logit is too large for that.
    """
    log_p_NC = F.log_softmax(logits_NC, 1)
    label_N = of_label(log_p_NC, labels_N)
    column_R = torch.arange(logits_NC.shape[1] - 1, device=logits_NC.device)
    others_NR = log_p_NC.gather(1, column_R + (column_R >= labels_N[:, None]))
    return torch.stack([label_N, others_NR.logsumexp(1)], 1), others_NR


def dist_loss(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute DIST's loss, which asks for correlated and not for equal predictions.

    .. math::
        \beta \Big(1 - \frac1N \sum_i \rho(q_{i \cdot}, p_{i \cdot})\Big)
        + \gamma \Big(1 - \frac1C \sum_j \rho(q_{\cdot j}, p_{\cdot j})\Big)

    with q = softmax(input / T), p = softmax(target / T) and Pearson's correlation
    rho(a, b) = a'b / (|a| |b| + 1e-8) of centred vectors: between the classes of a row (inter) and
    between the rows of a class (intra) (Huang et al., "Knowledge Distillation from A Stronger
    Teacher", NeurIPS 2022, arXiv 2205.10536). A vector without variance (equal logits, a class of
    probability 0 or 1 everywhere, a batch of one row) has correlation 0 and no gradient. The 1e-8
    is the published one: the loss of equal predictions is zero only as far as it is negligible,
    and classes of very small probability count little. There is no factor T^2 (published: T = 4,
    times 16, on CIFAR).

    The rows that count share the intra term: "none" adds it to every row, so that the mean is the
    loss, and parts of a batch do not add up to the whole.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the student; gets the gradient.
        target: logits of the teacher, of input's shape; gets no gradient.
        beta: weight >= 0 of the inter-class term.
        gamma: weight >= 0 of the intra-class term.
        temperature: T > 0, divides both logits.
        mask: bool, input's shape without dim 1; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none" (one value per row).
        num_items: replaces the number of rows in "mean"; then the intra term of a part of a batch
            weighs as much as its share of the rows.

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[5.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
        >>> round(dist_loss(student, teacher).item(), 4)
        1.3114
    """
    check_logits(input, target)
    check_reducing(reduction, num_items)
    check_number("beta", beta)
    check_number("gamma", gamma)
    check_number("temperature", temperature, positive=True)
    counted = counted_rows(input, mask, None, NO_LABEL)
    dtype = compute_dtype(input, target)
    q_NC = F.softmax(to_rows(input, dtype, counted) / temperature, 1)
    p_NC = F.softmax(to_rows(target.detach(), dtype, counted) / temperature, 1)
    inter_N = 1.0 - _correlation(q_NC, p_NC, 1, None)
    intra = 1.0 - _correlation(q_NC, p_NC, 0, counted).mean()
    values_N = beta * inter_N + gamma * intra
    row_shape = input.shape[:1] + input.shape[2:]
    return reduce_rows(values_N, reduction, counted, row_shape, num_items)


def _correlation(q_NC: Tensor, p_NC: Tensor, dim: int, counted: Tensor | None) -> Tensor:
    """Return Pearson's correlation along a dimension, 0 where one side has no variance."""
    (q_NC, q_length, q_flat), (p_NC, p_length, p_flat) = (
        _centred(values_NC, dim, counted) for values_NC in (q_NC, p_NC)
    )
    correlation = (q_NC * p_NC).sum(dim) / (q_length * p_length + _CORRELATION_EPSILON)
    return correlation.masked_fill(q_flat | p_flat, 0.0)


def _centred(values_NC: Tensor, dim: int, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred vectors, their lengths, and which are zero up to rounding."""
    count: float | Tensor = max(values_NC.shape[dim], 1)
    if counted is not None:
        count = num_counted(values_NC, counted)
        values_NC = values_NC.masked_fill(~counted[:, None], 0.0)
    centred_NC = values_NC - values_NC.sum(dim, keepdim=True) / count
    if counted is not None:
        centred_NC = centred_NC.masked_fill(~counted[:, None], 0.0)
    length = torch.linalg.vector_norm(centred_NC, dim=dim)
    rounding = _ROUNDING * torch.finfo(values_NC.dtype).eps
    return centred_NC, length, length <= rounding * torch.linalg.vector_norm(values_NC, dim=dim)

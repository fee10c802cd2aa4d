"""Loss formulas of adversarial-training methods: MART's, and the views' divergence of DAJAT.

Shapes: N rows, C classes, K views. All arguments are logits, and all arithmetic is in log space:
probabilities that underflow cost precision nowhere and make no NaN.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.losses.reduction import reduce_rows
from dkl.losses.rows import (
    NO_LABEL,
    check_logits,
    check_number,
    check_reduction,
    compute_dtype,
    counted_rows,
    of_label,
    to_rows,
)

# MART's published code adds these constants. The first bounds -log(1 - p) by 9.21, the second
# -log q by 27.63: both change values noticeably where a prediction saturates, so they are kept, and
# with them the other two, which do not show in float32.
_MARGIN_ABOVE_ONE = 1e-4 + 1e-12
_PROBABILITY_FLOOR = 1e-12
_WEIGHT_ABOVE_ONE = 1e-7


def boosted_cross_entropy(
    input: Tensor, labels: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Compute MART's boosted cross-entropy, which also pushes the best wrong class down.

    .. math:: -\log p_y - \log (1 + \epsilon - \max_{k \neq y} p_k), \quad p = softmax(input)

    (equation 8 of Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR 2020), with the epsilon of the published code, 1e-4 + 1e-12: it bounds the
    second term by 9.21.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of adversarial images, C >= 2.
        labels: integers of input's shape without dim 1; rows with -100 do not count.
        mask: bool, likewise; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none" (one value per row).

    Returns:
        The loss; float32 for half inputs. Gradients reach ``input`` through both terms; among equal
        best wrong classes one gets it.

    Raises:
        ValueError: shapes, dtypes, labels or options that do not fit.

    Example:
        >>> round(boosted_cross_entropy(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        1.3861
    """
    labels_N, counted = _checked(input, input, labels, mask, reduction)
    log_q_NC = F.log_softmax(to_rows(input, compute_dtype(input), counted), -1)
    values_N = _boosted_rows(log_q_NC, labels_N)
    return reduce_rows(values_N, reduction, counted, input.shape[:1] + input.shape[2:])


def misclassification_weighted_kl(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute MART's KL divergence, weighted by how wrong the reference prediction is.

    .. math:: (1 - p_y) \sum_k p_k \log (p_k / q_k), \quad p = softmax(target), q = softmax(input)

    (equation 11 of Wang et al., ICLR 2020), with the constants of the published code: the weight is
    1.0000001 - p_y, and q + 1e-12 stands for q, which bounds the divergence by 27.63.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of adversarial images.
        target: logits of the clean images, of input's shape.
        labels: integers of input's shape without dim 1; rows with -100 do not count.
        mask: bool, likewise; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none" (one value per row).

    Returns:
        The loss; float32 for half inputs. Gradients reach ``input`` and ``target``, the latter
        through the weight as well.

    Raises:
        ValueError: shapes, dtypes, labels or options that do not fit.

    Example:
        >>> adversarial, clean = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
        >>> round(misclassification_weighted_kl(adversarial, clean, torch.tensor([0])).item(), 4)
        0.2169
    """
    labels_N, counted = _checked(input, target, labels, mask, reduction)
    dtype = compute_dtype(input, target)
    log_q_NC = F.log_softmax(to_rows(input, dtype, counted), -1)
    log_p_NC = F.log_softmax(to_rows(target, dtype, counted), -1)
    values_N = _weighted_kl_rows(log_q_NC, log_p_NC, labels_N)
    return reduce_rows(values_N, reduction, counted, input.shape[:1] + input.shape[2:])


def mart_loss(
    adversarial: Tensor,
    clean: Tensor,
    labels: Tensor,
    *,
    beta: float = 5.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute MART's loss: boosted cross-entropy plus beta times the weighted KL divergence.

    The sum of :func:`boosted_cross_entropy` (adversarial) and beta times
    :func:`misclassification_weighted_kl` (adversarial, clean): equation 12 of Wang et al., ICLR
    2020, whose lambda is beta, with the constants of the published code.

    Args:
        adversarial: [N, C] or [N, C, d1, ...] logits of adversarial images, C >= 2.
        clean: logits of the clean images, of the same shape.
        labels: integers of that shape without dim 1; rows with -100 do not count.
        beta: >= 0.
        mask: bool, likewise; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none" (one value per row).

    Returns:
        The loss; float32 for half inputs. Gradients reach both logits through every term.

    Raises:
        ValueError: shapes, dtypes, labels or options that do not fit.

    Example:
        >>> adversarial, clean = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
        >>> round(mart_loss(adversarial, clean, torch.tensor([0]), beta=2.0).item(), 4)
        0.6875
    """
    check_number("beta", beta)
    labels_N, counted = _checked(adversarial, clean, labels, mask, reduction)
    dtype = compute_dtype(adversarial, clean)
    log_q_NC = F.log_softmax(to_rows(adversarial, dtype, counted), -1)
    log_p_NC = F.log_softmax(to_rows(clean, dtype, counted), -1)
    values_N = _boosted_rows(log_q_NC, labels_N)
    values_N = values_N + beta * _weighted_kl_rows(log_q_NC, log_p_NC, labels_N)
    row_shape = adversarial.shape[:1] + adversarial.shape[2:]
    return reduce_rows(values_N, reduction, counted, row_shape)


def jensen_shannon_views(
    logits_KBC: Sequence[Tensor], *, mask: Tensor | None = None, reduction: str = "none"
) -> Tensor:
    r"""Compute the Jensen-Shannon divergence of the predictions of several views.

    .. math:: \frac1K \sum_k KL(p_k, \bar p), \quad \bar p = \frac1K \sum_k p_k

    Symmetric in the views and at most log K. Source: the consistency term of DAJAT (Addepalli et
    al., NeurIPS 2022), whose code clamps the mean at 1e-7; here its logarithm comes from the
    logarithms of the parts, and nothing needs a clamp.

    Args:
        logits_KBC: the views' logits, each [B, C] or [B, C, d1, ...], all of one shape; K >= 2.
        mask: bool, their shape without dim 1; True where a row counts.
        reduction: "none" (one value per row), "mean" over the rows that count, or "sum".

    Returns:
        The divergence; float32 for half inputs. Gradients reach all views.

    Raises:
        ValueError: fewer than two views, shapes, dtypes or options that do not fit.

    Example:
        >>> views = [torch.tensor([[50.0, 0.0, 0.0]]).roll(shift, 1) for shift in range(3)]
        >>> jensen_shannon_views(views).exp()
        tensor([3.])
    """
    if len(logits_KBC) < 2:
        raise ValueError(
            f"logits_KBC must hold the logits of two or more views, got {len(logits_KBC)}"
        )
    first = logits_KBC[0]
    for view in logits_KBC:
        check_logits(first, view)
    check_reduction(reduction)
    counted = counted_rows(first, mask, None, NO_LABEL)
    dtype = compute_dtype(*logits_KBC)
    log_p_KNC = torch.stack(
        [F.log_softmax(to_rows(view, dtype, counted), -1) for view in logits_KBC]
    )
    # Relative to the largest, so that the mean of equal views is theirs to the last bit.
    largest_NC = log_p_KNC.detach().amax(0)
    log_mean_NC = largest_NC + (log_p_KNC - largest_NC).exp().mean(0).log()
    values_N = (log_p_KNC.exp() * (log_p_KNC - log_mean_NC)).sum(-1).mean(0)
    return reduce_rows(values_N, reduction, counted, first.shape[:1] + first.shape[2:])


def _checked(
    input: Tensor, target: Tensor, labels: Tensor, mask: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """Return labels [N], 0 where a row does not count, and which rows count."""
    check_logits(input, target)
    check_reduction(reduction)
    num_classes = input.shape[1]
    if num_classes < 2:
        raise ValueError(
            f"a best wrong class needs at least two classes, got logits {list(input.shape)}"
        )
    counted = counted_rows(input, mask, labels, NO_LABEL)
    labels_N = labels.reshape(-1).long()
    if counted is not None:
        labels_N = labels_N.masked_fill(~counted, 0)
    return labels_N, counted


def _boosted_rows(log_q_NC: Tensor, labels_N: Tensor) -> Tensor:
    right_N = of_label(log_q_NC, labels_N)
    wrong_NC = log_q_NC.detach().scatter(1, labels_N[:, None], -math.inf)
    best_wrong_N = log_q_NC.gather(1, wrong_NC.argmax(1, keepdim=True)).squeeze(1)
    # 1 - q without cancellation where q is next to one.
    return -right_N - (_MARGIN_ABOVE_ONE - torch.expm1(best_wrong_N)).log()


def _weighted_kl_rows(log_q_NC: Tensor, log_p_NC: Tensor, labels_N: Tensor) -> Tensor:
    log_floor = log_q_NC.new_tensor(math.log(_PROBABILITY_FLOOR))
    divergence_N = (log_p_NC.exp() * (log_p_NC - torch.logaddexp(log_q_NC, log_floor))).sum(-1)
    return divergence_N * (_WEIGHT_ABOVE_ONE - torch.expm1(of_label(log_p_NC, labels_N)))

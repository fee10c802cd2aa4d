"""KL, reverse KL and Jensen-Shannon divergence between two sets of logits.

Shapes: N rows, C classes. ``input`` is the prediction being trained (q), ``target`` the reference
(p); both are logits, and gradients reach both.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.losses.reduction import reduce_rows
from dkl.losses.rows import (
    NO_LABEL,
    check_logits,
    check_number,
    check_reduction,
    compute_dtype,
    counted_rows,
    to_rows,
)

RowFormula = Callable[[Tensor, Tensor], Tensor]


def _kl_rows(input_NC: Tensor, target_NC: Tensor) -> Tensor:
    log_q_NC, log_p_NC = F.log_softmax(input_NC, -1), F.log_softmax(target_NC, -1)
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(-1)


def _reverse_kl_rows(input_NC: Tensor, target_NC: Tensor) -> Tensor:
    return _kl_rows(target_NC, input_NC)


def _jsd_rows(input_NC: Tensor, target_NC: Tensor) -> Tensor:
    log_q_NC, log_p_NC = F.log_softmax(input_NC, -1), F.log_softmax(target_NC, -1)
    # log(p / m) = log 2 + log sigmoid(log p - log q), which is exactly zero where p = q
    log_ratio_NC = log_p_NC - log_q_NC
    from_p_NC = log_p_NC.exp() * (F.logsigmoid(log_ratio_NC) + math.log(2))
    from_q_NC = log_q_NC.exp() * (F.logsigmoid(-log_ratio_NC) + math.log(2))
    return 0.5 * (from_p_NC + from_q_NC).sum(-1)


def _divergence(
    formula: RowFormula,
    input: Tensor,
    target: Tensor,
    temperature: float,
    mask: Tensor | None,
    reduction: str,
) -> Tensor:
    check_logits(input, target)
    check_reduction(reduction)
    check_number("temperature", temperature, positive=True)
    counted = counted_rows(input, mask, None, NO_LABEL)
    dtype = compute_dtype(input, target)
    input_NC, target_NC = to_rows(input, dtype, counted), to_rows(target, dtype, counted)
    values_N = formula(input_NC / temperature, target_NC / temperature)
    return reduce_rows(values_N, reduction, counted, input.shape[:1] + input.shape[2:])


def kl_loss(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the KL divergence of the prediction from the reference, both given as logits.

    .. math:: \sum_j p_j \log (p_j / q_j), \quad p = softmax(target / T), q = softmax(input / T)

    Unlike ``F.kl_div`` it takes logits on both sides, in the same order, and its "mean" is the mean
    over rows ("batchmean" there). There is no factor T^2: multiply it in where a recipe has it.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction (student, adversarial).
        target: logits of the reference (teacher, clean), of input's shape.
        temperature: T > 0, divides both logits.
        mask: bool, input's shape without dim 1; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none" (one value per row).

    Returns:
        The loss; float32 for half inputs. Gradients reach ``input`` and ``target``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> round(kl_loss(student, teacher).item(), 4)
        0.4338
    """
    return _divergence(_kl_rows, input, target, temperature, mask, reduction)


def reverse_kl_loss(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the KL divergence of the reference from the prediction, both given as logits.

    .. math:: \sum_j q_j \log (q_j / p_j), \quad p = softmax(target / T), q = softmax(input / T)

    Its gradient for ``input`` is that of the weighted MSE with the prediction's own weights.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction.
        target: logits of the reference, of input's shape.
        temperature: T > 0, divides both logits.
        mask: bool, input's shape without dim 1; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none".

    Returns:
        The loss; float32 for half inputs. Gradients reach ``input`` and ``target``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> round(reverse_kl_loss(student, teacher).item(), 4)
        0.3278
    """
    return _divergence(_reverse_kl_rows, input, target, temperature, mask, reduction)


def jsd_loss(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the Jensen-Shannon divergence between prediction and reference.

    .. math:: \tfrac12 KL(p, m) + \tfrac12 KL(q, m), \quad m = (p + q) / 2

    Symmetric, at most log 2, computed in log space throughout.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction.
        target: logits of the reference, of input's shape.
        temperature: T > 0, divides both logits.
        mask: bool, input's shape without dim 1; True where a row counts.
        reduction: "mean" over the rows that count, "sum", or "none".

    Returns:
        The loss; float32 for half inputs. Gradients reach ``input`` and ``target``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> round(jsd_loss(student, teacher).item(), 4)
        0.0895
    """
    return _divergence(_jsd_rows, input, target, temperature, mask, reduction)


class _DivergenceModule(nn.Module):
    """Holds the options of a divergence; subclasses name the function."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_number("temperature", temperature, positive=True)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction = reduction

    def extra_repr(self) -> str:
        """Show the settings in ``repr``."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class KLLoss(_DivergenceModule):
    """Module form of :func:`kl_loss`.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 10)
        >>> KLLoss(temperature=4.0)(logits, logits).item()
        0.0
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence."""
        return kl_loss(
            input, target, temperature=self.temperature, mask=mask, reduction=self.reduction
        )


class ReverseKLLoss(_DivergenceModule):
    """Module form of :func:`reverse_kl_loss`.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 10)
        >>> ReverseKLLoss()(logits, logits).item()
        0.0
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence."""
        return reverse_kl_loss(
            input, target, temperature=self.temperature, mask=mask, reduction=self.reduction
        )


class JSDLoss(_DivergenceModule):
    """Module form of :func:`jsd_loss`.

    Example:
        >>> import torch
        >>> bool(JSDLoss()(torch.randn(4, 10), torch.randn(4, 10)) < 0.6932)
        True
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence."""
        return jsd_loss(
            input, target, temperature=self.temperature, mask=mask, reduction=self.reduction
        )

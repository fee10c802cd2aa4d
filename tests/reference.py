"""The losses written out pair by pair, in float64: the oracle that the tests compare with.

Everything here is deliberately naive: rows that do not count are cut out with a boolean index, and
the weighted MSE is the [N, C, C] sum of its definition. It shares no code with the package.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rows_of(values: Tensor) -> Tensor:
    """Return [N, C, d1, ...] as float64 rows [N', C]."""
    order = [0, *range(2, values.ndim), 1]
    return values.permute(order).reshape(-1, values.shape[1]).double()


def counted_of(
    input: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int
) -> Tensor:
    """Return [N'] bool: which rows count."""
    counted = torch.ones(input.shape[:1] + input.shape[2:], dtype=torch.bool)
    if mask is not None:
        counted = counted & mask
    if labels is not None:
        counted = counted & (labels != ignore_index)
    return counted.reshape(-1)


def pairwise_wmse(input_NC: Tensor, target_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """Return (1/4) sum_jk w_j w_k ((m_j - m_k) - (n_j - n_k))^2 for every row."""
    delta_m_NCC = target_NC[:, :, None] - target_NC[:, None, :]
    delta_n_NCC = input_NC[:, :, None] - input_NC[:, None, :]
    weights_NCC = weights_NC[:, :, None] * weights_NC[:, None, :]
    return 0.25 * (weights_NCC * (delta_m_NCC - delta_n_NCC) ** 2).sum((1, 2))


def decoupled_kl_reference(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = None,
    *,
    class_table: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    normalization: str = "rows",
    break_asymmetry: bool = True,
    detach_weights: bool = True,
    reduction: str = "mean",
    denominator: float | None = None,
    num_items: float | None = None,
) -> Tensor:
    """Return the loss of the public contract, from its definition."""
    counted = counted_of(input, mask, labels, ignore_index)
    n, m = rows_of(input)[counted], rows_of(target)[counted]
    if class_table is not None and labels is not None:
        weights = torch.stack(
            [class_table.double()[y] for y in labels.reshape(-1)[counted].tolist()]
            or [m.new_zeros(m.shape[1])]
        )[: len(m)]
    elif class_probs is not None:
        weights = rows_of(class_probs)[counted]
    else:
        weights = (m / weight_temperature).softmax(1)
    weights = weights**gamma
    if detach_weights:
        weights = weights.detach()

    wmse = pairwise_wmse(n if break_asymmetry else n.detach(), m, weights)
    soft_label = (m.detach() / temperature).softmax(1)
    soft_ce = -(soft_label * (n / temperature).log_softmax(1)).sum(1)

    num_rows = max(len(m), 1) if num_items is None else num_items
    if normalization == "weights":
        if denominator is None:
            denominator = (weights.sum(1) ** 2).sum()
            if denominator == 0:
                denominator = 1.0
        wmse = wmse * num_rows / denominator
    values = mse_weight * wmse + ce_weight * soft_ce
    if reduction == "none":
        whole = values.new_zeros(len(counted)).masked_scatter(counted, values)
        return whole.reshape(input.shape[:1] + input.shape[2:])
    return values.sum() / (num_rows if reduction == "mean" else 1)


def value_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], upstream: float | Tensor = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Return function(*tensors) and the gradient of its (weighted) sum for every tensor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    gradients = torch.autograd.grad((value * upstream).sum(), leaves, materialize_grads=True)
    return value.detach(), list(gradients)


def max_relative_error(ours: Tensor, expected: Tensor) -> float:
    """Return max |ours - expected| / max |expected|: the error in the maximum norm."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().item()
    error = (ours.double() - expected.double()).abs().max().item()
    return error if scale == 0 else error / scale

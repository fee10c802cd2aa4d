"""From per-row values to the loss: mean, sum or none over the rows that count."""

import torch
from torch import Tensor


def num_counted(values_N: Tensor, counted: Tensor | None) -> Tensor:
    """Return how many rows count, as a 0-dim tensor that is at least one."""
    if counted is None:
        return values_N.new_tensor(max(values_N.shape[0], 1))
    return counted.sum().clamp(min=1).to(values_N.dtype)


def keep_counted(values_N: Tensor, counted: Tensor | None) -> Tensor:
    """Return the values with exact zeros where a row does not count."""
    return values_N if counted is None else values_N.masked_fill(~counted, 0.0)


def safe_divisor(divisor: float | Tensor, values: Tensor) -> float | Tensor:
    """Return the divisor in the dtype of the values, or one where it is zero.

    A count or weight sum is zero where nothing counts: the sum above it is zero too, and so is the
    loss then.
    """
    if not isinstance(divisor, Tensor):
        return divisor or 1.0
    divisor = divisor.to(values.dtype)
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def reduce_rows(
    values_N: Tensor,
    reduction: str,
    counted: Tensor | None,
    row_shape: torch.Size,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Return the mean over rows that count (or sum / num_items), their sum, or values per row."""
    if reduction == "none":
        return keep_counted(values_N, counted).reshape(row_shape)
    total = keep_counted(values_N, counted).sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        return total / safe_divisor(num_items, total)
    if counted is None:
        return total / max(values_N.shape[0], 1)
    return total / num_counted(values_N, counted)

"""From user tensors to rows: shape checks, working precision, and which rows count.

Shapes: N rows, C classes; a map [N, C, d1, ...] has one row per position.
"""

import math

import torch
from torch import Tensor

NO_LABEL = -100


def check_logits(input: Tensor, target: Tensor) -> None:
    """Raise ValueError unless both are floating-point logits of one shape, classes in dim 1."""
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor of logits, got {type(value).__name__}")
    if not (input.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            "input and target must both be floating-point logits (target is the reference model's "
            f"logits, neither labels nor probabilities), got {input.dtype} and {target.dtype}"
        )
    if input.shape != target.shape or input.ndim < 2:
        raise ValueError(
            "input and target must have one shape [N, C] or [N, C, d1, ...] with classes in dim 1, "
            f"got input {list(input.shape)} and target {list(target.shape)}; for sequences "
            "[B, T, C] use dkl.losses.dense.sequence_loss"
        )
    if input.shape[1] == 0:
        raise ValueError(f"at least one class is needed in dim 1, got shape {list(input.shape)}")


def check_reduction(reduction: str) -> None:
    """Raise ValueError for anything but mean, sum and none."""
    if reduction not in ("mean", "sum", "none"):
        hint = " (F.kl_div's 'batchmean' is 'mean' here)" if reduction == "batchmean" else ""
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}{hint}")


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Raise ValueError unless value is finite and >= 0 (> 0 when ``positive``)."""
    # Comparisons alone, because torch.compile with dynamic shapes traces them and not isfinite.
    if not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'>' if positive else '>='} 0, got {value}")


def check_divisor(name: str, value: float | Tensor | None) -> None:
    """Raise ValueError unless value is None, finite and >= 0, or a tensor without dimensions."""
    if isinstance(value, Tensor):
        if value.ndim > 0:
            raise ValueError(
                f"{name} must be a number or a tensor without dimensions, as .sum() returns, "
                f"got shape {list(value.shape)}"
            )
    elif value is not None:
        check_number(name, value)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 when any tensor has it, else float32: half precision never does arithmetic."""
    dtypes = [tensor.dtype for tensor in tensors]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def counted_rows(
    input: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int
) -> Tensor | None:
    """Return [N'] bool, True where a row counts, or None when every row does.

    Raises:
        ValueError: mask or labels of a wrong shape or dtype.
    """
    if mask is None and labels is None:
        return None
    row_shape = input.shape[:1] + input.shape[2:]
    if mask is not None and (mask.shape != row_shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool (True = counts) of input's shape without dim 1, {list(row_shape)}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if labels is None and mask is not None:
        return mask.reshape(-1)
    if labels is None:
        return None
    if labels.shape != row_shape or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers of input's shape without dim 1, {list(row_shape)}, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    # long, because in an unsigned type a negative ignore_index would wrap to a valid class
    counted = labels.long() != ignore_index
    return (counted if mask is None else counted & mask).reshape(-1)


def to_rows(
    values: Tensor, dtype: torch.dtype, counted: Tensor | None, fill: float = 0.0
) -> Tensor:
    """Return [N', C] in ``dtype``, ``fill`` (and zero gradients) where a row does not count."""
    rows_NC = values if values.ndim == 2 else values.movedim(1, -1).reshape(-1, values.shape[1])
    rows_NC = rows_NC.to(dtype)
    return fill_uncounted(rows_NC, counted, fill)


def fill_uncounted(rows_NC: Tensor, counted: Tensor | None, fill: float) -> Tensor:
    """Fill rows that do not count, before any arithmetic sees what they hold, even NaN."""
    return rows_NC if counted is None else rows_NC.masked_fill(~counted[:, None], fill)


def of_label(values_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return each row's value at its label, [N].

    Raises:
        ValueError: a label that is no class.
    """
    try:
        return values_NC.gather(1, labels_N[:, None]).squeeze(1)
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"labels must be in [0, {values_NC.shape[1]}), or {NO_LABEL} where a row does not "
            f"count, got {labels_N.min().item()} to {labels_N.max().item()}"
        ) from error

"""The loss of a batch by a fused backend: factors of the rows first, then rows and gradients.

Shapes: N rows, C classes; a map [N, C, d1, ...] has one row per position.
"""

import torch
from torch import Tensor

from dkl.losses.blocks import sum_weights
from dkl.losses.formula import class_weights, label_error
from dkl.losses.fused import fused_value
from dkl.losses.hand_out import Problem
from dkl.losses.reduction import keep_counted, num_counted, safe_divisor
from dkl.losses.row_kernel import NO_WEIGHTS, LossOptions, LossTerms, RowWeights, Scale
from dkl.losses.rows import compute_dtype, to_rows


def fused_loss(
    input: Tensor,
    target: Tensor,
    options: LossOptions,
    backend: str,
    *,
    registered: bool,
    return_parts: bool,
) -> LossTerms:
    """Return the loss of ``decoupled_kl_loss`` by a fused backend.

    Args:
        input: [N, C] or [N, C, d1, ...] logits n.
        target: logits m of the same shape.
        options: of the loss; no gradient goes through the weights.
        backend: "blocked", "compile" or "triton".
        registered: go through the registered operator whatever the size.
        return_parts: whether the terms are wanted; without, they come without their factors.

    Raises:
        ValueError: labels that are no rows of the class table.
    """
    shape = input.shape
    if len(shape) > 2:
        input, target = input.flatten(2), target.flatten(2)
    weights, counted_N = options.weights, options.counted_N
    if weights is not NO_WEIGHTS or counted_N is not None:
        weights, counted_N = _flat_weights(weights), _uncounted_alone(counted_N)
        options = options._replace(weights=weights, counted_N=counted_N)
    summed = options.reduction != "none"
    divisor = _num_items(input, target, options) if options.reduction == "mean" else 1.0
    mse_factor: Scale = 1.0
    if options.normalization == "weights":
        mse_factor = _rows_per_weight(input, target, options, backend)
    scales = (options.mse_weight * mse_factor / divisor, options.ce_weight / divisor)
    problem = Problem(weights, counted_N, scales, options.rows, summed, backend)
    value, mse, ce = fused_value(
        input, target, problem, registered=registered, with_terms=return_parts
    )
    if return_parts:
        mse, ce = mse * (mse_factor / divisor), ce / divisor
    if not summed:
        value, mse, ce = (x.reshape(shape[:1] + shape[2:]) for x in (value, mse, ce))
    return LossTerms(value, mse, ce)


def _uncounted_alone(counted_N: Tensor | None) -> Tensor | None:
    """Return None where every row counts, if that can be seen without waiting for a device."""
    if counted_N is None or torch.compiler.is_compiling() or counted_N.device.type != "cpu":
        return counted_N
    return None if bool(counted_N.all()) else counted_N


def _flat_weights(weights: RowWeights) -> RowWeights:
    """Return the weights without gradient and with one dimension for all positions."""
    class_probs, class_table, labels_N = weights
    if class_table is not None and labels_N is not None:
        _check_labels(class_table, labels_N)
        return RowWeights(None, class_table.detach(), labels_N)
    if class_probs is not None:
        class_probs = class_probs.detach()
        return RowWeights(class_probs.flatten(2) if class_probs.ndim > 2 else class_probs)
    return weights


def _check_labels(class_table: Tensor, labels_N: Tensor) -> None:
    """Raise ValueError where a label is no row of the class table; asynchronous on a GPU."""
    if torch.compiler.is_compiling():
        return
    known = ((labels_N >= 0) & (labels_N < class_table.shape[0])).all()
    if known.device.type != "cpu":
        torch._assert_async(known, "labels must be rows of class_table, or ignore_index")
    elif not known:
        raise label_error(class_table, labels_N)


def _num_items(input: Tensor, target: Tensor, options: LossOptions) -> Scale:
    """Return the number of rows that the mean is over."""
    if options.num_items is not None:
        return _number(safe_divisor(options.num_items, _like(input, target)))
    if options.counted_N is None:
        num_rows = input.shape[0] if input.ndim == 2 else input.shape[0] * input.shape[2]
        return float(num_rows or 1)
    return _number(num_counted(_like(input, target), options.counted_N))


def _rows_per_weight(input: Tensor, target: Tensor, options: LossOptions, backend: str) -> Scale:
    """Return n / D with D = sum_i W_i^2, which turns a mean into a sum divided by D."""
    denominator = options.denominator
    if denominator is None:
        total_N = _total_weights(target, options, backend)
        denominator = keep_counted(total_N.square(), options.counted_N).sum()
    divisor = safe_divisor(denominator, _like(input, target))
    return _num_items(input, target, options) / _number(divisor)


def _total_weights(target: Tensor, options: LossOptions, backend: str) -> Tensor:
    """Return the sum W of the weights of each row."""
    rows = options.rows
    if torch.compiler.is_compiling():  # the caller's graph fuses it
        target_NC = to_rows(target.detach(), compute_dtype(target), options.counted_N)
        return class_weights(
            target_NC, options.weights, options.counted_N, rows.weight_temperature, rows.gamma
        ).sum(1)
    sums = sum_weights
    if backend == "triton":
        from dkl.losses.triton_kernels import weight_sums as sums
    return sums(target.detach(), options.weights, options.counted_N, rows)


def _like(input: Tensor, target: Tensor) -> Tensor:
    return input.new_empty(0, dtype=compute_dtype(input, target))


def _number(value: Scale) -> Scale:
    """Return a plain number where reading one does not wait for a device."""
    if type(value) is not Tensor or value.device.type != "cpu" or torch.compiler.is_compiling():
        return value
    return value.item()

"""Rows in blocks that stay in the processor's cache, for the ``blocked`` and ``compile`` backends.

Shapes: N rows, C classes, R rows of a block; a map [N, C, P] has a row for every one of its P
positions, and only the blocks of it are ever copied.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dkl.losses.row_kernel import RowOptions, RowResult, RowWeights, Scale
from dkl.losses.rows import compute_dtype

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block (1 MiB in float32): the best of 2**14 to 2**20 where it was measured."""


class Block(NamedTuple):
    """What a block function reads and writes; logits and weights are in the working precision.

    Args:
        input_RC: logits n; not to be written to.
        target_RC: logits m; not to be written to.
        weights_RC: weights before the power gamma, or None for softmax(m / tau).
        mse_scale: factor a of the gradient.
        ce_scale: factor b of the gradient.
        options: numbers of the formula.
        input_gradient_RC: receives the gradient for the input; None if it is not needed.
        target_gradient_RC: receives the gradient for the target; None if it is not needed.
    """

    input_RC: Tensor
    target_RC: Tensor
    weights_RC: Tensor | None
    mse_scale: Scale
    ce_scale: Scale
    options: RowOptions
    input_gradient_RC: Tensor | None
    target_gradient_RC: Tensor | None


BlockFormula = Callable[[Block], tuple[Tensor, Tensor]]
"""Writes the gradients of a block and returns the weighted MSE and the soft cross-entropy."""


class Place(NamedTuple):
    """A block: samples [first, last), positions [start, stop) and where its rows lie."""

    first: int
    last: int
    start: int
    stop: int
    rows: slice


def run_blocks(
    compute: BlockFormula,
    input: Tensor,
    target: Tensor,
    weights: RowWeights,
    counted_N: Tensor | None,
    scales: tuple[Scale, Scale],
    options: RowOptions,
    needs: tuple[bool, bool],
    *,
    upstream_N: Tensor | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> RowResult:
    """Compute rows and gradients block by block.

    Args:
        compute: the formula, for one block.
        input: [N, C] or [N, C, P] logits n.
        target: logits m of the same shape.
        weights: their source; ``class_probs`` has the shape of the input, ``labels_N`` one label
            for every row.
        counted_N: bool, False for rows that do not count, or None.
        scales: factors (a, b) of the terms in the gradients.
        options: numbers of the formula.
        needs: whether the gradients for input and target are needed.
        upstream_N: factors of the rows in the gradients, beside the scales; or None.
        block_elements: how many elements a block should have; one row at least.

    Returns:
        Values per row in the order of ``input.movedim(1, -1)``, and gradients in the shapes of
        input and target.
    """
    dtype = compute_dtype(input, target)
    input_gradient = torch.empty_like(input) if needs[0] else None
    target_gradient = torch.empty_like(target) if needs[1] else None
    values: list[tuple[Tensor, Tensor]] = []
    for place in _places(input, _rows_of_block(block_elements, input.shape[1])):
        counted_R = counted_N if counted_N is None or place is None else counted_N[place.rows]
        if counted_R is not None and input.device.type == "cpu" and bool(counted_R.all()):
            counted_R = None
        block = Block(
            _take(input, place, dtype, counted_R, 0.0),
            _take(target, place, dtype, counted_R, 0.0),
            take_weights(weights, place, dtype, counted_R),
            *scales,
            options,
            _output(input_gradient, place, dtype),
            _output(target_gradient, place, dtype),
        )
        mse_R, ce_R = compute(block)
        if counted_R is not None:
            mse_R.masked_fill_(~counted_R, 0.0)
            ce_R.masked_fill_(~counted_R, 0.0)
        values.append((mse_R, ce_R))
        for gradient, rows_RC in (
            (input_gradient, block.input_gradient_RC),
            (target_gradient, block.target_gradient_RC),
        ):
            if gradient is not None and rows_RC is not None:
                if counted_R is not None:
                    rows_RC.masked_fill_(~counted_R[:, None], 0.0)
                if upstream_N is not None:
                    upstream_R = upstream_N if place is None else upstream_N[place.rows]
                    rows_RC.mul_(upstream_R[:, None])
                _put(gradient, place, rows_RC)
    mse_N, ce_N = _joined(values, input, dtype)
    return RowResult(mse_N, ce_N, input_gradient, target_gradient)


def sum_weights(
    target: Tensor, weights: RowWeights, counted_N: Tensor | None, options: RowOptions
) -> Tensor:
    """Return the sum of the powered weights of each row, block by block.

    Args:
        target: [N, C] or [N, C, P] logits m.
        weights: their source.
        counted_N: bool, False for rows that do not count, whose sums mean nothing; or None.
        options: numbers of the formula.
    """
    dtype = compute_dtype(target)
    gamma, tau = options.gamma, options.weight_temperature
    table, labels_N = weights.class_table, weights.labels_N
    if table is not None and labels_N is not None and table.shape[0] <= labels_N.shape[0]:
        # Fewer rows in the table than in the batch: each of them once.
        return sum_weights(table, RowWeights(table), None, options)[labels_N].to(dtype)
    num_rows = target.shape[0] * (target.shape[2] if target.ndim == 3 else 1)
    if gamma == 1.0 and table is None and weights.class_probs is None:
        return torch.ones(num_rows, dtype=dtype, device=target.device)
    sums: list[Tensor] = []
    for place in _places(target, _rows_of_block(BLOCK_ELEMENTS, target.shape[1])):
        counted_R = counted_N if counted_N is None or place is None else counted_N[place.rows]
        weights_RC = take_weights(weights, place, dtype, counted_R)
        if weights_RC is None:
            target_RC = _take(target, place, dtype, counted_R, 0.0)
            weights_RC = torch.log_softmax(target_RC / tau, 1).mul_(gamma).exp_()
        elif gamma != 1.0:
            weights_RC = weights_RC.pow(gamma)
        sums.append(weights_RC.sum(1))
    return torch.cat(sums) if sums else target.new_empty(0, dtype=dtype)


def _rows_of_block(block_elements: int, num_classes: int) -> int:
    """Return how many rows a block has: where they are long, one for each thread if memory allows.

    The bound is 8 MiB for each of the five buffers that a block has at most, in float32.
    """
    threads = min(torch.get_num_threads(), (1 << 21) // num_classes)
    return max(1, threads, block_elements // num_classes)


def _joined(
    values: list[tuple[Tensor, Tensor]], input: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if len(values) == 1:
        return values[0]
    if not values:
        return input.new_empty(0, dtype=dtype), input.new_empty(0, dtype=dtype)
    mse, ce = zip(*values, strict=True)
    return torch.cat(mse), torch.cat(ce)


def _places(input: Tensor, block_rows: int) -> Iterator[Place | None]:
    """Yield the blocks; None for all of a matrix at once, which needs no slicing."""
    num_samples = input.shape[0]
    positions = input.shape[2] if input.ndim == 3 else 1
    if input.ndim == 2 and 0 < num_samples <= block_rows:
        yield None
        return
    samples = max(1, block_rows // max(positions, 1))
    for first in range(0, num_samples, samples):
        last = min(first + samples, num_samples)
        step = positions if last - first > 1 else min(positions, block_rows)
        for start in range(0, positions, max(step, 1)):
            stop = min(start + step, positions)
            begin = first * positions + start
            yield Place(
                first, last, start, stop, slice(begin, begin + (last - first) * (stop - start))
            )


def _part(values: Tensor, place: Place) -> Tensor:
    part = values[place.first : place.last]
    return part if part.ndim == 2 else part[:, :, place.start : place.stop].transpose(1, 2)


def _take(
    values: Tensor, place: Place | None, dtype: torch.dtype, counted_R: Tensor | None, fill: float
) -> Tensor:
    rows_RC = values if place is None else _part(values, place)
    if rows_RC.ndim == 3:
        rows_RC = rows_RC.reshape(-1, values.shape[1])
    if rows_RC.dtype != dtype:
        rows_RC = rows_RC.to(dtype)
    return rows_RC if counted_R is None else rows_RC.masked_fill(~counted_R[:, None], fill)


def take_weights(
    weights: RowWeights, place: Place | None, dtype: torch.dtype, counted_R: Tensor | None
) -> Tensor | None:
    """Return the weights of a block before the power, or None for softmax(m / tau)."""
    if weights.class_table is not None and weights.labels_N is not None:
        labels_R = weights.labels_N if place is None else weights.labels_N[place.rows]
        rows_RC = weights.class_table.index_select(0, labels_R).to(dtype)
        return rows_RC if counted_R is None else rows_RC.masked_fill_(~counted_R[:, None], 1.0)
    if weights.class_probs is not None:
        return _take(weights.class_probs, place, dtype, counted_R, 1.0)
    return None


def _output(gradient: Tensor | None, place: Place | None, dtype: torch.dtype) -> Tensor | None:
    """Return where a block may write its gradient: in place where layout and dtype allow it."""
    if gradient is None:
        return None
    if gradient.ndim == 2 and gradient.dtype == dtype:
        return gradient if place is None else gradient[place.rows]
    num_rows = gradient.shape[0] if place is None else place.rows.stop - place.rows.start
    return torch.empty((num_rows, gradient.shape[1]), dtype=dtype, device=gradient.device)


def _put(gradient: Tensor, place: Place | None, rows_RC: Tensor) -> None:
    if gradient.ndim == 3 or gradient.dtype != rows_RC.dtype:
        part = gradient if place is None else _part(gradient, place)
        part.copy_(rows_RC.view(part.shape))

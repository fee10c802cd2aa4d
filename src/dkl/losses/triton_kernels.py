"""The ``triton`` backend: values and gradients of the rows in one launch.

Shapes: N rows, C classes, K rows of a class table; a map [N, C, P] has a row for every one of its P
positions. The formula, its gradient and how both are computed are at the head of
``triton_programs.py``. A launch reads the logits once, and once more where a row is longer than a
tile (from a cache, as far as it holds them), gathers weights by class on the way and writes the
gradients that are needed; nothing else is allocated, and nothing waits for the device.

This module needs Triton, so that it is imported where the backend is used and not with ``dkl``.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkl.losses.row_kernel import RowOptions, RowResult, RowWeights, Scale
from dkl.losses.rows import compute_dtype

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "backend 'triton' needs the package triton, which PyTorch brings along on Linux for CUDA "
        f"and ROCm ({error}); use backend='auto' here"
    ) from error
if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(  # programs have no tuples before
        "backend 'triton' needs Triton 3.3 or newer, which comes with PyTorch 2.7; found Triton "
        f"{triton.__version__}; use backend='auto' here"
    )

from dkl.losses.triton_programs import rows_program, scale_program, weight_sums_program

OLDEST_CAPABILITY = (7, 0)
MAX_BLOCK = {torch.float32: 8192, torch.float64: 2048}
"""Most classes of a tile, by working precision."""
THREAD_ELEMENTS = {torch.float32: 16, torch.float64: 8}
"""Elements of a tile for each thread: as many as its registers hold without spilling."""
LOG2_E = math.log2(math.e)


class Tiling(NamedTuple):
    """How rows are cut into tiles.

    Args:
        rows: rows of a program.
        block: classes of a tile.
        num_warps: warps of a program, 32 threads each.
    """

    rows: int
    block: int
    num_warps: int


def is_available(device: torch.device | None = None) -> tuple[bool, str]:
    """Return whether the backend runs on a device, and by what, or else why not.

    Args:
        device: that of the logits; the current CUDA or ROCm device if it is left out. Triton's
            interpreter, which TRITON_INTERPRET=1 chooses at import, runs on every device.
    """
    if not isinstance(rows_program, triton.JITFunction):
        return True, "Triton's interpreter (TRITON_INTERPRET=1)"
    if device is not None and device.type != "cuda":
        return False, f"Triton needs a CUDA or ROCm device, and the logits are on {device.type!r}"
    if not torch.cuda.is_available():
        return False, "Triton needs a CUDA or ROCm device, and PyTorch finds none"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        found = ".".join(map(str, capability))
        return False, f"Triton needs compute capability 7.0 or newer, and the device has {found}"
    return True, f"Triton {triton.__version__} on {torch.cuda.get_device_name(device)}"


def choose_tiling(
    num_classes: int,
    num_positions: int,
    dtype: torch.dtype,
    *,
    unit_strides: bool = True,
    max_block: int | None = None,
) -> Tiling:
    """Return how to cut rows; all numbers are powers of two.

    Args:
        num_classes: C >= 1.
        num_positions: rows that lie side by side, >= 1: N of a matrix, P of a map.
        dtype: working precision, float32 or float64.
        unit_strides: whether the classes of a row are next to each other in memory; otherwise its
            positions are, and a tile has many rows to read them side by side.
        max_block: most classes of a tile, to make it small in tests.
    """
    elements, limit = (1024, MAX_BLOCK[dtype]) if unit_strides else (4096, 128)
    limit = limit if max_block is None else max_block
    block = min(_power_of_two(num_classes), limit)
    # Rows of few classes share a program: one for each of them would leave its threads idle.
    rows = max(1, min(elements // block, _power_of_two(num_positions)))
    num_warps = rows * block // (32 * THREAD_ELEMENTS[dtype])
    return Tiling(rows, block, min(max(num_warps, 1), 16))


def decoupled_rows(
    input: Tensor,
    target: Tensor,
    weights: RowWeights,
    counted_N: Tensor | None,
    scales: tuple[Scale, Scale],
    options: RowOptions,
    needs: tuple[bool, bool],
    *,
    upstream_N: Tensor | None = None,
    max_block: int | None = None,
) -> RowResult:
    """Return rows and gradients; the arguments are those of ``run_blocks``.

    Rows that do not count are not even read. Strides are free, and fast where the classes of a row
    (or, in maps, positions) are next to each other. A label outside the class table makes NaN.

    Args:
        input: [N, C] or [N, C, P] logits n.
        target: logits m of the same shape.
        weights: their source.
        counted_N: bool, False for rows that do not count, or None.
        scales: factors (a, b) of the terms in the gradients; tensors are read on the device.
        options: numbers of the formula.
        needs: whether the gradients for input and target are needed.
        upstream_N: factors of the rows in the gradients, or None.
        max_block: most classes of a tile, a power of two; tests make it small.
    """
    dtype, (num_samples, num_classes, num_positions) = compute_dtype(input, target), _sizes(input)
    num_rows = num_samples * num_positions
    mse_N = torch.empty(num_rows, dtype=dtype, device=input.device)
    ce_N = torch.empty_like(mse_N)
    input_gradient = torch.empty_like(input) if needs[0] else None
    target_gradient = torch.empty_like(target) if needs[1] else None
    result = RowResult(mse_N, ce_N, input_gradient, target_gradient)
    if num_rows == 0:
        return result
    table, labels_N = _weight_source(weights)
    tensors = input, target, table, input_gradient, target_gradient
    tiling, alignment = _tiling(tensors, num_classes, num_positions, dtype, max_block)
    is_label = options.gamma / options.weight_temperature == 1.0 / options.temperature
    with _on_device(input):
        rows_program[(num_samples * triton.cdiv(num_positions, tiling.rows),)](
            *tensors,
            *(_strides(tensor) for tensor in tensors),
            labels_N,
            _as_bytes(counted_N),
            None if upstream_N is None else upstream_N.contiguous(),
            *(scale if isinstance(scale, Tensor) else None for scale in scales),
            mse_N,
            ce_N,
            num_classes,
            num_positions,
            0 if table is None else table.shape[0],
            *(0.0 if isinstance(scale, Tensor) else float(scale) for scale in scales),
            LOG2_E / options.temperature,
            LOG2_E / options.weight_temperature,
            float(options.gamma),
            WEIGHTS="given" if table is not None else "soft label" if is_label else "softmax",
            UNIT_POWER=options.gamma == 1.0,
            BREAK_ASYMMETRY=options.break_asymmetry,
            ONE_TILE=num_classes <= tiling.block,
            ALIGNMENT=alignment,
            ROWS=tiling.rows,
            BLOCK=tiling.block,
            DTYPE=_DTYPES[dtype],
            num_warps=tiling.num_warps,
        )
    return result


def weight_sums(
    target: Tensor,
    weights: RowWeights,
    counted_N: Tensor | None,
    options: RowOptions,
    *,
    max_block: int | None = None,
) -> Tensor:
    """Return W_N, the sum of the weights (to the power gamma) of each row, 0 where not counted.

    GKL's denominator is the sum of their squares. Only what the weights come from is read, and not
    even that where they are a softmax and gamma is one: they sum to one.

    Args:
        target: [N, C] or [N, C, P] logits m.
        weights: their source.
        counted_N: bool, False for rows that do not count, or None.
        options: numbers of the formula.
        max_block: most classes of a tile, a power of two.
    """
    dtype, (num_samples, num_classes, num_positions) = compute_dtype(target), _sizes(target)
    num_rows = num_samples * num_positions
    table, labels_N = _weight_source(weights)
    if table is None and options.gamma == 1.0:
        ones_N = torch.ones(num_rows, dtype=dtype, device=target.device)
        return ones_N if counted_N is None else counted_N.to(dtype)
    sums_N = torch.empty(num_rows, dtype=dtype, device=target.device)
    if num_rows == 0:
        return sums_N
    tensors = target, table
    read = target if table is None else table
    tiling, alignment = _tiling((read,), num_classes, num_positions, dtype, max_block)
    with _on_device(target):
        weight_sums_program[(num_samples * triton.cdiv(num_positions, tiling.rows),)](
            *tensors,
            *(_strides(tensor) for tensor in tensors),
            labels_N,
            _as_bytes(counted_N),
            sums_N,
            num_classes,
            num_positions,
            0 if table is None else table.shape[0],
            LOG2_E / options.weight_temperature,
            float(options.gamma),
            UNIT_POWER=options.gamma == 1.0,
            ALIGNMENT=alignment,
            ROWS=tiling.rows,
            BLOCK=tiling.block,
            DTYPE=_DTYPES[dtype],
            num_warps=tiling.num_warps,
        )
    return sums_N


def scale_gradient_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a gradient in place by the incoming one and return it; nothing waits for the device.

    The program reads a single incoming gradient on the device, and where it is exactly one, as
    after ``loss.backward()``, it touches nothing else.

    Args:
        gradient: any shape, contiguous.
        upstream: a tensor without dimensions, or one number for each element of the first one.

    Raises:
        ValueError: a gradient that is not contiguous, or an upstream that does not fit.
    """
    if not gradient.is_contiguous():
        raise ValueError(f"gradient must be contiguous, got strides {gradient.stride()}")
    if upstream.ndim > 0 and upstream.shape != gradient.shape[:1]:
        raise ValueError(
            f"upstream must be one number, or one for each row of gradient {list(gradient.shape)}, "
            f"got shape {list(upstream.shape)}"
        )
    if upstream.ndim > 0:
        return gradient.mul_(upstream.reshape(-1, *(1 for _ in gradient.shape[1:])))
    if gradient.numel() > 0:
        block = 4096
        # So few programs that finding a one is soon done, and enough to fill a device.
        num_programs = min(triton.cdiv(gradient.numel(), block), 2048)
        dtype = compute_dtype(gradient)
        with _on_device(gradient):
            scale_program[(num_programs,)](
                gradient, upstream, gradient.numel(), BLOCK=block, DTYPE=_DTYPES[dtype], num_warps=8
            )
    return gradient


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number >= 1."""
    return 1 << (number - 1).bit_length()


def _sizes(values: Tensor) -> tuple[int, int, int]:
    """Return the numbers of samples, classes and positions: a matrix is one map, turned round."""
    num_rows, num_classes = values.shape[:2]
    return (1, num_classes, num_rows) if values.ndim == 2 else (num_rows, *values.shape[1:])


def _strides(values: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of samples, classes and positions."""
    if values is None:
        return 0, 0, 0
    if values.ndim == 2:
        return 0, values.stride(1), values.stride(0)
    return values.stride(0), values.stride(1), values.stride(2)


def _tiling(
    tensors: Sequence[Tensor | None],
    num_classes: int,
    num_positions: int,
    dtype: torch.dtype,
    max_block: int | None,
) -> tuple[Tiling, int]:
    """Return how rows are cut, and the alignment of their classes (zero if these are apart)."""
    present = [x for x in tensors if x is not None]
    alignment = 0
    if num_classes == 1 or all(x.stride(1) == 1 for x in present):
        others = [stride for x in present for stride in (x.stride(0), *x.stride()[2:])]
        alignment = math.gcd(16, num_classes, *others)
    tiling = choose_tiling(
        num_classes, num_positions, dtype, unit_strides=alignment > 0, max_block=max_block
    )
    return tiling, alignment


def _weight_source(weights: RowWeights) -> tuple[Tensor | None, Tensor | None]:
    """Return given weights and the labels that choose their rows, if any."""
    if weights.class_table is not None and weights.labels_N is not None:
        return weights.class_table, weights.labels_N.contiguous()
    return weights.class_probs, None


def _as_bytes(counted_N: Tensor | None) -> Tensor | None:
    return None if counted_N is None else counted_N.contiguous().view(torch.uint8)


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""Linear heads and losses over chunks of rows, so that logits are never whole in memory.

Shapes: N rows (tokens), n rows that count, R rows of a chunk, H features, V classes (vocabulary).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkl.losses.backends import BACKENDS, choose_backend, fastest_backend, row_kernel
from dkl.losses.decoupled import decoupled_kl_loss
from dkl.losses.formula import reference_loss
from dkl.losses.hand_out import scaled
from dkl.losses.reduction import keep_counted, num_counted, reduce_rows, safe_divisor
from dkl.losses.row_kernel import LossOptions, LossTerms, RowKernel, Scale
from dkl.losses.rows import NO_LABEL, counted_rows

_CHUNK_ELEMENTS = 1 << 23
"""Logits of a chunk: 32 MiB in float32; three such buffers are in use at a time."""

_ENOUGH_ROWS = {"cpu": 128}
"""Rows of a chunk that keep the products efficient; 1024 on any other device."""


class Sweep(NamedTuple):
    """What a pass over all chunks is to compute, besides values.

    Args:
        needs: which tensors need a gradient.
        scales: factors of the weighted MSE and of the soft cross-entropy in the value of a row.
        factor: derivative of the loss for the value of a row, 1/N for a mean. It multiplies sums
            over rows, after the products: in float16 single gradients would vanish with it.
        factor_N: the same where rows differ (reduction "none"), instead.
    """

    needs: Sequence[bool]
    scales: tuple[Scale, Scale]
    factor: Scale = 1.0
    factor_N: Tensor | None = None


class Swept(NamedTuple):
    """Terms of each row (without scales; zero where it does not count) and the gradients."""

    mse_N: Tensor
    ce_N: Tensor
    gradients: Sequence[Tensor | None]


RunSweep = Callable[[Sequence[Tensor | None], Sweep], Swept]


def check_options(options: LossOptions, chunk_size: int | None, backend: str) -> None:
    """Raise ValueError for options that are out of range or have no effect."""
    row = torch.zeros(1, 2)
    reference_options = {
        "mse_weight": options.mse_weight,
        "ce_weight": options.ce_weight,
        "normalization": options.normalization,
        "reduction": options.reduction,
        "denominator": options.denominator,
        "num_items": options.num_items,
        **options.rows._asdict(),
    }
    decoupled_kl_loss(row, row, **reference_options, backend="reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be a number of rows >= 1 or None, got {chunk_size}")


def choose_kernel(backend: str, hidden: Tensor, options: LossOptions) -> RowKernel | None:
    """Return what computes a chunk; None for plain autograd on whole logits."""
    fastest = fastest_backend(hidden.device) if backend == "auto" else backend
    wanted = "blocked" if backend == "auto" and fastest == "reference" else fastest
    try:
        chosen = choose_backend(wanted, hidden, hidden, options)
    except ValueError:
        if backend != "auto":
            raise
        chosen = "reference"  # transforms of torch.func and the like
    return None if chosen == "reference" else row_kernel(chosen)


class CountedRows(NamedTuple):
    """Which rows count, and their way to the computation and back.

    Args:
        shape: of the rows, [N] or [B, T].
        counted_N: False for rows that do not count, or None.
        kept_n: indices of the rows that alone are computed, instead, or None.
    """

    shape: torch.Size
    counted_N: Tensor | None
    kept_n: Tensor | None

    def take(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return rows [N, H] of [*shape, H]: those that count alone, or others filled."""
        rows_NH = values.reshape(self.shape.numel(), values.shape[-1])
        if self.kept_n is not None:
            return rows_NH.index_select(0, self.kept_n)
        # Filled before any product: a gradient of zero times NaN would be NaN in the weight's.
        uncounted_N = None if self.counted_N is None else ~self.counted_N
        return rows_NH if uncounted_N is None else rows_NH.masked_fill(uncounted_N[:, None], fill)

    def restore(self, value: Tensor, reduction: str) -> Tensor:
        """Return values per row in the shape of the rows; a reduced value as it is."""
        if reduction != "none":
            return value
        if self.kept_n is not None:
            value = value.new_zeros(self.shape.numel()).index_copy(0, self.kept_n, value)
        return value.reshape(self.shape)


def choose_rows(
    name: str, values: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int
) -> CountedRows:
    """Return which rows of ``values`` [..., H] count.

    On the CPU they are picked out, so that the others cost nothing. Elsewhere that would wait for
    the device: the others are computed too, on zeros.
    """
    shape = values.shape[:-1]
    for choice_name, choice in (("mask", mask), ("labels", labels)):
        if choice is not None and choice.shape != shape:
            raise ValueError(
                f"{choice_name} must have one entry for every row of {name}, {list(shape)}, "
                f"got {list(choice.shape)}"
            )
    if labels is None and ignore_index != NO_LABEL:
        raise ValueError("ignore_index would be ignored without labels: pass labels too")
    counted_N = counted_rows(
        values.reshape(shape.numel(), values.shape[-1]),
        None if mask is None else mask.reshape(-1),
        None if labels is None else labels.reshape(-1),
        ignore_index,
    )
    if counted_N is None or counted_N.device.type != "cpu":
        return CountedRows(shape, counted_N, None)
    return CountedRows(shape, None, counted_N.nonzero().squeeze(1))


class HeadOptions(NamedTuple):
    """How a head makes logits: capped(scale * (hidden weight^T + bias)), products in ``dtype``."""

    scale: float
    softcap: float | None
    dtype: torch.dtype


class HeadRows:
    """Logits of a linear head, a chunk of rows at a time, and the gradients of its tensors.

    A chunk's gradient for the logits, g_RV, becomes at once

        hidden_RH: g_RV weight_VH      weight_VH: += g_RV^T hidden_RH      bias_V: += sum_r g_rv
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        options: HeadOptions,
        needs: Sequence[bool],
        chunk_rows: int,
    ) -> None:
        hidden_NH, weight_VH, bias_V = tensors
        assert hidden_NH is not None
        assert weight_VH is not None
        self.options = options
        self.hidden_NH = hidden_NH
        # Under autocast products are in half precision, and their operands are copies.
        self.weight_VH = weight_VH.to(options.dtype)
        self.bias_V = None if bias_V is None else bias_V.to(options.dtype)
        self.buffer_RV = self.weight_VH.new_empty(chunk_rows, weight_VH.shape[0])
        self.exact = torch.promote_types(options.dtype, torch.float32)
        # Every row of hidden is written once; weight and bias sum up over rows, in float32.
        self.stored = [None if x is None else _stored_dtype(x.dtype) for x in tensors]
        self.gradients = [
            hidden_NH.new_empty(hidden_NH.shape, dtype=self.stored[0]) if needs[0] else None,
            weight_VH.new_zeros(weight_VH.shape, dtype=self.exact) if needs[1] else None,
            weight_VH.new_zeros(weight_VH.shape[0], dtype=self.exact) if needs[2] else None,
        ]

    def logits(self, chunk: slice) -> Tensor:
        """Return logits [R, V] of a chunk, in a buffer that the next chunk overwrites."""
        self.hidden_RH = self.hidden_NH[chunk].to(self.options.dtype)
        logits_RV = self.buffer_RV[: self.hidden_RH.shape[0]]
        scale, softcap = self.options.scale, self.options.softcap
        if self.bias_V is None:
            logits_RV.addmm_(self.hidden_RH, self.weight_VH.t(), beta=0, alpha=scale)
        else:
            operands = (self.bias_V, self.hidden_RH, self.weight_VH.t())
            torch.addmm(*operands, beta=scale, alpha=scale, out=logits_RV)
        if softcap is not None:
            logits_RV = logits_RV.to(self.exact).div_(softcap).tanh_().mul_(softcap)
        self.logits_RV = logits_RV
        return logits_RV

    def add_gradient(self, chunk: slice, gradient_RV: Tensor, factor_R: Tensor | None) -> None:
        """Pass the gradient for the latest logits on to the tensors; overwrites both."""
        if self.options.softcap is not None:
            slope_RV = self.logits_RV.div_(self.options.softcap).square_().neg_().add_(1.0)
            gradient_RV = gradient_RV.mul_(slope_RV)
        gradient_RV = gradient_RV.to(self.options.dtype)
        hidden_RH = self.hidden_RH
        for_hidden, for_weight, for_bias = self.gradients
        if for_hidden is not None:
            product_RH = gradient_RV @ self.weight_VH
            for_hidden[chunk] = product_RH if factor_R is None else product_RH * factor_R[:, None]
        if factor_R is not None:
            hidden_RH = (hidden_RH * factor_R[:, None]).to(self.options.dtype)
        if for_weight is not None and self.options.dtype == torch.bfloat16:
            for_weight.add_(gradient_RV.t() @ hidden_RH)
        elif for_weight is not None:  # float16 lacks the range for a sum over rows
            for_weight.addmm_(gradient_RV.t().to(self.exact), hidden_RH.to(self.exact))
        if for_bias is not None and factor_R is None:
            for_bias.add_(gradient_RV.sum(0, dtype=self.exact))
        elif for_bias is not None and factor_R is not None:
            for_bias.addmv_(gradient_RV.t().to(self.exact), factor_R.to(self.exact))

    def finish(self, factor: Scale) -> list[Tensor | None]:
        """Return the gradients for hidden, weight and bias, times a factor."""
        factor = factor * self.options.scale
        return [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(self.gradients, self.stored, strict=True)
        ]


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for float16, whose range needs the loss scale that comes in the backward."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunks_of(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Yield slices of at most ``chunk_rows`` rows."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def rows_per_chunk(hidden_NH: Tensor, num_classes: int, chunk_size: int | None) -> int:
    """Return how many rows a chunk has; by default all chunks are about equal."""
    num_rows, num_features = hidden_NH.shape
    if chunk_size is None:
        # Every chunk reads and writes the gradient of the weight once: with too few rows that
        # takes longer than the products. Up to H rows have no more logits than the weight numbers.
        enough = min(num_features, _ENOUGH_ROWS.get(hidden_NH.device.type, 1024))
        most = max(_CHUNK_ELEMENTS // num_classes, enough, 1)
        chunk_size = math.ceil(num_rows / max(math.ceil(num_rows / most), 1))
    return max(min(chunk_size, num_rows), 1)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products have the dtype of their operands."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _ChunkedLoss(torch.autograd.Function):
    """Makes the gradients in the forward; for reduction "none" in the backward, from anew."""

    @staticmethod
    def forward(
        ctx: Any, run: RunSweep, sweep: Sweep, per_row: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        now = sweep._replace(needs=[False] * len(tensors)) if per_row else sweep
        mse_N, ce_N, gradients = run(tensors, now)
        values_N = sweep.scales[0] * mse_N + sweep.scales[1] * ce_N
        ctx.run, ctx.sweep, ctx.per_row = run, sweep, per_row
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*(tensors if per_row else gradients))
        ctx.mark_non_differentiable(mse_N, ce_N)
        return values_N if per_row else values_N.sum() * sweep.factor, mse_N, ce_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss computed in chunks has no second derivative (create_graph=True); use "
                "backend='reference', which holds all logits in memory"
            )
        gradients = ctx.saved_tensors
        if ctx.per_row:
            gradients = ctx.run(gradients, ctx.sweep._replace(factor_N=upstream)).gradients
        else:
            gradients = [None if x is None else scaled(x, upstream) for x in gradients]
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return None, None, None, *(None if x is None else x.to(dtype) for x, dtype in pairs)


def chunked_loss(
    run: RunSweep,
    tensors: Sequence[Tensor | None],
    rows: CountedRows,
    options: LossOptions,
    weight_sums: Callable[[], Tensor] | None = None,
) -> LossTerms:
    """Return the loss of the rows that a sweep computes, reduced as ``decoupled_kl_loss`` does.

    Args:
        run: the sweep, over all chunks.
        tensors: its inputs, all that may need a gradient; the first has one row for every value.
        rows: which rows count.
        options: of the loss.
        weight_sums: returns W [N] of each row, for normalization "weights"; None where W is one.
    """
    if torch.compiler.is_compiling():  # a graph breaks here: the loop is not to be unrolled
        disable: Any = torch.compiler.disable
        return LossTerms(*disable(chunked_loss)(run, tensors, rows, options, weight_sums))
    hidden_NH, counted_N, num_items = tensors[0], options.counted_N, options.num_items
    assert hidden_NH is not None
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    ones_N = hidden_NH.new_ones(hidden_NH.shape[0], dtype=dtype)
    num_rows = num_counted(ones_N, counted_N) if num_items is None else num_items
    ratio: Scale = 1.0
    if options.normalization == "weights":  # n / D makes a sum divided by D from a mean over rows
        denominator = options.denominator
        if denominator is None:
            sums_N = ones_N if weight_sums is None else weight_sums()
            denominator = keep_counted(sums_N.square(), counted_N).sum()
        ratio = num_rows / safe_divisor(denominator, ones_N)
        ratio = ratio.to(ones_N.device) if isinstance(ratio, Tensor) else ratio
    reduction = options.reduction
    sweep = Sweep(
        needs=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors],
        scales=(options.mse_weight * ratio, options.ce_weight),
        factor=1.0 / safe_divisor(num_rows, ones_N) if reduction == "mean" else 1.0,
    )
    loss, mse_N, ce_N = _ChunkedLoss.apply(run, sweep, reduction == "none", *tensors)
    mse, ce = (
        reduce_rows(x, reduction, counted_N, x.shape, num_items) for x in (mse_N * ratio, ce_N)
    )
    return LossTerms(*(rows.restore(x, reduction) for x in (loss, mse, ce)))


def dense_loss(
    input_NC: Tensor, target_NC: Tensor, rows: CountedRows, options: LossOptions
) -> LossTerms:
    """Return the loss of whole logits, of the rows that were taken, by plain autograd."""
    terms = reference_loss(input_NC, target_NC, options)
    return LossTerms(*(rows.restore(x, options.reduction) for x in terms))

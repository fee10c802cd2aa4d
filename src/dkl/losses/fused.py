"""The decoupled KL loss with its gradient made in the forward pass: one operator, several backends.

Shapes: N rows, C classes; maps [N, C, P] have P rows for every sample.

A backend computes values and gradients of the rows together (``row_kernel.py`` has the formula);
``hand_out.py`` is the backward pass. Large inputs go through the registered operator
``dkl::decoupled_rows``; small ones through an autograd.Function that does the same with less
dispatch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkl.losses import blocked
from dkl.losses.hand_out import (
    Needs,
    Problem,
    check_table,
    graph_is_kept,
    hand_out,
    is_one,
    recomputes,
    run_backend,
    table_version,
)
from dkl.losses.row_kernel import RowOptions, RowWeights, Scale
from dkl.losses.rows import compute_dtype

_FEW_ELEMENTS = 1 << 17  # below, the dispatch of the registered operator costs more than it brings
_SO_FEW = 1 << 15  # below, sums over all elements at once lose no accuracy that matters

_FULL = (torch.float32, torch.float64)


class FusedValue(NamedTuple):
    """What the rows are worth, per row or summed.

    Args:
        value: scaled sum of the terms; carries the gradient.
        mse: weighted MSE without its scale and without gradient.
        ce: soft cross-entropy, likewise.
    """

    value: Tensor
    mse: Tensor
    ce: Tensor


class _Made(NamedTuple):
    """A value, its gradients where they are needed, and the terms where they were made."""

    value: Tensor
    input_gradient: Tensor | None
    target_gradient: Tensor | None
    mse: Tensor | None = None
    ce: Tensor | None = None


def fused_value(
    input: Tensor,
    target: Tensor,
    problem: Problem,
    *,
    registered: bool = False,
    with_terms: bool = True,
) -> FusedValue:
    """Return the scaled terms of the rows, or their sum, with gradients for input and target.

    Args:
        input: [N, C] or [N, C, P] logits n.
        target: logits m of the same shape.
        problem: everything else.
        registered: go through the registered operator also where there is little to do.
        with_terms: whether the terms are wanted; without, they may be missing (the value itself).

    Returns:
        The value; rows are in the order of ``input.movedim(1, -1)``.
    """
    grad = torch.is_grad_enabled()
    needs = (grad and input.requires_grad, grad and target.requires_grad)
    if registered or input.numel() > _FEW_ELEMENTS:
        value, mse, ce, _, _ = _registered_rows(*_flat(input, target, problem), *needs)
        return FusedValue(value, mse.detach(), ce.detach())
    if not (needs[0] or needs[1]):
        made = _make(input, target, problem, needs, with_terms)
        return FusedValue(made.value, *_terms(made))
    terms: list[Tensor] = []
    value = _HandOut.apply(input, target, problem, needs, terms if with_terms else None)
    return FusedValue(value, *(terms or (value, value)))


def _terms(made: _Made) -> tuple[Tensor, Tensor]:
    value, _, _, mse, ce = made
    return (value, value) if mse is None or ce is None else (mse, ce)


def _make(input: Tensor, target: Tensor, problem: Problem, needs: Needs, with_terms: bool) -> _Made:
    kind = "cpu" if input.is_cpu else input.device.type
    if torch.is_autocast_enabled(kind):  # products would be in half precision
        with torch.autocast(kind, enabled=False):
            return _make(input, target, problem, needs, with_terms)
    if recomputes(input, target, needs):
        needs = (False, False)
    if not with_terms and _is_small(input, target, problem):
        weights, _, (mse_scale, ce_scale), options, _, _ = problem
        scales = (float(mse_scale), float(ce_scale))
        return _Made(*blocked.decoupled_sum(input, target, weights, scales, options, needs))
    mse, ce, input_gradient, target_gradient = run_backend(input, target, problem, needs)
    mse_scale, ce_scale = problem.scales
    value = mse * mse_scale + ce * ce_scale
    if problem.summed:
        value, mse, ce = value.sum(), mse.sum(), ce.sum()
    return _Made(value, input_gradient, target_gradient, mse, ce)


def _is_small(input: Tensor, target: Tensor, problem: Problem) -> bool:
    """Tell whether the number of operations is what costs."""
    dtype = input.dtype
    return (
        0 < input.numel() <= _SO_FEW
        and problem.summed
        and problem.counted_N is None
        and problem.backend == "blocked"
        and dtype is target.dtype
        and dtype in _FULL
        and input.ndim == 2
        and input.is_contiguous()
        and target.is_contiguous()
        and input.is_cpu
    )


class _HandOut(torch.autograd.Function):
    """Makes gradients in the forward pass and hands them out in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        problem: Problem,
        needs: Needs,
        terms: list[Tensor] | None,
    ) -> Tensor:
        made = _make(input, target, problem, needs, terms is not None)
        if terms is not None:
            terms += _terms(made)
        class_probs, class_table, labels_N = problem.weights
        ctx.save_for_backward(input, target, class_probs, *made[1:3])
        # Not saved, because a table that changes between forward and backward is nobody's mistake
        # (ClassStatistics.commit): only recomputing needs it as it was.
        ctx.table_version, ctx.needs = table_version(class_table), needs
        if class_probs is not None:
            problem = problem._replace(weights=RowWeights(None, class_table, labels_N))
        ctx.problem = problem
        return made.value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, class_probs, first, second = ctx.saved_tensors
        problem: Problem = ctx.problem
        made = ctx.needs == (first is not None, second is not None)
        final = not (torch.is_grad_enabled() or graph_is_kept())
        if made and final and upstream.ndim == 0 and is_one(upstream):
            return first, second, None, None, None  # the quickest way for the usual case
        if class_probs is not None:
            problem = problem._replace(weights=RowWeights(class_probs))
        if ctx.table_version is not None:
            check_table(problem, ctx.table_version, input, target, ctx.needs)
        found = hand_out(input, target, problem, ctx.needs, (first, second), upstream)
        return *found, None, None, None


# The registered operator: the same, for torch.compile, exporters, profilers and large inputs.


def _flat(input: Tensor, target: Tensor, problem: Problem) -> tuple[Any, ...]:
    dtype, device = compute_dtype(input, target), input.device
    scales_2 = torch.stack([_scalar(x, dtype, device) for x in problem.scales])
    weights, counted_N = problem.weights, problem.counted_N
    tensors = (weights.class_probs, weights.class_table, weights.labels_N, counted_N, scales_2)
    return input, target, *tensors, *problem.options, problem.summed, problem.backend


def _scalar(value: Scale, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor without dimensions; filled, since a copy to a device would wait for it."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _problem(arguments: Sequence[Any]) -> Problem:
    """Return the problem in the flat arguments after input and target."""
    class_probs, class_table, labels_N, counted_N, scales_2 = arguments[:5]
    scales = scales_2.unbind()
    if type(scales_2) is Tensor and scales_2.device.type == "cpu":
        scales = tuple(scales_2.tolist())
    return Problem(
        RowWeights(class_probs, class_table, labels_N),
        counted_N,
        (scales[0], scales[1]),
        RowOptions(*arguments[5:9]),
        *arguments[9:11],
    )


@torch.library.custom_op(
    "dkl::decoupled_rows",
    mutates_args=(),
    schema="(Tensor input, Tensor target, Tensor? class_probs, Tensor? class_table, "
    "Tensor? labels, Tensor? counted, Tensor scales, float temperature, float weight_temperature, "
    "float gamma, bool break_asymmetry, bool summed, str backend, bool needs_input, "
    "bool needs_target) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _registered_rows(input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Value, weighted MSE, soft cross-entropy and both gradients (empty where not needed)."""
    needs = (arguments[-2], arguments[-1])
    made = _make(input, target, _problem(arguments), needs, True)
    first, second = (input.new_empty(0) if x is None else x for x in made[1:3])
    return made.value, *_terms(made), first, second


@_registered_rows.register_fake
def _(input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    num_rows = input.shape[0] * (input.shape[2] if input.ndim == 3 else 1)
    shape = () if arguments[9] else (num_rows,)
    dtype = compute_dtype(input, target)
    needs = (arguments[-2], arguments[-1])
    later = recomputes(input, target, needs)
    first, second = (
        torch.empty_like(x) if needed and not later else input.new_empty(0)
        for x, needed in zip((input, target), needs, strict=True)
    )
    value, mse, ce = (input.new_empty(shape, dtype=dtype) for _ in range(3))
    return value, mse, ce, first, second


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, class_probs, ctx.class_table, *others = inputs[:7]
    ctx.save_for_backward(input, target, class_probs, *others, *output[3:])
    ctx.table_version, ctx.rest = table_version(ctx.class_table), inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if any(x is not None for x in unused):
        raise RuntimeError("dkl::decoupled_rows has a gradient for its first output only")
    input, target, class_probs, *others, first, second = ctx.saved_tensors
    needs = ctx.rest[-2:]
    none = (None,) * (5 + len(ctx.rest))
    if upstream is None:
        return None, None, *none
    problem = _problem((class_probs, ctx.class_table, *others, *ctx.rest))
    check_table(problem, ctx.table_version, input, target, needs)
    made = (first if needs[0] else None, second if needs[1] else None)
    return *hand_out(input, target, problem, needs, made, upstream), *none


_registered_rows.register_autograd(_backward, setup_context=_save)

"""The backward pass of the fused backends: gradients that are there, or made again.

Shapes: N rows, C classes; maps [N, C, P] have P rows for every sample.

Gradients are handed out multiplied by the upstream gradient where that is not one, and in place
when the graph is not kept: nothing is ever held beside the gradients that are needed. Two cases
recompute from the inputs instead: float16, whose small gradients would underflow before a gradient
scaler's factor reaches them, and ``create_graph``, where the ``reference`` formula gives the second
derivative.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dkl.losses.backends import fastest_backend, row_kernel
from dkl.losses.formula import reference_loss
from dkl.losses.row_kernel import LossOptions, RowOptions, RowResult, RowWeights, Scale

Needs = tuple[bool, bool]


class Problem(NamedTuple):
    """What a backend needs beside the logits.

    Args:
        weights: source of the class weights.
        counted_N: False for rows that do not count, or None.
        scales: factors of the weighted MSE and of the soft cross-entropy in the value.
        options: numbers of the formula.
        summed: whether the value is one sum over the rows.
        backend: "blocked", "compile" or "triton".
    """

    weights: RowWeights
    counted_N: Tensor | None
    scales: tuple[Scale, Scale]
    options: RowOptions
    summed: bool
    backend: str


def run_backend(
    input: Tensor,
    target: Tensor,
    problem: Problem,
    needs: Needs,
    upstream_N: Tensor | None = None,
) -> RowResult:
    """Return what the backend makes of a problem."""
    weights, counted_N, scales, options, _, backend = problem
    return row_kernel(backend)(
        input,
        target,
        weights,
        counted_N,
        scales,
        options,
        needs,
        upstream_N=upstream_N,
    )


def recomputes(input: Tensor, target: Tensor, needs: Needs) -> bool:
    """Return whether gradients are made in the backward pass only."""
    half = torch.float16
    return (needs[0] and input.dtype == half) or (needs[1] and target.dtype == half)


def table_version(class_table: Tensor | None) -> int | None:
    """Return how often a class table has been changed in place."""
    return class_table._version if type(class_table) is Tensor else None


def check_table(
    problem: Problem, version: int | None, input: Tensor, target: Tensor, needs: Needs
) -> None:
    """Raise RuntimeError if recomputing needs a class table that has changed since."""
    needed = torch.is_grad_enabled() or recomputes(input, target, needs)
    if needed and version != table_version(problem.weights.class_table):
        raise RuntimeError(
            "class_table was changed between the forward pass and a backward pass that needs it "
            "again (create_graph=True or float16 logits): pass class_table.clone() to the loss, or "
            "commit the class statistics after the backward pass"
        )


def hand_out(
    input: Tensor,
    target: Tensor,
    problem: Problem,
    needs: Needs,
    made: tuple[Tensor | None, Tensor | None],
    upstream: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients for input and target.

    Args:
        input: logits n as the forward pass had them.
        target: logits m.
        problem: everything else.
        needs: which gradients are needed.
        made: the gradients that the forward pass made.
        upstream: gradient of the value, without dimensions or per row.
    """
    if torch.is_grad_enabled():
        return _differentiable_gradients(input, target, problem, needs, upstream)
    if upstream.ndim == 1 and upstream.numel() > 0 and upstream.stride(0) == 0:
        upstream = upstream[0]  # what the backward of a sum over the rows sends
    if recomputes(input, target, needs):
        if upstream.ndim == 0:
            mse_scale, ce_scale = problem.scales
            problem = problem._replace(scales=(mse_scale * upstream, ce_scale * upstream))
        with torch.autocast(input.device.type, enabled=False):
            result = run_backend(input, target, problem, needs, upstream if upstream.ndim else None)
        return result.input_gradient, result.target_gradient
    first, second = made
    return (
        None if first is None else scaled(first, upstream),
        None if second is None else scaled(second, upstream),
    )


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Return gradient times upstream: the same memory if nothing else can need it any more."""
    if upstream.ndim == 1:
        shape = (gradient.shape[0], 1, *gradient.shape[2:])
        upstream = upstream.reshape(shape)
    if type(gradient) is not Tensor or type(upstream) is not Tensor:  # traced: the values are open
        return (gradient * upstream).to(gradient.dtype)
    if graph_is_kept():  # what is handed out becomes the caller's, who may write to it
        return (gradient * upstream).to(gradient.dtype)
    if upstream.ndim == 0 and is_one(upstream):
        return gradient
    on_gpu = gradient.is_cuda and gradient.is_contiguous() and upstream.ndim == 0
    if on_gpu and fastest_backend(gradient.device) == "triton":
        from dkl.losses.triton_kernels import scale_gradient_

        return scale_gradient_(gradient, upstream)  # reads nothing where upstream is one
    return gradient.mul_(upstream)


def is_one(upstream: Tensor) -> bool:
    """Return whether a gradient without dimensions is one; no where asking would wait."""
    return upstream.is_cpu and type(upstream) is Tensor and upstream.item() == 1.0


def graph_is_kept() -> bool:
    """Tell whether this backward pass keeps the graph; yes where PyTorch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _differentiable_gradients(
    input: Tensor, target: Tensor, problem: Problem, needs: Needs, upstream: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by the reference formula, so that they can be differentiated again."""
    options = LossOptions(
        problem.weights,
        problem.counted_N,
        problem.options,
        *problem.scales,  # type: ignore[arg-type]
        normalization="rows",
        detach_weights=True,
        reduction="sum" if problem.summed else "none",
        denominator=None,
        num_items=None,
    )
    value = reference_loss(input, target, options).loss
    wanted = [x for x, needed in zip((input, target), needs, strict=True) if needed]
    found = iter(
        torch.autograd.grad(
            value,
            wanted,
            upstream.reshape(value.shape),
            create_graph=True,
            materialize_grads=True,
        )
    )
    return (next(found) if needs[0] else None, next(found) if needs[1] else None)

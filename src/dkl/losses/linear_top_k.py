"""The IKL loss of a linear head against a cached teacher's k most likely classes.

Shapes: N rows (tokens), V classes (the vocabulary), R rows of a chunk. ``buckets.py`` has the
formula, ``chunks.py`` the head.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from dkl.losses.buckets import (
    Buckets,
    blockwise_buckets,
    blockwise_gradient,
    check_teacher,
    rest_logits,
    student_buckets,
    take_teacher,
)
from dkl.losses.chunks import (
    HeadOptions,
    HeadRows,
    Sweep,
    Swept,
    check_options,
    choose_kernel,
    choose_rows,
    chunked_loss,
    chunks_of,
    dense_loss,
    rows_per_chunk,
    without_autocast,
)
from dkl.losses.decoupled import DecoupledParts
from dkl.losses.linear import check_head, dense_logits
from dkl.losses.row_kernel import LossOptions, RowKernel, RowOptions, RowWeights
from dkl.losses.rows import NO_LABEL
from dkl.losses.top_k import TopKOptions


class LinearTopKOptions(TopKOptions, total=False):
    """Keyword options of :func:`linear_top_k_ikl_loss`, where they are explained."""

    input_bias: Tensor | None
    input_softcap: float | None
    input_logit_scale: float
    chunk_size: int | None


def _sweep_head(
    kernel: RowKernel,
    head: HeadOptions,
    target: Buckets,
    options: LossOptions,
    chunk_size: int | None,
    tensors: Sequence[Any],
    sweep: Sweep,
) -> Swept:
    """Compute the rows of a head and the gradients of its tensors, chunk by chunk."""
    hidden_NH, weight_VH = tensors[:2]
    chunk_rows = rows_per_chunk(hidden_NH, weight_VH.shape[0], chunk_size)
    mse_N, ce_N = torch.empty_like(target.logits[:, :2].t())
    input_rows = HeadRows(tensors, head, sweep.needs, chunk_rows)

    def compute(chunk: slice) -> None:  # a function, so that nothing of a chunk outlives it
        buckets = target.rows(chunk)
        input_RV = input_rows.logits(chunk)
        logits_RB, total_R1 = blockwise_buckets(input_RV, buckets)
        result = kernel(
            logits_RB,
            buckets.logits,
            RowWeights(class_probs=buckets.weights),
            None if options.counted_N is None else options.counted_N[chunk],
            sweep.scales,
            options.rows,
            (any(sweep.needs), False),
        )
        mse_N[chunk], ce_N[chunk] = result.mse_N, result.ce_N
        if result.input_gradient is not None:
            gradient_RV = blockwise_gradient(result.input_gradient, input_RV, total_R1, buckets)
            factor_R = None if sweep.factor_N is None else sweep.factor_N[chunk]
            input_rows.add_gradient(chunk, gradient_RV, factor_R)

    with torch.no_grad(), without_autocast(hidden_NH.device):
        for chunk in chunks_of(hidden_NH.shape[0], chunk_rows):
            compute(chunk)
    return Swept(mse_N, ce_N, input_rows.finish(sweep.factor))


@overload
def linear_top_k_ikl_loss(
    input_hidden: Tensor,
    input_weight: Tensor,
    target_log_probs: Tensor,
    target_indices: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[LinearTopKOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def linear_top_k_ikl_loss(
    input_hidden: Tensor,
    input_weight: Tensor,
    target_log_probs: Tensor,
    target_indices: Tensor,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[LinearTopKOptions],
) -> Tensor: ...
def linear_top_k_ikl_loss(
    input_hidden: Tensor,
    input_weight: Tensor,
    target_log_probs: Tensor,
    target_indices: Tensor,
    *,
    input_bias: Tensor | None = None,
    target_tail_log_prob: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = NO_LABEL,
    mask: Tensor | None = None,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    normalization: str = "rows",
    break_asymmetry: bool = True,
    input_softcap: float | None = None,
    input_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DecoupledParts]:
    """Compute the IKL loss of a linear head against a cached teacher's k most likely classes.

    It is :func:`top_k_ikl_loss` of the logits that :func:`linear_ikl_loss` makes of
    ``input_hidden`` and ``input_weight``, where the formulas are; no more than a chunk of rows of
    these logits is ever in memory, and the forward pass makes the gradients. Second derivatives
    need ``backend="reference"``.

    Args:
        input_hidden: [N, H] or [B, T, H] last hidden states of the prediction (student).
        input_weight: [V, H] weight of its head, as ``nn.Linear(H, V).weight``.
        target_log_probs: [N, k] or [B, T, k] log-probabilities of the teacher at ``temperature``
            over all classes; -inf pads a row that lists fewer.
        target_indices: integers of the same shape: the classes, different within a row (not
            checked).
        input_bias: [V].
        target_tail_log_prob: [N] or [B, T] logarithm of the rest's probability; default one minus
            the listed.
        labels: integers [N] or [B, T]; only tell by ``ignore_index`` which rows count.
        ignore_index: rows with this label do not count.
        mask: bool [N] or [B, T]; True where a row counts.
        mse_weight: a >= 0 of the weighted MSE.
        ce_weight: b >= 0 of the soft cross-entropy.
        temperature: T > 0 at which the teacher was cached.
        weight_temperature: > 0, of the weights.
        gamma: power of the weights, >= 0.
        normalization: "rows" or "weights", as in ``decoupled_kl_loss``.
        break_asymmetry: let the weighted MSE reach the input; without it the term has no gradient.
        input_softcap: c > 0 of the head, or None.
        input_logit_scale: s > 0 of the head.
        reduction: "mean" over the rows that count, "sum", or "none": one value per row.
        denominator: as in ``decoupled_kl_loss``.
        num_items: as in ``decoupled_kl_loss``.
        return_parts: also return the two terms without their weights, detached.
        chunk_size: rows of a chunk, as in ``linear_ikl_loss``.
        backend: as in ``decoupled_kl_loss``; "reference" holds all logits.

    Returns:
        The loss, or with ``return_parts`` the loss and ``DecoupledParts``. Hidden states, weight
        and bias get gradients where they require them.

    Raises:
        ValueError: shapes, dtypes, numbers or options that do not fit.

    Example:
        >>> student = torch.nn.Linear(8, 1000, bias=False)
        >>> hidden, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 1000)
        >>> top = teacher.log_softmax(-1).topk(64)
        >>> loss = linear_top_k_ikl_loss(hidden, student.weight, top.values, top.indices)
        >>> loss.backward()
        >>> student.weight.grad.shape
        torch.Size([1000, 8])
    """
    head = check_head(
        "input", input_hidden, input_weight, input_bias, input_logit_scale, input_softcap
    )
    num_classes = input_weight.shape[0]
    teacher = target_log_probs, target_indices, target_tail_log_prob
    check_teacher(input_hidden.shape[:-1], num_classes, *teacher)
    rows = choose_rows("input_hidden", input_hidden, mask, labels, ignore_index)
    row_options = RowOptions(temperature, weight_temperature, gamma, break_asymmetry)
    target = take_teacher(rows, num_classes, head.dtype, *teacher, row_options)
    options = LossOptions(
        RowWeights(class_probs=target.weights),
        rows.counted_N,
        # The weights are powers already, of the buckets' softmax.
        row_options._replace(weight_temperature=1.0, gamma=1.0),
        mse_weight,
        ce_weight,
        normalization,
        True,
        reduction,
        denominator,
        num_items,
    )
    check_options(options, chunk_size, backend)
    tensors = (rows.take(input_hidden), input_weight, input_bias)
    kernel = choose_kernel(backend, input_hidden, options)
    if kernel is None:
        input_NV = dense_logits(*tensors, head)
        logits_NB, _ = student_buckets(input_NV, rest_logits(input_NV, target), target)
        terms = dense_loss(logits_NB, target.logits, rows, options)
    else:
        sweep = partial(_sweep_head, kernel, head, target, options, chunk_size)
        terms = chunked_loss(sweep, tensors, rows, options, lambda: target.weights.sum(1))
    return (terms.loss, DecoupledParts(terms.mse, terms.ce)) if return_parts else terms.loss

"""The IKL loss of two linear heads, for vocabularies whose logits do not fit into memory.

Shapes: N rows (tokens), R rows of a chunk, V classes (the vocabulary), H features. Hidden sizes of
input and target may differ. ``chunks.py`` has the machinery.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from dkl.losses.blocks import sum_weights
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
from dkl.losses.row_kernel import NO_WEIGHTS, LossOptions, RowKernel, RowOptions
from dkl.losses.rows import NO_LABEL, check_number


class LinearOptions(TypedDict, total=False):
    """Keyword options of :func:`linear_ikl_loss`, where they are explained."""

    input_bias: Tensor | None
    target_bias: Tensor | None
    labels: Tensor | None
    ignore_index: int
    mask: Tensor | None
    mse_weight: float
    ce_weight: float
    temperature: float
    weight_temperature: float
    gamma: float
    normalization: str
    break_asymmetry: bool
    input_softcap: float | None
    target_softcap: float | None
    input_logit_scale: float
    target_logit_scale: float
    reduction: str
    denominator: float | Tensor | None
    num_items: float | Tensor | None
    chunk_size: int | None
    backend: str


def check_head(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> HeadOptions:
    """Return how a head makes logits.

    Raises:
        ValueError: tensors that do not fit one another, or numbers out of range.
    """
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for part, value in tensors.items():
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}_{part} must be a floating-point tensor, got {got}")
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden must be [N, H] or [B, T, H] and {name}_weight [V, H], as the weight of "
            f"nn.Linear(H, V), got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{name}_weight needs a class and a feature, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}_bias must be [V] = {list(weight.shape[:1])}, got {list(bias.shape)}"
        )
    check_number(f"{name}_logit_scale", logit_scale, positive=True)
    if softcap is not None:
        check_number(f"{name}_softcap", softcap, positive=True)
    dtypes = {part: value.dtype for part, value in tensors.items()}
    if torch.is_autocast_enabled(hidden.device.type):
        half = torch.get_autocast_dtype(hidden.device.type)
        dtypes = {part: half if x != torch.float64 else x for part, x in dtypes.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"hidden, weight and bias of {name} must have one dtype outside of autocast, got "
            + ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items())
        )
    return HeadOptions(logit_scale, softcap, dtypes["hidden"])


def dense_logits(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: HeadOptions
) -> Tensor:
    """Return all logits [N, V] of a head, with autograd."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V)
    if options.scale == 1.0 and options.softcap is None:
        return logits_NV
    logits_NV = options.scale * logits_NV.to(torch.promote_types(options.dtype, torch.float32))
    if options.softcap is None:
        return logits_NV
    return torch.tanh(logits_NV / options.softcap) * options.softcap


def _check_pair(
    input_hidden: Tensor, input_weight: Tensor, target_hidden: Tensor, target_weight: Tensor
) -> None:
    if input_hidden.shape[:-1] != target_hidden.shape[:-1]:
        raise ValueError(
            "input_hidden and target_hidden must have the same rows, [N, H] or [B, T, H] (H may "
            f"differ), got {list(input_hidden.shape)} and {list(target_hidden.shape)}"
        )
    sizes = input_weight.shape[0], target_weight.shape[0]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"input_weight has {sizes[0]} classes and target_weight {sizes[1]}: class j must be "
            "the same token in both. Where only padding differs, slice the larger one, "
            f"weight[:{min(sizes)}] (and its bias); zeros for the smaller one would be logits that "
            "no model made"
        )


def _sweep_heads(
    kernel: RowKernel,
    heads: tuple[HeadOptions, HeadOptions],
    options: LossOptions,
    chunk_size: int | None,
    tensors: Sequence[Any],
    sweep: Sweep,
) -> Swept:
    """Compute the rows of two heads and the gradients of their tensors, chunk by chunk."""
    hidden_NH, weight_VH = tensors[0], tensors[1]
    chunk_rows = rows_per_chunk(hidden_NH, weight_VH.shape[0], chunk_size)
    exact = torch.promote_types(heads[0].dtype, heads[1].dtype)
    exact = torch.promote_types(exact, torch.float32)
    mse_N, ce_N = hidden_NH.new_empty((2, hidden_NH.shape[0]), dtype=exact)
    needs = (any(sweep.needs[:3]), any(sweep.needs[3:]))
    input_rows = HeadRows(tensors[:3], heads[0], sweep.needs[:3], chunk_rows)
    target_rows = HeadRows(tensors[3:], heads[1], sweep.needs[3:], chunk_rows)

    def compute(chunk: slice) -> None:  # a function, so that nothing of a chunk outlives it
        result = kernel(
            input_rows.logits(chunk),
            target_rows.logits(chunk),
            NO_WEIGHTS,
            None if options.counted_N is None else options.counted_N[chunk],
            sweep.scales,
            options.rows,
            needs,
        )
        mse_N[chunk], ce_N[chunk] = result.mse_N, result.ce_N
        factor_R = None if sweep.factor_N is None else sweep.factor_N[chunk]
        if result.input_gradient is not None:
            input_rows.add_gradient(chunk, result.input_gradient, factor_R)
        if result.target_gradient is not None:
            target_rows.add_gradient(chunk, result.target_gradient, factor_R)

    with torch.no_grad(), without_autocast(hidden_NH.device):
        for chunk in chunks_of(hidden_NH.shape[0], chunk_rows):
            compute(chunk)
    gradients = input_rows.finish(sweep.factor) + target_rows.finish(sweep.factor)
    return Swept(mse_N, ce_N, gradients)


def _weight_sums(
    tensors: Sequence[Any], head: HeadOptions, options: RowOptions, chunk_size: int | None
) -> Tensor:
    """Return W = sum_j softmax(m / tau)_j^gamma of each row [N], for D; costs one product."""
    chunk_rows = rows_per_chunk(tensors[0], tensors[1].shape[0], chunk_size)
    with torch.no_grad(), without_autocast(tensors[0].device):
        rows = HeadRows(tensors, head, (False, False, False), chunk_rows)
        sums_N = torch.empty(len(tensors[0]), dtype=rows.exact, device=tensors[0].device)
        for chunk in chunks_of(sums_N.shape[0], chunk_rows):
            sums_N[chunk] = sum_weights(rows.logits(chunk), NO_WEIGHTS, None, options)
    return sums_N


@overload
def linear_ikl_loss(
    input_hidden: Tensor,
    input_weight: Tensor,
    target_hidden: Tensor,
    target_weight: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def linear_ikl_loss(
    input_hidden: Tensor,
    input_weight: Tensor,
    target_hidden: Tensor,
    target_weight: Tensor,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
def linear_ikl_loss(
    input_hidden: Tensor,
    input_weight: Tensor,
    target_hidden: Tensor,
    target_weight: Tensor,
    *,
    input_bias: Tensor | None = None,
    target_bias: Tensor | None = None,
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
    target_softcap: float | None = None,
    input_logit_scale: float = 1.0,
    target_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DecoupledParts]:
    r"""Compute the IKL loss from hidden states and the weights of two linear heads.

    It is :func:`ikl_loss` (equation 7 of arXiv 2305.13948) with weights softmax(target) of

    .. math::
        n = cap(s (h W^T + b)), \quad cap(z) = c \tanh(z / c)

    and m likewise, but no more than a chunk of rows of the logits is ever in memory: each chunk's
    gradients become those of hidden states and weights at once, in the forward pass, and the
    backward pass only multiplies them. Gradients of weights are summed in float32. Second
    derivatives need ``backend="reference"``, plain autograd on whole logits.

    The scale comes before the cap, so that no logit exceeds c; models that have both do it in this
    order. In the configurations of ``transformers``, c is ``final_logit_softcapping`` (Gemma) and s
    is ``logit_scale`` (Cohere) or 1 / ``logits_scaling`` (Granite). Scale and cap are computed in
    float32.

    Args:
        input_hidden: [N, H] or [B, T, H] last hidden states of the prediction (student).
        input_weight: [V, H] weight of its head, as ``nn.Linear(H, V).weight``.
        target_hidden: hidden states of the reference (teacher), same rows; H may differ.
        target_weight: weight of its head, same V.
        input_bias: [V].
        target_bias: [V].
        labels: integers [N] or [B, T], aligned with the logits as for ``F.cross_entropy``. They
            only tell by ``ignore_index`` which rows count.
        ignore_index: rows with this label do not count.
        mask: bool [N] or [B, T]; True where a row counts. Rows that do not count reach neither
            loss nor gradients, even when they hold NaN, and cost nothing on the CPU.
        mse_weight: a >= 0 of the weighted MSE (the authors' BETA).
        ce_weight: b >= 0 of the soft cross-entropy (the authors' ALPHA).
        temperature: T > 0 of the soft cross-entropy only. No T^2 factor is applied.
        weight_temperature: > 0, of the softmax(target) weights.
        gamma: power of the weights, >= 0.
        normalization: "rows" or, as in GKL, "weights": see ``decoupled_kl_loss``. The latter with
            gamma other than 1 and no ``denominator`` computes the target's logits twice.
        break_asymmetry: let the weighted MSE reach the input too; False gives DKL.
        input_softcap: c > 0 of the input's head, or None.
        target_softcap: c > 0 of the target's head, or None.
        input_logit_scale: s > 0 of the input's head.
        target_logit_scale: s > 0 of the target's head.
        reduction: "mean" over the rows that count, "sum", or "none": one value per row; for its
            gradients the backward pass computes the logits again.
        denominator: replaces D of normalization "weights": a number or a tensor without dimensions.
        num_items: replaces the number of rows in "mean", for exact gradient accumulation.
        return_parts: also return the two terms without their weights, detached.
        chunk_size: rows of a chunk; default 2^23 / V, but enough that the products are efficient.
        backend: as in ``decoupled_kl_loss``; "reference" holds all logits.

    Returns:
        The loss (float32 for half inputs), or with ``return_parts`` the loss and
        ``DecoupledParts``. Gradients reach what requires them: on the input's side from both
        terms, on the target's from the weighted MSE.

    Raises:
        ValueError: shapes, dtypes or options that do not fit. Vocabularies of different sizes
            are to be sliced, never padded.

    Example:
        >>> student, teacher = torch.nn.Linear(8, 100), torch.nn.Linear(16, 100)
        >>> student_hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
        >>> labels = torch.tensor([[3, 8, 1, -100, -100], [9, 9, 2, 4, -100]])
        >>> loss = linear_ikl_loss(
        ...     student_hidden,
        ...     student.weight,
        ...     teacher_hidden,
        ...     teacher.weight.detach(),
        ...     input_bias=student.bias,
        ...     target_bias=teacher.bias.detach(),
        ...     labels=labels,
        ... )
        >>> loss.backward()
        >>> student.weight.grad.shape
        torch.Size([100, 8])
    """
    heads = (
        check_head(
            "input", input_hidden, input_weight, input_bias, input_logit_scale, input_softcap
        ),
        check_head(
            "target", target_hidden, target_weight, target_bias, target_logit_scale, target_softcap
        ),
    )
    _check_pair(input_hidden, input_weight, target_hidden, target_weight)
    rows = choose_rows("input_hidden", input_hidden, mask, labels, ignore_index)
    options = LossOptions(
        NO_WEIGHTS,
        rows.counted_N,
        RowOptions(temperature, weight_temperature, gamma, break_asymmetry),
        mse_weight,
        ce_weight,
        normalization,
        True,
        reduction,
        denominator,
        num_items,
    )
    check_options(options, chunk_size, backend)
    inputs = (rows.take(input_hidden), input_weight, input_bias)
    targets = (rows.take(target_hidden), target_weight, target_bias)
    kernel = choose_kernel(backend, input_hidden, options)
    if kernel is None:
        logits = dense_logits(*inputs, heads[0]), dense_logits(*targets, heads[1])
        terms = dense_loss(*logits, rows, options)
    else:
        sweep = partial(_sweep_heads, kernel, heads, options, chunk_size)
        sums = partial(_weight_sums, targets, heads[1], options.rows, chunk_size)
        terms = chunked_loss(
            sweep, (*inputs, *targets), rows, options, None if gamma == 1.0 else sums
        )
    return (terms.loss, DecoupledParts(terms.mse, terms.ce)) if return_parts else terms.loss

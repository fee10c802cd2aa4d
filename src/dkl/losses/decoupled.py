"""The decoupled Kullback-Leibler loss: weighted MSE on logit differences plus soft cross-entropy.

Source: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024 (arXiv 2305.13948),
and "Generalized Kullback-Leibler Divergence Loss" (arXiv 2503.08038) for gamma and "weights".

Shapes: N rows, C classes. With d = target - input, weights w, W = sum_j w_j and
mu = sum_j w_j d_j / W, the pairwise weighted MSE of a row needs O(C) only, in centred form:

    (1/4) sum_jk w_j w_k (d_j - d_k)^2  =  (W/2) sum_j w_j (d_j - mu)^2.
"""

import functools
from typing import Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from dkl.losses.backends import BACKENDS, choose_backend
from dkl.losses.formula import reference_loss
from dkl.losses.fused_loss import fused_loss
from dkl.losses.row_kernel import NO_WEIGHTS, LossOptions, RowOptions, RowWeights
from dkl.losses.rows import (
    NO_LABEL,
    check_divisor,
    check_logits,
    check_number,
    check_reduction,
    counted_rows,
)


class DecoupledParts(NamedTuple):
    """The two terms of the loss without their weights, detached, reduced as the loss is."""

    weighted_mse: Tensor
    soft_cross_entropy: Tensor


class DecoupledOptions(TypedDict, total=False):
    """Keyword options of :func:`decoupled_kl_loss`, where they are explained."""

    class_table: Tensor | None
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
    detach_weights: bool
    reduction: str
    denominator: float | Tensor | None
    num_items: float | Tensor | None
    backend: str


def _check_weight_source(
    input: Tensor,
    class_probs: Tensor | None,
    class_table: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    weight_temperature: float,
) -> None:
    num_classes = input.shape[1]
    if class_probs is not None and class_table is not None:
        raise ValueError("give class_probs or class_table with labels, not both")
    if class_table is not None and labels is None:
        raise ValueError("class_table needs labels: its rows are gathered by them")
    if class_table is not None and class_table.shape != (num_classes, num_classes):
        raise ValueError(
            f"class_table must be [C, C] = [{num_classes}, {num_classes}], "
            f"got {list(class_table.shape)}"
        )
    if class_probs is not None and class_probs.shape != input.shape:
        raise ValueError(
            f"class_probs must have input's shape {list(input.shape)}, "
            f"got {list(class_probs.shape)}; a [C, C] table goes to class_table, with labels"
        )
    if weight_temperature != 1.0 and (class_probs is not None or class_table is not None):
        raise ValueError(
            "weight_temperature acts on softmax(target) weights only and would be ignored with "
            "class_probs or class_table; pass it to ClassStatistics(temperature=...) instead"
        )
    if labels is None and ignore_index != NO_LABEL:
        raise ValueError("ignore_index would be ignored without labels: pass labels too")


def _check_options(
    mse_weight: float,
    ce_weight: float,
    temperature: float,
    weight_temperature: float,
    gamma: float,
    normalization: str,
    reduction: str,
    backend: str,
) -> None:
    check_reduction(reduction)
    check_number("mse_weight", mse_weight)
    check_number("ce_weight", ce_weight)
    check_number("gamma", gamma)
    check_number("temperature", temperature, positive=True)
    check_number("weight_temperature", weight_temperature, positive=True)
    if normalization not in ("rows", "weights"):
        raise ValueError(f"normalization must be 'rows' or 'weights', got {normalization!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


# The same few options come back at every step, and small inputs notice what checks cost.
_check_options_once = functools.lru_cache(maxsize=64)(_check_options)
_NUMBERS = {int, float}


def _check_divisors(
    denominator: float | Tensor | None,
    num_items: float | Tensor | None,
    normalization: str,
    reduction: str,
) -> None:
    check_divisor("denominator", denominator)
    check_divisor("num_items", num_items)
    if denominator is not None and normalization == "rows":
        raise ValueError("denominator belongs to normalization='weights'; for rows pass num_items")
    if num_items is not None and reduction != "mean":
        raise ValueError("num_items replaces the row count of reduction='mean' and needs it")


@overload
def decoupled_kl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[True],
    **options: Unpack[DecoupledOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def decoupled_kl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[DecoupledOptions],
) -> Tensor: ...


def decoupled_kl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = None,
    *,
    class_table: Tensor | None = None,
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
    detach_weights: bool = True,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DecoupledParts]:
    r"""Compute the decoupled KL loss, the engine behind the DKL, IKL and GKL losses.

    .. math::
        \frac{a}{4} \sum_{jk} w_j w_k (\Delta m_{jk} - \Delta n_{jk})^2
        - b \sum_j softmax(m / T)_j \log softmax(n / T)_j

    with m = target, n = input, :math:`\Delta m_{jk} = m_j - m_k` (equations 5 to 7 of arXiv
    2305.13948), averaged over rows. Exact in O(C) time and memory. The weights w of a row are
    ``class_probs``, or the row of ``class_table`` of its label (class-wise global information),
    or softmax(target / weight_temperature); then w := w^gamma, not renormalised.

    Coming from ``F.kl_div``: the order of the arguments is the same, but both are *logits* (no log,
    no softmax), "mean" is over rows ("batchmean" there), and there is no ``log_target``.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction (student, adversarial); any
            floating dtype, finite. Gets gradients from the soft cross-entropy and, when
            ``break_asymmetry``, from the weighted MSE.
        target: logits of the reference (teacher, clean), of input's shape. Gets gradients from the
            weighted MSE; detach it where the reference is fixed.
        class_probs: weights of each row, input's shape, >= 0; rows need not sum to one.
        class_table: [C, C] weights by class, gathered by ``labels`` (see ``ClassStatistics``).
        labels: integers of input's shape without dim 1, in [0, C) or ``ignore_index``.
        ignore_index: rows with this label do not count.
        mask: bool, input's shape without dim 1; True where a row counts. Rows that do not count
            reach neither loss nor gradients, even when they hold NaN.
        mse_weight: a >= 0 (the authors' BETA); the factor 1/4 is inside the term.
        ce_weight: b >= 0 (the authors' ALPHA).
        temperature: T > 0 of the soft cross-entropy only. No T^2 factor is applied.
        weight_temperature: > 0, of softmax(target) weights only.
        gamma: power of the weights, >= 0.
        normalization: "rows" divides both terms by the number of rows that count; "weights" (GKL)
            divides the weighted MSE by D, the sum over these rows of (sum_j w_j)^2, instead.
        break_asymmetry: let the weighted MSE reach ``input`` too (BA); False gives DKL.
        detach_weights: no gradient through the weights.
        reduction: "mean", "sum", or "none": one value per row, zero where it does not count; with
            "weights" normalization their mean over counted rows is the loss.
        denominator: replaces D, for exact data parallelism and gradient accumulation: a number or
            a tensor without dimensions, >= 0; at zero nothing counts and the term is zero.
        num_items: replaces the number of rows in "mean", likewise.
        return_parts: also return the two terms without their weights, detached.
        backend: "auto" or "reference" (plain autograd: double backward, torch.func).

    Returns:
        The loss (float32 for half inputs), or with ``return_parts`` the loss and
        ``DecoupledParts``. With no rows that count it is 0.0 with zero gradients.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or an option that has no effect.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 1.0, 0.0]])
        >>> loss, parts = decoupled_kl_loss(student, teacher, return_parts=True)
        >>> [round(x.item(), 4) for x in (loss, *parts)]
        [1.9685, 0.4879, 1.4806]
    """
    numbers = (mse_weight, ce_weight, temperature, weight_temperature, gamma)
    plain = _NUMBERS.issuperset(map(type, numbers)) and not torch.compiler.is_compiling()
    check = _check_options_once if plain else _check_options
    check(*numbers, normalization, reduction, backend)
    if denominator is not None or num_items is not None:
        _check_divisors(denominator, num_items, normalization, reduction)
    check_logits(input, target)
    if class_probs is not None or class_table is not None or ignore_index != NO_LABEL:
        _check_weight_source(
            input, class_probs, class_table, labels, ignore_index, weight_temperature
        )
    counted_N = counted_rows(input, mask, labels, ignore_index)
    options = LossOptions(
        _row_weights(class_probs, class_table, labels, counted_N),
        counted_N,
        RowOptions(temperature, weight_temperature, gamma, break_asymmetry),
        mse_weight,
        ce_weight,
        normalization,
        detach_weights,
        reduction,
        denominator,
        num_items,
    )
    chosen = choose_backend(backend, input, target, options)
    if chosen == "reference":
        terms = reference_loss(input, target, options)
    else:
        terms = fused_loss(
            input,
            target,
            options,
            chosen,
            registered=backend != "auto",
            return_parts=return_parts,
        )
    if return_parts:
        return terms.loss, DecoupledParts(terms.mse, terms.ce)
    return terms.loss


def _row_weights(
    class_probs: Tensor | None,
    class_table: Tensor | None,
    labels: Tensor | None,
    counted_N: Tensor | None,
) -> RowWeights:
    if class_table is None or labels is None:
        return NO_WEIGHTS if class_probs is None else RowWeights(class_probs)
    labels_N = labels.reshape(-1).long()
    # A label that stands for a row that does not count is no row of the table.
    labels_N = labels_N if counted_N is None else labels_N.masked_fill(~counted_N, 0)
    return RowWeights(None, class_table, labels_N)

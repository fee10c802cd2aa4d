"""The decoupled KL loss of each row in plain operations: the ``reference`` backend.

Source: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024 (arXiv 2305.13948),
and "Generalized Kullback-Leibler Divergence Loss" (arXiv 2503.08038) for gamma.

Shapes: N rows, C classes. With d = target - input, weights w, W = sum_j w_j and
mu = sum_j w_j d_j / W, the pairwise weighted MSE of a row needs O(C) only, in centred form:

    (1/4) sum_jk w_j w_k (d_j - d_k)^2  =  (W/2) sum_j w_j (d_j - mu)^2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.losses.reduction import keep_counted, num_counted, reduce_rows, safe_divisor
from dkl.losses.row_kernel import LossOptions, LossTerms, RowWeights
from dkl.losses.rows import compute_dtype, fill_uncounted, to_rows


def weighted_mse_rows(
    input_NC: Tensor, target_NC: Tensor, weights_NC: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted MSE of each row in centred form, and its weight sum W; both [N]."""
    difference_NC = target_NC - input_NC
    total_N1 = weights_NC.sum(-1, keepdim=True)
    # A row whose weights are all zero contributes zero, not 0/0.
    divisor_N1 = torch.where(total_N1 > 0, total_N1, torch.ones_like(total_N1))
    mean_N1 = (weights_NC * difference_NC).sum(-1, keepdim=True) / divisor_N1
    squares_N = (weights_NC * (difference_NC - mean_N1).square()).sum(-1)
    total_N = total_N1.squeeze(-1)
    return 0.5 * total_N * squares_N, total_N


def soft_cross_entropy_rows(input_NC: Tensor, target_NC: Tensor, temperature: float) -> Tensor:
    """Return -sum_j softmax(target/T)_j log softmax(input/T)_j per row, soft label detached."""
    label_NC = F.softmax(target_NC.detach() / temperature, -1)
    return -(label_NC * F.log_softmax(input_NC / temperature, -1)).sum(-1)


def _table_rows(class_table: Tensor, labels_N: Tensor) -> Tensor:
    """Gather rows of the class table; an unknown label is an error, as in F.cross_entropy."""
    if torch.compiler.is_compiling():
        return class_table.index_select(0, labels_N)
    try:
        return class_table.index_select(0, labels_N)
    except IndexError as error:
        raise label_error(class_table, labels_N) from error


def label_error(class_table: Tensor, labels_N: Tensor) -> ValueError:
    """Return the error for labels that are no rows of the class table."""
    return ValueError(
        f"labels must be in [0, {class_table.shape[0]}) or ignore_index where a row does not "
        f"count, got {labels_N.min().item()} to {labels_N.max().item()}"
    )


def class_weights(
    target_NC: Tensor,
    weights: RowWeights,
    counted: Tensor | None,
    weight_temperature: float,
    gamma: float,
) -> Tensor:
    """Return the weights w [N, C] from their one source, raised to the power gamma.

    Rows that do not count hold one: the power of zero has infinite derivatives.
    """
    if weights.class_table is not None and weights.labels_N is not None:
        weights_NC = _table_rows(weights.class_table.to(target_NC.dtype), weights.labels_N)
        weights_NC = fill_uncounted(weights_NC, counted, 1.0)
    elif weights.class_probs is not None:
        weights_NC = to_rows(weights.class_probs, target_NC.dtype, counted, fill=1.0)
    else:  # in log space, so that the power's gradient is finite where a probability underflows
        return (gamma * F.log_softmax(target_NC / weight_temperature, -1)).exp()
    return weights_NC if gamma == 1.0 else weights_NC.pow(gamma)


def reference_rows(
    input: Tensor,
    target: Tensor,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weighted MSE, soft cross-entropy and weight sum of each row; all [N]."""
    dtype, counted, rows = compute_dtype(input, target), options.counted_N, options.rows
    input_NC, target_NC = to_rows(input, dtype, counted), to_rows(target, dtype, counted)
    weights_NC = class_weights(
        target_NC, options.weights, counted, rows.weight_temperature, rows.gamma
    )
    mse_N, total_N = weighted_mse_rows(
        input_NC if rows.break_asymmetry else input_NC.detach(),
        target_NC,
        weights_NC.detach() if options.detach_weights else weights_NC,
    )
    return mse_N, soft_cross_entropy_rows(input_NC, target_NC, rows.temperature), total_N


def reference_loss(input: Tensor, target: Tensor, options: LossOptions) -> LossTerms:
    """Return the loss of ``decoupled_kl_loss`` in plain operations, differentiable at will."""
    counted, num_items = options.counted_N, options.num_items
    mse_N, ce_N, total_N = reference_rows(input, target, options)
    if options.normalization == "weights":
        # n / D turns the mean over the rows into a sum divided by D
        num_rows = num_counted(total_N, counted) if num_items is None else num_items
        denominator = options.denominator
        if denominator is None:
            denominator = keep_counted(total_N.square(), counted).sum()
        mse_N = mse_N * (num_rows / safe_divisor(denominator, total_N))
    row_shape = input.shape[:1] + input.shape[2:]

    def reduced(values_N: Tensor) -> Tensor:
        return reduce_rows(values_N, options.reduction, counted, row_shape, num_items)

    loss = reduced(options.mse_weight * mse_N + options.ce_weight * ce_N)
    return LossTerms(loss, reduced(mse_N.detach()), reduced(ce_N.detach()))

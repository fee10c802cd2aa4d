"""What a backend of the decoupled KL loss computes: rows of values and of gradients together.

Shapes: N rows, C classes, K rows of a class table. With m = target, n = input, weights w,
W = sum_j w_j, d = m - n, mu = sum_j w_j d_j / W, p = softmax(m / T) and q = softmax(n / T):

    mse = (W / 2) sum_j w_j (d_j - mu)^2          ce = -sum_j p_j log q_j
    d/dn (a mse + b ce) = b (q - p) / T - a W w (d - mu)     (the last term only with BA)
    d/dm (a mse + b ce) = a W w (d - mu)

(equations 5 to 7 of arXiv 2305.13948; weights and soft label detached). ``decoupled.py`` holds the
same formula for autograd, and every backend is tested against it.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Scale = float | Tensor
"""A number, or a tensor without dimensions on the device of the rows (no synchronisation)."""


class RowWeights(NamedTuple):
    """Where the weights of a row come from: at most one source; softmax(m / tau) without any.

    Args:
        class_probs: [N, C] weights of each row, any floating dtype.
        class_table: [K, C] weights by class, any floating dtype, never copied to [N, C].
        labels_N: int64 rows of the table, in [0, K); 0 where a row does not count.
    """

    class_probs: Tensor | None = None
    class_table: Tensor | None = None
    labels_N: Tensor | None = None


NO_WEIGHTS = RowWeights()


class RowOptions(NamedTuple):
    """Numbers of the formula that are the same for all rows.

    Args:
        temperature: T > 0 of the soft cross-entropy.
        weight_temperature: tau > 0 of softmax(m / tau) weights.
        gamma: power of the weights, >= 0.
        break_asymmetry: whether the weighted MSE reaches the input.
    """

    temperature: float = 1.0
    weight_temperature: float = 1.0
    gamma: float = 1.0
    break_asymmetry: bool = True


class LossOptions(NamedTuple):
    """How the loss of a batch is made from its rows; ``decoupled_kl_loss`` explains each.

    Args:
        weights: source of the class weights; ``labels_N`` are 0 where a row does not count.
        counted_N: False for rows that do not count, or None where all do.
        rows: numbers of the formula.
        mse_weight: weight of the weighted MSE.
        ce_weight: weight of the soft cross-entropy.
        normalization: "rows" or "weights".
        detach_weights: whether no gradient goes through the weights.
        reduction: "mean", "sum" or "none".
        denominator: replaces the sum of W^2 over the rows.
        num_items: replaces the number of rows.
    """

    weights: RowWeights
    counted_N: Tensor | None
    rows: RowOptions
    mse_weight: float
    ce_weight: float
    normalization: str
    detach_weights: bool
    reduction: str
    denominator: float | Tensor | None
    num_items: float | Tensor | None


class LossTerms(NamedTuple):
    """The loss and its two terms without their weights, reduced alike.

    Args:
        loss: what is differentiated.
        mse: weighted MSE, detached.
        ce: soft cross-entropy, detached.
    """

    loss: Tensor
    mse: Tensor
    ce: Tensor


class RowResult(NamedTuple):
    """The terms of each row, without scales, and the gradients of their scaled sum.

    Args:
        mse_N: weighted MSE, float32 (float64 when an input is float64); 0 where not counted.
        ce_N: soft cross-entropy, likewise.
        input_gradient: [N, C] in the dtype of the input, or None if it was not needed.
        target_gradient: [N, C] in the dtype of the target, or None if it was not needed.
    """

    mse_N: Tensor
    ce_N: Tensor
    input_gradient: Tensor | None
    target_gradient: Tensor | None


RowKernel = Callable[..., RowResult]
"""``decoupled_rows`` of a backend; the arguments are those of ``dkl.losses.blocks.run_blocks``."""

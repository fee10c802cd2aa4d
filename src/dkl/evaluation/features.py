"""What a model's predictions look like class by class.

Shapes: N samples, C classes.
"""

import torch
from torch import Tensor


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Return how many samples each class has.

    Args:
        labels: [N] int64 class indices.
        num_classes: C.

    Returns:
        [C] int64.

    Raises:
        ValueError: when labels are not [N] integers in [0, num_classes).

    Example:
        >>> class_counts(torch.tensor([2, 0, 2]), num_classes=4)
        tensor([1, 0, 2, 0])
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be [N] integer class indices, got {labels.dtype} {list(labels.shape)}."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}), got values from {int(labels.min())} "
            f"to {int(labels.max())}."
        )
    return torch.bincount(labels.long(), minlength=num_classes)


def class_margins(
    logits: Tensor, labels: Tensor, num_classes: int, *, missing: float = 0.0
) -> Tensor:
    """Return the margin of each class: how far its mean probability leads the others.

    Margin_y = p_y[y] - max_{k != y} p_y[k], with p_y the mean of softmax(logits) over the samples
    of class y (figure 3c of the paper plots the difference of two models' margins).

    Args:
        logits: [N, C] floating point.
        labels: [N] int64 class indices.
        num_classes: C, at least 2.
        missing: the value of classes without samples, which have no margin. The default 0 draws
            no bar in the figure; ``class_counts`` tells which classes these are.

    Returns:
        [C] margins from -1 to 1, float64 for float64 logits and float32 otherwise; free of NaN
        when the logits are.

    Raises:
        ValueError: when the shapes do not fit or num_classes is below 2.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]).log()
        >>> class_margins(logits, torch.tensor([0, 0, 1]), num_classes=2)
        tensor([0.2500, 0.8000])
    """
    counts_C = _checked_counts(logits, labels, num_classes)
    if num_classes < 2:
        raise ValueError(f"a margin needs another class: num_classes is {num_classes}.")
    probs_NC = torch.softmax(logits.double(), dim=1)
    sums_CC = probs_NC.new_zeros(num_classes, num_classes).index_add_(0, labels.long(), probs_NC)
    means_CC = sums_CC / counts_C.clamp(min=1).unsqueeze(1)
    others_CC = means_CC.clone().fill_diagonal_(-torch.inf)
    margins_C = means_CC.diagonal() - others_CC.amax(dim=1)
    margins_C = torch.where(counts_C > 0, margins_C, missing)
    return margins_C if logits.dtype == torch.float64 else margins_C.float()


def per_class_accuracy(
    logits: Tensor, labels: Tensor, num_classes: int, *, missing: float = 0.0
) -> Tensor:
    """Return the share of correct predictions in each class.

    Args:
        logits: [N, C] floating point.
        labels: [N] int64 class indices.
        num_classes: C.
        missing: the value of classes without samples; ``class_counts`` tells which these are.

    Returns:
        [C] float32 accuracies from 0 to 1.

    Raises:
        ValueError: when the shapes do not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        >>> per_class_accuracy(logits, torch.tensor([0, 0, 1]), num_classes=2)
        tensor([0.5000, 1.0000])
    """
    counts_C = _checked_counts(logits, labels, num_classes)
    hits_N = logits.argmax(dim=1) == labels
    hits_C = torch.bincount(labels[hits_N].long(), minlength=num_classes)
    return torch.where(counts_C > 0, hits_C / counts_C.clamp(min=1), missing).float()


def _checked_counts(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Check that the shapes fit and return the samples per class."""
    if logits.ndim != 2 or logits.shape[1] != num_classes or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [N, {num_classes}], got {logits.dtype} "
            f"{list(logits.shape)}."
        )
    counts_C = class_counts(labels, num_classes)
    if len(labels) != len(logits):
        raise ValueError(f"logits have {len(logits)} rows, but there are {len(labels)} labels.")
    return counts_C

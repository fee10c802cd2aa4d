"""Whether confidence is what it promises: calibration error, reliability and likelihood.

Shapes: N samples, C classes, M bins of confidence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.evaluation.accuracy import check_clean_logits
from dkl.evaluation.features import class_counts

NUM_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Predictions sorted into M bins of equal width by their confidence, from 0 to 1.

    Args:
        confidence: [M] float64, mean probability of the predicted class in each bin; 0 in a bin
            without predictions.
        accuracy: [M] float64, share of right predictions in each bin; 0 likewise.
        count: [M] int64, predictions in each bin.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance of accuracy and confidence, bins weighted by their predictions."""
        gap_M = (self.accuracy - self.confidence).abs()
        return float((self.count * gap_M).sum() / self.count.sum())

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy over all predictions; negative where they are modest."""
        return float((self.count * (self.confidence - self.accuracy)).sum() / self.count.sum())


def reliability(logits: Tensor, labels: Tensor, *, num_bins: int = NUM_BINS) -> Reliability:
    r"""Sort predictions into bins of confidence.

    The confidence of a sample is :math:`c_i = \max_j softmax(z_i)_j`; bin m of M holds the samples
    with c in ((m - 1) / M, m / M] (Guo et al., "On Calibration of Modern Neural Networks", ICML
    2017, section 2).

    Args:
        logits: [N, C] floating point, finite, C >= 2, N >= 1.
        labels: [N] int64 class indices.
        num_bins: M, at least 1.

    Returns:
        Confidence, accuracy and count of every bin, on the CPU.

    Raises:
        ValueError: shapes, labels or numbers that do not fit.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]).log()
        >>> found = reliability(logits, torch.tensor([0, 1, 1]), num_bins=2)
        >>> found.count.tolist(), [round(value, 4) for value in found.confidence.tolist()]
        ([0, 3], [0.0, 0.8])
        >>> round(found.expected_calibration_error, 4)
        0.1333
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"num_bins must be an integer of at least 1, got {num_bins!r}.")
    _check(logits, labels)
    confidence_N, predicted_N = logits.detach().double().softmax(dim=1).max(dim=1)
    # Upper ends belong to their bin: c = 1 is in the last one, and c > 0 always.
    bins_N = (confidence_N * num_bins).ceil().long().clamp(1, num_bins) - 1
    right_N = (predicted_N == labels.to(predicted_N.device)).double()
    count_M = torch.bincount(bins_N, minlength=num_bins)
    confidence_M, accuracy_M = (
        confidence_N.new_zeros(num_bins).index_add_(0, bins_N, values_N) / count_M.clamp(min=1)
        for values_N in (confidence_N, right_N)
    )
    return Reliability(confidence_M.cpu(), accuracy_M.cpu(), count_M.cpu())


def expected_calibration_error(
    logits: Tensor, labels: Tensor, *, num_bins: int = NUM_BINS
) -> float:
    r"""Return the expected calibration error (ECE) of predictions.

    .. math:: ECE = \sum_m \frac{n_m}{N} |acc_m - conf_m|

    over the bins of ``reliability`` (Guo et al., ICML 2017, equation 3; 15 bins as in their
    tables). It depends on the number of bins, and is biased upwards where bins hold few samples.

    Args:
        logits: [N, C] floating point, finite.
        labels: [N] int64 class indices.
        num_bins: M, bins of equal width.

    Returns:
        The error, from 0 to 1.

    Raises:
        ValueError: shapes, labels or numbers that do not fit.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25]]).log().expand(4, 2)
        >>> round(expected_calibration_error(logits, torch.tensor([0, 0, 0, 1])), 4)
        0.0
    """
    return reliability(logits, labels, num_bins=num_bins).expected_calibration_error


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    r"""Return the mean of :math:`-\log softmax(z_i)_{y_i}`, in nats.

    A proper score: unlike the calibration error, only the true probabilities minimise it.

    Args:
        logits: [N, C] floating point, finite.
        labels: [N] int64 class indices.

    Returns:
        The mean, at least 0.

    Raises:
        ValueError: shapes or labels that do not fit.

    Example:
        >>> logits = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> round(negative_log_likelihood(logits, torch.tensor([0, 1])), 4)
        0.4904
    """
    _check(logits, labels)
    # Rounding can leave a sure and right prediction at -0.
    return max(0.0, float(F.cross_entropy(logits.detach().double(), labels.to(logits.device))))


def _check(logits: Tensor, labels: Tensor) -> None:
    """Refuse what is not finite logits [N, C] with a label for each row."""
    if logits.ndim != 2 or not logits.is_floating_point() or len(logits) == 0:
        raise ValueError(
            f"logits must be floating point [N, C] with N >= 1, got {logits.dtype} "
            f"{list(logits.shape)}."
        )
    if len(labels) != len(logits):
        raise ValueError(f"logits have {len(logits)} rows, but there are {len(labels)} labels.")
    class_counts(labels, logits.shape[1])
    check_clean_logits(logits, labels)

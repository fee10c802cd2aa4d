"""Loss formula of contrastive representation distillation (CRD), in log space.

Shapes: B samples, D features of an embedding, K negatives of each sample.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.losses.reduction import num_counted, reduce_rows
from dkl.losses.rows import check_number, compute_dtype
from dkl.losses.samples import check_features, check_reducing, counted_samples, to_samples

_EPSILON = 1e-7
"""Part of the definition, in the denominators."""


def crd_loss(
    input: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    num_samples: int,
    log_normalizer: float | Tensor,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the noise-contrastive loss of CRD for the anchors of one network.

    .. math::
        -\log \frac{P(u_i, v_i)}{P(u_i, v_i) + c} - \sum_{k=1}^K \log \frac{K / N}{P_{ik} + c},
        \quad P(u, v) = \exp(u' v / T) / Z, \quad c = K / N + 10^{-7}

    with N training samples (Tian et al., "Contrastive Representation Distillation", ICLR 2020,
    arXiv 1910.10699). The method adds the loss of the student's anchors among the teacher's
    embeddings and that of the teacher's among the student's (published: 0.8 times the sum, K =
    16384 negatives of other classes). Nothing is normalised here: embeddings have length one
    already.

    Args:
        input: [B, D] embeddings u of the anchors; get a gradient.
        target: [B, D] embeddings v of the same samples by the other network, from its memory bank;
            get no gradient.
        negatives: [B, K] inner products of each anchor with the embeddings of its negatives; get a
            gradient, which they hand on to the anchors.
        num_samples: N, the size of the training set.
        log_normalizer: log Z, a number or a tensor without dimensions; see
            :func:`crd_log_normalizer`.
        temperature: T > 0.
        mask: [B] bool; True where a sample counts.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean", so that parts of a batch add up.

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> anchor = torch.tensor([[1.0, 0.0]])
        >>> two = torch.tensor([[-1.0, 0.0]])
        >>> loss = crd_loss(anchor, anchor, two, num_samples=10, log_normalizer=14.0)
        >>> round(loss.item(), 4)
        0.14
    """
    check_reducing(reduction, num_items)
    counted = counted_samples(input, mask)
    logits_BK1 = _logits(input, target, negatives, num_samples, temperature, counted)
    log_noise = math.log(negatives.shape[1] / num_samples)
    log_constant = math.log(negatives.shape[1] / num_samples + _EPSILON)
    # P / (P + c) is the sigmoid of log P - log c.
    excess_BK1 = logits_BK1 - log_normalizer - log_constant
    rejected_B = (log_noise - log_constant + F.logsigmoid(-excess_BK1[:, 1:])).sum(1)
    values_B = -F.logsigmoid(excess_BK1[:, 0]) - rejected_B
    return reduce_rows(values_B, reduction, counted, input.shape[:1], num_items)


def crd_log_normalizer(
    input: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    num_samples: int,
    temperature: float = 0.07,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the logarithm of CRD's constant Z from a batch, as published from the first one.

    .. math:: Z = N \, mean(\exp(u' v / T))

    over the positives and negatives of all samples (Tian et al., ICLR 2020).

    Args:
        input: [B, D] embeddings of the anchors.
        target: [B, D] embeddings of the same samples by the other network.
        negatives: [B, K] inner products of each anchor with its negatives.
        num_samples: N, the size of the training set.
        temperature: T > 0.
        mask: [B] bool; True where a sample counts; log N when none does.

    Returns:
        log Z without dimensions and without gradient.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> anchor = torch.tensor([[1.0, 0.0]])
        >>> two = torch.tensor([[-1.0, 0.0]])
        >>> round(crd_log_normalizer(anchor, anchor, two, num_samples=10).item(), 3)
        15.49
    """
    counted = counted_samples(input, mask)
    tensors = (input.detach(), target, negatives.detach())
    logits_BK1 = _logits(*tensors, num_samples, temperature, counted)
    if counted is None:
        counted = torch.ones_like(logits_BK1[:, 0], dtype=torch.bool)
    count = num_counted(logits_BK1, counted) * logits_BK1.shape[1]
    log_sum = logits_BK1.masked_fill(~counted[:, None], -math.inf).flatten().logsumexp(0)
    log_mean = torch.where(counted.any(), log_sum - count.log(), torch.zeros_like(log_sum))
    return log_mean + math.log(num_samples)


def _logits(
    input: Tensor,
    target: Tensor,
    negatives: Tensor,
    num_samples: int,
    temperature: float,
    counted: Tensor | None,
) -> Tensor:
    """Return inner products over T: that of the positive and those of the negatives."""
    check_features(input, target, equal=True, ndim=2)
    check_features(input, negatives, equal=False, ndim=2)
    check_number("temperature", temperature, positive=True)
    if num_samples < 1:
        raise ValueError(f"num_samples must be the size of the training set, got {num_samples}")
    dtype = compute_dtype(input, target, negatives)
    student_BD, teacher_BD, negatives_BK = (
        to_samples(x, dtype, counted) for x in (input, target.detach(), negatives)
    )
    positive_B1 = (student_BD * teacher_BD).sum(1, keepdim=True)
    return torch.cat([positive_B1, negatives_BK], 1) / temperature

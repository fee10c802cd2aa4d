"""Loss formulas of distillation methods that compare relations between samples: RKD, SP, PKT.

Shapes: B samples, D features, A anchors of a chunk. A loss couples all samples that count; its
value for a sample is its mean over the relations of that sample, and the loss is the mean of those
values. Parts of a batch do not add up to the whole, because relations across them are missing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dkl.losses.chunks import without_autocast
from dkl.losses.reduction import num_counted, reduce_rows
from dkl.losses.rows import compute_dtype
from dkl.losses.samples import (
    check_features,
    check_reducing,
    counted_samples,
    to_samples,
    unit_vectors,
)

_CHUNK_ELEMENTS = 1 << 23
"""Of the largest tensor of a chunk of angles: 32 MiB in float32; about eight are in use."""

_SHORTEST_DISTANCE = 1e-6
"""Between two samples, as published: coincident ones count and get no gradient."""

_PKT_EPSILON = 1e-7
"""Part of PKT's definition, added to lengths and to probabilities."""


def rkd_distance_loss(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the distance-wise loss of relational knowledge distillation.

    .. math::
        \frac{1}{B^2} \sum_{ij} h(\psi^s_{ij} - \psi^t_{ij}),
        \quad \psi_{ij} = \|x_i - x_j\|_2 / \mu

    with Huber's h (delta 1) and mu the mean distance over pairs i != j of the same network (Park et
    al., CVPR 2019, arXiv 1904.05068). It does not change when either side is moved, rotated or
    scaled. Published weight: 25.

    Args:
        input: [B, D] features of the student; gets the gradient, which is finite (zero) between
            samples that coincide.
        target: [B, D'] features of the teacher; gets no gradient.
        mask: [B] bool; True where a sample counts, and its pairs with others that do.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean".

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> teacher = torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(rkd_distance_loss(5 - 2 * teacher, teacher).item(), 6)
        0.0
        >>> round(rkd_distance_loss(teacher.square(), teacher).item(), 4)
        0.0247
    """
    check_features(input, target, equal=False, ndim=2)
    check_reducing(reduction, num_items)
    counted = counted_samples(input, mask)
    dtype = compute_dtype(input, target)
    student_BB = _relative_distances(to_samples(input, dtype, counted), counted)
    teacher_BB = _relative_distances(to_samples(target.detach(), dtype, counted), counted)
    values_BB = F.smooth_l1_loss(student_BB, teacher_BB, reduction="none")
    values_B = values_BB.sum(1) / num_counted(student_BB, counted)
    return reduce_rows(values_B, reduction, counted, input.shape[:1], num_items)


def _relative_distances(x_BD: Tensor, counted: Tensor | None) -> Tensor:
    """Return distances over their mean, 0 on the diagonal and where a sample does not count."""
    # Not through products, which lose the distance of close points far from the origin.
    distance_BB = torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
    excluded_BB = torch.eye(len(x_BD), dtype=torch.bool, device=x_BD.device)
    if counted is not None:
        excluded_BB = excluded_BB | ~(counted & counted[:, None])
    distance_BB = distance_BB.clamp(min=_SHORTEST_DISTANCE).masked_fill(excluded_BB, 0.0)
    num_pairs = (~excluded_BB).sum().clamp(min=1).to(x_BD.dtype)
    mean = distance_BB.sum() / num_pairs
    return distance_BB / mean.masked_fill(mean == 0, 1.0)


def rkd_angle_loss(
    input: Tensor,
    target: Tensor,
    *,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the angle-wise loss of relational knowledge distillation.

    .. math::
        \frac{1}{B^3} \sum_{ijk} h(\cos^s_{ijk} - \cos^t_{ijk}),
        \quad \cos_{ijk} = e_{ij}' e_{kj}, \quad e_{ij} = (x_i - x_j) / \|x_i - x_j\|_2

    with Huber's h (delta 1) and the angle at the anchor j (Park et al., CVPR 2019, arXiv
    1904.05068). It does not change when either side is moved, rotated or scaled. Published weight:
    50.

    A chunk of A anchors takes some tensors of A B max(B, D) elements. With more than one chunk
    each is computed again for the backward pass, so that no more than one is ever in memory.

    Args:
        input: [B, D] features of the student; gets the gradient, which is finite (zero) between
            samples that coincide: their direction is the zero vector.
        target: [B, D'] features of the teacher; gets no gradient.
        chunk_size: anchors of a chunk; None for as many as take 32 MiB per float32 tensor (all, up
            to B = D = 200).
        mask: [B] bool; True where a sample counts, and its triples with others that do.
        reduction: "mean" over the samples that count (as anchors), "sum", or "none" (one value per
            anchor).
        num_items: replaces the number of samples in "mean".

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> rkd_angle_loss(3 * corner + 1, corner).item() < 1e-12
        True
        >>> flat = torch.tensor([[0.0], [1.0], [2.0]])
        >>> round(rkd_angle_loss(flat, corner).item(), 4)
        0.1296
    """
    check_features(input, target, equal=False, ndim=2)
    check_reducing(reduction, num_items)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be a number of anchors >= 1 or None, got {chunk_size}")
    counted = counted_samples(input, mask)
    dtype = compute_dtype(input, target)
    student_BD = to_samples(input, dtype, counted)
    teacher_BD = to_samples(target.detach(), dtype, counted)
    num_samples = max(len(input), 1)
    if chunk_size is None:
        width = max(num_samples, input.shape[1], target.shape[1])
        chunk_size = max(_CHUNK_ELEMENTS // (num_samples * width), 1)
    if chunk_size >= num_samples:
        totals_B = _angle_errors(student_BD, teacher_BD, counted, 0, num_samples)
    else:
        chunks = (
            checkpoint(
                _angle_errors,
                student_BD,
                teacher_BD,
                counted,
                first,
                first + chunk_size,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for first in range(0, num_samples, chunk_size)
        )
        totals_B = torch.cat(list(chunks))
    values_B = totals_B / num_counted(totals_B, counted).square()
    return reduce_rows(values_B, reduction, counted, input.shape[:1], num_items)


def _angle_errors(
    student_BD: Tensor, teacher_BD: Tensor, counted: Tensor | None, first: int, end: int
) -> Tensor:
    """Return sums of h over the pairs (i, k) of the anchors from first to end."""
    with without_autocast(student_BD.device):
        student_ABB = _cosines(student_BD, counted, first, end)
        teacher_ABB = _cosines(teacher_BD, counted, first, end)
        return F.smooth_l1_loss(student_ABB, teacher_ABB, reduction="none").sum((1, 2))


def _cosines(x_BD: Tensor, counted: Tensor | None, first: int, end: int) -> Tensor:
    """Return the cosines of all angles at some anchors, 0 for samples that do not count."""
    direction_ABD = unit_vectors(x_BD - x_BD[first:end, None])
    if counted is not None:
        direction_ABD = direction_ABD.masked_fill(~counted[:, None], 0.0)
    return direction_ABD @ direction_ABD.mT


def similarity_preserving_loss(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the similarity-preserving loss (SP).

    .. math:: \frac{1}{B^2} \| \hat G^s - \hat G^t \|_F^2, \quad G = X X'

    with the rows of G scaled to length one (ICCV 2019, arXiv 1907.09682). It does
    not change when either side is rotated or scaled. Published weight: 3000.

    Args:
        input: [B, ...] features of the student, flattened per sample; gets the gradient.
        target: [B, ...] features of the teacher; gets no gradient.
        mask: [B] bool; True where a sample counts, and its pairs with others that do.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean".

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> similarity_preserving_loss(torch.eye(2), torch.ones(2, 3))
        tensor(0.2929)
    """
    check_features(input, target, equal=False)
    check_reducing(reduction, num_items)
    counted = counted_samples(input, mask)
    dtype = compute_dtype(input, target)
    student_BB, teacher_BB = (
        _similarities(to_samples(x, dtype, counted).flatten(1)) for x in (input, target.detach())
    )
    values_B = (student_BB - teacher_BB).square().sum(1) / num_counted(student_BB, counted)
    return reduce_rows(values_B, reduction, counted, input.shape[:1], num_items)


def _similarities(x_BD: Tensor) -> Tensor:
    with without_autocast(x_BD.device):
        return unit_vectors(x_BD @ x_BD.t())


def pkt_loss(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the loss of probabilistic knowledge transfer (PKT).

    .. math::
        \frac{1}{B^2} \sum_{ij} p_{ij} \log \frac{p_{ij} + \epsilon}{q_{ij} + \epsilon}, \quad
        p_{ij} = \frac{1 + \cos(t_i, t_j)}{\sum_k (1 + \cos(t_i, t_k))}

    with q likewise of the student and epsilon = 1e-7, also in the cosines' lengths (Passalis and
    Tefas, ECCV 2018, arXiv 1803.10837). Published weight: 30000.

    Args:
        input: [B, D] features of the student; gets the gradient.
        target: [B, D'] features of the teacher; gets no gradient.
        mask: [B] bool; True where a sample counts, and its pairs with others that do.
        reduction: "mean" over the samples that count, "sum", or "none" (one value per sample).
        num_items: replaces the number of samples in "mean".

    Returns:
        The loss; float32 for half inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> round(pkt_loss(torch.eye(2), torch.ones(2, 3)).item(), 4)
        0.0294
    """
    check_features(input, target, equal=False, ndim=2)
    check_reducing(reduction, num_items)
    counted = counted_samples(input, mask)
    dtype = compute_dtype(input, target)
    q_BB, p_BB = (
        _neighbour_probs(to_samples(x, dtype, counted), counted) for x in (input, target.detach())
    )
    terms_BB = p_BB * ((p_BB + _PKT_EPSILON) / (q_BB + _PKT_EPSILON)).log()
    values_B = terms_BB.sum(1) / num_counted(terms_BB, counted)
    return reduce_rows(values_B, reduction, counted, input.shape[:1], num_items)


def _neighbour_probs(x_BD: Tensor, counted: Tensor | None) -> Tensor:
    unit_BD = x_BD / (torch.linalg.vector_norm(x_BD, dim=1, keepdim=True) + _PKT_EPSILON)
    with without_autocast(x_BD.device):
        # Rounding may take a cosine below -1.
        similarity_BB = (unit_BD @ unit_BD.t() + 1.0).clamp(min=0.0)
    if counted is not None:
        similarity_BB = similarity_BB.masked_fill(~counted, 0.0)
    total_B1 = similarity_BB.sum(1, keepdim=True)
    probs_BB: Tensor = similarity_BB / total_B1.masked_fill(total_B1 == 0, 1.0)
    return probs_BB

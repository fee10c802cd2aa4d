"""From features of two networks to values per sample: checks, masks and a little geometry.

Shapes: B samples (dim 0), C channels, H x W positions, D features. ``input`` is the student's,
``target`` the teacher's; the functions of this folder that take them detach the target.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dkl.losses.rows import check_divisor, check_reduction

_SHORTEST = 1e-12
"""Vectors that are shorter have no direction."""


def check_reducing(reduction: str, num_items: float | Tensor | None) -> None:
    """Raise ValueError for a wrong reduction, or a count of items that it would not use."""
    check_reduction(reduction)
    check_divisor("num_items", num_items)
    if num_items is not None and reduction != "mean":
        raise ValueError("num_items replaces the sample count of reduction='mean' and needs it")


def check_features(input: Tensor, target: Tensor, *, equal: bool, ndim: int | None = None) -> None:
    """Raise ValueError unless both are features of the same samples.

    Args:
        input: features of the student.
        target: features of the teacher.
        equal: whether all sizes must be equal, and not only the numbers of samples.
        ndim: how many dimensions both must have; None for any two or more.
    """
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a floating-point tensor of features, got {got}")
    shapes = f"got input {list(input.shape)} and target {list(target.shape)}"
    layout = {None: "[B, ...]", 2: "[B, D]", 4: "[B, C, H, W]"}[ndim]
    fit = all(x.ndim >= 2 if ndim is None else x.ndim == ndim for x in (input, target))
    if not fit or input.shape[0] != target.shape[0]:
        raise ValueError(
            f"input and target must both be {layout} with the same samples in dim 0, {shapes}"
        )
    if equal and input.shape != target.shape:
        raise ValueError(
            f"input and target must have one shape, {shapes}; pass the student's features through "
            "a layer that gives them the teacher's shape"
        )
    if 0 in (*input.shape[1:], *target.shape[1:]):
        raise ValueError(f"each sample needs at least one value, {shapes}")


def check_stages(inputs: Sequence[Tensor], targets: Sequence[Tensor], *, equal: bool) -> None:
    """Raise ValueError unless both are lists of maps [B, C, H, W], one of each per stage."""
    lists: list[tuple[str, object]] = [("inputs", inputs), ("targets", targets)]
    for name, maps in lists:
        if isinstance(maps, Tensor):
            raise ValueError(
                f"{name} must be a list of maps [B, C, H, W], one per stage, got one tensor "
                f"{list(maps.shape)}; for a single stage pass [map]"
            )
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise ValueError(
            "inputs and targets must have one map per stage and at least one stage, got "
            f"{len(inputs)} and {len(targets)}"
        )
    for input, target in zip(inputs, targets, strict=True):
        check_features(input, target, equal=equal, ndim=4)
        if input.shape[0] != inputs[0].shape[0]:
            raise ValueError(
                "all stages must have the same samples in dim 0, got "
                f"{[map.shape[0] for map in inputs]}"
            )


def counted_samples(input: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask [B], or None when every sample counts.

    Raises:
        ValueError: a mask of a wrong shape or dtype.
    """
    if mask is not None and (mask.shape != input.shape[:1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool (True = counts) with one value per sample, {[input.shape[0]]}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return mask


def to_samples(values: Tensor, dtype: torch.dtype, counted: Tensor | None) -> Tensor:
    """Return values in ``dtype``, 0 (and zero gradients) in samples that do not count."""
    values = values.to(dtype)
    if counted is None:
        return values
    return values.masked_fill(~counted.view(-1, *[1] * (values.ndim - 1)), 0.0)


def unit_vectors(vectors: Tensor, dim: int = -1) -> Tensor:
    """Return vectors of length one; zero vectors stay zero and get no gradient.

    Close to zero the gradient of a direction has no bound, so that a clamped length would hand on
    1e12 times what it gets.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    directions: Tensor = vectors / length.masked_fill(length < _SHORTEST, math.inf)
    return directions


def average_pool(map_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Return adaptive averages [B, C, height, width] of a map that is at least as large.

    Two products with constant matrices, because the backward of ``F.adaptive_avg_pool2d`` is not
    deterministic on a GPU. Call it outside of autocast.
    """
    size = map_BCHW.shape[2:]
    if size == (height, width):
        return map_BCHW
    rows_hH, columns_wW = _averages(size[0], height, map_BCHW), _averages(size[1], width, map_BCHW)
    return rows_hH @ map_BCHW @ columns_wW.t()


def to_one_size(first_BCHW: Tensor, second_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger map to the size of the smaller one, side by side."""
    height, width = map(min, first_BCHW.shape[2:], second_BCHW.shape[2:])
    return average_pool(first_BCHW, height, width), average_pool(second_BCHW, height, width)


def _averages(size: int, pooled: int, like: Tensor) -> Tensor:
    """Return [pooled, size]; row i averages from floor(i size / pooled) to ceil((i + 1) ...)."""
    position = torch.arange(size, device=like.device)
    cell = torch.arange(pooled, device=like.device)[:, None]
    first = (cell * size) // pooled
    end = ((cell + 1) * size + pooled - 1) // pooled
    member = ((position >= first) & (position < end)).to(like.dtype)
    return member / member.sum(1, keepdim=True)

"""Stratified splits by stated rules that no library version can change."""

import hashlib
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from dkl.data.images import ImageData

if TYPE_CHECKING:
    from dkl.data.images_on_disk import ImageFiles

Data = TypeVar("Data", ImageData, "ImageFiles")
"""Images in memory or in files: a part of the data is of the same kind."""


def split_validation(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    """Hold a stratified part of the training data out for validation.

    Within each class the samples are ordered by the SHA-256 digest of "seed:index"; the first
    ``fraction`` of them (rounded half up, but at least one, and at least one stays for training
    where a class has two or more) become the validation set. A class with a single sample stays in
    training. No random generator is involved: the split is the same on every machine and version.

    Args:
        data: the training data.
        fraction: share to hold out, between 0 and 1, both excluded.
        seed: which of the possible splits.

    Returns:
        (train, validation): disjoint, together all of ``data``, each in the order of ``data``.

    Raises:
        ValueError: the fraction is not between 0 and 1, or no class has two samples.

    Example:
        >>> images = torch.zeros(20, 1, 1, 1, dtype=torch.uint8)
        >>> data = ImageData(images, torch.arange(20) % 2, 2, ("a", "b"))
        >>> train, validation = split_validation(data, 0.2, seed=0)
        >>> len(train), len(validation), validation.labels.bincount()
        (16, 4, tensor([2, 2]))
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction must lie between 0 and 1, both excluded; got {fraction}. "
            f"0.1 holds a tenth of the training data out; to hold nothing out, do not split."
        )
    held_out = torch.zeros(len(data), dtype=torch.bool)
    for members in _members_of_classes(data.labels, data.num_classes):
        if len(members) < 2:
            continue
        ordered = sorted(members, key=lambda index: _digest(seed, index))
        count = int(fraction * len(members) + 0.5)
        held_out[ordered[: min(max(count, 1), len(members) - 1)]] = True
    if not held_out.any():
        raise ValueError(
            f"a stratified split needs a class with at least two samples; got {data!r} with at "
            f"most one of each."
        )
    return data.subset((~held_out).nonzero().flatten()), data.subset(held_out.nonzero().flatten())


def every_nth_of_each_class(labels_N: Tensor, num_classes: int, n: int) -> Tensor:
    """Mark the n-th, 2n-th, ... sample of each class, in the order of the data.

    Args:
        labels_N: [N] int64.
        num_classes: number of classes.
        n: positive.

    Returns:
        [N] bool, True for the marked samples.

    Example:
        >>> every_nth_of_each_class(torch.tensor([0, 0, 1, 0, 1, 0]), 2, n=2)
        tensor([False,  True, False, False,  True,  True])
    """
    marked = torch.zeros(labels_N.shape[0], dtype=torch.bool)
    for members in _members_of_classes(labels_N, num_classes):
        marked[members[n - 1 :: n]] = True
    return marked


def _members_of_classes(labels_N: Tensor, num_classes: int) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(num_classes)]
    for index, label in enumerate(labels_N.tolist()):
        members[label].append(index)
    return members


def _digest(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()

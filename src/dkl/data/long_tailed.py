"""Long-tailed splits of balanced data, and accuracy by the number of training images of a class.

Legend: N samples, C classes.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from dkl.data.splits import Data, _digest, _members_of_classes

Kind = Literal["exponential", "pareto"]

_PARETO_POWER = 6.0
_LEAST_POWER, _MOST_POWER = 0.1, 1000.0
_ROUNDING = 1e-12  # relative; 49 * (1 / 49) is below 1 in float64


def class_sizes(
    num_per_class: int,
    num_classes: int,
    imbalance: float,
    kind: Kind = "exponential",
    *,
    power: float | None = None,
) -> tuple[int, ...]:
    r"""Return the sizes of the classes of a long-tailed split, the largest first.

    "exponential" is CIFAR-LT (Cui et al., CVPR 2019; Cao et al., NeurIPS 2019): class c of C has

    .. math:: n_c = \lfloor n_\max \rho^{-c / (C - 1)} \rfloor

    samples: their code drops the fraction, too. CIFAR-100 with imbalance rho = 100 keeps 10847.

    "pareto" follows ImageNet-LT (Liu et al., CVPR 2019), whose sizes are draws from a Pareto
    distribution (of the second kind) with power alpha = 6, scaled to 5 to 1280 images. Here they
    are its quantiles, so that nothing is random:

    .. math::
        n_c = \lfloor t_c n_\max + (1 - t_c) n_\max / \rho \rfloor, \quad
        t_c = \frac{(C / (c + 1))^{1/\alpha} - 1}{C^{1/\alpha} - 1}

    With 1280, 1000 classes and rho = 256 that is 121449 images and 404, 456 and 140 classes with
    many, medium and few, where the published draw has 115846 and 385, 479 and 136. For the
    published list itself, see ``read_image_list``.

    Args:
        num_per_class: n_max, the size of the largest class.
        num_classes: C, at least 2.
        imbalance: rho, largest class over smallest; 1 to ``num_per_class``.
        kind: "exponential" or "pareto".
        power: alpha of "pareto", 0.1 to 1000; None: 6.

    Returns:
        C sizes, none below 1 and none above the one before.

    Raises:
        ValueError: a number is out of range, a class would be empty, or the kind is unknown.

    Example:
        >>> class_sizes(5000, 10, 100)
        (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50)
        >>> class_sizes(5000, 10, 100, "pareto")
        (5000, 3305, 2401, 1795, 1345, 990, 698, 450, 237, 50)
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}.")
    if num_classes < 2:
        raise ValueError(f"a long tail needs at least 2 classes; got {num_classes}.")
    if not 1 <= imbalance <= num_per_class:
        raise ValueError(
            f"imbalance must lie in 1 to {num_per_class}, the size of the largest class, so that "
            f"the smallest one keeps a sample; got {imbalance}. Lower it, or use more data."
        )
    if power is not None and (kind != "pareto" or not _LEAST_POWER <= power <= _MOST_POWER):
        raise ValueError(
            f"power must lie in {_LEAST_POWER} to {_MOST_POWER:g} and belongs to kind 'pareto'; "
            f"got power={power} for {kind!r}."
        )
    ranks = range(num_classes)
    if kind == "exponential":
        sizes = [num_per_class * imbalance ** (-rank / (num_classes - 1)) for rank in ranks]
    else:
        exponent = 1 / (_PARETO_POWER if power is None else power)
        excess = [(num_classes / (rank + 1)) ** exponent - 1 for rank in ranks]
        least = num_per_class / imbalance
        shares = [one / excess[0] for one in excess]
        sizes = [num_per_class * share + least * (1 - share) for share in shares]
    return tuple(int(size * (1 + _ROUNDING)) for size in sizes)


def long_tailed(
    data: Data,
    *,
    imbalance: float = 100.0,
    kind: Kind = "exponential",
    seed: int = 0,
    max_per_class: int | None = None,
    shuffle_classes: bool = False,
    power: float | None = None,
) -> Data:
    """Keep a long-tailed part of the data.

    Class sizes are those of ``class_sizes``. Within each class the samples are ordered by the
    SHA-256 digest of "seed:index", and the first ones are kept: no random generator is involved,
    the split is the same on every machine and version, and with one seed a steeper split is part of
    a flatter one. Split validation data off before, so that the tail does not decide about it.

    Args:
        data: usually balanced.
        imbalance: largest class over smallest.
        kind: "exponential" (as CIFAR-LT) or "pareto" (as ImageNet-LT).
        seed: which samples are kept; with ``shuffle_classes`` also which classes are large.
        max_per_class: size of the largest class; None: that of the smallest class of ``data``,
            which every class can provide.
        shuffle_classes: order the classes by the SHA-256 digest of "seed:class:index". Otherwise
            class 0 is the largest, as in the published splits.
        power: of "pareto"; None: 6.

    Returns:
        The kept samples, in the order of ``data``.

    Raises:
        ValueError: a number is out of range, or a class has fewer samples than its share.

    Example:
        >>> from dkl.data import ImageData
        >>> labels = torch.arange(300) % 3
        >>> images = torch.zeros(300, 1, 1, 1, dtype=torch.uint8)
        >>> data = ImageData(images, labels, 3, ("a", "b", "c"))
        >>> long_tailed(data, imbalance=100).labels.bincount()
        tensor([100,  10,   1])
    """
    members = _members_of_classes(data.labels, data.num_classes)
    available = [len(indices) for indices in members]
    largest = min(available) if max_per_class is None else max_per_class
    if min(available) == 0:
        raise ValueError(
            f"every class needs samples; class {available.index(0)} of {data!r} has none."
        )
    sizes = class_sizes(largest, data.num_classes, imbalance, kind, power=power)
    ranks = list(range(data.num_classes))
    if shuffle_classes:
        ranks.sort(key=lambda index: hashlib.sha256(f"{seed}:class:{index}".encode()).digest())
    kept: list[int] = []
    for size, index in zip(sizes, ranks, strict=True):
        if size > available[index]:
            raise ValueError(
                f"class {index} must provide {size} samples and has {available[index]}; lower "
                f"max_per_class={largest} (None takes what every class can provide)."
            )
        kept += sorted(members[index], key=lambda sample: _digest(seed, sample))[:size]
    return data.subset(torch.tensor(sorted(kept), dtype=torch.int64, device="cpu"))


def shot_groups(train_counts_C: Tensor, *, many: int = 100, few: int = 20) -> dict[str, Tensor]:
    """Group classes by their number of training samples.

    Source: Liu et al., CVPR 2019: "many" above 100, "few" below 20, "medium" between, both ends
    included. On ImageNet-LT these are 385, 136 and 479 classes.

    Args:
        train_counts_C: [C] integers, samples of each class in the *training* data.
        many: classes with more are "many".
        few: classes with fewer are "few"; at most ``many`` + 1, so that groups are disjoint.

    Returns:
        "many", "medium" and "few", each [C] bool on the device of the counts; a class is in one.

    Raises:
        ValueError: the counts are no vector of integers from 0, or the groups would overlap.

    Example:
        >>> groups = shot_groups(torch.tensor([1280, 101, 100, 20, 19, 0]))
        >>> {name: members.nonzero().flatten().tolist() for name, members in groups.items()}
        {'many': [0, 1], 'medium': [2, 3], 'few': [4, 5]}
    """
    is_integer = not (train_counts_C.is_floating_point() or train_counts_C.dtype == torch.bool)
    if not is_integer or train_counts_C.ndim != 1 or bool((train_counts_C < 0).any()):
        raise ValueError(
            f"train_counts_C must be a vector of integers from 0, training samples of each class; "
            f"got {train_counts_C.dtype} of shape {tuple(train_counts_C.shape)}."
        )
    if few > many + 1:
        raise ValueError(
            f"few must be at most many + 1, or a class would be both; got many={many}, few={few}."
        )
    is_many_C, is_few_C = train_counts_C > many, train_counts_C < few
    return {"many": is_many_C, "medium": ~(is_many_C | is_few_C), "few": is_few_C}


def group_accuracies(
    correct_N: Tensor,
    labels_N: Tensor,
    train_counts_C: Tensor,
    *,
    many: int = 100,
    few: int = 20,
    average: Literal["classes", "samples"] = "classes",
) -> dict[str, float]:
    """Return the accuracy on classes with many, medium and few training samples.

    A group's accuracy is the mean over its classes of each class's accuracy, as long-tailed work
    reports it, or with ``average="samples"`` the share of its samples. The two differ only where
    test classes differ in size. ImageNet-LT's test set has 50 images of each class, so tables 5 and
    18 of arXiv 2305.13948 are both: 63.16, 33.47 and 5.88 on 385, 479 and 136 classes give 41.15.

    Args:
        correct_N: [N] bool, whether the prediction for a test sample was right.
        labels_N: [N] integers, 0 to C - 1.
        train_counts_C: [C] integers, samples of each class in the *training* data.
        many: as in ``shot_groups``.
        few: as in ``shot_groups``.
        average: over "classes" or "samples".

    Returns:
        "many", "medium", "few" and "all", each in 0 to 1. Classes without test samples have no
        accuracy and do not count; a group of only such classes is left out.

    Raises:
        ValueError: shapes, types, labels or options do not fit, or there are no samples.

    Example:
        >>> correct = torch.tensor([True, True, True, False, False])
        >>> labels = torch.tensor([0, 0, 1, 1, 2])
        >>> group_accuracies(correct, labels, torch.tensor([500, 200, 3]))
        {'many': 0.75, 'few': 0.0, 'all': 0.5}
    """
    groups: Mapping[str, Tensor] = shot_groups(train_counts_C.cpu(), many=many, few=few)
    num_classes = len(train_counts_C)
    if average not in ("classes", "samples"):
        raise ValueError(f"average must be 'classes' or 'samples'; got {average!r}.")
    _check_answers(correct_N, labels_N, num_classes)
    labels = labels_N.cpu().to(torch.int64)
    totals_C = torch.bincount(labels, minlength=num_classes)
    right_C = torch.bincount(labels[correct_N.cpu()], minlength=num_classes)
    everyone = torch.ones(num_classes, dtype=torch.bool, device="cpu")
    accuracies: dict[str, float] = {}
    for name, members_C in {**groups, "all": everyone}.items():
        tested_C = members_C & (totals_C > 0)
        if not tested_C.any():
            continue
        right, totals = right_C[tested_C].double(), totals_C[tested_C].double()
        by_class = average == "classes"
        accuracies[name] = float(
            (right / totals).mean() if by_class else right.sum() / totals.sum()
        )
    return accuracies


def _check_answers(correct_N: Tensor, labels_N: Tensor, num_classes: int) -> None:
    if correct_N.dtype != torch.bool or correct_N.ndim != 1 or correct_N.shape != labels_N.shape:
        raise ValueError(
            f"correct_N must be bool and labels_N integers, one of each for every sample; got "
            f"{correct_N.dtype} of shape {tuple(correct_N.shape)} and {labels_N.dtype} of shape "
            f"{tuple(labels_N.shape)}. Compare predictions with labels first."
        )
    if labels_N.is_floating_point() or labels_N.dtype == torch.bool or len(labels_N) == 0:
        raise ValueError(
            f"labels_N must be integers, at least one; got {len(labels_N)} of {labels_N.dtype}."
        )
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        raise ValueError(
            f"labels must lie in 0 to {num_classes - 1} for {num_classes} training counts; got "
            f"{int(labels_N.min())} to {int(labels_N.max())}."
        )

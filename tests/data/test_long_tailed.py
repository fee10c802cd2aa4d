"""Long-tailed splits: published sizes, what is kept, groups by training count, their accuracies."""

import math

import pytest
import torch
from torch import Tensor

from dkl.data import ImageData, class_sizes, group_accuracies, long_tailed, shot_groups


def balanced(per_class: int, num_classes: int) -> ImageData:
    """Make images whose three pixels spell their index."""
    index = torch.arange(per_class * num_classes)
    pixels = torch.stack([index // 65536, index // 256 % 256, index % 256], 1)
    names = tuple(str(number) for number in range(num_classes))
    images = pixels.to(torch.uint8).reshape(-1, 3, 1, 1)
    return ImageData(images, index % num_classes, num_classes, names)


def kept(data: ImageData) -> list[int]:
    pixels = data.images.long().flatten(1)
    return (pixels @ torch.tensor([65536, 256, 1])).tolist()


# Totals that the literature gives for CIFAR-100-LT and CIFAR-10-LT.
PUBLISHED = [
    (500, 100, 10, 19573),
    (500, 100, 50, 12608),
    (500, 100, 100, 10847),
    (5000, 10, 10, 20431),
    (5000, 10, 50, 13996),
    (5000, 10, 100, 12406),
]


@pytest.mark.parametrize(("largest", "num_classes", "imbalance", "total"), PUBLISHED)
def test_exponential_sizes_are_the_published_ones(
    largest: int, num_classes: int, imbalance: int, total: int
) -> None:
    sizes = class_sizes(largest, num_classes, imbalance)
    assert sum(sizes) == total
    exact = [largest * imbalance ** (-c / (num_classes - 1)) for c in range(num_classes)]
    assert all(size <= value + 1e-9 < size + 1 for size, value in zip(sizes, exact, strict=True))


def test_pareto_sizes_resemble_imagenet_lt() -> None:
    sizes = torch.tensor(class_sizes(1280, 1000, 256, "pareto"))
    groups = {name: int(members.sum()) for name, members in shot_groups(sizes).items()}
    assert (int(sizes.max()), int(sizes.min())) == (1280, 5)
    assert (int(sizes.sum()), groups) == (121449, {"many": 404, "medium": 456, "few": 140})
    published = {"many": 385, "medium": 479, "few": 136}
    assert abs(int(sizes.sum()) / 115846 - 1) < 0.05
    assert all(abs(groups[name] / published[name] - 1) < 0.05 for name in groups)


def test_pareto_sizes_by_hand() -> None:
    # t = (4^(1/2) - 1, 2^(1/2) - 1, (4/3)^(1/2) - 1, 0) / 1; n = 100 t + 10 (1 - t)
    by_hand = [100, 10 + 90 * (math.sqrt(2) - 1), 10 + 90 * (math.sqrt(4 / 3) - 1), 10]
    assert class_sizes(100, 4, 10, "pareto", power=2) == tuple(int(n) for n in by_hand)


@pytest.mark.parametrize("kind", ["exponential", "pareto"])
@pytest.mark.parametrize("imbalance", [1, 1.5, 7, 49, 98])
@pytest.mark.parametrize("num_classes", [2, 3, 11, 100])
def test_sizes_fall_from_the_largest_to_the_smallest(
    kind: str, imbalance: float, num_classes: int
) -> None:
    sizes = class_sizes(98, num_classes, imbalance, kind)  # type: ignore[arg-type]
    assert (len(sizes), sizes[0], sizes[-1]) == (num_classes, 98, int(98 / imbalance + 1e-9))
    assert list(sizes) == sorted(sizes, reverse=True)


def test_a_split_has_these_sizes_and_keeps_the_order() -> None:
    data = balanced(40, 5)
    tail = long_tailed(data, imbalance=20)
    assert tuple(tail.labels.bincount().tolist()) == class_sizes(40, 5, 20)
    assert kept(tail) == sorted(kept(tail))
    assert tail.labels.tolist() == [index % 5 for index in kept(tail)]
    assert (tail.num_classes, tail.class_names) == (5, data.class_names)


def test_only_the_seed_decides() -> None:
    data = balanced(40, 5)
    torch.manual_seed(0)
    first = kept(long_tailed(data, imbalance=20, seed=3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert kept(long_tailed(data, imbalance=20, seed=3)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert kept(long_tailed(data, imbalance=20, seed=4)) != first


def test_the_rule_is_frozen() -> None:
    # By sha256sum: of "0:1", "0:3", ... "0:19" the two smallest are those of 7 and 15.
    tail = long_tailed(balanced(10, 2), imbalance=5)
    assert [index for index in kept(tail) if index % 2] == [7, 15]
    assert [index for index in kept(tail) if index % 2 == 0] == list(range(0, 20, 2))


def test_a_steeper_split_is_part_of_a_flatter_one() -> None:
    data = balanced(100, 6)
    flat = set(kept(long_tailed(data, imbalance=5, seed=1)))
    assert set(kept(long_tailed(data, imbalance=50, seed=1))) < flat


def test_shuffled_classes_have_the_same_sizes_in_another_order() -> None:
    data = balanced(40, 12)
    sizes = class_sizes(40, 12, 20)
    orders = []
    for seed in range(4):
        tail = long_tailed(data, imbalance=20, seed=seed, shuffle_classes=True)
        counts = tuple(tail.labels.bincount(minlength=12).tolist())
        assert tuple(sorted(counts, reverse=True)) == sizes
        orders.append(counts)
    assert len(set(orders)) == 4
    assert sizes not in orders


def test_unequal_classes_give_what_the_smallest_can() -> None:
    data = balanced(40, 3)
    unequal = data.subset((torch.arange(120) >= 30).nonzero().flatten()[:-1])
    counts = unequal.labels.bincount()
    tail = long_tailed(unequal, imbalance=4)
    assert tuple(tail.labels.bincount().tolist()) == class_sizes(int(counts.min()), 3, 4)
    larger = long_tailed(unequal, imbalance=4, max_per_class=30)
    assert tuple(larger.labels.bincount().tolist()) == class_sizes(30, 3, 4)
    with pytest.raises(ValueError, match=r"class 0 must provide 31 samples and has 30"):
        long_tailed(unequal, imbalance=4, max_per_class=31)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"imbalance": 41.0}, r"imbalance must lie in 1 to 40.*got 41"),
        ({"imbalance": 0.5}, "got 0.5"),
        ({"imbalance": float("nan")}, "got nan"),
        ({"kind": "zipf", "imbalance": 4}, "one of exponential, pareto; got 'zipf'"),
        ({"power": 6.0, "imbalance": 4}, "belongs to kind 'pareto'; got power=6.0"),
        ({"power": 0.0, "kind": "pareto", "imbalance": 4}, "power must lie in"),
        ({"power": float("inf"), "kind": "pareto", "imbalance": 4}, "power must lie in"),
    ],
)
def test_bad_settings_are_explained(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_tailed(balanced(40, 3), **arguments)  # type: ignore[arg-type]


def test_data_that_cannot_have_a_tail_are_explained() -> None:
    data = balanced(4, 3)
    with pytest.raises(ValueError, match=r"class 2 of ImageData.*has none"):
        long_tailed(data.subset((data.labels < 2).nonzero().flatten()), imbalance=2)
    with pytest.raises(ValueError, match="at least 2 classes; got 1"):
        class_sizes(4, 1, 2)


def test_every_class_is_in_one_group() -> None:
    counts = torch.arange(0, 200)
    for many, few in ((100, 20), (50, 51), (0, 0)):
        groups = shot_groups(counts, many=many, few=few)
        assert torch.equal(torch.stack(list(groups.values())).sum(0), torch.ones(200).long())
        assert torch.equal(groups["many"], counts > many)
        assert torch.equal(groups["few"], counts < few)


@pytest.mark.parametrize(
    "counts", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([-1]), torch.tensor([True])]
)
def test_bad_counts_are_explained(counts: Tensor) -> None:
    with pytest.raises(ValueError, match="training samples of each class; got"):
        shot_groups(counts)


def test_overlapping_groups_are_explained() -> None:
    with pytest.raises(ValueError, match="few must be at most many"):
        shot_groups(torch.tensor([1]), many=10, few=12)


def answers(per_class: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return correct and labels for (right, wrong) answers of each class, interleaved."""
    labels = [c for c, (right, wrong) in enumerate(per_class) for _ in range(right + wrong)]
    correct = [n < right for right, wrong in per_class for n in range(right + wrong)]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(correct)[order], torch.tensor(labels)[order]


TRAIN_COUNTS = torch.tensor([500, 150, 60, 20, 5, 2])


def test_accuracies_by_hand() -> None:
    correct, labels = answers([(3, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 1)])
    by_class = group_accuracies(correct, labels, TRAIN_COUNTS)
    expected = {
        "many": (3 / 4 + 1) / 2,
        "medium": (1 / 2 + 0) / 2,
        "few": (0 + 1 / 2) / 2,
        "all": (3 / 4 + 1 + 1 / 2 + 0 + 0 + 1 / 2) / 6,
    }
    assert by_class == pytest.approx(expected)
    by_sample = group_accuracies(correct, labels, TRAIN_COUNTS, average="samples")
    assert by_sample == pytest.approx({"many": 4 / 5, "medium": 1 / 4, "few": 1 / 5, "all": 6 / 14})


def test_both_means_agree_on_balanced_test_data_and_weigh_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    rights = torch.randint(0, 51, (6,), generator=generator).tolist()
    correct, labels = answers([(right, 50 - right) for right in rights])
    by_class = group_accuracies(correct, labels, TRAIN_COUNTS)
    assert by_class == pytest.approx(
        group_accuracies(correct, labels, TRAIN_COUNTS, average="samples")
    )
    assert by_class["all"] == pytest.approx(float(correct.double().mean()))
    shares = {name: int(one.sum()) / 6 for name, one in shot_groups(TRAIN_COUNTS).items()}
    assert by_class["all"] == pytest.approx(sum(by_class[name] * shares[name] for name in shares))


def test_the_papers_rows_are_weighted_means() -> None:
    # Table 5 of arXiv 2305.13948: many, medium, few, all.
    for many, medium, few, everyone in (
        (63.16, 33.47, 5.88, 41.15),
        (67.25, 38.56, 8.21, 45.47),
        (66.60, 38.53, 8.19, 45.21),
        (70.06, 43.47, 10.99, 49.29),
    ):
        assert (385 * many + 479 * medium + 136 * few) / 1000 == pytest.approx(everyone, abs=0.011)


def test_what_has_no_test_samples_does_not_count() -> None:
    correct, labels = answers([(1, 1), (0, 0), (2, 0)])
    found = group_accuracies(correct, labels, TRAIN_COUNTS)
    assert found == {"many": 0.5, "medium": 1.0, "all": 0.75}


@pytest.mark.parametrize(
    ("correct", "labels", "message"),
    [
        (torch.tensor([1, 0]), torch.tensor([0, 1]), "correct_N must be bool"),
        (torch.tensor([True]), torch.tensor([0, 1]), "one of each for every sample"),
        (torch.tensor([True]), torch.tensor([6]), "labels must lie in 0 to 5.*got 6 to 6"),
        (torch.tensor([True]), torch.tensor([-1]), "got -1 to -1"),
        (torch.tensor([True]), torch.tensor([1.0]), "labels_N must be integers"),
        (torch.tensor([], dtype=torch.bool), torch.tensor([], dtype=torch.int64), "at least one"),
    ],
)
def test_bad_answers_are_explained(correct: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_accuracies(correct, labels, TRAIN_COUNTS)


def test_an_unknown_average_is_explained() -> None:
    with pytest.raises(ValueError, match="'classes' or 'samples'; got 'both'"):
        group_accuracies(*answers([(1, 1)]), TRAIN_COUNTS, average="both")  # type: ignore[arg-type]

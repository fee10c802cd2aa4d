"""Validation splits: disjoint, complete, stratified, the same for ever."""

import pytest
import torch

from dkl.data import ImageData, split_validation


def numbered(labels: list[int], num_classes: int) -> ImageData:
    """Make images whose first two pixels spell their index."""
    index = torch.arange(len(labels))
    images = torch.stack([index // 256, index % 256], 1).to(torch.uint8).reshape(-1, 1, 1, 2)
    names = tuple(str(number) for number in range(num_classes))
    return ImageData(images, torch.tensor(labels), num_classes, names)


def indices(data: ImageData) -> list[int]:
    pixels = data.images.long().flatten(1)
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_disjoint_complete_and_stratified(fraction: float, seed: int) -> None:
    labels = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    data = numbered(labels, 8)  # class 7 is absent
    train, validation = split_validation(data, fraction, seed)
    assert sorted(indices(train) + indices(validation)) == list(range(1000))
    for part in (train, validation):
        assert indices(part) == sorted(indices(part))
        assert part.labels.tolist() == [labels[i] for i in indices(part)]
    total = torch.bincount(data.labels, minlength=8)
    held = torch.bincount(validation.labels, minlength=8)
    assert torch.all((held - fraction * total).abs() <= 1)
    assert torch.all(held[:7] >= 1)
    assert torch.all(total[:7] - held[:7] >= 1)


def test_only_the_seed_decides() -> None:
    data = numbered([0, 1] * 100, 2)
    torch.manual_seed(0)
    first = split_validation(data, 0.2, 5)[1]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert indices(split_validation(data, 0.2, 5)[1]) == indices(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert indices(split_validation(data, 0.2, 6)[1]) != indices(first)


def test_the_rule_is_frozen() -> None:
    # A change of the rule would move validation images into training when a run is resumed.
    data = numbered([0, 1] * 10, 2)
    # By sha256sum: the three smallest of "0:0", "0:2", ... and of "0:1", "0:3", ...
    assert indices(split_validation(data, 0.3, 0)[1]) == [4, 7, 9, 10, 15, 18]


def test_a_single_sample_stays_in_training() -> None:
    train, validation = split_validation(numbered([0, 0, 0, 1], 2), 0.4, 0)
    assert 1 in train.labels.tolist()
    assert validation.labels.tolist() == [0]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_bad_fractions_are_explained(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1, both excluded; got"):
        split_validation(numbered([0, 0], 1), fraction, 0)


def test_nothing_to_hold_out_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        split_validation(numbered([0, 1], 2), 0.5, 0)

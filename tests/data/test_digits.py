"""The bundled digits: exact pixels and a frozen split."""

import hashlib
from fractions import Fraction
from math import floor

import torch
from sklearn import datasets

from dkl.data import ImageData, load_data
from dkl.data.splits import every_nth_of_each_class


def digest(data: ImageData) -> str:
    return hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()


def test_pixels_are_the_originals_rounded_once() -> None:
    bunch = datasets.load_digits()
    half = Fraction(1, 2)
    table = torch.tensor([floor(Fraction(value * 255, 16) + half) for value in range(17)])
    expected = table[torch.from_numpy(bunch.images).long()].to(torch.uint8)
    train, test = load_data("digits")
    in_test = every_nth_of_each_class(torch.from_numpy(bunch.target), 10, 5)
    assert torch.equal(train.images[:, 0], expected[~in_test])
    assert torch.equal(test.images[:, 0], expected[in_test])
    assert torch.equal(test.labels, torch.from_numpy(bunch.target)[in_test].long())


def test_every_fifth_of_each_class_is_for_testing() -> None:
    train, test = load_data("digits")
    assert (len(train), len(test)) == (1442, 355)
    total = torch.bincount(train.labels) + torch.bincount(test.labels)
    assert torch.equal(torch.bincount(test.labels), total // 5)
    seen = [0] * 10
    for label, marked in zip(
        labels := datasets.load_digits().target.tolist(),
        every_nth_of_each_class(torch.tensor(labels), 10, 5).tolist(),
        strict=True,
    ):
        seen[label] += 1
        assert marked == (seen[label] % 5 == 0)


def test_the_split_is_frozen() -> None:
    # Numbers measured on another split would not be comparable.
    train, test = load_data("digits")
    assert digest(train) == "7fa69e063a1f915ea22d195060e9cf48f5dcaf611a34b52dbac72bbd09d7c510"
    assert digest(test) == "c828ed8d66d4999368244a654a4bd17850508763dc9ee33f20f139ab0bb00a7d"

"""ImageData: checks, subsets, batches, statistics."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from dkl.data import ImageData


def make(num: int = 30, channels: int = 3, num_classes: int = 5) -> ImageData:
    generator = torch.Generator().manual_seed(num)
    images = torch.randint(0, 256, (num, channels, 4, 5), generator=generator).to(torch.uint8)
    labels = torch.randint(0, num_classes, (num,), generator=generator)
    return ImageData(images, labels, num_classes, tuple("abcdefgh"[:num_classes]))


def test_batches_follow_the_given_indices() -> None:
    data = make()
    index_batches = [torch.tensor([3, 3, 29]), torch.tensor([0]), torch.empty(0, dtype=torch.int64)]
    got = list(data.batches(iter(index_batches), "cpu"))
    assert len(got) == 3
    for indices, (images, labels) in zip(index_batches, got, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, data.images[indices])
        assert labels.dtype == torch.int64
        assert torch.equal(labels, data.labels[indices])


def test_batches_take_indices_one_at_a_time() -> None:
    taken: list[int] = []

    def indices():  # type: ignore[no-untyped-def]
        for number in range(5):
            taken.append(number)
            yield torch.tensor([number])

    stream = make().batches(indices(), "cpu")
    next(stream)
    assert taken == [0]


def test_subset_is_a_copy() -> None:
    data = make()
    part = data.subset(torch.arange(len(data)))
    part.images.zero_()
    assert data.images.any()
    assert len(data.subset(torch.empty(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("num", [1, 30, 5000])  # 5000 takes more than one pass
def test_mean_std_equals_float64_over_all_pixels(num: int) -> None:
    data = make(num)
    pixels = data.images.double().div(255).transpose(0, 1).flatten(1)
    mean, std = data.mean_std()
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.std(1, correction=0), rtol=1e-6, atol=0
    )


def test_mean_std_does_not_depend_on_the_order() -> None:
    data = make(5000)
    assert data.subset(torch.randperm(5000)).mean_std() == data.mean_std()


def test_fields_cannot_be_replaced() -> None:
    with pytest.raises(FrozenInstanceError):
        make().labels = torch.zeros(1)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 1, 4, 4)}, r"uint8 of shape \[N, C, H, W\]; got torch.float32"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, r"of shape \(2, 4, 4\)"),
        ({"labels": torch.tensor([0, 1, 0])}, r"int64 of shape \[2\].*\(3,\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, r"got torch.float32"),
        ({"labels": torch.tensor([0, 2])}, r"lie in 0 to 1 for 2 classes; got 0 to 2"),
        ({"labels": torch.tensor([-1, 1])}, r"got -1 to 1"),
        ({"class_names": ("a",)}, r"got 1 names for num_classes = 2"),
        ({"num_classes": 0, "class_names": ()}, r"at least one; got 0 names"),
    ],
)
def test_bad_fields_are_explained(change: dict[str, object], message: str) -> None:
    fields = {
        "images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        "labels": torch.tensor([0, 1]),
        "num_classes": 2,
        "class_names": ("a", "b"),
    }
    ImageData(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        ImageData(**{**fields, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([30]), r"0 to 29 for 30 images; got 30 to 30"),
        (torch.tensor([-1]), r"got -1 to -1"),
        (torch.ones(30, dtype=torch.bool), r"got torch.bool.*nonzero"),
        (torch.tensor(3), r"of shape \(\)"),
    ],
)
def test_bad_indices_are_explained(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().subset(indices)
    with pytest.raises(ValueError, match=message):
        list(make().batches([indices], "cpu"))


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        make().subset(torch.empty(0, dtype=torch.int64)).mean_std()

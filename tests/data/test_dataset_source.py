"""A user's Dataset behind the same interface as images in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from dkl.data import DatasetSource


class Samples(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def good_samples(kind: str) -> list[Any]:
    images = torch.rand(7, 3, 4, 4)
    labels: list[Any] = [number % 3 for number in range(7)]
    if kind == "uint8":
        images = (images * 255).to(torch.uint8)
    elif kind == "numpy":
        labels = [np.int32(label) for label in labels]
    elif kind == "tensor":
        labels = list(torch.tensor(labels, dtype=torch.int32))
    return list(zip(images, labels, strict=True))


@pytest.mark.parametrize("kind", ["float", "uint8", "numpy", "tensor"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_the_given_indices(kind: str, num_workers: int) -> None:
    samples = good_samples(kind)
    source = DatasetSource(Samples(samples), num_workers)
    assert len(source) == 7
    index_batches = [torch.tensor([6, 0, 6]), torch.tensor([2])]
    got = list(source.batches(iter(index_batches), "cpu"))
    assert len(got) == 2
    for indices, (images, labels) in zip(index_batches, got, strict=True):
        assert labels.dtype == torch.int64
        assert labels.tolist() == [int(samples[i][1]) for i in indices.tolist()]
        assert torch.equal(images, torch.stack([samples[i][0] for i in indices.tolist()]))


def test_batches_can_be_asked_for_again() -> None:
    source = DatasetSource(Samples(good_samples("float")))
    first = [images for images, _ in source.batches([torch.arange(7)], "cpu")]
    second = [images for images, _ in source.batches([torch.arange(7)], "cpu")]
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((Image.new("RGB", (4, 4)), 0), r"got Image.*PILToTensor"),
        ((np.zeros((3, 4, 4)), 0), r"must be tensors \[C, H, W\]; got ndarray"),
        ((torch.rand(4, 4), 0), r"torch.float32 of shape \(4, 4\)"),
        ((torch.zeros(3, 4, 4, dtype=torch.int64), 0), r"got torch.int64"),
        ((torch.full((3, 4, 4), -0.5), 0), r"from -0.5 to -0.5. Leave Normalize out"),
        ((torch.full((3, 4, 4), 255.0), 0), r"to 255.*1/255"),
        ((torch.full((3, 4, 4), float("nan")), 0), r"must lie in \[0, 1\].*nan"),
        ((torch.rand(3, 4, 4), 0.5), r"labels must be integers.*got 0.5 \(float\)"),
        ((torch.rand(3, 4, 4), torch.tensor([0, 1])), r"labels must be integers"),
        ((torch.rand(3, 4, 4), True), r"got True \(bool\)"),
        (torch.rand(3, 4, 4), r"pair \(image, label\); got Tensor"),
    ],
)
def test_bad_samples_are_explained(sample: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetSource(Samples([sample]))


def test_bad_datasets_are_explained() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(ValueError, match=r"map-style.*got Stream"):
        DatasetSource(Stream())
    with pytest.raises(ValueError, match="empty Samples"):
        DatasetSource(Samples([]))
    with pytest.raises(ValueError, match="num_workers must be 0 or more; got -1"):
        DatasetSource(Samples(good_samples("float")), -1)

"""A user's own torch Dataset as a source of batches."""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset


class DatasetSource:
    """Batches from a map-style dataset of (image, label), collected by a DataLoader.

    The first sample is read once, here, to check what the dataset gives. Random transforms inside
    the dataset draw from torch's global generator, not from the loop's draws: prefer a batch
    augmentation where a split batch must give the same trajectory.

    Args:
        dataset: has a length; gives (image, label) with an image tensor [C, H, W], uint8 or floats
            in [0, 1], and an integer label.
        num_workers: processes that read samples; 0 reads in this one.
        num_classes: labels from 0 to this - 1 are allowed; None does not check them.

    Raises:
        ValueError: the dataset or its first sample is something else.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))
        >>> source = DatasetSource(dataset)
        >>> for images, labels in source.batches([torch.tensor([3, 0])], "cpu"):
        ...     print(tuple(images.shape), labels)
        (2, 1, 8, 8) tensor([1, 0])
    """

    def __init__(
        self, dataset: Dataset[Any], num_workers: int = 0, *, num_classes: int | None = None
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"the dataset must be map-style, with a length and samples by index; got "
                f"{type(dataset).__name__}. Give it __len__ and __getitem__."
            )
        self._length = len(dataset)
        if self._length == 0:
            raise ValueError(
                f"the dataset must have samples; got an empty {type(dataset).__name__}."
            )
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more; got {num_workers}.")
        _check_sample(dataset[0])
        self._dataset = dataset
        self._num_workers = num_workers
        self._num_classes = num_classes

    def __len__(self) -> int:
        return self._length

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch for each vector of indices, in the given order.

        Args:
            index_batches: vectors [B] of int64, 0 to len - 1.
            device: where the batches go.

        Yields:
            images [B, C, H, W] as the dataset gives them and labels [B] int64, on the device.

        Raises:
            ValueError: a label is out of range.
        """
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=(indices.tolist() for indices in index_batches),
            num_workers=self._num_workers,
        )
        for images, labels in loader:
            self._check_labels(labels)
            yield images.to(device), labels.to(device=device, dtype=torch.int64)

    def _check_labels(self, labels: Tensor) -> None:
        highest = None if self._num_classes is None else self._num_classes - 1
        if highest is not None and not 0 <= int(labels.min()) <= int(labels.max()) <= highest:
            raise ValueError(
                f"labels must be in [0, {self._num_classes}), one logit of the model for each; the "
                f"dataset gave {int(labels.min())} to {int(labels.max())}. Renumber them from 0, "
                f"or give the model more classes."
            )


def _check_sample(sample: Any) -> None:
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise ValueError(f"a sample must be a pair (image, label); got {type(sample).__name__}.")
    image, label = sample
    if not isinstance(image, Tensor):
        raise ValueError(
            f"images must be tensors [C, H, W]; got {type(image).__name__}. Let the dataset's "
            f"transform end with torchvision.transforms.v2.PILToTensor() or ToImage()."
        )
    is_float = image.is_floating_point()
    if image.ndim != 3 or not (is_float or image.dtype == torch.uint8):
        raise ValueError(
            f"images must be uint8 or floats in [0, 1] of shape [C, H, W]; got {image.dtype} of "
            f"shape {tuple(image.shape)}."
        )
    if is_float:
        smallest, largest = (
            (float(v) for v in torch.aminmax(image)) if image.numel() else (0.0, 0.0)
        )
        if not 0 <= smallest <= largest <= 1:
            raise ValueError(
                f"float images must lie in [0, 1]; the first has values from {smallest:.3g} to "
                f"{largest:.3g}. Leave Normalize out of the transform (give the model mean and "
                f"std), and scale pixels of 0 to 255 by 1/255."
            )
    try:
        if isinstance(label, bool) or (isinstance(label, Tensor) and label.ndim):
            raise TypeError("not a class number")
        operator.index(label)
    except TypeError as error:
        raise ValueError(
            f"labels must be integers, the number of the class; got {label!r} "
            f"({type(label).__name__})."
        ) from error

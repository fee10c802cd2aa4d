"""A labelled set of images that stays uint8 in memory.

Legend: N images, B batch, C channels, H height, W width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # images per pass of `mean_std`; bounds its temporary memory


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images and labels in memory, checked once when they are made.

    Args:
        images: [N, C, H, W] uint8, 0 to 255.
        labels: [N] int64, 0 to num_classes - 1.
        num_classes: number of classes.
        class_names: one name per class.

    Raises:
        ValueError: a type, shape, label or number of names does not fit the description above.

    Example:
        >>> images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        >>> data = ImageData(images, torch.tensor([0, 1, 0]), 2, ("cat", "dog"))
        >>> data
        ImageData(3 images of 1x2x2, 2 classes)
        >>> data.subset(torch.tensor([1])).labels
        tensor([1])
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 of shape [N, C, H, W]; got {self.images.dtype} of shape "
                f"{shape}. Turn floats in [0, 1] into (images * 255).round().to(torch.uint8)."
            )
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape [{shape[0]}], one for each image; got "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )
        if len(self.class_names) != self.num_classes or self.num_classes < 1:
            raise ValueError(
                f"class_names must name each of the num_classes classes, at least one; got "
                f"{len(self.class_names)} names for num_classes = {self.num_classes}."
            )
        if (
            len(self)
            and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes
        ):
            raise ValueError(
                f"labels must lie in 0 to {self.num_classes - 1} for {self.num_classes} classes; "
                f"got {int(self.labels.min())} to {int(self.labels.max())}. "
                f"Renumber them from 0 or correct num_classes."
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    def __repr__(self) -> str:
        size = "x".join(str(n) for n in self.images.shape[1:])
        return f"ImageData({len(self)} images of {size}, {self.num_classes} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Tensor) -> "ImageData":
        """Return the images at these positions, in this order.

        Args:
            indices: [M] int64, 0 to N - 1; repeats are allowed.

        Returns:
            New data of M images (a copy) with the same classes.

        Raises:
            ValueError: the indices are not a vector of int64 in range.

        Example:
            >>> images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
            >>> data = ImageData(images, torch.tensor([0, 1, 0, 1]), 2, ("a", "b"))
            >>> data.subset(torch.tensor([3, 0])).images.flatten()
            tensor([3, 0], dtype=torch.uint8)
        """
        images, labels = self._rows(indices)
        return ImageData(images, labels, self.num_classes, self.class_names)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch for each vector of indices, in the given order.

        The images travel as uint8, a quarter of the bytes of float32; the device makes them floats.

        Args:
            index_batches: vectors [B] of int64, 0 to N - 1; consumed one at a time.
            device: where the batches go.

        Yields:
            images [B, C, H, W] uint8 and labels [B] int64, on the device.

        Raises:
            ValueError: some indices are not a vector of int64 in range.

        Example:
            >>> images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
            >>> data = ImageData(images, torch.tensor([0, 1, 0, 1]), 2, ("a", "b"))
            >>> for images, labels in data.batches([torch.tensor([3, 0])], "cpu"):
            ...     print(tuple(images.shape), labels)
            (2, 1, 2, 2) tensor([1, 0])
        """
        for indices in index_batches:
            images, labels = self._rows(indices)
            yield images.to(device), labels.to(device)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of every channel, on the scale [0, 1].

        Counts of the 256 pixel values are summed as integers, so that neither the order of the
        images nor float rounding matters. The deviation is that of the population.

        Returns:
            (mean, std), C numbers each.

        Raises:
            ValueError: there are no images.

        Example:
            >>> images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
            >>> ImageData(images, torch.tensor([0, 0]), 1, ("a",)).mean_std()
            ((0.5,), (0.5,))
        """
        if self.images.numel() == 0:
            raise ValueError(f"mean_std needs at least one pixel; got {self!r}.")
        # On the CPU, whatever the default device is: it may be "meta".
        values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        means, deviations = [], []
        for channel in range(self.images.shape[1]):
            counts = torch.zeros(256, dtype=torch.int64, device="cpu")
            for chunk in torch.split(self.images[:, channel], _CHUNK):
                counts += torch.bincount(chunk.flatten(), minlength=256).cpu()
            shares = counts / counts.sum().double()
            mean = (shares * values).sum()
            means.append(float(mean))
            deviations.append(float((shares * (values - mean).square()).sum().sqrt()))
        return tuple(means), tuple(deviations)

    def _rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(
                f"indices must be a vector of int64; got {indices.dtype} of shape "
                f"{tuple(indices.shape)}. A bool mask becomes indices by mask.nonzero().flatten()."
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise ValueError(
                f"indices must lie in 0 to {len(self) - 1} for {len(self)} images; "
                f"got {int(indices.min())} to {int(indices.max())}."
            )
        here = indices.to(self.images.device)
        return self.images.index_select(0, here), self.labels.index_select(
            0, indices.to(self.labels.device)
        )

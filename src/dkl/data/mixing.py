"""Real and generated images in one source: fixed shares in every batch.

Legend: B batch, C channels, H height, W width; R real images, G generated ones.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkl.data.generated import GeneratedImages
from dkl.data.images import ImageData
from dkl.data.random_order import Integers, permutation, random_bits


class MixedSource:
    """Training data of which a stated share of every batch is generated.

    Positions 0 to R - 1 are the real images, R to R + G - 1 the generated ones. An epoch has
    ``samples_per_epoch`` samples whatever the number of images, in the order of ``epoch_order``, of
    which every ``batch_size`` consecutive ones are a batch.

    Source: Wang et al. 2023, "Better diffusion models further improve adversarial training" (50000
    samples per epoch, share 0.7 with 1M generated images).

    Args:
        real: images in memory.
        generated: images on disk, of the same shape and classes.
        fraction: share of generated images, above 0 and at most 1; a batch has
            int(batch_size * fraction) of them.
        samples_per_epoch: length of an epoch.
        batch_size: samples of one optimiser step, over all processes and micro-batches.

    Raises:
        ValueError: a number is out of range, a batch would have no generated image, or the two
            kinds of images do not fit together.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dkl.data.npz_files import write_npz
        >>> real = ImageData(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4), 4,
        ...                  ("a", "b", "c", "d"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     part = write_npz(real, Path(folder) / "part.npz")
        ...     generated = GeneratedImages([part], num_classes=4, image_shape=(1, 2, 2))
        ...     source = MixedSource(real, generated, fraction=0.5, samples_per_epoch=8,
        ...                          batch_size=4)
        >>> (source.epoch_order(seed=0, epoch=0) >= 4).int()  # generated
        tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.int32)
    """

    def __init__(
        self,
        real: ImageData,
        generated: GeneratedImages,
        *,
        fraction: float,
        samples_per_epoch: int,
        batch_size: int,
    ) -> None:
        _check_numbers(fraction, samples_per_epoch, batch_size)
        _check_fit(real, generated, fraction)
        self.real = real
        self.generated = generated
        self.fraction = fraction
        self.batch_size = batch_size
        self.num_classes = real.num_classes
        self.class_names = real.class_names
        self._length = samples_per_epoch

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return (
            f"MixedSource({len(self)} samples per epoch, {self.fraction:g} of them from "
            f"{self.generated!r}, the rest from {self.real!r})"
        )

    def epoch_order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the samples of an epoch.

        A batch of b samples, also the last and smaller one of an epoch, has int(b * fraction)
        generated ones, spread evenly: any run of m neighbours has m / b of them, give or take one,
        so that micro-batches are mixed alike. The real samples of a run walk through permutations
        of the real images, one after another and over the ends of epochs: each image comes once in
        every R draws. Generated samples are drawn with replacement.

        Everything is a pure function of seed and epoch, by integer arithmetic (SplitMix64; Steele,
        Lea and Flood, OOPSLA 2014): the same on every machine and version, for any number of
        processes, and for an epoch that a resumed run starts with.

        Args:
            seed: of the run.
            epoch: 0-based.

        Returns:
            [samples_per_epoch] int64.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more; got {epoch}.")
        is_generated = self._is_generated()
        order = np.empty(len(self), np.int64)
        num_real = int((~is_generated).sum())
        order[~is_generated] = self._real_draws(seed, epoch * num_real, num_real)
        bits = random_bits(len(self) - num_real, f"{seed}:generated:{epoch}")
        # The remainder prefers small numbers by less than G / 2**64.
        drawn = (bits % np.uint64(len(self.generated))).astype(np.int64)
        order[is_generated] = len(self.real) + drawn
        return torch.from_numpy(order)

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read the images at these positions.

        Args:
            indices: [B] int64, 0 to R + G - 1.

        Returns:
            images [B, C, H, W] uint8 and labels [B] int64, on the CPU, in the order of the indices.

        Raises:
            ValueError: the indices are not a vector of int64 in range.
        """
        total = len(self.real) + len(self.generated)
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(
                f"indices must be a vector of int64; got {indices.dtype} of shape "
                f"{tuple(indices.shape)}."
            )
        indices_B = indices.cpu()
        if len(indices_B) and not 0 <= int(indices_B.min()) <= int(indices_B.max()) < total:
            raise ValueError(
                f"indices must lie in 0 to {total - 1} for {len(self.real)} real and "
                f"{len(self.generated)} generated images; got {int(indices_B.min())} to "
                f"{int(indices_B.max())}."
            )
        images_BCHW = torch.empty((len(indices_B), *self.generated.image_shape), dtype=torch.uint8)
        labels_B = torch.empty(len(indices_B), dtype=torch.int64)
        is_real_B = indices_B < len(self.real)
        real = indices_B[is_real_B]
        images_BCHW[is_real_B] = self.real.images[real.to(self.real.images.device)].cpu()
        labels_B[is_real_B] = self.real.labels[real.to(self.real.labels.device)].cpu()
        read = self.generated.rows(indices_B[~is_real_B] - len(self.real))
        images_BCHW[~is_real_B], labels_B[~is_real_B] = read
        return images_BCHW, labels_B

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch for each vector of indices, in the given order.

        While a batch is used, a thread reads the next one from disk.

        Args:
            index_batches: vectors [B] of int64; consumed one ahead.
            device: where the batches go.

        Yields:
            images [B, C, H, W] uint8 and labels [B] int64, on the device.

        Raises:
            ValueError: some indices are not a vector of int64 in range.
        """
        reading: Future[tuple[Tensor, Tensor]] | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dkl-data") as reader:
            for indices in index_batches:
                upcoming = reader.submit(self.rows, indices)
                if reading is not None:
                    images, labels = reading.result()
                    yield images.to(device), labels.to(device)
                reading = upcoming
        # The thread has ended here: the last batch may be used for as long as a whole validation.
        if reading is not None:
            images, labels = reading.result()
            yield images.to(device), labels.to(device)

    def _is_generated(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mark the generated positions of an epoch: where floor(j g / b) rises at place j."""
        places = np.arange(len(self), dtype=np.int64)
        starts = places - places % self.batch_size
        sizes = np.minimum(self.batch_size, len(self) - starts)
        counts = (sizes * self.fraction).astype(np.int64)
        within = places - starts
        return np.asarray((within + 1) * counts // sizes > within * counts // sizes)

    def _real_draws(self, seed: int, first: int, count: int) -> Integers:
        """Return draws first to first + count - 1 of the run."""
        num_real = len(self.real)
        if count == 0:
            return np.empty(0, np.int64)
        passes = range(first // num_real, (first + count - 1) // num_real + 1)
        drawn = np.concatenate([permutation(num_real, f"{seed}:real:{one}") for one in passes])
        skipped = first - passes[0] * num_real
        return drawn[skipped : skipped + count]


def _check_numbers(fraction: float, samples_per_epoch: int, batch_size: int) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction must be above 0 and at most 1, the share of generated images; got "
            f"{fraction}. To train on real images alone, leave the generated data away."
        )
    if batch_size < 1 or samples_per_epoch < 1:
        raise ValueError(
            f"batch_size and samples_per_epoch must be at least 1; got {batch_size} and "
            f"{samples_per_epoch}."
        )
    size = min(batch_size, samples_per_epoch)
    if int(size * fraction) == 0:
        raise ValueError(
            f"a batch of {size} with fraction {fraction} has int({size * fraction:g}) = 0 "
            f"generated images; raise the fraction or the batch size."
        )


def _check_fit(real: ImageData, generated: GeneratedImages, fraction: float) -> None:
    if len(real) == 0 and fraction < 1:
        raise ValueError(f"real must have images for a share of {1 - fraction:g}; got {real!r}.")
    shape = tuple(real.images.shape[1:])
    if shape != tuple(generated.image_shape) or real.num_classes != generated.num_classes:
        raise ValueError(
            f"generated images must have the shape and classes of the real ones; got {generated!r} "
            f"for {real!r}."
        )

"""A labelled set of images that stay in files until a batch needs them.

Legend: N images, B batch, S side of the images in pixels.
"""

import hashlib
import json
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dkl.data.image_decoding import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BrokenImageError,
    Decoding,
    decode,
    decode_drawn,
    make_transform,
)
from dkl.data.image_stores import ImageStore
from dkl.data.images import ImageData
from dkl.data.lookup import DatasetNotFoundError
from dkl.data.random_order import permutation


@dataclass(frozen=True, eq=False, repr=False)
class ImageFiles:
    """Images in files and their labels; pixels are decoded by worker processes, batch by batch.

    In training a sample is asked for by its position pass * N + sample: every pass over the images
    augments them anew. The augmentation is a function of seed and position alone, so that batches
    are the same for any number of workers and processes, and after a resume.

    Args:
        store: where the encoded images are.
        samples: [N] int64, numbers of the images in the store.
        labels: [N] int64, 0 to num_classes - 1.
        num_classes: number of classes.
        class_names: one name per class.
        decoding: how pixels are made.
        augmented: for training; False: for evaluation, without randomness.
        seed: of the augmentation.
    """

    store: ImageStore
    samples: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    decoding: Decoding = field(default_factory=Decoding)
    augmented: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        size = self.decoding.image_size
        return f"ImageFiles({len(self)} images of 3x{size}x{size}, {self.num_classes} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (3, S, S)."""
        return 3, self.decoding.image_size, self.decoding.image_size

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return ImageNet's constants, which published networks of such images normalise with."""
        return IMAGENET_MEAN, IMAGENET_STD

    def subset(self, indices: Tensor) -> "ImageFiles":
        """Return the images at these positions [M] int64, 0 to N - 1, in this order."""
        chosen = indices.cpu()
        return replace(self, samples=self.samples[chosen], labels=self.labels[chosen])

    def for_evaluation(self) -> "ImageFiles":
        """Return the same images, decoded without randomness."""
        return replace(self, augmented=False)

    def epoch_order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the positions of an epoch, [N] int64.

        Each image comes once; or N / repeats of them, drawn anew for every epoch, come ``repeats``
        times in a row, so that a batch holds several augmentations of an image.

        Args:
            seed: of the run.
            epoch: 0-based.
        """
        repeats, count = self.decoding.repeats, len(self)
        order_N = torch.from_numpy(permutation(count, f"{seed}:files:{epoch}"))
        draws_N = torch.arange(count)
        return order_N[draws_N // repeats] + (epoch * repeats + draws_N % repeats) * count

    def drawn_positions(self, samples_S: Tensor, *, epoch: int) -> Tensor:
        """Return positions for samples that something else has drawn for an epoch, [S] int64.

        Every draw is augmented by itself, also of a sample that is drawn several times.

        Args:
            samples_S: [S] int64, 0 to N - 1.
            epoch: 0-based.
        """
        passes_S = epoch * len(samples_S) + torch.arange(len(samples_S))
        return samples_S + passes_S * len(self)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch for each vector of positions, in the given order.

        Args:
            index_batches: vectors [B] of int64; position p is sample p modulo N. They are consumed
                ahead of the batches, by as many as workers prefetch.
            device: where the batches go.

        Yields:
            images [B, 3, S, S] uint8 and labels [B] int64, on the device.

        Raises:
            BrokenImageError: a file cannot be decoded.
            DatasetNotFoundError: a file is not there any more.
        """
        place, workers = torch.device(device), self.decoding.workers
        if isinstance(index_batches, list | tuple) and len(index_batches) <= 1:
            workers = 0  # one batch is decoded sooner than workers start
        on_gpu = place.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            _Decoded(self),
            batch_sampler=_Lists(index_batches),
            num_workers=workers,
            prefetch_factor=self.decoding.prefetch if workers else None,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            pin_memory=on_gpu,
            # Or the loader would draw a number from the generator of the run.
            generator=torch.Generator(),
        )
        for loaded in loader:
            if isinstance(loaded, _Failure):
                raise loaded.error
            images, labels = loaded
            yield images.to(place, non_blocking=on_gpu), labels.to(place, non_blocking=on_gpu)

    def in_memory(self, indices: Tensor) -> ImageData:
        """Decode some images as for evaluation and keep their pixels in memory.

        Args:
            indices: [M] int64, 0 to N - 1.
        """
        some = self.for_evaluation().subset(indices)
        parts = torch.split(torch.arange(len(some)), 64)
        images = torch.empty(0, *self.image_shape, dtype=torch.uint8)
        if len(some):
            images = torch.cat([images for images, _ in some.batches(parts, "cpu")])
        return ImageData(images, some.labels, self.num_classes, self.class_names)

    def find_broken(self, rows: Tensor) -> Iterator[str]:
        """Decode some images by the workers, and yield a message for each that cannot be.

        Args:
            rows: [M] int64, 0 to N - 1.
        """
        decoded = _Decoded(self.for_evaluation())
        messages: DataLoader[Any] = DataLoader(
            decoded,
            sampler=rows.tolist(),
            batch_size=None,
            num_workers=self.decoding.workers if len(rows) > 1 else 0,
            collate_fn=_message,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
        )
        yield from filter(None, messages)

    def fingerprint(self) -> str:
        """Return a hash of which images these are, in which order, and how they are decoded.

        Names, sizes of the files and labels stand for their content: to read all of ImageNet takes
        an hour on a slow disk.
        """
        facts = self.decoding.describe(augmented=self.augmented)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for sample, label in zip(self.samples.tolist(), self.labels.tolist(), strict=True):
            text = f"{self.store.name(sample)}\0{self.store.size(sample)}\0{label}\n"
            digest.update(text.encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class _Failure:
    """What a worker could not do; raised where batches are taken, without a worker's traceback."""

    error: Exception


class _Decoded(Dataset[Any]):
    """Pixels and label by position, for a DataLoader."""

    def __init__(self, data: ImageFiles) -> None:
        self._data = data
        self._transform = make_transform(data.decoding, augmented=data.augmented)

    def __getitem__(self, position: int) -> "tuple[Tensor, Tensor] | _Failure":
        data = self._data
        row = position % len(data)
        sample = int(data.samples[row])
        try:
            content, place = data.store.read(sample), data.store.place(sample)
            if not data.augmented:
                return decode(content, place, self._transform), data.labels[row]
            pixels = decode_drawn(
                content, place, self._transform, seed=data.seed, position=position
            )
        except BrokenImageError as error:
            return _Failure(BrokenImageError(str(error)))
        except OSError as error:
            return _Failure(DatasetNotFoundError(str(error)))
        return pixels, data.labels[row]


def _ignore_signals(_worker: int) -> None:
    """Go on after Ctrl-C or a cluster's SIGTERM, which reach all processes of a run.

    The process that trains decides: it ends its step, saves, and stops the workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _message(sample: Any) -> Any:
    """Return what failed, so that no pixels travel between processes."""
    return str(sample.error) if isinstance(sample, _Failure) else ""


class _Lists:
    """Index batches as lists of numbers, made when they are asked for."""

    def __init__(self, index_batches: Iterable[Tensor]) -> None:
        self._index_batches = index_batches

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self._index_batches:
            yield indices.tolist()


def _collate(samples: "list[tuple[Tensor, Tensor] | _Failure]") -> Any:
    """Return images and labels, or the first failure."""
    failures = [sample for sample in samples if isinstance(sample, _Failure)]
    if failures:
        return failures[0]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)

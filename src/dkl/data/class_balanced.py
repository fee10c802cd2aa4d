"""Class-balanced sampling: every class is drawn alike, however many samples it has.

Legend: N samples, C classes, S draws of an epoch, B batch.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dkl.data.random_order import permutation, random_bits

_Integers = np.ndarray[Any, np.dtype[np.int64]]

_WEIGHT_BITS = 16  # binary places that weights are rounded to, at most
_PRODUCT_BITS = 62  # what draws times weights may take, so that int64 arithmetic is exact


class LabelledSource(Protocol):
    """Training data whose labels are known without reading the images, such as ``ImageData``."""

    @property
    def labels(self) -> Tensor:
        """Return the labels, [N] int64."""

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels for each vector of indices."""


class ClassBalancedSource:
    """Training data drawn class by class: a class of n samples with a share ~ n^power of the draws.

    An epoch has ``samples_per_epoch`` draws in the order of ``epoch_order``. Classes without
    samples are never drawn.

    Source: Kang et al., ICLR 2020, "Decoupling representation and classifier for long-tailed
    recognition", equation 1: power 0 is class-balanced sampling, 1/2 square-root sampling, 1
    takes samples as often as they are there.

    Args:
        data: images and labels.
        power: 0 to 1.
        samples_per_epoch: draws of an epoch; None: as many as ``data`` has samples.

    Raises:
        ValueError: a number is out of range, or there are no samples.

    Example:
        >>> from dkl.data.images import ImageData
        >>> labels = torch.tensor([0] * 9 + [1])
        >>> data = ImageData(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), labels, 2, ("a", "b"))
        >>> source = ClassBalancedSource(data)
        >>> labels[source.epoch_order(seed=0, epoch=0)].bincount()
        tensor([5, 5])
    """

    def __init__(
        self, data: LabelledSource, *, power: float = 0.0, samples_per_epoch: int | None = None
    ) -> None:
        length = len(data) if samples_per_epoch is None else samples_per_epoch
        if not 0 <= power <= 1:
            raise ValueError(
                f"power must lie in 0 (all classes alike) to 1 (all samples alike); got {power}."
            )
        if len(data) == 0 or length < 1:
            raise ValueError(
                f"class-balanced sampling needs samples and at least one draw per epoch; got "
                f"{data!r} and samples_per_epoch={samples_per_epoch}."
            )
        self.data = data
        self.power = power
        self.num_classes = data.num_classes
        labels_N = data.labels.cpu().numpy()
        sizes_C = np.bincount(labels_N, minlength=data.num_classes)
        by_class = np.argsort(labels_N, kind="stable").astype(np.int64)
        self._members = np.split(by_class, np.cumsum(sizes_C)[:-1])
        self._ends_C = np.cumsum(_integer_weights(sizes_C, power, length))
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return (
            f"ClassBalancedSource({len(self)} samples per epoch of {self.data!r}, "
            f"power {self.power:g})"
        )

    def epoch_order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the samples of an epoch.

        With S draws and a class's share p, an epoch draws the class S p times, rounded down or up
        (systematic sampling: S equidistant points from a random start, so that the mean over epochs
        is S p exactly). Where in the epoch is random. The draws of a class walk through
        permutations of its samples, one after another and over the ends of epochs: each comes once
        in every n draws of the class.

        Everything is a pure function of seed and epoch, by integer arithmetic: the same for any
        number of processes, and for an epoch that a resumed run starts with. A class that is
        smaller than its share of a batch has samples that come twice in one step, and are then
        augmented alike.

        Args:
            seed: of the run.
            epoch: 0-based.

        Returns:
            [samples_per_epoch] int64, 0 to N - 1; for images in files, positions of
            ``ImageFiles``.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more; got {epoch}.")
        before_C = self._counts(seed, 0, epoch)
        counts_C = self._counts(seed, epoch, epoch + 1)
        classes_S = np.repeat(np.arange(self.num_classes), counts_C)
        classes_S = classes_S[permutation(len(self), f"{seed}:classes:{epoch}")]
        drawn = [
            members[self._walk(f"{seed}:class:{index}", len(members), first, count)]
            for index, (members, first, count) in enumerate(
                zip(self._members, before_C.tolist(), counts_C.tolist(), strict=True)
            )
            if count
        ]
        order_S = np.empty(len(self), np.int64)
        order_S[np.argsort(classes_S, kind="stable")] = np.concatenate(drawn)
        samples_S = torch.from_numpy(order_S)
        # Images that are augmented as they are read: every draw of one by itself.
        positions = getattr(self.data, "drawn_positions", None)
        return samples_S if positions is None else positions(samples_S, epoch=epoch)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch for each vector of indices, as ``data`` does.

        Args:
            index_batches: vectors [B] of int64, 0 to N - 1.
            device: where the batches go.

        Yields:
            images [B, C, H, W] and labels [B] int64, on the device.

        Raises:
            ValueError: some indices are not a vector of int64 in range.
        """
        return self.data.batches(index_batches, device)

    def _counts(self, seed: int, first: int, end: int) -> _Integers:
        """Return how often each class is drawn in epochs first to end - 1, [C].

        Of an epoch's points (i W + r) / S, i = 0 to S - 1, those below a class's upper end are
        ceil((S end - r) / W), where W is the sum of the weights and r in 0 to W - 1 is random.
        """
        total = int(self._ends_C[-1])
        # The remainder prefers small numbers by less than W / 2**64.
        starts = random_bits(end, f"{seed}:start")[first:] % np.uint64(total)
        last_E1 = (total - 1 - starts.astype(np.int64))[:, None]
        below_C = ((len(self) * self._ends_C + last_E1) // total).sum(0)
        counts_C: _Integers = np.diff(below_C, prepend=0)
        return counts_C

    @staticmethod
    def _walk(key: str, size: int, first: int, count: int) -> _Integers:
        """Return draws first to first + count - 1 of a class, as positions in it."""
        passes = range(first // size, (first + count - 1) // size + 1)
        drawn = np.concatenate([permutation(size, f"{key}:{one}") for one in passes])
        skipped = first - passes[0] * size
        return drawn[skipped : skipped + count]


def _integer_weights(sizes_C: _Integers, power: float, num_draws: int) -> _Integers:
    """Return n^power of each class as integers with one factor; 0 for classes without samples."""
    if power == 0:
        return (sizes_C > 0).astype(np.int64)
    weights_C = np.where(sizes_C > 0, sizes_C.astype(np.float64) ** power, 0.0)
    needed = int(weights_C.sum() * num_draws).bit_length()
    bits = min(_WEIGHT_BITS, _PRODUCT_BITS - needed)
    if bits < 0:
        raise ValueError(
            f"power {power:g} needs fewer samples or draws: {int(sizes_C.sum())} samples and "
            f"{num_draws} draws per epoch are beyond exact integer arithmetic."
        )
    return np.rint(weights_C * 2.0**bits).astype(np.int64)

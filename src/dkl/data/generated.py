"""Generated images on disk: many parts, of which only the rows that are asked for are read.

Legend: N images, B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkl.data.npz import MappedPart, map_part
from dkl.data.npz_files import as_paths

_LABELS_PER_CHECK = 1 << 20


class GeneratedImages:
    """Images and labels in npz parts, mapped into memory.

    A part is an npz file as ``numpy.savez`` writes it, with ``image`` [N, H, W, C] uint8 (RGB) and
    ``label`` [N] integers: the format of the data generated for Wang et al. 2023, "Better diffusion
    models further improve adversarial training". Files of ``numpy.savez_compressed`` must be
    converted once (``convert_npz``, or ``dkl data convert``). A folder with ``image.npy`` and
    ``label.npy``, which is what unpacking an npz file leaves, is a part too. Pickled arrays are
    never loaded.

    Only headers and labels are read here. The pages of images that were read are the system's to
    keep or drop; no memory of the process grows with the data.

    Args:
        parts: paths, in order; their images are numbered through.
        num_classes: labels must lie in 0 to this - 1.
        image_shape: (C, H, W) that every part must have.

    Raises:
        DatasetNotFoundError: a part does not exist.
        ValueError: no parts, or a part that is compressed, damaged, or of another shape or type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "part.npz"
        ...     pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
        ...     np.savez(path, image=pixels, label=np.array([4, 9]))
        ...     generated = GeneratedImages([path], num_classes=10, image_shape=(3, 2, 2))
        ...     images, labels = generated.rows(torch.tensor([1, 0, 1]))
        >>> generated
        GeneratedImages(2 images of 3x2x2, 10 classes, 1 part)
        >>> images.shape, labels, images[1, 0]
        (torch.Size([3, 3, 2, 2]), tensor([9, 4, 9]), tensor([[0, 3],
            [6, 9]], dtype=torch.uint8))
    """

    def __init__(
        self,
        parts: Sequence[Path | str],
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.paths = tuple(as_paths(parts))
        self._parts = [map_part(path) for path in self.paths]
        for part in self._parts:
            _check_image_shape(part, image_shape)
            _check_labels(part, num_classes)
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        size = "x".join(str(n) for n in self.image_shape)
        count = f"{len(self._parts)} part" + ("s" if len(self._parts) > 1 else "")
        return f"GeneratedImages({len(self)} images of {size}, {self.num_classes} classes, {count})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as paths, not as pixels."""
        return _reopen, (self.paths, self.num_classes, self.image_shape)

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read the images at these positions.

        Args:
            indices: [B] int64, 0 to N - 1, any order; repeats are allowed.

        Returns:
            images [B, C, H, W] uint8 and labels [B] int64, on the CPU, in the order of the indices.

        Raises:
            ValueError: the indices are not a vector of int64 in range.
        """
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(
                f"indices must be a vector of int64; got {indices.dtype} of shape "
                f"{tuple(indices.shape)}."
            )
        wanted_B = indices.cpu().numpy()
        if len(wanted_B) and not 0 <= int(wanted_B.min()) <= int(wanted_B.max()) < len(self):
            raise ValueError(
                f"indices must lie in 0 to {len(self) - 1} for {len(self)} images; got "
                f"{int(wanted_B.min())} to {int(wanted_B.max())}."
            )
        channels, height, width = self.image_shape
        images_BHWC = np.empty((len(wanted_B), height, width, channels), np.uint8)
        labels_B = np.empty(len(wanted_B), np.int64)
        # In the order of the files: the disk is read forwards, and each part at once.
        order_B = np.argsort(wanted_B, kind="stable")
        cuts = np.searchsorted(wanted_B[order_B], self._ends)
        first = 0
        for part, cut, end in zip(self._parts, cuts, self._ends, strict=True):
            places = order_B[first:cut]
            if len(places):
                rows = wanted_B[places] - (end - len(part))
                images_BHWC[places] = part.images.take(rows)
                labels_B[places] = part.labels.take(rows)
            first = cut
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()
        return images_BCHW, torch.from_numpy(labels_B)


def _reopen(
    paths: Sequence[Path], num_classes: int, image_shape: tuple[int, int, int]
) -> GeneratedImages:
    return GeneratedImages(paths, num_classes=num_classes, image_shape=image_shape)


def _check_image_shape(part: MappedPart, image_shape: tuple[int, int, int]) -> None:
    channels, height, width = image_shape
    got = part.images.array.shape
    if got[1:] == (height, width, channels):
        return
    hint = "Generate or resize images of that size."
    if got[1:] == (channels, height, width):
        hint = "The channels must come last: save images.transpose(0, 2, 3, 1)."
    raise ValueError(
        f"images in {part.path} must have shape [N, {height}, {width}, {channels}] (N, H, W, C); "
        f"got {got}. {hint}"
    )


def _check_labels(part: MappedPart, num_classes: int) -> None:
    labels_N = part.labels.array
    for start in range(0, len(labels_N), _LABELS_PER_CHECK):
        chunk = labels_N[start : start + _LABELS_PER_CHECK]
        lowest, highest = int(chunk.min()), int(chunk.max())
        if not 0 <= lowest <= highest < num_classes:
            raise ValueError(
                f"labels in {part.path} must lie in 0 to {num_classes - 1} for {num_classes} "
                f"classes; got {lowest} to {highest} among labels {start} to "
                f"{start + len(chunk) - 1}. These parts may be of another data set."
            )

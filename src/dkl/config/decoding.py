"""Sub-section ``data.decoding``: how image files become pixels."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dkl.config.base import Count, CountOrZero, Number, PositiveNumber, Problem, Section

FILE_DATASETS = frozenset({"imagenet", "image_folder", "imagenet_lt", "webdataset"})
"""Datasets whose images stay in files, all others are in memory."""

_RAND_AUGMENT = r"^rand(-[a-z]+[0-9.]+)+$"


class DecodingSettings(Section):
    """How image files become pixels, and how many processes make them.

    Training crops a random part, mirrors, distorts and erases, in this order; what
    ``data.augment`` says comes after it, on whole batches.

    Args:
        image_size: side of the images in pixels.
        resize: short side before the centre is cropped in evaluation.
        interpolation: of both.
        scale: least and largest share of the area that a training crop has.
        flip: mirror half of the training images left to right.
        rand_augment: timm's text for RandAugment, such as "rand-m9-mstd0.5-inc1"; null means none.
        random_erasing: share of training images in which a rectangle is erased.
        repeats: times that an image comes in an epoch, differently augmented, so many times fewer
            images being in it (repeated augmentation); 1 means once.
        workers: processes that decode, for each process that trains; 0 decodes in that one.
        prefetch: batches that each worker is ahead.
    """

    image_size: Count = 224
    resize: Count = 256
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"
    scale: Annotated[tuple[PositiveNumber, PositiveNumber], Field(strict=False)] = (0.08, 1.0)
    flip: bool = True
    rand_augment: Annotated[str, Field(pattern=_RAND_AUGMENT)] | None = None
    random_erasing: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repeats: Count = 1
    workers: CountOrZero = 4
    prefetch: Count = 4

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.resize < self.image_size:
            yield "resize", f"must be at least image_size ({self.image_size}); got {self.resize}"
        if not self.scale[0] <= self.scale[1] <= 1:
            least, most = self.scale
            yield "scale", f"must be two ascending shares up to 1; got [{least:g}, {most:g}]"

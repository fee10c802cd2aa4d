"""From the bytes of an image file to uint8 pixels of one size, by torchvision and timm.

Legend: C channels, S side of the image.
"""

import hashlib
import io
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]

Transform = Callable[[Any], Tensor]
"""An RGB image of PIL to pixels [3, S, S] uint8."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BrokenImageError(ValueError):
    """A file cannot be decoded as an image.

    Example:
        >>> issubclass(BrokenImageError, ValueError)
        True
    """


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels, and by how many processes.

    Training crops a random part of the image and scales it (Szegedy et al. 2015), mirrors half of
    the images, distorts by RandAugment (Cubuk et al. 2020) and erases a rectangle (Zhong et al.
    2020), in this order. Evaluation scales the short side and crops the centre.

    Args:
        image_size: S, side of the images in pixels.
        resize: short side before the centre is cropped in evaluation, at least ``image_size``.
        interpolation: of both.
        scale: least and largest share of the area that a training crop has.
        flip: mirror half of the training images left to right.
        rand_augment: timm's text for it, such as "rand-m9-mstd0.5-inc1"; None means none.
        random_erasing: share of training images in which a rectangle becomes ImageNet's mean.
        repeats: times that an image comes in an epoch, in a row and differently augmented; an epoch
            then has so many times fewer images (Hoffer et al. 2020). 1 means once.
        workers: processes that decode; 0 decodes in this one.
        prefetch: batches that each worker is ahead.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> Decoding(image_size=64, resize=32)
        Traceback (most recent call last):
        ...
        ValueError: decoding: resize must be at least image_size (64); got 32
    """

    image_size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    rand_augment: str | None = None
    random_erasing: float = 0.0
    repeats: int = 1
    workers: int = 4
    prefetch: int = 4

    def __post_init__(self) -> None:
        least = {"image_size": 1, "repeats": 1, "workers": 0, "prefetch": 1}
        problems = [
            f"{name} must be at least {bound}; got {getattr(self, name)}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.resize < self.image_size:
            problems.append(
                f"resize must be at least image_size ({self.image_size}); got {self.resize}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            problems.append(f"scale must be two ascending shares in (0, 1]; got {self.scale}")
        if self.rand_augment is not None and not self.rand_augment.startswith("rand-"):
            problems.append(
                f'rand_augment must be like "rand-m9-mstd0.5-inc1"; got {self.rand_augment!r}'
            )
        if not 0 <= self.random_erasing <= 1:
            problems.append(f"random_erasing must lie in 0 to 1; got {self.random_erasing}")
        if problems:
            raise ValueError("decoding: " + "; ".join(problems))

    def describe(self, *, augmented: bool) -> dict[str, Any]:
        """Return what decides the pixels, JSON-ready."""
        names = ["image_size", "interpolation"]
        names += (
            ["scale", "flip", "rand_augment", "random_erasing", "repeats"]
            if augmented
            else ["resize"]
        )
        return {name: getattr(self, name) for name in names}


def make_transform(decoding: Decoding, *, augmented: bool) -> Transform:
    """Return what makes uint8 pixels [3, S, S] of an RGB image.

    Args:
        decoding: how.
        augmented: for training, drawing from the global generators; False: for evaluation.

    Raises:
        ImportError: RandAugment is wanted and timm is missing.
        ValueError: timm does not know the text for RandAugment.
    """
    from torchvision.transforms import v2

    how = v2.InterpolationMode(decoding.interpolation)
    size = decoding.image_size
    # PIL scales: its filters are what published weights were trained with.
    steps: list[Any] = []
    if not augmented:
        steps = [v2.Resize(decoding.resize, interpolation=how), v2.CenterCrop(size)]
    else:
        steps.append(v2.RandomResizedCrop(size, scale=decoding.scale, interpolation=how))
        if decoding.flip:
            steps.append(v2.RandomHorizontalFlip())
        if decoding.rand_augment is not None:
            steps.append(_rand_augment(decoding.rand_augment, decoding))
    steps.append(v2.PILToTensor())
    if augmented and decoding.random_erasing > 0:
        # The mean is what published recipes erase by: zero, behind their normalisation.
        mean = [round(255 * value) for value in IMAGENET_MEAN]
        steps.append(v2.RandomErasing(p=decoding.random_erasing, value=mean))
    transform: Transform = v2.Compose(steps)
    return transform


def _rand_augment(text: str, decoding: Decoding) -> Any:
    """Return timm's RandAugment, set up as timm's own training does."""
    from PIL import Image

    try:
        from timm.data.auto_augment import rand_augment_transform
    except ImportError as error:
        raise ImportError(
            "data.decoding.rand_augment is timm's, and timm is missing: pip install 'dkl[timm]'"
        ) from error
    options = {
        "translate_const": int(0.45 * decoding.image_size),
        "img_mean": tuple(round(255 * value) for value in IMAGENET_MEAN),
        "interpolation": Image.Resampling[decoding.interpolation.upper()],
    }
    try:
        return rand_augment_transform(text, options)
    # timm checks by assert, and reads numbers as they come.
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"data.decoding.rand_augment: timm cannot read {text!r}; it takes texts such as "
            '"rand-m9-mstd0.5-inc1"'
        ) from error


def decode(content: bytes, place: str, transform: Transform) -> Tensor:
    """Return the pixels of an image file.

    Args:
        content: of the file.
        place: of the file, for messages.
        transform: from ``make_transform``.

    Returns:
        [3, S, S] uint8.

    Raises:
        BrokenImageError: the bytes are no image, or not all of one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # ImageNet has files with odd notes of their camera, whose pixels are sound.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                pixels = image.convert("RGB")
    # PIL answers damaged files by many kinds of errors: SyntaxError and struct.error among them.
    except Exception as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise BrokenImageError(
            f"{place} cannot be decoded as an image ({len(content)} bytes){reason}. Fetch it "
            "again, or take it out of the data."
        ) from error
    return transform(pixels)


def decode_drawn(
    content: bytes, place: str, transform: Transform, *, seed: int, position: int
) -> Tensor:
    """Return the pixels of an image file, all randomness a function of seed and position alone.

    The global generators are left as they were.

    Args:
        content: of the file.
        place: of the file, for messages.
        transform: from ``make_transform``.
        seed: of the run.
        position: of the sample, with its pass over the data.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    with _seeded(int.from_bytes(digest, "little")):
        return decode(content, place, transform)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what transforms draw from: torch's generator, and for timm's Python's and NumPy's."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    # Not torch.manual_seed, which would also seed the generators of GPUs.
    torch.default_generator.manual_seed(seed >> 1)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])

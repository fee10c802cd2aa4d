"""Sections ``data`` and ``model``: what is learnt from, and the network."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dkl.config.base import Count, CountOrZero, Number, PositiveNumber, Problem, Section
from dkl.config.decoding import FILE_DATASETS, DecodingSettings

_LONG_TAILED = frozenset({"imagenet_lt"})  # datasets that are published so
_WITH_VALIDATION = frozenset({"imagenet_lt"})  # datasets that bring images for validation


class AugmentSettings(Section):
    """Augmentation of training images: AutoAugment policy, crop, mirror, cutout, mixing, in order.

    Args:
        auto_augment: apply torchvision's AutoAugment policy for CIFAR-10 first.
        padding: pixels added on each side before a crop of the original size; 0 means no crop.
        padding_mode: what the border is filled with.
        flip: mirror half of the images left to right.
        cutout: side in pixels of a black square at a random place; null means none.
        cutmix: share of images into which a box of another training image is pasted, labels mixed
            by area; 0 means none.
        mixup: share of images that become weighted means of themselves and another training image,
            labels likewise; 0 means none. An image has either CutMix or mixup.
        mixup_alpha: the weight is drawn from Beta(alpha, alpha).
    """

    auto_augment: bool = False
    padding: CountOrZero = 4
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: bool = True
    cutout: Count | None = None
    cutmix: Annotated[Number, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[Number, Field(ge=0, le=1)] = 0.0
    mixup_alpha: Annotated[Number, Field(gt=0, le=1)] = 1.0

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        plain = (self.padding, self.flip, self.auto_augment, self.cutout)
        if not any((*plain, self.cutmix, self.mixup)):
            yield "padding", "0 without flip augments nothing; write augment: null instead"
        if self.cutmix + self.mixup > 1:
            yield (
                "mixup",
                f"and cutmix are shares of the images, together at most 1; got {self.mixup:g} and "
                f"{self.cutmix:g}",
            )
        if self.mixup == 0 and self.mixup_alpha != 1:
            yield "mixup_alpha", "would be ignored: mixup is 0; set mixup, or leave it 1"


class GeneratedSettings(Section):
    """Images beside the real ones: npz files with ``image`` [N, H, W, C] uint8 and ``label``.

    Args:
        parts: the files, together one pool; empty with ``held_out``.
        held_out: make one such file from the real training images beyond ``train_limit``, as a
            stand-in for generated images at small scale.
        fraction: share of generated images in every batch.
        samples_per_epoch: samples of an epoch, real and generated; null means as many as there are
            real ones.
    """

    parts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    held_out: bool = False
    fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.7
    samples_per_epoch: Count | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if not self.parts and not self.held_out:
            yield "parts", "name at least one npz file, or set held_out: true"
        if self.parts and self.held_out:
            yield "held_out", "would be ignored: parts are given; set one of the two"


class LongTailedSettings(Section):
    """Which part of the training images is kept, so that classes have long-tailed sizes.

    Args:
        imbalance: images of the largest class over those of the smallest.
        kind: "exponential" (CIFAR-LT) or "pareto" (as ImageNet-LT); see ``dkl.data.class_sizes``.
        power: of "pareto"; null means 6.
        max_per_class: images of the largest class; null means as many as every class has.
        shuffle_classes: let the seed order the classes; otherwise class 0 is the largest.
        seed: which images are kept and which are held out for validation, the same for all seeds of
            a recipe; null takes the recipe's seed, so that each run has a split of its own.
    """

    imbalance: Annotated[Number, Field(ge=1)] = 100.0
    kind: Literal["exponential", "pareto"] = "exponential"
    power: Annotated[Number, Field(ge=0.1, le=1000)] | None = None
    max_per_class: Count | None = None
    shuffle_classes: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = 0

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.power is not None and self.kind != "pareto":
            yield "power", f"would be ignored: it belongs to kind pareto, not {self.kind}"
        if self.max_per_class is not None and self.imbalance > self.max_per_class:
            yield (
                "imbalance",
                f"must be at most max_per_class ({self.max_per_class}), so that the smallest class "
                "keeps an image",
            )


class ClassBalancedSettings(Section):
    """Class-balanced sampling: a class of n training images has a share ~ n^power of the draws.

    Args:
        power: 0 draws all classes alike, 1/2 is square-root sampling, 1 draws all images alike.
        samples_per_epoch: draws of an epoch; null means as many as there are training images.
    """

    power: Annotated[Number, Field(ge=0, le=1)] = 0.0
    samples_per_epoch: Count | None = None


class DataSettings(Section):
    """The dataset and how it is split.

    Args:
        name: "digits" comes with scikit-learn; "imagenet", "image_folder", "imagenet_lt" and
            "webdataset" are decoded from their files batch by batch; the others are read into
            memory by torchvision.
        folder: where the files are; null looks in the usual places.
        download: fetch the files if they are not there.
        validation_fraction: share of the training data held out to choose the best checkpoint.
        decoding: how image files become pixels; null means the defaults, and for datasets in
            memory none.
        train_limit: train on the first so many images that are not held out; null means all.
        test_limit: evaluate on this many test images only; null means all.
        augment: augmentation of training images; null means none.
        views: further augmentations of the same images, for methods that train on several views.
        generated: generated images mixed into every batch; null means none.
        long_tailed: keep a long-tailed part of the images that ``validation_fraction`` and
            ``train_limit`` leave for training; null means all. Validation and test stay as they
            are.
        class_balanced: draw training images class by class; null means each once an epoch.
    """

    name: Literal[
        "digits",
        "fashion_mnist",
        "cifar10",
        "cifar100",
        "imagenet",
        "image_folder",
        "imagenet_lt",
        "webdataset",
    ]
    folder: str | None = None
    download: bool = False
    decoding: DecodingSettings | None = None
    validation_fraction: Annotated[Number, Field(ge=0, le=0.5)] = 0.1
    train_limit: Count | None = None
    test_limit: Count | None = None
    augment: AugmentSettings | None = None
    views: Annotated[tuple[AugmentSettings, ...], Field(strict=False)] = ()
    generated: GeneratedSettings | None = None
    long_tailed: LongTailedSettings | None = None
    class_balanced: ClassBalancedSettings | None = None

    @property
    def is_long_tailed(self) -> bool:
        """Whether classes differ so much in size that each group of sizes is measured."""
        return self.long_tailed is not None or self.name in _LONG_TAILED

    @property
    def in_files(self) -> bool:
        """Whether images are decoded batch by batch, instead of being in memory."""
        return self.name in FILE_DATASETS

    @property
    def has_validation(self) -> bool:
        """Whether there are images to choose the best checkpoint by."""
        return self.validation_fraction > 0 or self.name in _WITH_VALIDATION

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        for number, view in enumerate(self.views):
            for key in ("cutmix", "mixup"):
                if getattr(view, key) > 0:
                    yield f"views.{number}.{key}", "labels are those of the images; leave it 0"
        if self.generated is not None and self.generated.held_out and self.train_limit is None:
            yield "train_limit", "needed by generated.held_out, which takes the images beyond it"
        if self.class_balanced is not None and self.generated is not None:
            yield (
                "class_balanced",
                "must be null beside generated, whose share of every batch decides what is drawn",
            )
        if self.long_tailed is not None and self.name in _LONG_TAILED:
            yield "long_tailed", f"must be null: {self.name} is long-tailed already"
        yield from self._problems_of_files()
        if self.name == "digits":
            reason = "would be ignored: digits comes with scikit-learn"
            if self.folder is not None:
                yield "folder", f"{reason}; leave it null"
            if self.download:
                yield "download", f"{reason}; leave it false"

    def _problems_of_files(self) -> Iterator[Problem]:
        if not self.in_files:
            if self.decoding is not None:
                yield "decoding", f"would be ignored: {self.name} is in memory; leave it null"
            return
        if self.download:
            yield "download", f"cannot fetch {self.name}; get it yourself and set folder"
        if self.generated is not None:
            yield "generated", f"must be null: {self.name} is read from files, not from memory"
        if self.name in _WITH_VALIDATION and self.validation_fraction > 0:
            yield "validation_fraction", f"must be 0: {self.name} brings a list for validation"


class ModelSettings(Section):
    """The network.

    Args:
        name: a name of ``dkl.models.list_models()`` or ``timm/<name>``.
        normalize: build mean and standard deviation into the model, which takes pixels in [0, 1].
        mean: of each channel; null takes those of the training images.
        std: likewise.
        dual_batch_norm: a second set of batch-norm layers for auxiliary views (DAJAT).
        kwargs: further keyword arguments of ``dkl.models.create_model``.
    """

    name: Annotated[str, Field(min_length=1)]
    normalize: bool = True
    mean: Annotated[tuple[Number, ...], Field(strict=False)] | None = None
    std: Annotated[tuple[PositiveNumber, ...], Field(strict=False)] | None = None
    dual_batch_norm: bool = False
    kwargs: dict[str, Any] = Field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if (self.mean is None) != (self.std is None):
            yield "mean", "and std go together; give both or neither"
        if self.mean is not None and not self.normalize:
            yield "mean", "would be ignored: normalize is false"
        for key in ("name", "num_classes", "in_channels", "mean", "std"):
            if key in self.kwargs:
                yield f"kwargs.{key}", "is set from the data and from model.name; remove it"

"""Sections ``data`` and ``model``: what is learnt from, and the network."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dkl.config.base import Count, CountOrZero, Number, Problem, Section


class AugmentSettings(Section):
    """Random crop and mirror of training images.

    Args:
        padding: pixels added on each side before a crop of the original size; 0 means no crop.
        padding_mode: what the border is filled with.
        flip: mirror half of the images left to right.
    """

    padding: CountOrZero = 4
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: bool = True

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.padding == 0 and not self.flip:
            yield "padding", "0 without flip augments nothing; write augment: null instead"


class DataSettings(Section):
    """The dataset and how it is split.

    Args:
        name: "digits" comes with scikit-learn; the others are read by torchvision.
        folder: where the files are; null looks in the usual places.
        download: fetch the files if they are not there.
        validation_fraction: share of the training data held out to choose the best checkpoint.
        train_limit: train on the first so many images that are not held out; null means all.
        test_limit: evaluate on this many test images only; null means all.
        augment: augmentation of training images; null means none.
    """

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100"]
    folder: str | None = None
    download: bool = False
    validation_fraction: Annotated[Number, Field(ge=0, le=0.5)] = 0.1
    train_limit: Count | None = None
    test_limit: Count | None = None
    augment: AugmentSettings | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.name == "digits":
            reason = "would be ignored: digits comes with scikit-learn"
            if self.folder is not None:
                yield "folder", f"{reason}; leave it null"
            if self.download:
                yield "download", f"{reason}; leave it false"


class ModelSettings(Section):
    """The network.

    Args:
        name: a name of ``dkl.models.list_models()`` or ``timm/<name>``.
        normalize: build the mean and standard deviation of the training images into the model.
        kwargs: further keyword arguments of ``dkl.models.create_model``.
    """

    name: Annotated[str, Field(min_length=1)]
    normalize: bool = True
    kwargs: dict[str, Any] = Field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        for key in ("name", "num_classes", "in_channels", "mean", "std"):
            if key in self.kwargs:
                yield f"kwargs.{key}", "is set from the data and from model.name; remove it"

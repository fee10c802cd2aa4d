"""Data sets by name."""

import difflib
from collections.abc import Callable
from pathlib import Path

from dkl.data.cifar import CIFAR10, CIFAR100, load_cifar
from dkl.data.digits import load_digits
from dkl.data.fashion_mnist import load_fashion_mnist
from dkl.data.images import ImageData


def _load_bundled_digits(folder: Path | None, download: bool) -> tuple[ImageData, ImageData]:
    del download  # a permission that is not needed
    if folder is not None:
        raise ValueError(
            f"digits come with scikit-learn and are not read from a folder; got folder = {folder}. "
            f"Leave the folder out."
        )
    return load_digits()


DATASETS: dict[str, Callable[[Path | None, bool], tuple[ImageData, ImageData]]] = {
    "digits": _load_bundled_digits,
    "fashion_mnist": load_fashion_mnist,
    "cifar10": lambda folder, download: load_cifar(CIFAR10, folder, download),
    "cifar100": lambda folder, download: load_cifar(CIFAR100, folder, download),
}


def load_data(
    name: str, *, folder: str | Path | None = None, download: bool = False
) -> tuple[ImageData, ImageData]:
    """Load the training and the test set of a data set.

    Args:
        name: "digits" (bundled with scikit-learn), "fashion_mnist", "cifar10" or "cifar100".
        folder: where the files are, or are downloaded to; None: the system's folders, then
            ``dkl`` in the user's cache folder.
        download: whether to download what is found nowhere. What is found is never downloaded
            again.

    Returns:
        (train, test), images uint8.

    Raises:
        ValueError: unknown name, data not found (``DatasetNotFoundError``), a damaged file, or a
            folder for data that are read from none.
        ImportError: a package of the extra ``train`` is missing.

    Example:
        >>> train, test = load_data("digits")
        >>> len(train), len(test), train.images.shape[1:]
        (1442, 355, torch.Size([1, 8, 8]))
    """
    load = DATASETS.get(name)
    if load is None:
        wanted = str(name).lower().replace("-", "_")
        near = difflib.get_close_matches(wanted, DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown data set {name!r}; {hint}There are: {', '.join(DATASETS)}.")
    try:
        return load(None if folder is None else Path(folder).expanduser(), download)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the data set {name!r} needs {error.name}; install it by: pip install 'dkl[train]'"
        ) from error

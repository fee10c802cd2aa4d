"""CIFAR-10 and CIFAR-100: 60000 photographs, 3x32x32 (Krizhevsky 2009)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dkl.data.cifar_pickle import read_cifar_pickle
from dkl.data.images import ImageData
from dkl.data.lookup import DatasetFiles, find_or_download


@dataclass(frozen=True)
class CifarFormat:
    """File and key names of one of the two data sets.

    Args:
        title: its name, also that of torchvision's class without the dash.
        folder: the folder in the published archive.
        train_files: training batches, in order.
        test_files: test batches.
        meta_file: the file with the class names.
        labels_key: key of the labels in a batch.
        names_key: key of the class names in the meta file.
        num_classes: how many names there must be.
    """

    title: str
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    meta_file: str
    labels_key: str
    names_key: str
    num_classes: int


CIFAR10 = CifarFormat(
    title="CIFAR-10",
    folder="cifar-10-batches-py",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_files=("test_batch",),
    meta_file="batches.meta",
    labels_key="labels",
    names_key="label_names",
    num_classes=10,
)
CIFAR100 = CifarFormat(
    title="CIFAR-100",
    folder="cifar-100-python",
    train_files=("train",),
    test_files=("test",),
    meta_file="meta",
    labels_key="fine_labels",
    names_key="fine_label_names",
    num_classes=100,
)


def load_cifar(
    cifar: CifarFormat, folder: Path | None, download: bool
) -> tuple[ImageData, ImageData]:
    """Return CIFAR-10 or CIFAR-100 (fine labels).

    Looked for in ``folder`` (the published archive's folder in it, or its files directly) and in
    the cache folder; downloaded and checked (MD5 of the archive) by torchvision only where it is in
    neither and ``download`` is True. The files are pickles: they are not read by torchvision, whose
    reader unpickles whatever passes its checksums and refuses everything else, but by
    ``read_cifar_pickle``, which can build plain data only. So files found in a folder need no
    checksum to be harmless, and subsets in the same format work too.

    Args:
        cifar: ``CIFAR10`` or ``CIFAR100``.
        folder: where to look first and where to download to; None: the cache folder.
        download: whether it may be downloaded.

    Returns:
        (train, test): 50000 and 10000 images in the published files.

    Raises:
        DatasetNotFoundError: not found, or the download failed.
        ValueError: a file is damaged, or asks for more than plain data.
    """
    needed = (*cifar.train_files, *cifar.test_files, cifar.meta_file)

    def locate(place: Path) -> Path | None:
        bases = (place / cifar.folder, place)
        complete = [base for base in bases if all((base / name).is_file() for name in needed)]
        return complete[0] if complete else None

    def fetch(target: Path) -> None:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive

        published = {CIFAR10: datasets.CIFAR10, CIFAR100: datasets.CIFAR100}[cifar]
        download_and_extract_archive(
            published.url, str(target), filename=published.filename, md5=published.tgz_md5
        )

    files = DatasetFiles(
        title=cifar.title,
        layout=cifar.folder,
        locate=locate,
        fetch=fetch,
        advice=(
            f"Three ways to get it: allow the download (download=True); give a folder that holds "
            f"{cifar.folder} from the published archive; or give {cifar.folder} itself."
        ),
    )
    base = find_or_download(files, folder, download)
    class_names = _class_names(base / cifar.meta_file, cifar)
    train = _read_batches([base / name for name in cifar.train_files], cifar)
    test = _read_batches([base / name for name in cifar.test_files], cifar)
    return (
        ImageData(*train, cifar.num_classes, class_names),
        ImageData(*test, cifar.num_classes, class_names),
    )


def _class_names(path: Path, cifar: CifarFormat) -> tuple[str, ...]:
    names = read_cifar_pickle(path).get(cifar.names_key)
    if not isinstance(names, list) or len(names) != cifar.num_classes:
        raise ValueError(
            f"{path} must hold {cifar.num_classes} names under {cifar.names_key!r}; got {names!r}. "
            f"Delete the folder and get {cifar.title} again."
        )
    return tuple(str(name) for name in names)


def _read_batches(paths: Sequence[Path], cifar: CifarFormat) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in paths:
        batch = read_cifar_pickle(path)
        pixels, batch_labels = batch.get("data"), batch.get(cifar.labels_key)
        if not (
            isinstance(pixels, Tensor)
            and pixels.ndim == 2
            and pixels.shape[1] == 3 * 32 * 32
            and isinstance(batch_labels, list)
            and len(batch_labels) == len(pixels)
            and all(isinstance(label, int) for label in batch_labels)
        ):
            raise ValueError(
                f"{path} must hold uint8 rows of 3072 pixels under 'data' and as many integers "
                f"under {cifar.labels_key!r}; it has the keys {sorted(batch)}. Delete the folder "
                f"and get {cifar.title} again."
            )
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(torch.tensor(batch_labels, dtype=torch.int64))
    return torch.cat(images), torch.cat(labels)

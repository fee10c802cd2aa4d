"""Data sets of image files: folders of classes, ImageNet, ImageNet-LT, WebDataset's shards."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dkl.data.image_decoding import Decoding
from dkl.data.image_lists import ImageList, read_image_list
from dkl.data.image_stores import IMAGE_SUFFIXES, FileStore, ImageStore, index_shards
from dkl.data.images_on_disk import ImageFiles
from dkl.data.lookup import DatasetNotFoundError, cache_folder
from dkl.data.random_order import permutation

_IMAGENET_CLASSES = 1000
_NAMED = 3  # how many classes a message names
_LISTS = "ImageNet_LT_{part}.txt"


@dataclass(frozen=True)
class FileSplits:
    """The parts of a data set of image files.

    Args:
        train: decoded with augmentation.
        validation: where the data set brings a part for it, or None.
        test: decoded for evaluation.
    """

    train: ImageFiles
    validation: ImageFiles | None
    test: ImageFiles


def load_image_files(
    name: str, *, folder: str | Path | None = None, decoding: Decoding | None = None, seed: int = 0
) -> FileSplits:
    """Find the images of a data set on the disk; none is read yet.

    The images of each part are put into a fixed random order, so that the first so many of them
    are of all classes, where a folder or list has them class by class.

    Args:
        name: "image_folder" (train/CLASS/*.jpg and val/CLASS/*.jpg), "imagenet" (the same, with
            its 1000 classes), "imagenet_lt" (ImageNet's folder with ImageNet_LT_train.txt, _val.txt
            and _test.txt in it), or "webdataset" (train-*.tar and val-*.tar, or validation-*.tar,
            with any prefix, of KEY.jpg and KEY.cls).
        folder: of the data set; None: ~/.cache/dkl/NAME, for "imagenet_lt" ~/.cache/dkl/imagenet.
        decoding: how pixels are made; None: as usual for ImageNet.
        seed: of the augmentation.

    Raises:
        DatasetNotFoundError: the folder, a part or a file that a list names is missing.
        ValueError: unknown name, or what is there does not fit.
    """
    load = FILE_DATASETS.get(name)
    if load is None:
        raise ValueError(
            f"unknown data set {name!r}; of files there are: {', '.join(FILE_DATASETS)}."
        )
    place = _usual_place(name) if folder is None else Path(folder).expanduser()
    if not place.is_dir():
        raise DatasetNotFoundError(
            f"{name} is not there: the folder {place} does not exist. {_ADVICE[name]} Say where it "
            "is by data.folder=DIR; it cannot be downloaded."
        )
    splits = load(place)
    how = decoding if decoding is not None else Decoding()

    def made(part: _Part, *, augmented: bool) -> ImageFiles:
        samples = torch.from_numpy(permutation(len(part.labels), "files"))
        classes = splits.class_names
        labels = part.labels[samples]
        return ImageFiles(part.store, samples, labels, len(classes), classes, how, augmented, seed)

    validation = None
    if splits.validation is not None:
        validation = made(splits.validation, augmented=False)
    return FileSplits(
        made(splits.train, augmented=True), validation, made(splits.test, augmented=False)
    )


def _usual_place(name: str) -> Path:
    return cache_folder() / ("imagenet" if name == "imagenet_lt" else name)


@dataclass(frozen=True)
class _Part:
    store: ImageStore
    labels: Tensor


@dataclass(frozen=True)
class _Parts:
    train: _Part
    test: _Part
    class_names: tuple[str, ...]
    validation: _Part | None = None


def _image_folder(root: Path) -> _Parts:
    classes = _class_folders(root, "train")
    others = sorted(set(_class_folders(root, "val")) - set(classes))
    if others:
        raise ValueError(
            f"{root / 'val'} has {len(others)} classes that {root / 'train'} lacks: "
            f"{_first(others)}. Both need the same names."
        )
    return _Parts(
        _scan(root / "train", classes, every=True),
        _scan(root / "val", classes, every=False),
        tuple(classes),
    )


def _imagenet(root: Path) -> _Parts:
    classes = _class_folders(root, "train")
    if len(classes) != _IMAGENET_CLASSES:
        raise ValueError(
            f"imagenet has {_IMAGENET_CLASSES} classes, and {root / 'train'} has {len(classes)} "
            f"folders of classes: {_first(classes)}. Unpack all of it, or set "
            "data.name=image_folder for a part of it or other images."
        )
    return _image_folder(root)


def _class_folders(root: Path, part: str) -> list[str]:
    folder = root / part
    if not folder.is_dir():
        raise DatasetNotFoundError(f"{folder} does not exist. {_ADVICE['image_folder']}")
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    classes = sorted(name for name, is_folder in found if is_folder)
    if not classes:
        hint = ""
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name, _ in found):
            hint = (
                " Its images lie there without folders of classes, as in ImageNet's validation "
                "archive: sort them by their classes first."
            )
        raise DatasetNotFoundError(
            f"{folder} has no folders of classes.{hint} {_ADVICE['image_folder']}"
        )
    return classes


def _scan(folder: Path, classes: Sequence[str], *, every: bool) -> _Part:
    """List the images of all classes, those of a class in the order of their names."""
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        files = sorted(_images_under(folder, name))
        if not files:
            empty.append(name)
        names += files
        labels += [label] * len(files)
    if not names or (every and empty):
        raise DatasetNotFoundError(
            f"{len(empty)} folders of classes in {folder} hold no images: {_first(empty)}. Files "
            f"must end with {', '.join(IMAGE_SUFFIXES)}; take empty folders away."
        )
    return _Part(FileStore(folder, names), torch.tensor(labels, dtype=torch.int64, device="cpu"))


def _images_under(folder: Path, name: str) -> list[str]:
    """Return the image files of a class, also in folders below, relative to the folder."""
    found: list[str] = []
    for place, _, files in os.walk(folder / name, followlinks=True):
        below = Path(place).relative_to(folder).as_posix()
        found += [f"{below}/{file}" for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    return found


def _imagenet_lt(root: Path) -> _Parts:
    # ImageNet-LT's smallest classes have five training images: every class occurs.
    train = _read_list(root, "train", None)
    validation, test = (_read_list(root, part, train.num_classes) for part in ("val", "test"))
    return _Parts(
        _listed(train),
        _listed(test),
        tuple(map(str, range(train.num_classes))),
        _listed(validation),
    )


def _read_list(root: Path, part: str, num_classes: int | None) -> ImageList:
    file = root / _LISTS.format(part=part)
    if not file.is_file():
        raise DatasetNotFoundError(f"{file} does not exist. {_ADVICE['imagenet_lt']}")
    return read_image_list(file, root=root, num_classes=num_classes)


def _listed(images: ImageList) -> _Part:
    return _Part(FileStore(images.root, images.paths), images.labels)


def _webdataset(root: Path) -> _Parts:
    train, train_labels = index_shards(_shards(root, "train"))
    test, test_labels = index_shards(_shards(root, "val", "validation"))
    num_classes = int(train_labels.max()) + 1
    absent = (torch.bincount(train_labels, minlength=num_classes) == 0).nonzero().flatten()
    if len(absent):
        raise ValueError(
            f"the training shards in {root} have labels up to {num_classes - 1} but none of class "
            f"{int(absent[0])}: is a shard missing? Labels count from 0."
        )
    if int(test_labels.max()) >= num_classes:
        raise ValueError(
            f"the validation shards in {root} have labels up to {int(test_labels.max())}, the "
            f"training shards up to {num_classes - 1}: is a shard missing?"
        )
    return _Parts(
        _Part(train, train_labels), _Part(test, test_labels), tuple(map(str, range(num_classes)))
    )


def _shards(root: Path, *parts: str) -> list[Path]:
    found = {
        file
        for part in parts
        for pattern in (f"{part}-*.tar", f"*[-_]{part}-*.tar")
        for file in root.glob(pattern)
    }
    if not found:
        raise DatasetNotFoundError(
            f"{root} has no shards {' or '.join(f'{part}-*.tar' for part in parts)}. "
            f"{_ADVICE['webdataset']}"
        )
    return sorted(found)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


FILE_DATASETS: dict[str, Callable[[Path], _Parts]] = {
    "imagenet": _imagenet,
    "image_folder": _image_folder,
    "imagenet_lt": _imagenet_lt,
    "webdataset": _webdataset,
}

_FOLDERS = (
    "The folder must hold train/CLASS/*.jpg and val/CLASS/*.jpg, as for torchvision's ImageFolder."
)
_ADVICE = {
    "imagenet": _FOLDERS,
    "image_folder": _FOLDERS,
    "imagenet_lt": (
        "The folder must be ImageNet's, with train/ and val/, and hold the lists "
        "ImageNet_LT_train.txt, ImageNet_LT_val.txt and ImageNet_LT_test.txt, whose paths start "
        "from it."
    ),
    "webdataset": (
        "The folder must hold tar files train-*.tar and val-*.tar of KEY.jpg and KEY.cls, a class "
        "number."
    ),
}

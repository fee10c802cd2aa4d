"""Fashion-MNIST: 70000 photographs of clothing, 1x28x28 (Xiao et al. 2017, arXiv:1708.07747)."""

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dkl.data.images import ImageData
from dkl.data.lookup import DatasetFiles, find_or_download

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_LAYOUT = "FashionMNIST"
_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_ADVICE = (
    "Three ways to get it: install the Debian package dataset-fashion-mnist; allow the download "
    "(download=True); or give a folder that holds the four ubyte files, gzipped or not, directly "
    "or in torchvision's layout FashionMNIST/raw."
)


def load_fashion_mnist(folder: Path | None, download: bool) -> tuple[ImageData, ImageData]:
    """Return Fashion-MNIST, read by torchvision's idx reader.

    Looked for in ``folder`` (the four ubyte files, gzipped or not, directly in it or in
    ``FashionMNIST/raw``), in the Debian package's folder and in the cache folder; downloaded by
    torchvision, with its checksums, only where it is in none of them and ``download`` is True.

    Args:
        folder: where to look first and where to download to; None: the cache folder.
        download: whether it may be downloaded.

    Returns:
        (train, test): 60000 and 10000 images in the published files.

    Raises:
        DatasetNotFoundError: not found, or the download failed.
        ValueError: a file is damaged.
    """
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def fetch(target: Path) -> None:
        FashionMNIST(str(target), download=True)

    files = DatasetFiles(
        title="Fashion-MNIST",
        layout=_LAYOUT,
        locate=_locate,
        fetch=fetch,
        advice=_ADVICE,
        system_folders=(DEBIAN_FOLDER,),
    )
    paths = find_or_download(files, folder, download)
    class_names = tuple(FashionMNIST.classes)

    def read(part: str) -> ImageData:
        image_path = paths[f"{part}-images-idx3-ubyte"]
        images_NHW = _read(image_path, read_image_file)
        labels = _read(paths[f"{part}-labels-idx1-ubyte"], read_label_file)
        if images_NHW.shape[1:] != (28, 28):
            raise ValueError(
                f"{image_path} must hold images of 28x28; got shape {tuple(images_NHW.shape)}."
            )
        return ImageData(images_NHW.unsqueeze(1), labels, len(class_names), class_names)

    return read("train"), read("t10k")


def _locate(folder: Path) -> dict[str, Path] | None:
    for base in (folder / _LAYOUT / "raw", folder):
        paths: dict[str, Path] = {}
        for name in _FILES:
            for path in (base / name, base / f"{name}.gz"):
                if path.is_file():
                    paths.setdefault(name, path)
        if len(paths) == len(_FILES):
            return paths
    return None


def _read(path: Path, reader: Callable[[str], Tensor]) -> Tensor:
    try:
        if path.suffix != ".gz":
            return reader(str(path))
        # torchvision's reader takes the name of an uncompressed file only.
        with tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch) / path.stem
            with gzip.open(path, "rb") as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            return reader(str(plain))
    except (
        AssertionError,  # the reader states its expectations of the header as asserts
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{path} is not a readable idx file ({type(error).__name__}: {error}). "
            f"Delete it and get the data again. {_ADVICE}"
        ) from error

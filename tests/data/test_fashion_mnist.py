"""Fashion-MNIST: the real idx format on tiny files, and the real files where they are installed."""

import gzip
import logging
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import datasets as torchvision_datasets

from dkl.data import DatasetNotFoundError, fashion_mnist, load_data

Parts = dict[str, tuple[Tensor, Tensor]]


def idx_bytes(array: Tensor) -> bytes:
    """Two zero bytes, type 8 for uint8, number of dimensions, big-endian sizes, the bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.contiguous().numpy().tobytes()


def write(folder: Path, packed: bool = True, size: int = 28, seed: int = 0) -> Parts:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    parts: Parts = {}
    for part, num in (("train", 12), ("t10k", 5)):
        images = torch.randint(0, 256, (num, size, size), generator=generator).to(torch.uint8)
        labels = torch.randint(0, 10, (num,), generator=generator).to(torch.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
        parts[part] = images, labels
    return parts


def check(folder: Path | None, parts: Parts, download: bool = False) -> None:
    loaded = load_data("fashion_mnist", folder=folder, download=download)
    for data, (images, labels) in zip(loaded, (parts["train"], parts["t10k"]), strict=True):
        assert torch.equal(data.images, images[:, None])
        assert torch.equal(data.labels, labels.long())
        assert data.num_classes == 10
        assert data.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_files_in_a_folder(empty_machine: Path, inside: str, packed: bool) -> None:
    folder = empty_machine / "mine"
    parts = write(folder / inside, packed)
    check(folder, parts)


def test_files_of_the_system_and_of_the_cache(empty_machine: Path) -> None:
    in_cache = write(empty_machine / "cache" / "dkl", seed=1)
    check(None, in_cache)
    in_debian = write(empty_machine / "debian", seed=2)
    check(None, in_debian)


def test_a_copy_from_elsewhere_than_the_given_folder_is_announced(
    empty_machine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = empty_machine / "mine"
    folder.mkdir()
    parts = write(empty_machine / "debian")
    with caplog.at_level(logging.WARNING):
        check(folder, parts)
    assert f"(it is not in {folder})" in caplog.text
    assert str(empty_machine / "debian") in caplog.text


def test_missing_files_say_where_and_how(empty_machine: Path) -> None:
    folder = empty_machine / "mine"
    write(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()  # incomplete is not found
    with pytest.raises(ValueError, match="Fashion-MNIST was not found; looked in") as caught:
        load_data("fashion_mnist", folder=folder)
    message = str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    for place in (folder, empty_machine / "debian", empty_machine / "cache" / "dkl"):
        assert str(place) in message
    for way in ("dataset-fashion-mnist", "download=True", "FashionMNIST/raw"):
        assert way in message
    assert not (empty_machine / "cache").exists()


def test_a_folder_that_does_not_exist_is_a_mistake(empty_machine: Path) -> None:
    write(empty_machine / "debian")
    with pytest.raises(DatasetNotFoundError, match="nowhere does not exist"):
        load_data("fashion_mnist", folder=empty_machine / "nowhere")


def fake_download(monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> list[Parts]:
    """Replace torchvision's class by one that writes tiny files instead of downloading."""
    calls: list[Parts] = []

    class Download(torchvision_datasets.FashionMNIST):
        def __init__(self, root: str, download: bool = False) -> None:
            calls.append(write(Path(root) / "FashionMNIST" / "raw"))
            if fail:
                raise RuntimeError("no network")

    monkeypatch.setattr(torchvision_datasets, "FashionMNIST", Download)
    return calls


def test_download_happens_once_and_only_when_asked(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_download(monkeypatch)
    with pytest.raises(DatasetNotFoundError):
        load_data("fashion_mnist")
    assert not calls
    for _ in range(2):
        loaded = load_data("fashion_mnist", download=True)
        assert torch.equal(loaded[0].images, calls[0]["train"][0][:, None])
    assert len(calls) == 1
    check(None, calls[0])
    assert [path.name for path in (empty_machine / "cache" / "dkl").iterdir()] == ["FashionMNIST"]


def test_download_goes_into_the_given_folder(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_download(monkeypatch)
    folder = empty_machine / "new" / "folder"
    load_data("fashion_mnist", folder=folder, download=True)
    check(folder, calls[0])


def test_a_failed_download_leaves_nothing_and_says_how(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_download(monkeypatch, fail=True)
    with pytest.raises(DatasetNotFoundError, match=r"no network.*dataset-fashion-mnist"):
        load_data("fashion_mnist", download=True)
    assert not list((empty_machine / "cache" / "dkl").iterdir())


def test_a_download_does_not_mix_with_incomplete_files(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_download(monkeypatch)
    folder = empty_machine / "mine"
    write(folder / "FashionMNIST" / "raw")
    (folder / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DatasetNotFoundError, match="move it away"):
        load_data("fashion_mnist", folder=folder, download=True)
    assert not calls


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"404 not found, the page you asked for does not exist",
        "cut": content[:-7],
        "too long": content + b"\0",
        "other type": content[:2] + b"\x0d" + content[3:],
        "labels instead": idx_bytes(torch.zeros(12, dtype=torch.uint8)),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", sorted(damaged(b"")))
def test_damaged_files_are_named(empty_machine: Path, damage: str, packed: bool) -> None:
    folder = empty_machine / "mine"
    write(folder, packed)
    path = folder / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    content = path.read_bytes()
    broken = damaged(gzip.decompress(content) if packed else content)[damage]
    path.write_bytes(gzip.compress(broken) if packed else broken)
    with pytest.raises(ValueError, match=rf"{path.name} is not a readable idx file"):
        load_data("fashion_mnist", folder=folder)


@pytest.mark.parametrize("keep", [5, 300, -4])
def test_a_cut_gzip_file_is_named(empty_machine: Path, keep: int) -> None:
    folder = empty_machine / "mine"
    write(folder)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is not a readable idx file"):
        load_data("fashion_mnist", folder=folder)


def test_images_of_another_size_are_refused(empty_machine: Path) -> None:
    write(empty_machine / "mine", size=14)
    with pytest.raises(ValueError, match=r"28x28; got shape \(12, 14, 14\)"):
        load_data("fashion_mnist", folder=empty_machine / "mine")


def test_the_real_files_where_they_are_installed() -> None:
    if not (fashion_mnist.DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"no real Fashion-MNIST in {fashion_mnist.DEBIAN_FOLDER}")
    train, test = load_data("fashion_mnist", folder=fashion_mnist.DEBIAN_FOLDER)
    assert train.images.shape == (60000, 1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [6000] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    mean, std = train.mean_std()
    assert mean == pytest.approx((0.2860,), abs=5e-5)  # the values published everywhere
    assert std == pytest.approx((0.3530,), abs=5e-5)

"""Generated data: tiny parts in the real format, malformed ones, and huge ones that are holes."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dkl.data import DatasetNotFoundError, GeneratedImages, ImageData, write_npz
from dkl.data import generated as generated_module

SHAPE = (3, 4, 5)


def content(num: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (num, 4, 5, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, num),
    }


def open_parts(*parts: Path) -> GeneratedImages:
    return GeneratedImages(parts, num_classes=10, image_shape=SHAPE)


def npy_bytes(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), **options)
    return buffer.getvalue()


def npy_folder(folder: Path, arrays: dict[str, Any]) -> Path:
    folder.mkdir()
    for key, array in arrays.items():
        np.save(folder / f"{key}.npy", array)
    return folder


def test_rows_come_from_all_parts_in_the_order_asked_for(tmp_path: Path) -> None:
    contents = [content(num, num) for num in (6, 1, 9)]
    np.savez(tmp_path / "a.npz", **contents[0])
    contents[1]["label"] = contents[1]["label"].astype(np.uint8)
    np.savez(tmp_path / "b.npz", **contents[1], other=np.zeros(3))
    contents[2]["label"] = contents[2]["label"].astype(">i4")
    parts = [tmp_path / "a.npz", tmp_path / "b.npz", npy_folder(tmp_path / "c", contents[2])]
    generated = GeneratedImages(
        [parts[0], str(parts[1]), parts[2]], num_classes=10, image_shape=SHAPE
    )
    assert len(generated) == 16
    images = np.concatenate([one["image"] for one in contents]).transpose(0, 3, 1, 2)
    labels = np.concatenate([one["label"] for one in contents])
    for indices in (torch.randint(0, 16, (50,)), torch.arange(16), torch.tensor([15, 6, 5, 0])):
        got_images, got_labels = generated.rows(indices)
        assert got_images.dtype == torch.uint8
        assert got_images.is_contiguous()
        assert np.array_equal(got_images.numpy(), images[indices.numpy()])
        assert got_labels.dtype == torch.int64
        assert got_labels.tolist() == labels[indices.numpy()].tolist()
    empty_images, empty_labels = generated.rows(torch.empty(0, dtype=torch.int64))
    assert (tuple(empty_images.shape), tuple(empty_labels.shape)) == ((0, *SHAPE), (0,))


def test_rows_are_copies(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content())
    generated = open_parts(tmp_path / "a.npz")
    generated.rows(torch.tensor([2]))[0].zero_()
    assert generated.rows(torch.tensor([2]))[0].any()


def test_large_rows_are_read_as_small_ones(tmp_path: Path) -> None:
    # Rows of a page and more are asked for in advance, at any offset in a page.
    pixels = np.random.default_rng(0).integers(0, 256, (40, 37, 41, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", image=pixels, label=np.arange(40))
    generated = GeneratedImages([tmp_path / "a.npz"], num_classes=40, image_shape=(3, 37, 41))
    indices = torch.randint(0, 40, (100,))
    indices[0], indices[1] = 0, 39
    images, labels = generated.rows(indices)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[indices.numpy()])
    assert torch.equal(labels, indices)


def test_pickling_takes_the_paths_along_and_no_pixels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content(500))
    generated = open_parts(tmp_path / "a.npz")
    packed = pickle.dumps(generated)
    assert len(packed) < 1000
    back = pickle.loads(packed)
    assert torch.equal(back.rows(torch.arange(9))[0], generated.rows(torch.arange(9))[0])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_written_data_are_read_back(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (3000, *shape)).to(torch.uint8)
    data = ImageData(images, torch.randint(0, 4, (3000,)), 4, tuple("abcd"))
    path = write_npz(data, tmp_path / "folder" / "part.npz")
    generated = GeneratedImages([path], num_classes=4, image_shape=shape)
    got_images, got_labels = generated.rows(torch.arange(3000))
    assert torch.equal(got_images, images)
    assert torch.equal(got_labels, data.labels)
    with np.load(path) as archive:  # and numpy agrees, checksums included
        assert np.array_equal(archive["image"], images.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(archive["label"], data.labels.numpy())
    assert [entry.name for entry in path.parent.iterdir()] == ["part.npz"]


# ---------------------------------------------------------------- malformed parts


def save(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def stored(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for key, raw in members.items():
            archive.writestr(f"{key}.npy", raw)


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    save(path, **content())
    path.write_bytes(edit(path.read_bytes()))


def encrypted(raw: bytes) -> bytes:
    return raw.replace(b"PK\1\2\x2d\x03\x2d\x00\x00\x00", b"PK\1\2\x2d\x03\x2d\x00\x01\x00")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed": (
        lambda path: np.savez_compressed(path, **content()),
        r"is compressed.*dkl data convert .*part\.npz --out",
    ),
    "not a zip": (lambda path: path.write_bytes(b"hello"), r"is not an npz file"),
    "empty file": (lambda path: path.write_bytes(b""), r"is not an npz file"),
    "npy, not npz": (
        lambda path: path.write_bytes(npy_bytes(content()["image"])),
        r"is not an npz file",
    ),
    "truncated": (
        lambda path: change(path, lambda raw: raw[: len(raw) // 2]),
        r"not all of it is there",
    ),
    "end cut off": (lambda path: change(path, lambda raw: raw[:-1]), r"not all of it is there"),
    "local header gone": (
        lambda path: change(path, lambda raw: b"XX" + raw[2:]),
        r"damaged: its header is not there",
    ),
    "encrypted": (lambda path: change(path, encrypted), r"is encrypted"),
    "no label": (
        lambda path: save(path, image=content()["image"], labels=content()["label"]),
        r"label is missing among \['image', 'labels'\]",
    ),
    "nothing in it": (stored, r"image and label is missing among \[\]"),
    "no npy": (
        lambda path: stored(path, image=b"hello", label=npy_bytes(content()["label"])),
        r"image.npy in .* is not an npy array",
    ),
    "npy version": (
        lambda path: stored(
            path,
            image=npy_bytes(content()["image"]).replace(b"NUMPY\1", b"NUMPY\3"),
            label=npy_bytes(content()["label"]),
        ),
        r"npy version \(3, 0\)",
    ),
    "header promises more": (
        lambda path: stored(
            path,
            image=npy_bytes(content()["image"]).replace(b"(6, 4, 5, 3)", b"(9, 4, 5, 3)"),
            label=npy_bytes(content(9)["label"]),
        ),
        r"truncated: an array of shape \(9, 4, 5, 3\) needs 540 bytes; got 360",
    ),
    "objects": (
        lambda path: save(path, image=content()["image"], label=np.array([{}] * 6, dtype=object)),
        r"label.npy in .* holds Python objects.*never loaded",
    ),
    "object images": (
        lambda path: save(path, image=np.array([None] * 6), label=content()["label"]),
        r"image.npy in .* holds Python objects",
    ),
    "float images": (
        lambda path: save(path, image=np.zeros((6, 4, 5, 3)), label=content()["label"]),
        r"must be uint8 of shape \[N, H, W, C\]; got float64 of shape \(6, 4, 5, 3\)",
    ),
    "three dimensions": (
        lambda path: save(path, image=np.zeros((6, 4, 5), np.uint8), label=content()["label"]),
        r"of shape \(6, 4, 5\).*needs C = 1",
    ),
    "channels first": (
        lambda path: save(path, image=np.zeros((6, 3, 4, 5), np.uint8), label=content()["label"]),
        r"got \(6, 3, 4, 5\)\. The channels must come last: save images.transpose\(0, 2, 3, 1\)",
    ),
    "another size": (
        lambda path: save(path, image=np.zeros((6, 8, 8, 3), np.uint8), label=content()["label"]),
        r"must have shape \[N, 4, 5, 3\].*got \(6, 8, 8, 3\)",
    ),
    "column major": (
        lambda path: save(
            path, image=np.asfortranarray(content()["image"]), label=content()["label"]
        ),
        r"Fortran order",
    ),
    "no images": (
        lambda path: save(path, image=np.zeros((0, 4, 5, 3), np.uint8), label=np.zeros(0, int)),
        r"must hold at least one value",
    ),
    "fewer labels": (
        lambda path: save(path, image=content()["image"], label=content()["label"][:5]),
        r"6 images and 5 labels",
    ),
    "float labels": (
        lambda path: save(path, image=content()["image"], label=np.zeros(6)),
        r"must be integers of shape \[N\].*got float64",
    ),
    "one-hot labels": (
        lambda path: save(path, image=content()["image"], label=np.zeros((6, 10), int)),
        r"got int64 of shape \(6, 10\)",
    ),
    "label too high": (
        lambda path: save(path, image=content()["image"], label=np.array([0, 1, 2, 3, 4, 10])),
        r"lie in 0 to 9 for 10 classes; got 0 to 10",
    ),
    "label negative": (
        lambda path: save(path, image=content()["image"], label=np.array([0, 1, 2, 3, 4, -1])),
        r"got -1 to 4",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_malformed_parts_are_explained(tmp_path: Path, name: str) -> None:
    write, message = BAD[name]
    path = tmp_path / "part.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_parts(path)
    assert "part.npz" in str(caught.value)


def test_missing_parts_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"gone.npz does not exist"):
        open_parts(tmp_path / "gone.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"image.npy does not exist; a part that is a"):
        open_parts(tmp_path / "folder")
    with pytest.raises(ValueError, match="empty list"):
        open_parts()
    with pytest.raises(ValueError, match=r"write \['a.npz'\]"):
        GeneratedImages("a.npz", num_classes=10, image_shape=SHAPE)


def test_truncated_npy_is_explained(tmp_path: Path) -> None:
    folder = npy_folder(tmp_path / "part", content())
    raw = (folder / "image.npy").read_bytes()
    (folder / "image.npy").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=r"image.npy is truncated.*needs 360 bytes; got 359"):
        open_parts(folder)


def test_labels_are_checked_beyond_the_first_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_module, "_LABELS_PER_CHECK", 4)
    arrays = content(11)
    arrays["label"][9] = 77
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"got \d to 77 among labels 8 to 10"):
        open_parts(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([6]), r"0 to 5 for 6 images; got 6 to 6"),
        (torch.tensor([-1]), r"got -1 to -1"),
        (torch.ones(6, dtype=torch.bool), r"got torch.bool"),
        (torch.tensor(3), r"of shape \(\)"),
    ],
)
def test_bad_indices_are_explained(tmp_path: Path, indices: torch.Tensor, message: str) -> None:
    np.savez(tmp_path / "a.npz", **content())
    with pytest.raises(ValueError, match=message):
        open_parts(tmp_path / "a.npz").rows(indices)


# ---------------------------------------------------------------- parts larger than memory


def write_holes(path: Path, num: int, last_image: bytes) -> None:
    """Write what ``numpy.savez`` would write for ``num`` images, black but for the last one.

    The pixels are a hole in the file, which takes no room on the disk. All sizes and offsets stand
    in 64-bit extra fields, as in archives beyond 4 GiB.
    """
    far = 0xFFFFFFFF
    sizes = {"image": (num, 32, 32, 3), "label": (num,)}
    with path.open("wb") as file:
        directory = b""
        for key, shape in sizes.items():
            dtype = np.dtype(np.uint8 if key == "image" else np.int64)
            buffer = io.BytesIO()
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(buffer, header)
            size = len(buffer.getvalue()) + int(np.prod(shape)) * dtype.itemsize
            name, offset = f"{key}.npy".encode(), file.tell()
            common = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0x21, 0, far, far)
            extra = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(b"PK\3\4" + common + struct.pack("<HH", len(name), len(extra)))
            file.write(name + extra + buffer.getvalue())
            file.seek(offset + 30 + len(name) + len(extra) + size)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            lengths = struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, far)
            directory += b"PK\1\2" + struct.pack("<H", 45) + common + lengths + name + extra
        start = file.tell()
        file.write(directory)
        end = file.tell()
        zip64 = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2, 2, end - start, start)
        file.write(b"PK\6\6" + zip64 + b"PK\6\7" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 2, 2, end - start, far, 0))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("image.npy")
    with path.open("r+b") as file:
        file.seek(info.header_offset + 30 + 9 + 20 + info.file_size - len(last_image))
        file.write(last_image)


def test_the_writer_of_holes_writes_what_numpy_reads(tmp_path: Path) -> None:
    last = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    write_holes(tmp_path / "a.npz", 3, last.tobytes())
    raw = (tmp_path / "a.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:  # numpy checks the sums, which are not there
        infos = archive.infolist()
    assert [info.filename for info in infos] == ["image.npy", "label.npy"]
    image = infos[0]
    start = image.header_offset + 30 + 9 + 20
    array = np.load(io.BytesIO(raw[start : start + image.file_size]))
    assert array.shape == (3, 32, 32, 3)
    assert np.array_equal(array[2], last)
    assert not array[:2].any()


READER = """
import resource, sys, torch
from dkl.data import GeneratedImages
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB on Linux
before = peak()
generated = GeneratedImages([sys.argv[1]], num_classes=10, image_shape=(3, 32, 32))
last = len(generated) - 1
images, labels = generated.rows(torch.tensor([last, 0, last // 2, 1, 2, 3, last - 1, last]))
print(len(generated), peak() - before, images[0].tolist() == images[7].tolist(),
      images[0].sum().item(), images[1:7].sum().item(), labels.sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs holes in files and Linux's peak memory")
@pytest.mark.parametrize("gibibytes", [2, 5])  # below and beyond what 32-bit offsets reach
def test_huge_parts_are_not_read_whole(tmp_path: Path, gibibytes: int) -> None:
    num = gibibytes * 2**30 // 3072
    path = tmp_path / "huge.npz"
    write_holes(path, num, bytes([1]) * 3072)
    assert path.stat().st_size > gibibytes * 2**30
    assert path.stat().st_blocks * 512 < 2**24, "this file system fills holes"
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True
    )
    length, grown, same, ones, rest, labels = done.stdout.split()
    assert (int(length), same, int(ones), int(rest), int(labels)) == (num, "True", 3072, 0, 0)
    # The labels, 8 bytes for 3072 of pixels, are looked at once: 14 MiB of the 5 GiB.
    assert int(grown) < 64

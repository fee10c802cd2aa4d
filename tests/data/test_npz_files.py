"""Converting compressed parts: streamed, complete or absent, resumed."""

import shutil
import tracemalloc
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dkl.data import (
    DatasetNotFoundError,
    GeneratedImages,
    ImageData,
    convert_npz,
    npz_files,
    write_npz,
)


def content(num: int = 50, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, num),
    }


def compressed(folder: Path, *nums: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for num in nums:
        np.savez_compressed(folder / f"part_{num}.npz", **content(num, num))
    return [folder / f"part_{num}.npz" for num in nums]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def check(paths: list[Path], nums: tuple[int, ...]) -> None:
    generated = GeneratedImages(paths, num_classes=10, image_shape=(3, 8, 8))
    images, labels = generated.rows(torch.arange(sum(nums)))
    expected = [content(num, num) for num in nums]
    pixels = np.concatenate([one["image"] for one in expected])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert np.array_equal(labels.numpy(), np.concatenate([one["label"] for one in expected]))


def test_converted_parts_hold_the_same_images(tmp_path: Path) -> None:
    parts = compressed(tmp_path / "in", 50, 70)
    calls: list[tuple[int, int]] = []
    paths = convert_npz(
        parts, tmp_path / "deep" / "out", progress=lambda done, total: calls.append((done, total))
    )
    assert paths == [tmp_path / "deep" / "out" / part.name for part in parts]
    check(paths, (50, 70))
    total = 120 * (8 * 8 * 3 + 8) + 4 * 128  # four npy headers
    assert calls[-1] == (total, total)
    assert {one for _, one in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert names(tmp_path / "deep" / "out") == ["part_50.npz", "part_70.npz"]


def test_finished_parts_are_not_written_again(tmp_path: Path) -> None:
    parts = compressed(tmp_path / "in", 50, 70)
    convert_npz(parts[:1], tmp_path / "out")
    before = (tmp_path / "out" / "part_50.npz").stat()
    calls: list[tuple[int, int]] = []
    paths = convert_npz(parts, tmp_path / "out", progress=lambda *call: calls.append(call))
    after = (tmp_path / "out" / "part_50.npz").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert calls[-1][1] == 70 * (8 * 8 * 3 + 8) + 2 * 128
    check(paths, (50, 70))
    convert_npz(parts, tmp_path / "out", progress=lambda *call: pytest.fail("wrote again"))


def test_an_interrupted_conversion_leaves_nothing_and_goes_on(tmp_path: Path) -> None:
    parts = compressed(tmp_path / "in", 50, 70)
    first = 50 * (8 * 8 * 3 + 8) + 2 * 128

    def interrupt(done: int, total: int) -> None:
        if done > first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_npz(parts, tmp_path / "out", progress=interrupt)
    assert names(tmp_path / "out") == ["part_50.npz"]
    # A process that was killed cannot clean up: the next one does.
    (tmp_path / "out" / ".part_70.npz.0123.unfinished").write_bytes(b"half a part")
    check(convert_npz(parts, tmp_path / "out"), (50, 70))
    assert names(tmp_path / "out") == ["part_50.npz", "part_70.npz"]


def test_mappable_parts_are_used_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "stored.npz", **content(20, 20))
    folder = tmp_path / "unpacked"
    shutil.unpack_archive(tmp_path / "stored.npz", folder, "zip")
    packed = compressed(tmp_path / "in", 30)
    paths = convert_npz([tmp_path / "stored.npz", folder, *packed], tmp_path / "out")
    assert paths == [tmp_path / "stored.npz", folder, tmp_path / "out" / "part_30.npz"]
    check(paths, (20, 20, 30))
    assert names(tmp_path / "out") == ["part_30.npz"]


def test_one_compressed_member_is_enough(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content(20, 20))
    with (
        zipfile.ZipFile(tmp_path / "a.npz") as old,
        zipfile.ZipFile(tmp_path / "b.npz", "w") as new,
    ):
        new.writestr("image.npy", old.read("image.npy"))
        new.writestr("label.npy", old.read("label.npy"), zipfile.ZIP_LZMA)
        new.writestr("comment.txt", "left out")
    paths = convert_npz([tmp_path / "b.npz"], tmp_path / "out")
    check(paths, (20,))
    with zipfile.ZipFile(paths[0]) as archive:
        assert archive.namelist() == ["image.npy", "label.npy"]
        assert archive.testzip() is None


def test_arrays_are_never_whole_in_memory(tmp_path: Path) -> None:
    num_bytes = 64 << 20
    pixels = np.zeros((num_bytes // 3072, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", image=pixels, label=np.zeros(len(pixels), int))
    del pixels
    tracemalloc.start()
    try:
        convert_npz([tmp_path / "a.npz"], tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < num_bytes / 3


def test_damage_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (part,) = compressed(tmp_path / "in", 200)
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 0xFF  # in the pixels
    part.write_bytes(raw)
    with pytest.raises(ValueError, match=r"part_200.npz is damaged"):
        convert_npz([part], tmp_path / "out")
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": content()["image"]}, r"label is missing"),
        ({**content(), "image": np.zeros((50, 8, 8), np.uint8)}, r"must be uint8 of shape"),
        ({**content(), "label": np.array([{}] * 50)}, r"Python objects.*never loaded"),
        ({**content(), "label": np.zeros(49, int)}, r"50 images and 49 labels"),
    ],
)
def test_wrong_parts_are_refused_before_anything_is_written(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    parts = compressed(tmp_path / "in", 20)
    np.savez_compressed(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        convert_npz([*parts, tmp_path / "bad.npz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_in_the_way_are_explained(tmp_path: Path) -> None:
    (part,) = compressed(tmp_path / "in", 20)
    (other,) = compressed(tmp_path / "other", 20)
    with pytest.raises(ValueError, match=r"two parts are named part_20.npz"):
        convert_npz([part, other], tmp_path / "out")
    np.savez(tmp_path / "part_20.npz", **content(20, seed=1))
    with pytest.raises(ValueError, match=r"is not the conversion of"):
        convert_npz([part], tmp_path)
    with pytest.raises(ValueError, match=r"convert into another folder"):
        convert_npz([part], part.parent)
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        convert_npz([tmp_path / "gone.npz"], tmp_path / "out")
    with pytest.raises(ValueError, match="empty list"):
        convert_npz([], tmp_path / "out")
    with pytest.raises(ValueError, match="list of paths; got one path"):
        convert_npz(str(part), tmp_path / "out")


def test_a_full_disk_is_told_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(npz_files.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 99, 99))
    parts = compressed(tmp_path / "in", 20)
    with pytest.raises(ValueError, match=r"need 0.0 GB in .*out; only 0.0 GB are free"):
        convert_npz(parts, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_write_npz_replaces_at_once_and_needs_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ImageData(torch.ones(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), 4, tuple("abcd"))
    path = tmp_path / "part.npz"
    path.write_bytes(b"what was here before")
    with monkeypatch.context() as patched:

        def fail(_: Any) -> None:
            raise OSError("disk is gone")

        patched.setattr(npz_files.os, "fsync", fail)
        with pytest.raises(OSError, match="disk is gone"):
            write_npz(data, path)
    assert path.read_bytes() == b"what was here before"
    assert names(tmp_path) == ["part.npz"]
    write_npz(data, str(path))
    generated = GeneratedImages([path], num_classes=4, image_shape=(3, 8, 8))
    assert torch.equal(generated.rows(torch.arange(4))[0], data.images)
    with pytest.raises(ValueError, match="at least one image"):
        write_npz(data.subset(torch.empty(0, dtype=torch.int64)), tmp_path / "none.npz")

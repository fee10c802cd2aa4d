"""Lists of images: what is read, and which mistakes are named."""

from pathlib import Path

import pytest
import torch

from dkl.data import DatasetNotFoundError, read_image_list

NAMES = ["train/n01/a_1.JPEG", "train/n01/with space.JPEG", "train/n02/b.JPEG"]
TEXT = f"{NAMES[0]} 0\n\n{NAMES[1]} 0\r\n  {NAMES[2]}\t2 \n{NAMES[0]} 0\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_bytes(TEXT.encode())
    return tmp_path


def test_a_list_is_read_in_its_order(root: Path) -> None:
    images = read_image_list(root / "list.txt", root=str(root), num_classes=4)
    assert images.paths == (NAMES[0], NAMES[1], NAMES[2], NAMES[0])
    assert images.labels.tolist() == [0, 0, 2, 0]
    assert images.labels.dtype == torch.int64
    assert images.class_counts().tolist() == [3, 0, 1, 0]
    assert images.file(1) == root / NAMES[1]
    assert (len(images), repr(images)) == (4, f"ImageList(4 images under {root}, 4 classes)")


def test_the_number_of_classes_is_counted_where_none_is_absent(root: Path) -> None:
    (root / "list.txt").write_text(f"{NAMES[0]} 1\n{NAMES[2]} 0")
    assert read_image_list(root / "list.txt", root=root).num_classes == 2
    (root / "list.txt").write_text(f"{NAMES[0]} 999999999\n{NAMES[2]} 0")
    with pytest.raises(ValueError, match=r"up to 999999999 but none of class 1; give num_classes"):
        read_image_list(root / "list.txt", root=root)


def test_missing_files_are_counted_and_the_first_named(root: Path) -> None:
    lines = [f"train/n03/gone_{number}.JPEG 0" for number in range(5)]
    (root / "list.txt").write_text("\n".join([f"{NAMES[0]} 0", *lines]))
    with pytest.raises(DatasetNotFoundError) as caught:
        read_image_list(root / "list.txt", root=root)
    message = str(caught.value)
    assert "5 of 6 files" in message
    assert "gone_0.JPEG, train/n03/gone_1.JPEG, train/n03/gone_2.JPEG and 2 more" in message
    assert "gone_3" not in message
    assert len(read_image_list(root / "list.txt", root=root, check_files=False)) == 6
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        read_image_list(root / "none.txt", root=root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/a.JPEG", "has no path or no label"),
        ("7", "has no path or no label"),
        ("a.JPEG cat", "does not end with a class number"),
        ("a.JPEG -1", "does not end with a class number"),
        ("a.JPEG 1.0", "does not end with a class number"),
        ("a.JPEG " + "9" * 5000, "does not end with a class number"),
        ("a.JPEG 10", "has a label beyond 0 to 9"),
        ("/etc/passwd 0", "leaves the root folder"),
        ("../a.JPEG 0", "leaves the root folder"),
        (f"{NAMES[0]} 3", "has another label, 0, in an earlier line"),
    ],
)
def test_bad_lines_are_named(root: Path, line: str, message: str) -> None:
    (root / "list.txt").write_text(f"{NAMES[0]} 0\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_image_list(root / "list.txt", root=root, num_classes=10)
    assert f"line 2 ({line[:80]!r})" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_many_bad_lines_are_counted(root: Path) -> None:
    (root / "list.txt").write_text("x\n" * 50)
    with pytest.raises(ValueError, match=r"line 1 .*line 2 .*line 3 .*; and 47 more"):
        read_image_list(root / "list.txt", root=root)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "it is empty"), (b"\xff\xd8\xff\xe0", "text file of UTF-8")]
)
def test_files_that_are_no_lists_are_explained(root: Path, content: bytes, message: str) -> None:
    (root / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image_list(root / "list.txt", root=root)

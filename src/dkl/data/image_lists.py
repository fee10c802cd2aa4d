"""Text files that list images and their classes, such as those of ImageNet-LT."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from dkl.data.lookup import DatasetNotFoundError

_NAMED = 3  # how many bad lines or missing files a message names
_MAX_DIGITS = 9  # of a class number


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """Files and labels that a list names; no image has been read.

    Args:
        root: folder that the paths start from.
        paths: relative, with forward slashes, in the order of the list.
        labels: [N] int64, 0 to num_classes - 1.
        num_classes: number of classes.
    """

    root: Path
    paths: tuple[str, ...]
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"ImageList({len(self)} images under {self.root}, {self.num_classes} classes)"

    def file(self, index: int) -> Path:
        """Return the whole path of an image."""
        return self.root / self.paths[index]

    def class_counts(self) -> Tensor:
        """Return the number of images of each class, [num_classes] int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)


def read_image_list(
    path: Path | str,
    *,
    root: Path | str,
    num_classes: int | None = None,
    check_files: bool = True,
) -> ImageList:
    r"""Read a list of images: lines of a relative path, white space and a class number.

    This is the format of ``ImageNet_LT_train.txt`` ("train/n01440764/n01440764_762.JPEG 0"). A path
    may contain spaces; empty lines are skipped.

    Args:
        path: of the list, UTF-8.
        root: folder that the paths start from.
        num_classes: number of classes; None: one more than the largest label, all of which must
            occur.
        check_files: look whether every file is there (seconds for ImageNet on a local disk).

    Returns:
        Paths and labels in the order of the list.

    Raises:
        DatasetNotFoundError: the list or some of its files do not exist; the first few are named.
        ValueError: the list is empty or no text, lines cannot be understood (the first few are
            named), a path has two labels, or labels are missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a.png", "b.png"):
        ...         Path(folder, name).touch()
        ...     written = Path(folder, "list.txt").write_text("a.png 1\nb.png 0\n")
        ...     images = read_image_list(Path(folder, "list.txt"), root=folder)
        >>> images.paths, images.labels, images.class_counts()
        (('a.png', 'b.png'), tensor([1, 0]), tensor([1, 1]))
    """
    place, folder = Path(path).expanduser(), Path(root).expanduser()
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"the image list {place} does not exist.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be a text file of UTF-8; {error}.") from error
    paths, labels = _parse(place, lines, num_classes)
    if num_classes is None:
        num_classes = _count_classes(place, labels)
    if check_files:
        _check_files(place, folder, paths)
    return ImageList(
        folder, tuple(paths), torch.tensor(labels, dtype=torch.int64, device="cpu"), num_classes
    )


def _parse(place: Path, lines: list[str], num_classes: int | None) -> tuple[list[str], list[int]]:
    labels: dict[str, int] = {}
    rows: list[tuple[str, int]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, text = (["", *line.rsplit(None, 1)])[-2:]
        name = name.strip()
        problem = _problem(name, text, num_classes)
        if problem is None:
            label = int(text)
            if labels.setdefault(name, label) != label:
                problem = f"has another label, {labels[name]}, in an earlier line"
            rows.append((name, label))
        if problem is not None:
            problems.append(f"line {number} ({line.strip()[:80]!r}) {problem}")
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(
            f"{place} must hold lines 'relative/path label': {'; '.join(problems[:_NAMED])}{more}."
        )
    if not rows:
        raise ValueError(f"{place} must list at least one image; it is empty.")
    return [name for name, _ in rows], [label for _, label in rows]


def _problem(name: str, label: str, num_classes: int | None) -> str | None:
    """Return what is wrong with a line, or None."""
    if not name:
        return "has no path or no label"
    if not (label.isascii() and label.isdigit() and len(label) <= _MAX_DIGITS):
        return "does not end with a class number"
    if num_classes is not None and int(label) >= num_classes:
        return f"has a label beyond 0 to {num_classes - 1}"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return "has a path that leaves the root folder"
    return None


def _count_classes(place: Path, labels: list[int]) -> int:
    num_classes = max(labels) + 1
    present = set(labels)
    if len(present) < num_classes:
        # Looked for only as far as the message needs: a label may be huge by mistake.
        absent = next(label for label in range(num_classes) if label not in present)
        raise ValueError(
            f"{place} has labels up to {num_classes - 1} but none of class {absent}; give "
            f"num_classes if classes may be without images, or renumber the labels from 0."
        )
    return num_classes


def _check_files(place: Path, folder: Path, paths: list[str]) -> None:
    missing = [name for name in paths if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise DatasetNotFoundError(
            f"{len(missing)} of {len(paths)} files that {place} lists are not under {folder}: "
            f"{', '.join(missing[:_NAMED])}{more}. The root must be the folder that the paths in "
            f"the list start from."
        )

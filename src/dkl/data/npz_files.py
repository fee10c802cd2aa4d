"""Writing parts of generated data: uncompressed npz files, complete or not there at all."""

import io
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dkl.data.images import ImageData
from dkl.data.npz import (
    IMAGE_KEY,
    KEYS,
    LABEL_KEY,
    Array,
    check_lengths,
    map_part,
    read_members,
    read_npy_header,
)

Progress = Callable[[int, int], None]
"""``progress(done, total)``, both in bytes."""

_CHUNK_BYTES = 1 << 22
_UNFINISHED = ".unfinished"
_Members = Mapping[str, zipfile.ZipInfo]


def write_npz(data: ImageData, path: Path | str) -> Path:
    """Write images as a part of generated data: an uncompressed npz file.

    Args:
        data: the images.
        path: of the file, usually ending in ".npz"; replaced if it is there.

    Returns:
        The path.

    Raises:
        ValueError: no images.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from dkl.data.generated import GeneratedImages
        >>> images = torch.arange(12, dtype=torch.uint8).reshape(4, 3, 1, 1)
        >>> data = ImageData(images, torch.tensor([0, 1, 0, 1]), 2, ("a", "b"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     part = write_npz(data, Path(folder) / "part.npz")
        ...     generated = GeneratedImages([part], num_classes=2, image_shape=(3, 1, 1))
        ...     images, labels = generated.rows(torch.tensor([3]))
        >>> images.flatten(), labels
        (tensor([ 9, 10, 11], dtype=torch.uint8), tensor([1]))
    """
    images_NHWC = data.images.cpu().permute(0, 2, 3, 1).numpy()
    return write_arrays(images_NHWC, data.labels.cpu().numpy(), Path(path))


def write_arrays(images_NHWC: Array, labels_N: Array, path: Path) -> Path:
    """Write arrays as a part, chunk by chunk.

    Args:
        images_NHWC: uint8.
        labels_N: integers.
        path: of the file; replaced if it is there.

    Returns:
        The path.

    Raises:
        ValueError: no images.
    """
    if len(images_NHWC) == 0:
        raise ValueError("a part must hold at least one image; got none.")
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = {IMAGE_KEY: _npy_chunks(images_NHWC), LABEL_KEY: _npy_chunks(labels_N)}
    _write_archive(path, chunks)
    return path


def convert_npz(
    parts: Sequence[Path | str], out_dir: Path | str, *, progress: Progress | None = None
) -> list[Path]:
    """Write compressed npz parts once more without compression, so that they can be mapped.

    The arrays are streamed, never held in memory. A file appears in ``out_dir`` only when it is
    complete and its checksums are right, so that after an interruption the same call goes on with
    the part that was interrupted. Parts that can be mapped as they are, are not copied.

    Args:
        parts: npz files with ``image`` and ``label``.
        out_dir: folder for the converted files, which keep their names.
        progress: called with bytes written and bytes in all, of the parts still to convert.

    Returns:
        The paths to use instead, in the order of ``parts``.

    Raises:
        DatasetNotFoundError: a part does not exist.
        ValueError: a part is damaged or no such file, names clash, another file is in the way, or
            the disk has not enough space.
    """
    sources = as_paths(parts)
    folder = Path(out_dir)
    results: list[Path] = []
    jobs: list[tuple[Path, Path, _Members]] = []
    for source in sources:
        members = None if source.is_dir() else _check_source(source)
        if members is None or not any(info.compress_type for info in members.values()):
            results.append(map_part(source).path)
            continue
        target = folder / source.name
        if target in results:
            raise ValueError(f"two parts are named {source.name}; convert them into two folders.")
        results.append(target)
        if not target.exists():
            jobs.append((source, target, members))
        elif not _is_conversion(target, members):
            raise ValueError(
                f"{target} is there, but is not the conversion of {source}. Move it away, or "
                f"convert into another folder."
            )
    _run(jobs, folder, progress)
    return results


def as_paths(parts: Sequence[Path | str]) -> list[Path]:
    """Return a list of paths with the home folder expanded.

    Raises:
        ValueError: there is no part, or one path stands in place of the list.
    """
    if isinstance(parts, str | Path):
        raise ValueError(f"parts must be a list of paths; got one path: write [{str(parts)!r}].")
    if not parts:
        raise ValueError("parts must name at least one npz file; got an empty list.")
    return [Path(part).expanduser() for part in parts]


def _check_source(path: Path) -> _Members:
    """Read the headers, so that a wrong file is told before the first one is converted."""
    members = read_members(path)
    shapes = []
    with _told_as_damage(path), zipfile.ZipFile(path) as archive:
        for key in KEYS:
            with archive.open(members[key]) as stream:
                place = f"{members[key].filename} in {path}"
                shapes.append(read_npy_header(stream, place, key)[0])
    check_lengths(path, *shapes)
    return members


def _is_conversion(target: Path, members: _Members) -> bool:
    try:
        map_part(target)
        converted = read_members(target)
    except ValueError:
        return False
    return all(
        (converted[key].CRC, converted[key].file_size) == (members[key].CRC, members[key].file_size)
        for key in KEYS
    )


def _run(
    jobs: Sequence[tuple[Path, Path, _Members]], folder: Path, progress: Progress | None
) -> None:
    total = sum(info.file_size for _, _, members in jobs for info in members.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"the converted files need {total / 1e9:.1f} GB in {folder}; only {free / 1e9:.1f} GB "
            f"are free. Make room, or give a folder on another disk."
        )
    done = 0

    def counted(source: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
        nonlocal done
        with source.open(info) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
                done += len(chunk)
                if progress is not None:
                    progress(done, total)

    for source_path, target, members in jobs:
        with _told_as_damage(source_path), zipfile.ZipFile(source_path) as source:
            _write_archive(target, {key: counted(source, members[key]) for key in KEYS})


@contextmanager
def _told_as_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(
            f"{path} is damaged or compressed in an unknown way ({error}). Get it again from its "
            f"publisher."
        ) from error


def _npy_chunks(array: Array) -> Iterator[bytes]:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(array.dtype)
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": array.shape}
    )
    yield header.getvalue()
    rows = max(1, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows].tobytes()


def _write_archive(path: Path, members: Mapping[str, Iterable[bytes]]) -> None:
    with _complete_or_nothing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for key, chunks in members.items():
            # The size is not known in advance, and members beyond 2 GiB are usual.
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                for chunk in chunks:
                    member.write(chunk)


@contextmanager
def _complete_or_nothing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that takes its place when the block ends without an error."""
    # What a killed process left would fill the disk. One that still runs keeps its open file, and
    # fails at the end, where its name is gone.
    for leftover in path.parent.glob(f".{path.name}.*{_UNFINISHED}"):
        leftover.unlink(missing_ok=True)
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}"
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

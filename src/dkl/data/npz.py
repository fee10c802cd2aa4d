"""Parts of generated data: npz files whose arrays are mapped into memory, never read whole.

An npz file is a zip archive of npy files. A member that is stored without compression lies in the
archive byte for byte, so that its array can be mapped at the member's offset.

Legend: N images, H height, W width, C channels.
"""

import math
import mmap
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dkl.data.lookup import DatasetNotFoundError

Array = np.ndarray[Any, np.dtype[Any]]

IMAGE_KEY, LABEL_KEY = "image", "label"
KEYS = (IMAGE_KEY, LABEL_KEY)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra
_ENCRYPTED = 0x1
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class MappedArray:
    """One array of a file, mapped read-only: rows are fetched from disk when they are asked for.

    Args:
        path: the file.
        offset: first byte of the array.
        shape: of the array, row order.
        dtype: without objects.
    """

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offset = offset
        self.array: Array = np.ndarray(shape, dtype, buffer=self._map, offset=offset)
        self._row_bytes = self.array.strides[0]
        # The system's reading ahead fetches many large rows for one that is wanted. Small rows are
        # left to it. Windows has no such advice.
        self._is_advised = self._row_bytes >= mmap.PAGESIZE // 4 and hasattr(mmap, "MADV_RANDOM")
        if self._is_advised:
            self._map.madvise(mmap.MADV_RANDOM)

    def take(self, rows: Array) -> Array:
        """Copy rows, [B] of integers in range; best in rising order."""
        if self._is_advised:
            # All rows are fetched at once, not one page fault after the other.
            for row in rows.tolist():
                start = self._offset + row * self._row_bytes
                page = start - start % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, page, start + self._row_bytes - page)
        return self.array[rows]


@dataclass(frozen=True, eq=False)
class MappedPart:
    """Images and labels of one part.

    Args:
        path: the part.
        images: [N, H, W, C] uint8.
        labels: [N] integers.
    """

    path: Path
    images: MappedArray
    labels: MappedArray

    def __len__(self) -> int:
        return int(self.images.array.shape[0])


def map_part(path: Path) -> MappedPart:
    """Map a part: an uncompressed npz file, or a folder with ``image.npy`` and ``label.npy``.

    Nothing of the arrays is read. Pickles are never loaded.

    Args:
        path: of the part, with ``image`` [N, H, W, C] uint8 and ``label`` [N] integers.

    Returns:
        The mapped part.

    Raises:
        DatasetNotFoundError: there is no such file.
        ValueError: it is compressed, damaged, or holds anything else.
    """
    if path.is_dir():
        image, label = (_map_npy(path / f"{key}.npy") for key in KEYS)
    else:
        members = read_members(path)
        packed = [key for key in KEYS if members[key].compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(
                f"{path} is compressed, so that its images cannot be read one by one. Convert it "
                f"once, by: dkl data convert {path} --out FOLDER, and give the file that is then "
                f"in FOLDER."
            )
        image, label = (_map_member(path, members[key]) for key in KEYS)
    check_lengths(path, image.array.shape, label.array.shape)
    return MappedPart(path, image, label)


def read_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return where the archive's two arrays are.

    Args:
        path: an npz file.

    Returns:
        The entries of "image" and "label".

    Raises:
        DatasetNotFoundError: there is no such file.
        ValueError: not a zip archive, truncated, encrypted, or a key is missing.
    """
    if not path.is_file():
        raise DatasetNotFoundError(f"the part {path} does not exist; give the path of an npz file.")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"{path} is not an npz file, or not all of it is there ({error}). Get it again from "
            f"its publisher."
        ) from error
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(
            f"{path} must hold the arrays {' and '.join(KEYS)}; {' and '.join(missing)} is missing "
            f"among {sorted(found)}. Write it by numpy.savez(path, image=..., label=...)."
        )
    if any(found[key].flag_bits & _ENCRYPTED for key in KEYS):
        raise ValueError(f"{path} is encrypted; decrypt it first.")
    return {key: found[key] for key in KEYS}


def read_npy_header(file: IO[bytes], place: str, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an npy stream and leave the stream at the array's first byte.

    Args:
        file: a stream at the beginning of the npy data.
        place: of the array, for messages.
        key: "image" or "label": what it must be.

    Returns:
        (shape, dtype).

    Raises:
        ValueError: not npy data, or not an array of the kind that the key needs.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"npy version {version} is not for plain arrays")
        shape, column_major, dtype = _NPY_HEADERS[version](file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{place} is not an npy array ({error}). Get the file again.") from error
    if dtype.hasobject:
        raise ValueError(
            f"{place} holds Python objects, which are pickles; they can run code and are never "
            f"loaded. Save a plain array of numbers."
        )
    if key == IMAGE_KEY and not (dtype == np.uint8 and len(shape) == 4):
        raise ValueError(
            f"{place} must be uint8 of shape [N, H, W, C]; got {dtype} of shape {shape}. Floats "
            f"become (255 * images).round().astype('uint8'); one grey channel needs C = 1."
        )
    if key == LABEL_KEY and not (dtype.kind in "iu" and len(shape) == 1):
        raise ValueError(
            f"{place} must be integers of shape [N], one class number for each image; got {dtype} "
            f"of shape {shape}."
        )
    if column_major and len(shape) > 1:
        raise ValueError(
            f"{place} is stored in Fortran order, where an image is scattered over the file. Save "
            f"numpy.ascontiguousarray(images)."
        )
    if 0 in shape:
        raise ValueError(f"{place} must hold at least one value; got shape {shape}.")
    return shape, dtype


def check_lengths(path: Path, image_shape: tuple[int, ...], label_shape: tuple[int, ...]) -> None:
    """Refuse a part with another number of labels than images.

    Raises:
        ValueError: the numbers differ.
    """
    if image_shape[0] != label_shape[0]:
        raise ValueError(
            f"{path} must have one label for each image; got {image_shape[0]} images and "
            f"{label_shape[0]} labels."
        )


def _map_member(path: Path, info: zipfile.ZipInfo) -> MappedArray:
    place = f"{info.filename} in {path}"
    with path.open("rb") as file:
        # The local header has a name and an extra field of its own; they may be longer than those
        # of the central directory.
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise ValueError(f"{place} is damaged: its header is not there. Get the file again.")
        _signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        file.seek(start)
        shape, dtype = read_npy_header(file, place, info.filename.removesuffix(".npy"))
        offset = file.tell()
    return _map_checked(path, place, offset, start + info.file_size, shape, dtype)


def _map_npy(path: Path) -> MappedArray:
    if not path.is_file():
        raise DatasetNotFoundError(
            f"{path} does not exist; a part that is a folder must hold "
            f"{' and '.join(f'{key}.npy' for key in KEYS)}."
        )
    with path.open("rb") as file:
        shape, dtype = read_npy_header(file, str(path), path.stem)
        offset = file.tell()
    return _map_checked(path, str(path), offset, path.stat().st_size, shape, dtype)


def _map_checked(
    path: Path, place: str, offset: int, end: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> MappedArray:
    """Map after checking that all bytes of the array are there: a page that is not kills."""
    available = min(end, path.stat().st_size) - offset
    needed = math.prod(shape) * dtype.itemsize
    if available < needed:
        raise ValueError(
            f"{place} is truncated: an array of shape {shape} needs {needed} bytes; got "
            f"{max(available, 0)}. Get the file again."
        )
    return MappedArray(path, offset, shape, dtype)

"""Files of a teacher cache: some thousand rows each, written whole or not at all, then only read.

A file is a header of 64 bytes (magic, identity of the cache, number of rows, CRC-32 of header and
keys, CRC-32 of the columns), the keys of its rows in ascending order as int64, and the columns of
the rows one after another, each padded to a multiple of 8 bytes; all little-endian. Its name tells
the first and the last view in it. A row's key is view * num_samples + sample.

Legend: R rows of a file.
"""

import errno
import os
import re
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dkl.data.teacher_rows import RowFormat

_HEADER = struct.Struct("<8s32sQII8x")
_MAGIC = b"DKLTEACH"
_NAME = re.compile(r"(\d+)-(\d+)-[0-9a-f]{32}\.rows")
_UNFINISHED = ".tmp-"
_STALE_SECONDS = 3600
_READ_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

KEY_BYTES = 8


class TeacherCacheError(ValueError):
    """A teacher cache is another one, lacks rows, is damaged, or cannot be written."""


class Chunk:
    """One file, mapped into memory: of the columns, only the pages of rows that are read.

    Args:
        path: of the file.
        rows: its format.
        identity: 32 bytes that files of one cache share.
        num_samples: of the cache.

    Raises:
        TeacherCacheError: the file is gone, belongs to another cache, or its header or keys are
            damaged.
    """

    def __init__(self, path: Path, rows: RowFormat, identity: bytes, num_samples: int) -> None:
        self.path = path
        num_rows, keys_crc, self._columns_crc = _read_header(path, rows, identity)
        *places, size = _places(rows, num_rows)
        # Closes the file after mapping, so that the number of open files does not bound a cache's.
        mapped = torch.from_file(
            str(path), shared=False, size=size, dtype=torch.uint8, device=torch.device("cpu")
        )
        kinds = ((torch.int64, 1), *rows.columns)
        parts = [
            mapped[start : start + num_rows * width * dtype.itemsize].view(dtype).view(-1, width)
            for start, (dtype, width) in zip(places, kinds, strict=True)
        ]
        self.keys_R = parts[0].squeeze(1)
        self.columns = tuple(parts[1:])
        self._columns_start = places[1]
        if zlib.crc32(self.keys_R.numpy().data, _header_crc(identity, num_rows)) != keys_crc:
            raise _damaged(path, "the checksum of its header and keys is wrong")
        views = tuple(int(self.keys_R[end]) // num_samples for end in (0, -1))
        if views != views_of(path.name):
            raise _damaged(path, f"it holds views {views[0]} to {views[1]}, unlike its name")

    def check_columns(self) -> None:
        """Read the columns once through, past the map, and compare their checksum.

        Raises:
            TeacherCacheError: it is wrong, or the file is gone.
        """
        buffer = np.empty(_READ_BYTES, np.uint8)
        crc = 0
        with _told_as_gone(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self._columns_start)
            while count := file.readinto(buffer.data):
                crc = zlib.crc32(buffer[:count].data, crc)
        if crc != self._columns_crc:
            raise _damaged(self.path, "the checksum of its rows is wrong")


def chunk_size(rows: RowFormat, num_rows: int) -> int:
    """Return the bytes of a file with this many rows.

    Example:
        >>> chunk_size(RowFormat(10), 1)  # header, key, ten times two bytes padded to 24
        96
    """
    return _places(rows, num_rows)[-1]


def row_size(rows: RowFormat) -> int:
    """Return the bytes of one row with its key, without padding.

    Example:
        >>> row_size(RowFormat(10)), row_size(RowFormat(10, top_k=2))
        (28, 18)
    """
    return KEY_BYTES + sum(dtype.itemsize * width for dtype, width in rows.columns)


def views_of(name: str) -> tuple[int, int] | None:
    """Return the first and the last view in a file of this name; None if it is none of ours.

    Example:
        >>> views_of(f"3-12-{'0' * 32}.rows"), views_of("manifest.json")
        ((3, 12), None)
    """
    matched = _NAME.fullmatch(name)
    return None if matched is None else (int(matched[1]), int(matched[2]))


def write_chunk(
    folder: Path,
    identity: bytes,
    num_samples: int,
    keys_R: Tensor,
    columns: tuple[Tensor, ...],
) -> str:
    """Write rows as a new file, which appears when it is complete and on the disk.

    Args:
        folder: of the cache.
        identity: 32 bytes that files of one cache share.
        num_samples: of the cache.
        keys_R: [R] int64, any order, R at least 1.
        columns: of these rows.

    Returns:
        The name of the file.

    Raises:
        TeacherCacheError: no space is left.
        OSError: the file cannot be written for another reason.
    """
    order_R = torch.argsort(keys_R, stable=True)
    parts = [part[order_R].contiguous().numpy() for part in (keys_R, *columns)]
    keys, *body = [piece for part in parts for piece in (part.data, b"\0" * (-part.nbytes % 8))]
    num_rows = len(keys_R)
    keys_crc = zlib.crc32(keys, _header_crc(identity, num_rows))
    crc = 0
    for piece in body:
        crc = zlib.crc32(piece, crc)
    header = _HEADER.pack(_MAGIC, identity, num_rows, keys_crc, crc)
    first, last = (int(parts[0][end]) // num_samples for end in (0, -1))
    name = f"{first}-{last}-{uuid.uuid4().hex}.rows"
    unfinished = folder / f"{_UNFINISHED}{name}"
    try:
        with unfinished.open("xb") as file:
            for piece in (header, keys, *body):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / name)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise TeacherCacheError(
            f"no space is left for the teacher cache in {folder} ({error.strerror}). What is "
            f"there is valid: make room and run the same again, and it goes on from there. A "
            f"smaller cache lists only top_k classes."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return name


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left unfinished; what may still be in use is young, and stays."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # another process was faster


def is_leftover(name: str) -> bool:
    """Return whether a file of this name is a writer's unfinished one."""
    return name.startswith(_UNFINISHED)


def chunk_names(folder: Path) -> Iterator[str]:
    """Yield the names of the finished files, in no order."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if views_of(entry.name) is not None:
                yield entry.name


def _places(rows: RowFormat, num_rows: int) -> list[int]:
    """Return where keys and columns start, and the size of the file."""
    places = [_HEADER.size]
    for width in (KEY_BYTES, *(dtype.itemsize * width for dtype, width in rows.columns)):
        places.append(places[-1] + -(-num_rows * width // 8) * 8)
    return places


def _read_header(path: Path, rows: RowFormat, identity: bytes) -> tuple[int, int, int]:
    """Return the number of rows and the two checksums."""
    with _told_as_gone(path), path.open("rb") as file:
        header = file.read(_HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
        raise _damaged(path, "its header is wrong")
    _, owner, num_rows, keys_crc, columns_crc = _HEADER.unpack(header)
    if owner != identity:
        raise TeacherCacheError(
            f"{path} was written for another teacher cache (other teacher, data or settings). Move "
            f"it out of the folder; its rows will count as missing and can be written again."
        )
    if num_rows == 0 or chunk_size(rows, num_rows) != size:
        raise _damaged(path, f"{size} bytes are not the size of {num_rows} rows")
    return num_rows, keys_crc, columns_crc


def _header_crc(identity: bytes, num_rows: int) -> int:
    return zlib.crc32(_HEADER.pack(_MAGIC, identity, num_rows, 0, 0))


@contextmanager
def _told_as_gone(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise TeacherCacheError(f"{path} is gone; open the teacher cache again.") from error


def _damaged(path: Path, reason: str) -> TeacherCacheError:
    return TeacherCacheError(
        f"{path} is damaged: {reason}. Delete this file; its rows will count as missing and can be "
        f"written again."
    )

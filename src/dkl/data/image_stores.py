"""Where the bytes of images are: files under a folder, or members of tar shards.

A store knows names and sizes; it reads an image when it is asked for one, in any order and in any
process. Names are kept in one tensor, which worker processes share: a list of a million texts would
be copied into each of them.
"""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dkl.data.lookup import DatasetNotFoundError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of image files, in lower case: those of torchvision's ImageFolder."""

_SHARD_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImageStore(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, index: int) -> str:
        """Return the name of an image, without the place where the data are."""

    def place(self, index: int) -> str:
        """Return where an image is, for messages."""

    def size(self, index: int) -> int:
        """Return the bytes of an image file."""

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""


class Texts:
    """Many short texts in one tensor.

    Example:
        >>> texts = Texts(["a.jpg", "bb.jpg"])
        >>> len(texts), texts[1]
        (2, 'bb.jpg')
    """

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        joined = bytearray(b"".join(encoded))
        lengths = torch.tensor([0, *map(len, encoded)], dtype=torch.int64, device="cpu")
        self._ends = lengths.cumsum(0)
        self._bytes = torch.frombuffer(joined, dtype=torch.uint8) if joined else lengths[:0].byte()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index].item(), self._ends[index + 1].item()
        return os.fsdecode(bytes(self._bytes[start:end].tolist()))


class FileStore:
    """Image files under a folder.

    Args:
        root: the folder.
        names: of the files, relative to it, with forward slashes.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self._names = Texts(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return the name of a file, relative to the folder."""
        return self._names[index]

    def place(self, index: int) -> str:
        """Return the path of a file."""
        return str(self.root / self._names[index])

    def size(self, index: int) -> int:
        """Return the bytes of a file."""
        return (self.root / self._names[index]).stat().st_size

    def read(self, index: int) -> bytes:
        """Return the content of a file.

        Raises:
            DatasetNotFoundError: it is not there any more.
        """
        try:
            return (self.root / self._names[index]).read_bytes()
        except FileNotFoundError as error:
            raise DatasetNotFoundError(
                f"the image {self.place(index)} is not there any more."
            ) from error


class TarStore:
    """Images inside uncompressed tar files, found by an index of where each begins.

    WebDataset's own reader streams shards and shuffles in a buffer, so that the order depends on
    the number of workers, an epoch has no exact length, and a run that was interrupted cannot go
    on in the middle. Here any image is read by itself, and one order holds for every number of
    workers and processes, and after a resume. The price: shards belong on a disk with fast random
    access.

    Args:
        shards: the tar files.
        shard_of: [N] int64, which of them has the image.
        offsets: [N] int64, where in it the image begins.
        sizes: [N] int64, bytes of the image.
        names: of the members.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        shard_of: Tensor,
        offsets: Tensor,
        sizes: Tensor,
        names: Sequence[str],
    ) -> None:
        self.shards = tuple(shards)
        self._shard_of, self._offsets, self._sizes = shard_of, offsets, sizes
        self._names = Texts(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return the name of a member."""
        return self._names[index]

    def place(self, index: int) -> str:
        """Return the path of a shard and the name of the member."""
        return f"{self.shards[int(self._shard_of[index])]}:{self._names[index]}"

    def size(self, index: int) -> int:
        """Return the bytes of a member."""
        return int(self._sizes[index])

    def read(self, index: int) -> bytes:
        """Return the content of a member.

        Raises:
            DatasetNotFoundError: the shard is not there any more.
        """
        try:
            with self.shards[int(self._shard_of[index])].open("rb") as file:
                file.seek(int(self._offsets[index]))
                return file.read(int(self._sizes[index]))
        except FileNotFoundError as error:
            raise DatasetNotFoundError(
                f"the image {self.place(index)} is not there any more."
            ) from error


def index_shards(shards: Sequence[Path]) -> tuple[TarStore, Tensor]:
    """Look through tar shards in WebDataset's layout: KEY.jpg with KEY.cls, a class number.

    A key is a name up to the first dot after its last slash. Members that belong to neither, such
    as KEY.json, are passed over.

    Args:
        shards: uncompressed tar files, in order.

    Returns:
        The images, and their labels [N] int64.

    Raises:
        ValueError: a shard is no tar file or cut off, a label is missing or no number, or there
            are no images.
    """
    names: list[str] = []
    found: list[tuple[int, int, int, int]] = []
    for number, shard in enumerate(shards):
        images, labels = _members(shard)
        for key, (name, offset, size) in images.items():
            if key not in labels:
                raise ValueError(f"{shard} has {name} but no label for it: {key}.cls is missing.")
            names.append(name)
            found.append((number, offset, size, labels[key]))
    if not found:
        tried = ", ".join(map(str, shards[:3]))
        raise ValueError(
            f"no images were found in {len(shards)} shards ({tried}{', ...' * (len(shards) > 3)}); "
            "WebDataset's layout is KEY.jpg (or jpeg, png, webp) and KEY.cls."
        )
    columns = torch.tensor(found, dtype=torch.int64, device="cpu").T.contiguous()
    shard_of, offsets, sizes, label_N = columns
    return TarStore(shards, shard_of, offsets, sizes, names), label_N.clone()


def _members(shard: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, int]]:
    """Return name, offset and size of each image, and the labels, both by key."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    length, end = shard.stat().st_size, 0
    try:
        # "r:" takes no compression, with which nothing can be read by its place.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isfile():
                    continue
                key, suffix = _key_and_suffix(member.name)
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if suffix in _SHARD_SUFFIXES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == ".cls":
                    content = archive.extractfile(member)
                    labels[key] = _label(shard, member.name, content.read() if content else b"")
        if length < end + tarfile.BLOCKSIZE:  # tarfile does not miss the block of zeros at the end
            raise tarfile.ReadError("it was cut off")
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} cannot be read as an uncompressed tar file: {error}. Unpack compression "
            "(gunzip), or fetch it again."
        ) from error
    return images, labels


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    key, dot, rest = base.partition(".")
    return folder + slash + key, (dot + rest).lower()


def _label(shard: Path, name: str, content: bytes) -> int:
    text = content.decode("ascii", "replace").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(f"{shard}:{name} must hold a class number; got {text[:40]!r}.")
    return int(text)

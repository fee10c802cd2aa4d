"""A teacher's log-probabilities on disk, so that students train without running the teacher.

Legend: N samples, C classes, B batch, k listed classes, M rows of a view.
"""

import operator
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dkl.data.teacher_chunks import (
    TeacherCacheError,
    chunk_size,
    remove_leftovers,
    row_size,
    write_chunk,
)
from dkl.data.teacher_index import ChunkIndex
from dkl.data.teacher_manifest import (
    FORMAT,
    identity_of,
    make_manifest,
    read_manifest,
    refuse_differences,
)
from dkl.data.teacher_rows import RowFormat, StoredDtype, TopKRows

_CHUNK_BYTES = 8 << 20
_NAMED = 3  # how many samples or files a message names
_KEYS = 1 << 62


class TeacherCache:
    """Log-probabilities of a teacher by sample and view, mapped into memory.

    A *view* is a number that stands for one draw of the augmentation, such as the step or the epoch
    whose noise made the image; without augmentation there is one, 0. Rows differ from the teacher's
    logits by a shift, which neither softmax nor the weighted MSE of arXiv 2305.13948 notices: they
    take the logits' place in every loss of that kind, at every temperature.

    In float16 a log-probability l is off by at most 2^-11 |l|, a probability by at most 1.8e-4;
    below -65504 it is stored as -65504. See ``RowFormat``.

    Rows are collected and written as files of about 8 MiB, each whole or not there at all, with a
    checksum: a writer that is killed loses at most the rows that it has not written yet, and
    ``missing`` names them. Every writing process adds files of its own, so that any number may
    write into one folder at a time; all files together are the cache. A file is checked when the
    first of its rows is read. Only the keys of the views in use are held in memory.

    Use ``create`` or ``open``. As a context manager it flushes at a regular end.

    Example:
        >>> import tempfile
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
        >>> facts = {"teacher": "resnet56", "data": "two images"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TeacherCache.create(
        ...         folder, num_samples=4, num_classes=3, fingerprint=facts
        ...     ) as cache:
        ...         cache.write(torch.tensor([3, 1]), logits, view=0)
        ...     cache = TeacherCache.open(folder, fingerprint=facts)
        ...     rows = cache.read(torch.tensor([1, 3]), view=0)
        ...     missing = cache.missing(view=0)
        >>> (rows - logits.flip(0).log_softmax(1)).abs().max() < 2e-3, missing
        (tensor(True), tensor([0, 2]))
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], chunk_bytes: int) -> None:
        self.folder = folder
        self.num_samples = int(manifest["num_samples"])
        self.rows = RowFormat(
            manifest["num_classes"], manifest["top_k"], manifest["dtype"], manifest["temperature"]
        )
        self._identity = identity_of(manifest)
        self._chunk_rows = _rows_per_chunk(self.rows, chunk_bytes)
        self._pending: list[tuple[Tensor, ...]] = []
        self._num_pending = 0
        self._index = ChunkIndex(folder, self.rows, self._identity, self.num_samples)

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        num_samples: int,
        num_classes: int,
        fingerprint: Mapping[str, Any],
        top_k: int | None = None,
        dtype: StoredDtype = "float16",
        temperature: float = 1.0,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> "TeacherCache":
        """Make a cache, or go on with one that was made alike.

        Args:
            path: folder, made if it is not there.
            num_samples: N; samples are numbered 0 to N - 1.
            num_classes: C.
            fingerprint: JSON-ready facts that decide the teacher's answers: hashes of its weights
                and of the data, settings and seed of the augmentation. Other facts are refused when
                the cache is opened.
            top_k: store the k most likely classes and the rest's probability; None stores all.
            dtype: "float16", or "float32" for twice the space.
            temperature: T of the stored log softmax(logits / T), with ``top_k`` only: it cannot be
                changed once classes are left out.
            chunk_bytes: size of a file, which is also how much a killed writer may lose.

        Raises:
            TeacherCacheError: the folder holds something else; every difference is named.
            ValueError: a number is out of range.
        """
        rows = RowFormat(num_classes, top_k, dtype, float(temperature))
        if not 1 <= num_samples < 1 << 40:
            raise ValueError(f"num_samples must be at least 1; got {num_samples}.")
        _rows_per_chunk(rows, chunk_bytes)  # told before a folder is made
        folder = Path(path).expanduser()
        wanted = {
            "format": FORMAT,
            "num_samples": num_samples,
            "num_classes": rows.num_classes,
            "top_k": rows.top_k,
            "dtype": rows.dtype,
            "temperature": rows.temperature,
            "fingerprint": dict(fingerprint),
        }
        cache = cls(folder, make_manifest(folder, wanted), chunk_bytes)
        remove_leftovers(folder)
        return cache

    @classmethod
    def open(cls, path: Path | str, *, fingerprint: Mapping[str, Any] | None) -> "TeacherCache":
        """Open a cache, to read it or to add rows.

        Args:
            path: its folder.
            fingerprint: facts that it must have been made with; None takes whatever is there, such
                as to look at it.

        Raises:
            TeacherCacheError: there is no cache, it is damaged, or of something else; every
                difference is named.
        """
        folder = Path(path).expanduser()
        manifest = read_manifest(folder)
        if fingerprint is not None:
            refuse_differences(folder, manifest["fingerprint"], fingerprint, "fingerprint.")
        return cls(folder, manifest, _CHUNK_BYTES)

    def __enter__(self) -> "TeacherCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()

    def __repr__(self) -> str:
        stored = "all classes" if self.rows.top_k is None else f"top {self.rows.top_k}"
        return (
            f"TeacherCache({self.folder}, {self.num_samples} samples, {self.rows.num_classes} "
            f"classes, {stored} in {self.rows.dtype}, {len(self._index)} files)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as a path, not as rows; what is not flushed stays here."""
        return _reopen, (self.folder,)

    def write(self, indices: Tensor, logits: Tensor, *, view: int) -> None:
        """Add the teacher's answers to a batch; they can be read after ``flush``.

        Leave out rows whose ``batch.mask`` is False. A row that is there already is written again,
        and takes space twice; see ``written``.

        Args:
            indices: [B] int64, 0 to N - 1.
            logits: [B, C] finite floats on any device.
            view: of the augmentation, from 0.

        Raises:
            ValueError: shapes, types or numbers do not fit.
            TeacherCacheError: no space is left on the disk. What is written stays valid, and the
                rest is kept, so that ``flush`` can be called again.
        """
        indices_B = self._check_indices(indices)
        if len(logits) != len(indices_B):
            raise ValueError(
                f"logits must have one row for each of {len(indices_B)} indices; got "
                f"{tuple(logits.shape)}."
            )
        keys_B = self._check_view(view) * self.num_samples + indices_B
        columns = self.rows.encode(logits)
        self._pending.append((keys_B, *columns))
        self._num_pending += len(keys_B)
        if self._num_pending >= self._chunk_rows:
            self._write_pending(self._chunk_rows)

    def flush(self) -> None:
        """Write what has been collected to the disk.

        Raises:
            TeacherCacheError: no space is left.
        """
        self._write_pending(1)

    def read(
        self, indices: Tensor, *, view: int, device: torch.device | str = "cpu"
    ) -> Tensor | TopKRows:
        """Return the teacher's answers to a batch.

        Args:
            indices: [B] int64, 0 to N - 1, any order; repeats are allowed.
            view: of the augmentation.
            device: where the answers go; they travel there as they are stored.

        Returns:
            Log-probabilities [B, C] float32, or with ``top_k`` the ``TopKRows`` that
            ``top_k_ikl_loss`` takes.

        Raises:
            TeacherCacheError: rows are missing, or a file is damaged; it is named.
            ValueError: the indices are no vector of int64 in range.
        """
        indices_B = self._check_indices(indices)
        where = self._index.view(self._check_view(view))
        found_B, there_B = where.find(indices_B)
        if not bool(there_B.all()) and self._index.refresh():
            where = self._index.view(view)
            found_B, there_B = where.find(indices_B)
        if not bool(there_B.all()):
            absent = sorted(set(indices_B[~there_B].tolist()))
            raise TeacherCacheError(
                f"the teacher cache in {self.folder} lacks {len(absent)} of the {len(indices_B)} "
                f"samples of view {view} in a batch, such as {str(absent[:_NAMED])[1:-1]}. Run the "
                f"teacher on what is missing, and flush, before students read it."
            )
        return self.rows.decode(where.gather(found_B, self.rows, self._index.checked), device)

    def written(self, indices: Tensor, *, view: int) -> Tensor:
        """Return which of these samples are on the disk, as of opening or the last own flush.

        Args:
            indices: [B] int64, 0 to N - 1.
            view: of the augmentation.

        Returns:
            [B] bool.
        """
        where = self._index.view(self._check_view(view))
        return where.find(self._check_indices(indices))[1]

    def missing(self, *, view: int) -> Tensor:
        """Return the samples of a view that no process has written to the disk, [M] int64."""
        self._index.refresh()
        everything = torch.ones(self.num_samples, dtype=torch.bool, device="cpu")
        everything[self._index.view(self._check_view(view)).samples_M] = False
        return everything.nonzero().flatten()

    def verify(self) -> int:
        """Read every file once through and compare its checksum.

        Returns:
            The number of files.

        Raises:
            TeacherCacheError: some are damaged; the first few are named.
        """
        self._index.refresh()
        problems = self._index.verify()
        if problems:
            raise TeacherCacheError(
                f"{len(problems)} of {len(self._index)} files of the teacher cache cannot be "
                f"used: {' '.join(problems[:_NAMED])}"
            )
        return len(self._index)

    def _write_pending(self, least: int) -> None:
        """Write files of at most a chunk's rows, while there are ``least`` rows."""
        if self._num_pending < least:
            return
        rest = tuple(torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = [rest]
        while self._num_pending >= least:
            keys_R, *columns = (part[: self._chunk_rows] for part in rest)
            name = write_chunk(
                self.folder, self._identity, self.num_samples, keys_R, tuple(columns)
            )
            self._index.add(name)
            rest = tuple(part[self._chunk_rows :] for part in rest)
            self._pending, self._num_pending = [rest], len(rest[0])

    def _check_view(self, view: int) -> int:
        number = operator.index(view)
        if not 0 <= number < _KEYS // self.num_samples:
            raise ValueError(
                f"view must be an integer in 0 to {_KEYS // self.num_samples - 1}; got {view}."
            )
        return number

    def _check_indices(self, indices: Tensor) -> Tensor:
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(
                f"indices must be a vector of int64; got {indices.dtype} of shape "
                f"{tuple(indices.shape)}."
            )
        indices_B = indices.cpu()
        if len(indices_B) and not 0 <= int(indices_B.min()) <= int(indices_B.max()) < (
            self.num_samples
        ):
            raise ValueError(
                f"indices must lie in 0 to {self.num_samples - 1}, samples of the teacher cache; "
                f"got {int(indices_B.min())} to {int(indices_B.max())}. Was it written for other "
                f"data?"
            )
        return indices_B


def estimate_bytes(
    *,
    num_samples: int,
    num_classes: int,
    num_views: int = 1,
    top_k: int | None = None,
    dtype: StoredDtype = "float16",
    chunk_bytes: int = _CHUNK_BYTES,
) -> int:
    """Return the size of a cache that one process writes in one go.

    Each further process, and each interruption, adds one file, less than 200 bytes.

    Args:
        num_samples: samples in each view.
        num_classes: C.
        num_views: such as the epochs, where each has an augmentation of its own.
        top_k: as for ``TeacherCache.create``.
        dtype: as for ``TeacherCache.create``.
        chunk_bytes: as for ``TeacherCache.create``.

    Returns:
        Bytes of all rows, without the manifest.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> estimate_bytes(num_samples=50000, num_classes=100, num_views=240) / 1e9  # CIFAR-100
        2.496019...
        >>> estimate_bytes(num_samples=1281167, num_classes=1000) / 1e9  # ImageNet, one view
        2.572602...
    """
    if num_samples < 1 or num_views < 1:
        raise ValueError(
            f"num_samples and num_views must be at least 1; got {num_samples} and {num_views}."
        )
    rows = RowFormat(num_classes, top_k, dtype)
    per_chunk = _rows_per_chunk(rows, chunk_bytes)
    full, rest = divmod(num_samples * num_views, per_chunk)
    return full * chunk_size(rows, per_chunk) + (chunk_size(rows, rest) if rest else 0)


def _rows_per_chunk(rows: RowFormat, chunk_bytes: int) -> int:
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive; got {chunk_bytes}.")
    return max(1, chunk_bytes // row_size(rows))


def _reopen(folder: Path) -> TeacherCache:
    return TeacherCache.open(folder, fingerprint=None)

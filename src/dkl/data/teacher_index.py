"""Which file of a teacher cache holds which row.

Legend: N samples, B batch, M rows of a view.
"""

import bisect
import itertools
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dkl.data.teacher_chunks import Chunk, TeacherCacheError, chunk_names, views_of
from dkl.data.teacher_rows import RowFormat

_File = tuple[tuple[int, int], str]
"""First and last view of a file, and its name."""

_INDEXED_VIEWS = 2  # kept in memory: the end of one epoch and the start of the next


class ViewIndex(NamedTuple):
    """Where the rows of one view are.

    Args:
        samples_M: [M] int64, ascending.
        owners_M: [M] int32, which of ``chunks`` has the row.
        rows_M: [M] int64, the row in it.
        chunks: mapped files.
    """

    samples_M: Tensor
    owners_M: Tensor
    rows_M: Tensor
    chunks: list[Chunk]

    def find(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position of each sample among the M, and whether it is there, both [B]."""
        if len(self.samples_M) == 0:
            return torch.zeros_like(indices_B), torch.zeros_like(indices_B, dtype=torch.bool)
        found_B = torch.searchsorted(self.samples_M, indices_B).clamp(max=len(self.samples_M) - 1)
        return found_B, self.samples_M[found_B] == indices_B

    def gather(self, found_B: Tensor, rows: RowFormat, checked: set[Path]) -> tuple[Tensor, ...]:
        """Copy rows, by position among the M, out of the files they are in, file by file.

        Raises:
            TeacherCacheError: one of these files is damaged; those in ``checked`` are trusted, and
                the others join them.
        """
        owners_B, rows_B = self.owners_M[found_B], self.rows_M[found_B]
        counts = torch.bincount(owners_B, minlength=len(self.chunks)).tolist()
        places = torch.split_with_sizes(torch.argsort(owners_B, stable=True), counts)
        columns = tuple(
            torch.empty((len(found_B), width), dtype=dtype, device="cpu")
            for dtype, width in rows.columns
        )
        for chunk, place in zip(self.chunks, places, strict=True):
            if len(place) == 0:
                continue
            if chunk.path not in checked:
                chunk.check_columns()
                checked.add(chunk.path)
            for column, stored in zip(columns, chunk.columns, strict=True):
                column[place] = stored[rows_B[place]]
        return columns


class ChunkIndex:
    """The files of a cache, by view.

    Args:
        folder: of the cache.
        rows: format of its rows.
        identity: 32 bytes that its files share.
        num_samples: N.

    Attributes:
        checked: files whose rows have been found sound.
    """

    def __init__(self, folder: Path, rows: RowFormat, identity: bytes, num_samples: int) -> None:
        self.checked: set[Path] = set()
        self._folder = folder
        self._rows = rows
        self._identity = identity
        self._num_samples = num_samples
        self._files: list[_File] = []
        self._mapped: WeakValueDictionary[str, Chunk] = WeakValueDictionary()
        self._views: OrderedDict[int, ViewIndex] = OrderedDict()
        self._take([])
        self.refresh()

    def __len__(self) -> int:
        return len(self._files)

    def refresh(self) -> bool:
        """Look which files there are now; return whether that has changed."""
        files = sorted((views_of(name) or (0, 0), name) for name in chunk_names(self._folder))
        if files == self._files:
            return False
        self._take(files)
        self._views.clear()
        return True

    def add(self, name: str) -> None:
        """Take up a file that has just been written."""
        file = (views_of(name) or (0, 0), name)
        bisect.insort(self._files, file)
        self._take(self._files)
        for view in [view for view in self._views if file[0][0] <= view <= file[0][1]]:
            del self._views[view]

    def view(self, view: int) -> ViewIndex:
        """Return where the rows of a view are.

        Raises:
            TeacherCacheError: a file is gone, damaged or another cache's.
        """
        if view not in self._views:
            self._views[view] = self._index(view)
        self._views.move_to_end(view)
        while len(self._views) > _INDEXED_VIEWS:
            self._views.popitem(last=False)
        return self._views[view]

    def verify(self) -> list[str]:
        """Read every file once through, and return what is wrong with any."""
        problems = []
        for _, name in self._files:
            try:
                self._mapped.pop(name, None)
                self._open(name).check_columns()
            except TeacherCacheError as error:
                problems.append(str(error))
        return problems

    def _take(self, files: list[_File]) -> None:
        self._files = files
        self._starts = [first for (first, _), _ in files]
        # The last view in any file up to each: none before the first that reaches a view has it.
        self._reached = list(itertools.accumulate((last for (_, last), _ in files), max))

    def _index(self, view: int) -> ViewIndex:
        """Find the rows of a view; of two that hold one sample, the first file's counts."""
        chunks = self._chunks_with(view)
        first = view * self._num_samples
        bounds = torch.tensor([first, first + self._num_samples], device="cpu")
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        samples, owners, rows = [none], [none.int()], [none]
        for number, chunk in enumerate(chunks):
            begin, end = torch.searchsorted(chunk.keys_R, bounds).tolist()
            samples.append(chunk.keys_R[begin:end] - first)
            owners.append(torch.full((end - begin,), number, dtype=torch.int32, device="cpu"))
            rows.append(torch.arange(begin, end, device="cpu"))
        samples_M, order_M = torch.sort(torch.cat(samples), stable=True)
        is_first_M = torch.ones(len(samples_M), dtype=torch.bool, device="cpu")
        is_first_M[1:] = samples_M[1:] != samples_M[:-1]
        kept_M = order_M[is_first_M]
        return ViewIndex(
            samples_M[is_first_M], torch.cat(owners)[kept_M], torch.cat(rows)[kept_M], chunks
        )

    def _chunks_with(self, view: int) -> list[Chunk]:
        begin = bisect.bisect_left(self._reached, view)
        end = bisect.bisect_right(self._starts, view)
        return [self._open(name) for (_, last), name in self._files[begin:end] if last >= view]

    def _open(self, name: str) -> Chunk:
        """Map a file; one that no view in memory uses any more is unmapped by itself."""
        chunk = self._mapped.get(name)
        if chunk is None:
            chunk = Chunk(self._folder / name, self._rows, self._identity, self._num_samples)
            self._mapped[name] = chunk
        return chunk

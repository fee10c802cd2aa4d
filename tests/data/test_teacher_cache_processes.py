"""TeacherCache with killed writers, several processes, a full disk, and more rows than memory."""

import errno
import io
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.data import TeacherCache, TeacherCacheError

N, C, VIEWS = 400, 50, 3
FACTS = {"teacher": "t", "data": "d"}
linux_only = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")


def teacher(view: int) -> Tensor:
    return 5 * torch.randn(N, C, generator=torch.Generator().manual_seed(view))


def create(folder: Path, **options: Any) -> TeacherCache:
    settings = {"chunk_bytes": 2000, "dtype": "float32", "fingerprint": FACTS, **options}
    return TeacherCache.create(folder, num_samples=N, num_classes=C, **settings)


def write_missing(cache: TeacherCache, part: int = 0, parts: int = 1, pause: float = 0.0) -> None:
    """Write what a process's part of the samples still lacks, as a resumed command would."""
    for view in range(VIEWS):
        logits = teacher(view)
        mine = cache.missing(view=view)
        for indices in mine[mine % parts == part].split(7):
            cache.write(indices, logits[indices], view=view)
            time.sleep(pause)
    cache.flush()


def check_whole(folder: Path) -> None:
    cache = TeacherCache.open(folder, fingerprint=FACTS)
    for view in range(VIEWS):
        assert torch.equal(cache.read(torch.arange(N), view=view), teacher(view).log_softmax(1))  # type: ignore[arg-type]


def num_files(folder: Path) -> int:
    return len(list(folder.glob("[0-9]*.rows")))


def fork(work: Any, *arguments: Any, **options: Any) -> int:
    """Run a function in a child process, and return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(*arguments, **options)
        code = 0
    finally:
        os._exit(code)


def test_a_writer_that_is_killed_again_and_again_gets_there(tmp_path: Path) -> None:
    dice = random.Random(0)
    create(tmp_path)
    missing = VIEWS * N
    for _ in range(8):
        before = num_files(tmp_path)
        child = fork(lambda: write_missing(create(tmp_path), pause=0.001))
        while num_files(tmp_path) == before:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        cache = create(tmp_path)
        assert cache.verify() > before
        left = sum(len(cache.missing(view=view)) for view in range(VIEWS))
        assert 0 < left < missing  # what was there once stays
        missing = left
        for view in range(VIEWS):
            written = cache.written(torch.arange(N), view=view).nonzero().flatten()
            rows = cache.read(written, view=view)
            assert torch.equal(rows, teacher(view)[written].log_softmax(1))  # type: ignore[arg-type]
    write_missing(create(tmp_path))
    check_whole(tmp_path)


def test_a_process_killed_while_it_writes_a_file_leaves_none(tmp_path: Path) -> None:
    create(tmp_path)

    def killed_at_the_end_of_a_file() -> None:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_missing(create(tmp_path))

    _, status = os.waitpid(fork(killed_at_the_end_of_a_file), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-*.rows"))) == 1
    assert list(tmp_path.glob("[0-9]*.rows")) == []
    cache = create(tmp_path)
    assert len(cache.missing(view=0)) == N
    write_missing(cache)
    check_whole(tmp_path)


def test_several_processes_write_one_cache_from_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def work(part: int) -> None:
        write_missing(create(folder), part, 4, pause=0.0005)

    children = [fork(work, part) for part in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    check_whole(folder)
    cache = TeacherCache.open(folder, fingerprint=FACTS)
    assert [len(cache.missing(view=view)) for view in range(VIEWS)] == [0] * VIEWS
    assert cache.verify() > 4


def test_readers_run_beside_a_writer(tmp_path: Path) -> None:
    create(tmp_path)
    done = tmp_path.parent / "done"

    def read() -> None:
        cache = TeacherCache.open(tmp_path, fingerprint=FACTS)
        seen = 0
        while True:
            last = done.exists()
            for view in range(VIEWS):
                missing = cache.missing(view=view)
                there = torch.ones(N, dtype=torch.bool)
                there[missing] = False
                indices = there.nonzero().flatten()
                rows = cache.read(indices, view=view)
                assert torch.equal(rows, teacher(view)[indices].log_softmax(1))  # type: ignore[arg-type]
                seen += 0 < len(indices) < N
            if last:
                break
        assert seen

    readers = [fork(read) for _ in range(2)]
    write_missing(create(tmp_path), pause=0.001)
    done.touch()
    assert [os.waitpid(child, 0)[1] for child in readers] == [0, 0]


def test_a_spawned_process_reads_what_this_one_wrote(tmp_path: Path) -> None:
    write_missing(create(tmp_path))
    code = (
        "import sys, torch\n"
        "from dkl.data import TeacherCache\n"
        "cache = TeacherCache.open(sys.argv[1], fingerprint={'teacher': 't', 'data': 'd'})\n"
        "print(float(cache.read(torch.arange(400), view=1).double().sum()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) == float(teacher(1).log_softmax(1).double().sum())


@linux_only
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    whole = create(tmp_path / "probe", chunk_bytes=20000)
    write_missing(whole)
    size = max(path.stat().st_size for path in (tmp_path / "probe").glob("[0-9]*.rows"))
    folder = tmp_path / "cache"

    def work() -> None:
        cache = create(folder, chunk_bytes=20000)
        cache.write(torch.arange(10), teacher(0)[:10], view=0)
        cache.flush()
        # A file size limit fails in the middle of a write, as a full disk does.
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, old[1]))
        with pytest.raises(TeacherCacheError, match=r"no space is left .* What is there is valid"):
            cache.write(torch.arange(10, N), teacher(0)[10:], view=0)
        assert list(folder.glob(".tmp-*")) == []
        assert len(TeacherCache.open(folder, fingerprint=FACTS).missing(view=0)) == N - 10
        assert cache.verify() == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        cache.flush()  # there is room again
        assert cache.missing(view=0).tolist() == []
        write_missing(cache)

    assert os.waitpid(fork(work), 0)[1] == 0
    check_whole(folder)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, TeacherCacheError), (errno.EIO, OSError)]
)
def test_other_errors_are_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    cache = create(tmp_path)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(kind, match=os.strerror(number)):
            write_missing(cache)
    assert list(tmp_path.glob(".tmp-*")) == []
    cache.flush()
    write_missing(cache)
    check_whole(tmp_path)


def mapped_kilobytes(folder: Path) -> tuple[int, int]:
    """Return size and resident part of this process's maps of files in a folder."""
    size = resident = 0
    ours = False
    for line in io.StringIO(Path("/proc/self/smaps").read_text()):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Size:"):
            size += int(line.split()[1])
        elif ours and line.startswith("Rss:"):
            resident += int(line.split()[1])
    return size, resident


@linux_only
def test_reading_some_rows_loads_some_pages(tmp_path: Path) -> None:
    num_samples, num_classes = 16000, 1000
    facts = {"teacher": "large"}
    with TeacherCache.create(
        tmp_path, num_samples=num_samples, num_classes=num_classes, fingerprint=facts
    ) as writer:
        for indices in torch.arange(num_samples).split(1000):
            writer.write(indices, indices[:, None] + torch.arange(num_classes) * 0.01, view=0)
    del writer
    cache = TeacherCache.open(tmp_path, fingerprint=facts)
    assert mapped_kilobytes(tmp_path) == (0, 0)
    wanted = torch.tensor([0, num_samples - 1])
    rows = cache.read(wanted, view=0)
    size, resident = mapped_kilobytes(tmp_path)
    assert size > 31000  # kilobytes: all is mapped
    # Keys and two rows; how much comes along with a touched page is the system's choice.
    assert 0 < resident < size / 4
    expected = (torch.arange(num_classes) * 0.01).log_softmax(0)
    assert torch.allclose(rows, expected.expand(2, -1), rtol=1e-3)  # type: ignore[arg-type]
    open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not any(str(tmp_path) in one for one in open_files)
    del cache
    assert mapped_kilobytes(tmp_path) == (0, 0)


def test_only_the_views_in_use_stay_in_memory(tmp_path: Path) -> None:
    write_missing(create(tmp_path))
    cache = TeacherCache.open(tmp_path, fingerprint=FACTS)
    for view in range(VIEWS):
        cache.read(torch.tensor([3]), view=view)
    assert list(cache._index._views) == [1, 2]
    used = {chunk.path for one in cache._index._views.values() for chunk in one.chunks}
    assert {chunk.path for chunk in cache._index._mapped.values()} == used
    assert len(used) < len(cache._index)

"""TeacherCache: what is stored, to which precision, and what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dkl import ikl_loss, top_k_ikl_loss
from dkl.data import TeacherCache, TeacherCacheError, TopKRows
from dkl.data.teacher_cache import estimate_bytes
from dkl.data.teacher_rows import RowFormat

N, C = 60, 7
FACTS: dict[str, Any] = {
    "teacher": "4f" * 32,
    "data": "9a" * 32,
    "augmentation": {"name": "basic", "seed": 0},
}


def teacher(view: int, num_classes: int = C, scale: float = 6.0) -> Tensor:
    """Return the logits [N, C] of a teacher on one view."""
    generator = torch.Generator().manual_seed(view)
    return scale * torch.randn(N, num_classes, generator=generator)


def create(folder: Path, **options: Any) -> TeacherCache:
    settings = {"num_samples": N, "num_classes": C, "fingerprint": FACTS, **options}
    return TeacherCache.create(folder, **settings)


def fill(cache: TeacherCache, views: range, num_classes: int = C, batch: int = 13) -> None:
    for view in views:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(100 + view))
        for indices in order.split(batch):
            cache.write(indices, teacher(view, num_classes)[indices], view=view)
    cache.flush()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.rows"))


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1000, 1 << 20])
def test_every_row_comes_back(tmp_path: Path, chunk_bytes: int) -> None:
    cache = create(tmp_path, dtype="float32", chunk_bytes=chunk_bytes)
    fill(cache, range(3))
    for reader in (cache, TeacherCache.open(tmp_path, fingerprint=FACTS)):
        for view in (2, 0, 1, 2):
            indices = torch.randint(0, N, (90,), generator=torch.Generator().manual_seed(view))
            rows = reader.read(indices, view=view)
            assert isinstance(rows, Tensor)
            assert torch.equal(rows, teacher(view)[indices].log_softmax(1))
            assert reader.missing(view=view).tolist() == []
    assert cache.verify() == len(files(tmp_path)) > 0


def test_a_batch_may_be_empty(tmp_path: Path) -> None:
    cache = create(tmp_path)
    none = torch.empty(0, dtype=torch.int64)
    cache.write(none, torch.empty(0, C), view=0)
    cache.flush()
    assert files(tmp_path) == []
    rows = cache.read(none, view=0)
    assert isinstance(rows, Tensor)
    assert tuple(rows.shape) == (0, C)


def test_steps_can_be_views(tmp_path: Path) -> None:
    # A sample may come again in another step, and a step holds few of the samples.
    steps = [torch.tensor([5, 9, 2]), torch.tensor([9, 30]), torch.tensor([5])]
    with create(tmp_path, chunk_bytes=100, dtype="float32") as cache:
        for step, indices in enumerate(steps):
            cache.write(indices, teacher(step)[indices], view=10**9 + step)
    reader = TeacherCache.open(tmp_path, fingerprint=FACTS)
    for step, indices in enumerate(steps):
        rows = reader.read(indices.flip(0), view=10**9 + step)
        assert torch.equal(rows, teacher(step)[indices.flip(0)].log_softmax(1))
        written = reader.written(torch.arange(N), view=10**9 + step)
        assert written.nonzero().flatten().tolist() == sorted(indices.tolist())
    assert len(files(tmp_path)) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_every_precision_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = create(tmp_path)
    logits = teacher(0).to(dtype)
    cache.write(torch.arange(N), logits.requires_grad_(), view=0)
    cache.flush()
    rows = cache.read(torch.arange(N), view=0)
    assert isinstance(rows, Tensor)
    assert (rows.dtype, rows.requires_grad) == (torch.float32, False)
    assert torch.allclose(rows, logits.detach().float().log_softmax(1), rtol=2**-10, atol=1e-6)


def test_the_stated_precision_of_float16_holds() -> None:
    # Log-probabilities of all sizes, in float32 as they come out of the softmax.
    sizes = torch.cat([torch.logspace(-12, 4.8, 40001), torch.linspace(0.9, 1.1, 10001)])
    stored = -torch.stack([sizes, sizes.flip(0)], 1)
    rounded = RowFormat(2)._rounded(stored).double()
    exact = stored.double()
    error = (rounded - exact).abs()
    bound = torch.maximum(2.0**-11 * exact.abs(), torch.tensor(2.0**-25))
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.99  # it is reached: the bound is not a loose one
    of_probability = float((rounded.exp() - exact.exp()).abs().max())
    assert 1.7e-4 < of_probability <= 1.8e-4


def test_what_float16_cannot_hold_is_as_far_as_it_reaches() -> None:
    logits = torch.tensor([[0.0, -7e4, -1e30], [3e38, 0.0, -3e38]])
    rows = RowFormat(3).decode(RowFormat(3).encode(logits))
    assert isinstance(rows, Tensor)
    assert rows.tolist() == [[0.0, -65504.0, -65504.0], [0.0, -65504.0, -65504.0]]
    assert torch.equal(rows.exp(), torch.tensor([[1.0, 0.0, 0.0]] * 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 4.0, "mse_weight": 8.0},
        {"weight_temperature": 100.0, "mse_weight": 12.0},
        {"gamma": 0.3, "normalization": "weights"},
    ],
)
def test_the_loss_and_its_gradient_are_those_of_the_live_teacher(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    cache = create(tmp_path, num_classes=100)
    fill(cache, range(1), num_classes=100)
    rows = cache.read(torch.arange(N), view=0)
    assert isinstance(rows, Tensor)

    def loss_and_gradient(target: Tensor) -> tuple[Tensor, Tensor]:
        student = (teacher(1, 100, 2.0)).requires_grad_()
        loss = ikl_loss(student, target, **options)
        loss.backward()
        assert student.grad is not None
        return loss.detach(), student.grad

    live, live_gradient = loss_and_gradient(teacher(0, 100))
    cached, cached_gradient = loss_and_gradient(rows)
    assert float((cached / live - 1).abs()) < 1e-3
    assert float((cached_gradient - live_gradient).norm() / live_gradient.norm()) < 1e-3


@pytest.mark.parametrize("num_classes", [7, 40000, 70000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_top_classes_and_the_rest(tmp_path: Path, num_classes: int, dtype: str) -> None:
    cache = create(tmp_path, num_classes=num_classes, top_k=5, dtype=dtype, temperature=2.0)
    logits = teacher(0, num_classes)[:8].double()
    cache.write(torch.arange(8), logits, view=3)
    cache.flush()
    rows = TeacherCache.open(tmp_path, fingerprint=FACTS).read(torch.arange(8), view=3)
    assert isinstance(rows, TopKRows)
    probs = (logits / 2).softmax(1)
    listed = probs.gather(1, rows.indices)
    assert torch.equal(rows.indices, probs.topk(5, 1).indices)
    tail = probs.scatter(1, rows.indices, 0.0).sum(1)
    tolerance = 2e-4 if dtype == "float16" else 1e-6
    assert torch.allclose(rows.log_probs.double().exp(), listed, atol=tolerance, rtol=0)
    assert torch.allclose(rows.tail_log_prob.double().exp(), tail, atol=tolerance, rtol=0)
    assert [(one.dtype, tuple(one.shape)) for one in rows] == [
        (torch.float32, (8, 5)),
        (torch.int64, (8, 5)),
        (torch.float32, (8,)),
    ]


@pytest.mark.parametrize("top_k", [1, 4, C])
def test_the_top_k_loss_takes_what_is_read(tmp_path: Path, top_k: int) -> None:
    cache = create(tmp_path, top_k=top_k, temperature=4.0)
    fill(cache, range(1))
    rows = cache.read(torch.arange(N), view=0)
    assert isinstance(rows, TopKRows)
    student = teacher(1)
    loss = top_k_ikl_loss(
        student,
        rows.log_probs,
        rows.indices,
        target_tail_log_prob=rows.tail_log_prob,
        temperature=4.0,
    )
    exact = (teacher(0) / 4).log_softmax(1).topk(top_k)
    expected = top_k_ikl_loss(student, exact.values, exact.indices, temperature=4.0)
    assert float((loss / expected - 1).abs()) < 2e-3
    if top_k == C:
        dense = ikl_loss(student, teacher(0), temperature=4.0)
        assert float((loss / dense - 1).abs()) < 2e-3
        assert bool(rows.tail_log_prob.isneginf().all())


def test_a_confident_teachers_rest_is_not_lost_to_cancellation(tmp_path: Path) -> None:
    logits = torch.tensor([[100.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0]])
    rows = RowFormat(C, top_k=1).decode(RowFormat(C, top_k=1).encode(logits))
    assert isinstance(rows, TopKRows)
    expected = logits.double()[:, 1:].logsumexp(1) - logits.double().logsumexp(1)
    assert float((rows.tail_log_prob.double() / expected - 1).abs()) <= 2**-11


def test_what_is_missing_is_known_and_told(tmp_path: Path) -> None:
    cache = create(tmp_path)
    cache.write(torch.tensor([4, 7]), teacher(0)[[4, 7]], view=2)
    with pytest.raises(TeacherCacheError, match=r"lacks 1 of the 1 samples of view 2.*such as 4"):
        cache.read(torch.tensor([4]), view=2)  # not flushed yet
    cache.flush()
    assert cache.missing(view=2).tolist() == [n for n in range(N) if n not in (4, 7)]
    assert cache.missing(view=0).tolist() == list(range(N))
    assert cache.written(torch.tensor([7, 8, 4]), view=2).tolist() == [True, False, True]
    with pytest.raises(TeacherCacheError) as caught:
        cache.read(torch.tensor([4, 9, 1, 9, 30, 2]), view=2)
    assert "lacks 4 of the 6 samples of view 2 in a batch, such as 1, 2, 9." in str(caught.value)


def test_a_reader_finds_what_was_added_since_it_opened(tmp_path: Path) -> None:
    writer = create(tmp_path, dtype="float32")
    reader = TeacherCache.open(tmp_path, fingerprint=FACTS)
    for part in torch.arange(N).split(20):
        writer.write(part, teacher(0)[part], view=0)
        writer.flush()
        assert torch.equal(reader.read(part, view=0), teacher(0)[part].log_softmax(1))  # type: ignore[arg-type]
    assert reader.missing(view=0).tolist() == []


def test_a_row_written_twice_counts_once(tmp_path: Path) -> None:
    cache = create(tmp_path, dtype="float32")
    for _ in range(2):
        cache.write(torch.tensor([3, 3, 5]), teacher(0)[[3, 3, 5]], view=0)
        cache.flush()
    rows = cache.read(torch.tensor([5, 3]), view=0)
    assert torch.equal(rows, teacher(0)[[5, 3]].log_softmax(1))  # type: ignore[arg-type]
    assert len(cache.missing(view=0)) == N - 2


def test_going_on_with_a_cache_needs_the_same_facts(tmp_path: Path) -> None:
    fill(create(tmp_path, dtype="float32"), range(1))
    again = create(tmp_path, dtype="float32", chunk_bytes=300)
    fill(again, range(1, 2))
    assert [len(again.missing(view=view)) for view in range(3)] == [0, 0, N]
    assert TeacherCache.open(tmp_path, fingerprint=None).missing(view=1).tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 61}, "num_samples is 60 there and 61 here"),
        ({"top_k": 3}, "top_k is null there and 3 here"),
        ({"dtype": "float32"}, 'dtype is "float16" there and "float32" here'),
        ({"num_classes": 8}, "num_classes is 7 there and 8 here"),
        (
            {"fingerprint": {**FACTS, "data": "other"}},
            r'data is "9a9a.*\.\.\. there and "other" here',
        ),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fill(create(tmp_path), range(1))
    before = files(tmp_path)
    with pytest.raises(TeacherCacheError, match=message):
        create(tmp_path, **change)
    assert files(tmp_path) == before


def test_every_difference_of_a_fingerprint_is_named(tmp_path: Path) -> None:
    create(tmp_path)
    changed = {"teacher": "ab", "augmentation": {"name": "basic", "seed": 1}, "more": True}
    with pytest.raises(TeacherCacheError) as caught:
        TeacherCache.open(tmp_path, fingerprint=changed)
    for part in (
        "fingerprint.augmentation.seed is 0 there and 1 here",
        'fingerprint.data is "9a9a9a9a9a9',
        "there and nothing here",
        "fingerprint.more is nothing there and true here",
        "Its log-probabilities would be wrong here",
    ):
        assert part in str(caught.value)
    assert "augmentation.name" not in str(caught.value)
    with pytest.raises(ValueError, match="fingerprint must be made of texts"):
        create(tmp_path / "new", fingerprint={"model": object()})
    with pytest.raises(ValueError, match="fingerprint must be made of texts"):
        create(tmp_path / "new", fingerprint={"eps": float("nan")})
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherCacheError, match="holds no teacher cache"):
        TeacherCache.open(tmp_path, fingerprint=None)
    (tmp_path / "photo.png").touch()
    with pytest.raises(TeacherCacheError, match=r"holds photo\.png: it is no teacher cache"):
        create(tmp_path)
    with pytest.raises(TeacherCacheError, match="is a file"):
        create(tmp_path / "photo.png")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}'])
def test_a_damaged_manifest_is_told(tmp_path: Path, content: str) -> None:
    create(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(TeacherCacheError, match=r"manifest.json (cannot be read|is not of format)"):
        TeacherCache.open(tmp_path, fingerprint=FACTS)
    with pytest.raises(TeacherCacheError, match=r"manifest.json (cannot be read|is not of format)"):
        create(tmp_path)


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    fill(create(tmp_path, top_k=2), range(1))
    (path,) = files(tmp_path)
    sound = path.read_bytes()
    meaningful = [place for place in range(len(sound)) if not 56 <= place < 64]  # header's padding
    step = max(1, len(meaningful) // 150)
    for place in [*range(56), *meaningful[56::step], len(sound) - 1]:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
        with pytest.raises(TeacherCacheError, match=r"\.rows (is damaged|was written for)"):
            TeacherCache.open(tmp_path, fingerprint=FACTS).read(torch.arange(N), view=0)
        with pytest.raises(TeacherCacheError, match="1 of 1 files of the teacher cache cannot"):
            TeacherCache.open(tmp_path, fingerprint=FACTS).verify()
    for length in (0, 10, 63, 64, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(TeacherCacheError, match=r"\.rows is damaged"):
            TeacherCache.open(tmp_path, fingerprint=FACTS).missing(view=0)
    path.write_bytes(sound + b"\0")
    with pytest.raises(TeacherCacheError, match="not the size of 60 rows"):
        TeacherCache.open(tmp_path, fingerprint=FACTS).verify()


def test_a_damaged_file_can_be_deleted_and_its_rows_written_again(tmp_path: Path) -> None:
    fill(create(tmp_path, chunk_bytes=300, dtype="float32"), range(2))
    victim = files(tmp_path)[1]
    content = bytearray(victim.read_bytes())
    content[-9] ^= 1
    victim.write_bytes(content)
    cache = TeacherCache.open(tmp_path, fingerprint=FACTS)
    with pytest.raises(TeacherCacheError, match=f"{victim.name} is damaged.*Delete this file"):
        cache.verify()
    victim.unlink()
    gone = {view: cache.missing(view=view) for view in range(2)}
    assert sum(len(one) for one in gone.values()) > 0
    for view, indices in gone.items():
        cache.write(indices, teacher(view)[indices], view=view)
    cache.flush()
    for view in range(2):
        rows = cache.read(torch.arange(N), view=view)
        assert torch.equal(rows, teacher(view).log_softmax(1))  # type: ignore[arg-type]


def test_files_of_another_cache_and_renamed_files_are_refused(tmp_path: Path) -> None:
    fill(create(tmp_path / "a"), range(1))
    fill(create(tmp_path / "b", fingerprint={"teacher": "other"}), range(1))
    (path,) = files(tmp_path / "b")
    moved = path.rename(tmp_path / "a" / path.name)
    with pytest.raises(TeacherCacheError, match="written for another teacher cache"):
        TeacherCache.open(tmp_path / "a", fingerprint=FACTS).read(torch.tensor([0]), view=0)
    moved.unlink()
    (path,) = files(tmp_path / "a")
    path.rename(path.with_name(path.name.replace("0-0", "0-4", 1)))
    with pytest.raises(TeacherCacheError, match="holds views 0 to 0, unlike its name"):
        TeacherCache.open(tmp_path / "a", fingerprint=FACTS).missing(view=3)


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    fill(create(tmp_path), range(1))
    reader = TeacherCache.open(tmp_path, fingerprint=FACTS)
    files(tmp_path)[0].unlink()
    with pytest.raises(TeacherCacheError, match="is gone; open the teacher cache again"):
        reader.read(torch.tensor([0]), view=0)


def test_leftovers_are_ignored_and_old_ones_removed(tmp_path: Path) -> None:
    fill(create(tmp_path), range(1))
    young, old = tmp_path / ".tmp-0-0-young.rows", tmp_path / ".tmp-0-0-old.rows"
    for path in (young, old):
        path.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    cache = create(tmp_path)
    assert (cache.verify(), young.exists(), old.exists()) == (1, True, False)
    (tmp_path / "manifest.json").unlink()
    files(tmp_path)[0].unlink()
    create(tmp_path)  # leftovers alone do not make a folder one of something else


@pytest.mark.parametrize(
    ("indices", "logits", "view", "message"),
    [
        (torch.tensor([0]), torch.zeros(2, C), 0, "one row for each of 1 indices"),
        (torch.tensor([0]), torch.zeros(1, C + 1), 0, r"shape \[B, 7\].*got \(1, 8\)"),
        (torch.tensor([0]), torch.zeros(1, C, dtype=torch.int64), 0, "floating-point; got"),
        (torch.tensor([0]), torch.full((1, C), torch.nan), 0, "logits must be finite"),
        (torch.tensor([0]), torch.full((1, C), -torch.inf), 0, "logits must be finite"),
        (torch.tensor([N]), torch.zeros(1, C), 0, r"0 to 59.*got 60 to 60"),
        (torch.tensor([-1]), torch.zeros(1, C), 0, "got -1 to -1"),
        (torch.tensor([0.0]), torch.zeros(1, C), 0, "vector of int64; got torch.float32"),
        (torch.tensor([0]), torch.zeros(1, C), -1, "view must be an integer in 0 to"),
        (torch.tensor([0]), torch.zeros(1, C), 1 << 60, "view must be an integer in 0 to"),
    ],
)
def test_bad_rows_are_explained_and_not_kept(
    tmp_path: Path, indices: Tensor, logits: Tensor, view: int, message: str
) -> None:
    cache = create(tmp_path)
    with pytest.raises(ValueError, match=message):
        cache.write(indices, logits, view=view)
    cache.flush()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"top_k": 0}, "top_k must lie in 1 to 7"),
        ({"top_k": 8}, "top_k must lie in 1 to 7"),
        ({"dtype": "int8"}, "one of float16, float32; got 'int8'"),
        ({"temperature": 4.0}, "temperature belongs to top_k"),
        ({"temperature": 0.0, "top_k": 2}, "temperature must be positive"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
    ],
)
def test_bad_settings_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("chunk_bytes", [100, 1000, 1 << 20])
def test_the_estimate_is_what_the_files_take(
    tmp_path: Path, top_k: int | None, dtype: Any, chunk_bytes: int
) -> None:
    options: dict[str, Any] = {"top_k": top_k, "dtype": dtype, "chunk_bytes": chunk_bytes}
    fill(create(tmp_path, **options), range(3))
    taken = sum(path.stat().st_size for path in files(tmp_path))
    assert taken == estimate_bytes(num_samples=N, num_classes=C, num_views=3, **options)


def test_an_exception_leaves_what_is_on_the_disk(tmp_path: Path) -> None:
    def interrupted() -> None:
        with create(tmp_path, chunk_bytes=200) as cache:
            cache.write(torch.arange(N), teacher(0), view=0)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    left = TeacherCache.open(tmp_path, fingerprint=FACTS)
    assert 0 < len(left.missing(view=0)) < N
    assert left.verify() == len(files(tmp_path))


def test_it_travels_to_other_processes_as_a_path(tmp_path: Path) -> None:
    cache = create(tmp_path, dtype="float32")
    fill(cache, range(1))
    data = pickle.dumps(cache)
    assert len(data) < 500
    there = pickle.loads(data)
    assert torch.equal(there.read(torch.arange(N), view=0), teacher(0).log_softmax(1))


def test_the_manifest_tells_people_what_is_there(tmp_path: Path) -> None:
    cache = create(tmp_path, top_k=2, temperature=4)
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert told["fingerprint"] == FACTS
    assert (told["num_samples"], told["top_k"], told["temperature"]) == (N, 2, 4.0)
    assert f"{tmp_path}, 60 samples, 7 classes, top 2 in float16, 0 files" in repr(cache)

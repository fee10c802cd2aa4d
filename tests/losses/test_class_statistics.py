"""The class table in one process: what is collected, what is kept, what is refused."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dkl.losses import ClassStatistics, ikl_loss

NUM_CLASSES = 5


def random_batch(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_samples, NUM_CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(NUM_CLASSES, (num_samples,), generator=generator)


def mean_table(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the table by its definition, class by class; classes without samples are uniform."""
    probs = (logits.double() / temperature).softmax(1)
    rows = [
        probs[labels == y].mean(0) if (labels == y).any() else torch.full_like(probs[0], 0.2)
        for y in range(NUM_CLASSES)
    ]
    return torch.stack(rows)


def double_statistics(temperature: float = 1.0) -> ClassStatistics:
    return ClassStatistics(NUM_CLASSES, temperature, dtype=torch.float64)


def test_uniform_at_first() -> None:
    statistics = ClassStatistics(4)
    assert torch.equal(statistics.table, torch.full((4, 4), 0.25))
    statistics.commit()
    assert torch.equal(statistics.table, torch.full((4, 4), 0.25))
    assert ClassStatistics(1).table.tolist() == [[1.0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_table_is_the_mean_prediction_of_every_class(temperature: float) -> None:
    logits, labels = random_batch(200)
    statistics = double_statistics(temperature)
    statistics.update(logits, labels)
    assert torch.equal(statistics.table, torch.full_like(statistics.table, 0.2))
    statistics.commit()
    expected = mean_table(logits, labels, temperature)
    torch.testing.assert_close(statistics.table, expected, rtol=1e-14, atol=1e-16)


def test_chunks_equal_the_whole() -> None:
    logits, labels = random_batch(200)
    whole, chunked = double_statistics(), double_statistics()
    whole.update(logits, labels)
    for part in (slice(0, 7), slice(7, 7), slice(7, 150), slice(150, 200)):
        chunked.update(logits[part], labels[part])
    whole.commit()
    chunked.commit()
    torch.testing.assert_close(chunked.table, whole.table, rtol=1e-14, atol=0)


def test_commit_starts_anew() -> None:
    first, second = random_batch(50, seed=1), random_batch(50, seed=2)
    statistics = double_statistics()
    statistics.update(*first)
    statistics.commit()
    assert not statistics.sums.any()
    assert not statistics.counts.any()
    statistics.update(*second)
    statistics.commit()
    torch.testing.assert_close(statistics.table, mean_table(*second))


def test_classes_without_samples_keep_their_row() -> None:
    statistics = double_statistics()
    statistics.update(*random_batch(100))
    statistics.commit()
    before = statistics.table.clone()
    logits, _ = random_batch(6, seed=3)
    labels = torch.tensor([0, 0, 3, 3, 3, 0])
    statistics.update(logits, labels)
    statistics.commit(momentum=0.5)
    assert torch.equal(statistics.table[[1, 2, 4]], before[[1, 2, 4]])
    expected = 0.5 * before + 0.5 * mean_table(logits, labels)
    torch.testing.assert_close(statistics.table[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99])
def test_momentum_is_the_share_of_the_old_table(momentum: float) -> None:
    logits, labels = random_batch(100)
    statistics = double_statistics()
    statistics.update(logits, labels)
    statistics.commit(momentum)
    expected = momentum * 0.2 + (1 - momentum) * mean_table(logits, labels)
    torch.testing.assert_close(statistics.table, expected)
    torch.testing.assert_close(statistics.table.sum(1), torch.ones(5).double())


def test_soft_labels_weigh_the_predictions() -> None:
    logits, labels = random_batch(40)
    _, others = random_batch(40, seed=7)
    share = torch.linspace(0.1, 1, 40, dtype=torch.float64)[:, None]
    eye = torch.eye(NUM_CLASSES, dtype=torch.float64)
    soft = share * eye[labels] + (1 - share) * eye[others]
    statistics = double_statistics()
    statistics.update(logits, soft)
    statistics.commit()
    expected = (soft.t() @ logits.softmax(1)) / soft.sum(0)[:, None]
    torch.testing.assert_close(statistics.table, expected)


def test_one_hot_soft_labels_equal_hard_ones() -> None:
    logits, labels = random_batch(40)
    hard, soft = double_statistics(), double_statistics()
    hard.update(logits, labels)
    soft.update(logits, torch.eye(NUM_CLASSES)[labels])
    torch.testing.assert_close(soft.sums, hard.sums)
    torch.testing.assert_close(soft.counts, hard.counts)


@pytest.mark.parametrize("soft", [False, True])
def test_samples_that_do_not_count(soft: bool) -> None:
    logits, labels = random_batch(9)
    expected = double_statistics()
    eye = torch.eye(NUM_CLASSES, dtype=torch.float64)
    expected.update(logits[:4], eye[labels[:4]] if soft else labels[:4])
    logits[4, 0], logits[5, 1], logits[6, 2] = float("nan"), float("inf"), -float("inf")
    mask = torch.ones(9, dtype=torch.bool)
    mask[7] = False
    if soft:
        given = eye[labels]
        given[7] = float("nan")  # masked out
        given[8, 3] = float("inf")
    else:
        given = labels.clone()
        given[7] = 99  # masked out
        given[8] = -100
    statistics = double_statistics()
    statistics.update(logits, given, mask=mask)
    torch.testing.assert_close(statistics.sums, expected.sums, rtol=1e-14, atol=0)
    assert torch.equal(statistics.counts, expected.counts)


def test_logits_that_overflow_the_buffers_are_skipped() -> None:
    statistics = ClassStatistics(2)
    logits = torch.tensor([[1e300, 0.0], [1.0, 1.0]], dtype=torch.float64)
    statistics.update(logits, torch.tensor([0, 1]))
    assert statistics.counts.tolist() == [0, 1]
    assert statistics.sums.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(3, 160), torch.tensor([0, 120, 4 if dtype == torch.int8 else 156])
    expected, ours = ClassStatistics(160), ClassStatistics(160)
    expected.update(logits, labels)
    ours.update(logits, labels.to(dtype))
    assert ours.counts.sum() == 3  # in uint8, 156 is what -100 wraps to
    assert torch.equal(ours.sums, expected.sums)
    assert torch.equal(ours.rows(labels.to(dtype)), ours.rows(labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float32_sums_of_lower_precision_logits(dtype: torch.dtype) -> None:
    logits, labels = random_batch(3000)
    statistics = ClassStatistics(NUM_CLASSES)
    statistics.update(logits.to(dtype), labels)
    statistics.commit()
    expected = mean_table(logits.to(dtype), labels)
    torch.testing.assert_close(statistics.table.double(), expected, rtol=1e-5, atol=1e-7)


def test_autocast_does_not_lower_the_sums() -> None:
    logits, _ = random_batch(40)
    soft = logits.sin().softmax(1).float()
    expected, ours = ClassStatistics(NUM_CLASSES), ClassStatistics(NUM_CLASSES)
    expected.update(logits.float(), soft)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours.update(logits.float(), soft)
        ours.commit()
        rows = ours.rows(soft)
    expected.commit()
    assert torch.equal(ours.table, expected.table)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, soft @ expected.table)


def test_buffers_stay_in_single_precision_when_bfloat16_is_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        statistics = ClassStatistics(3)
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(300):  # bfloat16 counts stop at 256
        statistics.update(torch.zeros(1, 3), torch.tensor([1]))
    assert statistics.counts.tolist() == [0, 300, 0]


def test_no_gradients_and_no_changes_to_the_arguments() -> None:
    logits, labels = random_batch(6)
    before = logits.clone(), labels.clone()
    statistics = double_statistics()
    statistics.update(logits.requires_grad_(), labels)
    statistics.commit()
    assert not statistics.table.requires_grad
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def test_commit_between_forward_and_backward_is_allowed() -> None:
    logits, labels = random_batch(6)
    statistics = double_statistics()
    student = torch.zeros_like(logits).requires_grad_()
    loss = ikl_loss(student, logits, class_table=statistics.table, labels=labels)
    expected = torch.autograd.grad(loss, student, retain_graph=True)[0]
    statistics.update(logits, labels)
    statistics.commit()
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)


def test_rows() -> None:
    statistics = double_statistics()
    statistics.update(*random_batch(50))
    statistics.commit()
    labels = torch.tensor([3, 0, 3])
    assert torch.equal(statistics.rows(labels), statistics.table[labels])
    mixed = torch.tensor([[0.25, 0, 0, 0.75, 0]])
    expected = 0.25 * statistics.table[0] + 0.75 * statistics.table[3]
    torch.testing.assert_close(statistics.rows(mixed), expected[None])
    logits, _ = random_batch(3)
    by_rows = ikl_loss(logits, logits.sin(), statistics.rows(labels))
    by_table = ikl_loss(logits, logits.sin(), class_table=statistics.table, labels=labels)
    assert torch.equal(by_rows, by_table)


def test_state_dict_round_trip_in_mid_epoch(tmp_path: Path) -> None:
    first, second = random_batch(30, seed=1), random_batch(30, seed=2)
    straight = double_statistics()
    straight.update(*random_batch(30))
    straight.commit()
    straight.update(*first)
    torch.save(straight.state_dict(), tmp_path / "statistics.pt")
    resumed = double_statistics()
    resumed.load_state_dict(torch.load(tmp_path / "statistics.pt", weights_only=True))
    for statistics in (straight, resumed):
        statistics.update(*second)
        statistics.commit(momentum=0.25)
    assert set(straight.state_dict()) == {"table", "sums", "counts"}
    assert torch.equal(resumed.table, straight.table)


def test_loading_with_assign_and_copying() -> None:
    statistics = double_statistics()
    statistics.update(*random_batch(30))
    twin = double_statistics()
    twin.load_state_dict(copy.deepcopy(statistics.state_dict()), assign=True)
    third = copy.deepcopy(statistics)
    for other in (twin, third):
        other.commit()
    assert statistics.counts.sum() == 30
    assert torch.equal(twin.table, third.table)


def test_consolidate_alone_changes_nothing() -> None:
    statistics = double_statistics()
    statistics.update(*random_batch(30))
    before = copy.deepcopy(statistics.state_dict())
    statistics.consolidate()
    after = statistics.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_repr() -> None:
    assert repr(ClassStatistics(3, 4.0)) == "ClassStatistics(num_classes=3, temperature=4.0)"


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        ClassStatistics(0)
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        ClassStatistics(3, temperature=0.0)
    with pytest.raises(ValueError, match=r"torch.float32 or torch.float64, got torch.bfloat16"):
        ClassStatistics(3, dtype=torch.bfloat16)
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
            ClassStatistics(3).commit(momentum)


@pytest.mark.parametrize(
    ("logits", "labels", "mask", "words"),
    [
        (torch.zeros(2, 4), torch.tensor([0, 1]), None, r"logits must be \[B, 5\], got \[2, 4\]"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 3).long(), None, r"logits must be \[B, 5\]"),
        (torch.zeros(2, 5), torch.tensor([0, 1, 2]), None, r"integers \[B\].*\[2, 5\].*\[3\]"),
        (torch.zeros(2, 5), torch.tensor([0.0, 1.0]), None, r"integers \[B\].*torch.float32"),
        (torch.zeros(2, 5), torch.tensor([True, False]), None, r"integers \[B\].*torch.bool"),
        (torch.zeros(2, 5), torch.zeros(2, 5).long(), None, r"floats \[B, C\].*torch.int64"),
        (torch.zeros(2, 5), torch.zeros(2, 4), None, r"floats \[B, C\].*\[2, 4\]"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), torch.ones(2), r"mask must be bool \[B\]"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), None, r"labels must be in \[0, 5\).*got 0 to 5"),
        (torch.zeros(2, 5), torch.tensor([0, -1]), None, r"\[0, 5\), or -100.*got -1 to 0"),
    ],
)
def test_wrong_updates_change_nothing(
    logits: Tensor, labels: Tensor, mask: Tensor | None, words: str
) -> None:
    statistics = ClassStatistics(NUM_CLASSES)
    with pytest.raises(ValueError, match=words):
        statistics.update(logits, labels, mask)
    assert not statistics.sums.any()
    assert not statistics.counts.any()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 5]), r"\[0, 5\).*got 0 to 5"),
        (torch.tensor([-1]), r"\[0, 5\).*got -1"),
        (torch.tensor([True]), "integers.*torch.bool"),
        (torch.tensor([1.0]), "integers.*torch.float32"),
        (torch.zeros(2, 3), r"C = 5.*\[2, 3\]"),
        (torch.zeros(2, 3, 4).long(), "maps take class_table and labels"),
    ],
)
def test_wrong_rows(labels: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClassStatistics(NUM_CLASSES).rows(labels)

"""The loss that the integrations share: shares of a step add up, labels may be missing or soft."""

import pytest
import torch

from dkl.integrations.distillation import DistillationLoss
from tests.integrations.tiny import NUM_CLASSES, mean_table, mixed, some_table


def batch(num_samples: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, num_samples, NUM_CLASSES, generator=generator)
    return student, teacher, torch.arange(num_samples) % NUM_CLASSES


def make_loss(**options) -> DistillationLoss:
    loss = DistillationLoss(NUM_CLASSES, mse_weight=3.0, **options)
    if loss.statistics is not None:
        loss.statistics.table.copy_(some_table())
    return loss


@pytest.mark.parametrize("class_weights", [True, False])
@pytest.mark.parametrize("kind", ["hard", "uncounted", "soft"])
def test_shares_of_a_step_add_up_to_its_mean(class_weights: bool, kind: str) -> None:
    loss = make_loss(class_weights=class_weights)
    student, teacher, labels = batch()
    if kind == "uncounted":
        labels[:5] = -100
    elif kind == "soft":
        labels = mixed(labels)
    num_items = 7 if kind == "uncounted" else 12
    parts = (slice(0, 4), slice(4, 5), slice(5, 12))
    shares = [loss(student[p], teacher[p], labels[p], num_items) for p in parts]
    torch.testing.assert_close(torch.stack(shares).sum(), loss(student, teacher, labels))


def test_gkl_weighs_micro_batches_by_their_share() -> None:
    loss = make_loss(gamma=0.5)
    student, teacher, labels = batch()
    parts = (slice(0, 4), slice(4, 12))
    total = sum(loss(student[p], teacher[p], labels[p], 12) for p in parts)
    values = [loss(student[p], teacher[p], labels[p]) for p in parts]
    torch.testing.assert_close(total, values[0] / 3 + 2 * values[1] / 3)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, labels = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    make_loss()(student, teacher, labels).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_observed_predictions_make_the_next_table() -> None:
    loss = make_loss()
    _, teacher, labels = batch()
    loss.observe(teacher, labels)
    assert torch.equal(loss.statistics.table, some_table())
    loss.commit()
    torch.testing.assert_close(loss.statistics.table, mean_table(teacher, labels))


def test_without_class_weights_nothing_is_collected() -> None:
    loss = make_loss(class_weights=False)
    loss.observe(*batch()[1:])
    loss.commit()
    assert loss.state_dict() == {}

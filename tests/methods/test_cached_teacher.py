"""Methods from a teacher's cached answers: shifts do not matter, buckets are what they say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dkl import methods
from dkl.methods.protocol import Batch, StepContext

BATCH, CLASSES, TEMPERATURE = 6, 7, 2.5


class Logits(nn.Module):
    """A network that returns its parameter, whatever the images."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=generator)
        self.logits_BC = nn.Parameter(3 * noise)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_BC[images[:, 0, 0, 0].long()]


def batch_of(*, padded: bool = True) -> Batch:
    mask = torch.ones(BATCH, dtype=torch.bool)
    mask[-1] = not padded
    return Batch(
        images=torch.arange(BATCH, dtype=torch.float64).view(-1, 1, 1, 1),
        labels=torch.arange(BATCH) % CLASSES,
        mask=mask,
        indices=torch.arange(BATCH) + 10,
    )


def context_of(batch: Batch, epoch: int = 0) -> StepContext:
    return StepContext(
        epoch=epoch,
        num_epochs=4,
        step=epoch,
        num_items=batch.mask.sum(),
        step_labels=batch.labels[batch.mask],
        loss_scale=1.0,
        draw=lambda k: torch.zeros(BATCH, k),
    )


def loss_and_gradient(method: nn.Module, epoch: int = 0) -> tuple[Tensor, Tensor]:
    student, batch = Logits(1), batch_of()
    context = context_of(batch, epoch)
    output = method.loss(student, method.prepare(student, batch, context), context)
    output.loss.backward()
    assert student.logits_BC.grad is not None
    return output.loss.detach(), student.logits_BC.grad


def top_k_teacher(teacher: Logits, k: int) -> methods.CachedTopKTeacher:
    rows_BC = (teacher.logits_BC.detach() / TEMPERATURE).log_softmax(1)
    top = rows_BC.topk(k, 1)
    rest_B = rows_BC.scatter(1, top.indices, -torch.inf).logsumexp(1)

    def read(indices: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        here = indices - 10
        return top.values[here], top.indices[here], rest_B[here]

    return methods.CachedTopKTeacher(read, TEMPERATURE)


BUILDERS = {
    "kd": methods.kd,
    "jsd_kd": methods.jsd_kd,
    "dkd": methods.dkd,
    "dist": methods.dist,
    "ikl_kd": lambda teacher: methods.ikl_kd(teacher, CLASSES),
    "ikl_kd_rows": lambda teacher: methods.ikl_kd(
        teacher, CLASSES, class_weights=False, weight_temperature=3.0
    ),
    "gkl_kd": lambda teacher: methods.ikl_kd(teacher, CLASSES, gamma=0.5, class_weights=False),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_log_probabilities_are_as_good_as_logits(name: str) -> None:
    teacher = Logits(0)
    rows_BC = teacher.logits_BC.detach().log_softmax(1)
    read = methods.CachedTeacher(lambda indices, epoch: rows_BC[indices - 10])
    live, cached = BUILDERS[name](teacher), BUILDERS[name](read)
    for one, other in zip(loss_and_gradient(live), loss_and_gradient(cached), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        assert one.abs().max() > 1e-3
    if live.term is not None and live.term.statistics is not None:
        live.on_epoch_end(0)
        cached.on_epoch_end(0)
        torch.testing.assert_close(cached.term.statistics.table, live.term.statistics.table)
        assert (live.term.statistics.table - 1 / CLASSES).abs().max() > 0.1


def test_the_epoch_says_which_answers_are_read() -> None:
    rows = torch.stack([Logits(seed).logits_BC.detach().log_softmax(1) for seed in (0, 5)])
    method = methods.kd(methods.CachedTeacher(lambda indices, epoch: rows[epoch, indices - 10]))
    for epoch, seed in enumerate((0, 5)):
        one, other = loss_and_gradient(methods.kd(Logits(seed))), loss_and_gradient(method, epoch)
        torch.testing.assert_close(other[1], one[1], rtol=1e-12, atol=1e-12)


def test_answers_take_the_dtype_of_the_images() -> None:
    rows_BC = torch.zeros(BATCH, CLASSES)
    teacher = methods.CachedTeacher(lambda indices, epoch: rows_BC[indices - 10])
    batch = batch_of()
    assert teacher.answers(batch, context_of(batch))["teacher_logits"].dtype == torch.float64
    half = replace(batch, images=batch.images.float())
    assert teacher.answers(half, context_of(half))["teacher_logits"].dtype == torch.float32


def test_all_classes_in_buckets_are_the_method_of_all_classes() -> None:
    teacher = Logits(0)
    every = top_k_teacher(teacher, CLASSES)
    pairs = (
        (methods.kd(teacher, temperature=TEMPERATURE), methods.top_k_kd(every)),
        (
            methods.ikl_kd(
                teacher,
                CLASSES,
                class_weights=False,
                temperature=TEMPERATURE,
                weight_temperature=3.0,
                mse_weight=2.0,
                ce_weight=0.5,
            ),
            methods.top_k_ikl_kd(every, weight_temperature=3.0, mse_weight=2.0, ce_weight=0.5),
        ),
    )
    for live, cached in pairs:
        for one, other in zip(loss_and_gradient(live), loss_and_gradient(cached), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_kd_on_buckets_is_the_divergence_of_the_buckets(k: int) -> None:
    teacher, student, batch = Logits(0), Logits(1), batch_of()
    p, q = (
        (network.logits_BC.detach() / TEMPERATURE).softmax(1)[batch.mask]
        for network in (teacher, student)
    )
    listed = p.topk(k, 1).indices
    kept_p, kept_q = p.gather(1, listed), q.gather(1, listed)
    p_k, q_k = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (kept_p, kept_q))
    wanted = TEMPERATURE**2 * (p_k * (p_k / q_k).log()).sum(1).mean()
    method = methods.top_k_kd(top_k_teacher(teacher, k), hard_weight=0.0, soft_weight=1.0)
    found = loss_and_gradient(method)[0]
    torch.testing.assert_close(found, wanted)
    whole = methods.kd(teacher, temperature=TEMPERATURE, hard_weight=0.0, soft_weight=1.0)
    # Equal where every class is kept, up to rounding.
    assert 0 < found <= loss_and_gradient(whole)[0] * (1 + 1e-12)


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient() -> None:
    like = top_k_teacher(Logits(1), 3)
    for method in (
        methods.top_k_kd(like, hard_weight=0.0, soft_weight=1.0),
        methods.top_k_ikl_kd(like, hard_weight=0.0, ce_weight=0.0),
    ):
        loss, gradient = loss_and_gradient(method)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)

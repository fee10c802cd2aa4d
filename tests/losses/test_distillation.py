"""What holds for every distillation loss: gradients, masks, reductions, precision, bad input."""

import math
import re

import pytest
import torch

from dkl.losses import attention_transfer_loss, crd_loss, hcl_loss, hint_loss, ofd_loss
from tests.losses.distillation_cases import CASES, sides, tensors

every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
uncoupled = {name: case for name, case in CASES.items() if not case.couples}


@every_loss
def test_gradients_reach_the_student_and_not_the_teacher(case):
    student, teacher = sides(case)
    case.loss(student, teacher).backward()
    assert all(x.grad is not None and x.grad.norm() > 1e-6 for x in student)
    assert all(x.grad is None for x in teacher)


@every_loss
def test_gradients_are_those_of_finite_differences(case):
    student, teacher = sides(case, batch=4)
    assert torch.autograd.gradcheck(lambda *s: case.loss(s, teacher), student, fast_mode=True)


@every_loss
def test_reductions_agree(case):
    student, teacher = sides(case)
    rows = case.loss(student, teacher, reduction="none")
    assert rows.shape == (6,)
    assert (rows > 0).all()
    torch.testing.assert_close(case.loss(student, teacher), rows.mean())
    torch.testing.assert_close(case.loss(student, teacher, reduction="sum"), rows.sum())
    torch.testing.assert_close(case.loss(student, teacher, num_items=9.0), rows.sum() / 9)
    as_tensor = case.loss(student, teacher, num_items=torch.tensor(9))
    torch.testing.assert_close(as_tensor, rows.sum() / 9)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_samples_that_do_not_count_are_as_if_cut_out(case, reduction):
    student, teacher = sides(case)
    counted = torch.tensor([True, True, False, True, False, True])
    kept = [x[counted] for x in student], [x[counted] for x in teacher]
    expected = case.loss(*kept, reduction=reduction)
    expected_gradients = torch.autograd.grad(expected.sum(), student)
    with torch.no_grad():
        for x in student:
            x[~counted] = math.nan
        for x in teacher:
            x[~counted] = math.inf
    loss = case.loss(student, teacher, mask=counted, reduction=reduction)
    if reduction == "none":
        assert (loss[~counted] == 0).all()
        loss = loss[counted]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, wanted in zip(
        torch.autograd.grad(loss.sum(), student), expected_gradients, strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


@every_loss
@pytest.mark.parametrize("batch", [0, 3])
def test_nothing_that_counts_is_zero_with_zero_gradients(case, batch):
    student, teacher = sides(case, batch)
    loss = case.loss(student, teacher, mask=torch.zeros(batch, dtype=torch.bool))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, student))
    assert case.loss(student, teacher, num_items=0.0, mask=torch.zeros(batch).bool()) == 0


@every_loss
def test_an_empty_batch_is_zero(case):
    student, teacher = sides(case, batch=0)
    loss = case.loss(student, teacher)
    assert loss == 0
    assert [x.shape for x in torch.autograd.grad(loss, student)] == [x.shape for x in student]


@every_loss
def test_one_sample_is_finite(case):
    student, teacher = sides(case, batch=1)
    loss = case.loss(student, teacher)
    gradients = torch.autograd.grad(loss, student)
    assert all(x.isfinite().all() for x in (loss, *gradients))


@every_loss
def test_the_order_of_samples_does_not_matter(case):
    student, teacher = sides(case)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    turned = [x[order] for x in student], [x[order] for x in teacher]
    torch.testing.assert_close(
        case.loss(*turned, reduction="none"),
        case.loss(student, teacher, reduction="none")[order],
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("case", uncoupled.values(), ids=uncoupled)
def test_parts_of_a_batch_add_up(case):
    student, teacher = sides(case, batch=6)
    first = [x[:3] for x in student], [x[:3] for x in teacher]
    whole = case.loss(student, teacher, reduction="none")
    torch.testing.assert_close(case.loss(*first, reduction="none"), whole[:3])
    torch.testing.assert_close(case.loss(*first, num_items=6), whole[:3].sum() / 6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(case, dtype):
    student, teacher = sides(case, dtype=dtype)
    loss = case.loss(student, teacher)
    assert loss.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in student]
    expected = case.loss(wide, [x.float() for x in teacher])
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, student)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        assert torch.equal(ours, wanted.to(dtype))


@every_loss
def test_float32_agrees_with_float64(case):
    student, teacher = sides(case)
    expected = case.loss(student, teacher)
    gradients = torch.autograd.grad(expected, student)
    single = [x.detach().float().requires_grad_() for x in student]
    loss = case.loss(single, [x.float() for x in teacher])
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-7)
    for ours, wanted in zip(torch.autograd.grad(loss, single), gradients, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-4 * scale)


@every_loss
def test_autocast_changes_nothing(case):
    student, teacher = sides(case, dtype=torch.float32)
    expected = case.loss(student, teacher)
    gradients = torch.autograd.grad(expected, student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(student, teacher)
    assert torch.equal(loss, expected)
    for ours, wanted in zip(torch.autograd.grad(loss, student), gradients, strict=True):
        assert torch.equal(ours, wanted)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["large", "signs", "zeros", "equal_samples"])
def test_extreme_inputs_give_finite_losses_and_gradients(case, dtype, kind):
    def extreme(values, sign):
        if kind == "large":
            return (1e4 * sign * values.detach().clamp(-1, 1)).to(dtype)
        if kind == "signs":
            return (1e4 * sign * values.detach().sign()).to(dtype)
        if kind == "zeros":
            return torch.zeros_like(values, dtype=dtype)
        return values.detach()[:1].expand_as(values).to(dtype)

    student, teacher = sides(case)
    student = [extreme(x, 1.0).requires_grad_() for x in student]
    teacher = [extreme(x, -1.0) for x in teacher]
    loss = case.loss(student, teacher, reduction="none")
    assert loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.mean(), student):
        assert gradient.isfinite().all()


zero_cases = {name: case for name, case in CASES.items() if case.at_equality is not None}


@pytest.mark.parametrize("case", zero_cases.values(), ids=zero_cases)
def test_equal_sides_have_no_loss_and_no_gradient(case):
    student = tensors(case.student, 6, 1)
    loss = case.loss(student, [x.detach().clone() for x in student])
    assert loss.abs() <= case.at_equality
    assert all(x.abs().max() <= case.at_equality for x in torch.autograd.grad(loss, student))


@every_loss
def test_wrong_options_are_refused(case):
    student, teacher = sides(case)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none'"):
        case.loss(student, teacher, reduction="batchmean")
    with pytest.raises(ValueError, match="num_items replaces the sample count"):
        case.loss(student, teacher, reduction="sum", num_items=3)
    with pytest.raises(ValueError, match="num_items must be finite"):
        case.loss(student, teacher, num_items=-1.0)
    for mask in (torch.ones(6), torch.ones(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask must be bool .*\[6\]"):
            case.loss(student, teacher, mask=mask)


@every_loss
def test_sides_of_different_batches_are_refused(case):
    student, teacher = sides(case)
    with pytest.raises(ValueError, match=r"one shape|same samples|all stages"):
        case.loss(student, [x[:4] for x in teacher])
    with pytest.raises(ValueError, match="floating-point"):
        case.loss(student, [x.long() for x in teacher])


def test_errors_of_features_say_what_came():
    map_, row = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3)

    def refused(words, function, *args, **options):
        with pytest.raises(ValueError, match=re.escape(words)):
            function(*args, **options)

    refused("got one tensor [2, 3, 4, 4]; for a single", attention_transfer_loss, map_, [map_])
    refused("one map per stage and at least one stage, got 1 and 2", hcl_loss, [map_], [map_] * 2)
    refused("got 0 and 0", hcl_loss, [], [])
    refused("must both be [B, C, H, W]", attention_transfer_loss, [row], [map_])
    refused("must both be [B, ...]", hint_loss, torch.zeros(2), torch.zeros(2))
    refused("input must be a floating-point tensor of features, got str", hint_loss, "x", row)
    refused("one shape, got input [2, 3] and target [2, 4]", hint_loss, row, torch.zeros(2, 4))
    refused("at least one value", hint_loss, row[:, :0], row[:, :0])
    refused("all stages must have the same samples", hcl_loss, *[[map_, map_[:1]]] * 2)
    margins = [torch.zeros(3)]
    refused("channels (connect", ofd_loss, [map_], [map_[:, :2]], margins)
    refused("one value per channel and stage, [3]", ofd_loss, [map_], [map_], [torch.zeros(4)])
    refused("one value per channel and stage, [3]", ofd_loss, [map_], [map_], margins * 2)
    numbers = {"log_normalizer": 0.0, "num_samples": 9}
    refused("must both be [B, D]", crd_loss, row, row, torch.zeros(2, 3, 1), **numbers)
    refused("at least one value", crd_loss, row, row, row[:, :0], **numbers)
    refused("temperature must be", crd_loss, row, row, row, temperature=0.0, **numbers)
    refused("size of the training set", crd_loss, row, row, row, log_normalizer=0.0, num_samples=0)

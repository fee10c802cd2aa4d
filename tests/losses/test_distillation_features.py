"""AT, FitNet, OFD, ReviewKD and VID against their definitions, in float64, and at their edges."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from dkl.losses import (
    attention_transfer_loss,
    hcl_loss,
    hint_loss,
    ofd_loss,
    ofd_margins,
    vid_loss,
)
from dkl.losses.samples import average_pool, unit_vectors


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(ours, expected, leaf):
    """Compare values per sample and the gradients of their sums."""
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaf)[0],
        torch.autograd.grad(expected.sum(), leaf)[0],
        rtol=1e-10,
        atol=1e-13,
    )


SIZES = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 7), (7, 7), (8, 2), (1, 6), (14, 14), (16, 16)]


@pytest.mark.parametrize("size", SIZES)
def test_average_pool_is_the_adaptive_one(size):
    map_ = maps(2, 3, *size)
    for height, width in itertools.product(range(1, 5), range(1, 5)):
        if height <= size[0] and width <= size[1]:
            ours, expected = (
                average_pool(map_, height, width),
                F.adaptive_avg_pool2d(map_, (height, width)),
            )
            assert_same(ours, expected, map_)


def test_unit_vectors_have_length_one_or_are_zero_without_gradient():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]], requires_grad=True)
    units = unit_vectors(vectors)
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(units[:, 1].sum(), vectors)
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()


def attention_by_hand(student, teacher):
    height = min(student.shape[2], teacher.shape[2])
    width = min(student.shape[3], teacher.shape[3])
    attentions = []
    for map_ in (student, teacher):
        attention = F.adaptive_avg_pool2d(map_, (height, width)).pow(2).mean(1).flatten(1)
        attentions.append(attention / attention.norm(dim=1, keepdim=True))
    return (attentions[0] - attentions[1]).pow(2).mean(1)


@pytest.mark.parametrize("sizes", [((8, 8), (8, 8)), ((8, 8), (4, 4)), ((3, 3), (7, 7))])
def test_attention_transfer_is_its_formula_at_any_two_sizes(sizes):
    student, teacher = maps(3, 4, *sizes[0], seed=1), maps(3, 6, *sizes[1], seed=2).detach()
    ours = attention_transfer_loss([student], [teacher], reduction="none")
    assert_same(ours, attention_by_hand(student, teacher), student)


def test_attention_transfer_pools_each_side_of_a_map_to_the_smaller():
    student, teacher = maps(2, 3, 8, 2, seed=1), maps(2, 3, 4, 6, seed=2).detach()
    ours = attention_transfer_loss([student], [teacher], reduction="none")
    assert_same(ours, attention_by_hand(student, teacher), student)


def test_attention_does_not_depend_on_scale_sign_or_order_of_channels():
    student, teacher = maps(3, 4, 5, 5, seed=1), maps(3, 6, 5, 5, seed=2)
    expected = attention_transfer_loss([student], [teacher])
    turned = -7 * student[:, [2, 0, 3, 1]]
    torch.testing.assert_close(attention_transfer_loss([turned], [0.1 * teacher]), expected)


def test_a_dead_map_has_no_attention_and_no_gradient():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer_loss([student], [torch.ones(2, 3, 4, 4)])
    torch.testing.assert_close(loss.item(), 1 / 16)  # |0 - A|^2 = 1 over 16 positions
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_stages_add_up():
    students = [maps(2, 3, 8, 8, seed=1), maps(2, 5, 4, 4, seed=2)]
    teachers = [maps(2, 3, 8, 8, seed=3), maps(2, 5, 4, 4, seed=4)]
    for loss in (attention_transfer_loss, hcl_loss):
        parts = [loss([s], [t]) for s, t in zip(students, teachers, strict=True)]
        torch.testing.assert_close(loss(students, teachers), sum(parts))


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 5, 5), (4, 2, 3)])
def test_hint_is_the_mean_squared_error(shape):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    torch.testing.assert_close(hint_loss(student, teacher), F.mse_loss(student, teacher))
    by_hand = (student - teacher.detach()).pow(2).flatten(1).mean(1)
    assert_same(hint_loss(student, teacher, reduction="none"), by_hand, student)


def partial_distance_by_hand(student, teacher, margin):
    values = []
    for sample, reference in zip(student, teacher, strict=True):
        total = student.new_zeros(())
        for index in np.ndindex(*sample.shape):
            s, t = sample[index], reference[index]
            wanted = max(t.item(), margin[index[0]].item())
            if s.item() > wanted or t.item() > 0:
                total = total + (s - wanted) ** 2
        values.append(total)
    return torch.stack(values)


def test_partial_distance_is_its_formula():
    student, teacher = maps(3, 4, 3, 3, seed=1), maps(3, 4, 3, 3, seed=2).detach()
    margin = torch.tensor([-0.1, -0.5, -1.0, 0.0], dtype=torch.float64)
    ours = ofd_loss([student], [teacher], [margin], reduction="none")
    assert_same(ours, partial_distance_by_hand(student, teacher, margin), student)


def test_deeper_stages_of_ofd_weigh_twice_as_much_each():
    students = [maps(2, 3, 4, 4, seed=k) for k in range(3)]
    teachers = [maps(2, 3, 4, 4, seed=k + 5) for k in range(3)]
    margins = [torch.full((3,), -0.3)] * 3
    single = [ofd_loss(*([x] for x in one)) for one in zip(students, teachers, margins)]  # noqa: B905
    torch.testing.assert_close(
        ofd_loss(students, teachers, margins), single[0] / 4 + single[1] / 2 + single[2]
    )


@pytest.mark.parametrize("sizes", [((4, 4), (8, 8)), ((8, 8), (4, 4)), ((1, 1), (2, 2))])
def test_ofd_pools_the_larger_map(sizes):
    student, teacher = maps(2, 3, *sizes[0], seed=1), maps(2, 3, *sizes[1], seed=2).detach()
    size = min(sizes)
    expected = ofd_loss(
        [F.adaptive_avg_pool2d(student, size)],
        [F.adaptive_avg_pool2d(teacher, size)],
        [torch.full((3,), -0.2)],
        reduction="none",
    )
    ours = ofd_loss([student], [teacher], [torch.full((3,), -0.2)], reduction="none")
    assert_same(ours, expected, student)


def test_below_the_margin_a_student_is_left_alone():
    student = torch.full((1, 1, 1, 1), -5.0, requires_grad=True)
    loss = ofd_loss([student], [torch.full((1, 1, 1, 1), -2.0)], [torch.tensor([-1.0])])
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0] == 0


def test_margins_are_the_means_of_truncated_normals():
    weight = torch.tensor([1.0, -0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.3, -1.0, -0.4, 5.0], dtype=torch.float64)
    expected = [
        stats.truncnorm.mean(-np.inf, (0 - b) / abs(w), loc=b, scale=abs(w))
        for w, b in zip(weight.tolist(), bias.tolist(), strict=True)
    ]
    np.testing.assert_allclose(ofd_margins(weight, bias).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_margins_at_the_edges(dtype):
    """Channels that are never, always or constantly negative, or constant."""
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1e-4], dtype=dtype)
    bias = torch.tensor([3.05, 3.2, -300.0, 2.0, -2.0, 0.0, -100.0], dtype=dtype)
    margins = ofd_margins(weight.requires_grad_(), bias.requires_grad_())
    assert not margins.requires_grad
    assert margins.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # P(x < 0) is .00114 and .00069 for the first two: only the second is too rare.
    mean = stats.truncnorm.mean(-np.inf, -bias[0].item(), loc=bias[0].item())
    expected = [mean, -3.0, -300.0, 0.0, -2.0, 0.0, -100.0]
    np.testing.assert_allclose(margins.numpy(), expected, rtol=2e-5)
    assert -0.5 < mean < -0.2


def test_margins_need_a_batch_norm():
    with pytest.raises(ValueError, match=r"batch norm, floating-point \[C\], got .* \[3\] and \[4"):
        ofd_margins(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="floating-point"):
        ofd_margins(torch.ones(3).long(), torch.ones(3))


def pyramid_by_hand(student, teacher):
    values, weights = [], []
    height, width = student.shape[2:]
    for size in (None, *(k for k in (4, 2, 1) if k < max(height, width))):
        pooled = (student, teacher)
        if size is not None:
            shape = (min(size, height), min(size, width))
            pooled = tuple(F.adaptive_avg_pool2d(map_, shape) for map_ in pooled)
        values.append((pooled[0] - pooled[1]).pow(2).flatten(1).mean(1))
        weights.append(2.0 ** -len(weights))
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("size", SIZES)
def test_hcl_is_its_formula_at_every_size(size):
    student, teacher = maps(3, 4, *size, seed=1), maps(3, 4, *size, seed=2).detach()
    ours = hcl_loss([student], [teacher], reduction="none")
    assert_same(ours, pyramid_by_hand(student, teacher), student)


@pytest.mark.parametrize(
    ("size", "total_weight"), [(1, 1.0), (2, 1.5), (4, 1.75), (8, 1.875), (16, 1.875)]
)
def test_hcl_is_a_weighted_mean_of_its_levels(size, total_weight):
    """A constant difference is the same on every level, checkers are left on the first alone."""
    ones = torch.ones(2, 3, size, size)
    assert hcl_loss([3 * ones], [ones]) == pytest.approx(4.0)
    position = torch.arange(size)
    checkers = ones * (1 - 2 * ((position + position[:, None]) % 2))
    assert hcl_loss([checkers], [0 * ones]) == pytest.approx(1 / total_weight)


def test_vid_is_a_normal_log_likelihood():
    mean, target = maps(3, 4, 5, 5, seed=1), maps(3, 4, 5, 5, seed=2).detach()
    log_variance = torch.linspace(-1, 2, 4, dtype=torch.float64).requires_grad_()
    deviation = (0.5 * log_variance).exp().view(4, 1, 1)
    likelihood = torch.distributions.Normal(mean, deviation).log_prob(target)
    expected = -(likelihood + 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
    ours = vid_loss(mean, target, log_variance, reduction="none")
    torch.testing.assert_close(ours, expected)
    for gradients in zip(
        *(torch.autograd.grad(x.sum(), (mean, log_variance)) for x in (ours, expected)),
        strict=True,
    ):
        torch.testing.assert_close(*gradients)


def test_vid_needs_a_variance_per_channel():
    with pytest.raises(ValueError, match=r"one value per channel, \[3\], got torch.float32 \[2\]"):
        vid_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))

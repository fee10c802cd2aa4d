"""DKD and DIST against their definitions, in float64, and at their edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dkl.losses import dist_loss, dkd_loss, kl_loss


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def dkd_by_hand(student, teacher, labels, alpha, beta, temperature):
    """Return DKD of every row, in probabilities."""
    rows = []
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        q, p = (s / temperature).softmax(0), (t / temperature).softmax(0)
        others = [k for k in range(len(q)) if k != y]
        binary = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        q, p = q[others] / q[others].sum(), p[others] / p[others].sum()
        rows.append(alpha * binary + beta * (p * (p / q).log()).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 101])
@pytest.mark.parametrize(
    ("alpha", "beta", "temperature"), [(1, 8, 4), (1, 0.5, 1), (0, 1, 2), (2, 0, 0.5)]
)
def test_dkd_is_its_formula(num_classes, alpha, beta, temperature):
    student, teacher = logits(7, num_classes, seed=1), logits(7, num_classes, seed=2)
    labels = torch.arange(7) % num_classes
    expected = dkd_by_hand(student, teacher.detach(), labels, alpha, beta, temperature)
    ours = dkd_loss(
        student,
        teacher,
        labels,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        reduction="none",
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student)[0],
        torch.autograd.grad(expected.sum(), student)[0],
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_dkd_with_the_teachers_doubt_as_beta(temperature):
    student, teacher, labels = logits(6, 5, seed=1), logits(6, 5, seed=2), torch.arange(6) % 5
    options = {"temperature": temperature, "reduction": "none"}
    label_part = dkd_loss(student, teacher, labels, beta=0.0, **options)
    other_part = dkd_loss(student, teacher, labels, alpha=0.0, **options)
    doubt = 1 - F.softmax(teacher / temperature, 1)[torch.arange(6), labels]
    torch.testing.assert_close(
        label_part + doubt * other_part, kl_loss(student, teacher, **options)
    )


def test_two_classes_leave_only_the_label_part():
    student, teacher, labels = logits(6, 2, seed=1), logits(6, 2, seed=2), torch.arange(6) % 2
    torch.testing.assert_close(
        dkd_loss(student, teacher, labels, beta=8.0), kl_loss(student, teacher)
    )
    assert dkd_loss(student, teacher, labels, alpha=0.0, beta=8.0) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_dkd_stays_exact_where_probabilities_underflow(dtype, num_classes):
    """One class 1e4 above the others: log(1 - p) is -1e4, while 1 - p rounds to zero."""
    student = torch.zeros(2, num_classes, dtype=dtype)
    student[:, 0] = 1e4
    teacher = torch.zeros(2, num_classes, dtype=dtype)
    teacher[:, 1] = 1e4
    labels = torch.tensor([0, 1])
    student.requires_grad_()
    loss = dkd_loss(student, teacher, labels, beta=0.0, reduction="none")
    # From label 0 the teacher is sure that it is not the label, the student that it is; from
    # label 1 the other way round. The others of the student share 1 - p.
    torch.testing.assert_close(
        loss.double(), torch.tensor([1e4 - math.log(num_classes - 1), 1e4]).double()
    )
    both = dkd_loss(student, teacher, labels, beta=8.0)
    (gradient,) = torch.autograd.grad(both, student)
    assert both.isfinite()
    assert gradient.isfinite().all()
    assert gradient.dtype == dtype


def test_logits_above_a_thousand_do_not_leak_into_the_other_classes():
    """Where the label is excluded by subtracting 1000, it would win among the others here."""
    student = torch.tensor([[2000.0, 1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2000.0, 0.0, 1.0]], dtype=torch.float64)
    ours = dkd_loss(student, teacher, torch.tensor([0]), alpha=0.0)
    torch.testing.assert_close(ours, kl_loss(student[:, 1:], teacher[:, 1:]))


def test_an_offset_of_all_logits_costs_no_precision():
    student, teacher = logits(5, 10, seed=1).detach(), logits(5, 10, seed=2).detach()
    labels, options = torch.arange(5), {"beta": 8.0, "temperature": 4.0}
    expected = dkd_loss(student, teacher, labels, **options)
    torch.testing.assert_close(dkd_loss(student + 50.0, teacher - 3.0, labels, **options), expected)
    # multiples of 2^-10 stay what they are after the offset
    student, teacher = (((x * 1024).round() / 1024).float() for x in (student, teacher))
    options = {"beta": 0.0, "reduction": "none"}
    expected = dkd_loss(student, teacher, labels, **options)
    moved = dkd_loss(student + 1e4, teacher + 1e4, labels, **options)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


def test_dkd_counts_rows_by_label_and_mask():
    student, teacher = logits(5, 4, seed=1), logits(5, 4, seed=2)
    labels = torch.tensor([0, -100, 3, 1, 99])
    mask = torch.tensor([True, True, True, False, False])
    kept = torch.tensor([0, 2])
    expected = dkd_loss(student[kept], teacher[kept], labels[kept])
    torch.testing.assert_close(dkd_loss(student, teacher, labels, mask=mask), expected)


def test_maps_have_a_row_per_position():
    student, teacher = logits(2, 6, 3, seed=1), logits(2, 6, 3, seed=2)
    labels, mask = torch.arange(6).view(2, 3), torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()

    def rows(values):
        return values.movedim(1, -1).reshape(-1, 6)

    ours = dkd_loss(student, teacher, labels, mask=mask, reduction="none")
    assert ours.shape == (2, 3)
    expected = dkd_loss(
        rows(student), rows(teacher), labels.view(-1), mask=mask.view(-1), reduction="none"
    )
    torch.testing.assert_close(ours.view(-1), expected)
    torch.testing.assert_close(
        dist_loss(student, teacher, mask=mask),
        dist_loss(rows(student), rows(teacher), mask=mask.view(-1)),
    )


def test_dkd_permutes_with_the_classes():
    student, teacher, labels = logits(6, 5, seed=1), logits(6, 5, seed=2), torch.arange(6) % 5
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = dkd_loss(student[:, order], teacher[:, order], order.argsort()[labels], beta=3.0)
    torch.testing.assert_close(turned, dkd_loss(student, teacher, labels, beta=3.0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_pearsons_correlations(temperature):
    """Probabilities here are large enough for the epsilon not to show."""
    student, teacher = logits(9, 5, seed=1, scale=1.0), logits(9, 5, seed=2, scale=1.0)
    q, p = ((x.detach() / temperature).softmax(1).numpy() for x in (student, teacher))
    inter = 1 - np.mean([np.corrcoef(q[i], p[i])[0, 1] for i in range(9)])
    intra = 1 - np.mean([np.corrcoef(q[:, j], p[:, j])[0, 1] for j in range(5)])
    ours = dist_loss(student, teacher, beta=2.0, gamma=3.0, temperature=temperature)
    assert ours.item() == pytest.approx(2 * inter + 3 * intra, rel=1e-5)


def test_the_epsilon_of_dist_is_the_published_one():
    """It shows in classes of small probability, which count less for it."""
    small = torch.tensor([[0.0, -9.0], [0.0, -10.0], [0.0, -11.0]], dtype=torch.float64)
    q = small.softmax(1)
    length = (q - q.mean(0)).norm(dim=0)
    correlations = length**2 / (length**2 + 1e-8)
    assert 0.05 < correlations[1] < 0.95
    ours = dist_loss(small, small, beta=0.0)
    torch.testing.assert_close(ours, 1 - correlations.mean())


def test_dist_accepts_correlated_predictions():
    """A student that is the teacher mixed with the uniform distribution loses nothing."""
    p = logits(8, 4, seed=3, scale=1.0).detach().softmax(1)
    mixed = 0.3 * p + 0.7 / 4
    assert dist_loss(mixed.log(), p.log()) < 1e-4
    assert dist_loss(mixed.log(), p.log()[:, [1, 0, 3, 2]]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_variance_is_no_correlation_and_no_gradient(dtype):
    teacher = logits(4, 3, seed=1).detach().to(dtype)
    uniform = torch.full((4, 3), 0.7, dtype=dtype, requires_grad=True)
    sure = torch.tensor([[9e3, 0.0, 0.0]], dtype=dtype).repeat(4, 1).requires_grad_()
    for student in (uniform, sure):
        for pair in ((student, teacher), (student, student.detach())):
            intra = dist_loss(*pair, beta=0.0)
            assert intra == 1.0
            assert (torch.autograd.grad(intra, student)[0] == 0).all()
    inter = dist_loss(uniform, teacher, gamma=0.0, reduction="none")
    assert (inter == 1.0).all()
    assert (torch.autograd.grad(inter.sum(), uniform)[0] == 0).all()


def test_one_row_has_no_intra_class_correlation():
    student, teacher = logits(1, 5, seed=1), logits(1, 5, seed=2)
    torch.testing.assert_close(
        dist_loss(student, teacher, gamma=3.0), dist_loss(student, teacher, gamma=0.0) + 3.0
    )


def test_bad_input_is_refused():
    one, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"at least two classes, got logits \[2, 1\]"):
        dkd_loss(one[:, :1], one[:, :1], labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), or -100 .* got 0 to 3"):
        dkd_loss(one, one, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels must be integers of input's shape"):
        dkd_loss(one, one, one)
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got -1"):
            dkd_loss(one, one, labels, **{name: -1.0})
    for name in ("beta", "gamma"):
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got nan"):
            dist_loss(one, one, **{name: math.nan})
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        dkd_loss(one, one, labels, temperature=0.0)
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        dist_loss(one, one, temperature=0.0)
    with pytest.raises(ValueError, match=r"one shape .* got input \[2, 3\] and target \[2, 4\]"):
        dist_loss(one, torch.zeros(2, 4))

"""MART's losses and the views' divergence against their formulas, and at their edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from dkl import jsd_loss
from dkl.losses.robust import (
    boosted_cross_entropy,
    jensen_shannon_views,
    mart_loss,
    misclassification_weighted_kl,
)

NUM_CLASSES = 6


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def published_mart(adversarial, clean, labels, beta):
    """MART as its code computes it: in probabilities, with its constants."""
    q, p = F.softmax(adversarial, 1), F.softmax(clean, 1)
    right = torch.arange(len(labels))
    others = q.detach().clone()
    others[right, labels] = -1.0
    wrong = q[right, others.argmax(1)]
    boosted = -q[right, labels].log() - (1.0001 - wrong + 1e-12).log()
    divergence = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return boosted, beta * divergence * (1.0000001 - p[right, labels])


def three_losses(adversarial, clean, labels, **options):
    return (
        boosted_cross_entropy(adversarial, labels, **options),
        misclassification_weighted_kl(adversarial, clean, labels, **options),
        mart_loss(adversarial, clean, labels, **options),
    )


# A scale of 12 saturates predictions, so that every published constant shows.
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_mart_is_the_published_formula_with_its_constants(scale):
    adversarial, clean = logits(40, 6, seed=1, scale=scale), logits(40, 6, seed=2, scale=scale)
    labels = torch.arange(40) % 6
    boosted, weighted = published_mart(adversarial, clean, labels, beta=5.0)
    ours = mart_loss(adversarial, clean, labels, reduction="none")
    torch.testing.assert_close(ours, boosted + weighted, rtol=1e-9, atol=1e-9)
    for x, y in zip(
        torch.autograd.grad(ours.sum(), (adversarial, clean)),
        torch.autograd.grad((boosted + weighted).sum(), (adversarial, clean)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_mart_without_constants_would_differ_where_predictions_saturate():
    """Why the published epsilons are kept: they bound what a confident mistake costs."""
    adversarial, labels = torch.tensor([[-40.0, 40.0]]).double(), torch.tensor([0])
    boosted = boosted_cross_entropy(adversarial, labels)
    torch.testing.assert_close(boosted.item(), 80.0 - math.log(1.0e-4), rtol=1e-6, atol=0.0)
    weighted = misclassification_weighted_kl(adversarial, -adversarial, labels=torch.tensor([1]))
    torch.testing.assert_close(weighted.item(), -math.log(1e-12), rtol=1e-6, atol=0.0)


def test_mart_is_the_sum_of_its_two_terms():
    adversarial, clean, labels = logits(9, 6), logits(9, 6, seed=3), torch.arange(9) % 6
    boosted, weighted, _ = three_losses(adversarial, clean, labels)
    torch.testing.assert_close(
        mart_loss(adversarial, clean, labels, beta=3.0), boosted + 3.0 * weighted
    )


def test_marts_gradients_reach_both_predictions_through_weight_and_divergence():
    adversarial, clean, labels = logits(4, 6), logits(4, 6, seed=3), torch.arange(4)
    weighted = misclassification_weighted_kl(adversarial, clean, labels)
    (whole,) = torch.autograd.grad(weighted, clean)
    p, log_q = F.softmax(clean, 1), F.log_softmax(adversarial.detach(), 1)
    weight = 1 - p.gather(1, labels[:, None]).squeeze(1)
    divergence = (p * (p.log() - log_q)).sum(1)
    through_weight = torch.autograd.grad((weight * divergence.detach()).mean(), clean)[0]
    p = F.softmax(clean, 1)
    divergence = (p * (p.log() - log_q)).sum(1)
    through_divergence = torch.autograd.grad((weight.detach() * divergence).mean(), clean)[0]
    assert through_weight.abs().max() > 1e-3
    torch.testing.assert_close(whole, through_weight + through_divergence, rtol=1e-5, atol=1e-8)
    boosted = boosted_cross_entropy(adversarial, labels)
    assert torch.autograd.grad(boosted, adversarial)[0].abs().max() > 1e-2


@pytest.mark.parametrize("count", [2, 3, 5])
def test_views_divergence_is_its_formula(count):
    views = [logits(7, 6, seed=k) for k in range(count)]
    p = torch.stack([F.softmax(view, 1) for view in views])
    expected = (p * (p.log() - p.mean(0).log())).sum(2).mean(0)
    ours = jensen_shannon_views(views)
    torch.testing.assert_close(ours, expected)
    for x, y in zip(
        torch.autograd.grad(ours.sum(), views),
        torch.autograd.grad(expected.sum(), views),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_two_views_give_the_jensen_shannon_divergence():
    one, two = logits(8, 6, seed=1), logits(8, 6, seed=2)
    torch.testing.assert_close(
        jensen_shannon_views([one, two], reduction="mean"), jsd_loss(one, two)
    )


def test_equal_views_have_no_divergence_and_no_gradient():
    views = [logits(5, 6, scale=30.0) for _ in range(3)]
    values = jensen_shannon_views(views)
    assert torch.equal(values, torch.zeros(5).double())
    for gradient in torch.autograd.grad(values.sum(), views):
        assert gradient.abs().max() < 1e-15


def test_views_divergence_is_symmetric_and_at_most_log_k():
    views = [logits(5, 6, seed=k, scale=20.0) for k in range(3)]
    values = jensen_shannon_views(views)
    torch.testing.assert_close(values, jensen_shannon_views(views[::-1]))
    assert values.min() > 0
    assert values.max() <= math.log(3) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_and_half_inputs_stay_finite(dtype):
    largest = 1e4
    clean = (largest * torch.tensor([[1.0, -1, 0], [-1, 1, 1], [0, 0, 0], [1, 1, -1]])).to(dtype)
    adversarial = clean.roll(1, 1).clone().requires_grad_()
    clean.requires_grad_()
    labels = torch.tensor([0, 1, 2, 2])
    views = [adversarial, clean, clean.roll(2, 1)]
    for value in (
        *three_losses(adversarial, clean, labels, reduction="none"),
        jensen_shannon_views(views),
    ):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.isfinite().all()
        gradients = torch.autograd.grad(
            value.sum(), (adversarial, clean), retain_graph=True, allow_unused=True
        )
        for gradient in gradients:
            assert gradient is None or (gradient.isfinite().all() and gradient.dtype == dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count_reach_nothing(reduction):
    adversarial, clean = logits(6, 6), logits(6, 6, seed=4)
    labels, mask = torch.tensor([0, 1, 2, -100, 4, 99]), torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    with torch.no_grad():
        adversarial[3:] = math.nan
        clean[3:] = math.inf
    kept = three_losses(adversarial[:3], clean[:3], labels[:3], reduction=reduction)
    values = three_losses(adversarial, clean, labels, mask=mask, reduction=reduction)
    mask[3] = False
    kept += (jensen_shannon_views([adversarial[:3], clean[:3]], reduction=reduction),)
    values += (jensen_shannon_views([adversarial, clean], mask=mask, reduction=reduction),)
    for value, expected in zip(values, kept, strict=True):
        if reduction == "none":
            expected = F.pad(expected, (0, 3))  # noqa: PLW2901
        torch.testing.assert_close(value, expected)
        gradient = torch.autograd.grad(value.sum(), adversarial, retain_graph=True)[0]
        assert gradient[:3].isfinite().all()
        assert (gradient[3:] == 0).all()
    nothing = mart_loss(adversarial, clean, labels, mask=torch.zeros(6).bool())
    assert nothing == 0


def test_maps_have_a_row_per_position():
    adversarial, clean = logits(2, 6, 3, seed=1), logits(2, 6, 3, seed=2)
    labels = torch.arange(6).view(2, 3)

    def rows(values):
        return values.movedim(1, -1).reshape(-1, 6)

    values = mart_loss(adversarial, clean, labels, reduction="none")
    assert values.shape == (2, 3)
    torch.testing.assert_close(
        values.reshape(-1),
        mart_loss(rows(adversarial), rows(clean), labels.reshape(-1), reduction="none"),
    )
    divergence = jensen_shannon_views([adversarial, clean])
    torch.testing.assert_close(
        divergence.reshape(-1), jensen_shannon_views([rows(adversarial), rows(clean)])
    )


def test_gradients_are_those_of_finite_differences():
    adversarial, clean, labels = logits(3, 4, seed=1), logits(3, 4, seed=2), torch.arange(3)
    assert torch.autograd.gradcheck(lambda a, b: mart_loss(a, b, labels), (adversarial, clean))
    third = logits(3, 4, seed=3)
    assert torch.autograd.gradcheck(
        lambda *views: jensen_shannon_views(views), (adversarial, clean, third)
    )


def test_bad_input_is_refused():
    one, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="beta must be finite and >= 0, got -1"):
        mart_loss(one, one, labels, beta=-1.0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), or -100 .* got 0 to 3"):
        mart_loss(one, one, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="labels must be integers of input's shape"):
        boosted_cross_entropy(one, one)
    with pytest.raises(ValueError, match=r"two classes, got logits \[2, 1\]"):
        boosted_cross_entropy(one[:, :1], labels)
    with pytest.raises(ValueError, match="one shape"):
        misclassification_weighted_kl(one, torch.zeros(2, 4), labels)
    with pytest.raises(ValueError, match="reduction must be"):
        boosted_cross_entropy(one, labels, reduction="batchmean")
    with pytest.raises(ValueError, match="two or more views, got 1"):
        jensen_shannon_views([one])
    with pytest.raises(ValueError, match="one shape"):
        jensen_shannon_views([one, torch.zeros(3, 3)])

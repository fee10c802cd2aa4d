"""Mixed labels (CutMix) in every term that knows labels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dkl import methods
from dkl.methods.adversarial import cross_entropy_inner
from dkl.methods.terms import hard_cross_entropy
from tests.methods.conftest import (
    NUM_CLASSES,
    assert_parts_add_up,
    gradients_of,
    make_batch,
    make_context,
    mixed,
    padded,
)
from tests.methods.test_objectives import (
    ADVERSARIAL,
    ATTACK,
    distillation,
    fill_table,
    pairwise,
    soft_ce,
    step,
)

# What cannot take mixed labels says so: see the last tests.
TAKES_MIXED = [name for name in ADVERSARIAL if name not in ("mart", "gkl_at")]


def one_hot(batch):
    return replace(batch, targets=F.one_hot(batch.labels, NUM_CLASSES).double())


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_with_mixed_labels_is_torchs(smoothing):
    batch = mixed(make_batch())
    batch.mask[2] = False
    logits = torch.randn(8, NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    ours = hard_cross_entropy(logits, batch, make_context(batch), smoothing)
    targets = (1 - smoothing) * batch.targets + smoothing / NUM_CLASSES
    rows = -(targets * F.log_softmax(logits, 1)).sum(1)
    expected = rows[batch.mask].mean()
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mixed_labels_of_another_precision(dtype):
    batch = mixed(make_batch())
    logits = torch.randn(8, NUM_CLASSES).to(dtype)
    loss = hard_cross_entropy(logits, batch, make_context(batch))
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), batch.targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)


def test_a_row_that_does_not_count_may_hold_anything():
    batch = make_batch()
    batch.mask[2] = False
    logits = torch.randn(8, NUM_CLASSES, dtype=torch.float64)
    expected = F.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
    logits[2] = torch.nan
    logits.requires_grad_()
    for labelled in (batch, one_hot(batch)):
        loss = hard_cross_entropy(logits, labelled, make_context(batch))
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert (gradient[2] == 0).all()


@pytest.mark.parametrize("name", [*TAKES_MIXED, "kd", "ikl_kd"])
def test_certain_labels_are_the_limit_of_mixed_ones(model, teacher, name):
    """Distributions with all mass on the label give what the labels give."""
    method, batch = {**ADVERSARIAL, **distillation(teacher)}[name](), make_batch()
    if getattr(method, "term", None) is not None and method.term.statistics is not None:
        fill_table(method)
    hard, soft = (gradients_of(method, model, each) for each in (batch, one_hot(batch)))
    for a, b in zip(hard, soft, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", TAKES_MIXED)
def test_parts_of_a_mixed_step_add_up_to_the_whole(model, name):
    method = ADVERSARIAL[name]()
    if method.term is not None and method.term.statistics is not None:
        fill_table(method)
    assert_parts_add_up(method, model, mixed(make_batch(7)), padded)


def test_the_attack_maximises_the_mixed_cross_entropy():
    batch, logits = mixed(make_batch()), torch.randn(8, NUM_CLASSES, dtype=torch.float64)
    expected = -(batch.targets * F.log_softmax(logits, 1)).sum(1)
    torch.testing.assert_close(cross_entropy_inner(logits, logits, batch.targets), expected)


def test_pgd_at_attacks_and_trains_with_the_mixed_labels(model):
    batch = mixed(make_batch())
    output, prepared = step(methods.pgd_at(ATTACK), model, batch)
    _, hard = step(methods.pgd_at(ATTACK), model, make_batch())
    assert not torch.equal(prepared.extras["adversarial"], hard.extras["adversarial"])
    logits = model(prepared.extras["adversarial"])
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, batch.targets))


def test_weights_of_a_mixed_label_are_the_mixture_of_its_rows(model):
    method, batch = ADVERSARIAL["ikl_at"](), mixed(make_batch())
    rows = fill_table(method)
    output, prepared = step(method, model, batch)
    clean, adversarial = model(batch.images), model(prepared.extras["adversarial"])
    w = batch.targets @ rows
    expected = F.cross_entropy(clean, batch.targets)
    expected = (
        expected + (5 * pairwise(adversarial, clean, w) + 2 * soft_ce(adversarial, clean)).mean()
    )
    torch.testing.assert_close(output.loss, expected)


def test_class_statistics_take_a_mixed_sample_in_by_shares(model):
    method, batch = ADVERSARIAL["ikl_at"]().double(), mixed(make_batch())
    batch.mask[3] = False
    step(method, model, batch)
    statistics, kept = method.term.statistics, batch.targets[batch.mask]
    torch.testing.assert_close(statistics.counts, kept.sum(0))
    probs = F.softmax(model(batch.images[batch.mask]) / 4, 1)
    torch.testing.assert_close(statistics.sums, kept.T @ probs)


def test_gkl_with_a_class_table_refuses_mixed_labels(model):
    with pytest.raises(ValueError, match=r"one label per image, .* mixed labels \(CutMix\)"):
        step(ADVERSARIAL["gkl_at"](), model, mixed(make_batch()))


def test_gkl_with_own_weights_takes_mixed_labels(model):
    method = methods.ikl_at(ATTACK, NUM_CLASSES, gamma=0.4, class_weights=False)
    batch = mixed(make_batch())
    output, prepared = step(method, model, batch)
    clean, adversarial = model(batch.images), model(prepared.extras["adversarial"])
    w = F.softmax(clean.detach() / 4, 1).pow(0.4)
    mse = pairwise(adversarial, clean, w).sum() / w.sum(1).square().sum()
    expected = F.cross_entropy(clean, batch.targets) + mse + soft_ce(adversarial, clean).mean()
    torch.testing.assert_close(output.loss, expected)


def test_mart_refuses_mixed_labels(model):
    with pytest.raises(ValueError, match="MART compares one right class with the best wrong one"):
        step(ADVERSARIAL["mart"](), model, mixed(make_batch()))

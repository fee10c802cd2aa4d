"""MART, label smoothing, the order of forward passes, and refusals of the adversarial methods."""

import pytest
import torch
import torch.nn.functional as F

from dkl import methods
from dkl.attacks import PGDSettings, ThreatModel
from tests.methods.conftest import (
    NUM_CLASSES,
    gradients_of,
    make_batch,
    make_context,
    trained_parameters,
)
from tests.methods.test_objectives import ADVERSARIAL, ATTACK, step

TARGETS = torch.eye(NUM_CLASSES).double()
SMOOTHED = {
    "trades": lambda smooth: methods.trades(ATTACK, label_smoothing=0.2, smooth_direction=smooth),
    "ikl_at": lambda smooth: methods.ikl_at(
        ATTACK, NUM_CLASSES, label_smoothing=0.2, smooth_direction=smooth
    ),
}


def assert_same_gradients(method, model, ours, theirs):
    parameters = trained_parameters(method, model)
    pairs = zip(
        torch.autograd.grad(ours, parameters, retain_graph=True, materialize_grads=True),
        torch.autograd.grad(theirs, parameters, materialize_grads=True),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_mart_is_its_formula_on_images_of_the_cross_entropy_attack(model):
    method, batch = methods.mart(ATTACK, beta=4.0), make_batch()
    output, prepared = step(method, model, batch)
    adversarial = prepared.extras["adversarial"]
    assert torch.equal(
        adversarial, step(methods.pgd_at(ATTACK), model, batch)[1].extras["adversarial"]
    )
    p, q = F.softmax(model(batch.images), 1), F.softmax(model(adversarial), 1)
    is_label = F.one_hot(batch.labels, NUM_CLASSES).bool()
    boosted = -q[is_label].log() - (1.0001 - q.masked_fill(is_label, 0).amax(1) + 1e-12).log()
    divergence = (p * (p.log() - (q + 1e-12).log())).sum(1)
    expected = (boosted + 4.0 * divergence * (1.0000001 - p[is_label])).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0.0)
    assert_same_gradients(method, model, output.loss, expected)
    torch.testing.assert_close(
        sum(value for name, value in output.parts.items() if name != "loss"), output.parts["loss"]
    )
    torch.testing.assert_close(output.logits, model(batch.images))


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_labels_are_torchs_and_in_the_clean_cross_entropy_alone(model, name):
    batch = make_batch()
    smoothed, _ = step(SMOOTHED[name](smooth=True), model, batch)
    plain, _ = step(ADVERSARIAL[name](), model, batch)
    # Of 5 classes 0.84 of the mass stays on the label, and 0.04 goes to each other one.
    log_p = F.log_softmax(model(batch.images), 1)
    expected = -((0.8 * TARGETS[batch.labels] + 0.04) * log_p).sum(1).mean()
    torch.testing.assert_close(smoothed.parts["clean_ce"] / 8, expected)
    assert not torch.isclose(smoothed.parts["clean_ce"], plain.parts["clean_ce"])


@pytest.mark.parametrize("name", SMOOTHED)
@pytest.mark.parametrize("smooth", [True, False])
def test_the_direction_pass_smooths_labels_only_where_it_should(model, name, smooth):
    method, batch = SMOOTHED[name](smooth), make_batch()
    ce = step(method, model, batch, phase="direction")[0].parts["clean_ce"] / 8
    smoothing = 0.2 if smooth else 0.0
    logits = model(batch.images)
    torch.testing.assert_close(ce, F.cross_entropy(logits, batch.labels, label_smoothing=smoothing))
    ce = step(method, model, batch)[0].parts["clean_ce"] / 8
    torch.testing.assert_close(ce, F.cross_entropy(logits, batch.labels, label_smoothing=0.2))


def test_acats_published_smoothing_is_this_share():
    """0.9 on the label and 0.1 / 99 on each other class, in torch's words."""
    logits = torch.randn(3, 100, dtype=torch.float64)
    labels = torch.tensor([0, 50, 99])
    published = torch.full((3, 100), 0.1 / 99).double().scatter(1, labels[:, None], 0.9)
    torch.testing.assert_close(
        F.cross_entropy(logits, labels, label_smoothing=0.1 * 100 / 99),
        F.cross_entropy(logits, published),
    )


@pytest.mark.parametrize(
    ("make", "clean_is_first"),
    [
        (lambda: methods.trades(ATTACK), False),
        (lambda: methods.trades(ATTACK, clean_first=True), True),
        (lambda: methods.ikl_at(ATTACK, NUM_CLASSES), False),
        (lambda: methods.ikl_at(ATTACK, NUM_CLASSES, clean_first=True), True),
        (lambda: methods.mart(ATTACK), True),
    ],
)
def test_order_of_the_forward_passes(model, make, clean_is_first):
    method, batch = make(), make_batch()
    prepared = method.prepare(model, batch, make_context(batch))
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.loss(model, prepared, make_context(batch))
    adversarial = prepared.extras["adversarial"]
    expected = [batch.images, adversarial] if clean_is_first else [adversarial, batch.images]
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("name", ["pgd_at", "mart"])
def test_an_attack_on_the_cross_entropy_forwards_no_clean_images(model, name):
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    batch = make_batch()
    ADVERSARIAL[name]().prepare(model, batch, make_context(batch))
    assert len(calls) == ATTACK.num_steps


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("scale", [3e4, -3e4])
def test_extreme_logits_give_finite_losses_and_gradients(model, name, scale):
    method, batch = ADVERSARIAL[name](), make_batch()
    with torch.no_grad():
        model[-1].weight *= scale
    largest = model(batch.images).abs().max().item()
    assert largest > 1e4
    output, _ = step(method, model, batch)
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients_of(method, model, batch))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.trades(ATTACK, beta=-1.0), "beta must be finite and >= 0, got -1"),
        (lambda: methods.mart(ATTACK, beta=float("nan")), "beta must be finite and >= 0, got nan"),
        (lambda: methods.pgd_at(ATTACK, label_smoothing=1.0), r"\[0, 1\), such as 0.1; got 1.0"),
        (lambda: methods.trades(ATTACK, label_smoothing=-0.1), "label_smoothing must be in"),
        (lambda: methods.ikl_at(ATTACK, 5, label_smoothing=2), "label_smoothing must be in"),
        (lambda: methods.trades(ATTACK, second_view_weight=-1), "second_view_weight must be"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_class_table_stays_as_it_is_in_the_direction_pass(model):
    method, batch = methods.ikl_at(ATTACK, NUM_CLASSES).double(), make_batch()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    step(method, model, batch, phase="direction")
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_attack_in_train_mode_updates_batch_norm_as_often_as_it_forwards(model):
    """Rice et al. attack in train mode; MART's attack adds no clean pass to that."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1).double(), *model)
    attack = PGDSettings(ThreatModel("Linf", 0.1), 3, 0.05, batch_norm="train")
    batch = make_batch()
    for make in (methods.pgd_at, methods.mart):
        model[0].num_batches_tracked.zero_()
        make(attack).prepare(model, batch, make_context(batch))
        assert model[0].num_batches_tracked == 3

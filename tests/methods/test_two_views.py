"""Training on two views of every image: [basic; second] in one batch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl import methods
from dkl.engine.noise import SampleNoise
from tests.methods.conftest import (
    NUM_CLASSES,
    assert_parts_add_up,
    gradients_of,
    make_batch,
    make_context,
    mixed,
    padded,
)
from tests.methods.test_objectives import ATTACK, fill_table, pairwise, soft_ce, step

WEIGHT = 0.3
METHODS = {
    "trades": lambda: methods.trades(ATTACK, beta=3.0, second_view_weight=WEIGHT),
    "ikl_at": lambda: methods.ikl_at(
        ATTACK, NUM_CLASSES, mse_weight=5.0, ce_weight=2.0, second_view_weight=WEIGHT
    ),
    "gkl_at": lambda: methods.ikl_at(
        ATTACK, NUM_CLASSES, mse_weight=5.0, ce_weight=2.0, gamma=0.4, second_view_weight=WEIGHT
    ),
}


def made(name):
    method = METHODS[name]()
    rows = None if method.term is None else fill_table(method)
    return method, rows


def robust(name, clean, adversarial, rows, labels):
    if name == "trades":
        p, log_q = F.softmax(clean, 1), F.log_softmax(adversarial, 1)
        return 3.0 * (p * (p.log() - log_q)).sum(1).mean()
    w = rows[labels].pow(0.4 if name == "gkl_at" else 1.0)
    q = pairwise(adversarial, clean, w)
    mse = q.sum() / w.sum(1).square().sum() if name == "gkl_at" else q.mean()
    return 5.0 * mse + 2.0 * soft_ce(adversarial, clean).mean()


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_ce_of_all_images_and_weighted_robust_losses(model, name):
    method, rows = made(name)
    output, prepared = step(method, model, make_batch())
    images = (prepared.images, prepared.extras["view_1"])
    attacked = (prepared.extras["adversarial"], prepared.extras["adversarial_view_1"])
    labels = prepared.labels
    expected = F.cross_entropy(model(torch.cat(images)), torch.cat([labels, labels]))
    for weight, x, x_adv in zip((1.0, WEIGHT), images, attacked, strict=True):
        expected = expected + weight * robust(name, model(x), model(x_adv), rows, labels)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=0.0)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_parts_of_a_step_add_up_to_the_whole(model, name):
    method, _ = made(name)
    assert not method.couples_batch
    assert_parts_add_up(method, model, make_batch(7), padded)


def test_each_view_is_attacked_within_its_own_ball(model):
    batch = make_batch()
    _, prepared = step(METHODS["trades"](), model, batch)
    for image, attacked in (("images", "adversarial"), ("view_1", "adversarial_view_1")):
        clean = batch.images if image == "images" else batch.extras[image]
        distance = (prepared.extras[attacked] - clean).abs().amax((1, 2, 3))
        assert (distance <= 0.1 + 1e-12).all()
        assert (distance > 0.05).all()


def test_the_basic_view_is_attacked_as_without_the_second_one(model):
    """Same noise, same steps: without batch-norm the second view changes nothing for the first."""
    batch = make_batch()

    def attacked(method):
        context = make_context(batch, draw=SampleNoise(0, "prepare", 0, batch.indices))
        return method.prepare(model, batch, context).extras

    two, one = attacked(METHODS["trades"]()), attacked(methods.trades(ATTACK, beta=3.0))
    torch.testing.assert_close(two["adversarial"], one["adversarial"])
    assert "adversarial_view_1" not in one


def test_views_start_from_noise_of_their_own(model):
    """Equal views are attacked from different starts."""
    batch = make_batch()
    batch = replace(batch, extras={"view_1": batch.images.clone()})
    context = make_context(batch, draw=SampleNoise(0, "prepare", 0, batch.indices))
    extras = METHODS["trades"]().prepare(model, batch, context).extras
    assert not torch.equal(extras["adversarial"], extras["adversarial_view_1"])


def test_both_views_pass_through_one_batch_norm_in_one_forward(model):
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=1.0).double(), *model)
    method, batch = METHODS["trades"](), make_batch()
    prepared = method.prepare(model, batch, make_context(batch))
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    method.loss(model, prepared, make_context(batch))
    assert sizes == [16, 16]
    both = torch.cat([batch.images, batch.extras["view_1"]])
    torch.testing.assert_close(model[0].running_mean, both.mean()[None])


def test_class_table_and_accuracy_are_those_of_the_basic_view(model):
    method, _ = made("ikl_at")
    batch = make_batch()
    output, _ = step(method, model, batch)
    logits = model(batch.images)
    torch.testing.assert_close(output.logits, logits)
    assert output.counts == 8
    assert method.term.statistics.counts.sum() == 8
    sums = torch.zeros(NUM_CLASSES, NUM_CLASSES).double()
    sums.index_add_(0, batch.labels, F.softmax(logits / 4, 1).detach())
    torch.testing.assert_close(method.term.statistics.sums, sums)


def test_weight_zero_still_learns_the_labels_of_the_second_view(model):
    batch = make_batch()
    output, _ = step(methods.trades(ATTACK, beta=3.0, second_view_weight=0.0), model, batch)
    alone, _ = step(methods.trades(ATTACK, beta=3.0), model, batch)
    torch.testing.assert_close(output.parts["robust"], alone.parts["robust"])
    ce = F.cross_entropy(model(batch.extras["view_1"]), batch.labels, reduction="sum")
    torch.testing.assert_close(output.parts["clean_ce"], (alone.parts["clean_ce"] + ce) / 2)


def test_mixed_labels_are_those_of_the_basic_view_alone(model):
    """The second view is made from the image that another one was mixed into."""
    batch = mixed(make_batch())
    output, prepared = step(METHODS["trades"](), model, batch)
    ce = (
        F.cross_entropy(model(batch.images), batch.targets)
        + F.cross_entropy(model(batch.extras["view_1"]), batch.labels)
    ) / 2
    torch.testing.assert_close(output.parts["clean_ce"] / 8, ce)
    assert prepared.targets is batch.targets


def test_rows_that_do_not_count_change_nothing(model):
    method, _ = made("ikl_at")
    batch = padded(make_batch())
    kept = gradients_of(method, model, batch)
    other = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    changed = replace(
        batch,
        images=torch.cat([batch.images[:-1], other]),
        labels=torch.cat([batch.labels[:-1], batch.labels[-1:].add(1) % NUM_CLASSES]),
        extras={"view_1": torch.cat([batch.extras["view_1"][:-1], 1 - other])},
    )
    for a, b in zip(kept, gradients_of(method, model, changed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_a_batch_without_a_second_view_is_refused(model):
    batch = replace(make_batch(), extras={})
    with pytest.raises(ValueError, match=r"needs a second view .* \(data.views\)"):
        step(METHODS["trades"](), model, batch)


def test_a_second_view_of_another_size_is_refused(model):
    batch = make_batch()
    batch = replace(batch, extras={"view_1": batch.images[:, :, :3]})
    with pytest.raises(
        ValueError, match=r"shape of the images, \[8, 1, 4, 4\]; got \[8, 1, 3, 4\]"
    ):
        step(METHODS["trades"](), model, batch)

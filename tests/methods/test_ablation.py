"""The steps from KL to IKL: broken asymmetry (BA) and class weights (GI), each by itself.

With m = z(x), n = z(x'), d = m - n, weights w and S the stop-gradient, a corner is

    CE(m, y) + mean_i [ beta/4 sum_jk w_j w_k (d_j - d_k)^2 - beta sum_j S(p(m)_j) log p(n)_j ]

where without BA the n inside d is S(n), without GI w is S(softmax(m)), and with GI the table's row.
"""

import pytest
import torch
import torch.nn.functional as F

from dkl import methods
from tests.methods.conftest import NUM_CLASSES, gradients_of, make_batch
from tests.methods.test_objectives import ATTACK, fill_table, pairwise, soft_ce, step

BETA = 6.0
CORNERS = [(False, False), (True, False), (False, True), (True, True)]
OPTIONS = {"mse_weight": BETA, "ce_weight": BETA, "weight_temperature": 1.0, "inner": "kl"}


def corner(breaks_asymmetry, has_class_weights):
    """Return one of the four methods; they differ in two words."""
    return methods.ikl_at(
        ATTACK,
        NUM_CLASSES,
        break_asymmetry=breaks_asymmetry,
        class_weights=has_class_weights,
        **OPTIONS,
    )


@pytest.mark.parametrize(("breaks_asymmetry", "has_class_weights"), CORNERS)
def test_a_corner_is_its_formula(model, breaks_asymmetry, has_class_weights):
    method = corner(breaks_asymmetry, has_class_weights)
    rows = fill_table(method) if has_class_weights else None
    output, prepared = step(method, model, make_batch())
    clean, adversarial = model(prepared.images), model(prepared.extras["adversarial"])
    w = F.softmax(clean, 1).detach() if rows is None else rows[prepared.labels]
    inside = adversarial if breaks_asymmetry else adversarial.detach()
    robust = BETA * (pairwise(inside, clean, w) + soft_ce(adversarial, clean)).mean()
    expected = F.cross_entropy(clean, prepared.labels) + robust
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=0.0)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_both_it_trains_exactly_as_kl(model):
    """Theorem 1: the gradients of DKL are those of TRADES with the same beta."""
    batch = make_batch()
    decoupled, kl = corner(False, False), methods.trades(ATTACK, beta=BETA)
    for a, b in zip(
        gradients_of(decoupled, model, batch), gradients_of(kl, model, batch), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    images = [step(method, model, batch)[1].extras["adversarial"] for method in (decoupled, kl)]
    assert torch.equal(*images)


def test_each_switch_changes_the_gradients(model):
    batch, gradients = make_batch(), []
    for switches in CORNERS:
        method = corner(*switches)
        if switches[1]:
            fill_table(method)
        gradients.append(torch.cat([g.flatten() for g in gradients_of(method, model, batch)]))
    for number, first in enumerate(gradients):
        for second in gradients[number + 1 :]:
            assert (first - second).norm() > 1e-3 * first.norm()


def test_class_weights_of_own_predictions_are_those_without_them(model):
    """GI changes where the weights come from and nothing else: a table that holds each sample's
    own prediction gives the loss without GI."""
    batch = make_batch(NUM_CLASSES)
    batch.labels.copy_(torch.arange(NUM_CLASSES))
    with_table = corner(True, True).double()
    with_table.term.statistics.table.copy_(F.softmax(model(batch.images), 1).detach())
    for a, b in zip(
        gradients_of(with_table, model, batch),
        gradients_of(corner(True, False), model, batch),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

"""Each method's loss against its formula written out, and which tensors it detaches."""

import pytest
import torch
import torch.nn.functional as F

from dkl import methods
from dkl.attacks import PGDSettings, ThreatModel
from tests.methods.conftest import (
    NUM_CLASSES,
    assert_parts_add_up,
    make_batch,
    make_context,
    padded,
)

ATTACK = PGDSettings(ThreatModel("Linf", 0.1), num_steps=3, step_size=0.05, random_start="uniform")
ADVERSARIAL = {
    "pgd_at": lambda: methods.pgd_at(ATTACK),
    "trades": lambda: methods.trades(ATTACK, beta=3.0),
    "mart": lambda: methods.mart(ATTACK, beta=5.0),
    "ikl_at": lambda: methods.ikl_at(ATTACK, NUM_CLASSES, mse_weight=5.0, ce_weight=2.0),
    "ikl_at_sample_weights": lambda: methods.ikl_at(ATTACK, NUM_CLASSES, class_weights=False),
    "dkl_at": lambda: methods.ikl_at(ATTACK, NUM_CLASSES, break_asymmetry=False),
    "gkl_at": lambda: methods.ikl_at(ATTACK, NUM_CLASSES, gamma=0.4, mse_weight=5.0),
}


def distillation(teacher):
    return {
        "kd": lambda: methods.kd(teacher),
        "ikl_kd": lambda: methods.ikl_kd(teacher, NUM_CLASSES, mse_weight=4.0, temperature=4.0),
        "gkl_kd": lambda: methods.ikl_kd(teacher, NUM_CLASSES, gamma=0.3, mse_weight=4.0),
    }


def pairwise(n, m, w):
    """(1/4) sum_jk w_j w_k (Delta_m - Delta_n)^2 per row, as published."""
    delta = (m[:, :, None] - m[:, None, :]) - (n[:, :, None] - n[:, None, :])
    return 0.25 * (w[:, :, None] * w[:, None, :] * delta.square()).sum((1, 2))


def soft_ce(n, m, temperature=1.0):
    return -(F.softmax(m / temperature, 1).detach() * F.log_softmax(n / temperature, 1)).sum(1)


def fill_table(method, seed=5):
    """Give the class table distinct rows, as after an epoch."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(NUM_CLASSES, NUM_CLASSES, generator=generator).double().softmax(1)
    method.term.statistics.double().table.copy_(rows)
    return rows


def step(method, model, batch, **changes):
    context = make_context(batch, **changes)
    prepared = method.prepare(model, batch, context)
    return method.loss(model, prepared, context), prepared


def test_natural_training_is_smoothed_cross_entropy(model):
    batch = make_batch()
    output, _ = step(methods.NaturalTraining(label_smoothing=0.2), model, batch)
    expected = F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.2)
    torch.testing.assert_close(output.loss, expected)


def test_pgd_at_is_cross_entropy_of_its_images(model):
    output, prepared = step(methods.pgd_at(ATTACK), model, make_batch())
    logits = model(prepared.extras["adversarial"])
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, prepared.labels))


def test_trades_is_clean_ce_plus_beta_kl(model):
    output, prepared = step(ADVERSARIAL["trades"](), model, make_batch())
    clean, adversarial = model(prepared.images), model(prepared.extras["adversarial"])
    divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
    expected = F.cross_entropy(clean, prepared.labels) + 3.0 * divergence
    torch.testing.assert_close(output.loss, expected)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["ikl_at", "dkl_at", "gkl_at", "ikl_at_sample_weights"])
def test_decoupled_at_is_its_published_formula(model, name):
    method = ADVERSARIAL[name]()
    rows = fill_table(method) if method.term.statistics is not None else None
    output, prepared = step(method, model, make_batch())
    clean, adversarial = model(prepared.images), model(prepared.extras["adversarial"])
    gamma = method.term.gamma or 1.0
    w = F.softmax(clean.detach() / 4, 1) if rows is None else rows[prepared.labels].pow(gamma)
    n = adversarial.detach() if name == "dkl_at" else adversarial
    q = pairwise(n, clean, w)
    mse = q.sum() / w.sum(1).square().sum() if name == "gkl_at" else q.mean()
    a = method.term.options.get("mse_weight", 1.0)
    b = method.term.options.get("ce_weight", 1.0)
    expected = (
        F.cross_entropy(clean, prepared.labels) + a * mse + b * soft_ce(adversarial, clean).mean()
    )
    torch.testing.assert_close(output.loss, expected)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_kd_is_hard_ce_plus_t2_kl(model, teacher):
    batch = make_batch()
    output, _ = step(methods.kd(teacher, temperature=4.0), model, batch)
    student, fixed = model(batch.images), teacher.eval()(batch.images)
    divergence = F.kl_div(
        F.log_softmax(student / 4, 1), F.softmax(fixed / 4, 1), reduction="batchmean"
    )
    expected = 0.1 * F.cross_entropy(student, batch.labels) + 0.9 * 16 * divergence
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.25), (1, 0.5), (7, 1.0)])
def test_ikl_kd_is_its_published_formula_with_warmup(model, teacher, epoch, share):
    method = methods.ikl_kd(
        teacher, NUM_CLASSES, mse_weight=8.0, ce_weight=3.0, temperature=4.0, warmup_epochs=4
    )
    rows, batch = fill_table(method), make_batch()
    output, _ = step(method, model, batch, epoch=epoch)
    student, fixed = model(batch.images), teacher.eval()(batch.images)
    soft = 8 * pairwise(student, fixed, rows[batch.labels]) + 3 * soft_ce(student, fixed, 4.0)
    expected = F.cross_entropy(student, batch.labels) + share * soft.mean()
    torch.testing.assert_close(output.loss, expected)


def test_teacher_is_frozen_in_eval_mode_and_not_saved(model, teacher):
    method = methods.ikl_kd(teacher, NUM_CLASSES).double()
    method.train()
    output, prepared = step(method, model, make_batch())
    assert not teacher.training
    assert not prepared.extras["teacher_logits"].requires_grad
    output.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any("teacher" in key for key in method.state_dict())
    assert list(method.parameters()) == []


def test_teacher_follows_the_method_to_another_dtype(teacher):
    method = methods.kd(teacher).float()
    assert next(method.teacher.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", [*ADVERSARIAL, "kd", "ikl_kd", "gkl_kd"])
def test_parts_of_a_step_add_up_to_the_whole(model, teacher, name):
    """Gradients of cut batches, with padded duplicates that do not count, equal the whole's."""
    method = {**ADVERSARIAL, **distillation(teacher)}[name]()
    assert not method.couples_batch
    if getattr(method, "term", None) is not None and method.term.statistics is not None:
        fill_table(method)
    assert_parts_add_up(method, model, make_batch(7), padded)


def test_gkl_with_sample_weights_declares_that_it_couples_the_batch(model):
    method = methods.ikl_at(ATTACK, NUM_CLASSES, gamma=0.4, class_weights=False)
    assert method.couples_batch
    output, prepared = step(method, model, make_batch())
    clean, adversarial = model(prepared.images), model(prepared.extras["adversarial"])
    w = F.softmax(clean.detach() / 4, 1).pow(0.4)
    mse = pairwise(adversarial, clean, w).sum() / w.sum(1).square().sum()
    expected = F.cross_entropy(clean, prepared.labels) + mse + soft_ce(adversarial, clean).mean()
    torch.testing.assert_close(output.loss, expected)
    assert not methods.ikl_at(ATTACK, NUM_CLASSES, gamma=0.4).couples_batch


@pytest.mark.parametrize("name", ["ikl_at", "ikl_kd"])
def test_class_table_learns_from_the_update_pass_only(model, teacher, name):
    method = {**ADVERSARIAL, **distillation(teacher)}[name]()
    method.term.statistics.double()
    batch = make_batch()
    step(method, model, batch, phase="direction")
    assert method.term.statistics.counts.sum() == 0
    step(method, model, batch, phase="update")
    assert method.term.statistics.counts.sum() == len(batch.labels)
    method.on_epoch_end(0)
    reference = model if name == "ikl_at" else teacher.eval()
    tau = method.term.weight_temperature
    probs = F.softmax(reference(batch.images) / tau, 1)
    for label in batch.labels.unique():
        torch.testing.assert_close(
            method.term.statistics.table[label], probs[batch.labels == label].mean(0)
        )


def test_inner_objective_loss_has_both_weights_one(model):
    """The attack of IKL-AT maximises the loss with a = b = 1 whatever the outer weights are."""
    batch = make_batch()
    images = []
    for a, b in ((1.0, 1.0), (20.0, 4.0)):
        method = methods.ikl_at(ATTACK, NUM_CLASSES, mse_weight=a, ce_weight=b)
        fill_table(method)
        images.append(step(method, model, batch)[1].extras["adversarial"])
    assert torch.equal(images[0], images[1])
    kl = methods.ikl_at(ATTACK, NUM_CLASSES, inner="kl")
    fill_table(kl)
    trades = step(methods.trades(ATTACK), model, batch)[1].extras["adversarial"]
    assert torch.equal(step(kl, model, batch)[1].extras["adversarial"], trades)


def test_unknown_inner_objective_is_refused():
    with pytest.raises(ValueError, match="inner must be 'loss' or 'kl', got 'mse'"):
        methods.ikl_at(ATTACK, NUM_CLASSES, inner="mse")


def test_attack_forwards_the_clean_images_once(model):
    """num_steps adversarial passes and one clean pass, not one clean pass per step."""
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    batch = make_batch()
    ADVERSARIAL["ikl_at"]().prepare(model, batch, make_context(batch))
    assert len(calls) == ATTACK.num_steps + 1


def test_an_attack_schedule_is_asked_for_each_epoch(model):
    asked = []

    def schedule(epoch, num_epochs):
        asked.append((epoch, num_epochs))
        return ATTACK

    batch = make_batch()
    methods.trades(schedule).prepare(model, batch, make_context(batch, epoch=3))
    assert asked == [(3, 10)]

"""LBGAT: the formula, who learns from what, and the second network's state."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl import methods
from dkl.attacks import AdversarialWeightPerturbation, PGDSettings, ThreatModel
from tests.engine.tiny_training import (
    InterruptingData,
    assert_same_run,
    tiny_fit,
    tiny_model,
)
from tests.methods.conftest import (
    NUM_CLASSES,
    assert_parts_add_up,
    gradients_of,
    make_batch,
    make_context,
    mixed,
    padded,
    trained_parameters,
)
from tests.methods.test_objectives import ATTACK, step


@pytest.fixture
def guide() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, NUM_CLASSES)
    ).double()


@pytest.fixture
def plain_guide() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, NUM_CLASSES)).double()


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_lbgat_is_its_formula_for_both_networks(model, guide, beta):
    method = methods.lbgat(ATTACK, guide, beta=beta)
    output, prepared = step(method, model, make_batch())
    adversarial, clean = model(prepared.extras["adversarial"]), model(prepared.images)
    shown = guide(prepared.images)
    p, log_q = F.softmax(clean, 1), F.log_softmax(adversarial, 1)
    expected = (
        (adversarial - shown).square().mean()
        + F.cross_entropy(shown, prepared.labels)
        + beta * (p * (p.log() - log_q)).sum(1).mean()
    )
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=0.0)
    parameters = trained_parameters(method, model)
    assert len(parameters) == 4 + 6
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (output.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_model_learns_labels_from_the_guide_alone(model, guide):
    """Other labels change the gradient of the guide's cross-entropy and nothing of the model's."""
    method, batch = methods.lbgat(ATTACK, guide), make_batch()
    first = gradients_of(method, model, batch)
    batch.labels.copy_((batch.labels + 1) % NUM_CLASSES)
    second = gradients_of(method, model, batch)
    for a, b in zip(first[:4], second[:4], strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(first[-1], second[-1])


def test_the_squared_error_moves_the_guide_too(model, plain_guide):
    """Not detached: without it the guide's gradient would be that of its cross-entropy."""
    method, batch = methods.lbgat(ATTACK, plain_guide), make_batch()
    whole = gradients_of(method, model, batch)[4:]
    ce = F.cross_entropy(plain_guide(batch.images), batch.labels)
    alone = torch.autograd.grad(ce, list(plain_guide.parameters()))
    prepared = method.prepare(model, batch, make_context(batch))
    difference = plain_guide(batch.images) - model(prepared.extras["adversarial"]).detach()
    error = torch.autograd.grad(difference.square().mean(), list(plain_guide.parameters()))
    for a, b, c in zip(whole, alone, error, strict=True):
        torch.testing.assert_close(a, b + c)
        assert c.abs().max() > 1e-3


def test_the_attack_is_that_of_trades_and_never_asks_the_guide(model, guide):
    guide.register_forward_hook(lambda *args: pytest.fail("the attack asked the guide"))
    batch = make_batch()
    prepared = methods.lbgat(ATTACK, guide).prepare(model, batch, make_context(batch))
    trades = methods.trades(ATTACK).prepare(model, batch, make_context(batch))
    assert torch.equal(prepared.extras["adversarial"], trades.extras["adversarial"])


def test_training_accuracy_is_the_models_on_clean_images(model, guide):
    batch = make_batch()
    output, _ = step(methods.lbgat(ATTACK, guide), model, batch)
    torch.testing.assert_close(output.logits, model(batch.images))
    assert set(output.parts) == {"loss", "guide_mse", "guide_ce"}
    output, _ = step(methods.lbgat(ATTACK, guide, beta=1.0), model, batch)
    assert set(output.parts) == {"loss", "guide_mse", "guide_ce", "robust"}


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_adversarial_images_are_forwarded_first_and_clean_ones_always(model, guide, beta):
    method, batch = methods.lbgat(ATTACK, guide, beta=beta), make_batch()
    prepared = method.prepare(model, batch, make_context(batch))
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.loss(model, prepared, make_context(batch))
    assert torch.equal(seen[0], prepared.extras["adversarial"])
    assert torch.equal(seen[1], batch.images)
    assert len(seen) == 2


def test_the_guide_is_in_train_mode_throughout(model, guide):
    method, batch = methods.lbgat(ATTACK, guide).eval(), make_batch()
    step(method, model, batch)
    assert guide.training
    assert guide[2].num_batches_tracked == 1
    method.eval()
    step(method, model, batch, phase="direction")
    assert guide.training
    assert all(parameter.requires_grad for parameter in guide.parameters())


def test_the_direction_pass_leaves_the_guide_alone_and_finds_the_same_direction(model, guide):
    method, batch = methods.lbgat(ATTACK, guide, beta=2.0), make_batch()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    direction, _ = step(method, model, batch, phase="direction")
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    direction.loss.backward()
    assert all(parameter.grad is None for parameter in guide.parameters())
    found = [parameter.grad for parameter in model.parameters()]
    update, _ = step(method, model, batch)
    expected = torch.autograd.grad(update.loss, list(model.parameters()))
    torch.testing.assert_close(update.loss, direction.loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(guide[2].running_mean, before["guide.2.running_mean"])


def test_the_guide_is_saved_and_trained(guide):
    method = methods.lbgat(ATTACK, guide)
    assert {f"guide.{name}" for name in guide.state_dict()} == set(method.state_dict())
    assert list(method.parameters()) == list(guide.parameters())
    assert not method.couples_batch


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_parts_of_a_step_add_up_to_the_whole(model, plain_guide, beta):
    method = methods.lbgat(ATTACK, plain_guide, beta=beta)
    assert_parts_add_up(method, model, make_batch(7), padded)
    assert_parts_add_up(method, model, mixed(make_batch(7)), padded)


def test_extreme_logits_give_finite_losses_and_gradients(model, plain_guide):
    with torch.no_grad():
        model[-1].weight *= 1e5
        plain_guide[-1].weight *= -1e5
    method = methods.lbgat(ATTACK, plain_guide, beta=3.0)
    output, prepared = step(method, model, make_batch())
    assert model(prepared.images).abs().max() > 1e4
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients_of(method, model, make_batch()))


def test_wrong_use_is_refused(model):
    with pytest.raises(ValueError, match="beta must be finite and >= 0, got -6"):
        methods.lbgat(ATTACK, nn.Linear(2, 2), beta=-6.0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with pytest.raises(ValueError, match=r"one shape; got \[8, 5\] and \[8, 3\]"):
        step(methods.lbgat(ATTACK, other), model, make_batch())


# In the loop


def fitted(out_dir: Path, guide: nn.Module, **options):
    attack = PGDSettings(ThreatModel("Linf", 0.1), 2, 0.06, "gaussian")
    return tiny_fit(
        out_dir,
        model=tiny_model(batch_norm=True),
        method=methods.lbgat(attack, guide, beta=2.0),
        weight_perturbation=AdversarialWeightPerturbation(0.01, start_epoch=1),
        **options,
    )[0]


def test_a_stopped_run_goes_on_bit_for_bit_with_its_guide(tmp_path: Path) -> None:
    guides = [tiny_model(batch_norm=True, seed=1) for _ in range(3)]
    fitted(tmp_path / "straight", guides[0])
    assert fitted(tmp_path / "stopped", guides[1], data=InterruptingData(4)).stopped_early
    fitted(tmp_path / "stopped", guides[2], resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    start = tiny_model(batch_norm=True, seed=1).double().state_dict()
    for name, value in guides[0].state_dict().items():
        assert torch.equal(value, guides[2].state_dict()[name])
        if value.is_floating_point():
            assert not torch.equal(value, start[name])

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import AdversarialWeightPerturbation, attack_mode

AWP = AdversarialWeightPerturbation(gamma=0.05)


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    ).to(dtype)


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, 8, 8, generator=generator).to(dtype)
    return images, torch.randint(4, (8,), generator=generator)


IMAGES, LABELS = make_batch()


def backward(model, images=IMAGES):
    F.cross_entropy(model(images), LABELS).backward()


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(actual, expected):
    """Equality that tells -0.0 from 0.0 and knows NaN."""
    integers = torch.int64 if expected.dtype == torch.float64 else torch.int32
    return torch.equal(actual.detach().view(integers), expected.view(integers))


def assert_same_parameters(model, expected):
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, expected[name]), name


def proxy_perturbations(model, gamma):
    """The published way: a copy of the model makes an ascent step; its direction is rescaled."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer.zero_grad()
    (-F.cross_entropy(proxy(IMAGES), LABELS)).backward()
    optimizer.step()
    old, new = model.state_dict(), proxy.state_dict()
    perturbations = {}
    for name, weight in old.items():
        if "weight" in name and weight.ndim > 1:
            difference = new[name] - weight
            perturbations[name] = (
                gamma * weight.norm() / (difference.norm() + 1e-20) * difference
            ).detach()
    return perturbations


def test_equals_the_proxy_model():
    model = make_model()
    before = parameters_of(model)
    expected = proxy_perturbations(model, AWP.gamma)
    assert expected.keys() == {"0.weight", "3.weight", "6.weight"}
    with AWP.perturbed(model, lambda: backward(model)):
        for name, parameter in model.named_parameters():
            if name in expected:
                moved = parameter.detach() - before[name]
                torch.testing.assert_close(moved, expected[name], rtol=1e-6, atol=1e-9)
                ratio = moved.norm() / before[name].norm()
                assert ratio.item() == pytest.approx(AWP.gamma, rel=1e-9)
            else:
                # Norms and biases.
                assert same_bits(parameter, before[name])


def test_the_perturbation_raises_the_loss():
    model = make_model()
    with torch.no_grad():
        clean = F.cross_entropy(model(IMAGES), LABELS)
    with AWP.perturbed(model, lambda: backward(model)), torch.no_grad():
        assert F.cross_entropy(model(IMAGES), LABELS) > clean + 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_step_weights_come_back_bit_for_bit(dtype):
    for gamma in (1e-6, 0.01, 3.0, 1e4):
        model = make_model(dtype)
        with torch.no_grad():
            model[6].weight[0, 0] = -0.0
            model[6].weight[0, 1] = torch.finfo(dtype).tiny
        before = parameters_of(model)
        images = IMAGES.to(dtype)
        awp = AdversarialWeightPerturbation(gamma)
        with awp.perturbed(model, lambda m=model, x=images: backward(m, x)):
            assert not torch.equal(model[6].weight, before["6.weight"])
            backward(model, images)
        assert_same_parameters(model, before)
        assert model[6].weight.grad is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_brings_the_weights_back_bit_for_bit(error):
    model = make_model()
    before = parameters_of(model)
    optimizer = torch.optim.SGD([model[6].weight], lr=1.0)

    def fail():
        with AWP.perturbed(model, lambda: backward(model)):
            backward(model)
            optimizer.step()
            raise error

    with pytest.raises(error):
        fail()
    assert_same_parameters(model, before)


def test_an_error_in_the_direction_pass_leaves_no_trace():
    model = make_model()
    before = parameters_of(model)
    buffers = [buffer.clone() for buffer in model.buffers()]

    def compute_gradients():
        backward(model)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), AWP.perturbed(model, compute_gradients):
        pass
    assert_same_parameters(model, before)
    assert all(map(torch.equal, buffers, model.buffers()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_direction_pass_leaves_buffers_and_gradients_alone():
    model = make_model().train()
    model.register_buffer("rebound", torch.tensor(1.0))
    rebound = model.rebound
    buffers = [buffer.clone() for buffer in model.buffers()]
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    gradient = model[0].weight.grad

    def compute_gradients():
        assert model[0].weight.grad is None
        model.rebound = torch.tensor(2.0)
        backward(model)
        # What a data-parallel bucket does to a view of it.
        gradient.zero_()

    with AWP.perturbed(model, compute_gradients):
        assert all(map(torch.equal, buffers, model.buffers()))
        assert model.rebound is rebound
        assert model[1].num_batches_tracked == 0
        assert model[0].weight.grad is gradient
        assert (gradient == 7.0).all()
        assert all(p.grad is None for p in model.parameters() if p is not model[0].weight)
        model(IMAGES)
    # The real forward pass at the perturbed weights counts.
    assert model[1].num_batches_tracked == 1
    assert not torch.equal(model[1].running_mean, buffers[1])


@pytest.mark.parametrize("step_inside", [True, False])
def test_where_the_optimiser_steps_by_hand(step_inside):
    learning_rate, weight_decay = 0.3, 0.1
    model = make_model()
    before = parameters_of(model)
    perturbations = proxy_perturbations(model, 0.05)
    awp = AdversarialWeightPerturbation(0.05, step_inside=step_inside)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    with awp.perturbed(model, lambda: backward(model)):
        backward(model)
        if awp.step_inside:
            optimizer.step()
    if not awp.step_inside:
        optimizer.step()

    reference = make_model()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.add_(perturbations.get(name, torch.zeros(())))
    backward(reference)
    for (name, weight), moved in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Weight decay sees the weights at which the step is made.
        decayed = moved.detach() if step_inside else before[name]
        expected = before[name] - learning_rate * (moved.grad + weight_decay * decayed)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


def test_gamma_zero_does_nothing_at_all():
    model = make_model()
    before = parameters_of(model)
    awp = AdversarialWeightPerturbation(0.0)

    def forbidden():
        raise AssertionError

    with awp.perturbed(model, forbidden):
        assert_same_parameters(model, before)
        with torch.no_grad():
            model[6].weight.add_(1.0)
    assert same_bits(model[6].weight, before["6.weight"] + 1.0)
    assert not awp.active_in(5)


def test_weights_with_non_finite_or_no_gradient_stay():
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = parameters_of(model)

    def compute_gradients():
        backward(model)
        model[3].weight.grad[0, 0, 0, 0] = torch.inf

    with AWP.perturbed(model, compute_gradients):
        assert same_bits(model[0].weight, before["0.weight"])
        assert same_bits(model[3].weight, before["3.weight"])
        assert not torch.equal(model[6].weight, before["6.weight"])
    assert_same_parameters(model, before)


def test_a_zero_gradient_perturbs_nothing():
    model = make_model()
    before = parameters_of(model)
    zero = 0.0 * model(IMAGES).sum()
    with AWP.perturbed(model, zero.backward):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_scale_of_the_gradient_does_not_matter():
    model = make_model(torch.float32)
    images = IMAGES.float()
    moved = []
    for scale in (1.0, 2.0**16):
        with AWP.perturbed(
            model, lambda s=scale: (s * F.cross_entropy(model(images), LABELS)).backward()
        ):
            moved.append(model[3].weight.detach().clone())
    torch.testing.assert_close(moved[0], moved[1])


def test_bfloat16_weights_use_float32_norms():
    torch.manual_seed(0)
    model = nn.Linear(1000, 50, bias=False, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    with AdversarialWeightPerturbation(0.5).perturbed(
        model, lambda: model(torch.ones(2, 1000, dtype=torch.bfloat16)).square().sum().backward()
    ):
        ratio = (model.weight.detach().double() - before.double()).norm() / before.double().norm()
        assert ratio.item() == pytest.approx(0.5, rel=0.01)
    assert torch.equal(model.weight, before)


def test_autocast_sees_the_perturbed_weights():
    model = nn.Linear(8, 4, bias=False)
    inputs = torch.rand(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clean = model(inputs).detach()
        with AdversarialWeightPerturbation(0.5).perturbed(
            model, lambda: model(inputs).float().sum().backward()
        ):
            perturbed = model(inputs).detach()
        after = model(inputs).detach()
    assert (perturbed > clean).all()
    assert torch.equal(after, clean)


def test_tied_weights_move_once():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    before = model[0].weight.detach().clone()
    with AWP.perturbed(model, lambda: model(torch.rand(4, 5)).sum().backward()):
        ratio = (model[0].weight.detach() - before).norm() / before.norm()
        assert ratio.item() == pytest.approx(AWP.gamma, rel=1e-4)
    assert torch.equal(model[0].weight, before)


def test_use_inside_attack_mode_is_refused():
    model = make_model()
    with (
        attack_mode(model),
        pytest.raises(ValueError, match=r"no trainable parameter.*Leave attack_mode"),
        AWP.perturbed(model, lambda: backward(model)),
    ):
        pass


def test_a_direction_pass_without_backward_is_refused():
    model = make_model()
    with (
        pytest.raises(ValueError, match="has to call backward"),
        AWP.perturbed(model, lambda: None),
    ):
        pass


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf")])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma has to be"):
        AdversarialWeightPerturbation(gamma)


def test_start_epoch():
    awp = AdversarialWeightPerturbation(0.005, start_epoch=2)
    assert [awp.active_in(epoch) for epoch in range(4)] == [False, False, True, True]
    with pytest.raises(ValueError, match="counts from 0"):
        AdversarialWeightPerturbation(0.005, start_epoch=-1)


def test_two_processes_perturb_as_one(tmp_path):
    script = Path(__file__).with_name("ddp_perturbation.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "0", "1")
    )
    for stage in ("perturbed", "after"):
        for name, expected in one[stage].items():
            assert torch.equal(first[stage][name], second[stage][name])
            torch.testing.assert_close(first[stage][name], expected, rtol=1e-9, atol=1e-12)

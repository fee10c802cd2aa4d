"""Strategies, their policy gradient, and how a model is tried out one step ahead."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import PGDSettings, ThreatModel, attack_mode, cross_entropy_objective
from dkl.engine.noise import SampleNoise
from dkl.methods.look_ahead import LookAhead
from dkl.methods.protocol import Batch
from dkl.methods.strategy_policy import StrategyPolicy
from tests.methods.conftest import NUM_CLASSES, make_batch
from tests.methods.trajectories import fill, tiny_network

CHOICES = {"eps": (0.05, 0.1, 0.2), "steps": (1, 3), "step_size": (0.02, 0.05)}


def tiny_strategy(num_logits: int, shift: float = 0.0) -> nn.Module:
    layers = nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, num_logits)
    return fill(nn.Sequential(*layers), shift)


def plain_strategy(num_logits: int) -> nn.Module:
    """Return a network without batch-norm, so that rows are independent."""
    return fill(nn.Sequential(nn.Flatten(), nn.Linear(16, num_logits)))


def noise(batch, stream="prepare"):
    return SampleNoise(0, stream, 0, batch.indices, torch.float64)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module, state):
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class Bias(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


# Sampling


def test_strategies_are_drawn_by_inverse_cdf_from_the_softmax_of_each_head():
    logits = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    policy = StrategyPolicy(Bias(logits), CHOICES)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    uniform = torch.stack([grid, grid.flip(0), grid.roll(300)], dim=1)
    actions = policy.sample(torch.zeros(1000, 1), lambda k: uniform[:, :k])
    for head, (column, probs) in enumerate(
        zip(uniform.unbind(1), [part.softmax(0) for part in logits.split([3, 2, 2])], strict=True)
    ):
        cdf = torch.tensor([probs[: i + 1].sum() for i in range(len(probs))])
        expected = torch.tensor([int((cdf <= u).sum()) for u in column])
        assert torch.equal(actions[:, head], expected)
        frequency = torch.bincount(actions[:, head], minlength=len(probs)) / 1000
        torch.testing.assert_close(frequency.double(), probs, atol=1e-3, rtol=0)


def test_without_a_draw_torchs_generator_is_used():
    torch.manual_seed(0)
    policy = StrategyPolicy(Bias([0.0, 1.0, 2.0]), {"eps": (0.1, 0.2, 0.3)})
    actions = policy.sample(torch.zeros(4000, 1))
    frequency = torch.bincount(actions[:, 0], minlength=3) / 4000
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)


def test_probabilities_that_round_to_less_than_one_leave_no_gap():
    policy = StrategyPolicy(Bias([-800.0, 0.0, -800.0]).float(), {"eps": (0.1, 0.2, 0.3)})
    edges = torch.tensor([[0.0], [1 - 2**-24], [0.5]])
    actions = policy.sample(torch.zeros(3, 1), lambda k: edges)
    assert actions[0] == 1
    assert actions[2] == 1
    assert actions.max() <= 2


def test_strategy_of_an_image_does_not_depend_on_its_batch():
    batch = make_batch(6)
    policy = StrategyPolicy(plain_strategy(7), CHOICES)
    whole = policy.sample(batch.images, noise(batch))
    part = policy.sample(
        batch.images[2:5], SampleNoise(0, "prepare", 0, batch.indices[2:5], torch.float64)
    )
    assert torch.equal(whole[2:5], part)
    assert len(whole.unique(dim=0)) > 1


def test_sampling_changes_nothing():
    policy = StrategyPolicy(tiny_strategy(7), CHOICES, momentum=0.9)
    before, generator = state_of(policy), torch.get_rng_state()
    policy.sample(make_batch().images, noise(make_batch()))
    assert_same_state(policy, before)
    assert torch.equal(torch.get_rng_state(), generator)


# Policy gradient


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_update_is_reinforce_with_clipped_gradient_and_sgd(momentum):
    """-r sum_h mean_i log pi, written out, and torch's clipping and optimiser."""
    network, batch = tiny_strategy(7), make_batch(7)
    batch.mask[3] = False
    theirs = copy.deepcopy(network).train()
    policy = StrategyPolicy(network, CHOICES, momentum=momentum, weight_decay=0.01).double()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=momentum, weight_decay=0.01)
    norms = []
    for step, reward in enumerate((0.1, 9.0, 2.0)):
        draw = SampleNoise(0, "prepare", step, batch.indices, torch.float64)
        actions = policy.sample(batch.images, draw)
        logits = theirs(batch.images)
        loss = 0.0
        for head, (start, stop) in enumerate(((0, 3), (3, 5), (5, 7))):
            log_probs = logits[:, start:stop].log_softmax(1)
            rows = [log_probs[i, actions[i, head]] for i in range(7) if batch.mask[i]]
            loss = loss - reward * torch.stack(rows).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item())
        optimizer.step()
        policy.reinforce(
            batch.images,
            actions,
            torch.tensor(reward, dtype=torch.float64),
            mask=batch.mask,
            num_items=batch.mask.sum(),
            lr=0.3,
        )
        for ours, expected in zip(network.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12, check_dtype=True)
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert min(norms) < 1 < max(norms)
    for name, value in network[2].state_dict().items():
        torch.testing.assert_close(value, theirs[2].state_dict()[name], rtol=1e-9, atol=1e-12)
    assert (policy.momentum is None) == (momentum == 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_reward_that_is_not_finite_leaves_parameters_and_momentum(bad):
    batch = make_batch()
    policy = StrategyPolicy(plain_strategy(7), CHOICES, momentum=0.9).double()
    actions = policy.sample(batch.images, noise(batch))
    shared = {"mask": batch.mask, "num_items": batch.mask.sum(), "lr": 0.1}
    policy.reinforce(batch.images, actions, torch.tensor(2.0), **shared)
    before = state_of(policy)
    policy.reinforce(batch.images, actions, torch.tensor(bad), **shared)
    assert_same_state(policy, before)
    policy.reinforce(batch.images, actions, torch.tensor(2.0), **shared)
    assert all(value.isfinite().all() for value in policy.state_dict().values())
    assert not torch.equal(policy.momentum, before["momentum"])


def test_bandit_learns_the_arm_that_pays():
    policy = StrategyPolicy(Bias([0.0] * 5), {"eps": (0.1, 0.2, 0.3), "steps": (1, 2)})
    images, mask = torch.zeros(4, 1), torch.ones(4, dtype=torch.bool)
    for step in range(300):
        actions = policy.sample(images, SampleNoise(0, "x", step, torch.arange(4), torch.float64))
        reward = 4.0 * (actions[:, 0] == 2).double().mean()
        shared = {"mask": mask, "num_items": mask.sum()}
        policy.reinforce(images, actions, reward, lr=0.1, **shared)
    probs = policy.network.logits[:3].softmax(0)
    assert probs[2] > 0.9


# Look-ahead


def test_step_ahead_is_that_of_a_fresh_sgd_on_a_copy():
    model, batch = tiny_network().train(), make_batch()
    model[0].bias.requires_grad_(False)
    model[5].bias.grad = torch.ones_like(model[5].bias)
    theirs = copy.deepcopy(model)
    before = state_of(model)

    def loss_of(network):
        return F.cross_entropy(network(batch.images), batch.labels)

    judge = LookAhead(PGDSettings(ThreatModel("Linf", 0.1), 2, 0.05))
    ahead = judge.step(model, loss_of, 0.4)
    optimizer = torch.optim.SGD(
        [p for p in theirs.parameters() if p.requires_grad],
        lr=0.4,
        momentum=0.9,
        weight_decay=5e-4,
    )
    loss_of(theirs).backward()
    optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ahead.state_dict()[name], value, rtol=1e-12, atol=1e-14)
    assert not torch.equal(ahead[5].weight, model[5].weight)
    assert not torch.equal(ahead[1].running_mean, model[1].running_mean)
    assert_same_state(model, before)
    assert torch.equal(model[5].bias.grad, torch.ones_like(model[5].bias))
    assert model[5].weight.grad is None


def test_an_image_is_robust_when_no_step_of_no_restart_flips_it():
    model, batch = tiny_network().train(), make_batch(60)
    with torch.no_grad():  # confident enough for both outcomes
        model[5].weight.mul_(3)
        batch = replace(batch, labels=model.eval()(batch.images).argmax(1))
        model.train()
    batch.labels[:5] = (batch.labels[:5] + 1) % NUM_CLASSES
    judge = LookAhead(PGDSettings(ThreatModel("Linf", 0.1), 4, 0.03, "uniform"), restarts=2)
    robust, clean = judge.judge(model, batch, noise(batch))
    assert model.training
    draw, expected = noise(batch), torch.ones(60, dtype=torch.bool)
    with attack_mode(model):
        for _ in range(2):
            x = judge.attack.threat.random_start(batch.images, "uniform", draw)
            for _ in range(5):
                x = x.detach().requires_grad_()
                logits = model(x)
                expected &= logits.argmax(1) == batch.labels
                (g,) = torch.autograd.grad(F.cross_entropy(logits, batch.labels), x)
                x = judge.attack.threat.project(x.detach() + 0.03 * g.sign(), batch.images)
    assert torch.equal(robust, expected)
    assert 0 < robust.sum() < clean.sum() == 55
    broken = fill(copy.deepcopy(model))
    nn.init.constant_(broken[5].bias, torch.nan)
    robust, clean = judge.judge(broken, batch, noise(batch))
    assert not robust.any()
    assert not clean.any()


class Bump(nn.Module):
    """The second class wins around 0.5 alone."""

    def forward(self, images):
        return torch.cat([torch.zeros_like(images), 1 - 20 * (images - 0.5).abs()], dim=1)


def test_an_image_that_later_steps_lead_back_is_broken():
    """Both overshoot the bump and end outside of it; the first one starts on it."""
    images, labels = torch.tensor([[0.49], [0.43]]), torch.tensor([0, 0])
    batch = Batch(images, labels, torch.ones(2, dtype=torch.bool), torch.arange(2))
    judge = LookAhead(PGDSettings(ThreatModel("Linf", 0.2), 1, 0.14), restarts=1)
    found = judge.attack.attack(Bump(), images, cross_entropy_objective(labels))
    assert Bump()(found).argmax(1).tolist() == [0, 0]
    robust, clean = judge.judge(Bump(), batch, noise(batch))
    assert robust.tolist() == [False, True]
    assert clean.tolist() == [False, True]

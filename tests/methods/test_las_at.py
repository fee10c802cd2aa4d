"""LAS-AT: the reward of its strategy network, when that learns, and the model's loss."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import ThreatModel, attack_mode, cross_entropy_objective, pgd_attack
from dkl.data.digits import load_digits
from dkl.engine import LoopSettings, cosine, fit
from dkl.engine.noise import SampleNoise
from dkl.methods import NaturalTraining
from dkl.methods.las_at import las_at
from dkl.methods.protocol import Batch
from dkl.models import create_model
from tests.methods.conftest import NUM_CLASSES, make_batch, make_context
from tests.methods.test_strategy_policy import (
    CHOICES,
    Bias,
    assert_same_state,
    noise,
    plain_strategy,
    state_of,
    tiny_strategy,
)
from tests.methods.trajectories import Trajectory, check, rewrite, tiny_network

SETTINGS = {
    "eps": 0.1,
    "eps_choices": CHOICES["eps"],
    "steps_choices": CHOICES["steps"],
    "step_size_choices": CHOICES["step_size"],
    "strategy_lr": 0.1,
    "update_every": 2,
    "lookahead_steps": 3,
    "lookahead_step_size": 0.04,
}
BETAS = (2.0, 4.0, 6.0)
VARIANTS = ("pgd", "trades", "awp")


def make_method(variant="pgd", make_strategy=tiny_strategy, **changes):
    own = {"beta_choices": BETAS} if variant == "trades" else {}
    num_logits = sum(map(len, CHOICES.values())) + len(own.get("beta_choices", ()))
    options = SETTINGS | own | changes
    return las_at(make_strategy(num_logits), variant=variant, **options).double()


def context_for(batch, **changes):
    return make_context(batch, **{"draw": noise(batch), "learning_rate": 0.3} | changes)


def test_strategies_stand_in_the_batch_as_values():
    batch = make_batch(64)
    prepared = make_method("trades").prepare(
        tiny_network().train(), batch, context_for(batch, step=1)
    )
    for name, options in {**CHOICES, "beta": BETAS}.items():
        values = prepared.extras[f"strategy_{name}"]
        assert values.dtype == torch.float64
        assert set(values.tolist()) == set(map(float, options))


def test_policy_learns_the_radius_that_costs_the_model_most(model):
    """The whole reward in place, with the cross-entropy alone: large perturbations pay."""
    method = las_at(
        Bias([0.0, 0.0, 0.0, 0.0]),
        eps=0.01,
        eps_choices=(0.001, 0.4),
        steps_choices=(3,),
        step_size_choices=(0.2,),
        strategy_lr=0.3,
        update_every=1,
        reward_robust=0.0,
        reward_clean=0.0,
        lookahead_steps=1,
        lookahead_restarts=1,
    ).double()
    with torch.no_grad():
        model[1].weight.mul_(4)
    batch = make_batch(4)
    for step in range(150):
        draw = SampleNoise(0, "x", step, batch.indices, torch.float64)
        method.prepare(model, batch, make_context(batch, step=step, draw=draw))
    assert method.policy.network.logits[:2].softmax(0)[1] > 0.8


def reward_by_hand(method, model, prepared, learning_rate):
    """Everything again, with torch's optimiser and plain loops."""
    count = prepared.mask.sum()
    ahead = copy.deepcopy(model)
    optimizer = torch.optim.SGD(ahead.parameters(), lr=learning_rate, weight_decay=5e-4)
    loss_by_hand(method, ahead, prepared).backward()
    optimizer.step()
    draw = noise(prepared)
    draw(len(method.policy.choices)), draw(16)  # spent on strategies and on the random start
    robust, clean = method.lookahead.judge(ahead, prepared, draw)
    with attack_mode(model):
        logits = model(prepared.extras["adversarial"]).detach()
    ce = F.cross_entropy(logits[prepared.mask], prepared.labels[prepared.mask])
    return (
        ce.clamp(0, 10)
        + 4.0 * robust[prepared.mask].sum() / count
        + 2.0 * clean[prepared.mask].sum() / count
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_reward_is_loss_plus_weighted_accuracies_of_the_model_ahead(variant):
    method, model, batch = make_method(variant), tiny_network().train(), make_batch(40)
    batch.mask[5:9] = False
    before, generator = state_of(model), torch.get_rng_state()
    prepared = method.prepare(model, batch, context_for(batch))
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    expected = reward_by_hand(method, model, prepared, 0.3)
    torch.testing.assert_close(method.reward, expected)


def test_cross_entropy_in_the_reward_is_at_most_ten():
    method = make_method(reward_robust=0.0, reward_clean=0.0)
    model, batch = tiny_network().train(), make_batch()
    with torch.no_grad():
        model[5].weight.mul_(1e4)
    method.prepare(model, batch, context_for(batch))
    assert method.reward == 10


def test_model_that_is_not_finite_leaves_the_policy_as_it_was():
    method, model, batch = make_method(strategy_momentum=0.9), tiny_network(), make_batch()
    method.prepare(tiny_network().train(), batch, context_for(batch))
    before = state_of(method)
    nn.init.constant_(model[5].bias, torch.nan)
    method.prepare(model, batch, context_for(batch, step=2))
    for name, value in method.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
        assert value.isfinite().all()


# When the policy learns


def prepared_states(method, contexts, batches=None):
    model = tiny_network().train()
    states = [state_of(method)]
    for number, context in enumerate(contexts):
        batch = make_batch(6, seed=number) if batches is None else batches[number]
        prepared = method.prepare(model, batch, context(batch))
        states.append(state_of(method))
        if batches is None:
            method.loss(model, prepared, context(batch))
    return [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]


def test_policy_learns_every_so_many_steps():
    contexts = [lambda batch, step=step: context_for(batch, step=step) for step in range(5)]
    assert prepared_states(make_method(), contexts) == [True, False, True, False, True]


def test_policy_learns_from_the_first_micro_batch_of_a_step_alone():
    batches = [make_batch(6, seed=number) for number in range(3)]
    contexts = [lambda batch: context_for(batch, step=4)] * 3
    assert prepared_states(make_method(), contexts, batches) == [True, False, False]


def test_nothing_of_the_policy_changes_in_the_direction_pass():
    method, model, batch = make_method(), tiny_network().train(), make_batch()
    prepared = method.prepare(model, batch, context_for(batch, step=1))
    before = state_of(method)
    method.loss(model, prepared, context_for(batch, phase="direction"))
    method.loss(model, prepared, context_for(batch))
    method.prepare(model, batch, context_for(batch, phase="direction"))
    assert_same_state(method, before)


def test_learning_rate_of_the_policy_follows_the_models():
    moves = []
    for factor in (1.0, 0.5):
        method, batch = make_method(make_strategy=plain_strategy), make_batch()
        start = method.policy.network[1].weight.clone()
        method.prepare(tiny_network().train(), batch, context_for(batch, rate_factor=factor))
        moves.append(method.policy.network[1].weight - start)
    torch.testing.assert_close(moves[1], 0.5 * moves[0])
    assert moves[0].norm() > 1e-3


def test_samples_that_do_not_count_do_not_matter(model):
    """Networks without batch-norm: a masked row is as good as none."""
    batch = make_batch(6)
    batch.mask[4] = False
    keep = torch.tensor([0, 1, 2, 3, 5])
    without = Batch(batch.images[keep], batch.labels[keep], batch.mask[keep], batch.indices[keep])
    results = []
    for one in (batch, without):
        method = make_method("trades", plain_strategy)
        prepared = method.prepare(model, one, context_for(one))
        output = method.loss(model, prepared, context_for(one))
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        results.append([method.reward, *method.parameters(), output.loss, *gradients])
        results[-1] += [output.parts[name] for name in sorted(output.parts)]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


# What the model minimises


def loss_by_hand(method, model, prepared, smoothing=0.0):
    counted = [i for i in range(len(prepared.labels)) if prepared.mask[i]]
    adversarial = model(prepared.extras["adversarial"])
    source = model(prepared.images) if method.variant == "trades" else adversarial
    total = 0.0
    for i in counted:
        y = int(prepared.labels[i])
        row = source[i].log_softmax(0)
        others = row.sum() - row[y]
        total = total - (1 - smoothing) * row[y] - smoothing / (NUM_CLASSES - 1) * others
        if method.variant == "trades":
            p, q = source[i].log_softmax(0), adversarial[i].log_softmax(0)
            total = total + prepared.extras["strategy_beta"][i] * (p.exp() * (p - q)).sum()
    return total / len(counted)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_its_published_formula(variant, smoothing):
    method = make_method(variant, label_smoothing=smoothing)
    model, batch = tiny_network().train(), make_batch(10)
    batch.mask[2] = False
    prepared = method.prepare(model, batch, context_for(batch))
    assert not prepared.extras["adversarial"].requires_grad
    output = method.loss(model, prepared, context_for(batch))
    expected = loss_by_hand(method, model, prepared, smoothing)
    torch.testing.assert_close(output.loss, expected)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attack_maximises_the_cross_entropy_with_each_images_strategy(variant):
    method, model, batch = make_method(variant), tiny_network().train(), make_batch(12)
    prepared = method.prepare(model, batch, context_for(batch, step=1))
    draw = noise(batch)
    draw(len(method.policy.choices))
    start = ThreatModel("Linf", 0.1).random_start(batch.images, "uniform", draw)
    model.eval()
    for i in range(12):
        row, x = slice(i, i + 1), start[i : i + 1]
        eps, steps, size = (
            prepared.extras[f"strategy_{name}"][i] for name in ("eps", "steps", "step_size")
        )
        for _ in range(int(steps)):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(x), batch.labels[row]), x)
            x = x.detach() + size * g.sign()
            x = torch.min(torch.max(x, batch.images[row] - eps), batch.images[row] + eps)
            x = x.clamp(0, 1)
        if variant == "awp":
            x = torch.min(torch.max(x, batch.images[row] - 0.1), batch.images[row] + 0.1)
        found = prepared.extras["adversarial"][row]
        torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_only_some_variants_bring_images_back_into_the_ball():
    distances = {}
    for variant, project in (("pgd", False), ("pgd", True), ("awp", False)):
        method = make_method(variant, project=project, step_size_choices=(0.2, 0.2))
        model, batch = tiny_network().train(), make_batch(12)
        found = method.prepare(model, batch, context_for(batch)).extras["adversarial"]
        distances[variant, project] = (found - batch.images).abs().max().item()
    assert distances["pgd", False] > 0.19
    assert distances["pgd", True] == distances["awp", False] == pytest.approx(0.1)


def test_mixed_labels_take_the_place_of_hard_ones():
    targets = torch.rand(8, NUM_CLASSES, dtype=torch.float64).softmax(1)
    batch = replace(make_batch(), targets=targets)
    method, model = make_method(), tiny_network().train()
    prepared = method.prepare(model, batch, context_for(batch))
    output = method.loss(model, prepared, context_for(batch))
    rows = model(prepared.extras["adversarial"]).log_softmax(1)
    torch.testing.assert_close(output.loss, -(targets * rows).sum(1).mean())


def test_records_say_what_the_policy_does():
    method, model, batch = make_method("trades"), tiny_network().train(), make_batch(10)
    batch.mask[7:] = False
    prepared = method.prepare(model, batch, context_for(batch))
    output = method.loss(model, prepared, context_for(batch))
    assert output.counts == 7
    assert output.parts.keys() >= {"loss", "clean_ce", "robust", "reward", "strategy_steps"}
    for name in ("eps", "steps", "step_size", "beta"):
        expected = prepared.extras[f"strategy_{name}"][:7].sum()
        torch.testing.assert_close(output.parts[f"strategy_{name}"], expected)
    torch.testing.assert_close(output.parts["reward"] / output.counts, method.reward)
    assert 0 < method.reward < 4 + 2 + 10


def test_batch_is_coupled_and_no_other_optimiser_takes_the_strategy_network():
    method = make_method(strategy_momentum=0.9)
    assert method.couples_batch
    assert not any(parameter.requires_grad for parameter in method.parameters())
    saved = method.state_dict()
    assert {"reward", "policy.momentum", "policy.network.1.weight"} <= saved.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "mart"}, 'variant must be "pgd", "trades" or "awp", got \'mart\''),
        ({"norm": "L2"}, "defined for norm \"Linf\", got 'L2'"),
        ({"variant": "trades"}, "needs beta_choices"),
        ({"beta_choices": (1.0,)}, 'ignored by variant "pgd"'),
        ({"variant": "trades", "beta_choices": (-1.0,)}, "beta_choices must be >= 0"),
        ({"eps_choices": ()}, "eps_choices needs at least one option"),
        ({"eps_choices": (8.0,)}, "Did you mean 8/255"),
        ({"steps_choices": (0, 1)}, "steps_choices takes whole numbers of at least 1, got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"update_every": 0}, "update_every takes whole numbers"),
        ({"lookahead_restarts": 0}, "lookahead_restarts takes whole numbers"),
        ({"strategy_momentum": 1.0}, "momentum in"),
        ({"strategy_weight_decay": -0.1}, "weight decay >= 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        las_at(tiny_strategy(30), **changes)


def test_networks_that_do_not_fit_are_refused():
    batch = make_batch()
    method = las_at(plain_strategy(31))
    with pytest.raises(ValueError, match=r"13 \(eps\) \+ 12 \(steps\).*num_classes=30"):
        method.prepare(tiny_network(), batch, context_for(batch))
    with pytest.raises(ValueError, match="no parameters"):
        las_at(nn.Flatten())
    method = make_method(label_smoothing=0.9)
    with pytest.raises(ValueError, match=r"less for the true one of 5 classes.*at most 0\.8"):
        method.prepare(tiny_network(), batch, context_for(batch))


# As a whole

TRAJECTORIES = {
    "las_at_pgd": Trajectory(lambda: make_method(label_smoothing=0.3)),
    "las_at_trades": Trajectory(
        lambda: make_method("trades", strategy_momentum=0.9, strategy_weight_decay=5e-4)
    ),
    "las_at_awp": Trajectory(
        lambda: make_method("awp", update_every=1, reward_robust=1.0, reward_clean=1.0), awp=0.01
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    check(name, TRAJECTORIES[name])


def train_on_digits(method, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("convnet_small", 10, in_channels=1, width=12)
    fit(
        method,
        model,
        load_digits()[0],
        settings=LoopSettings(epochs=3, batch_size=64, trackers=()),
        out_dir=folder,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=5e-4),
        schedule=cosine(3),
    )
    return model.eval()


def robust_accuracy(model: nn.Module) -> float:
    test = load_digits()[1]
    images, labels = test.images.float() / 255, test.labels
    found = pgd_attack(
        model,
        images,
        cross_entropy_objective(labels),
        threat=ThreatModel("Linf", 0.15),
        num_steps=10,
        step_size=0.04,
    )
    return (model(found).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_digits_are_learnt_robustly(tmp_path, variant):
    own = {"beta_choices": (3.0, 5.0)} if variant == "trades" else {}
    torch.manual_seed(1)
    strategy = create_model("convnet_small", 11 + (variant == "trades") * 2, in_channels=1, width=8)
    method = las_at(
        strategy,
        variant=variant,
        eps=0.15,
        eps_choices=(0.05, 0.1, 0.15, 0.2),
        steps_choices=(1, 2, 3, 4),
        step_size_choices=(0.05, 0.08, 0.12),
        strategy_lr=0.01,
        update_every=5,
        lookahead_steps=4,
        lookahead_step_size=0.05,
        lookahead_restarts=1,
        **own,
    )
    model = train_on_digits(method, tmp_path / "las_at")
    assert robust_accuracy(model) > 0.4
    if variant == "pgd":
        natural = train_on_digits(NaturalTraining(), tmp_path / "natural")
        assert robust_accuracy(natural) < 0.2


if __name__ == "__main__":
    rewrite(TRAJECTORIES, __spec__.name)

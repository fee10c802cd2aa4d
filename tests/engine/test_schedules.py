"""Schedules against PyTorch's schedulers and the published formulas."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from dkl.engine.schedules import (
    attack_steps,
    constant,
    cosine,
    linear_ramp,
    one_cycle,
    one_cycle_momentum,
    per_epoch,
    set_rates,
    step_decay,
    with_first_epoch,
    with_warmup,
)


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)


def torch_values(optimizer: torch.optim.SGD, scheduler: LRScheduler, count: int, key: str = "lr"):
    values = []
    for _ in range(count):
        values.append(optimizer.param_groups[0][key])
        optimizer.step()
        scheduler.step()
    return values


def test_cosine_is_pytorchs() -> None:
    optimizer = sgd()
    expected = torch_values(optimizer, CosineAnnealingLR(optimizer, 20), 20)
    assert [cosine(20)(epoch) for epoch in range(20)] == pytest.approx(expected)


def test_cosine_published_forms() -> None:
    num_epochs = 200
    official = per_epoch(cosine(num_epochs + 1, offset=1))
    other = per_epoch(cosine(num_epochs))
    for epoch in range(1, num_epochs + 1):
        progress = epoch - 1 + 0.4
        assert 0.2 * official(progress) == pytest.approx(
            0.1 * (1 + math.cos(math.pi * epoch / (num_epochs + 1)))
        )
        assert 0.2 * other(progress) == pytest.approx(
            0.1 * (1 + math.cos(math.pi * (epoch - 1) / num_epochs))
        )


def test_cosine_ends_at_final_and_stays() -> None:
    schedule = cosine(10, final=0.1)
    assert schedule(0) == 1
    assert schedule(10) == pytest.approx(0.1)
    assert schedule(15) == pytest.approx(0.1)


def test_step_decay_is_pytorchs() -> None:
    optimizer = sgd()
    expected = torch_values(optimizer, MultiStepLR(optimizer, [4, 7], gamma=0.3), 10)
    assert [step_decay([4, 7], 0.3)(epoch) for epoch in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("steps_per_epoch", [1, 4])
def test_one_cycle_is_pytorchs(steps_per_epoch: int) -> None:
    total = 40 * steps_per_epoch
    unit = 1 / steps_per_epoch
    for key, schedule in {
        "lr": one_cycle(40, pct_start=0.25, unit=unit),
        "momentum": one_cycle_momentum(40, pct_start=0.25, unit=unit),
    }.items():
        optimizer = sgd()
        scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=total, pct_start=0.25)
        values = []
        for step in range(total):
            values.append(optimizer.param_groups[0][key])
            optimizer.step()
            if step + 1 < total:
                scheduler.step()
        ours = [schedule(step / steps_per_epoch) for step in range(total)]
        assert ours == pytest.approx(values, abs=1e-9)


def test_dm_at_cycles_rate_and_momentum_as_pytorch_does() -> None:
    # 400 epochs, peak after 2.5 % of them, evaluated once an epoch; the momentum of the optimiser
    # is replaced by the cycle's.
    optimizer = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr=0.2, momentum=0.9, nesterov=True
    )
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=400, pct_start=0.025)
    rate = per_epoch(one_cycle(400, pct_start=0.025, unit=1))
    momentum = per_epoch(one_cycle_momentum(400, pct_start=0.025, unit=1))
    group = {"initial_lr": 0.2, "momentum": 0.9}
    seen = []
    for epoch in range(400):
        set_rates([group], epoch + 0.7, rate, momentum)
        theirs = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(theirs["lr"], rel=1e-9)
        assert group["momentum"] == pytest.approx(theirs["momentum"], rel=1e-12)
        seen.append((group["lr"], group["momentum"]))
        optimizer.step()
        if epoch < 399:
            scheduler.step()
    assert seen[0] == pytest.approx((0.2 / 25, 0.95))
    assert max(seen) == seen[9] == pytest.approx((0.2, 0.85))
    assert seen[-1] == pytest.approx((0.2 / 25e4, 0.95))


def test_first_epoch_has_a_factor_of_its_own() -> None:
    schedule = with_first_epoch(step_decay([75, 90]), 0.2)
    assert [schedule(progress) for progress in (0, 0.5, 0.999)] == [0.2] * 3
    for progress in (1, 1.5, 74.9, 75, 92):
        assert schedule(progress) == step_decay([75, 90])(progress)
    assert per_epoch(schedule)(0.9) == 0.2


def test_warmup_meets_the_schedule() -> None:
    schedule = with_warmup(cosine(10), 2, start=0.5)
    assert schedule(0) == 0.5
    assert schedule(1) == pytest.approx(0.75 * cosine(10)(1))
    for progress in (2, 3.5, 9):
        assert schedule(progress) == cosine(10)(progress)


def test_linear_ramp_over_the_run_or_its_start() -> None:
    assert [linear_ramp(5)(epoch) for epoch in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [linear_ramp(2)(epoch) for epoch in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_attack_budgets() -> None:
    assert attack_steps("low", 8)(7) == (2, 1.0)
    assert {attack_steps("high", 8)(epoch) for epoch in range(8)} == {(5, 0.5)}
    intended = [attack_steps("high_intended", 8)(epoch) for epoch in range(8)]
    assert [steps.num_steps for steps in intended] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert all(steps.num_steps * steps.step_factor == pytest.approx(2) for steps in intended)


def test_rates_are_set_in_every_group() -> None:
    groups = [{"initial_lr": 1.0}, {"initial_lr": 0.1, "betas": (0.9, 0.99)}]
    set_rates(groups, 5, step_decay([3], 0.5), constant(0.7))
    assert groups[0] == {"initial_lr": 1.0, "lr": 0.5, "momentum": 0.7}
    assert groups[1] == {"initial_lr": 0.1, "lr": 0.05, "betas": (0.7, 0.99)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(0), "num_epochs must be positive"),
        (lambda: step_decay([5, 5]), "must increase"),
        (lambda: one_cycle(10, pct_start=1.5), "pct_start"),
        (lambda: one_cycle(3, pct_start=0.025, unit=1), "pct_start"),
        (lambda: with_first_epoch(constant(), -0.1), "must not be negative"),
        (lambda: with_warmup(constant(), 0), "num_epochs must be positive"),
        (lambda: linear_ramp(0), "num_epochs must be positive"),
        (lambda: attack_steps("medium", 10), "'low', 'high' or 'high_intended'"),
    ],
)
def test_bad_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

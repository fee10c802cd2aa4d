"""Averaged weights against the closed form, for every policy."""

import pytest
import torch
from torch import nn

from dkl.engine.averaging import AverageSettings, WeightAverage


def set_all(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def averaged(settings: AverageSettings, values: list[float], model: nn.Module | None = None):
    """Feed constant weights, one per unit of progress, after a start at 0."""
    model = model or nn.BatchNorm1d(2)
    set_all(model, 0)
    average = WeightAverage(model, settings)
    for number, value in enumerate(values, start=1):
        set_all(model, value)
        average.update(model, progress=number)
    return average


def test_closed_form() -> None:
    average = averaged(AverageSettings(decay=0.75), [4, 8])
    expected = 0.75 * (0.25 * 4) + 0.25 * 8
    assert torch.allclose(average.model.weight, torch.tensor(expected))


def test_buffer_policies() -> None:
    averaging = averaged(AverageSettings(decay=0.5), [4.0, 8.0]).model
    copying = averaged(AverageSettings(decay=0.5, buffers="copy"), [4.0, 8.0]).model
    assert torch.equal(averaging.running_mean, torch.full((2,), 5.0))
    assert torch.equal(copying.running_mean, torch.full((2,), 8.0))
    assert torch.equal(copying.weight, averaging.weight)
    assert averaging.num_batches_tracked == copying.num_batches_tracked == 8
    assert averaging.num_batches_tracked.dtype == torch.int64


def test_before_its_start_it_is_a_copy() -> None:
    settings = AverageSettings(decay=0.5, start_epoch=2)
    assert torch.equal(averaged(settings, [4, 8]).model.weight, torch.full((2,), 8.0))
    assert torch.equal(averaged(settings, [4, 8, 16]).model.weight, torch.full((2,), 12.0))


def test_ramp_counts_from_the_start() -> None:
    average = averaged(AverageSettings(decay=0.9, start_epoch=1, ramp=True), [4, 8])
    decay = 2 / 11
    assert torch.allclose(average.model.weight, torch.tensor(decay * 4 + (1 - decay) * 8))


def test_ramp_is_dm_ats_one_update_earlier() -> None:
    """DM-AT: decay 0 for the first steps, then min(tau, (1 + d) / (10 + d)), d from 0."""
    tau, warmup = 0.5, 3
    settings = AverageSettings(decay=tau, start_epoch=warmup, ramp=True, buffers="copy")
    values = [4.0, 8.0, 16.0, -3.0, 5.0, 11.0, 2.0, 7.0, 1.0, 9.0, 6.0, 3.0]
    ours = averaged(settings, values)
    expected = 0.0
    for step, value in enumerate(values):
        d = step - warmup + 1  # published: without the 1
        decay = min(tau, (1 + d) / (10 + d)) if step >= warmup else 0.0
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ours.model.weight, torch.full((2,), expected))
    assert torch.equal(ours.model.running_mean, torch.full((2,), values[-1]))


def test_tied_weights_are_averaged_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight

    average = averaged(AverageSettings(decay=0.5), [8], Tied())
    assert average.model.first.weight is average.model.second.weight
    assert torch.equal(average.model.first.weight, torch.full((2, 2), 4.0))


def test_average_is_separate_frozen_and_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    average = WeightAverage(model, AverageSettings(decay=0.5))
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {id(tensor) for tensor in model.parameters()}
    assert not own & {id(tensor) for tensor in average.model.parameters()}


def test_counters_survive() -> None:
    settings = AverageSettings(decay=0.9, ramp=True)
    straight = averaged(settings, [4, 8, 16])
    first = averaged(settings, [4, 8])
    second = WeightAverage(nn.BatchNorm1d(2), settings)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    model = nn.BatchNorm1d(2)
    set_all(model, 16)
    second.update(model, progress=3)
    assert torch.equal(second.model.weight, straight.model.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay must be in"),
        ({"decay": 0.9, "per": "batch"}, "per must be"),
        ({"decay": 0.9, "buffers": "none"}, "buffers must be"),
        ({"decay": 0.9, "start_epoch": -1}, "start_epoch"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AverageSettings(**options)

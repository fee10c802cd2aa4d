"""Golden trajectories of distillation; run as a script to store new ones."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.methods.distillation_cases import NAMES, make, networks
from tests.methods.trajectories import NUM_SAMPLES, Trajectory, check, fill, rewrite


def student() -> nn.Module:
    return fill(networks(batch_norm=True)[0])


def filled_method(name: str) -> nn.Module:
    """Return a method whose own layers and memory come from formulas."""
    teacher = fill(networks()[1], 0.7)
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            wave = torch.arange(layer.num_features, dtype=torch.float64).sin()
            layer.running_mean.copy_(0.1 * wave)
            layer.running_var.copy_(1 + 0.3 * wave)
    method = fill(make(name, networks(batch_norm=True)[0], teacher.eval(), NUM_SAMPLES), 0.3)
    for key, buffer in method.named_buffers():
        if key.startswith("banks."):
            wave = torch.arange(buffer.numel(), dtype=torch.float64).mul(0.9).sin()
            buffer.copy_(wave.view_as(buffer))
    return method


TRAJECTORIES = {
    name: Trajectory(partial(filled_method, name), student, learning_rate=0.02) for name in NAMES
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_twenty_steps_are_the_stored_ones(name):
    check(name, TRAJECTORIES[name])


if __name__ == "__main__":
    rewrite(TRAJECTORIES, __spec__.name)

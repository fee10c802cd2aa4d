"""Golden trajectories: twenty steps of a method on a tiny network, against stored numbers.

A test module names its trajectories in one table, compares each with ``check``, and rewrites the
stored numbers when it is run as a script:

    TRAJECTORIES = {"mart": Trajectory(lambda: methods.mart(ATTACK))}

    @pytest.mark.parametrize("name", TRAJECTORIES)
    def test_trajectory(name):
        check(name, TRAJECTORIES[name])

    if __name__ == "__main__":
        rewrite(TRAJECTORIES, __spec__.name)

    python -m tests.methods.test_trajectories [NAME ...]

Everything is made from closed formulas and hashed noise in float64, so that no generator of torch
is in the way of another version. What is stored: the loss of every step, and of every tensor of
model and method at the end its norm and its product with a fixed vector.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dkl.attacks import AdversarialWeightPerturbation
from dkl.engine.noise import SampleNoise
from dkl.methods.protocol import Batch, StepContext
from tests.methods.conftest import NUM_CLASSES

FOLDER = Path(__file__).parents[1] / "golden"
NUM_STEPS, STEPS_PER_EPOCH, BATCH_SIZE, NUM_SAMPLES = 20, 5, 12, 30
LEARNING_RATE = 0.2


def fill(model: nn.Module, shift: float = 0.0) -> nn.Module:
    """Give a network weights from a formula, in float64."""
    model.double()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            wave = torch.arange(parameter.numel(), dtype=torch.float64).mul(1.7).add(number + shift)
            values = wave.sin().view_as(parameter)
            if parameter.ndim > 1:
                parameter.copy_(values * (1.5 / parameter[0].numel() ** 0.5))
            else:  # near one for the scales of batch-norm, near zero for shifts and biases
                parameter.copy_(float(name.endswith("weight")) + 0.1 * values)
    return model


def tiny_network(shift: float = 0.0) -> nn.Module:
    """Return a network with batch-norm, whose statistics tell the order of forward passes."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, NUM_CLASSES),
    )
    return fill(model, shift)


@dataclass(frozen=True)
class Trajectory:
    """What to train.

    Args:
        make_method: returns the method; it is put into float64.
        make_model: returns the network in float64; see ``fill``.
        num_views: further views in ``extras["view_1"]``, ...
        awp: gamma of weight perturbation from epoch 1 on; 0: none.
        mixed_labels: give ``Batch.targets``.
        learning_rate: of all steps.
    """

    make_method: Callable[[], nn.Module]
    make_model: Callable[[], nn.Module] = tiny_network
    num_views: int = 0
    awp: float = 0.0
    mixed_labels: bool = False
    learning_rate: float = LEARNING_RATE


def run(trajectory: Trajectory) -> dict[str, object]:
    """Train, and return what is stored."""
    method, model = trajectory.make_method().double(), trajectory.make_model().train()
    own = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*model.parameters(), *own], lr=trajectory.learning_rate)
    perturbation = AdversarialWeightPerturbation(trajectory.awp, start_epoch=1)
    losses: list[float] = []
    for step in range(NUM_STEPS):
        epoch = step // STEPS_PER_EPOCH
        batch = _batch(step, trajectory)
        prepared = method.prepare(model, batch, _context(batch, step, "prepare", "update"))

        def backward(phase: str, batch: Batch = prepared, step: int = step) -> float:
            output = method.loss(model, batch, _context(batch, step, "loss", phase))
            output.loss.backward()
            return output.loss.item()

        if perturbation.active_in(epoch):
            with perturbation.perturbed(model, lambda: backward("direction")):
                optimizer.zero_grad()
                losses.append(backward("update"))
                optimizer.step()
        else:
            losses.append(backward("update"))
            optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % STEPS_PER_EPOCH == 0:
            method.on_epoch_end(epoch)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"method.{name}": value for name, value in method.state_dict().items()}
    tensors = {name: v for name, v in state.items() if isinstance(v, Tensor)}
    return {"losses": losses, "state": {name: _digest(v) for name, v in tensors.items()}}


def check(name: str, trajectory: Trajectory) -> None:
    """Assert that a trajectory is the stored one."""
    stored, found = json.loads(_path(name).read_text()), run(trajectory)
    assert found["losses"] == pytest.approx(stored["losses"], rel=1e-9)
    assert found["state"].keys() == stored["state"].keys()
    for entry, values in found["state"].items():
        assert values == pytest.approx(stored["state"][entry], rel=1e-9, abs=1e-10), entry


def rewrite(trajectories: Mapping[str, Trajectory], module: str) -> None:
    """Store what the trajectories are now: all of them, or those named on the command line."""
    for name in sys.argv[1:] or trajectories:
        content = {
            "_about": (
                f"{NUM_STEPS} steps of plain SGD in float64 on a tiny network; made by `python -m "
                f"{module} {name}` with torch {metadata.version('torch')}, see "
                "tests/methods/trajectories.py. losses: of each step; state: of each tensor at the "
                "end, its norm and its product with cos(0), cos(1), ..."
            ),
            **run(trajectories[name]),
        }
        _path(name).write_text(json.dumps(content, indent=1) + "\n")


def _path(name: str) -> Path:
    return FOLDER / f"trajectory_{name}.json"


def _digest(value: Tensor) -> list[float]:
    flat = value.detach().double().flatten()
    vector = torch.arange(flat.numel(), dtype=torch.float64).cos()
    return [flat.norm().item(), (flat * vector).sum().item()]


def _batch(step: int, trajectory: Trajectory) -> Batch:
    """Return a batch whose last sample is a padded duplicate at every third step."""
    indices = (step * BATCH_SIZE + torch.arange(BATCH_SIZE)) % NUM_SAMPLES
    mask = torch.ones(BATCH_SIZE, dtype=torch.bool)
    mask[-1] = step % 3 != 0
    labels = (indices * 7) % NUM_CLASSES
    extras = {f"view_{k}": _images(indices, labels, k) for k in range(1, trajectory.num_views + 1)}
    targets = None
    if trajectory.mixed_labels:
        first = nn.functional.one_hot(labels, NUM_CLASSES).double()
        share = SampleNoise(3, "share", step, indices, torch.float64)(1)
        targets = share * first + (1 - share) * first.roll(1, 0)
    return Batch(_images(indices, labels, 0), labels, mask, indices, extras, targets)


def _images(indices: Tensor, labels: Tensor, view: int) -> Tensor:
    noise = SampleNoise(3, "images", view, indices, torch.float64)(16)
    pattern = (torch.arange(16) * (labels[:, None] + 1.0)).double().sin()
    return (0.6 * noise + 0.2 + 0.2 * pattern).view(-1, 1, 4, 4)


def _context(batch: Batch, step: int, stream: str, phase: str) -> StepContext:
    return StepContext(
        epoch=step // STEPS_PER_EPOCH,
        num_epochs=NUM_STEPS // STEPS_PER_EPOCH,
        step=step,
        num_items=batch.mask.sum(),
        step_labels=batch.labels[batch.mask],
        loss_scale=1.0,
        draw=SampleNoise(0, stream, step, batch.indices, torch.float64),
        learning_rate=LEARNING_RATE,
        rate_factor=1.0,
        phase=phase,
    )

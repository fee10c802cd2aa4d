"""Tiny models, trained in a moment on real digits."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A trained model and test samples it has not seen."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def take(self, num_samples: int) -> "Problem":
        return Problem(self.model, self.images[:num_samples], self.labels[:num_samples])


def make_model(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))


@functools.cache
def train(num_classes: int) -> Problem:
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images, labels = images[labels < num_classes], labels[labels < num_classes]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model(num_classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            noisy = (images[100:] + 0.1 * torch.randn_like(images[100:])).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(noisy), labels[100:]).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return Problem(model, images[:100].contiguous(), labels[:100])


@pytest.fixture(scope="session")
def train_problem():
    """(num_classes) -> problem with a shared model, which must not be changed."""
    return train


@pytest.fixture
def make_problem():
    """(num_classes, num_samples) -> problem; the model is a fresh copy."""

    def make(num_classes: int = 10, num_samples: int = 100) -> Problem:
        problem = train(num_classes)
        problem = Problem(copy.deepcopy(problem.model), problem.images, problem.labels)
        return problem.take(num_samples)

    return make


@pytest.fixture
def digits(make_problem) -> Problem:
    return make_problem()


@pytest.fixture
def quick_attacks(monkeypatch):
    """AutoAttack with few steps and queries, for tests in which its strength is not the point."""
    import pyautoattack

    from dkl.evaluation import auto_attack_phases

    class QuickAutoAttack(pyautoattack.AutoAttack):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.apgd.n_iter = self.apgd_targeted.n_iter = 10
            # Under L1 each radius of the schedule has its part of these.
            self.apgd.n_iter_orig = self.apgd_targeted.n_iter_orig = 10
            self.fab.n_iter = 5

    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    monkeypatch.setattr(auto_attack_phases, "SQUARE_QUERIES", 30)

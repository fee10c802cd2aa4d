"""Signs that a number may not mean what it seems to."""

import logging

import pytest
import torch
from torch import nn

from dkl.evaluation import auto_attack

pytestmark = pytest.mark.usefixtures("quick_attacks")


class Wrapped(nn.Module):
    """Applies a function to the logits of another model."""

    def __init__(self, model, change):
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, images):
        return self.change(self.model(images))


def test_randomised_outputs_are_reported(digits, caplog):
    noisy = Wrapped(digits.model, lambda logits: logits + torch.randn_like(logits))
    with caplog.at_level(logging.WARNING, logger="dkl"):
        result = auto_attack(noisy, digits.images[:8], digits.labels[:8], eps=0.05, version="fast")
    assert any("randomised" in note for note in result.notes)
    assert any("randomised" in message for message in caplog.messages)


def test_probabilities_are_reported(digits):
    probabilities = Wrapped(digits.model, lambda logits: logits.softmax(1))
    result = auto_attack(
        probabilities, digits.images[:8], digits.labels[:8], eps=0.05, version="fast"
    )
    assert any("probabilities" in note for note in result.notes)


def test_masked_gradients_are_reported(digits):
    """Saturated logits without gradients: only the query attack finds what is there."""
    flat = Wrapped(digits.model, lambda logits: logits.detach().round() * 5 + 0 * logits)
    result = auto_attack(flat, digits.images[:30], digits.labels[:30], eps=0.15)
    assert any("zero gradients" in note for note in result.notes)
    assert any("square broke" in note for note in result.notes)

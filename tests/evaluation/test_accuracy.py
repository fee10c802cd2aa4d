"""Predictions and clean accuracy."""

import pytest
import torch
from torch import nn

from dkl.evaluation import accuracy, predict_logits


def test_batches_do_not_matter(digits):
    whole = predict_logits(digits.model, digits.images, batch_size=100)
    parts = predict_logits(digits.model, digits.images, batch_size=7)
    torch.testing.assert_close(whole, parts)
    assert not whole.requires_grad
    direct = (digits.model(digits.images).argmax(1) == digits.labels).double().mean().item()
    assert accuracy(digits.model, digits.images, digits.labels, batch_size=7) == direct
    assert 0.5 < direct < 1


def test_pixels_of_either_kind(digits):
    pixels = (digits.images * 255).round().to(torch.uint8)
    torch.testing.assert_close(
        predict_logits(digits.model, pixels), predict_logits(digits.model, pixels.float() / 255)
    )


def test_evaluation_mode_is_used_and_restored():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(9, 1, 2, 2)
    first, second = predict_logits(model, images), predict_logits(model, images)
    assert torch.equal(first, second)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float32_whatever_is_around_it(digits):
    plain = predict_logits(digits.model, digits.images[:5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predict_logits(digits.model, digits.images[:5]), plain)


def test_device_argument(digits):
    logits = predict_logits(digits.model, digits.images[:5], device="cpu")
    assert torch.equal(logits, predict_logits(digits.model, digits.images[:5]))


def test_bad_batch_size(digits):
    with pytest.raises(ValueError, match="batch_size"):
        predict_logits(digits.model, digits.images, batch_size=0)

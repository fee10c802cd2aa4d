"""Adversarial images that were made on another model."""

import copy

import pytest
import torch
from torch import nn

from dkl.evaluation import pgd_images, pgd_robust, predict_logits, transfer_robust


@pytest.fixture
def other(digits):
    """A model of the same kind that was disturbed."""
    model = copy.deepcopy(digits.model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def transfer(digits, surrogate, **settings):
    settings = {"eps": 0.12, "num_steps": 10, **settings}
    return transfer_robust(digits.model, surrogate, digits.images, digits.labels, **settings)


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.12), ("L2", 0.6)])
def test_it_is_the_accuracy_on_the_surrogates_images(digits, other, objective, norm, eps):
    settings = {"eps": eps, "norm": norm, "num_steps": 10, "objective": objective}
    images = pgd_images(other, digits.images, digits.labels, **settings)
    expected = predict_logits(digits.model, images).argmax(1) == digits.labels
    expected &= predict_logits(digits.model, digits.images).argmax(1) == digits.labels
    found = transfer(digits, other, objective=objective, norm=norm, eps=eps)
    assert torch.equal(found, expected)
    assert torch.equal(transfer(digits, other, batch_size=7, **settings), found)
    own = pgd_robust(digits.model, digits.images, digits.labels, **settings)
    assert 0 < own.sum() < found.sum()


def test_the_model_itself_as_surrogate_is_plain_pgd(digits):
    own = pgd_robust(digits.model, digits.images, digits.labels, eps=0.12, num_steps=10)
    assert torch.equal(transfer(digits, digits.model), own)


def test_images_are_adversarial_images_of_pgd(digits):
    """The images by which ``pgd_robust`` judges lie in the ball and have its verdict."""
    settings = {"eps": 0.12, "num_steps": 10}
    images = pgd_images(digits.model, digits.images, digits.labels, **settings)
    assert images.shape == digits.images.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert (images - digits.images).abs().max() <= 0.12 + 1e-6
    robust = pgd_robust(digits.model, digits.images, digits.labels, **settings)
    clean = predict_logits(digits.model, digits.images).argmax(1) == digits.labels
    again = predict_logits(digits.model, images).argmax(1) == digits.labels
    assert torch.equal(clean & again, robust)
    half = pgd_images(
        digits.model,
        digits.images[40:],
        digits.labels[40:],
        sample_ids=torch.arange(40, 100),
        **settings,
    )
    torch.testing.assert_close(half, images[40:], rtol=0, atol=1e-6)


def test_surroundings_of_both_models_are_restored(digits, other):
    other.train()
    digits.model.eval()
    transfer(digits, other)
    assert other.training
    assert not digits.model.training
    for model in (other, digits.model):
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_goes_on_where_it_was_cut_short(digits, other, tmp_path):
    straight = transfer(digits, other)

    def stop(state):
        assert state.attack == "transfer-pgd-10"
        if state.num_done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(digits, other, batch_size=20, state_dir=tmp_path, progress=stop)
    assert len(list(tmp_path.glob("batch-*.npz"))) == 2
    assert torch.equal(transfer(digits, other, batch_size=20, state_dir=tmp_path), straight)
    with pytest.raises(ValueError, match="surrogate"):
        transfer(digits, digits.model, batch_size=20, state_dir=tmp_path)


def test_surrogates_that_do_not_fit(digits):
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ValueError, match="same 10 classes"):
        transfer(digits, few)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(65, 10))
    with pytest.raises(ValueError, match="cannot take images"):
        transfer(digits, wide)
    with pytest.raises(ValueError, match="AutoAttack"):
        transfer(digits, digits.model, norm="L1", eps=2.0)

"""Normalisation inside the model."""

import copy

import pytest
import torch
from torch import nn

from dkl.models import create_model
from dkl.models.normalization import add_normalization, normalize_images

MEAN, STD = [0.1, 0.4, 0.8], [0.2, 0.3, 0.5]


def build_pair():
    """The same weights without and with normalisation."""
    plain = create_model("convnet_small", 5, width=4).eval()
    normalizing = create_model("convnet_small", 5, mean=MEAN, std=STD, width=4).eval()
    normalizing.load_state_dict(plain.state_dict())
    return plain, normalizing


def by_hand(images):
    mean, std = (torch.tensor(v, dtype=images.dtype)[None, :, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def test_equals_normalising_by_hand_with_gradients():
    plain, normalizing = build_pair()
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    expected = plain(by_hand(images))
    torch.testing.assert_close(normalizing(images), expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(normalizing(images)[:, 0].sum(), images)
    (expected_gradient,) = torch.autograd.grad(expected[:, 0].sum(), images)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)
    torch.testing.assert_close(normalize_images(normalizing, images), by_hand(images))


def test_names_of_state_and_parameters_stay():
    plain, normalizing = build_pair()
    assert list(normalizing.state_dict()) == list(plain.state_dict())
    named, plain_named = normalizing.named_parameters(), plain.named_parameters()
    assert [name for name, _ in named] == [name for name, _ in plain_named]
    assert type(normalizing) is type(plain)


def test_type_conversions_move_mean_and_std():
    plain, normalizing = build_pair()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    logits = normalizing.double()(images)
    torch.testing.assert_close(logits, plain.double()(by_hand(images)), rtol=1e-6, atol=1e-7)
    with torch.device("meta"):
        shadow = create_model("convnet_small", 5, mean=MEAN, std=STD)
    assert shadow(torch.rand(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_deepcopy_is_independent_and_normalises_once():
    _, normalizing = build_pair()
    images = torch.rand(2, 3, 8, 8)
    expected = normalizing(images)
    twin = copy.deepcopy(normalizing)
    normalizing.get_buffer("input_mean").zero_()
    torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)
    assert not torch.equal(normalizing(images), expected)


def test_keeps_channels_last():
    _, normalizing = build_pair()
    normalizing.to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    normalized = normalize_images(normalizing, images)
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_torch_compile_traces_the_normalisation():
    plain, normalizing = build_pair()
    images = torch.rand(2, 3, 8, 8)
    compiled = torch.compile(normalizing, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), plain(by_hand(images)))
    torch.testing.assert_close(normalize_images(compiled, images), by_hand(images))


def test_models_of_others():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.rand(3, 3, 2, 2)
    expected = model(by_hand(images))
    add_normalization(model, MEAN, STD, in_channels=3)
    torch.testing.assert_close(model(images), expected)
    with pytest.raises(ValueError, match="already"):
        add_normalization(model, MEAN, STD, in_channels=3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"float.*255"),
        (torch.zeros(2, 1, 8, 8), r"\[N, 3, H, W\], got \[2, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"\[N, 3, H, W\], got \[3, 8, 8\]"),
    ],
)
def test_images_that_would_be_normalised_wrongly_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        build_pair()[1](images)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], STD, "mean needs one number for each of the 3 channels, got 1"),
        (MEAN, [0.5] * 4, "std needs one number for each of the 3 channels, got 4"),
        ([125.3, 123.0, 113.9], STD, "divide mean and std by 255"),
        (MEAN, [0.2, 0.0, 0.2], "std must be positive"),
        (MEAN, [0.2, float("nan"), 0.2], "std must be positive"),
        (0.5, STD, "mean must be a list of 3 numbers"),
        (MEAN, None, "got mean without std"),
        (None, STD, "got std without mean"),
    ],
)
def test_wrong_mean_or_std(mean, std, message):
    with pytest.raises(ValueError, match=message):
        create_model("convnet_small", 5, mean=mean, std=std)

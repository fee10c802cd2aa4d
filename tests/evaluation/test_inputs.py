"""What is refused before any attack begins, by every entry point."""

import pytest
import torch
from torch import nn

from dkl.evaluation import (
    accuracy,
    auto_attack,
    epsilon_sweep,
    masking_checks,
    pgd_images,
    pgd_robust,
    transfer_robust,
)
from dkl.evaluation.inputs import arithmetic, float_images

pytestmark = pytest.mark.usefixtures("quick_attacks")

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
IMAGES = torch.full((2, 3, 2, 2), 0.5)
LABELS = torch.tensor([0, 1])

ENTRY_POINTS = {
    "accuracy": accuracy,
    "pgd_robust": lambda *data: pgd_robust(*data, eps=0.1),
    "auto_attack": lambda *data: auto_attack(*data, eps=0.1),
    "transfer_robust": lambda model, *data: transfer_robust(model, MODEL, *data, eps=0.1),
    "masking_checks": lambda *data: masking_checks(*data, eps=0.1),
    "epsilon_sweep": lambda *data: epsilon_sweep(*data, [0.1]),
}

BAD = [
    (IMAGES.numpy(), LABELS, "torch.from_numpy"),
    (IMAGES[0], LABELS, r"\[N, C, H, W\]"),
    (IMAGES[:0], LABELS[:0], "N >= 1"),
    (torch.zeros(2, 8, 8, 3), LABELS, "permute"),
    (IMAGES.double(), LABELS, r"images.float\(\)"),
    (IMAGES.half(), LABELS, r"images.float\(\)"),
    (IMAGES * 2.2, LABELS, "divide by 255"),
    (IMAGES - 0.6, LABELS, "unnormalised"),
    (IMAGES * torch.nan, LABELS, "NaN"),
    (IMAGES, [0, 1], "got list"),
    (IMAGES, LABELS[:1], "one class index per image"),
    (IMAGES, torch.eye(2), "argmax"),
    (IMAGES, LABELS.float(), r"labels.long\(\)"),
    (IMAGES, LABELS.bool(), r"labels.long\(\)"),
    (IMAGES, LABELS - 1, "got -1"),
    (IMAGES, LABELS + 2, "got 3"),
]


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize(("images", "labels", "message"), BAD)
def test_bad_data_is_refused_with_advice(entry, images, labels, message):
    with pytest.raises(ValueError, match=message):
        ENTRY_POINTS[entry](MODEL, images, labels)


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_bad_models_are_refused_with_advice(entry):
    with pytest.raises(ValueError, match=r"torch.nn.Module"):
        ENTRY_POINTS[entry](lambda images: images, IMAGES, LABELS)
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        ENTRY_POINTS[entry](MODEL, IMAGES, LABELS)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.constant_(broken[1].weight, torch.inf)
    with pytest.raises(ValueError, match="clean images are NaN"):
        ENTRY_POINTS[entry](broken, IMAGES, LABELS)


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_no_grad_around_it_is_fine(entry):
    with torch.no_grad():
        without = ENTRY_POINTS[entry](MODEL, IMAGES, LABELS)
    with_grad = ENTRY_POINTS[entry](MODEL, IMAGES, LABELS)
    for name in ("robust", "robust_accuracy"):
        if hasattr(without, name):
            assert torch.equal(
                torch.as_tensor(getattr(without, name)), torch.as_tensor(getattr(with_grad, name))
            )


def test_pgd_images_want_good_data_too():
    for images, labels, message in BAD[:-1]:
        with pytest.raises(ValueError, match=message):
            pgd_images(MODEL, images, labels, eps=0.1)


def test_eps_in_pixel_units_is_refused_under_every_norm():
    """A ball that holds every image says that the radius is in units of 0 to 255."""
    for norm, eps in (("Linf", 8), ("L2", 128), ("L1", 255 * 12)):
        with pytest.raises(ValueError, match="/255"):
            auto_attack(MODEL, IMAGES, LABELS, norm=norm, eps=eps, version="fast")


def test_float_images_are_a_contiguous_copy():
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    assert torch.equal(float_images(pixels), pixels.float() / 255)
    strided = IMAGES.to(memory_format=torch.channels_last)
    copy = float_images(strided)
    assert copy.is_contiguous()
    assert copy.data_ptr() != strided.data_ptr()
    assert torch.equal(copy, IMAGES)


def test_arithmetic_on_the_cpu_is_float32():
    assert arithmetic(torch.device("cpu")) == "float32"

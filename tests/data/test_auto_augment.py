"""AutoAugment: torchvision's own transform is the reference, its choices fed to ours."""

import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from dkl.data import Draw, auto_augment

NUM_PAIRS = 25


def fixed_draw(uniform_BK: Tensor) -> Draw:
    def draw(k: int) -> Tensor:
        assert k == uniform_BK.shape[1]
        return uniform_BK

    return draw


def photographs(num: int, channels: int = 3, size: int = 32) -> Tensor:
    """Random bytes, smoothed, so that every operation has something to change."""
    generator = torch.Generator().manual_seed(num)
    noise = torch.rand(num, channels, size, size, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    return (smooth * 255).round() / 255


def all_choices(applied: float = 0.0) -> Tensor:
    """Every pair of operations in every combination of signs; 0 applies, 0.9999 does not."""
    return torch.tensor(
        [
            [(pair + 0.5) / NUM_PAIRS, applied, applied, 0.25 + 0.5 * first, 0.25 + 0.5 * second]
            for pair in range(NUM_PAIRS)
            for first in (0, 1)
            for second in (0, 1)
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_same_choices_give_what_torchvision_gives(channels: int) -> None:
    num = 300
    images = photographs(num, channels)
    stock = AutoAugment(AutoAugmentPolicy.CIFAR10)
    rows, expected = [], []
    for number, image_CHW in enumerate(images):
        torch.manual_seed(number)
        pair, probabilities, signs = AutoAugment.get_params(NUM_PAIRS)
        rows.append([(pair + 0.5) / NUM_PAIRS, *probabilities.tolist(), *(0.5 * signs).tolist()])
        torch.manual_seed(number)
        pixels_HWC = (image_CHW * 255).round().byte().permute(1, 2, 0).numpy()
        changed = stock(Image.fromarray(pixels_HWC.squeeze(2) if channels == 1 else pixels_HWC))
        expected.append(np.asarray(changed).reshape(32, 32, channels).transpose(2, 0, 1))
    assert len({int(row[0] * NUM_PAIRS) for row in rows}) == NUM_PAIRS
    got = auto_augment()(images, fixed_draw(torch.tensor(rows)))
    assert torch.equal(got, torch.from_numpy(np.stack(expected)).float() / 255)
    assert (got != images).flatten(1).any(1).float().mean() > 0.5


def test_every_operation_treats_grey_as_equal_colours() -> None:
    rows = all_choices()
    grey = photographs(len(rows), channels=1)
    augment = auto_augment()
    got_grey = augment(grey, fixed_draw(rows))
    got_colour = augment(grey.expand(-1, 3, -1, -1), fixed_draw(rows))
    assert got_grey.shape == grey.shape
    assert torch.equal(got_grey.expand(-1, 3, -1, -1), got_colour)
    # Posterize, Color and such may leave a grey image alone; most pairs may not.
    assert (got_grey != grey).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 9, 5)])
def test_shapes_and_range_for_every_operation(shape: tuple[int, int, int]) -> None:
    rows = all_choices()
    images = torch.rand(len(rows), *shape)
    got = auto_augment()(images, fixed_draw(rows))
    assert got.shape == images.shape
    assert got.is_contiguous()
    assert 0 <= got.min() <= got.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_no_operation_touches_are_exactly_the_loops(dtype: torch.dtype) -> None:
    rows = all_choices(applied=0.9999)
    pixels = torch.randint(0, 256, (len(rows), 3, 8, 8)).to(torch.uint8)
    images = pixels.to(dtype) / 255
    got = auto_augment()(images, fixed_draw(rows))
    assert got.dtype == dtype
    assert torch.equal(got, images)


def test_a_sample_depends_on_its_own_draws_alone() -> None:
    images, rows = photographs(40), torch.rand(40, 5)
    augment = auto_augment()
    whole = augment(images, fixed_draw(rows))
    order = torch.randperm(40)
    assert torch.equal(augment(images[order], fixed_draw(rows[order])), whole[order])
    parts = [augment(images[one], fixed_draw(rows[one])) for one in torch.arange(40).split(7)]
    assert torch.equal(torch.cat(parts), whole)


def test_no_global_generator_is_used() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    auto_augment()(photographs(100), fixed_draw(all_choices()))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_memory_format_dtype_and_emptiness() -> None:
    images, rows = photographs(20), torch.rand(20, 5)
    augment = auto_augment()
    expected = augment(images, fixed_draw(rows))
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(augment(strided, fixed_draw(rows)), expected)
    half = augment(images.bfloat16(), fixed_draw(rows))
    assert half.dtype == torch.bfloat16
    assert augment(images[:0], fixed_draw(rows[:0])).shape == (0, 3, 32, 32)
    largest = torch.full((1, 5), float(np.nextafter(np.float32(1), np.float32(0))))
    assert augment(images[:1], fixed_draw(largest)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 2, 8, 8), r"1 or 3 channels; got 2"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8"),
        (torch.full((2, 3, 8, 8), 1.5), r"lie in \[0, 1\].*got values from 1.5 to 1.5"),
        (torch.full((2, 3, 8, 8), -0.1), r"lie in \[0, 1\].*normalisation"),
        (torch.full((2, 3, 8, 8), float("nan")), r"without NaN"),
    ],
)
def test_bad_images_are_explained(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auto_augment()(images, lambda k: torch.rand(2, k))


def test_bad_settings_and_draws_are_explained() -> None:
    with pytest.raises(ValueError, match=r"one of cifar10; got 'imagenet'"):
        auto_augment("imagenet")
    with pytest.raises(ValueError, match=r"one row for each of the 2 images.*got \(3, 5\)"):
        auto_augment()(torch.rand(2, 3, 8, 8), lambda k: torch.rand(3, k))


def test_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match=r"torchvision; install it by: pip install 'dkl\[train\]"):
        auto_augment()

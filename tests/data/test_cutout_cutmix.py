"""Cutout and CutMix against a loop over samples that takes the papers word for word."""

import math

import pytest
import torch
from torch import Tensor

from dkl.data import Draw, cutmix, cutout

LARGEST = 1 - 2.0**-24


def fixed_draw(uniform_BK: Tensor) -> Draw:
    def draw(k: int) -> Tensor:
        assert k == uniform_BK.shape[1]
        return uniform_BK

    return draw


def box(
    centre: tuple[int, int], sides: tuple[int, int], size: tuple[int, int]
) -> tuple[slice, ...]:
    first = [middle - side // 2 for middle, side in zip(centre, sides, strict=True)]
    return tuple(
        slice(min(max(start, 0), limit), min(max(start + side, 0), limit))
        for start, side, limit in zip(first, sides, size, strict=True)
    )


@pytest.mark.parametrize("size", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (30, 3, 32, 32), (9, 2, 5, 7), (0, 3, 8, 8)])
def test_cutout_equals_the_reference(shape: tuple[int, int, int, int], size: int) -> None:
    images, uniform = torch.rand(shape) + 0.1, torch.rand(shape[0], 2)
    uniform[:1] = LARGEST
    before = images.clone()
    got = cutout(size)(images, fixed_draw(uniform))
    assert torch.equal(images, before)
    for image, row, result in zip(images, uniform.tolist(), got, strict=True):
        height, width = image.shape[1:]
        centre = (math.floor(row[0] * height), math.floor(row[1] * width))
        expected = image.clone()
        expected[(slice(None), *box(centre, (size, size), (height, width)))] = 0
        assert torch.equal(result, expected)


def test_cutout_centres_are_uniform() -> None:
    images = torch.ones(20000, 1, 5, 5)
    generator = torch.Generator().manual_seed(0)
    got = cutout(1)(images, lambda k: torch.rand(20000, k, generator=generator))
    assert torch.all(((1 - got).sum(0) / 800 - 1).abs() < 0.2)  # 25 places, 5 deviations


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_cutout_keeps_type_and_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    images, uniform = torch.rand(12, 3, 8, 8).to(dtype), torch.rand(12, 2)
    augment = cutout(3)
    whole = augment(images, fixed_draw(uniform))
    assert whole.dtype == dtype
    order = torch.randperm(12)
    assert torch.equal(augment(images[order], fixed_draw(uniform[order])), whole[order])
    parts = [augment(images[one], fixed_draw(uniform[one])) for one in torch.arange(12).split(5)]
    assert torch.equal(torch.cat(parts), whole)


def test_cutout_bad_settings_are_explained() -> None:
    with pytest.raises(ValueError, match=r"size must be 1 or more pixels.*got 0"):
        cutout(0)
    with pytest.raises(ValueError, match=r"got torch.uint8"):
        cutout(2)(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), lambda k: torch.rand(1, k))
    with pytest.raises(ValueError, match=r"got \(3, 2\)"):
        cutout(2)(torch.zeros(1, 1, 4, 4), lambda k: torch.rand(3, k))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (200, 3, 32, 32), (30, 2, 5, 7), (0, 3, 8, 8)])
def test_cutmix_equals_the_reference(shape: tuple[int, int, int, int], probability: float) -> None:
    images, partners, uniform = torch.rand(shape), torch.rand(shape) + 1, torch.rand(shape[0], 4)
    uniform[:1] = LARGEST
    uniform[1:2] = 0
    mixed, share = cutmix(images, partners, fixed_draw(uniform), probability=probability)
    assert share.dtype == torch.float32
    for number, (lam, row, column, apply) in enumerate(uniform.double().tolist()):
        height, width = shape[2:]
        sides = tuple(math.floor(n * math.sqrt(1 - lam)) for n in (height, width))
        centre = (math.floor(row * height), math.floor(column * width))
        expected = images[number].clone()
        if apply < probability:
            inside = (slice(None), *box(centre, sides, (height, width)))  # type: ignore[arg-type]
            expected[inside] = partners[number][inside]
        assert torch.equal(mixed[number], expected)
        own = (expected < 1).double().mean()  # partners are brighter than 1
        assert share[number] == pytest.approx(float(own), abs=1e-6)


def test_cutmix_share_before_clipping_follows_lambda() -> None:
    # With the centre in the middle nothing is clipped, and the share is lambda but for rounding.
    lam = torch.linspace(0.001, 0.999, 500)
    middle = torch.full((500, 2), 0.5)
    uniform = torch.cat([lam[:, None], middle, torch.zeros(500, 1)], dim=1)
    images = torch.zeros(500, 1, 256, 256)
    _, share = cutmix(images, images + 1, fixed_draw(uniform))
    assert torch.all(share >= lam - 1e-6)
    assert torch.all(share - lam < 2 / 256)


def test_cutmix_does_not_depend_on_the_batch() -> None:
    images, partners, uniform = torch.rand(12, 3, 8, 8), torch.rand(12, 3, 8, 8), torch.rand(12, 4)
    mixed, share = cutmix(images, partners, fixed_draw(uniform), probability=0.7)
    order = torch.randperm(12)
    again, share_again = cutmix(
        images[order], partners[order], fixed_draw(uniform[order]), probability=0.7
    )
    assert torch.equal(again, mixed[order])
    assert torch.equal(share_again, share[order])


def test_cutmix_types() -> None:
    images = torch.rand(3, 1, 8, 8)
    uniform = torch.rand(3, 4)
    _, expected = cutmix(images.double(), images.double(), fixed_draw(uniform.double()))
    assert expected.dtype == torch.float64
    half, share = cutmix(images.half(), images.half(), fixed_draw(uniform))
    assert half.dtype == torch.float16
    torch.testing.assert_close(share, expected.float())


def test_cutmix_bad_inputs_are_explained() -> None:
    images = torch.rand(2, 1, 8, 8)

    def draw(k: int) -> Tensor:
        return torch.rand(2, k)

    with pytest.raises(ValueError, match=r"alpha must be 1 .*got 0.5"):
        cutmix(images, images, draw, alpha=0.5)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"probability must lie in 0 to 1"):
            cutmix(images, images, draw, probability=probability)
    with pytest.raises(ValueError, match=r"shape and type of images, \(2, 1, 8, 8\)"):
        cutmix(images, images[:1], draw)
    with pytest.raises(ValueError, match=r"got \(2, 1, 8, 8\) torch.float64"):
        cutmix(images, images.double(), draw)
    with pytest.raises(ValueError, match=r"one row for each of the 2 images"):
        cutmix(images, images, lambda k: torch.rand(5, k))

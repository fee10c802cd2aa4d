"""Batch augmentation against a loop over samples that takes the recipe word for word."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dkl.data import Draw, auto_augment, basic_augment, compose, cutout, make_augment


def fixed_draw(uniform_BK: Tensor) -> Draw:
    def draw(k: int) -> Tensor:
        assert k == uniform_BK.shape[1]
        return uniform_BK

    return draw


def one_sample(image_CHW: Tensor, row: list[float], padding: int, mode: str, flip: bool) -> Tensor:
    """Pad, slice, mirror: the reference."""
    _, height, width = image_CHW.shape
    result = image_CHW
    if padding:
        pad_mode = "constant" if mode == "zeros" else "reflect"
        padded = F.pad(image_CHW[None], (padding,) * 4, mode=pad_mode)[0]
        top, left = (min(math.floor(u * (2 * padding + 1)), 2 * padding) for u in row[:2])
        result = padded[:, top : top + height, left : left + width]
    return result.flip(2) if flip and row[-1] < 0.5 else result


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (17, 3, 32, 32), (9, 2, 5, 7), (0, 3, 8, 8)])
def test_every_sample_equals_the_reference(
    shape: tuple[int, int, int, int], padding: int, flip: bool, mode: str
) -> None:
    num_draws = (2 if padding else 0) + int(flip)
    images, uniform = torch.rand(shape), torch.rand(shape[0], num_draws)
    if num_draws and shape[0]:
        uniform[0] = torch.nextafter(torch.ones(()), torch.zeros(()))  # the largest draw there is
    got = basic_augment(padding, mode, flip)(images, fixed_draw(uniform))
    assert got.shape == images.shape
    for image, row, result in zip(images, uniform.tolist(), got, strict=True):
        assert torch.equal(result, one_sample(image, row, padding, mode, flip))


def test_a_sample_depends_on_its_own_draws_alone() -> None:
    augment = basic_augment()
    images, uniform = torch.rand(12, 3, 8, 8), torch.rand(12, 3)
    whole = augment(images, fixed_draw(uniform))
    order = torch.randperm(12)
    shuffled = augment(images[order], fixed_draw(uniform[order]))
    assert torch.equal(shuffled, whole[order])
    halves = [
        augment(images[part], fixed_draw(uniform[part])) for part in torch.arange(12).chunk(2)
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_offsets_and_mirrors_are_uniform() -> None:
    # One bright pixel in the middle of 9x9: where it lands tells offset and, with the edge marked
    # by a second channel's ramp, the direction.
    images = torch.zeros(20000, 2, 9, 9)
    images[:, 0, 4, 4] = 1
    images[:, 1] = torch.linspace(0.1, 1, 9)
    generator = torch.Generator().manual_seed(0)
    got = basic_augment(2)(images, lambda k: torch.rand(20000, k, generator=generator))
    landed = got[:, 0].sum(0)
    assert landed.sum() == 20000
    assert torch.all((landed[2:7, 2:7] / 800 - 1).abs() < 0.2)  # 25 places, 7 deviations
    mirrored = got[:, 1, 4, 3] > got[:, 1, 4, 5]
    assert abs(mirrored.double().mean() - 0.5) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_are_moved_exactly_in_every_type(dtype: torch.dtype) -> None:
    images = torch.rand(6, 3, 8, 8).to(dtype)
    before = images.clone()
    got = basic_augment(0)(images, lambda k: torch.rand(6, k))
    assert got.dtype == dtype
    assert torch.equal(got.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(images, before)


def test_channels_last_images_give_the_same_pixels() -> None:
    images, uniform = torch.rand(5, 3, 8, 8), torch.rand(5, 3)
    augment = basic_augment()
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(augment(strided, fixed_draw(uniform)), augment(images, fixed_draw(uniform)))


def test_nothing_to_do_draws_nothing() -> None:
    images = torch.rand(2, 1, 4, 4)

    def refuse(k: int) -> Tensor:
        raise AssertionError(f"drew {k} numbers")

    assert torch.equal(basic_augment(0, flip=False)(images, refuse), images)


def test_bad_settings_and_inputs_are_explained() -> None:
    with pytest.raises(ValueError, match=r"padding must be 0 or more pixels; got -1"):
        basic_augment(-1)
    with pytest.raises(ValueError, match=r"'zeros' or 'reflect'; got 'edge'"):
        basic_augment(padding_mode="edge")  # type: ignore[arg-type]
    augment = basic_augment(4, "reflect")
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(2, 1, 8, 8\)"):
        augment(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), lambda k: torch.rand(2, k))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 8, 8\)"):
        augment(torch.zeros(1, 8, 8), lambda k: torch.rand(1, k))
    with pytest.raises(ValueError, match=r"reflection by 4 pixels.*got 4x8"):
        augment(torch.zeros(2, 1, 4, 8), lambda k: torch.rand(2, k))
    with pytest.raises(ValueError, match=r"one row for each of the 2 images.*got \(3, 3\)"):
        augment(torch.zeros(2, 1, 8, 8), lambda k: torch.rand(3, k))


def rows_by_sample(seeds: list[int]) -> Draw:
    """Draw like the loop: the numbers of a sample are a function of the sample and the call."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(k: int) -> Tensor:
        return torch.stack([torch.rand(k, generator=one) for one in generators])

    return draw


def test_composed_augmentations_run_in_order_on_draws_of_their_own() -> None:
    images = torch.rand(6, 3, 8, 8)
    seeds = list(range(6))
    got = compose(basic_augment(2), cutout(3), basic_augment(1))(images, rows_by_sample(seeds))
    draw = rows_by_sample(seeds)
    expected = basic_augment(1)(cutout(3)(basic_augment(2)(images, draw), draw), draw)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="at least one augmentation"):
        compose()


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_a_recipe_is_policy_crop_flip_cutout(
    policy: bool, size: int | None, padding: int, flip: bool
) -> None:
    images = (torch.rand(6, 3, 8, 8) * 255).round() / 255
    seeds = list(range(6))
    augment = make_augment(padding=padding, flip=flip, auto_augment=policy, cutout=size)
    draw, expected = rows_by_sample(seeds), images
    if policy:
        expected = auto_augment()(expected, draw)
    expected = basic_augment(padding, "zeros", flip)(expected, draw)
    if size is not None:
        expected = cutout(size)(expected, draw)
    if augment is None:
        assert (policy, size, padding, flip) == (False, None, 0, False)
    else:
        assert torch.equal(augment(images, rows_by_sample(seeds)), expected)


def test_a_whole_recipe_does_not_depend_on_the_batch() -> None:
    augment = make_augment(padding=2, padding_mode="reflect", auto_augment=True, cutout=4)
    assert augment is not None
    images = (torch.rand(9, 1, 8, 8) * 255).round() / 255
    whole = augment(images, rows_by_sample(list(range(9))))
    parts = [
        augment(images[first : first + 4], rows_by_sample(list(range(first, min(first + 4, 9)))))
        for first in (0, 4, 8)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_recipe_refuses_what_its_parts_refuse() -> None:
    with pytest.raises(ValueError, match="padding must be 0 or more"):
        make_augment(padding=-1)
    with pytest.raises(ValueError, match="size must be 1 or more"):
        make_augment(cutout=0)
    with pytest.raises(ValueError, match="'zeros' or 'reflect'"):
        make_augment(padding=0, flip=False, padding_mode="edge")  # type: ignore[arg-type]

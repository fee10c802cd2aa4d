"""ClassBalancedSource: shares of classes, passes through their samples, resumption, batches."""

from itertools import chain, pairwise

import pytest
import torch
from torch import Tensor

from dkl.data import ClassBalancedSource, ImageData
from dkl.engine.plan import epoch_plan, source_order

SIZES = [50, 17, 0, 5, 1]


def tail_data(sizes: list[int] = SIZES) -> ImageData:
    """Images that tell their number, with the classes mixed up."""
    labels = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.arange(len(labels)).to(torch.uint8).reshape(-1, 1, 1, 1)
    return ImageData(images, labels[order], len(sizes), tuple("abcdefgh"[: len(sizes)]))


def counts_of(source: ClassBalancedSource, order: Tensor) -> Tensor:
    return source.data.labels[order].bincount(minlength=source.num_classes)


CASES = [(0.0, None), (0.5, None), (1.0, None), (0.25, 1000), (0.0, 3), (0.5, 2), (0.0, 1)]


@pytest.mark.parametrize(("power", "samples"), CASES)
def test_every_epoch_has_its_share_of_every_class(power: float, samples: int | None) -> None:
    data = tail_data()
    source = ClassBalancedSource(data, power=power, samples_per_epoch=samples)
    assert len(source) == (samples or sum(SIZES))
    weights = torch.tensor([size**power if size else 0.0 for size in SIZES], dtype=torch.float64)
    expected = len(source) * weights / weights.sum()
    total = torch.zeros(len(SIZES), dtype=torch.int64)
    for epoch in range(400):
        order = source.epoch_order(seed=1, epoch=epoch)
        assert (order.dtype, tuple(order.shape)) == (torch.int64, (len(source),))
        counts = counts_of(source, order)
        assert bool((counts >= (expected - 1e-3).floor()).all())
        assert bool((counts <= (expected + 1e-3).ceil()).all())
        total += counts
    # The mean of 400 roundings up or down has a deviation of 0.025 at most.
    assert float((total / 400 - expected).abs().max()) < 0.1
    if power == 1 and samples is None:
        assert torch.equal(total, 400 * data.labels.bincount())


@pytest.mark.parametrize(("power", "samples"), CASES)
def test_the_samples_of_a_class_come_in_passes_over_the_ends_of_epochs(
    power: float, samples: int | None
) -> None:
    source = ClassBalancedSource(tail_data(), power=power, samples_per_epoch=samples)
    drawn = torch.cat([source.epoch_order(seed=5, epoch=epoch) for epoch in range(60)])
    for number, size in enumerate(SIZES):
        if size == 0:
            continue
        passes = drawn[source.data.labels[drawn] == number].split(size)
        for one in passes:
            assert len(one.unique()) == len(one)
        for one, following in pairwise(passes[:-1]):
            assert size < 10 or not torch.equal(one, following)


def test_classes_are_spread_over_the_epoch() -> None:
    source = ClassBalancedSource(tail_data([400, 4]), samples_per_epoch=4000)
    order = source.epoch_order(seed=0, epoch=0)
    shares = (source.data.labels[order] == 1).double().reshape(20, 200).mean(1)
    assert float((shares - 0.5).abs().max()) < 0.15  # deviation 0.035


def test_an_epoch_alone_equals_the_epoch_in_sequence() -> None:
    source = ClassBalancedSource(tail_data(), power=0.5)
    sequence = [source.epoch_order(seed=7, epoch=epoch) for epoch in range(5)]
    again = ClassBalancedSource(tail_data(), power=0.5)
    assert torch.equal(again.epoch_order(seed=7, epoch=3), sequence[3])
    assert not torch.equal(sequence[2], sequence[3])
    assert not torch.equal(again.epoch_order(seed=8, epoch=3), sequence[3])


def test_the_order_is_the_same_for_ever() -> None:
    source = ClassBalancedSource(tail_data(), samples_per_epoch=12)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    expected = [18, 11, 10, 59, 61, 71, 5, 18, 18, 34, 48, 57]
    assert source.epoch_order(seed=3, epoch=2).tolist() == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loop_takes_its_order() -> None:
    source = ClassBalancedSource(tail_data(), samples_per_epoch=20)
    order = source_order(source, seed=2, epoch=1)
    assert torch.equal(order, source.epoch_order(seed=2, epoch=1))
    plans = [
        epoch_plan(len(source), batch_size=8, seed=2, epoch=1, order=order, rank=r, world_size=2)
        for r in (0, 1)
    ]
    steps = [
        torch.cat([micro.indices[micro.mask] for plan in plans for micro in plan[step]])
        for step in range(3)
    ]
    assert torch.equal(torch.cat(steps), order)


def test_batches_hold_the_images_of_their_indices() -> None:
    source = ClassBalancedSource(tail_data(), samples_per_epoch=20)
    steps = source.epoch_order(seed=0, epoch=0).split(6)
    batches = list(source.batches(iter(steps), "cpu"))
    numbers = list(chain.from_iterable(images.flatten().tolist() for images, _ in batches))
    assert numbers == torch.cat(steps).tolist()
    for (_, labels), indices in zip(batches, steps, strict=True):
        assert torch.equal(labels, source.data.labels[indices])
    assert (source.num_classes, "power 0" in repr(source)) == (5, True)


def test_weights_stay_exact_for_large_sets() -> None:
    class Labels:
        labels = torch.tensor([0]).expand(3_000_000)
        num_classes = 2

        def __len__(self) -> int:
            return 3_000_000

    small = ClassBalancedSource(Labels(), power=1.0, samples_per_epoch=10)  # type: ignore[arg-type]
    assert small._ends_C.tolist() == [3_000_000 << 16] * 2
    huge = ClassBalancedSource(Labels(), power=1.0, samples_per_epoch=1 << 32)  # type: ignore[arg-type]
    assert huge._ends_C[-1] * len(huge) < 1 << 62
    with pytest.raises(ValueError, match="beyond exact integer arithmetic"):
        ClassBalancedSource(Labels(), power=1.0, samples_per_epoch=1 << 42)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": -0.1}, "power must lie in 0 .*got -0.1"),
        ({"power": 1.5}, "got 1.5"),
        ({"power": float("nan")}, "got nan"),
        ({"samples_per_epoch": 0}, "at least one draw per epoch; got .*samples_per_epoch=0"),
    ],
)
def test_bad_settings_are_explained(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassBalancedSource(tail_data(), **change)  # type: ignore[arg-type]


def test_no_samples_and_negative_epochs_are_explained() -> None:
    with pytest.raises(ValueError, match="needs samples"):
        ClassBalancedSource(tail_data([0, 0]), samples_per_epoch=3)
    with pytest.raises(ValueError, match="epoch must be 0 or more; got -1"):
        ClassBalancedSource(tail_data()).epoch_order(seed=0, epoch=-1)

"""The plan of an epoch: every sample once, the same steps however they are split."""

import itertools

import pytest
import torch

from dkl.engine.plan import count_steps, epoch_order, epoch_plan

SPLITS = [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)]


def counted(num_samples: int, batch_size: int, world: int, accumulation: int, **options):
    """Return per step the indices that count, over all ranks, in the plan's order of chunks."""
    plans = [
        epoch_plan(
            num_samples,
            batch_size=batch_size,
            seed=1,
            epoch=2,
            rank=rank,
            world_size=world,
            accumulation=accumulation,
            **options,
        )
        for rank in range(world)
    ]
    steps = []
    for step in range(len(plans[0])):
        chunks = [
            plans[r][step][a] for a, r in itertools.product(range(accumulation), range(world))
        ]
        sizes = {len(chunk.indices) for chunk in chunks}
        assert len(sizes) == 1, "chunks of a step have one size"
        mask = torch.cat([chunk.mask for chunk in chunks])
        assert (mask.long().diff() <= 0).all(), "padding comes last"
        steps.append(torch.cat([chunk.indices[chunk.mask] for chunk in chunks]).tolist())
    return steps


@pytest.mark.parametrize(("world", "accumulation"), SPLITS)
@pytest.mark.parametrize(("num_samples", "batch_size"), [(23, 8), (24, 8), (5, 8), (9, 1), (13, 7)])
def test_splits_share_the_same_steps(num_samples, batch_size, world, accumulation) -> None:
    whole = counted(num_samples, batch_size, 1, 1)
    assert counted(num_samples, batch_size, world, accumulation) == whole
    assert sorted(itertools.chain(*whole)) == list(range(num_samples))
    assert [len(step) for step in whole[:-1]] == [batch_size] * (len(whole) - 1)


def test_one_process_without_accumulation_has_no_padding() -> None:
    plan = epoch_plan(23, batch_size=8, seed=0, epoch=0)
    assert [len(step[0].indices) for step in plan] == [8, 8, 7]
    assert all(step[0].mask.all() for step in plan)


def test_padding_is_of_the_same_step() -> None:
    plan = epoch_plan(9, batch_size=8, seed=0, epoch=0, accumulation=4)
    last = plan[-1]
    assert [micro.mask.tolist() for micro in last] == [[True], [False], [False], [False]]
    assert len({micro.indices.item() for micro in last}) == 1


def test_drop_last() -> None:
    assert [len(step) for step in counted(23, 8, 2, 1, drop_last=True)] == [8, 8]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    base = epoch_order(1000, seed=0, epoch=0)
    assert torch.equal(base, epoch_order(1000, seed=0, epoch=0))
    for other in (epoch_order(1000, seed=1, epoch=0), epoch_order(1000, seed=0, epoch=1)):
        assert torch.equal(other.sort().values, torch.arange(1000))
        assert (other == base).double().mean() < 0.02
    positions = base.argsort()
    assert (
        torch.corrcoef(torch.stack([positions.double(), torch.arange(1000.0)]))[0, 1].abs() < 0.15
    )


def test_without_shuffle_the_order_is_that_of_the_data() -> None:
    assert counted(5, 2, 1, 1, shuffle=False) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "at least one sample"),
        ({"batch_size": 0}, "batch size of at least 1"),
        ({"rank": 2, "world_size": 2}, "rank < world_size"),
        ({"accumulation": 0}, "accumulation >= 1"),
        ({"num_samples": 3, "drop_last": True}, "leaves no step"),
    ],
)
def test_bad_numbers_are_refused(options: dict, message: str) -> None:
    arguments = {"num_samples": 10, "batch_size": 4, "seed": 0, "epoch": 0} | options
    with pytest.raises(ValueError, match=message):
        epoch_plan(arguments.pop("num_samples"), **arguments)


def test_count_steps_agrees_with_the_plan() -> None:
    for num_samples, drop_last in itertools.product(range(4, 20), (False, True)):
        plan = epoch_plan(num_samples, batch_size=4, seed=0, epoch=0, drop_last=drop_last)
        assert len(plan) == count_steps(num_samples, 4, drop_last)

"""Which samples each process sees in each micro-batch of an epoch.

The plan is a function of the seed and the epoch alone. One optimiser step covers the same samples
however many processes and accumulation steps share them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dkl.engine.noise import hash_indices
from dkl.engine.settings import DataSource


class MicroBatchPlan(NamedTuple):
    """Samples of one micro-batch: ``indices`` [B] int64; ``mask`` [B] bool, False for padding."""

    indices: Tensor
    mask: Tensor


def count_steps(num_samples: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of optimiser steps of an epoch.

    Args:
        num_samples: samples of the training data, at least 1.
        batch_size: samples of one optimiser step, over all processes and micro-batches.
        drop_last: leave out an incomplete last step.

    Raises:
        ValueError: if an argument is out of range, or no step would remain.

    Example:
        >>> count_steps(10, 4), count_steps(10, 4, drop_last=True)
        (3, 2)
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"an epoch needs at least one sample and a batch size of at least 1; got "
            f"num_samples={num_samples}, batch_size={batch_size}"
        )
    num_steps = num_samples // batch_size if drop_last else -(-num_samples // batch_size)
    if num_steps == 0:
        raise ValueError(
            f"drop_last=True leaves no step: {num_samples} samples are fewer than batch_size="
            f"{batch_size}; lower batch_size or set drop_last=False"
        )
    return num_steps


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """Return the order of the samples in an epoch, [num_samples] int64, a permutation.

    Example:
        >>> sorted(epoch_order(5, seed=0, epoch=3).tolist())
        [0, 1, 2, 3, 4]
    """
    samples = torch.arange(num_samples)
    if not shuffle:
        return samples
    return torch.argsort(hash_indices(samples, seed, "order", epoch), stable=True)


def source_order(source: DataSource, *, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """Return the order of an epoch: the source's own if it has one, else ``epoch_order``.

    Raises:
        ValueError: if the source's own order is not [len(source)] int64 positions from 0, or would
            be ignored because of ``shuffle=False``.
    """
    own = getattr(source, "epoch_order", None)
    if own is None:
        return epoch_order(len(source), seed=seed, epoch=epoch, shuffle=shuffle)
    name = type(source).__name__
    if not shuffle:
        raise ValueError(
            f"shuffle=False would be ignored: {name}.epoch_order() decides the order; leave "
            "shuffle=True"
        )
    order = torch.as_tensor(own(seed=seed, epoch=epoch)).cpu()
    if order.dtype != torch.int64 or tuple(order.shape) != (len(source),):
        raise ValueError(
            f"{name}.epoch_order() must return [{len(source)}] int64, one position for each sample "
            f"of an epoch; got {order.dtype} of shape {tuple(order.shape)}"
        )
    if int(order.min()) < 0:
        raise ValueError(
            f"{name}.epoch_order() must return positions from 0; got {int(order.min())}"
        )
    return order


def draw_partners(indices: Tensor, order: Tensor, *, seed: int, step: int) -> Tensor:
    """Draw for each sample another one to mix with, uniformly from the samples of the epoch.

    Args:
        indices: [B] int64 positions of the samples.
        order: [N] int64, the positions of the whole epoch.
        seed: seed of the run.
        step: 0-based step of the run.

    Returns:
        [B] int64 positions, a function of seed, step and each sample alone; a sample may meet
        itself.

    Example:
        >>> order = torch.arange(100)
        >>> both = draw_partners(torch.tensor([3, 8]), order, seed=0, step=5)
        >>> draw_partners(torch.tensor([8]), order, seed=0, step=5).item() == both[1].item()
        True
    """
    return order[torch.remainder(hash_indices(indices, seed, "partner", step), len(order))]


def epoch_plan(
    num_samples: int,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    drop_last: bool = False,
    shuffle: bool = True,
    order: Tensor | None = None,
) -> list[list[MicroBatchPlan]]:
    """Return the steps of an epoch for one process; a step is a list of micro-batches.

    The samples of a step are cut into ``world_size * accumulation`` chunks of equal size, and chunk
    ``micro * world_size + rank`` goes to that process and micro-batch. Where the division leaves a
    rest, the tail is filled with duplicates of the step's first sample whose mask is False, so that
    padding always comes last. A single process without accumulation never sees padding.

    Args:
        num_samples: samples of the training data.
        batch_size: samples of one optimiser step, over all processes and micro-batches.
        seed: seed of the run.
        epoch: 0-based epoch.
        rank: this process.
        world_size: number of processes.
        accumulation: micro-batches of one optimiser step in each process.
        drop_last: leave out an incomplete last step.
        shuffle: draw a new order for every epoch; False keeps the order of the data.
        order: [num_samples] int64 positions, which takes the place of the drawn order; they may
            repeat and exceed ``num_samples``.

    Raises:
        ValueError: if a number is out of range or no step would remain.

    Example:
        >>> plan = epoch_plan(5, batch_size=5, seed=0, epoch=0, accumulation=2, shuffle=False)
        >>> [(micro.indices.tolist(), micro.mask.tolist()) for micro in plan[0]]
        [([0, 1, 2], [True, True, True]), ([3, 4, 0], [True, True, False])]
    """
    if accumulation < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"need accumulation >= 1, world_size >= 1 and 0 <= rank < world_size; got "
            f"accumulation={accumulation}, world_size={world_size}, rank={rank}"
        )
    num_steps = count_steps(num_samples, batch_size, drop_last)
    if order is None:
        order = epoch_order(num_samples, seed=seed, epoch=epoch, shuffle=shuffle)
    num_chunks = world_size * accumulation
    return [
        _cut_step(order[step * batch_size : (step + 1) * batch_size], num_chunks)[rank::world_size]
        for step in range(num_steps)
    ]


def _cut_step(samples: Tensor, num_chunks: int) -> list[MicroBatchPlan]:
    chunk_size = -(-len(samples) // num_chunks)
    num_padding = chunk_size * num_chunks - len(samples)
    indices = torch.cat([samples, samples[:1].expand(num_padding)])
    mask = torch.arange(len(indices)) < len(samples)
    return [
        MicroBatchPlan(*pair)
        for pair in zip(
            torch.split(indices, chunk_size), torch.split(mask, chunk_size), strict=True
        )
    ]

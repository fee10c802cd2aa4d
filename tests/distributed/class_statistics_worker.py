"""One of two processes: collect class statistics on half of every batch, then report them.

Arguments: rank, number of processes, a folder that all of them share. Every process leaves its
report there, as ``rank_<rank>.pt``.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dkl.cli.processes import leave
from dkl.losses import ClassStatistics, ikl_loss

NUM_CLASSES = 4
MOMENTUM = 0.25


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Return the whole batch of a step: 10 samples; class 3 is absent after the first two."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(NUM_CLASSES - (index > 1), (10,), generator=generator)


def share(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Return the indices of this process's samples and the mask of those that count.

    The shares are unequal; the second is padded with samples of the first, as samplers do.
    """
    if world_size == 1:
        return torch.arange(10), torch.ones(10, dtype=torch.bool)
    if rank == 0:
        return torch.arange(6), torch.ones(6, dtype=torch.bool)
    indices = torch.tensor([6, 7, 8, 9, 0, 1])
    return indices, torch.tensor([True, True, True, True, False, False])


def make_model(world_size: int) -> nn.Module:
    """Return a model with buffers, which DistributedDataParallel broadcasts at every forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, NUM_CLASSES), nn.BatchNorm1d(NUM_CLASSES)).double()
    model[1].eval()
    return DistributedDataParallel(model) if world_size > 1 else model


def collect(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Run three epochs of two batches with a checkpoint in the middle of the second."""
    model = make_model(world_size)
    statistics = ClassStatistics(NUM_CLASSES, temperature=2.0, dtype=torch.float64)
    indices, mask = share(rank, world_size)
    report: dict[str, Any] = {"tables": []}
    for step in range(6):
        images, labels = (tensor[indices] for tensor in batch(step))
        logits = model(images)
        statistics.update(logits, labels, mask=mask)
        weights = {"class_table": statistics.table, "labels": labels, "mask": mask}
        ikl_loss(logits, logits.detach().flip(1), **weights).backward()
        if step == 2:
            statistics.consolidate()
            once = [statistics.sums.clone(), statistics.counts.clone()]
            statistics.consolidate()
            report["idempotent"] = torch.equal(once[0], statistics.sums) and torch.equal(
                once[1], statistics.counts
            )
            report["consolidated"] = {
                name: value.clone() for name, value in statistics.state_dict().items()
            }
            if rank == 0:
                torch.save(statistics.state_dict(), folder / "checkpoint.pt")
        if step % 2 == 1:
            statistics.commit(MOMENTUM)
            report["tables"].append(statistics.table.clone())
    return report


def resume(rank: int, world_size: int, folder: Path) -> Tensor:
    """Load the checkpoint of the first process in all of them and finish the second epoch."""
    model = make_model(world_size)
    statistics = ClassStatistics(NUM_CLASSES, temperature=2.0, dtype=torch.float64)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    statistics.load_state_dict(state, assign=True)
    if state["counts"].sum() != 10:
        raise RuntimeError("loading changed the checkpoint")
    indices, mask = share(rank, world_size)
    images, labels = (tensor[indices] for tensor in batch(3))
    statistics.update(model(images), labels, mask=mask)
    statistics.commit(MOMENTUM)
    return statistics.table.clone()


def main() -> None:
    """Join the group, work, save the report."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
        )
    report = collect(rank, world_size, folder)
    if world_size > 1:
        dist.barrier()
    report["resumed"] = resume(rank, world_size, folder)
    torch.save(report, folder / f"rank_{rank}.pt")
    leave()


if __name__ == "__main__":
    main()

"""One of two gloo processes that make two AWP steps on half of the batch; rank 0 also alone."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dkl.attacks import AdversarialWeightPerturbation


def make_two_steps(wrapper, inputs, targets):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = wrapper(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)

    def backward():
        nn.functional.mse_loss(model(inputs), targets).backward()

    record = {}
    for _ in range(2):
        optimizer.zero_grad()
        with AdversarialWeightPerturbation(0.1).perturbed(model, backward):
            record["perturbed"] = {k: v.clone() for k, v in network.state_dict().items()}
            backward()
            optimizer.step()
    record["after"] = network.state_dict()
    return record


def wrap(network):
    return DistributedDataParallel(network, gradient_as_bucket_view=True)


def main(folder, rank):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(10, 6, generator=generator).double()
    targets = torch.randn(10, 2, generator=generator).double()
    meeting_point = f"file://{folder / 'meeting_point'}"
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    torch.save(make_two_steps(wrap, inputs[rank::2], targets[rank::2]), folder / f"{rank}.pt")
    if rank == 0:
        torch.save(make_two_steps(lambda network: network, inputs, targets), folder / "one.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

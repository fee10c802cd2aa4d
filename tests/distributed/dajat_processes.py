"""DAJAT, further views and mixed images on tiny networks; run by torchrun, and by the test in one.

torchrun --nproc_per_node 2 dajat_processes.py FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from method_runs import ATTACK, NUM_CLASSES, sgd, tiny_data, tiny_network
from test_mixing import ALL, Classified, ViewMethod
from tiny_training import assert_same_run, tiny_fit, tiny_settings

from dkl.attacks import AdversarialWeightPerturbation
from dkl.cli.processes import leave
from dkl.data import ImageData, basic_augment
from dkl.engine import AverageSettings, FitResult, LoopSettings, fit
from dkl.methods.dajat import dajat
from dkl.models.dual_batch_norm import add_dual_batch_norm


class Normalised(nn.Module):
    """A network with batch-norm, which every process takes from its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(36, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.bn(self.conv(images)).relu()
        return self.fc(nn.functional.avg_pool2d(features, 2).flatten(1))


def two_norms() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return add_dual_batch_norm(Normalised())


class Stopping(ImageData):
    """Asks this process alone to stop when its third batch is read."""

    def batches(self, index_batches: Any, device: Any) -> Any:
        for number, batch in enumerate(super().batches(index_batches, device), start=1):
            if number == 3:
                os.kill(os.getpid(), 15)
            yield batch


def train(folder: Path, model: nn.Module, accumulation: int = 1, **options: Any) -> FitResult:
    settings = LoopSettings(
        epochs=2,
        batch_size=12,
        accumulation=accumulation,
        dtype="float64",
        trackers=(),
        record_every_steps=1,
    )
    return fit(
        dajat(ATTACK, beta=4.0, label_smoothing=0.1, smooth_direction=False),
        model,
        options.pop("data", tiny_data()),
        settings=settings,
        out_dir=folder,
        make_optimizer=sgd,
        augment=basic_augment(padding=1, flip=True),
        views=[basic_augment(padding=2, flip=True), basic_augment(padding=1, flip=False)],
        weight_perturbation=AdversarialWeightPerturbation(0.01, start_epoch=1),
        weight_average=AverageSettings(decay=0.9),
        **options,
    )


def views_and_mixing(folder: Path, **settings: Any) -> None:
    tiny_fit(
        folder,
        method=ViewMethod(),
        data=Classified(21),
        settings=tiny_settings(epochs=3, **settings),
        **ALL,
    )


def agree(model: nn.Module) -> None:
    """Assert that weights, and statistics after an epoch, are the same in both processes."""
    for name, value in model.state_dict().items():
        gathered = [torch.empty_like(value) for _ in range(2)]
        torch.distributed.all_gather(gathered, value.contiguous())
        assert torch.equal(*gathered), name


def with_batch_norm(folder: Path) -> None:
    model = two_norms()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(folder / "straight", model)
    agree(model)
    moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert moved == set(before)
    assert not model.bn.uses_auxiliary
    data = tiny_data()
    if torch.distributed.get_rank() == 1:
        data = Stopping(data.images, data.labels, data.num_classes, data.class_names)
    assert train(folder / "stopped", two_norms(), data=data).steps_done == 3
    train(folder / "stopped", two_norms(), resume=True)
    if torch.distributed.get_rank() == 0:
        assert_same_run(folder / "straight", folder / "stopped")


def main() -> None:
    folder = Path(sys.argv[1])
    train(folder / "dajat", tiny_network(1))
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
    views_and_mixing(folder / "mixing")
    with_batch_norm(folder / "batch_norm")
    if torch.distributed.get_rank() == 0:
        (folder / "done").touch()
    leave()


if __name__ == "__main__":
    main()

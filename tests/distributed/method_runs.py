"""Shipped methods on a tiny network; run by torchrun in two processes, by the test in one.

torchrun --nproc_per_node 2 method_runs.py FOLDER
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkl.attacks import AdversarialWeightPerturbation, PGDSettings, ThreatModel
from dkl.cli.processes import leave
from dkl.data import ImageData, basic_augment, cutmix
from dkl.engine import AverageSettings, LoopSettings, fit
from dkl.methods import ikl_at, ikl_kd, lbgat, mart, trades
from dkl.methods.protocol import Method

NUM_CLASSES = 4
NUM_SAMPLES = 29  # steps of 12, 12 and 5: in 2 or 4 parts the last one is uneven
ATTACK = PGDSettings(ThreatModel("Linf", 0.1), 2, 0.06, "gaussian", "eval")
UNIFORM = PGDSettings(ThreatModel("Linf", 0.1), 2, 0.06, "uniform", "eval")
WEIGHTS = {"mse_weight": 3.0, "ce_weight": 2.0, "weight_temperature": 2.0}
AWP = AdversarialWeightPerturbation(0.01, start_epoch=1)


def tiny_data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (NUM_SAMPLES,), generator=generator)
    noise = torch.randint(0, 100, (NUM_SAMPLES, 1, 6, 6), generator=generator)
    images = (noise + 50 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageData(images, labels, NUM_CLASSES, tuple("abcd"))


def tiny_network(seed: int) -> nn.Module:
    """Return a network without batch-norm, whose statistics are those of a process."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(36, NUM_CLASSES),
        )


METHODS: dict[str, tuple[Callable[[], Method], dict[str, Any]]] = {
    "ikl_at": (lambda: ikl_at(ATTACK, NUM_CLASSES, **WEIGHTS), {}),
    "gkl_at": (lambda: ikl_at(UNIFORM, NUM_CLASSES, gamma=0.8, **WEIGHTS), {}),
    "trades_awp": (lambda: trades(ATTACK, beta=4.0), {"weight_perturbation": AWP}),
    "mart_awp": (lambda: mart(ATTACK, beta=4.0), {"weight_perturbation": AWP}),
    "lbgat_awp": (
        lambda: lbgat(ATTACK, tiny_network(5), beta=2.0),
        {"weight_perturbation": AWP},
    ),
    "ikl_at_two_views": (
        lambda: ikl_at(ATTACK, NUM_CLASSES, second_view_weight=0.5, **WEIGHTS),
        {"views": [basic_augment(padding=2, flip=False)]},
    ),
    "trades_cutmix": (lambda: trades(ATTACK, beta=4.0), {"mix": cutmix}),
    "ikl_kd": (lambda: ikl_kd(tiny_network(9), NUM_CLASSES, warmup_epochs=2, **WEIGHTS), {}),
}


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=1e-3)


def train_all(folder: Path, accumulation: int = 1) -> None:
    for name, (make_method, options) in METHODS.items():
        settings = LoopSettings(
            epochs=3,
            batch_size=12,
            accumulation=accumulation,
            dtype="float64",
            trackers=(),
            record_every_steps=1,
        )
        fit(
            make_method(),
            tiny_network(1),
            tiny_data(),
            settings=settings,
            out_dir=folder / name,
            make_optimizer=sgd,
            augment=basic_augment(padding=1, flip=True),
            weight_average=AverageSettings(decay=0.9),
            **options,
        )


def main() -> None:
    train_all(Path(sys.argv[1]))
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
    leave()


if __name__ == "__main__":
    main()

"""LAS-AT on tiny networks: whole, split, stopped and resumed; run by torchrun, by the test in one.

torchrun --nproc_per_node 2 las_at_runs.py FOLDER
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkl.attacks import AdversarialWeightPerturbation
from dkl.cli.processes import leave
from dkl.data import ImageData, basic_augment
from dkl.engine import AverageSettings, FitResult, LoopSettings, cosine, fit
from dkl.methods.las_at import las_at

NUM_CLASSES = 4
NUM_SAMPLES = 29  # steps of 12, 12 and 5: in 2 or 4 parts the last one is uneven
CHOICES: dict[str, Any] = {
    "eps": 0.1,
    "eps_choices": (0.05, 0.1, 0.15),
    "steps_choices": (1, 2, 3),
    "step_size_choices": (0.04, 0.08),
    "lookahead_steps": 2,
    "lookahead_step_size": 0.06,
    "strategy_lr": 0.5,
    "strategy_momentum": 0.9,
    "strategy_weight_decay": 1e-3,
    "update_every": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pgd": {"label_smoothing": 0.2},
    "trades": {"beta_choices": (2.0, 4.0)},
    "awp": {"update_every": 1},
}
AWP = AdversarialWeightPerturbation(0.01, start_epoch=1)


def tiny_data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (NUM_SAMPLES,), generator=generator)
    noise = torch.randint(0, 100, (NUM_SAMPLES, 1, 6, 6), generator=generator)
    images = (noise + 50 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageData(images, labels, NUM_CLASSES, tuple("abcd"))


class StoppingData:
    """Sends this process SIGTERM when a certain batch is asked for."""

    def __init__(self, data: ImageData, at_batch: int) -> None:
        self.data, self.at_batch, self.num_asked = data, at_batch, 0

    def __len__(self) -> int:
        return len(self.data)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.data.batches(index_batches, device):
            self.num_asked += 1
            if self.num_asked == self.at_batch:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def tiny_network(num_outputs: int, seed: int, batch_norm: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4) if batch_norm else nn.Identity(),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(36, num_outputs),
        )


def train(
    folder: Path,
    variant: str,
    *,
    batch_norm: bool = False,
    accumulation: int = 1,
    at_batch: int | None = None,
    resume: bool = False,
) -> FitResult:
    num_logits = 8 + 2 * (variant == "trades")
    strategy = tiny_network(num_logits, 2, batch_norm)
    method = las_at(strategy, variant=variant, **(CHOICES | VARIANTS[variant]))
    data = tiny_data()
    return fit(
        method,
        tiny_network(NUM_CLASSES, 1, batch_norm),
        data if at_batch is None else StoppingData(data, at_batch),
        settings=LoopSettings(
            epochs=3,
            batch_size=12,
            accumulation=accumulation,
            dtype="float64",
            trackers=(),
            record_every_steps=1,
        ),
        out_dir=folder,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=1e-3),
        schedule=cosine(3),
        augment=basic_augment(padding=1, flip=True),
        weight_perturbation=AWP if variant == "awp" else None,
        weight_average=AverageSettings(decay=0.9),
        resume=resume,
    )


def main() -> None:
    folder = Path(sys.argv[1])
    for variant in VARIANTS:
        train(folder / variant, variant)
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
    train(folder / "accumulated", "pgd", accumulation=2)
    train(folder / "batch_norm", "pgd", batch_norm=True)
    # A signal to the second process alone, in the middle of the second epoch.
    at_batch = 5 if torch.distributed.get_rank() == 1 else None
    stopped = train(folder / "stopped", "pgd", batch_norm=True, at_batch=at_batch)
    assert stopped.stopped_early
    assert stopped.steps_done == 5
    train(folder / "stopped", "pgd", batch_norm=True, resume=True)
    leave()


if __name__ == "__main__":
    main()

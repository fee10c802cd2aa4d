"""Models, data and hand-made values that the tests of the integrations share."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NUM_CLASSES = 4


class Net(nn.Module):
    """A linear classifier of 3x2x2 images that carries what timm reads of a model."""

    num_classes = NUM_CLASSES
    in_chans = 3

    def __init__(self, seed: int, std: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = nn.Linear(12, NUM_CLASSES)
        self.norm = nn.BatchNorm1d(12, affine=False)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (std,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self.head(self.norm(images.flatten(1)))


class PlainNet(Net):
    """The same without normalisation, whose rows do not depend on each other."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self.head(images.flatten(1))


def data(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images and labels; every class is there."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, 3, 2, 2, generator=generator)
    return images, torch.arange(num_samples) % NUM_CLASSES


def mixed(labels: Tensor) -> Tensor:
    """Return soft labels: 0.7 of each label and 0.3 of the next class."""
    hot = nn.functional.one_hot(labels, NUM_CLASSES).float()
    return 0.7 * hot + 0.3 * hot.roll(1, 1)


def mean_table(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class table by its definition."""
    return torch.stack([logits.softmax(1)[labels == y].mean(0) for y in range(NUM_CLASSES)])


def some_table() -> Tensor:
    """Return a class table that is far from uniform."""
    generator = torch.Generator().manual_seed(99)
    return (2 * torch.randn(NUM_CLASSES, NUM_CLASSES, generator=generator)).softmax(1)


def two_processes(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run ``two_processes.py NAME FOLDER`` under torchrun and return both reports."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    here = Path(__file__)
    worker = [str(here.with_name("two_processes.py")), name, str(folder)]
    done = subprocess.run(
        [sys.executable, *launcher, "--rdzv-endpoint=localhost:0", *worker],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]

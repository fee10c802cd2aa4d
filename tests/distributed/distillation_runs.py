"""Methods of distillation on small networks; run by torchrun in two processes, by the test in one.

torchrun --nproc_per_node 2 distillation_runs.py FOLDER
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from dkl.cli.processes import leave
from dkl.data import ImageData, basic_augment
from dkl.engine import LoopSettings, fit
from tests.methods.distillation_cases import NAMES, NUM_CLASSES, labels_of_data, make, networks

NUM_SAMPLES = 29  # steps of 12, 12 and 5: in 2 or 4 parts the last one is uneven


def tiny_data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = labels_of_data(NUM_SAMPLES)
    noise = torch.randint(0, 100, (NUM_SAMPLES, 1, 4, 4), generator=generator)
    images = (noise + 30 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageData(images, labels, NUM_CLASSES, tuple("abcde"))


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-3)


def train(name: str, folder: Path, *, resume: bool = False, **settings: Any) -> None:
    """Train one method for three epochs."""
    student, teacher = networks()
    options = {"epochs": 3, "batch_size": 12, "dtype": "float64", "trackers": ()} | settings
    if options["dtype"] == "float32":
        student, teacher = student.float(), teacher.float()
    method = make(name, student, teacher, NUM_SAMPLES)
    if options["dtype"] == "float32":
        method.float()
    fit(
        method,
        student,
        tiny_data(),
        settings=LoopSettings(**options, record_every_steps=1),
        out_dir=folder / name,
        make_optimizer=sgd,
        augment=basic_augment(padding=1, flip=True),
        resume=resume,
    )


def main() -> None:
    for name in NAMES:
        train(name, Path(sys.argv[1]))
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
    leave()


if __name__ == "__main__":
    main()

"""Batches, contexts and a small model for testing methods without a loop."""

import pytest
import torch
from torch import Tensor, nn

from dkl.methods.protocol import Batch, StepContext

NUM_CLASSES = 5


def make_batch(num_samples: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_samples, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    mask = torch.ones(num_samples, dtype=torch.bool)
    return Batch(images, labels, mask, torch.arange(num_samples))


def draw_for(indices: Tensor):
    """Per-sample noise that does not depend on how the batch is cut."""

    def draw(num_columns: int) -> Tensor:
        rows = []
        for index in indices.tolist():
            generator = torch.Generator().manual_seed(1000 + index)
            rows.append(torch.rand(num_columns, generator=generator, dtype=torch.float64))
        return torch.stack(rows)

    return draw


def make_context(batch: Batch, *, whole: Batch | None = None, **changes: object) -> StepContext:
    whole = whole or batch
    values = {
        "epoch": 0,
        "num_epochs": 10,
        "step": 0,
        "num_items": whole.mask.sum(),
        "step_labels": whole.labels[whole.mask],
        "loss_scale": 1.0,
        "draw": draw_for(batch.indices),
    }
    return StepContext(**{**values, **changes})


def cut(batch: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    return Batch(batch.images[part], batch.labels[part], batch.mask[part], batch.indices[part])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, NUM_CLASSES)
    ).double()


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(4)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, NUM_CLASSES))
    return network.double().train()

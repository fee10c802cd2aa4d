"""Batches, contexts and a small model for testing methods without a loop."""

from collections.abc import Callable
from dataclasses import replace

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
    view = torch.rand(num_samples, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(images, labels, mask, torch.arange(num_samples), {"view_1": view})


def mixed(batch: Batch, seed: int = 7) -> Batch:
    """Return the batch with label distributions, as CutMix makes them."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(batch.labels), 1, generator=generator, dtype=torch.float64)
    labels_BC = nn.functional.one_hot(batch.labels, NUM_CLASSES).double()
    return replace(batch, targets=share * labels_BC + (1 - share) * labels_BC.roll(1, 0))


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


def select(batch: Batch, rows: Tensor | slice) -> Batch:
    """Return some rows of a batch, of everything in it."""
    return Batch(
        batch.images[rows],
        batch.labels[rows],
        batch.mask[rows],
        batch.indices[rows],
        {name: value[rows] for name, value in batch.extras.items()},
        None if batch.targets is None else batch.targets[rows],
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    return select(batch, slice(start, stop))


def padded(batch: Batch) -> Batch:
    """Return the batch with its first sample once more, as a duplicate that does not count."""
    longer = select(batch, torch.tensor([*range(len(batch.labels)), 0]))
    return replace(longer, mask=torch.cat([batch.mask, torch.tensor([False])]))


def trained_parameters(method: nn.Module, model: nn.Module) -> list[nn.Parameter]:
    """Return what the loop's optimiser trains: the model's parameters and the method's own."""
    return [*model.parameters(), *(p for p in method.parameters() if p.requires_grad)]


def gradients_of(
    method: nn.Module, model: nn.Module, batch: Batch, whole: Batch | None = None
) -> list[Tensor]:
    """Prepare a batch, and return the gradients of its loss, zero where there is none."""
    context = make_context(batch, whole=whole)
    loss = method.loss(model, method.prepare(model, batch, context), context).loss
    found = torch.autograd.grad(loss, trained_parameters(method, model), materialize_grads=True)
    return list(found)


def assert_parts_add_up(
    method: nn.Module, model: nn.Module, whole: Batch, add_padding: Callable[[Batch], Batch]
) -> None:
    """Assert that gradients of a cut batch with a padded last part are the whole batch's."""
    expected = gradients_of(method, model, whole)
    middle = len(whole.labels) // 2 + 1
    parts = [cut(whole, 0, middle), add_padding(cut(whole, middle, len(whole.labels)))]
    pieces = [gradients_of(method, model, part, whole) for part in parts]
    for first, second, total in zip(*pieces, expected, strict=True):
        torch.testing.assert_close(first + second, total, rtol=1e-10, atol=1e-12)


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

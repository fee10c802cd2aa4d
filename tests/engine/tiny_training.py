"""A training run small enough for tests: model, data, method, and how to compare runs."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.engine import FitResult, LoopSettings, find_checkpoint, fit, load_checkpoint
from dkl.engine.recorder import read_rows
from dkl.methods.protocol import Batch, StepContext, StepOutput

NUM_CLASSES = 3


@dataclass
class TinyData:
    """Random images whose class shifts their brightness; remembers what was asked for."""

    num_samples: int = 22
    seed: int = 0
    asked: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.labels = torch.randint(0, NUM_CLASSES, (self.num_samples,), generator=generator)
        noise = torch.randint(0, 128, (self.num_samples, 1, 4, 4), generator=generator)
        self.images = (noise + 60 * self.labels.view(-1, 1, 1, 1)).to(torch.uint8)

    def __len__(self) -> int:
        return self.num_samples

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in index_batches:
            self.asked.append(indices.tolist())
            yield self.images[indices].to(device), self.labels[indices].to(device)


def tiny_model(dropout: float = 0.0, batch_norm: bool = False, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(16, 8), nn.Tanh()]
        if batch_norm:
            layers.append(nn.BatchNorm1d(8))
        return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(8, NUM_CLASSES))


class TinyMethod(nn.Module):
    """Two forwards in one loss, noise in both stages, state of its own, a trainable scale.

    The loss is a mean over all samples of the step plus a term with the step's label histogram, so
    that wrong counts, wrong labels and wrong noise all show.
    """

    couples_batch = False

    def __init__(self, trainable: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=trainable)
        self.register_buffer("label_sums", torch.zeros(NUM_CLASSES, dtype=torch.float64))
        self.register_buffer("histogram", torch.zeros(NUM_CLASSES, dtype=torch.float64))
        self.phases: list[str] = []

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        noise = context.draw(batch.images[0].numel()).view_as(batch.images)
        return replace(batch, extras={"noisy": (batch.images + 0.2 * noise).clamp(0, 1)})

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        self.phases.append(context.phase)
        clean, noisy = model(batch.images), model(batch.extras["noisy"])
        weight = torch.bincount(context.step_labels, minlength=NUM_CLASSES) / context.num_items
        rows = F.cross_entropy(clean, batch.labels, reduction="none")
        rows = rows + self.scale**2 * (clean.detach() - noisy).square().sum(dim=1)
        rows = rows * (1 + weight[batch.labels]) * (1 + 0.1 * context.draw(1)[:, 0])
        rows = torch.where(batch.mask, rows, 0)
        if context.phase == "update":
            counted = batch.labels[batch.mask]
            self.label_sums += torch.bincount(counted, minlength=NUM_CLASSES)
        return StepOutput(
            loss=rows.sum() / context.num_items * context.loss_scale,
            logits=clean.detach(),
            parts={"loss": rows.sum().detach()},
            counts=batch.mask.sum(),
        )

    def on_epoch_end(self, epoch: int) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.label_sums)
        self.histogram.copy_(self.label_sums)
        self.label_sums.zero_()

    def consolidate(self) -> None:
        if torch.distributed.is_initialized():
            total = self.label_sums.clone()
            torch.distributed.all_reduce(total)
            self.label_sums.copy_(total if torch.distributed.get_rank() == 0 else 0 * total)


@dataclass(frozen=True)
class TinyPerturbation:
    """Moves the weights along the gradient and back again."""

    start_epoch: int = 0
    step_inside: bool = True
    size: float = 0.01

    @contextmanager
    def perturbed(self, model: nn.Module, compute_gradients: Callable[[], None]) -> Iterator[None]:
        compute_gradients()
        deltas = [self.size * parameter.grad.sign() for parameter in model.parameters()]
        model.zero_grad()
        self._add(model, deltas, 1)
        try:
            yield
        finally:
            self._add(model, deltas, -1)

    @staticmethod
    @torch.no_grad()
    def _add(model: nn.Module, deltas: list[Tensor], sign: int) -> None:
        for parameter, delta in zip(model.parameters(), deltas, strict=True):
            parameter.add_(delta, alpha=sign)


def augment(images: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    return (images * (0.8 + 0.4 * draw(1).view(-1, 1, 1, 1))).clamp(0, 1)


def validate(model: nn.Module) -> dict[str, float]:
    data = TinyData(num_samples=16, seed=1)
    images = data.images.to(next(model.parameters()).dtype) / 255
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(images), data.labels).item()
    model.train(was_training)
    torch.rand(3)  # what validation draws must not matter
    return {"val_loss": loss}


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def tiny_settings(**changes: Any) -> LoopSettings:
    defaults: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 8,
        "dtype": "float64",
        "best_metric": "val_loss",
        "best_mode": "min",
        "trackers": (),
        "record_every_steps": 1,
    }
    return LoopSettings(**defaults | changes)


def tiny_fit(
    out_dir: Path,
    model: nn.Module | None = None,
    method: nn.Module | None = None,
    data: Any = None,
    settings: LoopSettings | None = None,
    **options: Any,
) -> tuple[FitResult, nn.Module]:
    """Train and return the result with the trained model."""
    model = tiny_model() if model is None else model
    result = fit(
        TinyMethod() if method is None else method,
        model,
        TinyData() if data is None else data,
        settings=settings or tiny_settings(),
        out_dir=out_dir,
        **{"make_optimizer": sgd, "augment": augment, "validate": validate} | options,
    )
    return result, model


class InterruptingData(TinyData):
    """Sends this process a signal when a certain batch is asked for."""

    def __init__(self, at_batch: int, number: int = signal.SIGTERM, **options: Any) -> None:
        super().__init__(**options)
        self.at_batch = at_batch
        self.number = number

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().batches(index_batches, device):
            if len(self.asked) == self.at_batch:
                os.kill(os.getpid(), self.number)
            yield batch


def same(first: Any, second: Any) -> bool:
    """Return whether nested containers of tensors and numbers are equal, bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def assert_same_run(first_dir: Path, second_dir: Path) -> None:
    """Assert that two runs ended in the same state and wrote the same records, times aside."""
    first, second = (load_checkpoint(find_checkpoint(path)) for path in (first_dir, second_dir))
    assert first.path.name == second.path.name
    assert same(first.model, second.model)
    assert same(first.average, second.average)
    for checkpoint in (first, second):
        for process in checkpoint.training["processes"]:
            del process["seconds"]
    assert same(first.training, second.training)
    assert first.meta["best"] == second.meta["best"]
    rows = []
    for path in (first_dir, second_dir):
        rows.append(read_rows(path / "records.jsonl"))
        for row in rows[-1]:
            row.pop("seconds", None)
            row.pop("images_per_second", None)
    assert rows[0] == rows[1]

"""What a training run is told, and what it returns."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

TRACKERS = ("tensorboard", "wandb")

_BOOKKEEPING = ("checkpoint_every_steps", "keep_last", "record_every_steps", "trackers")


class DataSource(Protocol):
    """Training data: a length, and batches for given positions.

    Two more attributes are looked for. ``num_classes`` is needed when images are mixed.
    ``epoch_order(*, seed, epoch)`` gives a source an order of its own, such as a share of generated
    images in every batch: [len(source)] int64, a function of its arguments alone, the same in every
    process. Its entries are positions in the source's own index space: they may exceed the length
    and repeat within an epoch. A sample that comes twice in one optimiser step is augmented,
    attacked and mixed alike both times, because noise is keyed by seed, step and position.
    """

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images [B, C, H, W] uint8 or float in [0, 1], labels [B]) for each index batch."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the training loop.

    Args:
        epochs: number of epochs.
        batch_size: samples of one optimiser step, over all processes and micro-batches.
        seed: of the order of the data, the noise and the global generators, in [0, 2**31).
        accumulation: micro-batches of one optimiser step in each process.
        dtype: of weights and images; "float64" is for tests of exactness.
        mixed_precision: "no", "bf16" or "fp16" (GPU only); weights stay in ``dtype``.
        channels_last: memory format of model and images.
        compile_model: compile the model's forward with torch.compile.
        clip_norm: bound on the norm of the whole gradient, or None.
        drop_last: leave out the incomplete last step of an epoch.
        shuffle: draw a new order for every epoch.
        batch_norm: "local" takes batch statistics in each process and averages the running ones
            over processes at the end of every epoch; "sync" takes statistics over all processes
            (GPU only).
        batch_norm_momentum: momentum of the running statistics, in (0, 1], set on all batch-norm
            layers of the model; None keeps each layer's own.
        batch_norm_first_momentum: another momentum for the very first optimiser step, so that 1
            replaces the initial statistics; None makes no difference.
        decay_batch_norm: False puts scales and shifts of batch-norm layers, the model's and the
            method's, into a parameter group without weight decay.
        deterministic: refuse operations without a deterministic implementation.
        checkpoint_every_steps: additional checkpoints within an epoch; one is always written at its
            end.
        keep_last: number of latest checkpoints kept, at least 1, beside the best.
        record_every_steps: steps between rows in the records.
        validate_every: epochs between validations; the last epoch is always validated.
        best_metric: which value of ``validate`` chooses the best checkpoint; None keeps no best.
        best_mode: whether "max" or "min" of it is best.
        trackers: "tensorboard" and "wandb", in addition to the JSONL records.

    Raises:
        ValueError: with every value that is out of range.

    Example:
        >>> LoopSettings(epochs=2, batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: training settings: batch_size must be at least 1; got 0
    """

    epochs: int
    batch_size: int
    seed: int = 0
    accumulation: int = 1
    dtype: Literal["float32", "float64"] = "float32"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    compile_model: bool = False
    clip_norm: float | None = None
    drop_last: bool = False
    shuffle: bool = True
    batch_norm: Literal["local", "sync"] = "local"
    batch_norm_momentum: float | None = None
    batch_norm_first_momentum: float | None = None
    decay_batch_norm: bool = True
    deterministic: bool = False
    checkpoint_every_steps: int | None = None
    keep_last: int = 1
    record_every_steps: int = 50
    validate_every: int = 1
    best_metric: str | None = "val_accuracy"
    best_mode: Literal["max", "min"] = "max"
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        problems = [*self._counts_out_of_range(), *self._unknown_choices()]
        if not 0 <= self.seed < 2**31:
            problems.append(f"seed must be in [0, 2**31); got {self.seed}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm must be positive or None; got {self.clip_norm}")
        for name in ("batch_norm_momentum", "batch_norm_first_momentum"):
            momentum = getattr(self, name)
            if momentum is not None and not 0 < momentum <= 1:
                problems.append(f"{name} must be in (0, 1] or None; got {momentum}")
        if self.dtype == "float64" and self.mixed_precision != "no":
            problems.append("mixed precision needs dtype 'float32'; set one of the two back")
        if problems:
            raise ValueError("training settings: " + "; ".join(problems))

    def _counts_out_of_range(self) -> Iterator[str]:
        names = ("epochs", "batch_size", "accumulation", "keep_last")
        for name in (*names, "record_every_steps", "validate_every"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1; got {getattr(self, name)}"
        every = self.checkpoint_every_steps
        if every is not None and every < 1:
            yield f"checkpoint_every_steps must be at least 1 or None; got {every}"

    def _unknown_choices(self) -> Iterator[str]:
        choices = {
            "dtype": ("float32", "float64"),
            "mixed_precision": ("no", "bf16", "fp16"),
            "batch_norm": ("local", "sync"),
            "best_mode": ("max", "min"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                yield f"trackers may hold {', '.join(TRACKERS)}; got {tracker!r}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return ``dtype`` as PyTorch knows it."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def trajectory(self) -> dict[str, Any]:
        """Return the settings that decide the trajectory: those a resumed run must share."""
        return {key: value for key, value in asdict(self).items() if key not in _BOOKKEEPING}


@dataclass(frozen=True)
class FitResult:
    """Where a training run ended.

    Args:
        run_dir: folder of the run.
        last_checkpoint: folder of the latest checkpoint.
        best_checkpoint: folder of the best one; None without validation.
        best_metric: name of the value that chose it; None if nothing was to choose one.
        best_value: that value; None without validation.
        epochs_done: completed epochs.
        steps_done: completed optimiser steps.
        stopped_early: True if a signal ended the run; it can be resumed.
    """

    run_dir: Path
    last_checkpoint: Path
    best_checkpoint: Path | None
    best_metric: str | None
    best_value: float | None
    epochs_done: int
    steps_done: int
    stopped_early: bool

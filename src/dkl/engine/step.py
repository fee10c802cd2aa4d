"""One optimiser step: micro-batches through a method, gradients, the update."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dkl.engine.batch_norm import momentum_of
from dkl.engine.noise import SampleNoise
from dkl.engine.processes import average_gradients
from dkl.engine.settings import LoopSettings
from dkl.engine.setup import Training
from dkl.methods.protocol import Batch, StepContext, StepOutput

Phase = Literal["update", "direction"]
Sums = dict[str, Tensor]


class WeightPerturbation(Protocol):
    """A perturbation of the weights during the update, such as AWP.

    ``perturbed(model, compute_gradients)`` calls ``compute_gradients`` once, reads the gradients it
    left in ``.grad``, clears them, and returns a context in which the weights are perturbed.
    """

    @property
    def start_epoch(self) -> int:
        """Return the first 0-based epoch that uses it."""

    @property
    def step_inside(self) -> bool:
        """Return whether the optimiser steps at the perturbed weights."""

    def perturbed(
        self, model: nn.Module, compute_gradients: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Return the context in which the weights are perturbed."""


@dataclass
class StepReport:
    """What one step did in this process.

    Args:
        batches: the prepared micro-batches.
        sums: "counts", "correct" and "part/<name>": sums over the rows that count; 0-dim, on the
            device. Where labels are mixed, "correct" adds up the shares of the predicted classes.
        is_finite: 0-dim bool; whether every loss was finite.
    """

    batches: list[Batch]
    sums: Sums
    is_finite: Tensor


class TrainingStep:
    """Takes optimiser steps.

    Args:
        training: the objects of the run.
        settings: of the loop.
        weight_perturbation: used in the update, or None.
    """

    def __init__(
        self,
        training: Training,
        settings: LoopSettings,
        weight_perturbation: WeightPerturbation | None = None,
    ) -> None:
        self._training = training
        self._settings = settings
        self._perturbation = weight_perturbation

    def run(self, batches: list[Batch], *, epoch: int, step: int, num_items: int) -> StepReport:
        """Take one step.

        Args:
            batches: the micro-batches of this process, not yet prepared.
            epoch: 0-based epoch.
            step: 0-based step of the run.
            num_items: samples that count, over all micro-batches and processes.
        """
        first_momentum = self._settings.batch_norm_first_momentum
        if first_momentum is not None and step == 0:
            with momentum_of(self._training.model, first_momentum):
                return self._run(batches, epoch=epoch, step=step, num_items=num_items)
        return self._run(batches, epoch=epoch, step=step, num_items=num_items)

    def _run(self, batches: list[Batch], *, epoch: int, step: int, num_items: int) -> StepReport:
        training = self._training
        group = training.optimizer.param_groups[0]
        rate, base_rate = float(group["lr"]), float(group["initial_lr"])
        step_labels = self._step_labels(batches, num_items)
        count = torch.full((), num_items, device=training.device)

        def context(batch: Batch, phase: Phase, stream: str) -> StepContext:
            return StepContext(
                epoch=epoch,
                num_epochs=self._settings.epochs,
                step=step,
                num_items=count,
                step_labels=step_labels,
                loss_scale=float(training.accelerator.num_processes),
                draw=self._noise(stream, step, batch.indices),
                learning_rate=rate,
                rate_factor=rate / base_rate if base_rate else 1.0,
                phase=phase,
            )

        prepared = []
        for batch in batches:
            with training.accelerator.autocast():
                prepared.append(
                    training.method.prepare(
                        training.model, batch, context(batch, "update", "prepare")
                    )
                )
        report = StepReport(prepared, {}, torch.ones((), dtype=torch.bool, device=training.device))

        def compute_gradients(phase: Phase) -> None:
            for number, batch in enumerate(prepared, start=1):
                is_last = number == len(prepared)
                output = self._backward(batch, context(batch, phase, "loss"), is_last)
                if phase == "update":
                    self._add(report, batch, output)
            average_gradients(training.accelerator, training.method_parameters)

        self._update(epoch, compute_gradients)
        return report

    def _update(self, epoch: int, compute_gradients: Callable[[Phase], None]) -> None:
        optimizer, model = self._training.optimizer, self._training.model
        perturbation = self._perturbation
        optimizer.zero_grad()
        if perturbation is None or epoch < perturbation.start_epoch:
            compute_gradients("update")
            self._apply()
            return
        with perturbation.perturbed(model, lambda: compute_gradients("direction")):
            optimizer.zero_grad()
            compute_gradients("update")
            if perturbation.step_inside:
                self._apply()
        if not perturbation.step_inside:
            self._apply()

    def _apply(self) -> None:
        training = self._training
        if self._settings.clip_norm is not None:
            training.accelerator.clip_grad_norm_(
                training.trained_parameters(), self._settings.clip_norm
            )
        training.optimizer.step()
        training.optimizer.zero_grad()

    def _backward(self, batch: Batch, context: StepContext, is_last: bool) -> StepOutput:
        training = self._training
        accelerator = training.accelerator
        # Gradients are exchanged once, in the backward of the last micro-batch.
        with nullcontext() if is_last else accelerator.no_sync(training.wrapped):
            with accelerator.autocast():
                output = training.method.loss(training.wrapped, batch, context)
            accelerator.backward(output.loss)
        return output

    def _step_labels(self, batches: list[Batch], num_items: int) -> Tensor:
        """Return the labels of the samples that count in this step, the same in every process.

        Micro-batches have equal sizes and padding comes last in the plan's order, so that cutting
        the tail off removes it without waiting for the device.
        """
        accelerator = self._training.accelerator
        labels = torch.stack([batch.labels for batch in batches])
        gathered = accelerator.gather(labels).view(accelerator.num_processes, *labels.shape)
        labels_M: Tensor = gathered.transpose(0, 1).flatten(0, 2)[:num_items]
        return labels_M

    def _noise(self, stream: str, step: int, indices: Tensor) -> SampleNoise:
        settings = self._settings
        return SampleNoise(settings.seed, stream, step, indices, settings.torch_dtype)

    @torch.no_grad()
    def _add(self, report: StepReport, batch: Batch, output: StepOutput) -> None:
        predicted_B = output.logits.argmax(dim=1)
        if batch.targets is None:
            correct_B = (predicted_B == batch.labels).to(torch.float32)
        else:
            correct_B = batch.targets.gather(1, predicted_B.unsqueeze(1)).squeeze(1)
        correct = correct_B.masked_fill(~batch.mask, 0).sum()
        sums = {"counts": output.counts, "correct": correct}
        sums |= {f"part/{name}": value for name, value in output.parts.items()}
        report.is_finite = report.is_finite & torch.isfinite(output.loss.detach())
        add_sums(report.sums, sums)


def add_sums(total: Sums, more: Sums) -> None:
    """Add named 0-dim tensors to running totals, in double precision where the device has it.

    Example:
        >>> total = {}
        >>> add_sums(total, {"counts": torch.tensor(3)})
        >>> add_sums(total, {"counts": torch.tensor(4)})
        >>> total["counts"].item()
        7.0
    """
    for name, value in more.items():
        dtype = torch.float32 if value.device.type == "mps" else torch.float64
        addend = value.detach().to(dtype)
        total[name] = total[name] + addend if name in total else addend


def mean_values(accelerator: Accelerator, sums: Sums) -> dict[str, float]:
    """Return accuracy and the mean of every part over the samples of all processes; collective."""
    names = sorted(sums)
    stacked = torch.stack([sums[name] for name in names])
    values: list[float] = accelerator.reduce(stacked, "sum").tolist()
    totals = dict(zip(names, values, strict=True))
    counts = max(totals["counts"], 1.0)
    means = {"accuracy": totals["correct"] / counts}
    for name, value in totals.items():
        if name.startswith("part/"):
            means[name.removeprefix("part/")] = value / counts
    return means

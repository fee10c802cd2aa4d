"""A training run in progress: epochs, records, validation, checkpoints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dkl.engine.batches import Augment, Mix, augmentations_of, load_batches
from dkl.engine.nonfinite import all_finite, report_nonfinite
from dkl.engine.plan import count_steps, epoch_plan, source_order
from dkl.engine.processes import average_batch_norm_buffers, from_first
from dkl.engine.randomness import preserved_rng
from dkl.engine.recorder import Recorder
from dkl.engine.schedules import Schedule, set_rates
from dkl.engine.settings import DataSource, FitResult, LoopSettings
from dkl.engine.setup import Training
from dkl.engine.snapshot import capture, restore
from dkl.engine.state import Checkpoint, CheckpointError, clean_checkpoints, save_checkpoint
from dkl.engine.step import Sums, TrainingStep, WeightPerturbation, add_sums, mean_values
from dkl.engine.watch import StepTrace, StepWatch, StopRequest, Verdict
from dkl.methods.protocol import Batch

Validate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Hooks:
    """The optional parts of a run; see ``fit``."""

    schedule: Schedule
    momentum_schedule: Schedule | None
    augment: Augment | None
    validate: Validate | None
    weight_perturbation: WeightPerturbation | None
    views: Sequence[Augment] = ()
    mix: Mix | None = None


class TrainingRun:
    """The state of a run between its steps, and the moves from one to the next."""

    def __init__(
        self,
        training: Training,
        source: DataSource,
        settings: LoopSettings,
        run_dir: Path,
        hooks: Hooks,
        description: dict[str, Any],
        stop: StopRequest,
    ) -> None:
        self.training = training
        self.source = source
        self.settings = settings
        self.run_dir = run_dir
        self.hooks = hooks
        self.augmentations = augmentations_of(source, hooks.augment, hooks.views, hooks.mix)
        self.description = description
        self.stop = stop
        self.accelerator = training.accelerator
        self.train_step = TrainingStep(training, settings, hooks.weight_perturbation)
        self.watch = StepWatch(training.accelerator)
        self.steps_per_epoch = count_steps(len(source), settings.batch_size, settings.drop_last)
        # Refused here, what does not fit has cost nothing yet.
        self._order(epoch=0)
        self.epoch = 0
        self.step_in_epoch = 0
        self.sums: Sums = {}
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.last_trace: StepTrace | None = None

    @property
    def step(self) -> int:
        """Return the number of completed steps."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def run(self, start: Checkpoint | None) -> FitResult:
        """Train to the end, from the beginning or from a checkpoint."""
        if start is not None:
            self._continue_from(start)
        self.recorder = Recorder(
            self.accelerator,
            self.run_dir,
            trackers=self.settings.trackers,
            num_steps=self.settings.epochs * self.steps_per_epoch,
            num_epochs=self.settings.epochs,
            epoch=self.epoch,
            step=self.step,
            recipe=self.description["recipe"],
        )
        try:
            if start is None:
                self._save()
            stopped = False
            while self.epoch < self.settings.epochs and not stopped:
                stopped = self._run_epoch()
        finally:
            self.recorder.close()
        return self._result(stopped)

    def _continue_from(self, start: Checkpoint) -> None:
        self.sums, self.seconds = restore(self.training, start)
        self.epoch = start.meta["epoch"]
        self.step_in_epoch = start.meta["step_in_epoch"]
        self.best = start.meta["best"]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            clean_checkpoints(self.run_dir, start)

    def _run_epoch(self) -> bool:
        """Run (the rest of) an epoch; return whether to stop."""
        order = self._order(self.epoch)
        plan = epoch_plan(
            len(self.source),
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            epoch=self.epoch,
            order=order,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            accumulation=self.settings.accumulation,
            drop_last=self.settings.drop_last,
        )
        remaining = plan[self.step_in_epoch :]
        self.training.model.train()
        micro_batches = load_batches(
            self.source,
            remaining,
            order,
            first_step=self.step,
            settings=self.settings,
            augmentations=self.augmentations,
            device=self.training.device,
        )
        for _ in remaining:
            started = time.monotonic()
            batches = [next(micro_batches) for _ in range(self.settings.accumulation)]
            verdict = self._run_step(batches)
            self.seconds += time.monotonic() - started
            if verdict is not None and verdict.stop:
                self._save()
                return True
            every = self.settings.checkpoint_every_steps
            if every and self.step % every == 0 and self.step_in_epoch < self.steps_per_epoch:
                self._save()
        self._check(self.watch.flush())
        self._finish_epoch()
        return self.watch.agree(self.stop.requested)

    def _order(self, epoch: int) -> Tensor:
        settings = self.settings
        return source_order(self.source, seed=settings.seed, epoch=epoch, shuffle=settings.shuffle)

    def _run_step(self, batches: list[Batch]) -> Verdict | None:
        epoch, step = self.epoch, self.step
        progress = epoch + self.step_in_epoch / self.steps_per_epoch
        set_rates(
            self.training.optimizer.param_groups,
            progress,
            self.hooks.schedule,
            self.hooks.momentum_schedule,
        )
        first = self.step_in_epoch * self.settings.batch_size
        num_items = min(self.settings.batch_size, len(self.source) - first)
        report = self.train_step.run(batches, epoch=epoch, step=step, num_items=num_items)
        add_sums(self.sums, report.sums)
        self.step_in_epoch += 1
        self._update_average("step")
        self.last_trace = StepTrace(epoch, step, report.batches)
        verdict = self.watch.push(self.last_trace, report.is_finite, self.stop.requested)
        self._check(verdict)
        self.recorder.step_done(epoch, self.step, num_items)
        if self.step % self.settings.record_every_steps == 0:
            row = {"kind": "step", "epoch": epoch, "step": self.step}
            self.recorder.write(row | mean_values(self.accelerator, report.sums) | self._rates())
        return verdict

    def _rates(self) -> dict[str, float]:
        return {"learning_rate": float(self.training.optimizer.param_groups[0]["lr"])}

    def _update_average(self, per: str) -> None:
        average = self.training.average
        skipped = self.accelerator.optimizer_step_was_skipped
        if average is not None and average.settings.per == per and not (per == "step" and skipped):
            average.update(
                self.training.model, self.epoch + self.step_in_epoch / self.steps_per_epoch
            )

    def _check(self, verdict: Verdict | None) -> None:
        if verdict is not None and not verdict.is_finite:
            report_nonfinite(self.accelerator, self.run_dir, verdict.trace, "the loss is")

    def _finish_epoch(self) -> None:
        training, epoch = self.training, self.epoch
        average_batch_norm_buffers(self.accelerator, training.model, training.method_module)
        self._update_average("epoch")
        if training.average is not None:
            average_batch_norm_buffers(self.accelerator, training.average.model)
        training.method.on_epoch_end(epoch)
        means = mean_values(self.accelerator, self.sums)
        row: dict[str, Any] = {
            "kind": "epoch",
            "epoch": epoch,
            "step": self.step,
            "seconds": self.seconds,
            "images_per_second": self._num_images() / max(self.seconds, 1e-9),
            **self._rates(),
            **{f"train_{name}": value for name, value in means.items()},
        }
        if training.method_parameters:
            # Trained beside the model and no part of the result, such as regressors of features.
            row["method_parameters"] = sum(one.numel() for one in training.method_parameters)
        values = self._validate()
        self.recorder.write(row | values)
        self.epoch, self.step_in_epoch, self.sums, self.seconds = epoch + 1, 0, {}, 0.0
        self._save(is_best=self._update_best(values))

    def _num_images(self) -> int:
        return min(len(self.source), self.steps_per_epoch * self.settings.batch_size)

    def _validate(self) -> dict[str, float]:
        is_due = (self.epoch + 1) % self.settings.validate_every == 0
        is_last = self.epoch + 1 == self.settings.epochs
        if self.hooks.validate is None or not (is_due or is_last):
            return {}
        # Validation must not change the trajectory, whatever it draws.
        with preserved_rng(self.training.device):
            values = dict(self.hooks.validate(self.training.evaluated_model))
        self.training.model.train()
        values = {name: float(value) for name, value in values.items()}
        values = dict(from_first(self.accelerator, values))
        if self.settings.best_metric not in (None, *values):
            raise ValueError(
                f"best_metric is {self.settings.best_metric!r}, but validation returned "
                f"{sorted(values)}; choose one of them"
            )
        return values

    def _update_best(self, values: Mapping[str, float]) -> bool:
        metric, mode = self.settings.best_metric, self.settings.best_mode
        if not values or metric is None:
            return False
        value, sign = values[metric], 1 if mode == "max" else -1
        if math.isnan(value) or (self.best and sign * value <= sign * self.best["value"]):
            return False
        self.best = {
            "metric": metric,
            "value": value,
            "epoch": self.epoch,
            "checkpoint": self._checkpoint_name(),
        }
        return True

    def _checkpoint_name(self) -> str:
        return f"step_{self.step:08d}_epoch_{self.epoch:05d}"

    def _save(self, is_best: bool = False) -> None:
        self._check(self.watch.flush())
        training = self.training
        if self.watch.agree(not all_finite(training.model)):
            self._report_bad_weights()
        training.method.consolidate()
        state = capture(training, self.sums, self.seconds)
        failure: str | None = None
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(
                    self.run_dir,
                    self._checkpoint_name(),
                    model=training.model.state_dict(),
                    average=training.average.model.state_dict() if training.average else None,
                    training=state,
                    meta=self._meta(),
                    is_best=is_best,
                    keep_last=self.settings.keep_last,
                )
            except CheckpointError as error:
                failure = str(error)
        failure = from_first(self.accelerator, failure)
        if failure is not None:
            raise CheckpointError(failure)

    def _meta(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "step_in_epoch": self.step_in_epoch, "step": self.step}
        return position | {"best": self.best} | self.description

    def _report_bad_weights(self) -> None:
        if self.last_trace is None:
            raise ValueError(
                "the model's weights are not finite before the first step; check its "
                "initialisation or the file they were loaded from"
            )
        report_nonfinite(self.accelerator, self.run_dir, self.last_trace, "the weights are")

    def _result(self, stopped: bool) -> FitResult:
        root = self.run_dir / "checkpoints"
        best = self.best
        return FitResult(
            run_dir=self.run_dir,
            last_checkpoint=root / self._checkpoint_name(),
            best_checkpoint=root / best["checkpoint"] if best else None,
            best_metric=self.settings.best_metric,
            best_value=best["value"] if best else None,
            epochs_done=self.epoch,
            steps_done=self.step,
            stopped_early=stopped and self.epoch < self.settings.epochs,
        )

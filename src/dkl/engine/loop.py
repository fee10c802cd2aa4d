"""The training loop: one for every method.

The loop owns order, noise, accumulation, precision, processes, schedules, averages, records and
checkpoints; the method owns the loss. Under several processes the model's gradients are averaged by
DistributedDataParallel and the method's by one all-reduce; batch-norm layers take batch statistics
in each process, and their running statistics are averaged over processes at the end of every epoch,
before validation and checkpoint (``LoopSettings.batch_norm``). Models without batch-norm train the
same trajectory however a step is split; with it they do not, because statistics are those of the
split.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dkl.engine.averaging import AverageSettings
from dkl.engine.batches import Augment, Mix
from dkl.engine.randomness import numerics
from dkl.engine.resume import describe_run, find_start
from dkl.engine.run import Hooks, TrainingRun, Validate
from dkl.engine.schedules import Schedule, constant
from dkl.engine.settings import DataSource, FitResult, LoopSettings
from dkl.engine.setup import MakeOptimizer, make_accelerator, set_up
from dkl.engine.step import WeightPerturbation
from dkl.engine.watch import stop_on_signals
from dkl.methods.protocol import Method

logger = logging.getLogger(__name__)


def fit(
    method: Method,
    model: nn.Module,
    train_source: DataSource,
    *,
    settings: LoopSettings,
    out_dir: Path | str,
    make_optimizer: MakeOptimizer,
    schedule: Schedule | None = None,
    momentum_schedule: Schedule | None = None,
    augment: Augment | None = None,
    views: Sequence[Augment] = (),
    mix: Mix | None = None,
    validate: Validate | None = None,
    weight_perturbation: WeightPerturbation | None = None,
    weight_average: AverageSettings | None = None,
    recipe: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> FitResult:
    """Train a model with a method.

    Model and method are trained in place, on the device that Accelerate chooses. The folder gets
    ``records.jsonl``, ``checkpoints/`` and what the trackers write. A checkpoint is written before
    the first step, at the end of every epoch, every ``checkpoint_every_steps`` steps, and when
    SIGTERM or SIGINT ends the run after the step at hand. With ``resume`` a run continues from its
    last checkpoint, on the CPU bit for bit. The global random generators are seeded with the seed.

    Args:
        method: what to minimise; an ``nn.Module``.
        model: images [B, C, H, W] to logits [B, num_classes].
        train_source: training data.
        settings: of the loop.
        out_dir: folder of the run.
        make_optimizer: builds the optimiser from the trainable parameters of model and method;
            with ``settings.decay_batch_norm=False`` from two groups of them.
        schedule: factor of the learning rate by progress in epochs; constant by default.
        momentum_schedule: momentum (the first beta of Adam) by progress in epochs.
        augment: images [B, C, H, W] in [0, 1] and noise to images; on the training device.
        views: further augmentations; each makes of the same images, with noise of its own, the
            ``view_1``, ``view_2``, ... of ``Batch.extras``.
        mix: mixes every augmented image with another sample of the epoch, drawn uniformly and
            augmented by noise of its own (CutMix): (images, partners, noise) to mixed images and
            the share of the first in each. ``Batch.targets`` says how labels are shared. Views are
            not mixed. Training accuracy is then the share of the predicted class.
        validate: model to named values, such as {"val_accuracy": 0.9}, of data held out of
            training. It is called in every process and gets the averaged model if there is one.
        weight_perturbation: perturbs the weights during the update (AWP).
        weight_average: keep averaged weights.
        recipe: the resolved recipe, JSON values; kept in checkpoints and compared on resume.
        resume: continue the run in ``out_dir``.

    Returns:
        Where the run ended.

    Raises:
        ResumeError: if there is nothing to resume, the run was started differently, or a run is
            already there and ``resume`` is False.
        CheckpointError: if a checkpoint cannot be written or read.
        NonFiniteLossError: if loss or weights become NaN or infinite.
        ValueError: if data or settings do not fit.
    """
    run_dir = Path(out_dir)
    hooks = Hooks(
        schedule or constant(),
        momentum_schedule,
        augment,
        validate,
        weight_perturbation,
        tuple(views),
        mix,
    )
    accelerator = make_accelerator(settings)
    description = describe_run(
        settings, recipe, world_size=accelerator.num_processes, num_samples=len(train_source)
    )
    start = find_start(run_dir, description, resume=resume)
    accelerator.wait_for_everyone()
    if method.couples_batch and accelerator.num_processes * settings.accumulation > 1:
        logger.warning(
            "%s couples the samples of a micro-batch: split into %d, a step differs from a whole",
            type(method).__name__,
            accelerator.num_processes * settings.accumulation,
        )
    with numerics(settings.deterministic), stop_on_signals() as stop:
        training = set_up(accelerator, method, model, settings, make_optimizer, weight_average)
        try:
            run = TrainingRun(training, train_source, settings, run_dir, hooks, description, stop)
            return run.run(start)
        finally:
            if settings.compile_model:
                model._compiled_call_impl = None

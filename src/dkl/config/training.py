"""Sections ``training``, ``optimizer``, ``schedule``, ``weight_perturbation``, ``averaging``."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dkl.config.base import (
    Count,
    CountOrZero,
    NonNegativeNumber,
    Number,
    PositiveNumber,
    Problem,
    Section,
)

Fraction = Annotated[Number, Field(ge=0, lt=1)]
OpenFraction = Annotated[Number, Field(gt=0, lt=1)]


def _no_is_a_word(value: object) -> object:
    """Undo YAML's reading of an unquoted ``no`` as false."""
    return "no" if value is False else value


MixedPrecision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no_is_a_word)]


class TrainingSettings(Section):
    """How long and in what numbers training runs.

    Args:
        epochs: passes over the training data.
        batch_size: samples of one optimiser step, over all processes and micro-batches.
        accumulation: micro-batches that one optimiser step is cut into.
        drop_last: leave out the last, smaller batch of an epoch.
        mixed_precision: autocast of the forward pass.
        channels_last: memory format of model and images.
        compile: run the model through ``torch.compile``.
        clip_norm: bound of the gradient's norm; null means none.
        deterministic: ask torch for deterministic kernels.
        checkpoint_every_steps: save inside epochs as well; null means after each epoch only.
        validate_every: epochs between validations.
        best_metric: what the best checkpoint maximises on the validation split; null keeps the
            last checkpoint only.
        batch_norm_momentum: momentum of all batch-norm layers; null keeps the model's own.
        batch_norm_first_momentum: another one for the very first step; DM-AT takes 1.
        decay_batch_norm: weight decay also for the scales and shifts of batch-norm layers.
        dtype: of weights and images; "float64" is for tests.
        threads: CPU threads; null leaves it to torch.
    """

    epochs: Count
    batch_size: Count = 128
    accumulation: Count = 1
    drop_last: bool = False
    mixed_precision: MixedPrecision = "no"
    channels_last: bool = False
    compile: bool = False
    clip_norm: PositiveNumber | None = None
    deterministic: bool = True
    checkpoint_every_steps: Count | None = None
    validate_every: Count = 1
    best_metric: Literal["val_accuracy", "val_robust_accuracy"] | None = "val_accuracy"
    batch_norm_momentum: Annotated[Number, Field(gt=0, le=1)] | None = None
    batch_norm_first_momentum: Annotated[Number, Field(gt=0, le=1)] | None = None
    decay_batch_norm: bool = True
    dtype: Literal["float32", "float64"] = "float32"
    threads: Count | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.batch_size % self.accumulation:
            yield (
                "accumulation",
                f"must divide training.batch_size ({self.batch_size}), "
                "which is cut into equal micro-batches",
            )
        if self.dtype == "float64" and self.mixed_precision != "no":
            yield "mixed_precision", 'must be "no" with dtype float64'
        if self.best_metric is not None and self.validate_every > self.epochs:
            yield (
                "validate_every",
                f"must be at most training.epochs ({self.epochs}), or nothing is ever validated; "
                "or set training.best_metric=null",
            )


class SGD(Section):
    """Stochastic gradient descent."""

    kind: Literal["sgd"]
    lr: PositiveNumber
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeNumber = 5e-4
    hints: ClassVar = {"betas": "belongs to kind adamw; sgd has momentum"}

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.nesterov and self.momentum == 0:
            yield "nesterov", "needs momentum > 0"


class AdamW(Section):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"]
    lr: PositiveNumber
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    weight_decay: NonNegativeNumber = 1e-2
    hints: ClassVar = {"momentum": "belongs to kind sgd; adamw has betas"}


class Lamb(Section):
    """Adam with the step of each layer in proportion to its weights (You et al. 2020), of timm.

    Args:
        lr: the learning rate.
        betas: of the moving averages.
        eps: added to the root of the second moment.
        weight_decay: inside the step that is scaled.
        max_grad_norm: bound of the gradient's norm, over all parameters; null means none.
    """

    kind: Literal["lamb"]
    lr: PositiveNumber
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveNumber = 1e-6
    weight_decay: NonNegativeNumber = 0.02
    max_grad_norm: PositiveNumber | None = 1.0
    hints: ClassVar = {"momentum": "belongs to kind sgd; lamb has betas"}


OptimizerSettings = Annotated[SGD | AdamW | Lamb, Field(discriminator="kind")]


class _Schedule(Section):
    """What schedules share.

    Args:
        per_epoch: change the learning rate between epochs only, not at each step.
        warmup_epochs: epochs (or parts of one) of linear growth from zero.
    """

    per_epoch: bool = False
    warmup_epochs: NonNegativeNumber = 0.0


class Cosine(_Schedule):
    """Half a cosine, from the full learning rate down to zero.

    With ``per_epoch`` as published for IKL-AT: (1 + cos(pi e / (E + 1))) / 2 in epoch e = 1..E.

    Args:
        from_full: (1 + cos(pi (e - 1) / E)) / 2 instead, as published for DAJAT and TRADES.
        after_warmup: the cosine begins where the warm-up of W epochs ends; with ``per_epoch`` as
            published for ImageNet-LT: e / W in epoch e = 1..W, then the cosine of E - W epochs.
    """

    kind: Literal["cosine"]
    from_full: bool = False
    after_warmup: bool = False

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if self.after_warmup and self.warmup_epochs == 0:
            yield "after_warmup", "would be ignored: warmup_epochs is 0; set it, or this one false"


class Step(_Schedule):
    """The learning rate is multiplied by ``factor`` at each epoch of ``milestones``.

    Args:
        milestones: epochs, or parts of one, counted from 0.
        factor: what each multiplies by.
        first_epoch_factor: of the first epoch alone; LBGAT starts with 0.2.
    """

    kind: Literal["step"]
    milestones: Annotated[tuple[PositiveNumber, ...], Field(strict=False, min_length=1)]
    factor: OpenFraction = 0.1
    first_epoch_factor: Annotated[Number, Field(gt=0, le=1)] = 1.0

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        if list(self.milestones) != sorted(set(self.milestones)):
            yield "milestones", "must be epochs in increasing order"


class OneCycle(Section):
    """Up to the full learning rate for ``pct_start`` of training, then down, along cosines.

    Args:
        pct_start: share of training spent going up.
        div: starts at the learning rate divided by this.
        final_div: ends at the starting rate divided by this.
        per_epoch: change the learning rate between epochs only, stepped as torch's OneCycleLR.
        cycle_momentum: the momentum goes from 0.95 to 0.85 and back, in the place of the
            optimiser's, as torch's OneCycleLR does by default.
    """

    kind: Literal["one_cycle"]
    pct_start: OpenFraction = 0.3
    div: Annotated[Number, Field(ge=1)] = 25.0
    final_div: Annotated[Number, Field(ge=1)] = 1e4
    per_epoch: bool = False
    cycle_momentum: bool = False
    hints: ClassVar = {
        "warmup_epochs": "one_cycle warms up by itself; set schedule.pct_start instead",
    }


class Constant(_Schedule):
    """The same learning rate throughout, after the warm-up."""

    kind: Literal["constant"]


ScheduleSettings = Annotated[Cosine | Step | OneCycle | Constant, Field(discriminator="kind")]


class WeightPerturbationSettings(Section):
    """Adversarial weight perturbation (AWP).

    Args:
        gamma: length of the perturbation relative to each weight tensor.
        start_epoch: first (0-based) epoch in which weights are perturbed.
        step_inside: the optimiser steps at the perturbed weights, as the authors do.
    """

    gamma: NonNegativeNumber = 0.005
    start_epoch: CountOrZero = 0
    step_inside: bool = True


class AveragingSettings(Section):
    """Exponential moving average of the weights; validated and evaluated in their place.

    Args:
        decay: share of the old average kept by an update.
        per: update after each optimiser step or after each epoch.
        start_epoch: epochs (or parts of one) during which the average simply follows the weights.
        ramp: use min(decay, (1 + d) / (10 + d)) at the d-th update, so that early weights are
            forgotten quickly.
        buffers: batch-norm buffers are averaged too, or copied from the model.
    """

    decay: Fraction = 0.999
    per: Literal["step", "epoch"] = "step"
    start_epoch: NonNegativeNumber = 0.0
    ramp: bool = False
    buffers: Literal["average", "copy"] = "average"

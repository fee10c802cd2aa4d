"""What the training loop and a method say to each other.

A step of the loop is: ``prepare`` every micro-batch once (attacks happen here, no parameter
gradients), then ``loss`` on what was prepared, once for the update and once more before it when the
weights are perturbed (AWP). Everything random is drawn from ``StepContext.draw``, which is keyed by
seed, step and sample, so that batches may be split over processes and accumulation steps without
changing a trajectory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

Draw = Callable[[int], Tensor]
"""``draw(k)`` gives fresh uniform numbers in [0, 1) of shape [B, k], one row per sample."""


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch, on the training device.

    Args:
        images: [B, C, H, W] floats in [0, 1], augmented.
        labels: [B] int64.
        mask: [B] bool; False marks a padded duplicate, which must not count anywhere.
        indices: [B] int64, positions in the training data.
        extras: further tensors with a first dimension of B: ``view_1``, ``view_2``, ... from the
            loop (the same images, augmented otherwise), and what ``Method.prepare`` adds
            (adversarial images, teacher logits).
        targets: [B, num_classes] label distributions where augmentation mixes images (CutMix),
            else None; ``labels`` then holds the label of the image that was mixed into.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor
    indices: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None


@dataclass(frozen=True)
class StepContext:
    """Where training stands, and what a loss needs to be exact over a whole optimiser step.

    Args:
        epoch: 0-based epoch.
        num_epochs: epochs of the whole run.
        step: 0-based optimiser step of the whole run.
        num_items: 0-dim tensor; samples that count in this optimiser step, over all micro-batches
            and processes. Losses divide by it.
        step_labels: [M] labels of exactly those samples, the same on every process.
        loss_scale: multiply the loss by it (the number of processes, because gradients are averaged
            over processes).
        draw: noise for the samples of the batch at hand.
        learning_rate: of this step; methods that train a network by themselves follow it.
        rate_factor: the learning rate over its base value.
        phase: "update" for the pass whose gradients are used; "direction" for the pass that only
            finds the weight perturbation: running state must not change in it.
    """

    epoch: int
    num_epochs: int
    step: int
    num_items: Tensor
    step_labels: Tensor
    loss_scale: float
    draw: Draw
    learning_rate: float = 0.0
    rate_factor: float = 1.0
    phase: Literal["update", "direction"] = "update"


@dataclass(frozen=True)
class StepOutput:
    """What a method returns for one micro-batch.

    Args:
        loss: 0-dim; the share of this micro-batch in the loss of the whole step, times
            ``context.loss_scale``: micro-batch gradients add up to the step's gradient.
        logits: [B, C] of the clean images, detached; for training accuracy.
        parts: named 0-dim detached sums over the rows that count, for the records ("loss" among
            them); the loop divides by ``counts``.
        counts: 0-dim; the rows that count in this micro-batch.
    """

    loss: Tensor
    logits: Tensor
    parts: Mapping[str, Tensor]
    counts: Tensor


class Method(Protocol):
    """A training method: an ``nn.Module`` whose buffers and submodules are its saved state.

    Its parameters that require gradients are trained by the loop's optimiser together with the
    model's (LBGAT's second network). A network that a method trains by itself (LAS-AT's strategy
    network) keeps ``requires_grad`` False between its own steps, and its optimiser's state in
    buffers.

    ``couples_batch`` is True when a sample's loss depends on which samples share its micro-batch,
    so that splitting a batch changes the result. ``on_epoch_end`` is called by every process after
    the last step of an epoch (collectives are allowed), ``consolidate`` before a checkpoint.
    """

    @property
    def couples_batch(self) -> bool:
        """Whether a sample's loss depends on its micro-batch."""

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Return the batch with what ``loss`` needs (attack, teacher); no parameter gradients."""

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the loss of one prepared micro-batch."""

    def on_epoch_end(self, epoch: int) -> None:
        """Commit what was collected during the epoch."""

    def consolidate(self) -> None:
        """Gather per-process state on the first process; collective, changes no total."""

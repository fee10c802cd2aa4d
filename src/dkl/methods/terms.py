"""Pieces that several methods share: exact normalisation over a step, and the frozen teacher."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.attacks import BatchNormMode, attack_mode
from dkl.losses import ClassStatistics, gkl_loss, ikl_loss
from dkl.losses.formula import class_weights
from dkl.losses.row_kernel import RowWeights
from dkl.losses.rows import compute_dtype
from dkl.methods.protocol import Batch, StepContext, StepOutput

HardLoss = Literal["ce", "bce"]
"""A loss against the labels; see ``hard_loss_of``."""


def labels_of(batch: Batch) -> Tensor:
    """Return the label distributions [B, C] of a batch that has them (CutMix), else labels [B]."""
    return batch.labels if batch.targets is None else batch.targets


def label_cross_entropy(logits_BC: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each row with labels [B] or label distributions [B, C].

    Label smoothing is torch's: the share is spread over all classes, those of the label included,
    and distributions are mixed with it.
    """
    wide_BC = logits_BC.to(compute_dtype(logits_BC))
    if labels.is_floating_point():
        labels = labels.to(wide_BC.dtype)
    return F.cross_entropy(wide_BC, labels, reduction="none", label_smoothing=label_smoothing)


def hard_cross_entropy(
    logits_BC: Tensor, batch: Batch, context: StepContext, label_smoothing: float = 0.0
) -> Tensor:
    """Return the share of this micro-batch in the step's mean cross-entropy with the labels.

    Label distributions (``batch.targets``) are used where there are any.
    """
    # Filled before any arithmetic: zero times NaN would be NaN in the gradient.
    counted_BC = logits_BC.masked_fill(~batch.mask[:, None], 0.0)
    values_B = label_cross_entropy(counted_BC, labels_of(batch), label_smoothing)
    return values_B.masked_fill(~batch.mask, 0.0).sum() / context.num_items


def hard_loss_of(logits_BC: Tensor, batch: Batch, context: StepContext, kind: HardLoss) -> Tensor:
    """Return the share of this micro-batch in the step's mean loss against the labels.

    Args:
        logits_BC: of the student.
        batch: its labels or label distributions.
        context: of the step.
        kind: "ce", cross-entropy; "bce", binary cross-entropies of all classes, their mean, as in
            timm's recipes (Wightman et al. 2021, "ResNet strikes back").
    """
    if kind == "ce":
        return hard_cross_entropy(logits_BC, batch, context)
    labels, dtype = labels_of(batch), compute_dtype(logits_BC)
    if not labels.is_floating_point():
        labels = F.one_hot(labels.clamp(min=0), logits_BC.shape[1])
    counted_BC = logits_BC.to(dtype).masked_fill(~batch.mask[:, None], 0.0)
    values_BC = F.binary_cross_entropy_with_logits(counted_BC, labels.to(dtype), reduction="none")
    return values_BC.mean(1).masked_fill(~batch.mask, 0.0).sum() / context.num_items


def warmup_factor(context: StepContext, num_epochs: int) -> float:
    """Return min((epoch + 1) / num_epochs, 1), by which the teacher's terms grow; 1 without any."""
    return min((context.epoch + 1) / max(num_epochs, 1), 1.0)


def smoothing_in(context: StepContext, label_smoothing: float, smooth_direction: bool) -> float:
    """Return the label smoothing of this pass: none in AWP's direction pass unless it has it."""
    return label_smoothing if smooth_direction or context.phase == "update" else 0.0


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless the share is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), such as 0.1; got {label_smoothing}")


def step_output(
    terms: Mapping[str, Tensor], logits_BC: Tensor, batch: Batch, context: StepContext
) -> StepOutput:
    """Add up the terms (each a share of the step's mean) into what the loop expects."""
    loss = torch.stack([*terms.values()]).sum()
    parts = {"loss": loss.detach() * context.num_items}
    if len(terms) > 1:
        parts |= {name: term.detach() * context.num_items for name, term in terms.items()}
    return StepOutput(loss * context.loss_scale, logits_BC.detach(), parts, batch.mask.sum())


class DecoupledTerm(nn.Module):
    """The IKL or GKL loss of a training step, with its class table, exact when a step is split.

    Where labels are mixed (``batch.targets``) a sample's weights are the mixture of its classes'
    rows, and the class statistics take it in by shares. GKL with a class table refuses such labels:
    its denominator would need those of the whole step.

    Args:
        num_classes: C.
        class_weights: weigh by the class table (GI); False: by softmax(target).
        weight_temperature: tau > 0 of the table, or of softmax(target).
        gamma: None for the IKL loss, else the GKL loss with this power.
        options: weights, temperature, break_asymmetry of the loss.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_weights: bool = True,
        weight_temperature: float = 1.0,
        gamma: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.statistics = (
            ClassStatistics(num_classes, weight_temperature) if class_weights else None
        )
        self.gamma = gamma
        self.weight_temperature = weight_temperature
        self.options = options

    @property
    def couples_batch(self) -> bool:
        """GKL's denominator is known for a whole step only when weights follow from labels."""
        return self.gamma is not None and self.statistics is None

    def forward(
        self, input_BC: Tensor, target_BC: Tensor, batch: Batch, context: StepContext
    ) -> Tensor:
        """Return the share of this micro-batch in the step's loss."""
        options = {
            **self.options,
            **self.weight_source(labels_of(batch)),
            "mask": batch.mask,
            "num_items": context.num_items,
        }
        if self.gamma is None:
            ikl: Tensor = ikl_loss(input_BC, target_BC, **options)
            return ikl
        denominator = self._denominator(target_BC, batch, context)
        gkl: Tensor = gkl_loss(
            input_BC, target_BC, gamma=self.gamma, denominator=denominator, **options
        )
        return gkl

    def weight_source(self, labels: Tensor) -> dict[str, Any]:
        """Return the options of the loss that say where its weights come from.

        Args:
            labels: [B], or [B, C] distributions, whose weights are mixtures of the table's rows.
        """
        if self.statistics is None:
            return {"weight_temperature": self.weight_temperature}
        if labels.is_floating_point():
            return {"class_probs": self.statistics.rows(labels)}
        return {"class_table": self.statistics.table, "labels": labels}

    def _denominator(self, target_BC: Tensor, batch: Batch, context: StepContext) -> Tensor:
        """Return D of the whole step (class table), or this micro-batch's D scaled up to it."""
        gamma = 1.0 if self.gamma is None else self.gamma
        if self.statistics is not None:
            if batch.targets is not None:
                raise ValueError(
                    "GKL with a class table needs one label per image, because its denominator is "
                    "made from the labels of the whole step; this batch has mixed labels (CutMix). "
                    "Leave CutMix out, use IKL (gamma=None), or class_weights=False"
                )
            weights_C = self.statistics.table.pow(gamma).sum(1)
            return weights_C[context.step_labels].square().sum()
        rows_BC = target_BC.detach().to(compute_dtype(target_BC))
        weights_B = class_weights(rows_BC, RowWeights(), None, self.weight_temperature, gamma).sum(
            1
        )
        weight_sum = weights_B.masked_fill(~batch.mask, 0.0).square().sum()
        share = batch.mask.sum().clamp(min=1) / context.num_items
        return weight_sum.clamp(min=torch.finfo(weight_sum.dtype).tiny) / share

    def observe(self, target_BC: Tensor, batch: Batch, context: StepContext) -> None:
        """Add the reference's predictions to the class statistics, once per step."""
        if self.statistics is not None and context.phase == "update":
            self.statistics.update(target_BC, labels_of(batch), batch.mask)

    def commit(self) -> None:
        """Publish the epoch's class table; collective."""
        if self.statistics is not None:
            self.statistics.commit()

    def consolidate(self) -> None:
        """Gather running sums on the first process; collective."""
        if self.statistics is not None:
            self.statistics.consolidate()


class TrainingMethod(nn.Module):
    """What the methods of this package share; the protocol asks for no base class.

    Args:
        term: the decoupled loss inside the method's loss, if there is one; its class table is
            committed at the end of every epoch.
    """

    def __init__(self, term: DecoupledTerm | None = None) -> None:
        super().__init__()
        self.term = term

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of a sample depends on its micro-batch."""
        return self.term is not None and self.term.couples_batch

    def on_epoch_end(self, epoch: int) -> None:  # noqa: ARG002
        """Commit the class table; collective."""
        if self.term is not None:
            self.term.commit()

    def consolidate(self) -> None:
        """Gather the class statistics on the first process; collective."""
        if self.term is not None:
            self.term.consolidate()


class FrozenTeacher(nn.Module):
    """A teacher that stays in eval mode, gets no gradients and is no part of a saved state.

    The recipe names the teacher, so no checkpoint copies its weights: it is not registered as a
    submodule, and only follows when the method moves to a device or dtype.

    Args:
        model: the trained teacher; images in [0, 1] in, logits [B, C] out.

    Example:
        >>> teacher = FrozenTeacher(nn.Linear(4, 3)).train()
        >>> teacher.model.training, teacher(torch.zeros(2, 4)).requires_grad, teacher.state_dict()
        (False, False, OrderedDict())
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model.eval().requires_grad_(False))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the teacher's logits."""
        logits: Tensor = self.model(images)
        return logits

    def answers(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``teacher_logits`` [B, C] of the batch's images."""
        return {"teacher_logits": self(batch.images)}

    @torch.no_grad()
    def read(
        self, images: Tensor, read: Callable[[nn.Module, Tensor], Any], mode: BatchNormMode = "eval"
    ) -> Any:
        """Return what ``read(teacher, images)`` returns.

        Args:
            images: [B, C, H, W].
            read: reads features of a network.
            mode: "batch-stats" lets batch-norm layers normalise by the batch and remember nothing.
        """
        with attack_mode(self.model, mode):
            return read(self.model, images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenTeacher":
        # What .to(), .double() and .cuda() call.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

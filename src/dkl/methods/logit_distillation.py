"""Distillation on logits: KD, JSD, DKD, DIST, IKL-KD and GKL-KD as settings of one method.

Shapes: B samples, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dkl.losses import dist_loss, dkd_loss, jsd_loss, kl_loss
from dkl.methods.cached_teacher import CachedTeacher, CachedTopKTeacher
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import (
    DecoupledTerm,
    FrozenTeacher,
    HardLoss,
    TrainingMethod,
    hard_loss_of,
    step_output,
    warmup_factor,
)

SoftTerm = Callable[[Tensor, Tensor, Batch, StepContext], Tensor]
"""(student_BC, teacher_BC, batch, context) -> share of the micro-batch in the soft loss."""


class LogitDistillation(TrainingMethod):
    """Train a student on labels and on a fixed teacher's logits for the same augmented images.

    Args:
        teacher: a trained model, which stays in eval mode and gets no gradients; or its cached
            answers.
        soft: the loss against the teacher's logits.
        hard_weight: weight of the loss against the labels.
        hard_loss: that loss, "ce" or "bce"; see ``hard_loss_of``.
        warmup_epochs: the soft loss grows linearly to its full weight at this epoch; 0: at once.
        term: the decoupled loss inside ``soft`` when there is one; its class table is fed with the
            teacher's logits.
        couples_samples: whether ``soft`` compares samples of a micro-batch with each other.
    """

    def __init__(
        self,
        teacher: nn.Module,
        soft: SoftTerm,
        *,
        hard_weight: float = 1.0,
        hard_loss: HardLoss = "ce",
        warmup_epochs: int = 0,
        term: DecoupledTerm | None = None,
        couples_samples: bool = False,
    ) -> None:
        super().__init__(term)
        self.teacher: FrozenTeacher | CachedTeacher | CachedTopKTeacher = (
            teacher
            if isinstance(teacher, CachedTeacher | CachedTopKTeacher)
            else FrozenTeacher(teacher)
        )
        self.soft = soft
        self.hard_weight = hard_weight
        self.hard_loss = hard_loss
        self.warmup_epochs = warmup_epochs
        self.couples_samples = couples_samples

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of a sample depends on its micro-batch."""
        return self.couples_samples or super().couples_batch

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:  # noqa: ARG002
        """Ask the teacher."""
        answers = self.teacher.answers(batch, context)
        return replace(batch, extras={**batch.extras, **answers})

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return hard and soft loss, and feed the class statistics on the update pass."""
        student_BC = model(batch.images)
        teacher_BC = batch.extras["teacher_logits"]
        hard = hard_loss_of(student_BC, batch, context, self.hard_loss)
        soft = self.soft(student_BC, teacher_BC, batch, context)
        terms = {
            f"hard_{self.hard_loss}": self.hard_weight * hard,
            "soft": warmup_factor(context, self.warmup_epochs) * soft,
        }
        if self.term is not None:
            self.term.observe(teacher_BC, batch, context)
        return step_output(terms, student_BC, batch, context)


def kd(
    teacher: nn.Module,
    *,
    temperature: float = 4.0,
    hard_weight: float = 0.1,
    soft_weight: float = 0.9,
    **options: Any,
) -> LogitDistillation:
    """Build knowledge distillation: hard loss + soft_weight T^2 KL(teacher, student) (Hinton 2015).

    Args:
        teacher: a trained model with the student's classes.
        temperature: T > 0 of both softmaxes; the factor T^2 is applied here.
        hard_weight: weight of the loss against the labels.
        soft_weight: weight of T^2 KL.
        options: ``hard_loss`` and ``warmup_epochs`` of ``LogitDistillation``.

    Returns:
        The method.
    """
    soft = _scaled(kl_loss, soft_weight, temperature)
    return LogitDistillation(teacher, soft, hard_weight=hard_weight, **options)


def jsd_kd(
    teacher: nn.Module, *, temperature: float = 1.0, weight: float = 1.0, **options: Any
) -> LogitDistillation:
    """Build distillation by the Jensen-Shannon divergence: hard loss + weight T^2 JSD.

    A baseline of the paper's table 18 (Cui et al. 2024), there with T = 1.

    Args:
        teacher: a trained model with the student's classes.
        temperature: T > 0 of both softmaxes; the factor T^2 is applied here.
        weight: weight of T^2 JSD.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``LogitDistillation``.

    Returns:
        The method.
    """
    return LogitDistillation(teacher, _scaled(jsd_loss, weight, temperature), **options)


def _scaled(divergence: Callable[..., Tensor], weight: float, temperature: float) -> SoftTerm:
    """Return weight T^2 times a divergence of softmaxes at temperature T, as a soft term."""

    def soft(student_BC: Tensor, teacher_BC: Tensor, batch: Batch, context: StepContext) -> Tensor:
        total = divergence(
            student_BC, teacher_BC, temperature=temperature, mask=batch.mask, reduction="sum"
        )
        return weight * temperature**2 * total / context.num_items

    return soft


def dkd(
    teacher: nn.Module,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    **options: Any,
) -> LogitDistillation:
    """Build decoupled knowledge distillation: hard loss + T^2 DKD (Zhao et al., CVPR 2022).

    Args:
        teacher: a trained model with the student's classes.
        alpha: weight >= 0 of the label against the rest.
        beta: weight >= 0 of the other classes among themselves; published: 2 to 8 by pair.
        temperature: T > 0 of both softmaxes; the factor T^2 is applied here.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` (published: 20) of
            ``LogitDistillation``.

    Returns:
        The method; it needs plain labels, not mixed ones.
    """

    def soft(student_BC: Tensor, teacher_BC: Tensor, batch: Batch, context: StepContext) -> Tensor:
        if batch.targets is not None:
            raise ValueError(
                "DKD tells the label from the other classes, so it needs one label per image; this "
                "batch has mixed labels: leave mixup and CutMix out, or use kd"
            )
        value = dkd_loss(
            student_BC,
            teacher_BC,
            batch.labels,
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            mask=batch.mask,
            num_items=context.num_items,
        )
        return temperature**2 * value

    return LogitDistillation(teacher, soft, **options)


def dist(
    teacher: nn.Module,
    *,
    weight: float = 2.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    **options: Any,
) -> LogitDistillation:
    """Build DIST: hard loss + weight T^2 DIST (Huang et al., NeurIPS 2022).

    Its intra-class term correlates the samples of a micro-batch, so splitting a batch changes it.

    Args:
        teacher: a trained model with the student's classes.
        weight: weight of T^2 DIST; published: 2 on CIFAR and ImageNet.
        beta: weight >= 0 of the correlation between classes.
        gamma: weight >= 0 of the correlation between samples.
        temperature: T > 0 of both softmaxes; the factor T^2 is applied here.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``LogitDistillation``.

    Returns:
        The method.
    """

    def soft(student_BC: Tensor, teacher_BC: Tensor, batch: Batch, context: StepContext) -> Tensor:
        value = dist_loss(
            student_BC,
            teacher_BC,
            beta=beta,
            gamma=gamma,
            temperature=temperature,
            mask=batch.mask,
            num_items=context.num_items,
        )
        return weight * temperature**2 * value

    return LogitDistillation(teacher, soft, couples_samples=gamma > 0, **options)


def ikl_kd(
    teacher: nn.Module,
    num_classes: int,
    *,
    hard_weight: float = 1.0,
    hard_loss: HardLoss = "ce",
    warmup_epochs: int = 0,
    class_weights: bool = True,
    weight_temperature: float = 1.0,
    gamma: float | None = None,
    **options: Any,
) -> LogitDistillation:
    """Build IKL-KD: hard loss + IKL(target = teacher, input = student); GKL-KD with gamma.

    Args:
        teacher: a trained model with the student's classes.
        num_classes: C.
        hard_weight: weight of the loss against the labels.
        hard_loss: that loss, "ce" or "bce"; see ``hard_loss_of``.
        warmup_epochs: linear warm-up of the soft loss (published for CIFAR: 20).
        class_weights: class-wise global information (GI); False: weights softmax(teacher / tau), as
            in the released CIFAR settings, with tau = 100.
        weight_temperature: tau of the table or of the teacher's softmax.
        gamma: power of the weights (GKL); None for IKL.
        options: ``mse_weight``, ``ce_weight``, ``temperature`` of the loss. No factor T^2.

    Returns:
        The method; its class table is ``method.term.statistics``.
    """
    term = DecoupledTerm(
        num_classes,
        class_weights=class_weights,
        weight_temperature=weight_temperature,
        gamma=gamma,
        **options,
    )
    return LogitDistillation(
        teacher,
        term,
        hard_weight=hard_weight,
        hard_loss=hard_loss,
        warmup_epochs=warmup_epochs,
        term=term,
    )

"""Distillation on logits: KD, IKL-KD and GKL-KD as settings of one method.

Shapes: B samples, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dkl.losses import kl_loss
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import (
    DecoupledTerm,
    FrozenTeacher,
    TrainingMethod,
    hard_cross_entropy,
    step_output,
)

SoftTerm = Callable[[Tensor, Tensor, Batch, StepContext], Tensor]
"""(student_BC, teacher_BC, batch, context) -> share of the micro-batch in the soft loss."""


class LogitDistillation(TrainingMethod):
    """Train a student on labels and on a fixed teacher's logits for the same augmented images.

    Args:
        teacher: a trained model; it stays in eval mode and gets no gradients.
        soft: the loss against the teacher's logits.
        hard_weight: weight of the cross-entropy with the labels.
        warmup_epochs: the soft loss grows linearly to its full weight at this epoch; 0: at once.
        term: the decoupled loss inside ``soft`` when there is one; its class table is fed with the
            teacher's logits.
    """

    def __init__(
        self,
        teacher: nn.Module,
        soft: SoftTerm,
        *,
        hard_weight: float = 1.0,
        warmup_epochs: int = 0,
        term: DecoupledTerm | None = None,
    ) -> None:
        super().__init__(term)
        self.teacher = FrozenTeacher(teacher)
        self.soft = soft
        self.hard_weight = hard_weight
        self.warmup_epochs = warmup_epochs

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:  # noqa: ARG002
        """Ask the teacher."""
        logits_BC = self.teacher(batch.images)
        return replace(batch, extras={**batch.extras, "teacher_logits": logits_BC})

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return hard and soft loss, and feed the class statistics on the update pass."""
        student_BC = model(batch.images)
        teacher_BC = batch.extras["teacher_logits"]
        warmup = min((context.epoch + 1) / max(self.warmup_epochs, 1), 1.0)
        terms = {
            "hard_ce": self.hard_weight * hard_cross_entropy(student_BC, batch, context),
            "soft": warmup * self.soft(student_BC, teacher_BC, batch, context),
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
) -> LogitDistillation:
    """Build knowledge distillation: hard CE + soft_weight T^2 KL(teacher, student) (Hinton 2015).

    Args:
        teacher: a trained model with the student's classes.
        temperature: T > 0 of both softmaxes; the factor T^2 is applied here.
        hard_weight: weight of the cross-entropy with the labels.
        soft_weight: weight of T^2 KL.

    Returns:
        The method.
    """

    def soft(student_BC: Tensor, teacher_BC: Tensor, batch: Batch, context: StepContext) -> Tensor:
        divergence = kl_loss(
            student_BC, teacher_BC, temperature=temperature, mask=batch.mask, reduction="sum"
        )
        return soft_weight * temperature**2 * divergence / context.num_items

    return LogitDistillation(teacher, soft, hard_weight=hard_weight)


def ikl_kd(
    teacher: nn.Module,
    num_classes: int,
    *,
    hard_weight: float = 1.0,
    warmup_epochs: int = 0,
    class_weights: bool = True,
    weight_temperature: float = 1.0,
    gamma: float | None = None,
    **options: Any,
) -> LogitDistillation:
    """Build IKL-KD: CE + IKL(target = teacher, input = student); GKL-KD with gamma.

    Args:
        teacher: a trained model with the student's classes.
        num_classes: C.
        hard_weight: weight of the cross-entropy with the labels.
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
        teacher, term, hard_weight=hard_weight, warmup_epochs=warmup_epochs, term=term
    )
